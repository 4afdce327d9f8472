import numpy as np
import pytest

from datastore.coding import FEATURE_DTYPES, CodedRows, as_float32, encode, encode_ref, row_bytes
from datastore.errors import SettingError

CODED = ["int8", "int4", "binary"]


def unit_rows(num_rows, width, seed=0, heavy=False):
    rows_NK = np.random.default_rng(seed).standard_normal((num_rows, width))
    if heavy:
        rows_NK = rows_NK**5
    return (rows_NK / np.linalg.norm(rows_NK, axis=1)[:, None]).astype(np.float32)


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("shape", [(1, 8), (3, 104), (63, 4104), (130, 8192)])
@pytest.mark.parametrize("dtype", CODED)
def test_codes_are_those_of_the_reference(dtype, shape, heavy):
    features_NK = unit_rows(*shape, heavy=heavy)
    coded = encode(features_NK, dtype)
    integers_NK, scales_N = encode_ref(features_NK, dtype)
    assert isinstance(coded, CodedRows)
    assert coded.shape == shape
    assert np.array_equal(coded.integers(), integers_NK)
    assert np.allclose(coded.scales_N, scales_N, rtol=1e-5)


@pytest.mark.parametrize("dtype", CODED)
def test_a_coded_row_has_the_product_1_with_the_row_it_stands_for(dtype):
    features_NK = unit_rows(50, 4096)
    assert np.allclose((encode(features_NK, dtype).decode() * features_NK).sum(axis=1), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "bound"), [("float32", 0), ("float16", 3e-6), ("int8", 2e-4), ("int4", 2e-3), ("binary", 1e-2)]
)
def test_a_product_with_coded_rows_is_off_by_no_more_than_their_bits_allow(dtype, bound):
    features_NK, queries_JK = unit_rows(400, 8192), unit_rows(20, 8192, seed=1)
    errors_NJ = (as_float32(encode(features_NK, dtype)) - features_NK) @ queries_JK.T
    assert np.sqrt((errors_NJ**2).mean()) <= bound


def test_a_heavy_tailed_row_is_not_cut_off():
    """Where few coordinates hold the norm, the range of a normal distribution would lose them."""
    features_NK = np.full((1, 1024), 1e-3, np.float32)
    features_NK[0, 7] = 1
    decoded_NK = encode(features_NK, "int4").decode()
    assert decoded_NK[0, 7] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("dtype", CODED)
def test_a_rows_code_does_not_depend_on_the_rows_beside_it(dtype):
    features_NK = unit_rows(40, 65536)
    whole, alone = encode(features_NK, dtype), encode(features_NK[17:18], dtype)
    assert np.array_equal(whole.codes_NX[17:18], alone.codes_NX)
    assert np.array_equal(whole.scales_N[17:18], alone.scales_N)


@pytest.mark.parametrize("dtype", CODED)
def test_indexing_keeps_rows_coded(dtype):
    coded = encode(unit_rows(9, 64), dtype)
    keep_N = np.arange(9) % 2 == 0
    assert np.array_equal(coded[keep_N].decode(), coded.decode()[keep_N])
    assert np.array_equal(coded[2:5].decode(), coded.decode()[2:5])
    assert len(coded[2:5]) == 3


@pytest.mark.parametrize("dtype", CODED)
def test_integers_can_be_written_into_a_buffer(dtype):
    coded = encode(unit_rows(5, 48), dtype)
    buffer_NK = np.full((5, 48), 99, np.int8)
    assert coded.integers(buffer_NK) is buffer_NK
    assert np.array_equal(buffer_NK, coded.integers())


@pytest.mark.parametrize("dtype", FEATURE_DTYPES)
def test_row_bytes_are_what_a_row_takes(dtype):
    assert row_bytes(dtype, 128) == encode(unit_rows(1, 128), dtype).nbytes


@pytest.mark.parametrize(("dtype", "width"), [("int4", 7), ("binary", 12)])
def test_codes_that_fill_no_whole_bytes_are_refused(dtype, width):
    with pytest.raises(SettingError, match=f"K = {width} is no"):
        encode(unit_rows(2, width), dtype)


def test_an_unknown_dtype_is_refused_with_those_known():
    with pytest.raises(SettingError, match="one of float32, float16, int8, int4, binary, got 'int2'"):
        row_bytes("int2", 8)
