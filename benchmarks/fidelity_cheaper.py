"""Cheaper features: what each saving costs in rank, and what it saves.

    python benchmarks/fidelity_cheaper.py gather  --work DIR --model M --run RUN --pool POOL --data FOLDER
    python benchmarks/fidelity_cheaper.py cost    --work DIR --model M --run RUN --pool POOL
    python benchmarks/fidelity_cheaper.py report  --work DIR --json benchmarks/results/NAME.json

Features may be taken of some layers only (`--layers`: the last N blocks, or the layers that a pattern finds), at the
last checkpoint only, or with fewer columns K. Each such way is judged against the exact score: unprojected, every
LoRA layer, every checkpoint, `adam`. For each set of targets, whose score is the highest over its subtasks:

    Spearman    with the exact score
    top 5%      share of the exact top 5% that is in the way's own top 5%               chance: 0.05
    recall(f)   share of the exact top 5% that is among the way's best f of the rows    chance: f
    f95         the smallest f with recall(f) ≥ 0.95
    two stages  cost of the way for every row, then of exact features for its best f95:   cost + f95

and as the first stage of `--prefilter`, at one checkpoint, against the plain build's own top 5%.

Intervals: 95%, percentile bootstrap over the pool's rows; targets and checkpoints are as they are.

`gather` makes one pass over rows and checkpoints. Γ is elementwise and Π linear, so every way is a partial sum over
LoRA parameters of what that pass sees anyway: inner products with each target, and norms, are all that is kept. Rows
are done in ranges, each at every checkpoint before the next, so an interrupted run goes on where it was, and `report`
can be asked at any time. FOLDER holds `target_NAME.jsonl`; rows and targets that do not fit into the model's context
are left out. `cost` times `build_datastore` at the run's last checkpoint, in interleaved rounds and in seconds of
CPU: what else runs on the machine is not the way's cost. A build of one short row is timed too, and taken off: at a
pool's size it is nothing. A checkpoint costs what another does, so one of C costs 1/C; that is measured once.
"""

import argparse
import itertools
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import agree_on_plan, machine, machine_in_words, timed, write_report
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from datastore import Datastore
from less import build_datastore
from less.adapters import adapted_model, load_adapter_weights
from less.checkpoints import find_checkpoints
from less.data import RenderConfig, Renderer, collate, load_targets, open_source
from less.data.batching import BatchBudget, run_in_batches
from less.data.conversations import RowProblem
from less.data.rendering import Rendered
from less.features import FeatureSet, FeatureSetConfig
from less.gradients import per_sample_gradients
from less.models import ParamLayout, choose_layers, context_length, layer_of, load_base_model, load_tokenizer
from less.moments import load_adam_state
from less.projection import ProjectionConfig, Projector, make_projector
from less.statistics import average_ranks

ATTENTION, MLP = "self_attn", "mlp"
RANGE_ROWS = 128
FRACTION = 0.05
WANTED_RECALL = 0.95
CURVE = tuple(round(0.05 * n, 2) for n in range(1, 11))
NUM_RESAMPLES = 500


@dataclass(frozen=True)
class Variant:
    """Features of some layers, in K columns."""

    layers: str
    """As in `BuildConfig.layers`."""
    proj_dim: int | None
    """K; None: unprojected."""

    @property
    def name(self) -> str:
        """How files call it."""
        return f"{self.layers}@{self.proj_dim or 'exact'}"


EXACT = Variant("all", None)


def variants_of(last: Sequence[int], widths: Sequence[int]) -> list[Variant]:
    """Some layers in the widest features, and all layers in every width."""
    layers = [*(f"last:{n}" for n in sorted(last)), ATTENTION, MLP]
    return [Variant(name, max(widths)) for name in layers] + [Variant("all", width) for width in sorted(widths)]


def main() -> None:
    """One stage."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    stages = parser.add_subparsers(required=True)
    for stage, work in (("gather", gather), ("cost", cost), ("report", report)):
        own = stages.add_parser(stage)
        own.set_defaults(work_on=work)
        own.add_argument("--work", type=Path, required=True)
        if stage == "report":
            own.add_argument("--json", type=Path, required=True)
            own.add_argument("--resamples", type=int, default=NUM_RESAMPLES)
            continue
        own.add_argument("--model", required=True)
        own.add_argument("--run", type=Path, required=True)
        own.add_argument("--pool", type=Path, required=True)
        own.add_argument("--rows", type=int, default=800 if stage == "gather" else 16)
        if stage == "cost":
            own.add_argument("--rounds", type=int, default=3)
            continue
        own.add_argument("--label", help="what to call the model on the page; the folder's name by default")
        own.add_argument("--data", type=Path, required=True)
        own.add_argument("--targets", nargs="+", default=["gsm8k:8", "bbh:1", "t0:1"], help="NAME:most of a subtask")
        own.add_argument("--last", type=int, nargs="*", default=[1, 3, 6, 10, 15, 20])
        own.add_argument("--widths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
        own.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    args.work_on(args)


# ---- gather


class FeatureParts:
    """Features of every variant from one pass: sums over the layers that belong to the same variants."""

    def __init__(self, variants: Sequence[Variant], layers: Sequence[str], projectors: dict[int, Projector]) -> None:
        self.variants, self.layers, self.projectors = variants, layers, projectors
        self.part_of: dict[int, dict[str, int]] = {}
        self.members: dict[Variant, list[int]] = {}
        for width in projectors:
            own = {v: choose_layers(layers, v.layers) for v in variants if v.proj_dim == width}
            belongs = {layer: tuple(layer in chosen for chosen in own.values()) for layer in layers}
            kinds = list(dict.fromkeys(belongs.values()))
            self.part_of[width] = {layer: kinds.index(kind) for layer, kind in belongs.items()}
            for n, variant in enumerate(own):
                self.members[variant] = [part for part, kind in enumerate(kinds) if kind[n]]

    def begin(self, num_rows: int) -> None:
        """Nothing added yet, for a batch of B rows."""
        self.sums = {
            width: torch.zeros(max(parts.values()) + 1, num_rows, width) for width, parts in self.part_of.items()
        }

    def add(self, name: str, block_Bp: Tensor) -> None:
        """Project one parameter's block into the part that its layer belongs to."""
        for width, projector in self.projectors.items():
            projector.project_add_(self.sums[width][self.part_of[width][layer_of(name)]], block_Bp, name)

    def features(self, variant: Variant) -> Tensor:
        """(B, K), not normalised."""
        return self.sums[variant.proj_dim][self.members[variant]].sum(0)


def gather(args: argparse.Namespace) -> None:
    """Inner products and norms of every row with every target, for the exact score and for every variant."""
    base = load_base_model(args.model, dtype=args.dtype, device="cpu").eval()
    renderer = Renderer(load_tokenizer(args.model), RenderConfig(), context_length=context_length(base.config))
    rows, rendered = whole_rows(args.pool, args.rows, renderer)
    targets = few_targets(args.data, args.targets, renderer)
    checkpoints = find_checkpoints([args.run])
    variants = variants_of(args.last, args.widths)
    with adapted_model(base, checkpoints[0].path) as model:
        layout = ParamLayout.of(model)
        layers = list(dict.fromkeys(map(layer_of, layout.names)))
        plan = {
            "model": args.label or Path(args.model).name,
            "dtype": args.dtype,
            "pool_rows": args.rows,
            "rows": rows,
            "num_tokens": [row.num_tokens for row in rendered],
            "num_params": layout.num_params,
            "checkpoints": {c.name: [c.adapter_sha256, c.weight] for c in checkpoints},
            "targets": [[name, subtask] for name, subtask, _ in targets],
            "layers": layers,
            "variants": [[v.layers, v.proj_dim] for v in variants],
        }
        agree_on_plan(args.work, plan)
        projectors = {
            width: make_projector(ProjectionConfig(kind="sparse", proj_dim=width), layout) for width in args.widths
        }
        parts = FeatureParts(variants, layers, projectors)
        for span, checkpoint in itertools.product(ranges_of(len(rows)), checkpoints):
            file = args.work / checkpoint.name / f"rows-{span.start:05d}.npz"
            if file.exists():
                continue
            load_adapter_weights(model, checkpoint.path)
            kept = args.work / checkpoint.name / "targets.safetensors"
            if not kept.exists():
                kept.parent.mkdir(exist_ok=True)
                save_file(target_gradients(model, [row for *_, row in targets], parts), kept.with_suffix(".part"))
                kept.with_suffix(".part").replace(kept)
            projector = projectors[max(projectors)]
            adam = FeatureSet.prepare(
                FeatureSetConfig(projection=projector.config), layout, projector,
                load_adam_state(checkpoint.path, model, layout), model.device,
            )  # fmt: skip
            found = row_products(model, [rendered[n] for n in span], adam, load_file(kept), parts)
            with open(file.with_suffix(".part"), "wb") as stream:
                np.savez(stream, **found)
            file.with_suffix(".part").replace(file)
            print(f"{checkpoint.name}: rows {span.start} to {span.stop} of {len(rows)}", flush=True)


def ranges_of(num_rows: int) -> list[range]:
    """What is done and kept at once."""
    return [range(start, min(start + RANGE_ROWS, num_rows)) for start in range(0, num_rows, RANGE_ROWS)]


def whole_rows(pool: Path, num_rows: int, renderer: Renderer) -> tuple[list[int], list[Rendered]]:
    """Those of the pool's first rows that fit into the model's context: their numbers and tokens."""
    rows, rendered = [], []
    for record in open_source(pool).iter_records(0, num_rows):
        try:
            row = renderer.render_record(record)
        except RowProblem:
            continue
        if not row.truncated:
            rows.append(record.number)
            rendered.append(row)
    return rows, rendered


def few_targets(data: Path, wanted: Sequence[str], renderer: Renderer) -> list[tuple[str, str, Rendered]]:
    """(set, subtask, tokens) of the first few targets of each subtask that fit into the model's context."""
    found = []
    for name, most in (entry.split(":") for entry in wanted):
        targets = load_targets(data / f"target_{name}.jsonl", renderer, name=name)
        counts = dict.fromkeys(targets.subtasks, 0)
        for subtask, rendered in zip(targets.subtask_of, targets.rendered, strict=True):
            if not rendered.truncated and counts[subtask] < int(most):
                counts[subtask] += 1
                found.append((name, subtask, rendered))
    return found


def target_gradients(model: Any, rendered: Sequence[Rendered], parts: FeatureParts) -> dict[str, Tensor]:
    """Each parameter's plain gradients (M, p), and ψ of each variant (M, K)."""
    kept: dict[str, Tensor] = {}

    def compute(members: list[int]) -> None:
        def add(name: str, grads_Bp: Tensor) -> None:
            kept.setdefault(name, torch.empty(len(rendered), grads_Bp.shape[1]))[members] = grads_Bp
            parts.add(name, grads_Bp)

        parts.begin(len(members))
        per_sample_gradients(model, collate(rendered, members), add)
        for variant in parts.variants:
            psi_BK = parts.features(variant)
            kept.setdefault(variant.name, torch.empty(len(rendered), psi_BK.shape[1]))[members] = psi_BK

    run_in_batches([row.num_tokens for row in rendered], BatchBudget.on(model.device), compute)
    return kept


def row_products(
    model: Any, rendered: Sequence[Rendered], adam: FeatureSet, targets: Mapping[str, Tensor], parts: FeatureParts
) -> dict[str, NDArray[np.float32]]:
    """What is kept of N rows at one checkpoint; nothing is normalised.

    Returns:
        exact_NLM and squares_NL: ⟨Γ, g⟩ and ‖Γ‖² in each of the L LoRA layers; sgd_NM and sgd_squares_N: ⟨g, g⟩ and
        ‖g‖² over all; projected_NVM and norms_NV: ⟨φ, ψ⟩ and ‖φ‖ of each of the V variants; of the M targets, squares
        and norms likewise: targets_ML and target_norms_MV.
    """
    num_rows, num_layers, num_targets = len(rendered), len(parts.layers), len(next(iter(targets.values())))
    found = {
        "exact_NLM": np.zeros((num_rows, num_layers, num_targets), np.float32),
        "squares_NL": np.zeros((num_rows, num_layers), np.float32),
        "sgd_NM": np.zeros((num_rows, num_targets), np.float32),
        "sgd_squares_N": np.zeros(num_rows, np.float32),
        "projected_NVM": np.zeros((num_rows, len(parts.variants), num_targets), np.float32),
        "norms_NV": np.zeros((num_rows, len(parts.variants)), np.float32),
        "targets_ML": np.zeros((num_targets, num_layers), np.float32),
        "target_norms_MV": np.stack([targets[v.name].norm(dim=1).numpy() for v in parts.variants], axis=1),
    }
    for name in adam.rules:
        found["targets_ML"][:, parts.layers.index(layer_of(name))] += targets[name].square().sum(dim=1).numpy()

    def compute(members: list[int]) -> None:
        def add(name: str, grads_Bp: Tensor) -> None:
            layer, targets_Mp = parts.layers.index(layer_of(name)), targets[name]
            found["sgd_NM"][members] += (grads_Bp @ targets_Mp.T).numpy()
            found["sgd_squares_N"][members] += grads_Bp.square().sum(dim=1).numpy()
            updates_Bp = adam.rules[name].apply_(grads_Bp)
            found["exact_NLM"][members, layer] += (updates_Bp @ targets_Mp.T).numpy()
            found["squares_NL"][members, layer] += updates_Bp.square().sum(dim=1).numpy()
            parts.add(name, updates_Bp)

        parts.begin(len(members))
        per_sample_gradients(model, collate(rendered, members), add)
        for v, variant in enumerate(parts.variants):
            phi_BK = parts.features(variant)
            found["projected_NVM"][members, v] = (phi_BK @ targets[variant.name].T).numpy()
            found["norms_NV"][members, v] = phi_BK.norm(dim=1).numpy()

    run_in_batches([row.num_tokens for row in rendered], BatchBudget.on(model.device), compute)
    return found


# ---- cost


def cost(args: argparse.Namespace) -> None:
    """Time `build_datastore` in every variant, beside the full one."""
    plan = json.loads((args.work / "plan.json").read_text(encoding="utf-8"))
    variants = [Variant(*entry) for entry in plan["variants"]]
    *some, full = (v for v in variants if v.layers == "all")
    variants = [v for v in variants if v not in some[1:]]  # of the narrower features, the narrowest
    checkpoints = [checkpoint.path for checkpoint in find_checkpoints([args.run])]
    model = load_base_model(args.model, dtype=plan["dtype"], device="cpu").eval()
    tokenizer = load_tokenizer(args.model)
    rows = [record.columns for record in open_source(args.pool).iter_records(0, args.rows)]
    lengths = dict(zip(plan["rows"], plan["num_tokens"], strict=True))
    shortest = min((n for n in lengths if n < len(rows)), key=lengths.__getitem__)
    stores = itertools.count()
    with tempfile.TemporaryDirectory() as folder:

        def build(variant: Variant, data: list[dict], at: list[Path]) -> Datastore:
            store = Path(folder) / f"store-{next(stores)}"
            build_datastore(
                model=model, tokenizer=tokenizer, checkpoints=at, data=data, datastore=store, layers=variant.layers,
                proj_dim=variant.proj_dim, progress=False,
            )  # fmt: skip
            return Datastore.open(store)

        ways = {v.name: partial(build, v, rows, checkpoints[-1:]) for v in variants}
        ways["set-up"] = partial(build, full, [rows[shortest]], checkpoints[-1:])
        ways["two checkpoints"] = partial(build, full, rows, checkpoints[-2:])
        results, cpu = timed_on_cpu(ways, full.name, args.rounds, lambda found: check_stores(found, variants))
    found = {
        "rows": len(rows),
        "tokens": sum(lengths.get(n, 0) for n in range(len(rows))),
        "rounds": args.rounds,
        "full": full.name,
        "machine": machine(),
        "results": {name: found | cpu[name] for name, found in results.items()},
    }
    (args.work / "cost.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def timed_on_cpu(
    ways: Mapping[str, Callable[[], Datastore]],
    against: str,
    rounds: int,
    gate: Callable[[dict[str, Datastore]], None],
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """What `timed` finds, and the CPU seconds and their ratios in the same rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}

    def clocked(name: str) -> Datastore:
        start = time.process_time()
        store = ways[name]()
        seconds[name].append(time.process_time() - start)
        return store

    results = timed({name: partial(clocked, name) for name in ways}, against=against, rounds=rounds, gate=gate)
    cpu = {}
    for name, own in seconds.items():  # the first of them is the round of the gate
        ratios = [one / other for one, other in zip(own[1:], seconds[against][1:], strict=True)]
        cpu[name] = {"cpu_seconds": round(float(np.median(own[1:])), 3), "cpu_ratios": [round(r, 4) for r in ratios]}
    return results, cpu


def check_stores(stores: Mapping[str, Datastore], variants: Sequence[Variant]) -> None:
    """Stop unless ‖Γ‖² of attention and MLP add up to that of all layers, and that of the last N grows with N."""
    squares = {}
    for variant in variants:
        store = stores[variant.name]
        (feature_set,), (checkpoint,) = store.feature_sets, store.checkpoints
        squares[variant] = store.stats(feature_set, checkpoint).update_norms_N.astype(np.float64) ** 2
    widest = max(v.proj_dim for v in variants)
    full = squares[Variant("all", widest)]
    worst = np.abs((squares[Variant(ATTENTION, widest)] + squares[Variant(MLP, widest)]) / full - 1).max()
    grown = [squares[v] for v in variants if v.layers.startswith("last:")] + [full]
    if worst > 1e-3 or any((more <= less).any() for less, more in itertools.pairwise(grown)):
        raise SystemExit(f"the layers' ‖Γ‖² do not add up (off by {worst:.1e}); nothing is timed")


def net_costs(timing: Mapping[str, Any]) -> dict[str, float]:
    """Ratio of each way to the full build, the set-up taken off both: median over rounds."""
    rounds = {name: np.array(found["cpu_ratios"]) for name, found in timing["results"].items()}
    return {name: float(np.median((own - rounds["set-up"]) / (1 - rounds["set-up"]))) for name, own in rounds.items()}


# ---- report


@dataclass(frozen=True)
class Gathered:
    """What `gather` kept of the rows that are done at every checkpoint."""

    plan: dict[str, Any]
    num_rows: int
    products: dict[str, dict[str, NDArray]]
    """By checkpoint, see `row_products`."""

    @classmethod
    def read(cls, work: Path) -> "Gathered":
        """All ranges up to the first that is not done."""
        plan = json.loads((work / "plan.json").read_text(encoding="utf-8"))
        names, done = list(plan["checkpoints"]), []
        for span in ranges_of(len(plan["rows"])):
            files = [work / name / f"rows-{span.start:05d}.npz" for name in names]
            if not all(file.exists() for file in files):
                break
            done.append([dict(np.load(file)) for file in files])
        if not done:
            raise SystemExit(f"{work}: no range of rows is done at every checkpoint yet")
        products = {}
        for name, parts in zip(names, zip(*done, strict=True), strict=True):
            products[name] = {
                key: np.concatenate([part[key] for part in parts]) if "_N" in key else parts[0][key] for key in parts[0]
            }
        return cls(plan, len(products[names[0]]["sgd_squares_N"]), products)

    @property
    def variants(self) -> list[Variant]:
        """The projected ones."""
        return [Variant(*entry) for entry in self.plan["variants"]]

    def scores(self, variant: Variant, checkpoints: Sequence[str], rule: str = "adam") -> NDArray[np.float64]:
        """score(z, j) of every row and subtask, from these checkpoints alone; (N, J) in the order of `subtasks`."""
        weights = np.array([self.plan["checkpoints"][name][1] for name in checkpoints])
        shares = weights / weights.sum() if len(checkpoints) > 1 else [1.0]
        total_NM = sum(w * self._cosines(variant, name, rule) for w, name in zip(shares, checkpoints, strict=True))
        columns = [[m for m, own in enumerate(self.plan["targets"]) if own == pair] for pair in self.subtasks]
        return np.stack([total_NM[:, members].mean(axis=1) for members in columns], axis=1)

    @property
    def subtasks(self) -> list[list[str]]:
        """(set, subtask), each once."""
        return [list(pair) for pair in dict.fromkeys(map(tuple, self.plan["targets"]))]

    def best(self, scores_NJ: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        """score(z) for each set of targets: the highest over its subtasks."""
        sets = [name for name, _ in self.subtasks]
        return {
            name: scores_NJ[:, [j for j, own in enumerate(sets) if own == name]].max(axis=1)
            for name in dict.fromkeys(sets)
        }

    def _cosines(self, variant: Variant, checkpoint: str, rule: str) -> NDArray[np.float64]:
        """(N, M)."""
        kept = {key: array.astype(np.float64) for key, array in self.products[checkpoint].items() if "NLM" not in key}
        if variant.proj_dim is not None:
            v = self.variants.index(variant)
            return kept["projected_NVM"][:, v] / (kept["norms_NV"][:, v, None] * kept["target_norms_MV"][:, v])
        own = choose_layers(self.plan["layers"], variant.layers)
        chosen = [n for n, layer in enumerate(self.plan["layers"]) if layer in own]
        squares_M = kept["targets_ML"][:, chosen].sum(axis=1)
        if rule == "sgd":
            return kept["sgd_NM"] / np.sqrt(kept["sgd_squares_N"][:, None] * squares_M)
        inner_NM = self.products[checkpoint]["exact_NLM"][:, chosen].sum(axis=1, dtype=np.float64)
        return inner_NM / np.sqrt(kept["squares_NL"][:, chosen].sum(axis=1)[:, None] * squares_M)


def judge(exact_N: NDArray, found_N: NDArray) -> dict[str, float]:
    """Spearman, the share of the top 5% that is found, and f95."""
    num_rows = len(exact_N)
    count = math.ceil(FRACTION * num_rows)
    place_T = places(found_N)[np.argsort(-exact_N, kind="stable")[:count]]
    return {
        "spearman": float(np.corrcoef(average_ranks(exact_N), average_ranks(found_N))[0, 1]),
        "top": float(np.mean(place_T < count)),
        "f95": float((np.sort(place_T)[math.ceil(WANTED_RECALL * count) - 1] + 1) / num_rows),
    }


def places(scores_N: NDArray) -> NDArray[np.int64]:
    """Place of each row, best first, from 0; ties go to the earlier row."""
    place_N = np.empty(len(scores_N), np.int64)
    place_N[np.argsort(-scores_N, kind="stable")] = np.arange(len(scores_N))
    return place_N


def recall_curve(exact_N: NDArray, found_N: NDArray) -> dict[str, float]:
    """recall(f) for f from 0.05 to 0.5."""
    num_rows = len(exact_N)
    place_T = places(found_N)[np.argsort(-exact_N, kind="stable")[: math.ceil(FRACTION * num_rows)]]
    return {str(f): float(np.mean(place_T < math.ceil(f * num_rows))) for f in CURVE}


def judged(exact_N: NDArray, found_N: NDArray, num_resamples: int) -> dict[str, Any]:
    """`judge` with intervals, and the curve."""
    draw = np.random.default_rng(0)
    draws = [draw.integers(len(exact_N), size=len(exact_N)) for _ in range(num_resamples)]
    resampled = [judge(exact_N[rows], found_N[rows]) for rows in draws]
    intervals = {
        f"{key}_interval": np.percentile([one[key] for one in resampled], [2.5, 97.5]).round(4).tolist()
        for key in ("spearman", "top", "f95")
    }
    values = {key: round(value, 4) for key, value in judge(exact_N, found_N).items()}
    return values | intervals | {"recall": recall_curve(exact_N, found_N)}


def report(args: argparse.Namespace) -> None:
    """Judge every way, join the costs, write the page and the picture."""
    gathered = Gathered.read(args.work)
    names = list(gathered.plan["checkpoints"])
    exact = gathered.best(gathered.scores(EXACT, names))
    timing_file = args.work / "cost.json"
    timing = json.loads(timing_file.read_text(encoding="utf-8")) if timing_file.exists() else None
    costs = net_costs(timing) if timing else {}
    ways = []
    for variant, checkpoints, rule in ways_of(gathered.variants, names):
        found = gathered.best(gathered.scores(variant, checkpoints, rule))
        share, own = len(checkpoints) / len(names), costs.get(variant.name)
        ways.append(
            {
                "layers": variant.layers,
                "proj_dim": variant.proj_dim,
                "rule": rule,
                "checkpoints": "all" if len(checkpoints) == len(names) else checkpoints[0],
                "cost": None if own is None else round(own * share, 4),
                "targets": {name: judged(exact[name], found[name], args.resamples) for name in exact},
            }
        )
    num_tokens = gathered.plan["num_tokens"][: gathered.num_rows]
    result = {
        "what": "rank of cheaper features against exact ones, and their cost",
        "case": {
            "model": gathered.plan["model"],
            "dtype": gathered.plan["dtype"],
            "pool_rows": gathered.plan["rows"][gathered.num_rows - 1] + 1,
            "rows": gathered.num_rows,
            "tokens": sum(num_tokens),
            "num_params": gathered.plan["num_params"],
            "checkpoints": {name: round(weight, 4) for name, (_, weight) in gathered.plan["checkpoints"].items()},
            "targets": {
                name: {
                    "targets": sum(own == name for own, _ in gathered.plan["targets"]),
                    "subtasks": sum(own == name for own, _ in gathered.subtasks),
                }
                for name in exact
            },
            "resamples": args.resamples,
        },
        "machine": machine(),
        "cost": timing,
        "results": ways,
        "prefilter": prefilters(gathered, costs, args.resamples),
    }
    write_report(result, as_markdown(result, args.json.with_suffix(".png").name), args.json)
    if timing:
        draw(result, args.json.with_suffix(".png"))


def prefilters(gathered: Gathered, costs: Mapping[str, float], num_resamples: int) -> list[dict[str, Any]]:
    """What the first stage of a two-stage build keeps of the plain build's own top 5%, at one checkpoint each."""
    names = list(gathered.plan["checkpoints"])
    widest = max(variant.proj_dim for variant in gathered.variants if variant.proj_dim)
    plain = gathered.best(gathered.scores(Variant("all", widest), names))
    found = []
    for variant, name in itertools.product(gathered.variants, names):
        if variant.proj_dim != widest:
            continue
        cheap = gathered.best(gathered.scores(variant, [name]))
        own = costs.get(variant.name)
        to_come = 1 - 1 / len(names) if variant.layers == "all" else 1  # all layers' are the exact ones there
        judgements = {target: judged(plain[target], cheap[target], num_resamples) for target in plain}
        for judgement in judgements.values():
            judgement["cost"] = None if own is None else round(own / len(names) + judgement["f95"] * to_come, 4)
        found.append({"layers": variant.layers, "proj_dim": widest, "checkpoint": name, "targets": judgements})
    return found


def ways_of(variants: Sequence[Variant], names: Sequence[str]) -> Iterator[tuple[Variant, list[str], str]]:
    """Every variant, projected and not, at all checkpoints and at the last; all layers at each; plain gradients."""
    layers = dict.fromkeys(v.layers for v in variants)
    for variant in [*variants, *(Variant(name, None) for name in layers)]:
        if variant != EXACT:
            yield variant, list(names), "adam"
        single = names if variant.layers == "all" else names[-1:]
        yield from ((variant, [name], "adam") for name in single if len(names) > 1)
    yield EXACT, list(names), "sgd"


def in_words(way: Mapping[str, Any]) -> str:
    """What the features of a way are, for a table."""
    layers = {"all": "all layers", ATTENTION: "attention", MLP: "MLP"}.get(way["layers"], way["layers"])
    width = "unprojected" if way["proj_dim"] is None else f"K = {way['proj_dim']:,}"
    return f"{layers}, {width}" + ("" if way["rule"] == "adam" else f", `{way['rule']}`")


def as_markdown(result: Mapping[str, Any], picture: str) -> str:
    """The report as a page."""
    case, timing = result["case"], result["cost"]
    sets = list(case["targets"])
    weights = ", ".join(f"{name} {weight:.2f}" for name, weight in case["checkpoints"].items())
    targets = ", ".join(
        f"{name} ({found['targets']} in {found['subtasks']})" for name, found in case["targets"].items()
    )
    count = math.ceil(FRACTION * case["rows"])
    lines = [
        f"# Cheaper features on {case['model']}", "",
        f"{case['rows']:,} of the first {case['pool_rows']:,} rows of the pool ({case['tokens']:,} tokens), "
        f"P = {case['num_params']:,}, {case['dtype']}; checkpoints and their weights: {weights}; targets (in "
        f"subtasks): {targets}. The exact top 5% are {count} rows; intervals are 95%, from {case['resamples']} "
        "resamples of the rows. " + machine_in_words(result["machine"]), "",
        *([f"![Agreement with the exact score against cost]({picture})", ""] if timing else []),
        "Every way against the exact score (unprojected, all layers, all checkpoints, `adam`): mean over the sets of "
        "targets, in brackets the worst of them. Costs are ratios to the full build, which is the first line: even it "
        "is not the exact score, since K columns are a projection. Two stages: the way for every row, then exact "
        "features for the best f95 of them, so that 95% of the exact top 5% are kept in the worst set. Fewer columns "
        "save room (2 K bytes a row and checkpoint), hardly time.", "",
        "| features | checkpoints | cost | Spearman | top 5% | f95 | two stages |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    projected = sorted((way for way in result["results"] if way["proj_dim"]), key=_place_on_the_page)
    lines += [_summary_line(way, sets) for way in projected if way["checkpoints"] in ("all", _last(case))]
    for name in sets:
        lines += ["", f"## {name}", "", "| features | checkpoints | Spearman | top 5% | f95 |"]
        lines += ["| --- | --- | --- | --- | --- |"]
        for way in projected:
            if way["checkpoints"] in ("all", _last(case)):
                found = way["targets"][name]
                cells = (f"{found[k]:.2f} [{found[f'{k}_interval'][0]:.2f}, {found[f'{k}_interval'][1]:.2f}]"
                         for k in ("spearman", "top", "f95"))  # fmt: skip
                lines.append(f"| {in_words(way)} | {way['checkpoints']} | {' | '.join(cells)} |")
    lines += ["", "## Two stages", ""]
    lines += [
        "`build-datastore --prefilter F` ranks the rows by one checkpoint alone, the weightiest, and does the others "
        f"for the best F of them. What it keeps of the plain build's own top {FRACTION:.0%} (same projection, every "
        "checkpoint) at F = 0.2, the F that keeps 95% of it, and what both stages then cost beside the plain build "
        f"where the rows kept are as long as the others; for {', '.join(sets)}.", "",
        "| first stage | checkpoint | kept at F = 0.2 | f95 | its 95% intervals | cost |",
        "| --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    heaviest = max(case["checkpoints"], key=case["checkpoints"].get)
    for way in sorted(result["prefilter"], key=lambda way: _place_on_the_page(way | {"checkpoints": "all"})):
        if way["layers"] == "all" or way["checkpoint"] == heaviest:
            found = [way["targets"][name] for name in sets]
            spans = ", ".join(f"{one['f95_interval'][0]:.2f} to {one['f95_interval'][1]:.2f}" for one in found)
            cells = [
                ", ".join(f"{one['recall']['0.2']:.2f}" for one in found),
                ", ".join(f"{one['f95']:.2f}" for one in found),
                spans,
                ", ".join("" if one["cost"] is None else f"{one['cost']:.2f}" for one in found),
            ]
            layers = {"all": "all layers", ATTENTION: "attention", MLP: "MLP"}.get(way["layers"], way["layers"])
            lines.append(f"| {layers} | {way['checkpoint']} | {' | '.join(cells)} |")
    lines += ["", "## Without projection, and single checkpoints", ""]
    lines += ["What is lost by the layers and checkpoints alone, and what other choices rank like.", ""]
    lines += ["| features | checkpoints | Spearman | top 5% | f95 |", "| --- | --- | --- | --- | --- |"]
    others = [w for w in result["results"] if not w["proj_dim"] or w["checkpoints"] not in ("all", _last(case))]
    widest = max(way["proj_dim"] for way in projected)
    for way in sorted(others, key=_place_on_the_page):
        if way["proj_dim"] in (None, widest):
            lines.append(f"| {in_words(way)} | {way['checkpoints']} | {_means(way, sets)} |")
    if timing:
        lines += ["", "## Cost", ""]
        lines += [
            f"`build_datastore` on {timing['rows']} rows ({timing['tokens']:,} tokens) at the last checkpoint, "
            f"{timing['rounds']} interleaved rounds, CPU seconds against {timing['full']}; net of the set-up, "
            "which is the build of one short row. A checkpoint costs what another does: the last alone is reckoned as "
            f"1/{len(case['checkpoints'])}, and two were measured beside one. "
            + machine_in_words(timing["machine"]), "",
            "| way | seconds | CPU seconds | their ratios in the rounds | net |", "| --- | --- | --- | --- | --- |",
        ]  # fmt: skip
        for name, net in net_costs(timing).items():
            own = timing["results"][name]
            ratios = ", ".join(f"{ratio:.2f}" for ratio in own["cpu_ratios"])
            lines.append(f"| {name} | {own['seconds']:.2f} | {own['cpu_seconds']:.2f} | {ratios} | {net:.2f} |")
    return "\n".join(lines) + "\n"


def _last(case: Mapping[str, Any]) -> str:
    return list(case["checkpoints"])[-1]


def _place_on_the_page(way: Mapping[str, Any]) -> tuple:
    """All checkpoints first; all layers from the widest features down, then fewer and fewer layers."""
    last = way["layers"].startswith("last:")
    kind = 0 if way["layers"] == "all" else 1 if last else 2
    return way["checkpoints"] != "all", kind, -(way["proj_dim"] or math.inf), -int(way["layers"][5:]) if last else 0


def _summary_line(way: Mapping[str, Any], sets: Sequence[str]) -> str:
    own = way["cost"]
    two_stages = "" if own is None else f"{own + max(way['targets'][name]['f95'] for name in sets):.2f}"
    price = "" if own is None else f"{own:.2f}"
    return f"| {in_words(way)} | {way['checkpoints']} | {price} | {_means(way, sets)} | {two_stages} |"


def _means(way: Mapping[str, Any], sets: Sequence[str]) -> str:
    cells = []
    for key, worst in (("spearman", min), ("top", min), ("f95", max)):
        values = [way["targets"][name][key] for name in sets]
        cells.append(f"{np.mean(values):.2f} ({worst(values):.2f})")
    return " | ".join(cells)


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Cost against agreement, a marker a way; mean over the sets of targets, and their range."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    priced = [way for way in result["results"] if way["proj_dim"] and way["cost"] is not None]
    if not priced:
        return
    widest = max(way["proj_dim"] for way in priced)
    looks = {"all": ("every checkpoint", "#0072B2", "o"), _last(result["case"]): ("the last alone", "#D55E00", "s")}
    figure, axes = plt.subplots(2, 1, figsize=(7, 8), sharex=True, dpi=100)
    for axis, (key, title) in zip(axes, (("top", "top 5% found"), ("spearman", "Spearman")), strict=True):
        for checkpoints, (label, colour, marker) in looks.items():
            own = [way for way in priced if (way["checkpoints"], way["proj_dim"]) == (checkpoints, widest)]
            points = {way["layers"]: (way["cost"], _mean(way, key)) for way in own}
            blocks = [points[layers] for layers in points if layers not in (ATTENTION, MLP)]
            if not own:  # the run has one checkpoint
                continue
            axis.plot(*zip(*blocks, strict=True), color=colour, linewidth=1, marker=marker, label=label)
            for way in own:
                values, (x, y) = [found[key] for found in way["targets"].values()], points[way["layers"]]
                axis.vlines(x, min(values), max(values), color=colour, alpha=0.3, linewidth=1.5)
                if way["layers"] in (ATTENTION, MLP):
                    axis.plot(x, y, marker, color=colour, markerfacecolor="white")
                name = {ATTENTION: "attention", MLP: "MLP"}.get(way["layers"], way["layers"].removeprefix("last:"))
                right = {ATTENTION: (6, -10), MLP: (6, -4)}.get(way["layers"])
                axis.annotate(
                    name, (x, y), xytext=right or (-4, 6), textcoords="offset points", fontsize=9, color=colour,
                    horizontalalignment="left" if right else "right",
                )  # fmt: skip
        axis.set_ylabel(title)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.25)
    axes[0].legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
    axes[1].set_xscale("log")
    ticks = [tick for tick in (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1) if tick >= 0.8 * min(way["cost"] for way in priced)]
    axes[1].set_xticks(ticks, [str(tick) for tick in ticks])
    axes[1].minorticks_off()
    axes[1].set_xlabel("cost, full build = 1; numbers: layers of the last N blocks; bars: range of the target sets")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _mean(way: Mapping[str, Any], key: str) -> float:
    return float(np.mean([found[key] for found in way["targets"].values()]))


if __name__ == "__main__":
    main()
