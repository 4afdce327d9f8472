"""Which rows of a store are alike in gradient space, in groups, and which row of each group would stay.

    sim(z, z') = Σ_c w_c cos(φ_c(z), φ_c(z')) ≥ threshold        joins two rows; a group is all that are joined

The first row of a group in the pool stays, the others may go. A chain of likes is one group, so each of those others is
told with its own similarity to the row that stays, which can be below the threshold. The search is
`datastore.index`'s, and needs an index (`gradsift index`). Leaving out rows like better ones while selecting is left to
`less.selection`: there the row of the higher score stays.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from datastore import Datastore, GradientIndex
from datastore.errors import SettingError
from datastore.index import ROUNDING, NearDuplicates
from less.data.writing import check_outputs, write_lines
from less.neighbours import Neighbour, PoolRow, along_momentum, index_in_words, pool_rows
from less.pool import Pool
from less.progress import Progress

__all__ = ["AlikeGroup", "AlikeRows", "NearDuplicatesConfig", "near_duplicates"]

_CHARACTERS = 300
"""Of each row's text that are kept: a third of a pool may be alike."""


@dataclass(frozen=True, kw_only=True)
class NearDuplicatesConfig:
    """Settings of the search."""

    threshold: float = 0.95
    """Rows that are at least this similar are alike."""
    feature_set: str | None = None
    """Which of the store's feature sets; needed where it has several."""
    verify: bool = True
    """Check the checksum of every file that is read."""

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise SettingError(f"threshold must be above 0 and at most 1, got {self.threshold}")


@dataclass(frozen=True, kw_only=True)
class AlikeGroup:
    """Rows that are alike."""

    first: PoolRow
    """The earliest in the pool: the one that would stay."""
    others: tuple[Neighbour, ...]
    """The others in the pool's order, each with its similarity to the first."""

    @property
    def num_rows(self) -> int:
        """All of them."""
        return 1 + len(self.others)

    @property
    def num_same_tokens(self) -> int:
        """Of the others those with the very tokens of the first."""
        return sum(near.same_tokens for near in self.others)

    @property
    def similarities(self) -> tuple[float, float]:
        """The lowest and the highest."""
        found = [near.similarity for near in self.others]
        return min(found), max(found)

    @property
    def least(self) -> Neighbour:
        """The one least like the first."""
        return min(self.others, key=lambda near: near.similarity)


@dataclass(frozen=True, kw_only=True)
class AlikeRows:
    """The groups of likes in a store."""

    datastore: Path
    """The store."""
    feature_set: str
    """The feature set."""
    threshold: float
    """Rows that are at least this similar are alike."""
    num_rows: int
    """Scored rows of the store."""
    groups: tuple[AlikeGroup, ...]
    """The largest first; among equals the earlier one."""
    num_ids_shared: int
    """Rows that would go and have the id of a row that would stay: dropping by id would drop that one too."""
    found_by: str
    """How they were found, in words."""

    @property
    def num_others(self) -> int:
        """Rows that would go."""
        return sum(len(group.others) for group in self.groups)

    @property
    def num_same_tokens(self) -> int:
        """Of those the rows with the very tokens of the row that would stay."""
        return sum(group.num_same_tokens for group in self.groups)

    @property
    def num_by_way(self) -> int:
        """Of those the rows less similar to the row that would stay than the threshold: alike by way of others."""
        return sum(near.similarity < self.threshold - ROUNDING for near in self._others())

    @property
    def num_by_momentum(self) -> int:
        """Of those the rows whose similarity is mostly along Adam's momentum, which all rows share."""
        return sum((near.from_momentum or 0) > near.similarity / 2 for near in self._others())

    def iter_json(self) -> Iterator[dict[str, Any]]:
        """A JSON object for each row that would go, with the row that it is like; group by group.

        Not one for each group, since what people do with it is to drop rows: each object names one, by its id, and by
        its source and row number, which no two rows share; and the similarities can be filtered and sorted.
        """
        for number, group in enumerate(self.groups, start=1):
            like = asdict(group.first)
            for near in group.others:
                yield asdict(near) | {"group": number, "group_rows": group.num_rows, "like": like}

    def _others(self) -> Iterator[Neighbour]:
        return (near for group in self.groups for near in group.others)


def near_duplicates(
    *,
    datastore: str | Path | Datastore,
    data: Any = None,
    output: str | Path | None = None,
    progress: bool = True,
    **settings: Any,
) -> AlikeRows:
    """Find the rows of a store that are alike in gradient space, by its index.

    Args:
        datastore: a sealed store, of gradients or of embeddings, with an index of the feature set.
        data: the pool, where it is not where the build found it (needed for rows given in memory).
        output: JSON Lines file to write too, a line for each row that would go (`AlikeRows.iter_json`).
        progress: show progress on standard error.
        **settings: fields of `NearDuplicatesConfig`.

    Raises:
        DamagedStoreError: a file of the store or of its index is not as it was written.
        DataError: the pool has changed since the build.
        ProvenanceError: the index is of another state of the store.
        SettingError: a threshold that is out of range, or an output that cannot be written or is the pool.
        StoreError: there is no index.
    """
    config = NearDuplicatesConfig(**settings)
    store = datastore if isinstance(datastore, Datastore) else Datastore.open(datastore)
    index = GradientIndex.open(store, config.feature_set, verify=config.verify)
    pool = Pool(store, data)
    check_outputs([None if output is None else Path(output)], [source.location for source in pool.sources])
    with Progress(total=index.entry.num_rows, description="near-duplicates", enabled=progress) as bar:
        alike = index.near_duplicates(config.threshold, advance=bar.advance)
    found_by = index_in_words(index)
    if index.entry.num_probes < index.entry.num_lists:
        found_by += (
            f", which looks into {index.entry.num_probes:,} of {index.entry.num_lists:,} lists for each row and so "
            "can miss some"
        )
    groups, num_ids_shared = _groups(index, pool, alike)
    found = AlikeRows(
        datastore=store.path,
        feature_set=index.entry.feature_set,
        threshold=config.threshold,
        num_rows=index.entry.num_rows,
        groups=groups,
        num_ids_shared=num_ids_shared,
        found_by=found_by,
    )
    if output is not None:
        write_lines(output, map(json.dumps, found.iter_json()))
    return found


def _groups(index: GradientIndex, pool: Pool, alike: NearDuplicates) -> tuple[tuple[AlikeGroup, ...], int]:
    """The groups, the largest first, and how many rows that would go have the id of one that would stay."""
    if not alike.positions_D.size:
        return (), 0
    rows = index.space.store.rows(index.entry.feature_set, verify=index.space.verify)
    positions_P = np.union1d(alike.positions_D, alike.firsts_D)
    told = pool_rows(rows, pool, positions_P, _CHARACTERS)
    along_PC = along_momentum(index.space, positions_P)

    def neighbour(n: int, first: int, similarity: float) -> Neighbour:
        shared = None
        if along_PC is not None:
            a_C, b_C = along_PC[np.searchsorted(positions_P, [n, first])]
            shared = float(a_C @ b_C)
        return Neighbour(
            **vars(told[n]),
            similarity=similarity,
            from_momentum=shared,
            same_tokens=bool(rows.digests_N[n] == rows.digests_N[first]),
        )

    order_D = np.argsort(alike.firsts_D, kind="stable")
    columns = (alike.positions_D, alike.firsts_D, alike.similarities_D)
    in_groups = zip(*(column_D[order_D].tolist() for column_D in columns), strict=True)
    groups = [
        AlikeGroup(first=told[first], others=tuple(neighbour(*near) for near in others))
        for first, others in groupby(in_groups, key=lambda near: near[1])
    ]
    going = set(alike.positions_D.tolist())
    labels = {told[n].id for n in going}
    staying = {label for n, label in enumerate(rows.ids) if label in labels and n not in going}
    num_ids_shared = sum(told[n].id in staying for n in going)
    return tuple(sorted(groups, key=lambda group: -group.num_rows)), num_ids_shared
