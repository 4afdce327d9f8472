"""The dense projection of the LESS paper: Π_ik = ±1/√K, independent, generated in tiles and never stored.

    sign of (i, k) = bit k mod 32 of absorb(hash(name, i), ⌊k/32⌋),   out += (1/√K) Σ_i g_i sign(i, ·)

One hashed word holds 32 signs; a set bit is -1. The column is a word of its own, so the counter does not
repeat where a 32-bit number of (i, k) would (P×K is 1.1e12 for a 7B model). Exact sum first, scale last.

    Var ⟨Πx, Πy⟩ = (‖x‖²‖y‖² + ⟨x, y⟩² - 2 Σ x_i² y_i²) / K

Achlioptas, 2003; Xia et al., 2024. A thousand times the work of `sparse` for the same error: for comparison.
"""

import torch
from torch import Tensor

from less.projection.hashing import absorb, hash_index, hash_index_ref, make_key
from less.projection.projector import Projector

__all__ = ["RademacherProjector"]


class RademacherProjector(Projector):
    """Needs no memory between calls; each call generates the parameter's p×K signs anew."""

    def _add_(self, out_BK: Tensor, block_Bp: Tensor, name: str) -> None:
        device, key = block_Bp.device, make_key(self.config.seed, name, "rademacher")
        if self._runs_kernels(device):
            from less.projection import kernels

            return kernels.add_rademacher_(out_BK, block_Bp, key)
        # 4 MB of signs stay in a CPU's cache; a GPU wants fewer and larger launches
        tile_rows = max(1, (2**20 if device.type == "cpu" else 2**24) // self.dim)
        words_p = hash_index(key, torch.arange(self._num_rows(name), device=device))
        sum_BK = torch.zeros_like(out_BK)
        for tile_Bt, words_t in zip(block_Bp.split(tile_rows, dim=1), words_p.split(tile_rows), strict=True):
            sum_BK.addmm_(tile_Bt, _signs(words_t, self.dim))
        out_BK.add_(sum_BK, alpha=self.dim**-0.5)

    def _rows_ref(self, name: str) -> Tensor:
        key = make_key(self.config.seed, name, "rademacher")
        num_words = -(-self.dim // 32)
        words_pW = [[hash_index_ref(key, i, w) for w in range(num_words)] for i in range(self._num_rows(name))]
        signs_pK = [[1 - 2 * (row[k // 32] >> k % 32 & 1) for k in range(self.dim)] for row in words_pW]
        return torch.tensor(signs_pK, dtype=torch.float32) * self.dim**-0.5


def _signs(words_t: Tensor, dim: int) -> Tensor:
    """Rows of ±1 from one hashed word a row: (t, dim) float32."""
    columns_W = torch.arange(-(-dim // 32), device=words_t.device)
    words_tW = absorb(words_t[:, None], columns_W).to(torch.int32)
    shifts = torch.arange(31, -1, -1, dtype=torch.int32, device=words_t.device)
    bits_tW32 = words_tW[:, :, None] << shifts  # bit k mod 32 is now float32's sign bit
    ones_tW32 = bits_tW32.bitwise_and_(-(2**31)).bitwise_or_(0x3F800000).view(torch.float32)
    return ones_tW32.flatten(1)[:, :dim]
