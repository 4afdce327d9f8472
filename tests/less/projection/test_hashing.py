"""The hash under all projections: pinned for ever, equal to its slow twin, and random enough."""

import pytest
import torch

from less.projection.hashing import absorb, hash_index, hash_index_ref, make_key, mix_ref

KEY = (0x01234567, 0x89ABCDEF)
Q_PROJ_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def test_pinned_keys() -> None:
    assert make_key(0, Q_PROJ_A, "sign") == (0x2C6F9699, 0xCCBDB25C)
    assert make_key(2**63 - 1, "a", "rotation") == (0x74AEB261, 0x901144D5)


def test_pinned_words() -> None:
    assert [mix_ref(word) for word in (0, 1, 2, 2**32 - 1, 0xDEADBEEF)] == [
        0x00000000,
        0x688990C0,
        0xD1132181,
        0x6768824A,
        0xE628C683,
    ]
    indices = torch.tensor([0, 1, 2**32 - 1, 2**32, 2**32 + 1, 2**40 + 7])
    words = hash_index(KEY, indices)
    assert words.tolist() == [0x95C86B90, 0x75200922, 0x70CEF2FD, 0xE9ABBF64, 0x03E4A79A, 0x79FA7C56]
    columns = absorb(words, 255)
    assert columns.tolist() == [0xA5491A8C, 0x6B332DA2, 0x11C988BB, 0x34E955BD, 0x1A8A8622, 0x7AFC2965]


def test_mix_is_lowbias32() -> None:
    """Its published inverse undoes it, so the constants and shifts are the published ones."""

    def inverse(word: int) -> int:
        word ^= word >> 16
        word = word * 0x43021123 & 0xFFFFFFFF
        word ^= word >> 15 ^ word >> 30
        word = word * 0x1D69E2A5 & 0xFFFFFFFF
        return word ^ word >> 16

    for word in [0, 1, 2**31, 2**32 - 1, *range(7, 2**32, 2**32 // 1009)]:
        assert inverse(mix_ref(word)) == word


@pytest.mark.parametrize("shape", [(1,), (63,), (4097,), (3, 101)])
def test_tensor_hash_equals_its_twin(shape: tuple[int, ...]) -> None:
    indices = torch.randint(2**62, shape, generator=torch.Generator().manual_seed(len(shape)))
    indices.view(-1)[0] = 2**63 - 1
    before = indices.clone()
    words = hash_index(KEY, indices)
    assert torch.equal(indices, before)
    assert words.flatten().tolist() == [hash_index_ref(KEY, i) for i in indices.flatten().tolist()]
    columns = absorb(words[..., None], torch.tensor([0, 31, 2**32 - 1]))
    expected = [hash_index_ref(KEY, i, column) for i in indices.flatten().tolist() for column in (0, 31, 2**32 - 1)]
    assert columns.flatten().tolist() == expected


def test_words_are_32_bits() -> None:
    words = hash_index((2**32 - 1, 2**32 - 1), torch.arange(2**16))
    assert words.min() >= 0
    assert words.max() < 2**32


def test_nothing_repeats_at_2_to_the_32() -> None:
    low = torch.arange(2**14)
    words = hash_index(KEY, low)
    for offset in (2**32, 2**33, 3 * 2**32, 2**40):
        agreement = (hash_index(KEY, low + offset) >> 31 == words >> 31).double().mean()
        assert abs(agreement - 0.5) < 4 * 0.5 / 2**7


def test_every_bit_is_balanced() -> None:
    words = hash_index(KEY, torch.arange(2**16))
    for bit in range(32):
        ones = (words >> bit & 1).double().mean()
        assert abs(ones - 0.5) < 4.5 * 0.5 / 2**8, f"bit {bit} is set in {ones:.4f} of words"


def test_every_input_bit_flips_half_of_the_output_bits() -> None:
    indices = torch.arange(2**12) * 977
    words = hash_index(KEY, indices)
    for bit in range(40):
        flipped = words ^ hash_index(KEY, indices ^ (1 << bit))
        per_bit = torch.stack([(flipped >> b & 1).double().mean() for b in range(32)])
        assert (per_bit - 0.5).abs().max() < 0.05, f"index bit {bit}"


@pytest.mark.parametrize("other", [make_key(1, "a", "sign"), make_key(0, "b", "sign"), make_key(0, "a", "rotation")])
def test_seeds_names_and_purposes_give_unrelated_streams(other: tuple[int, int]) -> None:
    indices = torch.arange(2**16)
    words, others = hash_index(make_key(0, "a", "sign"), indices), hash_index(other, indices)
    agreement = (words >> 31 == others >> 31).double().mean()
    assert abs(agreement - 0.5) < 4 * 0.5 / 2**8
    assert (words == others).sum() <= 1


def test_keys_that_differ_in_few_bits_are_not_permutations_of_each_other() -> None:
    indices = torch.arange(2**12)
    words = hash_index(KEY, indices)
    others = hash_index((KEY[0] ^ 5, KEY[1] ^ 1), indices)
    assert len(set(words.tolist()) & set(others.tolist())) <= 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cpu_and_gpu_hash_to_the_same_bits() -> None:
    indices = torch.cat([torch.arange(4097), torch.arange(2**40, 2**40 + 4097)])
    words = hash_index(KEY, indices)
    assert torch.equal(hash_index(KEY, indices.cuda()).cpu(), words)
    assert torch.equal(absorb(words.cuda(), 2**32 - 1).cpu(), absorb(words, 2**32 - 1))
