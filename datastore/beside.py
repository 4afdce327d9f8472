"""What lies beside a store and is made from it: `<store>.index`, `<store>.scores`, `<store>.prefilter`, `<store>.rds`.

All of it can be made again, and all but the embeddings (`.rds`, a store of its own) is removed when rows are deleted
from the store. Only files that are known by their names are removed: a folder is left where anything else is in it.
"""

import os
import shutil
from contextlib import suppress
from pathlib import Path

from datastore.build import BUILD
from datastore.errors import StoreError
from datastore.files import disk_errors, lock_folder, sync_folder

__all__ = [
    "EMBEDDINGS",
    "FILES",
    "INDEX",
    "PREFILTER",
    "SCORES",
    "beside",
    "has_files",
    "remove_made_from",
    "remove_store",
]

INDEX, SCORES, PREFILTER, EMBEDDINGS = "index", "scores", "prefilter", "rds"
FILES = {
    INDEX: ("*/index.json", "*/index.faiss", "*/.index.*.tmp"),
    SCORES: ("*/scores.npy", "*/scores.json", "*/progress.json", "*/.*.json.tmp", "*/.lock"),
}
"""The files of the folders that are no stores."""


def beside(folder: Path, kind: str) -> Path:
    """Where what is made from the store in `folder` lies."""
    return folder.with_name(f"{folder.name}.{kind}")


def remove_made_from(folder: Path) -> None:
    """Remove index, scores and prefilter of the store in `folder`.

    Raises `StoreError` for one that is a link or cannot be removed, `StoreLockedError` for a prefilter at work.
    """
    for kind in (*FILES, PREFILTER):
        place = beside(folder, kind)
        if place.is_symlink():
            raise StoreError(
                f"{place} is a link; expected a folder. It is made from the store: delete what it leads to, then the "
                "link, and rerun the same command"
            )
        with disk_errors(place):
            if kind == PREFILTER:
                remove_store(place)
                continue
            for pattern in FILES[kind]:
                for file in place.glob(pattern):
                    file.unlink()
            for inner in place.glob("*/"):
                _remove_if_empty(inner)
            _remove_if_empty(place)


def has_files(place: Path) -> bool:
    """Whether anything is in a folder but a lock, which is all that a removal leaves that was killed at its end."""
    return any(entry.name != ".lock" for entry in place.iterdir())


def remove_store(place: Path) -> None:
    """Remove the store in a folder, if there is one; `StoreLockedError` where it is being written.

    `build.json` goes last, since by it a removal that was killed is known to have left its work.
    """
    if not (place / BUILD).is_file() and not (place.is_dir() and not has_files(place)):
        return
    lock = lock_folder(place)
    try:
        for entry in place.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name not in (BUILD, ".lock"):
                entry.unlink()
        sync_folder(place)
        for name in (BUILD, ".lock"):
            (place / name).unlink(missing_ok=True)
        _remove_if_empty(place)
    finally:
        os.close(lock)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()
