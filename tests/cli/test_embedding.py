"""`gradsift build-embeddings`, and the commands that read such a store."""

import json

import pytest

from datastore import Datastore


@pytest.fixture
def command(tiny_model_folder, tiny_pool, tmp_path):
    return [
        "build-embeddings", "--model", tiny_model_folder, "--data", tiny_pool, "--datastore", tmp_path / "ds",
        "--shard-rows", 16,
    ]  # fmt: skip


def test_build_inspect_and_select(gradsift, command, tiny_target_file, tiny_rows, tmp_path):
    done = gradsift(*command)
    assert done.code == 0, done
    assert "40 rows embedded of 40, " in done.out
    assert "embeddings: 40 of 40 rows" in done.err
    shown = gradsift("inspect", tmp_path / "ds", "--verify")
    assert shown.code == 0, shown
    assert "every checksum is right" in shown.out
    assert "rds: " in shown.out
    assert all(len(line) <= 80 for line in shown.out.splitlines())
    asked = json.loads(gradsift("inspect", tmp_path / "ds", "--json").out)
    assert asked["num_scored"] == 40
    select = ["select", "--datastore", tmp_path / "ds", "--targets", tiny_target_file, "--count", 3]
    done = gradsift(*select, "--output", tmp_path / "out.jsonl")
    assert done.code == 0, done
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["influence_rank"] for row in written] == [1, 2, 3]
    assert {row["id"] for row in written} <= {row["id"] for row in tiny_rows}
    assert "--method rds" in gradsift(*select, "--output", tmp_path / "out.jsonl", "--method", "less").error
    for method in ("bm25", "length", "perplexity", "random"):
        done = gradsift(*select, "--output", tmp_path / f"{method}.jsonl", "--method", method)
        assert done.code == 0, done


def test_a_second_call_computes_nothing(gradsift, command, tmp_path):
    gradsift(*command)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "ds").rglob("*.safetensors")}
    done = gradsift(*command)
    assert done.code == 0, done
    assert "embeddings:" not in done.err
    assert before == {file: file.stat().st_mtime_ns for file in before}


def test_rows_that_cannot_be_used_are_told(gradsift, command, write_rows, tiny_rows, tmp_path):
    command[command.index("--data") + 1] = write_rows(tmp_path / "mixed.jsonl", [*tiny_rows[:3], {"id": "bare"}])
    done = gradsift(*command)
    assert done.code == 0, done
    assert "skipped 1 of 4 rows:" in done.out
    assert "mixed.jsonl:4" in done.out
    assert "3 rows embedded of 4" in done.out
    assert "mixed.jsonl:4: no messages" in gradsift(*command, "--strict", "--datastore", tmp_path / "strict").error


def test_quiet_says_nothing(gradsift, command):
    done = gradsift(*command, "--quiet")
    assert (done.code, done.out, done.err) == (0, "", "")


def test_other_settings_and_a_setting_out_of_range_are_one_line(gradsift, command, tmp_path):
    assert "shard_rows must be at least 1" in gradsift(*command, "--shard-rows", 0).error
    gradsift(*command)
    assert "max_length" in gradsift(*command, "--max-length", 20).error


def test_the_embeddings_beside_a_store_of_gradients_are_made_once(gradsift, tiny_store, tiny_target_file, tmp_path):
    import shutil

    shutil.copytree(tiny_store, tmp_path / "ds")
    select = [
        "select", "--datastore", tmp_path / "ds", "--targets", tiny_target_file, "--count", 3, "--method", "rds",
        "--output", tmp_path / "out.jsonl",
    ]  # fmt: skip
    first = gradsift(*select)
    assert (first.code, "embeddings: 40 of 40 rows" in first.err) == (0, True), first
    assert Datastore.open(tmp_path / "ds.rds").num_rows == 40
    again = gradsift(*select)
    assert (again.code, "embeddings:" in again.err) == (0, False), again
    assert again.out == first.out
