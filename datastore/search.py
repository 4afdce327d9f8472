"""Nearest rows: which rows of a store have the largest inner product with a query.

The answer is exact: FAISS multiplies a block at a time, on a GPU where there is one, and the choice of the k
largest is made here, so that equal scores go to the earlier row. (`faiss.knn` leaves ties open, and took
twice the time of the product alone on a CPU.) FAISS is imported on first use.

The scan of several checkpoints at once is `similarity`, an index that reads part of the rows `index`. Influence scores,
which need every row and not the nearest, are left to `less.influence`.
"""

import importlib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

import numpy as np
import numpy.typing as npt

from datastore.coding import as_float32
from datastore.errors import GradsiftError, SettingError
from datastore.store import Datastore

__all__ = ["Best", "import_faiss", "inner_product", "nearest_rows", "nearest_rows_ref", "use_gpu"]

DISTRIBUTIONS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu11", "faiss-gpu-cu12", "faiss-gpu-cuvs", "faiss-cuda")
QUERIES_AT_ONCE = 1024  # bounds the scores held at a time to these × one shard

Positions = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float32]


def import_faiss() -> ModuleType:
    """The module `faiss`; `GradsiftError` if it is absent, or a mix of two distributions."""
    installed = [f"{name} {found}" for name in DISTRIBUTIONS if (found := _version(name))]
    swap = f"`pip uninstall --yes {' '.join(DISTRIBUTIONS)}`, then `pip install faiss-cpu` or `faiss-gpu`"
    if len(installed) > 1:
        raise GradsiftError(
            f"{' and '.join(installed)} are installed together: they own the same import name and have "
            f"overwritten each other's files. Keep one: {swap}."
        )
    try:
        faiss = importlib.import_module("faiss")
    except ImportError as error:
        raise GradsiftError(f"faiss cannot be imported ({error}). Install one: {swap}.") from error
    if not hasattr(faiss, "__version__") or not hasattr(faiss, "pairwise_distances"):
        raise GradsiftError(
            "faiss is installed in part: another distribution of the same import name was uninstalled and "
            f"took its files along. Install it again: {swap}."
        )
    return faiss


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def use_gpu() -> bool:
    """Whether FAISS has a GPU. Ask before any of its GPU calls: without one they abort the process."""
    get_num_gpus = getattr(import_faiss(), "get_num_gpus", lambda: 0)
    return bool(get_num_gpus() > 0)


def nearest_rows(
    store: Datastore, feature_set: str, checkpoint: str, queries_MK: npt.NDArray[np.float32], k: int
) -> tuple[Scores, Positions]:
    """The min(k, rows) positions of largest inner product with each query, best first, and the scores.

    Takes float32 queries (M, K). Gives scores (M, k) float32 and positions (M, k) int64; equal scores go to
    the earlier row. Holds one shard in float32 and its scores for `QUERIES_AT_ONCE` queries at a time.
    Raises `SettingError` for a k below 1 or queries of another shape or not finite, `DamagedStoreError`.
    """
    _check(store, feature_set, queries_MK, k)
    multiply, best = inner_product(), Best(len(queries_MK), min(k, store.num_rows))
    for block in store.iter_blocks(feature_set, checkpoint):
        features_nK = as_float32(block.features_nK)
        for first in range(0, len(queries_MK), QUERIES_AT_ONCE):
            queries_mK = np.ascontiguousarray(queries_MK[first : first + QUERIES_AT_ONCE])
            best.add(first, block.start, multiply(queries_mK, features_nK))  # (m, n)
    return best.scores_Mk, best.positions_Mk


class Best:
    """The k largest scores of each of M queries over the rows seen so far, equal ones to the earlier row."""

    def __init__(self, M: int, k: int) -> None:
        self.scores_Mk: Scores = np.full((M, k), -np.inf, np.float32)
        self.positions_Mk: Positions = np.full((M, k), -1, np.int64)

    def add(self, first: int, start: int, scores_mn: Scores) -> None:
        """Take in the scores of the queries from `first` on the rows from position `start` on: none seen before."""
        k = self.scores_Mk.shape[1]
        worst_m1 = self.scores_Mk[first : first + len(scores_mn), -1:]
        better_mn = scores_mn > worst_m1  # an equal score would lose: its row is later
        for m in np.flatnonzero(better_mn.any(axis=1)):
            found = np.flatnonzero(better_mn[m])
            scores = np.concatenate([self.scores_Mk[first + m], scores_mn[m, found]])
            positions = np.concatenate([self.positions_Mk[first + m], start + found])
            order = np.argsort(-scores, kind="stable")[:k]
            self.scores_Mk[first + m], self.positions_Mk[first + m] = scores[order], positions[order]


def nearest_rows_ref(
    store: Datastore, feature_set: str, checkpoint: str, queries_MK: npt.NDArray[np.float32], k: int
) -> tuple[Scores, Positions]:
    """`nearest_rows` with the whole store in memory."""
    features_NK = np.concatenate([as_float32(b.features_nK) for b in store.iter_blocks(feature_set, checkpoint)])
    scores_MN = queries_MK @ features_NK.T
    positions_Mk = np.argsort(-scores_MN, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores_MN, positions_Mk, axis=1), positions_Mk


def _check(store: Datastore, feature_set: str, queries_MK: npt.NDArray[np.float32], k: int) -> None:
    if k < 1:
        raise SettingError(f"k must be positive, got {k}")
    K = store.proj_dim(feature_set)
    if queries_MK.dtype != np.float32 or queries_MK.shape != (len(queries_MK), K):
        raise SettingError(f"queries must be float32 of shape (M, {K}), got {queries_MK.dtype} of {queries_MK.shape}")
    if not np.isfinite(queries_MK).all():
        raise SettingError("queries must be finite")


def inner_product() -> Callable[[npt.NDArray[np.float32], npt.NDArray[np.float32]], Scores]:
    """(m, K), (n, K) → (m, n), on the GPU where FAISS has one."""
    faiss = import_faiss()
    if use_gpu():
        resources = faiss.StandardGpuResources()
        return lambda a, b: faiss.pairwise_distance_gpu(resources, a, b, metric=faiss.METRIC_INNER_PRODUCT)
    return lambda a, b: faiss.pairwise_distances(a, b, metric=faiss.METRIC_INNER_PRODUCT)
