"""A sample of a store's rows, recomputed exactly at one checkpoint after the other, beside what the store holds.

    g_ref     autograd, one row at a time, unpadded                        (`less.gradients.gradients_ref`)
    Γ_ref     the update rule's formula on g_ref, float64                  (`less.adam.update_direction_ref`)
    q_j       mean unit g_ref of some targets of subtask j; exact score: max_j Σ_c w_c ⟨Γ_ref/‖Γ_ref‖, q_j⟩

Against these stand the batched hooks, the prepared rule, and the stored norms and unit features. Each row is reduced as
soon as it is computed, to norms, errors, J products and K features. At one checkpoint there are held J queries, four
rows, Adam's moments and the prepared rule: about (J + 10) P numbers of 4 bytes beside the model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor

from datastore import RowTable
from datastore.coding import as_float32
from datastore.errors import DataError, ProvenanceError
from less.adam import NEEDS_MOMENTS, PreparedRule, update_direction_ref
from less.adapters import adapted_model, load_adapter_weights
from less.checkpoints import Checkpoint
from less.data.batching import BatchBudget, collate, plan_batches
from less.data.rendering import Rendered
from less.features import FeatureSet, FeatureSetConfig
from less.gradients import gradients_ref, per_sample_gradients
from less.influence import subtask_queries
from less.models import ParamLayout, layer_of, lora_parameters
from less.moments import AdamState, load_adam_state
from less.progress import Progress
from less.projection import Projector
from less.provenance import constants_of, recorded_projector
from less.scoring import Scorer
from less.verification.sampling import Probes, Sample

__all__ = ["Measured", "recompute"]

ROWS_AT_ONCE = 4
"""Rows in a batch of the fast path at most: as many reference gradients are held beside it."""

_NO_CONSTANTS = {"step": 0, "beta1": 0.0, "beta2": 0.0, "eps": 0.0}  # sgd and sign read none


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one checkpoint gave for S rows, J subtasks and K features; NaN where a row's gradient is not finite."""

    gradient_S: NDArray[np.float64]
    stored_gradient_norm_S: NDArray[np.float64]
    update_S: NDArray[np.float64]
    stored_update_norm_S: NDArray[np.float64]
    stored_features_S: NDArray[np.float64]
    grad_norms_S: NDArray[np.float64]
    exact_SJ: NDArray[np.float64]
    """Mean cosine of Γ_ref with the subtask's targets."""
    stored_SJ: NDArray[np.float64]
    """The same, by the store's unit rows and projected targets."""
    queries_JK: Tensor
    silent: list[str]
    """Parameters without a gradient in any row."""
    untrained: list[str]
    """Layers of them whose B is zero."""


def recompute(scorer: Scorer, rows: RowTable, sample: Sample, probes: Probes, *, progress: bool) -> list[Measured]:
    """What each checkpoint gives for the sample and the probes.

    Args:
        scorer: the store, its model and its checkpoints.
        rows: of the store.
        sample: the rows to recompute.
        probes: the targets.
        progress: show progress on standard error.

    Raises:
        DataError: a target has no direction.
        ProvenanceError: an optimizer state is not the one that the store was built with.
    """
    return _Recomputation(scorer, rows, sample, probes).measure(progress)


class _Recomputation:
    """A store, the model that it was built with, and what is sampled of it."""

    def __init__(self, scorer: Scorer, rows: RowTable, sample: Sample, probes: Probes) -> None:
        self.store, self.feature_set, self.checkpoints = scorer.store, scorer.feature_set, scorer.checkpoints
        self.base, self.rows, self.sample, self.probes = scorer.model, rows, sample, probes
        self.rule = self.store.settings["feature_sets"][self.feature_set]["update_rule"]
        self.num_targets = sum(map(len, probes.rendered))

    def measure(self, progress: bool) -> list[Measured]:
        """Everything that needs the model, checkpoint by checkpoint."""
        self._check_moments()
        total = (len(self.sample.rendered) + self.num_targets) * len(self.checkpoints)
        with (
            adapted_model(self.base, self.checkpoints[0].path) as model,
            Progress(total=total, description="exact gradients", enabled=progress) as bar,
        ):
            layout = ParamLayout.of(model, self.store.settings["model"]["layers"])
            projector = recorded_projector(self.store, self.feature_set, layout)
            found = []
            for checkpoint in self.checkpoints:
                load_adapter_weights(model, checkpoint.path)
                state = None
                if self.rule in NEEDS_MOMENTS:
                    state = load_adam_state(checkpoint.path, model, ParamLayout.of(model))
                found.append(self._measure(model, checkpoint, layout, projector, state, bar))
        return found

    def _measure(
        self,
        model: PeftModel,
        checkpoint: Checkpoint,
        layout: ParamLayout,
        projector: Projector,
        state: AdamState | None,
        bar: Progress,
    ) -> Measured:
        """One checkpoint, whose adapter the model carries."""
        device, rendered = model.device, self.sample.rendered
        num_rows, num_subtasks = len(rendered), len(self.probes.names)
        queries, queries_JK = self._queries(model, checkpoint, layout, projector, bar)
        config = FeatureSetConfig(update_rule=self.rule, projection=projector.config)
        rules = FeatureSet.prepare(config, layout, projector, state, device).rules
        stored = [self._stored(checkpoint, position) for position in self.sample.positions.tolist()]
        errors = {name: np.empty(num_rows) for name in ("gradient", "update", "features")}
        grad_norms_S, update_norms_S = np.empty(num_rows), np.empty(num_rows)
        exact_SJ = np.empty((num_rows, num_subtasks))
        speaking: set[str] = set()
        for members in _batches(rendered, self.store.settings["tokens_per_batch"], device):
            reference = []
            for row in members:
                _, blocks = gradients_ref(model, collate(rendered, [row]).to(device))
                blocks = {name: blocks[name] for name in layout.names}
                speaking.update(name for name, grads_1p in blocks.items() if grads_1p.any())
                exact = _exact_row(blocks, self.rule, state, rules, queries, projector)
                grad_norms_S[row], update_norms_S[row] = exact.grad_norm, exact.update_norm
                exact_SJ[row] = exact.products_J / exact.update_norm
                errors["update"][row] = _relative(exact.update_error, exact.update_norm)
                difference_K = stored[row].features_K * stored[row].norm - exact.features_K
                errors["features"][row] = _relative(np.linalg.norm(difference_K), np.linalg.norm(exact.features_K))
                reference.append(blocks)
            squares_B = _squared_differences(model, rendered, members, reference, layout)
            errors["gradient"][members] = np.sqrt(squares_B)
            errors["gradient"][members] = [_relative(errors["gradient"][row], grad_norms_S[row]) for row in members]
            bar.advance(len(members), sum(rendered[row].num_tokens for row in members))
        parameters = lora_parameters(model)
        silent = [name for name in layout.names if name not in speaking]
        units_SK = np.stack([row.features_K for row in stored])
        return Measured(
            gradient_S=errors["gradient"],
            stored_gradient_norm_S=_relative_norms([row.grad_norm for row in stored], grad_norms_S),
            update_S=errors["update"],
            stored_update_norm_S=_relative_norms([row.update_norm for row in stored], update_norms_S),
            stored_features_S=errors["features"],
            grad_norms_S=grad_norms_S,
            exact_SJ=exact_SJ,
            stored_SJ=units_SK.astype(np.float64) @ queries_JK.T.double().numpy(),
            queries_JK=queries_JK,
            silent=silent,
            untrained=[
                layer
                for layer in dict.fromkeys(map(layer_of, silent))
                if not parameters[f"{layer}.lora_B.weight"].any()
            ],
        )

    def _queries(
        self, model: PeftModel, checkpoint: Checkpoint, layout: ParamLayout, projector: Projector, bar: Progress
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Each subtask's mean unit plain gradient: whole, (J, p) by parameter; and of the projected ones, (J, K)."""
        device, num_subtasks = model.device, len(self.probes.names)
        queries = {
            name: torch.zeros(num_subtasks, size, device=device)
            for name, size in zip(layout.names, layout.sizes, strict=True)
        }
        features_MK = torch.zeros(self.num_targets, projector.dim, device=device)
        subtask_M: list[int] = []
        for j, targets in enumerate(self.probes.rendered):
            for target, where in zip(targets, self.probes.where[j], strict=True):
                _, blocks = gradients_ref(model, collate([target], [0]).to(device))
                norm = float(sum(blocks[name].double().square().sum() for name in layout.names)) ** 0.5
                if not 0 < norm < float("inf"):
                    raise DataError(
                        f"{where}: its gradient has norm {norm:g} at {checkpoint.name}, so there is no cosine with it; "
                        "leave it out of the targets, or have others chosen with --seed"
                    )
                for name in layout.names:
                    queries[name][j] += blocks[name][0] / (norm * len(targets))
                    projector.project_add_(features_MK[len(subtask_M)][None], blocks[name], name)
                subtask_M.append(j)
                bar.advance(1, target.num_tokens)
        queries_JK = subtask_queries(
            features_MK.cpu(), subtask_M, num_subtasks, aggregate="mean-of-cosines", normalize="cosine"
        )
        return queries, queries_JK

    def _stored(self, checkpoint: Checkpoint, position: int) -> "_StoredRow":
        source, row = int(self.rows.sources_N[position]), int(self.rows.rows_N[position])
        size = self.store.manifest.shard_rows
        start = row - row % size
        stop = min(start + size, self.store.sources[source].num_rows)
        shard = self.store.shard(self.store.manifest.shard_key(self.feature_set, checkpoint.name, source, start, stop))
        at = int(np.searchsorted(shard.rows_N, row))
        return _StoredRow(
            as_float32(shard.features_NK[at : at + 1])[0],
            float(shard.norms_N[at]),
            float(shard.grad_norms_N[at]),
            float(shard.update_norms_N[at]),
        )

    def _check_moments(self) -> None:
        """Raise `ProvenanceError` unless the optimizer states are those that the store was built with."""
        for checkpoint in self.checkpoints:
            expected = self.store.settings["checkpoints"][checkpoint.name]["optimizer_sha256"]
            if self.rule in NEEDS_MOMENTS and checkpoint.optimizer_sha256 not in (None, expected):
                raise ProvenanceError(
                    f"{checkpoint.path}: its optimizer state is not the one that {self.store.path} was built with: "
                    f"sha256 {checkpoint.optimizer_sha256[:12]}, expected {expected[:12]}. Give the right --checkpoints"
                )


@dataclass(frozen=True)
class _StoredRow:
    """What a store holds of a row at a checkpoint."""

    features_K: NDArray[np.float32]
    norm: float
    grad_norm: float
    update_norm: float


@dataclass(frozen=True)
class _ExactRow:
    """What a row's reference gradient was reduced to."""

    grad_norm: float
    update_norm: float
    update_error: float
    """‖Γ of the prepared rule - Γ_ref‖."""
    products_J: NDArray[np.float64]
    """⟨Γ_ref, q_j⟩."""
    features_K: NDArray[np.float32]
    """Π Γ_ref."""


def _exact_row(
    blocks: Mapping[str, Tensor],
    rule: str,
    state: AdamState | None,
    rules: Mapping[str, PreparedRule],
    queries: Mapping[str, Tensor],
    projector: Projector,
) -> _ExactRow:
    """Reduce a row's gradient, (1, p) float32 by parameter, parameter by parameter."""
    (num_subtasks, _), device = next(iter(queries.values())).shape, next(iter(blocks.values())).device
    squares_3 = torch.zeros(3, dtype=torch.float64, device=device)
    products_J = torch.zeros(num_subtasks, dtype=torch.float64, device=device)
    features_1K = torch.zeros(1, projector.dim, device=device)
    constants = constants_of(state) or _NO_CONSTANTS
    for name, grads_1p in blocks.items():
        m_p, v_p = (None, None) if state is None else (t[name].flatten().to(device) for t in (state.m, state.v))
        update_1p = update_direction_ref(rule, grads_1p, m_p, v_p, **constants)
        difference_1p = rules[name].apply_(grads_1p.clone()).double() - update_1p
        squares_3 += torch.stack([t.double().square().sum() for t in (grads_1p, update_1p, difference_1p)])
        products_J += queries[name].double() @ update_1p[0]
        projector.project_add_(features_1K, update_1p.float(), name)
    grad_norm, update_norm, update_error = squares_3.sqrt().tolist()
    return _ExactRow(grad_norm, update_norm, update_error, products_J.cpu().numpy(), features_1K[0].cpu().numpy())


def _squared_differences(
    model: PeftModel,
    rendered: Sequence[Rendered],
    members: Sequence[int],
    reference: Sequence[Mapping[str, Tensor]],
    layout: ParamLayout,
) -> NDArray[np.float64]:
    """‖g - g_ref‖² of each row, with g from one batch of the fast path."""
    squares_B = torch.zeros(len(members), dtype=torch.float64, device=model.device)

    def add_block(name: str, grads_Bp: Tensor) -> None:
        reference_Bp = torch.cat([blocks[name] for blocks in reference])
        squares_B.add_((grads_Bp.double() - reference_Bp.double()).square().sum(dim=1))

    per_sample_gradients(model, collate(rendered, members).to(model.device), add_block, layout.layers)
    return squares_B.cpu().numpy()


def _batches(rendered: Sequence[Rendered], max_tokens: int, device: torch.device) -> list[list[int]]:
    """Batches as a build's, but of a few rows."""
    planned = plan_batches([row.num_tokens for row in rendered], BatchBudget.on(device, max_tokens))
    return [batch[at : at + ROWS_AT_ONCE] for batch in planned for at in range(0, len(batch), ROWS_AT_ONCE)]


def _relative(error: float | np.floating, norm: float | np.floating) -> float:
    """No error is none even of nothing."""
    return 0.0 if error == 0 else float(np.divide(error, norm)) if norm else float("inf")


def _relative_norms(found: Sequence[float], exact_S: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.array([_relative(abs(one - norm), norm) for one, norm in zip(found, exact_S.tolist(), strict=True)])
