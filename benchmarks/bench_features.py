"""Seconds to build a datastore, beside a plain LoRA forward and backward pass over the same batches.

    python benchmarks/bench_features.py --model M --data POOL --json benchmarks/results/NAME.json [--less-way]
    python benchmarks/bench_features.py --random-llama 7b --lora-targets q_proj,k_proj,v_proj,o_proj --rank 128

    plain             PEFT's own forward pass with all logits, one loss a batch, autograd's backward pass; nothing else
    plain, by budget  the same, but rows sorted by length and each batch filled up to the token budget (where that is
                      not what we do): as a Trainer that groups by length has them
    gradsift          `build_datastore`: tokens, per-sample gradients, Adam's Γ, projection to K, shards on the disk
    LESS way          one row at a time, autograd, Γ and the dense projection of the whole gradient, also to the disk
    bergson           `bergson_way`: the plain gradient, no moments, a small projection of each matrix, to the disk

`plain`, `gradsift` and `bergson` run the same padded batches; moments are from a short warm-up. The gate: the store's
‖g‖ of some rows equals `gradients_ref`'s to 1e-3 (1e-1 in bfloat16), every row is there, the LESS way's features have
the norms of the store's Γ, bergson's unprojected gradients have ‖g‖. A ratio below 1 means that features cost less
than a plain training step without its optimizer. Further passes, not among those timed, say where the time goes
(`stage_clock`) and what is held at once (`peak_memory`).
"""

import itertools
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import bergson_way
import numpy as np
import torch
from harness import machine, machine_in_words, options, table, timed, write_report
from made_up_models import SIZES, letter_tokenizer, pool_lengths, random_llama, rows_of_lengths
from model_flops import gpu_peak_flops, model_flops
from peak_memory import peak_bytes
from peft import PeftModel
from stage_clock import FORWARD, PROJECTION, StageClock
from torch import Tensor

from datastore import Datastore
from less import build_datastore, warmup
from less.adam import UpdateRule
from less.adapters import adapted_model
from less.data import Batch, BatchBudget, RenderConfig, Rendered, Renderer, RowProblem, collate, plan_batches
from less.data.records import Memory
from less.features import FeatureSet, FeatureSetConfig, gradient_features
from less.gradients import gradients_ref, per_sample_gradients
from less.models import ParamLayout, context_length, load_base_model, load_tokenizer, resolve_device, resolve_dtype
from less.moments import load_adam_state
from less.projection import ProjectionConfig, make_projector

NUM_CHECKED = 3
FLOAT_BYTES = 4


def main() -> None:
    """Measure, and write the table."""
    parser = options(__doc__)
    parser.add_argument("--model")
    parser.add_argument("--random-llama", choices=SIZES, help="a model with random weights and made-up rows, no data")
    parser.add_argument("--label", help="what to call the model on the page; the folder's name by default")
    parser.add_argument("--data")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lora-targets", default="all-linear", help="all-linear, or names with commas")
    parser.add_argument("--layers", default="all", help="those whose gradients count, as in build_datastore")
    parser.add_argument("--proj-dim", type=int, default=8192)
    parser.add_argument("--dtype", default="auto", help="auto is bfloat16 on CUDA, float32 on a CPU")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tokens-per-batch", type=int, help="by default, build_datastore's")
    parser.add_argument("--less-way", action="store_true", help="also one row at a time with the dense projection")
    parser.add_argument("--less-rows", type=int, help="rows the LESS way is timed on; its time is scaled by tokens")
    parser.add_argument("--bergson", action="store_true", help="also bergson, where it is installed")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    if args.smoke:
        args.random_llama, args.rows, args.rounds, args.proj_dim = "tiny", 9, 1, 64
        args.less_way, args.less_rows, args.rank = True, 4, min(args.rank, 4)
        args.tokens_per_batch = args.tokens_per_batch or 1024
    if bool(args.random_llama) == bool(args.model and args.data):
        parser.error("give --model and --data, or --random-llama")
    if args.bergson and not bergson_way.is_importable():
        print("bergson is not installed here and is left out")
        args.bergson = False
    with tempfile.TemporaryDirectory() as folder:
        report = measure(Job.prepare(args, Path(folder)), args)
    write_report(report, as_markdown(report), args.json)


@dataclass(frozen=True)
class Job:
    """The same work for every way."""

    model: Any
    rows: list[dict]
    settings: dict[str, Any]
    """What `build_datastore` is told beside model, checkpoints, data and store."""
    rendered: list[Rendered]
    batches: list[list[int]]
    """As `build_datastore` makes them."""
    by_budget: list[list[int]]
    """As many rows in each as the budget takes."""
    checkpoint: Path
    folder: Path
    numbers: Any
    """A fresh one for each store."""

    @classmethod
    def prepare(cls, args: Any, folder: Path) -> "Job":
        """Load or make up a model and rows, and warm up."""
        if args.random_llama:
            device = resolve_device(args.device)
            model = random_llama(args.random_llama, device=device, dtype=resolve_dtype(args.dtype, device))
            tokenizer, pool = letter_tokenizer(), rows_of_lengths(pool_lengths(), args.rows)
        else:
            model = load_base_model(args.model, dtype=args.dtype, device=args.device).eval()
            tokenizer = load_tokenizer(args.model)
            pool = [json.loads(line) for line in Path(args.data).read_bytes().splitlines()]
        template = "chatml" if tokenizer.chat_template is None else None
        config = RenderConfig(chat_template=template)
        rows, rendered = usable(
            pool, Renderer(tokenizer, config, context_length=context_length(model.config)), args.rows
        )  # fmt: skip
        shared = {"tokenizer": tokenizer, "chat_template": template, "progress": False}
        run = warmup(
            model=model, data=rows[:8], output=folder / "run", fraction=1.0, epochs=1, batch_size=4,
            lora_rank=args.rank, target_modules=args.lora_targets, tokens_per_batch=args.tokens_per_batch, **shared,
        )  # fmt: skip
        budget = BatchBudget.on(model.device, args.tokens_per_batch)
        lengths = [row.num_tokens for row in rendered]
        shared |= {"proj_dim": args.proj_dim, "tokens_per_batch": budget.max_tokens, "layers": args.layers}
        return cls(
            model, rows, shared, rendered, plan_batches(lengths, budget), filled_batches(lengths, budget.max_tokens),
            run.checkpoints[-1], folder, itertools.count(),
        )  # fmt: skip

    @property
    def proj_dim(self) -> int:
        """K."""
        return self.settings["proj_dim"]

    def padded_tokens(self, batches: list[list[int]]) -> int:
        """Tokens of these batches, padding included."""
        return sum(len(members) * max(self.rendered[n].num_tokens for n in members) for members in batches)

    def layout(self, adapted: PeftModel) -> ParamLayout:
        """Of the parameters whose gradients count."""
        return ParamLayout.of(adapted, self.settings["layers"])

    def collate(self, members: Sequence[int]) -> Batch:
        """These rows on the model's device."""
        return collate(self.rendered, members).to(self.model.device)

    def plain(self, batches: list[list[int]]) -> None:
        """Two passes over each batch."""
        with adapted_model(self.model, self.checkpoint) as adapted:
            for members in batches:
                plain_step(adapted, self.collate(members))

    def gradsift(self) -> Datastore:
        """A datastore."""
        store = self.folder / f"store-{next(self.numbers)}"
        build_datastore(
            model=self.model, checkpoints=self.checkpoint, data=self.rows, datastore=store, **self.settings
        )  # fmt: skip
        return Datastore.open(store)

    def less_way(self, members: Sequence[int]) -> np.ndarray:
        """A file of features of these rows; returns them."""
        with adapted_model(self.model, self.checkpoint) as adapted:
            layout, state = self.layout(adapted), load_adam_state(self.checkpoint, adapted, ParamLayout.of(adapted))
            rule, features = UpdateRule.of("adam", state), []
            rules = {
                name: rule.prepare(*(moment[name].flatten().to(self.model.device) for moment in (state.m, state.v)))
                for name in layout.names
            }
            projector = make_projector(ProjectionConfig(kind="rademacher", proj_dim=self.proj_dim), layout)
            for n in members:
                _, blocks = gradients_ref(adapted, self.collate([n]))
                out_1K = torch.zeros(1, self.proj_dim, device=self.model.device)
                for name in layout.names:
                    projector.project_add_(out_1K, rules[name].apply_(blocks[name].float()), name)
                features.append(out_1K.cpu().numpy())
        features_NK = np.concatenate(features)
        np.save(self.folder / "features.npy", features_NK.astype(np.float16))
        return features_NK

    def bergson(self, members: Sequence[int] | None = None, **settings: Any) -> np.ndarray:
        """An index of all rows in our batches, or of these, one by one; returns its gradients."""
        folder = self.folder / f"bergson-{next(self.numbers)}"
        rendered = self.rendered if members is None else [self.rendered[n] for n in members]
        batches = self.batches if members is None else [[n] for n in range(len(members))]
        with adapted_model(self.model, self.checkpoint) as adapted, quiet():
            return bergson_way.collect(adapted, rendered, batches, folder, **settings)

    def reference_norms(self, num_rows: int) -> np.ndarray:
        """‖g‖ of the first rows, slowly."""
        with adapted_model(self.model, self.checkpoint) as adapted:
            _, blocks = gradients_ref(adapted, self.collate(range(num_rows)))
            grads_BP = torch.cat([blocks[name] for name in self.layout(adapted).names], dim=1)
        return grads_BP.float().norm(dim=1).cpu().numpy()


def usable(pool: list[dict], renderer: Renderer, num_rows: int) -> tuple[list[dict], list[Rendered]]:
    """The first rows that have supervised tokens within the model's context, and their tokens."""
    rows, rendered = [], []
    for row, record in zip(pool, Memory(pool).iter_records(), strict=True):
        with suppress(RowProblem):
            rendered.append(renderer.render_record(record))
            rows.append(row)
        if len(rows) == num_rows:
            break
    return rows, rendered


def plain_step(adapted: PeftModel, batch: Batch) -> None:
    """What training does with a batch, without the optimizer."""
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_("lora_" in name)
    labels_BT = batch.input_ids_BT.masked_fill(~batch.supervised_BT, -100)
    with torch.enable_grad():
        adapted(
            input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, labels=labels_BT, use_cache=False
        ).loss.backward()  # fmt: skip
    adapted.zero_grad()


def filled_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Rows longest first, as many in a batch as its padded tokens allow."""
    longest_first = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    batches: list[list[int]] = []
    while longest_first:
        size = max(max_tokens // lengths[longest_first[0]], 1)
        batches.append(longest_first[:size])
        longest_first = longest_first[size:]
    return batches


def spread(lengths: Sequence[int], num_rows: int) -> list[int]:
    """That many rows, evenly spread over the rows by length."""
    by_length = sorted(range(len(lengths)), key=lambda row: lengths[row])
    return [by_length[(2 * n + 1) * len(by_length) // (2 * num_rows)] for n in range(num_rows)]


def measure(job: Job, args: Any) -> dict[str, Any]:
    """Time the ways, then look at one build's stages and memory."""
    lengths = [row.num_tokens for row in job.rendered]
    less_rows = spread(lengths, min(args.less_rows or len(lengths), len(lengths)))
    ways: dict[str, Callable[[], Any]] = {"plain": lambda: job.plain(job.batches)}
    if job.by_budget != job.batches:
        ways["plain, by budget"] = lambda: job.plain(job.by_budget)
    ways["gradsift"] = job.gradsift
    if args.less_way:
        ways["LESS way"] = lambda: job.less_way(less_rows)
    if args.bergson:
        ways["bergson"] = job.bergson
    device = job.model.device
    results = timed(
        ways,
        against="plain",
        rounds=args.rounds,
        gate=lambda found: check(job, found, less_rows),
        wait=torch.cuda.synchronize if device.type == "cuda" else lambda: None,
    )
    if args.less_way:
        results["LESS way"] = scaled(results["LESS way"], sum(lengths) / sum(lengths[n] for n in less_rows))
    with adapted_model(job.model, job.checkpoint) as adapted:
        num_params = job.layout(adapted).num_params
        flops = model_flops(adapted, [(row.num_tokens, row.num_supervised) for row in job.rendered])
    peak = gpu_peak_flops(device, job.model.dtype)
    for found in results.values():
        found["tokens_per_second"] = round(sum(lengths) / found["seconds"]) if found["seconds"] else None
        whole = peak and found["seconds"] and args.layers == "all"  # else part of the backward pass is left out
        found["flop_utilisation"] = round(flops / found["seconds"] / peak, 3) if whole else None
    return {
        "what": "seconds to build a datastore, and the ratio to a plain LoRA forward and backward pass",
        "case": {
            "model": f"a random Llama, {args.random_llama}" if args.random_llama
            else args.label or str(args.model).rstrip("/").split("/")[-1],
            "dtype": str(job.model.dtype).removeprefix("torch."),
            "device": device.type,
            "rows": len(job.rows),
            "tokens": sum(lengths),
            "supervised_tokens": sum(row.num_supervised for row in job.rendered),
            "tokens_per_batch": job.settings["tokens_per_batch"],
            "batches": len(job.batches),
            "padded_tokens": job.padded_tokens(job.batches),
            "batches_by_budget": len(job.by_budget),
            "padded_tokens_by_budget": job.padded_tokens(job.by_budget),
            "lora_rank": args.rank,
            "lora_targets": args.lora_targets,
            "layers": args.layers,
            "num_params": num_params,
            "proj_dim": job.proj_dim,
            "less_rows": len(less_rows) if args.less_way else None,
            "bergson_proj_dim": bergson_way.PROJ_DIM if args.bergson else None,
            "model_flops": flops,
            "rounds": args.rounds,
        },
        "machine": machine(*(["bergson"] if args.bergson else [])),
        "results": results,
        "stages": stages(job),
        "memory": memory(job),
    }  # fmt: skip


def check(job: Job, found: dict[str, Any], less_rows: Sequence[int]) -> None:
    """The gate."""
    store: Datastore = found["gradsift"]
    (feature_set,) = store.feature_sets
    (block,) = store.iter_blocks(feature_set, store.checkpoints[0])
    stats = store.stats(feature_set, store.checkpoints[0])
    if store.num_rows != len(job.rows) or block.features_nK.shape != (len(job.rows), job.proj_dim):
        raise SystemExit(f"{store.num_rows} of {len(job.rows)} rows are in the store; nothing is timed")
    tolerance = 1e-3 if job.model.dtype == torch.float32 else 1e-1
    expected_B = job.reference_norms(NUM_CHECKED)
    refuse_beyond(tolerance, "gradsift: ‖g‖", stats.grad_norms_N[:NUM_CHECKED] / expected_B)
    if "LESS way" in found:
        norms_n = np.linalg.norm(found["LESS way"], axis=1)
        six_errors = 6 * sqrt(2 / job.proj_dim)
        refuse_beyond(six_errors + 2 * tolerance, "LESS way: ‖φ‖²", (norms_n / stats.update_norms_N[less_rows]) ** 2)
    if "bergson" in found:
        grads_BP = job.bergson(range(NUM_CHECKED), proj_dim=0)
        refuse_beyond(tolerance, "bergson: ‖g‖", np.linalg.norm(grads_BP.astype(np.float32), axis=1) / expected_B)


def refuse_beyond(tolerance: float, what: str, ratios: np.ndarray) -> None:
    """Stop unless every ratio is 1 to within this."""
    worst = float(np.abs(ratios - 1).max())
    if not worst <= tolerance:
        raise SystemExit(f"{what} is off by {worst:.1e}; nothing is timed")


def scaled(found: dict[str, Any], factor: float) -> dict[str, Any]:
    """Times and ratios of as much more work."""
    return {
        "seconds": round(found["seconds"] * factor, 3),
        "ratio": round(found["ratio"] * factor, 3),
        "ratios": [round(ratio * factor, 3) for ratio in found["ratios"]],
    }


def stages(job: Job) -> dict[str, Any]:
    """Where the time of one build goes, and that of the two plain passes beside it."""

    def plain() -> None:
        with clocks["plain"].stage(FORWARD):
            job.plain(job.batches)

    clocks = {"plain": StageClock(job.model.device), "gradsift": StageClock(job.model.device)}
    for name, work in (("plain", plain), ("gradsift", job.gradsift)):
        with clocks[name].watching(job.model):
            work()
    seconds = {name: clock.seconds() for name, clock in clocks.items()}
    total = sum(seconds["gradsift"].values())
    return {
        "seconds": {name: {stage: round(s, 4) for stage, s in own.items()} for name, own in seconds.items()},
        "shares": {stage: round(own / total, 4) for stage, own in seconds["gradsift"].items()},
        "seconds_beside": {stage: round(own, 4) for stage, own in clocks["gradsift"].beside.items()},
    }


def memory(job: Job) -> dict[str, Any]:
    """Most bytes held for the largest batch beyond what was there before it: plain, ours without features, ours."""
    device = job.model.device
    largest = max(job.batches, key=lambda members: job.padded_tokens([members]))
    with adapted_model(job.model, job.checkpoint) as adapted:
        layout, state = job.layout(adapted), load_adam_state(job.checkpoint, adapted, ParamLayout.of(adapted))
        config = FeatureSetConfig(projection=ProjectionConfig(proj_dim=job.proj_dim))
        feature_set = FeatureSet.prepare(config, layout, make_projector(config.projection, layout), state, device)
        batch = job.collate(largest)
        gradient_features(adapted, job.collate(job.batches[-1]), [feature_set])  # it keeps the signs it has met

        def throw_away(_: str, __: Tensor) -> None: ...

        peaks = {
            "plain": peak_bytes(lambda: plain_step(adapted, batch), device),
            "ours, gradients thrown away": peak_bytes(
                lambda: per_sample_gradients(adapted, batch, throw_away, layout.layers), device
            ),
            "gradsift": peak_bytes(lambda: gradient_features(adapted, batch, [feature_set]), device),
        }
        layer_sizes: dict[str, int] = {}
        for name, size in zip(layout.names, layout.sizes, strict=True):
            layer = name.rpartition(".lora_")[0]
            layer_sizes[layer] = layer_sizes.get(layer, 0) + size
    return {
        "rows": len(largest),
        "padded_tokens": job.padded_tokens([largest]),
        "peak_bytes": peaks,
        "for_features_bytes": peaks["gradsift"] - peaks["ours, gradients thrown away"],
        "largest_layer_bytes": FLOAT_BYTES * len(largest) * max(layer_sizes.values()),
        "all_gradients_bytes": FLOAT_BYTES * len(largest) * layout.num_params,
    }


@contextmanager
def quiet() -> Any:
    """Without what a library says while it works."""
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def as_markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    case, found, held = report["case"], report["stages"], report["memory"]
    targets = "all linear layers" if case["lora_targets"] == "all-linear" else case["lora_targets"]
    layers = "" if case["layers"] == "all" else f", gradients of layers {case['layers']}"
    lines = [
        f"# Features of {case['rows']} rows with {case['model']}",
        "",
        f"{case['dtype']}, LoRA rank {case['lora_rank']} on {targets}{layers} ({case['num_params']:,} parameters), "
        f"`adam`, sparse, K = {case['proj_dim']:,}; {case['tokens']:,} tokens, {case['supervised_tokens']:,} "
        f"supervised, {case['padded_tokens']:,} with padding in {case['batches']} batches of up to "
        f"{case['tokens_per_batch']:,}; median of {case['rounds']} interleaved rounds. "
        + machine_in_words(report["machine"]),
        "",
        *table(report["results"], tokens_per_second="tokens/s", flop_utilisation="FLOP utilisation"),
        "",
    ]
    notes = []
    if "plain, by budget" in report["results"]:
        notes.append(
            f"By budget: {case['batches_by_budget']} batches, {case['padded_tokens_by_budget']:,} tokens with padding."
        )
    if case["less_rows"] and case["less_rows"] < case["rows"]:
        notes.append(f"The LESS way is timed on {case['less_rows']} rows of all lengths and scaled by tokens.")
    if case["bergson_proj_dim"]:
        side = case["bergson_proj_dim"]
        notes.append(f"bergson: plain gradients, no moments, {side} × {side} numbers for each adapter matrix.")
    lines += [" ".join(notes), ""] if notes else []
    plain, ours = found["seconds"]["plain"], found["seconds"]["gradsift"]
    lines += ["| stage | seconds of plain | of gradsift | share of gradsift |", "| --- | --- | --- | --- |"]
    for stage, share in found["shares"].items():
        of_plain = f"{plain[stage]:.2f}" if plain[stage] >= 0.005 else ""
        lines.append(f"| {stage} | {of_plain} | {ours[stage]:.2f} | {100 * share:.1f} % |")
    beside = ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in found["seconds_beside"].items())
    lines += [
        "",
        f"**Transformation and projection: {100 * found['shares'][PROJECTION]:.1f} %** of a datastore, in one "
        "instrumented pass of each" + (f"; in threads beside it: {beside}." if beside else "."),
        "",
        f"| of the largest batch, {held['rows']} rows, {held['padded_tokens']:,} tokens | MB at the peak |",
        "| --- | --- |",
        *(f"| {name} | {num_bytes / 1e6:,.1f} |" for name, num_bytes in held["peak_bytes"].items()),
        "",
        f"Features take {held['for_features_bytes'] / 1e6:,.1f} MB more than gradients thrown away. The gradients of "
        f"the largest layer's A and B are {held['largest_layer_bytes'] / 1e6:,.1f} MB, those of all parameters would "
        f"be {held['all_gradients_bytes'] / 1e6:,.1f} MB.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
