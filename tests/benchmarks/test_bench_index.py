"""The benchmark of indexes runs, asks what it says, and times nothing that is wrong."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from datastore import Datastore, GradientSpace

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("bench_index")


@pytest.fixture
def space(bench, tmp_path):
    bench.make_store(tmp_path / "store", 300, 24)
    return GradientSpace(Datastore.open(tmp_path / "store"))


def test_the_smoke_run_times_every_type_beside_the_scan(tmp_path):
    script, out = BENCHMARKS / "bench_index.py", tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, script, "--smoke", "--dim", "12", "--json", out],
        capture_output=True, text=True, timeout=400, cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(BENCHMARKS.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    names = ["scan", "flat", "ivf", "ivf-sq8", "sq8", "hnsw"]
    assert [*report["at_once"]] == [*report["alone"]] == names
    assert report["at_once"]["scan"] | {"ratio": 1.0, "recall": 1.0} == report["at_once"]["scan"]
    for name in names[1:]:
        own = report["at_once"][name]
        assert own["bytes"] > 0
        assert own["recall"] >= own.get("stated", 0.5) - 0.05
    assert "| ivf-sq8 |" in out.with_suffix(".md").read_text()


def test_a_store_that_is_there_is_used_again(bench, space):
    files = [file for file in space.store.path.rglob("*.safetensors")]
    before = {file: file.stat().st_mtime_ns for file in files}
    bench.make_store(space.store.path, 300, 24)
    assert {file: file.stat().st_mtime_ns for file in files} == before


def test_what_is_wrong_stops_the_benchmark(bench, space):
    asked = np.arange(0, 300, 30)
    scan = space.nearest(asked, 10)
    facts = {"scan": {}, "flat": {"stated": 1.0}}
    bench.gate(space, asked, facts, {"scan": scan, "flat": scan})
    assert facts["flat"]["recall"] == 1
    with pytest.raises(SystemExit, match=r"flat: it finds 0\.00 of the nearest rows and says 1\.00; nothing"):
        bench.gate(space, asked, facts, {"scan": scan, "flat": (scan[0], scan[1] + 1000)})
    with pytest.raises(SystemExit, match="scan: it is not right; nothing is timed"):
        bench.gate(space, asked, facts, {"scan": (scan[0] + np.float32(1e-3), scan[1])})
