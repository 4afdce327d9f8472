"""The benchmark on storage: its ways agree with slow twins, and it runs from a store to a page."""

import importlib
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from less import build_datastore

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("fidelity_storage")


@pytest.fixture(scope="module")
def report(bench, tmp_path_factory, tiny_model_folder, tiny_run, tiny_pool, tiny_target_file):
    folder = tmp_path_factory.mktemp("storage")
    arguments = [
        "--store", folder / "ds", "--targets", f"tones={tiny_target_file}", "--halvings", 2, "--rounds", 1,
        "--resamples", 5, "--label", "tiny", "--json", folder / "out.json",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tiny run's weak evidence, and matplotlib's of its fonts
        build_datastore(
            model=tiny_model_folder, checkpoints=tiny_run, data=tiny_pool, datastore=folder / "ds", proj_dim=256,
            feature_dtype="float32", progress=False,
        )  # fmt: skip
        patch.setattr(sys, "argv", ["fidelity_storage.py", *map(str, arguments)])
        bench.main()
    return folder


def test_a_page_and_a_plot_are_made_of_every_way(report):
    found = json.loads((report / "out.json").read_text())
    ways = {(way["dtype"], way["proj_dim"]): way for way in found["ways"]}
    assert {dtype for dtype, _ in ways} >= {"float32", "float16", "int8", "int4", "binary", "FAISS QT_8bit"}
    assert {width for _, width in ways} == {256, 128, 64}
    exact = ways["float32", 256]["sets"]["tones"]
    assert exact["spearman"]["value"] == exact["top_overlap"]["value"] == 1
    assert 0.9 < ways["int8", 256]["sets"]["tones"]["spearman"]["value"] <= 1
    assert ways["binary", 256]["row_bytes"] == 36
    page = (report / "out.md").read_text()
    assert "| 260 | int8 | 256 |" in page
    assert (report / "out.png").stat().st_size > 10_000


def test_folded_rows_keep_inner_products_on_average(bench):
    rows_NK = np.random.default_rng(0).standard_normal((60, 4096)).astype(np.float32)
    folded = bench.fold(rows_NK, 1024)
    assert folded.shape == (60, 1024)
    errors = folded @ folded.T - rows_NK @ rows_NK.T
    scale = np.linalg.norm(rows_NK, axis=1)[:, None] * np.linalg.norm(rows_NK, axis=1)
    assert abs((errors / scale).mean()) < 3e-3
    assert np.sqrt(((errors / scale) ** 2).mean()) < 1.5 / np.sqrt(1024)
    assert bench.fold(rows_NK, 4096) is rows_NK


def test_a_scan_that_is_wrong_is_not_timed(bench, monkeypatch):
    monkeypatch.setattr(bench._Scan, "add", lambda self, block, normalize, scores_nJ: scores_nJ.fill(1))
    rows_NK = bench.unit(np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32))
    with pytest.raises(SystemExit, match="nothing is timed"):
        bench.scan_times(rows_NK, rows_NK[:2], rounds=1)
