"""The writer: opens a folder for one process, adds sources and shards, and seals the store.

A build can be killed at any time. What has its final name is whole, so a rerun computes only what is missing;
a sealed store stays readable while rows are added to it, until the new manifest takes the old one's place.
Likewise a deletion: `build.json` says first which rows are to go, so that whoever opens the store for writing next
goes on with it; shards without them are written beside the old ones; the manifest changes from these to those; then
what the rows were in is removed.

What is computed, and in what order, is left to the caller.
"""

import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from datastore.beside import EMBEDDINGS, beside, remove_made_from, remove_store
from datastore.build import BUILD, Build, SourceEntry
from datastore.errors import DamagedStoreError, StoreError
from datastore.files import (
    FileEntry,
    canonical_json,
    damaged,
    disk_errors,
    hash_file,
    lock_folder,
    make_folder,
    remove_temporary_files,
    sync_folder,
)
from datastore.manifest import MANIFEST, FeatureEntry, Manifest, RowRange, ShardEntry
from datastore.shards import (
    Shard,
    ShardKey,
    direction_path,
    drop_rows,
    open_direction,
    open_shard,
    write_direction,
    write_shard,
)

__all__ = ["DatastoreWriter", "iter_stale_shards"]

_SHARD = re.compile(r"s\d{4,}-\d{10,}-\d{10,}(-[0-9a-f]{8})?\.safetensors")


class DatastoreWriter:
    """A datastore open for writing; a context manager, and the only writer as long as it is open.

    >>> with DatastoreWriter.open(folder, settings=..., environment=..., ...) as writer:
    ...     writer.add_source(source)
    ...     for key in writer.missing_shards():
    ...         writer.write_shard(key, compute(key))
    ...     for feature_set, checkpoint in writer.missing_directions():
    ...         writer.write_direction(feature_set, checkpoint, momentum(feature_set, checkpoint))
    ...     writer.seal()
    """

    def __init__(self, path: Path, build: Build, environment: Mapping[str, Any], lock: int) -> None:
        """Use `open`."""
        self.path = path
        self.build = build
        self._settings_hash = build.settings_hash
        self._environment = _plain(environment)
        self._lock = lock
        self._written: dict[str, FileEntry] = {}
        self._sealed = Manifest.load(path) if (path / MANIFEST).exists() else None
        if self._sealed and not self._sealed.is_part_of(build):
            raise damaged({path / MANIFEST: f"it does not belong to {BUILD}"})

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        settings: Mapping[str, Any],
        environment: Mapping[str, Any],
        feature_sets: Sequence[str],
        checkpoints: Sequence[str],
        shard_rows: int,
    ) -> Self:
        """Create a store, or open one to resume it or to add to it.

        Raises `SettingError` (names, `shard_rows`), `StoreError` (a folder of something else, or one that
        cannot be written), `StoreLockedError`, `ProvenanceError` (other settings), `DamagedStoreError`,
        `FormatVersionError`.
        """
        folder, given = Path(path).resolve(), Path(path).absolute()  # one name, beside which things lie
        asked = Build(
            feature_sets=list(feature_sets),
            checkpoints=list(checkpoints),
            shard_rows=shard_rows,
            settings=_plain(settings),
            environments=[],
            sources=[],
        )
        asked.check()
        with disk_errors(folder):
            make_folder(folder)
            names = {entry.name for entry in folder.iterdir() if not entry.name.startswith(".")}
            if names and BUILD not in names:
                raise StoreError(
                    f"{given} is not a datastore: it has {min(names)} and no {BUILD}. "
                    "Choose another --datastore folder."
                )
            lock = lock_folder(folder)
        try:
            remove_temporary_files(folder)
            if not (folder / BUILD).exists():
                asked.write(folder)
            build = Build.load(folder)
            build.check_same_settings(asked, folder)
            writer = cls(folder, build, environment, lock)
            writer._write_editions()
            writer._remove_stale_shards()
        except BaseException:
            os.close(lock)
            raise
        return writer

    @classmethod
    def reopen(cls, path: str | os.PathLike[str]) -> Self:
        """Open a store that is there, with its own settings. Raises as `open`, and `StoreError` where there is none."""
        folder = Path(path).resolve()
        if not (folder / BUILD).is_file():
            raise StoreError(f"no datastore at {Path(path).absolute()}: expected a folder with {BUILD}")
        known = Build.load(folder)
        return cls.open(
            folder,
            settings=known.settings,
            environment=known.environments[-1] if known.environments else {},
            feature_sets=known.feature_sets,
            checkpoints=known.checkpoints,
            shard_rows=known.shard_rows,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let another process write."""
        if self._lock >= 0:
            os.ftruncate(self._lock, 0)
            os.close(self._lock)
            self._lock = -1

    def add_source(self, source: SourceEntry) -> int:
        """`add_sources` of one."""
        return self.add_sources([source])[0]

    def add_sources(self, sources: Sequence[SourceEntry]) -> list[int]:
        """Each source's number: its old one if its content is known. All are added, or none.

        Raises `ProvenanceError` if a known file has changed since.
        """
        build, numbers = self.build, []
        for source in sources:
            build, number = build.with_source(source)
            numbers.append(number)
        if build is not self.build:
            build.check()
            build.write(self.path)
            self.build = build
        return numbers

    def add_environments(self, environments: Sequence[Mapping[str, Any]]) -> None:
        """Record machines and versions that made what is about to be written, each once: the last is the last."""
        known = list(self.build.environments)
        for environment in map(_plain, environments):
            known = [one for one in known if one != environment] + [environment]
        if known != self.build.environments:
            self.build = replace(self.build, environments=known)
            self.build.write(self.path)

    def delete(
        self, rows: Mapping[int, Collection[int]], advance: Callable[[int], None] = lambda num_shards: None
    ) -> None:
        """Delete rows, by number of their source: for good once this returns, from the shards once `seal` does.

        Shards that hold them are written anew without them, and `advance` is told of each. Raises `SettingError` for
        a row that there is not, `DiskFullError`.
        """
        build = self.build.with_deleted(rows)
        if build != self.build:
            build.write(self.path)
            self.build = build
        self._write_editions(advance)

    @property
    def is_sealed(self) -> bool:
        """Whether the manifest covers every source; with nothing missing there is nothing to do."""
        sealed, build = self._sealed, self.build
        return sealed is not None and (sealed.sources, sealed.deleted) == (build.sources, build.deleted)

    def has_shard(self, key: ShardKey) -> bool:
        """Whether the shard is done; `DamagedStoreError` for a file that is not what its name says."""
        if not (self.path / key.path).exists():
            return False
        open_shard(self.path, key, self._settings_hash)
        return True

    def missing_shards(self) -> list[ShardKey]:
        """What is still to be computed, checkpoint by checkpoint, then in pool order."""
        return [key for key in self.build.shard_keys() if not self.has_shard(key)]

    def missing_directions(self) -> list[tuple[str, str]]:
        """(feature set, checkpoint) of the momentum directions that are still to be written."""
        return [key for key in self.build.direction_keys() if not (self.path / direction_path(*key)).exists()]

    def write_shard(self, key: ShardKey, shard: Shard) -> None:
        """Write a shard whole or not at all. `ValueError` if it does not fit `key`, `DiskFullError`."""
        self._record_environment()
        self._written[key.path] = write_shard(self.path, key, self._settings_hash, shard)

    def write_direction(self, feature_set: str, checkpoint: str, direction_K: npt.NDArray[np.float32]) -> None:
        """Write Π Γ(0) of a checkpoint, (K,); zeros for an update rule without momentum."""
        self._record_environment()
        self._written[direction_path(feature_set, checkpoint)] = write_direction(
            self.path, feature_set, checkpoint, self._settings_hash, direction_K
        )

    def seal(self) -> Manifest:
        """Write the manifest: from here on the store can be read. It changes nothing if nothing was added or deleted.

        Raises `StoreError` if a shard or a momentum direction is missing, or what lies beside the store and is made
        from rows that are deleted cannot be removed.
        """
        missing = [key.path for key in self.missing_shards()]
        if missing := missing + [direction_path(*key) for key in self.missing_directions()]:
            raise StoreError(
                f"the datastore {self.path} lacks {len(missing)} files, the first {missing[0]}. Rerun "
                "`gradsift build-datastore` with every --data it was given: it computes what is missing."
            )
        features: dict[str, FeatureEntry] = {}
        shards: dict[str, ShardEntry] = {}
        ranges = {
            place: RowRange(source=place[0], start=place[1], stop=place[2], skipped=[])
            for place in self.build.row_ranges()
        }
        for key in self.build.shard_keys():
            shard = open_shard(self.path, key, self._settings_hash)
            feature = FeatureEntry(proj_dim=shard.features_NK.shape[1], dtype=str(shard.features_NK.dtype))
            self._expect(key.path, feature, features.setdefault(key.feature_set, feature))
            entry = self._entry(key.path)
            shards[key.path] = ShardEntry(
                sha256=entry.sha256, num_bytes=entry.num_bytes, num_rows=len(shard.ids), notes=shard.notes
            )
            place = key.source, key.start, key.stop
            ranges[place] = ranges[place].also_without(shard)
        directions = {}
        for name, checkpoint in self.build.direction_keys():
            direction_K = open_direction(self.path, name, checkpoint, self._settings_hash)
            path = direction_path(name, checkpoint)
            self._expect(path, len(direction_K), features[name].proj_dim)
            directions[path] = self._entry(path)
        manifest = Manifest(
            **vars(self.build),
            features=features,
            shards=shards,
            directions=directions,
            ranges=list(ranges.values()),
        )
        if manifest != self._sealed:
            known = self._sealed.deleted if self._sealed else {}
            manifest.write(self.path)
            self._sealed = manifest
            self._remove_stale_shards(rows_have_gone=manifest.deleted != known)
        return manifest

    def _write_editions(self, advance: Callable[[int], None] = lambda num_shards: None) -> None:
        """Write the shards of ranges that rows are deleted from, out of those that the manifest lists.

        What is damaged there is left to be computed anew, without the deleted rows.
        """
        sealed = self._sealed
        if sealed is None or sealed.deleted == self.build.deleted:
            return
        for old in sealed.shard_keys():
            new = self.build.shard_key(old.feature_set, old.checkpoint, old.source, old.start, old.stop)
            if new == old:
                continue
            if not (self.path / new.path).exists():
                try:
                    shard = open_shard(self.path, old, self._settings_hash, sealed.shards[old.path].sha256)
                except DamagedStoreError:
                    continue
                shard = drop_rows(shard, self.build.deleted_rows(new.source, new.start, new.stop))
                self._written[new.path] = write_shard(self.path, new, self._settings_hash, shard)
            advance(1)

    def _remove_stale_shards(self, *, rows_have_gone: bool = False) -> None:
        """Remove shards that neither the manifest nor the build has, after what was made from rows in them.

        In this order: as long as there are such shards, a writer that was killed here is known to have left its work.
        """
        stale = list(iter_stale_shards(self.path, self.build, self._sealed))
        if rows_have_gone or (stale and self.build.deleted):
            remove_made_from(self.path)
            self._delete_from_embeddings()
        with disk_errors(self.path):
            for file in stale:
                file.unlink()
            for folder in {file.parent for file in stale}:
                sync_folder(folder)

    def _delete_from_embeddings(self) -> None:
        """Delete from the embeddings beside the store what is deleted from it; remove them if they are unfinished."""
        folder = beside(self.path, EMBEDDINGS)
        if not (folder / BUILD).is_file():
            return
        deleted = {source.sha256: self.build.deleted.get(str(n), []) for n, source in enumerate(self.build.sources)}
        with type(self).reopen(folder) as writer:
            known = writer.build.sources
            writer.delete({number: deleted.get(source.sha256, []) for number, source in enumerate(known)})
            is_whole = not (writer.missing_shards() or writer.missing_directions())
            if is_whole:
                writer.seal()
        if not is_whole:
            remove_store(folder)

    def _entry(self, path: str) -> FileEntry:
        """Checksum and size. A file is hashed as it is written; read for it only if that run was killed."""
        known = self._written.get(path) or (self._sealed and self._sealed.files.get(path))
        if not known:
            return hash_file(self.path / path)
        self._expect(path, (self.path / path).stat().st_size, known.num_bytes)
        return FileEntry(sha256=known.sha256, num_bytes=known.num_bytes)

    def _expect(self, path: str, found: object, expected: object) -> None:
        if found != expected:
            raise damaged({self.path / path: f"it has {found}, expected {expected}"})

    def _record_environment(self) -> None:
        self.add_environments([self._environment])


def iter_stale_shards(folder: Path, build: Build, sealed: Manifest | None) -> Iterator[Path]:
    """The files of a store's shards that neither the manifest lists nor the build needs."""
    needed = {key.path for key in build.shard_keys()} | (sealed.shards.keys() if sealed else set())
    root = folder.resolve()
    for file in folder.glob("shards/*/*/s*.safetensors"):
        inside = file.parent.resolve().is_relative_to(root)  # else a link would have files elsewhere removed
        if inside and _SHARD.fullmatch(file.name) and str(file.relative_to(folder)) not in needed:
            yield file


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping as it comes back from JSON."""
    plain: dict[str, Any] = json.loads(canonical_json(dict(value)))
    return plain
