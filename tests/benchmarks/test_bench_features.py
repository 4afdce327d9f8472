"""The benchmark of features runs, and its gate looks at what was stored."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("bench_features")


def smoke(tmp_path, *code):
    command = [
        sys.executable,
        *(code or [BENCHMARKS / "bench_features.py"]),
        "--smoke",
        "--device",
        "cpu",
        "--json",
        tmp_path / "out.json",
    ]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=240, cwd=BENCHMARKS,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(BENCHMARKS.parent)},
    )  # fmt: skip


def test_the_smoke_run_times_every_way_and_says_where_time_and_memory_go(tmp_path):
    done = smoke(tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    case, results = report["case"], report["results"]
    assert list(results) == ["plain", "plain, by budget", "gradsift", "LESS way"]
    assert results["plain"]["ratio"] == 1
    assert case["padded_tokens_by_budget"] > case["padded_tokens"] >= case["tokens"] > case["supervised_tokens"] > 0
    assert case["batches_by_budget"] < case["batches"]
    assert all(found["tokens_per_second"] > 0 for found in results.values())

    shares, beside = report["stages"]["shares"], report["stages"]["seconds_beside"]
    assert sum(shares.values()) == pytest.approx(1, abs=1e-3)
    assert all(shares[stage] + beside.get(stage, 0) > 0 for stage in shares), shares
    plain = report["stages"]["seconds"]["plain"]
    assert {stage for stage, seconds in plain.items() if seconds > 0.001} == {"forward", "LM head and loss", "backward"}

    memory = report["memory"]
    assert 0 < memory["for_features_bytes"] < memory["peak_bytes"]["gradsift"] < 1.5 * memory["peak_bytes"]["plain"]
    page = (tmp_path / "out.md").read_text()
    assert "**Transformation and projection: " in page
    assert "timed on 4 rows of all lengths" in page


def test_wrong_gradients_stop_the_benchmark(tmp_path):
    wrong = "import bench_features as b; ref = b.gradients_ref; "
    wrong += "b.gradients_ref = lambda *args: (0, {n: 1.01 * g for n, g in ref(*args)[1].items()}); b.main()"
    done = smoke(tmp_path, "-c", wrong)
    assert done.returncode != 0
    assert "nothing is timed" in done.stderr
    assert not (tmp_path / "out.json").exists()


def test_batches_by_budget_hold_as_many_rows_as_fit_and_every_row_once(bench):
    lengths = [5, 9, 2, 9, 30, 1, 4]
    batches = bench.filled_batches(lengths, 20)
    assert batches == [[4], [1, 3], [0, 6, 2, 5]]


def test_rows_for_the_less_way_are_spread_over_the_lengths(bench):
    lengths = list(range(100, 0, -1))
    assert [lengths[n] for n in bench.spread(lengths, 4)] == [13, 38, 63, 88]
    assert sorted(bench.spread(lengths, 100)) == list(range(100))


def test_scaling_to_all_rows_scales_time_and_ratios(bench):
    found = bench.scaled({"seconds": 2.0, "ratio": 0.5, "ratios": [0.5, 0.25]}, 4)
    assert found == {"seconds": 8.0, "ratio": 2.0, "ratios": [2.0, 1.0]}


def test_a_ratio_that_is_not_a_number_is_refused(bench):
    bench.refuse_beyond(1e-3, "ours", bench.np.array([1.0, 1.0005]))
    for wrong in (1.01, float("nan")):
        with pytest.raises(SystemExit, match=r"^ours is off by .*; nothing is timed"):
            bench.refuse_beyond(1e-3, "ours", bench.np.array([1.0, wrong]))


def test_a_column_without_any_number_is_left_out_of_the_table(bench):
    found = {"seconds": 2.0, "ratio": 1.0, "ratios": [1.0], "tokens_per_second": 1500, "flop_utilisation": None}
    head, _, plain, other = bench.table(
        {"plain": found, "other": found | {"tokens_per_second": None}},
        tokens_per_second="tokens/s", flop_utilisation="FLOP utilisation",
    )  # fmt: skip
    assert head == "| way | seconds | ratio | ratios of the rounds | tokens/s |"
    assert (plain, other) == ("| plain | 2.00 | 1.00 | 1.0 | 1,500 |", "| other | 2.00 | 1.00 | 1.0 |  |")


def test_bergson_is_left_out_where_it_is_not_installed(bench, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench.bergson_way, "find_spec", lambda name: None)
    monkeypatch.setattr(bench, "measure", lambda job, args: {"asked": args.bergson})
    monkeypatch.setattr(bench, "write_report", lambda report, page, path: print(report))
    monkeypatch.setattr(bench, "as_markdown", lambda report: "")
    monkeypatch.setattr(bench.Job, "prepare", lambda args, folder: None)
    monkeypatch.setattr(sys, "argv", ["bench_features.py", "--smoke", "--bergson"])
    bench.main()
    assert capsys.readouterr().out.splitlines() == ["bergson is not installed here and is left out", "{'asked': False}"]
