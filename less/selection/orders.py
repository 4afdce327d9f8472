"""Whose turn it is: by score, or queues that take turns, each adding its best row that is left.

A queue is a way to rank rows; a turn ends when its row is taken, not when one is passed over. With one queue that is
plain top-k. Nothing is sorted further than it is asked for.
"""

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from less.selection.candidates import Labels, Scores

__all__ = ["LabelOrder", "Queue", "Turns", "queue_by_score", "ranks", "select_round_robin", "select_top"]

_CHUNK = 1024
"""Places that are turned into Python's integers at once."""

Gone = bytearray
"""One byte a row, not zero for a row that has been taken or passed over."""


def select_top(scores_N: NDArray[np.floating], count: int) -> NDArray[np.int64]:
    """Positions of the `count` highest scores, best first; ties go to the earlier row (LESS §4.2).

    Cost: N + count log count.
    """
    num_rows = len(scores_N)
    if count < num_rows:
        threshold = np.partition(scores_N, num_rows - count)[num_rows - count]
        above_N = scores_N > threshold
        ties = np.flatnonzero(scores_N == threshold)[: count - np.count_nonzero(above_N)]
        picked = np.union1d(np.flatnonzero(above_N), ties)
    else:
        picked = np.arange(num_rows)
    return picked[np.argsort(-scores_N[picked], kind="stable")]


def ranks(scores_N: NDArray[np.floating]) -> NDArray[np.int64]:
    """Each row's place in descending order of score, from 1; ties go to the earlier row."""
    places_N = np.empty(len(scores_N), dtype=np.int64)
    places_N[np.argsort(-scores_N, kind="stable")] = np.arange(1, len(scores_N) + 1)
    return places_N


def select_round_robin(scores_NS: NDArray[np.floating], count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The S columns take turns, each adding its best row that is not taken yet, until there are `count`.

    Cost: S N + count log count, where the columns' best rows are not mostly the same.

    Returns:
        positions of the rows in the order they were taken, and the column that took each.
    """
    num_rows, num_columns = scores_NS.shape
    share = -(-count // num_columns)
    order = Turns([_queue_of_column(scores_NS, s, share) for s in range(num_columns)])
    picked, column = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)
    gone = bytearray(num_rows)
    for turn in range(count):
        found = order.next(gone)
        assert found is not None
        picked[turn], column[turn] = found
        gone[found[0]] = 1
        order.took(found[0])
    return picked, column


def _queue_of_column(scores_NS: NDArray[np.floating], column: int, guess: int) -> "Queue":
    return Queue(lambda count: select_top(scores_NS[:, column], count), guess)


def queue_by_score(
    score_of: Callable[[], NDArray[np.float32]],
    min_score: float | None,
    guess: int,
    rows: NDArray[np.int64] | None = None,
) -> "Queue":
    """All rows that score at least `min_score`, or those of `rows`, best first; ties go to the earlier row.

    Args:
        score_of: score_N; asked again for each further stretch of the queue, so that no queue keeps its scores.
        min_score: None for no limit.
        guess: about how many will be looked at.
        rows: ascending positions; None for all.
    """

    def first(count: int) -> NDArray[np.int64]:
        score_N = score_of()
        own = score_N if rows is None else score_N[rows]
        places = select_top(own, count)
        if min_score is not None:
            places = places[: np.count_nonzero(own[places] >= min_score)]
        return places if rows is None else rows[places]

    return Queue(first, guess)


class Queue:
    """Rows in one order, sorted in stretches of four times the length before."""

    def __init__(self, first: Callable[[int], NDArray[np.int64]], guess: int) -> None:
        """Start before the first row.

        Args:
            first: the first `count` rows of the order, or all where there are fewer.
            guess: about how many will be looked at.
        """
        self._further, self._wanted, self._whole = first, max(16, 2 * guess) // 4 + 1, False
        self._rows = np.empty(0, np.int64)
        self._chunk: list[int] = []
        self._place, self._offset = 0, 0  # in the chunk, and that of its end in the rows

    def next(self, gone: Gone) -> int | None:
        """The first row that is not gone; None where there is none."""
        while True:
            chunk, place = self._chunk, self._place
            while place < len(chunk) and gone[chunk[place]]:
                place += 1
            self._place = place
            if place < len(chunk):
                return chunk[place]
            if self._offset == len(self._rows) and not self._extend():
                return None
            self._chunk, self._place = self._rows[self._offset : self._offset + _CHUNK].tolist(), 0
            self._offset += len(self._chunk)

    def upcoming(self, count: int, gone: Gone) -> list[int]:
        """The rows that come next unless others take them: at most `count`, and at least one where there is any."""
        if self.next(gone) is None:
            return []
        return [row for row in self._chunk[self._place : self._place + count] if not gone[row]]

    def first(self, count: int) -> NDArray[np.int64]:
        """The first `count` rows, whether gone or not; fewer where there are no more."""
        while len(self._rows) < count and self._extend():
            pass
        return self._rows[:count]

    def _extend(self) -> bool:
        if self._whole:
            return False
        self._wanted *= 4
        before, self._rows = len(self._rows), self._further(self._wanted)
        self._whole = len(self._rows) < self._wanted
        return len(self._rows) > before


class Turns:
    """Queues that take turns; one that is empty is left out from then on."""

    def __init__(self, queues: Sequence[Queue], last: Queue | None = None) -> None:
        """Start with the first queue's turn; `last` has all turns once the others are empty."""
        self._waiting = deque(enumerate(queues))
        self._last = None if last is None else (len(queues), last)

    def next(self, gone: Gone) -> tuple[int, int] | None:
        """The best row that is left of the queue whose turn it is, and the queue's number."""
        while True:
            while self._waiting:
                turn, queue = self._waiting[0]
                row = queue.next(gone)
                if row is not None:
                    return row, turn
                self._waiting.popleft()
            if self._last is None:
                return None
            self._waiting.append(self._last)
            self._last = None

    def took(self, row: int) -> None:
        """The row was taken: the turn is the next queue's."""
        self._waiting.rotate(-1)

    def upcoming(self, count: int, gone: Gone) -> list[int]:
        """About `count` rows that come next, that of `next` first."""
        if self.next(gone) is None:
            return []
        each = -(-count // len(self._waiting))
        rows: dict[int, None] = {}
        for _, queue in self._waiting:
            rows.update(dict.fromkeys(queue.upcoming(each, gone)))
            if len(rows) >= count:
                break
        return list(rows)


class LabelOrder:
    """The values of a column take turns, in the order of their best rows; each adds its best row that is left.

    A row of several values is taken for the one whose turn it is. Rows without a value come last, by score. With pairs
    of skills as values, data is balanced over pairs, as Instruct-SkillMix (Kaur et al. 2024) has it written for random
    pairs of skills; here rows are chosen from those there are, best first.

    Cost: L log L for L values of all rows, whatever the count.
    """

    def __init__(self, labels: Labels, scores: Scores, min_score: float | None) -> None:
        """Sort the rows of each value.

        Args:
            labels: of the column, or its `pairs`.
            scores: rows are ranked by the best of them.
            min_score: rows below have no turn; None for no limit.
        """
        score_N = scores.best_N
        rows_L, codes_L = labels.rows_L, labels.codes_L
        if min_score is not None:
            kept_L = score_N[rows_L] >= min_score
            rows_L, codes_L = rows_L[kept_L], codes_L[kept_L]
        order_L = np.lexsort((-score_N[rows_L], codes_L))
        self._rows_L, codes_L = rows_L[order_L], codes_L[order_L]
        starts = np.flatnonzero(np.diff(codes_L, prepend=-1))
        sizes = np.diff(starts, append=len(codes_L))
        best = self._rows_L[starts]
        by_best = np.lexsort((best, -score_N[best]))  # stable: of two values with one best row the earlier comes first
        self._starts_G, self._sizes_G = starts[by_best], sizes[by_best]
        self.names = tuple(labels.names[code] for code in codes_L[self._starts_G].tolist())
        self._is_disjoint = bool((labels.sizes_N <= 1).all())
        without = np.flatnonzero(labels.sizes_N == 0)
        self._rest = queue_by_score(lambda: score_N, min_score, 0, without)

    def turns(self) -> Turns:
        """A turn's number is the place of its value in `names`, or their number for rows without a value."""
        return Turns([self._queue(g) for g in range(len(self.names))], self._rest)

    def _queue(self, group: int) -> Queue:
        start, size = self._starts_G[group], self._sizes_G[group]
        return Queue(lambda count: self._rows_L[start : start + min(size, count)], 0)

    def first(self, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
        """The first `count` rows and their turns, where no row has two values and no rule forbids any; else None.

        Then a row's place is known beforehand: first its rank among the rows of its value, then the value's turn.
        """
        if not self._is_disjoint:
            return None
        deepest = int(self._sizes_G.max(initial=0))
        low, high = 0, deepest  # the fewest rounds that give enough rows
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if np.minimum(self._sizes_G, middle).sum() >= count else (middle + 1, high)
        kept_G = np.minimum(self._sizes_G, low)
        turns = np.repeat(np.arange(len(kept_G)), kept_G)
        rank = np.arange(len(turns)) - np.repeat(kept_G.cumsum() - kept_G, kept_G)
        order = np.lexsort((turns, rank))[:count]
        positions, turns = (self._rows_L[self._starts_G[turns] + rank])[order], turns[order]
        if len(positions) < count:
            rest = self._rest.first(count - len(positions))
            positions = np.concatenate([positions, rest])
            turns = np.concatenate([turns, np.full(len(rest), len(self.names))])
        return positions, turns
