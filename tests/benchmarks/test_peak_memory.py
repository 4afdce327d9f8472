"""The peak is that of arithmetic, to the byte."""

import importlib
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
MEGA, SLACK = 2**20, 4096


@pytest.fixture
def peak_bytes(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("peak_memory").peak_bytes


def test_the_peak_is_the_most_that_lives_at_once_not_the_sum(peak_bytes):
    def work():
        first = torch.zeros(MEGA)  # 4 MB
        second = first + 1  # 8 MB
        del first
        third = torch.cat([second, second])  # 4 + 8 MB
        del second, third
        torch.zeros(2 * MEGA)  # 8 MB

    assert 0 <= peak_bytes(work, torch.device("cpu")) - 12 * MEGA <= SLACK


def test_what_lived_before_does_not_count(peak_bytes):
    before = torch.zeros(4 * MEGA)  # 16 MB
    assert 0 <= peak_bytes(lambda: before + torch.ones(4 * MEGA), torch.device("cpu")) - 32 * MEGA <= SLACK


def test_a_backward_pass_holds_what_it_saved_and_two_gradients(peak_bytes):
    x = torch.ones(MEGA, requires_grad=True)

    def work():
        y = x.exp()  # saved: 4 MB
        (y.sin()).sum().backward()  # cos(y) and its product with the gradient, then x's

    found = peak_bytes(work, torch.device("cpu"))
    assert 0 <= found - 12 * MEGA <= SLACK


def test_a_scratch_buffer_inside_an_operator_counts(peak_bytes):
    x = torch.arange(MEGA, dtype=torch.int32).flip(0)
    plain = peak_bytes(lambda: torch.empty_like(x), torch.device("cpu"))
    assert plain - 4 * MEGA <= SLACK
    assert peak_bytes(lambda: x.sort(), torch.device("cpu")) > (4 + 8) * MEGA  # values, indices, and its own
