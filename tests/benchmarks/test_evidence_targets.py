"""How far a ranking depends on its examples: right where the answer is known, and from a store to a page."""

import importlib
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("evidence_targets")


def test_examples_that_all_say_the_same_agree_wholly_and_noise_by_chance(bench):
    generator = np.random.default_rng(0)
    same_NM = np.repeat(generator.standard_normal((400, 1)), 8, axis=1)
    assert bench.agreement(same_NM, 2, 20)["top_overlap"] == {"value": 1, "low": 1, "high": 1}
    noise = bench.agreement(generator.standard_normal((400, 8)), 2, 200)
    assert abs(noise["spearman"]["value"]) < 0.05
    assert noise["top_overlap"]["value"] < 0.15


def test_more_examples_agree_better(bench):
    generator = np.random.default_rng(0)
    examples_NM = generator.standard_normal((400, 1)) + 2 * generator.standard_normal((400, 16))
    found = [bench.agreement(examples_NM, size, 50)["spearman"]["value"] for size in (1, 4, 8)]
    assert found == sorted(found)


def test_a_page_is_made_from_a_store(bench, tmp_path, tiny_store, tiny_target_file, monkeypatch):
    arguments = [
        "--store", tiny_store, "--examples", f"tones={tiny_target_file}", "--sizes", 1, 2, 50, "--draws", 3,
        "--json", tmp_path / "out.json",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["evidence_targets.py", *map(str, arguments)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tiny run's weak evidence
        bench.main()
    kind = json.loads((tmp_path / "out.json").read_text())["kinds"]["tones"]
    assert kind["examples"] == 5
    assert list(kind["sizes"]) == ["1", "2"]
    assert "| tones | 2 |" in (tmp_path / "out.md").read_text()
