"""`gradsift evaluate`."""

from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.libraries import hush_libraries
from cli.options import CommaList, found_again_options, output_options
from cli.showing import show_table, table

if TYPE_CHECKING:
    from less.statistics import Interval

__all__ = ["evaluate_command"]


@click.command("evaluate", short_help="Train on what each method selects; measure the target.")
@click.option("--datastore", required=True, metavar="DS", help="A finished store.")
@click.option("--targets", required=True, multiple=True, metavar="T", help="Target examples; may be repeated.")
@click.option(
    "--eval",
    "held_out",
    required=True,
    multiple=True,
    metavar="FILE",
    help="Rows of the target to measure on, never selected by; one for each --targets, in the same order.",
)
@click.option("--output", required=True, metavar="OUT", help="Folder for trials, scores, the outcome and its figure.")
@click.option(
    "--methods",
    type=CommaList(),
    default=("less", "rds", "bm25", "length", "random"),
    metavar="M,M,...",
    help="less, less:FEATURE_SET, less:FEATURE_SET:none, or baselines.  [default: less,rds,bm25,length,random]",
)
@click.option(
    "--fractions", type=CommaList(float), default=(0.05,), metavar="F,F,...", help="Budgets.  [default: 0.05]"
)
@click.option(
    "--match",
    type=CommaList(),
    default=("rows", "tokens"),
    metavar="rows,tokens",
    help="As many rows for each method, as many supervised tokens, or both.  [default: rows,tokens]",
)
@click.option("--seeds", default=3, show_default=True, metavar="N", help="Trainings of each selection.")
@click.option(
    "--quantiles",
    default=0,
    show_default=True,
    metavar="N",
    help="Also train on N parts of the score's range, such as 10.",
)
@click.option(
    "--quantile-methods",
    type=CommaList(),
    default=("less",),
    metavar="M,M,...",
    help="Whose scores --quantiles is about.  [default: less]",
)
@click.option("--epochs", default=4, show_default=True, metavar="N", help="Passes over a selection.")
@click.option("--learning-rate", default=2e-5, show_default=True, metavar="LR", help="At its peak.")
@click.option("--batch-size", default=32, show_default=True, metavar="N", help="Rows an optimizer step.")
@click.option("--lora-rank", type=int, metavar="R", help="Of the adapter.  [default: as the store's checkpoints]")
@click.option("--eval-rows", type=int, metavar="N", help="At most so many held-out rows of each set.  [default: all]")
@click.option(
    "--answer-rows", default=0, show_default=True, metavar="N", help="So many with an `answer` are answered: slow."
)
@click.option("--max-new-tokens", default=256, show_default=True, metavar="N", help="Of an answer.")
@click.option("--system-prompt", metavar="keep|none|TEXT", help="For targets and --eval.  [default: as for the pool]")
@click.option("--tokens-per-batch", type=click.IntRange(min=1), metavar="N", help="Padded tokens computed at once.")
@click.option("--verify/--no-verify", default=True, show_default=True, help="Check the shards' checksums.")
@found_again_options
@output_options
def evaluate_command(quiet: bool, debug: bool, **options: Any) -> None:
    """Select by each method, train a fresh adapter on each selection, and measure the loss on held-out target rows.

    Every method gets as many rows, or as many supervised tokens, the same start and the same order of training; random
    rows are always among them. Finished trainings are kept: started again, it goes on; started several times, the
    processes share the work. OUT gets `evaluation.json` and `evaluation.png`.

    \b
    gradsift evaluate --datastore store --targets target.jsonl \\
        --eval eval.jsonl --fractions 0.05,0.1 --output experiment
    """
    hush_libraries(quiet)
    from cli.evaluation_figure import evaluation_figure, percent
    from less import evaluate

    for name in ("targets", "held_out", "checkpoints", "data"):
        options[name] = list(options[name]) or None
    found = evaluate(progress=not quiet, **options)
    figure = Path(options["output"]) / "evaluation.png"
    evaluation_figure(found.to_json()).savefig(figure, dpi=150)
    if quiet:
        return
    for target, start in found.start.items():
        before = f"loss before training {start['loss']:.4f}"
        if answered := not isnan(start["accuracy"]):
            before += f", correct {start['accuracy']:.0%}"
        for fraction, match in dict.fromkeys((arm.fraction, arm.match) for arm in found.arms):
            view = table(
                f"{target}: {percent(fraction)} of the {match}; {before}",
                "method", "rows", "tokens", "loss", "drop beyond random [95%]", *(["correct"] if answered else []),
            )  # fmt: skip
            for column in view.columns[1:4]:
                column.justify = "right"
            own = [arm for arm in found.arms if (arm.target, arm.fraction, arm.match) == (target, fraction, match)]
            for arm in sorted(own, key=lambda arm: arm.loss):
                beyond = "" if arm.method == "random" else _with_signs(arm.over_random)
                cells = [arm.method, f"{arm.num_rows:,.0f}", f"{arm.num_supervised:,.0f}", f"{arm.loss:.4f}", beyond]
                view.add_row(*cells, *([f"{arm.accuracy:.0%}"] if answered else []))
            show_table(view)
            click.echo()
    if found.quantiles:
        title = "does a higher score teach more?"
        view = table(title, "target", "scores by", "parts", "rank correlation with the drop [95%]")
        for test in found.quantiles:
            view.add_row(test.target, test.method, str(len(test.drops)), str(test.trend))
        show_table(view)
        click.echo()
    click.echo(f"written: {figure.with_suffix('.json')}")
    click.echo(f"written: {figure}")


def _with_signs(found: "Interval") -> str:
    return f"{found.value:+.4f} [{found.low:+.4f}, {found.high:+.4f}]".replace("-", "−")
