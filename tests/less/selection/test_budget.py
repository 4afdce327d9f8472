"""How much is selected, exactly."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datastore.errors import SettingError
from less.selection import num_to_select, select_tokens
from less.selection.budget import Budget

SCORES = st.lists(st.integers(-3, 3), min_size=1, max_size=30).map(lambda xs: np.array(xs, np.float32))


@given(SCORES, st.data())
def test_select_tokens_takes_the_best_rows_up_to_the_one_that_reaches_the_budget(scores_N, data):
    num_tokens = data.draw(st.lists(st.integers(1, 9), min_size=len(scores_N), max_size=len(scores_N)))
    budget = data.draw(st.one_of(st.integers(1, sum(num_tokens) + 5), st.floats(0.01, sum(num_tokens) + 5.0)))
    expected, held = [], 0
    for n in sorted(range(len(scores_N)), key=lambda n: (-scores_N[n], n)):
        if held >= budget:
            break
        expected.append(n)
        held += num_tokens[n]
    assert select_tokens(scores_N, np.array(num_tokens, np.int32), budget).tolist() == expected


def test_select_tokens_counts_beyond_32_bits():
    num_tokens_N = np.full(4, 2**30, np.int32)
    assert len(select_tokens(np.zeros(4, np.float32), num_tokens_N, 3 * 2**30)) == 3


@pytest.mark.parametrize(
    ("fraction", "num_rows", "expected"),
    [(0.05, 1000, 50), (0.07, 100, 7), (0.05, 19, 1), (1.0, 3, 3), (0.051, 100, 6)],
)
def test_fraction_takes_the_exact_ceiling(fraction, num_rows, expected):
    assert num_to_select(num_rows, fraction=fraction) == expected


@given(st.decimals("0.001", "1", places=3), st.integers(1, 10_000))
def test_fraction_never_selects_less_than_asked_nor_a_row_more(fraction, num_rows):
    count = num_to_select(num_rows, fraction=float(fraction))
    assert count == math.ceil(fraction * num_rows)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"fraction": 0.1, "count": 1}, {"fraction": 0.0}, {"fraction": 1.1}, {"count": 0}, {"count": 11}],
)
def test_a_size_out_of_range_is_refused(arguments):
    with pytest.raises(SettingError):
        num_to_select(10, **arguments)


@given(st.lists(st.integers(1, 9), max_size=20), st.integers(1, 60))
def test_the_rows_that_fit_hold_no_more_than_the_budget_and_lack_less_than_the_next(num_tokens, total):
    budget = Budget(total, np.array(num_tokens, np.int32))
    num_fit = budget.num_that_fit(np.arange(len(num_tokens)))
    assert sum(num_tokens[:num_fit]) <= total
    assert num_fit == len(num_tokens) or sum(num_tokens[: num_fit + 1]) > total


def test_a_share_is_exact_in_its_decimal_digits():
    budget = Budget(100)
    assert (budget.at_least(0.07), budget.at_most(0.07)) == (7, 7)
    assert (budget.at_least(0.071), budget.at_most(0.079)) == (8, 7)
    assert (budget.at_least(0.29), budget.at_most(0.29)) == (29, 29)  # 0.29 * 100 is 28.999… in floats
