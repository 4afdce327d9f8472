"""`gradsift report` and `gradsift ches report`."""

from pathlib import Path
from typing import Any

import click

from cli.json_files import check_writable, write_json
from cli.options import output_options

__all__ = ["report_command", "selection_report_command"]


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


@click.command("report", short_help="A page: what a selection took from its pool.")
@click.option("--datastore", required=True, metavar="DS", help="The store that was selected from.")
@click.option("--selected", required=True, metavar="SELECTED", help="What `gradsift select --output` wrote.")
@click.option("--scores", required=True, metavar="SCORES", help="What the same `gradsift select --scores` wrote.")
@click.option("--output", required=True, metavar="REPORT", help="The page: one .html file that needs no other.")
@click.option(
    "--column", "columns", multiple=True, metavar="NAME",
    help="Compare selected and pool by it; may be repeated.  [default: dataset, subtask, skill where there are]",
)  # fmt: skip
@click.option("--json", "json_file", metavar="FILE", help="Also write the facts as JSON.")
@click.option("--feature-set", metavar="NAME", help="Whose gradient norms, where the store has several.")
@click.option("--data", multiple=True, metavar="POOL", help="The pool, where it has moved.")
@click.option("--verify/--no-verify", default=True, show_default=True, help="Check the shards' checksums.")
@output_options
def selection_report_command(
    quiet: bool, debug: bool, selected: str, output: str, json_file: str | None, data: tuple[str, ...], **options: Any
) -> None:
    """Write a page about a selection: what it took from its pool, whether lengths explain it, and rows to read.

    The page shows texts of the data, which may be offensive.

    \b
    gradsift report --datastore store --selected selected.jsonl \\
        --scores scores.jsonl --output report.html
    """
    check_writable(output, json_file, store=options["datastore"], inputs=[selected, options["scores"], *data])
    from cli.selection_report import write_selection_page
    from less import report_selection

    report = report_selection(selected=selected, data=list(data) or None, **options)
    write_selection_page(report, output, selected=Path(selected).name)
    write_json(json_file, report.to_json())
    if quiet:
        return
    for sentence in report.warnings:
        click.echo(f"warning: {sentence}")
    click.echo(f"{report.num_selected:,} of {report.num_rows:,} rows selected")
    click.echo(f"written: {output}{f', {json_file}' if json_file else ''}")
