"""Each command from end to end on the tiny model: what is made, and what is said about it."""

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest

from datastore import Datastore


def build(model, run, pool, store, *more):
    return [
        "build-datastore", "--model", model, "--checkpoints", run, "--data", pool, "--datastore", store,
        "--proj-dim", 64, "--shard-rows", 16, "--tokens-per-batch", 256, *more,
    ]  # fmt: skip


@pytest.fixture
def mixed_pool(tmp_path, tiny_rows):
    """24 rows that can be used and four that cannot."""
    lines = [json.dumps(row) for row in tiny_rows[:24]]
    lines[3:3] = ["{no json", '{"id": "bare"}', '{"messages": [{"role": "wizard", "content": "x"}]}', "[1]"]
    pool = tmp_path / "mixed.jsonl"
    pool.write_text("\n".join(lines) + "\n")
    return pool


def test_warmup(gradsift, tiny_model_folder, tiny_pool, tmp_path):
    run = tmp_path / "run"
    command = ["warmup", "--model", tiny_model_folder, "--data", tiny_pool, "--output", run, "--fraction", 0.2,
               "--epochs", 2, "--batch-size", 4, "--lora-rank", 2, "--target-modules", "q_proj,v_proj"]  # fmt: skip
    done = gradsift(*command)
    assert done.code == 0, done
    assert sorted(p.name for p in run.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert "2 checkpoints after 4 steps on 8 rows" in done.out
    assert done.err.count("warning: a warm-up of 4 optimizer steps, fewer than 50") == 1
    assert "warm-up: 16 of 16 rows" in done.err
    for noise in ("Loading weights", "Writing model shards", "FutureWarning", "gradient_checkpointing"):
        assert noise not in done.err + done.out
    again = gradsift(*command)
    assert f"{run} is complete: nothing to do" in again.out
    assert again.err == ""


def test_build_tells_what_it_skipped_and_a_rerun_does_nothing(
    gradsift, tiny_model_folder, tiny_run, mixed_pool, tmp_path
):
    command = build(tiny_model_folder, tiny_run, mixed_pool, tmp_path / "ds")
    done = gradsift(*command)
    assert done.code == 0, done
    assert "skipped 4 of 28 rows:" in done.out
    for reason, where in (("not JSON", 4), ("no messages", 5), ("unknown role", 6), ("not an object", 7)):
        assert any(reason in line and f"mixed.jsonl:{where}" in line for line in done.out.splitlines())
    assert "24 rows scored of 28" in done.out
    assert "gradients: 56 of 56 rows" in done.err
    assert not any(line != line.rstrip() for line in done.out.splitlines())
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "ds").rglob("*.safetensors")}
    again = gradsift(*command)
    assert "is complete: nothing to do" in again.out
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "ds").rglob("*.safetensors")}


def test_strict_stops_at_the_first_bad_row(gradsift, tiny_model_folder, tiny_run, mixed_pool, tmp_path):
    line = gradsift(*build(tiny_model_folder, tiny_run, mixed_pool, tmp_path / "ds", "--strict")).error
    assert "mixed.jsonl:4: not JSON" in line


def test_more_data_is_appended_and_repeats_are_told(
    gradsift, write_rows, tiny_model_folder, tiny_run, tiny_rows, tmp_path
):
    first = write_rows(tmp_path / "first.jsonl", tiny_rows[:8])
    more = write_rows(tmp_path / "more.jsonl", [*tiny_rows[8:12], tiny_rows[0]])
    gradsift(*build(tiny_model_folder, tiny_run, first, tmp_path / "ds"))
    done = gradsift(*build(tiny_model_folder, tiny_run, first, tmp_path / "ds", "--data", more))
    assert "gradients: 10 of 10 rows" in done.err
    assert "13 rows scored of 13" in done.out
    assert "1 scored rows have an id that came before" in done.out
    assert "token for token" in done.out


def test_several_feature_sets_need_a_choice(
    gradsift, tiny_model_folder, tiny_run, tiny_pool, tiny_target_file, tmp_path
):
    done = gradsift(
        *build(tiny_model_folder, tiny_run, tiny_pool, tmp_path / "ds"), "--update-rule", "adam", "--update-rule", "sgd"
    )
    assert done.code == 0, done
    select = ["select", "--datastore", tmp_path / "ds", "--targets", tiny_target_file, "--count", 1,
              "--output", tmp_path / "out.jsonl"]  # fmt: skip
    assert "--feature-set" in gradsift(*select).error
    assert gradsift(*select, "--feature-set", Datastore.open(tmp_path / "ds").feature_sets[1]).code == 0


def test_select(gradsift, tiny_store, tiny_target_file, tmp_path):
    done = gradsift(
        "select", "--datastore", tiny_store, "--targets", tiny_target_file, "--fraction", 0.2,
        "--output", tmp_path / "out.jsonl", "--scores", tmp_path / "scores.jsonl",
    )  # fmt: skip
    assert done.code == 0, done
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["influence_rank"] for row in rows] == [*range(1, 9)]
    assert len((tmp_path / "scores.jsonl").read_text().splitlines()) == 40
    assert done.out.startswith("tones: 8 rows")
    assert rows[0]["id"] in done.out
    assert rows[6]["id"] not in done.out
    assert f"written: {tmp_path / 'out.jsonl'}" in done.out
    assert f"every candidate's scores: {tmp_path / 'scores.jsonl'}" in done.out


def test_select_for_several_targets(gradsift, write_rows, tiny_store, tiny_target_file, tiny_targets, tmp_path):
    other = write_rows(tmp_path / "other.jsonl", tiny_targets[:2])
    command = ["select", "--datastore", tiny_store, "--targets", tiny_target_file, "--targets", other, "--count", 4]
    assert gradsift(*command, "--output", tmp_path / "each").code == 0
    assert sorted(p.name for p in (tmp_path / "each").iterdir()) == ["other.jsonl", "tones.jsonl"]
    assert "--combine" in gradsift(*command, "--output", tmp_path / "one.jsonl").error
    done = gradsift(*command, "--output", tmp_path / "one.jsonl", "--combine", "round-robin")
    assert done.code == 0, done
    assert "tones+other: 4 rows" in done.out


def test_a_target_that_cannot_be_used_is_told(gradsift, write_rows, tiny_store, tiny_targets, tmp_path):
    targets = write_rows(tmp_path / "t.jsonl", [*tiny_targets, {"id": "bare"}])
    command = [
        "select",
        "--datastore",
        tiny_store,
        "--targets",
        targets,
        "--count",
        1,
        "--output",
        tmp_path / "o.jsonl",
    ]
    done = gradsift(*command)
    assert "skipped 1 targets:" in done.out or "skipped 1 of 6 targets:" in done.out
    assert "t.jsonl:6" in done.out
    assert "t.jsonl:6: no messages" in gradsift(*command, "--strict").error


def test_quiet_says_nothing(gradsift, tiny_model_folder, tiny_run, tiny_pool, tiny_target_file, tmp_path):
    for command in (
        ["warmup", "--model", tiny_model_folder, "--data", tiny_pool, "--output", tmp_path / "run", "--batch-size", 1,
         "--fraction", 0.6, "--epochs", 3, "--lora-rank", 2],
        build(tiny_model_folder, tiny_run, tiny_pool, tmp_path / "ds"),
        ["select", "--datastore", tmp_path / "ds", "--targets", tiny_target_file, "--count", 2,
         "--output", tmp_path / "out.jsonl"],
    ):  # fmt: skip
        done = gradsift(*command, "--quiet")
        assert (done.code, done.out, done.err) == (0, "", "")


def test_render_shows_which_tokens_carry_loss(gradsift, tiny_model_folder, mixed_pool, tiny_rows):
    done = gradsift("render", "--model", tiny_model_folder, "--data", mixed_pool, "--rows", 4)
    assert done.code == 0, done
    answer = tiny_rows[0]["messages"][1]["content"]
    brackets = "".join(f"[{letter}]" for letter in answer)
    assert f"a|s|s|i|s|t|a|n|t|||>|{brackets}[</s>]⏎" in done.out
    assert f"{len(answer) + 1} carry loss" in done.out
    assert "mixed.jsonl:4  skipped: not JSON" in done.out
    assert (
        "not JSON"
        in gradsift("render", "--model", tiny_model_folder, "--data", mixed_pool, "--rows", 4, "--strict").error
    )


def test_render_keeps_a_rows_terminal_commands_and_markup_from_acting(
    gradsift, write_rows, tiny_model_folder, tmp_path
):
    said = "[bold]x[/nonsense] \x1b[2J"
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": said}], "id": "[/b]"}
    pool = write_rows(tmp_path / "p.jsonl", [row])
    done = gradsift("render", "--model", tiny_model_folder, "--data", pool)
    assert done.code == 0, done
    assert "\x1b" not in done.out
    assert "[/b]: " in done.out


def test_inspect(gradsift, tiny_store):
    done = gradsift("inspect", tiny_store, "--verify")
    assert done.code == 0, done
    for shown in ("40 of 40", "adam-sparse", "checkpoint-", "pool.jsonl", "every checksum is right", "torch"):
        assert shown in done.out
    assert "None" not in done.out
    assert max(map(len, done.out.splitlines())) <= 80


def test_inspect_as_json(gradsift, tiny_store):
    summary = json.loads(gradsift("inspect", tiny_store, "--json").out)
    assert (summary["num_rows"], summary["num_scored"], summary["skipped"]) == (40, 40, [])
    assert summary["settings"] == Datastore.open(tiny_store).settings
    assert [source["name"] for source in summary["sources"]] == ["pool.jsonl"]


def test_quickstart_with_another_model(gradsift, tiny_model_folder, tmp_path):
    done = gradsift("quickstart", "--model", tiny_model_folder, "--output", tmp_path / "q")
    assert done.code == 0, done
    assert "warning" not in done.err
    for target in ("arithmetic", "translation"):
        assert f"Target: {target}" in done.out
        assert f"of the top 10 are {target} rows" in done.out
        assert len((tmp_path / f"q/selected/target_{target}.jsonl").read_text().splitlines()) == 10
    assert f"M={tiny_model_folder}" in done.out
    again = gradsift("quickstart", "--model", tiny_model_folder, "--output", tmp_path / "q")
    assert "warm-up:" not in again.err
    assert "gradients:" not in again.err


def test_a_terminal_gets_bars_and_tables_that_fit_it(tiny_model_folder, tiny_run, tiny_pool, tmp_path):
    """In a process of its own, at 80 columns: no line of a library, nothing wider than the terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 40, 80, 0, 0))
    command = [str(part) for part in build(tiny_model_folder, tiny_run, tiny_pool, tmp_path / "ds")]
    with subprocess.Popen(
        [sys.executable, "-c", "from cli.main import main; main()", *command],
        stdin=theirs, stdout=theirs, stderr=theirs, env=os.environ | {"COLUMNS": "80", "TERM": "xterm"},
    ) as process:  # fmt: skip
        os.close(theirs)
        shown = b""
        while True:
            try:
                shown += os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
    os.close(ours)
    lines = shown.decode().replace("\r\n", "\n").replace("\r", "\n").split("\n")
    assert process.returncode == 0, lines
    assert any(line.startswith("gradients: 100%|") and "tokens/s" in line for line in lines), lines
    assert max(len(line) for line in lines if line.startswith("gradients: ")) <= 80
    assert all(line.startswith(("gradients: ", "note: ")) or "40 rows scored" in line for line in lines if line.strip())
