"""The sparse projection: one signed non-zero a coordinate, added without scatter.

A parameter's flattened gradient g is cut into chunks of K. Chunk c is rotated as a whole by r_c, each
coordinate i takes a sign s_i, and the chunks are added:

    out[(i + r_⌊i/K⌋) mod K] += s_i g_i,   r_c = hash(name, c) mod K,   s_i = ±1 = hash(name, i)

Signs are independent, so E[⟨Πx, Πy⟩] = ⟨x, y⟩. Coordinates of different chunks meet with probability 1/K,
those of one chunk never, so the variance is at most that of a column hashed for each coordinate:

    Var ⟨Πx, Πy⟩ ≤ (‖x‖²‖y‖² + ⟨x, y⟩²) / K

It is the count sketch (Charikar, Chen & Farach-Colton, 2002), feature hashing (Weinberger et al., 2009), the
sparse Johnson-Lindenstrauss transform with one non-zero (Kane & Nelson, 2014), but for the rotation: adding
is two contiguous slices a chunk, which read the block once and in a fixed order, on any device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from less.adam import PreparedRule
from less.projection.config import ProjectionConfig
from less.projection.hashing import hash_index, hash_index_ref, make_key
from less.projection.projector import FeatureSums, Projector

if TYPE_CHECKING:
    from less.models import ParamLayout

__all__ = ["SparseProjector"]


class _Plan(NamedTuple):
    """Where one parameter's coordinates go, and with which sign."""

    signs_p: Tensor
    """±1 in int8: a quarter of float32's memory, for at most 6 % of the time of Γ and projection."""
    moves: list[tuple[slice, slice]]
    """(coordinates, columns), one or two a chunk."""


class SparseProjector(Projector):
    """The default. Keeps one byte for each coordinate it has met, its sign: P bytes in all on each device.

    With `kernels` it keeps nothing: they hash again in registers, and do Γ and both norms in the same pass.
    """

    def __init__(self, config: ProjectionConfig, layout: ParamLayout) -> None:
        super().__init__(config, layout)
        self._plans: dict[tuple[str, torch.device], _Plan] = {}
        self._keys = {n: (make_key(config.seed, n, "sign"), make_key(config.seed, n, "rotation")) for n in layout.names}

    def new_sums(self, num_rows: int, device: torch.device) -> FeatureSums:
        """Zeros, in as many parts as the kernel wants."""
        if not self._runs_kernels(device):
            return super().new_sums(num_rows, device)
        from less.projection import kernels

        parts = kernels.num_parts(num_rows, self.dim, max(self.layout.sizes))
        square_parts = parts * kernels.num_tiles(self.dim)
        return FeatureSums.zeros(num_rows, self.dim, device, parts=parts, square_parts=square_parts)

    def add_updates_(
        self, sums: FeatureSums, grads_Bp: Tensor, name: str, rule: PreparedRule, *, keep: bool = True
    ) -> None:
        """As in `Projector`; the kernel reads the gradients once and leaves them as they were."""
        if not self._runs_kernels(grads_Bp.device):
            return super().add_updates_(sums, grads_Bp, name, rule, keep=keep)
        from less.projection import kernels

        self._check(sums.features_SBK[0], grads_Bp, name)
        squares = sums.grad_squares_SB, sums.update_squares_SB
        kernels.add_sparse_(sums.features_SBK, grads_Bp, rule, *self._keys[name], squares)

    def _add_(self, out_BK: Tensor, block_Bp: Tensor, name: str) -> None:
        if self._runs_kernels(block_Bp.device):
            from less.projection import kernels

            return kernels.add_sparse_(out_BK[None], block_Bp, PreparedRule("sgd"), *self._keys[name])
        plan = self._plans.get((name, block_Bp.device))
        if plan is None:
            plan = self._plans[name, block_Bp.device] = self._build_plan(name, block_Bp.device)
        for coordinates, columns in plan.moves:
            out_BK[:, columns].addcmul_(block_Bp[:, coordinates], plan.signs_p[coordinates])

    def _build_plan(self, name: str, device: torch.device) -> _Plan:
        num_rows, (sign_key, rotation_key) = self._num_rows(name), self._keys[name]
        words_p = hash_index(sign_key, torch.arange(num_rows, device=device))
        signs_p = (1 - 2 * (words_p >> 31)).to(torch.int8)  # the top bit is the sign
        starts = range(0, num_rows, self.dim)
        words = hash_index(rotation_key, torch.arange(len(starts)))
        moves = []
        for start, rotation in zip(starts, (words % self.dim).tolist(), strict=True):
            stop = min(start + self.dim, num_rows)
            wrap = min(start + self.dim - rotation, stop)  # the first coordinate that goes to column 0
            moves.append((slice(start, wrap), slice(rotation, rotation + wrap - start)))
            if wrap < stop:
                moves.append((slice(wrap, stop), slice(0, stop - wrap)))
        return _Plan(signs_p, moves)

    def _rows_ref(self, name: str) -> Tensor:
        sign_key, rotation_key = self._keys[name]
        rows_pK = torch.zeros(self._num_rows(name), self.dim)
        for i, row_K in enumerate(rows_pK):
            rotation = hash_index_ref(rotation_key, i // self.dim) % self.dim
            row_K[(i + rotation) % self.dim] = -1 if hash_index_ref(sign_key, i) >> 31 else 1
        return rows_pK
