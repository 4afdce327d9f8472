"""The measures of the real run, and the whole script on a tiny model."""

import json
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import fidelity_real
from benchmarks.fidelity_real import auc, r_precision

LABELLED = st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=20).filter(
    lambda rows: len({right for _, right in rows}) == 2
)


@given(LABELLED)
def test_auc_is_the_share_of_pairs_in_the_right_order(rows):
    score_N, right_N = (np.array(column) for column in zip(*rows, strict=True))
    pairs = [(a > b) + (a == b) / 2 for a in score_N[right_N] for b in score_N[~right_N]]
    assert auc(score_N, right_N) == pytest.approx(np.mean(pairs))


@given(LABELLED)
def test_r_precision_is_the_share_of_right_rows_at_the_top(rows):
    score_N, right_N = (np.array(column) for column in zip(*rows, strict=True))
    order = sorted(range(len(rows)), key=lambda n: (-score_N[n], n))[: right_N.sum()]
    assert r_precision(score_N, right_N) == pytest.approx(np.mean([right_N[n] for n in order]))


def test_perfect_scores_reach_the_ceiling():
    right_N = np.array([True, False, True, False])
    assert r_precision(right_N.astype(float), right_N) == auc(right_N.astype(float), right_N) == 1


@pytest.mark.filterwarnings("ignore::less.checkpoints.EvidenceWarning")
def test_the_script_runs_and_goes_on_where_it_was(tmp_path, tiny_model_folder, tiny_rows, monkeypatch, capsys):
    data = tmp_path / "data"
    data.mkdir()
    labels = [("t0", "ab"[n % 2]) if n % 4 else ("dolly", "qa" if n % 8 else "open") for n in range(len(tiny_rows))]
    rows = [row | {"dataset": d, "subtask": s} for row, (d, s) in zip(tiny_rows, labels, strict=True)]
    (data / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in fidelity_real.TARGETS:
        own = [row for row in rows if row["dataset"] == name][:4] or rows[:2]
        (data / f"target_{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    arguments = ["--model", tiny_model_folder, "--data", data, "--work", tmp_path / "work", "--rows", "40"]
    arguments += ["--json", tmp_path / "report.json", "--update-rule", "adam", "sgd"]
    monkeypatch.setattr(sys, "argv", ["fidelity_real.py", *map(str, arguments)])
    for _ in range(2):
        fidelity_real.main()
        report = json.loads((tmp_path / "report.json").read_text())
        assert report["num_scored"] == 40
        for rule in ("adam", "sgd"):
            assert report["results"][rule]["t0"]["num_subtasks"] == 2
            assert 0 < report["results"][rule]["t0"]["chance"] < report["results"][rule]["t0"]["ceiling"]
            assert report["results"][rule]["bbh"]["num_selected"] == 2
    assert "| adam | t0 | 2 |" in capsys.readouterr().out
