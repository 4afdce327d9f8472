"""Shards: the features of one range of a source's rows, for one feature set at one checkpoint.

A shard holds the rows whose features could be computed, a reason for each of the others, and of those that a prefilter
set aside, which may be most, a bit and a label. `FORMAT.md` fixes its bytes; the same shard always has the same. How
bytes reach the disk is left to `files`, which shards a store needs to `manifest`, and when they are made to `store`.
"""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from datastore.coding import CodedRows, Features
from datastore.files import FileEntry, canonical_json, damaged, from_json, open_tensors, write_tensors

__all__ = [
    "DELETED",
    "SET_ASIDE",
    "Shard",
    "ShardKey",
    "SkippedRow",
    "bits_of",
    "direction_path",
    "drop_rows",
    "open_direction",
    "open_shard",
    "rows_of",
    "set_rows_aside",
    "take_rows",
    "write_direction",
    "write_shard",
]

DELETED = "deleted"
"""Why a row that was deleted from the store is skipped."""
SET_ASIDE = "prefilter"
"""Why a row that a prefilter set aside has no features."""


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
    deleted: tuple[int, ...] = ()
    "Rows of the range that are deleted, ascending."

    @property
    def edition(self) -> str:
        """8 hexadecimal digits that follow from the deleted rows; empty for a range that has all its rows."""
        if not self.deleted:
            return ""
        return hashlib.sha256(canonical_json(self.deleted).encode()).hexdigest()[:8]

    @property
    def path(self) -> str:
        """The shard's file, relative to the store's folder: another one after each deletion."""
        edition = f"-{self.edition}" if self.deleted else ""
        name = f"s{self.source:04d}-{self.start:010d}-{self.stop:010d}{edition}.safetensors"
        return f"shards/{self.feature_set}/{self.checkpoint}/{name}"

    def to_json(self) -> dict[str, Any]:
        """What the shard's file says of itself."""
        fields = {name: value for name, value in vars(self).items() if name != "deleted"}
        return fields | ({"edition": self.edition} if self.deleted else {})


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
    features_NK: Features
    "Unit rows: float16, float32, or coded in fewer bits."
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
    "The other rows of the range, ascending, but for those that are set aside."
    set_aside: dict[int, str] = field(default_factory=dict)
    "Rows of the range that a prefilter set aside, each with its label."
    notes: dict[str, Any] = field(default_factory=dict)
    'What was unusual in its making, as JSON: `{"oom_retries": 1}`.'


@dataclass(frozen=True, kw_only=True)
class _Metadata:
    """What a shard's header says beside the tensors."""

    key: dict[str, Any]
    settings_hash: str
    ids: list[str]
    skipped: list[SkippedRow]
    notes: dict[str, Any]
    set_aside: str = ""
    set_aside_ids: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """What the file says; a shard of which no row was set aside says nothing of it."""
        fields = asdict(self)
        if not self.set_aside:
            del fields["set_aside"], fields["set_aside_ids"]
        return fields


_BEFORE = {  # tensors in the order of the file: each starts at a multiple of its item size
    "rows_N": "<i8", "digests_N": "<u8",
    "norms_N": "<f4", "grad_norms_N": "<f4", "update_norms_N": "<f4", "losses_N": "<f4",
    "num_tokens_N": "<i4", "num_supervised_N": "<i4",
}  # fmt: skip
_FEATURES = {  # between those and `truncated_N`: one of these
    "float32": {"features_NK": "<f4"},
    "float16": {"features_NK": "<f2"},
    "int8": {"scales_N": "<f4", "int8_NK": "|i1"},
    "int4": {"scales_N": "<f4", "int4_NX": "|u1"},
    "binary": {"scales_N": "<f4", "binary_NX": "|u1"},
}
_NUMBERS = [*_BEFORE, "truncated_N"]


def write_shard(folder: Path, key: ShardKey, settings_hash: str, shard: Shard) -> FileEntry:
    """Write a shard whole or not at all; `ValueError` for one that does not fit its key."""
    tensors = _to_tensors(shard)
    problem = _misfit(key, tensors, shard.ids, shard.skipped, shard.set_aside)
    if not problem and not all(np.isfinite(tensor).all() for tensor in tensors.values()):
        problem = "it has values that are not finite"
    if problem:
        raise ValueError(f"shard {key.path}: {problem}")
    metadata = _Metadata(
        key=key.to_json(),
        settings_hash=settings_hash,
        ids=shard.ids,
        skipped=shard.skipped,
        notes=shard.notes,
        set_aside=bits_of(shard.set_aside, key.start, key.stop),
        set_aside_ids=[shard.set_aside[row] for row in sorted(shard.set_aside)],
    )
    return write_tensors(folder / key.path, metadata.to_json(), tensors)


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
        if (holds := canonical_json(metadata.key)) != (expected := canonical_json(key.to_json())):
            raise ValueError(f"it holds {holds}, expected {expected}")
        rows_set_aside = rows_of(metadata.set_aside, key.start, key.stop)
        if len(rows_set_aside) != len(metadata.set_aside_ids):
            raise ValueError(f"{len(rows_set_aside)} rows set aside have {len(metadata.set_aside_ids)} labels")
        set_aside = dict(zip(rows_set_aside, metadata.set_aside_ids, strict=True))
        if problem := _misfit(key, tensors, metadata.ids, metadata.skipped, set_aside):
            raise ValueError(problem)
    except (ValueError, RecursionError) as error:
        raise damaged({path: str(error)}) from None
    numbers = {name: tensors[name] for name in _NUMBERS} | {"truncated_N": tensors["truncated_N"].astype(bool)}
    return Shard(
        **numbers,
        features_NK=_features(tensors),
        ids=metadata.ids,
        skipped=metadata.skipped,
        set_aside=set_aside,
        notes=metadata.notes,
    )


def bits_of(rows: Collection[int], start: int, stop: int) -> str:
    """Some rows of a range in hexadecimal, a bit a row; the first row is the highest bit. Empty for no row."""
    if not rows:
        return ""
    bits_R = np.zeros(stop - start, bool)
    bits_R[np.array(list(rows)) - start] = True
    return np.packbits(bits_R).tobytes().hex()


def rows_of(bits: str, start: int, stop: int) -> list[int]:
    """The inverse of `bits_of`, ascending; `ValueError` for what that never gives."""
    if not bits:
        return []
    num_digits = (stop - start + 7) // 8 * 2
    try:
        data = bytes.fromhex(bits)
    except ValueError:
        data = b""
    rows = [start + n for n in np.flatnonzero(np.unpackbits(np.frombuffer(data, np.uint8))).tolist()]
    if data.hex() != bits or len(bits) != num_digits or not rows or rows[-1] >= stop:
        raise ValueError(
            f"the bits of its rows set aside are {bits[:40]!r}, expected {num_digits} hexadecimal digits, with a bit "
            f"for some of the rows from {start} to {stop} and for no other"
        )
    return rows


def take_rows(shard: Shard, keep_N: npt.NDArray[np.bool_]) -> Shard:
    """Some of a shard's N rows; what it says of the other rows of its range stays as it is."""
    arrays: dict[str, Any] = {
        name: value[keep_N] for name, value in vars(shard).items() if isinstance(value, (np.ndarray, CodedRows))
    }
    return replace(shard, **arrays, ids=list(compress(shard.ids, keep_N)))


def drop_rows(shard: Shard, dropped: Sequence[SkippedRow]) -> Shard:
    """A shard without the rows that are named in `dropped`, which are skipped now for that reason alone."""
    numbers = {row.row for row in dropped}
    others = [row for row in shard.skipped if row.row not in numbers]
    set_aside = {row: label for row, label in shard.set_aside.items() if row not in numbers}
    kept = take_rows(shard, ~np.isin(shard.rows_N, list(numbers)))
    return replace(kept, skipped=sorted([*others, *dropped], key=lambda row: row.row), set_aside=set_aside)


def set_rows_aside(shard: Shard, rows: Collection[int]) -> Shard:
    """A shard without those of its rows that are among `rows`; their labels stay in it."""
    aside_N = np.isin(shard.rows_N, list(rows))
    labels = dict(zip(shard.rows_N[aside_N].tolist(), compress(shard.ids, aside_N), strict=True))
    return replace(take_rows(shard, ~aside_N), set_aside=shard.set_aside | labels)


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


def _to_tensors(shard: Shard) -> dict[str, npt.NDArray[Any]]:
    """A shard's arrays by the names that they have in the file, in its order."""
    features_NK = shard.features_NK
    if isinstance(features_NK, CodedRows):
        stored: dict[str, Any] = dict(
            zip(_FEATURES[features_NK.dtype], (features_NK.scales_N, features_NK.codes_NX), strict=True)
        )
    else:
        stored = {"features_NK": features_NK}
    tensors = {name: getattr(shard, name) for name in _BEFORE} | stored
    return tensors | {"truncated_N": shard.truncated_N.astype("|u1")}


def _features(tensors: Mapping[str, npt.NDArray[Any]]) -> Features:
    """The stored rows among a file's tensors."""
    for dtype, names in _FEATURES.items():
        if "scales_N" in names and tensors.keys() >= names.keys():
            scales_N, codes_NX = (tensors[name] for name in names)
            return CodedRows(dtype=dtype, codes_NX=codes_NX, scales_N=scales_N)
    return tensors["features_NK"]


def _layout(tensors: Mapping[str, npt.NDArray[Any]]) -> dict[str, str]:
    """The names and dtypes that a shard with such features has, in order."""
    for stored in _FEATURES.values():
        if all(name in tensors and tensors[name].dtype.str == dtype for name, dtype in stored.items()):
            return {**_BEFORE, **stored, "truncated_N": "|u1"}
    return {**_BEFORE, "features_NK": "<f2 or <f4", "truncated_N": "|u1"}


def _misfit(
    key: ShardKey,
    tensors: Mapping[str, npt.NDArray[Any]],
    ids: Sequence[str],
    skipped: Sequence[SkippedRow],
    set_aside: Collection[int],
) -> str | None:
    """What keeps these from being the shard `key`, or None."""
    layout = _layout(tensors)
    if tensors.keys() != layout.keys():
        return f"it holds the tensors {sorted(tensors)}, expected {sorted(layout)}"
    N = len(ids)
    for name, dtype in layout.items():
        tensor = tensors[name]
        shape = (N,) if name.endswith("_N") else (N, max([1, *tensor.shape[1:2]]))
        if tensor.dtype.str != dtype or tensor.shape != shape:
            return f"{name} is {tensor.dtype.str} {list(tensor.shape)}, expected {dtype} {list(shape)}"
    rows, skipped_rows = tensors["rows_N"].tolist(), [row.row for row in skipped]
    if rows != sorted(rows) or skipped_rows != sorted(skipped_rows):
        return "its rows are not in order"
    num_rows, all_rows = N + len(skipped) + len(set_aside), {*rows, *skipped_rows, *set_aside}
    if num_rows != key.stop - key.start or all_rows != {*range(key.start, key.stop)}:
        return f"its rows, skipped and set aside ones are not just those from {key.start} to {key.stop}"
    if (deleted := tuple(row.row for row in skipped if row.reason == DELETED)) != key.deleted:
        return f"it lists the rows {deleted} as deleted, expected {key.deleted}"
    return None
