"""The pool: its sources as a build is given them, and opened again for a finished store.

A store keeps no text. What needs it (the selected rows, `bm25`, near-duplicates) reads the pool again here, as it was
when the store was built, or not at all.
"""

import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datastore import Datastore, RowTable, SourceEntry
from datastore.errors import DataError
from less.data.records import Record, Source, open_source

__all__ = ["Pool", "entry_of", "open_sources"]

_ROWS_AT_ONCE = 2**14


class Pool:
    """The sources of a store, in its order.

    Args:
        store: whose rows are wanted.
        data: the pool, where it is not where the build found it (needed for rows given in memory).

    Raises:
        DataError: a source is no longer there, has changed, or is none of the store's.
    """

    def __init__(self, store: Datastore, data: Any) -> None:
        given = {} if data is None else {source.sha256: source for source in open_sources(data)}
        if strange := given.keys() - {entry.sha256 for entry in store.sources}:
            source = given[min(strange)]
            raise DataError(
                f"{source.location or source.name} is no source of {store.path}: sha256 {source.sha256[:12]}, expected "
                f"one of {', '.join(f'{entry.sha256[:12]} ({entry.name})' for entry in store.sources)}"
            )
        self.sources = [_reopen(entry, given) for entry in store.sources]

    @property
    def kind(self) -> str:
        """What the sources are, where they are all of one kind."""
        kinds = {source.kind for source in self.sources}
        return kinds.pop() if len(kinds) == 1 else "memory"

    def iter_records(self, rows: RowTable) -> Iterator[Record]:
        """The records of `rows`, which are in the pool's order, streamed."""
        for number, source in enumerate(self.sources):
            wanted = iter(rows.rows_N[rows.sources_N == number].tolist())
            row = next(wanted, None)
            for record in source.iter_records():
                if record.number == row:
                    yield record
                    row = next(wanted, None)

    def take(self, rows: RowTable, positions: NDArray[np.int64]) -> list[Record]:
        """The records at these positions of `rows`, in this order; each source is read once."""
        records: dict[int, Record] = {}
        for number in np.unique(rows.sources_N[positions]).tolist():
            own = positions[rows.sources_N[positions] == number]
            taken = self.sources[number].take(rows.rows_N[own].tolist())
            records.update(zip(own.tolist(), taken, strict=True))
        return [records[n] for n in positions.tolist()]

    def iter_take(self, rows: RowTable, positions: NDArray[np.int64]) -> Iterator[Record]:
        """`take`, with some of the records in memory at a time."""
        for start in range(0, len(positions), _ROWS_AT_ONCE):
            yield from self.take(rows, positions[start : start + _ROWS_AT_ONCE])


def _reopen(entry: SourceEntry, given: Mapping[str, Source]) -> Source:
    if entry.sha256 in given:
        return given[entry.sha256]
    if entry.location is None:
        raise DataError(f"{entry.name} was given in memory when the store was built; give it again as data")
    if os.path.isabs(entry.location) and not os.path.exists(entry.location):
        raise DataError(f"{entry.location} is no longer there; give the pool's {entry.name} again with --data")
    source = open_source(entry.location)
    if source.sha256 != entry.sha256:
        raise DataError(
            f"{entry.location} has changed since the store was built: sha256 {source.sha256[:12]}, expected "
            f"{entry.sha256[:12]}. Restore it, or give the file that was used with --data"
        )
    return source


def open_sources(data: Any) -> list[Source]:
    """One source for each file, data set or list of rows in `data`.

    Raises:
        DataError: there is nothing in them, or the same content is given twice.
    """
    is_several = isinstance(data, list | tuple) and not any(isinstance(row, dict) for row in data)
    sources = [open_source(part) for part in (data if is_several else [data])]
    if not sources:
        raise DataError("no data was given; expected a file, a hub name, a datasets.Dataset or a list of dicts")
    first_with: dict[str, Source] = {}
    for source in sources:
        if (first := first_with.setdefault(source.sha256, source)) is not source:
            raise DataError(f"{first.name} and {source.name} have the same content; give each source once")
    return sources


def entry_of(source: Source) -> SourceEntry:
    """What a store records of a source."""
    return SourceEntry(
        name=source.name,
        kind=source.kind,
        location=source.location,
        sha256=source.sha256,
        num_rows=source.num_rows,
    )
