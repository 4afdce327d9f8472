"""The two stages by command, on the tiny model: what is built, said and selected."""

import json

import pytest

from datastore import Datastore


@pytest.fixture
def command(tiny_model_folder, tiny_run, tiny_pool, tiny_target_file, tmp_path):
    return [
        "build-datastore", "--model", tiny_model_folder, "--checkpoints", tiny_run, "--data", tiny_pool,
        "--datastore", tmp_path / "ds", "--proj-dim", 64, "--shard-rows", 16, "--tokens-per-batch", 256,
        "--prefilter", 0.3, "--targets", tiny_target_file,
    ]  # fmt: skip


def test_build_inspect_and_select(gradsift, command, tiny_target_file, write_rows, tiny_rows, tmp_path):
    done = gradsift(*command)
    assert done.code == 0, done
    assert "28 of 40 rows set aside by the prefilter" in done.out
    assert "12 rows scored of 40" in done.out
    assert "skipped" not in done.out
    assert "prefilter: 40 of 40 rows" in done.err
    assert "gradients: 12 of 12 rows" in done.err
    shown = gradsift("inspect", tmp_path / "ds").out
    assert "28 of 40 rows set aside by the prefilter" in shown
    summary = json.loads(gradsift("inspect", tmp_path / "ds", "--json").out)
    assert (summary["num_scored"], summary["num_set_aside"], summary["skipped"]) == (12, 28, [])
    assert "the best 0.3 for tones at checkpoint-5, layers all" in shown
    assert "skipped" not in shown
    assert gradsift("inspect", tmp_path / "ds.prefilter", "--verify").code == 0
    select = ["select", "--datastore", tmp_path / "ds", "--output", tmp_path / "out.jsonl"]
    done = gradsift(*select, "--targets", tiny_target_file, "--fraction", 0.1)
    assert (done.code, "warning" in done.err) == (0, False), done
    ids = [json.loads(line)["id"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(ids) == 4
    assert set(ids) < set(Datastore.open(tmp_path / "ds").rows().ids)
    other = write_rows(tmp_path / "other.jsonl", tiny_rows[:2])
    assert "warning: other: the rows of" in gradsift(*select, "--targets", other, "--count", 1).err
    assert "prefilter" in gradsift(*select, "--targets", tiny_target_file, "--fraction", 0.5).error
    again = gradsift(*command)
    assert "is complete: nothing to do" in again.out
    assert "prefilter:" not in again.err


def test_rows_skipped_for_a_problem_are_told_apart(gradsift, command, write_rows, tiny_rows, tmp_path):
    pool = write_rows(tmp_path / "mixed.jsonl", [*tiny_rows[:9], {"id": "bare"}])
    command[command.index("--data") + 1] = pool
    done = gradsift(*command)
    assert done.code == 0, done
    assert "skipped 1 of 10 rows:" in done.out
    assert "mixed.jsonl:10" in done.out
    assert "6 of 10 rows set aside by the prefilter" in done.out


def test_one_without_the_other_is_one_line(gradsift, command):
    assert "--targets" in gradsift(*command[:-2]).error
    assert "--prefilter 0.2" in gradsift(*command[:-4], *command[-2:]).error


def test_one_checkpoint_with_the_same_layers_is_refused_before_any_work(gradsift, command, tiny_run, tmp_path):
    command[command.index("--checkpoints") + 1] = f"{tiny_run}:last"
    assert "--prefilter-layers last:N" in gradsift(*command).error
    assert not list(tmp_path.glob("ds*"))
    assert gradsift(*command, "--prefilter-layers", "last:1").code == 0
    assert "layers all\n" in gradsift("inspect", tmp_path / "ds").out
    assert "layers last:1\n" in gradsift("inspect", tmp_path / "ds.prefilter").out
