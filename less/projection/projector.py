"""What every projection does: add Π_name · block to the features, one parameter at a time.

Π is linear: the features of a whole gradient are the sum over its parameters, and a parameter's gradient can
be freed as soon as it was added. The B×P matrix never exists.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from less.projection.config import ProjectionConfig
from less.projection.hashing import HASH_VERSION

if TYPE_CHECKING:
    from less.models import ParamLayout

__all__ = ["NoProjection", "Projector"]


class Projector(ABC):
    """A fixed P×K matrix Π that is never stored; rows by parameter, in the order of the layout."""

    def __init__(self, config: ProjectionConfig, layout: ParamLayout) -> None:
        self.config = config
        self.layout = layout

    @property
    def dim(self) -> int:
        """K, the width of the features."""
        return self.config.proj_dim

    def project_add_(self, out_BK: Tensor, block_Bp: Tensor, name: str) -> None:
        """Add the projection of one parameter's block to `out_BK`; the block is left as it was.

        Args:
            out_BK: (B, K) float32, changed in place.
            block_Bp: (B, p) float32, the parameter's gradients or update directions, each flattened.
            name: the parameter, one of `layout.names`.

        Raises:
            ValueError: a shape or dtype is not that.
        """
        columns = self.layout.slice(name)
        expected_Bp = (len(out_BK), columns.stop - columns.start)
        if tuple(block_Bp.shape) != expected_Bp or out_BK.shape[1:] != (self.dim,):
            raise ValueError(
                f"{name}: got a block of {tuple(block_Bp.shape)} for features of {tuple(out_BK.shape)}, "
                f"expected {expected_Bp} for (B, {self.dim})"
            )
        if out_BK.dtype != torch.float32 or block_Bp.dtype != torch.float32:
            raise ValueError(f"{name}: got {block_Bp.dtype} for {out_BK.dtype}, expected float32 for both")
        self._add_(out_BK, block_Bp, name)

    def matrix_ref(self) -> Tensor:
        """Π itself, (P, K) float32, from the slow definition of the hash: for small cases."""
        return torch.cat([self._rows_ref(name) for name in self.layout.names])

    def provenance(self) -> dict[str, str | int | None]:
        """All that decides Π beside the layout: features with equal provenance can be compared."""
        return {
            "kind": self.config.kind,
            "proj_dim": self.dim,
            "seed": self.config.seed,
            "version": HASH_VERSION,
        }

    def _num_rows(self, name: str) -> int:
        columns = self.layout.slice(name)
        return columns.stop - columns.start

    @abstractmethod
    def _add_(self, out_BK: Tensor, block_Bp: Tensor, name: str) -> None: ...

    @abstractmethod
    def _rows_ref(self, name: str) -> Tensor: ...


class NoProjection(Projector):
    """Π = 1 and K = P: each parameter goes to its own slice of the features."""

    @property
    def dim(self) -> int:
        """P."""
        return self.layout.num_params

    def provenance(self) -> dict[str, str | int | None]:
        """The kind and P: no randomness, so no seed."""
        return super().provenance() | {"seed": None, "version": None}

    def _add_(self, out_BK: Tensor, block_Bp: Tensor, name: str) -> None:
        out_BK[:, self.layout.slice(name)].add_(block_Bp)

    def _rows_ref(self, name: str) -> Tensor:
        return torch.eye(self.dim)[self.layout.slice(name)]
