"""Rows back to a file, with columns added and all the rest as it was.

JSON Lines to JSON Lines splices the new columns into the line, whose own bytes stay; Parquet to Parquet keeps
the Arrow types; anything else goes through the row's dict. A file appears whole or not at all. `dataset_of` makes
the same rows a `datasets.Dataset` in place of a file.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from datastore.errors import DataError, SettingError
from less.data.sources import SUFFIXES, Record, json_of

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

__all__ = ["check_outputs", "dataset_of", "write_lines", "write_selected"]

_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")


def check_outputs(files: Iterable[Path | None], inputs: Iterable[str | Path | None]) -> None:
    """See before any work that files can be written, each of its own, and none in the place of an input.

    Args:
        files: to be written; None for what is not asked for.
        inputs: files and folders that are read; hub names and None are none.

    Raises:
        SettingError: one is asked for twice, would write over an input, or cannot be written.
    """
    read = {str(Path(path).absolute().resolve()): path for path in inputs if path is not None}
    wanted: set[Path] = set()
    for file in files:
        if file is None:
            continue
        path = file.absolute().resolve()
        if path in wanted:
            raise SettingError(f"{file} is asked for twice; name another file for one of them")
        wanted.add(path)
        if found := read.keys() & {str(path), *map(str, path.parents)}:
            raise SettingError(f"{file} would write over {read[min(found)]}, which is read; name another file")
        above = next(folder for folder in path.parents if folder.exists())
        if path.is_dir() or not above.is_dir() or not os.access(above, os.W_OK):
            raise SettingError(f"{file} cannot be written; name a file in a folder that can be")


def write_selected(
    path: str | os.PathLike[str],
    records: Iterable[Record],
    extra: Iterable[dict[str, Any]],
    kind: str | None = None,
) -> None:
    """Writes `records` in the order given, each with its columns of `extra` added, or replaced if there.

    Args:
        path: `.parquet` for Parquet, else JSON Lines. Folders are made, an existing file is replaced.
        records: rows with columns; of a JSON Lines file one is in memory at a time, of a Parquet file all.
        extra: the new columns of each row, the same names in every row; None is written as null.
        kind: the source's kind, which decides the format of a path without a known suffix.

    Raises:
        DataError: the rows do not fit into Parquet columns.
    """
    path = Path(path)
    if path.suffix == ".parquet" or (kind == "parquet" and path.suffix not in SUFFIXES):
        import pyarrow.parquet as pq

        table = _table(list(records), list(extra))
        with _appearing_whole(path) as file:
            pq.write_table(table, file)
    else:
        write_lines(path, (_line(record, new) for record, new in zip(records, extra, strict=True)))


def dataset_of(records: Sequence[Record], extra: Sequence[dict[str, Any]]) -> "datasets.Dataset":
    """`records` in the order given, with their columns of `extra`; None where a row lacks a column of another.

    Raises:
        DataError: a column has values of several types.
    """
    import datasets
    import pyarrow as pa

    rows = [{**(record.columns or {}), **added} for record, added in zip(records, extra, strict=True)]
    names = dict.fromkeys(name for row in rows for name in row)
    try:  # `from_list` would take the columns of the first row for those of all
        return datasets.Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})
    except (pa.ArrowException, OverflowError) as err:
        raise DataError(f"the selected rows do not fit into one table: {err}; use their records") from err


def write_lines(path: str | os.PathLike[str], lines: Iterable[str]) -> None:
    """Writes lines of text as UTF-8. Folders are made, an existing file is replaced at the end."""
    with _appearing_whole(Path(path)) as file:
        file.writelines(line.encode() + b"\n" for line in lines)


def _line(record: Record, new: dict[str, Any]) -> str:
    if record.raw is None:
        return json_of({**(record.columns or {}), **new})
    return _spliced(record.raw.decode(), new)


def _spliced(line: str, new: dict[str, Any]) -> str:
    """The JSON object `line` with the members of `new`, in place of those of that name or after the last."""
    copied = line.index("{") + 1  # `pieces` stand for `line[:copied]`
    last = copied  # where the last member so far ends
    pieces, met = [line[:copied]], set()
    at = _past_space(line, copied)
    while line[at] != "}":
        name, at = _DECODER.raw_decode(line, at)
        start = _past_space(line, _past_space(line, at) + 1)  # past the colon
        _, last = _DECODER.raw_decode(line, start)
        if name in new:
            pieces += [line[copied:start], json_of(new[name])]
            copied = last
        met.add(name)
        at = _past_space(line, last)
        if line[at] == ",":
            at = _past_space(line, at + 1)
    added = [f"{json_of(name)}: {json_of(value)}" for name, value in new.items() if name not in met]
    separator = ", " if met and added else ""
    return "".join([*pieces, line[copied:last], separator, ", ".join(added), line[last:]])


def _past_space(line: str, at: int) -> int:
    return _SPACE.match(line, at).end()  # type: ignore[union-attr]  # it matches the empty string


def _table(records: Sequence[Record], extra: Sequence[dict[str, Any]]) -> "pa.Table":
    import pyarrow as pa

    typed = [record.arrow for record in records if record.arrow is not None]
    try:
        if records and len(typed) == len(records):
            table = pa.concat_tables(typed, promote_options="permissive")
        else:
            table = pa.table(_columns([record.columns or {} for record in records]))
        for name, column in _columns(extra).items():
            at = table.schema.get_field_index(name)
            table = table.append_column(name, column) if at < 0 else table.set_column(at, name, column)
    except (pa.ArrowException, OverflowError) as error:
        raise DataError(f"the rows do not fit into Parquet columns: {error}; write a .jsonl file instead") from error
    return table


def _columns(rows: Sequence[dict[str, Any]]) -> dict[str, "pa.Array"]:
    import pyarrow as pa

    names = dict.fromkeys(name for row in rows for name in row)
    return {name: pa.array([row.get(name) for row in rows]) for name in names}


@contextmanager
def _appearing_whole(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` once it is complete and on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
