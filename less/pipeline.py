"""From a pool and its checkpoints to a sealed datastore.

For each checkpoint, for each range of `shard_rows` source rows: compute one shard for each feature set
(`less.row_ranges`) and write it, while the next range is rendered. What the store has already is not computed
again, so a build that was killed goes on where it was, and a store grows by the rows that are new. With a prefilter
a cheap store is built first, in the same way, and ranks the rows. Which rows are worth more is `less.prefilter`'s
business, what a shard looks like on disk `datastore`'s, how features are computed `less.features`'.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from datastore import Build, Datastore, DatastoreWriter, Shard, ShardKey, SkippedRow, check_free_space
from datastore.build import BUILD
from datastore.coding import check_feature_dtype, row_bytes
from datastore.errors import DataError, SettingError, StoreError
from datastore.overlap import WriteBehind, read_ahead
from datastore.shards import set_rows_aside
from less.adam import NEEDS_MOMENTS, UPDATE_RULES
from less.adapters import adapted_model, load_adapter_weights
from less.checkpoints import Checkpoint, as_paths, find_checkpoints
from less.data.batching import BatchBudget
from less.data.records import Source
from less.data.rendering import Renderer
from less.features import FeatureSet, FeatureSetConfig, gradient_features, shared_direction
from less.loading import LoadingConfig, load_model
from less.models import ParamLayout
from less.moments import AdamState, load_adam_state
from less.pool import entry_of, open_sources
from less.prefilter import (
    EVERY_ROW,
    Shortlist,
    cheap_folder,
    check_prefilter,
    describe_prefilter,
    rank_rows,
    recorded_shortlist,
)
from less.progress import Progress
from less.projection import ProjectionConfig, make_projector
from less.provenance import constants_of, record_environment, record_settings
from less.row_ranges import RowRange, compute_shards, render_range
from less.scoring import ScoreConfig, load_target_sets

if TYPE_CHECKING:
    import datasets

__all__ = ["BuildConfig", "BuildResult", "build_datastore"]


@dataclass(frozen=True, kw_only=True)
class BuildConfig(LoadingConfig):
    """Settings of a build. All that decides the features is held by the store."""

    update_rule: str | Sequence[str] = "adam"
    """Γ: adam, adam-less, adam-no-momentum, sgd or sign; several fill several feature sets."""
    projection: str | Sequence[str] = "sparse"
    """Π: sparse, rademacher or none; several are combined with every update rule."""
    proj_dim: int = 32768
    """K."""
    seed: int = 0
    """Chooses Π."""
    layers: str = "all"
    """LoRA layers whose gradients count: all, last:N (those of the last N blocks; the backward pass ends there), or a
    regular expression searched in their names."""
    prefilter: float | None = None
    """Fraction of the rows that get these features: those that cheap ones rank best for the targets. None: all."""
    prefilter_layers: str | None = None
    """LoRA layers of the cheap features; None for those of `layers`."""
    shard_rows: int = 1024
    """Source rows in one shard: what a killed build loses at most."""
    feature_dtype: str = "auto"
    """Of stored unit rows: float32, float16, int8, int4, binary, or auto (float32 for projection none, else int8)."""
    checkpoint_weights: Sequence[float] | None = None
    """w_c, in place of the mean learning rates of the checkpoints' logs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for rule in self.update_rules:
            if rule not in UPDATE_RULES:
                raise SettingError(f"update rule must be one of {', '.join(UPDATE_RULES)}, got {rule!r}")
        if self.shard_rows < 1:
            raise SettingError(f"shard_rows must be at least 1, got {self.shard_rows}")
        if self.feature_dtype != "auto":
            check_feature_dtype(self.feature_dtype)
        if self.prefilter is not None and not 0 < self.prefilter <= 1:
            raise SettingError(f"prefilter must be above 0 and at most 1, got {self.prefilter}")
        if self.prefilter is None and self.prefilter_layers is not None:
            raise SettingError(
                f"prefilter_layers is {self.prefilter_layers!r} and there is no prefilter; give the fraction of the "
                "rows to keep with --prefilter, or leave out --prefilter-layers"
            )
        names = [fs.name for fs in self.feature_sets]
        if repeated := [name for name, count in Counter(names).items() if count > 1]:
            raise SettingError(f"feature set {repeated[0]} is asked for twice")

    @property
    def update_rules(self) -> tuple[str, ...]:
        """The update rules as a tuple."""
        return (self.update_rule,) if isinstance(self.update_rule, str) else tuple(self.update_rule)

    @property
    def feature_sets(self) -> tuple[FeatureSetConfig, ...]:
        """Every update rule with every projection."""
        kinds = (self.projection,) if isinstance(self.projection, str) else tuple(self.projection)
        return tuple(
            FeatureSetConfig(
                update_rule=rule,
                projection=ProjectionConfig(kind=kind, proj_dim=self.proj_dim, seed=self.seed),
            )
            for rule in self.update_rules
            for kind in kinds
        )

    @property
    def cheap(self) -> "BuildConfig":
        """Settings of the prefilter's own store: one feature set, projected, of its layers."""
        first = self.feature_sets[0]
        return replace(
            self,
            update_rule=first.update_rule,
            projection="sparse" if first.projection.kind == "none" else first.projection.kind,
            layers=self.layers if self.prefilter_layers is None else self.prefilter_layers,
            prefilter=None,
            prefilter_layers=None,
        )


@dataclass(frozen=True, kw_only=True)
class BuildResult:
    """What a build did."""

    datastore: Path
    """The sealed store."""
    num_rows: int
    """Rows of all sources."""
    num_scored: int
    """Rows that have features at every checkpoint."""
    num_computed: int
    """Rows times checkpoints computed by this call, cheap ones too; 0 when the store was complete."""
    skipped: tuple[SkippedRow, ...]
    """Rows left out, each with its reason, but for those that the prefilter set aside."""
    num_set_aside: int
    """Rows that the prefilter set aside."""
    num_repeated_ids: int
    """Scored rows whose id an earlier row has too."""
    num_duplicates: int
    """Scored rows whose tokens an earlier row has too."""
    num_bytes: int
    """Size of the shards."""
    seconds: float
    """Wall time."""


def build_datastore(
    *,
    model: "str | Path | PreTrainedModel",
    checkpoints: "str | Path | Sequence[str | Path]",
    data: "str | Path | datasets.Dataset | Sequence[Any]",
    datastore: str | Path,
    targets: Any = None,
    tokenizer: "str | Path | PreTrainedTokenizerBase | None" = None,
    progress: bool = True,
    **settings: Any,
) -> BuildResult:
    """Compute the gradient features of a pool at every checkpoint and keep them in a datastore.

    A store that is complete is left as it is; one that was interrupted is completed; new `data` is appended.

    With `prefilter=F`, features of one checkpoint alone (that of the greatest weight), in a store of their own at
    `<datastore>.prefilter`, rank the rows against `targets` first, and only the best F of them get features at every
    checkpoint. With C checkpoints that costs about 1/C + F (C-1)/C of the whole, so nothing is saved where there is
    one; there only `prefilter_layers` saves, and no more than about half of the first stage, since a forward pass
    stays whole. Such a store is for these targets, and no data can be appended to it.

    Args:
        model: the base model: a folder, a hub name, or a loaded model.
        checkpoints: a run folder (all its `checkpoint-*`) or checkpoint folders.
        data: a file, a hub name, a `datasets.Dataset`, a list of dicts, or a list of such.
        datastore: the store's folder.
        targets: for the prefilter, and as in `select`: a file, data set or list of dicts; several as a list, or as a
            dict that names them, and they take turns.
        tokenizer: where it is not the model's own.
        progress: show progress on standard error.
        **settings: fields of `BuildConfig`.

    Raises:
        GradsiftError: see `datastore.errors`; every problem of the whole call comes before any work.
    """
    start = time.monotonic()
    config = BuildConfig(**settings)
    check_prefilter(config.prefilter, targets)
    sources = open_sources(data)
    found = find_checkpoints(as_paths(checkpoints), config.checkpoint_weights)
    base, renderer = load_model(model, tokenizer, config)
    job = _Job(
        config=config,
        sources=sources,
        checkpoints=found,
        base=base,
        renderer=renderer,
        environment=record_environment(
            model=model, tokenizer=tokenizer, checkpoints=found, rendering=config.rendering, device=base.device
        ),
        progress=progress,
    )
    shortlist, num_computed = (EVERY_ROW, 0) if config.prefilter is None else job.prefilter(datastore, targets)
    num_computed += job.write(datastore, config, found, shortlist, "gradients")
    store = Datastore.open(datastore)
    if store.num_rows == 0:
        reasons = ", ".join(f"{n} {reason}" for reason, n in store.manifest.counts["num_skipped"].items())
        raise DataError(f"no row of the data can be used ({reasons}); the first: {store.skipped[0].where}")
    rows = store.rows(verify=False)
    return BuildResult(
        datastore=Path(datastore),
        num_rows=sum(entry.num_rows for entry in store.sources),
        num_scored=store.num_rows,
        num_computed=num_computed,
        skipped=tuple(store.skipped),
        num_set_aside=store.num_set_aside,
        num_repeated_ids=store.num_rows - len(np.unique(np.fromiter(map(hash, rows.ids), np.int64, store.num_rows))),
        num_duplicates=len(rows.digests_N) - len(np.unique(rows.digests_N)),
        num_bytes=store.num_bytes,
        seconds=time.monotonic() - start,
    )


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What a call of `build_datastore` was given, opened and loaded."""

    config: BuildConfig
    sources: list[Source]
    checkpoints: list[Checkpoint]
    base: PreTrainedModel
    renderer: Renderer
    environment: dict[str, Any]
    progress: bool

    def write(
        self, folder: str | Path, config: BuildConfig, at: Sequence[Checkpoint], shortlist: Shortlist, what: str
    ) -> int:
        """Complete one store, of these checkpoints and rows; returns rows times checkpoints computed."""
        environment = self.environment | {"checkpoints": [str(checkpoint.path.resolve()) for checkpoint in at]}
        with adapted_model(self.base, at[0].path) as adapted:
            builder = _Builder(config, adapted, at, self.renderer, shortlist)
            with DatastoreWriter.open(folder, environment=environment, **builder.plan()) as writer:
                _refuse_absent_sources(writer, self.sources)
                numbers = writer.add_sources([entry_of(source) for source in self.sources])
                sources = dict(zip(numbers, self.sources, strict=True))
                num_computed = builder.write_missing(writer, sources, what, self.progress)
                writer.seal()
        return num_computed

    def prefilter(self, datastore: str | Path, targets: Any) -> tuple[Shortlist, int]:
        """The rows that are worth exact features, and how many rows were computed to know.

        Whatever would stop the exact build stops this, before its first row. The one checkpoint is the one that
        weighs most in a score. With equal layers and feature sets its features are the exact ones.
        """
        config, cheap, found = self.config, self.config.cheap, self.checkpoints
        assert config.prefilter is not None
        if len(found) == 1 and cheap.layers == config.layers:
            raise SettingError(
                "there is one checkpoint, so the prefilter's features would be the exact ones and save nothing; leave "
                "out --prefilter, or give it fewer layers with --prefilter-layers last:N"
            )
        heaviest = replace(max(found, key=lambda checkpoint: checkpoint.weight), weight=1.0)
        target_sets = load_target_sets(targets, self.renderer, config.strict)
        asked = describe_prefilter(config.prefilter, cheap.layers, heaviest, cheap.feature_sets[0], target_sets)
        with adapted_model(self.base, found[0].path) as adapted:
            plan = _Builder(config, adapted, found, self.renderer, Shortlist(settings=asked)).plan()
        recorded = recorded_shortlist(Path(datastore), Build(**plan, environments=[], sources=[]), self.sources)
        if recorded is not None:
            return recorded, 0
        if (Path(datastore) / BUILD).exists() and Build.load(Path(datastore)).deleted:
            raise StoreError(
                f"{datastore} lacks shards, and rows were deleted from it, which its prefilter would rank again. "
                "Build another store from data without these rows"
            )
        folder = cheap_folder(datastore)
        num_computed = self.write(folder, cheap, [heaviest], EVERY_ROW, "prefilter")
        store = Datastore.open(folder)
        places = rank_rows(
            store,
            self.sources,
            target_sets,
            model=self.base,
            tokenizer=self.renderer.tokenizer,
            checkpoint=heaviest,
            config=ScoreConfig(tokens_per_batch=config.tokens_per_batch, strict=config.strict),
            progress=self.progress,
        )
        are_exact = (cheap.layers, cheap.feature_sets) == (config.layers, config.feature_sets)
        return replace(places.shortlist(self.sources, asked), exact=store if are_exact else None), num_computed


class _Builder:
    """What stays the same from shard to shard."""

    def __init__(
        self,
        config: BuildConfig,
        model: PeftModel,
        checkpoints: Sequence[Checkpoint],
        renderer: Renderer,
        shortlist: Shortlist,
    ) -> None:
        self.config, self.model, self.renderer, self.shortlist = config, model, renderer, shortlist
        self.checkpoints = {checkpoint.name: checkpoint for checkpoint in checkpoints}
        self.layout, self.device = ParamLayout.of(model, config.layers), model.device
        self.budget = BatchBudget.on(self.device, config.tokens_per_batch)
        projectors = {
            projection: make_projector(projection, self.layout)
            for projection in dict.fromkeys(fs.projection for fs in config.feature_sets)
        }
        self.projectors = {fs: projectors[fs.projection] for fs in config.feature_sets}

    def plan(self) -> dict[str, Any]:
        """What is fixed for a store's life. Every checkpoint's moments are read, so a bad one stops the build here."""
        settings = record_settings(
            base=self.model.get_base_model(),
            layout=self.layout,
            layers=self.config.layers,
            renderer=self.renderer,
            adam={checkpoint: constants_of(self._moments(checkpoint)) for checkpoint in self.checkpoints.values()},
            feature_sets={fs: (self.projectors[fs], self._dtype(fs)) for fs in self.config.feature_sets},
            tokens_per_batch=self.budget.max_tokens,
            prefilter=self.shortlist.settings,
        )
        return {
            "settings": settings,
            "feature_sets": [fs.name for fs in self.config.feature_sets],
            "checkpoints": list(self.checkpoints),
            "shard_rows": self.config.shard_rows,
        }

    def write_missing(self, writer: DatastoreWriter, sources: dict[int, Source], what: str, progress: bool) -> int:
        """Compute and write what the store lacks; returns rows times checkpoints computed."""
        tasks = [_Task(list(keys)) for _, keys in groupby(writer.missing_shards(), key=_Task.place)]
        num_left = {task: self.shortlist.num_left(sources[task.source], task.rows) for task in tasks}
        num_to_compute = sum(num for task, num in num_left.items() if not self.shortlist.is_done(task.checkpoint))
        sizes = {fs.name: row_bytes(self._dtype(fs), projector.dim) for fs, projector in self.projectors.items()}
        check_free_space(writer.path, sum(num * sizes[name] for task, num in num_left.items() for name in task.keys))
        directions = writer.missing_directions()
        with (
            Progress(total=num_to_compute, description=what, enabled=progress) as bar,
            WriteBehind() as write_behind,
        ):

            def render(task: _Task) -> tuple[_Task, RowRange | dict[str, Shard]]:
                source, rows, strict = sources[task.source], task.rows, self.config.strict
                set_aside = self.shortlist.set_aside(source, rows)
                if self.shortlist.is_done(task.checkpoint):
                    exact = self.shortlist.exact_shards(source, rows)
                    return task, {name: set_rows_aside(shard, set_aside) for name, shard in exact.items()}
                deleted = writer.build.deleted_rows(task.source, rows.start, rows.stop)
                return task, render_range(
                    source, rows, self.renderer, strict=strict, set_aside=set_aside, deleted=deleted
                )

            rendered = read_ahead(render, tasks)
            for name, checkpoint in self.checkpoints.items():
                num_tasks = sum(task.checkpoint == name for task in tasks)
                if not num_tasks and name not in {at for _, at in directions}:
                    continue
                feature_sets = self._prepare(checkpoint)
                for fs in feature_sets:
                    if (fs.name, name) in directions:
                        direction_K = shared_direction(fs, self.layout, self.device)
                        write_behind(writer.write_direction, fs.name, name, direction_K.cpu().numpy())
                for task, found in islice(rendered, num_tasks):
                    shards = (
                        found
                        if isinstance(found, dict)
                        else compute_shards(
                            found,
                            partial(
                                gradient_features,
                                self.model,
                                feature_sets=[fs for fs in feature_sets if fs.name in task.keys],
                            ),
                            widths={fs.name: fs.projector.dim for fs in feature_sets if fs.name in task.keys},
                            dtypes={fs.name: self._dtype(fs) for fs in self.projectors},
                            device=self.device,
                            budget=self.budget,
                            strict=self.config.strict,
                            bar=bar,
                        )
                    )
                    for feature_set, shard in shards.items():
                        write_behind(writer.write_shard, task.keys[feature_set], shard)
        return num_to_compute

    def _prepare(self, checkpoint: Checkpoint) -> list[FeatureSet]:
        load_adapter_weights(self.model, checkpoint.path)
        state = self._moments(checkpoint)
        return [
            FeatureSet.prepare(fs, self.layout, projector, state, self.device)
            for fs, projector in self.projectors.items()
        ]

    def _moments(self, checkpoint: Checkpoint) -> AdamState | None:
        if NEEDS_MOMENTS.isdisjoint(self.config.update_rules):
            return None
        return load_adam_state(checkpoint.path, self.model, ParamLayout.of(self.model))

    def _dtype(self, feature_set: FeatureSetConfig) -> str:
        """The stored dtype of a feature set: an unprojected one is for checking, so it keeps float32."""
        if self.config.feature_dtype != "auto":
            return self.config.feature_dtype
        return "float32" if feature_set.projection.kind == "none" else "int8"


class _Task:
    """One range of source rows at one checkpoint, and the shards that it still lacks."""

    def __init__(self, keys: Sequence[ShardKey]) -> None:
        self.checkpoint, self.source, start, stop = self.place(keys[0])
        self.rows = range(start, stop)
        self.keys = {key.feature_set: key for key in keys}

    @staticmethod
    def place(key: ShardKey) -> tuple[str, int, int, int]:
        """What the shards of one task have in common."""
        return key.checkpoint, key.source, key.start, key.stop


def _refuse_absent_sources(writer: DatastoreWriter, sources: Sequence[Source]) -> None:
    """An interrupted build has to be completed with the data that it was given, before anything is written."""
    known, given = writer.build.sources, {source.sha256 for source in sources}
    if absent := [known[key.source] for key in writer.missing_shards() if known[key.source].sha256 not in given]:
        raise StoreError(
            f"{writer.path} still lacks rows of {absent[0].name}, which is not among the data given; add "
            f"{absent[0].location or 'it'} with --data"
        )
