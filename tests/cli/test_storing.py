"""`gradsift datastore`: what its commands print, write and refuse."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from datastore import Datastore, DatastoreWriter


@pytest.fixture
def store(tiny_store, tmp_path):
    """A copy of the tiny store, to be changed."""
    return Path(shutil.copytree(tiny_store, tmp_path / "ds"))


def fits(done, tmp_path):
    return all(len(line) <= 80 for line in done.out.splitlines() if str(tmp_path) not in line)


def test_delete_says_what_it_does_and_proves_it(gradsift, store, tmp_path):
    (tmp_path / "ids.txt").write_text("row-3\nrow-4\n")
    options = ("delete", store, "--ids", tmp_path / "ids.txt", "--id", "row-9", "--row", "0:17")
    planned = gradsift("datastore", *options, "--dry-run")
    assert planned.code == 0, planned
    assert "  0:17  row-17\n4 rows would be deleted from" in planned.out
    assert Datastore.open(store).num_rows == 40
    done = gradsift("datastore", *options, "--verify-deleted")
    assert done.code == 0, done
    assert f"4 rows deleted from {store}; 36 scored rows left" in done.out
    assert "searched for 4 rows and 3 ids in" in done.out
    assert "none is left\nnot looked at: copies, backups" in done.out
    assert "delete: 4 of 4 shards" in done.err
    assert fits(done, tmp_path)
    again = gradsift("datastore", "delete", store, "--row", "0:17")
    assert again.out.startswith("note: 1 row deleted already\n0 rows deleted from ")
    assert gradsift("datastore", "delete", store, "--row", "0:20", "--quiet").out == ""
    shown = gradsift("inspect", store)
    assert "skipped 5 of 40 rows:" in shown.out
    assert "pool.jsonl[3], pool.jsonl[4], pool.jsonl[9]" in shown.out


def test_an_id_of_several_rows_deletes_all_and_says_so(gradsift, store, tmp_path):
    one = tmp_path / "one"
    manifest = Datastore.open(store).manifest
    with DatastoreWriter.open(
        one, settings=manifest.settings, environment=manifest.environments[0], feature_sets=manifest.feature_sets,
        checkpoints=manifest.checkpoints, shard_rows=manifest.shard_rows,
    ) as writer:  # fmt: skip
        writer.add_source(replace(manifest.sources[0], sha256="00" * 32, location=None, name="copy"))
        old = Datastore.open(store)
        for key in writer.missing_shards():
            writer.write_shard(key, old.shard(key))
        for key in writer.missing_directions():
            writer.write_direction(*key, old.direction(*key))
        writer.seal()
    both = tmp_path / "both"
    assert gradsift("datastore", "merge", both, store, one).code == 0
    done = gradsift("datastore", "delete", both, "--id", "row-3")
    assert done.out.startswith("note: 2 rows have the id row-3\n2 rows deleted from ")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), "no row is named; give --id, --ids or --row"),
        (("--id", "row-3", "--id", "nobody"), "has no row 'nobody'; expected labels"),
        (("--row", "0:40"), "has no row '0:40'"),
        (("--row", "17"), "'17' is not SOURCE:NUMBER"),
        (("--row", "-1:3"), "'-1:3' is not SOURCE:NUMBER"),
        (("--ids", "nowhere.txt"), "nowhere.txt: No such file"),
    ],
)
def test_delete_refuses_in_one_line_and_deletes_nothing(gradsift, store, options, expected):
    assert expected in gradsift("datastore", "delete", store, *options).error
    assert Datastore.open(store).num_rows == 40


def test_what_is_missing_can_be_passed_over(gradsift, store):
    done = gradsift("datastore", "delete", store, "--id", "row-3", "--id", "nobody", "--ignore-missing")
    assert done.out.startswith("note: no row nobody\n1 row deleted")


def test_verify_deleted_exits_with_one_where_a_row_is_left(gradsift, store, tmp_path):
    assert gradsift("datastore", "verify-deleted", store).code == 0
    done = gradsift("datastore", "verify-deleted", store, "--id", "row-3")
    assert done.code == 1
    assert "it has the label row-3" in " ".join(done.out.split())
    assert done.err.splitlines()[-1] == "error: 2 files may have deleted rows still"
    shutil.copytree(store, tmp_path / "kept")
    gradsift("datastore", "delete", store, "--id", "row-3")
    assert gradsift("datastore", "verify-deleted", store, "--id", "row-3").code == 0
    shutil.copytree(tmp_path / "kept", tmp_path / "ds.prefilter")
    quiet = gradsift("datastore", "verify-deleted", store, "--quiet")
    assert (quiet.code, quiet.out) == (1, "")


def test_a_store_is_deleted_from_compacted_merged_split_and_shrunk(gradsift, store, tiny_rows, write_rows, tmp_path):
    gradsift("datastore", "delete", store, "--id", "row-3")
    line = gradsift("datastore", "compact", store, tmp_path / "small").error
    assert "1 of 40 rows of pool.jsonl are deleted" in line
    edited = write_rows(tmp_path / "edited.jsonl", [row for row in tiny_rows if row["id"] != "row-3"])
    done = gradsift("datastore", "compact", store, tmp_path / "small", "--data", edited)
    assert done.code == 0, done
    assert done.out.startswith("39 rows scored of 39, ")
    done = gradsift("datastore", "merge", tmp_path / "all", store, tmp_path / "small")
    assert done.out.startswith("78 rows scored of 79, ")
    assert "merge: 12 of 12 shards" in done.err
    done = gradsift("datastore", "split", tmp_path / "all", "--by", "source", "--output", tmp_path / "parts")
    assert [text.rsplit("/", 1)[1] for text in done.out.splitlines()] == ["pool", "edited"]
    done = gradsift("datastore", "convert", tmp_path / "small", tmp_path / "int4", "--feature-dtype", "int4")
    assert done.code == 0, done
    small = Datastore.open(tmp_path / "int4")
    assert small.settings["feature_sets"]["adam-sparse"]["dtype"] == "int4"
    assert small.num_bytes < Datastore.open(tmp_path / "small").num_bytes
    assert fits(done, tmp_path)
    assert gradsift("datastore", "convert", store, tmp_path / "q", "--feature-dtype", "int4", "--quiet").out == ""
    assert "got float32" in gradsift("datastore", "convert", store, tmp_path / "f", "--feature-dtype", "float32").error


def test_a_shrunk_store_of_one_checkpoint_is_selected_from(gradsift, store, tiny_target_file, tmp_path):
    last = Datastore.open(store).checkpoints[-1]
    assert gradsift("datastore", "convert", store, tmp_path / "one", "--checkpoint", last).code == 0
    done = gradsift(
        "select", "--datastore", tmp_path / "one", "--targets", tiny_target_file, "--count", 3, "--output",
        tmp_path / "out.jsonl",
    )  # fmt: skip
    assert done.code == 0, done
    assert len([json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]) == 3


def test_a_second_writer_is_told_who_is_writing(gradsift, store, tmp_path):
    with DatastoreWriter.reopen(store):
        assert "is being written by process" in gradsift("datastore", "delete", store, "--id", "row-3").error
    gradsift("datastore", "split", store, "--output", tmp_path / "parts")
    with DatastoreWriter.reopen(tmp_path / "parts" / "pool"):
        assert (
            "is being written by process" in gradsift("datastore", "split", store, "--output", tmp_path / "parts").error
        )


def test_what_is_no_store_is_one_line(gradsift, tmp_path):
    for command in (
        ("delete", tmp_path, "--id", "x"), ("verify-deleted", tmp_path), ("compact", tmp_path, tmp_path / "o"),
        ("merge", tmp_path / "o", tmp_path, tmp_path), ("split", tmp_path, "--output", tmp_path / "o"),
        ("convert", tmp_path, tmp_path / "o"),
    ):  # fmt: skip
        assert "no datastore at" in gradsift("datastore", *command).error


def test_labels_cannot_command_a_terminal(gradsift, store):
    line = gradsift("datastore", "delete", store, "--id", "\x1b[2J").error
    assert "\x1b" not in line
    done = gradsift("datastore", "delete", store, "--id", "\x1b[2J", "--ignore-missing", "--verify-deleted")
    assert "\x1b" not in done.out
