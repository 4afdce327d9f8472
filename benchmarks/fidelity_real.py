"""The whole job on a real model and a real pool, and how often the right rows come first.

    python benchmarks/fidelity_real.py --model M --data FOLDER --work DIR --json benchmarks/results/NAME.json

FOLDER holds `pool.jsonl` and `target_{bbh,gsm8k,t0,dolly}.jsonl`, rows with `dataset` and `subtask`. The first
`--rows` of the pool are warmed up on, built and selected from. For T0 and Dolly the right answer is known: the
pool rows of the target's own dataset and subtask. Per subtask with at least five of them, from the per-subtask
scores of every candidate:

    R-precision   of the R best rows, the share that are among the R right ones      chance: R / N
    AUC           probability that a right row scores above another one              chance: 0.5

Provenance rewards surface form: it shows that the numbers mean something, not that the selection trains well.
A finished stage is not done again, so an interrupted run goes on where it was.
"""

import argparse
import itertools
import json
import platform
import time
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

import numpy as np

from less.statistics import auc, r_precision

TARGETS = ("bbh", "gsm8k", "t0", "dolly")
KNOWN = ("t0", "dolly")
LEAST_RIGHT_ROWS = 5


def main() -> None:
    """Run the stages and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--lora-rank", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--update-rule", nargs="+", default=["adam"])
    args = parser.parse_args()

    import torch

    from datastore import Datastore
    from less import build_datastore, select, warmup

    args.work.mkdir(parents=True, exist_ok=True)
    pool = args.work / "pool.jsonl"
    with open(args.data / "pool.jsonl", "rb") as lines:
        pool.write_bytes(b"".join(itertools.islice(lines, args.rows)))
    start = time.monotonic()
    run = warmup(
        model=args.model, data=pool, output=args.work / "run", dtype=args.dtype, epochs=args.epochs,
        batch_size=args.batch_size, learning_rate=args.learning_rate, lora_rank=args.lora_rank,
    )  # fmt: skip
    built = build_datastore(
        model=args.model, checkpoints=args.work / "run", data=pool, datastore=args.work / "store",
        dtype=args.dtype, update_rule=args.update_rule, shard_rows=128, proj_dim=8192,
    )  # fmt: skip
    results: dict[str, dict] = {}
    for feature_set in Datastore.open(args.work / "store").feature_sets:
        rule = feature_set.split("-sparse")[0]
        scores = args.work / "scores" / rule
        if not all((scores / f"target_{name}.jsonl").exists() for name in TARGETS):
            select(
                datastore=args.work / "store",
                targets=[args.data / f"target_{name}.jsonl" for name in TARGETS],
                fraction=0.05,
                scores=scores,
                output=args.work / "selected" / rule,
                feature_set=feature_set,
            )
        results[rule] = {name: what_was_selected(scores / f"target_{name}.jsonl", pool) for name in TARGETS}
        for name in KNOWN:
            results[rule][name] |= provenance_measures(scores / f"target_{name}.jsonl", pool, name)
    report = {
        "what": "R-precision and AUC by subtask; datasets of the selected 5%",
        "model": Path(args.model).name,
        "rows": args.rows,
        "num_scored": built.num_scored,
        "skipped": {row.where: row.reason for row in built.skipped},
        "settings": {
            "warm-up": f"5% ({run.num_rows} rows), {args.epochs} epochs, {run.num_steps} steps of {args.batch_size} "
            f"rows, learning rate {args.learning_rate}, LoRA rank {args.lora_rank} on all linear layers",
            "features": "sparse, K = 8192, float16",
            "dtype": args.dtype,
        },
        "seconds_of_this_call": round(time.monotonic() - start),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, "
        + (torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "gradsift")},
        "results": results,
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    args.json.with_suffix(".md").write_text(as_markdown(report), encoding="utf-8")
    print(as_markdown(report))


def read(path: Path) -> list[dict]:
    """Rows of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def provenance_measures(scores: Path, pool: Path, dataset: str) -> dict:
    """Mean over subtasks of R-precision and AUC, beside chance and ceiling."""
    rows = {row["id"]: row for row in read(pool)}
    lines = [line for line in read(scores) if line["score"] is not None]
    own = np.array([rows[line["id"]]["dataset"] == dataset for line in lines])
    of_subtask: dict[str, list[int]] = defaultdict(list)
    for n in np.flatnonzero(own):
        of_subtask[rows[lines[n]["id"]].get("subtask", "")].append(int(n))
    by_subtask = {}
    for subtask in sorted(lines[0]["scores"]):
        right = of_subtask.get(subtask, [])
        if len(right) < LEAST_RIGHT_ROWS:
            continue
        is_right = np.zeros(len(lines), bool)
        is_right[right] = True
        score_N = np.array([line["scores"][subtask] for line in lines])
        by_subtask[subtask] = {
            "right": len(right),
            "r_precision": r_precision(score_N, is_right),
            "auc": auc(score_N, is_right),
            "auc_within_dataset": auc(score_N[own], is_right[own]),
            "chance": len(right) / len(lines),
        }
    means = {
        key: float(np.mean([entry[key] for entry in by_subtask.values()]))
        for key in ("r_precision", "auc", "auc_within_dataset", "chance")
    }
    return {"num_subtasks": len(by_subtask), **means, "ceiling": 1.0, "by_subtask": by_subtask}


def what_was_selected(scores: Path, pool: Path) -> dict:
    """Datasets of the best 5%, beside their share of the pool."""
    rows = {row["id"]: row for row in read(pool)}
    lines = sorted((line for line in read(scores) if line["rank"]), key=lambda line: line["rank"])
    best = lines[: -(-len(lines) // 20)]
    selected: dict[str, int] = defaultdict(int)
    for line in best:
        selected[rows[line["id"]]["dataset"]] += 1
    return {"num_selected": len(best), "selected": dict(sorted(selected.items(), key=lambda kv: -kv[1]))}


def as_markdown(report: dict) -> str:
    """The report as a page."""
    lines = [
        f"# {report['model']}, the first {report['rows']} rows of the pool", "",
        f"{report['settings']['warm-up']}; {report['settings']['features']}; {report['settings']['dtype']}. "
        f"{report['num_scored']} rows scored. {report['machine']}; "
        + ", ".join(f"{name} {v}" for name, v in report["versions"].items()) + ".", "",
        "| update rule | target | subtasks | R-precision | chance | ceiling | AUC | AUC within the dataset | chance |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for rule, by_target in report["results"].items():
        for name in KNOWN:
            m = by_target[name]
            lines.append(
                f"| {rule} | {name} | {m['num_subtasks']} | {m['r_precision']:.2f} | {m['chance']:.2f} | "
                f"{m['ceiling']:.2f} | {m['auc']:.2f} | {m['auc_within_dataset']:.2f} | 0.50 |"
            )
    lines += ["", "| update rule | target | datasets of the selected 5% |", "| --- | --- | --- |"]
    for rule, by_target in report["results"].items():
        for name in TARGETS:
            shares = ", ".join(f"{dataset} {count}" for dataset, count in by_target[name]["selected"].items())
            lines.append(f"| {rule} | {name} | {shares} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
