"""One trial: a fresh LoRA adapter trained on some rows, then held-out rows: their losses, and answers where asked for.

    loss(v)     mean negative log-likelihood over v's supervised tokens
    correct(v)  the model's greedy reply gives v's `answer`, exactly

A reply's answer is what stands behind its last "answer is", up to the line's end, else all of it; case, white space and
punctuation at the ends, `$` and the commas of thousands do not count.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from less.adapters import lora_model
from less.data.batching import BatchBudget, collate, run_in_batches
from less.data.rendering import Rendered
from less.evaluation.held_out import HeldOut
from less.gradients import token_losses
from less.lm_head import find_unembedding
from less.progress import Progress
from less.training import WarmupConfig, fine_tune, randomness

__all__ = ["Measured", "answer_of", "measure", "row_losses", "run_trial"]

_BEFORE = re.compile(r"answer is:?", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a model gives on held-out rows."""

    losses: list[float]
    """Of each row, in nats per token."""
    correct: list[bool]
    """Of each prompt."""


def run_trial(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Rendered],
    held_out: Sequence[HeldOut],
    *,
    lora: LoraConfig,
    training: WarmupConfig,
    max_new_tokens: int,
    bar: Progress | None = None,
) -> dict[str, Measured]:
    """Train a fresh adapter on `rows` and measure each held-out set; the base is given back as it was.

    The adapter's start, the order of rows and the dropout depend on `training.seed` and the number of rows alone.
    """
    with randomness(training.seed), lora_model(base, lora) as model:
        fine_tune(model, rows, training, bar)
        model.eval()
        return {own.name: measure(model, tokenizer, own, training.tokens_per_batch, max_new_tokens) for own in held_out}


def measure(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    held_out: HeldOut,
    tokens_per_batch: int | None,
    max_new_tokens: int,
) -> Measured:
    """Losses and answers of one model, in evaluation mode."""
    replies = _replies(model, tokenizer, held_out.prompts, tokens_per_batch, max_new_tokens)
    return Measured(
        losses=row_losses(model, held_out.rendered, tokens_per_batch),
        correct=[answer_of(reply) == answer_of(a) for reply, a in zip(replies, held_out.answers, strict=True)],
    )


@torch.no_grad()
def row_losses(model: nn.Module, rendered: Sequence[Rendered], tokens_per_batch: int | None = None) -> list[float]:
    """The loss of each row, in nats per supervised token."""
    device = next(model.parameters()).device
    losses_N = torch.empty(len(rendered))

    def compute(members: list[int]) -> None:
        batch = collate(rendered, members).to(device)
        head = find_unembedding(model, batch.input_ids_BT.numel())
        losses_N[members] = token_losses(model, batch, head).cpu()

    run_in_batches([row.num_tokens for row in rendered], BatchBudget.on(device, tokens_per_batch), compute)
    return losses_N.tolist()


def answer_of(reply: str) -> str:
    """What a reply gives as its answer, made comparable."""
    *before, text = _BEFORE.split(reply)
    if before:
        text = text.lstrip().partition("\n")[0]
    text = text.casefold().replace("$", "")
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text)
    return " ".join(text.split()).strip(" .,:;!?'\"*`")


@torch.no_grad()
def _replies(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    tokens_per_batch: int | None,
    max_new_tokens: int,
) -> list[str]:
    """The greedy reply to each prompt, padded on the left."""
    device = next(model.parameters()).device
    replies = [""] * len(prompts)

    def generate(members: list[int]) -> None:
        width = max(len(prompts[n]) for n in members)
        gaps = [width - len(prompts[n]) for n in members]
        input_ids_BT = torch.tensor([[0] * gap + prompts[n] for gap, n in zip(gaps, members, strict=True)])
        mask_BT = torch.tensor([[0] * gap + [1] * (width - gap) for gap in gaps])
        output_BT: Tensor = model.generate(  # type: ignore[operator]
            input_ids=input_ids_BT.to(device), attention_mask=mask_BT.to(device), do_sample=False,
            max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
        )  # fmt: skip
        for n, ids_T in zip(members, output_BT[:, width:].tolist(), strict=True):
            replies[n] = str(tokenizer.decode(ids_T, skip_special_tokens=True))

    lengths = [len(prompt) + max_new_tokens for prompt in prompts]
    run_in_batches(lengths, BatchBudget.on(device, tokens_per_batch), generate)
    return replies
