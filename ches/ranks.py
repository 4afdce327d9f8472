"""Agreement of two rankings.

    ρ = cov(r(x), r(y)) / (σ(r(x)) σ(r(y))),   r: ranks from 1, ties share the mean of theirs

Which rows have both values is left to the caller.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["average_ranks", "spearman"]


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
    x_N, y_N = np.asarray(x_N, dtype=np.float64), np.asarray(y_N, dtype=np.float64)
    if x_N.ndim != 1 or x_N.shape != y_N.shape:
        raise ValueError(f"ranks need two vectors of one length, got the shapes {x_N.shape} and {y_N.shape}")
    if len(x_N) < 2 or np.isnan(x_N).any() or np.isnan(y_N).any():
        return float("nan")
    r_N, s_N = (ranks_N - ranks_N.mean() for ranks_N in (average_ranks(x_N), average_ranks(y_N)))
    scale = float(np.sqrt((r_N @ r_N) * (s_N @ s_N)))
    return float(np.clip(r_N @ s_N / scale, -1, 1)) if scale > 0 else float("nan")
