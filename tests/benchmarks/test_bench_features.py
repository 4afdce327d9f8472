"""The benchmark of features runs, and its gate looks at what was stored."""

import json
import os
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def smoke(tmp_path, *code):
    command = [
        sys.executable,
        *(code or [BENCHMARKS / "bench_features.py"]),
        "--smoke",
        "--json",
        tmp_path / "out.json",
    ]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=BENCHMARKS,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(BENCHMARKS.parent)},
    )  # fmt: skip


def test_the_smoke_run_times_every_way(tmp_path):
    done = smoke(tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert list(report["results"]) == ["plain", "gradsift", "LESS way"]
    assert report["results"]["plain"]["ratio"] == 1
    assert report["case"]["padded_tokens"] >= report["case"]["tokens"] > report["case"]["supervised_tokens"] > 0


def test_wrong_gradients_stop_the_benchmark(tmp_path):
    wrong = "import bench_features as b; ref = b.gradients_ref; "
    wrong += "b.gradients_ref = lambda *args: (0, {n: 1.01 * g for n, g in ref(*args)[1].items()}); b.main()"
    done = smoke(tmp_path, "-c", wrong)
    assert done.returncode != 0
    assert "nothing is timed" in done.stderr
    assert not (tmp_path / "out.json").exists()
