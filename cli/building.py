"""`gradsift build-datastore`."""

from typing import Any

import click

from cli.libraries import hush_libraries
from cli.options import (
    CommaList,
    loading_options,
    model_option,
    output_options,
    pool_options,
    rendering_options,
    running_options,
    strict_option,
)
from cli.showing import human_bytes, show_skipped

__all__ = ["build_datastore_command"]


@click.command("build-datastore", short_help="Gradient features of every row, at every checkpoint.")
@model_option
@click.option(
    "--checkpoints",
    required=True,
    multiple=True,
    metavar="RUN",
    help="A run folder (all its checkpoint-*), RUN:last (its last one) or a checkpoint folder; may be repeated.",
)
@pool_options
@click.option(
    "--update-rule",
    default=["adam"],
    multiple=True,
    type=click.Choice(["adam", "adam-less", "adam-no-momentum", "sgd", "sign"]),
    help="How a gradient becomes an update; repeat it for several feature sets.  [default: adam]",
)
@click.option(
    "--projection",
    default=["sparse"],
    multiple=True,
    type=click.Choice(["sparse", "rademacher", "none"]),
    help="Random projection; may be repeated.  [default: sparse]",
)
@click.option("--proj-dim", default=32768, show_default=True, metavar="K", help="Dimensions kept.")
@click.option("--seed", default=0, show_default=True, metavar="S", help="Of the projection.")
@click.option(
    "--layers",
    default="all",
    show_default=True,
    metavar="all|last:N|REGEX",
    help="Whose gradients count: of all LoRA layers, of the last N blocks (cheaper), or of those whose name matches.",
)
@click.option(
    "--prefilter",
    type=float,
    metavar="F",
    help="Only for the best fraction F of the rows, such as 0.2, found by features of one checkpoint alone.",
)
@click.option("--targets", multiple=True, metavar="T", help="What --prefilter ranks the rows by; may be repeated.")
@click.option(
    "--prefilter-layers",
    metavar="all|last:N|REGEX",
    help="Whose gradients --prefilter takes.  [default: as --layers]",
)
@click.option(
    "--checkpoint-weights",
    type=CommaList(float),
    metavar="W,W,...",
    help="Weight of each checkpoint.  [default: mean learning rates, from its log]",
)
@click.option(
    "--feature-dtype",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "float32", "float16", "int8", "int4", "binary"]),
    help="Of stored rows; auto is float32 for projection none, else int8.",
)
@rendering_options()
@running_options
@strict_option
@loading_options
@output_options
def build_datastore_command(quiet: bool, debug: bool, **options: Any) -> None:
    """Compute each row's gradient features at every checkpoint and keep them in a folder.

    Killed and started again, a build does only what is missing. More --data is appended to a finished store. With
    --prefilter, features of the weightiest checkpoint rank all rows first (they stay in DS.prefilter), and only the
    best are done at every checkpoint: for selecting few rows of a large pool, with several checkpoints.

    \b
    gradsift build-datastore --model M --checkpoints run \\
        --data pool.jsonl --datastore store
    """
    hush_libraries(quiet)
    from less import build_datastore

    options["targets"] = list(options["targets"]) or None
    result = build_datastore(progress=not quiet, **options)
    if quiet:
        return
    show_skipped(result.skipped, result.num_rows, num_set_aside=result.num_set_aside)
    for count, what in ((result.num_repeated_ids, "have an id"), (result.num_duplicates, "are token for token a row")):
        if count:
            click.echo(f"note: {count} scored rows {what} that came before; all are kept")
    if result.num_computed == 0:
        click.echo(f"{result.datastore} is complete: nothing to do")
    click.echo(
        f"{result.num_scored} rows scored of {result.num_rows}, {human_bytes(result.num_bytes)}: {result.datastore}"
    )
