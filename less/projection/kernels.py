"""The projections as Triton kernels, for CUDA: the gradients are read once and nothing is stored on the way.

    sparse       out[b, (i + r_⌊i/K⌋) mod K] += s_i Γ(g_bi),  ‖g_b‖², ‖Γ(g_b)‖²     in one pass
    rademacher   out[b, k] += (1/√K) Σ_i x_bi sign(i, k)                            signs made in registers

Same hash, same Π as `sparse` and `rademacher`, which are the twins of these in PyTorch. No atomics: each sum
belongs to one program, which adds in a fixed order, so the same call gives the same bits.

What `sparse` cannot do without, for a parameter of p coordinates and a batch of B rows: 4·B·p bytes of g and
8·p of μ and ν. A program takes 16 rows at once, so μ, ν and the hash serve 16 gradients, and larger batches
find μ and ν in the L2 cache. On top come 8·B·K bytes a part of the sums, read and written: they stay in L2,
and are less than half of g's where there is more than one part. Nothing of size p is written.

`rademacher` is bound by arithmetic: 2·B·p·K operations in float32, and a hash for every 32 signs.

Importable without triton, which comes with torch on Linux; nothing here can be called then.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# (a kernel's arguments are Triton's, and its annotations are Triton's too)

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from less.projection import hashing

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:
    triton = None

if TYPE_CHECKING:
    from less.adam import PreparedRule
    from less.projection.hashing import Key

__all__ = ["add_rademacher_", "add_sparse_", "agree_with_twins", "num_parts", "num_tiles"]

_ROWS = 16  # of one program; in `rademacher` twice as many, where there are more
_SMALL_EPS = 1e-12  # far above the root of float32's smallest normal number, 1e-19
_COLUMNS = 128  # of one program of four warps: one a thread, so that a hash serves all of its rows
_DEPTH = 32  # coordinates at a time in `rademacher`
_PART_CHUNKS = 4  # at least so many chunks of g for each part of the sums
_PARTS_NUMEL = 2**20  # of all parts: as many loads in flight as an H100's memory needs, a small part of its L2


def num_tiles(dim: int) -> int:
    """How many programs share the K columns; each has its own slot for squared norms in each part."""
    return -(-dim // _COLUMNS)


def num_parts(num_rows: int, dim: int, num_params: int) -> int:
    """Into how many parts the sums over a parameter's chunks should be cut; not a function of the device.

    Few rows of few columns give too few programs to keep a GPU's memory busy; then several programs share
    the chunks, each with a part of the sums of its own.
    """
    return max(1, min(_PARTS_NUMEL // max(1, num_rows * dim), num_params // dim // _PART_CHUNKS))


def add_sparse_(
    features_SBK: Tensor,
    grads_Bp: Tensor,
    rule: PreparedRule,
    sign_key: Key,
    rotation_key: Key,
    squares: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Add Π Γ(g) of one parameter, and both squared norms. The gradients are left as they were.

    Args:
        features_SBK: (S, B, K) float32; their sum over S is added to. Up to S programs share the chunks.
        grads_Bp: (B, p) float32.
        rule: Γ.
        sign_key: of `sparse`'s signs.
        rotation_key: of its rotations.
        squares: ‖g‖² and ‖Γ‖², each contiguous (S · num_tiles(K), B) float32, sums over the first axis.
    """
    num_rows, num_params = grads_Bp.shape
    parts, _, dim = features_SBK.shape
    if grads_Bp.numel() == 0:
        return
    num_chunks = -(-num_params // dim)
    part_chunks = -(-num_chunks // min(parts, max(1, num_chunks // _PART_CHUNKS)))
    rows = min(_ROWS, triton.next_power_of_2(num_rows))
    grid = (triton.cdiv(num_rows, rows) * num_tiles(dim), triton.cdiv(num_chunks, part_chunks))
    with torch.cuda.device_of(grads_Bp):
        _sparse_kernel[grid](
            features_SBK, *features_SBK.stride(),
            grads_Bp, *grads_Bp.stride(),
            *(squares or (None, None)),
            rule.mu_P, rule.nu_P, rule.kappa, rule.eps,
            *sign_key, *rotation_key,
            num_rows, num_params, part_chunks,
            K=dim, RULE=rule.name, EXACT_ROOT=rule.eps < _SMALL_EPS, ROWS=rows, COLUMNS=_COLUMNS, num_warps=4,
        )  # fmt: skip


def add_rademacher_(out_BK: Tensor, block_Bp: Tensor, key: Key) -> None:
    """Add Π x of one parameter.

    Args:
        out_BK: (B, K) float32, changed in place.
        block_Bp: (B, p) float32.
        key: of `rademacher`'s signs.
    """
    num_rows, num_params = block_Bp.shape
    dim = out_BK.shape[1]
    if block_Bp.numel() == 0:
        return
    rows = _ROWS if num_rows <= _ROWS else 2 * _ROWS
    grid = (triton.cdiv(num_rows, rows) * num_tiles(dim),)
    with torch.cuda.device_of(block_Bp):
        _rademacher_kernel[grid](
            out_BK, *out_BK.stride(),
            block_Bp, *block_Bp.stride(),
            *key,
            num_rows, num_params, dim, dim**-0.5,
            ROWS=rows, COLUMNS=_COLUMNS, DEPTH=_DEPTH, num_warps=4,
        )  # fmt: skip


def agree_with_twins(device: torch.device) -> bool:
    """Whether both kernels give on this device what PyTorch gives, to the bit, on a block of small integers."""
    from less.adam import PreparedRule

    num_rows, num_params, dim, keys = 3, 300, 64, ((1, 2**31), (3, 4))
    numbers = torch.arange(num_rows * num_params, device=device) * 31 % 7 - 3
    grads_Bp = numbers.view(num_rows, num_params).float()
    index_p = torch.arange(num_params, device=device)
    column_p = (index_p + hashing.hash_index(keys[1], index_p // dim)) % dim
    sign_p = 1.0 - 2 * (hashing.hash_index(keys[0], index_p) >> 31)
    expected_BK = torch.zeros(num_rows, dim, device=device).index_add_(1, column_p, grads_Bp * sign_p)
    found_BK = torch.zeros_like(expected_BK)
    squares = torch.zeros(2, num_tiles(dim), num_rows, device=device)
    add_sparse_(found_BK[None], grads_Bp, PreparedRule("sgd"), *keys, (squares[0], squares[1]))
    sparse = torch.equal(found_BK, expected_BK) and torch.equal(squares.sum(1), grads_Bp.square().sum(1).expand(2, -1))

    word_p2 = hashing.absorb(hashing.hash_index(keys[0], index_p)[:, None], torch.arange(dim // 32, device=device))
    sign_pK = 1.0 - 2 * (word_p2[:, :, None] >> torch.arange(32, device=device) & 1).flatten(1)
    dense_BK = torch.zeros_like(expected_BK)
    add_rademacher_(dense_BK, grads_Bp, keys[0])
    return sparse and torch.equal(dense_BK, (grads_Bp @ sign_pK) * dim**-0.5)


def _jit(*not_specialized: str) -> Callable[[Any], Any]:
    """`triton.jit`, with no version of the kernel for each value of these arguments."""
    return triton.jit(do_not_specialize=not_specialized) if triton else lambda function: function


@_jit()
def absorb(state, word):
    """`hashing.absorb`, on uint32."""
    state ^= word
    state ^= state >> 16
    state *= 0x7FEB352D
    state ^= state >> 15
    state *= 0x846CA68B
    return state ^ (state >> 16)


@_jit()
def hash_index(key0, key1, index):
    """`hashing.hash_index` of int64 indices, as uint32."""
    low, high = index.to(tl.uint32), (index >> 32).to(tl.uint32)
    return absorb(absorb(absorb(low, key0), high), key1)


@_jit()
def update_direction(g, mu, nu, kappa, eps, RULE: tl.constexpr, EXACT_ROOT: tl.constexpr):
    """`PreparedRule.apply_`: rows of g, one row of μ and ν."""
    if RULE == "sgd":
        update = g
    elif RULE == "sign":
        update = tl.where(g > 0, 1.0, tl.where(g < 0, -1.0, 0.0)) + g * 0  # a bad value must stay visible
    else:
        squared = nu + kappa * g * g
        # the quick root takes a subnormal number for 0, which ε̂ hides unless it is that small itself
        root = tl.sqrt_rn(squared) if EXACT_ROOT else tl.sqrt(squared)
        update = (g + mu) / (root + eps)
    return update


@_jit(
    "features_part", "features_row", "grads_row", "sign_key0", "sign_key1", "rotation_key0", "rotation_key1",
    "num_rows", "num_params", "part_chunks",
)  # fmt: skip
def _sparse_kernel(
    features, features_part, features_row, features_column,
    grads, grads_row, grads_column,
    grad_squares, update_squares,
    mu, nu, kappa, eps,
    sign_key0: tl.uint32, sign_key1: tl.uint32, rotation_key0: tl.uint32, rotation_key1: tl.uint32,
    num_rows, num_params, part_chunks,
    K: tl.constexpr, RULE: tl.constexpr, EXACT_ROOT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows, COLUMNS columns of the features, and what one part has of the chunks."""
    num_row_blocks = tl.cdiv(num_rows, ROWS)
    tile, part = tl.program_id(0) // num_row_blocks, tl.program_id(1)
    row = tl.program_id(0) % num_row_blocks * ROWS + tl.arange(0, ROWS)
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    has_row, has_column = row < num_rows, column < K
    read_row = tl.minimum(row, num_rows - 1)  # cheaper than a mask in the loop; what comes of it is not stored
    row_grads = grads + read_row[:, None].to(tl.int64) * grads_row
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    own_grad_squares = tl.zeros((ROWS, COLUMNS), tl.float32)
    own_update_squares = tl.zeros((ROWS, COLUMNS), tl.float32)
    own_mu, own_nu = tl.zeros((1, COLUMNS), tl.float32), tl.zeros((1, COLUMNS), tl.float32)

    for step in range(part_chunks):
        chunk = part.to(tl.int64) * part_chunks + step
        word = hash_index(rotation_key0.to(tl.uint32), rotation_key1.to(tl.uint32), chunk)
        place = column - (word % K).to(tl.int32)
        index = chunk * K + tl.where(place < 0, place + K, place)  # the coordinate that goes to this column
        has_index = has_column & (index < num_params)
        word = hash_index(sign_key0.to(tl.uint32), sign_key1.to(tl.uint32), index)
        sign = tl.where(word >> 31 != 0, -1.0, 1.0)
        g = tl.load(row_grads + index[None, :] * grads_column, mask=has_index[None, :], other=0.0)
        if nu is not None:
            own_nu = tl.load(nu + index, mask=has_index, other=0.0)[None, :]
        if mu is not None:
            own_mu = tl.load(mu + index, mask=has_index, other=0.0)[None, :]
        update = update_direction(g, own_mu, own_nu, kappa, eps, RULE, EXACT_ROOT)
        sums += update * sign[None, :]
        own_grad_squares += g * g
        own_update_squares += update * update

    own = features + part.to(tl.int64) * features_part
    own += row[:, None].to(tl.int64) * features_row + column[None, :].to(tl.int64) * features_column
    mask = has_row[:, None] & has_column[None, :]
    tl.store(own, tl.load(own, mask=mask) + sums, mask=mask)
    slot = (part * tl.cdiv(K, COLUMNS) + tile) * num_rows + row
    if grad_squares is not None:
        before = tl.load(grad_squares + slot, mask=has_row)
        tl.store(grad_squares + slot, before + tl.sum(own_grad_squares, axis=1), mask=has_row)
    if update_squares is not None:
        before = tl.load(update_squares + slot, mask=has_row)
        tl.store(update_squares + slot, before + tl.sum(own_update_squares, axis=1), mask=has_row)


@_jit("out_row", "block_row", "key0", "key1", "num_rows", "num_params", "dim")
def _rademacher_kernel(
    out, out_row, out_column,
    block, block_row, block_column,
    key0: tl.uint32, key1: tl.uint32,
    num_rows, num_params, dim, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows, COLUMNS columns, all p coordinates, DEPTH of them at a time."""
    num_row_blocks = tl.cdiv(num_rows, ROWS)
    tile = tl.program_id(0) // num_row_blocks
    row = tl.program_id(0) % num_row_blocks * ROWS + tl.arange(0, ROWS)
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    has_row, has_column = row < num_rows, column < dim
    row_block = block + row[:, None].to(tl.int64) * block_row
    column_word = (tile * (COLUMNS // 32) + tl.arange(0, COLUMNS // 32)).to(tl.uint32)
    shift = tl.arange(0, 32).to(tl.uint32)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)

    for start in range(0, num_params, DEPTH):
        index = start + tl.arange(0, DEPTH).to(tl.int64)
        words = hash_index(key0.to(tl.uint32), key1.to(tl.uint32), index)
        words = absorb(words[:, None], column_word[None, :])  # (DEPTH, COLUMNS / 32), 32 signs each
        bits = (words[:, :, None] >> shift[None, None, :]) & 1
        signs = tl.where(tl.reshape(bits, (DEPTH, COLUMNS)) != 0, -1.0, 1.0)
        mask = has_row[:, None] & (index < num_params)[None, :]
        x = tl.load(row_block + index[None, :] * block_column, mask=mask, other=0.0)
        sums = tl.dot(x, signs, sums, input_precision="ieee")

    own = out + row[:, None].to(tl.int64) * out_row + column[None, :].to(tl.int64) * out_column
    mask = has_row[:, None] & has_column[None, :]
    tl.store(own, tl.load(own, mask=mask) + sums * scale, mask=mask)
