"""`gradsift quickstart`: warm-up, build and select on the sample that the package carries."""

import json
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.libraries import hush_libraries
from cli.options import output_options
from cli.showing import human_bytes, one_line, show_table, table

if TYPE_CHECKING:
    from less import Selection

__all__ = ["quickstart_command"]

SAMPLE = Path(__file__).parent / "sample"
_FRACTION = 0.05
_ROWS_SHOWN = 5

# 50 optimizer steps, below which a warm-up is warned of, of as few rows as that takes.
_WARMUP = {"fraction": 0.25, "epochs": 2, "batch_size": 2, "learning_rate": 2e-4, "lora_rank": 8}
# The sample has no system prompts, and the template's default one would be a third of every row.
_RENDERING = {"system_prompt": "none"}


@click.command("quickstart", short_help="The whole job on a small sample, in a few minutes.")
@click.option("--model", metavar="M", help="Base model.  [default: SmolLM2-135M-Instruct, from a wheel]")
@click.option("--output", default="quickstart-run", show_default=True, metavar="DIR", help="Folder for all it makes.")
@output_options
def quickstart_command(model: str | None, output: str, quiet: bool, debug: bool) -> None:
    """Warm up, build a datastore and select, on 200 short rows of eight skills, for two targets.

    Takes a few minutes on two cores. Started again, it does only what is missing.

    \b
    gradsift quickstart --output quickstart-run
    """
    start = time.monotonic()
    folder = Path(output)
    pool, targets = SAMPLE / "pool.jsonl", sorted(SAMPLE.glob("target_*.jsonl"))
    skills = Counter(json.loads(line)["skill"] for line in pool.read_text(encoding="utf-8").splitlines())
    _say(quiet, f"Pool: {sum(skills.values())} rows, {len(skills)} skills:\n{', '.join(sorted(skills))}")
    _say(quiet, "Model: " + (model or "SmolLM2-135M-Instruct, de-quantised from 4 bits on the first run."))

    hush_libraries(quiet)
    from cli.demo_model import demo_model
    from less import build_datastore, select, warmup

    model = model or str(demo_model())
    _say(quiet, "\n1. warmup: a LoRA adapter of rank 8, two epochs on a quarter of the pool")
    warmup(model=model, data=pool, output=folder / "run", progress=not quiet, **_WARMUP, **_RENDERING)
    _say(quiet, "\n2. build-datastore: each row's gradient, as Adam would step, at both checkpoints")
    built = build_datastore(
        model=model, checkpoints=folder / "run", data=pool, datastore=folder / "store", progress=not quiet,
        **_RENDERING,
    )  # fmt: skip
    _say(quiet, f"   {built.num_scored} rows, {human_bytes(built.num_bytes)}")
    _say(quiet, "\n3. select: the top 5% for each target, eight examples of one skill")
    selections = select(
        datastore=folder / "store", targets=targets, fraction=_FRACTION, output=folder / "selected",
        scores=folder / "scores", progress=not quiet,
    )  # fmt: skip
    if quiet:
        return
    for selection in selections:
        _show(selection, skills)
    click.echo(
        f"\nDone in {time.monotonic() - start:.0f} seconds; everything is in {folder}/.\n"
        "No skill was told to the model or the engine: they saw messages only. But these\n"
        "skills are easy to tell apart, and those of a real pool are not.\n\n"
        "The same on your own data:\n"
    )
    click.echo(_commands(model))


def _show(selection: "Selection", skills: Counter[str]) -> None:
    wanted = selection.name.removeprefix("target_")
    found = [(record.columns or {})["skill"] for record in selection.records]
    chance = len(found) * skills[wanted] / sum(skills.values())
    view = table(f"\nTarget: {wanted}", "rank", "score", "skill", "request")
    for rank, (record, score) in enumerate(zip(selection.records, selection.scores, strict=True), start=1):
        if rank <= _ROWS_SHOWN:
            request = (record.columns or {})["messages"][0]["content"]
            view.add_row(str(rank), f"{score:.4f}", found[rank - 1], one_line(request, 44))
    show_table(view)
    others = Counter(skill for skill in found if skill != wanted)
    rest = f" (the others: {', '.join(f'{n} {skill}' for skill, n in others.most_common())})" if others else ""
    click.echo(f"{len(found) - others.total()} of the top {len(found)} are {wanted} rows{rest}; by chance: {chance:g}")


def _commands(model: str) -> str:
    return (
        f"  M={model}\n"
        "  gradsift warmup --model $M --data POOL.jsonl --output run\n"
        "  gradsift build-datastore --model $M --checkpoints run \\\n"
        "      --data POOL.jsonl --datastore store\n"
        "  gradsift select --datastore store --targets TARGET.jsonl \\\n"
        "      --fraction 0.05 --output selected.jsonl"
    )


def _say(quiet: bool, text: str) -> None:
    if not quiet:
        click.echo(text)
