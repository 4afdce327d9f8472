"""`verify`: recompute a sample of a datastore's rows by the slow reference, and say what its numbers are worth.

What is recomputed and how is `recompute`'s business, what is sampled, `sampling`'s, what the findings mean,
`certificate`'s. Statistics over checkpoints and rows are made here: of the sample, how far errors go and how well
scores agree; of all rows, from the store alone, what else explains the scores.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from datastore import Datastore, RowTable
from datastore.errors import DataError, SettingError
from less.data.records import open_source
from less.pool import Pool, open_sources
from less.progress import Progress
from less.scan import influence_scores
from less.scoring import ScoreConfig, Scorer
from less.statistics import bootstrap, r_squared, spearman, top_overlap
from less.verification.certificate import Certificate, Errors, check_bounds
from less.verification.checksums import verify_files
from less.verification.contamination import NearDuplicate, near_duplicates
from less.verification.recompute import Measured, recompute
from less.verification.sampling import MAX_SUBTASKS, Probes, Sample, choose_probes, open_sample, rows_as_probes

__all__ = ["VerifyConfig", "verify"]

TOP = 0.2
"""Of the sample, the rows that count as its best."""


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
        probes = rows_as_probes(open_sample(pool, rows, positions[:num_probes], scorer.renderer))
        positions = positions[num_probes:]
    else:
        probes = choose_probes(scorer.load_targets(targets), generator)
    sample = open_sample(pool, rows, np.sort(positions[: config.sample]), scorer.renderer)
    found = recompute(scorer, rows, sample, probes, progress=progress)
    contaminated = None
    if targets is not None:
        with Progress(total=store.num_rows, description="pool", enabled=progress) as bar:
            contaminated = _contamination(targets, pool, rows, bar)
    audit = _Audit(scorer, rows, sample, probes, found)
    return audit.certificate(config, contaminated, progress=progress)


class _Audit:
    """What was sampled of a store, and what each checkpoint gave for it."""

    def __init__(
        self, scorer: Scorer, rows: RowTable, sample: Sample, probes: Probes, found: Sequence[Measured]
    ) -> None:
        self.store, self.feature_set, self.checkpoints = scorer.store, scorer.feature_set, scorer.checkpoints
        self.rows, self.sample, self.probes, self.found = rows, sample, probes, found

    def certificate(
        self, config: VerifyConfig, contaminated: tuple[NearDuplicate, ...] | None, *, progress: bool
    ) -> Certificate:
        """Statistics over checkpoints and rows, and over all rows of the store."""
        store, settings = self.store, self.store.settings
        weights_C = np.array([checkpoint.weight for checkpoint in self.checkpoints])
        exact_CSJ, stored_CSJ = np.stack([m.exact_SJ for m in self.found]), np.stack([m.stored_SJ for m in self.found])
        grad_norms_CS = np.stack([m.grad_norms_S for m in self.found])
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
            gradient=self._errors([m.gradient_S for m in self.found]),
            stored_gradient_norm=self._errors([m.stored_gradient_norm_S for m in self.found]),
            update=self._errors([m.update_S for m in self.found]),
            stored_update_norm=self._errors([m.stored_update_norm_S for m in self.found]),
            stored_features=self._errors([m.stored_features_S for m in self.found]),
            cosine=float(np.sqrt(np.square((stored_CSJ - exact_CSJ)[:, finite_S]).mean())),
            spearman=bootstrap(spearman, stored_N, exact_N),
            top_overlap=bootstrap(lambda x_N, y_N: top_overlap(x_N, y_N, num_top), stored_N, exact_N),
            num_top=num_top,
            zero_gradients=tuple(where[s] for s in np.flatnonzero((grad_norms_CS == 0).any(axis=0))),
            not_finite=tuple(where[s] for s in np.flatnonzero(~np.isfinite(grad_norms_CS).all(axis=0))),
            skipped=store.manifest.counts["num_skipped"],
            zero_parameters={
                name: tuple(m.silent) for name, m in zip(store.checkpoints, self.found, strict=True) if m.silent
            },
            untrained=tuple(dict.fromkeys(layer for m in self.found for layer in m.untrained)),
            explained=self._explained([m.queries_JK for m in self.found], progress),
            contaminated=contaminated,
            require=dict(config.require or {}),
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


def _refuse_embeddings(store: Datastore, feature_set: str | None) -> None:
    for name, entry in store.settings["feature_sets"].items():
        if feature_set in (None, name) and "update_rule" not in entry:
            raise SettingError(
                f"{name} of {store.path} holds embeddings, there is no gradient to verify; "
                "`gradsift inspect --verify` checks its files"
            )


def _contamination(targets: Any, pool: Pool, rows: RowTable, bar: Progress) -> tuple[NearDuplicate, ...]:
    """Among the rows that can be selected: not those that are skipped, or deleted from the store."""
    parts = targets.values() if isinstance(targets, Mapping) else None
    sources = open_sources(targets) if parts is None else [open_source(part) for part in parts]

    def counted() -> Any:
        for record in pool.iter_records(rows):
            bar.advance()
            yield record

    return tuple(near_duplicates((record for source in sources for record in source.iter_records()), counted()))


def _unit(vector_K: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vector_K, dim=0, eps=torch.finfo(torch.float32).tiny)
