"""Whether the measures foresee displacement in a real DPO run, and whether filtering by them prevents it.

    python benchmarks/evidence_displacement.py --model M --label NAME --data PAIRS.jsonl --work DIR --json FILE

Razin et al. (ICLR 2025, sections 5 and 6) claim that DPO lowers log p(chosen) of pairs with high CHES, and that
keeping the pairs of lowest length-normalised CHES prevents it. Both are tested by training, against two
controls: the lengths of both replies, and random subsets of the same size, trained on for as many steps.

Protocol, fixed before any run:

    pairs      those of PAIRS.jsonl whose prompt and longer reply have at most `--max-tokens` tokens, in the file's
               order, a prompt that came before left out: the first for SFT, then the pool, then the held-out pairs
    sft        one epoch on the chosen replies; the result is the model that every DPO run starts from
    scores     `ches.score_pairs` of the pool under that model, tokens as `DPOTrainer` trains on them
    mixed      DPO on a random part of the pool; log p of both replies of each trained pair before and after
    filtering  DPO on the whole pool, on the lowest `--keep` of it by ln_ches, ches and alpha_ches, and on as many
               random pairs, several times; the same start and number of steps; log p of the held-out pairs

    Δ = log p after − log p before, in nats, summed over the reply's tokens;  a chosen reply *falls* where Δ < 0

A measure's claim is **reproduced** if the partial Spearman correlation of the measure with −Δ log p(chosen), both
lengths partialled out (Pearson of the residuals of ranks on the ranks of both lengths), has a 95% bootstrap interval
(percentile, resampling pairs) above 0 in the mixed run of seed 0. Other seeds are shown beside it and decide
nothing; Δ per token is a secondary outcome. A measure's filter **mitigates** if its mean Δ log p(chosen) on the
held-out pairs, less the mean of the random runs, has an interval above 0; how far the random runs lie apart is told.

Two cautions were added when most results were known, and decide nothing: DPO on the pairs that a filter by length
alone keeps, and each random run less the mean of the other random runs, a difference that should be nothing.

The sizes are what one core does in an hour and a half; they were settled before any result was seen.
Full fine-tuning in float32 without dropout, AdamW, constant learning rate, gradients clipped to norm 1. A finished
stage is a JSON file in DIR and is not done again, so an interrupted run goes on where it was; `--report` computes
nothing and writes the page from the stages that are finished.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from less.statistics import average_ranks, spearman

FILTERS = ("ln_ches", "ches", "alpha_ches")
LENGTH_FILTERS = ("length_difference", "-length_chosen")
"""What a filter by length alone does: ches and alpha_ches keep pairs of long chosen replies."""
PREDICTORS = ("ches", "ln_ches", "alpha_ches", "last_hidden", "-edit_distance")
"""High where the paper expects, or does not expect, displacement."""
BASELINES = ("length_difference", "length_chosen", "-length_chosen")
SIDES = ("chosen", "rejected")
BETA = 0.1
SMOKE = {"sft": 8, "pool": 14, "held_out": 5, "mixed": 8, "keep": 0.4, "steps": 2, "batch_size": 4, "micro_batch": 2}
SMOKE |= {"mixed_seeds": 1, "random_seeds": 2, "resamples": 50, "max_tokens": 1000}

Floats = NDArray[np.float64]


def main() -> None:
    """Run the stages and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--label", help="what to call the model on the page; the folder's name by default")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--max-tokens", type=int, default=136)
    parser.add_argument("--sft", type=int, default=160, help="rows of the first stage")
    parser.add_argument("--pool", type=int, default=400, help="pairs that are scored and trained on")
    parser.add_argument("--held-out", type=int, default=100)
    parser.add_argument("--mixed", type=int, default=192, help="pairs of a mixed run")
    parser.add_argument("--keep", type=float, default=0.15, help="fraction that a filter keeps")
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps of a run of the filtering stage")
    parser.add_argument("--mixed-seeds", type=int, default=2)
    parser.add_argument("--random-seeds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=1, help="of a mixed run")
    parser.add_argument("--sft-learning-rate", type=float, default=2e-5)
    parser.add_argument("--learning-rate", type=float, default=2e-6)
    parser.add_argument("--resamples", type=int, default=2000)
    parser.add_argument("--report", action="store_true", help="only write the page")
    parser.add_argument("--smoke", action="store_true", help="a handful of pairs, to see that the script works")
    if parser.parse_known_args()[0].smoke:
        parser.set_defaults(**SMOKE)
    args = parser.parse_args()

    study = Study(args)
    study.run()
    args.json.parent.mkdir(parents=True, exist_ok=True)
    report = as_report(study)
    args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    args.json.with_suffix(".md").write_text(as_markdown(report), encoding="utf-8")
    print(as_markdown(report))


class Study:
    """The stages, each computed once and kept in the work folder."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.finished: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        self.missing: list[str] = []
        args.work.mkdir(parents=True, exist_ok=True)
        self.start = args.work / "start"
        self.settings = {
            name: getattr(args, name)
            for name in ("max_tokens", "sft", "pool", "held_out", "batch_size", "micro_batch", "sft_learning_rate")
        }

    def run(self) -> None:
        """All stages, or with `--report` what is there of them."""
        args = self.args
        self.stage("split", {}, self.split)
        self.stage("sft", {}, self.fine_tune)
        self.stage("scores", {}, self.score)
        dpo = {"learning_rate": args.learning_rate}
        mixed = dpo | {"mixed": args.mixed, "epochs": args.epochs}
        short = dpo | {"keep": args.keep, "steps": args.steps}
        self.stage("mixed-0", mixed, lambda: self.mixed(0))
        # one control early: an interrupted run should have what to compare with
        runs = ["ln_ches", "random-0", "ches", "alpha_ches"]
        runs += [f"random-{seed}" for seed in range(1, args.random_seeds)] + ["all", *LENGTH_FILTERS]
        for name in runs:
            self.stage(f"filter-{name}", short, lambda name=name: self.filtered(name))
        for seed in range(1, args.mixed_seeds):
            self.stage(f"mixed-{seed}", mixed, lambda seed=seed: self.mixed(seed))

    def stage(self, name: str, settings: dict[str, Any], compute: Callable[[], Any]) -> None:
        """What `compute` gives, from the work folder if it was made with these settings."""
        path, settings = self.args.work / f"{name}.json", self.settings | settings
        if path.exists() and (kept := json.loads(path.read_text(encoding="utf-8")))["settings"] == settings:
            self.finished[name], self.seconds[name] = kept["result"], kept["seconds"]
        elif self.args.report:
            self.missing.append(name)
        else:
            start = time.monotonic()
            result = compute()
            seconds = round(time.monotonic() - start, 1)
            path.write_text(json.dumps({"settings": settings, "seconds": seconds, "result": result}), encoding="utf-8")
            self.finished[name], self.seconds[name] = result, seconds
            print(f"{time.strftime('%H:%M:%S')} {name}: {seconds:.0f} s", flush=True)

    def split(self) -> dict[str, Any]:
        """Write the three disjoint sets; how many pairs they were taken from, and how long each of the pool is."""
        from ches.pairs import pair_of
        from ches.tokens import PairRenderer
        from less.data.records import RowProblem, open_source
        from less.data.rendering import RenderConfig
        from less.models import load_tokenizer

        renderer = PairRenderer(load_tokenizer(self.args.model), RenderConfig(max_length=10**6))
        short, lengths, prompts = [], [], set()
        for record in open_source(self.args.data).iter_records():
            try:
                tokens = renderer.render_record(record)
            except RowProblem:
                continue
            longer = max(len(tokens.chosen.input_ids), len(tokens.rejected.input_ids))
            prompt = tuple(tokens.prompt_ids)
            if len(prompt) + longer <= self.args.max_tokens and prompt not in prompts:
                prompts.add(prompt)
                pair = pair_of(record.columns or {})
                short.append({"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected})
                lengths.append(len(prompt) + longer)
        asked = {"sft": self.args.sft, "pool": self.args.pool, "held_out": self.args.held_out}
        if len(short) < sum(asked.values()):
            raise SystemExit(
                f"only {len(short)} pairs have at most {self.args.max_tokens} tokens and a prompt of their own, "
                f"expected {sum(asked.values())}; raise --max-tokens or lower --sft, --pool or --held-out"
            )
        rows = iter(short)
        for name, count in asked.items():
            lines = "".join(json.dumps(row) + "\n" for row in islice(rows, count))
            (self.args.work / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        start = self.args.sft
        return {"num_short": len(short), "pool_tokens": lengths[start : start + self.args.pool]}

    def fine_tune(self) -> dict[str, Any]:
        """One epoch on the chosen replies, loss on the reply alone; saves the start model."""
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in read(self.args.work / "sft.jsonl")]
        model, tokenizer = load(self.args.model)
        config = SFTConfig(
            **self.trainer_settings("sft"), learning_rate=self.args.sft_learning_rate, num_train_epochs=1, seed=0,
            completion_only_loss=True,
        )  # fmt: skip
        trainer = SFTTrainer(
            model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )
        trainer.train()
        trainer.save_model(self.start)
        tokenizer.save_pretrained(self.start)
        return {"loss": losses(trainer)}

    def score(self) -> dict[str, Any]:
        """The pool with all measures, the held-out pairs with log p; writes both, and returns no text of them."""
        from ches import score_pairs
        from ches.scored import MEASURES

        work = self.args.work
        for name, measures in (("pool", tuple(MEASURES)), ("held_out", ("logp",))):
            scores = score_pairs(
                model=self.start, data=work / f"{name}.jsonl", output=work / f"{name}_scored.jsonl", measures=measures,
                dtype="float32", device="cpu", progress=False, strict=True,
            )  # fmt: skip
            assert scores.num_scored == scores.num_rows
        return {name: columns_of(read(work / f"{name}_scored.jsonl")) for name in ("pool", "held_out")}

    def mixed(self, seed: int) -> dict[str, Any]:
        """DPO on random pairs of the pool; log p of these pairs afterwards."""
        generator = np.random.default_rng([seed, 1])
        rows = sorted(generator.choice(self.args.pool, self.args.mixed, replace=False).tolist())
        order = np.concatenate([generator.permutation(rows) for _ in range(self.args.epochs)])
        trainer = self.train(order.tolist())
        return {"rows": rows, **told(trainer), "trained": self.log_probs(trainer, self.pool(rows))}

    def filtered(self, name: str) -> dict[str, Any]:
        """DPO on one subset, its rows taken in turn; log p of the held-out pairs afterwards."""
        rows = self.subset(name)
        order = np.random.default_rng([0, 2]).permutation(rows)
        in_turn = np.resize(order, self.args.steps * self.args.batch_size).tolist()
        trainer = self.train(in_turn)
        held_out = self.log_probs(trainer, read(self.args.work / "held_out.jsonl"))
        return {"rows": rows, "trained": sorted({*in_turn}), **told(trainer), "held_out": held_out}

    def subset(self, name: str) -> list[int]:
        """Rows of the pool that a run of the filtering stage trains on."""
        from ches import filter_pairs

        if name == "all":
            return list(range(self.args.pool))
        scored = self.args.work / "pool_scored.jsonl"
        if name in (*FILTERS, *LENGTH_FILTERS):
            return filter_pairs(scored, measure=name, keep_lowest=self.args.keep).kept.tolist()
        seed = int(name.removeprefix("random-"))
        control = filter_pairs(scored, keep_lowest=self.args.keep, random_control=True, seed=seed).control
        assert control is not None
        return control.tolist()

    def train(self, rows: Sequence[int]) -> Any:
        """A finished `DPOTrainer` that started from the start model and took these rows of the pool, in this order."""
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        class WithReference(DPOTrainer):
            """Takes log p under the reference from the data: the start model has scored these very tokens."""

            def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
                return dataset

        scores, size = self.finished["scores"]["pool"], self.args.batch_size
        num_tokens = self.finished["split"]["pool_tokens"]
        # within one step the order makes no difference but to padding
        steps = (sorted(rows[at : at + size], key=lambda row: num_tokens[row]) for at in range(0, len(rows), size))
        in_order = [row for step in steps for row in step]
        reference = ({f"ref_{side}_logps": scores[f"logp_{side}"][row] for side in SIDES} for row in in_order)
        pairs = [pair | known for pair, known in zip(self.pool(in_order), reference, strict=True)]
        model, tokenizer = load(self.start)
        config = DPOConfig(
            **self.trainer_settings("dpo"), learning_rate=self.args.learning_rate, beta=BETA, num_train_epochs=1,
            precompute_ref_log_probs=True, train_sampling_strategy="sequential", seed=0,
        )  # fmt: skip
        trainer = WithReference(
            model=model, args=config, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer
        )
        trainer.train()
        return trainer

    def trainer_settings(self, folder: str) -> dict[str, Any]:
        """What both trainers are told."""
        args = self.args
        return {
            "output_dir": str(args.work / folder), "per_device_train_batch_size": args.micro_batch,
            "gradient_accumulation_steps": args.batch_size // args.micro_batch, "lr_scheduler_type": "constant",
            "optim": "adamw_torch", "max_length": 1024, "bf16": False, "gradient_checkpointing": False, "use_cpu": True,
            "report_to": "none", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True,
        }  # fmt: skip

    def pool(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """These pairs of the pool, unscored."""
        pairs = read(self.args.work / "pool.jsonl")
        return [pairs[row] for row in rows]

    def log_probs(self, trainer: Any, pairs: list[dict[str, Any]]) -> dict[str, list[float]]:
        """log p of both replies of each pair under the trained weights, by the project's own scorer."""
        from ches import score_pairs

        # a fresh model: the trainer has put its own forward into the one it trained
        model, tokenizer = load(self.start)
        model.load_state_dict(trainer.model.state_dict())
        scores = score_pairs(
            model=model, data=pairs, tokenizer=tokenizer, measures=["logp"], progress=False, strict=True
        )
        return {name: [columns[name] for columns in scores.columns] for name in ("logp_chosen", "logp_rejected")}


def load(folder: str | Path) -> tuple[Any, Any]:
    """A model in float32 and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def columns_of(rows: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Columns of numbers."""
    names = [name for name, value in rows[0].items() if isinstance(value, int | float)]
    return {name: [row[name] for row in rows] for name in names}


def losses(trainer: Any) -> list[float]:
    """Training loss of each step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def told(trainer: Any) -> dict[str, Any]:
    """What a DPO run says of itself."""
    first = next(entry for entry in trainer.state.log_history if "rewards/chosen" in entry)
    apart = max(abs(first[f"rewards/{side}"]) / BETA for side in SIDES)
    return {"loss": losses(trainer), "num_steps": trainer.state.global_step, "logp_apart": apart}


def partial_spearman(x_N: Floats, y_N: Floats, controls_CN: Sequence[Floats]) -> float:
    """Pearson correlation of what is left of the ranks of x and y once the ranks of the controls are regressed out.

    NaN where nothing is left of one of them.
    """
    ranks_N2 = np.column_stack([average_ranks(x_N), average_ranks(y_N)])
    given_NC = np.column_stack([np.ones(len(x_N)), *(average_ranks(control_N) for control_N in controls_CN)])
    left_N2 = ranks_N2 - given_NC @ np.linalg.lstsq(given_NC, ranks_N2, rcond=None)[0]
    norms = np.linalg.norm(left_N2, axis=0)
    if (norms <= 1e-9 * np.linalg.norm(ranks_N2, axis=0)).any():
        return float("nan")
    return float(left_N2[:, 0] @ left_N2[:, 1] / norms.prod())


def with_interval(statistic: Callable[..., float], *columns: Floats, resamples: int) -> dict[str, Any] | None:
    """The statistic and its 95% percentile bootstrap interval over rows; None where it has no value."""
    value = statistic(*columns)
    if not np.isfinite(value):
        return None
    generator = np.random.default_rng(0)
    num_rows = len(columns[0])
    drawn = (generator.integers(num_rows, size=num_rows) for _ in range(resamples))
    values = np.array([statistic(*(column[rows] for column in columns)) for rows in drawn])
    low, high = np.percentile(values[np.isfinite(values)], [2.5, 97.5])
    return {"value": float(value), "low": float(low), "high": float(high)}


def foresight(columns: dict[str, Floats], fall_N: Floats, resamples: int) -> dict[str, Any]:
    """How each measure goes with the fall, raw and with both lengths partialled out."""

    def partial(x_N: Floats, y_N: Floats, chosen_N: Floats, rejected_N: Floats) -> float:
        return partial_spearman(x_N, y_N, [chosen_N, rejected_N])

    lengths = columns["length_chosen"], columns["length_rejected"]
    result = {}
    for name in (*PREDICTORS, *BASELINES):
        x_N = -columns[name[1:]] if name.startswith("-") else columns[name]
        result[name] = {
            "spearman": with_interval(spearman, x_N, fall_N, resamples=resamples),
            "partial": with_interval(partial, x_N, fall_N, *lengths, resamples=resamples),
        }
    return result


def changes(before: dict[str, Any], after: dict[str, list[float]]) -> dict[str, Floats]:
    """Δ log p of both replies."""
    return {side: np.array(after[f"logp_{side}"]) - np.array(before[f"logp_{side}"]) for side in SIDES}


def outcomes(delta: dict[str, Floats], resamples: int) -> dict[str, Any]:
    """Means over pairs, with intervals."""
    chosen_N, rejected_N = delta["chosen"], delta["rejected"]
    of = {
        "chosen": chosen_N,
        "rejected": rejected_N,
        "falls": (chosen_N < 0).astype(float),
        "margin": chosen_N - rejected_N,
        "right": (chosen_N > rejected_N).astype(float),
    }
    return {name: with_interval(np.mean, values, resamples=resamples) for name, values in of.items()}


def rows_of(columns: dict[str, list[float]], rows: Sequence[int]) -> dict[str, Floats]:
    """Some rows of columns of numbers."""
    return {name: np.array(values, dtype=float)[list(rows)] for name, values in columns.items()}


def analyse_mixed(result: dict[str, Any], pool: dict[str, list[float]], resamples: int) -> dict[str, Any]:
    """A mixed run: what changed, and how the measures go with it."""
    columns = rows_of(pool, result["rows"])
    delta = changes(columns, result["trained"])
    names = (*PREDICTORS, "length_difference")
    signed = {name: -columns[name[1:]] if name.startswith("-") else columns[name] for name in names}
    return {
        "num_pairs": len(result["rows"]),
        "num_steps": result["num_steps"],
        "loss": result["loss"],
        "logp_apart": result["logp_apart"],
        "outcomes": outcomes(delta, resamples),
        "fall": foresight(columns, -delta["chosen"], resamples),
        "fall_per_token": foresight(columns, -delta["chosen"] / columns["length_chosen"], resamples),
        "agreement": {one: {other: spearman(signed[one], signed[other]) for other in names} for one in names},
    }


def analyse_filters(study: Study) -> dict[str, Any]:
    """The runs of the filtering stage, and each less the mean of the random ones."""
    resamples = study.args.resamples
    results = {name.removeprefix("filter-"): r for name, r in study.finished.items() if name.startswith("filter-")}
    if not results:
        return {}
    scores = study.finished["scores"]
    before = rows_of(scores["held_out"], range(study.args.held_out))
    delta = {name: changes(before, result["held_out"]) for name, result in results.items()}
    runs = {}
    for name in sorted(results, key=lambda name: name.startswith("random-")):
        result = results[name]
        own = rows_of(scores["pool"], result["trained"])
        runs[name] = {
            "num_pairs": len(result["trained"]),
            "num_steps": result["num_steps"],
            "loss": result["loss"],
            "logp_apart": result["logp_apart"],
            "mean_length_chosen": float(own["length_chosen"].mean()),
            "mean_length_rejected": float(own["length_rejected"].mean()),
            "held_out": outcomes(delta[name], resamples),
        }
    random = [name for name in results if name.startswith("random-")]
    if not random:
        return {"runs": runs}
    mean = mean_of([delta[name] for name in random])
    less = {name: difference(delta[name], mean, resamples) for name in delta if name not in random}
    placebo = {}
    for name in random if len(random) > 1 else []:
        others = mean_of([delta[other] for other in random if other != name])
        placebo[name] = difference(delta[name], others, resamples)
    return {
        "runs": runs,
        "random": {
            "num_runs": len(random),
            "held_out": outcomes(mean, resamples),
            "means": [float(delta[name]["chosen"].mean()) for name in random],
        },
        "less_random": less,
        "less_other_random": placebo,
        "less_length": {
            name: {
                length: difference(delta[name], delta[length], resamples)
                for length in LENGTH_FILTERS
                if length in delta
            }
            for name in FILTERS
            if name in delta
        },
    }


def mean_of(deltas: Sequence[dict[str, Floats]]) -> dict[str, Floats]:
    """The mean of several runs, pair by pair."""
    return {side: np.mean([delta[side] for delta in deltas], axis=0) for side in SIDES}


def difference(one: dict[str, Floats], other: dict[str, Floats], resamples: int) -> dict[str, Any]:
    """One run less another, pair by pair, in the mean."""
    less = {side: one[side] - other[side] for side in SIDES}
    less["margin"] = less["chosen"] - less["rejected"]
    return {name: with_interval(np.mean, values_N, resamples=resamples) for name, values_N in less.items()}


def as_report(study: Study) -> dict[str, Any]:
    """All numbers."""
    import torch

    args, finished = study.args, study.finished
    mixed = {name: r for name, r in finished.items() if name.startswith("mixed-")}
    pool = finished["scores"]["pool"]
    return {
        "what": "Spearman of each measure with the fall of log p(chosen) in DPO; filtering against random subsets",
        "model": args.label or Path(args.model).name,
        "data": args.data.name,
        "settings": {
            name: getattr(args, name)
            for name in (
                "max_tokens", "sft", "pool", "held_out", "mixed", "epochs", "keep", "steps", "batch_size",
                "micro_batch", "sft_learning_rate", "learning_rate", "resamples",
            )
        } | {"beta": BETA},
        "num_short": finished["split"]["num_short"],
        "pool_lengths": {side: float(np.mean(pool[f"length_{side}"])) for side in SIDES},
        "sft_loss": finished["sft"]["loss"],
        "seconds": study.seconds,
        "not_run": study.missing,
        "machine": f"{platform.machine()}, no GPU, threads: {torch.get_num_threads()}, beside other work",
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "gradsift")},
        "mixed": {name: analyse_mixed(result, pool, args.resamples) for name, result in mixed.items()},
        "filtering": analyse_filters(study),
    }  # fmt: skip


def as_markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    s, mixed, filters = report["settings"], report["mixed"], report["filtering"]
    sft_loss = report["sft_loss"]
    quarter = -(-len(sft_loss) // 4)
    versions = ", ".join(f"{name} {v}" for name, v in report["versions"].items())
    lines = [
        f"# Displacement in real DPO runs: {report['model']}",
        "",
        "Asked: does a measure foresee which pairs lose log p(chosen) in DPO, beyond what the lengths of the replies "
        "tell? And does training on the pairs of lowest measure keep log p(chosen) higher than training on random ones "
        "does?",
        "",
        f"{report['data']}: of its {report['num_short']} pairs of at most {s['max_tokens']} tokens with a prompt of "
        f"their own, in the file's order, {s['sft']} for SFT on the chosen replies (one epoch, learning rate "
        f"{s['sft_learning_rate']}; mean loss of its first quarter {np.mean(sft_loss[:quarter]):.2f}, of its last "
        f"{np.mean(sft_loss[-quarter:]):.2f}), "
        f"{s['pool']} for the pool, {s['held_out']} held out. Every DPO run starts from the SFT model: TRL's "
        f"`DPOTrainer`, full fine-tuning in float32, AdamW, constant learning rate {s['learning_rate']}, beta "
        f"{s['beta']}, {s['batch_size']} pairs a step. Δ is log p after less log p before, in nats, summed over a "
        f"reply's tokens. Replies of the pool have {report['pool_lengths']['chosen']:.0f} (chosen) and "
        f"{report['pool_lengths']['rejected']:.0f} (rejected) tokens in the mean. In brackets: 95% percentile "
        f"bootstrap intervals over pairs, {s['resamples']} resamples; they hold for these runs, and do not cover "
        "another draw of the training pairs. What counts as reproduced was fixed beforehand: see the top of "
        "`evidence_displacement.py`.",
        "",
        f"{report['machine']}; {versions}. Seconds: "
        + ", ".join(f"{name} {seconds:.0f}" for name, seconds in report["seconds"].items())
        + ".",
    ]
    if report["not_run"]:
        lines += ["", f"Not finished in the time there was: {', '.join(report['not_run'])}."]
    lines += ["", *verdicts(mixed, filters)]
    for name, run in mixed.items():
        lines += ["", *mixed_section(name, run)]
    if filters:
        lines += ["", *filter_section(filters, s)]
    return "\n".join([*lines, "", *LIMITS]) + "\n"


LIMITS = [
    "## What this does not show",
    "",
    "One small model; one data set of short pairs that the model did not write; one learning rate and a few dozen "
    "steps at most. The paper trains models of 1B to 8B parameters for longer, and reports means over subsets, not "
    "correlations over pairs. Log p is all that is measured: no text was generated and judged. An interval that holds "
    "0 says that these runs cannot tell, not that there is nothing; several measures are tested, without a correction "
    "for their number.",
]


def verdicts(mixed: dict[str, Any], filters: dict[str, Any]) -> list[str]:
    """What the numbers say, in sentences."""
    lines = ["## Verdicts", ""]
    if "mixed-0" in mixed:
        lines += foresight_verdicts(mixed)
    if "random" in filters:
        return [*lines, *filter_verdicts(filters)]
    return [*lines, "No random run was finished, so nothing is said of mitigation."]


def foresight_verdicts(mixed: dict[str, Any]) -> list[str]:
    """Which measures foresee the fall."""
    lines = [
        "Reproduced, by the partial correlation with the fall of log p(chosen) in the mixed run of seed 0? (The "
        "paper claims it of CHES, and says that last_hidden and the edit distance are not indicative; alpha_ches is "
        "its Theorem 6 with the coefficients.)",
        "",
    ]
    partial = {
        name: [run["fall"][name]["partial"] for run in mixed.values()] for name in (*PREDICTORS, "length_difference")
    }
    for name in PREDICTORS:
        first, *others = partial[name]
        repeats = f"; in the repeat, which decides nothing, {', '.join(map(cell, others))}" if others else ""
        lines.append(f"- {name}: {verdict(first)}{repeats}")
    always = [name for name in PREDICTORS if all(entry and entry["low"] > 0 for entry in partial[name])]
    return [
        *lines,
        "",
        f"Above 0 in all mixed runs ({len(mixed)}): {', '.join(always) or 'no measure'}. length_difference, which "
        f"knows nothing but the lengths, has {', '.join(map(cell, partial['length_difference']))} by the same "
        "reckoning: the ranks of two lengths do not take out all of their difference, and what goes with it (ches, "
        f"{mixed['mixed-0']['agreement']['ches']['length_difference']:.2f}) cannot be told from it.",
        "",
    ]


def filter_verdicts(filters: dict[str, Any]) -> list[str]:
    """Which filters keep log p(chosen) up, and how far that is to be trusted."""
    random, less_random = filters["random"], filters["less_random"]
    low, high = min(random["means"]), max(random["means"])
    lines = [nothing_to_mitigate(random["held_out"]["chosen"]), ""]
    for name in (measure for measure in FILTERS if measure in less_random):
        own = filters["runs"][name]["held_out"]["chosen"]["value"]
        place = "above all of" if own > high else "below all of" if own < low else "within the range of"
        text = f"- {name}: {mitigation(less_random[name]['chosen'])}. Its mean is {place} the random runs'."
        for length, less in filters["less_length"][name].items():
            better = "" if less["chosen"]["low"] > 0 else ", not shown to be better"
            text += f" Less a filter by {length} alone: {cell(less['chosen'], 3)}{better}."
        lines.append(text)
    placebo = filters["less_other_random"] | {name: less_random[name] for name in ("all",) if name in less_random}
    apart = [name for name, less in placebo.items() if less["chosen"]["low"] > 0 or less["chosen"]["high"] < 0]
    return [
        *lines,
        "",
        f"How far to trust these intervals: of {len(placebo)} runs on random pairs ({', '.join(placebo)}), each less "
        "the mean of the other random ones, these have an interval without 0, though no measure chose their pairs: "
        f"{', '.join(apart) or 'none'}.",
    ]


def mixed_section(name: str, run: dict[str, Any]) -> list[str]:
    """The part of the page about one mixed run."""
    o, seed = run["outcomes"], name.removeprefix("mixed-")
    lines = [
        f"## Which pairs lose: mixed run, seed {seed}",
        "",
        f"{run['num_pairs']} random pairs of the pool, {run['num_steps']} steps. Mean Δ log p(chosen) "
        f"{cell(o['chosen'])}, Δ log p(rejected) {cell(o['rejected'])}; the chosen reply falls in {cell(o['falls'])} "
        f"of the pairs; Δ chosen > Δ rejected in {cell(o['right'])}.",
        "",
        "Spearman with the fall, −Δ log p(chosen): positive where the measure is right. Partial: both lengths "
        "partialled out.",
        "",
        "| measure | fall | fall, partial | fall per token | fall per token, partial |",
        "| --- | --- | --- | --- | --- |",
    ]
    for measure in (*PREDICTORS, *BASELINES):
        cells = [cell(run[of][measure][kind]) for of in ("fall", "fall_per_token") for kind in ("spearman", "partial")]
        lines.append(f"| {measure} | {' | '.join(cells)} |")
    names = list(run["agreement"])
    lines += ["", "Spearman between the measures:", "", f"| | {' | '.join(names)} |", "| --- |" + " --- |" * len(names)]
    for one in names:
        lines.append(f"| {one} | " + " | ".join(f"{run['agreement'][one][other]:.2f}" for other in names) + " |")
    return lines


def filter_section(filters: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """The part of the page about filtering."""
    lines = [
        "## Filtering, at equal steps",
        "",
        f"Each run: {settings['steps']} steps of {settings['batch_size']} pairs, taken in turn from the lowest "
        f"{settings['keep']:.0%} of the pool by the measure, from as many random pairs, or from the whole pool (so "
        "few steps see only a part of it: in effect one more random draw); measured on the same "
        f"{settings['held_out']} held-out pairs. The measures choose replies of other lengths than the random draw "
        "does, so runs on what a filter by length alone keeps stand beside them (-length_chosen: the longest chosen "
        "replies).",
        "",
        "| trained on | pairs | chosen, rejected tokens | Δ log p(chosen) | Δ log p(rejected) | chosen falls | "
        "Δ chosen − Δ rejected | Δ chosen > Δ rejected |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    rows = {name: (run, run["held_out"]) for name, run in filters["runs"].items()}
    for name, (run, o) in rows.items():
        lines.append(
            f"| {name} | {run['num_pairs']} | {run['mean_length_chosen']:.1f}, {run['mean_length_rejected']:.1f} | "
            f"{outcome_cells(o)} |"
        )
    if "random" not in filters:
        return lines
    random = filters["random"]
    lines += [
        f"| mean of {random['num_runs']} random | | | {outcome_cells(random['held_out'])} |",
        "",
        f"The random runs' means of Δ log p(chosen) go from {min(random['means']):+.3f} to {max(random['means']):+.3f}."
        " Less their mean (a random run: less that of the others), pair by pair:",
        "",
        "| trained on | Δ log p(chosen) | Δ log p(rejected) | Δ chosen − Δ rejected |",
        "| --- | --- | --- | --- |",
    ]
    for name, less in (filters["less_random"] | filters["less_other_random"]).items():
        lines.append(f"| {name} | " + " | ".join(cell(less[of], 3) for of in ("chosen", "rejected", "margin")) + " |")
    return lines


def outcome_cells(o: dict[str, Any]) -> str:
    """The outcomes of a run as cells of a table."""
    digits = {"chosen": 3, "rejected": 3, "falls": 2, "margin": 3, "right": 2}
    return " | ".join(cell(o[name], digits[name]) for name in digits)


def nothing_to_mitigate(random: dict[str, float]) -> str:
    """Whether training on random pairs made log p(chosen) fall in the first place."""
    change = f"log p(chosen) of held-out pairs, {cell(random, 3)} in the mean"
    if random["high"] < 0:
        return f"Training on random pairs lowers {change}: there is a displacement to prevent."
    if random["low"] > 0:
        return f"Training on random pairs *raises* {change}: no displacement in the mean that a filter could prevent."
    return f"Training on random pairs neither clearly lowers nor raises {change}: little that a filter could prevent."


def cell(entry: dict[str, float] | None, digits: int = 2) -> str:
    """A value and its interval."""
    if entry is None:
        return "–"
    value, low, high = (f"{round(entry[name], digits) + 0:.{digits}f}" for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def verdict(entry: dict[str, float] | None) -> str:
    """Whether the claim is reproduced, by the definition at the top."""
    if entry is None:
        return "no value"
    if entry["low"] > 0:
        return f"**yes**, {cell(entry)}"
    return f"**no**, {cell(entry)}" + ("; the opposite" if entry["high"] < 0 else "; the interval holds 0")


def mitigation(entry: dict[str, float]) -> str:
    """What the difference to the random runs says."""
    if entry["low"] > 0:
        return f"**mitigates**: log p(chosen) ends higher than after training on random pairs, by {cell(entry, 3)}"
    if entry["high"] < 0:
        return f"**the opposite**: log p(chosen) ends lower than after training on random pairs, by {cell(entry, 3)}"
    return f"**no mitigation shown**: the difference to training on random pairs, {cell(entry, 3)}, may be 0"


if __name__ == "__main__":
    main()
