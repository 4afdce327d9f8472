"""What a config asks for, as orders and rules over some candidates."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from datastore.errors import SettingError
from less.selection.budget import Budget, num_to_select
from less.selection.candidates import Candidates, Scores
from less.selection.config import Amount, SelectConfig
from less.selection.orders import LabelOrder, Turns, queue_by_score
from less.selection.rules import Away, Caps, ExactDuplicates, Rule, code_of
from less.selection.walk import Order

__all__ = ["Job", "Plan", "Quota", "budget_of"]

FirstRows = Callable[[int], tuple[NDArray[np.int64], NDArray[np.int64]] | None]


@dataclass(frozen=True)
class Plan:
    """An order, and what its turns mean."""

    order: Order
    reasons: Sequence[str]
    """Why a row is taken: by the number of its turn or, with `by_column`, by the column of its score."""
    by_column: bool = False
    """See `reasons`."""
    columns: Sequence[Sequence[int]] | None = None
    """The columns that each turn ranks by; None for all, whatever the turn."""
    first: FirstRows = lambda count: None
    """The first `count` rows and their turns where no rule forbids any; None where rows can only be had one by one."""


@dataclass(frozen=True)
class Quota:
    """At least so much of one value."""

    name: str
    rows: NDArray[np.int64]
    """With the value, ascending."""
    need: int
    in_tokens: bool
    """Whether `need` is in tokens; else in rows."""

    def held(self, taken_N: NDArray[np.bool_], budget: Budget) -> int:
        """How much of it there is among the rows taken."""
        own = self.rows[taken_N[self.rows]]
        if not self.in_tokens or budget.num_tokens_N is None:
            return len(own)
        return int(budget.num_tokens_N[own].sum(dtype=np.int64))


def budget_of(candidates: Candidates, config: SelectConfig) -> Budget:
    """How much a config wants of these rows.

    Raises:
        SettingError: more rows than there are, or tokens of rows whose tokens are not known.
    """
    if config.token_budget is None:
        count = num_to_select(
            candidates.num_rows,
            fraction=config.fraction,
            count=config.count,
            num_set_aside=candidates.num_set_aside,
        )
        return Budget(count)
    if candidates.num_tokens_N is None:
        raise SettingError("token_budget needs the tokens of each row, and they are not given; give fraction or count")
    return Budget(config.token_budget, candidates.num_tokens_N)


class Job:
    """A config applied to candidates."""

    def __init__(self, candidates: Candidates, config: SelectConfig, budget: Budget | None = None) -> None:
        """See that all is there that the config needs.

        Args:
            candidates: N rows.
            config: what is wanted of them.
            budget: in place of the config's own.

        Raises:
            SettingError: something is not, or the budget does not fit.
        """
        _check_present(candidates, config)
        self.candidates, self.config = candidates, config
        self.budget = budget_of(candidates, config) if budget is None else budget
        self.scores = Scores(candidates.scores_NJ, candidates.away_N, config.away_factor)

    def enlarged(self, times: int) -> "Job":
        """The same by score for so many times the budget: caps grow with it, there are no quotas."""
        caps = [
            cap if isinstance(cap.amount, float) else Amount(cap.column, cap.value, cap.amount * times)
            for cap in self.config.all_caps
        ]
        config = replace(self.config, caps=caps, quotas=(), turns=None, balance=None, balance_pairs=None)
        return Job(self.candidates, config, Budget(times * self.budget.total, self.budget.num_tokens_N))

    @property
    def num_expected(self) -> int:
        """About how many rows will be looked at."""
        return self.budget.total if self.budget.unit == "rows" else self.candidates.num_rows // 20

    def rules(self) -> tuple[list[Rule], list[str]]:
        """All rules but that on near-duplicates, the cheapest first, and what is to be noted of them."""
        candidates, config = self.candidates, self.config
        rules: list[Rule] = []
        notes: list[str] = []
        if config.away_above is not None and candidates.away_N is not None:
            away = Away(candidates.away_N, config.away_above)
            rules.append(away)
            notes.append(
                f"away: {away.num_forbidden:,} of {candidates.num_rows:,} rows score {config.away_above:g} or more for "
                "what is to be avoided"
            )
        if config.duplicates is not None and candidates.digests_N is not None:
            rules.append(ExactDuplicates(candidates.digests_N))
        for column in dict.fromkeys(cap.column for cap in config.all_caps):
            own = [cap for cap in config.all_caps if cap.column == column]
            caps = Caps(column, candidates.column(column), own, self.budget)
            rules.append(caps)
            notes += caps.notes
        return rules, notes

    def quotas(self) -> Iterator[Quota]:
        """Each quota; one for every value is one for each."""
        for amount in self.config.all_quotas:
            labels = self.candidates.column(amount.column)
            codes = range(len(labels.names)) if amount.value is None else [code_of(labels, amount)]
            need = self.budget.at_least(amount.amount) if isinstance(amount.amount, float) else amount.amount
            for code in codes:
                name = f"quota {amount.column}={labels.names[code]}"
                yield Quota(name, labels.rows_with(code), need, amount.in_tokens(self.budget))

    def plan(self) -> Plan:
        """The order that the config asks for, without diversity."""
        if self.config.turns is not None:
            return self._by_turns()
        if self.config.balance is not None or self.config.balance_pairs is not None:
            return self._by_labels()
        return self.by_score()

    def by_score(self) -> Plan:
        """One queue of all rows."""
        scores = self.scores
        queue = queue_by_score(lambda: scores.best_N, self.config.min_score, self.num_expected)

        def first(count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
            rows = queue.first(count)
            return rows, np.zeros(len(rows), np.int64)

        return Plan(Turns([queue]), self.best_for(""), by_column=True, first=first)

    def by_quota(self, quota: Quota) -> Plan:
        """One queue of the rows with a value."""
        scores = self.scores
        queue = queue_by_score(lambda: scores.best_N, self.config.min_score, 0, quota.rows)
        return Plan(Turns([queue]), [quota.name])

    def best_for(self, what: str) -> list[str]:
        """A reason for each subtask."""
        return [f"{what}best for {name}" for name in self.candidates.subtasks]

    def _by_turns(self) -> Plan:
        """A queue for each subtask, or for each target set by the best of its subtasks."""
        candidates, scores, min_score = self.candidates, self.scores, self.config.min_score
        if self.config.turns == "subtask":
            groups = [[j] for j in range(len(candidates.subtasks))]
            reasons = [f"turn of subtask {name}" for name in candidates.subtasks]
        else:
            sets = list(dict.fromkeys(candidates.target_sets))
            groups = [[j for j, own in enumerate(candidates.target_sets) if own == name] for name in sets]
            reasons = [f"turn of target set {name}" for name in sets]
        share = -(-self.num_expected // len(groups))
        queues = [queue_by_score(partial(scores.best_of, own), min_score, share) for own in groups]
        return Plan(Turns(queues), reasons, columns=groups)

    def _by_labels(self) -> Plan:
        config = self.config
        if config.balance is not None:
            column, without = config.balance, f"best of those without {config.balance}"
            labels = self.candidates.column(column)
        else:
            assert config.balance_pairs is not None
            column, without = config.balance_pairs, f"best of those without a pair of {config.balance_pairs}"
            labels = self.candidates.column(column).pairs
        order = LabelOrder(labels, self.scores, config.min_score)
        reasons = [*(f"turn of {column} {name}" for name in order.names), without]
        return Plan(order.turns(), reasons, first=order.first)


def _check_present(candidates: Candidates, config: SelectConfig) -> None:
    if candidates.away_N is None and (config.away_above is not None or config.away_weight is not None):
        raise SettingError("away_above and away_weight need negative targets, and there are none; give some")
    if config.duplicates is not None and candidates.digests_N is None:
        raise SettingError("duplicates needs a digest of each row, and they are not given; leave it out")
    if config.needs_features and candidates.features_of is None:
        name = "near_duplicates" if config.near_duplicates is not None else "diversity"
        raise SettingError(
            f"{name} needs gradient features of the rows, and there are none; select from a store of gradients, or "
            f"leave out {name}"
        )
