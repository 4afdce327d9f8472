"""`gradsift warmup`."""

from typing import Any

import click

from cli.libraries import hush_libraries
from cli.options import loading_options, model_option, output_options, rendering_options, running_options, strict_option
from cli.showing import show_skipped

__all__ = ["warmup_command"]


@click.command("warmup", short_help="Train a LoRA adapter on a fraction of the pool.")
@model_option
@click.option(
    "--data", required=True, metavar="POOL", help="Instruction pool: .jsonl, .parquet, a folder or a hub name."
)
@click.option("--output", required=True, metavar="RUN", help="Folder for the checkpoints.")
@click.option("--fraction", default=0.05, show_default=True, metavar="F", help="Of the pool's rows to train on.")
@click.option("--epochs", default=4, show_default=True, metavar="N", help="Passes; a checkpoint after each.")
@click.option("--learning-rate", default=2e-5, show_default=True, metavar="LR", help="At its peak.")
@click.option(
    "--warmup-ratio",
    default=0.03,
    show_default=True,
    metavar="F",
    help="Of the steps, in which the learning rate rises; then it falls to 0.",
)
@click.option("--batch-size", default=32, show_default=True, metavar="N", help="Rows an optimizer step.")
@click.option("--lora-rank", default=128, show_default=True, metavar="R", help="Rank of the adapter.")
@click.option("--lora-alpha", type=float, metavar="A", help="Scale of the adapter.  [default: 4 × rank]")
@click.option("--lora-dropout", default=0.1, show_default=True, metavar="P", help="While training only.")
@click.option(
    "--target-modules",
    default="all-linear",
    show_default=True,
    metavar="all-linear|q_proj,...",
    help="Linear layers to adapt.",
)
@click.option("--seed", default=0, show_default=True, metavar="S", help="Of the sample, its order and the adapter.")
@rendering_options()
@running_options
@strict_option
@loading_options
@output_options
def warmup_command(quiet: bool, debug: bool, **options: Any) -> None:
    """Train a LoRA adapter on a random fraction of the pool, as LESS does before it looks at gradients.

    RUN gets one checkpoint an epoch, as the Hugging Face Trainer writes it. Started again, an interrupted run
    goes on from its last checkpoint.

    \b
    gradsift warmup --model HuggingFaceTB/SmolLM2-135M-Instruct \\
        --data pool.jsonl --output run
    """
    hush_libraries(quiet)
    from less import warmup

    result = warmup(progress=not quiet, **options)
    if not quiet:
        show_skipped(result.skipped, result.num_rows + len(result.skipped))
        if result.num_computed == 0:
            click.echo(f"{result.output} is complete: nothing to do")
        click.echo(
            f"{len(result.checkpoints)} checkpoints after {result.num_steps} steps on {result.num_rows} rows, "
            f"last loss {result.final_loss:.3f}: {result.output}"
        )
