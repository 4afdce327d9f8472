"""Labels and scores of the rows that a selection chooses from."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datastore.errors import SettingError
from less.selection import Candidates, Labels
from less.selection.candidates import Scores

NAMES = st.sampled_from("abcd")
VALUES = st.lists(st.one_of(st.none(), NAMES, st.lists(NAMES, max_size=4)), max_size=12)


def as_lists(value):
    return list(dict.fromkeys([] if value is None else value if isinstance(value, list) else [value]))


def names_of(labels, row):
    return [labels.names[code] for code in labels.of_row(row)]


@given(VALUES)
def test_labels_hold_each_rows_values_once(values):
    labels = Labels.of(values)
    assert labels.num_rows == len(values)
    assert [names_of(labels, n) for n in range(len(values))] == [as_lists(value) for value in values]
    for code, name in enumerate(labels.names):
        assert labels.rows_with(code).tolist() == [n for n, value in enumerate(values) if name in as_lists(value)]


def test_several_columns_are_read_at_once_as_each_alone():
    rows = [("a", None), (["b", "a", "b"], 1), ("c", [2, 1])]
    for found, column in zip(Labels.of_columns(iter(rows), 2), zip(*rows, strict=True), strict=True):
        alone = Labels.of(column)
        assert found.names == alone.names
        assert [found.of_row(n) for n in range(3)] == [alone.of_row(n) for n in range(3)]


@given(VALUES)
def test_pairs_are_the_unordered_pairs_of_a_rows_values(values):
    labels = Labels.of(values)
    order = {name: code for code, name in enumerate(labels.names)}
    for n, value in enumerate(values):
        own = sorted(as_lists(value), key=order.__getitem__)
        expected = {f"{a} + {b}" for a, b in combinations(own, 2)}
        assert set(names_of(labels.pairs, n)) == expected
        assert len(names_of(labels.pairs, n)) == len(expected)


def test_numbers_are_labels_by_their_text():
    labels = Labels.of([3, "3", True, np.int64(3), np.str_("x"), [1.5, None]])
    assert [names_of(labels, n) for n in range(6)] == [["3"], ["3"], ["true"], ["3"], ["x"], ["1.5"]]


def test_a_value_that_is_no_label_is_refused():
    with pytest.raises(SettingError, match="holds a dict at position 1"):
        Labels.of(["a", {"b": 1}])


@given(st.data(), st.integers(1, 6), st.integers(1, 4))
def test_what_is_to_be_avoided_is_taken_off_and_pointing_away_from_it_is_not_rewarded(data, num_rows, num_columns):
    numbers = st.integers(-3, 3)
    drawn = data.draw(st.lists(numbers, min_size=num_rows * num_columns, max_size=num_rows * num_columns))
    scores_NJ = np.array(drawn, np.float32).reshape(num_rows, num_columns)
    away_N = np.array(data.draw(st.lists(numbers, min_size=num_rows, max_size=num_rows)), np.float32)
    scores = Scores(scores_NJ, away_N, 0.5)
    expected_NJ = scores_NJ - 0.5 * np.maximum(away_N, 0)[:, None]
    assert np.array_equal(scores.best_N, expected_NJ.max(axis=1))
    columns = data.draw(st.lists(st.integers(0, num_columns - 1), min_size=1, unique=True))
    assert np.array_equal(scores.best_of(columns), expected_NJ[:, columns].max(axis=1))
    positions = np.array(data.draw(st.lists(st.integers(0, num_rows - 1))), np.int64)
    best, column = scores.at(positions, columns)
    assert np.array_equal(best, expected_NJ[positions][:, columns].max(axis=1))
    assert np.array_equal(best, expected_NJ[positions, column])
    assert set(column.tolist()) <= set(columns)


def test_arrays_that_do_not_fit_each_other_are_refused():
    scores_NJ = np.zeros((3, 2), np.float32)
    with pytest.raises(SettingError, match="subtasks must name each of the 2 columns of scores, got 1"):
        Candidates(scores_NJ=scores_NJ, subtasks=["a"], target_sets=["s", "s"])
    with pytest.raises(SettingError, match="away_N has 2 rows, expected 3"):
        Candidates(scores_NJ=scores_NJ, subtasks=["a", "b"], target_sets=["s", "s"], away_N=np.zeros(2, np.float32))
    with pytest.raises(SettingError, match="dataset has 1 rows, expected 3"):
        Candidates(
            scores_NJ=scores_NJ, subtasks=["a", "b"], target_sets=["s", "s"], labels={"dataset": Labels.of(["x"])}
        )
    with pytest.raises(SettingError, match="a score is not finite at position 1"):
        Candidates(scores_NJ=np.array([[0], [np.nan]], np.float32), subtasks=["a"], target_sets=["s"])
