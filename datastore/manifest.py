"""`manifest.json`: what a complete datastore holds. It is written last, and makes the store readable.

To the build it adds what was found: checksums, skipped rows, a bit for each row that a prefilter set aside, counts. A
row that was skipped or set aside by any shard is so everywhere. It must list just the files that its own build implies:
it can name none of its choosing. When it is written is left to `writer`, and reading what it lists to `store`.
"""

import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from datastore.build import Build, json_hash, read_json, write_json
from datastore.coding import row_bytes
from datastore.files import FileEntry, damaged
from datastore.shards import DELETED, SET_ASIDE, Shard, ShardKey, SkippedRow, bits_of, direction_path, rows_of

__all__ = ["MANIFEST", "FeatureEntry", "Manifest", "RowRange", "ShardEntry"]

MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class RowRange:
    """A range of a source's rows, and those of them that are in no block."""

    source: int
    "Number of the source."
    start: int
    "First row."
    stop: int
    "One past the last row."
    skipped: list[SkippedRow]
    "Rows skipped by any shard of the range, ascending; the reason is the first shard's that gives one."
    set_aside: str = ""
    "The rows that a prefilter set aside, as `datastore.shards.bits_of` has them; only shards have their labels."

    @property
    def rows_set_aside(self) -> list[int]:
        """The numbers of the rows that a prefilter set aside, ascending."""
        return rows_of(self.set_aside, self.start, self.stop)

    @property
    def num_set_aside(self) -> int:
        """How many these are."""
        return int(self.set_aside or "0", 16).bit_count()

    @property
    def num_scored(self) -> int:
        """Rows that every shard of the range has."""
        return self.stop - self.start - len(self.skipped) - self.num_set_aside

    def also_without(self, shard: Shard) -> Self:
        """The range without what this shard lacks too; what another has said of a row before stays."""
        known, set_aside = {row.row for row in self.skipped}, {*self.rows_set_aside}
        new = [row for row in shard.skipped if row.row not in known | set_aside]
        set_aside |= shard.set_aside.keys() - known
        return replace(
            self,
            skipped=sorted([*self.skipped, *new], key=lambda row: row.row),
            set_aside=bits_of(set_aside, self.start, self.stop),
        )

    def scored(self, rows_N: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which of N rows of the range every shard has, (N,) bool."""
        return ~np.isin(rows_N, [row.row for row in self.skipped] + self.rows_set_aside)


@dataclass(frozen=True, kw_only=True)
class FeatureEntry:
    """The shape of a feature set."""

    proj_dim: int
    "K, the length of a row."
    dtype: str
    "One of `datastore.coding.FEATURE_DTYPES`."


@dataclass(frozen=True, kw_only=True)
class ShardEntry(FileEntry):
    """What the manifest knows of a shard."""

    num_rows: int
    "Rows in the file, before those bad at another checkpoint are dropped."
    notes: dict[str, Any]
    "The shard's notes."


@dataclass(frozen=True, kw_only=True)
class Manifest(Build):
    """A complete store: its build, and what came of it."""

    features: dict[str, FeatureEntry]
    "For each feature set its shape."
    shards: dict[str, ShardEntry]
    "For each shard's path its checksum, size and rows."
    directions: dict[str, FileEntry]
    "For each momentum direction's path its checksum and size."
    ranges: list[RowRange]
    "Every row range, in pool order."

    @property
    def num_rows(self) -> int:
        """Rows that can be scored."""
        return sum(rows.num_scored for rows in self.ranges)

    @property
    def files(self) -> dict[str, FileEntry]:
        """Every file by its path."""
        return {**self.shards, **self.directions}

    @cached_property
    def sha256(self) -> str:
        """What `manifest.json` says of itself: another store, or the same one later, has another."""
        return str(self.to_json()["sha256"])

    def is_part_of(self, build: Build) -> bool:
        """Whether `build` has these settings, these sources before any other, and has deleted these rows too."""
        known = build.sources[: len(self.sources)]
        if (self.settings_hash, self.sources) != (build.settings_hash, known):
            return False
        return all({*rows} <= {*build.deleted.get(number, [])} for number, rows in self.deleted.items())

    @property
    def counts(self) -> dict[str, Any]:
        """`num_rows` of the sources, `num_scored`, and `num_skipped` by reason, rows set aside among them."""
        num_skipped = Counter(row.reason for rows in self.ranges for row in rows.skipped)
        if num_set_aside := sum(rows.num_set_aside for rows in self.ranges):
            num_skipped[SET_ASIDE] += num_set_aside
        return {
            "num_rows": sum(source.num_rows for source in self.sources),
            "num_scored": self.num_rows,
            "num_skipped": dict(num_skipped),
        }

    def to_json(self) -> dict[str, Any]:
        """All of it, with what can be computed from it; `sha256` is of all the rest as canonical JSON."""
        doc = super().to_json() | {"settings_hash": self.settings_hash, "counts": self.counts}
        for rows in doc["ranges"]:
            if not rows["set_aside"]:
                del rows["set_aside"]
        return doc | {"sha256": json_hash(doc)}

    def write(self, folder: Path) -> None:
        """Write `manifest.json`."""
        write_json(folder / MANIFEST, self.to_json())

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read `manifest.json`; `FileNotFoundError`, `FormatVersionError`, or `DamagedStoreError`."""
        path = folder / MANIFEST
        try:
            return cls.parse(read_json(path))
        except (FileNotFoundError, NotADirectoryError):
            raise
        except (OSError, ValueError, RecursionError) as error:
            raise damaged({path: str(error)}) from None

    @classmethod
    def parse(cls, doc: dict[str, Any]) -> Self:
        """The inverse of `to_json`; `ValueError`."""
        if doc.get("sha256") != json_hash({name: doc[name] for name in doc if name != "sha256"}):
            raise ValueError("its checksum is not that of its content")
        computed = ("settings_hash", "counts", "sha256")
        manifest = super().parse({name: doc[name] for name in doc if name not in computed})
        manifest._check_parts()
        if doc != manifest.to_json():
            raise ValueError("its settings_hash or counts do not fit its content")
        return manifest

    def _check_parts(self) -> None:
        """Raise `ValueError` unless ranges, skipped rows and files are those that the build implies."""
        found = ((rows.source, rows.start, rows.stop) for rows in self.ranges)
        for ours, expected in itertools.zip_longest(found, self.row_ranges()):
            if ours != expected:
                raise ValueError(f"its row ranges have {ours} in the place of {expected}")
        for rows in self.ranges:
            numbers = [row.row for row in rows.skipped]
            if numbers != sorted(set(numbers)) or any(not rows.start <= n < rows.stop for n in numbers):
                raise ValueError(f"its skipped rows {numbers} are not in {rows.start} to {rows.stop} in order")
            if both := sorted({*numbers} & {*rows.rows_set_aside}):
                raise ValueError(f"its rows {both[:5]} from {rows.start} on are both skipped and set aside")
            deleted = [row for row in rows.skipped if row.reason == DELETED]
            if deleted != self.deleted_rows(rows.source, rows.start, rows.stop):
                raise ValueError(
                    f"the rows from {rows.start} to {rows.stop} skipped as deleted are not the deleted ones"
                )
        num_directions = len(self.feature_sets) * len(self.checkpoints)
        for what, files, num_needed in (
            ("shards", self.shards, num_directions * len(self.ranges)),
            ("directions", self.directions, num_directions),
        ):  # before any is named: a short list of names and one of ranges imply more paths than memory can hold
            if len(files) != num_needed:
                raise ValueError(f"its {what} are {len(files)}, expected {num_needed}")
        keys = {key.path: key for key in self.shard_keys()}
        for what, names, needed in (
            ("features", {*self.features}, {*self.feature_sets}),
            ("shards", {*self.shards}, {*keys}),
            ("directions", {*self.directions}, {direction_path(*key) for key in self.direction_keys()}),
        ):
            if odd := sorted(names ^ needed):
                raise ValueError(f"its {what} lack or should not have {', '.join(odd[:5])}")
        self._check_sizes(keys)

    def _check_sizes(self, keys: Mapping[str, ShardKey]) -> None:
        """Raise `ValueError` for rows or columns that the files, by path, have no room for: arrays are made by them."""
        for name, feature in self.features.items():
            if feature.proj_dim < 1:
                raise ValueError(f"its feature set {name} has {feature.proj_dim} columns, expected 1 or more")
        for name, checkpoint in self.direction_keys():
            path, proj_dim = direction_path(name, checkpoint), self.features[name].proj_dim
            if self.directions[path].num_bytes < row_bytes("float32", proj_dim):
                raise ValueError(f"{path} has {self.directions[path].num_bytes} bytes for {proj_dim} columns")
        num_scored = {(rows.source, rows.start): rows.num_scored for rows in self.ranges}
        num_bytes = {name: row_bytes(feature.dtype, feature.proj_dim) for name, feature in self.features.items()}
        for path, key in keys.items():
            shard, least, most = self.shards[path], num_scored[key.source, key.start], key.stop - key.start
            if not least <= shard.num_rows <= most:
                raise ValueError(f"{path} has {shard.num_rows} rows, expected {least} to {most}")
            if shard.num_bytes < shard.num_rows * num_bytes[key.feature_set]:
                raise ValueError(f"{path} has {shard.num_bytes} bytes for {shard.num_rows} rows")
