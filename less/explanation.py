"""Why one row of a store has the score that it has, and which rows are like it.

    score(z, j) = Σ_c w_c ⟨φ_c(z), q_jc⟩                          q_jc: mean unit target of subtask j
                = Σ_c w_c mean over targets v in j of cos(φ_c(z), ψ_c(v))
                = Σ_c w_c ⟨φ_c, d_c⟩⟨d_c, q_jc⟩ + the rest        d_c: unit momentum direction, shared by all rows

The first sum says which checkpoints give the score, the second which targets, the third how much of it every row has,
since Adam's momentum is a part of each row's update. The score itself is `less.scoring`'s; near rows are left to
`less.neighbours`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from datastore import Datastore, GradientSpace, RowTable
from datastore.coding import as_float32
from datastore.errors import SettingError
from datastore.similarity import choose_feature_set
from less.data.targets import SkippedRow, TargetSet, columns_of
from less.influence import InfluenceScores
from less.methods import open_scorer
from less.neighbours import Neighbour, PoolRow, neighbours_of, pool_rows
from less.pool import Pool
from less.provenance import holds_gradients
from less.scoring import ScoreConfig, Scorer
from less.selection import ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "CheckpointFacts",
    "ExplainConfig",
    "Explanation",
    "SubtaskPull",
    "TargetPull",
    "TargetSetRank",
    "explain",
    "find_row",
]

_KEY = re.compile(r"(\d+):(\d+)")
_NAMED = 5
"""Rows of one id, and ids, that an error lists."""


@dataclass(frozen=True, kw_only=True)
class ExplainConfig:
    """Settings of an explanation."""

    neighbours: int = 5
    """Near rows to list."""
    top_targets: int = 5
    """Targets to list."""
    feature_set: str | None = None
    """Which of the store's feature sets; needed where it has several."""
    system_prompt: str | None = None
    """keep, none or a text, for the targets; None as for the pool."""
    tokens_per_batch: int | None = None
    """Padded tokens in one batch of targets."""
    verify: bool = True
    """Check the checksum of every file that is read."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    trust_remote_code: bool = False
    """Let code that comes with the model run."""

    def __post_init__(self) -> None:
        for name in ("neighbours", "top_targets"):
            if getattr(self, name) < 0:
                raise SettingError(f"{name} must be at least 0, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class CheckpointFacts:
    """What the store holds of the row at one checkpoint."""

    name: str
    """The checkpoint."""
    weight: float
    """w_c."""
    loss: float
    """Nats per supervised token."""
    grad_norm: float
    """‖g‖."""
    update_norm: float
    """‖Γ‖."""
    momentum_cosine: float | None
    """Cosine of the row's feature with the momentum direction; None where the update rule has none."""


@dataclass(frozen=True, kw_only=True)
class TargetSetRank:
    """The row's score for one target set: what `select` ranks by."""

    name: str
    """The target set."""
    score: float
    """The highest over its subtasks."""
    rank: int
    """Among all scored rows, from 1; ties go to the earlier row."""
    subtask: str
    """The subtask that gives the score."""


@dataclass(frozen=True, kw_only=True)
class SubtaskPull:
    """What one subtask makes of the row."""

    target_set: str
    """Its target set."""
    subtask: str
    """Its name."""
    num_targets: int
    """Targets in it."""
    score: float
    """score(z, j)."""
    rank: int
    """Among all scored rows, by this subtask alone."""
    by_checkpoint: Mapping[str, float]
    """The parts of the score; they sum to it."""
    from_momentum: float | None
    """The part of the score along the momentum directions; None where the update rule has none."""


@dataclass(frozen=True, kw_only=True)
class TargetPull:
    """What one target makes of the row."""

    id: str
    """Its label."""
    where: str
    """Where a person finds it."""
    target_set: str
    """Its target set."""
    subtask: str
    """Its subtask, whose score is the mean of its targets' contributions."""
    contribution: float
    """Σ_c w_c cos(φ_c, ψ_c)."""
    cosines: Mapping[str, float]
    """cos(φ_c, ψ_c) by checkpoint."""
    text: str
    """What its turns say."""


@dataclass(frozen=True, kw_only=True)
class Explanation(PoolRow):
    """A row, what pulls it in, and what is like it."""

    datastore: Path
    """The store."""
    feature_set: str
    """The feature set."""
    num_rows: int
    """Scored rows of the store."""
    num_tokens: int
    """Tokens after truncation."""
    num_supervised: int
    """Those that carry loss."""
    truncated: bool
    """Whether it was cut to the length limit."""
    checkpoints: tuple[CheckpointFacts, ...]
    """What the store holds of it."""
    target_sets: tuple[TargetSetRank, ...]
    """Its score for each target set; empty without targets."""
    subtasks: tuple[SubtaskPull, ...]
    """What each subtask makes of it, the highest score first; empty without targets."""
    targets: tuple[TargetPull, ...]
    """The targets of largest contribution, best first; empty without targets."""
    skipped_targets: tuple[SkippedRow, ...]
    """Targets left out, each with its reason."""
    neighbours: tuple[Neighbour, ...]
    """The nearest other rows, best first."""
    neighbours_by: str
    """How those were found, in words."""

    def as_json(self) -> dict[str, Any]:
        """All of it, as JSON."""
        return asdict(self) | {"datastore": str(self.datastore)}


def explain(
    *,
    datastore: str | Path | Datastore,
    row: str | tuple[int, int],
    targets: Any = None,
    data: Any = None,
    model: "str | Path | PreTrainedModel | None" = None,
    tokenizer: "str | Path | PreTrainedTokenizerBase | None" = None,
    checkpoints: str | Path | Sequence[str | Path] | None = None,
    progress: bool = True,
    **settings: Any,
) -> Explanation:
    """Explain one row of a store: what the targets make of it, at which checkpoint, and which rows are like it.

    Without targets no model is loaded, and only the row and its neighbours are told of.

    Args:
        datastore: a sealed store; with targets one of gradients.
        row: its id; or `SOURCE:NUMBER`, or a pair of ints: number of the source in the store, and row number in it.
        targets: as in `select`: a file, data set or list of dicts; several as a list, or as a dict that names them.
        data: the pool, where it is not where the build found it (needed for rows given in memory).
        model, tokenizer, checkpoints: where they are not where the build found them.
        progress: show progress on standard error.
        **settings: fields of `ExplainConfig`.

    Raises:
        DamagedStoreError: a file of the store or of its index is not as it was written.
        DataError: no usable target, or the pool has changed since the build.
        ProvenanceError: the model or a checkpoint is not the one that the store was built with.
        SettingError: no such row, or several of that id; the store holds embeddings and there are targets.
    """
    config = ExplainConfig(**settings)
    store = datastore if isinstance(datastore, Datastore) else Datastore.open(datastore)
    if targets is not None and not holds_gradients(store):
        raise SettingError(
            f"{store.path} holds embeddings, whose score has no checkpoints to explain it by; leave out --targets, "
            "or explain a row of a store of gradients"
        )
    feature_set = choose_feature_set(store, config.feature_set)
    space = GradientSpace(store, feature_set, verify=config.verify)
    rows = store.rows(feature_set, verify=config.verify)
    position = find_row(store, rows, row)
    pool = Pool(store, data)
    own = _Row(space, position)
    sets: tuple[TargetSetRank, ...] = ()
    subtasks: tuple[SubtaskPull, ...] = ()
    pulls: tuple[TargetPull, ...] = ()
    skipped: tuple[SkippedRow, ...] = ()
    if targets is not None:
        scorer = open_scorer(
            store,
            ScoreConfig(
                method="less",
                feature_set=feature_set,
                system_prompt=config.system_prompt,
                tokens_per_batch=config.tokens_per_batch,
                verify=config.verify,
                device=config.device,
                trust_remote_code=config.trust_remote_code,
            ),
            model=model,
            tokenizer=tokenizer,
            checkpoints=checkpoints,
            progress=progress,
        )
        assert isinstance(scorer, Scorer)
        given = scorer.load_targets(targets)
        features, target_sets = scorer.usable_features(given)
        influence, _ = scorer.score(given)
        units = {name: _units(features_MK.numpy()) for name, features_MK in features.items()}
        sets = tuple(_rank_for(t.name, influence, position) for t in target_sets)
        subtasks = own.subtasks(influence, target_sets, units)
        pulls = own.targets(target_sets, units, config.top_targets)
        skipped = tuple(row for t in target_sets for row in t.skipped)
    neighbours, how = neighbours_of(space, rows, pool, position, config.neighbours)
    return Explanation(
        datastore=store.path,
        feature_set=feature_set,
        num_rows=store.num_rows,
        **vars(pool_rows(rows, pool, np.array([position]))[position]),
        num_tokens=int(rows.num_tokens_N[position]),
        num_supervised=int(rows.num_supervised_N[position]),
        truncated=bool(rows.truncated_N[position]),
        checkpoints=own.facts,
        target_sets=sets,
        subtasks=subtasks,
        targets=pulls,
        skipped_targets=skipped,
        neighbours=neighbours,
        neighbours_by=how,
    )


def find_row(store: Datastore, rows: RowTable, row: str | tuple[int, int]) -> int:
    """The position of a row given by its id, or by source and number.

    An id that one row has goes first; then `SOURCE:NUMBER`. Raises `SettingError` where there is no such row, it was
    skipped, or several have the id.
    """
    if isinstance(row, str):
        found = [n for n, name in enumerate(rows.ids) if name == row]
        if len(found) == 1:
            return found[0]
        key = _KEY.fullmatch(row)
        if key is None and found:
            several = [f"{rows.sources_N[n]}:{rows.rows_N[n]}" for n in found]
            more = ", …" if len(several) > _NAMED else ""
            raise SettingError(
                f"{len(found)} rows of {store.path} have the id {row!r}: {', '.join(several[:_NAMED])}{more} (number "
                f"of the source, number of the row in it). Choose one, as in --row {several[0]}"
            )
        if key is None:
            raise SettingError(_no_such_row(store, rows, row))
        number, line = int(key[1]), int(key[2])
    else:
        number, line = row
    at = np.flatnonzero((rows.sources_N == number) & (rows.rows_N == line))
    if not at.size:
        raise SettingError(_no_such_row(store, rows, row, (number, line)))
    return int(at[0])


def _no_such_row(
    store: Datastore, rows: RowTable, row: str | tuple[int, int], key: tuple[int, int] | None = None
) -> str:
    for rows_of in store.manifest.ranges:
        for left_out in store.left_out(rows_of):
            if row == left_out.id or key == (rows_of.source, left_out.row):
                return (
                    f"{left_out.where} has no features in {store.path}, since it was skipped: {left_out.reason}"
                    f"{f' ({left_out.detail})' if left_out.detail else ''}. Choose a row that is scored"
                )
    sources = ", ".join(f"{number}: {entry.name}" for number, entry in enumerate(store.sources))
    asked = row if isinstance(row, str) else f"{row[0]}:{row[1]}"
    return (
        f"{store.path} has no row {asked!r}; expected an id such as {', '.join(rows.ids[:2])}, or SOURCE:NUMBER, the "
        f"number of a row in a source, from 0 ({sources})"
    )


class _Row:
    """What the store holds of one row: φ_c as it is stored, and the facts."""

    def __init__(self, space: GradientSpace, position: int) -> None:
        self.position, self.features, self.directions = position, {}, {}
        store, facts = space.store, []
        for name, weight in space.weights.items():
            shard, at = space.shard_of(position, name)
            row_K = as_float32(shard.features_NK[at : at + 1])[0].astype(np.float64)
            direction_K = store.direction(space.feature_set, name).astype(np.float64)
            self.features[name] = row_K
            if length := float(np.linalg.norm(direction_K)):
                self.directions[name] = direction_K / length
            along = float(row_K @ self.directions[name] / np.linalg.norm(row_K)) if length else None
            facts.append(
                CheckpointFacts(
                    name=name,
                    weight=weight,
                    loss=float(shard.losses_N[at]),
                    grad_norm=float(shard.grad_norms_N[at]),
                    update_norm=float(shard.update_norms_N[at]),
                    momentum_cosine=along,
                )
            )
        self.weights, self.facts = space.weights, tuple(facts)

    def subtasks(
        self, influence: InfluenceScores, target_sets: Sequence[TargetSet], units: Mapping[str, NDArray[np.float64]]
    ) -> tuple[SubtaskPull, ...]:
        """What each subtask makes of the row, the highest score first."""
        columns, subtask_M = columns_of(target_sets)
        found = []
        for j, (name, subtask) in enumerate(columns):
            members = np.flatnonzero(np.array(subtask_M) == j)
            by_checkpoint, from_momentum = {}, 0.0
            for checkpoint, weight in self.weights.items():
                query_K = units[checkpoint][members].mean(axis=0)
                by_checkpoint[checkpoint] = float(weight * (self.features[checkpoint] @ query_K))
                if checkpoint in self.directions:
                    direction_K = self.directions[checkpoint]
                    from_momentum += weight * (self.features[checkpoint] @ direction_K) * (direction_K @ query_K)
            found.append(
                SubtaskPull(
                    target_set=name,
                    subtask=subtask,
                    num_targets=len(members),
                    score=float(influence.scores_NJ[self.position, j]),
                    rank=int(ranks(influence.scores_NJ[:, j])[self.position]),
                    by_checkpoint=by_checkpoint,
                    from_momentum=float(from_momentum) if self.directions else None,
                )
            )
        return tuple(sorted(found, key=lambda pull: -pull.score))

    def targets(
        self, target_sets: Sequence[TargetSet], units: Mapping[str, NDArray[np.float64]], count: int
    ) -> tuple[TargetPull, ...]:
        """The targets of largest contribution, best first."""
        cosines = {name: units_MK @ self.features[name] for name, units_MK in units.items()}
        contribution_M = np.sum([self.weights[name] * cosine_M for name, cosine_M in cosines.items()], axis=0)
        places = [(t, n) for t in target_sets for n in range(len(t.ids))]
        found = []
        for m in np.argsort(-contribution_M, kind="stable")[:count].tolist():
            t, n = places[m]
            found.append(
                TargetPull(
                    id=t.ids[n],
                    where=t.where_of[n],
                    target_set=t.name,
                    subtask=t.subtask_of[n],
                    contribution=float(contribution_M[m]),
                    cosines={name: float(cosine_M[m]) for name, cosine_M in cosines.items()},
                    text=t.text_of[n],
                )
            )
        return tuple(found)


def _rank_for(name: str, influence: InfluenceScores, position: int) -> TargetSetRank:
    own = influence.of(name)
    return TargetSetRank(
        name=name,
        score=float(own.score_N[position]),
        rank=int(ranks(own.score_N)[position]),
        subtask=own.subtasks[own.column_N[position]],
    )


def _units(features_MK: NDArray[np.float32]) -> NDArray[np.float64]:
    return torch.nn.functional.normalize(torch.from_numpy(features_MK), dim=1, eps=0).double().numpy()
