"""`gradsift verify`: what it prints, what it writes, and how it ends."""

import json

import pytest

from less.verification.certificate import BOUNDS


@pytest.fixture
def verify(gradsift, tiny_store):
    def verify(*more, datastore=tiny_store):
        return gradsift("verify", datastore, "--sample", 6, *more)

    return verify


def test_says_in_lines_of_eighty_columns_what_the_numbers_are_worth(verify, tiny_target_file, tmp_path):
    done = verify("--targets", tiny_target_file, "--json", tmp_path / "certificate.json")
    assert done.code == 0, done
    assert max(len(line) for line in done.out.splitlines() if str(tmp_path) not in line) <= 80
    assert not any(line != line.rstrip() for line in done.out.splitlines())
    for begin in (
        "sample: 6 of 40 rows at 2 checkpoints", "checksums: all 8 files", "gradients: right to", "update directions:",
        "stored features: right to", "projection: K = 256 moves a cosine by 0.0", "ranks:", "best rows: of the 2 best",
        "sampled rows: no gradient is zero", "skipped rows of the pool: none", "adapter: every parameter",
        "the score's variance over all 40 rows", f"written: {tmp_path / 'certificate.json'}",
    ):  # fmt: skip
        assert sum(line.startswith(begin) for line in done.out.splitlines()) == 1, begin
    doc = json.loads((tmp_path / "certificate.json").read_text())
    assert [*doc["values"]] == [*BOUNDS]
    assert doc["seed"] == 0
    assert len(doc["rows"]) == 6
    assert doc["missed"] == []
    assert "".join(doc["verdicts"][0].split()) in "".join(done.out.split())


def test_a_bound_that_is_kept_ends_with_0_and_one_that_is_missed_with_1(verify):
    kept = verify("--require", "gradient=1e-3, spearman=-1")
    assert kept.code == 0, kept
    assert "required: gradient at most 0.001, got" in kept.out
    missed = verify("--require", "cosine=1e-9,gradient=1e-3")
    assert missed.code == 1
    assert "MISSED" in missed.out
    assert missed.err.splitlines()[-1] == "missed: cosine"
    quiet = verify("--require", "cosine=1e-9", "--quiet")
    assert (quiet.code, quiet.out, quiet.err) == (1, "", "missed: cosine\n")


def test_targets_that_stand_in_the_pool_can_be_forbidden(verify, write_rows, tiny_rows, tmp_path):
    targets = write_rows(tmp_path / "copied.jsonl", tiny_rows[3:4])
    done = verify("--targets", targets, "--require", "contaminated=0")
    assert done.code == 1
    assert "pool.jsonl:4 (1.00 of copied.jsonl:1)" in " ".join(done.out.split())


@pytest.mark.parametrize(
    ("require", "expected"),
    [
        ("gradeint=1", "cannot require 'gradeint'; expected one of gradient,"),
        ("gradient", "is not NAME=BOUND"),
        ("gradient=small", "is not NAME=BOUND"),
        ("contaminated=0", "--targets"),
    ],
)
def test_a_wrong_bound_is_one_line_before_any_work(verify, require, expected, tmp_path):
    assert expected in verify("--require", require, datastore=tmp_path / "nowhere").error


def test_a_report_that_cannot_be_written_is_told_before_any_work(verify, tmp_path):
    line = verify("--json", tmp_path / "none" / "c.json", datastore=tmp_path / "nowhere").error
    assert "its folder is not there" in line


def test_no_store_is_one_line(verify, tmp_path):
    assert "no datastore at" in verify(datastore=tmp_path / "nowhere").error
