"""`gradsift ches score`: what it makes, and what it says about it."""

import json
import os

import pytest
from click.testing import CliRunner

from ches.scored import Manifest
from ches.scores import score_pairs
from cli.preferences import score_command

WORDS = ["red", "green", "blue", "amber", "violet"]


def pair_row(number):
    chosen, rejected = (" ".join(WORDS[(number + i) % 5] for i in range(1 + number * k % 4)) for k in (2, 3))
    return {
        "id": number, "prompt": [{"role": "user", "content": f"Mix {number}."}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": f"{rejected}!"}],
    }  # fmt: skip


LONG = {**pair_row(1), "chosen": [{"role": "assistant", "content": "red " * 90}]}
SAME = {**pair_row(2), "chosen": pair_row(2)["rejected"]}
TRANSCRIPT = {
    "chosen": "\n\nHuman: Which?\n\nAssistant: Red.", "rejected": "\n\nHuman: Which?\n\nAssistant: Blue, I'd say.",
}  # fmt: skip


@pytest.fixture
def run(gradsift, tiny_model_folder, write_rows, tmp_path, monkeypatch):
    """The command on these rows, from within a folder."""
    monkeypatch.chdir(tmp_path)

    def call(rows, *options):
        write_rows(tmp_path / "pairs.jsonl", rows)
        command = ["ches", "score", "--model", tiny_model_folder, "--data", "pairs.jsonl", "--output", "scored.jsonl"]
        return gradsift(*command, *options)

    return call


def cells(out, title):
    """The rows of the table with this title, by their first word."""
    lines = out.splitlines()
    start = lines.index(title) + 3
    return {words[0]: words[1:] for line in lines[start : lines.index("", start)] if (words := line.split())}


def test_the_summary_tells_what_was_skipped_cut_and_scored(run, tmp_path):
    rows = [*map(pair_row, range(9)), SAME, LONG, {"id": "bare"}]
    done = run(rows, "--max-length", 100)
    assert done.code == 0, done
    lines = done.out.splitlines()
    assert not [line for line in lines if len(line) > 80 or line != line.rstrip() or "\x1b" in line]
    assert "skipped 2 of 12 pairs:" in lines
    assert cells(done.out, "skipped 2 of 12 pairs:").keys() == {"same", "field"}
    assert any(line.startswith("field missing") and line.endswith("pairs.jsonl:12") for line in lines)
    assert "note: 1 of 12 pairs with a reply cut at the length limit: scored, and marked" in lines
    assert lines[-1] == "10 of 12 pairs scored: scored.jsonl"
    assert "pairs: 12 of 12 pairs" in done.err
    assert "Loading weights" not in done.err + done.out

    scored = [json.loads(line) for line in (tmp_path / "scored.jsonl").read_text().splitlines()]
    measured = [row for row in scored if row["ches"] is not None]
    table = cells(done.out, "scores")
    assert list(table) == [name for name in scored[0] if name not in (*rows[0], "ches_problem")]
    for name, shown in table.items():
        values = sorted(row[name] for row in measured)
        assert len(shown) == 5
        found = [float(number.replace(",", "")) for number in (shown[0], shown[-1])]
        assert found == pytest.approx([values[0], values[-1]], rel=0.006)


def test_large_numbers_and_long_names_stay_on_their_line(run, monkeypatch):
    import ches

    def enlarged(**options):
        scores = score_pairs(**options)
        for columns in scores.columns:
            columns |= {name: value * -1e9 for name, value in columns.items() if isinstance(value, float)}
        return scores

    monkeypatch.setattr(ches, "score_pairs", enlarged)
    table = cells(run([pair_row(n) for n in range(6)]).out, "scores")
    assert len(table) == 10
    assert all(len(numbers) == 5 for numbers in table.values())
    assert {len(number) for number in table["ches"]} == {8, 9}


def test_a_second_run_has_nothing_to_do_and_says_so(run, tmp_path):
    rows = [pair_row(n) for n in range(6)]
    first = run(rows)
    before = (tmp_path / "scored.jsonl").read_bytes()
    second = run(rows)
    assert "scored.jsonl is complete: nothing to do" in second.out.splitlines()
    assert "nothing to do" not in first.out
    assert cells(second.out, "scores") == cells(first.out, "scores")
    assert second.err == ""
    assert (tmp_path / "scored.jsonl").read_bytes() == before


def test_quiet_prints_nothing(run, tmp_path):
    done = run([pair_row(0), SAME, TRANSCRIPT, LONG], "--quiet")
    assert (done.code, done.out, done.err) == (0, "", "")
    assert len((tmp_path / "scored.jsonl").read_text().splitlines()) == 4


def test_a_layout_that_is_rewritten_is_told(run):
    done = run([TRANSCRIPT], "--measures", "ln_ches")
    assert "note: prompt, chosen and rejected are written as messages: DPOTrainer would misread the layout" in done.out
    assert cells(done.out, "scores").keys() == {"ln_ches", "length_difference", "length_chosen", "length_rejected"}


def test_options_reach_the_scores(run, tmp_path):
    done = run(
        [pair_row(n) for n in range(5)], "--measures", "ches, logp", "--tokens", "reference", "--max-length", 150,
        "--shard-rows", 2, "--tokens-per-batch", 100, "--system-prompt", "Be brief.", "--dtype", "bfloat16",
        "--device", "cpu", "--chat-template", "chatml",
    )  # fmt: skip
    assert done.code == 0, done
    settings = Manifest.load(tmp_path / "scored.jsonl").settings
    assert settings["measures"] == ["ches", "logp"]
    assert settings["model"]["dtype"] == "bfloat16"
    assert (settings["shard_rows"], settings["tokens_per_batch"]) == (2, 100)
    rendering = settings["rendering"]
    assert (rendering["tokens"], rendering["max_length"], rendering["system_prompt"]) == ("reference", 150, "Be brief.")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--measures", "ches,chess"], "got 'chess'"),
        (["--measures", ""], "got ''"),
        (["--tokens", "all"], "'all' is not one of 'trainer', 'reference'"),
        (["--max-length", 0], "max_length must be at least 1, got 0"),
        (["--adapter", "absent"], "no adapter for this model can be loaded from absent"),
        (["--model", "./absent"], "absent"),
        (["--data", "absent.jsonl"], "absent.jsonl"),
        (["--output", "pairs.jsonl"], "pairs.jsonl is the data itself"),
        (["--strict"], "pairs.jsonl:2: same replies"),
    ],
)
def test_errors_are_one_line(run, tmp_path, options, words):
    done = run([pair_row(0), SAME], *options)
    assert words in done.error
    assert done.out == ""
    assert not (tmp_path / "scored.jsonl").exists()


def test_other_settings_are_refused_in_one_line(run):
    rows = [pair_row(0)]
    assert run(rows).code == 0
    line = run(rows, "--measures", "ches").error
    assert "measures is [" in line
    assert "--output" in line


def test_help_names_every_measure_and_loads_no_torch():
    import subprocess
    import sys

    shown = CliRunner().invoke(score_command, ["--help"]).output
    for name in ("ches", "ln_ches", "alpha_ches", "last_hidden", "edit_distance", "length_difference", "logp"):
        assert name in shown
    code = "import sys; from cli.main import main; sys.argv = ['gradsift', 'ches', 'score', '--help']\n"
    code += "try: main()\nexcept SystemExit: pass\n"
    code += "print(sorted({'torch', 'numpy', 'rich', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert done.stdout.splitlines()[-1] == "[]", done
