"""Whose turn it is, against brute force."""

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from less.selection import Labels, ranks, select_round_robin, select_top
from less.selection.candidates import Scores
from less.selection.orders import LabelOrder, Queue

SCORES = st.lists(st.integers(-3, 3), min_size=1, max_size=30).map(lambda xs: np.array(xs, np.float32))


@given(SCORES, st.data())
def test_select_top_equals_a_stable_sort(scores_N, data):
    count = data.draw(st.integers(1, len(scores_N)))
    expected = sorted(range(len(scores_N)), key=lambda n: (-scores_N[n], n))[:count]
    assert select_top(scores_N, count).tolist() == expected


@given(SCORES)
def test_ranks_are_the_places_in_select_top(scores_N):
    order = select_top(scores_N, len(scores_N))
    assert ranks(scores_N)[order].tolist() == list(range(1, len(scores_N) + 1))


@given(st.integers(1, 12), st.integers(1, 4), st.data())
def test_round_robin_takes_each_columns_best_that_is_left(num_rows, num_columns, data):
    values = data.draw(st.lists(st.integers(0, 4), min_size=num_rows * num_columns, max_size=num_rows * num_columns))
    scores_NS = np.array(values, np.float32).reshape(num_rows, num_columns)
    count = data.draw(st.integers(1, num_rows))
    picked, column = select_round_robin(scores_NS, count)
    left = set(range(num_rows))
    for turn in range(count):
        assert column[turn] == turn % num_columns
        best = min(left, key=lambda n: (-scores_NS[n, column[turn]], n))
        assert picked[turn] == best
        left.remove(best)


@given(SCORES, st.integers(0, 9), st.data())
def test_a_queue_gives_the_rows_that_are_not_gone_in_its_order_and_sorts_no_further_than_it_must(scores_N, guess, data):
    asked = []

    def first(count):
        asked.append(count)
        return select_top(scores_N, count)

    queue, gone, given_ = Queue(first, guess), bytearray(len(scores_N)), []
    others = data.draw(st.sets(st.integers(0, len(scores_N) - 1)))
    for row in others:
        gone[row] = 1
    while (row := queue.next(gone)) is not None:
        assert queue.next(gone) == row
        assert queue.upcoming(1, gone) == [row]
        given_.append(row)
        gone[row] = 1
    assert given_ == [row for row in select_top(scores_N, len(scores_N)).tolist() if row not in others]
    assert all(later == 4 * earlier for earlier, later in pairwise(asked))


def test_a_queue_of_many_rows_sorts_a_few_of_them():
    asked = []

    def first(count):
        asked.append(count)
        return np.arange(min(count, 10_000))

    queue, gone = Queue(first, 100), bytearray(10_000)
    for expected in range(150):
        assert queue.next(gone) == expected
        gone[expected] = 1
    assert len(asked) == 1
    assert asked[0] < 300


@given(
    st.lists(st.tuples(st.integers(-2, 2), st.sampled_from([None, "a", "b", "c"])), min_size=1, max_size=20), st.data()
)
def test_the_places_of_disjoint_labels_are_those_of_the_walk(rows, data):
    scores_N1 = np.array([[score] for score, _ in rows], np.float32)
    min_score = data.draw(st.sampled_from([None, -1, 1]))
    order = LabelOrder(Labels.of(value for _, value in rows), Scores(scores_N1, None, 0), min_score)
    turns, gone, walked = order.turns(), bytearray(len(rows)), []
    while (found := turns.next(gone)) is not None:
        walked.append(found)
        gone[found[0]] = 1
        turns.took(found[0])
    count = data.draw(st.integers(1, len(rows)))
    positions, turn_of = order.first(count)
    assert list(zip(positions.tolist(), turn_of.tolist(), strict=True)) == walked[:count]


def test_labels_that_share_rows_have_no_places_beforehand():
    order = LabelOrder(Labels.of([["a", "b"], ["a"]]), Scores(np.ones((2, 1), np.float32), None, 0), None)
    assert order.first(1) is None
