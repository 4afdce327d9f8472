"""`gradsift build-embeddings`."""

from typing import Any

import click

from cli.libraries import hush_libraries
from cli.options import (
    loading_options,
    model_option,
    output_options,
    pool_options,
    rendering_options,
    running_options,
    strict_option,
)
from cli.showing import human_bytes, show_skipped

__all__ = ["build_embeddings_command"]


@click.command("build-embeddings", short_help="Embeddings of every row, to select by without gradients.")
@model_option
@pool_options
@click.option(
    "--feature-dtype",
    default="float16",
    show_default=True,
    type=click.Choice(["float32", "float16", "int8", "int4", "binary"]),
    help="Of stored rows.",
)
@rendering_options()
@running_options
@strict_option
@loading_options
@output_options
def build_embeddings_command(quiet: bool, debug: bool, **options: Any) -> None:
    """Compute each row's embedding (RDS+) and loss by one forward pass of the base model, and keep them in a folder.

    `gradsift select` ranks such a store by `--method rds`, the default there, and by every other method but `less`. No
    checkpoint is needed. Killed and started again, it does only what is missing.

    \b
    gradsift build-embeddings --model M --data pool.jsonl --datastore store
    """
    hush_libraries(quiet)
    from less import build_embeddings

    store = build_embeddings(progress=not quiet, **options)
    if not quiet:
        num_rows = sum(source.num_rows for source in store.sources)
        show_skipped(store.skipped, num_rows)
        click.echo(f"{store.num_rows} rows embedded of {num_rows}, {human_bytes(store.num_bytes)}: {store.path}")
