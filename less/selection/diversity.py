"""Orders in which rows that are unlike those taken come first. Both choose from n rows, the best of the pool.

Similarities are inner products in gradient space; one below zero counts as zero: to point apart is no better than to
have nothing in common. Equal values go to the earlier row.

**mmr**, maximal marginal relevance (Carbonell & Goldstein 1998, §2). The next row is

    argmax over the rows left of λ r(z) - (1 - λ) max(0, max over taken s of ⟨x_z, x_s⟩)

with r(z) the score stretched to 0..1 over the n rows, so that λ means the same whatever the scores' unit. The second
term only grows, so a value that is out of date is an upper bound: rows are kept in a heap by it, and only those at its
top are brought up to date (the lazy evaluation of Minoux 1978). It gives the same rows as the definition. Cost: at most
n k d products for k rows taken, most often far fewer; (n + k) d floats of memory.

**facility-location**: the rows taken should have something like each of the n rows among them. f is submodular and
grows, and stochastic greedy (Mirzasoleiman et al. 2015, Algorithm 1) takes of a random sample the row that adds most:

    f(S) = sum over i of max(0, max over s in S of ⟨x_i, x_s⟩)        (n / k) ln(1 / ε) rows a sample, ε = 0.1

whose f is expected to be at least 1 - 1/e - ε of the best there is. The score chooses the n rows and is not asked
again. i runs over the n rows, or over `MOST_COVERED` of them, u, drawn by the seed. Cost: n ln(1/ε) u d products and
(n + u) d floats.
"""

import heapq
from collections.abc import Sequence
from math import ceil, log

import numpy as np
from numpy.typing import NDArray

from less.selection.orders import Gone
from less.selection.similarity import BLOCK, HeldFeatures, Nearest

__all__ = [
    "MOST_COVERED",
    "FacilityLocation",
    "Mmr",
    "Samples",
    "covered_rows",
    "facility_location_next_ref",
    "mmr_next_ref",
    "stretched",
]

MOST_COVERED = 4096
"""Rows that facility location sums over."""
EPSILON = 0.1
"""ε of stochastic greedy."""


def stretched(scores_n: NDArray[np.float32]) -> NDArray[np.float64]:
    """r(z): the scores between the lowest, 0, and the highest, 1; all 0 where they are equal."""
    low, high = float(scores_n.min()), float(scores_n.max())
    return (scores_n.astype(np.float64) - low) / ((high - low) or 1.0)


class Mmr:
    """Rows by maximal marginal relevance."""

    def __init__(self, rows_n: NDArray[np.int64], scores_n: NDArray[np.float32], weight: float, near: Nearest) -> None:
        """Start from what `near` has taken.

        Args:
            rows_n: the rows to choose from, ascending, held by `near`.
            scores_n: their scores.
            weight: λ.
            near: told of every row that is taken, by whoever holds it.
        """
        self._near, self._weight = near, weight
        self._reward = dict(zip(rows_n.tolist(), stretched(scores_n).tolist(), strict=True))
        self._heap = [(-weight * reward, row, 0) for row, reward in self._reward.items()]
        heapq.heapify(self._heap)

    def next(self, gone: Gone) -> tuple[int, int] | None:
        """The row of the highest value, and 0 for the turn."""
        heap, num_taken = self._heap, self._near.num_taken
        while heap:
            _, row, upto = heap[0]
            if gone[row]:
                heapq.heappop(heap)
            elif upto == num_taken:
                return row, 0
            else:
                self._refresh(upto, gone)
        return None

    def took(self, row: int) -> None:
        """Nothing to do: `near` has been told."""

    def upcoming(self, count: int, gone: Gone) -> list[int]:
        """The next row alone: it has been compared already."""
        found = self.next(gone)
        return [] if found is None else [found[0]]

    def _refresh(self, upto: int, gone: Gone) -> None:
        """Bring the rows at the top of the heap up to date that were last so together."""
        rows: list[int] = []
        while self._heap and len(rows) < BLOCK // 4 and self._heap[0][2] == upto:
            row = heapq.heappop(self._heap)[1]
            if not gone[row]:
                rows.append(row)
        self._near.bring_up_to_date(rows)
        for row in rows:
            value = mmr_value(self._reward[row], self._near.of(row), self._weight)
            heapq.heappush(self._heap, (-value, row, self._near.num_taken))


def mmr_value(reward: float, nearest: float, weight: float) -> float:
    """λ r(z) - (1 - λ) nearest(z)."""
    return weight * reward - (1 - weight) * nearest


class FacilityLocation:
    """Rows by stochastic greedy maximisation of facility location."""

    def __init__(
        self, rows_n: NDArray[np.int64], features: HeldFeatures, taken: Sequence[int], times: int, seed: int
    ) -> None:
        """Start from what has been taken.

        Args:
            rows_n: the rows to choose from, ascending, held by `features`.
            features: of the rows.
            taken: rows that were taken before, such as for a quota.
            times: n / k.
            seed: of all that is drawn.
        """
        self._features, self._samples = features, Samples(rows_n, times, seed)
        self._covered_ud = features.of(covered_rows(rows_n, seed).tolist())
        self._cover_u = np.zeros(len(self._covered_ud), np.float32)
        self._last = -1, self._cover_u  # the row that was given last, and its similarities
        for row in taken:
            self.took(row)

    def next(self, gone: Gone) -> tuple[int, int] | None:
        """The row of a sample that adds most to f, and 0 for the turn."""
        sample = self._samples.draw(gone)
        if not sample:
            return None
        similar_su = self._features.of(sample) @ self._covered_ud.T
        place = int(np.maximum(similar_su - self._cover_u, 0).sum(axis=1).argmax())
        self._last = sample[place], similar_su[place]
        return sample[place], 0

    def took(self, row: int) -> None:
        """Each row is as well covered as by the best that was taken."""
        last, similar_u = self._last
        if row != last:
            similar_u = (self._features.of([row]) @ self._covered_ud.T)[0]
        np.maximum(self._cover_u, similar_u, out=self._cover_u)

    def upcoming(self, count: int, gone: Gone) -> list[int]:
        """None: which rows are sampled next is not known."""
        return []


class Samples:
    """Draws from the rows that are left, with repetition: for a seed the same on every machine."""

    def __init__(self, rows_n: NDArray[np.int64], times: int, seed: int) -> None:
        """Draw (n / k) ln(1 / ε) of `rows_n` at once, with `times` for n / k."""
        self._left, self._size = rows_n.tolist(), ceil(times * log(1 / EPSILON))
        self._bits = np.random.PCG64(seed)

    def draw(self, gone: Gone) -> list[int]:
        """Distinct rows that are not gone, ascending; none where none is left."""
        left, sample = self._left, set()
        # random_raw is the part of numpy's generators whose stream never changes
        for number in self._bits.random_raw(self._size).tolist():
            while left and gone[left[place := number % len(left)]]:
                left[place] = left[-1]
                left.pop()
            if left:
                sample.add(left[place])
        return sorted(sample)


def covered_rows(rows_n: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """The rows that f sums over: all, or `MOST_COVERED` of them, those of the lowest random numbers."""
    if len(rows_n) <= MOST_COVERED:
        return rows_n
    numbers_n = np.random.PCG64([seed, 1]).random_raw(len(rows_n))
    return rows_n[np.sort(np.argsort(numbers_n, kind="stable")[:MOST_COVERED])]


def mmr_next_ref(
    left: Sequence[int], rewards: dict[int, float], taken: Sequence[int], x: NDArray[np.float32], weight: float
) -> int:
    """The definition: every row that is left is compared with every row taken.

    Args:
        left: rows to choose from.
        rewards: r(z) of each.
        taken: the rows taken.
        x: features of all rows.
        weight: λ.
    """

    def value(z: int) -> float:
        return mmr_value(rewards[z], max([0.0, *(float(x[z] @ x[s]) for s in taken)]), weight)

    return min(left, key=lambda z: (-value(z), z))


def facility_location_next_ref(
    sample: Sequence[int], covered: Sequence[int], taken: Sequence[int], x: NDArray[np.float32]
) -> int:
    """The definition: f anew with each row of the sample added.

    Args:
        sample: rows to choose from.
        covered: the rows that f sums over.
        taken: the rows taken.
        x: features of all rows.
    """

    def f(chosen: Sequence[int]) -> float:
        return sum(max([0.0, *(float(x[i] @ x[s]) for s in chosen)]) for i in covered)

    return min(sample, key=lambda z: (-f([*taken, z]), z))
