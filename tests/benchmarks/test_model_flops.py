"""The formula counts what PyTorch counts, where PyTorch counts what it should."""

import importlib
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from less.adapters import adapted_model
from less.checkpoints import find_checkpoints
from less.data import RenderConfig, Renderer, collate
from less.data.records import Memory
from less.gradients import per_sample_gradients

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def formulas(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("model_flops")


def test_the_formula_is_what_an_unpadded_row_takes_but_for_the_first_inputs_and_the_mask(
    formulas, tiny_model, tiny_run, tiny_tokenizer
):
    renderer = Renderer(tiny_tokenizer, RenderConfig(), context_length=64)
    (record,) = Memory([{"prompt": "abcdefg", "completion": "hijkl"}]).iter_records()
    row = renderer.render_record(record)
    tiny_model.set_attn_implementation("eager")
    with adapted_model(tiny_model, find_checkpoints([tiny_run])[0].path) as adapted:
        with FlopCounterMode(display=False) as counter:
            per_sample_gradients(adapted, collate([row], [0]), lambda name, grads_Bp: None)
        expected = formulas.model_flops(adapted, [(row.num_tokens, row.num_supervised)])
    attention = 6 * 2 * 32 * row.num_tokens**2  # 2 layers, 32 wide: the half above the diagonal is computed too
    first_inputs = 2 * row.num_tokens * (32 * (32 + 16 + 16) + 3 * 4 * 32)  # q, k, v and their A: no gradient of x
    assert counter.get_total_flops() == expected + attention - first_inputs


def test_a_cpu_and_float32_have_no_known_peak(formulas, monkeypatch):
    gpu = torch.device("cuda")
    assert formulas.gpu_peak_flops(torch.device("cpu"), torch.bfloat16) is None
    for name, peak in (
        ("NVIDIA H200", 989e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 PCIe", None), ("Tesla T4", None),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert formulas.gpu_peak_flops(gpu, torch.bfloat16) == peak, name
        assert formulas.gpu_peak_flops(gpu, torch.float32) is None
