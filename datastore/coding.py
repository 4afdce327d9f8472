"""Features in few bits: how a unit row of K numbers is kept as float32, float16, int8, int4 or binary.

    x ≈ scale · code,   code: integers of few bits,   scale = 1 / ⟨code, x⟩

With this scale ⟨x, scale · code⟩ is 1, as ⟨x, x⟩ is: rounding makes no row longer or shorter than another (for signs:
Gao & Long, RaBitQ, 2024, §3.2). Each row is coded by itself, so that the same row has the same bytes in every shard and
nothing has to be trained on a pool that is still to come; FAISS's scalar quantizers have one trained range for all
rows. What each costs in rank is measured on real gradients by `benchmarks/fidelity_storage.py`.

Products with coded rows are left to `less.influence`, files to `shards`.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from datastore.errors import SettingError

__all__ = [
    "FEATURE_DTYPES",
    "ROUNDING",
    "CodedRows",
    "Features",
    "as_float32",
    "check_feature_dtype",
    "encode",
    "row_bytes",
]

FEATURE_DTYPES = ("float32", "float16", "int8", "int4", "binary")
ROUNDING = {"float32": 6e-8, "float16": 3e-4, "int8": 1e-2, "int4": 1.1e-1, "binary": 7.6e-1}
"""‖x − scale · code‖ of a unit row of normally distributed coordinates; random, so that it averages out in sums."""
CODES_A_BYTE = {"int8": 1, "int4": 2, "binary": 8}

# A projected gradient's coordinates are a sum of many: their distribution is the normal one (kurtosis 3.01 on SmolLM2).
# 15 equal steps lose least of it between ±2.8 standard deviations; the largest coordinate of 32768 is at 4.3.
_INT4_RANGE = 2.8
_VALUES_AT_ONCE = 2**19  # a piece of a few rows, coded while it is in the cache

Rows = slice | npt.NDArray[np.bool_] | npt.NDArray[np.integer]


@dataclass(frozen=True, kw_only=True, eq=False)
class CodedRows:
    """N unit rows of K numbers in few bits; indexing gives some of the rows, still coded."""

    dtype: str
    '"int8", "int4" or "binary".'
    codes_NX: npt.NDArray[np.int8] | npt.NDArray[np.uint8]
    "int8 (N, K); or uint8, several a byte: byte i of X holds columns i, i + X, i + 2X, ..., from the low bits up."
    scales_N: npt.NDArray[np.float32]
    "What a row's codes are multiplied by."

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return len(self.codes_NX), self.codes_NX.shape[1] * CODES_A_BYTE[self.dtype]

    @property
    def nbytes(self) -> int:
        """Of codes and scales."""
        return self.codes_NX.nbytes + self.scales_N.nbytes

    def __len__(self) -> int:
        return len(self.codes_NX)

    def __getitem__(self, rows: Rows) -> Self:
        return type(self)(dtype=self.dtype, codes_NX=self.codes_NX[rows], scales_N=self.scales_N[rows])

    def integers(self, out: npt.NDArray[np.int8] | None = None) -> npt.NDArray[np.int8]:
        """The codes one by one, (N, K) int8, written to `out` if it is given: −127..127, −7..7, or −1 and 1."""
        if self.dtype == "int8":
            if out is None:
                return self.codes_NX.view(np.int8)
            out[...] = self.codes_NX
            return out
        found_NK = np.empty(self.shape, np.int8) if out is None else out
        num_parts, X = CODES_A_BYTE[self.dtype], self.codes_NX.shape[1]
        bits = 8 // num_parts
        for part in range(num_parts):
            part_NX = found_NK[:, part * X : (part + 1) * X]
            np.right_shift(self.codes_NX, bits * part, out=part_NX.view(np.uint8))
            part_NX &= (1 << bits) - 1
            if self.dtype == "int4":
                part_NX -= 8
            else:
                part_NX *= 2
                part_NX -= 1
        return found_NK

    def decode(self) -> npt.NDArray[np.float32]:
        """scale · code, (N, K) float32."""
        return self.integers() * self.scales_N[:, None]


Features = npt.NDArray[np.float16] | npt.NDArray[np.float32] | CodedRows


def check_feature_dtype(name: str) -> None:
    """Raise `SettingError` unless `name` is one of `FEATURE_DTYPES`."""
    if name not in FEATURE_DTYPES:
        raise SettingError(f"feature_dtype must be one of {', '.join(FEATURE_DTYPES)}, got {name!r}")


def row_bytes(dtype: str, proj_dim: int) -> int:
    """Bytes that one row of `proj_dim` features takes; `SettingError` where its codes fill no whole bytes."""
    check_feature_dtype(dtype)
    if dtype not in CODES_A_BYTE:
        return proj_dim * np.dtype(dtype).itemsize
    if proj_dim % CODES_A_BYTE[dtype]:
        raise SettingError(
            f"feature_dtype {dtype} keeps {CODES_A_BYTE[dtype]} numbers a byte, and K = {proj_dim} is no multiple of "
            "that; choose another --proj-dim, or int8"
        )
    return proj_dim // CODES_A_BYTE[dtype] + np.dtype(np.float32).itemsize


def as_float32(features_NK: Features) -> npt.NDArray[np.float32]:
    """Stored rows as (N, K) float32; a view where they are that."""
    return features_NK.decode() if isinstance(features_NK, CodedRows) else np.asarray(features_NK, np.float32)


def encode(features_NK: npt.NDArray[np.floating], dtype: str) -> Features:
    """Unit rows (N, K), finite and none of them zero, as they are stored; `SettingError` for a K that does not fit.

    float16, float32: rounded to nearest. int8: equal steps, 127 to the row's largest coordinate. int4: 7 steps to 2.8
    root mean squares, or to the largest coordinate, whichever code has the larger cosine with the row. binary: signs,
    with 0 as −1. A row costs K operations, and memory is a few rows beside the result.
    """
    N, K = features_NK.shape
    row_bytes(dtype, K)
    if dtype not in CODES_A_BYTE:
        return np.asarray(features_NK, dtype)
    codes_NX = np.empty((N, K // CODES_A_BYTE[dtype]), np.int8 if dtype == "int8" else np.uint8)
    scales_N = np.empty(N, np.float32)
    step = max(1, _VALUES_AT_ONCE // max(K, 1))
    for start in range(0, N, step):
        rows = slice(start, start + step)
        x_nK = np.asarray(features_NK[rows], np.float32)
        if dtype == "binary":
            integers_nK = np.where(x_nK > 0, np.float32(1), np.float32(-1))
        elif dtype == "int8":
            integers_nK = _steps(x_nK, np.abs(x_nK).max(axis=1), 127)
        else:
            integers_nK = _int4(x_nK)
        scales_N[rows] = 1 / (integers_nK * x_nK).sum(axis=1)
        codes_NX[rows] = _pack(integers_nK, dtype)
    return CodedRows(dtype=dtype, codes_NX=codes_NX, scales_N=scales_N)


def encode_ref(
    features_NK: npt.NDArray[np.floating], dtype: str
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """`encode`, a row at a time: the integers, not packed, and the scales."""
    integers, scales = [], []
    for x_K in np.asarray(features_NK, np.float32):
        ends = {"int8": [np.abs(x_K).max()], "int4": [_INT4_RANGE * np.sqrt(np.mean(x_K**2)), np.abs(x_K).max()]}
        top = {"int8": 127, "int4": 7}.get(dtype, 1)
        codes = [np.clip(np.rint(x_K * (top / end)), -top, top) for end in ends.get(dtype, [])]
        codes = codes or [np.where(x_K > 0, 1, -1)]
        code_K = max(codes, key=lambda c: (c @ x_K) / np.linalg.norm(c))
        integers.append(code_K.astype(np.int8))
        scales.append(1 / (code_K @ x_K))
    return np.array(integers, np.int8), np.array(scales, np.float32)


def _steps(x_nK: npt.NDArray[np.float32], ends_n: npt.NDArray[np.float32], top: int) -> npt.NDArray[np.float32]:
    """Each row in `top` equal steps to its end, rounded to nearest; what is beyond the end is put there."""
    steps_nK = x_nK * (np.float32(top) / ends_n)[:, None]
    return np.clip(np.rint(steps_nK, out=steps_nK), -top, top, out=steps_nK)


def _int4(x_nK: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    best_nK = _steps(x_nK, _INT4_RANGE * np.sqrt(np.square(x_nK).mean(axis=1)), 7)
    whole_nK = _steps(x_nK, np.abs(x_nK).max(axis=1), 7)
    better_n = _cosines(whole_nK, x_nK) > _cosines(best_nK, x_nK)
    best_nK[better_n] = whole_nK[better_n]
    return best_nK


def _cosines(codes_nK: npt.NDArray[np.float32], x_nK: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return (codes_nK * x_nK).sum(axis=1) / np.sqrt(np.maximum(np.square(codes_nK).sum(axis=1), 1))


def _pack(integers_nK: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[np.int8] | npt.NDArray[np.uint8]:
    if dtype == "int8":
        return integers_nK.astype(np.int8)
    unsigned_nK = (integers_nK + 8 if dtype == "int4" else integers_nK > 0).astype(np.uint8)
    num_parts = CODES_A_BYTE[dtype]
    parts = np.split(unsigned_nK, num_parts, axis=1)
    packed_nX = parts[0].copy()
    for number, part_nX in enumerate(parts[1:], start=1):
        packed_nX |= part_nX << (8 // num_parts * number)
    return packed_nX
