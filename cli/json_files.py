"""What a command writes as JSON beside what it shows: asked for before the work, written after it."""

import json
from pathlib import Path
from typing import Any

import click

__all__ = ["check_writable", "write_json"]


def check_writable(*files: str | None) -> None:
    """Raise `UsageError` for a file whose folder is not there, before any work is done for it."""
    for file in filter(None, files):
        if not Path(file).absolute().parent.is_dir():
            raise click.UsageError(f"{file} cannot be written: its folder is not there")


def write_json(file: str | None, facts: dict[str, Any], *, ascii_only: bool = True) -> None:
    """Write a command's facts, if a file for them was asked for."""
    if file:
        text = json.dumps(facts, indent=2, ensure_ascii=ascii_only, allow_nan=False)
        Path(file).write_text(text + "\n", encoding="utf-8")
