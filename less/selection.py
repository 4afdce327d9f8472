"""From scores to the rows that are kept: pure functions over arrays.

Scores come from `less.influence`, rows are written by `less.ranking`.
"""

from fractions import Fraction
from math import ceil

import numpy as np
from numpy.typing import NDArray

from datastore.errors import SettingError

__all__ = ["SET_ASIDE", "num_to_select", "ranks", "select_round_robin", "select_tokens", "select_top"]

SET_ASIDE = "prefilter"
"""The reason for which a row is skipped that the prefilter set aside."""


def num_to_select(
    num_rows: int, *, fraction: float | None = None, count: int | None = None, num_set_aside: int = 0
) -> int:
    """How many of `num_rows` scored rows are wanted: `count`, or the ceiling of `fraction` of those and the set aside.

    The ceiling is exact in the decimal digits of `fraction`: 0.07 of 100 rows is 7.

    Args:
        num_rows: scored rows.
        fraction: above 0 and at most 1.
        count: at least 1.
        num_set_aside: rows that would have scores too if a prefilter had not left them out.

    Raises:
        SettingError: not exactly one of the two is given, it is out of range, or the prefilter has left fewer rows.
    """
    if (fraction is None) == (count is None):
        raise SettingError("give either a fraction or a count of rows to select, not both and not neither")
    if fraction is not None:
        if not 0 < fraction <= 1:
            raise SettingError(f"fraction must be above 0 and at most 1, got {fraction}")
        wanted = ceil(Fraction(str(fraction)) * (num_rows + num_set_aside))
    else:
        assert count is not None
        wanted = count
    if num_set_aside and wanted > num_rows:
        raise SettingError(
            f"{wanted} rows are asked for, and the prefilter of the build has left {num_rows} of "
            f"{num_rows + num_set_aside}; select at most those, or build another store with a greater --prefilter"
        )
    if fraction is None and not 1 <= wanted <= num_rows:
        raise SettingError(f"count must be between 1 and the {num_rows} scored rows, got {count}")
    return wanted


def select_top(scores_N: NDArray[np.floating], count: int) -> NDArray[np.int64]:
    """Positions of the `count` highest scores, best first; ties go to the earlier row (LESS §4.2)."""
    num_rows = len(scores_N)
    if count < num_rows:
        threshold = np.partition(scores_N, num_rows - count)[num_rows - count]
        above_N = scores_N > threshold
        ties = np.flatnonzero(scores_N == threshold)[: count - np.count_nonzero(above_N)]
        picked = np.union1d(np.flatnonzero(above_N), ties)
    else:
        picked = np.arange(num_rows)
    return picked[np.argsort(-scores_N[picked], kind="stable")]


def select_tokens(
    scores_N: NDArray[np.floating], num_tokens_N: NDArray[np.integer], budget: float
) -> NDArray[np.int64]:
    """Positions of the best rows, best first, until they hold at least `budget` tokens; ties go to the earlier row.

    Args:
        scores_N: higher is better.
        num_tokens_N: tokens of each row, such as those that carry loss.
        budget: above 0; where all rows together hold less, all are taken.
    """
    order_N = np.argsort(-scores_N, kind="stable")
    return order_N[: 1 + int(np.searchsorted(num_tokens_N[order_N].cumsum(dtype=np.int64), budget))]


def select_round_robin(scores_NS: NDArray[np.floating], count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The S columns take turns, each adding its best row that is not taken yet, until there are `count`.

    Returns:
        positions of the rows in the order they were taken, and the column that took each.
    """
    num_rows, num_columns = scores_NS.shape
    queues = [iter(np.argsort(-scores_NS[:, s], kind="stable")) for s in range(num_columns)]
    taken = np.zeros(num_rows, dtype=bool)
    picked = np.empty(count, dtype=np.int64)
    column = np.empty(count, dtype=np.int64)
    for turn in range(count):
        column[turn] = turn % num_columns
        picked[turn] = next(row for row in queues[turn % num_columns] if not taken[row])
        taken[picked[turn]] = True
    return picked, column


def ranks(scores_N: NDArray[np.floating]) -> NDArray[np.int64]:
    """Each row's place in descending order of score, from 1; ties go to the earlier row."""
    places_N = np.empty(len(scores_N), dtype=np.int64)
    places_N[np.argsort(-scores_N, kind="stable")] = np.arange(1, len(scores_N) + 1)
    return places_N
