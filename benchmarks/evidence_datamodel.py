"""The linear datamodeling score: does a sum of scores foresee what a model trained on some of the rows is good at?

    python benchmarks/evidence_datamodel.py --model M --pool POOL --targets NAME=FILE:MOST ... --work DIR --json FILE

Ilyas et al. (2022); the measure is Park et al.'s (TRAK, 2023, §2). S random halves of a pool of N rows are drawn, and a
LoRA adapter is trained on each. For a target v and a score with one number for each row:

    predicted_s   Σ_{z in half s} score(z, v)
    actual_s      −ℓ(v; θ_s), the target's loss under the model trained on half s, negated
    LDS(v)        Spearman's correlation of predicted_s and actual_s over the S halves;  LDS = mean over targets

Scores are those of a store over the checkpoints of a warm-up, Σ_c w_c ⟨φ_c(z), ψ_c(v)⟩ and Σ_c w_c cos(φ_c(z), ψ_c(v)),
each target a subtask of its own, for every update rule. Beside them: random numbers (chance is 0), the rows' supervised
tokens, and ‖g‖, which know nothing of the target.

Protocol, fixed before any run: the pool is the first `--rows` rows of POOL of at most `--max-tokens` tokens, all
scored; the warm-up trains on a random half of them, with the same rank, batches, epochs and peak rate as the halves'
models. These are trained from the base with an untrained adapter, as one trains on what was selected, not from the
warm-up: AdamW, linear decay to 0, gradients clipped to norm 1, no dropout, the mean over a batch's rows of each row's
mean loss, as many steps for all. Every model has its own random start and order, and each half is trained on with
two or more seeds.

The ceiling is the noise of training. With r the mean over targets of Spearman's correlation of one seed's losses with
another's over the halves, the mean of n seeds would agree with that of n others by Spearman–Brown: R = n r / (1 + (n −
1) r). A perfect score would reach about √R. What a score is compared with is the mean over the seeds.

What decides: a score **foresees** what training does if the 95% interval of its LDS over halves lies above 0, and is
**better or worse than** `adam`'s inner products if the interval of the difference, over the same resamples of halves,
leaves 0 out. Percentile bootstrap, not corrected for the number of scores; the interval over targets, with the halves
as they are, is shown beside it and decides nothing.

A model is a file in DIR and is not trained again; more halves or seeds may be asked for later.
"""

import argparse
import itertools
import json
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evidence_first_order import NORMALIZES, Case, Targets, as_json, in_words, projected
from harness import agree_on_plan, machine, machine_in_words, write_report
from numpy.typing import NDArray
from peft import LoraConfig

from datastore import Datastore
from less import build_datastore, warmup
from less.adam import UPDATE_RULES
from less.adapters import adapted_model, load_adapter_weights, lora_model
from less.checkpoints import EvidenceWarning
from less.data import BatchBudget, RenderConfig, Renderer, RowProblem, collate, open_source, plan_batches
from less.data.rendering import Rendered
from less.gradients import token_losses
from less.influence import subtask_queries
from less.models import ParamLayout, context_length, load_base_model, load_tokenizer
from less.scan import influence_scores
from less.statistics import bootstrap

BASELINES = ("random", "supervised tokens", "gradient norm")
REFERENCE = "adam none"
LORA_ALPHA_PER_RANK = 4
SMOKE = {"rows": 16, "subsets": 4, "epochs": 1, "batch_rows": 4, "lora_rank": 2, "proj_dim": 64, "resamples": 20}

Floats = NDArray[np.float64]


def main() -> None:
    """Train what is missing and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--label", help="what to call the model on the page; the folder's name by default")
    parser.add_argument("--pool", type=Path, required=True)
    parser.add_argument("--targets", nargs="+", required=True, metavar="NAME=FILE[:MOST]", help="evenly spaced if more")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path, help="where to write the result; a page and a picture go beside it")
    parser.add_argument("--rows", type=int, default=160, help="N")
    parser.add_argument("--max-tokens", type=int, default=144, help="of a row")
    parser.add_argument("--subsets", type=int, default=48, help="S")
    parser.add_argument("--seeds", type=int, default=2, help="models of each half")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-rows", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--lora-rank", type=int, default=8)
    parser.add_argument("--proj-dim", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resamples", type=int, default=500)
    parser.add_argument("--smoke", action="store_true", help="a few models, to see that the script works")
    if parser.parse_known_args()[0].smoke:
        parser.set_defaults(**SMOKE)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    report = judge(*gather(args), args)
    write_report(report, as_markdown(report, args.json and args.json.with_suffix(".png").name), args.json)
    if args.json:
        draw(report, args.json.with_suffix(".png"))


# ---- rows, scores and models


def gather(args: argparse.Namespace) -> tuple[dict[str, Floats], Floats, dict[str, Any]]:
    """Scores of the rows, losses of the targets under every model, and what was done.

    Returns:
        by score's name (N, M); losses_ASM of the A seeds; the case.
    """
    pool = args.work / "pool.jsonl"
    base = load_base_model(args.model, dtype="float32", device="cpu").eval()
    renderer = Renderer(load_tokenizer(args.model), RenderConfig(), context_length=context_length(base.config))
    targets = Targets.load(args.targets, renderer)
    rendered, lines = short_rows(args.pool, args.rows, args.max_tokens, renderer)
    plan = {
        name: getattr(args, name)
        for name in ("rows", "max_tokens", "epochs", "batch_rows", "learning_rate", "lora_rank", "proj_dim")
    }
    plan |= {
        "pool": open_source(args.pool).sha256,
        "targets": list(map(list, zip(targets.sets, targets.ids, strict=True))),
    }
    agree_on_plan(args.work, plan)
    if not pool.exists():
        pool.write_text("".join(lines), encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EvidenceWarning)  # few steps are what is studied here
        run = warmup(
            model=args.model, data=pool, output=args.work / "run", fraction=0.5, epochs=args.epochs,
            batch_size=args.batch_rows, learning_rate=args.learning_rate, lora_rank=args.lora_rank,
            lora_alpha=LORA_ALPHA_PER_RANK * args.lora_rank, lora_dropout=0.0, dtype="float32", progress=False,
        )  # fmt: skip
        build_datastore(
            model=args.model, checkpoints=args.work / "run", data=pool, datastore=args.work / "store",
            update_rule=UPDATE_RULES, proj_dim=args.proj_dim, dtype="float32", progress=False,
        )  # fmt: skip
        case = Case.open(args.work / "store")
    if case.store.num_rows != len(rendered):
        raise SystemExit(
            f"{len(rendered) - case.store.num_rows} rows of the pool have no score; the sums would lack them"
        )
    scores = scores_of_rows(case, targets)
    losses, seconds = trained_losses(args, base, rendered, targets)
    return scores, losses, describe(args, rendered, targets, run.num_rows, seconds)


def short_rows(pool: Path, count: int, most: int, renderer: Renderer) -> tuple[list[Rendered], list[str]]:
    """The first rows of the pool that can be used and have few tokens: their tokens, and their lines."""
    rendered, lines = [], []
    for record in open_source(pool).iter_records():
        try:
            row = renderer.render_record(record)
        except RowProblem:
            continue
        if not row.truncated and row.num_tokens <= most:
            rendered.append(row)
            lines.append(json.dumps(record.columns) + "\n")
        if len(rendered) == count:
            return rendered, lines
    raise SystemExit(
        f"{pool} has {len(rendered)} rows of at most {most} tokens, expected {count}; ask for fewer --rows"
    )


def scores_of_rows(case: Case, targets: Targets) -> dict[str, Floats]:
    """Score of every row for every target, by update rule and normalization, and the baselines': (N, M) each."""
    store, num_targets = case.store, len(targets.rendered)
    psi: dict[str, dict[str, torch.Tensor]] = {}
    with adapted_model(case.model, case.checkpoints[0].path) as model:
        layout = ParamLayout.of(model)
        projectors = case.projectors(layout)
        for checkpoint in case.checkpoints:
            load_adapter_weights(model, checkpoint.path)
            gradients = targets.gradients(model)
            psi[checkpoint.name] = {name: projected(gradients, projector) for name, projector in projectors.items()}
    weights = {checkpoint.name: checkpoint.weight for checkpoint in case.checkpoints}
    found = {}
    for (feature_set, rule), normalize in itertools.product(case.rules.items(), NORMALIZES):
        queries = {
            name: subtask_queries(
                own[feature_set], range(num_targets), num_targets, aggregate="mean-of-cosines", normalize=normalize
            )
            for name, own in psi.items()
        }
        scores_NM = influence_scores(store, feature_set, queries, weights, normalize=normalize)
        found[f"{rule} {normalize}"] = scores_NM.astype(np.float64)
    return found | baselines(store, weights, num_targets)


def baselines(store: Datastore, weights: Mapping[str, float], num_targets: int) -> dict[str, Floats]:
    """Numbers that do not look at the target: (N, M) each."""
    feature_set = store.feature_sets[0]
    tokens_N = store.rows().num_supervised_N.astype(np.float64)
    norms_N = sum(w * store.stats(feature_set, name).grad_norms_N.astype(np.float64) for name, w in weights.items())
    columns = {"supervised tokens": tokens_N, "gradient norm": norms_N}
    random_NM = np.random.default_rng(0).normal(size=(store.num_rows, num_targets))
    return {"random": random_NM} | {
        name: np.repeat(column_N[:, None], num_targets, axis=1) for name, column_N in columns.items()
    }


def halves(num_subsets: int, num_rows: int) -> NDArray[np.bool_]:
    """Which rows are in each of the random halves: (S, N). Fewer halves are the first of more."""
    inside_SN = np.zeros((num_subsets, num_rows), bool)
    for s in range(num_subsets):
        inside_SN[s, np.random.default_rng([1, s]).permutation(num_rows)[: num_rows // 2]] = True
    return inside_SN


def trained_losses(
    args: argparse.Namespace, base: Any, rendered: Sequence[Rendered], targets: Targets
) -> tuple[Floats, float]:
    """Loss of every target under the model of every seed and half, (A, S, M), and the seconds that training took."""
    folder = args.work / "models"
    folder.mkdir(exist_ok=True)
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=args.lora_rank, lora_alpha=LORA_ALPHA_PER_RANK * args.lora_rank,
        target_modules="all-linear",
    )  # fmt: skip
    inside_SN = halves(args.subsets, len(rendered))
    losses_ASM = np.empty((args.seeds, args.subsets, len(targets.rendered)))
    seconds = 0.0
    for seed, s in itertools.product(range(args.seeds), range(args.subsets)):
        file = folder / f"seed-{seed}-half-{s:03d}.json"
        if not file.exists():
            start = time.monotonic()
            own = [rendered[n] for n in np.flatnonzero(inside_SN[s])]
            losses_M, last = train(base, lora, own, targets, args, [2, seed, s])
            found = {"losses": losses_M.tolist(), "training_loss": last, "seconds": time.monotonic() - start}
            file.with_suffix(".part").write_text(json.dumps(found), encoding="utf-8")
            file.with_suffix(".part").replace(file)
            print(f"seed {seed}, half {s + 1} of {args.subsets}: {found['seconds']:.1f} s", flush=True)
        kept = json.loads(file.read_text(encoding="utf-8"))
        losses_ASM[seed, s] = kept["losses"]
        seconds += kept["seconds"]
    return losses_ASM, seconds


def train(
    base: Any, lora: LoraConfig, rows: Sequence[Rendered], targets: Targets, args: argparse.Namespace, seed: list[int]
) -> tuple[Floats, float]:
    """Train an adapter from its random start; the targets' losses (M,) and the training loss of the last epoch."""
    draw = np.random.default_rng(seed)
    with torch.random.fork_rng():
        torch.manual_seed(int(draw.integers(2**31)))
        with lora_model(base, lora) as model:
            model.eval()  # there is no dropout; it only keeps the two passes alike
            parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
            optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.0)
            per_epoch = math.ceil(len(rows) / args.batch_rows)
            total = per_epoch * args.epochs
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)
            losses = []
            for _ in range(args.epochs):
                order = draw.permutation(len(rows)).tolist()
                for start in range(0, len(rows), args.batch_rows):
                    batch = order[start : start + args.batch_rows]
                    optimizer.zero_grad()
                    losses.append(0.0)
                    for piece in plan_batches([rows[n].num_tokens for n in batch], BatchBudget.on(model.device)):
                        loss = token_losses(model, collate(rows, [batch[i] for i in piece]), None).sum() / len(batch)
                        loss.backward()
                        losses[-1] += loss.item()
                    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                    optimizer.step()
                    schedule.step()
            return targets.losses(model), float(np.mean(losses[-per_epoch:]))


def describe(
    args: argparse.Namespace, rendered: Sequence[Rendered], targets: Targets, num_warmup_rows: int, seconds: float
) -> dict[str, Any]:
    """What was done, for the report."""
    return {
        "model": args.label or Path(args.model).name,
        "rows": len(rendered),
        "tokens": sum(row.num_tokens for row in rendered),
        "max_tokens": args.max_tokens,
        "targets": {name: targets.sets.count(name) for name in targets.names},
        "set_of_target": targets.sets,
        "subsets": args.subsets,
        "rows_of_a_subset": len(rendered) // 2,
        "seeds": args.seeds,
        "warmup_rows": num_warmup_rows,
        "epochs": args.epochs,
        "batch_rows": args.batch_rows,
        "learning_rate": args.learning_rate,
        "lora_rank": args.lora_rank,
        "proj_dim": args.proj_dim,
        "resamples": args.resamples,
        "seconds_of_training": round(seconds),
    }


# ---- judgement


def correlations(predicted_SM: Floats, actual_SM: Floats) -> Floats:
    """Spearman over the halves, of each target: (M,); as `less.statistics.spearman`, which takes one at a time."""
    p_SM, a_SM = (ranks_SM - ranks_SM.mean(axis=0) for ranks_SM in map(column_ranks, (predicted_SM, actual_SM)))
    with np.errstate(invalid="ignore"):  # a column without an order has no correlation: NaN
        return (p_SM * a_SM).sum(axis=0) / np.sqrt((p_SM**2).sum(axis=0) * (a_SM**2).sum(axis=0))


def column_ranks(values_SM: Floats) -> Floats:
    """Ranks within each column, ties share the mean of theirs. All pairs are compared: for a few halves."""
    below_SM = (values_SM[:, None] > values_SM).sum(axis=1)
    not_above_SM = (values_SM[:, None] >= values_SM).sum(axis=1)
    return (below_SM + not_above_SM + 1) / 2


def lds(predicted_SM: Floats, actual_SM: Floats) -> float:
    """Mean over targets of Spearman over the halves."""
    return float(correlations(predicted_SM, actual_SM).mean())


def gain(own_SM: Floats, other_SM: Floats, actual_SM: Floats) -> float:
    """How much higher one LDS is than another."""
    return lds(own_SM, actual_SM) - lds(other_SM, actual_SM)


def agreement_of_seeds(*losses_ASM: Floats) -> float:
    """r: mean over pairs of seeds and targets of Spearman over the halves; each argument is one seed's (S, M)."""
    return float(np.mean([lds(one, other) for one, other in itertools.combinations(losses_ASM, 2)]))


def spearman_brown(r: float, count: int) -> float:
    """Agreement of the mean of `count` seeds with that of as many others (Spearman 1910, Brown 1910)."""
    return count * r / (1 + (count - 1) * r)


def judge(scores: Mapping[str, Floats], losses_ASM: Floats, case: dict[str, Any], args: argparse.Namespace) -> dict:
    """LDS of every score, and the ceiling."""
    num_seeds, num_subsets, _ = losses_ASM.shape
    inside_SN = halves(num_subsets, case["rows"])
    actual_SM = -losses_ASM.mean(axis=0)
    predicted = {name: inside_SN @ scores_NM for name, scores_NM in scores.items()}
    sets, interval = np.array(case["set_of_target"]), partial(bootstrap, num_resamples=args.resamples)
    results = {}
    for name, predicted_SM in predicted.items():
        found_M = correlations(predicted_SM, actual_SM)
        results[name] = {
            "lds": as_json(interval(lds, predicted_SM, actual_SM)),
            "over_targets": as_json(interval(np.mean, found_M)),
            "by_set": {own: round(float(found_M[sets == own].mean()), 4) for own in case["targets"]},
            "by_target": found_M.round(4).tolist(),
            "one_seed": round(float(np.mean([lds(predicted_SM, -own_SM) for own_SM in losses_ASM])), 4),
            "less_adam": None
            if name == REFERENCE
            else as_json(interval(gain, predicted_SM, predicted[REFERENCE], actual_SM)),
        }
    ceiling = None
    if num_seeds > 1:
        seeds = as_json(interval(agreement_of_seeds, *losses_ASM))
        r = agreement_of_seeds(*losses_ASM)
        pairs = list(itertools.combinations(losses_ASM, 2))
        by_target_M = np.mean([correlations(one, other) for one, other in pairs], axis=0)
        ceiling = {
            "one_with_another": seeds,
            "by_set": {own: round(float(by_target_M[sets == own].mean()), 4) for own in case["targets"]},
            "by_target": by_target_M.round(4).tolist(),
            "mean_with_another_mean": round(spearman_brown(r, num_seeds), 4),
            "perfect_score": round(math.sqrt(max(0.0, spearman_brown(r, num_seeds))), 4),
        }
    spread_M = losses_ASM.mean(axis=0).std(axis=0)
    return {
        "what": "linear datamodeling score: sums of scores against losses after training on random halves",
        "case": case,
        "machine": machine(),
        "mean_loss": {own: round(float(losses_ASM[:, :, sets == own].mean()), 4) for own in case["targets"]},
        "spread_over_halves": {own: round(float(spread_M[sets == own].mean()), 4) for own in case["targets"]},
        "ceiling": ceiling,
        "results": results,
    }


# ---- the page


def as_markdown(report: Mapping[str, Any], picture: str | None) -> str:
    """The report as a page."""
    case, ceiling = report["case"], report["ceiling"]
    sets = list(case["targets"])
    targets = ", ".join(
        f"{name} {count} (loss {report['mean_loss'][name]:.2f}, its standard deviation over halves "
        f"{report['spread_over_halves'][name]:.3f})"
        for name, count in case["targets"].items()
    )
    lines = [
        f"# Linear datamodeling score on {case['model']}", "",
        f"{case['subsets']} random halves of {case['rows']} rows ({case['tokens']:,} tokens, at most "
        f"{case['max_tokens']} each), {case['seeds']} models of each: LoRA rank {case['lora_rank']} from the base, "
        f"{case['epochs']} epochs in batches of {case['batch_rows']}, learning rate {case['learning_rate']:g}; scores "
        f"from the {case['epochs']} checkpoints of a warm-up on {case['warmup_rows']} of the rows, K = "
        f"{case['proj_dim']:,}. Targets: {targets}. Training took {case['seconds_of_training']:,} seconds. "
        + machine_in_words(report["machine"]), "",
    ]  # fmt: skip
    if picture:
        lines += [f"![Linear datamodeling score of every rule]({picture})", ""]
    if ceiling:
        by_set = ", ".join(f"{name} {r:.2f}" for name, r in ceiling["by_set"].items())
        lines += [
            f"**Ceiling.** One seed's losses agree with another's over the halves by r = "
            f"{in_words(ceiling['one_with_another'])} (Spearman, mean over targets; {by_set}). The mean of "
            f"{case['seeds']} seeds, which the scores are held against, would agree with that of {case['seeds']} "
            f"others by {ceiling['mean_with_another_mean']:.2f} (Spearman–Brown), and a perfect score would reach "
            f"about {ceiling['perfect_score']:.2f}.", "",
        ]  # fmt: skip
    lines += [
        "LDS with its 95% interval over halves, then over targets; against one seed alone; by set of targets; and the "
        f"difference from `adam`'s inner products, over halves. {case['resamples']} resamples.", "",
        "| score | LDS | over targets | one seed | " + " | ".join(sets) + " | less `adam` |",
        "| --- | --- | --- | --- | " + " | ".join("---" for _ in sets) + " | --- |",
    ]  # fmt: skip
    for name, own in report["results"].items():
        cells = [in_words(own["lds"]), in_words(own["over_targets"]), f"{own['one_seed']:.2f}"]
        cells += [f"{own['by_set'][one]:.2f}" for one in sets] + [in_words(own["less_adam"], 3)]
        lines.append(f"| {_named(name)} | " + " | ".join(cells).replace("-", "−") + " |")
    lines += ["", "## In short", "", *(f"- {sentence}" for sentence in verdicts(report["results"]))]
    return "\n".join(lines) + "\n"


def verdicts(results: Mapping[str, Any]) -> list[str]:
    """Which scores foresee, and which are better or worse than `adam`'s inner products."""

    def those(key: str, side: str, sign: int, names: Sequence[str]) -> str:
        found = [n for n in names if results[n][key] and sign * (results[n][key][side] or -sign) > 0]
        return ", ".join(map(_named, found)) or "none"

    names = list(results)
    return [
        f"Foresee what training does: {those('lds', 'low', 1, names)}.",
        f"Better than `adam`'s inner products: {those('less_adam', 'low', 1, names)}.",
        f"Worse than `adam`'s inner products: {those('less_adam', 'high', -1, names)}.",
    ]


def _named(name: str) -> str:
    if name in BASELINES:
        return name
    rule, normalize = name.split()
    return f"`{rule}` {'inner product' if normalize == 'none' else 'cosine'}"


def draw(report: Mapping[str, Any], path: Path) -> None:
    """LDS of every score with its interval over halves, beside the ceiling."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    results = report["results"]
    figure, axis = plt.subplots(figsize=(7.5, 5), dpi=100)
    for place, (name, own) in enumerate(reversed(results.items())):
        colour = "#777777" if name in BASELINES else "#0072B2" if name.endswith(" none") else "#D55E00"
        value, low, high = (own["lds"][key] for key in ("value", "low", "high"))
        if value is None:
            continue
        axis.plot(value, place, "o", color=colour)
        if low is not None:
            axis.hlines(place, low, high, color=colour, linewidth=1.5, alpha=0.6)
    axis.axvline(0, color="#999999", linewidth=0.8)
    if report["ceiling"]:
        for key, style, label in (
            ("one_with_another", ":", "one seed with another"),
            ("perfect_score", "--", "a perfect score, about"),
        ):
            found = report["ceiling"][key]
            x = found["value"] if isinstance(found, dict) else found
            axis.axvline(x, color="#009E73", linestyle=style, linewidth=1.2, label=f"{label}: {x:.2f}")
        axis.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    axis.set_yticks(range(len(results)), [_named(name).replace("`", "") for name in reversed(results)])
    axis.set_xlabel("LDS; bars: 95% intervals over halves")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="x", alpha=0.25)
    figure.tight_layout()
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    main()
