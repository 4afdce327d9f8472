"""Score a finished store against targets by LESS: their features at every checkpoint, then one scan.

The model runs on the targets only, and must be the one that the store was built with, which is checked by
fingerprint. The formulas are in `less.influence`; other ways to score are in `less.baselines`, `less.methods` chooses.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datastore import Datastore
from datastore.errors import DataError, ProvenanceError, RowError, SettingError
from datastore.similarity import choose_feature_set
from less.adapters import adapted_model, load_adapter_weights
from less.checkpoints import Checkpoint, as_paths, find_checkpoints
from less.data.batching import BatchBudget, collate, plan_batches
from less.data.conversations import RowProblem
from less.data.rendering import RenderConfig, Renderer
from less.data.targets import TargetSet, columns_of, load_targets
from less.features import FeatureSet, FeatureSetConfig, gradient_features
from less.influence import InfluenceScores, check_formula, subtask_queries
from less.models import ParamLayout, load_base_model, load_tokenizer, resolve_device
from less.progress import Progress
from less.provenance import (
    check_checkpoints,
    check_model,
    check_template,
    location_of,
    recorded_projector,
)
from less.scan import gather_scores, iter_scores
from less.score_matrix import ScoreMatrix

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["METHODS", "ScoreConfig", "Scorer", "load_target_sets", "open_base_model", "open_renderer"]

METHODS = ("less", "rds", "bm25", "length", "perplexity", "random")


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Settings of scoring; what is None is taken from the store."""

    method: str | None = None
    """less, rds, bm25, length, perplexity or random; None: less for a store of gradients, rds for one of embeddings."""
    feature_set: str | None = None
    """Which of the store's feature sets `less` scores by, and rows are compared by; needed where there are several."""
    aggregate: str = "mean-of-cosines"
    """mean-of-cosines, or cosine-of-mean (the paper's text)."""
    normalize: str = "cosine"
    """cosine, or none: the first-order prediction of the targets' loss drop, which favours short rows."""
    checkpoint_weights: Sequence[float] | None = None
    """w_c in the store's order of checkpoints."""
    seed: int = 0
    """Of the method `random`."""
    system_prompt: str | None = None
    """keep, none or a text, for the targets."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    tokens_per_batch: int | None = None
    """Padded tokens in one batch of targets."""
    verify: bool = True
    """Check the checksum of every shard that is read."""
    keep_scores: bool = True
    """Keep the scores of `less` beside the store: another selection for the same targets then costs no scan."""
    strict: bool = False
    """Stop at the first target that cannot be used instead of skipping it."""
    trust_remote_code: bool = False
    """Let code that comes with the model run."""

    def __post_init__(self) -> None:
        if self.method not in (None, *METHODS):
            raise SettingError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        check_formula(self.aggregate, self.normalize)
        if self.method not in (None, "less"):
            for name, default in (("feature_set", None), ("normalize", "cosine"), ("checkpoint_weights", None)):
                if (given := getattr(self, name)) != default:
                    raise SettingError(
                        f"{name} is {given!r}, and the method {self.method} has none; leave it out, or choose less"
                    )
        if self.seed < 0:
            raise SettingError(f"seed must be at least 0, got {self.seed}")
        if self.tokens_per_batch is not None and self.tokens_per_batch < 1:
            raise SettingError(f"tokens_per_batch must be at least 1, got {self.tokens_per_batch}")


def load_target_sets(targets: Any, renderer: Renderer, strict: bool) -> list[TargetSet]:
    """The target sets in a file, data set or list of dicts, in several of them, or in a dict that names them.

    Raises:
        DataError: there is no target that can be used; RowError: one cannot, under `strict`.
        SettingError: two sets have one name.
    """
    if isinstance(targets, Mapping):
        named = list(targets.items())
    elif isinstance(targets, list | tuple) and not any(isinstance(t, dict) for t in targets):
        named = [(None, part) for part in targets]
    else:
        named = [(None, targets)]
    sets = [load_targets(part, renderer, name=name, strict=strict) for name, part in named]
    if not sets:
        raise DataError("no target was given; expected a file or a list of examples")
    if len({t.name for t in sets}) < len(sets):
        raise SettingError(f"two target sets have one name among {', '.join(t.name for t in sets)}; rename a file")
    return sets


def open_base_model(store: Datastore, config: ScoreConfig, model: Any) -> "PreTrainedModel":
    """The model that a store was built with: `model`, or where the build found it.

    Raises:
        ProvenanceError: it has other weights.
        SettingError: it is not given, and had no name.
    """
    loaded = load_base_model(
        _name_of_model(store) if model is None else model,
        dtype=store.settings["model"]["dtype"],
        device=config.device,
        trust_remote_code=config.trust_remote_code,
    )
    check_model(store, loaded)
    return loaded


def open_renderer(
    store: Datastore, config: ScoreConfig, model: Any, tokenizer: Any, context_length: int | None
) -> Renderer:
    """Renders targets as the store's pool was, but for a system prompt of their own.

    Raises:
        ProvenanceError: the tokenizer or its template is another.
        SettingError: the tokenizer is not given, and had no name.
    """
    where = store.environment
    if tokenizer is None:
        own = model is not None and where["tokenizer"] == where["model"]  # the model's own, then and now
        tokenizer = location_of(model) if own else where["tokenizer"]
        if not tokenizer:
            raise SettingError("the tokenizer has no name to load it by; give it with --tokenizer")
    renderer = Renderer(
        load_tokenizer(tokenizer, trust_remote_code=config.trust_remote_code),
        RenderConfig(**where["rendering"] | _given(system_prompt=config.system_prompt)),
        context_length=context_length,
    )
    check_template(store, renderer)
    return renderer


def _name_of_model(store: Datastore) -> str:
    if not (name := store.environment["model"]):
        raise SettingError(f"{store.path} was built with a model that has no name; give it again with --model")
    return name


class Scorer:
    """A store, the model that it was built with, and the settings of one scoring.

    Args:
        store: a sealed store of gradients.
        config: of scoring.
        model, tokenizer, checkpoints: where they are not where the build found them.
        progress: show progress on standard error.
        known: targets' features, filled as they are computed: ψ is of plain gradients, so that scorers of feature sets
            with one projection can share it.
    """

    def __init__(
        self,
        store: Datastore,
        config: ScoreConfig,
        model: Any,
        tokenizer: Any,
        checkpoints: Any,
        progress: bool,
        known: "dict[str, Tensor] | None" = None,
    ) -> None:
        self.store, self.config, self.progress = store, config, progress
        self._known: dict[str, Tensor] = {} if known is None else known
        self.feature_set = choose_feature_set(store, config.feature_set)
        if store.num_rows == 0:
            raise DataError(
                f"{store.path} has no row to score: all {store.manifest.counts['num_rows']} of its pool were skipped"
            )
        if model is None:
            _name_of_model(store)
        self.checkpoints = self._find_checkpoints(checkpoints or store.environment["checkpoints"])
        self._given_model = model
        if model is not None:
            _ = self.model  # what is given is held to the store at once
        self.renderer = open_renderer(store, config, model, tokenizer, store.settings["rendering"]["max_length"])

    @cached_property
    def model(self) -> "PreTrainedModel":
        """The base model, loaded when it is first needed: scores that are kept need none.

        Raises:
            ProvenanceError: it is not the one that the store was built with.
        """
        return open_base_model(self.store, self.config, self._given_model)

    def load_targets(self, targets: Any) -> list[TargetSet]:
        """The target sets, each with a name of its own."""
        return load_target_sets(targets, self.renderer, self.config.strict)

    def score(self, target_sets: Sequence[TargetSet]) -> tuple[InfluenceScores, list[TargetSet]]:
        """Features of the targets at every checkpoint, then one scan of the store.

        Returns:
            the scores, and the target sets without the targets that have no direction at some checkpoint.

        Raises:
            DataError: no target of a set has one; RowError: one has none, under `strict`.
        """
        matrix = ScoreMatrix(self.store, self._made_of(target_sets)) if self.config.keep_scores else None
        kept = None if matrix is None else matrix.load(verify=self.config.verify)
        if kept is not None:
            scores_NJ, dead = kept[0], {m: RowProblem(*problem) for m, *problem in kept[1]["dead_targets"]}
            target_sets = self._without(target_sets, dead)
        else:
            scores_NJ, target_sets = self._scan(target_sets, matrix)
        columns, _ = columns_of(target_sets)
        influence = InfluenceScores(
            rows=self.store.rows(self.feature_set, verify=self.config.verify),
            scores_NJ=scores_NJ,
            subtasks=tuple(subtask for _, subtask in columns),
            target_sets=tuple(name for name, _ in columns),
        )
        return influence, target_sets

    def _scan(
        self, target_sets: Sequence[TargetSet], matrix: ScoreMatrix | None
    ) -> tuple[NDArray[np.float32], list[TargetSet]]:
        """Features of the targets, and one scan, into `matrix` if there is one."""
        features, alive, dead = self._usable(target_sets)
        columns, subtask_M = columns_of(alive)
        config = self.config
        queries_JK = {
            name: subtask_queries(
                features_MK, subtask_M, len(columns), aggregate=config.aggregate, normalize=config.normalize
            )
            for name, features_MK in features.items()
        }
        scan = partial(
            iter_scores, self.store, self.feature_set, queries_JK, self._weights, normalize=config.normalize,
            device=resolve_device(config.device), verify=config.verify, progress=self.progress,
        )  # fmt: skip
        if matrix is None:
            return gather_scores(self.store.num_rows, len(columns), scan(first=0)), alive
        digest = hashlib.sha256(b"".join(query_JK.numpy().tobytes() for query_JK in queries_JK.values())).hexdigest()
        kept = {"dead_targets": [[m, problem.reason, problem.detail] for m, problem in dead.items()]}
        return matrix.make(len(columns), digest, kept, lambda first: scan(first=first)), alive

    @property
    def _weights(self) -> dict[str, float]:
        return {checkpoint.name: checkpoint.weight for checkpoint in self.checkpoints}

    def _made_of(self, target_sets: Sequence[TargetSet]) -> dict[str, Any]:
        """What scores depend on beside the store."""
        targets = [
            [t.name, subtask, list(map(int, row.input_ids)), list(map(int, row.supervised))]
            for t in target_sets
            for subtask, row in zip(t.subtask_of, t.rendered, strict=True)
        ]
        return {
            "feature_set": self.feature_set, "aggregate": self.config.aggregate, "normalize": self.config.normalize,
            "weights": self._weights, "targets": hashlib.sha256(json.dumps(targets).encode()).hexdigest(),
        }  # fmt: skip

    def usable_features(self, target_sets: Sequence[TargetSet]) -> tuple[dict[str, Tensor], list[TargetSet]]:
        """ψ of the targets that have a direction at every checkpoint, (M, K) float32 each, and the sets of those.

        They are computed once for the same sets. Raises as `score`.
        """
        features, alive, _ = self._usable(target_sets)
        return features, alive

    def _usable(
        self, target_sets: Sequence[TargetSet]
    ) -> tuple[dict[str, Tensor], list[TargetSet], dict[int, RowProblem]]:
        features = dict(self.target_features(target_sets))
        dead = _dead_targets(features)
        alive_M = torch.tensor([m not in dead for m in range(len(next(iter(features.values()))))])
        alive = self._without(target_sets, dead)
        return {name: features_MK[alive_M] for name, features_MK in features.items()}, alive, dead

    def target_features(self, target_sets: Sequence[TargetSet]) -> Iterator[tuple[str, Tensor]]:
        """ψ of every target, set after set, at each checkpoint: (M, K) float32, not normalised."""
        rendered = [row for t in target_sets for row in t.rendered]
        device = self.model.device
        budget = BatchBudget.on(device, self.config.tokens_per_batch)
        batches = plan_batches([row.num_tokens for row in rendered], budget)
        total = len(rendered) * len(self.checkpoints)
        with (
            adapted_model(self.model, self.checkpoints[0].path) as model,
            Progress(total=total, description="targets", enabled=self.progress) as bar,
        ):
            layout = ParamLayout.of(model, self.store.settings["model"]["layers"])
            projector = recorded_projector(self.store, self.feature_set, layout)
            plain = FeatureSetConfig(update_rule="sgd", projection=projector.config)
            for checkpoint in self.checkpoints:
                made_of = repr((checkpoint.adapter_sha256, layout.hash, projector.provenance(), rendered))
                if made_of in self._known:
                    bar.advance(len(rendered))
                    yield checkpoint.name, self._known[made_of]
                    continue
                load_adapter_weights(model, checkpoint.path)
                psi = FeatureSet.prepare(plain, layout, projector, None, device)
                features_MK = torch.empty(len(rendered), projector.dim)
                for rows in batches:
                    batch = collate(rendered, rows)
                    features = gradient_features(model, batch.to(device), [psi])
                    features_MK[rows] = features.features_BK[psi.name].cpu()
                    bar.advance(len(rows), batch.num_tokens)
                self._known[made_of] = features_MK
                yield checkpoint.name, features_MK

    def _without(self, target_sets: Sequence[TargetSet], dead: Mapping[int, RowProblem]) -> list[TargetSet]:
        """The sets without the targets, numbered through all sets, that have no direction."""
        alive, start = [], 0
        for target_set in target_sets:
            problems = {n: dead[start + n] for n in range(len(target_set.ids)) if start + n in dead}
            start += len(target_set.ids)
            if problems and (self.config.strict or len(problems) == len(target_set.ids)):
                n, problem = next(iter(problems.items()))
                message = f"{target_set.where_of[n]}: {problem}; there is no cosine with it"
                raise RowError(message) if self.config.strict else DataError(f"no target is left: {message}")
            alive.append(target_set.without(problems))
        return alive

    def _find_checkpoints(self, given: Any) -> list[Checkpoint]:
        """The store's checkpoints, found again, under the store's names and weights."""
        names = self.store.checkpoints
        recorded = [self.store.settings["checkpoints"][name]["weight"] for name in names]
        weights = self.config.checkpoint_weights
        if weights is not None and len(weights) != len(names):
            raise SettingError(
                f"--checkpoint-weights has {len(weights)} values, expected one for each checkpoint of "
                f"{self.store.path}: {', '.join(names)}"
            )
        try:
            found = find_checkpoints(as_paths(given), recorded if weights is None else weights)
        except SettingError as err:
            if weights is not None:
                raise
            raise ProvenanceError(
                f"{given}: not the {len(names)} checkpoints that {self.store.path} was built with "
                f"({', '.join(names)}). Give the right --checkpoints"
            ) from err
        check_checkpoints(self.store, found)
        return [replace(checkpoint, name=name) for checkpoint, name in zip(found, names, strict=True)]


def _dead_targets(features: Mapping[str, Tensor]) -> dict[int, RowProblem]:
    """The targets whose gradient is zero or not finite at some checkpoint."""
    dead: dict[int, RowProblem] = {}
    for checkpoint, features_MK in features.items():
        for m, norm in enumerate(torch.linalg.vector_norm(features_MK, dim=1).tolist()):
            if not 0 < norm < float("inf"):
                reason = "zero norm" if norm == 0 else "not finite"
                dead.setdefault(m, RowProblem(reason, f"gradient norm {norm:g} at {checkpoint}"))
    return dead


def _given(**settings: Any) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}
