"""Verify a datastore: recompute a sample of its rows by the slow reference and compare.

    g_ref     autograd, one row at a time, unpadded                        (`less.gradients.gradients_ref`)
    Γ_ref     the update rule's formula on g_ref, float64                  (`less.adam.update_direction_ref`)
    q_j       mean unit g_ref of some targets of subtask j; exact score: max_j Σ_c w_c ⟨Γ_ref/‖Γ_ref‖, q_j⟩

Against these stand the batched hooks, the prepared rule, and what the store holds: norms and unit features.
Each row is reduced as soon as it is computed, to norms, errors, J products and K features. At one checkpoint there are
held J queries, four rows, Adam's moments and the prepared rule: about (J + 10) P numbers of 4 bytes beside the model.
What the numbers mean is `less.certificate`'s business.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from datastore import Datastore, RowTable, ShardKey
from datastore.errors import DataError, ProvenanceError, SettingError
from less.adam import NEEDS_MOMENTS, PreparedRule, update_direction_ref
from less.adapters import adapted_model, load_adapter_weights
from less.certificate import Certificate, Errors, check_bounds
from less.checkpoints import Checkpoint
from less.checksums import verify_files
from less.contamination import NearDuplicate, near_duplicates
from less.data.batching import BatchBudget, collate, plan_batches
from less.data.conversations import RowProblem
from less.data.records import Record, open_source
from less.data.rendering import Rendered, Renderer
from less.data.targets import TargetSet
from less.features import FeatureSet, FeatureSetConfig
from less.gradients import gradients_ref, per_sample_gradients
from less.influence import influence_scores, subtask_queries
from less.models import ParamLayout, layer_of, lora_parameters
from less.moments import AdamState, load_adam_state
from less.pool import Pool, open_sources
from less.progress import Progress
from less.projection import Projector
from less.provenance import constants_of, recorded_projector
from less.scoring import ScoreConfig, Scorer
from less.statistics import bootstrap, r_squared, spearman, top_overlap

__all__ = ["VerifyConfig", "verify"]

MAX_SUBTASKS = 8
TARGETS_EACH = 2
ROWS_AT_ONCE = 4
"""Rows in a batch of the fast path at most: as many reference gradients are held beside it."""
TOP = 0.2
"""Of the sample, the rows that count as its best."""

_NO_CONSTANTS = {"step": 0, "beta1": 0.0, "beta2": 0.0, "eps": 0.0}  # sgd and sign read none


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Settings of a verification."""

    sample: int = 64
    """Rows to recompute."""
    feature_set: str | None = None
    """Which of the store's feature sets; needed where it has several."""
    seed: int = 0
    """Chooses the sample, and the targets where there are many."""
    require: Mapping[str, float] | None = None
    """Bounds by name, see `less.certificate.BOUNDS`; `Certificate.missed` lists those that are not kept."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    trust_remote_code: bool = False
    """Let code that comes with the model run."""

    def __post_init__(self) -> None:
        if self.sample < 2:
            raise SettingError(f"sample must be at least 2 rows, got {self.sample}")
        if self.seed < 0:
            raise SettingError(f"seed must be at least 0, got {self.seed}")
        check_bounds(self.require or {})


def verify(
    *,
    datastore: "str | Path | Datastore",
    targets: Any = None,
    data: Any = None,
    model: "str | Path | PreTrainedModel | None" = None,
    tokenizer: "str | Path | PreTrainedTokenizerBase | None" = None,
    checkpoints: "str | Path | Sequence[str | Path] | None" = None,
    progress: bool = True,
    **settings: Any,
) -> Certificate:
    """Check a store's files, recompute a sample of its rows exactly, and report what its numbers are worth.

    A row costs two passes a checkpoint, one of them by itself. Without targets, 8 other rows of the store stand in for
    them. With targets, at most 2 of each of at most 8 subtasks are used, chosen by the seed, and the whole pool is
    searched for near-duplicates of all of them.

    Args:
        datastore: a sealed store of gradients.
        targets: a file, data set or list of dicts; several as a list, or as a dict that names them.
        data: the pool, where it is not where the build found it (needed for rows given in memory).
        model, tokenizer, checkpoints: where they are not where the build found them.
        progress: show progress on standard error.
        **settings: fields of `VerifyConfig`.

    Raises:
        DamagedStoreError: a file is not as it was sealed.
        DataError: no usable target, a target without a direction, or the pool has changed since the build.
        ProvenanceError: the model, a checkpoint or its optimizer state is not the one that the store was built with.
        SettingError: the store holds embeddings; a bound has no such name, or needs targets.
    """
    config = VerifyConfig(**settings)
    if targets is None and "contaminated" in (config.require or {}):
        raise SettingError("contaminated is required and there are no targets to look for; give them with --targets")
    store = datastore if isinstance(datastore, Datastore) else Datastore.open(datastore)
    _refuse_embeddings(store, config.feature_set)
    verify_files(store, progress=progress)
    pool = Pool(store, data)
    scorer = Scorer(
        store,
        ScoreConfig(feature_set=config.feature_set, device=config.device, trust_remote_code=config.trust_remote_code),
        model,
        tokenizer,
        checkpoints,
        progress,
    )
    rows = store.rows(scorer.feature_set)
    generator = np.random.default_rng(config.seed)
    positions = generator.permutation(store.num_rows)
    if targets is None:
        num_probes = min(MAX_SUBTASKS, store.num_rows // 2)
        if not num_probes:
            raise DataError(f"{store.path} has one row, and no other to score it with; give targets with --targets")
        probes = _rows_as_probes(_opened(pool, rows, positions[:num_probes], scorer.renderer))
        positions = positions[num_probes:]
    else:
        probes = _choose_probes(scorer.load_targets(targets), generator)
    sample = _opened(pool, rows, np.sort(positions[: config.sample]), scorer.renderer)
    verifier = _Verifier(scorer, rows, sample, probes)
    found = verifier.measure(progress)
    contaminated = None
    if targets is not None:
        with Progress(total=sum(s.num_rows for s in pool.sources), description="pool", enabled=progress) as bar:
            contaminated = _contamination(targets, pool, bar)
    return verifier.certificate(found, config, progress=progress, contaminated=contaminated)


@dataclass(frozen=True)
class _Sample:
    """Rows of the store; the three run in parallel."""

    positions: NDArray[np.int64]
    records: list[Record]
    rendered: list[Rendered]


@dataclass(frozen=True)
class _Probes:
    """The targets of each of J subtasks; the three run in parallel."""

    names: list[str]
    rendered: list[list[Rendered]]
    where: list[list[str]]
    num_subtasks: int | None
    """Of which these were chosen; None for rows of the store."""


@dataclass(frozen=True, kw_only=True)
class _Measured:
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


def _refuse_embeddings(store: Datastore, feature_set: str | None) -> None:
    for name, entry in store.settings["feature_sets"].items():
        if feature_set in (None, name) and "update_rule" not in entry:
            raise SettingError(
                f"{name} of {store.path} holds embeddings, there is no gradient to verify; "
                "`gradsift inspect --verify` checks its files"
            )


def _opened(pool: Pool, rows: RowTable, positions: NDArray[np.int64], renderer: Renderer) -> _Sample:
    """The rows at these positions as the build saw them."""
    records = pool.take(rows, positions)
    rendered = []
    for record in records:
        try:
            rendered.append(renderer.render_record(record))
        except RowProblem as problem:
            raise ProvenanceError(
                f"{record.where} has features in the store and cannot be rendered now ({problem}). "
                "Use the version and the tokenizer that built it, or build it again"
            ) from None
    return _Sample(positions, records, rendered)


def _rows_as_probes(sample: _Sample) -> _Probes:
    where = [record.where for record in sample.records]
    return _Probes(where, [[row] for row in sample.rendered], [[place] for place in where], None)


def _choose_probes(target_sets: Sequence[TargetSet], generator: np.random.Generator) -> _Probes:
    """Some targets of some subtasks."""
    subtasks = [(t, subtask) for t in target_sets for subtask in t.subtasks]
    probes = _Probes([], [], [], len(subtasks))
    for number in np.sort(generator.permutation(len(subtasks))[:MAX_SUBTASKS]).tolist():
        target_set, subtask = subtasks[number]
        members = [n for n, own in enumerate(target_set.subtask_of) if own == subtask]
        picked = [members[n] for n in np.sort(generator.permutation(len(members))[:TARGETS_EACH]).tolist()]
        probes.names.append(f"{target_set.name}/{subtask}")
        probes.rendered.append([target_set.rendered[n] for n in picked])
        probes.where.append([target_set.where_of[n] for n in picked])
    return probes


def _contamination(targets: Any, pool: Pool, bar: Progress) -> tuple[NearDuplicate, ...]:
    parts = targets.values() if isinstance(targets, Mapping) else None
    sources = open_sources(targets) if parts is None else [open_source(part) for part in parts]

    def counted() -> Any:
        for source in pool.sources:
            for record in source.iter_records():
                bar.advance()
                yield record

    return tuple(near_duplicates((record for source in sources for record in source.iter_records()), counted()))


class _Verifier:
    """A store, the model that it was built with, and what is sampled of it."""

    def __init__(self, scorer: Scorer, rows: RowTable, sample: _Sample, probes: _Probes) -> None:
        self.store, self.feature_set, self.checkpoints = scorer.store, scorer.feature_set, scorer.checkpoints
        self.base, self.rows, self.sample, self.probes = scorer.model, rows, sample, probes
        self.rule = self.store.settings["feature_sets"][self.feature_set]["update_rule"]
        self.num_targets = sum(map(len, probes.rendered))

    def measure(self, progress: bool) -> list[_Measured]:
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

    def certificate(
        self,
        found: Sequence[_Measured],
        config: VerifyConfig,
        *,
        progress: bool,
        contaminated: tuple[NearDuplicate, ...] | None,
    ) -> Certificate:
        """Statistics over checkpoints and rows, and over all rows of the store."""
        store, settings = self.store, self.store.settings
        weights_C = np.array([checkpoint.weight for checkpoint in self.checkpoints])
        exact_CSJ, stored_CSJ = np.stack([m.exact_SJ for m in found]), np.stack([m.stored_SJ for m in found])
        grad_norms_CS = np.stack([m.grad_norms_S for m in found])
        finite_S = np.isfinite(exact_CSJ).all(axis=(0, 2))
        exact_N, stored_N = (
            np.einsum("c,csj->sj", weights_C, cosines_CSJ[:, finite_S]).max(axis=1)
            for cosines_CSJ in (exact_CSJ, stored_CSJ)
        )
        num_top = ceil(TOP * len(exact_N))
        where = tuple(record.where for record in self.sample.records)
        return Certificate(
            datastore=store.path,
            feature_set=self.feature_set,
            num_rows=store.num_rows,
            num_files=len(store.manifest.files),
            seed=config.seed,
            dtype=settings["model"]["dtype"],
            feature_dtype=settings["feature_sets"][self.feature_set]["dtype"],
            projection=settings["feature_sets"][self.feature_set]["projection"]["kind"],
            proj_dim=store.proj_dim(self.feature_set),
            checkpoints=tuple(store.checkpoints),
            rows=where,
            queries=dict(zip(self.probes.names, map(tuple, self.probes.where), strict=True)),
            num_subtasks=self.probes.num_subtasks,
            gradient=self._errors([m.gradient_S for m in found]),
            stored_gradient_norm=self._errors([m.stored_gradient_norm_S for m in found]),
            update=self._errors([m.update_S for m in found]),
            stored_update_norm=self._errors([m.stored_update_norm_S for m in found]),
            stored_features=self._errors([m.stored_features_S for m in found]),
            cosine=float(np.sqrt(np.square((stored_CSJ - exact_CSJ)[:, finite_S]).mean())),
            spearman=bootstrap(spearman, stored_N, exact_N),
            top_overlap=bootstrap(lambda x_N, y_N: top_overlap(x_N, y_N, num_top), stored_N, exact_N),
            num_top=num_top,
            zero_gradients=tuple(where[s] for s in np.flatnonzero((grad_norms_CS == 0).any(axis=0))),
            not_finite=tuple(where[s] for s in np.flatnonzero(~np.isfinite(grad_norms_CS).all(axis=0))),
            skipped=store.manifest.counts["num_skipped"],
            zero_parameters={
                name: tuple(m.silent) for name, m in zip(store.checkpoints, found, strict=True) if m.silent
            },
            untrained=tuple(dict.fromkeys(layer for m in found for layer in m.untrained)),
            explained=self._explained([m.queries_JK for m in found], progress),
            contaminated=contaminated,
            require=dict(config.require or {}),
        )

    def _measure(
        self,
        model: PeftModel,
        checkpoint: Checkpoint,
        layout: ParamLayout,
        projector: Projector,
        state: AdamState | None,
        bar: Progress,
    ) -> _Measured:
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
        return _Measured(
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
        shard = self.store.shard(
            ShardKey(feature_set=self.feature_set, checkpoint=checkpoint.name, source=source, start=start, stop=stop)
        )
        at = int(np.searchsorted(shard.rows_N, row))
        return _StoredRow(
            shard.features_NK[at].astype(np.float32),
            float(shard.norms_N[at]),
            float(shard.grad_norms_N[at]),
            float(shard.update_norms_N[at]),
        )

    def _explained(self, queries: Sequence[Tensor], progress: bool) -> dict[str, float]:
        """R² of the score of all rows, from the store alone."""
        names = [checkpoint.name for checkpoint in self.checkpoints]
        weights = {checkpoint.name: checkpoint.weight for checkpoint in self.checkpoints}
        directions = {name: torch.from_numpy(self.store.direction(self.feature_set, name).copy()) for name in names}
        with_direction = {
            name: torch.cat([queries_JK, _unit(directions[name])[None]])
            for name, queries_JK in zip(names, queries, strict=True)
        }
        scores_NJ = influence_scores(self.store, self.feature_set, with_direction, weights, progress=progress)
        score_N, momentum_N = scores_NJ[:, :-1].max(axis=1), scores_NJ[:, -1]
        norm_N = np.zeros(self.store.num_rows)
        for name in names:
            grad_norms_N = self.store.stats(self.feature_set, name).grad_norms_N
            norm_N += weights[name] * np.log(np.maximum(grad_norms_N, np.finfo(np.float32).tiny))
        columns = {"length": np.log(self.rows.num_supervised_N), "norm": norm_N}
        if any(direction_K.any() for direction_K in directions.values()):
            columns["momentum"] = momentum_N
        return {
            "length": r_squared(score_N, [columns["length"]]),
            "norm": r_squared(score_N, [columns["norm"]]),
            "momentum": r_squared(score_N, [columns["momentum"]]) if "momentum" in columns else float("nan"),
            "all": r_squared(score_N, list(columns.values())),
        }

    def _errors(self, errors: Sequence[NDArray[np.float64]]) -> Errors:
        errors_CS = np.nan_to_num(np.stack(errors), nan=np.inf, posinf=np.inf)
        c, s = np.unravel_index(errors_CS.argmax(), errors_CS.shape)
        return Errors(
            worst=float(errors_CS[c, s]),
            median=float(np.median(errors_CS)),
            where=f"{self.sample.records[s].where} at {self.checkpoints[c].name}",
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


def _unit(vector_K: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vector_K, dim=0, eps=torch.finfo(torch.float32).tiny)
