"""The command group, and the one place where errors become lines.

Every command is options → config → one library call → what to show. Nothing here imports torch, so that
`--help` answers at once.
"""

import importlib.util
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import click

from cli.building import build_datastore_command
from cli.inspecting import inspect_command
from cli.quickstart import quickstart_command
from cli.rendering import render_command
from cli.selecting import select_command
from cli.training import warmup_command

__all__ = ["main"]


class GradsiftGroup(click.Group):
    """Turns the errors that a user can mend into one line and exit code 2; `--debug` shows the traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, translating its errors."""
        from datastore.errors import GradsiftError

        try:
            return super().invoke(ctx)
        except (GradsiftError, OSError) as err:
            if "--debug" in sys.argv or isinstance(err, BrokenPipeError):
                raise
            click.echo(f"gradsift: {_one_line(err)}", err=True)
            ctx.exit(2)


@click.group(cls=GradsiftGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="gradsift")
def gradsift() -> None:
    """Find the rows of an instruction pool that teach a model what a few target examples show.

    \b
    gradsift warmup           train a LoRA adapter on a fraction of the pool
    gradsift build-datastore  gradient features of every row, at every checkpoint
    gradsift select           the rows most influential for the targets

    `gradsift quickstart` runs all three on a small sample.
    """


for command in (
    warmup_command,
    build_datastore_command,
    select_command,
    render_command,
    inspect_command,
    quickstart_command,
):
    gradsift.add_command(command)


def main(args: Sequence[str] | None = None) -> None:
    """The console script."""
    _refuse_foreign_packages()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.showwarning = _show_warning
    gradsift.main(args=args, prog_name="gradsift")


def _refuse_foreign_packages() -> None:
    """The import names are generic: another distribution's `less` or `cli` would be called unawares."""
    here = Path(__file__).resolve().parent.parent
    for name in ("ches", "datastore", "less"):
        spec = importlib.util.find_spec(name)
        found = Path(spec.origin).resolve().parent.parent if spec and spec.origin else None
        if found != here:
            sys.exit(
                f"gradsift: its package `{name}` comes from {found}, expected {here}: another distribution uses "
                "the same import name. Install gradsift in a virtual environment of its own"
            )


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int,
    file: TextIO | None = None, line: str | None = None,
) -> None:  # fmt: skip
    """Warnings about evidence are for the user; those of libraries are not."""
    if category.__module__.split(".")[0] in ("less", "datastore"):
        click.echo(f"warning: {_one_line(message)}", err=True)


def _one_line(message: object) -> str:
    if isinstance(message, OSError) and message.strerror:
        where = f"{message.filename}: " if message.filename else ""
        return f"{where}{message.strerror}"
    return " ".join(str(message).split())


if __name__ == "__main__":
    main()
