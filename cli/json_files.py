"""What a command writes beside what it shows: asked for before the work, written after it."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

__all__ = ["check_writable", "write_json"]


def check_writable(*files: str | None, store: str | None = None, inputs: Iterable[str | None] = ()) -> None:
    """See, before any work, that files can be written, in folders that are there, and replace nothing that is read.

    Args:
        files: to be written, where asked for.
        store: a datastore, whose pool is read.
        inputs: other files that are read.

    Raises:
        UsageError: a folder is not there; `SettingError`: see `less.data.writing.check_outputs`.
    """
    wanted = [Path(file) for file in files if file]
    for file in wanted:
        if not file.absolute().parent.is_dir():
            raise click.UsageError(f"{file} cannot be written: its folder is not there")
    if wanted:
        from datastore import Datastore
        from less.data.writing import check_outputs

        pool = [source.location for source in Datastore.open(store).sources] if store else []
        check_outputs(wanted, [*inputs, *pool])


def write_json(file: str | None, facts: dict[str, Any], *, ascii_only: bool = True) -> None:
    """Write a command's facts, if a file for them was asked for."""
    if file:
        from less.data.writing import write_lines

        write_lines(file, [json.dumps(facts, indent=2, ensure_ascii=ascii_only, allow_nan=False)])
