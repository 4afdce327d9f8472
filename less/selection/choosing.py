"""A selection: walk down an order of the rows, take each unless a rule forbids it, stop when the budget is full.

    quotas, each a walk over the rows with its value, best first, until there are enough
    then one walk over all, in the order asked for, until the budget is full

With diversity the order is over the best rows alone: those that a walk by score, under all rules but that on
near-duplicates, takes for `diversity_candidates` times the budget. Ties go to the earlier row everywhere, so what is
chosen by scores and labels is the same on every machine; with features it is up to the last bits of their products.

Memory beside the candidates: some dozen bytes a row, with turns 8 more for each row that a queue has sorted, with
labels some dozen for each value of a row, and with features what `less.selection.similarity` says. `choose_ref` in
`less.selection.reference` is the slow twin.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from less.selection.budget import Budget
from less.selection.candidates import Candidates
from less.selection.config import SelectConfig
from less.selection.diversity import FacilityLocation, Mmr
from less.selection.orders import Turns
from less.selection.plans import Job, Plan, Quota
from less.selection.rules import NearDuplicates
from less.selection.similarity import HeldFeatures, Nearest
from less.selection.walk import Order, Walk

__all__ = ["Choice", "choose"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Choice:
    """The k rows that were chosen, in the order in which they were taken."""

    positions: NDArray[np.int64]
    """Which rows."""
    scores: NDArray[np.float32]
    """The score that ranked each: its best, or with turns the best of the turn's columns."""
    column_of: NDArray[np.int64]
    """The column, a subtask, that gives this score."""
    reasons: tuple[str, ...]
    """The distinct reasons."""
    reason_of: NDArray[np.int64]
    """Each row's place in `reasons`."""
    passed_over: dict[str, NDArray[np.int64]]
    """By rule, the rows that the walk came to and did not take."""
    notes: tuple[str, ...]
    """What could not be had, and what a user should know of the rules."""

    @cached_property
    def why(self) -> list[str]:
        """The reason of each row, such as `best for algebra`, `turn of skill algebra` or `quota dataset=gsm8k`."""
        return [self.reasons[code] for code in self.reason_of.tolist()]


def choose(candidates: Candidates, config: SelectConfig) -> Choice:
    """The rows that a config selects.

    Args:
        candidates: N rows with scores.
        config: what is wanted of them.

    Returns:
        k rows. A quota that cannot be met and a budget that cannot be filled are said in its notes.

    Raises:
        SettingError: more rows are asked for than there are; a column, a value, or something that the config needs is
            missing; the features to be compared need too much memory.
    """
    job = Job(candidates, config)
    rules, notes = job.rules()
    quotas = list(job.quotas())
    plan = None if config.diversity is not None else job.plan()
    found = None
    if plan is not None and not rules and not quotas and config.near_duplicates is None:
        found = _all_at_once(plan, job.budget, job.num_expected)
    if plan is not None and found is not None:
        positions, turns, is_full = found
        walk = Walk(job.budget, (), bytearray(), is_full=is_full)
        return _choice_of(job, [(plan, positions, turns)], walk, quotas, notes)
    features = HeldFeatures(candidates.features_of) if config.needs_features and candidates.features_of else None
    near = None
    if features is not None and (config.near_duplicates is not None or config.diversity == "mmr"):
        near = Nearest(features, candidates.num_rows, job.budget.total if job.budget.unit == "rows" else 0)
        rules.append(NearDuplicates(near, config.near_duplicates))
    walk = Walk(job.budget, rules, bytearray(candidates.num_rows))
    plans = [(own := job.by_quota(quota), _walk_quota(walk, own, quota)) for quota in quotas]
    if plan is None:
        assert features is not None  # `Job` has seen to it
        plan = _diverse_plan(job, walk, features, near)
    plans.append((plan, walk.go(plan.order)))
    positions, turns = np.array(walk.positions, np.int64), np.array(walk.turns, np.int64)
    ends = np.cumsum([num_taken for _, num_taken in plans])[:-1]
    splits = zip(plans, np.split(positions, ends), np.split(turns, ends), strict=True)
    parts = [(own, own_positions, own_turns) for (own, _), own_positions, own_turns in splits]
    return _choice_of(job, parts, walk, quotas, notes)


def _all_at_once(
    plan: Plan, budget: Budget, num_expected: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], bool] | None:
    """The walk where nothing is forbidden: as much of the order as fits, and whether that fills the budget."""
    count = max(1, num_expected)
    while (found := plan.first(count)) is not None:
        positions, turns = found
        num_fit = budget.num_that_fit(positions)
        if num_fit < len(positions) or len(positions) < count or budget.unit == "rows":
            is_full = num_fit < len(positions) or (budget.unit == "rows" and num_fit == budget.total)
            return positions[:num_fit], turns[:num_fit], is_full
        count *= 4
    return None


def _walk_quota(walk: Walk, plan: Plan, quota: Quota) -> int:
    """Until what is taken holds the quota; how many rows that took."""
    taken_N = np.zeros(len(walk.gone), bool)
    taken_N[walk.positions] = True
    missing = quota.need - quota.held(taken_N, walk.budget)

    def so_far() -> int:
        return walk.used if quota.in_tokens else len(walk.positions)

    enough = so_far() + missing
    return walk.go(plan.order, lambda: so_far() >= enough)


def _diverse_plan(job: Job, walk: Walk, features: HeldFeatures, near: Nearest | None) -> Plan:
    """Diversity over the best rows that are left; those passed over on the way to them are so for good."""
    config = job.config
    larger = job.enlarged(config.diversity_candidates)
    wide = Walk(larger.budget, larger.rules()[0], bytearray(walk.gone))
    wide.go(larger.by_score().order)
    for rule, rows in wide.passed_over.items():
        walk.passed_over.setdefault(rule, array("q")).extend(rows)
    rows_n = np.sort(np.array(wide.positions, np.int64))
    order: Order = Turns([])
    if len(rows_n):
        features.hold(rows_n)
        if config.diversity == "mmr":
            assert near is not None
            order = Mmr(rows_n, job.scores.best_N[rows_n], config.diversity_weight, near)
        else:
            order = FacilityLocation(rows_n, features, walk.positions, config.diversity_candidates, config.seed)
    return Plan(order, job.best_for(f"{config.diversity}, "), by_column=True)


def _choice_of(
    job: Job,
    parts: Sequence[tuple[Plan, NDArray[np.int64], NDArray[np.int64]]],
    walk: Walk,
    quotas: Sequence[Quota],
    notes: Sequence[str],
) -> Choice:
    """Join what each plan took: plan, positions and turns."""
    scores, columns, codes = [], [], []
    reasons: list[str] = []
    for plan, positions, turns in parts:
        own_scores, own_columns = _ranked_by(job, plan, positions, turns)
        scores.append(own_scores)
        columns.append(own_columns)
        codes.append(len(reasons) + (own_columns if plan.by_column else turns))
        reasons += plan.reasons
    positions = np.concatenate([own for _, own, _ in parts])
    used, code_of_row = np.unique(np.concatenate(codes), return_inverse=True)
    return Choice(
        positions=positions,
        scores=np.concatenate(scores),
        column_of=np.concatenate(columns),
        reasons=tuple(reasons[code] for code in used.tolist()),
        reason_of=code_of_row,
        passed_over={rule: np.array(rows, np.int64) for rule, rows in walk.passed_over.items()},
        notes=(*notes, *_what_is_missing(job, positions, walk.is_full, quotas)),
    )


def _ranked_by(
    job: Job, plan: Plan, positions: NDArray[np.int64], turns: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    if plan.columns is None:
        return job.scores.at(positions)
    scores, columns = np.empty(len(positions), np.float32), np.empty(len(positions), np.int64)
    for turn, own in enumerate(plan.columns):
        at = turns == turn
        scores[at], columns[at] = job.scores.at(positions[at], own)
    return scores, columns


def _what_is_missing(job: Job, positions: NDArray[np.int64], is_full: bool, quotas: Sequence[Quota]) -> list[str]:
    """Notes on quotas that are not met and a budget that is not filled."""
    config, budget = job.config, job.budget
    notes = []
    taken_N = np.zeros(job.candidates.num_rows, bool)
    taken_N[positions] = True
    for quota in quotas:
        held = quota.held(taken_N, budget)
        if held < quota.need:
            unit = "tokens" if quota.in_tokens else "rows"
            why = "the rules leave no more"
            if taken_N[quota.rows].all():
                why = "the pool has no more"
            elif is_full:
                why = "the budget is full"
            notes.append(f"{quota.name}: {held:,} of {quota.need:,} {unit}, {why}")
    used = sum(map(budget.cost, positions.tolist()))
    if not is_full and used < budget.total:
        limits = ["min_score"] if config.min_score is not None else []
        limits += ["the rules"] if config.caps or config.duplicates or config.away_above is not None else []
        limits += ["near_duplicates"] if config.near_duplicates is not None else []
        limits += ["diversity_candidates"] if config.diversity is not None else []
        why = f"no other row passes {' and '.join(limits)}" if limits else "the pool has no more"
        notes.append(f"{used:,} of {budget.total:,} {budget.unit}: {why}")
    elif not len(positions):
        notes.append(f"no row was taken: the first has more than {budget.total:,} {budget.unit}")
    return notes
