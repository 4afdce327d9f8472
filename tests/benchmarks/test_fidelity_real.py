"""The real run, on a tiny model."""

import json
import sys

import pytest

from benchmarks import fidelity_real


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
