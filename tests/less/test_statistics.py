"""Statistics against their definitions, written out."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from less.statistics import auc, average_ranks, bootstrap, pearson, r_precision, r_squared, spearman, top_overlap


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


LABELLED = st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=20).filter(
    lambda rows: len({right for _, right in rows}) == 2
)


@given(LABELLED)
def test_auc_is_the_share_of_pairs_in_the_right_order(rows):
    score_N, right_N = (np.array(column) for column in zip(*rows, strict=True))
    pairs = [(a > b) + (a == b) / 2 for a in score_N[right_N] for b in score_N[~right_N]]
    assert auc(score_N, right_N) == pytest.approx(np.mean(pairs))


@given(LABELLED)
def test_r_precision_is_the_share_of_right_rows_at_the_top(rows):
    score_N, right_N = (np.array(column) for column in zip(*rows, strict=True))
    order = sorted(range(len(rows)), key=lambda n: (-score_N[n], n))[: right_N.sum()]
    assert r_precision(score_N, right_N) == pytest.approx(np.mean([right_N[n] for n in order]))


def test_perfect_scores_reach_the_ceiling():
    right_N = np.array([True, False, True, False])
    assert r_precision(right_N.astype(float), right_N) == auc(right_N.astype(float), right_N) == 1


def test_without_right_rows_or_others_there_is_no_value():
    assert math.isnan(auc([1, 2], [True, True]))
    assert math.isnan(r_precision([1, 2], [False, False]))


def test_top_overlap_is_of_the_best():
    assert top_overlap([4, 3, 2, 1], [1, 4, 3, 2], 2) == 0.5
    assert top_overlap([4, 3, 2, 1], [40, 30, 20, 10], 3) == 1


def test_r_squared_is_one_for_a_linear_score_and_nothing_for_noise():
    rng = np.random.default_rng(0)
    x, z, noise = rng.normal(size=(3, 4097))
    assert r_squared(3 * x - z + 7, [x, z]) == pytest.approx(1)
    assert r_squared(noise, [x, z]) < 0.005
    assert r_squared(x + noise, [x]) == pytest.approx(0.5, abs=0.05)
    assert math.isnan(r_squared(np.ones(3), [[1, 2, 3]]))


def test_a_bootstrap_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    found = [bootstrap(np.mean, rng.normal(size=63), num_resamples=200) for _ in range(200)]
    covered = np.mean([interval.low < 0 < interval.high for interval in found])
    assert 0.88 < covered < 0.99


def test_a_bootstrap_keeps_rows_together_and_says_when_there_is_no_interval():
    x = np.arange(101.0)
    assert str(bootstrap(pearson, x, -x)) == "−1.00 [−1.00, −1.00]"
    nothing = bootstrap(spearman, np.ones(7), np.arange(7))
    assert math.isnan(nothing.value)
    assert math.isnan(nothing.low)
