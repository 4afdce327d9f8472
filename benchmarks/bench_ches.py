"""Seconds to score preference pairs: gradsift's way beside a script's, and beside plain batches.

    python benchmarks/bench_ches.py --model M --data PAIRS --json benchmarks/results/NAME.json

    script            two forward passes a pair, one reply at a time, every layer's states and all logits kept
    batched           two padded batches, chosen and rejected, of pairs of like length, with logits
    backbone          the same two batches without the LM head
    ches, ln_ches     ours: prompts shared, no LM head
    all measures      ours: alpha_ches, log-probabilities and the rest too, the LM head on reply tokens only

All with the same token budget. The gate: every way's `ches` equals the first one's to 1e-4 of ⟨S⁺, S⁻⟩ and ‖S⁺‖².
The aim is at most 0.6 of `batched`, and never more than `backbone`.
"""

import itertools
import json
from collections.abc import Sequence
from typing import Any

import torch
from harness import machine, machine_in_words, options, table, timed, write_report
from torch import Tensor

from ches.embeddings import can_share_prompts, embed_replies, embed_replies_ref, sequence_tokens
from ches.measures import ches_scores, ches_terms
from ches.scoring import ChesConfig, PairScorer
from ches.tokens import PairRenderer, PairTokens
from less.data.batching import BatchBudget, plan_batches
from less.data.records import Memory
from less.data.rendering import RenderConfig
from less.models import load_base_model, load_tokenizer


def main() -> None:
    """Measure, and write the table."""
    parser = options(__doc__)
    parser.add_argument("--model")
    parser.add_argument("--label", help="what to call the model on the page; the folder's name by default")
    parser.add_argument("--data")
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens-per-batch", type=int, default=2048)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    if args.smoke:
        args.rounds = 1
        model, tokenizer, rows = tiny_case()
    else:
        model, tokenizer = load_base_model(args.model, dtype=args.dtype).eval(), load_tokenizer(args.model)
        with open(args.data, "rb") as lines:
            rows = [json.loads(line) for line in itertools.islice(lines, args.pairs)]
    renderer = PairRenderer(tokenizer, RenderConfig(max_length=1024))
    pairs = [renderer.render_record(record) for record in Memory(rows).iter_records()]
    budget = args.tokens_per_batch
    results = timed(
        {
            "script": lambda: by_script(model, pairs),
            "batched": lambda: by_batches(model, pairs, budget, logits=True),
            "backbone": lambda: by_batches(model, pairs, budget, logits=False),
            "ches, ln_ches": lambda: by_us(model, renderer, pairs, budget, ["ches", "ln_ches"]),
            "all measures": lambda: by_us(model, renderer, pairs, budget, ChesConfig().measures),
        },
        against="batched",
        rounds=args.rounds,
        gate=lambda results: check(results, scale_of(model, pairs)),
        wait=torch.cuda.synchronize if model.device.type == "cuda" else lambda: None,
    )
    prompts, replies = tokens_of(pairs)
    report = {
        "what": "seconds to score preference pairs, and the ratio to two padded batches with logits",
        "case": {
            "model": "made up" if args.smoke else args.label or str(args.model).rstrip("/").split("/")[-1],
            "dtype": str(model.dtype).removeprefix("torch."),
            "pairs": len(pairs),
            "prompt_tokens": prompts,
            "reply_tokens": replies,
            "tokens_shared_over_apart": round((prompts + replies) / (2 * prompts + replies), 3),
            "tokens_per_batch": budget,
            "rounds": args.rounds,
        },
        "machine": machine(),
        "results": results,
    }
    write_report(report, as_markdown(report), args.json)


def by_script(model: Any, pairs: Sequence[PairTokens]) -> list[float]:
    """One reply at a time."""
    return [ches_terms(*embed_replies_ref(model, pair)).total for pair in pairs]


def by_batches(model: Any, pairs: Sequence[PairTokens], budget: int, *, logits: bool) -> list[float]:
    """The chosen replies and the rejected ones, each as padded batches of the same pairs."""
    scores = [0.0] * len(pairs)
    width = [len(p.prompt_ids) + max(len(p.chosen.input_ids), len(p.rejected.input_ids)) for p in pairs]
    for members in plan_batches(width, BatchBudget.on(model.device, budget)):
        states = []
        for side in ("chosen", "rejected"):
            sequences = [pairs[n].prompt_ids + getattr(pairs[n], side).input_ids for n in members]
            longest = max(map(len, sequences))
            ids_BT = torch.tensor([ids + [0] * (longest - len(ids)) for ids in sequences], device=model.device)
            length_B = torch.tensor([len(ids) for ids in sequences], device=model.device)
            position_T = torch.arange(longest, device=model.device)
            attention_BT = (position_T < length_B[:, None]).long()
            starts_B = torch.tensor([len(pairs[n].prompt_ids) for n in members], device=model.device)
            mask_BT = (position_T >= starts_B[:, None] - 1) & (position_T < length_B[:, None] - 1)
            hidden_BTD = model.base_model(
                input_ids=ids_BT, attention_mask=attention_BT, use_cache=False
            ).last_hidden_state
            if logits:
                model.get_output_embeddings()(hidden_BTD)
            states.append((hidden_BTD, mask_BT))
        (chosen_BTD, chosen_BT), (rejected_BTD, rejected_BT) = states
        for n, score in zip(members, ches_scores(chosen_BTD, rejected_BTD, chosen_BT, rejected_BT), strict=True):
            scores[n] = float(score)
    return scores


def by_us(
    model: Any, renderer: PairRenderer, pairs: Sequence[PairTokens], budget: int, measures: Sequence[str]
) -> list[float]:
    """As `score_pairs` does it, without reading and writing."""
    scorer = PairScorer(model, renderer, ChesConfig(measures=measures))
    lengths = [sequence_tokens(pair, share_prompts=scorer.shares_prompts) for pair in pairs]
    scores = [0.0] * len(pairs)
    for members in plan_batches(lengths, BatchBudget.on(model.device, budget)):
        for n, found in zip(members, scorer.measure([pairs[n] for n in members]), strict=True):
            scores[n] = found.values["ches"]
    return scores


def scale_of(model: Any, pairs: Sequence[PairTokens]) -> Tensor:
    """|⟨S⁺, S⁻⟩| + ‖S⁺‖² of each pair: CHES is their difference, and its error is to be held against them."""
    sharing, scales = can_share_prompts(model), []
    for pair in pairs:
        ((chosen_TD, rejected_TD),) = embed_replies(model, [pair], share_prompts=sharing).pairs
        terms = ches_terms(chosen_TD, rejected_TD)
        scales.append(abs(float(terms.rejected_T.sum())) + abs(float(terms.chosen_T.sum())))
    return torch.tensor(scales)


def check(results: dict[str, list[float]], scale_N: Tensor) -> None:
    """The gate."""
    first, *others = results
    expected_N = torch.tensor(results[first])
    for name in others:
        worst = float(((torch.tensor(results[name]) - expected_N).abs() / scale_N).max())
        if not worst <= 1e-4:
            raise SystemExit(f"{name} disagrees with {first} by {worst:.1e} of the terms; nothing is timed")


def tokens_of(pairs: Sequence[PairTokens]) -> tuple[int, int]:
    """Prompt tokens (once a pair) and reply tokens."""
    prompts = sum(len(pair.prompt_ids) for pair in pairs)
    return prompts, sum(pair.num_tokens for pair in pairs) - prompts


def tiny_case() -> tuple[Any, Any, list[dict]]:
    """A random model with a byte tokenizer, and pairs for it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE({letter: n for n, letter in enumerate(["</s>", *letters])}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="</s>")
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    ).eval()
    rows = [{"prompt": "a" * n, "chosen": "b" * (n % 3 + 1), "rejected": "c" * (n % 5 + 1)} for n in range(1, 6)]
    return model, tokenizer, rows


def as_markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    case = report["case"]
    lines = [
        f"# Scoring {case['pairs']} pairs with {case['model']}",
        "",
        f"{case['dtype']}, {case['prompt_tokens']:,} prompt and {case['reply_tokens']:,} reply tokens (sharing prompts "
        f"leaves {case['tokens_shared_over_apart']:.2f} of them), budget {case['tokens_per_batch']:,}, median of "
        f"{case['rounds']} interleaved rounds. " + machine_in_words(report["machine"]),
        "",
        *table(report["results"]),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
