"""Made-up rows have the lengths asked for, and made-up models the shapes of the real ones."""

import importlib
from pathlib import Path

import pytest
import torch

from less.data import RenderConfig, Renderer
from less.data.records import Memory

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def made_up(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("made_up_models")


def test_a_made_up_row_renders_to_the_lengths_of_a_real_one(made_up):
    lengths = [*made_up.pool_lengths()[:20], (4, 2), (512, 2)]
    rows = made_up.rows_of_lengths(lengths, len(lengths) + 1)
    renderer = Renderer(made_up.letter_tokenizer(), RenderConfig(), context_length=2048)
    rendered = [renderer.render_record(record) for record in Memory(rows).iter_records()]
    found = [(row.num_tokens, row.num_supervised) for row in rendered]
    assert found == [*lengths, lengths[0]]
    assert rendered[0].input_ids != rendered[-1].input_ids


def test_the_pool_lengths_are_counts_that_can_be_made_up(made_up):
    lengths = made_up.pool_lengths()
    assert len(lengths) == 1000
    assert all(2 <= supervised < tokens <= 512 for tokens, supervised in lengths)


@pytest.mark.parametrize(("size", "parameters"), [("1b", 1_235_814_400), ("7b", 6_738_415_616)])
def test_a_random_llama_has_as_many_parameters_as_the_real_one(made_up, size, parameters):
    model = made_up.random_llama(size, device=torch.device("meta"), dtype=torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert model.dtype == torch.bfloat16


def test_a_random_llama_is_the_same_every_time_and_leaves_the_default_dtype(made_up):
    first, again = (made_up.random_llama("tiny", device=torch.device("cpu"), dtype=torch.bfloat16) for _ in range(2))
    assert torch.get_default_dtype() == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert float(first.lm_head.weight.detach().float().std()) > 0
