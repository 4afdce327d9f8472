"""Rows deleted from a store, and the proof that they are gone.

A deletion is kept in `build.json`, so that it outlasts whatever happens to a shard: what is computed anew later is
computed without the row. How it is carried out, and in what order, is `writer`'s business. Here rows are found by their
labels, and a store is searched for what should no longer be in it: in its shards, in files that no manifest lists, and
in all that is made from the store and lies beside it.

Deleting the row from the pool's own file is left to its owner, a store without any trace of it to `derive`.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from datastore.beside import EMBEDDINGS, FILES, INDEX, PREFILTER, SCORES, beside, has_files
from datastore.build import BUILD, Build
from datastore.errors import DamagedStoreError, SettingError, StoreError
from datastore.files import open_tensors
from datastore.manifest import MANIFEST, Manifest
from datastore.shards import DELETED, rows_of
from datastore.store import Datastore
from datastore.writer import DatastoreWriter, iter_stale_shards

__all__ = ["DeletionReport", "FoundRows", "delete_rows", "find_rows", "verify_deleted"]

RowKey = tuple[int, int]
"""Number of a source, number of a row in it."""
Watch = Callable[[int, int], None]
"""Told of long work how many files are done, and of how many."""

CANNOT_SEE = (
    "copies, backups and snapshots of these folders",
    "the pool's own files, and what was selected from them or written with --scores before",
    "models that were trained on the rows",
)
_NAMED = 5


@dataclass(frozen=True, kw_only=True)
class FoundRows:
    """The rows that some labels and keys stand for."""

    rows: dict[RowKey, str]
    "Each row that the store has still, with its label."
    deleted: list[RowKey]
    "Those that are deleted from it already."
    repeated: dict[str, int]
    "Labels that several rows carry, and how many."
    unknown: list[str]
    "What is no row of the store."


def find_rows(
    store: Datastore, labels: Sequence[str] = (), rows: Sequence[RowKey] = (), *, ignore_missing: bool = False
) -> FoundRows:
    """The rows of a store with these labels, every one of them, and those with these keys, skipped ones too.

    A deleted row has no label any more, but for the time in which a deletion that was killed is not finished.

    Raises `SettingError` for a label or a key that is no row's, unless they are to be ignored.
    """
    known: dict[str, list[RowKey]] = {label: [] for label in labels}
    label_of: dict[RowKey, str] = {}
    asked, deleted, strange = set(rows), [], []
    for key, label in _iter_labels(store):
        if label in known:
            known[label].append(key)
        if label in known or key in asked:
            label_of[key] = label
    for source, row in dict.fromkeys(rows):
        if not (0 <= source < len(store.sources) and 0 <= row < store.sources[source].num_rows):
            strange.append(f"{source}:{row}")
        elif (source, row) not in label_of:
            deleted.append((source, row))
    if nowhere := {label for label, found in known.items() if not found}:
        left = {label: key for label, key in _iter_leftovers(store) if label in nowhere}
        deleted += [key for key in left.values() if key not in deleted]
        strange += [label for label in known if label in nowhere - left.keys()]
    if strange and not ignore_missing:
        more = f" and {len(strange) - _NAMED} more" if len(strange) > _NAMED else ""
        gone = sum(map(len, store.manifest.deleted.values()))
        hint = f"{gone} rows are deleted and have no label any more. " if gone else ""
        sources = ", ".join(f"{n}: {s.name}, {s.num_rows} rows" for n, s in enumerate(store.sources))
        raise SettingError(
            f"{store.path} has no row {', '.join(map(repr, strange[:_NAMED]))}{more}; expected labels of its rows, or "
            f"SOURCE:NUMBER with numbers from 0 ({sources}). {hint}"
            "Nothing was deleted; leave these out, or pass over them with --ignore-missing"
        )
    return FoundRows(
        rows=dict(sorted(label_of.items())),
        deleted=sorted(deleted),
        repeated={label: len(found) for label, found in known.items() if len(found) > 1},
        unknown=strange,
    )


def delete_rows(
    path: str | os.PathLike[str], rows: Collection[RowKey], *, watch: Watch = lambda done, total: None
) -> Manifest:
    """Delete rows from a store, from the embeddings beside it, and remove all else that is made from it.

    Only ranges with such rows are written anew. A call that was killed is finished by the same call, and by whatever
    writes to the store next. Readers that have the store open go on, or are told to open it again.

    Raises `StoreError` (no complete store, or rows are being added to it), `StoreLockedError`, `SettingError` (no such
    row), `DamagedStoreError`, `DiskFullError`.
    """
    store = Datastore.open(path)
    with DatastoreWriter.reopen(path) as writer:
        if writer.build.sources != store.sources:
            new = writer.build.sources[len(store.sources)].name
            raise StoreError(
                f"{store.path} is not finished: rows of {new} were being added to it. Finish that with the same "
                "`gradsift build-datastore` command, then delete"
            )
        wanted = _by_source(sorted(rows))
        build = writer.build.with_deleted(wanted)
        total = sum(old != new for old, new in zip(store.manifest.shard_keys(), build.shard_keys(), strict=True))
        done = 0

        def advance(num_shards: int) -> None:
            nonlocal done
            done += num_shards
            watch(done, total)

        writer.delete(wanted, advance)
        return writer.seal()


@dataclass(kw_only=True)
class DeletionReport:
    """What a search for deleted rows has seen."""

    datastore: Path
    "The store."
    rows: list[RowKey]
    "Rows that were searched for."
    labels: list[str]
    "Labels that were searched for."
    looked_at: dict[str, int] = field(default_factory=dict)
    "What was looked at, and how many files of it."
    problems: dict[str, str] = field(default_factory=dict)
    "Each file that has a row or a label still, or that cannot be told to be without, and why."
    cannot_see: tuple[str, ...] = CANNOT_SEE
    "Where rows may be that this cannot look at."

    def note(self, path: Path, problem: str) -> None:
        """Add a problem of a file."""
        known = self.problems.get(str(path))
        self.problems[str(path)] = f"{known}; {problem}" if known else problem

    def count(self, what: str, num_files: int = 1) -> None:
        """Count files as looked at."""
        self.looked_at[what] = self.looked_at.get(what, 0) + num_files


def verify_deleted(
    path: str | os.PathLike[str],
    rows: Sequence[RowKey] | None = None,
    labels: Sequence[str] = (),
    *,
    watch: Watch = lambda done, total: None,
) -> DeletionReport:
    """Search a store, every file in its folder, and what lies beside it, for rows that should be gone.

    Args:
        path: a complete store.
        rows: keys of the rows; None for every row that the store says is deleted.
        labels: labels that no row must carry.
        watch: told of the store's files.

    Raises:
        SettingError: no such row.
        StoreError: the store cannot be opened, so nothing can be said of it.
    """
    store = Datastore.open(path)
    keys = _deleted_keys(store.manifest) if rows is None else sorted(set(rows))
    store.manifest.with_deleted(_by_source(keys))  # or raises
    report = DeletionReport(datastore=store.path, rows=keys, labels=sorted(set(labels)))
    if keys or labels:
        _Search(store, keys, report).run(watch)
    return report


class _Search:
    """One store's folder, and what lies beside it, searched for rows and labels."""

    def __init__(self, store: Datastore, keys: Sequence[RowKey], report: DeletionReport) -> None:
        self.store, self.report, self.labels = store, report, set(report.labels)
        self.rows = {source: set(rows) for source, rows in _by_source(keys).items()}

    def run(self, watch: Watch) -> None:
        """Look at everything."""
        store, report = self.store, self.report
        self._look_at_promises()
        listed = {key.path: key for key in store.manifest.shard_keys()}
        total = len(listed)
        for done, (path, key) in enumerate(listed.items(), start=1):
            try:
                shard = store.shard(key)
            except DamagedStoreError as error:
                report.note(store.path / path, str(error))
            else:
                rows, ids = [*shard.rows_N.tolist(), *shard.set_aside], [*shard.ids, *shard.set_aside.values()]
                self._look_at_rows(store.path / path, key.source, rows, ids, shard.skipped)
            watch(done, total)
        report.count(f"shards of {store.path.name}", total)
        others = {BUILD, MANIFEST, ".lock", *store.manifest.directions}
        for file in _iter_files(store.path):
            name = file.relative_to(store.path).as_posix()
            if name not in listed and name not in others:
                report.count(f"other files of {store.path.name}")
                self._look_at_unlisted(file)
        for kind in (INDEX, SCORES):
            self._look_at_made(kind)
        for kind in (PREFILTER, EMBEDDINGS):
            self._look_at_store(kind)

    def _look_at_promises(self) -> None:
        """What `build.json` and the manifest say, by which later work is held to the deletion."""
        store, report = self.store, self.report
        build = Build.load(store.path)
        for file, says in ((BUILD, build), (MANIFEST, store.manifest)):
            left = [
                f"{source}:{row}"
                for source, rows in self.rows.items()
                for row in sorted(rows - set(says.deleted.get(str(source), [])))
            ]
            if left:
                report.note(store.path / file, f"it does not say that {_some(left)} are deleted")
        listed = Counter(row.id for rows in store.manifest.ranges for row in rows.skipped)
        if named := sorted(self.labels & listed.keys()):
            report.note(store.path / MANIFEST, f"it has the label {_some(named)} among the skipped rows")
        report.count(f"{BUILD} and {MANIFEST} of {store.path.name}", 2)

    def _look_at_rows(
        self, file: Path, source: int, rows: Collection[int], ids: Collection[str], skipped: Collection[Any]
    ) -> None:
        wanted = self.rows.get(source, set())
        named = [row for row in skipped if row.row in wanted and (row.reason != DELETED or row.id or row.detail)]
        if found := sorted(wanted & set(rows)) + sorted(row.row for row in named):
            self.report.note(file, f"it has the row {_some([f'{source}:{row}' for row in found])}")
        if labels := sorted(self.labels & ({*ids} | {row.id for row in skipped})):
            self.report.note(file, f"it has the label {_some(labels)}")

    def _look_at_unlisted(self, file: Path) -> None:
        """A file that the manifest does not list: a shard of an earlier state tells by itself what rows it has."""
        if file.is_symlink():
            self.report.note(file, "it is a link, which was not followed")
            return
        try:
            source, rows, ids, skipped = _read_shard(file)
        except (DamagedStoreError, KeyError, TypeError, ValueError):
            self.report.note(file, "the store does not list it, and what it holds cannot be told")
            return
        self._look_at_rows(file, source, rows, ids, skipped)

    def _look_at_made(self, kind: str) -> None:
        """Index or scores: without the rows if they are of the store as it is now."""
        place = beside(self.store.path, kind)
        if not os.path.lexists(place):
            return
        if place.is_symlink():
            self.report.note(place, "it is a link, which was not followed")
            return
        known = {file for pattern in FILES[kind] for file in place.glob(pattern)}
        fresh: dict[Path, bool] = {}
        for file in _iter_files(place):
            self.report.count(f"files of {place.name}")
            if file not in known:
                self.report.note(file, "it is no part of what is made from the store, and what it holds cannot be told")
                continue
            if file.parent not in fresh:
                fresh[file.parent] = _state_of(kind, file.parent) == self.store.manifest.sha256
            if not fresh[file.parent] and file.name != ".lock":
                self.report.note(file, "it was made from an earlier state of the store, or cannot be told not to be")

    def _look_at_store(self, kind: str) -> None:
        """A store beside this one: it knows the rows by the same sources, under numbers of its own."""
        place = beside(self.store.path, kind)
        if not os.path.lexists(place) or (place.is_dir() and not has_files(place)):
            return
        try:
            inner = Datastore.open(place)
        except StoreError as error:
            self.report.note(place, f"it cannot be opened, and what it holds cannot be told: {error}")
            return
        numbers = {source.sha256: number for number, source in enumerate(inner.sources)}
        keys = [
            (numbers[self.store.sources[source].sha256], row)
            for source, rows in self.rows.items()
            for row in rows
            if self.store.sources[source].sha256 in numbers
        ]
        _Search(inner, sorted(keys), self.report).run(lambda done, total: None)


def _iter_labels(store: Datastore) -> Iterator[tuple[RowKey, str]]:
    """Key and label of every row that is not deleted, skipped ones and those set aside too."""
    rows = store.rows(verify=False)
    keys = zip(map(int, rows.sources_N), map(int, rows.rows_N), strict=True)  # no list: there may be many rows
    yield from zip(keys, rows.ids, strict=True)
    for span in store.manifest.ranges:
        for row in store.left_out(span):
            if row.reason != DELETED:
                yield (span.source, row.row), row.id


def _iter_leftovers(store: Datastore) -> Iterator[tuple[str, RowKey]]:
    """Label and key of deleted rows that are still in shards which a killed deletion has left."""
    for file in iter_stale_shards(store.path, Build.load(store.path), store.manifest):
        try:
            source, rows, ids, skipped = _read_shard(file)
        except (DamagedStoreError, KeyError, TypeError, ValueError):
            continue
        gone = set(store.manifest.deleted.get(str(source), []))
        yield from ((label, (source, row)) for label, row in zip(ids, rows, strict=True) if row in gone)
        yield from ((row.id, (source, row.row)) for row in skipped if row.row in gone and row.reason != DELETED)


@dataclass(frozen=True)
class _Skipped:
    row: int
    reason: str
    id: str
    detail: str


def _read_shard(file: Path) -> tuple[int, list[int], list[str], list[_Skipped]]:
    """Source, rows, labels and skipped rows of a shard, by what it says itself, wherever it lies.

    A row that was set aside is among the rows: of it too there is a label.
    """
    metadata, tensors = open_tensors(file)
    skipped = [_Skipped(row["row"], row["reason"], row["id"], row["detail"]) for row in metadata["skipped"]]
    key = metadata["key"]
    rows = np.asarray(tensors["rows_N"]).tolist() + rows_of(metadata.get("set_aside", ""), key["start"], key["stop"])
    ids = [*metadata["ids"], *metadata.get("set_aside_ids", [])]
    if len(rows) != len(ids):
        raise ValueError(f"{len(rows)} rows have {len(ids)} labels")
    return int(key["source"]), rows, ids, skipped


def _state_of(kind: str, folder: Path) -> str | None:
    """The manifest's sha256 that an index or a score matrix says it is of; None where it says none."""
    try:
        doc: Mapping[str, Any] = json.loads((folder / f"{kind}.json").read_bytes())
        return str(doc["manifest_sha256"] if kind == INDEX else doc["made_of"]["manifest"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _iter_files(folder: Path) -> Iterator[Path]:
    """Every file and every link under a folder; links are not followed."""
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            yield from _iter_files(entry)
        else:
            yield entry


def _deleted_keys(build: Build) -> list[RowKey]:
    return sorted((int(source), row) for source, rows in build.deleted.items() for row in rows)


def _by_source(keys: Collection[RowKey]) -> dict[int, list[int]]:
    rows: dict[int, list[int]] = {}
    for source, row in keys:
        rows.setdefault(source, []).append(row)
    return rows


def _some(names: Sequence[object]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(map(str, names[:_NAMED])) + more
