"""Gradient features: the whole method on one page.

    candidate z:  φ(z) = Π Γ(g(z))        target v:  ψ(v) = Π g(v)

g is the per-sample gradient of the LoRA parameters (`less.gradients`), Γ the direction in which Adam would
step with it (`less.adam`), Π one random projection P → K for both sides and every checkpoint
(`less.projection`); LESS, Xia et al. 2024, §4.1. Γ is elementwise and Π is linear, so both are applied to a
parameter's block while the backward pass is still on its way to the next: `Projector.add_updates_`, on a GPU
one kernel. What the features mean together is `less.influence`'s business.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from less.adam import PreparedRule, UpdateRule
from less.data.batching import Batch
from less.gradients import per_sample_gradients
from less.models import ParamLayout
from less.moments import AdamState
from less.projection import ProjectionConfig, Projector

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["BatchFeatures", "FeatureSet", "FeatureSetConfig", "gradient_features", "shared_direction"]


@dataclass(frozen=True, kw_only=True)
class FeatureSetConfig:
    """One kind of feature: an update rule and a projection. A store may hold several."""

    update_rule: str = "adam"
    """Γ: adam, adam-less, adam-no-momentum, sgd or sign."""
    projection: ProjectionConfig
    """Π."""

    @property
    def name(self) -> str:
        """Its label in the store, such as `adam-sparse`."""
        return f"{self.update_rule}-{self.projection.kind}"


@dataclass(frozen=True)
class FeatureSet:
    """A feature set made ready for one checkpoint: Γ with that checkpoint's moments, and Π."""

    name: str
    rules: dict[str, PreparedRule]
    """Γ of each parameter."""
    projector: Projector

    @classmethod
    def prepare(
        cls,
        config: FeatureSetConfig,
        layout: ParamLayout,
        projector: Projector,
        state: AdamState | None,
        device: torch.device,
    ) -> "FeatureSet":
        """Fold a checkpoint's moments into Γ's coefficients; `state` may be None for `sgd` and `sign`."""
        rule = UpdateRule.of(config.update_rule, state)
        moments = {name: (state.m[name], state.v[name]) if state else (None, None) for name in layout.names}
        rules = {
            name: rule.prepare(*(t if t is None else t.flatten().to(device) for t in moments[name]))
            for name in layout.names
        }
        return cls(config.name, rules, projector)


@dataclass(frozen=True)
class BatchFeatures:
    """What one batch of B rows gives; everything float32, on the model's device."""

    losses_B: Tensor
    """Mean negative log-likelihood over each row's supervised tokens."""
    grad_norms_B: Tensor
    """‖g‖ of each row."""
    update_norms_B: dict[str, Tensor]
    """‖Γ‖ of each row, by feature set."""
    features_BK: dict[str, Tensor]
    """φ (or ψ) of each row, not normalised, by feature set."""


def gradient_features(model: "PeftModel", batch: Batch, feature_sets: Sequence[FeatureSet]) -> BatchFeatures:
    """One forward and one backward pass of a batch, for every feature set at once.

    Args:
        model: a LoRA model from `less.adapters.adapted_model`.
        batch: B rows.
        feature_sets: one or more, made ready for the checkpoint whose adapter the model carries, of one layout.

    Raises:
        UnsupportedError: see `less.gradients.per_sample_gradients`.
    """
    num_rows, device = batch.input_ids_BT.shape[0], batch.input_ids_BT.device
    sums = {fs.name: fs.projector.new_sums(num_rows, device) for fs in feature_sets}

    def add_block(name: str, grads_Bp: Tensor) -> None:
        for fs in feature_sets:  # φ += Π Γ(g), with ‖g‖² and ‖Γ‖²
            wanted_again = fs is not feature_sets[-1]
            fs.projector.add_updates_(sums[fs.name], grads_Bp, name, fs.rules[name], keep=wanted_again)

    losses_B = per_sample_gradients(model, batch, add_block, feature_sets[0].projector.layout.layers)
    return BatchFeatures(
        losses_B=losses_B,
        grad_norms_B=sums[feature_sets[0].name].grad_norms_B,
        update_norms_B={name: own.update_norms_B for name, own in sums.items()},
        features_BK={name: own.features_BK for name, own in sums.items()},
    )


def shared_direction(feature_set: FeatureSet, layout: ParamLayout, device: torch.device) -> Tensor:
    """Π Γ(0): the part of every row's feature that the moments alone decide.

    Returns:
        direction_K, float32; zero for rules without momentum.
    """
    direction_1K = torch.zeros(1, feature_set.projector.dim, device=device)
    for name, size in zip(layout.names, layout.sizes, strict=True):
        nothing_1P = torch.zeros(1, size, device=device)
        feature_set.projector.project_add_(direction_1K, feature_set.rules[name].apply_(nothing_1P), name)
    return direction_1K[0]
