"""The exact scan: every stored row times every query, block by block, in memory that does not grow with the store.

    scores_NJ = Σ_c w_c ⟨φ_c, query_cj⟩

Every row is read once and no index is asked: choosing 5% of a pool is no search for neighbours. Rows in few bits are
multiplied as integers. A query is then two digits of int8 a number, q = s (128 h + l), which keeps 13 of its bits, so
that its rounding is far below that of the rows; the sums of integers are exact, and the same on every machine.

What a query is made of is `less.influence`'s business, what is done with the scores `less.selection`'s.
"""

from collections.abc import Iterator, Mapping
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datastore import Block, CodedRows, Datastore
from less.progress import Progress

__all__ = ["Parts", "gather_scores", "influence_scores", "iter_scores"]

Parts = Iterator[tuple[int, NDArray[np.float32]]]
CHUNK_VALUES = 2**20
"""Features that are cast and multiplied at once: 4 MB of float32."""
_LARGEST_DIGITS = 128 * 63 + 63  # h from −63 to 63, l from −64 to 63


def influence_scores(
    store: Datastore,
    feature_set: str,
    queries_JK: Mapping[str, Tensor],
    weights: Mapping[str, float],
    *,
    normalize: str = "cosine",
    device: str | torch.device = "cpu",
    verify: bool = True,
    progress: bool = False,
) -> NDArray[np.float32]:
    """Σ_c w_c ⟨φ_c, query_c⟩ for every scored row.

    Args:
        store: a sealed store.
        feature_set: which of its feature sets to read.
        queries_JK: by checkpoint, from `less.influence.subtask_queries`.
        weights: w_c by checkpoint, used as given.
        normalize: `cosine` uses the stored unit rows, `none` gives them their norms back.
        device: where to multiply.
        verify: check each shard's checksum before it is used.
        progress: show a bar.

    Returns:
        scores_NJ, float32, in the pool's order.

    Raises:
        DamagedStoreError: a shard is not what the manifest says.
    """
    parts = iter_scores(
        store, feature_set, queries_JK, weights, normalize=normalize, device=device, verify=verify, progress=progress
    )
    return gather_scores(store.num_rows, len(next(iter(queries_JK.values()))), parts)


def gather_scores(num_rows: int, num_subtasks: int, parts: Parts) -> NDArray[np.float32]:
    """scores_NJ of the parts that `iter_scores` gives."""
    scores_NJ = np.empty((num_rows, num_subtasks), np.float32)
    for start, scores_nJ in parts:
        scores_NJ[start : start + len(scores_nJ)] = scores_nJ
    return scores_NJ


def iter_scores(
    store: Datastore,
    feature_set: str,
    queries_JK: Mapping[str, Tensor],
    weights: Mapping[str, float],
    *,
    first: int = 0,
    normalize: str = "cosine",
    device: str | torch.device = "cpu",
    verify: bool = True,
    progress: bool = False,
) -> Parts:
    """`influence_scores` in parts: the position of the first row of each range of the pool, and its scores_nJ.

    Args:
        first: the position to begin at, where a range begins; see `influence_scores` for the others.
    """
    scan_of = {name: _Scan(weight * queries_JK[name].float(), torch.device(device)) for name, weight in weights.items()}
    num_subtasks = len(next(iter(queries_JK.values())))
    with Progress(total=store.num_rows * len(weights), description="scan", enabled=progress) as bar:
        bar.advance(first * len(weights))
        for blocks in store.iter_aligned(feature_set, list(weights), first=first, verify=verify):
            scores_nJ = np.zeros((len(blocks[0].norms_n), num_subtasks), np.float32)
            for scan, block in zip(scan_of.values(), blocks, strict=True):
                scan.add(block, normalize, scores_nJ)
                bar.advance(len(scores_nJ))
            yield blocks[0].start, scores_nJ


class _Scan:
    """The queries of one checkpoint, as the rows that it meets need them."""

    def __init__(self, query_JK: Tensor, device: torch.device) -> None:
        self.query_JK = query_JK.to(device)
        self.device = device
        self._digits: tuple[Tensor, Tensor] | None = None
        self._buffers: dict[torch.dtype, Tensor] = {}

    def add(self, block: Block, normalize: str, scores_nJ: NDArray[np.float32]) -> None:
        """Add the products of a block's rows to its scores."""
        step = max(1, CHUNK_VALUES // self.query_JK.shape[1])
        for start in range(0, len(scores_nJ), step):
            rows = slice(start, start + step)
            features_nK = block.features_nK[rows]
            if isinstance(features_nK, CodedRows):
                products_nJ = self._coded(features_nK)
            else:
                products_nJ = self._floats(torch.from_numpy(features_nK))
            if normalize == "none":
                products_nJ *= torch.from_numpy(block.norms_n[rows])[:, None]
            scores_nJ[rows] += products_nJ.numpy()

    def _floats(self, features_nK: Tensor) -> Tensor:
        buffer_nK = self._buffer(torch.float32)[: len(features_nK)].copy_(features_nK)
        return (self.query_JK @ buffer_nK.T).T.cpu()

    def _coded(self, rows: CodedRows) -> Tensor:
        scales_n1 = torch.from_numpy(rows.scales_N)[:, None]
        integers_nK = rows.codes_NX if rows.dtype == "int8" else self._integers(rows)
        codes_nK = torch.from_numpy(integers_nK)
        if self.device.type != "cpu" or not _multiplies_int8_exactly():
            return self._floats(codes_nK) * scales_n1
        scale_J, digits_DK = self._query_digits()
        sums_nD = torch._int_mm(codes_nK, digits_DK.T).double()
        J = len(scale_J)
        return ((128 * sums_nD[:, :J] + sums_nD[:, J:]) * scale_J).float() * scales_n1

    def _integers(self, rows: CodedRows) -> NDArray[np.int8]:
        return rows.integers(self._buffer(torch.int8)[: len(rows)].numpy())

    def _query_digits(self) -> tuple[Tensor, Tensor]:
        """s (J,) float64, and h above l (2J, K) int8, of q ≈ s (128 h + l)."""
        if self._digits is None:
            scale_J = self.query_JK.double().abs().amax(dim=1).clamp(min=1e-300) / _LARGEST_DIGITS
            numbers_JK = (self.query_JK / scale_J[:, None]).round().to(torch.int32)
            high_JK = (numbers_JK + 64) >> 7
            self._digits = scale_J, torch.cat([high_JK, numbers_JK - 128 * high_JK]).to(torch.int8)
        return self._digits

    def _buffer(self, dtype: torch.dtype) -> Tensor:
        """One piece of memory for all chunks: fresh memory would cost ten times the cast in page faults."""
        if dtype not in self._buffers:
            width = self.query_JK.shape[1]
            device = "cpu" if dtype == torch.int8 else self.device
            self._buffers[dtype] = torch.empty(max(1, CHUNK_VALUES // width), width, dtype=dtype, device=device)
        return self._buffers[dtype]


@cache
def _multiplies_int8_exactly() -> bool:
    """Whether the sums of int8 products are right here: processors without VNNI may cut sums of pairs at 16 bits."""
    for ours, theirs in ((127, 63), (-127, 63), (127, -64), (-127, -64)):
        rows_NK, digits_DK = (torch.full((17, 4096), value, dtype=torch.int8) for value in (ours, theirs))
        if not (torch._int_mm(rows_NK, digits_DK.T) == 4096 * ours * theirs).all():
            return False
    return True
