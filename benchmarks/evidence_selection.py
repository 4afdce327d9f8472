"""The experiment that tells, on a real model and pool: what is gained by training on what each method selects.

    python benchmarks/evidence_selection.py prepare --work DIR --model M --data FOLDER
    python benchmarks/evidence_selection.py run     --work DIR
    python benchmarks/evidence_selection.py report  --work DIR --json benchmarks/results/NAME.json

`prepare`: of FOLDER's `pool.jsonl` the first rows of at most `--max-tokens` tokens; `target_NAME.jsonl`, at most
`--targets-a-subtask` of each subtask; `eval_NAME.jsonl`, its rows of at most `--max-tokens` tokens; a warm-up, a
store with every update rule, and a store of embeddings. BBH's targets reason before they answer, and its held-out rows
are bare answers: as `bbh_answers` they show what comes of targets that do not look like what is wanted, and as `bbh`
the same targets are measured on the exemplars that are left over. `run` is `less.evaluate` with the settings given;
started twice, it shares the work, and what is finished is kept. `report` makes the page of what is there.

What decides, said before the run: a method is better than random rows for a target at a budget where the 95% interval
of its drop of the held-out loss, less that of random rows, is above 0.
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from harness import machine, machine_in_words, write_report

from cli.evaluation_figure import evaluation_figure
from less import build_datastore, build_embeddings, evaluate, warmup
from less.data import RenderConfig, Renderer, RowProblem, open_source
from less.models import load_tokenizer

RULES = ("adam", "adam-less", "adam-no-momentum", "sgd", "sign")


def main() -> None:
    """Run one stage."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    stages = parser.add_subparsers(required=True)
    own = stages.add_parser("prepare")
    own.set_defaults(work_on=prepare)
    own.add_argument("--model", required=True)
    own.add_argument("--data", type=Path, required=True)
    own.add_argument("--rows", type=int, default=1500)
    own.add_argument("--max-tokens", type=int, default=256)
    own.add_argument("--targets", nargs="+", default=["gsm8k", "t0", "bbh"])
    own.add_argument("--targets-a-subtask", type=int, default=2)
    own.add_argument("--dtype", default="bfloat16")
    own.add_argument("--lora-rank", type=int, default=8)
    own.add_argument("--epochs", type=int, default=3)
    own.add_argument("--batch-size", type=int, default=4)
    own.add_argument("--learning-rate", type=float, default=2e-4)
    own.add_argument("--proj-dim", type=int, default=32768)
    own.add_argument("--shard-rows", type=int, default=128)
    own.add_argument("--work", type=Path, required=True)
    own = stages.add_parser("run")
    own.set_defaults(work_on=run)
    own.add_argument("--work", type=Path, required=True)
    own.add_argument("--methods", nargs="+", default=["less:adam-sparse", "less:sgd-sparse", "rds", "bm25", "length"])
    own.add_argument("--fractions", nargs="+", type=float, default=[0.05, 0.1])
    own.add_argument("--match", nargs="+", default=["rows"])
    own.add_argument("--seeds", type=int, default=3)
    own.add_argument("--quantiles", type=int, default=0)
    own.add_argument("--quantile-methods", nargs="+", default=["less:adam-sparse"])
    own.add_argument("--only", nargs="+", help="target sets; all of them by default")
    own.add_argument("--epochs", type=int, default=1)
    own.add_argument("--batch-size", type=int, default=4)
    own.add_argument("--learning-rate", type=float, default=2e-4)
    own.add_argument("--eval-rows", type=int, default=48)
    own.add_argument("--embeddings", action="store_true", help="score from the store of embeddings: no gradients yet")
    own.add_argument("--part", default="main", help="what to call the outcome in the report")
    own = stages.add_parser("report")
    own.set_defaults(work_on=report)
    own.add_argument("--work", type=Path, required=True)
    own.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    args.work_on(args)


def prepare(args: argparse.Namespace) -> None:
    """Files, warm-up and stores; what is there is kept."""
    args.work.mkdir(parents=True, exist_ok=True)
    renderer = Renderer(load_tokenizer(args.model), RenderConfig(max_length=10**6))
    if not (args.work / "pool.jsonl").exists():
        write(args.work / "pool.jsonl", short_rows(args.data / "pool.jsonl", renderer, args.max_tokens)[: args.rows])
    for name in args.targets:
        targets = short_rows(args.data / f"target_{name}.jsonl", renderer, 2 * args.max_tokens)
        few = targets if name == "gsm8k" else few_of_each(targets, args.targets_a_subtask)
        held_out = {name: short_rows(args.data / f"eval_{name}.jsonl", renderer, args.max_tokens)}
        if name == "bbh":
            held_out = {"bbh": [line for line in targets if line not in few], "bbh_answers": held_out[name]}
        for own, rows in held_out.items():
            write(args.work / f"target_{own}.jsonl", few)
            write(args.work / f"eval_{own}.jsonl", rows)
    settings = {"model": args.model, "data": args.work / "pool.jsonl", "max_length": 2 * args.max_tokens}
    warmup(
        output=args.work / "run", lora_rank=args.lora_rank, epochs=args.epochs, batch_size=args.batch_size,
        learning_rate=args.learning_rate, dtype=args.dtype, **settings,
    )  # fmt: skip
    build_embeddings(
        datastore=args.work / "store.rds", dtype=args.dtype, shard_rows=args.shard_rows, **settings,
    )  # fmt: skip
    build_datastore(
        checkpoints=args.work / "run", datastore=args.work / "store", proj_dim=args.proj_dim, dtype=args.dtype,
        update_rule=RULES, shard_rows=args.shard_rows, **settings,
    )  # fmt: skip
    write(
        args.work / "prepared.json", [json.dumps({k: v for k, v in vars(args).items() if k != "work_on"}, default=str)]
    )


def short_rows(file: Path, renderer: Renderer, max_tokens: int) -> list[bytes]:
    """The lines of a file whose rows have at most `max_tokens` tokens."""
    kept = []
    for record in open_source(file).iter_records():
        try:
            if renderer.render_record(record).num_tokens <= max_tokens:
                kept.append(record.raw or b"")
        except RowProblem:
            continue
    return kept


def few_of_each(lines: list[bytes], most: int) -> list[bytes]:
    """At most so many of each subtask, the first ones."""
    seen: Counter[str] = Counter()
    kept = []
    for line in lines:
        subtask = json.loads(line).get("subtask", "")
        seen[subtask] += 1
        if seen[subtask] <= most:
            kept.append(line)
    return kept


def write(file: Path, lines: list[Any]) -> None:
    """Whole or not at all."""
    part = file.with_suffix(".part")
    part.write_bytes(b"".join((line.encode() if isinstance(line, str) else line).rstrip() + b"\n" for line in lines))
    part.replace(file)


def run(args: argparse.Namespace) -> None:
    """Train and measure."""
    names = args.only or [file.stem.removeprefix("eval_") for file in sorted(args.work.glob("eval_*.jsonl"))]
    evaluation = evaluate(
        datastore=args.work / ("store.rds" if args.embeddings else "store"),
        targets={name: args.work / f"target_{name}.jsonl" for name in names},
        held_out={name: args.work / f"eval_{name}.jsonl" for name in names},
        output=args.work / "evaluation",
        checkpoints=args.work / "run",
        methods=args.methods,
        fractions=args.fractions,
        match=args.match,
        seeds=args.seeds,
        quantiles=args.quantiles,
        quantile_methods=args.quantile_methods,
        epochs=args.epochs,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        eval_rows=args.eval_rows,
    )
    write(args.work / f"outcome-{args.part}.json", [json.dumps(evaluation.to_json(), indent=1)])


def report(args: argparse.Namespace) -> None:
    """The page and the plot of every part that was run."""
    prepared = json.loads((args.work / "prepared.json").read_text(encoding="utf-8"))
    parts = {
        file.stem.removeprefix("outcome-"): json.loads(file.read_text(encoding="utf-8"))
        for file in sorted(args.work.glob("outcome-*.json"))
    }
    found = {"what": __doc__.splitlines()[0], "prepared": prepared, "machine": machine(), "parts": parts}
    write_report(found, page_of(found, args.json.stem), args.json)
    for name, part in parts.items():
        figure = evaluation_figure(part)
        figure.savefig(args.json.with_name(f"{args.json.stem}_{name}.png"), dpi=120)


def page_of(found: dict[str, Any], stem: str) -> str:
    """The report as a page."""
    p = found["prepared"]
    lines = [
        "# What is gained by training on what each method selects", "",
        f"{Path(p['model']).name} ({p['dtype']}), the first {p['rows']} rows of the pool that have at most "
        f"{p['max_tokens']} tokens. Warm-up: {p['epochs']} epochs of 5%, rank {p['lora_rank']}, learning rate "
        f"{p['learning_rate']}; features: sparse, K = {p['proj_dim']}, {p['epochs']} checkpoints.", "",
        "*Over random* is the drop of the held-out loss beyond that of random rows at the same budget, with the same "
        "seeds of training; in bold where its 95% interval (over held-out rows and seeds) leaves out 0.", "",
        machine_in_words(found["machine"]), "",
    ]  # fmt: skip
    for name, part in found["parts"].items():
        s = part["settings"]
        held_out = ", ".join(
            f"{target} {own['rows']} rows (loss before training {own['loss']:.3f})"
            for target, own in part["start"].items()
        )
        lines += [
            f"## {name}", "",
            f"{s['seeds']} trainings of each selection, {s['epochs']} epoch(s), batches of {s['batch_size']}, learning "
            f"rate {s['learning_rate']}; {s['num_trials']} trainings in all. Held out: {held_out}.", "",
            f"![Drop over random]({stem}_{name}.png)", "",
            "| target | budget | as many | method | rows | supervised tokens | drop of the loss | over random |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]  # fmt: skip
        for arm in part["arms"]:
            cells = [
                arm["target"], f"{arm['fraction']:.0%}", arm["match"], arm["method"], f"{arm['num_rows']:.0f}",
                f"{arm['num_supervised']:,.0f}", interval(arm["drop"]),
                "" if arm["method"] == "random" else interval(arm["over_random"]),
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", *contrasts(part)]
        if part["quantiles"]:
            lines += ["| target | scores of | drop by part of the score's range, lowest first | trend (Spearman) |"]
            lines += ["| --- | --- | --- | --- |"]
            for test in part["quantiles"]:
                drops = ", ".join(f"{drop['value']:.3f}" for drop in test["drops"])
                lines.append(f"| {test['target']} | {test['method']} | {drops} | {interval(test['trend'], 2)} |")
            lines.append("")
    return "\n".join(lines)


def contrasts(part: dict[str, Any]) -> list[str]:
    """How far each gradient method is ahead of every other, of the same held-out rows and seeds."""
    others = part["settings"]["methods"]
    lines = [
        "How far gradients are ahead of each other method, of the same held-out rows with the same seeds:", "",
        f"| target | budget | method | {' | '.join(f'over {name}' for name in others)} |",
        f"| --- | --- | --- | {' | '.join('---' for _ in others)} |",
    ]  # fmt: skip
    for arm in part["arms"]:
        if arm["method"].startswith("less"):
            cells = [arm["target"], f"{arm['fraction']:.0%}", arm["method"]]
            cells += [interval(arm["over"][name]) if name in arm["over"] else "" for name in others]
            lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def interval(found: dict[str, float], digits: int = 3) -> str:
    """`0.012 [0.003, 0.020]`, in bold where it does not hold 0."""
    value, low, high = found["value"], found["low"], found["high"]
    text = f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]".replace("-", "−")
    return f"**{text}**" if low > 0 or high < 0 else text


if __name__ == "__main__":
    main()
