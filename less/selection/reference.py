"""The slow twin of `choose`: the definition, a row at a time, with every comparison made anew."""

from collections import defaultdict
from collections.abc import Callable
from fractions import Fraction
from itertools import combinations
from math import ceil, floor

import numpy as np

from less.selection.candidates import Candidates
from less.selection.config import Amount, SelectConfig
from less.selection.diversity import (
    Samples,
    covered_rows,
    facility_location_next_ref,
    mmr_next_ref,
    stretched,
)
from less.selection.rules import ROUNDING

__all__ = ["choose_ref"]


def choose_ref(candidates: Candidates, config: SelectConfig) -> tuple[list[int], list[str], dict[str, list[int]]]:
    """Positions in the order taken, why each was, and by rule the rows that were passed over.

    Args:
        candidates: few rows.
        config: any.
    """
    walk = _RefWalk(candidates, config)
    subtasks, score = candidates.subtasks, walk.score
    for quota in config.all_quotas:
        names = candidates.labels[quota.column].names if quota.value is None else [quota.value]
        for name in names:
            rows = [n for n in walk.rows if name in walk.values(quota.column, n)]
            while rows and walk.held(quota, name) < walk.amount(quota, ceil):
                row = min(rows, key=lambda n: (-score[n], n))
                rows.remove(row)
                walk.ask(row, f"quota {quota.column}={name}")
    if config.diversity is not None:
        wide = _RefWalk(candidates, config, times=config.diversity_candidates)
        wide.gone = set(walk.gone)
        for row in sorted(wide.rows, key=lambda n: (-score[n], n)):
            wide.ask(row, "", with_near=False)
        for rule, rows in wide.passed_over.items():
            walk.passed_over[rule] += rows
        walk.take_diverse(sorted(row for row, _ in wide.taken))
    else:
        groups, rest = walk.groups()
        waiting = list(groups.items()) or [rest]
        while waiting and not walk.full:
            why, scores = waiting[0]
            left = [n for n in scores if n not in walk.gone]
            if left:
                row = min(left, key=lambda n: (-scores[n], n))
                if walk.ask(row, why or f"best for {subtasks[walk.best_column(row)]}"):
                    waiting = waiting[1:] + waiting[:1]
            else:
                waiting = waiting[1:] or ([rest] if waiting[0] is not rest else [])
    return [row for row, _ in walk.taken], [why for _, why in walk.taken], dict(walk.passed_over)


class _RefWalk:
    def __init__(self, candidates: Candidates, config: SelectConfig, times: int = 1) -> None:
        self.candidates, self.config, self.times = candidates, config, times
        self.scores_NJ = candidates.scores_NJ
        if candidates.away_N is not None:
            fine_N = np.float32(config.away_factor) * np.maximum(candidates.away_N, 0)
            self.scores_NJ = candidates.scores_NJ - fine_N[:, None]
        self.score = self.scores_NJ.max(axis=1).tolist()
        low = -np.inf if config.min_score is None else config.min_score
        self.low = low
        self.rows = [n for n in range(candidates.num_rows) if self.score[n] >= low]
        self.tokens = None if config.token_budget is None else candidates.num_tokens_N
        num_all = candidates.num_rows + candidates.num_set_aside
        total = config.token_budget or config.count or ceil(Fraction(str(config.fraction)) * num_all)
        self.total = times * total
        self.taken: list[tuple[int, str]] = []
        self.gone: set[int] = set()
        self.passed_over: defaultdict[str, list[int]] = defaultdict(list)
        self.full = False
        every = np.arange(candidates.num_rows)
        self.x = candidates.features_of(every) if candidates.features_of else np.empty((0, 0), np.float32)

    def values(self, column: str, row: int) -> list[str]:
        labels = self.candidates.labels[column]
        return [labels.names[code] for code in labels.of_row(row)]

    def best_column(self, row: int) -> int:
        return int(self.candidates.scores_NJ[row].argmax())

    def amount(self, own: Amount, rounded: Callable[[Fraction], int]) -> int:
        if isinstance(own.amount, int):
            return own.amount * self.times
        return rounded(Fraction(str(own.amount)) * self.total)

    def cost(self, row: int) -> int:
        return 1 if self.tokens is None else int(self.tokens[row])

    def held(self, own: Amount, name: str) -> int:
        rows = [row for row, _ in self.taken if name in self.values(own.column, row)]
        return sum(map(self.cost, rows)) if isinstance(own.amount, float) else len(rows)

    def ask(self, row: int, why: str, *, with_near: bool = True) -> bool:
        """Take the row if nothing forbids it and it fits; whether it was taken."""
        if self.full or row in self.gone:
            return False
        self.gone.add(row)
        if (rule := self.forbidding(row, with_near)) is not None:
            self.passed_over[rule].append(row)
            return False
        used = sum(self.cost(other) for other, _ in self.taken) + self.cost(row)
        self.full = used >= self.total
        if used <= self.total:
            self.taken.append((row, why))
        return used <= self.total

    def forbidding(self, row: int, with_near: bool) -> str | None:
        candidates, config = self.candidates, self.config
        others = [other for other, _ in self.taken]
        if config.away_above is not None and candidates.away_N[row] >= config.away_above:  # type: ignore[index]
            return "away"
        digests = candidates.digests_N
        if config.duplicates and any(digests[row] == digests[other] for other in others):  # type: ignore[index]
            return "duplicate"
        for column in dict.fromkeys(cap.column for cap in config.all_caps):
            caps = {cap.value: cap for cap in config.all_caps if cap.column == column}
            for name in self.values(column, row):
                cap = caps.get(name, caps.get(None))
                if cap is not None:
                    more = self.cost(row) if isinstance(cap.amount, float) else 1
                    if self.held(cap, name) + more > self.amount(cap, floor):
                        return f"cap {column}={name}"
        threshold = config.near_duplicates if with_near else None
        if threshold is not None and any(self.x[row] @ self.x[other] >= threshold - ROUNDING for other in others):
            return "near-duplicate"
        return None

    def groups(self) -> tuple[dict[str, dict[int, float]], tuple[str, dict[int, float]]]:
        """By its reason, the scores of the rows of each that takes turns; and of the rows that come last."""
        candidates, config = self.candidates, self.config
        everyone = {n: self.score[n] for n in self.rows}
        if config.turns is not None:
            by_set = config.turns == "target-set"
            keys = candidates.target_sets if by_set else candidates.subtasks
            found: dict[str, dict[int, float]] = {}
            for name in dict.fromkeys(keys):
                columns = [j for j, own in enumerate(keys) if own == name]
                best = {n: float(self.scores_NJ[n, columns].max()) for n in range(candidates.num_rows)}
                why = f"turn of {'target set' if by_set else 'subtask'} {name}"
                found[why] = {n: score for n, score in best.items() if score >= self.low}
            return found, ("", {})
        column = config.balance or config.balance_pairs
        if column is None:
            return {}, ("", everyone)
        names = candidates.labels[column].names
        members: dict[tuple[int, ...], list[int]] = {}
        for n in self.rows:
            codes = sorted(names.index(name) for name in self.values(column, n))
            for key in combinations(codes, 1 if config.balance else 2):
                members.setdefault(key, []).append(n)

        def best_first(key: tuple[int, ...]) -> tuple:
            best = min(members[key], key=lambda n: (-self.score[n], n))
            return -self.score[best], best, key

        found = {
            f"turn of {column} {' + '.join(names[code] for code in key)}": {n: self.score[n] for n in members[key]}
            for key in sorted(members, key=best_first)
        }
        labelled = {n for own in members.values() for n in own}
        without = f"best of those without {'' if config.balance else 'a pair of '}{column}"
        return found, (without, {n: score for n, score in everyone.items() if n not in labelled})

    def take_diverse(self, rows: list[int]) -> None:
        config, subtasks = self.config, self.candidates.subtasks
        rows_n = np.array(rows, np.int64)
        if not rows:
            return
        rewards = dict(zip(rows, stretched(np.array(self.score, np.float32)[rows_n]).tolist(), strict=True))
        samples, covered = Samples(rows_n, config.diversity_candidates, config.seed), covered_rows(rows_n, config.seed)
        while not self.full and (left := [n for n in rows if n not in self.gone]):
            others = [other for other, _ in self.taken]
            if config.diversity == "mmr":
                row = mmr_next_ref(left, rewards, others, self.x, config.diversity_weight)
            else:
                gone = bytearray(n in self.gone for n in range(self.candidates.num_rows))
                row = facility_location_next_ref(samples.draw(gone), covered.tolist(), others, self.x)
            self.ask(row, f"{config.diversity}, best for {subtasks[self.best_column(row)]}")
