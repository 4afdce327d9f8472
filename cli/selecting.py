"""`gradsift select`."""

from typing import Any

import click

from cli.libraries import hush_libraries
from cli.options import CommaList, bundle, found_again_options, output_options
from cli.showing import show_skipped, show_table, table, visible

__all__ = ["select_command"]

_NUM_SHOWN = 5
_FEW_TARGETS = 8
_STRATEGY = (
    "fraction", "count", "token_budget", "turns", "balance", "balance_pairs", "quotas", "caps", "min_score",
    "duplicates", "near_duplicates", "diversity", "diversity_weight", "diversity_candidates", "seed",
    "away_weight", "away_above",
)  # fmt: skip


_how_much = bundle(
    click.option("--fraction", type=float, metavar="F", help="Of the usable rows of the pool to select, such as 0.05."),
    click.option("--count", type=int, metavar="N", help="Number of rows to select, in place of --fraction."),
    click.option("--token-budget", type=int, metavar="N", help="Or the most supervised tokens they may hold."),
    click.option("--config", metavar="TOML", help="File of these settings; an option given here replaces the file's."),
)

_which = bundle(
    click.option(
        "--turns", type=click.Choice(["subtask", "target-set"]), help="These take turns, each adding its best row."
    ),
    click.option("--balance", metavar="COLUMN", help="The values of a column of the pool take turns."),
    click.option("--balance-pairs", metavar="COLUMN", help="Pairs of a row's values, such as skills, take turns."),
    click.option(
        "--quota", "quotas", multiple=True, metavar="COL=[VALUE:]N",
        help="At least N rows, or a share such as 0.3, have this value, or each value; may be repeated.",
    ),
    click.option(
        "--cap", "caps", multiple=True, metavar="COL=[VALUE:]N",
        help="At most N rows, or a share, have this value, or any one value; may be repeated.",
    ),
    click.option("--min-score", type=float, metavar="X", help="Leave out rows that score less."),
    click.option(
        "--duplicates", type=click.Choice(["exact"]), help="Leave out rows with the very tokens of a taken row."
    ),
    click.option(
        "--near-duplicates", type=float, metavar="COS",
        help="Leave out rows this similar to a taken one in gradient space, such as 0.95.",
    ),
    click.option(
        "--diversity", type=click.Choice(["mmr", "facility-location"]),
        help="Prefer rows that are unlike those taken, in gradient space.",
    ),
    click.option(
        "--diversity-weight", type=float, metavar="L", help="How much the score counts in mmr.  [default: 0.5]"
    ),
    click.option(
        "--diversity-candidates", type=int, metavar="N",
        help="The best rows, N times the budget, that it chooses from.  [default: 4]",
    ),
    click.option(
        "--away-from", multiple=True, metavar="T",
        help="Negative targets: rows that point to them are ranked lower; may be repeated.",
    ),
    click.option(
        "--away-weight", type=float, metavar="W", help="How much they count.  [default: 1; 0 with --away-above]"
    ),
    click.option("--away-above", type=float, metavar="X", help="Leave out rows that score this or more for them."),
)  # fmt: skip


@click.command("select", short_help="The rows that are most influential for the targets.")
@click.option("--datastore", required=True, metavar="DS", help="A finished store.")
@click.option(
    "--targets",
    required=True,
    multiple=True,
    metavar="T",
    help="Examples of the wanted capability, in groups by their `subtask`; may be repeated.",
)
@_how_much
@click.option(
    "--output", required=True, metavar="OUT", help=".jsonl or .parquet file; or a folder, for one file each target set."
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
@_which
@click.option(
    "--seed", type=int, metavar="S", help="Of --method random and --diversity facility-location.  [default: 0]"
)
@click.option("--feature-set", metavar="NAME", help="Features to score and compare by, where there are several.")
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
@click.option(
    "--keep-scores/--no-keep-scores",
    default=True,
    show_default=True,
    help="Keep the scores in DS.scores: for the same targets, another selection then costs no model and no scan.",
)
@click.option("--strict", is_flag=True, help="Stop at the first target that would be skipped.")
@found_again_options
@output_options
def select_command(quiet: bool, debug: bool, **options: Any) -> None:
    """Rank a store's rows by their influence on the targets and write the best, with every original column.

    With another --method the same rows are ranked by a baseline, and the same files are written: `rds` (cosine of
    hidden states) and `bm25` (words shared) look at the targets, `length`, `perplexity` and `random` do not. `rds` and
    `perplexity` embed the pool first, once, into DS.rds.

    A selection walks down the rows, best first or by turns, takes each unless a rule forbids it, and stops when it has
    as many rows or tokens as it may. Why a row was taken is written beside it.

    \b
    gradsift select --datastore store --targets target.jsonl \\
        --fraction 0.05 --output selected.jsonl
    """
    hush_libraries(quiet)
    from less import select

    for name in ("targets", "checkpoints", "data", "away_from", "quotas", "caps"):
        options[name] = list(options[name]) or None
    unset = {name for name in _STRATEGY if options[name] is None}  # so that a file of settings can have them
    selections = select(progress=not quiet, **{name: value for name, value in options.items() if name not in unset})
    if quiet:
        return
    for selection in selections:
        show_skipped(selection.skipped_targets, None, what="targets")
        num_rows, ids = len(selection.positions), selection.influence.rows.ids
        view = table(f"{selection.name}: {num_rows} rows", "rank", "score", "subtask", "id")
        for n in range(num_rows):
            if n == num_rows - 1 > _NUM_SHOWN:
                view.add_row("…", "…", "…", "…")
            if n < _NUM_SHOWN or n == num_rows - 1:
                name = ids[int(selection.positions[n])]
                view.add_row(str(n + 1), f"{selection.scores[n]:.4f}", selection.subtasks[n], name)
        show_table(view)
        _show_choice(selection.choice)
        if selection.num_targets < _FEW_TARGETS and options["method"] in (None, "less"):
            click.echo(
                f"only {selection.num_targets} targets: below {_FEW_TARGETS}, most of a selection depends on which "
                "ones (benchmarks/EVIDENCE.md, 6)"
            )
        click.echo(f"written: {selection.output}\n")
    if options["scores"]:
        click.echo(f"every candidate's scores: {options['scores']}")


def _show_choice(choice: Any) -> None:
    """What was passed over, by rule, and what the strategy has to say."""
    for rule, rows in choice.passed_over.items():
        click.echo(f"passed over {len(rows):,} row{'' if len(rows) == 1 else 's'}: {visible(rule)}")
    for note in choice.notes:
        click.echo(visible(note))
