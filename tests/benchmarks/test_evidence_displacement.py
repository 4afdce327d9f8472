"""The statistics of the displacement runs against brute force, and the whole script on a tiny model."""

import json
import sys

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from benchmarks import evidence_displacement
from benchmarks.evidence_displacement import partial_spearman, verdict, with_interval
from less.statistics import spearman

COLUMNS = st.integers(6, 15).flatmap(
    lambda n: st.lists(st.lists(st.integers(0, 9), min_size=n, max_size=n), min_size=4, max_size=4)
)


def by_recursion(x_N, y_N, controls):
    """The textbook's partial correlation, one control at a time."""
    if not controls:
        return spearman(x_N, y_N)
    *others, z_N = controls
    xy, xz, yz = (by_recursion(a, b, others) for a, b in ((x_N, y_N), (x_N, z_N), (y_N, z_N)))
    left = (1 - xz**2) * (1 - yz**2)
    return (xy - xz * yz) / np.sqrt(left) if left > 1e-6 else float("nan")


@given(COLUMNS)
def test_partial_spearman_is_that_of_the_textbook(columns):
    x_N, y_N, *controls = (np.array(column, float) for column in columns)
    expected = by_recursion(x_N, y_N, controls)
    assume(np.isfinite(expected))
    assert partial_spearman(x_N, y_N, controls) == pytest.approx(expected, abs=1e-6)


def test_what_only_the_lengths_explain_is_partialled_out():
    generator = np.random.default_rng(0)
    length_N = generator.normal(size=2000)
    x_N, y_N = (length_N + generator.normal(size=2000) for _ in range(2))
    assert spearman(x_N, y_N) > 0.4
    assert abs(partial_spearman(x_N, y_N, [length_N, generator.normal(size=2000)])) < 0.06


def test_a_control_has_no_partial_correlation():
    x_N, y_N = np.random.default_rng(0).normal(size=(2, 20))
    assert np.isnan(partial_spearman(x_N, y_N, [x_N]))
    assert with_interval(lambda x_N, y_N: partial_spearman(x_N, y_N, [x_N]), x_N, y_N, resamples=10) is None


def test_the_interval_of_a_mean_is_that_of_its_standard_error():
    values = np.random.default_rng(0).normal(3, 2, size=400)
    entry = with_interval(np.mean, values, resamples=2000)
    half = 1.96 * values.std() / 20
    assert entry["value"] == pytest.approx(values.mean())
    assert [entry["low"], entry["high"]] == pytest.approx([values.mean() - half, values.mean() + half], abs=0.15 * half)


def test_rows_of_all_columns_are_resampled_together():
    x_N = np.arange(30.0)
    assert with_interval(spearman, x_N, -x_N, resamples=50) == {"value": -1, "low": -1, "high": -1}


@pytest.mark.parametrize(("low", "high", "word"), [(0.1, 0.3, "**yes**"), (0, 0.3, "**no**"), (-0.3, -0.1, "opposite")])
def test_reproduced_means_an_interval_above_zero(low, high, word):
    assert word in verdict({"value": (low + high) / 2, "low": low, "high": high})


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning")  # TRL sets it itself
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:(datasets|dill|multiprocess|pyarrow|pandas).*")
def test_the_script_runs_and_goes_on_where_it_was(tmp_path, tiny_model_folder, tiny_rows, monkeypatch, capsys):
    replies = [row["messages"][1:] for row in tiny_rows]
    rows = [
        {"prompt": row["messages"][:1], "chosen": replies[n], "rejected": replies[n - 7]}
        for n, row in enumerate(tiny_rows)
    ]
    data, work = tmp_path / "pairs.jsonl", tmp_path / "work"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--smoke", "--model", tiny_model_folder, "--data", data, "--work", work]

    def run(name, *more):
        asked = [*arguments, "--json", tmp_path / f"{name}.json", *more]
        monkeypatch.setattr(sys, "argv", ["evidence_displacement.py", *map(str, asked)])
        evidence_displacement.main()
        return json.loads((tmp_path / f"{name}.json").read_text())

    report = run("first")
    assert report["not_run"] == []
    assert {*report["mixed"]["mixed-0"]["fall"]} == {
        *evidence_displacement.PREDICTORS,
        *evidence_displacement.BASELINES,
    }
    assert report["mixed"]["mixed-0"]["fall"]["length_chosen"]["partial"] is None
    runs = report["filtering"]["runs"]
    measured = {"ln_ches", "ches", "alpha_ches", "length_difference", "-length_chosen", "all"}
    assert {*runs} == measured | {"random-0", "random-1"}
    assert {run["num_steps"] for run in runs.values()} == {2}
    assert {run["num_pairs"] for name, run in runs.items() if name != "all"} == {6}  # ⌈0.4 · 14⌉
    assert {*report["filtering"]["less_random"]} == measured
    one, other = (report["filtering"]["less_other_random"][f"random-{seed}"]["chosen"]["value"] for seed in range(2))
    assert one == pytest.approx(-other)
    for run_ in (*runs.values(), *report["mixed"].values()):
        assert run_["logp_apart"] < 1e-3  # ours and the trainer's log p of the first batch
    assert run("again") == report
    (work / "filter-ches.json").unlink()
    (work / "mixed-0.json").unlink()
    partly = run("partly", "--report")
    assert {*partly["not_run"]} == {"filter-ches", "mixed-0"}
    assert partly["filtering"]["less_random"]["all"] == report["filtering"]["less_random"]["all"]
    for file in ("first.json", "first.md", "partly.md"):
        told = (tmp_path / file).read_text()
        assert "chosen" in told
        assert not [row for row in rows if row["prompt"][0]["content"] in told]
    assert capsys.readouterr().out.count("## Which pairs lose") == 2
