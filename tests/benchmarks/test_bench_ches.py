"""The speed benchmark runs, and times nothing that is wrong."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_the_smoke_run_times_every_way(tmp_path):
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "bench_ches.py", "--smoke", "--json", tmp_path / "out.json"],
        capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert list(report["results"]) == ["script", "batched", "backbone", "ches, ln_ches", "all measures"]
    assert report["results"]["batched"]["ratio"] == 1
    assert all(found["seconds"] >= 0 for found in report["results"].values())
    assert report["machine"]["versions"]["torch"]
    assert "| script |" in (tmp_path / "out.md").read_text()


def test_a_way_that_disagrees_stops_the_benchmark(benchmark):
    import torch

    check = benchmark("bench_ches").check
    check({"first": [1.0, -3.0], "same": [1.0 + 5e-4, -3.0]}, torch.tensor([10.0, 10.0]))
    for wrong in ([1.01, -3.0], [float("nan"), -3.0]):
        with pytest.raises(SystemExit, match="wrong disagrees with first"):
            check({"first": [1.0, -3.0], "wrong": wrong}, torch.tensor([10.0, 10.0]))


def test_nothing_is_timed_before_the_gate_and_ratios_are_taken_within_a_round(benchmark):
    timed = benchmark("harness").timed
    calls = []

    def gate(results):
        calls.append(f"gate {sorted(results)}")

    found = timed(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, against="a", rounds=3, gate=gate
    )  # fmt: skip
    assert calls == ["a", "b", "gate ['a', 'b']", *["a", "b"] * 3]
    assert found["a"]["ratios"] == [1.0, 1.0, 1.0]
    assert len(found["b"]["ratios"]) == 3
