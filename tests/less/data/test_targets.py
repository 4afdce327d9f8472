"""Targets keep their order and subtasks, and a bad one is listed or refused."""

import json

import pytest

from datastore.errors import DataError, RowError
from less.data import RenderConfig, Renderer, load_targets

GOOD = {"id": "a", "subtask": "sums", "prompt": "1 + 1", "completion": "2"}


@pytest.fixture
def renderer(tokenizer_with):
    return Renderer(tokenizer_with("chatml"), RenderConfig())


def test_targets_have_subtasks_in_order_of_first_appearance(renderer, tmp_path):
    rows = [GOOD, GOOD | {"id": "b", "subtask": None}, GOOD | {"id": "c", "subtask": 7}, GOOD, {"id": "d"}]
    path = tmp_path / "maths.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    targets = load_targets(path, renderer)
    assert targets.name == "maths"
    assert targets.ids == ["a", "b", "c", "a"]
    assert targets.subtask_of == ["sums", "maths", "7", "sums"]
    assert targets.subtasks == ["sums", "maths", "7"]
    assert len(targets.rendered) == 4
    (skipped,) = targets.skipped
    assert (skipped.where, skipped.id, skipped.reason) == ("maths.jsonl:5", "d", "no messages")
    assert load_targets(path, renderer, name="sums").subtask_of == ["sums", "sums", "7", "sums"]


def test_targets_in_memory_are_called_targets(renderer):
    targets = load_targets([{"prompt": "1 + 1", "completion": "2"}], renderer)
    assert targets.name == "targets"
    assert targets.subtasks == ["targets"]
    assert targets.ids == ["memory:0"]
    assert len(targets.sha256) == 64


def test_strict_refuses_the_first_bad_target(renderer):
    with pytest.raises(RowError, match=r"memory\[1\]: no assistant turn"):
        load_targets([GOOD, {"messages": [{"role": "user", "content": "x"}]}], renderer, strict=True)


def test_no_usable_target_is_an_error_that_counts_the_reasons(renderer):
    with pytest.raises(DataError, match="none of the 2 targets in memory can be used: 2 no messages; the first"):
        load_targets([{}, {}], renderer)
