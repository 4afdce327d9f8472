"""Rows in and out: what a name stands for, opened as a `Source` of `Record`s.

    source = open_source("pool.jsonl")              # one pass: a hash, and the offset of every row
    for record in source.iter_records(): ...        # streamed
    selected = source.take([7, 3])                  # reads these rows only
    write_selected("selected.jsonl", selected, [{"influence_rank": 1}, {"influence_rank": 2}], source.kind)

A source that cannot be used at all is a `DataError`; a bad row is a record with a `problem`. The readers are
in `sources`, the writer in `writing`, the conversation that a row holds in `conversations`.
"""

import hashlib
import os
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datastore import SkippedRow
from datastore.errors import DataError, RowError
from less.data.conversations import REASONS, Conversation, RowProblem, conversation_of
from less.data.sources import (
    BOM,
    JSON_LINES,
    ROWS_AT_ONCE,
    SUFFIXES,
    Arrow,
    Chunk,
    JsonLines,
    Memory,
    Record,
    Source,
)
from less.data.writing import write_lines, write_selected

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "REASONS",
    "Conversation",
    "Record",
    "RowProblem",
    "Source",
    "conversation_of",
    "open_source",
    "skip",
    "write_lines",
    "write_selected",
]


def skip(record: Record, problem: RowProblem, *, strict: bool) -> SkippedRow:
    """The entry of a row in the list of those skipped; under `strict` it is a `RowError` instead."""
    if strict:
        raise RowError(f"{record.where}: {problem}; mend the row, or leave out strict to skip such rows") from None
    return SkippedRow(row=record.number, where=record.where, id=record.id, reason=problem.reason, detail=problem.detail)


def open_source(data: str | os.PathLike[str] | Sequence[dict[str, Any]] | Any) -> Source:
    """Opens a file, a folder, a data set or a list of dicts as a `Source`.

    `data` is a JSON Lines or Parquet file, a folder of Parquet files, a folder saved by `datasets`, the name
    of a data set on the Hugging Face hub (its `train` split), a `datasets.Dataset`, a sequence of dicts, or a
    `Source`, returned as it is.

    Raises:
        DataError: it is absent, empty or unreadable, or of another type.
    """
    source = _opened(data)
    if source.num_rows == 0:
        raise DataError(f"{source.location or source.name} holds no rows; expected at least one")
    return source


def _opened(data: Any) -> Source:
    if isinstance(data, Source):
        return data
    if isinstance(data, (str, os.PathLike)):
        path = Path(data).expanduser()
        try:
            if path.is_dir():
                return _open_folder(path)
            if path.exists():
                return _open_file(path)
            if _looks_like_a_path(data):
                raise DataError(f"there is no file or folder {data}")
            return _open_hub(str(data))
        except _unreadable() as error:
            raise DataError(f"cannot read {data}: {error}") from error
        except ModuleNotFoundError as error:
            raise DataError(
                f"{data} cannot be read without the package {error.name}; install it, or give a JSON Lines file"
            ) from error
    if isinstance(data, Sequence) and not isinstance(data, bytes):
        return Memory(data)
    if hasattr(data, "with_format") and hasattr(data, "num_rows") and not isinstance(data, dict):
        return _open_dataset(data, "dataset", None)
    raise DataError(
        f"cannot read rows from a {type(data).__name__}; expected a path, the name of a data set on the hub, "
        "a datasets.Dataset (one split, not streamed) or a list of dicts"
    )


def _unreadable() -> tuple[type[Exception], ...]:
    """What reading raises. Only Parquet and `datasets` need Arrow, so it may not be there."""
    arrow = sys.modules.get("pyarrow")
    return (OSError, arrow.ArrowException) if arrow else (OSError,)


def _looks_like_a_path(data: str | os.PathLike[str]) -> bool:
    text = os.fspath(data)
    return not isinstance(data, str) or text.endswith(SUFFIXES) or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", text)


def _open_file(path: Path) -> Source:
    if path.suffix == ".parquet":
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return Arrow(path.name, "parquet", str(path.resolve()), _row_groups([path]), sha256)
    if path.suffix not in JSON_LINES:
        raise DataError(f"cannot tell the format of {path}; expected a name that ends in {', '.join(SUFFIXES)}")
    with open(path, "rb") as file:
        if path.suffix == ".json" and file.read(ROWS_AT_ONCE).removeprefix(BOM).lstrip().startswith(b"["):
            raise DataError(
                f"{path} is one JSON array; expected JSON Lines, one object a line. "
                f"Convert it with: jq -c '.[]' {path} > {path}l"
            )
    return JsonLines(path)


def _open_folder(path: Path) -> Source:
    if (path / "dataset_dict.json").exists():
        splits = ", ".join(sorted(str(entry) for entry in path.iterdir() if entry.is_dir()))
        raise DataError(f"{path} holds several splits; name one of them: {splits}")
    if (path / "state.json").exists():
        import datasets

        return _open_dataset(datasets.load_from_disk(str(path)), path.resolve().name, str(path.resolve()))
    files = sorted(path.glob("*.parquet"))
    if not files:
        raise DataError(f"{path} holds neither *.parquet files nor a data set saved by `datasets`; name one file of it")
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            hashlib.file_digest(stream, lambda: digest)
    return Arrow(path.resolve().name, "parquet", str(path.resolve()), _row_groups(files), digest.hexdigest())


def _row_groups(files: Sequence[Path]) -> list[Chunk]:
    import pyarrow.parquet as pq

    chunks, schema = [], None
    for file in files:
        with pq.ParquetFile(file) as parquet:
            schema = schema or parquet.schema_arrow
            if not parquet.schema_arrow.equals(schema):
                raise DataError(f"{file} and {files[0]} have different columns; expected one schema in a folder")
            groups = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
        chunks += [Chunk(num_rows, partial(_read_row_group, file, group)) for group, num_rows in enumerate(groups)]
    return chunks


def _read_row_group(file: Path, group: int) -> "pa.Table":
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as parquet:
        return parquet.read_row_group(group)


def _open_hub(name: str) -> Source:
    import datasets

    try:
        loaded = datasets.load_dataset(name, split="train")
    except Exception as error:  # whatever goes wrong in there, the data set cannot be had
        raise DataError(
            f"{name} is no file or folder, and the hub has no such data set with a train split: {error}"
        ) from error
    return _open_dataset(loaded, name, name)


def _open_dataset(dataset: Any, name: str, location: str | None) -> Source:
    tables = dataset.with_format("arrow")
    starts = range(0, len(dataset), ROWS_AT_ONCE)
    chunks = [
        Chunk(min(ROWS_AT_ONCE, len(dataset) - at), partial(tables.__getitem__, slice(at, at + ROWS_AT_ONCE)))
        for at in starts
    ]
    return Arrow(name, "dataset", location, chunks)
