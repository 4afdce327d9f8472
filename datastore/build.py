"""`build.json`: what a datastore is to hold. It is written first, before any work.

Settings, feature sets, checkpoints and sources say it all: from them follow every row range and every file
name. Settings are fixed for the store's life, and asking for others is refused field by field; sources can be
added, and rows of them deleted (`deletion`). What came of the build is left to `manifest`.
"""

import hashlib
import itertools
import json
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from datastore.errors import DamagedStoreError, FormatVersionError, ProvenanceError, SettingError
from datastore.files import canonical_json, from_json, write_atomic
from datastore.shards import DELETED, ShardKey, SkippedRow

__all__ = ["BUILD", "FORMAT", "VERSION", "Build", "SourceEntry", "differences", "json_hash", "read_json", "write_json"]

BUILD = "build.json"
FORMAT, VERSION = "gradsift-datastore", 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]{0,99}")


@dataclass(frozen=True, kw_only=True)
class SourceEntry:
    """One file or data set of the pool. Its place in the list of sources is its number."""

    name: str
    "What reports call it."
    kind: str
    'How to open it: "jsonl", "parquet", "dataset" or "memory".'
    location: str | None
    "Where to open it again; None for rows that were only in memory."
    sha256: str
    "Of its content: what it is recognised by."
    num_rows: int
    "Rows in it, whether they can be used or not."


@dataclass(frozen=True, kw_only=True)
class Build:
    """What a store is to hold. All but `environments`, `sources` and `deleted` is fixed for its life."""

    feature_sets: list[str]
    "Names, in order."
    checkpoints: list[str]
    "Names, in order."
    shard_rows: int
    "Rows of a source that one shard covers; the last range of a source may be shorter."
    settings: dict[str, Any]
    "Everything else that the numbers depend on, as JSON."
    environments: list[dict[str, Any]]
    "Machines and versions that wrote to it; recorded, never compared."
    sources: list[SourceEntry]
    "The pool, in order; it can grow."
    deleted: dict[str, list[int]] = field(default_factory=dict)
    "By the number of a source, as text: rows that the store is no longer to hold, ascending. It can grow."

    def check(self) -> None:
        """Raise `SettingError` for names that make no file name, or numbers out of range."""
        for what, names in (("feature set", self.feature_sets), ("checkpoint", self.checkpoints)):
            for name in names:
                if not _NAME.fullmatch(name):
                    raise SettingError(f"{what} {name!r} cannot name a folder: expected {_NAME.pattern}")
            if not names or len(set(names)) < len(names):
                raise SettingError(f"expected one {what} or more, each name once, got {names}")
        if self.shard_rows < 1:
            raise SettingError(f"shard_rows must be positive, got {self.shard_rows}")
        for source in self.sources:
            if source.num_rows < 1:
                raise SettingError(f"source {source.name} must have rows, got {source.num_rows}")
        num_rows = {str(number): source.num_rows for number, source in enumerate(self.sources)}
        for number, rows in self.deleted.items():
            if number not in num_rows:
                raise SettingError(f"rows of source {number} cannot be deleted: there are {len(num_rows)} sources")
            if not rows or rows != sorted(set(rows)) or rows[0] < 0 or rows[-1] >= num_rows[number]:
                last, got = num_rows[number] - 1, str(rows)[:200]
                raise SettingError(f"deleted rows of source {number} must ascend, from 0 to {last}, got {got}")

    @property
    def settings_hash(self) -> str:
        """Hash of what is fixed; every shard carries it."""
        return json_hash(self.fixed())

    def fixed(self) -> dict[str, Any]:
        """What is fixed for the store's life."""
        return {name: getattr(self, name) for name in ("feature_sets", "checkpoints", "shard_rows", "settings")}

    def row_ranges(self) -> Iterator[tuple[int, int, int]]:
        """(source, start, stop) of every range, in pool order."""
        for number, source in enumerate(self.sources):
            for start in range(0, source.num_rows, self.shard_rows):
                yield number, start, min(start + self.shard_rows, source.num_rows)

    def shard_keys(self) -> Iterator[ShardKey]:
        """Every shard, in the order in which a build computes them: a checkpoint is loaded once."""
        for checkpoint in self.checkpoints:
            for source, start, stop in self.row_ranges():
                for name in self.feature_sets:
                    yield self.shard_key(name, checkpoint, source, start, stop)

    def shard_key(self, feature_set: str, checkpoint: str, source: int, start: int, stop: int) -> ShardKey:
        """The shard of a range, as rows have been deleted from it."""
        return ShardKey(
            feature_set=feature_set,
            checkpoint=checkpoint,
            source=source,
            start=start,
            stop=stop,
            deleted=tuple(self._deleted(source, start, stop)),
        )

    def deleted_rows(self, source: int, start: int, stop: int) -> list[SkippedRow]:
        """The entries of a range's deleted rows: nothing in them tells what the rows were."""
        name = self.sources[source].name
        return [
            SkippedRow(row=row, where=f"{name}[{row}]", id="", reason=DELETED, detail="")
            for row in self._deleted(source, start, stop)
        ]

    def with_deleted(self, rows: Mapping[int, Iterable[int]]) -> Self:
        """A build without these rows either, by number of the source; `SettingError` for one that there is not."""
        deleted = {number: set(known) for number, known in self.deleted.items()}
        for source, more in rows.items():
            deleted.setdefault(str(source), set()).update(more)
        build = replace(self, deleted={number: sorted(rows) for number, rows in sorted(deleted.items()) if rows})
        build.check()
        return build

    def direction_keys(self) -> Iterator[tuple[str, str]]:
        """(feature set, checkpoint) of every momentum direction."""
        return itertools.product(self.feature_sets, self.checkpoints)

    def check_same_settings(self, asked: "Build", folder: Path) -> None:
        """Raise `ProvenanceError` naming every field that `asked` has otherwise."""
        if different := differences(self.fixed(), asked.fixed(), "the store"):
            raise ProvenanceError(
                f"the datastore {folder} was built with other settings: {'; '.join(different)}. "
                "Rerun with the store's settings, or choose another --datastore folder."
            )

    def with_source(self, source: SourceEntry) -> tuple[Self, int]:
        """A build that has `source`, and its number; `ProvenanceError` if the file has changed since."""
        for number, known in enumerate(self.sources):
            if known.sha256 == source.sha256 and known.num_rows == source.num_rows:
                return self, number
            if known.sha256 == source.sha256 or known.location == source.location is not None:
                raise ProvenanceError(
                    f"{source.location or source.name} has changed since it was added to the datastore: "
                    f"{source.num_rows} rows with sha256 {source.sha256}, expected {known.num_rows} with "
                    f"{known.sha256}. Put the file back as it was, give new rows as a file of their own, "
                    "or choose another --datastore folder."
                )
        return replace(self, sources=[*self.sources, source]), len(self.sources)

    def write(self, folder: Path) -> None:
        """Write `build.json`."""
        write_json(folder / BUILD, self.to_json())

    def to_json(self) -> dict[str, Any]:
        """All of it, with the name and version of the format."""
        doc = {"format": FORMAT, "version": VERSION} | asdict(self)
        return doc if self.deleted else {name: value for name, value in doc.items() if name != "deleted"}

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read `build.json`; `FormatVersionError`, or `DamagedStoreError`."""
        try:
            doc = read_json(folder / BUILD)
            build = cls.parse(doc)
        except (ValueError, RecursionError) as error:
            raise DamagedStoreError(
                f"{folder / BUILD} is damaged: {error}. Put it back from a copy, or choose another "
                "--datastore folder: without it nothing says what the shards were made from."
            ) from None
        return build

    @classmethod
    def parse(cls, doc: dict[str, Any]) -> Self:
        """The inverse of `to_json`; `ValueError`."""
        build: Self = from_json(cls, {k: v for k, v in doc.items() if k not in ("format", "version")})
        build.check()
        return build

    def _deleted(self, source: int, start: int, stop: int) -> list[int]:
        rows = self.deleted.get(str(source), [])
        return rows[bisect_left(rows, start) : bisect_left(rows, stop)]


def json_hash(value: object) -> str:
    """sha256 of a JSON value."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def write_json(path: Path, doc: dict[str, Any]) -> None:
    """Write a JSON file for programs and people."""
    write_atomic(path, [json.dumps(doc, sort_keys=True, indent=1, allow_nan=False).encode() + b"\n"])


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of this format; `ValueError` for any other, `FormatVersionError` for a newer one."""
    doc = json.loads(path.read_bytes())
    if type(doc) is not dict or doc.get("format") != FORMAT or type(doc.get("version")) is not int:
        raise ValueError(f"not JSON of the format {FORMAT}")
    if doc["version"] > VERSION:
        raise FormatVersionError(
            f"{path} has format version {doc['version']}; this gradsift reads up to {VERSION}. "
            "Upgrade it: `pip install --upgrade gradsift`."
        )
    return doc


def differences(ours: object, theirs: object, place: str, other: str = "this command") -> list[str]:
    """A line for every leaf of `ours`, found in `place`, that `theirs`, asked for now, has otherwise."""
    return [f"{name} is {_show(a)} in {place} and {_show(b)} in {other}" for name, a, b in _differences(ours, theirs)]


_ABSENT = object()


def _differences(ours: Any, theirs: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted path, our value, their value) of every leaf that two JSON values have otherwise."""
    if isinstance(ours, dict) and isinstance(theirs, dict) and ours and theirs:
        for name in sorted(ours.keys() | theirs.keys()):
            yield from _differences(ours.get(name, _ABSENT), theirs.get(name, _ABSENT), f"{path}.{name}".lstrip("."))
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for number, pair in enumerate(zip(ours, theirs, strict=True)):
            yield from _differences(*pair, f"{path}[{number}]")
    elif _show(ours, None) != _show(theirs, None):
        yield path, ours, theirs


def _show(value: Any, length: int | None = 200) -> str:
    text = "absent" if value is _ABSENT else canonical_json(value)
    return text if length is None or len(text) <= length else f"{text[:length]}…"
