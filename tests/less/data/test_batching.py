"""Batches cover every row once, keep to the budget, and never mistake padding for a token."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from datastore.errors import SettingError
from less.data import Rendered, collate, plan_batches
from less.data.batching import BatchBudget, run_in_batches

lengths = st.lists(st.integers(1, 200), max_size=60)
budgets = st.builds(BatchBudget, max_tokens=st.integers(1, 1000), overhead=st.integers(0, 100))


@given(lengths, budgets)
def test_every_row_is_in_one_batch_and_a_batch_keeps_to_the_budget(lengths, budget):
    batches = plan_batches(lengths, budget)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= budget.max_tokens


@given(lengths, budgets)
def test_the_longest_rows_come_first_and_ties_keep_their_order(lengths, budget):
    order = [row for batch in plan_batches(lengths, budget) for row in batch]
    assert order == sorted(order, key=lambda row: (-lengths[row], row))


@given(st.lists(st.integers(1, 200), max_size=9), budgets)
def test_no_plan_is_cheaper(lengths, budget):
    def cost(batches):
        return sum(len(batch) * max(lengths[row] for row in batch) + budget.overhead for batch in batches)

    longest_first = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    plans = [[]]
    for row in longest_first:  # each row goes on with the last batch, or opens one
        joined = [[*plan[:-1], [*plan[-1], row]] for plan in plans if plan]
        fitting = [plan for plan in joined if len(plan[-1]) * lengths[plan[-1][0]] <= budget.max_tokens]
        plans = fitting + [[*plan, [row]] for plan in plans]
    assert cost(plan_batches(lengths, budget)) == min(map(cost, plans))


def test_cheap_batches_are_never_padded_and_dear_ones_are_full():
    lengths = [5, 9, 5, 7]
    assert plan_batches(lengths, BatchBudget(max_tokens=100, overhead=1)) == [[1], [3], [0, 2]]
    assert plan_batches(lengths, BatchBudget(max_tokens=100, overhead=1000)) == [[1, 3, 0, 2]]


@given(lengths, budgets, st.integers(1, 20))
def test_batches_that_do_not_fit_are_halved_until_they_do_and_every_row_runs_once(lengths, budget, room):
    done, refused = [], []

    def run(members):
        if len(members) > room:
            refused.append(members)
            raise torch.OutOfMemoryError
        done.extend(members)

    assert run_in_batches(lengths, budget, run) == len(refused)
    assert done == [row for batch in plan_batches(lengths, budget) for row in batch]


def test_a_row_that_does_not_fit_alone_is_an_error():
    def run(members):
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        run_in_batches([3, 2], BatchBudget(max_tokens=100, overhead=10), run)


def test_a_budget_must_be_positive():
    with pytest.raises(SettingError, match="tokens per batch must be positive, got 0"):
        BatchBudget(max_tokens=0, overhead=0)


def rendered(*ids):
    return Rendered(list(ids), [False] + [True] * (len(ids) - 1), truncated=False)


def test_padding_is_known_by_its_place_and_not_by_its_id():
    rows = [rendered(7, 0), rendered(5, 0, 0), rendered(9)]
    batch = collate(rows, [1, 0], pad_id=0)
    assert batch.input_ids_BT.tolist() == [[5, 0, 0], [7, 0, 0]]
    assert batch.attention_mask_BT.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.supervised_BT.tolist() == [[False, True, True], [False, True, False]]
    assert batch.input_ids_BT.dtype == batch.attention_mask_BT.dtype == torch.int64
    assert batch.position_ids_BT is None
    assert batch.rows == [1, 0]
    assert batch.num_tokens == 5


def test_left_padding_comes_with_positions():
    batch = collate([rendered(7, 8), rendered(5, 6, 4)], [0, 1], pad_id=0, padding_side="left").to("cpu")
    assert batch.input_ids_BT.tolist() == [[0, 7, 8], [5, 6, 4]]
    assert batch.attention_mask_BT.tolist() == [[0, 1, 1], [1, 1, 1]]
    assert batch.supervised_BT.tolist() == [[False, False, True], [False, True, True]]
    assert batch.position_ids_BT is not None
    assert batch.position_ids_BT.tolist() == [[0, 0, 1], [0, 1, 2]]
    with pytest.raises(SettingError, match="padding side"):
        collate([rendered(7)], [0], pad_id=0, padding_side="both")
