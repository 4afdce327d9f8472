"""Statistics of scores: agreement of rankings, how well right rows are told apart, and 95% intervals.

    spearman       ρ = cov(r(x), r(y)) / (σ(r(x)) σ(r(y))),   r: ranks from 1, ties share the mean of theirs
    auc            P(a right row scores above another one), ties count half
    r_precision    of the R best rows, the share that are among the R right ones
    top_overlap    of the best rows by one score, the share that are among the best by the other
    r_squared      share of a score's variance that a linear fit on some columns explains

Which rows have values is left to the caller.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "Interval", "auc", "average_ranks", "bootstrap", "pearson", "r_precision", "r_squared", "spearman", "top_overlap",
]  # fmt: skip

NUM_RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A statistic and its 95% interval."""

    value: float
    """On all rows."""
    low: float
    """The 2.5% quantile of the resamples; NaN where the statistic has no value on too many of them."""
    high: float
    """The 97.5% quantile."""

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]".replace("-", "−")


def bootstrap(
    statistic: Callable[..., float], *columns: ArrayLike, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> Interval:
    """A statistic with its percentile bootstrap interval over rows (Efron, 1979).

    Args:
        statistic: takes the columns, returns a number.
        *columns: arrays whose first axis is the rows; resampled together.
        num_resamples: draws with replacement; those on which the statistic is NaN (a constant column) are left out, and
            where they are more than half, there is no interval.
        seed: of the draws.
    """
    arrays = [np.asarray(column) for column in columns]
    generator, num_rows = np.random.default_rng(seed), len(arrays[0])
    draws = (generator.integers(num_rows, size=num_rows) for _ in range(num_resamples if num_rows else 0))
    found = np.array([statistic(*(array[draw] for array in arrays)) for draw in draws])
    usable = found[~np.isnan(found)]
    low, high = np.quantile(usable, [0.025, 0.975]) if 2 * len(usable) > len(found) else (np.nan, np.nan)
    return Interval(value=float(statistic(*arrays)), low=float(low), high=float(high))


def average_ranks(x_N: ArrayLike) -> NDArray[np.float64]:
    """Ranks of the values, the smallest first, from 1; equal values share the mean of their ranks. Shape (N,)."""
    _, place_N, count_U = np.unique(np.asarray(x_N), return_inverse=True, return_counts=True)
    last_U = np.cumsum(count_U)
    return (last_U - (count_U - 1) / 2)[place_N]


def spearman(x_N: ArrayLike, y_N: ArrayLike) -> float:
    """Spearman's rank correlation (Spearman, 1904), with average ranks for ties, in float64.

    Args:
        x_N, y_N: numbers, shape (N,) each, without unit: only their order counts.

    Returns:
        -1 to 1; NaN where there is no order to compare: fewer than two rows, a constant side, or a NaN.

    Raises:
        ValueError: the two are not of one length.
    """
    x_N, y_N = _two_vectors(x_N, y_N)
    if np.isnan(x_N).any() or np.isnan(y_N).any():
        return float("nan")
    return pearson(average_ranks(x_N), average_ranks(y_N))


def pearson(x_N: ArrayLike, y_N: ArrayLike) -> float:
    """Pearson's correlation, in float64; NaN and errors as `spearman`."""
    x_N, y_N = _two_vectors(x_N, y_N)
    if len(x_N) < 2:
        return float("nan")
    r_N, s_N = x_N - x_N.mean(), y_N - y_N.mean()
    scale = float(np.sqrt((r_N @ r_N) * (s_N @ s_N)))
    return float(np.clip(r_N @ s_N / scale, -1, 1)) if scale > 0 else float("nan")


def auc(score_N: ArrayLike, is_right_N: ArrayLike) -> float:
    """Probability that a right row scores above another one; ties count half (Mann and Whitney, 1947).

    NaN where all rows are right, or none.
    """
    score_N, is_right_N = np.asarray(score_N), np.asarray(is_right_N, bool)
    right, other = score_N[is_right_N], np.sort(score_N[~is_right_N])
    if not len(right) or not len(other):
        return float("nan")
    below = np.searchsorted(other, right, "left")
    ties = np.searchsorted(other, right, "right") - below
    return float(np.mean((below + ties / 2) / len(other)))


def r_precision(score_N: ArrayLike, is_right_N: ArrayLike) -> float:
    """Of the R best rows, the share that are right, where R is the number of right ones; NaN where that is 0."""
    is_right_N = np.asarray(is_right_N, bool)
    num_right = int(is_right_N.sum())
    return float(is_right_N[_best(score_N, num_right)].mean()) if num_right else float("nan")


def top_overlap(x_N: ArrayLike, y_N: ArrayLike, count: int) -> float:
    """Of the `count` best rows by x, the share that are among the `count` best by y; ties go to the earlier row."""
    return len(np.intersect1d(_best(x_N, count), _best(y_N, count))) / count


def r_squared(y_N: ArrayLike, columns: Sequence[ArrayLike]) -> float:
    """Share of the variance of y that a least-squares fit on the columns and a constant explains; NaN if y has none."""
    y_N = np.asarray(y_N, np.float64)
    design_NC = np.stack([np.ones(len(y_N)), *(np.asarray(column, np.float64) for column in columns)], axis=1)
    spread = float(np.square(y_N - y_N.mean()).sum())
    if not spread > 0:
        return float("nan")
    fitted_N = design_NC @ np.linalg.lstsq(design_NC, y_N, rcond=None)[0]
    return float(1 - np.square(y_N - fitted_N).sum() / spread)


def _best(score_N: ArrayLike, count: int) -> NDArray[np.int64]:
    return np.argsort(-np.asarray(score_N, np.float64), kind="stable")[:count]


def _two_vectors(x_N: Any, y_N: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    x_N, y_N = np.asarray(x_N, dtype=np.float64), np.asarray(y_N, dtype=np.float64)
    if x_N.ndim != 1 or x_N.shape != y_N.shape:
        raise ValueError(f"expected two vectors of one length, got the shapes {x_N.shape} and {y_N.shape}")
    return x_N, y_N
