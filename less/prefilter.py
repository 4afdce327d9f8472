"""Two stages: cheap features rank every row against the targets, and the best fraction of them gets exact ones.

    cost ≈ cheap features of every row + fraction · exact features of every row

Cheap features are those of one checkpoint, the one that weighs most in a score, and of some LoRA layers if so asked.
With the same layers they are the exact ones at that checkpoint and are not computed again: of C checkpoints, the whole
costs 1/C + fraction · (C-1)/C of a plain build, where the rows kept are as long as the others. Where there is one
checkpoint that saves nothing: only fewer layers do, and since the forward pass stays whole, they cost at least about
half. Whether it pays, and how many of the best rows it keeps, is measured in `benchmarks/results/cheaper_*.md`.

The cheap store is a datastore like any other, `<DS>.prefilter` beside `<DS>`; the places of its rows are kept in it.
Both are built by `less.pipeline`, which asks here what to build and which rows to leave out; scores are
`less.scoring`'s business.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from datastore import Build, Datastore, Shard
from datastore.beside import PREFILTER, beside
from datastore.build import BUILD
from datastore.errors import SettingError, StoreError
from datastore.files import open_tensors, write_tensors
from less.checkpoints import Checkpoint
from less.data.records import Source
from less.data.targets import TargetSet
from less.features import FeatureSetConfig
from less.scoring import ScoreConfig, Scorer
from less.selection import num_to_select, select_round_robin

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "EVERY_ROW",
    "Places",
    "Shortlist",
    "cheap_folder",
    "check_prefilter",
    "describe_prefilter",
    "rank_rows",
    "recorded_shortlist",
]

_PLACES = "places.safetensors"


@dataclass(frozen=True)
class Shortlist:
    """Which rows of the pool get exact features."""

    settings: dict[str, Any] | None
    """What the exact store records of the prefilter; None where there is none."""
    num_kept: int = 0
    """Rows ranked 1 to this number are kept."""
    ranks: Mapping[str, NDArray[np.int64]] | None = None
    """By a source's sha256, the rank of each of its rows from 1; 0 for one that had no cheap features."""
    exact: Datastore | None = None
    """The cheap store, where its features are the exact ones at its checkpoint."""

    def set_aside(self, source: Source, rows: range) -> set[int]:
        """Those rows of a range that get no exact features."""
        if self.ranks is None:
            return set()
        ranks_R = self.ranks[source.sha256][rows.start : rows.stop]
        return set((rows.start + np.flatnonzero(ranks_R > self.num_kept)).tolist())

    def is_done(self, checkpoint: str) -> bool:
        """Whether the cheap store has the exact features of this checkpoint."""
        return self.exact is not None and self.exact.checkpoints == [checkpoint]

    def exact_shards(self, source: Source, rows: range) -> dict[str, Shard]:
        """By feature set, the cheap store's shard of these rows, at a checkpoint that is done."""
        assert self.exact is not None
        number = [entry.sha256 for entry in self.exact.sources].index(source.sha256)
        checkpoint = self.exact.checkpoints[0]
        keys = {
            name: self.exact.manifest.shard_key(name, checkpoint, number, rows.start, rows.stop)
            for name in self.exact.feature_sets
        }
        return {name: self.exact.shard(key) for name, key in keys.items()}

    def num_left(self, source: Source, rows: range) -> int:
        """Rows of a range that are not set aside."""
        if self.ranks is None:
            return len(rows)
        return int(np.count_nonzero(self.ranks[source.sha256][rows.start : rows.stop] <= self.num_kept))


EVERY_ROW = Shortlist(settings=None)
"""No prefilter."""


@dataclass(frozen=True)
class Places:
    """The ranked rows of a cheap store: the P rows of the pool that have cheap features."""

    sources: list[str]
    """sha256 of each source of the cheap store."""
    sources_P: NDArray[np.int32]
    """Number of the source in it."""
    rows_P: NDArray[np.int64]
    """Row number in the source."""
    ranks_P: NDArray[np.int64]
    """Place, from 1: by score, ties to the earlier row; several target sets take turns."""
    scores_P: NDArray[np.float32]
    """The highest score over all subtasks."""

    def shortlist(self, sources: Sequence[Source], asked: dict[str, Any]) -> Shortlist:
        """The best `fraction` of the rows, and every row that has no place: the exact build says what is wrong with it.

        Args:
            sources: all of the pool.
            asked: from `describe_prefilter`.
        """
        num_ranked = len(self.rows_P)
        num_kept = num_to_select(num_ranked, fraction=asked["fraction"]) if num_ranked else 0
        ranks, digest = {}, hashlib.sha256()
        for source in sorted(sources, key=lambda source: source.sha256):
            own_P = self.sources_P == self.sources.index(source.sha256)
            ranks[source.sha256] = ranks_R = np.zeros(source.num_rows, np.int64)
            ranks_R[self.rows_P[own_P]] = self.ranks_P[own_P]
            digest.update(source.sha256.encode())
            digest.update(np.flatnonzero(ranks_R <= num_kept).astype("<i8").tobytes())
        return Shortlist(asked | {"kept_rows_sha256": digest.hexdigest()}, num_kept, ranks)


def check_prefilter(fraction: float | None, targets: Any) -> None:
    """Raise `SettingError` unless a prefilter and its targets are given together."""
    if fraction is not None and targets is None:
        raise SettingError(
            f"prefilter is {fraction} and there are no targets to rank the rows by; give them with --targets, or leave "
            "out --prefilter"
        )
    if fraction is None and targets is not None:
        raise SettingError(
            "targets are given and no prefilter; a build uses them only to set rows aside. Give the fraction to keep, "
            "such as --prefilter 0.2, or leave out --targets: `gradsift select` takes them"
        )


def cheap_folder(datastore: str | Path) -> Path:
    """Where the cheap store lies: beside the exact one."""
    return beside(Path(datastore).resolve(), PREFILTER)


def describe_prefilter(
    fraction: float,
    layers: str,
    checkpoint: Checkpoint,
    feature_set: FeatureSetConfig,
    target_sets: Sequence[TargetSet],
) -> dict[str, Any]:
    """What the exact store records of how its rows were chosen, as JSON; the rows themselves are still to come."""
    return {
        "fraction": float(fraction),
        "layers": layers,
        "checkpoint": checkpoint.name,
        "feature_set": feature_set.name,
        "targets": {t.name: t.sha256 for t in target_sets},
    }


def recorded_shortlist(folder: Path, asked: Build, sources: Sequence[Source]) -> Shortlist | None:
    """What the exact store that is there already was begun with; its problems are to be known before any work.

    Args:
        folder: of the exact store.
        asked: what this command asks for, with `settings["prefilter"]` from `describe_prefilter`.
        sources: the pool.

    Returns:
        its recorded choice where every shard is there, so that no row is left to be chosen; else None.

    Raises:
        ProvenanceError: it was built with other settings, naming each.
        StoreError: it was built from other data, or is no datastore.
    """
    if not (folder / BUILD).exists():
        if others := [entry.name for entry in folder.glob("[!.]*")]:
            raise StoreError(f"{folder} is not a datastore: it has {min(others)}. Choose another --datastore folder")
        return None
    known = Build.load(folder)
    recorded = known.settings.get("prefilter")
    kept = {"kept_rows_sha256": recorded["kept_rows_sha256"]} if recorded else {}
    settings = asked.settings | {"prefilter": asked.settings["prefilter"] | kept}
    known.check_same_settings(replace(asked, settings=settings), folder)
    if not known.sources:
        return None
    names, given = {entry.sha256: entry.name for entry in known.sources}, {s.sha256: s.name for s in sources}
    if new := given.keys() - names.keys():
        raise StoreError(
            f"{given[min(new)]} is new to {folder}, whose prefilter kept a fraction of {', '.join(names.values())}: "
            "no rows can be added to it. Leave out the new data, or choose another --datastore folder for all of them"
        )
    if all((folder / key.path).exists() for key in known.shard_keys()):
        return Shortlist(settings=recorded)
    if absent := names.keys() - given.keys():
        raise StoreError(f"{folder} is not finished and was begun with {names[min(absent)]} too; add it with --data")
    return None


def rank_rows(
    store: Datastore,
    sources: Sequence[Source],
    target_sets: Sequence[TargetSet],
    *,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    checkpoint: Checkpoint,
    config: ScoreConfig,
    progress: bool,
) -> Places:
    """Score a cheap store against the targets and rank its rows, or find the places of an earlier call again.

    Places are kept with the store: elsewhere two neighbours could change places by the last bits of their scores, and
    a build that goes on there has to leave out the same rows.

    Args:
        store: the cheap store.
        sources: the pool; rows of other sources that the store has too get no place.
        target_sets: each has an order of its own.
        model, tokenizer, checkpoint: those that the store was built with.
        config: of scoring.
        progress: show progress on standard error.

    Raises:
        DataError: no target of a set has a direction; RowError: one has none, under `strict`.
    """
    file, sources_of_store = store.path / _PLACES, [entry.sha256 for entry in store.sources]
    made_of: dict[str, Any] = {
        "settings_hash": store.manifest.settings_hash,
        "targets": {t.name: t.sha256 for t in target_sets},
        "sources": sorted(source.sha256 for source in sources),
    }
    if file.exists():
        metadata, tensors = open_tensors(file)
        if metadata == made_of:
            return Places(sources_of_store, **tensors)
    if store.num_rows == 0:
        no_rows = np.zeros(0, np.int64)
        return Places(sources_of_store, no_rows.astype(np.int32), no_rows, no_rows, no_rows.astype(np.float32))
    scorer = Scorer(store, config, model, tokenizer, [checkpoint.path], progress)
    influence, alive = scorer.score(target_sets)
    rows, numbers = influence.rows, [sources_of_store.index(sha256) for sha256 in made_of["sources"]]
    ranked_P = np.flatnonzero(np.isin(rows.sources_N, numbers))
    best_PS = np.stack([influence.of(t.name).score_N[ranked_P] for t in alive], axis=1)
    order_P, _ = select_round_robin(best_PS, len(ranked_P))
    ranks_P = np.empty(len(ranked_P), np.int64)
    ranks_P[order_P] = np.arange(1, len(ranked_P) + 1)
    places = Places(
        sources=sources_of_store,
        sources_P=rows.sources_N[ranked_P],
        rows_P=rows.rows_N[ranked_P],
        ranks_P=ranks_P,
        scores_P=influence.score_N[ranked_P],
    )
    write_tensors(file, made_of, {name: value for name, value in vars(places).items() if name != "sources"})
    return places
