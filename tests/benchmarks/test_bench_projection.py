"""The speed benchmark of the projections runs, and times nothing that is wrong."""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("bench_projection")


def test_the_smoke_run_times_every_way(tmp_path):
    script, out = BENCHMARKS / "bench_projection.py", tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, script, "--smoke", "--device", "cpu", "--json", out],
        capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert list(report["results"]) == ["copy", "sparse", "index-scatter", "rademacher"]
    assert report["results"]["copy"]["ratio"] == 1
    rows, params = report["case"]["rows"], report["case"]["grad_dim"]
    assert report["case"]["bytes_a_batch"] == {"copy": 8 * rows * params, "sparse": 4 * rows * params + 8 * params}
    assert "| index-scatter |" in out.with_suffix(".md").read_text()


def test_the_layers_are_those_of_smollm2(bench):
    layout = bench.llama_layout(8)
    assert (len(layout.names), layout.num_params) == (420, 2_442_240)


def test_a_way_that_disagrees_stops_the_benchmark(bench):
    case = bench.Case.random(
        bench.llama_layout(2, num_layers=1, hidden=32, kv=16, inner=48), 3, bench.ProjectionConfig(proj_dim=64),
        torch.device("cpu"),
    )  # fmt: skip
    found = {name: work() for name, work in bench.ways_of(case, 32, on_gpu=True).items()}
    bench.check(found, 32)

    def refuses(name, field, wrong):
        spoilt = replace(found[name], **{field: getattr(found[name], field) * wrong})
        with pytest.raises(SystemExit, match=f"^{name}.*nothing is timed"):
            bench.check(found | {name: spoilt}, 32)

    for wrong in (1.001, float("nan")):
        for field in ("features_BK", "grad_norms_B", "update_norms_B"):
            refuses("sparse", field, wrong)
            refuses("sparse, PyTorch", field, wrong)
    for wrong in (3, float("nan")):
        refuses("rademacher", "features_BK", wrong)
