"""Influence of every stored row on every subtask of the targets: the formulas.

    score(z, j) = mean over targets v in subtask j of Σ_c w_c cos(φ_c(z), ψ_c(v))
    score(z)    = max_j score(z, j)                                   (LESS, Xia et al. 2024, Def. 3.1 and §4.2)

The score is linear in unit targets, so each subtask is one query per checkpoint, the mean of its unit
targets, and a scan costs subtasks, not targets. The scan is in `less.scan`; which rows to keep is `less.selection`'s
business.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datastore import RowTable
from datastore.errors import SettingError

__all__ = [
    "AGGREGATES",
    "NORMALIZERS",
    "InfluenceScores",
    "check_formula",
    "influence_scores_ref",
    "subtask_queries",
]

AGGREGATES = ("mean-of-cosines", "cosine-of-mean")
NORMALIZERS = ("cosine", "none")
_ROWS_AT_ONCE = 2**16


@dataclass(frozen=True)
class InfluenceScores:
    """Scores of the N scored rows of a store for J subtasks, which may belong to several target sets."""

    rows: RowTable
    """Which rows they are, in the pool's order."""
    scores_NJ: NDArray[np.float32]
    """score(z, j)."""
    subtasks: tuple[str, ...]
    """Name of each of the J columns."""
    target_sets: tuple[str, ...]
    """The target set that each of the J columns belongs to."""

    def of(self, *target_sets: str) -> "InfluenceScores":
        """The columns of these target sets; where there are several, `set/subtask` names each column."""
        columns = [j for j, name in enumerate(self.target_sets) if name in target_sets]
        if missing := set(target_sets) - set(self.target_sets):
            raise KeyError(f"no target set {min(missing)!r}; there are {sorted(set(self.target_sets))}")
        several = len(target_sets) > 1
        span = slice(columns[0], columns[-1] + 1) if columns else slice(0)
        side_by_side = len(columns) == len(self.subtasks[span])  # then a view: the scores may be larger than memory

        def label(j: int) -> str:
            name, subtask = self.target_sets[j], self.subtasks[j]
            return f"{name}/{subtask}" if several and subtask != name else subtask

        return InfluenceScores(
            rows=self.rows,
            scores_NJ=self.scores_NJ[:, span if side_by_side else columns],
            subtasks=tuple(label(j) for j in columns),
            target_sets=tuple(self.target_sets[j] for j in columns),
        )

    @cached_property
    def score_N(self) -> NDArray[np.float32]:
        """score(z): the highest over the subtasks."""
        return self.scores_NJ.max(axis=1)

    @cached_property
    def column_N(self) -> NDArray[np.int64]:
        """The column, a subtask, that gives each row its score; the first one where several do."""
        column_N = np.empty(len(self.scores_NJ), np.int64)
        for start in range(0, len(column_N), _ROWS_AT_ONCE):  # argmax copies a map that it may not write to
            rows = slice(start, start + _ROWS_AT_ONCE)
            column_N[rows] = self.scores_NJ[rows].argmax(axis=1)
        return column_N


def check_formula(aggregate: str, normalize: str) -> None:
    """Raise `SettingError` for an unknown word, or `cosine-of-mean` without cosine."""
    if aggregate not in AGGREGATES:
        raise SettingError(f"aggregate must be one of {', '.join(AGGREGATES)}, got {aggregate!r}")
    if normalize not in NORMALIZERS:
        raise SettingError(f"normalize must be one of {', '.join(NORMALIZERS)}, got {normalize!r}")
    if (aggregate, normalize) == ("cosine-of-mean", "none"):
        raise SettingError("aggregate cosine-of-mean has no meaning with normalize none; leave one of them out")


def subtask_queries(
    features_MK: Tensor, subtask_M: Sequence[int], num_subtasks: int, *, aggregate: str, normalize: str
) -> Tensor:
    """One query a subtask, such that ⟨φ, query⟩ is the row's score before w_c.

    Args:
        features_MK: ψ of the targets at one checkpoint, not normalised, float32.
        subtask_M: the subtask of each target, 0 ≤ j < num_subtasks.
        num_subtasks: J.
        aggregate: `mean-of-cosines`, the mean of the unit targets, or `cosine-of-mean`, the paper's text: the
            unit vector of the mean target.
        normalize: `cosine`, or `none`: the mean target itself, in gradient units.

    Returns:
        queries_JK, float32.

    Raises:
        SettingError: an unknown word, or `cosine-of-mean` without cosine.
    """
    check_formula(aggregate, normalize)
    if (aggregate, normalize) == ("mean-of-cosines", "cosine"):
        features_MK = torch.nn.functional.normalize(features_MK, dim=1, eps=0)
    index_M = torch.as_tensor(subtask_M, device=features_MK.device)
    sums_JK = features_MK.new_zeros(num_subtasks, features_MK.shape[1]).index_add(0, index_M, features_MK)
    queries_JK = sums_JK / torch.bincount(index_M, minlength=num_subtasks)[:, None]
    if aggregate == "cosine-of-mean":  # a mean of zero has no direction, and scores zero
        return torch.nn.functional.normalize(queries_JK, dim=1, eps=torch.finfo(torch.float32).tiny)
    return queries_JK


def influence_scores_ref(
    features: Sequence[NDArray],
    targets: Sequence[NDArray],
    weights: Sequence[float],
    subtask_M: Sequence[int],
) -> NDArray[np.float64]:
    """The definition, a cosine at a time, in float64.

    Args:
        features: φ_c (N, K) for each checkpoint; targets: ψ_c (M, K); weights: w_c; subtask_M: as above.

    Returns:
        scores_NJ.
    """
    num_rows, num_subtasks = len(features[0]), max(subtask_M) + 1
    scores_NJ = np.zeros((num_rows, num_subtasks))
    for j in range(num_subtasks):
        members = [m for m, subtask in enumerate(subtask_M) if subtask == j]
        for n in range(num_rows):
            for m in members:
                for phi_NK, psi_MK, weight in zip(features, targets, weights, strict=True):
                    phi, psi = phi_NK[n].astype(np.float64), psi_MK[m].astype(np.float64)
                    cosine = phi @ psi / np.sqrt((phi @ phi) * (psi @ psi))
                    scores_NJ[n, j] += weight * cosine / len(members)
    return scores_NJ
