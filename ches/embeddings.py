"""Final hidden embeddings of the replies of a batch of pairs: one forward pass, without the LM head.

    [ prompt | chosen | rejected | padding ]

is one sequence in which a rejected token sees the prompt and what precedes it in its own reply, never the chosen
reply, and stands at the position that it has behind the prompt: the prompt is computed once, not twice. Where a
model cannot be told so (state-space layers, sliding windows shorter than the pair), each reply gets a sequence of
its own. Either way the embedding h of position i is the input of the LM head there, which predicts token i + 1.

What is made of embeddings is left to `measures` and `unembedding`, which tokens count to `tokens`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ches.tokens import PairTokens, Reply
from datastore.errors import UnsupportedError
from less.lm_head import lm_head

__all__ = ["Embeddings", "can_share_prompts", "embed_replies", "embed_replies_ref", "sequence_tokens"]


@dataclass(frozen=True)
class Embeddings:
    """The embeddings that predict the counted tokens of a batch: pair after pair, chosen before rejected."""

    hidden_SD: Tensor
    """In the model's dtype."""
    token_S: Tensor
    """int64: the token that each of them predicts."""
    sizes: list[tuple[int, int]]
    """Counted tokens of each pair's chosen and rejected reply; they add up to S."""

    @property
    def spans(self) -> Iterator[tuple[slice, slice]]:
        """Where each pair's chosen and rejected reply lie in S."""
        start = 0
        for num_chosen, num_rejected in self.sizes:
            middle, end = start + num_chosen, start + num_chosen + num_rejected
            yield slice(start, middle), slice(middle, end)
            start = end

    @property
    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(chosen_TD, rejected_TD) of each pair."""
        return ((self.hidden_SD[chosen], self.hidden_SD[rejected]) for chosen, rejected in self.spans)


@dataclass(frozen=True)
class _Sequence:
    """One row of a forward pass."""

    prompt: list[int]
    replies: tuple[Reply, ...]

    @property
    def input_ids(self) -> list[int]:
        return [*self.prompt, *(token for reply in self.replies for token in reply.input_ids)]

    @property
    def positions(self) -> list[int]:
        """Each reply goes on where the prompt ends."""
        start = len(self.prompt)
        return [*range(start), *(start + i for reply in self.replies for i in range(len(reply.input_ids)))]

    @property
    def parts(self) -> list[int]:
        """0 for the prompt, 1 for the first reply, 2 for the second."""
        numbered = enumerate(self.replies, start=1)
        return [0] * len(self.prompt) + [part for part, reply in numbered for _ in reply.input_ids]

    @property
    def predicting(self) -> list[int]:
        """Where the embeddings are that predict the counted tokens, reply after reply."""
        places, start = [], len(self.prompt)
        for reply in self.replies:
            before = [len(self.prompt) - 1, *range(start, start + len(reply.input_ids) - 1)]
            places += [place for place, counts in zip(before, reply.counted, strict=True) if counts]
            start += len(reply.input_ids)
        return places


@torch.no_grad()
def embed_replies(
    model: nn.Module, pairs: Sequence[PairTokens], *, share_prompts: bool, padding_side: str = "right"
) -> Embeddings:
    """The embeddings of a batch of pairs.

    Args:
        model: a causal language model, or a PEFT model of one, in evaluation mode.
        pairs: the batch; pairs of like length cost least.
        share_prompts: compute a pair as one sequence, if it fits the model's attention window. Ask
            `can_share_prompts` first.
        padding_side: "right" or "left"; the numbers are the same.

    Raises:
        UnsupportedError: the model has no LM head, or puts tokens of its own before a sequence.
    """
    window = _attention_window(model)
    sharing = share_prompts and max(pair.num_tokens for pair in pairs) <= window
    rows = _sequences(pairs, sharing)
    width = max(len(row.parts) for row in rows)
    device = next(model.parameters()).device

    def padded(values: Sequence[int], fill: int) -> list[int]:
        gap = [fill] * (width - len(values))
        return [*values, *gap] if padding_side == "right" else [*gap, *values]

    input_ids_BT = torch.tensor([padded(row.input_ids, 0) for row in rows], device=device)
    position_ids_BT = torch.tensor([padded(row.positions, 0) for row in rows], device=device)
    part_BT = torch.tensor([padded(row.parts, -1) for row in rows], device=device)
    mask = _attention_bias(part_BT, next(model.parameters()).dtype) if sharing else (part_BT >= 0).long()
    hidden_BTD = _lm_head_input(model, input_ids=input_ids_BT, attention_mask=mask, position_ids=position_ids_BT)
    place_S = [
        at * width + (0 if padding_side == "right" else width - len(row.parts)) + place
        for at, row in enumerate(rows)
        for place in row.predicting
    ]
    replies = [(pair.chosen, pair.rejected) for pair in pairs]
    tokens = [token for both in replies for reply in both for token in reply.counted_ids]
    return Embeddings(
        hidden_SD=hidden_BTD.flatten(0, 1)[torch.tensor(place_S, device=device)],
        token_S=torch.tensor(tokens, device=device),
        sizes=[(chosen.num_counted, rejected.num_counted) for chosen, rejected in replies],
    )


@torch.no_grad()
def embed_replies_ref(model: nn.Module, pair: PairTokens) -> tuple[Tensor, Tensor]:
    """`embed_replies` of one pair, slowly: two whole forward passes, every layer's states and all logits kept.

    Returns:
        chosen_TD and rejected_TD.
    """
    found = []
    for reply in (pair.chosen, pair.rejected):
        input_ids_1T = torch.tensor([pair.prompt_ids + reply.input_ids], device=next(model.parameters()).device)
        states_TD = model(input_ids=input_ids_1T, output_hidden_states=True, use_cache=False).hidden_states[-1][0]
        first = len(pair.prompt_ids)
        found.append(states_TD[[first + i - 1 for i, counts in enumerate(reply.counted) if counts]])
    return found[0], found[1]


def can_share_prompts(model: nn.Module) -> bool:
    """Whether a pair as one sequence gives this model's embeddings: tried out on a short one."""

    def reply(*tokens: int) -> Reply:
        return Reply(input_ids=list(tokens), counted=[True] * len(tokens), truncated=False)

    probe = PairTokens(prompt_ids=[5, 9, 6, 7, 3], chosen=reply(8, 4, 6), rejected=reply(7, 5, 9, 8))
    apart_SD = embed_replies(model, [probe], share_prompts=False).hidden_SD.float()
    try:
        shared_SD = embed_replies(model, [probe], share_prompts=True).hidden_SD.float()
    except (IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):  # it takes no such mask
        return False
    # In SmolLM2-135M rounding gave 1e-6, in bfloat16 0.02; seeing the chosen reply, or wrong positions, 0.7 and more.
    tolerance = 1e-4 if next(model.parameters()).dtype == torch.float32 else 0.1
    return bool((shared_SD - apart_SD).norm() <= tolerance * apart_SD.norm())


def sequence_tokens(pair: PairTokens, *, share_prompts: bool) -> int:
    """Tokens that a pair takes up in a batch: what a budget is counted in."""
    if share_prompts:
        return pair.num_tokens
    return 2 * (len(pair.prompt_ids) + max(len(pair.chosen.input_ids), len(pair.rejected.input_ids)))


def _sequences(pairs: Sequence[PairTokens], sharing: bool) -> list[_Sequence]:
    if sharing:
        return [_Sequence(pair.prompt_ids, (pair.chosen, pair.rejected)) for pair in pairs]
    return [_Sequence(pair.prompt_ids, (reply,)) for pair in pairs for reply in (pair.chosen, pair.rejected)]


def _attention_bias(part_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 1, T, T), added to attention scores: 0 where a token sees another, else the least number.

    Padding sees itself alone, so that no row of a softmax is empty.
    """
    width = part_BT.shape[1]
    query_BT1, key_B1T = part_BT[:, :, None], part_BT[:, None, :]
    earlier_TT = torch.ones(width, width, dtype=torch.bool, device=part_BT.device).tril()
    sees_BTT = earlier_TT & (key_B1T >= 0) & (query_BT1 >= 0) & ((key_B1T == 0) | (key_B1T == query_BT1))
    sees_BTT |= torch.eye(width, dtype=torch.bool, device=part_BT.device)
    bias_BTT = torch.zeros(sees_BTT.shape, dtype=dtype, device=part_BT.device)
    return bias_BTT.masked_fill_(~sees_BTT, torch.finfo(dtype).min)[:, None]


def _attention_window(model: nn.Module) -> float:
    """Tokens that every layer attends to: a mask of ours takes the place of a sliding window's, or adds to it."""
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    names = ("sliding_window", "attention_chunk_size", "window_size")
    windows = [getattr(config, name, None) for name in names]
    return min([window for window in windows if window], default=float("inf"))


def _lm_head_input(model: nn.Module, **inputs: Any) -> Tensor:
    """What the LM head is given, (B, T, D); the head itself gets nothing to do."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(args[0])
        return (args[0][:, :0], *args[1:])

    hook = lm_head(model).register_forward_pre_hook(keep)
    try:
        model(**inputs, use_cache=False)
    finally:
        hook.remove()
    (hidden_BTD,) = seen
    if hidden_BTD.shape[:2] != inputs["input_ids"].shape:
        raise UnsupportedError(
            f"{type(model).__name__} adds tokens of its own to a sequence, as prompt tuning does; expected a model or "
            "an adapter that does not"
        )
    return hidden_BTD
