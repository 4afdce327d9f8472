"""The score matrix on disk: what a scan has found, kept beside the store, so that another selection costs no scan.

    <store>.scores/<hash of what it is of>/
        scores.npy       scores_NJ, float32, in the pool's order
        progress.json    while the scan goes on: what it is of, and how many rows scores.npy holds already
        scores.json      what it is of, what is kept with it, and checksums of this and of scores.npy; written last

What it is of: the store's manifest, so that a store that has changed since is another one, and all that the scores
depend on. A killed scan goes on where it was. Folders of another manifest are removed by the next scan, but for those
that a process still writes to. Where nothing can be written, another process is writing the same matrix, or a deletion
of rows removes it meanwhile, scores are kept in memory only.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from datastore import Datastore
from datastore.beside import SCORES as BESIDE
from datastore.beside import beside
from datastore.errors import StoreError
from datastore.files import canonical_json, check_free_space, hash_file, lock_folder, make_folder, write_atomic
from less.scan import Parts, gather_scores

__all__ = ["ScoreMatrix", "scores_folder"]

SCORES, PROGRESS, DONE = "scores.npy", "progress.json", "scores.json"
_SECONDS_BETWEEN = 5.0
"""Of scanning that a kill can lose."""
_CANNOT_KEEP = (OSError, StoreError)
_NOT_THERE = (OSError, StoreError, ValueError, KeyError, TypeError, RecursionError, OverflowError, TokenError)
"""What damaged JSON ends in, and a damaged header of NumPy's, which is parsed as Python."""


def scores_folder(store: Datastore) -> Path:
    """Where a store's score matrices lie."""
    return beside(store.path, BESIDE)


class ScoreMatrix:
    """The scores of one store for one set of targets, on disk or still to be made.

    Args:
        store: whose rows are scored.
        made_of: everything else that the scores depend on, as JSON.
    """

    def __init__(self, store: Datastore, made_of: Mapping[str, Any]) -> None:
        self._num_rows = store.num_rows
        self._made_of = {"manifest": store.manifest.sha256, **made_of}
        self.path = scores_folder(store) / _hash(self._made_of)[:32]

    def load(self, *, verify: bool = True) -> tuple[NDArray[np.float32], dict[str, Any]] | None:
        """scores_NJ as a map of the file, and what `make` kept with it; None if it is not there or not whole."""
        try:
            doc = _read_json(self.path / DONE)
            if doc["made_of"] != self._made_of:
                return None
            if verify and hash_file(self.path / SCORES).sha256 != doc["sha256"]:
                return None
            if _hash(doc["kept"]) != doc["kept_sha256"]:
                return None
            scores_NJ = open_memmap(self.path / SCORES, mode="r")
        except _NOT_THERE:
            return None
        return (scores_NJ, doc["kept"]) if self._fits(scores_NJ, scores_NJ.shape[1:]) else None

    def make(
        self, num_subtasks: int, queries_sha256: str, kept: Mapping[str, Any], parts: Callable[[int], Parts]
    ) -> NDArray[np.float32]:
        """scores_NJ from its parts, kept on disk where that can be.

        Args:
            num_subtasks: J.
            queries_sha256: of the queries' bits: a scan that was cut short goes on only with the very same ones.
            kept: JSON to keep with it.
            parts: from a position at which to begin, the position and the scores_nJ of each part that follows.

        Raises:
            DamagedStoreError: a shard is not what the manifest says.
        """
        lock = self._lock(num_subtasks)
        if lock is None:
            return gather_scores(self._num_rows, num_subtasks, parts(0))
        try:
            found = self.load()  # another process may have finished it before the lock was free
            if found and self._fits(found[0], (num_subtasks,)) and found[1] == kept:
                return found[0]
            with suppress(OSError):
                self._remove_stale()
            return self._write(num_subtasks, queries_sha256, dict(kept), parts)
        finally:
            os.close(lock)

    def _write(
        self, num_subtasks: int, queries_sha256: str, kept: dict[str, Any], parts: Callable[[int], Parts]
    ) -> NDArray[np.float32]:
        first = self._num_done(num_subtasks, queries_sha256)
        progress = {"made_of": self._made_of, "queries_sha256": queries_sha256}
        try:
            scores_NJ = self._open(first, num_subtasks)
            self._write_json(PROGRESS, progress | {"num_done": first})
        except _CANNOT_KEEP:
            for name in (PROGRESS, SCORES):
                with suppress(OSError):
                    (self.path / name).unlink()
            return gather_scores(self._num_rows, num_subtasks, parts(0))
        saved = time.monotonic()
        for start, scores_nJ in parts(first):
            stop = start + len(scores_nJ)
            scores_NJ[start:stop] = scores_nJ
            if time.monotonic() - saved > _SECONDS_BETWEEN:
                with suppress(*_CANNOT_KEEP):
                    scores_NJ.flush()
                    (self.path / SCORES).stat()  # where a deletion has removed it, no other file is to come back
                    self._write_json(PROGRESS, progress | {"num_done": stop})
                saved = time.monotonic()
        try:
            scores_NJ.flush()
            sha256 = hash_file(self.path / SCORES).sha256
            done = {"made_of": self._made_of, "kept": kept, "kept_sha256": _hash(kept), "sha256": sha256}
            self._write_json(DONE, done)
            (self.path / PROGRESS).unlink(missing_ok=True)
            return open_memmap(self.path / SCORES, mode="r")
        except _CANNOT_KEEP:
            return scores_NJ  # a map outlives the name of its file

    def _open(self, first: int, num_subtasks: int) -> np.memmap[Any, np.dtype[np.float32]]:
        """scores.npy to write to, with room on the disk for all of it."""
        file = self.path / SCORES
        (self.path / DONE).unlink(missing_ok=True)
        if first:
            scores_NJ = open_memmap(file, mode="r+")
        else:
            file.unlink(missing_ok=True)  # another process may use a map of it, which a new file leaves alone
            scores_NJ = open_memmap(file, mode="w+", dtype=np.float32, shape=(self._num_rows, num_subtasks))
        if hasattr(os, "posix_fallocate"):  # a full disk kills a process that writes to the map of a file with holes
            with file.open("r+b") as opened:
                os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
        return scores_NJ

    def _num_done(self, num_subtasks: int, queries_sha256: str) -> int:
        """Rows that an unfinished scan has left, all of the same queries."""
        try:
            doc = _read_json(self.path / PROGRESS)
            scores_NJ = open_memmap(self.path / SCORES, mode="r")
        except _NOT_THERE:
            return 0
        done = doc.get("num_done")
        same = doc.get("queries_sha256") == queries_sha256 and self._fits(scores_NJ, (num_subtasks,))
        same = same and not (self.path / SCORES).is_symlink()  # no file elsewhere is written to
        return done if same and type(done) is int and 0 <= done <= self._num_rows else 0

    def _fits(self, scores_NJ: NDArray[Any], columns: tuple[int, ...]) -> bool:
        return scores_NJ.dtype == np.float32 and scores_NJ.shape == (self._num_rows, *columns) and len(columns) == 1

    def _lock(self, num_subtasks: int) -> int | None:
        """Held until it is closed; None where nothing can be written, or another process is writing."""
        if self.path.is_symlink():
            return None
        try:
            check_free_space(self.path, 4 * self._num_rows * num_subtasks)
            make_folder(self.path)
            return lock_folder(self.path)
        except _CANNOT_KEEP:
            return None

    def _remove_stale(self) -> None:
        """Remove what is of another state of the store, finished or not."""
        for folder in self.path.parent.iterdir():
            if folder.is_symlink():  # no file elsewhere is written to or removed
                continue
            with suppress(*_NOT_THERE):
                doc = _read_json(folder / (DONE if (folder / DONE).exists() else PROGRESS))
                if doc["made_of"]["manifest"] == self._made_of["manifest"]:
                    continue
                lock = lock_folder(folder)  # or another process writes to it
                try:
                    for name in (DONE, PROGRESS, SCORES, ".lock"):
                        (folder / name).unlink(missing_ok=True)
                    folder.rmdir()
                finally:
                    os.close(lock)

    def _write_json(self, name: str, doc: Mapping[str, Any]) -> None:
        write_atomic(self.path / name, [canonical_json(doc).encode() + b"\n"])


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; `ValueError`."""
    doc = json.loads(path.read_bytes())
    if type(doc) is not dict:
        raise ValueError(f"{path} holds no object")
    return doc


def _hash(doc: object) -> str:
    return hashlib.sha256(canonical_json(doc).encode()).hexdigest()
