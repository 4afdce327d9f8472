"""One range of a source's rows: rendered; then, at a checkpoint, batched by length, features computed, shards made.

Batches are a function of the range alone and never cross it, so the same range gives the same shards to the
byte, whenever it is computed. When a batch does not fit into a GPU's memory it is halved, which shows in the
last bits of a feature and is therefore noted in the shard. Which ranges are computed, and where shards go, is
`less.pipeline`'s business.
"""

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datastore import Shard, SkippedRow
from datastore.coding import encode
from less.data.batching import Batch, BatchBudget, collate, run_in_batches
from less.data.records import Record, RowProblem, Source, skip
from less.data.rendering import Rendered, Renderer
from less.features import BatchFeatures
from less.progress import Progress

__all__ = ["RowRange", "compute_shards", "content_digest", "render_range"]


@dataclass(frozen=True)
class RowRange:
    """The rows of one range; `records` and `rendered` run in parallel."""

    records: list[Record]
    """Those that can be used."""
    rendered: list[Rendered]
    """Their tokens."""
    skipped: list[SkippedRow]
    """The others, but for those that are set aside."""
    set_aside: dict[int, str]
    """The labels of these, by row."""


def render_range(
    source: Source,
    rows: range,
    renderer: Renderer,
    *,
    strict: bool,
    set_aside: Collection[int] = frozenset(),
    deleted: Sequence[SkippedRow] = (),
) -> RowRange:
    """Read and render the rows of a range.

    Args:
        source: where the rows come from.
        rows: their numbers.
        renderer: makes tokens of them.
        strict: a row that cannot be used is an error.
        set_aside: rows that are to be left out unseen (`less.prefilter`).
        deleted: entries of rows that were deleted from the store, which are skipped unseen.

    Raises:
        RowError: a row cannot be used, under `strict`.
    """
    found, gone = RowRange([], [], [], {}), {row.row: row for row in deleted}
    for record in source.iter_records(rows.start, rows.stop):
        if record.number in gone:
            found.skipped.append(gone[record.number])
            continue
        if record.number in set_aside:
            found.set_aside[record.number] = record.id
            continue
        try:
            found.rendered.append(renderer.render_record(record))
            found.records.append(record)
        except RowProblem as problem:
            found.skipped.append(skip(record, problem, strict=strict))
    return found


def compute_shards(
    rows: RowRange,
    features_of: Callable[[Batch], BatchFeatures],
    *,
    widths: Mapping[str, int],
    dtypes: Mapping[str, str],
    device: torch.device,
    budget: BatchBudget,
    strict: bool,
    bar: Progress,
) -> dict[str, Shard]:
    """The shard of each feature set, from one pass over the rows.

    Args:
        rows: from `render_range`.
        features_of: computes a batch, such as `less.features.gradient_features` at a checkpoint.
        widths: K of each feature set.
        dtypes: stored dtype of each feature set.
        device: where batches are computed.
        budget: of a batch.
        strict: a row whose feature is zero or not finite is an error.
        bar: told of rows and tokens as they are done.

    Raises:
        RowError: a row has no direction, under `strict`.
        UnsupportedError: see `less.gradients.per_sample_gradients`.
    """
    records, rendered = rows.records, rows.rendered
    bar.advance(len(rows.skipped))
    results = {
        name: _Results.empty(len(records), dim, "float16" if dtypes[name] == "float16" else "float32", device)
        for name, dim in widths.items()
    }

    def compute(members: list[int]) -> None:
        batch = collate(rendered, members)
        features = features_of(batch.to(device))
        for name, result in results.items():
            numbers = (features.losses_B, features.grad_norms_B, features.update_norms_B[name])
            result.put(members, features.features_BK[name], *numbers)
        bar.advance(len(members), batch.num_tokens)

    num_retries = run_in_batches([row.num_tokens for row in rendered], budget, compute)
    shards = {}
    for name, result in results.items():
        units_NK, numbers_4N = result.units_NK.cpu().numpy(), result.numbers_4N.cpu().numpy()
        problems = _problems(numbers_4N)
        bad = [skip(records[n], problem, strict=strict) for n, problem in problems.items()]
        kept = [n for n in range(len(records)) if n not in problems]
        norms_N, losses_N, grad_norms_N, update_norms_N = numbers_4N[:, kept]
        shards[name] = Shard(
            features_NK=encode(units_NK[kept] if problems else units_NK, dtypes[name]),
            norms_N=norms_N,
            grad_norms_N=grad_norms_N,
            update_norms_N=update_norms_N,
            losses_N=losses_N,
            num_tokens_N=np.array([rendered[n].num_tokens for n in kept], np.int32),
            num_supervised_N=np.array([rendered[n].num_supervised for n in kept], np.int32),
            truncated_N=np.array([rendered[n].truncated for n in kept], bool),
            rows_N=np.array([records[n].number for n in kept], np.int64),
            digests_N=np.array([content_digest(rendered[n]) for n in kept], np.uint64),
            ids=[records[n].id for n in kept],
            skipped=sorted(rows.skipped + bad, key=lambda row: row.row),
            set_aside=rows.set_aside,
            notes={"oom_retries": num_retries} if num_retries else {},
        )
    return shards


@dataclass(frozen=True)
class _Results:
    """What the rows of one shard gave so far, at their places in the shard whatever the batches.

    On the model's device until the shard is done: to fetch a batch's would wait for it, with nothing queued behind.
    """

    units_NK: Tensor
    numbers_4N: Tensor
    """‖φ‖, loss, ‖g‖ and ‖Γ‖, float32."""

    @classmethod
    def empty(cls, num_rows: int, dim: int, dtype: str, device: torch.device) -> "_Results":
        """Room for `num_rows` rows."""
        units_NK = torch.empty(num_rows, dim, dtype=getattr(torch, dtype), device=device)
        return cls(units_NK, torch.empty(4, num_rows, device=device))

    def put(
        self,
        rows: Sequence[int],
        features_BK: Tensor,
        losses_B: Tensor,
        grad_norms_B: Tensor,
        update_norms_B: Tensor,
    ) -> None:
        """Take in one batch."""
        norms_B = torch.linalg.vector_norm(features_BK, dim=1)
        at_B = torch.tensor(rows, pin_memory=features_BK.is_cuda).to(features_BK.device, non_blocking=True)
        self.units_NK[at_B] = (features_BK / norms_B[:, None]).to(self.units_NK.dtype)
        self.numbers_4N[:, at_B] = torch.stack([norms_B, losses_B, grad_norms_B, update_norms_B])


def _problems(numbers_4N: NDArray[np.float32]) -> dict[int, RowProblem]:
    """The rows without a direction: their loss or gradient is not finite, or their feature is zero."""
    found = {}
    for n in np.flatnonzero(~np.isfinite(numbers_4N).all(axis=0) | (numbers_4N[0] == 0)).tolist():
        norm, loss, grad, update = numbers_4N[:, n].tolist()
        reason = "zero norm" if norm == 0 else "not finite"
        found[n] = RowProblem(reason, f"loss {loss:g}, ‖g‖ {grad:g}, ‖Γ‖ {update:g}, ‖φ‖ {norm:g}")
    return found


def content_digest(rendered: Rendered) -> int:
    """64 bits over a row's tokens and which of them are supervised: equal for exact duplicates."""
    packed = np.array(rendered.input_ids, np.int64).tobytes() + np.array(rendered.supervised, bool).tobytes()
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")
