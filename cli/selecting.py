"""`gradsift select`."""

from typing import Any

import click

from cli.libraries import hush_libraries
from cli.options import CommaList, found_again_options, output_options
from cli.showing import show_skipped, show_table, table

__all__ = ["select_command"]

_NUM_SHOWN = 5


@click.command("select", short_help="The rows that are most influential for the targets.")
@click.option("--datastore", required=True, metavar="DS", help="A finished store.")
@click.option(
    "--targets",
    required=True,
    multiple=True,
    metavar="T",
    help="Examples of the wanted capability, in groups by their `subtask`; may be repeated.",
)
@click.option("--fraction", type=float, metavar="F", help="Of the usable rows of the pool to select, such as 0.05.")
@click.option("--count", type=int, metavar="N", help="Number of rows to select, in place of --fraction.")
@click.option(
    "--output", required=True, metavar="OUT", help=".jsonl or .parquet file; or a folder, a file a target set."
)
@click.option("--scores", metavar="SCORES", help="Also write every candidate's scores: a .jsonl file, or a folder.")
@click.option(
    "--combine",
    type=click.Choice(["max", "round-robin"]),
    help="One selection for all target sets: by the best of them, or by turns.  [default: one each]",
)
@click.option(
    "--method",
    type=click.Choice(["less", "rds", "bm25", "length", "perplexity", "random"]),
    help="What ranks: gradient influence, or a baseline to hold it against.  [default: less; rds for embeddings]",
)
@click.option("--seed", default=0, show_default=True, metavar="S", help="Of --method random.")
@click.option("--feature-set", metavar="NAME", help="Which feature set, where the store has several.")
@click.option(
    "--aggregate",
    default="mean-of-cosines",
    show_default=True,
    type=click.Choice(["mean-of-cosines", "cosine-of-mean"]),
    help="How the targets of a subtask count together.",
)
@click.option(
    "--normalize",
    default="cosine",
    show_default=True,
    type=click.Choice(["cosine", "none"]),
    help="Cosine; or none: the predicted drop of the targets' loss, which favours short rows.",
)
@click.option("--system-prompt", metavar="keep|none|TEXT", help="For the targets.  [default: as for the pool]")
@click.option("--checkpoint-weights", type=CommaList(float), metavar="W,W,...", help="In place of the store's.")
@click.option("--tokens-per-batch", type=click.IntRange(min=1), metavar="N", help="Padded tokens computed at once.")
@click.option("--verify/--no-verify", default=True, show_default=True, help="Check the shards' checksums.")
@click.option("--strict", is_flag=True, help="Stop at the first target that would be skipped.")
@found_again_options
@output_options
def select_command(quiet: bool, debug: bool, **options: Any) -> None:
    """Rank a store's rows by their influence on the targets and write the best, with every original column.

    With another --method the same rows are ranked by a baseline, and the same files are written: `rds` (cosine of
    hidden states) and `bm25` (words shared) look at the targets, `length`, `perplexity` and `random` do not. `rds` and
    `perplexity` embed the pool first, once, into DS.rds.

    \b
    gradsift select --datastore store --targets target.jsonl \\
        --fraction 0.05 --output selected.jsonl
    """
    hush_libraries(quiet)
    from less import select

    for name in ("targets", "checkpoints", "data"):
        options[name] = list(options[name]) or None
    selections = select(progress=not quiet, **options)
    if quiet:
        return
    for selection in selections:
        show_skipped(selection.skipped_targets, None, what="targets")
        view = table(f"{selection.name}: {len(selection.ids)} rows", "rank", "score", "subtask", "id")
        rows = zip(selection.scores, selection.subtasks, selection.ids, strict=True)
        for rank, (score, subtask, name) in enumerate(rows, start=1):
            if rank == len(selection.ids) > _NUM_SHOWN + 1:
                view.add_row("…", "…", "…", "…")
            if rank <= _NUM_SHOWN or rank == len(selection.ids):
                view.add_row(str(rank), f"{score:.4f}", subtask, name)
        show_table(view)
        click.echo(f"written: {selection.output}\n")
    if options["scores"]:
        click.echo(f"every candidate's scores: {options['scores']}")
