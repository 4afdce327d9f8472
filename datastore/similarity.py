"""How alike two rows are in gradient space, exactly.

    sim(z, z') = Σ_c w_c cos(φ_c(z), φ_c(z'))  =  ⟨x(z), x(z')⟩,   x(z) = (√w_c φ_c(z) / ‖φ_c(z)‖)_c,   Σ_c w_c = 1

φ_c are the rows as they are stored: what coding them in few bits has lost is lost here too. A vector x has the length
X = C·K, and no store of any size fits into memory as such vectors: here are some of them, or all of them a few at a
time. Finding near rows without reading every one is left to `index`; influence on targets to `less.influence`.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from datastore.coding import Features, as_float32
from datastore.errors import DataError, SettingError
from datastore.search import Best, Positions, Scores, inner_product
from datastore.shards import Shard
from datastore.store import Datastore

__all__ = ["GradientSpace", "choose_feature_set"]

VALUES_AT_ONCE = 2**20
"""Of vectors that are made at a time: 4 MB of float32 stay in the cache. With 64 MB it took twice the time."""
MAX_OPEN_SHARDS = 4096
"""Each is a memory map, of which a process may have some 65,000."""
SPARE = 32
"""Rows that the scan keeps beyond k, so that those which only rounding tells apart are ordered by exact sums."""

Vectors = npt.NDArray[np.float32]


def choose_feature_set(store: Datastore, asked: str | None) -> str:
    """The feature set asked for, or the only one; `SettingError`."""
    available = store.feature_sets
    if asked is None and len(available) == 1:
        return available[0]
    if asked not in available:
        found = "none was chosen" if asked is None else f"no {asked!r}"
        raise SettingError(
            f"{store.path} holds the feature sets {', '.join(available)}, {found}; choose one with --feature-set"
        )
    return asked


class GradientSpace:
    """The rows of one feature set at one or all checkpoints of a store, as vectors.

    Args:
        store: a sealed store, of gradients or of embeddings.
        feature_set: one of its feature sets; None where it has just one.
        checkpoint: one of its checkpoints; None for all, weighted as in an influence score.
        verify: check the checksum of every shard before its first use.

    Raises:
        DataError: the store has no row.
        SettingError: no such feature set or checkpoint; the store says nothing of its checkpoints' weights.
    """

    def __init__(
        self, store: Datastore, feature_set: str | None = None, checkpoint: str | None = None, *, verify: bool = True
    ) -> None:
        self.store, self.feature_set, self.verify = store, choose_feature_set(store, feature_set), verify
        if not store.num_rows:
            raise DataError(
                f"{store.path} has no row: all {store.manifest.counts['num_rows']} of its pool were skipped"
            )
        self.weights = _weights(store, checkpoint)
        self.width = len(self.weights) * store.proj_dim(self.feature_set)
        self.rows_at_once = max(1, VALUES_AT_ONCE // self.width)
        ranges = store.manifest.ranges
        self._stops = np.cumsum([rows.num_scored for rows in ranges])
        self._open = lru_cache(MAX_OPEN_SHARDS)(self._open_features)

    @property
    def num_rows(self) -> int:
        """N."""
        return self.store.num_rows

    def vectors(self, positions_P: Positions) -> Vectors:
        """x of the rows at these positions, (P, X) float32; only their shards are read. `DamagedStoreError`."""
        vectors_PX = np.empty((len(positions_P), self.width), np.float32)
        ranges_P = np.searchsorted(self._stops, positions_P, side="right")
        for number in np.unique(ranges_P).tolist():
            own = np.flatnonzero(ranges_P == number)
            places = positions_P[own] - (self._stops[number] - self.store.manifest.ranges[number].num_scored)
            for part, checkpoint in self._parts():
                features_NK, kept = self._open(number, checkpoint)
                vectors_PX[own, part] = self._weighted(as_float32(features_NK[kept[places]]), checkpoint)
        return vectors_PX

    def iter_vectors(self) -> Iterator[tuple[int, Vectors]]:
        """(position of the first, x of some consecutive rows) until all N have come; the memory is used again."""
        buffer_nX = np.empty((self.rows_at_once, self.width), np.float32)
        for blocks in self.store.iter_aligned(self.feature_set, list(self.weights), verify=self.verify):
            for first in range(blocks[0].start, blocks[0].stop, len(buffer_nX)):
                rows = slice(first - blocks[0].start, min(first + len(buffer_nX), blocks[0].stop) - blocks[0].start)
                vectors_nX = buffer_nX[: rows.stop - rows.start]
                for (part, checkpoint), block in zip(self._parts(), blocks, strict=True):
                    vectors_nX[:, part] = self._weighted(as_float32(block.features_nK[rows]), checkpoint)
                yield first, vectors_nX

    def similarities(self, vector_X: Vectors, positions_P: Positions) -> Scores:
        """sim of one vector with the rows at these positions, (P,) float32: equal rows have equal ones to the bit."""
        found_P = np.empty(len(positions_P), np.float32)
        for first in range(0, len(positions_P), self.rows_at_once):
            some = slice(first, first + self.rows_at_once)
            # no matrix product: in one, the sum's order depends on where a row stands
            found_P[some] = (self.vectors(positions_P[some]) * vector_X).sum(axis=1)
        return found_P

    def best(self, vector_X: Vectors, positions_P: Positions, k: int) -> tuple[Scores, Positions]:
        """Of these positions, each given once, the k most similar rows, best first; equal ones by position."""
        positions_P = np.sort(positions_P)
        found_P = self.similarities(vector_X, positions_P)
        order = np.argsort(-found_P, kind="stable")[:k]
        return found_P[order], positions_P[order]

    def nearest(self, positions_M: Positions, k: int) -> tuple[Scores, Positions]:
        """The min(k, N − 1) other rows most similar to each of these, by a scan of all rows.

        Gives similarities (M, k) float32 and positions (M, k) int64, best first; equal ones go to the earlier row.
        Raises `SettingError` for a k below 1 or a position that there is not, `DamagedStoreError`.
        """
        self.check(positions_M, k)
        k = min(k, self.num_rows - 1)
        vectors_MX = self.vectors(positions_M)
        multiply, best = inner_product(), Best(len(positions_M), min(k + 1 + SPARE, self.num_rows))
        for start, vectors_nX in self.iter_vectors():
            best.add(0, start, multiply(vectors_MX, vectors_nX))
        found = [
            self.best(vector_X, near[near != own], k)
            for vector_X, near, own in zip(vectors_MX, best.positions_Mk, positions_M, strict=True)
        ]
        return stacked(found, k)

    def nearest_ref(self, positions_M: Positions, k: int) -> tuple[Scores, Positions]:
        """`nearest` with all rows in memory."""
        vectors_NX = np.concatenate([vectors_nX.copy() for _, vectors_nX in self.iter_vectors()])
        found = []
        for m in positions_M.tolist():
            found_N = (vectors_NX * vectors_NX[m]).sum(axis=1)
            found_N[m] = -np.inf
            order = np.argsort(-found_N, kind="stable")[: min(k, self.num_rows - 1)]
            found.append((found_N[order], order))
        return stacked(found, min(k, self.num_rows - 1))

    def check(self, positions_M: Positions, k: int) -> None:
        """Raise `SettingError` for a k below 1 or a position that there is not."""
        if k < 1:
            raise SettingError(f"k must be positive, got {k}")
        if positions_M.ndim != 1 or ((positions_M < 0) | (positions_M >= self.num_rows)).any():
            raise SettingError(
                f"positions must be a list of numbers from 0 to {self.num_rows - 1}, got {positions_M.tolist()}"
            )

    def shard_of(self, position: int, checkpoint: str) -> tuple[Shard, int]:
        """The shard that holds a row, and the row's place in it."""
        number = int(np.searchsorted(self._stops, position, side="right"))
        first = self._stops[number] - self.store.manifest.ranges[number].num_scored
        shard = self._shard(number, checkpoint)
        return shard, int(self._kept(number, shard)[position - first])

    def _parts(self) -> Iterator[tuple[slice, str]]:
        K = self.width // len(self.weights)
        for number, checkpoint in enumerate(self.weights):
            yield slice(number * K, (number + 1) * K), checkpoint

    def _weighted(self, features_nK: npt.NDArray[np.float32], checkpoint: str) -> Vectors:
        norms_n1 = np.sqrt(np.square(features_nK).sum(axis=1, keepdims=True))
        return features_nK * (np.float32(self.weights[checkpoint] ** 0.5) / norms_n1)

    def _shard(self, number: int, checkpoint: str) -> Shard:
        rows = self.store.manifest.ranges[number]
        key = self.store.manifest.shard_key(self.feature_set, checkpoint, rows.source, rows.start, rows.stop)
        return self.store.shard(key, verify=self.verify)

    def _kept(self, number: int, shard: Shard) -> Positions:
        """The places in a shard of the rows that have a position."""
        return np.flatnonzero(self.store.manifest.ranges[number].scored(shard.rows_N))

    def _open_features(self, number: int, checkpoint: str) -> tuple[Features, Positions]:
        shard = self._shard(number, checkpoint)
        return shard.features_NK, self._kept(number, shard)


def stacked(found: list[tuple[Scores, Positions]], k: int) -> tuple[Scores, Positions]:
    """k scores and positions of each of M queries, as two arrays (M, k)."""
    scores_Mk, positions_Mk = np.empty((len(found), k), np.float32), np.empty((len(found), k), np.int64)
    for m, (scores, positions) in enumerate(found):
        scores_Mk[m], positions_Mk[m] = scores, positions
    return scores_Mk, positions_Mk


def _weights(store: Datastore, checkpoint: str | None) -> dict[str, float]:
    """w_c of the checkpoints that count, made to sum to 1."""
    if checkpoint is not None:
        if checkpoint not in store.checkpoints:
            known = ", ".join(store.checkpoints)
            raise SettingError(f"the datastore {store.path} has no checkpoint {checkpoint!r}; it has {known}.")
        return {checkpoint: 1.0}
    if len(store.checkpoints) == 1:
        return {store.checkpoints[0]: 1.0}
    try:
        weights = {name: float(store.settings["checkpoints"][name]["weight"]) for name in store.checkpoints}
    except (KeyError, TypeError, ValueError):
        raise SettingError(
            f"{store.path} says nothing of the weights of its checkpoints {', '.join(store.checkpoints)}; choose one"
        ) from None
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}
