"""Compact a store: rows that were deleted from it leave no trace, not even their numbers.

A row's key is its number in its source, so where some rows of a source are deleted, another file has to stand for it:
the same rows without these. It is rendered as the store's pool was, and taken only if every row of it has the tokens
that the store has a digest of, and every row that was skipped or set aside its old label. No gradient is computed
again. How the new store is written is `datastore.derive`'s business.
"""

from collections.abc import Iterator, Sequence
from heapq import merge
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from datastore import Datastore
from datastore.build import SourceEntry
from datastore.deletion import Watch
from datastore.derive import Renumbered, compact_store
from datastore.errors import DataError, SettingError
from datastore.shards import DELETED, SkippedRow
from less.data.conversations import RowProblem
from less.data.records import Record, Source
from less.data.rendering import Renderer
from less.data.sources import stem_of
from less.pool import entry_of, open_sources
from less.progress import Progress
from less.row_ranges import content_digest
from less.scoring import ScoreConfig, open_renderer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["compact"]


def compact(
    *,
    datastore: "str | Path | Datastore",
    output: "str | Path",
    data: Any = None,
    tokenizer: "str | Path | PreTrainedTokenizerBase | None" = None,
    trust_remote_code: bool = False,
    watch: Watch = lambda done, total: None,
    progress: bool = True,
) -> Datastore:
    """Write a store that has all of another one but its deleted rows, and no trace of these.

    Args:
        datastore: the store that rows were deleted from. It stays as it is.
        output: the new store's folder.
        data: for each source that lost some of its rows, in their order: the same file without these rows. A source
            that lost all its rows is left out.
        tokenizer: where it has moved since the build.
        trust_remote_code: let code that comes with the tokenizer run.
        watch: told of shards as they are written.
        progress: show progress on standard error.

    Raises:
        DataError: a file is not the source without the deleted rows.
        ProvenanceError: the tokenizer or its template is another.
        SettingError: nothing was deleted, or not as many files are given as sources have lost rows.
    """
    store = datastore if isinstance(datastore, Datastore) else Datastore.open(datastore)
    deleted = {int(number): rows for number, rows in store.manifest.deleted.items()}
    changed = [number for number, rows in sorted(deleted.items()) if len(rows) < store.sources[number].num_rows]
    given = [] if data is None else open_sources(data)
    if given and len(given) != len(changed):
        names = ", ".join(store.sources[number].name for number in changed) or "none"
        raise SettingError(
            f"{len(given)} files are given, expected one for each source that has lost some of its rows and has others "
            f"left, in this order: {names}"
        )
    renumbered = {}
    if given:
        limit = store.settings["rendering"]["max_length"]
        config = ScoreConfig(trust_remote_code=trust_remote_code)
        renderer = open_renderer(store, config, None, tokenizer, limit)
        total = sum(source.num_rows for source in given)
        with Progress(total=total, description="compare", enabled=progress) as bar:
            for number, source in zip(changed, given, strict=True):
                renumbered[number] = _Comparison(store, number, source, renderer).renumbered(deleted[number], bar)
    compact_store(store, output, renumbered, watch=watch)
    return Datastore.open(output)


class _Comparison:
    """A source of a store, and the file that is to be the same without the deleted rows."""

    def __init__(self, store: Datastore, number: int, source: Source, renderer: Renderer) -> None:
        self.store, self.number, self.source, self.renderer = store, number, source, renderer
        self.entry: SourceEntry = store.sources[number]

    def renumbered(self, deleted: Sequence[int], bar: Progress) -> Renumbered:
        """What takes the old source's place; `DataError` unless it has just the rows that are not deleted."""
        rows_R = np.setdiff1d(np.arange(self.entry.num_rows), deleted)
        if self.source.num_rows != len(rows_R):
            raise DataError(
                f"{self.source.location or self.source.name} has {self.source.num_rows} rows, expected {len(rows_R)}: "
                f"the {self.entry.num_rows} of {self.entry.name} without the {len(deleted)} that are deleted"
            )
        for (old, known), record in zip(self._iter_known(), self.source.iter_records(), strict=True):
            found = self._label(record) if isinstance(known, SkippedRow) else self._digest(record)
            if found != (self._old_label(known) if isinstance(known, SkippedRow) else known):
                raise DataError(
                    f"{record.where} is not row {old} of {self.entry.name}, as the store has it. Expected the same "
                    "file without the deleted rows, the others in their order and unaltered"
                )
            bar.advance()
        return Renumbered(entry=entry_of(self.source), rows_R=rows_R, named=self._named)

    def _iter_known(self) -> Iterator[tuple[int, int | SkippedRow]]:
        """Number and content of each old row that is not deleted; of one without features what is said of it."""
        rows = self.store.rows(verify=False)
        own_N = rows.sources_N == self.number
        digests = zip(map(int, rows.rows_N[own_N]), map(int, rows.digests_N[own_N]), strict=True)
        spans = (span for span in self.store.manifest.ranges if span.source == self.number)
        left_out = ((row.row, row) for span in spans for row in self.store.left_out(span) if row.reason != DELETED)
        known: Iterator[tuple[int, int | SkippedRow]] = merge(digests, left_out, key=itemgetter(0))
        return known

    def _named(self, start: int, stop: int) -> list[tuple[str, str]]:
        return [(record.id, record.where) for record in self.source.iter_records(start, stop)]

    def _digest(self, record: Record) -> int | None:
        try:
            return content_digest(self.renderer.render_record(record))
        except RowProblem:
            return None

    def _label(self, record: Record) -> str | None:
        """A row's own label; None for one that is made from its number."""
        return None if record.id == f"{record.label}:{record.number}" else record.id

    def _old_label(self, row: SkippedRow) -> str | None:
        made = f"{stem_of(self.entry.name)}:{row.row}"
        return None if row.id == made else row.id
