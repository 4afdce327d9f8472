"""Shards: the features of one range of a source's rows, for one feature set at one checkpoint.

A shard holds the rows whose features could be computed, and a reason for each of the others. `FORMAT.md`
fixes its bytes; the same shard always has the same. How bytes reach the disk is left to `files`, which shards
a store needs to `manifest`, and when they are made to `store`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from datastore.files import FileEntry, damaged, from_json, open_tensors, write_tensors

__all__ = [
    "Shard",
    "ShardKey",
    "SkippedRow",
    "direction_path",
    "open_direction",
    "open_shard",
    "write_direction",
    "write_shard",
]


@dataclass(frozen=True, kw_only=True)
class SkippedRow:
    """A row that has no features, and why."""

    row: int
    "Row number in its source, from 0."
    where: str
    "Where the user finds it: `pool.jsonl:18`."
    id: str
    "Its label."
    reason: str
    "One of a small closed list, to count by."
    detail: str
    "What exactly was wrong."


@dataclass(frozen=True, kw_only=True)
class ShardKey:
    """Which features of which rows a shard holds."""

    feature_set: str
    "Name of the feature set."
    checkpoint: str
    "Name of the checkpoint."
    source: int
    "Number of the source in the store, from 0."
    start: int
    "First row of the range."
    stop: int
    "One past its last row."

    @property
    def path(self) -> str:
        """The shard's file, relative to the store's folder."""
        name = f"s{self.source:04d}-{self.start:010d}-{self.stop:010d}.safetensors"
        return f"shards/{self.feature_set}/{self.checkpoint}/{name}"


def direction_path(feature_set: str, checkpoint: str) -> str:
    """The file of a checkpoint's momentum direction, relative to the store's folder."""
    return f"directions/{feature_set}/{checkpoint}.safetensors"


@dataclass(frozen=True, kw_only=True, eq=False)
class Shard:
    """The features of N rows in the order of their source, and the rows of the range that have none."""

    rows_N: npt.NDArray[np.int64]
    "Row numbers in the source, ascending."
    ids: list[str]
    "Their labels."
    digests_N: npt.NDArray[np.uint64]
    "A hash of each row's content: equal for exact duplicates."
    features_NK: npt.NDArray[np.float16] | npt.NDArray[np.float32]
    "Unit rows, float16 or float32."
    norms_N: npt.NDArray[np.float32]
    "Norm of the projected vector before it was made a unit row."
    grad_norms_N: npt.NDArray[np.float32]
    "‖g‖ before projection."
    update_norms_N: npt.NDArray[np.float32]
    "‖Γ‖ before projection."
    losses_N: npt.NDArray[np.float32]
    "Mean negative log-likelihood of the supervised tokens, in nats."
    num_tokens_N: npt.NDArray[np.int32]
    "Tokens after truncation."
    num_supervised_N: npt.NDArray[np.int32]
    "Those that carry loss."
    truncated_N: npt.NDArray[np.bool_]
    "Whether the row was cut to the length limit."
    skipped: list[SkippedRow] = field(default_factory=list)
    "The other rows of the range, ascending."
    notes: dict[str, Any] = field(default_factory=dict)
    'What was unusual in its making, as JSON: `{"oom_retries": 1}`.'


@dataclass(frozen=True, kw_only=True)
class _Metadata:
    """What a shard's header says beside the tensors."""

    key: ShardKey
    settings_hash: str
    ids: list[str]
    skipped: list[SkippedRow]
    notes: dict[str, Any]


_LAYOUT = {  # tensors in the order of the file: each starts at a multiple of its item size
    "rows_N": "<i8", "digests_N": "<u8",
    "norms_N": "<f4", "grad_norms_N": "<f4", "update_norms_N": "<f4", "losses_N": "<f4",
    "num_tokens_N": "<i4", "num_supervised_N": "<i4",
    "features_NK": "<f4", "truncated_N": "|u1",
}  # fmt: skip


def write_shard(folder: Path, key: ShardKey, settings_hash: str, shard: Shard) -> FileEntry:
    """Write a shard whole or not at all; `ValueError` for one that does not fit its key."""
    tensors = {
        name: getattr(shard, name).astype("|u1") if name == "truncated_N" else getattr(shard, name) for name in _LAYOUT
    }
    problem = _misfit(key, tensors, shard.ids, shard.skipped)
    if not problem and not all(np.isfinite(tensor).all() for tensor in tensors.values()):
        problem = "it has values that are not finite"
    if problem:
        raise ValueError(f"shard {key.path}: {problem}")
    metadata = _Metadata(key=key, settings_hash=settings_hash, ids=shard.ids, skipped=shard.skipped, notes=shard.notes)
    return write_tensors(folder / key.path, asdict(metadata), tensors)


def open_shard(folder: Path, key: ShardKey, settings_hash: str, sha256: str | None = None) -> Shard:
    """A shard whose arrays are views of the file: without `sha256`, features are read when they are used.

    Raises `DamagedStoreError` for a file that is not exactly the shard `key` of a store with these settings.
    """
    path = folder / key.path
    found, tensors = open_tensors(path, sha256)
    try:
        metadata: _Metadata = from_json(_Metadata, found)
        if metadata.settings_hash != settings_hash:
            raise ValueError(f"it was made with other settings ({metadata.settings_hash}, not {settings_hash})")
        if metadata.key != key:
            raise ValueError(f"it holds {metadata.key}, expected {key}")
        if problem := _misfit(key, tensors, metadata.ids, metadata.skipped):
            raise ValueError(problem)
    except (ValueError, RecursionError) as error:
        raise damaged({path: str(error)}) from None
    return Shard(
        **{**tensors, "truncated_N": tensors["truncated_N"].astype(bool)},
        ids=metadata.ids,
        skipped=metadata.skipped,
        notes=metadata.notes,
    )


def write_direction(
    folder: Path,
    feature_set: str,
    checkpoint: str,
    settings_hash: str,
    direction_K: npt.NDArray[np.float32],
) -> FileEntry:
    """Write Π Γ(0), what a zero gradient would still do at this checkpoint: (K,) float32."""
    if direction_K.dtype != np.float32 or direction_K.ndim != 1 or not np.isfinite(direction_K).all():
        raise ValueError("direction_K must be one row of finite float32")
    metadata = {"feature_set": feature_set, "checkpoint": checkpoint, "settings_hash": settings_hash}
    path = folder / direction_path(feature_set, checkpoint)
    return write_tensors(path, metadata, {"direction_K": direction_K})


def open_direction(
    folder: Path, feature_set: str, checkpoint: str, settings_hash: str, sha256: str | None = None
) -> npt.NDArray[np.float32]:
    """A checkpoint's momentum direction, (K,); `DamagedStoreError`."""
    path = folder / direction_path(feature_set, checkpoint)
    metadata, tensors = open_tensors(path, sha256)
    expected = {"feature_set": feature_set, "checkpoint": checkpoint, "settings_hash": settings_hash}
    found = [(name, tensor.dtype.str, tensor.ndim) for name, tensor in tensors.items()]
    if metadata != expected or found != [("direction_K", "<f4", 1)]:
        raise damaged({path: f"it holds {found} of {metadata}, expected one direction_K of {expected}"})
    return tensors["direction_K"]


def _misfit(
    key: ShardKey, tensors: Mapping[str, npt.NDArray[Any]], ids: Sequence[str], skipped: Sequence[SkippedRow]
) -> str | None:
    """What keeps these from being the shard `key`, or None."""
    if tensors.keys() != _LAYOUT.keys():
        return f"it holds the tensors {sorted(tensors)}, expected {sorted(_LAYOUT)}"
    N, K = len(ids), max(tensors["features_NK"].shape[1:], default=0)
    for name, dtype in _LAYOUT.items():
        tensor = tensors[name]
        dtypes, shape = ((dtype,), (N,)) if name != "features_NK" else (("<f2", "<f4"), (N, max(K, 1)))
        if tensor.dtype.str not in dtypes or tensor.shape != shape:
            found = f"{tensor.dtype.str} {list(tensor.shape)}"
            return f"{name} is {found}, expected {' or '.join(dtypes)} {list(shape)}"
    rows, skipped_rows = tensors["rows_N"].tolist(), [row.row for row in skipped]
    if rows != sorted(rows) or skipped_rows != sorted(skipped_rows):
        return "its rows are not in order"
    if N + len(skipped) != key.stop - key.start or {*rows, *skipped_rows} != {*range(key.start, key.stop)}:
        return f"its rows and skipped rows are not just those from {key.start} to {key.stop}"
    return None
