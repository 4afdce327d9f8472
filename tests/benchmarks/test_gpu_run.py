"""The GPU run goes through whatever its steps do, and says what came of each."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def gpu_run(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu_run")


def step(gpu_run, name, code, **settings):
    return gpu_run.Step(name=name, command=["-c", code, *(["--json", ""] if "headline" in settings else [])],
                        **{"limit_seconds": 60} | settings)  # fmt: skip


@pytest.mark.slow
def test_the_smoke_run_measures_on_a_cpu_and_writes_the_page(tmp_path):
    command = [sys.executable, BENCHMARKS / "gpu_run.py", "--smoke", "--out", tmp_path]
    done = subprocess.run(
        [*command, "--only", "tests,projection_r8,features_1b_r128"],
        capture_output=True, text=True, timeout=400, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    report = json.loads((tmp_path / "gpu_run.json").read_text())
    assert [own["outcome"] for own in report["steps"]] == ["done"] * 3
    page = (tmp_path / "gpu_run.md").read_text()
    assert "| tests | done |" in page
    assert "of the plain step" in page
    case = json.loads((tmp_path / "gpu_features_1b_r128.json").read_text())["case"]
    assert (case["lora_targets"], case["device"]) == ("q_proj,k_proj,v_proj,o_proj", "cpu")
    assert not list(tmp_path.glob("*.log"))


def test_a_step_that_fails_or_hangs_does_not_stop_the_next(gpu_run, tmp_path, capsys):
    steps = [
        step(gpu_run, "broken", "print('fine so far'); raise SystemExit('no peft here')"),
        step(gpu_run, "hanging", "import time; print('waiting', flush=True); time.sleep(60)", limit_seconds=2),
        step(gpu_run, "last", "print('7 passed')"),
    ]
    assert gpu_run.run_all(steps, tmp_path) is False
    broken, hanging, last = json.loads((tmp_path / "gpu_run.json").read_text())["steps"]
    assert (broken["outcome"], broken["found"]) == ("failed (1)", "fine so far / no peft here")
    assert (hanging["outcome"], hanging["found"]) == ("stopped after 2 s", "waiting")
    assert (last["outcome"], last["found"]) == ("done", "7 passed")
    assert (tmp_path / "gpu_broken.log").read_text().splitlines() == ["fine so far", "no peft here"]
    assert "| hanging | stopped after 2 s |" in (tmp_path / "gpu_run.md").read_text()


def test_the_headline_is_of_the_report_that_the_step_wrote(gpu_run, tmp_path):
    code = "import sys, pathlib; pathlib.Path(sys.argv[-1]).write_text('{\"n\": 3}')"
    outcome = gpu_run.run(step(gpu_run, "one", code, headline=lambda report: f"n is {report['n']}"), tmp_path)
    assert (outcome["outcome"], outcome["found"]) == ("done", "n is 3")


def test_a_stale_report_is_not_taken_for_this_runs(gpu_run, tmp_path):
    (tmp_path / "gpu_one.json").write_text('{"n": 3}')
    outcome = gpu_run.run(step(gpu_run, "one", "pass", headline=lambda report: f"n is {report['n']}"), tmp_path)
    assert outcome["outcome"] == "failed (no report)"


def test_all_steps_together_stay_under_ten_minutes(gpu_run):
    assert sum(own.limit_seconds for own in gpu_run.gpu_steps()) < 600
    assert len({own.name for own in gpu_run.gpu_steps()}) == 7


def test_what_is_not_installed_is_named(gpu_run, monkeypatch):
    monkeypatch.setattr(gpu_run, "version_of", lambda name: None if name in ("peft", "triton") else "1.0")
    assert "**Missing here: peft, triton.**" in "\n".join(gpu_run.about_this_machine())


def test_a_step_that_does_not_exist_is_refused(gpu_run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_run.py", "--smoke", "--only", "tests,features_70b"])
    with pytest.raises(SystemExit):
        gpu_run.main()
    assert "there is no step 'features_70b'; expected some of tests, projection_r8" in capsys.readouterr().err
