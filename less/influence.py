"""Influence of every stored row on every subtask of the targets: one exact scan, block by block.

    score(z, j) = mean over targets v in subtask j of Σ_c w_c cos(φ_c(z), ψ_c(v))
    score(z)    = max_j score(z, j)                                   (LESS, Xia et al. 2024, Def. 3.1 and §4.2)

The score is linear in unit targets, so each subtask is one query per checkpoint, the mean of its unit
targets, and a scan costs subtasks, not targets. Which rows to keep is `less.selection`'s business.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datastore import Datastore, RowTable
from datastore.errors import SettingError
from less.progress import Progress

__all__ = [
    "AGGREGATES",
    "NORMALIZERS",
    "InfluenceScores",
    "check_formula",
    "influence_scores",
    "influence_scores_ref",
    "subtask_queries",
]

AGGREGATES = ("mean-of-cosines", "cosine-of-mean")
NORMALIZERS = ("cosine", "none")

CHUNK_VALUES = 2**20
"""Features that are cast and multiplied at once: 4 MB of float32."""


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

        def label(j: int) -> str:
            name, subtask = self.target_sets[j], self.subtasks[j]
            return f"{name}/{subtask}" if several and subtask != name else subtask

        return InfluenceScores(
            rows=self.rows,
            scores_NJ=self.scores_NJ[:, columns],
            subtasks=tuple(label(j) for j in columns),
            target_sets=tuple(self.target_sets[j] for j in columns),
        )

    @cached_property
    def score_N(self) -> NDArray[np.float32]:
        """score(z): the highest over the subtasks."""
        return self.scores_NJ.max(axis=1)

    @cached_property
    def subtask_N(self) -> list[str]:
        """The subtask that gives each row its score; the first one where several do."""
        return [self.subtasks[j] for j in self.scores_NJ.argmax(axis=1)]


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


def influence_scores(
    store: Datastore,
    feature_set: str,
    queries_JK: Mapping[str, Tensor],
    weights: Mapping[str, float],
    *,
    normalize: str = "cosine",
    verify: bool = True,
    progress: bool = False,
) -> NDArray[np.float32]:
    """Σ_c w_c ⟨φ_c, query_c⟩ for every scored row, from memory-mapped blocks; memory is a few blocks.

    Args:
        store: a sealed store.
        feature_set: which of its feature sets to read.
        queries_JK: by checkpoint, from `subtask_queries`.
        weights: w_c by checkpoint, used as given.
        normalize: `cosine` uses the stored unit rows, `none` gives them their norms back.
        verify: check each shard's checksum before it is used.
        progress: show a bar.

    Returns:
        scores_NJ, float32, in the pool's order.

    Raises:
        DamagedStoreError: a shard is not what the manifest says.
    """
    num_subtasks, width = next(iter(queries_JK.values())).shape
    scores_NJ = np.zeros((store.num_rows, num_subtasks), dtype=np.float32)
    # Rows are cast a few at a time, into one buffer: they are multiplied while they are still in the cache, and
    # fresh memory would cost ten times the cast in page faults.
    buffer_nK = torch.empty(max(1, CHUNK_VALUES // width), width)
    total = store.num_rows * len(weights)
    with Progress(total=total, description="scan", enabled=progress) as bar:
        for checkpoint, weight in weights.items():
            query_JK = weight * queries_JK[checkpoint].to("cpu", torch.float32)
            for block in store.iter_blocks(feature_set, checkpoint, verify=verify):
                block_nJ = scores_NJ[block.start : block.stop]
                for start in range(0, len(block_nJ), len(buffer_nK)):
                    chunk = slice(start, start + len(buffer_nK))
                    features_nK = torch.from_numpy(block.features_nK[chunk])
                    products_Jn = (query_JK @ buffer_nK[: len(features_nK)].copy_(features_nK).T).numpy()
                    if normalize == "none":
                        products_Jn *= block.norms_n[chunk]
                    block_nJ[chunk] += products_Jn.T
                bar.advance(len(block_nJ))
    return scores_NJ


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
