"""Rows of a data file or data set, as they are: to the byte in JSON Lines, to the Arrow type in Parquet.

A bad row is a record with a `problem`, never an exception. JSON Lines has its own reader, since `datasets`
would turn dates and integers into other types and missing keys into nulls. Telling what kind of source a name
stands for is left to `records`, what a row says to `conversations`, rows back into a file to `writing`.
"""

import hashlib
import json
import os
import reprlib
from abc import ABC, abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from datastore.errors import DataError
from less.data.conversations import RowProblem

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "BOM",
    "JSON_LINES",
    "ROWS_AT_ONCE",
    "SUFFIXES",
    "Arrow",
    "Chunk",
    "JsonLines",
    "Memory",
    "Record",
    "Source",
    "json_of",
    "stem_of",
]

BOM = b"\xef\xbb\xbf"
JSON_LINES = (".jsonl", ".json", ".ndjson")
"""How the names of JSON Lines files end."""
SUFFIXES = (*JSON_LINES, ".parquet")
"""How the names of files that can be read end."""
ROWS_AT_ONCE = 1024
"""Rows that are turned from Arrow into Python at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One row of a source."""

    number: int
    """Row number in the source, from 0. With the source it is the row's key."""
    where: str
    """Where a person finds the row: `pool.jsonl:18` (file and line, from 1) or `name[17]`."""
    columns: dict[str, Any] | None
    """The row itself; None where it is not an object."""
    raw: bytes | None = None
    """JSON Lines only: the line without its newline."""
    problem: RowProblem | None = None
    """Why the row cannot be read, if so."""
    label: str = "row"
    """What the id of a row without an `id` begins with: the source's stem."""
    arrow: "pa.Table | None" = field(default=None, repr=False, compare=False)
    """Parquet and `datasets` only: the same row, one long, with its Arrow types."""

    @property
    def id(self) -> str:
        """The row's `id` column as text, else `label:number`. A label for people, not a key."""
        given = None if self.columns is None else self.columns.get("id")
        return f"{self.label}:{self.number}" if given is None else str(given)


def stem_of(name: str) -> str:
    """The name of a source without folder and suffix; a dot alone makes no suffix: `org/pool-1.0` is `pool-1.0`."""
    name = name.rsplit("/", 1)[-1]
    return next((name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)), name)


class Source(ABC):
    """Rows in a fixed order, read when they are asked for."""

    name: str
    """The file's or data set's name, as messages show it."""
    kind: str
    """"jsonl", "parquet", "dataset" or "memory"."""
    location: str | None
    """What opens it again: an absolute path or a hub name. None for data in memory."""
    sha256: str
    """Of the file's bytes (a folder's Parquet files by name), else of the rows' JSON, one line a row."""
    num_rows: int
    """Rows, bad ones included; blank lines are not rows."""

    @cached_property
    def stem(self) -> str:
        """`stem_of` its name."""
        return stem_of(self.name)

    @abstractmethod
    def iter_records(self, start: int = 0, stop: int | None = None) -> Iterator[Record]:
        """Rows `start` to `stop` (not included; None: to the end), in order, streamed."""

    @abstractmethod
    def take(self, numbers: Iterable[int]) -> list[Record]:
        """The rows with these numbers, in the order given. Reads no others of a JSON Lines file."""


class JsonLines(Source):
    """A JSON Lines file. In memory: eight bytes a row."""

    kind = "jsonl"

    def __init__(self, path: Path) -> None:
        self.name, self.location = path.name, str(path.resolve())
        self._path = path.resolve()
        self._offsets = array("q")
        self._blanks = array("q")  # for each blank line, the number of rows before it
        digest, at = hashlib.sha256(), 0
        with open(path, "rb") as file:
            for line in file:
                digest.update(line)
                bom = len(BOM) if at == 0 and line.startswith(BOM) else 0
                if line[bom:].isspace() or bom == len(line):
                    self._blanks.append(len(self._offsets))
                else:
                    self._offsets.append(at + bom)
                at += len(line)
            self._state = _state_of(file)
        self.sha256, self.num_rows = digest.hexdigest(), len(self._offsets)

    @contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        """The file, as long as it is the one whose lines were counted."""
        if not self._path.exists():
            raise DataError(f"{self._path} is no longer there; put it back, or start again with the file where it is")
        with open(self._path, "rb") as file:
            if _state_of(file) != self._state:
                raise DataError(f"{self._path} has changed while it was in use; start again with the file as it is now")
            yield file

    def iter_records(self, start: int = 0, stop: int | None = None) -> Iterator[Record]:
        """Rows of the file, one line at a time."""
        numbers = range(self.num_rows)[start:stop]
        if numbers:
            with self._opened() as file:
                file.seek(self._offsets[numbers.start])
                rows = (line for line in file if not line.isspace())
                yield from map(self._record, numbers, rows)

    def take(self, numbers: Iterable[int]) -> list[Record]:
        """The rows with these numbers, each found by its offset."""
        records = []
        with self._opened() as file:
            for number in numbers:
                file.seek(self._offsets[number])
                records.append(self._record(number, file.readline()))
        return records

    def _record(self, number: int, line: bytes) -> Record:
        raw = line.removesuffix(b"\n").removesuffix(b"\r")
        columns, problem = None, None
        try:
            row = json.loads(raw.decode())
        except (ValueError, RecursionError) as error:
            problem = RowProblem("not JSON", str(error))
        else:
            columns, problem = _object(row)
        where = f"{self.name}:{number + 1 + bisect_right(self._blanks, number)}"
        return Record(number=int(number), where=where, columns=columns, raw=raw, problem=problem, label=self.stem)


def _state_of(file: BinaryIO) -> tuple[int, int]:
    """What changes when a file is written to: its size and the time."""
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns


class Memory(Source):
    """A sequence of dicts."""

    kind = "memory"
    location = None

    def __init__(self, rows: Sequence[Any]) -> None:
        self.name, self._rows, self.num_rows = "memory", rows, len(rows)
        self.sha256 = _hash_rows(rows)

    def iter_records(self, start: int = 0, stop: int | None = None) -> Iterator[Record]:
        """Rows of the sequence."""
        return map(self._record, range(self.num_rows)[start:stop])

    def take(self, numbers: Iterable[int]) -> list[Record]:
        """The rows with these numbers."""
        return list(map(self._record, numbers))

    def _record(self, number: int) -> Record:
        columns, problem = _object(self._rows[number])
        where = f"{self.name}[{number}]"
        return Record(number=int(number), where=where, columns=columns, problem=problem, label=self.stem)


@dataclass
class Chunk:
    """Rows of an Arrow source that are read together."""

    num_rows: int
    load: "Callable[[], pa.Table]"


class Arrow(Source):
    """Arrow tables, read chunk by chunk: Parquet files by row group, or a `datasets.Dataset`."""

    def __init__(
        self, name: str, kind: str, location: str | None, chunks: list[Chunk], sha256: str | None = None
    ) -> None:
        self.name, self.kind, self.location = name, kind, location
        self._chunks = chunks
        self._starts = [0, *accumulate(chunk.num_rows for chunk in chunks)]
        self.num_rows = self._starts[-1]
        self.sha256 = sha256 or _hash_rows(
            row for chunk in chunks for batch in chunk.load().to_batches() for row in batch.to_pylist()
        )

    def iter_records(self, start: int = 0, stop: int | None = None) -> Iterator[Record]:
        """Rows of the tables, one chunk in memory at a time."""
        numbers = range(self.num_rows)[start:stop]
        for first, chunk in zip(self._starts, self._chunks, strict=False):
            inside = range(max(first, numbers.start), min(first + chunk.num_rows, numbers.stop))
            if inside:
                table = chunk.load()
                for at in inside[::ROWS_AT_ONCE]:
                    piece = range(at, min(at + ROWS_AT_ONCE, inside.stop))
                    yield from self._records(piece, table.slice(at - first, len(piece)))

    def take(self, numbers: Iterable[int]) -> list[Record]:
        """The rows with these numbers; a chunk without any is not read."""
        numbers = list(numbers)
        by_chunk: dict[int, list[int]] = {}
        for number in numbers:
            by_chunk.setdefault(bisect_right(self._starts, number) - 1, []).append(number)
        found: dict[int, Record] = {}
        for index, inside in by_chunk.items():
            table = self._chunks[index].load().take([number - self._starts[index] for number in inside])
            found.update(zip(inside, self._records(inside, table), strict=True))
        return [found[number] for number in numbers]

    def _records(self, numbers: Sequence[int], table: "pa.Table") -> Iterator[Record]:
        for at, (number, columns) in enumerate(zip(numbers, table.to_pylist(), strict=True)):
            where = f"{self.name}[{number}]"
            row = table.slice(at, 1)
            yield Record(number=int(number), where=where, columns=columns, label=self.stem, arrow=row)


def _object(row: Any) -> tuple[dict[str, Any] | None, RowProblem | None]:
    if isinstance(row, dict):
        return row, None
    return None, RowProblem("not an object", f"the row is {reprlib.repr(row)}, expected an object")


def _hash_rows(rows: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json_of(row, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def json_of(value: Any, *, sort_keys: bool = False) -> str:
    """JSON on one line. Dates become ISO text, NumPy values numbers or lists, other types their `str`."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=sort_keys, default=_plain)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair: JSON can escape it, UTF-8 cannot hold it
        text = json.dumps(value, sort_keys=sort_keys, default=_plain)
    return text


def _plain(value: Any) -> Any:
    for convert in ("isoformat", "tolist"):
        if hasattr(value, convert):
            return getattr(value, convert)()
    return str(value)
