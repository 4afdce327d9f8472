"""Batches of rendered rows: which rows go together, and their tensors.

Rows of like length go together, so that padding costs little. The plan depends on the lengths and the budget
alone: a resumed build makes the same batches.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from datastore.errors import SettingError
from less.data.rendering import Rendered

__all__ = ["Batch", "collate", "plan_batches", "run_in_batches"]


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
    rows: list[int]
    """Positions in the caller's list, in the order of axis B."""

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on `device`."""
        positions = self.position_ids_BT
        return replace(
            self,
            input_ids_BT=self.input_ids_BT.to(device),
            attention_mask_BT=self.attention_mask_BT.to(device),
            supervised_BT=self.supervised_BT.to(device),
            position_ids_BT=None if positions is None else positions.to(device),
        )

    @property
    def num_tokens(self) -> int:
        """Tokens without the padding."""
        return int(self.attention_mask_BT.sum())


def plan_batches(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Groups rows so that rows × longest row ≤ `tokens_per_batch`; a longer row is a batch of its own.

    Args:
        lengths: tokens of each row.
        tokens_per_batch: the budget, padding included.

    Returns:
        Positions in `lengths`, each once: longest first, so that memory runs out early or not at all; ties by
        position.

    Raises:
        SettingError: the budget is not positive.
    """
    if tokens_per_batch < 1:
        raise SettingError(f"tokens per batch must be positive, got {tokens_per_batch}")
    longest_first = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    batches, start = [], 0
    while start < len(longest_first):
        longest = max(lengths[longest_first[start]], 1)
        stop = start + max(tokens_per_batch // longest, 1)
        batches.append(longest_first[start:stop])
        start = stop
    return batches


def run_in_batches(lengths: Sequence[int], tokens_per_batch: int, run: Callable[[list[int]], None]) -> int:
    """Calls `run` with each batch of `plan_batches`; one that does not fit into a GPU's memory is halved.

    Returns:
        How often a batch was halved: it shows in the last bits of a result.

    Raises:
        torch.OutOfMemoryError: a single row does not fit.
    """
    num_retries = 0
    queue = plan_batches(lengths, tokens_per_batch)[::-1]
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
        rows=list(rows),
    )
