"""The writer: opens a folder for one process, adds sources and shards, and seals the store.

A build can be killed at any time. What has its final name is whole, so a rerun computes only what is missing;
a sealed store stays readable while rows are added to it, until the new manifest takes the old one's place.

What is computed, and in what order, is left to the caller.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from datastore.build import BUILD, Build, SourceEntry
from datastore.errors import StoreError
from datastore.files import (
    FileEntry,
    canonical_json,
    damaged,
    disk_errors,
    hash_file,
    lock_folder,
    make_folder,
    remove_temporary_files,
)
from datastore.manifest import MANIFEST, FeatureEntry, Manifest, RowRange, ShardEntry
from datastore.shards import (
    Shard,
    ShardKey,
    SkippedRow,
    direction_path,
    open_direction,
    open_shard,
    write_direction,
    write_shard,
)

__all__ = ["DatastoreWriter"]


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
        folder = Path(path).absolute()
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
                    f"{folder} is not a datastore: it has {min(names)} and no {BUILD}. "
                    "Choose another --datastore folder."
                )
            lock = lock_folder(folder)
        try:
            remove_temporary_files(folder)
            if not (folder / BUILD).exists():
                asked.write(folder)
            build = Build.load(folder)
            build.check_same_settings(asked, folder)
            return cls(folder, build, environment, lock)
        except BaseException:
            os.close(lock)
            raise

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

    @property
    def is_sealed(self) -> bool:
        """Whether the manifest covers every source; with nothing missing there is nothing to do."""
        return self._sealed is not None and self._sealed.sources == self.build.sources

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
        """Write the manifest: from here on the store can be read. It changes nothing if nothing was added.

        Raises `StoreError` if a shard or a momentum direction is missing.
        """
        missing = [key.path for key in self.missing_shards()]
        if missing := missing + [direction_path(*key) for key in self.missing_directions()]:
            raise StoreError(
                f"the datastore {self.path} lacks {len(missing)} files, the first {missing[0]}. Rerun "
                "`gradsift build-datastore` with every --data it was given: it computes what is missing."
            )
        features: dict[str, FeatureEntry] = {}
        shards: dict[str, ShardEntry] = {}
        skipped: dict[tuple[int, int, int], dict[int, SkippedRow]] = {}
        for key in self.build.shard_keys():
            shard = open_shard(self.path, key, self._settings_hash)
            feature = FeatureEntry(proj_dim=shard.features_NK.shape[1], dtype=str(shard.features_NK.dtype))
            self._expect(key.path, feature, features.setdefault(key.feature_set, feature))
            entry = self._entry(key.path)
            shards[key.path] = ShardEntry(
                sha256=entry.sha256, num_bytes=entry.num_bytes, num_rows=len(shard.ids), notes=shard.notes
            )
            rows = skipped.setdefault((key.source, key.start, key.stop), {})
            for row in shard.skipped:
                rows.setdefault(row.row, row)
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
            ranges=[
                RowRange(
                    source=source,
                    start=start,
                    stop=stop,
                    skipped=sorted(skipped[source, start, stop].values(), key=lambda row: row.row),
                )
                for source, start, stop in self.build.row_ranges()
            ],
        )
        if manifest != self._sealed:
            manifest.write(self.path)
            self._sealed = manifest
        return manifest

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
        if self._environment not in self.build.environments:
            self.build = replace(self.build, environments=[*self.build.environments, self._environment])
            self.build.write(self.path)


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping as it comes back from JSON."""
    plain: dict[str, Any] = json.loads(canonical_json(dict(value)))
    return plain
