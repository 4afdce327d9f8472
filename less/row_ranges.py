"""One range of a source's rows at one checkpoint: render, batch by length, compute features, make shards.

Batches are a function of the range alone and never cross it, so the same range gives the same shards to the
byte, whenever it is computed. When a batch does not fit into a GPU's memory it is halved, which shows in the
last bits of a feature and is therefore noted in the shard. Which ranges are computed, and where shards go, is
`less.pipeline`'s business.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor

from datastore import Shard, SkippedRow
from less.data.batching import collate, run_in_batches
from less.data.records import Record, RowProblem, Source, skip
from less.data.rendering import Rendered, Renderer
from less.features import FeatureSet, gradient_features
from less.progress import Progress

__all__ = ["compute_shards"]


def compute_shards(
    source: Source,
    rows: range,
    *,
    renderer: Renderer,
    model: PeftModel,
    feature_sets: Sequence[FeatureSet],
    dtypes: Mapping[str, str],
    tokens_per_batch: int,
    strict: bool,
    bar: Progress,
) -> dict[str, Shard]:
    """The shard of each feature set, from one backward pass over the rows.

    Args:
        source: where the rows come from.
        rows: their numbers.
        renderer: makes tokens of them.
        model: a LoRA model, carrying the checkpoint's adapter.
        feature_sets: made ready for the checkpoint.
        dtypes: stored dtype of each feature set.
        tokens_per_batch: padded tokens in one batch.
        strict: a row that cannot be used is an error.
        bar: told of rows and tokens as they are done.

    Raises:
        RowError: a row cannot be used, under `strict`.
        UnsupportedError: see `less.gradients.per_sample_gradients`.
    """
    records: list[Record] = []
    rendered: list[Rendered] = []
    skipped: list[SkippedRow] = []
    for record in source.iter_records(rows.start, rows.stop):
        try:
            rendered.append(renderer.render_record(record))
            records.append(record)
        except RowProblem as problem:
            skipped.append(skip(record, problem, strict=strict))
    bar.advance(len(skipped))
    results = {fs.name: _Results.empty(len(records), fs.projector.dim, dtypes[fs.name]) for fs in feature_sets}

    def compute(members: list[int]) -> None:
        batch = collate(rendered, members)
        features = gradient_features(model, batch.to(model.device), feature_sets)
        for name, result in results.items():
            numbers = (features.losses_B, features.grad_norms_B, features.update_norms_B[name])
            result.put(members, features.features_BK[name], *numbers)
        bar.advance(len(members), batch.num_tokens)

    num_retries = run_in_batches([row.num_tokens for row in rendered], tokens_per_batch, compute)
    shards = {}
    for name, result in results.items():
        problems = result.problems()
        bad = [skip(records[n], problem, strict=strict) for n, problem in problems.items()]
        kept = [n for n in range(len(records)) if n not in problems]
        shards[name] = Shard(
            features_NK=result.units_NK[kept],
            norms_N=result.norms_N[kept],
            grad_norms_N=result.grad_norms_N[kept],
            update_norms_N=result.update_norms_N[kept],
            losses_N=result.losses_N[kept],
            num_tokens_N=np.array([rendered[n].num_tokens for n in kept], np.int32),
            num_supervised_N=np.array([rendered[n].num_supervised for n in kept], np.int32),
            truncated_N=np.array([rendered[n].truncated for n in kept], bool),
            rows_N=np.array([records[n].number for n in kept], np.int64),
            digests_N=np.array([_digest(rendered[n]) for n in kept], np.uint64),
            ids=[records[n].id for n in kept],
            skipped=sorted(skipped + bad, key=lambda row: row.row),
            notes={"oom_retries": num_retries} if num_retries else {},
        )
    return shards


@dataclass(frozen=True)
class _Results:
    """What the rows of one shard gave so far, at their places in the shard whatever the batches."""

    units_NK: NDArray[np.floating]
    norms_N: NDArray[np.float32]
    losses_N: NDArray[np.float32]
    grad_norms_N: NDArray[np.float32]
    update_norms_N: NDArray[np.float32]

    @classmethod
    def empty(cls, num_rows: int, dim: int, dtype: str) -> "_Results":
        """Room for `num_rows` rows."""
        return cls(np.empty((num_rows, dim), dtype), *np.empty((4, num_rows), np.float32))

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
        self.units_NK[rows] = (features_BK / norms_B[:, None]).cpu().numpy()
        for ours_N, theirs_B in (
            (self.norms_N, norms_B),
            (self.losses_N, losses_B),
            (self.grad_norms_N, grad_norms_B),
            (self.update_norms_N, update_norms_B),
        ):
            ours_N[rows] = theirs_B.cpu().numpy()

    def problems(self) -> dict[int, RowProblem]:
        """The rows without a direction: their loss or gradient is not finite, or their feature is zero."""
        found = {}
        numbers = np.stack([self.losses_N, self.grad_norms_N, self.update_norms_N, self.norms_N])
        for n in np.flatnonzero(~np.isfinite(numbers).all(axis=0) | (self.norms_N == 0)).tolist():
            loss, grad, update, norm = numbers[:, n].tolist()
            reason = "zero norm" if norm == 0 else "not finite"
            found[n] = RowProblem(reason, f"loss {loss:g}, ‖g‖ {grad:g}, ‖Γ‖ {update:g}, ‖φ‖ {norm:g}")
        return found


def _digest(rendered: Rendered) -> int:
    """64 bits over a row's tokens and which of them are supervised: equal for exact duplicates."""
    packed = np.array(rendered.input_ids, np.int64).tobytes() + np.array(rendered.supervised, bool).tobytes()
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")
