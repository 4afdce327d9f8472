"""Batches of rendered rows: which rows go together, and their tensors.

A batch costs its padded tokens, and as much again as some more tokens would for being a batch at all (weights are
read, kernels are launched). Of all plans that take the rows longest first and keep to the budget, the cheapest is
found. It depends on the lengths and the budget alone: a resumed build makes the same batches.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from datastore.errors import SettingError
from less.data.rendering import Rendered

__all__ = ["Batch", "BatchBudget", "collate", "plan_batches", "run_in_batches"]


@dataclass(frozen=True, kw_only=True)
class BatchBudget:
    """What a batch may hold, and when padding is cheaper than another batch."""

    max_tokens: int
    """Padded tokens in one batch."""
    overhead: int
    """The tokens that would take as long as a batch does beyond its tokens."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise SettingError(f"tokens per batch must be positive, got {self.max_tokens}")

    @classmethod
    def on(cls, device: torch.device, max_tokens: int | None = None) -> Self:
        """Of a device: `max_tokens` large enough to fill it and small enough for its memory at 7B, unless given.

        On a CPU core a batch of SmolLM2-135M costs 22 tokens (float32) to 37 (bfloat16) beyond its own; on a GPU it
        is some thousand kernel launches.
        """
        usual, overhead = {"cuda": (16384, 2048)}.get(device.type, (2048, 32))
        return cls(max_tokens=usual if max_tokens is None else max_tokens, overhead=overhead)


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows padded to one length."""

    input_ids_BT: Tensor
    """int64."""
    attention_mask_BT: Tensor
    """int64: 1 for a token, 0 for padding. Padding is known by place, never by id: often pad = eos."""
    supervised_BT: Tensor
    """bool: the tokens that carry loss."""
    position_ids_BT: Tensor | None
    """int64; given only for left padding, where a model would count the padding otherwise."""
    predicted_S2: Tensor
    """int64: row and position of every supervised token but a row's first token, which nothing predicts."""
    rows: list[int]
    """Positions in the caller's list, in the order of axis B."""
    num_tokens: int
    """Tokens without the padding."""

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on `device`, without waiting for what the device still has to do."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {name: _moved(v, device) for name, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def plan_batches(lengths: Sequence[int], budget: BatchBudget) -> list[list[int]]:
    """The cheapest way to group rows so that rows × longest row ≤ `max_tokens`; a longer row is a batch of its own.

    Args:
        lengths: tokens of each row.
        budget: what a batch may hold and what it costs beyond its tokens.

    Returns:
        Positions in `lengths`, each once: longest first, so that memory runs out early or not at all; ties by
        position.
    """
    longest_first = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    num_rows = len(longest_first)
    cost_N = np.zeros(num_rows + 1, np.int64)  # of the best plan for the rows from n on
    size_N = np.zeros(num_rows, np.int64)  # of its first batch
    for n in reversed(range(num_rows)):
        longest = max(lengths[longest_first[n]], 1)
        sizes = np.arange(1, min(max(budget.max_tokens // longest, 1), num_rows - n) + 1)
        costs = sizes * longest + budget.overhead + cost_N[n + sizes]
        best = int(costs.argmin())
        cost_N[n], size_N[n] = costs[best], sizes[best]
    batches, start = [], 0
    while start < num_rows:
        stop = start + int(size_N[start])
        batches.append(longest_first[start:stop])
        start = stop
    return batches


def run_in_batches(lengths: Sequence[int], budget: BatchBudget, run: Callable[[list[int]], None]) -> int:
    """Calls `run` with each batch of `plan_batches`; one that does not fit into a GPU's memory is halved.

    Returns:
        How often a batch was halved: it shows in the last bits of a result.

    Raises:
        torch.OutOfMemoryError: a single row does not fit.
    """
    num_retries = 0
    queue = plan_batches(lengths, budget)[::-1]
    while queue:
        members = queue.pop()
        try:
            run(members)
        except torch.OutOfMemoryError:
            if len(members) == 1:
                raise
            torch.cuda.empty_cache()
            num_retries += 1
            queue += [members[len(members) // 2 :], members[: len(members) // 2]]
    return num_retries


def collate(
    rendered: Sequence[Rendered], rows: Sequence[int], *, pad_id: int = 0, padding_side: str = "right"
) -> Batch:
    """The rows `rows` of `rendered` as one batch, padded on `padding_side` to the longest.

    Padding is masked, so which id pads makes no difference.

    Raises:
        SettingError: `padding_side` is neither "right" nor "left".
    """
    if padding_side not in ("left", "right"):
        raise SettingError(f"padding side must be 'left' or 'right', got {padding_side!r}")
    width = max(rendered[row].num_tokens for row in rows)
    input_ids_BT = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    attention_mask_BT = torch.zeros((len(rows), width), dtype=torch.int64)
    supervised_BT = torch.zeros((len(rows), width), dtype=torch.bool)
    for at, row in enumerate(rows):
        length = rendered[row].num_tokens
        tokens = slice(0, length) if padding_side == "right" else slice(width - length, width)
        input_ids_BT[at, tokens] = torch.tensor(rendered[row].input_ids)
        attention_mask_BT[at, tokens] = 1
        supervised_BT[at, tokens] = torch.tensor(rendered[row].supervised)
    left = padding_side == "left"
    return Batch(
        input_ids_BT=input_ids_BT,
        attention_mask_BT=attention_mask_BT,
        supervised_BT=supervised_BT,
        position_ids_BT=(attention_mask_BT.cumsum(1) - 1).clamp(min=0) if left else None,
        predicted_S2=supervised_BT[:, 1:].nonzero() + torch.tensor([0, 1]),
        rows=list(rows),
        num_tokens=sum(rendered[row].num_tokens for row in rows),
    )


def _moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    """On a GPU by way of pinned memory: a copy from elsewhere waits until all kernels before it are done."""
    on_gpu = torch.device(device).type == "cuda" and tensor.device.type == "cpu"
    return tensor.pin_memory().to(device, non_blocking=True) if on_gpu else tensor.to(device)
