"""Whether a score foresees what a training step does to the targets' loss, for one step and for many.

    python benchmarks/evidence_first_order.py --store STORE --targets NAME=FILE:MOST ... --work DIR --json FILE

At one checkpoint θ of a finished datastore, with Adam's moments as they were saved, learning rate η, target set V:

    predicted   η ⟨φ(z), ψ̄⟩,  φ(z) = Π Γ(z) from the store,  ψ̄ = mean over v in V of Π g(v)      `--normalize none`
                mean over v of cos(φ(z), ψ(v)): the score of a selection, without unit             `--normalize cosine`
    actual      L(θ) − L(θ'),  L = mean over V of the targets' losses,
                θ' = θ after `torch.optim.AdamW` (weight decay 0, nothing clipped) on the loss of row z

The prediction is LESS's equation (Xia et al. 2024, §2; TracIn, Pruthi et al. 2020). The authors' notebook has a
correlation of 0.74, 0.57 and 0.46 on three tasks with Llama-2-7B. Beside the stored prediction is the exact one,
without Π and in float32, from the gradient that the step was taken with: it shows what the projection costs. Then what
a selection leans on, and one step does not show:

    many steps    k steps on the same row; Adam's moments and θ move on, the prediction stays: k times that of one
    a batch       one step on the mean loss of b rows, predicted as the mean of the rows' own predictions, though Γ is
                  no sum over rows; the exact one is Γ of the batch's own gradient
    in turn       b rows one after the other, a step each, and again from the first; the sum over the steps

Every rule of the store is judged by its own prediction of the same AdamW steps. Reported: Pearson and Spearman of
predicted and actual over rows or batches, for each set of targets and as the mean over the sets, and for inner
products of `adam`, `adam-less` and `adam-no-momentum` the slope of actual over predicted through the origin, 1 where
the prediction is right in size. Intervals are 95%, percentile bootstrap over rows or batches; targets are as they are.

What decides: a score **foresees** an outcome if the interval of its mean Pearson lies above 0; it is **better or worse
than** `adam`'s inner products if the interval of the difference, over the same resamples, leaves 0 out. Intervals are
not corrected for the number of scores.

Everything runs in float32 whatever the store's dtype, since the drops are small, and every trial begins at the
checkpoint again. A finished trial is a file in DIR and is not done again; more rows, steps or batches may be asked for
later. Model, pool and checkpoints are looked for where the store's build found them.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import agree_on_plan, machine, machine_in_words, write_report
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor

from datastore import Datastore
from datastore.errors import SettingError
from less.adapters import adapted_model
from less.checkpoints import Checkpoint, find_checkpoints
from less.data import BatchBudget, RenderConfig, Renderer, collate, load_targets, open_source, plan_batches
from less.data.rendering import Rendered
from less.features import FeatureSet, FeatureSetConfig
from less.gradients import per_sample_gradients, token_losses
from less.influence import subtask_queries
from less.models import ParamLayout, context_length, load_base_model, load_tokenizer, lora_parameters
from less.moments import AdamState, load_adam_state, optimizer_file, read_optimizer
from less.projection import Projector
from less.provenance import check_checkpoints, check_model, check_template, recorded_projector
from less.scan import influence_scores
from less.statistics import Interval, bootstrap, pearson, spearman

NORMALIZES = ("none", "cosine")
REFERENCE = ("adam", "none")
IN_UNITS = ("adam", "adam-less", "adam-no-momentum")
"""Rules whose Γ is a step of Adam's size, so that η times it predicts a drop in nats."""
USUAL_RATE = 2e-5
MOST_STEP_ERROR = 0.01
"""Of ‖Γ‖; what is left of a step after it was added to a float32 weight and taken off again is not exact."""
SMOKE = {"rows": 6, "rows_long": 4, "steps": [1, 3], "batch_rows": [3], "batches": 4, "turns": 4, "resamples": 50}


def main() -> None:
    """Run the trials that are missing and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--checkpoint", help="its name in the store; the first by default")
    parser.add_argument("--targets", nargs="+", required=True, metavar="NAME=FILE[:MOST]", help="evenly spaced if more")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path, help="where to write the result; a page and a picture go beside it")
    parser.add_argument("--label", help="what to call the model on the page; the folder's name by default")
    parser.add_argument("--model", help="where it is not where the build found it; likewise --run and --pool")
    parser.add_argument("--run", nargs="+", help="the store's checkpoints, all of them")
    parser.add_argument("--pool", type=Path)
    parser.add_argument("--learning-rate", type=float, help="η; that of the run's next step, or 2e-5 if none is kept")
    parser.add_argument("--rows", type=int, default=100, help="rows of which each is stepped on once")
    parser.add_argument("--rows-long", type=int, default=24, help="those of them that are stepped on more often")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 5, 20, 100])
    parser.add_argument("--batch-rows", type=int, nargs="*", default=[8, 32])
    parser.add_argument("--batches", type=int, default=24, help="of each size")
    parser.add_argument("--turns", type=int, default=20, help="steps of a trial that takes its rows in turn")
    parser.add_argument("--seed", type=int, default=0, help="draws rows and batches")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--smoke", action="store_true", help="a handful of trials, to see that the script works")
    if parser.parse_known_args()[0].smoke:
        parser.set_defaults(**SMOKE)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    report = judge(gather(args), args)
    write_report(report, as_markdown(report, args.json and args.json.with_suffix(".png").name), args.json)
    if args.json:
        draw(report, args.json.with_suffix(".png"))


# ---- the store, its model and the targets


@dataclass(frozen=True)
class Case:
    """A finished store with the model and the checkpoints that it was built with."""

    store: Datastore
    model: Any
    """The base, float32, on the CPU."""
    renderer: Renderer
    checkpoints: list[Checkpoint]
    """Under the store's names and weights."""

    @classmethod
    def open(cls, folder: Path, model: str | None = None, run: Sequence[str] | None = None) -> "Case":
        """Load what the store names, and hold it to the store.

        Raises:
            ProvenanceError: the model, tokenizer or checkpoints are others.
        """
        store = Datastore.open(folder)
        where = store.environment
        weights = [store.settings["checkpoints"][name]["weight"] for name in store.checkpoints]
        found = find_checkpoints(run or where["checkpoints"], weights)
        check_checkpoints(store, found)
        base = load_base_model(model or where["model"], dtype="float32", device="cpu").eval()
        check_model(store, base)
        renderer = Renderer(
            load_tokenizer(model or where["tokenizer"]),
            RenderConfig(**where["rendering"]),
            context_length=context_length(base.config),
        )
        check_template(store, renderer)
        named = [replace(own, name=name) for own, name in zip(found, store.checkpoints, strict=True)]
        return cls(store, base, renderer, named)

    @property
    def rules(self) -> dict[str, str]:
        """Update rule of each feature set that has one."""
        sets = self.store.settings["feature_sets"]
        return {name: sets[name]["update_rule"] for name in self.store.feature_sets if "update_rule" in sets[name]}

    def projectors(self, layout: ParamLayout) -> dict[str, Projector]:
        """Π of each feature set."""
        return {name: recorded_projector(self.store, name, layout) for name in self.rules}

    def rendered(self, positions: Sequence[int], pool: Path | None = None) -> dict[int, Rendered]:
        """Tokens of the store's rows at these positions, read from the pool again."""
        table, (entry, *others) = self.store.rows(verify=False), self.store.sources
        if others:
            raise SettingError(f"{self.store.path} has {1 + len(others)} sources; this script reads a pool of one")
        source = open_source(pool or entry.location)
        if source.sha256 != entry.sha256:
            raise SettingError(f"{pool or entry.location} is not the pool of {self.store.path}; give it with --pool")
        numbers = {int(table.rows_N[n]): n for n in positions}
        records = source.take(sorted(numbers))
        return {numbers[record.number]: self.renderer.render_record(record) for record in records}


@dataclass(frozen=True)
class Targets:
    """The M targets, whole ones only; the three run in parallel."""

    rendered: list[Rendered]
    sets: list[str]
    """The set of each."""
    ids: list[str]
    """Its label."""

    @classmethod
    def load(cls, wanted: Sequence[str], renderer: Renderer) -> "Targets":
        """From NAME=FILE, or NAME=FILE:MOST for so many, evenly spaced, of those that fit into the model's context."""
        found = cls([], [], [])
        for entry in wanted:
            name, _, rest = entry.partition("=")
            file, _, most = rest.rpartition(":") if rest.rpartition(":")[2].isdigit() else (rest, "", "")
            if not name or not file:
                raise SettingError(
                    f"--targets {entry}: expected NAME=FILE or NAME=FILE:MOST, as in gsm8k=gsm8k.jsonl:8"
                )
            own = load_targets(Path(file), renderer, name=name)
            whole = [n for n, row in enumerate(own.rendered) if not row.truncated]
            count = min(int(most or len(whole)), len(whole))
            for n in (whole[i * len(whole) // count] for i in range(count)):
                found.rendered.append(own.rendered[n])
                found.sets.append(name)
                found.ids.append(own.ids[n])
        return found

    @property
    def names(self) -> list[str]:
        """The sets, each once."""
        return list(dict.fromkeys(self.sets))

    @property
    def set_M(self) -> list[int]:
        """Number of each target's set."""
        return [self.names.index(name) for name in self.sets]

    def gradients(self, model: PeftModel) -> dict[str, Tensor]:
        """Plain gradient of every target, by parameter: (M, p) float32 each. All M times P at once."""
        kept: dict[str, Tensor] = {}
        for rows in plan_batches([row.num_tokens for row in self.rendered], BatchBudget.on(model.device)):

            def keep(name: str, grads_Bp: Tensor, rows: list[int] = rows) -> None:
                kept.setdefault(name, torch.empty(len(self.rendered), grads_Bp.shape[1]))[rows] = grads_Bp

            per_sample_gradients(model, collate(self.rendered, rows), keep)
        return kept

    def losses(self, model: PeftModel) -> NDArray[np.float64]:
        """Loss of every target, (M,), each summed in float32."""
        losses_M = np.empty(len(self.rendered))
        with torch.no_grad():
            for rows in plan_batches([row.num_tokens for row in self.rendered], BatchBudget.on(model.device)):
                losses_M[rows] = token_losses(model, collate(self.rendered, rows), None).double().numpy()
        return losses_M

    def means(self, values_M: NDArray[np.float64]) -> dict[str, float]:
        """Mean over each set."""
        set_M = np.array(self.set_M)
        return {name: float(values_M[set_M == j].mean()) for j, name in enumerate(self.names)}


def projected(gradients: Mapping[str, Tensor], projector: Projector) -> Tensor:
    """ψ of every target, (M, K) float32, from their gradients by parameter."""
    psi_MK = torch.zeros(len(next(iter(gradients.values()))), projector.dim)
    for name in projector.layout.names:
        projector.project_add_(psi_MK, gradients[name], name)
    return psi_MK


# ---- trials


@dataclass(frozen=True)
class Trial:
    """Some optimizer steps from the checkpoint, and after which of them the targets' loss is measured."""

    name: str
    kind: str
    """`row`, `batch of B` or `B in turn`."""
    steps: list[list[int]]
    """Positions of the rows of each step."""
    measured: list[int]
    """Numbers of steps, rising."""

    def predicted(self, scores_NJ: NDArray[np.float64], num_steps: int) -> NDArray[np.float64]:
        """Sum over the first steps of the mean over a step's rows of their scores: (J,)."""
        return sum((scores_NJ[rows].mean(axis=0) for rows in self.steps[:num_steps]), np.zeros(scores_NJ.shape[1]))


def trials_of(args: argparse.Namespace, num_rows: int) -> list[Trial]:
    """All trials. A smaller plan with the same seed is part of a larger one."""
    if num_rows < max([args.rows, *args.batch_rows]):
        raise SettingError(f"the store has {num_rows} rows; ask for fewer --rows and smaller --batch-rows")
    order = np.random.default_rng(args.seed).permutation(num_rows)[: args.rows].tolist()
    found = []
    for place, row in enumerate(order):
        steps = sorted(args.steps) if place < args.rows_long else [1]
        found.append(Trial(f"row-{row:06d}", "row", [[row]] * max(steps), steps))
    for size in args.batch_rows:
        for number in range(args.batches):
            draw = np.random.default_rng([args.seed, size, number])
            rows = draw.choice(num_rows, size, replace=False).tolist()
            found.append(Trial(f"batch-{size:03d}-{number:03d}", f"batch of {size}", [rows], [1]))
            turns = [[rows[k % size]] for k in range(args.turns)]
            found.append(Trial(f"turns-{size:03d}-{number:03d}", f"{size} in turn", turns, [args.turns]))
    return found


@dataclass(frozen=True)
class Exact:
    """Predictions without a projection: Γ of a step's own gradient against the mean gradients of the targets."""

    rules: dict[str, FeatureSet]
    """By update rule."""
    queries: dict[str, Tensor]
    """By parameter (2 J, p): mean gradients of the J sets, then the means of their unit gradients."""

    @classmethod
    def of(cls, rules: dict[str, FeatureSet], gradients: Mapping[str, Tensor], targets: Targets) -> "Exact":
        """Means of the targets' gradients."""
        squares_M = torch.stack([block_Mp.square().sum(dim=1) for block_Mp in gradients.values()]).sum(dim=0)
        set_M, sizes_J = torch.tensor(targets.set_M), torch.bincount(torch.tensor(targets.set_M))
        shares_JM = torch.nn.functional.one_hot(set_M).T / sizes_J[:, None]
        weights_2JM = torch.cat([shares_JM, shares_JM / squares_M.sqrt()])
        return cls(rules, {name: weights_2JM @ block_Mp for name, block_Mp in gradients.items()})

    def predictions(self, gradient: Mapping[str, Tensor]) -> dict[str, dict[str, list[float]]]:
        """⟨Γ, ḡ⟩ and the mean cosine with each set, by update rule and normalization."""
        found = {}
        for rule, feature_set in self.rules.items():
            products, square = torch.zeros(len(next(iter(self.queries.values())))), torch.zeros(())
            for name, queries in self.queries.items():
                update_P = feature_set.rules[name].apply_(gradient[name].flatten()[None].clone())[0]
                products += queries @ update_P
                square += update_P.square().sum()
            inner, cosine = products.double().chunk(2)
            found[rule] = {"none": inner.tolist(), "cosine": (cosine / square.double().sqrt()).tolist()}
        return found


class Stepper:
    """A LoRA model that takes AdamW steps from a checkpoint, and goes back to it."""

    def __init__(self, model: PeftModel, state: AdamState, learning_rate: float) -> None:
        self.model, self.state, self.learning_rate = model, state, learning_rate
        self.parameters = lora_parameters(model)
        self.start = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def restore(self) -> torch.optim.AdamW:
        """The checkpoint again; returns its optimizer, as it was saved."""
        optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=self.learning_rate, betas=(self.state.beta1, self.state.beta2),
            eps=self.state.eps, weight_decay=0.0,
        )  # fmt: skip
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(True)
            parameter.data.copy_(self.start[name])
            optimizer.state[parameter] = {
                "step": torch.tensor(float(self.state.step)),
                "exp_avg": self.state.m[name].clone(),
                "exp_avg_sq": self.state.v[name].clone(),
            }
        return optimizer

    def gradient(self, rendered: Sequence[Rendered]) -> dict[str, Tensor]:
        """Gradient of the rows' mean loss, by autograd through PEFT's own forward pass."""
        self.model.zero_grad()
        for rows in plan_batches([row.num_tokens for row in rendered], BatchBudget.on(self.model.device)):
            (token_losses(self.model, collate(rendered, rows), None).sum() / len(rendered)).backward()
        return {name: parameter.grad for name, parameter in self.parameters.items() if parameter.grad is not None}

    def run(self, trial: Trial, rendered: Mapping[int, Rendered], targets: Targets, exact: Exact) -> dict[str, Any]:
        """Drops of the sets' losses from the checkpoint after the steps that are measured, and exact predictions."""
        start = time.monotonic()
        optimizer = self.restore()
        found: dict[str, Any] = {"losses": {}, "exact": None}
        for number, rows in enumerate(trial.steps, 1):
            gradient = self.gradient([rendered[n] for n in rows])
            found["exact"] = found["exact"] or exact.predictions(gradient)
            optimizer.step()
            if number in trial.measured:
                found["losses"][str(number)] = targets.means(targets.losses(self.model))
        self.restore()
        return found | {"seconds": round(time.monotonic() - start, 2)}


@dataclass(frozen=True)
class Gathered:
    """What there is to judge."""

    trials: list[Trial]
    outcomes: dict[str, dict[str, Any]]
    """By trial, see `Stepper.run`."""
    start: dict[str, float]
    """Loss of each set at the checkpoint."""
    scores: dict[tuple[str, str], NDArray[np.float64]]
    """By update rule and normalization: (N, J) of the store's rows."""
    description: dict[str, Any]


def gather(args: argparse.Namespace) -> Gathered:
    """Do the trials that are missing; scores of every row of the store at the checkpoint."""
    case = Case.open(args.store, args.model, args.run)
    names = case.store.checkpoints
    if args.checkpoint not in (None, *names):
        raise SettingError(f"the store has no checkpoint {args.checkpoint!r}; it has {', '.join(names)}")
    checkpoint = case.checkpoints[names.index(args.checkpoint or names[0])]
    rate = args.learning_rate or rate_of_the_next_step(checkpoint) or USUAL_RATE
    targets = Targets.load(args.targets, case.renderer)
    trials = trials_of(args, case.store.num_rows)
    plan = {
        "store": case.store.settings["model"]["fingerprint"],
        "rows": case.store.num_rows,
        "checkpoint": checkpoint.adapter_sha256,
        "learning rate": rate,
        "targets": [[name, label] for name, label in zip(targets.sets, targets.ids, strict=True)],
        "seed": args.seed,
    }
    agree_on_plan(args.work, plan)
    with adapted_model(case.model, checkpoint.path) as model:
        layout = ParamLayout.of(model, case.store.settings["model"]["layers"])
        state = load_adam_state(checkpoint.path, model, ParamLayout.of(model))
        gradients = targets.gradients(model)
        projectors = case.projectors(layout)
        kept = {name: gradients[name] for name in layout.names}
        sets = {
            case.rules[name]: FeatureSet.prepare(
                FeatureSetConfig(update_rule=case.rules[name], projection=projector.config), layout, projector, state,
                model.device,
            )
            for name, projector in projectors.items()
        }  # fmt: skip
        scores = {
            (case.rules[name], normalize): stored_scores(case, name, checkpoint, kept, projector, targets, normalize)
            for name, projector in projectors.items()
            for normalize in NORMALIZES
        }
        rendered = case.rendered(sorted({n for trial in trials for rows in trial.steps for n in rows}), args.pool)
        stepper, exact = Stepper(model, state, rate), Exact.of(sets, kept, targets)
        start = targets.means(targets.losses(model))
        check_step(stepper, rendered, exact, trials[0])
        outcomes = finished(args.work / "trials", trials, lambda trial: stepper.run(trial, rendered, targets, exact))
    description = {
        "model": args.label or Path(str(args.model or case.store.environment["model"])).name,
        "store_dtype": case.store.settings["model"]["dtype"],
        "rows_of_the_store": case.store.num_rows,
        "num_params": layout.num_params,
        "proj_dim": {case.rules[name]: projector.dim for name, projector in projectors.items()},
        "checkpoint": checkpoint.name,
        "adam_steps": state.step,
        "learning_rate": rate,
        "targets": {name: targets.sets.count(name) for name in targets.names},
        "loss_at_the_checkpoint": start,
    }
    return Gathered(trials, outcomes, start, scores, description)


def check_step(stepper: Stepper, rendered: Mapping[int, Rendered], exact: Exact, trial: Trial) -> None:
    """Stop unless AdamW's first step is −η times the Γ of `adam` that the predictions are made of."""
    if "adam" not in exact.rules:
        return
    optimizer = stepper.restore()
    gradient = stepper.gradient([rendered[n] for n in trial.steps[0]])
    optimizer.step()
    wrong = whole = 0.0
    for name, rule in exact.rules["adam"].rules.items():
        taken_P = (stepper.start[name] - stepper.parameters[name].detach()).flatten() / stepper.learning_rate
        update_P = rule.apply_(gradient[name].flatten()[None].clone())[0]
        wrong += float((taken_P - update_P).square().sum())
        whole += float(update_P.square().sum())
    stepper.restore()
    if not wrong <= MOST_STEP_ERROR**2 * whole:
        raise SystemExit(f"a step is not Γ: off by {math.sqrt(wrong / whole):.1e} of its norm; nothing is measured")


def finished(
    folder: Path, trials: Sequence[Trial], run: Callable[[Trial], dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Outcome of every trial, by its name, from the folder where it is there with all that is measured."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for number, trial in enumerate(trials, 1):
        file = folder / f"{trial.name}.json"
        outcome = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"losses": {}}
        if not {str(k) for k in trial.measured} <= outcome["losses"].keys():
            outcome = run(trial)
            file.with_suffix(".part").write_text(json.dumps(outcome), encoding="utf-8")
            file.with_suffix(".part").replace(file)
            print(f"{trial.name}: {number} of {len(trials)}, {outcome['seconds']} s", flush=True)
        found[trial.name] = outcome
    return found


def stored_scores(
    case: Case, feature_set: str, checkpoint: Checkpoint, gradients: Mapping[str, Tensor], projector: Projector,
    targets: Targets, normalize: str,
) -> NDArray[np.float64]:  # fmt: skip
    """Scores of all rows for each set at one checkpoint, as a selection has them: (N, J)."""
    queries_JK = subtask_queries(
        projected(gradients, projector), targets.set_M, len(targets.names), aggregate="mean-of-cosines",
        normalize=normalize,
    )  # fmt: skip
    name = checkpoint.name
    found = influence_scores(case.store, feature_set, {name: queries_JK}, {name: 1.0}, normalize=normalize)
    return found.astype(np.float64)


def rate_of_the_next_step(checkpoint: Checkpoint) -> float | None:
    """The learning rate that the run's optimizer would have used next, if it is kept and not 0."""
    file = optimizer_file(checkpoint.path)
    return (file and float(read_optimizer(file)[1][0].get("lr", 0.0))) or None


# ---- judgement


def judge(gathered: Gathered, args: argparse.Namespace) -> dict[str, Any]:
    """Correlations of every way of predicting with every outcome."""
    kinds = [("row", k) for k in sorted(args.steps)]
    kinds += [(f"batch of {size}", 1) for size in args.batch_rows]
    kinds += [(f"{size} in turn", args.turns) for size in args.batch_rows]
    outcomes = []
    for kind, num_steps in kinds:
        trials = [trial for trial in gathered.trials if trial.kind == kind and num_steps in trial.measured]
        if not trials:
            continue
        actual_TJ = np.array([_drops(gathered, trial, num_steps) for trial in trials])
        reference_TJ = None
        if REFERENCE in gathered.scores:
            reference_TJ = np.array([trial.predicted(gathered.scores[REFERENCE], num_steps) for trial in trials])
        ways = {}
        for (rule, normalize), scores_NJ in gathered.scores.items():
            stored_TJ = np.array([trial.predicted(scores_NJ, num_steps) for trial in trials])
            if normalize == "none":
                stored_TJ *= gathered.description["learning_rate"]
            entry = agreement(stored_TJ, actual_TJ, args.resamples)
            entry["by_set"] = {
                name: _both(stored_TJ[:, j], actual_TJ[:, j], args.resamples) for j, name in enumerate(gathered.start)
            }
            if normalize == "none" and rule in IN_UNITS:
                entry["slope"] = as_json(bootstrap(slope, stored_TJ, actual_TJ, num_resamples=args.resamples))
            if reference_TJ is not None and (rule, normalize) != REFERENCE:
                less = bootstrap(gain, stored_TJ, reference_TJ, actual_TJ, num_resamples=args.resamples)
                entry["less_adam"] = as_json(less)
            if num_steps == 1:  # the gradient of the first step is that of the only one
                exact_TJ = np.array([gathered.outcomes[t.name]["exact"][rule][normalize] for t in trials])
                entry["exact"] = agreement(exact_TJ, actual_TJ, args.resamples)
            ways[f"{rule} {normalize}"] = entry
        sizes = np.median(np.abs(actual_TJ), axis=0)
        outcomes.append(
            {
                "kind": kind,
                "steps": num_steps,
                "trials": len(trials),
                "median_drop": dict(zip(gathered.start, np.median(actual_TJ, axis=0).tolist(), strict=True)),
                "median_size": dict(zip(gathered.start, sizes.tolist(), strict=True)),
                "ways": ways,
            }
        )
    return {
        "what": "predicted against actual change of the targets' loss after optimizer steps on rows of the pool",
        "case": gathered.description | {"seed": args.seed, "resamples": args.resamples},
        "machine": machine(),
        "seconds_of_trials": round(sum(outcome["seconds"] for outcome in gathered.outcomes.values())),
        "outcomes": outcomes,
    }


def _drops(gathered: Gathered, trial: Trial, num_steps: int) -> list[float]:
    after = gathered.outcomes[trial.name]["losses"][str(num_steps)]
    return [gathered.start[name] - after[name] for name in gathered.start]


def agreement(predicted_TJ: NDArray[np.float64], actual_TJ: NDArray[np.float64], resamples: int) -> dict[str, Any]:
    """Mean over the sets of both correlations, with intervals over the trials."""
    return {
        name: as_json(bootstrap(partial(mean_over_sets, of), predicted_TJ, actual_TJ, num_resamples=resamples))
        for name, of in (("pearson", pearson), ("spearman", spearman))
    }


def _both(predicted_T: NDArray[np.float64], actual_T: NDArray[np.float64], resamples: int) -> dict[str, Any]:
    return {
        name: as_json(bootstrap(of, predicted_T, actual_T, num_resamples=resamples))
        for name, of in (("pearson", pearson), ("spearman", spearman))
    }


def mean_over_sets(
    correlation: Callable[..., float], predicted_TJ: NDArray[np.float64], actual_TJ: NDArray[np.float64]
) -> float:
    """Mean over columns of their correlation."""
    return float(np.mean([correlation(p_T, a_T) for p_T, a_T in zip(predicted_TJ.T, actual_TJ.T, strict=True)]))


def gain(own_TJ: NDArray[np.float64], other_TJ: NDArray[np.float64], actual_TJ: NDArray[np.float64]) -> float:
    """How much higher the mean Pearson of a prediction is than another's."""
    return mean_over_sets(pearson, own_TJ, actual_TJ) - mean_over_sets(pearson, other_TJ, actual_TJ)


def slope(predicted_TJ: NDArray[np.float64], actual_TJ: NDArray[np.float64]) -> float:
    """Least squares through the origin, of actual on predicted, all sets together."""
    square = float(np.square(predicted_TJ).sum())
    return float((predicted_TJ * actual_TJ).sum()) / square if square > 0 else math.nan


def as_json(interval: Interval) -> dict[str, float | None]:
    """Its three numbers, rounded; None for NaN, which JSON has not."""
    values = {"value": interval.value, "low": interval.low, "high": interval.high}
    return {name: round(value, 4) if math.isfinite(value) else None for name, value in values.items()}


# ---- the page


def in_words(entry: Mapping[str, float | None] | None, digits: int = 2) -> str:
    """A number and its interval, for a table."""
    if entry is None or entry["value"] is None:
        return ""
    if entry["low"] is None:
        text = f"{entry['value']:.{digits}f}"
    else:
        text = f"{entry['value']:.{digits}f} [{entry['low']:.{digits}f}, {entry['high']:.{digits}f}]"
    return text.replace("-", "−")


def title(outcome: Mapping[str, Any]) -> str:
    """What an outcome is, in a few words."""
    kind, steps = outcome["kind"], outcome["steps"]
    if kind == "row":
        return "1 step" if steps == 1 else f"{steps} steps"
    return kind if kind.startswith("batch") else f"{kind}, {steps} steps"


def as_markdown(report: Mapping[str, Any], picture: str | None) -> str:
    """The report as a page."""
    case, outcomes = report["case"], report["outcomes"]
    sets = list(case["targets"])
    widths = sorted(set(case["proj_dim"].values()))
    counts = ", ".join(f"{name} {count} (loss {case['loss_at_the_checkpoint'][name]:.2f})"
                       for name, count in case["targets"].items())  # fmt: skip
    lines = [
        f"# First order on {case['model']}", "",
        f"{case['checkpoint']} of a store of {case['rows_of_the_store']:,} rows (K = "
        f"{', '.join(f'{width:,}' for width in widths)}; P = {case['num_params']:,}; built in {case['store_dtype']}), "
        f"{case['adam_steps']} steps into its run; AdamW from its moments with learning rate "
        f"{case['learning_rate']:.2g}, float32. Targets and their loss there: {counts}. Correlations of predicted and "
        f"actual drop of a set's loss, over rows or batches; intervals are 95%, from {case['resamples']} resamples of "
        "these. " + machine_in_words(report["machine"]), "",
    ]  # fmt: skip
    if picture:
        lines += [f"![Correlation of predicted and actual drop]({picture})", ""]
    for outcome in outcomes:
        if outcome["steps"] != 1:
            continue
        what = "One step on a row" if outcome["kind"] == "row" else f"One step on a {outcome['kind']}"
        own = ", ".join(f"{name} {outcome['median_drop'][name]:.1e}" for name in sets).replace("-", "−")
        lines += [
            f"## {what}", "",
            f"{outcome['trials']} of them; median drop in nats: {own}. Pearson for each set, then the mean over the "
            "sets, from the store and exact (without a projection); Spearman from the store; the difference of the mean"
            " Pearson from that of `adam`'s inner products; slope of actual over predicted.", "",
            "| rule | score | " + " | ".join(sets) + " | mean | mean, exact | Spearman | less `adam` | slope |",
            "| --- | --- | " + " | ".join("---" for _ in sets) + " | --- | --- | --- | --- | --- |",
        ]  # fmt: skip
        for way, entry in outcome["ways"].items():
            cells = [in_words(entry["by_set"][name]["pearson"]) for name in sets]
            cells += [in_words(entry["pearson"]), in_words(entry["exact"]["pearson"]), in_words(entry["spearman"])]
            cells += [in_words(entry.get("less_adam"), 3), in_words(entry.get("slope"))]
            lines.append(f"| {_way_in_words(way)} | " + " | ".join(cells) + " |")
        lines.append("")
    for measure in ("Pearson", "Spearman"):
        lines += [
            f"## Steps and batches: {measure}", "",
            "Mean over the sets, from the store. Trials: "
            + "; ".join(f"{title(outcome)}: {outcome['trials']}" for outcome in outcomes) + ".", "",
            "| rule | score | " + " | ".join(title(outcome) for outcome in outcomes) + " |",
            "| --- | --- | " + " | ".join("---" for _ in outcomes) + " |",
        ]  # fmt: skip
        for way in outcomes[0]["ways"]:
            cells = [in_words(outcome["ways"][way][measure.lower()]) for outcome in outcomes]
            lines.append(f"| {_way_in_words(way)} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += ["## In short", "", *(f"- {sentence}" for sentence in verdicts(outcomes)), ""]
    return "\n".join(lines)


def verdicts(outcomes: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each outcome: what foresees it, and what is better or worse than inner products with `adam`."""
    found = []
    for outcome in outcomes:
        ways = outcome["ways"]
        blind = [_named(way) for way, own in ways.items() if not (own["pearson"]["low"] or -1) > 0]
        better = [_named(way) for way, own in ways.items() if (own.get("less_adam", {}).get("low") or -1) > 0]
        worse = [_named(way) for way, own in ways.items() if (own.get("less_adam", {}).get("high") or 1) < 0]
        text = f"{title(outcome)}: " + (f"not foreseen by {', '.join(blind)}" if blind else "every score foresees it")
        text += f"; better than `adam`'s inner products: {', '.join(better) or 'none'}"
        found.append(f"{text}; worse: {', '.join(worse) or 'none'}.")
    return found


def _named(way: str) -> str:
    rule, normalize = way.split()
    return f"`{rule}` {'inner' if normalize == 'none' else 'cosine'}"


def _way_in_words(way: str) -> str:
    rule, normalize = way.split()
    return f"`{rule}` | {'inner product' if normalize == 'none' else 'cosine'}"


COLOURS = {
    "adam": "#0072B2", "adam-less": "#D55E00", "adam-no-momentum": "#009E73", "sgd": "#CC79A7", "sign": "#000000",
}  # fmt: skip


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Mean Pearson of every rule at every outcome, with intervals; inner products above, cosines below."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    outcomes = report["outcomes"]
    rules = list(dict.fromkeys(way.split()[0] for way in outcomes[0]["ways"]))
    figure, axes = plt.subplots(2, 1, figsize=(8, 7.5), sharex=True, sharey=True, dpi=100)
    for axis, (normalize, name) in zip(axes, (("none", "inner products"), ("cosine", "cosines")), strict=True):
        for number, rule in enumerate(rules):
            own = [outcome["ways"][f"{rule} {normalize}"]["pearson"] for outcome in outcomes]
            shown = [(n, entry) for n, entry in enumerate(own) if entry["value"] is not None]
            x = [n + 0.12 * (number - (len(rules) - 1) / 2) for n, _ in shown]
            y = [entry["value"] for _, entry in shown]
            spans = [[entry[key] if entry[key] is not None else entry["value"] for key in ("low", "high")]
                     for _, entry in shown]  # fmt: skip
            axis.plot(x, y, "o", color=COLOURS.get(rule, "#777777"), label=rule, markersize=5)
            axis.vlines(x, *zip(*spans, strict=True), color=COLOURS.get(rule, "#777777"), linewidth=1.5, alpha=0.6)
        axis.axhline(0, color="#999999", linewidth=0.8)
        axis.set_ylabel(f"Pearson, {name}")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.25)
    axes[0].legend(frameon=False, ncols=len(rules), loc="lower center", bbox_to_anchor=(0.5, 1), fontsize=9)
    labels = [title(outcome).replace(", ", ",\n").replace(" of ", "\nof ") for outcome in outcomes]
    axes[1].set_xticks(range(len(outcomes)), labels)
    axes[1].set_xlabel("what was trained on from the checkpoint; bars: 95% intervals over rows or batches")
    figure.tight_layout()
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    main()
