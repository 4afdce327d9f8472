"""Seconds to build a datastore, beside a plain LoRA forward and backward pass over the same batches.

    python benchmarks/bench_features.py --model M --data POOL --json benchmarks/results/NAME.json [--less-way]

    plain       PEFT's own forward pass with all logits, one loss a batch, autograd's backward pass; nothing else
    gradsift    `build_datastore`: tokens, per-sample gradients, Adam's Γ, projection to K, shards on the disk
    LESS way    one row at a time, autograd, Γ and the dense projection of the whole gradient, likewise to the disk

The same rows in the same padded batches (all but the last way); LoRA on every linear layer, moments from a short
warm-up. The gate: the store's ‖g‖ of some rows equals `gradients_ref`'s to 1e-3 (1e-1 in bfloat16), and every row
is there. A ratio below 1 means that features cost less than a plain training step without its optimizer.
"""

import itertools
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import machine, machine_in_words, options, table, timed, write_report

from datastore import Datastore
from less import build_datastore, warmup
from less.adam import UpdateRule
from less.adapters import adapted_model
from less.data import BatchBudget, RenderConfig, Renderer, collate, plan_batches
from less.data.records import Memory
from less.gradients import gradients_ref
from less.models import ParamLayout, context_length, load_base_model, load_tokenizer
from less.moments import load_adam_state
from less.projection import ProjectionConfig, make_projector

NUM_CHECKED = 3


def main() -> None:
    """Measure, and write the table."""
    parser = options(__doc__)
    parser.add_argument("--model")
    parser.add_argument("--label", help="what to call the model on the page; the folder's name by default")
    parser.add_argument("--data")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--proj-dim", type=int, default=8192)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens-per-batch", type=int, default=2048)
    parser.add_argument("--less-way", action="store_true", help="also one row at a time with the dense projection")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    if args.smoke:
        from bench_ches import tiny_case

        args.rounds, args.proj_dim, args.less_way = 1, 64, True
        model, tokenizer, _ = tiny_case()
        rows = [{"prompt": "a" * (n % 7 + 1), "completion": "b" * (n % 5 + 1)} for n in range(9)]
    else:
        model, tokenizer = load_base_model(args.model, dtype=args.dtype).eval(), load_tokenizer(args.model)
        with open(args.data, "rb") as lines:
            rows = [json.loads(line) for line in itertools.islice(lines, args.rows)]
    with tempfile.TemporaryDirectory() as folder:
        report = measure(model, tokenizer, rows, Path(folder), args)
    write_report(report, as_markdown(report), args.json)


def measure(model: Any, tokenizer: Any, rows: list[dict], folder: Path, args: Any) -> dict[str, Any]:
    """Time the ways on these rows."""
    template = "chatml" if tokenizer.chat_template is None else None
    settings = {"tokenizer": tokenizer, "chat_template": template, "progress": False}
    run = warmup(
        model=model, data=rows[:8], output=folder / "run", fraction=1.0, epochs=1, batch_size=4, lora_rank=args.rank,
        **settings,
    )  # fmt: skip
    checkpoint = run.checkpoints[-1]
    renderer = Renderer(tokenizer, RenderConfig(chat_template=template), context_length=context_length(model.config))
    rendered = [renderer.render_record(record) for record in Memory(rows).iter_records()]
    batches = plan_batches([row.num_tokens for row in rendered], BatchBudget.on(model.device, args.tokens_per_batch))
    stores = itertools.count()

    def plain() -> None:
        with adapted_model(model, checkpoint) as adapted, torch.enable_grad():
            for name, parameter in adapted.named_parameters():
                parameter.requires_grad_("lora_" in name)
            for members in batches:
                batch = collate(rendered, members).to(model.device)
                labels_BT = batch.input_ids_BT.masked_fill(~batch.supervised_BT, -100)
                adapted(
                    input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, labels=labels_BT,
                    use_cache=False,
                ).loss.backward()  # fmt: skip
                adapted.zero_grad()

    def gradsift() -> Datastore:
        store = folder / f"store-{next(stores)}"
        build_datastore(
            model=model, checkpoints=checkpoint, data=rows, datastore=store, proj_dim=args.proj_dim,
            tokens_per_batch=args.tokens_per_batch, **settings,
        )  # fmt: skip
        return Datastore.open(store)

    def less_way() -> None:
        with adapted_model(model, checkpoint) as adapted:
            layout = ParamLayout.of(adapted)
            state = load_adam_state(checkpoint, adapted, layout)
            rule, features = UpdateRule.of("adam", state), []
            projector = make_projector(ProjectionConfig(kind="rademacher", proj_dim=args.proj_dim), layout)
            for n in range(len(rendered)):
                _, blocks = gradients_ref(adapted, collate(rendered, [n]).to(model.device))
                out_1K = torch.zeros(1, args.proj_dim, device=model.device)
                for name, grads_1p in blocks.items():
                    prepared = rule.prepare(state.m[name].flatten(), state.v[name].flatten())
                    projector.project_add_(out_1K, prepared.apply_(grads_1p.float()), name)
                features.append(out_1K.half().cpu().numpy())
        np.save(folder / "features.npy", np.concatenate(features))

    def gate(results: dict[str, Any]) -> None:
        store: Datastore = results["gradsift"]
        (feature_set,) = store.feature_sets
        (block,) = store.iter_blocks(feature_set, store.checkpoints[0])
        found = store.stats(feature_set, store.checkpoints[0]).grad_norms_N
        if store.num_rows != len(rows) or block.features_nK.shape != (len(rows), args.proj_dim):
            raise SystemExit(f"{store.num_rows} of {len(rows)} rows are in the store; nothing is timed")
        with adapted_model(model, checkpoint) as adapted:
            _, blocks = gradients_ref(adapted, collate(rendered, range(NUM_CHECKED)).to(model.device))
        expected_B = torch.cat(list(blocks.values()), dim=1).float().norm(dim=1).cpu().numpy()
        worst = float(np.abs(found[:NUM_CHECKED] / expected_B - 1).max())
        if not worst <= (1e-3 if model.dtype == torch.float32 else 1e-1):
            raise SystemExit(f"‖g‖ is off by {worst:.1e}; nothing is timed")

    ways = {"plain": plain, "gradsift": gradsift} | ({"LESS way": less_way} if args.less_way else {})
    wait = torch.cuda.synchronize if model.device.type == "cuda" else lambda: None
    results = timed(ways, against="plain", rounds=args.rounds, gate=gate, wait=wait)
    with adapted_model(model, checkpoint) as adapted:
        num_params = ParamLayout.of(adapted).num_params
    num_tokens = sum(row.num_tokens for row in rendered)
    padded = sum(len(members) * max(rendered[n].num_tokens for n in members) for members in batches)
    return {
        "what": "seconds to build a datastore, and the ratio to a plain LoRA forward and backward pass",
        "case": {
            "model": "made up" if args.smoke else args.label or str(args.model).rstrip("/").split("/")[-1],
            "dtype": str(model.dtype).removeprefix("torch."),
            "rows": len(rows),
            "tokens": num_tokens,
            "supervised_tokens": sum(row.num_supervised for row in rendered),
            "padded_tokens": padded,
            "lora_rank": args.rank,
            "num_params": num_params,
            "proj_dim": args.proj_dim,
            "rounds": args.rounds,
        },
        "machine": machine(),
        "results": results,
    }


def as_markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    case = report["case"]
    lines = [
        f"# Features of {case['rows']} rows with {case['model']}",
        "",
        f"{case['dtype']}, LoRA rank {case['lora_rank']} on all linear layers ({case['num_params']:,} parameters), "
        f"`adam`, sparse, K = {case['proj_dim']:,}; {case['tokens']:,} tokens, {case['supervised_tokens']:,} "
        f"supervised, {case['padded_tokens']:,} with padding; median of {case['rounds']} interleaved rounds. "
        + machine_in_words(report["machine"]),
        "",
        *table(report["results"]),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
