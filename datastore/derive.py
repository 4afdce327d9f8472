"""Stores made of other stores: merged, split, with features in fewer bits, without what was deleted.

    (new source, new row) ← (store, source, row)

Each is a list of sources, new ones and where their rows come from, through a `DatastoreWriter`: it is locked, can be
killed and run again, and grows afterwards like a store that was built. No model runs; every shard read is checked.

Whether an edited file is the old one without the deleted rows is `less.compaction`'s business.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from datastore.build import Build, SourceEntry, differences
from datastore.coding import FEATURE_DTYPES, CodedRows, Features, as_float32, check_feature_dtype, encode, row_bytes
from datastore.deletion import Watch
from datastore.errors import ProvenanceError, SettingError, StoreError
from datastore.files import check_free_space
from datastore.manifest import Manifest
from datastore.shards import DELETED, Shard, ShardKey, SkippedRow, drop_rows, take_rows
from datastore.store import Datastore
from datastore.writer import DatastoreWriter

__all__ = ["Renumbered", "compact_store", "convert_store", "merge_stores", "split_folders", "split_store"]


def _no_watch(done: int, total: int) -> None:
    """Nobody waits."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Renumbered:
    """A source that has R rows of an old one, in their order."""

    entry: SourceEntry
    "The new source."
    rows_R: npt.NDArray[np.int64]
    "The old number of each row, ascending."
    named: Callable[[int, int], Sequence[tuple[str, str]]]
    "From the first row to one past the last, label and place of each of some new rows."


@dataclass(frozen=True, kw_only=True, eq=False)
class _Part:
    """A source of the new store."""

    store: Datastore
    number: int
    "Of the old source in its store."
    renumbered: Renumbered | None = None
    "None for a source that is taken as it is, its deleted rows too."

    @property
    def entry(self) -> SourceEntry:
        return self.renumbered.entry if self.renumbered else self.store.sources[self.number]

    @property
    def share_scored(self) -> float:
        """Scored rows per row that is not deleted: a prefilter leaves few."""
        manifest = self.store.manifest
        num_rows = self.store.sources[self.number].num_rows - len(manifest.deleted.get(str(self.number), []))
        num_scored = sum(rows.num_scored for rows in manifest.ranges if rows.source == self.number)
        return num_scored / max(num_rows, 1)


def merge_stores(out: str | os.PathLike[str], stores: Sequence[Datastore], *, watch: Watch = _no_watch) -> Manifest:
    """One store with the sources of several, in their order; rows deleted from one of them are deleted from it.

    Raises:
        ProvenanceError: they were built with other settings, naming each, or one source is in two of them.
        SettingError: fewer than two stores, or `out` is one of them.
    """
    if len(stores) < 2:
        raise SettingError(f"expected two stores or more to merge, got {len(stores)}")
    first, place_of = stores[0], dict[str, Path]()
    for store in stores:
        if different := differences(first.manifest.fixed(), store.manifest.fixed(), str(first.path), str(store.path)):
            raise ProvenanceError(
                f"{first.path} and {store.path} were built with different settings: {'; '.join(different)}. Expected "
                "stores of the same settings; build one of them again"
            )
        for source in store.sources:
            if source.sha256 in place_of:
                raise ProvenanceError(
                    f"the source {source.name} (sha256 {source.sha256[:12]}) is in {place_of[source.sha256]} and in "
                    f"{store.path}; expected each source once. Leave out one of the stores, or split it first"
                )
            place_of[source.sha256] = store.path
    parts = [_Part(store=store, number=number) for store in stores for number in range(len(store.sources))]
    return _derive(out, parts, watch=watch)


def split_folders(store: Datastore, folder: str | os.PathLike[str]) -> list[Path]:
    """A folder for each source of a store: by its name, with its number where names are alike.

    Where a number makes two names alike, as of `a`, `a` and `a-1`, all have theirs.
    """
    names = [
        re.sub(r"[^A-Za-z0-9._-]+", "-", Path(source.name).stem).strip("-.") or "source" for source in store.sources
    ]
    numbered = [f"{name}-{number}" for number, name in enumerate(names)]
    chosen = [full if names.count(name) > 1 else name for name, full in zip(names, numbered, strict=True)]
    return [Path(folder) / name for name in (chosen if len(set(chosen)) == len(chosen) else numbered)]


def split_store(store: Datastore, folder: str | os.PathLike[str], *, watch: Watch = _no_watch) -> list[Path]:
    """A store for each source, in `split_folders`."""
    folders = split_folders(store, folder)
    total, done = len(store.manifest.shards), 0
    for number, out in enumerate(folders):
        before = done

        def count(here: int, _: int, before: int = before) -> None:
            watch(before + here, total)

        done += len(_derive(out, [_Part(store=store, number=number)], watch=count).shards)
    return folders


def convert_store(
    store: Datastore,
    out: str | os.PathLike[str],
    *,
    feature_dtype: str | None = None,
    feature_sets: Sequence[str] = (),
    checkpoints: Sequence[str] = (),
    watch: Watch = _no_watch,
) -> Manifest:
    """A smaller store: features in fewer bits, or only some feature sets or checkpoints.

    From float32 the shards have the bytes that a build with this dtype would give them; else a note in each says what
    it was coded from. The weights of the checkpoints that are kept are scaled to a sum of 1, as a build scales them.

    Raises:
        SettingError: more bits than the store has, no such feature set or checkpoint, a K that does not fit, or nothing
            to do.
    """
    manifest = store.manifest
    names = _chosen("feature set", feature_sets, store.feature_sets, store)
    kept = _chosen("checkpoint", checkpoints, store.checkpoints, store)
    dtypes = {name: manifest.features[name].dtype for name in names}
    if feature_dtype is not None:
        check_feature_dtype(feature_dtype)
        for name, dtype in dtypes.items():
            if FEATURE_DTYPES.index(feature_dtype) < FEATURE_DTYPES.index(dtype):
                raise SettingError(
                    f"{name} of {store.path} has {dtype} features; expected that or fewer bits, got {feature_dtype}. "
                    "What is not stored cannot be brought back: build the store again"
                )
            row_bytes(feature_dtype, manifest.features[name].proj_dim)
        dtypes = dict.fromkeys(names, feature_dtype)
    if (names, kept) == (store.feature_sets, store.checkpoints) and all(
        dtypes[name] == manifest.features[name].dtype for name in names
    ):
        raise SettingError(
            f"{store.path} has these features already; choose fewer bits with --feature-dtype, or some of its feature "
            "sets or checkpoints"
        )
    parts = [_Part(store=store, number=number) for number in range(len(store.sources))]
    settings = _narrowed(store.settings, dtypes, kept)
    where = [store.checkpoints.index(name) for name in kept]
    environments = [_at_checkpoints(one, len(store.checkpoints), where) for one in manifest.environments]
    return _derive(
        out, parts, settings=settings, environments=environments, dtypes=dtypes, checkpoints=kept, watch=watch
    )


def compact_store(
    store: Datastore,
    out: str | os.PathLike[str],
    renumbered: Mapping[int, Renumbered] | None = None,
    *,
    watch: Watch = _no_watch,
) -> Manifest:
    """A store in which deleted rows have left no trace.

    Args:
        store: rows of which were deleted.
        out: the new store's folder.
        renumbered: for each source that lost some of its rows, what takes its place. A source that lost all of them is
            left out, one that lost none is taken as it is.
        watch: told of shards.

    Raises:
        SettingError: nothing was deleted, everything was, or a source that lost rows has nothing in its place.
    """
    renumbered = renumbered or {}
    if not store.manifest.deleted:
        raise SettingError(f"{store.path} has no deleted row: it is compact already")
    parts = []
    for number, source in enumerate(store.sources):
        num_deleted = len(store.manifest.deleted.get(str(number), []))
        if num_deleted == source.num_rows:
            continue
        if num_deleted and number not in renumbered:
            raise SettingError(
                f"{num_deleted} of {source.num_rows} rows of {source.name} are deleted from {store.path}, and its "
                "other rows would still bear their old numbers; give the file without these rows with --data"
            )
        parts.append(_Part(store=store, number=number, renumbered=renumbered.get(number)))
    if not parts:
        raise SettingError(f"every row of {store.path} is deleted: no store is left. Delete its folder instead")
    return _derive(out, parts, watch=watch)


def _derive(
    out: str | os.PathLike[str],
    parts: Sequence[_Part],
    *,
    watch: Watch,
    settings: Mapping[str, Any] | None = None,
    environments: Sequence[Mapping[str, Any]] | None = None,
    dtypes: Mapping[str, str] | None = None,
    checkpoints: Sequence[str] | None = None,
) -> Manifest:
    """The store of these parts; what is None is as in the first one's store."""
    first = parts[0].store
    if dtypes is None:
        dtypes = {name: first.manifest.features[name].dtype for name in first.feature_sets}
    if environments is None:
        environments = [one for store in {part.store.path: part.store for part in parts}.values()
                        for one in store.manifest.environments]  # fmt: skip
    folder = Path(out).absolute()
    for part in parts:
        if folder.resolve() == part.store.path.resolve():
            raise SettingError(f"{folder} is the store that is read; choose another folder for the new one")
    with DatastoreWriter.open(
        folder,
        settings=first.settings if settings is None else settings,
        environment=environments[-1] if environments else {},
        feature_sets=list(dtypes),
        checkpoints=first.checkpoints if checkpoints is None else checkpoints,
        shard_rows=first.manifest.shard_rows,
    ) as writer:
        wanted = {part.entry.sha256 for part in parts}
        if strange := [source.name for source in writer.build.sources if source.sha256 not in wanted]:
            raise StoreError(f"{folder} is a datastore with another source, {strange[0]}; choose another folder")
        numbers = writer.add_sources([part.entry for part in parts])
        part_of = dict(zip(numbers, parts, strict=True))
        writer.delete(
            {
                number: part.store.manifest.deleted.get(str(part.number), [])
                for number, part in part_of.items()
                if part.renumbered is None
            }
        )
        missing = writer.missing_shards()
        check_free_space(folder, _num_bytes(missing, part_of, dtypes))
        if missing:  # else nothing of theirs is copied in
            writer.add_environments(environments)
        total = sum(1 for _ in writer.build.shard_keys())
        watch(total - len(missing), total)
        for done, key in enumerate(missing, start=total - len(missing) + 1):
            writer.write_shard(key, _shard(part_of[key.source], key, writer.build, dtypes[key.feature_set]))
            watch(done, total)
        for name, checkpoint in writer.missing_directions():
            writer.write_direction(name, checkpoint, first.direction(name, checkpoint))
        return writer.seal()


def _shard(part: _Part, key: ShardKey, build: Build, dtype: str) -> Shard:
    if part.renumbered is None:
        old = part.store.manifest.shard_key(key.feature_set, key.checkpoint, part.number, key.start, key.stop)
        shard = drop_rows(part.store.shard(old), build.deleted_rows(key.source, key.start, key.stop))
    else:
        shard = _renumbered(part, key, part.renumbered)
    return _coded(shard, dtype)


def _renumbered(part: _Part, key: ShardKey, to: Renumbered) -> Shard:
    """One new shard, out of the old ones that its rows are in."""
    old_rows = to.rows_R[key.start : key.stop]
    shards = [take_rows(shard, np.isin(shard.rows_N, old_rows)) for shard in _iter_shards(part, key, old_rows)]
    skipped = {row.row: row for shard in shards for row in shard.skipped if row.reason != DELETED}
    rows_set_aside = {row for shard in shards for row in shard.set_aside}
    new_rows_N = np.searchsorted(to.rows_R, np.concatenate([shard.rows_N for shard in shards]))
    named = dict(zip(range(key.start, key.stop), to.named(key.start, key.stop), strict=True))
    numbers = {
        name: np.concatenate([getattr(shard, name) for shard in shards])
        for name, value in vars(shards[0]).items()
        if isinstance(value, np.ndarray) and name not in ("rows_N", "features_NK")
    }
    return Shard(
        rows_N=new_rows_N.astype(np.int64),
        ids=[named[row][0] for row in new_rows_N.tolist()],
        features_NK=_concatenated([shard.features_NK for shard in shards]),
        skipped=[
            SkippedRow(row=row, where=where, id=label, reason=found.reason, detail=found.detail)
            for row, (label, where) in named.items()
            if (found := skipped.get(int(to.rows_R[row]))) is not None
        ],
        set_aside={row: label for row, (label, _) in named.items() if int(to.rows_R[row]) in rows_set_aside},
        notes={name: value for shard in shards for name, value in shard.notes.items()},
        **numbers,
    )


def _iter_shards(part: _Part, key: ShardKey, old_rows: npt.NDArray[np.int64]) -> Iterator[Shard]:
    manifest = part.store.manifest
    step, num_rows = manifest.shard_rows, part.store.sources[part.number].num_rows
    for start in np.unique(old_rows - old_rows % step).tolist():
        stop = min(start + step, num_rows)
        yield part.store.shard(manifest.shard_key(key.feature_set, key.checkpoint, part.number, start, stop))


def _concatenated(parts: Sequence[Features]) -> Features:
    if isinstance(first := parts[0], CodedRows):
        coded = [part for part in parts if isinstance(part, CodedRows)]
        codes_NX = np.concatenate([part.codes_NX for part in coded])
        return CodedRows(
            dtype=first.dtype, codes_NX=codes_NX, scales_N=np.concatenate([part.scales_N for part in coded])
        )
    return np.concatenate([np.asarray(part) for part in parts])


def _coded(shard: Shard, dtype: str) -> Shard:
    """A shard with its features in this dtype."""
    before = str(shard.features_NK.dtype)
    if before == dtype:
        return shard
    features_NK = as_float32(shard.features_NK)
    if isinstance(shard.features_NK, CodedRows):  # a code is longer than the unit row that it stands for
        features_NK = features_NK / np.linalg.norm(features_NK, axis=1, keepdims=True)
    notes = shard.notes if before == "float32" else {**shard.notes, "converted_from": before}
    return replace(shard, features_NK=encode(features_NK, dtype), notes=notes)


def _chosen(what: str, asked: Sequence[str], known: list[str], store: Datastore) -> list[str]:
    if strange := [name for name in asked if name not in known]:
        raise SettingError(f"{store.path} has no {what} {strange[0]!r}; it has {', '.join(known)}")
    return [name for name in known if name in asked] if asked else known


def _narrowed(settings: Mapping[str, Any], dtypes: Mapping[str, str], checkpoints: Sequence[str]) -> dict[str, Any]:
    """Settings of a build that would have made these feature sets at these checkpoints only."""
    narrow = dict(settings)
    if "feature_sets" in settings:
        narrow["feature_sets"] = {name: {**settings["feature_sets"][name], "dtype": dtypes[name]} for name in dtypes}
    if "checkpoints" in settings:
        kept = {name: settings["checkpoints"][name] for name in checkpoints}
        total = sum(entry["weight"] for entry in kept.values())
        if total <= 0:
            raise SettingError(f"the checkpoints {', '.join(kept)} have no weight in the score; choose others")
        if len(kept) < len(settings["checkpoints"]):
            kept = {name: {**entry, "weight": entry["weight"] / total} for name, entry in kept.items()}
        narrow["checkpoints"] = kept
    return narrow


def _at_checkpoints(environment: Mapping[str, Any], num_checkpoints: int, kept: Sequence[int]) -> dict[str, Any]:
    """An environment that names the places of these checkpoints only."""
    places = environment.get("checkpoints")
    if not isinstance(places, list) or len(places) != num_checkpoints:
        return dict(environment)
    return {**environment, "checkpoints": [places[number] for number in kept]}


def _num_bytes(keys: Sequence[ShardKey], part_of: Mapping[int, _Part], dtypes: Mapping[str, str]) -> int:
    """About what features take: as if the scored rows of a source were spread evenly over those not deleted."""
    share_of = {number: part.share_scored for number, part in part_of.items()}
    manifest = next(iter(part_of.values())).store.manifest
    of_row = {name: row_bytes(dtype, manifest.features[name].proj_dim) for name, dtype in dtypes.items()}
    num_rows = ((key.stop - key.start - len(key.deleted)) * share_of[key.source] for key in keys)
    return round(sum(rows * of_row[key.feature_set] for key, rows in zip(keys, num_rows, strict=True)))
