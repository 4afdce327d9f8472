"""A complete datastore, open for reading: rows, statistics, and features block by block.

Pool order is the order of everything here: sources in the order they were added, rows as they stand in them,
without those that were skipped or set aside. A position is a place in that order. Features are views of the file
wherever no row of their shard is dropped, and a file's checksum is checked before its first use.

Scores are left to `less.influence`, neighbours to `search`.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from itertools import compress, islice, product
from pathlib import Path
from typing import Any, Self, overload

import numpy as np
import numpy.typing as npt

from datastore.build import BUILD, SourceEntry
from datastore.coding import Features
from datastore.errors import DamagedStoreError, SettingError, StoreError
from datastore.files import FileEntry, damaged, hash_file, read_through
from datastore.manifest import MANIFEST, Manifest, RowRange
from datastore.overlap import read_ahead
from datastore.shards import SET_ASIDE, Shard, ShardKey, SkippedRow, direction_path, open_direction, open_shard

__all__ = ["Block", "Datastore", "RowIds", "RowStats", "RowTable"]

COLUMN_DTYPES: dict[str, npt.DTypeLike] = {
    "rows_N": np.int64, "digests_N": np.uint64, "truncated_N": np.bool_,
    "num_tokens_N": np.int32, "num_supervised_N": np.int32,
    "norms_N": np.float32, "grad_norms_N": np.float32, "update_norms_N": np.float32, "losses_N": np.float32,
}  # fmt: skip
Keep = slice | npt.NDArray[np.bool_]
NUM_READERS = 2  # one waits for the disk while the other computes a checksum


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """The features of n consecutive positions."""

    start: int
    "Position of the first row."
    features_nK: Features
    "Unit rows, as stored: a view of the file unless rows had to be dropped."
    norms_n: npt.NDArray[np.float32]
    "Their norms before they were made unit rows."

    @property
    def stop(self) -> int:
        """One past the position of the last row."""
        return self.start + len(self.norms_n)


@dataclass(frozen=True, kw_only=True, eq=False)
class RowTable:
    """What is known of each of N rows, in pool order."""

    sources_N: npt.NDArray[np.int32]
    "Number of the source."
    rows_N: npt.NDArray[np.int64]
    "Row number in it; with the source, the row's key."
    ids: "RowIds"
    "Labels; they may repeat."
    num_tokens_N: npt.NDArray[np.int32]
    "Tokens after truncation."
    num_supervised_N: npt.NDArray[np.int32]
    "Those that carry loss."
    truncated_N: npt.NDArray[np.bool_]
    "Whether the row was cut to the length limit."
    digests_N: npt.NDArray[np.uint64]
    "Equal for exact duplicates."


class RowIds(Sequence[str]):
    """The label of every position. They stay in the shards until they are asked for, and are quickest in their order.

    Raises what `Datastore.shard` raises when a label is read.
    """

    def __init__(self, store: "Datastore", feature_set: str, *, verify: bool) -> None:
        self._store, self._where, self._verify = store, (feature_set, store.checkpoints[0]), verify
        self._starts = np.cumsum([0, *(rows.num_scored for rows in store.manifest.ranges)])
        self._last: tuple[int, list[str]] = (-1, [])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @overload
    def __getitem__(self, at: int) -> str: ...

    @overload
    def __getitem__(self, at: slice) -> list[str]: ...

    def __getitem__(self, at: int | slice) -> str | list[str]:
        if isinstance(at, slice):
            return [self[position] for position in range(len(self))[at]]
        position = range(len(self))[at]
        number = int(np.searchsorted(self._starts, position, side="right")) - 1
        if self._last[0] != number:
            rows = self._store.manifest.ranges[number]
            shard, keep = self._store._open_kept(*self._where, rows, self._verify)
            self._last = number, _kept(shard.ids, keep)
        return self._last[1][position - int(self._starts[number])]

    def __iter__(self) -> Iterator[str]:
        for _, _, shard, keep in self._store._iter_kept(*self._where, self._verify):
            yield from _kept(shard.ids, keep)


@dataclass(frozen=True, kw_only=True, eq=False)
class RowStats:
    """What a feature set measured on each of N rows at one checkpoint, in pool order, float32."""

    norms_N: npt.NDArray[np.float32]
    "Norm of the projected vector."
    grad_norms_N: npt.NDArray[np.float32]
    "‖g‖."
    update_norms_N: npt.NDArray[np.float32]
    "‖Γ‖."
    losses_N: npt.NDArray[np.float32]
    "Loss, in nats per supervised token."


class Datastore:
    """A complete store, as its manifest describes it; other files in the folder are not looked at."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        """Use `open`."""
        self.path = path
        self.manifest = manifest
        self._settings_hash = manifest.settings_hash
        self._verified: set[str] = set()

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Read the manifest and check that every file is there with its size.

        Raises `StoreError` (nothing there, or the build is not finished), `FormatVersionError`, or
        `DamagedStoreError`, which names every file that is missing, of another size, or outside the folder.
        """
        folder, given = Path(path).resolve(), Path(path).absolute()  # one name, beside which things lie
        try:
            store = cls(folder, Manifest.load(folder))
        except (FileNotFoundError, NotADirectoryError):
            if (folder / BUILD).exists():
                raise StoreError(
                    f"the datastore {given} is not finished: it has {BUILD} and no {MANIFEST}. Rerun the "
                    "same `gradsift build-datastore` command: it computes only what is missing."
                ) from None
            raise StoreError(
                f"no datastore at {given}: expected a folder with {MANIFEST}. Make one with `gradsift build-datastore`."
            ) from None
        problems = {folder / path: store._size_problem(path, entry) for path, entry in store._files()}
        if found := {path: problem for path, problem in problems.items() if problem}:
            if store.has_changed():
                return cls.open(path)  # rows were deleted between the manifest and its files
            raise damaged(found)
        return store

    def has_changed(self) -> bool:
        """Whether the folder has another manifest now: rows were added or deleted since it was opened."""
        try:
            return Manifest.load(self.path).sha256 != self.manifest.sha256
        except (OSError, StoreError):
            return False

    @property
    def settings(self) -> dict[str, Any]:
        """The settings it was built with."""
        return self.manifest.settings

    @property
    def environment(self) -> dict[str, Any]:
        """The machine and versions that wrote to it last, and where they found things."""
        if not self.manifest.environments:
            raise StoreError(f"{self.path} does not say what wrote it, nor from which model; build it with gradsift")
        return self.manifest.environments[-1]

    @property
    def sources(self) -> list[SourceEntry]:
        """The pool; a source's number is its place."""
        return self.manifest.sources

    @property
    def feature_sets(self) -> list[str]:
        """Names of the feature sets."""
        return self.manifest.feature_sets

    @property
    def checkpoints(self) -> list[str]:
        """Names of the checkpoints."""
        return self.manifest.checkpoints

    @property
    def num_rows(self) -> int:
        """Rows that can be scored: the number of positions."""
        return self.manifest.num_rows

    @property
    def num_bytes(self) -> int:
        """Size of its shards and momentum directions."""
        return sum(entry.num_bytes for _, entry in self._files())

    @property
    def skipped(self) -> list[SkippedRow]:
        """Rows that have no position, and why; those that a prefilter set aside are in `num_set_aside` alone."""
        return [row for rows in self.manifest.ranges for row in rows.skipped if row.reason != SET_ASIDE]

    @property
    def num_set_aside(self) -> int:
        """Rows that have no position since a prefilter set them aside."""
        return int(self.manifest.counts["num_skipped"].get(SET_ASIDE, 0))

    def proj_dim(self, feature_set: str) -> int:
        """K of a feature set."""
        self._check_names(feature_set)
        return self.manifest.features[feature_set].proj_dim

    def iter_blocks(self, feature_set: str, checkpoint: str, *, verify: bool = True) -> Iterator[Block]:
        """The features of every position, a shard at a time; with `verify`, no unchecked byte is handed out.

        While one block is used, threads read the next ones from the disk and check them. Memory is a few shards.

        Raises `SettingError` for a name the store does not have, `DamagedStoreError`.
        """
        return (block for (block,) in self.iter_aligned(feature_set, [checkpoint], verify=verify))

    def iter_aligned(
        self, feature_set: str, checkpoints: Sequence[str], *, first: int = 0, verify: bool = True
    ) -> Iterator[tuple[Block, ...]]:
        """`iter_blocks` of several checkpoints at once: for each range of the pool its block at each of them.

        Begins with the range that holds the position `first`.
        """
        for checkpoint in checkpoints:
            self._check_names(feature_set, checkpoint)
        starts = np.cumsum([0, *(rows.num_scored for rows in self.manifest.ranges)]).tolist()
        ranges = [
            (start, rows)
            for start, rows in zip(starts, self.manifest.ranges, strict=False)
            if rows.num_scored and start + rows.num_scored > first
        ]

        def open_block(item: tuple[int, RowRange, str]) -> Block:
            start, rows, checkpoint = item
            shard, keep = self._open_kept(feature_set, checkpoint, rows, verify, whole=True)
            return Block(start=start, features_nK=shard.features_NK[keep], norms_n=shard.norms_N[keep])

        wanted = ((start, rows, checkpoint) for start, rows in ranges for checkpoint in checkpoints)
        blocks = read_ahead(open_block, wanted, threads=NUM_READERS)
        while group := tuple(islice(blocks, len(checkpoints))):
            yield group

    def rows(self, feature_set: str | None = None, *, verify: bool = True) -> RowTable:
        """Keys, labels and lengths of every position: the same in every feature set.

        Name the one that is scanned: with `verify`, a shard that was not checked yet is read whole.
        """
        names = ["rows_N", "num_tokens_N", "num_supervised_N", "truncated_N", "digests_N"]
        feature_set = feature_set or self.feature_sets[0]
        columns = self._gather(feature_set, self.checkpoints[0], names, verify)
        ranges = self.manifest.ranges
        sources_N = np.repeat(
            np.array([rows.source for rows in ranges], np.int32), [rows.num_scored for rows in ranges]
        )
        return RowTable(sources_N=sources_N, ids=RowIds(self, feature_set, verify=verify), **columns)

    def stats(self, feature_set: str, checkpoint: str, *, verify: bool = True) -> RowStats:
        """Norms and loss of every position."""
        names = [item.name for item in fields(RowStats)]
        return RowStats(**self._gather(feature_set, checkpoint, names, verify))

    def direction(self, feature_set: str, checkpoint: str) -> npt.NDArray[np.float32]:
        """Π Γ(0) of a checkpoint, (K,): what all its rows share."""
        self._check_names(feature_set, checkpoint)
        sha256 = self.manifest.directions[direction_path(feature_set, checkpoint)].sha256
        with self._unless_changed():
            return open_direction(self.path, feature_set, checkpoint, self._settings_hash, sha256)

    def iter_verify(self) -> Iterator[tuple[str, int, str | None]]:
        """(path, bytes, what is wrong or None) of every file, each as soon as its checksum is computed."""
        for path, entry in self._files():
            problem = self._size_problem(path, entry)
            if not problem and hash_file(self.path / path).sha256 != entry.sha256:
                problem = f"its checksum is not the one in {MANIFEST}"
            if not problem:
                self._verified.add(path)
            yield path, entry.num_bytes, problem

    def verify(self) -> None:
        """Check every byte; `DamagedStoreError` names every file that is not as it was sealed."""
        if found := {self.path / path: problem for path, _, problem in self.iter_verify() if problem}:
            raise damaged(found)

    def _files(self) -> Iterator[tuple[str, FileEntry]]:
        return iter(self.manifest.files.items())

    def _size_problem(self, path: str, entry: FileEntry) -> str | None:
        file = (self.path / path).resolve()
        if not file.is_relative_to(self.path.resolve()):
            return f"it is a link out of the datastore, to {file}"
        if not file.is_file():
            return "it is missing"
        if (size := file.stat().st_size) != entry.num_bytes:
            return f"it has {size} bytes, expected {entry.num_bytes}"
        return None

    def shard(self, key: ShardKey, *, verify: bool = True) -> Shard:
        """One shard as it was written, with rows that have no position.

        Raises `KeyError`, `DamagedStoreError`, or `StoreError` where rows were deleted since the store was opened.
        """
        entry = self.manifest.shards[key.path]
        check = verify and key.path not in self._verified
        with self._unless_changed():
            shard = open_shard(self.path, key, self._settings_hash, entry.sha256 if check else None)
        if check:
            self._verified.add(key.path)
        return shard

    def left_out(self, rows: RowRange) -> list[SkippedRow]:
        """The rows of a range that have no position, ascending, those that a prefilter set aside too.

        The labels of the latter are read from a shard, without its checksum: that would read its features.

        Raises what `shard` raises.
        """
        labels: dict[int, str] = {}
        unknown = {*rows.rows_set_aside}
        for checkpoint, feature_set in product(self.checkpoints, self.feature_sets):
            if not unknown:
                break
            key = self.manifest.shard_key(feature_set, checkpoint, rows.source, rows.start, rows.stop)
            set_aside = self.shard(key, verify=False).set_aside
            labels |= {row: set_aside[row] for row in unknown & set_aside.keys()}
            unknown -= labels.keys()
        if unknown:
            raise damaged({self.path / MANIFEST: f"it has the row {min(unknown)} set aside, and no shard has it so"})
        name = self.sources[rows.source].name
        set_aside_rows = [
            SkippedRow(row=row, where=f"{name}[{row}]", id=label, reason=SET_ASIDE, detail="")
            for row, label in labels.items()
        ]
        return sorted([*rows.skipped, *set_aside_rows], key=lambda row: row.row)

    @contextmanager
    def _unless_changed(self) -> Iterator[None]:
        """A file that is missing is no damage where the store has another manifest by now."""
        try:
            yield
        except DamagedStoreError as error:
            if self.has_changed():
                raise StoreError(f"the datastore {self.path} has changed since it was opened; open it again") from error
            raise

    def _iter_kept(
        self, feature_set: str, checkpoint: str, verify: bool
    ) -> Iterator[tuple[int, RowRange, Shard, Keep]]:
        """(position of the first row, range, shard, which of its rows have a position) of every shard."""
        self._check_names(feature_set, checkpoint)

        def open_range(rows: RowRange) -> tuple[RowRange, Shard, Keep]:
            return rows, *self._open_kept(feature_set, checkpoint, rows, verify)

        start = 0
        for rows, shard, keep in read_ahead(open_range, self.manifest.ranges, threads=NUM_READERS):
            yield start, rows, shard, keep
            start += rows.num_scored

    def _open_kept(
        self, feature_set: str, checkpoint: str, rows: RowRange, verify: bool, *, whole: bool = False
    ) -> tuple[Shard, Keep]:
        """One shard, and which of its rows have a position; `whole`: its features are brought into memory."""
        key = self.manifest.shard_key(feature_set, checkpoint, rows.source, rows.start, rows.stop)
        in_memory = verify and key.path not in self._verified  # the checksum has read it all
        shard = self.shard(key, verify=verify)
        if whole and not in_memory:
            with suppress(FileNotFoundError):  # the map stays good when rows are deleted and the file goes
                read_through(self.path / key.path)
        keep = rows.scored(shard.rows_N)
        shape = (int(np.count_nonzero(keep)), shard.features_NK.shape[1])
        if shape != (expected := (rows.num_scored, self.proj_dim(feature_set))):
            raise damaged({self.path / key.path: f"its features are {shape}, expected {expected}"})
        return shard, slice(None) if keep.all() else keep

    def _gather(
        self, feature_set: str, checkpoint: str, names: Sequence[str], verify: bool
    ) -> dict[str, npt.NDArray[Any]]:
        """Fields of the shards, one array each; copied, since a map kept open for each shard is too many."""
        columns = {name: np.empty(self.num_rows, COLUMN_DTYPES[name]) for name in names}
        for start, rows, shard, keep in self._iter_kept(feature_set, checkpoint, verify):
            for name, column in columns.items():
                column[start : start + rows.num_scored] = np.asarray(getattr(shard, name), column.dtype)[keep]
        return columns

    def _check_names(self, feature_set: str, checkpoint: str | None = None) -> None:
        for what, name, names in (
            ("feature set", feature_set, self.feature_sets),
            ("checkpoint", checkpoint, [*self.checkpoints, None]),
        ):
            if name not in names:
                known = ", ".join(name for name in names if name)
                raise SettingError(f"the datastore {self.path} has no {what} {name!r}; it has {known}.")


def _kept(ids: list[str], keep: Keep) -> list[str]:
    return ids if isinstance(keep, slice) else list(compress(ids, keep))
