"""The benchmark of ranking runs, multiplies what it says, and times nothing that is wrong."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
ROWS, DIM = 70, 40


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("bench_select")


@pytest.fixture
def scan(bench, tmp_path):
    return bench.Scan(tmp_path / "store", ROWS, options(bench))


def options(bench, dtype="int8"):
    return bench.argparse.Namespace(proj_dim=DIM, shard_rows=32, feature_dtype=dtype)


def test_the_smoke_run_times_every_way_and_every_stage(tmp_path):
    script, out = BENCHMARKS / "bench_select.py", tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, script, "--smoke", "--subtasks", "1", "3", "--json", out],
        capture_output=True, text=True, timeout=400, cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(BENCHMARKS.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    cold, warm = report["results"]["cold"], report["results"]["warm"]
    assert list(cold) == ["read", "rank 1", "rank 3", "rank 3, unverified"]
    assert list(warm) == [
        "read", "gemm 1", "rank 1", "rank 1, unverified", "gemm 3", "rank 3", "rank 3, unverified",
    ]  # fmt: skip
    assert cold["read"]["ratio"] == warm["read"]["ratio"] == 1
    assert all(("share_of_gemm" in own) == name.startswith("rank") for name, own in warm.items())
    assert report["case"]["cold"]["bytes"] > report["case"]["cold"]["rows"] * report["case"]["proj_dim"]
    stages = report["select"]["stages"]
    for way in range(2):
        *parts, whole = (seconds[way] for seconds in stages.values())
        assert sum(parts) == pytest.approx(whole, abs=0.01)
        assert (min(parts) > 0) == (way == 0), "the second time some stages are left out"
    assert stages["target gradients"][1] == 0
    assert "| target gradients |" in out.with_suffix(".md").read_text()


def test_reading_reads_every_byte_once(scan, monkeypatch):
    total, real = 0, open

    class Counting:
        def __init__(self, *args, **kwargs):
            self.file = real(*args, **kwargs)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def readinto(self, buffer):
            nonlocal total
            total += (num_bytes := self.file.readinto(buffer))
            return num_bytes

    monkeypatch.setattr("builtins.open", Counting)
    scan.read()
    monkeypatch.undo()
    assert total == scan.num_bytes == sum(file.stat().st_size for file in scan.folder.rglob("shards/*/*/*"))


def test_a_store_that_is_there_is_used_again(bench, scan, tmp_path):
    before = {file: file.stat().st_mtime_ns for file in scan.files}
    again = bench.Scan(tmp_path / "store", ROWS, options(bench))
    assert {file: file.stat().st_mtime_ns for file in again.files} == before
    again.check({"rank 3": again.rank(3)})


@pytest.mark.parametrize("dtype", ["float16", "int4", "binary"])
def test_rows_may_be_kept_in_any_way(bench, tmp_path, dtype):
    scan = bench.Scan(tmp_path / dtype, ROWS, options(bench, dtype))
    scan.check({"rank 3": scan.rank(3)})


def test_a_result_that_is_wrong_stops_the_benchmark(scan):
    scores_NJ, positions = scan.rank(3)
    scan.check({"read": None, "rank 3": (scores_NJ, positions)})
    for wrong in (1e-3, np.nan):
        spoilt_NJ = scores_NJ.copy()
        spoilt_NJ[-1, 1] += wrong
        with pytest.raises(SystemExit, match=r"rank 3: a score is off by .*nothing is timed"):
            scan.check({"rank 3": (spoilt_NJ, positions)})
    with pytest.raises(SystemExit, match=r"rank 3: the rows selected are not the best; nothing is timed"):
        scan.check({"rank 3": (scores_NJ, positions[::-1])})


def test_bytes_that_did_not_come_from_the_disk_are_not_called_cold(bench, scan, monkeypatch):
    monkeypatch.setattr(bench, "disk_bytes", lambda: 0)
    args = bench.argparse.Namespace(subtasks=[2], rounds=1, smoke=False)
    with pytest.raises(SystemExit, match="read read 0% of the bytes from the disk; it was not cold"):
        bench.cold(scan, args)
