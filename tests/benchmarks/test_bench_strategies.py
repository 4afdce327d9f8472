"""The benchmark of strategies runs, and times nothing that breaks its config."""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("bench_strategies")


@pytest.fixture(scope="module")
def pool(bench):
    return bench.MadeUpPool(1000, 5, 16)


def test_the_smoke_run_times_every_strategy(bench, tmp_path):
    script, out = BENCHMARKS / "bench_strategies.py", tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, script, "--smoke", "--json", out],
        capture_output=True, text=True, timeout=400, cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(BENCHMARKS.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())["results"]
    assert list(results) == [*bench.STRATEGIES, "labels"]
    assert results["top"]["ratio"] == 1
    assert results["top"]["taken"] == 100
    assert results["mmr"]["taken"] == results["near-duplicates"]["taken"] == 20
    for name in ("caps", "exact duplicates", "negative targets, threshold"):
        assert results[name]["passed_over"] > 0
    assert "| facility location |" in out.with_suffix(".md").read_text()


def test_every_strategy_is_of_another_kind(bench, pool):
    chosen = {name: pool.choose(fields).positions.tolist() for name, fields in bench.STRATEGIES.items()}
    assert all(chosen[name] != chosen["top"] for name in bench.STRATEGIES if name not in ("top", "min score"))


@pytest.mark.parametrize(
    ("name", "taken", "words"),
    [
        ("top", lambda own: own[::-1], "the rows taken are not the best"),
        ("top", lambda own: np.append(own[:-1], own[0]), "a row is taken twice"),
        ("top", lambda own: own[:-1], "49 are taken of 50"),
        ("near-duplicates", lambda own: np.append(own[:-1], 0), "two rows taken are alike"),
        ("negative targets, threshold", lambda own: np.append(own[:-1], 1), "points to what is to be avoided"),
    ],
)
def test_a_choice_that_breaks_its_config_is_not_timed(bench, pool, name, taken, words, monkeypatch):
    fields = bench.STRATEGIES[name]
    choice = pool.choose(fields)
    pool.check({name: choice, "labels": pool.read_labels()})
    monkeypatch.setattr(pool, "kind_N", pool.kind_N.copy())
    monkeypatch.setattr(pool, "away_N", pool.away_N.copy())
    pool.kind_N[0] = pool.kind_N[choice.positions[0]]
    pool.away_N[1] = 1
    wrong = replace(choice, positions=taken(choice.positions))
    with pytest.raises(SystemExit, match=rf"{name}: .*{words}.*; nothing is timed"):
        pool.check({name: wrong})


def test_a_strategy_that_differs_from_its_twin_stops_the_benchmark(bench, monkeypatch):
    real = bench.choose

    def wrong(candidates, config):
        choice = real(candidates, config)
        return replace(choice, positions=choice.positions[::-1]) if config.caps else choice

    monkeypatch.setattr(bench, "choose", wrong)
    with pytest.raises(SystemExit, match="caps: the rows are not those of choose_ref; nothing is timed"):
        bench.check_against_twin(3, 8)
