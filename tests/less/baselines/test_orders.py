"""Orders that look at no target."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datastore import Datastore
from less.baselines.orders import length_scores, random_scores


@given(st.integers(1, 50), st.integers(0, 50), st.integers(0, 2**32))
def test_a_longer_pool_keeps_the_numbers_of_the_rows_before(num_rows, num_more, seed):
    longer = random_scores(num_rows + num_more, seed)
    np.testing.assert_array_equal(longer[:num_rows], random_scores(num_rows, seed))


def test_random_numbers_depend_on_the_seed_alone():
    np.random.seed(0)  # noqa: NPY002
    first = random_scores(100, 7)
    np.random.seed(1)  # noqa: NPY002
    np.testing.assert_array_equal(first, random_scores(100, 7))
    assert not np.array_equal(first, random_scores(100, 8))


def test_random_numbers_are_spread_evenly_between_0_and_1():
    drawn = random_scores(20_000, 0)
    assert drawn.dtype == np.float32
    assert 0 <= drawn.min() < drawn.max() < 1
    counts = np.histogram(drawn, bins=10, range=(0, 1))[0]
    assert np.abs(counts - 2000).max() < 5 * np.sqrt(2000)
    assert len(np.unique(drawn)) > 19_900


def test_length_is_the_supervised_tokens(tiny_store, tiny_rows):
    score_N = length_scores(Datastore.open(tiny_store).rows())
    own = [len(row["messages"][1]["content"].encode()) + 1 for row in tiny_rows]  # bytes, and the end of the turn
    assert score_N.tolist() == own
    assert score_N.dtype == np.float32


@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_any_seed_will_do(seed):
    assert random_scores(3, seed).shape == (3,)
