"""`gradsift ches filter`: what it says about what it kept."""

import json
import os
import re
import subprocess
import sys

import pytest
from click.testing import CliRunner

from ches.filtering import filter_pairs
from cli.filtering import filter_command
from datastore.errors import GradsiftError


@pytest.fixture
def scored(tmp_path, write_rows):
    rows = [
        {
            "id": n, "ln_ches": (37 * n % 40) - 20.5, "ches": (37 * n % 40) * 51_234_567.0, "edit_distance": n / 40,
            "length_chosen": 1000 + n, "length_rejected": 1100, "length_difference": 100 - n, "ches_problem": None,
        }
        for n in range(40)
    ]  # fmt: skip
    for n, problem in ((2, "empty reply"), (9, "empty reply"), (30, "\x1b[31m" + "long" * 20)):
        rows[n] |= {"ln_ches": None, "ches": None, "edit_distance": None, "ches_problem": problem}
    return write_rows(tmp_path / "scored.jsonl", rows)


@pytest.fixture
def run(scored, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)

    def call(*options):
        words = ["--scored", "scored.jsonl", "--output", "kept.jsonl", *map(str, options)]
        done = CliRunner().invoke(filter_command, words, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        lines = done.output.splitlines()
        assert not [line for line in lines if len(line) > 80 or line != line.rstrip() or "\x1b" in line]
        return lines

    return call


def cells(lines, title):
    """The rows of the table with this title, by their first word."""
    start = lines.index(title) + 3
    return {words[0]: words[1:] for line in lines[start : lines.index("", start)] if (words := line.split())}


def test_tells_counts_reasons_quantiles_lengths_and_files(run, scored, tmp_path):
    lines = run("--keep-lowest", 0.1, "--random-control", "control.parquet", "--seed", 3)
    result = filter_pairs(scored, keep_lowest=0.1, random_control=True, seed=3)
    assert lines[0] == "kept 4 of 37 ranked rows, dropped 33"
    assert "the highest ln_ches kept is -17.5" in lines
    assert "skipped 3 of 40 rows:" in lines
    assert any(line.startswith("empty reply") and "scored.jsonl:3, scored.jsonl:10" in line for line in lines)
    shown = cells(lines, "ln_ches, quantiles")
    assert list(shown) == ["all", "kept", "dropped", "control"]
    for name, group in result.summary.items():
        assert shown[name] == [str(group.num_rows), *(f"{value:.2f}" for value in group.quantiles)]
    shown = cells(lines, "mean length, tokens")
    for name, group in result.summary.items():
        assert shown[name] == [f"{mean:,.1f}" for mean in group.mean_lengths.values()]
    assert lines[-2:] == ["written: kept.jsonl", "random control: control.parquet (may share rows with those kept)"]
    source = scored.read_text().splitlines()
    assert (tmp_path / "kept.jsonl").read_text().splitlines() == [source[n] for n in result.kept]
    assert (tmp_path / "control.parquet").exists()


def test_asks_for_a_random_control_where_there_is_none(run):
    lines = run("--drop-highest", 0.1)
    assert lines[0] == "kept 33 of 37 ranked rows, dropped 4"
    assert lines[-2].startswith("no random control: only a run on 33 rows")
    assert lines[-1].endswith("add --random-control FILE")


def test_tells_the_bins(run):
    told = "ranked within bins of length_difference: 5, of 7 to 8 rows"
    lines = run("--keep-lowest", 0.2, "--length-strata", 5)
    assert told in lines
    assert not any(line.startswith("note") for line in lines)


def test_tells_of_fewer_bins_than_asked_for(run, scored, write_rows):
    write_rows(scored, [json.loads(line) | {"length_difference": 0} for line in scored.read_text().splitlines()])
    lines = run("--keep-lowest", 0.2, "--length-strata", 4)
    assert "ranked within bins of length_difference: 1, of 37 rows" in lines
    assert "note: not 4 bins, since rows of one length_difference stay together" in lines


def test_takes_negative_limits_and_negated_columns(run, tmp_path):
    assert run("--below", -19)[0] == "kept 2 of 37 ranked rows, dropped 35"
    lines = run("--below", -0.9, "--measure", "-edit_distance")
    assert "-edit_distance, quantiles" in lines
    kept = [json.loads(line)["edit_distance"] for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert kept == [37 / 40, 38 / 40, 39 / 40]


def test_fits_numbers_of_any_size_into_the_table(run):
    for measure, form in (
        ("ches", r"\d\.\d{3}e\+0\d"),
        ("-edit_distance", r"-0\.\d{4}"),
        ("length_chosen", r"1,0\d\d"),
    ):
        shown = cells(run("--keep-lowest", 0.5, "--measure", measure), f"{measure}, quantiles")
        assert all(re.fullmatch(form, value) for value in shown["kept"][1:]), shown


def test_notes_that_nothing_was_dropped(run):
    lines = run("--below", 2000, "--measure", "length_rejected")
    assert "note: every ranked row was kept" in lines
    assert cells(lines, "length_rejected, quantiles")["dropped"] == ["0", *"–––––"]


def test_says_nothing_when_quiet(run, tmp_path):
    assert run("--keep-lowest", 0.5, "-q") == []
    assert (tmp_path / "kept.jsonl").exists()


def test_leaves_what_is_wrong_to_the_one_place_for_errors(run):
    for words in (["--keep-lowest", 0.5, "--below", 1], ["--keep-lowest", 0.5, "--measure", "last_hidden"]):
        with pytest.raises(GradsiftError):
            run(*words)


def test_help_loads_nothing_heavy():
    code = (
        "import sys\nfrom cli.filtering import filter_command\n"
        "try:\n    filter_command(['--help'])\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'numpy', 'rich', 'datasets', 'less', 'ches', 'datastore') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
