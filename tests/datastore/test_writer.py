"""A build can be killed, resumed and added to; one process writes, with the same settings or not at all."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_stores import ENVIRONMENT, SETTINGS, K, build_store, fill, make_shard, open_writer, source, tree

from datastore import Datastore, DatastoreWriter, check_free_space, files
from datastore.errors import (
    DamagedStoreError,
    DiskFullError,
    FormatVersionError,
    ProvenanceError,
    SettingError,
    StoreError,
    StoreLockedError,
)

SKIP = {("checkpoint-2", 0): {1: "not JSON"}, ("checkpoint-10", 0): {1: "not JSON", 4: "not finite"}}


@settings(max_examples=15, deadline=None)
@given(num_rows=st.lists(st.integers(1, 12), min_size=1, max_size=3), shard_rows=st.integers(1, 13))
def test_ranges_cover_every_row_once(tmp_path_factory, num_rows, shard_rows):
    with open_writer(tmp_path_factory.mktemp("ds"), shard_rows=shard_rows) as writer:
        for number, rows in enumerate(num_rows):
            assert writer.add_source(source(f"pool{number}", rows)) == number
        ranges = list(writer.build.row_ranges())
        covered = [(number, row) for number, start, stop in ranges for row in range(start, stop)]
        assert covered == [(number, row) for number, rows in enumerate(num_rows) for row in range(rows)]
        assert all(stop - start <= shard_rows for _, start, stop in ranges)
        assert len(writer.missing_shards()) == 4 * len(ranges)


def test_a_checkpoint_is_worked_off_before_the_next(tmp_path):
    with open_writer(tmp_path) as writer:
        writer.add_source(source())
        order = [key.checkpoint for key in writer.missing_shards()]
    assert order == sorted(order, key=["checkpoint-2", "checkpoint-10"].index)


# --- resuming


def test_a_build_stopped_anywhere_resumes_to_the_same_bytes(tmp_path):
    whole = tree(build_store(tmp_path / "whole", skip=SKIP))
    num_shards = sum(name.startswith("shards/") for name in whole)
    for done in range(num_shards + 1):
        folder = tmp_path / str(done)
        with open_writer(folder) as writer:
            writer.add_source(source())
            for key in writer.missing_shards()[:done]:
                skip = SKIP.get((key.checkpoint, key.source))
                writer.write_shard(key, make_shard(key, skip))
        with open_writer(folder) as writer:
            assert writer.add_source(source()) == 0
            assert len(writer.missing_shards()) == num_shards - done
            assert not writer.is_sealed
            fill(writer, SKIP)
            writer.seal()
            assert writer.is_sealed
        assert tree(folder) == whole
        shutil.rmtree(folder)


def test_half_written_files_of_a_killed_run_are_removed_and_no_others(tmp_path):
    folder = build_store(tmp_path / "ds")
    clean = tree(folder)
    (folder / "shards/adam/checkpoint-2/.s0000-0000000000-0000000003.safetensors.tmp").write_bytes(b"half")
    (folder / "directions/adam/.checkpoint-2.safetensors.tmp").write_bytes(b"half")
    (folder / ".manifest.json.tmp").write_bytes(b"{")
    (folder / ".build.json.tmp").write_bytes(b"{")
    (folder / ".note.tmp").write_bytes(b"the user's own")
    open_writer(folder).close()
    assert tree(folder) == clean | {".note.tmp": b"the user's own"}


CHILD = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[2]]
from tiny_stores import fill, open_writer, source
with open_writer(sys.argv[3], shard_rows=1) as writer:
    writer.add_source(source(num_rows=100))
    fill(writer)
    writer.seal()
"""


def test_a_build_killed_with_sigkill_resumes_to_the_same_bytes(tmp_path):
    here = Path(__file__).parent
    whole = tree(build_store(tmp_path / "whole", source(num_rows=100), shard_rows=1))
    folder = tmp_path / "killed"
    for wanted in (1, 60, 200):
        child = subprocess.Popen([sys.executable, "-c", CHILD, here.parents[1], here, folder])
        deadline = time.monotonic() + 20
        while len(list(folder.glob("shards/*/*/s*.safetensors"))) < wanted and child.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        with pytest.raises(StoreError, match="is not finished"):
            Datastore.open(folder)
    with open_writer(folder, shard_rows=1) as writer:
        assert writer.add_source(source(num_rows=100)) == 0
        assert 0 < len(writer.missing_shards()) <= 200
        fill(writer)
        writer.seal()
    assert tree(folder) == whole
    Datastore.open(folder).verify()


def test_a_finished_store_is_left_as_it_is(tmp_path):
    folder = build_store(tmp_path / "ds")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.*s*")}
    with open_writer(folder, environment={"machine": "another"}) as writer:
        assert writer.add_source(source()) == 0
        assert writer.is_sealed
        assert not writer.missing_shards()
        assert not writer.missing_directions()
        writer.seal()
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.*s*")} == before


def test_a_store_that_lacks_a_shard_or_a_direction_is_not_sealed(tmp_path):
    with open_writer(tmp_path) as writer:
        writer.add_source(source())
        with pytest.raises(StoreError, match=r"lacks 16 files, the first shards/adam/checkpoint-2/s0000-0{10}-"):
            writer.seal()
        for key in writer.missing_shards():
            writer.write_shard(key, make_shard(key))
        with pytest.raises(StoreError, match="lacks 4 files, the first directions/adam/checkpoint-2"):
            writer.seal()
    assert not (tmp_path / "manifest.json").exists()


def test_a_deleted_shard_is_made_anew_even_if_it_comes_out_otherwise(tmp_path):
    folder = build_store(tmp_path / "ds")
    with open_writer(folder) as writer:
        key = next(writer.build.shard_keys())
        (folder / key.path).unlink()
        assert writer.missing_shards() == [key]
        writer.write_shard(key, replace(make_shard(key), notes={"oom_retries": 1}))
        writer.seal()
    store = Datastore.open(folder)
    store.verify()
    assert store.manifest.shards[key.path].notes == {"oom_retries": 1}


def test_a_shard_from_elsewhere_stops_the_build(tmp_path):
    other = build_store(tmp_path / "other", settings={"dtype": "float32"})
    with open_writer(tmp_path / "ds") as writer:
        writer.add_source(source())
        first, second, *_ = writer.missing_shards()
        (writer.path / first.path).parent.mkdir(parents=True)
        shutil.copy(other / first.path, writer.path / first.path)
        with pytest.raises(DamagedStoreError, match="made with other settings"):
            writer.has_shard(first)
        writer.write_shard(first, make_shard(first))
        (writer.path / second.path).parent.mkdir(parents=True)
        shutil.copy(writer.path / first.path, writer.path / second.path)
        with pytest.raises(DamagedStoreError, match=r'it holds .*"adam".*expected.*"sgd"'):
            writer.missing_shards()


def test_shards_of_one_feature_set_have_one_shape(tmp_path):
    with open_writer(tmp_path) as writer:
        writer.add_source(source())
        fill(writer)
        key = next(writer.build.shard_keys())
        writer.write_shard(key, make_shard(key, dtype=np.float32))
        with pytest.raises(DamagedStoreError, match=r"float16.*expected.*float32"):
            writer.seal()


# --- sources


def test_adding_rows_computes_only_the_new_ones_and_keeps_the_old_store_readable(tmp_path):
    folder = build_store(tmp_path / "ds")
    before = tree(folder)
    with open_writer(folder) as writer:
        assert writer.add_source(source("more", 4)) == 1
        assert not writer.is_sealed
        assert {key.source for key in writer.missing_shards()} == {1}
        assert Datastore.open(folder).num_rows == 7
        fill(writer)
        assert Datastore.open(folder).num_rows == 7
        writer.seal()
    after = tree(folder)
    assert Datastore.open(folder).num_rows == 11
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {"build.json", "manifest.json"}
    assert after == tree(build_store(tmp_path / "at-once", source(), source("more", 4)))


def test_a_source_is_known_by_its_content(tmp_path):
    with open_writer(tmp_path) as writer:
        assert writer.add_source(source("pool")) == 0
        assert writer.add_source(replace(source("pool"), name="copy", location="/elsewhere")) == 0
        assert writer.add_source(source("more")) == 1
        assert writer.add_source(replace(source("memory"), location=None)) == 2
        assert writer.add_source(replace(source("another"), location=None)) == 3
        assert writer.add_source(source("pool")) == 0
        with pytest.raises(ProvenanceError, match=r"/data/pool.jsonl has changed since it was added"):
            writer.add_source(source("pool", content="changed"))
        with pytest.raises(ProvenanceError, match=r"8 rows .* expected 7"):
            writer.add_source(source("pool", num_rows=8))
        with pytest.raises(SettingError, match="must have rows"):
            writer.add_source(source("empty", num_rows=0))
        assert len(writer.build.sources) == 4


# --- provenance


def test_other_settings_are_refused_field_by_field(tmp_path):
    build_store(tmp_path)
    other = {"model": {"name": "tiny", "fingerprint": "beef", "revision": 1}}
    with pytest.raises(ProvenanceError) as caught:
        open_writer(tmp_path, settings=other, checkpoints=["checkpoint-2"], shard_rows=4)
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        'checkpoints is ["checkpoint-2","checkpoint-10"] in the store and ["checkpoint-2"] in this command',
        "shard_rows is 3 in the store and 4 in this command",
        'settings.dtype is "float16" in the store and absent in this command',
        'settings.model.fingerprint is "f00d" in the store and "beef" in this command',
        "settings.model.revision is absent in the store and 1 in this command",
        "choose another --datastore folder",
    ):
        assert part in message
    assert "settings.model.name" not in message
    assert "feature_sets" not in message


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-9, 9) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(
    one=st.dictionaries(st.text(max_size=2), json_values),
    two=st.dictionaries(st.text(max_size=2), json_values),
)
def test_settings_are_refused_exactly_if_their_hash_differs(tmp_path_factory, one, two):
    folder = tmp_path_factory.mktemp("ds")
    with (
        open_writer(folder / "one", settings=one) as first,
        open_writer(folder / "two", settings=two) as second,
    ):
        same_hash = first.build.settings_hash == second.build.settings_hash
    open_writer(folder / "one", settings=one).close()
    try:
        open_writer(folder / "one", settings=two).close()
        assert same_hash
    except ProvenanceError:
        assert not same_hash


def test_environments_are_recorded_and_never_compared(tmp_path):
    build_store(tmp_path)
    with open_writer(tmp_path, environment={"machine": "second"}) as writer:
        writer.add_source(source("more"))
        fill(writer)
        assert writer.seal().environments == [ENVIRONMENT, {"machine": "second"}]


def test_the_environment_that_wrote_last_is_the_last_and_a_rerun_there_changes_no_byte(tmp_path):
    build_store(tmp_path, source("one"), environment={"machine": "A"})
    build_store(tmp_path, source("one"), source("two"), environment={"machine": "B"})
    build_store(tmp_path, source("one"), source("two"), source("three"), environment={"machine": "A"})
    assert Datastore.open(tmp_path).manifest.environments == [{"machine": "B"}, {"machine": "A"}]
    before = tree(tmp_path)
    for machine in "AB":  # nothing is written, wherever that is
        build_store(tmp_path, source("one"), source("two"), source("three"), environment={"machine": machine})
        assert tree(tmp_path) == before
    next(tmp_path.glob("shards/*/*/*")).unlink()
    build_store(tmp_path, source("one"), source("two"), source("three"), environment={"machine": "A"})
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"feature_sets": ["../adam"]},
        {"feature_sets": ["adam", "adam"]},
        {"feature_sets": []},
        {"checkpoints": ["a/b"]},
        {"checkpoints": [""]},
        {"checkpoints": [".hidden"]},
        {"checkpoints": ["name\n"]},
        {"shard_rows": 0},
    ],
)
def test_names_that_make_no_folder_are_refused_before_anything_is_written(tmp_path, changes):
    with pytest.raises(SettingError):
        open_writer(tmp_path / "ds", **changes)
    assert not (tmp_path / "ds").exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(StoreError, match=r"is not a datastore: it has thesis.tex"):
        open_writer(tmp_path)
    assert tree(tmp_path) == {"thesis.tex": b"years of work"}
    with pytest.raises(StoreError, match="cannot write"):
        open_writer(tmp_path / "thesis.tex")


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_store_of_a_newer_version_is_not_written_to(tmp_path):
    build_store(tmp_path)
    edit_json(tmp_path / "build.json", version=2)
    with pytest.raises(FormatVersionError, match="version 2; this gradsift reads up to 1"):
        open_writer(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"format": "zarr"}', "[" * 100_000, "\xff"], ids=lambda text: text[:9]
)
def test_a_broken_build_json_is_refused(tmp_path, text):
    build_store(tmp_path)
    (tmp_path / "build.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DamagedStoreError, match=r"build.json is damaged"):
        open_writer(tmp_path)


def test_a_manifest_of_another_store_is_refused(tmp_path):
    build_store(tmp_path / "ds")
    build_store(tmp_path / "other", settings={"dtype": "float32"})
    shutil.copy(tmp_path / "other/manifest.json", tmp_path / "ds/manifest.json")
    with pytest.raises(DamagedStoreError, match=r"does not belong to build.json"):
        open_writer(tmp_path / "ds")
    (tmp_path / "ds/manifest.json").unlink()
    assert tree(build_store(tmp_path / "ds")) == tree(build_store(tmp_path / "again"))


# --- the lock and the disk


def test_a_second_writer_is_refused_and_told_who_the_first_is(tmp_path):
    with (
        open_writer(tmp_path),
        pytest.raises(StoreLockedError, match=rf"being written by process {os.getpid()} on \S+\. Wait"),
    ):
        open_writer(tmp_path)
    open_writer(tmp_path).close()


def test_nothing_is_written_to_what_a_link_leads_to(tmp_path, monkeypatch):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    (tmp_path / ".lock").symlink_to(outside)
    with pytest.raises(StoreError, match=r"\.lock is a link; expected a file"):
        files.lock_folder(tmp_path)
    (tmp_path / ".doc.json.tmp").symlink_to(outside)
    files.write_atomic(tmp_path / "doc.json", [b"bytes"])
    assert (tmp_path / "doc.json").read_bytes() == b"bytes"
    assert not (tmp_path / "doc.json").is_symlink()
    (tmp_path / ".doc.json.tmp").symlink_to(outside)
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)  # as if another put the link back at once
    with pytest.raises(StoreError, match="cannot write"):
        files.write_atomic(tmp_path / "doc.json", [b"others"])
    assert (tmp_path / "doc.json").read_bytes() == b"bytes"
    assert outside.read_text() == "mine"


def test_a_store_has_one_path_by_whatever_name_it_is_written_to(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "ds")
    build_store(tmp_path / "link")
    with open_writer(tmp_path / "link") as writer:
        assert writer.path == (tmp_path / "ds").resolve()
    with DatastoreWriter.reopen(tmp_path / "link") as writer:
        assert writer.path == (tmp_path / "ds").resolve()


def test_the_lock_is_freed_by_an_error(tmp_path):
    open_writer(tmp_path).close()
    for _ in range(2):
        with pytest.raises(ProvenanceError):
            open_writer(tmp_path, shard_rows=9)
    open_writer(tmp_path).close()


def test_a_name_appears_after_its_bytes_are_on_the_disk_and_is_itself_made_to_last(tmp_path, monkeypatch):
    done = []
    real = os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: done.append(os.readlink(f"/proc/self/fd/{fd}")))
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("replace"), real(*names)))
    files.write_atomic(tmp_path / "new" / "file", [b"bytes"])
    folder = str(tmp_path / "new")
    assert done == [str(tmp_path), f"{folder}/.file.tmp", "replace", folder]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_loses_nothing_finished(tmp_path, monkeypatch, code, call):
    def full(*_):
        raise OSError(code, os.strerror(code))

    with open_writer(tmp_path / "ds") as writer:
        writer.add_source(source())
        first, second, *_ = writer.missing_shards()
        writer.write_shard(first, make_shard(first))
        before = {name: data for name, data in tree(writer.path).items() if name != ".lock"}
        with monkeypatch.context() as patch:
            patch.setattr(files.os, call, full)
            with pytest.raises(DiskFullError, match=rf"the disk is full: cannot write .*{second.path}"):
                writer.write_shard(second, make_shard(second))
        assert {name: data for name, data in tree(writer.path).items() if name != ".lock"} == before
    assert tree(build_store(tmp_path / "ds")) == tree(build_store(tmp_path / "whole"))


def test_another_failure_to_write_is_an_error_with_the_file_and_the_cause(tmp_path, monkeypatch):
    with open_writer(tmp_path) as writer:
        writer.add_source(source())
        key = writer.missing_shards()[0]
        (tmp_path / "shards").write_text("in the way")
        with pytest.raises(StoreError, match=r"cannot write .*safetensors: File exists"):
            writer.write_shard(key, make_shard(key))


def test_room_is_asked_for_before_any_work(tmp_path):
    check_free_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(DiskFullError, match=r"not enough room for .*ds: 1000000000.00 GB needed"):
        check_free_space(tmp_path / "ds", 10**18)
    assert not (tmp_path / "ds").exists()


def test_settings_come_back_as_json(tmp_path):
    with open_writer(tmp_path, settings=SETTINGS | {"pair": (1, 2)}) as writer:
        writer.add_source(source())
        fill(writer)
        manifest = writer.seal()
    assert manifest.settings == Datastore.open(tmp_path).settings == SETTINGS | {"pair": [1, 2]}
    assert manifest.features["adam"].proj_dim == K
