"""Rows that are near a row in gradient space, how much of that is Adam's momentum, and where a person finds them.

    sim(z, z') = Σ_c ⟨x_c(z), x_c(z')⟩ = Σ_c ⟨x_c(z), d_c⟩⟨x_c(z'), d_c⟩ + the rest

x is `datastore.similarity`'s vector, x_c its part of checkpoint c, d_c the unit momentum direction, which all rows
share. Near rows come from the index of the store's features where there is one (`gradsift index`), else from a scan of
them all.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from datastore import GradientIndex, GradientSpace, RowTable
from datastore.errors import ProvenanceError
from datastore.index import index_folder
from less.data.conversations import conversation_of
from less.pool import Pool

__all__ = ["Neighbour", "PoolRow", "along_momentum", "index_in_words", "neighbours_of", "pool_rows"]


@dataclass(frozen=True, kw_only=True)
class PoolRow:
    """A row of the store, and where a person finds it."""

    id: str
    """Its label."""
    source: int
    """Number of its source in the store."""
    row: int
    """Its number in the source."""
    where: str
    """Where a person finds it."""
    text: str
    """What its turns say, or the beginning of that."""


@dataclass(frozen=True, kw_only=True)
class Neighbour(PoolRow):
    """A row that is near another in gradient space."""

    similarity: float
    """Σ_c w_c cos(φ_c, φ_c'), from the stored features."""
    from_momentum: float | None
    """The part of the similarity along the momentum directions; None where the update rule has none."""
    same_tokens: bool
    """Whether it has the very same tokens."""


def neighbours_of(
    space: GradientSpace, rows: RowTable, pool: Pool, position: int, count: int
) -> tuple[tuple[Neighbour, ...], str]:
    """The other rows nearest to one, best first, and how they were found, in words.

    An index of one checkpoint gives similarities at that checkpoint. Raises `DamagedStoreError`, `DataError`.
    """
    if count == 0:
        return (), "not asked for"
    space, similarities_k, near_k, how = _nearest(space, position, count)
    along_PC = along_momentum(space, np.concatenate([[position], near_k]))
    told = pool_rows(rows, pool, near_k)
    neighbours = tuple(
        Neighbour(
            **vars(told[n]),
            similarity=float(similarity),
            from_momentum=None if along_PC is None else float(along_PC[0] @ along_PC[1 + k]),
            same_tokens=bool(rows.digests_N[n] == rows.digests_N[position]),
        )
        for k, (n, similarity) in enumerate(zip(near_k.tolist(), similarities_k, strict=True))
    )
    return neighbours, how


def along_momentum(space: GradientSpace, positions_P: NDArray[np.int64]) -> NDArray[np.float64] | None:
    """⟨x_c, d_c⟩ of rows, (P, C); 0 at a checkpoint without momentum, None where no checkpoint has any."""
    K = space.width // len(space.weights)
    units_CK = np.zeros((len(space.weights), K))
    for c, name in enumerate(space.weights):
        direction_K = space.store.direction(space.feature_set, name).astype(np.float64)
        units_CK[c] = direction_K / (np.linalg.norm(direction_K) or 1)
    if not units_CK.any():
        return None
    along_PC = np.empty((len(positions_P), len(units_CK)))
    for first in range(0, len(positions_P), space.rows_at_once):
        some = slice(first, first + space.rows_at_once)
        vectors_nCK = space.vectors(positions_P[some]).reshape(-1, *units_CK.shape)
        along_PC[some] = np.einsum("nck,ck->nc", vectors_nCK, units_CK)
    return along_PC


def pool_rows(
    rows: RowTable, pool: Pool, positions_P: NDArray[np.int64], characters: int | None = None
) -> Mapping[int, PoolRow]:
    """The rows at some positions, by position, read from the pool; of their text only so many characters."""
    wanted = np.unique(positions_P)  # ascending, as labels are read fastest
    return {
        n: PoolRow(
            id=rows.ids[n],
            source=int(rows.sources_N[n]),
            row=int(rows.rows_N[n]),
            where=record.where,
            text=conversation_of(record.columns or {}).text[:characters],
        )
        for n, record in zip(wanted.tolist(), pool.iter_take(rows, wanted), strict=True)
    }


def index_in_words(index: GradientIndex) -> str:
    """`the index (flat)`, and of which checkpoint where it is not of all."""
    weights = index.entry.weights
    at = f" at {next(iter(weights))}" if len(weights) < len(index.space.store.checkpoints) else ""
    return f"the index ({index.entry.type}{at})"


def _nearest(
    space: GradientSpace, position: int, count: int
) -> tuple[GradientSpace, NDArray[np.float32], NDArray[np.int64], str]:
    """The space in which they are near, similarities and positions of the nearest other rows, and how."""
    where = np.array([position])
    how = f"a scan of all {space.num_rows:,} rows"
    if (index_folder(space.store, space.feature_set) / "index.json").exists():
        try:
            index = GradientIndex.open(space.store, space.feature_set, verify=space.verify)
        except ProvenanceError:
            how += " (the index is of another state of the store; run `gradsift index` again)"
        else:
            similarities_1k, near_1k = index.neighbours(where, count)
            how = f"{index_in_words(index)}, which finds {index.entry.recall:.2f} of a row's 10 nearest"
            return index.space, similarities_1k[0], near_1k[0], how
    similarities_1k, near_1k = space.nearest(where, count)
    return space, similarities_1k[0], near_1k[0], how
