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
from typing import TextIO

import click

from cli.building import build_datastore_command
from cli.embedding import build_embeddings_command
from cli.evaluating import evaluate_command
from cli.indexing import explain_command, index_command, near_duplicates_command
from cli.inspecting import inspect_command
from cli.preferences import ches_group
from cli.quickstart import quickstart_command
from cli.rendering import render_command
from cli.reporting import selection_report_command
from cli.selecting import select_command
from cli.storing import datastore_group
from cli.training import warmup_command
from cli.verifying import verify_command

__all__ = ["gradsift", "main"]

_ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    # Threads that wait sleep instead of spinning: measured with two threads on two cores that other processes
    # use too, spinning made a training step 2 to 7 times slower than one thread alone, sleeping never slower.
    "OMP_WAIT_POLICY": "PASSIVE",
}


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="gradsift")
def gradsift() -> None:
    """Find the rows of an instruction pool that teach a model what a few target examples show.

    \b
    gradsift warmup           train a LoRA adapter on a fraction of the pool
    gradsift build-datastore  gradient features of every row, at every checkpoint
    gradsift select           the rows most influential for the targets
    gradsift verify           what the numbers of a store are worth
    gradsift evaluate         what is gained by training on a selection

    `gradsift quickstart` runs the first three on a small sample. `gradsift ches` is about preference pairs: which of
    them make DPO push probability off the answer that it should prefer.
    """


for command in (
    warmup_command,
    build_datastore_command,
    build_embeddings_command,
    select_command,
    evaluate_command,
    render_command,
    inspect_command,
    verify_command,
    index_command,
    explain_command,
    near_duplicates_command,
    selection_report_command,
    datastore_group,
    quickstart_command,
    ches_group,
):
    gradsift.add_command(command)


def main(args: Sequence[str] | None = None) -> None:
    """The console script: 0 is success, 1 a missed bound (`verify`), 2 a problem to mend, said in one line."""
    args = sys.argv[1:] if args is None else list(args)
    _refuse_foreign_packages()
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with warnings.catch_warnings():
        if "--debug" not in args:
            warnings.simplefilter("default")
            warnings.showwarning = _show_warning
        sys.exit(_run(args))


def _run(args: Sequence[str]) -> int | None:
    from datastore.errors import GradsiftError

    try:
        return gradsift.main(args=args or ["--help"], prog_name="gradsift", standalone_mode=False)
    except click.UsageError as err:
        help_for = err.ctx.command_path if err.ctx else "gradsift"
        _error(f"{err.format_message().removesuffix('.')}; see {help_for} --help")
    except click.ClickException as err:
        _error(err.format_message())
    except click.Abort:
        click.echo("stopped", err=True)
        return 130
    except (GradsiftError, OSError) as err:
        if "--debug" in args:
            raise
        _error(err)
    except (MemoryError, RuntimeError) as err:
        what = str(err).split(". ")[0]
        if "--debug" in args or not (isinstance(err, MemoryError) or "out of memory" in what):
            raise
        _error(f"{what or 'out of memory'}; lower --tokens-per-batch")
    return 2


def _refuse_foreign_packages() -> None:
    """The import names are generic: another distribution's `less` would be called unawares."""
    here = Path(__file__).resolve().parent.parent
    for name in ("ches", "datastore", "less"):
        spec = importlib.util.find_spec(name)
        found = Path(spec.origin).resolve().parent.parent if spec and spec.origin else None
        if found != here:
            _error(
                f"gradsift's own package `{name}` is {f'hidden by another in {found}' if found else 'not installed'}; "
                f"expected it in {here}. Install gradsift in a virtual environment of its own, and check PYTHONPATH"
            )
            sys.exit(2)


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int,
    file: TextIO | None = None, line: str | None = None,
) -> None:  # fmt: skip
    """Warnings about evidence are for the user; those of libraries are not."""
    if category.__module__.split(".")[0] in ("less", "datastore"):
        click.echo(f"warning: {_one_line(message)}", err=True)


def _error(message: object) -> None:
    click.echo(f"error: {_one_line(message)}", err=True)


def _one_line(message: object) -> str:
    if type(message) is not str and isinstance(message, OSError) and message.strerror:
        where = f"{message.filename}: " if message.filename else ""
        return f"{where}{message.strerror}"
    return " ".join(str(message).split())


if __name__ == "__main__":
    main()
