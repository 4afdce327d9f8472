"""Options that several commands share, so that a word means the same everywhere."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

__all__ = [
    "CommaList",
    "bundle",
    "found_again_options",
    "loading_options",
    "model_option",
    "output_options",
    "pool_options",
    "rendering_options",
    "running_options",
    "strict_option",
]

Command = TypeVar("Command", bound=Callable[..., Any])


class CommaList(click.ParamType):
    """`a,b,c`, each part converted by `kind`."""

    name = "list"

    def __init__(self, kind: Callable[[str], Any] = str) -> None:
        self.kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Split and convert."""
        if not isinstance(value, str):
            return value
        try:
            return tuple(self.kind(part.strip()) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not a comma-separated list of {self.kind.__name__} values", param, ctx)


def bundle(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """One decorator out of several, in their order."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


model_option = click.option("--model", required=True, metavar="M", help="Base model: a folder or a hub name.")

pool_options = bundle(
    click.option(
        "--data", required=True, multiple=True, metavar="POOL",
        help="Instruction pool: .jsonl, .parquet, a folder or a hub name; may be repeated.",
    ),
    click.option("--datastore", required=True, metavar="DS", help="Folder of the store."),
    click.option(
        "--shard-rows", default=1024, show_default=True, metavar="N", help="Rows a file: the most that a kill loses."
    ),
)  # fmt: skip

found_again_options = bundle(
    click.option("--model", metavar="M", help="Base model, where it has moved since the build."),
    click.option("--tokenizer", metavar="M", help="Tokenizer, where it is not the model's own."),
    click.option("--checkpoints", multiple=True, metavar="RUN", help="Checkpoints, where they have moved."),
    click.option("--data", multiple=True, metavar="POOL", help="The pool, where it has moved."),
    click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:N]", help="Where to compute."),
    click.option("--trust-remote-code", is_flag=True, help="Let Python code that comes with the model run."),
)

loading_options = bundle(
    click.option("--tokenizer", metavar="M", help="Tokenizer, where it is not the model's own."),
    click.option("--trust-remote-code", is_flag=True, help="Let Python code that comes with the model run."),
)

strict_option = click.option("--strict", is_flag=True, help="Stop at the first row that would be skipped.")


def rendering_options(max_length: int = 2048) -> Callable[[Command], Command]:
    """How rows become tokens, with the length limit that is usual for them."""
    return bundle(
        click.option(
            "--max-length", default=max_length, show_default=True, metavar="N", help="Tokens a row; its end is cut."
        ),
        click.option(
            "--system-prompt", default="keep", show_default=True, metavar="keep|none|TEXT",
            help="Each row's system prompt: kept, dropped, or TEXT instead.",
        ),
        click.option(
            "--chat-template", metavar="FILE|tulu|chatml",
            help="Chat template, in place of the tokenizer's own.",
        ),
    )  # fmt: skip


running_options = bundle(
    click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:N]", help="Where to compute."),
    click.option(
        "--dtype", default="auto", show_default=True, type=click.Choice(["auto", "float32", "bfloat16"]),
        help="Of the base weights; auto is bfloat16 on CUDA, else float32.",
    ),
    click.option(
        "--tokens-per-batch", type=int, metavar="N",
        help="Padded tokens computed at once; raise it as memory allows.  [default: by device]",
    ),
)  # fmt: skip

output_options = bundle(
    click.option("-q", "--quiet", is_flag=True, help="No progress and no summary."),
    click.option("--debug", is_flag=True, help="Show the traceback of an error."),
)
