"""`gradsift ches`: score, report and filter preference pairs."""

from typing import Any

import click

from cli.filtering import filter_command
from cli.libraries import hush_libraries
from cli.options import (
    CommaList,
    loading_options,
    model_option,
    output_options,
    rendering_options,
    running_options,
    strict_option,
)
from cli.reporting import report_command
from cli.showing import show_numbers, show_skipped, table

__all__ = ["ches_group"]

_QUANTILES = (0, 5, 50, 95, 100)
"""Percent: as many as fit beside the names on 80 columns."""


@click.group("ches", short_help="Which preference pairs push probability off the chosen answer in DPO.")
def ches_group() -> None:
    """Find the preference pairs that will make DPO push probability off the answer it should prefer.

    \b
    gradsift ches score   a column of displacement-risk scores
    gradsift ches report  a page to look at
    gradsift ches filter  the pairs to train on
    """


@ches_group.command("score", short_help="Displacement-risk scores of every preference pair.")
@model_option
@click.option(
    "--data", required=True, metavar="PAIRS", help="Preference pairs: .jsonl, .parquet, a folder or a hub name."
)
@click.option("--output", required=True, metavar="SCORED", help="The pairs with their scores: .jsonl or .parquet.")
@click.option(
    "--measures",
    type=CommaList(),
    default="ches,ln_ches,alpha_ches,last_hidden,edit_distance,length_difference,logp",
    metavar="M,M,...",
    help="Of ches, ln_ches, alpha_ches, last_hidden, edit_distance, length_difference, logp.  [default: all]",
)
@click.option("--adapter", metavar="A", help="Folder of a PEFT adapter, where DPO starts from one.")
@click.option(
    "--tokens",
    default="trainer",
    show_default=True,
    type=click.Choice(["trainer", "reference"]),
    help="Reply tokens that count: those DPOTrainer trains on, or the paper's.",
)
@click.option(
    "--shard-rows", default=1024, show_default=True, metavar="N", help="Pairs kept at a time: the most a kill loses."
)
@rendering_options(max_length=1024)
@running_options
@strict_option
@loading_options
@output_options
def score_command(quiet: bool, debug: bool, **options: Any) -> None:
    """Score preference pairs under the model that DPO will start from. Higher scores mean more displacement.

    Killed and started again, it does only what is missing.

    \b
    gradsift ches score --model M --data pairs.jsonl --output scored.jsonl
    """
    hush_libraries(quiet)
    from ches import score_pairs
    from ches.scored import TRUNCATED

    result = score_pairs(progress=not quiet, **options)
    if quiet:
        return
    show_skipped([row for row in result.problems if row.reason != TRUNCATED], result.num_rows, what="pairs")
    num_cut = sum(row.reason == TRUNCATED for row in result.problems)
    if num_cut:
        click.echo(
            f"note: {num_cut:,} of {result.num_rows:,} pairs with a reply cut at the length limit: scored, and marked"
        )
    if result.rewritten:
        click.echo("note: prompt, chosen and rejected are written as messages: DPOTrainer would misread the layout")
    _show_quantiles(result.columns)
    if result.num_computed == 0:
        click.echo(f"{result.output} is complete: nothing to do")
    click.echo(f"{result.num_scored:,} of {result.num_rows:,} pairs scored: {result.output}")


ches_group.add_command(report_command)
ches_group.add_command(filter_command)


def _show_quantiles(columns: Any) -> None:
    import numpy as np

    view = table("scores", "measure", *(f"{q}%" for q in _QUANTILES))
    for name in columns[0]:
        values = [row[name] for row in columns if isinstance(row[name], int | float)]
        if values:
            cuts = np.percentile(values, _QUANTILES)
            view.add_row(name, *(f"{x:,.4g}" if abs(x) < 1e4 else f"{x:.2e}" for x in cuts))
    show_numbers(view)
