"""What every projection does: add Π_name · block to the features, one parameter at a time.

Π is linear: the features of a whole gradient are the sum over its parameters, and a parameter's gradient can
be freed as soon as it was added. The B×P matrix never exists.

What is written here is PyTorch, for any device, and the reference. On CUDA, where there is Triton, `sparse` and
`rademacher` call `kernels` instead, for the same Π.
"""

from __future__ import annotations

import os
import shutil
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from less.projection.config import ProjectionConfig
from less.projection.hashing import HASH_VERSION

if TYPE_CHECKING:
    from less.adam import PreparedRule
    from less.models import ParamLayout

__all__ = ["FeatureSums", "NoProjection", "Projector"]


@dataclass(frozen=True)
class FeatureSums:
    """What a batch of B rows adds up for one feature set, parameter by parameter; float32, on one device.

    Each is the sum of its S parts, which need not be equally many: programs of a GPU that run side by side
    add to a part of their own, so that no result depends on which comes first.
    """

    features_SBK: Tensor
    """Π Γ(g)."""
    grad_squares_SB: Tensor
    """‖g‖²."""
    update_squares_SB: Tensor
    """‖Γ(g)‖²."""

    @classmethod
    def zeros(
        cls, num_rows: int, dim: int, device: torch.device, *, parts: int = 1, square_parts: int = 1
    ) -> FeatureSums:
        """Nothing added yet."""
        return cls(
            torch.zeros(parts, num_rows, dim, device=device),
            torch.zeros(square_parts, num_rows, device=device),
            torch.zeros(square_parts, num_rows, device=device),
        )

    @property
    def features_BK(self) -> Tensor:
        """Π Γ(g) of each row."""
        return self.features_SBK[0] if len(self.features_SBK) == 1 else self.features_SBK.sum(0)

    @property
    def grad_norms_B(self) -> Tensor:
        """‖g‖ of each row."""
        return self.grad_squares_SB.sum(0).sqrt()

    @property
    def update_norms_B(self) -> Tensor:
        """‖Γ(g)‖ of each row."""
        return self.update_squares_SB.sum(0).sqrt()


class Projector(ABC):
    """A fixed P×K matrix Π that is never stored; rows by parameter, in the order of the layout."""

    def __init__(self, config: ProjectionConfig, layout: ParamLayout) -> None:
        self.config = config
        self.layout = layout

    @property
    def dim(self) -> int:
        """K, the width of the features."""
        return self.config.proj_dim

    def new_sums(self, num_rows: int, device: torch.device) -> FeatureSums:
        """Zeros for a batch of B rows, to be filled by `add_updates_` with every parameter once."""
        return FeatureSums.zeros(num_rows, self.dim, device)

    def add_updates_(
        self, sums: FeatureSums, grads_Bp: Tensor, name: str, rule: PreparedRule, *, keep: bool = True
    ) -> None:
        """Add Π Γ(g), ‖g‖² and ‖Γ(g)‖² of one parameter's gradients to `sums`.

        Args:
            sums: from `new_sums`, changed in place.
            grads_Bp: (B, p) float32.
            name: the parameter, one of `layout.names`.
            rule: Γ of this parameter.
            keep: whether the gradients are wanted afterwards; else they may be overwritten.

        Raises:
            ValueError: a shape or dtype is not that.
        """
        sums.grad_squares_SB[0].add_(_squared_norms(grads_Bp))
        updates_Bp = rule.apply_(grads_Bp.clone() if keep else grads_Bp)
        sums.update_squares_SB[0].add_(_squared_norms(updates_Bp))
        self.project_add_(sums.features_SBK[0], updates_Bp, name)

    def project_add_(self, out_BK: Tensor, block_Bp: Tensor, name: str) -> None:
        """Add the projection of one parameter's block to `out_BK`; the block is left as it was.

        Args:
            out_BK: (B, K) float32, changed in place.
            block_Bp: (B, p) float32, the parameter's gradients or update directions, each flattened.
            name: the parameter, one of `layout.names`.

        Raises:
            ValueError: a shape or dtype is not that.
        """
        self._check(out_BK, block_Bp, name)
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

    @staticmethod
    def _runs_kernels(device: torch.device) -> bool:
        """Whether `kernels` does the work on this device."""
        return device.type == "cuda" and _has_triton() and _kernels_agree(device)

    def _check(self, out_BK: Tensor, block_Bp: Tensor, name: str) -> None:
        expected_Bp = (len(out_BK), self._num_rows(name))
        if tuple(block_Bp.shape) != expected_Bp or out_BK.shape[1:] != (self.dim,):
            raise ValueError(
                f"{name}: got a block of {tuple(block_Bp.shape)} for features of {tuple(out_BK.shape)}, "
                f"expected {expected_Bp} for (B, {self.dim})"
            )
        if out_BK.dtype != torch.float32 or block_Bp.dtype != torch.float32:
            raise ValueError(f"{name}: got {block_Bp.dtype} for {out_BK.dtype}, expected float32 for both")

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


def _squared_norms(block_Bp: Tensor) -> Tensor:
    return torch.linalg.vector_norm(block_Bp, dim=1).square()


@cache
def _has_triton() -> bool:
    """Triton, and the C compiler that it calls."""
    return find_spec("triton") is not None and any(map(shutil.which, (os.environ.get("CC", "gcc"), "clang")))


@cache
def _kernels_agree(device: torch.device) -> bool:
    """Tried out once a device: a kernel that is compiled wrongly there costs speed, never right numbers."""
    from less.projection import kernels

    try:
        agree = kernels.agree_with_twins(device)
    except Exception as error:  # a compiler for every GPU and driver may fail in every way
        agree, problem = False, f"{type(error).__name__}: {error}"
    else:
        problem = "their numbers differ"
    if not agree:
        warnings.warn(f"Triton's kernels are not used on {device}, PyTorch is slower: {problem}", stacklevel=2)
    return agree
