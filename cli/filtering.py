"""`gradsift ches filter`."""

from typing import TYPE_CHECKING, Any

import click

from cli.options import output_options
from cli.showing import one_line, show_numbers, show_skipped, table

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ches.filtering import FilterResult

__all__ = ["filter_command"]


@click.command("filter", short_help="The pairs that promise little displacement.")
@click.option("--scored", required=True, metavar="SCORED", help="What `gradsift ches score` wrote.")
@click.option("--output", required=True, metavar="KEPT", help=".jsonl or .parquet file for the rows that are kept.")
@click.option(
    "--keep-lowest", type=float, metavar="F", help="Keep this fraction of the ranked rows; the paper kept 0.05."
)
@click.option("--drop-highest", type=float, metavar="F", help="Drop this fraction of the ranked rows.")
@click.option("--below", type=float, metavar="X", help="Keep the rows whose value is below X.")
@click.option(
    "--measure",
    default="ln_ches",
    show_default=True,
    metavar="NAME",
    help="Column to rank by, low is good; -NAME for its negative, as in -edit_distance.",
)
@click.option(
    "--length-strata",
    type=int,
    metavar="N",
    help="Rank within N bins of like length_difference, so that the lengths stay as they are.",
)
@click.option(
    "--random-control", metavar="CONTROL", help="Also write equally many ranked rows at random (by bin, if binned)."
)
@click.option("--seed", default=0, show_default=True, help="Of the random control.")
@output_options
def filter_command(quiet: bool, debug: bool, scored: str, **options: Any) -> None:
    """Keep the preference pairs of lowest CHES, with every column, for DPO to train on.

    \b
    gradsift ches filter --scored scored.jsonl --keep-lowest 0.15 \\
        --output kept.jsonl --random-control control.jsonl
    """
    from ches.filtering import filter_pairs

    result = filter_pairs(scored, **options)
    if not quiet:
        _show(result)


def _show(result: "FilterResult") -> None:
    config, num_ranked = result.config, len(result.kept) + len(result.dropped)
    click.echo(f"kept {len(result.kept):,} of {num_ranked:,} ranked rows, dropped {len(result.dropped):,}")
    if config.length_strata is not None:
        few, many, num_bins = min(result.strata), max(result.strata), len(result.strata)
        sizes = f"{many:,}" if few == many else f"{few:,} to {many:,}"
        click.echo(f"ranked within bins of length_difference: {num_bins:,}, of {sizes} rows")
        if num_bins < config.length_strata:
            click.echo(f"note: not {config.length_strata:,} bins, since rows of one length_difference stay together")
    if not len(result.dropped):
        click.echo("note: every ranked row was kept")
    click.echo(f"the highest {config.measure} kept is {result.threshold:.6g}\n")
    _show_skipped(result, num_ranked)
    _show_quantiles(result)
    _show_lengths(result)
    click.echo(f"written: {result.output}")
    if result.control_output is not None:
        click.echo(f"random control: {result.control_output} (may share rows with those kept)")
    else:
        click.echo(
            f"no random control: only a run on {len(result.kept):,} rows drawn at random can show\n"
            "what the filter did beyond leaving rows out; add --random-control FILE"
        )


def _show_skipped(result: "FilterResult", num_ranked: int) -> None:
    from dataclasses import replace

    rows = [replace(row, reason=one_line(row.reason, 40)) for row in result.unranked]
    show_skipped(rows, num_ranked + len(rows))


def _show_quantiles(result: "FilterResult") -> None:
    from ches.filtering import QUANTILES

    style = _style(value for group in result.summary.values() for value in group.quantiles or ())
    view = table(f"{result.config.measure}, quantiles", "", "rows", *(f"{share:.0%}" for share in QUANTILES))
    for name, group in result.summary.items():
        shown = ["–"] * len(QUANTILES) if group.quantiles is None else [format(v, style) for v in group.quantiles]
        view.add_row(name, f"{group.num_rows:,}", *shown)
    show_numbers(view)


def _show_lengths(result: "FilterResult") -> None:
    from ches.filtering import LENGTHS

    view = table("mean length, tokens", "", *LENGTHS)
    for name, group in result.summary.items():
        means = [group.mean_lengths[column] for column in LENGTHS]
        view.add_row(name, *("–" if mean is None else f"{mean:,.1f}" for mean in means))
    show_numbers(view)


def _style(values: "Iterable[float]") -> str:
    """One format for numbers that stand in a table together: four digits of the largest."""
    from math import floor, log10

    largest = max(map(abs, values))
    if largest and not 1e-4 <= largest < 1e9:
        return ".3e"
    return f",.{max(0, 3 - floor(log10(largest))) if largest else 0}f"
