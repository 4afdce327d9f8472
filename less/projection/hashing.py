"""Counter-based randomness: 32 random bits for (seed, parameter name, index), with no state and no order.

    h(i) = mix(mix(mix(key₀ ^ low(i)) ^ high(i)) ^ key₁)

The low and high 32 bits of i are separate words, so nothing repeats at 2**32; a column, where there is one,
is a third (`absorb`). Half of the key comes after the index: with all of it before, two parameters whose
states differ by a small d would share one stream, permuted by i ^ d.

mix is lowbias32, of Chris Wellons' hash-prospector (github.com/skeeto/hash-prospector): shift, xor,
multiply on 32-bit words, so that a kernel with uint32 arithmetic gives the same bits. Here a word is an
int64 tensor's value in [0, 2**32). Stores on disk depend on these bits: a change needs a new
`HASH_VERSION`.
"""

import hashlib

import torch
from torch import Tensor

__all__ = ["HASH_VERSION", "Key", "absorb", "hash_index", "hash_index_ref", "make_key", "mix_ref"]

HASH_VERSION = 1

Key = tuple[int, int]

_WORD = 0xFFFFFFFF
_FACTORS = (0x7FEB352D, 0x846CA68B)


def make_key(seed: int, name: str, purpose: str) -> Key:
    """Two 32-bit words for a parameter's stream; streams of different purposes are unrelated."""
    digest = hashlib.sha256(f"gradsift:{purpose}:{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def absorb(state: Tensor, word: Tensor | int) -> Tensor:
    """mix(state ^ word), elementwise, on int64 tensors of 32-bit words; new memory of the broadcast shape."""
    hashed = state ^ word
    shifted = hashed >> 16
    hashed ^= shifted
    for factor, shift in zip(_FACTORS, (15, 16), strict=True):
        # a factor of 2**31 or more is taken less 2**32, the same word, so that no product leaves int64
        hashed.mul_(factor if factor < 2**31 else factor - 2**32).bitwise_and_(_WORD)
        hashed ^= torch.bitwise_right_shift(hashed, shift, out=shifted)
    return hashed


def hash_index(key: Key, index: Tensor) -> Tensor:
    """A random 32-bit word for each index ≥ 0 (int64 in and out, any shape), on the index's device."""
    low, high = index & _WORD, index >> 32
    return absorb(absorb(absorb(low, key[0]), high), key[1])


def mix_ref(word: int) -> int:
    """lowbias32 in plain integers."""
    word ^= word >> 16
    word = word * 0x7FEB352D & _WORD
    word ^= word >> 15
    word = word * 0x846CA68B & _WORD
    word ^= word >> 16
    return word


def hash_index_ref(key: Key, index: int, *words: int) -> int:
    """`hash_index` of one index, then `absorb` of each further word, in plain integers."""
    state = 0
    for word in (key[0] ^ (index & _WORD), index >> 32, key[1], *words):
        state = mix_ref(state ^ word)
    return state
