"""Rank correlation against a count over all pairs of rows, written out."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ches.ranks import average_ranks, spearman


def ranks_ref(values):
    """Each value beats those below it, and shares the places of those equal to it."""
    return [sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values]


def spearman_ref(x, y):
    r, s = ranks_ref(x), ranks_ref(y)
    mean = (len(x) + 1) / 2
    covariance = sum((a - mean) * (b - mean) for a, b in zip(r, s, strict=True))
    spread = math.sqrt(sum((a - mean) ** 2 for a in r) * sum((b - mean) ** 2 for b in s))
    return covariance / spread if spread else math.nan


tied = st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=40)
apart = st.lists(
    st.tuples(st.floats(allow_nan=False, allow_infinity=False), st.floats(allow_nan=False, allow_infinity=False)),
    min_size=2, max_size=20,
)  # fmt: skip


@given(tied | apart)
def test_equals_the_definition_with_and_without_ties(pairs):
    x, y = zip(*pairs, strict=True)
    assert average_ranks(x).tolist() == ranks_ref(x)
    assert spearman(x, y) == pytest.approx(spearman_ref(x, y), abs=1e-12, nan_ok=True)


def test_without_ties_equals_the_textbooks_formula():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=101), rng.normal(size=101)
    d = x.argsort().argsort() - y.argsort().argsort()
    assert spearman(x, y) == pytest.approx(1 - 6 * (d**2).sum() / (101 * (101**2 - 1)))


def test_only_order_counts():
    x = np.array([3.0, -1.0, 10.0, 4.0, 4.0])
    assert spearman(x, np.exp(x)) == 1.0
    assert spearman(x, -(x**3)) == -1.0
    assert spearman(x, [1e300, -1e300, 1.7e308, 1.6e300, 1.6e300]) == 1.0


@pytest.mark.parametrize(("x", "y"), [([], []), ([1.0], [2.0]), ([1, 1, 1], [1, 2, 3]), ([1, 2], [math.nan, 1])])
def test_without_an_order_to_compare_is_nan(x, y):
    assert math.isnan(spearman(x, y))
    assert math.isnan(spearman(y, x))


@pytest.mark.parametrize(("x", "y"), [([1, 2], [1, 2, 3]), (np.ones((2, 2)), np.ones((2, 2)))])
def test_needs_two_vectors_of_one_length(x, y):
    with pytest.raises(ValueError, match="two vectors of one length"):
        spearman(x, y)
