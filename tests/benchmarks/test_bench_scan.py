"""The scan's benchmark runs, and times nothing that is wrong."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from datastore.coding import FEATURE_DTYPES

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_the_smoke_run_weighs_and_times_every_way(tmp_path):
    script = BENCHMARKS / "bench_scan.py"
    done = subprocess.run(
        [sys.executable, str(script), "--smoke", "--json", str(tmp_path / "out.json")],
        capture_output=True, text=True, timeout=300, cwd=BENCHMARKS.parent, env={"PYTHONPATH": str(BENCHMARKS.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert list(results) == [*FEATURE_DTYPES, "int8, verified"]
    assert results["float16"]["ratio"] == 1
    assert results["binary"]["row_bytes"] == 12
    assert "| int8, verified | 68 |" in (tmp_path / "out.md").read_text()


def test_memory_that_is_held_for_a_moment_is_seen():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        bench = importlib.import_module("bench_scan")

    def hold():
        for _ in range(20):
            np.ones(8_000_000).sum()

    assert bench.peak_anonymous(hold) > 40e6
    assert bench.peak_anonymous(lambda: None) < 20e6
