"""`gradsift ches report`."""

from typing import Any

import click

from cli.options import output_options

__all__ = ["report_command"]


@click.command("report", short_help="A page: which pairs are risky, and can one believe it.")
@click.option("--scored", required=True, metavar="SCORED", help="What `gradsift ches score` wrote.")
@click.option("--output", required=True, metavar="REPORT", help="The page: one .html file that needs no other.")
@click.option(
    "--measure",
    type=click.Choice(["ches", "ln_ches", "alpha_ches", "last_hidden", "edit_distance"]),
    help="What to rank the pairs by.  [default: ln_ches, or the first measure there is]",
)
@output_options
def report_command(quiet: bool, debug: bool, **options: Any) -> None:
    """Write a page about scored pairs: how the scores are spread and follow length, and the pairs at both ends.

    The page shows texts of the data, which may be offensive.

    \b
    gradsift ches report --scored scored.jsonl --output report.html
    """
    from cli.pair_report import write_report

    report = write_report(**options)
    if quiet:
        return
    for sentence in report.verdict:
        click.echo(sentence)
    click.echo(f"\n{report.num_scored:,} of {report.num_rows:,} rows scored, ranked by {report.measure}")
    click.echo(f"written: {report.output}")
