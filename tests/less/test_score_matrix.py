"""What a scan has found is kept beside the store, and never taken for the scores of something else."""

import errno
import json
import os
import shutil

import numpy as np
import pytest
import torch

from datastore import Datastore
from datastore.beside import remove_made_from
from datastore.errors import ProvenanceError, StoreError
from datastore.files import lock_folder
from less import score, select
from less import scoring as scoring_module
from less.score_matrix import ScoreMatrix, scores_folder


@pytest.fixture
def store(tiny_store, tmp_path):
    return Datastore.open(shutil.copytree(tiny_store, tmp_path / "ds"))


@pytest.fixture
def numbers(store):
    return np.random.default_rng(0).standard_normal((store.num_rows, 3)).astype(np.float32)


class Dies(Exception):
    """What ends a scan in the middle."""


def parts_of(numbers_NJ, begun, die_at=None):
    """Parts of ten rows; notes where each scan begins."""

    def parts(first):
        begun.append(first)
        for start in range(first, len(numbers_NJ), 10):
            if start == die_at:
                raise Dies
            yield start, numbers_NJ[start : start + 10]

    return parts


def make(matrix, numbers_NJ, begun=None, queries="q", **options):
    return matrix.make(3, queries, {"note": 1}, parts_of(numbers_NJ, [] if begun is None else begun, **options))


def test_what_is_kept_comes_back_with_its_note(store, numbers):
    assert ScoreMatrix(store, {"a": 1}).load() is None
    made_NJ = make(ScoreMatrix(store, {"a": 1}), numbers)
    loaded_NJ, kept = ScoreMatrix(store, {"a": 1}).load()
    assert np.array_equal(made_NJ, numbers)
    assert np.array_equal(loaded_NJ, numbers)
    assert kept == {"note": 1}
    assert isinstance(loaded_NJ, np.memmap)


def test_scores_of_something_else_are_not_found(store, numbers):
    make(ScoreMatrix(store, {"a": 1}), numbers)
    assert ScoreMatrix(store, {"a": 2}).load() is None


def test_a_killed_scan_goes_on_where_it_was(store, numbers, monkeypatch):
    monkeypatch.setattr("less.score_matrix._SECONDS_BETWEEN", 0)
    begun = []
    with pytest.raises(Dies):
        make(ScoreMatrix(store, {}), numbers, begun, die_at=20)
    assert ScoreMatrix(store, {}).load() is None
    assert np.array_equal(make(ScoreMatrix(store, {}), numbers, begun), numbers)
    assert begun == [0, 20]
    assert not (ScoreMatrix(store, {}).path / "progress.json").exists()


def test_a_killed_scan_of_other_queries_begins_anew(store, numbers, monkeypatch):
    monkeypatch.setattr("less.score_matrix._SECONDS_BETWEEN", 0)
    begun = []
    with pytest.raises(Dies):
        make(ScoreMatrix(store, {}), -numbers, begun, die_at=20)
    assert np.array_equal(make(ScoreMatrix(store, {}), numbers, begun, queries="other"), numbers)
    assert begun == [0, 0]


def test_a_killed_scan_whose_scores_are_lost_begins_anew(store, numbers, monkeypatch):
    """As after a power cut: the file has its name and no bytes, or is no file of NumPy's."""
    monkeypatch.setattr("less.score_matrix._SECONDS_BETWEEN", 0)
    matrix = ScoreMatrix(store, {})
    for content in (b"", b"\x93NUMPY\x01\x00\x04\x00\x27\x27\x27\n", b"\x93NUMPY\x01\x00\x09\x00{[]: 1}  "):
        begun = []
        with pytest.raises(Dies):
            make(matrix, numbers, begun, die_at=20)
        (matrix.path / "scores.npy").write_bytes(content)
        assert np.array_equal(make(matrix, numbers, begun), numbers)
        assert begun == [0, 0]
        (matrix.path / "scores.json").unlink()
    (matrix.path / "progress.json").write_text("[" * 100_000)
    assert np.array_equal(make(matrix, numbers), numbers)


def test_scores_that_another_process_finishes_meanwhile_are_taken_and_stay(store, numbers):
    """It looked before they were there, and comes to the free lock after."""
    early, other = ScoreMatrix(store, {}), ScoreMatrix(store, {})
    assert early.load() is None
    others_NJ = make(other, numbers)
    begun = []
    assert np.array_equal(make(early, numbers, begun), numbers)
    assert begun == []
    assert np.array_equal(others_NJ, numbers)


def test_a_scan_that_begins_anew_leaves_alone_the_maps_of_what_it_replaces(store, numbers):
    matrix = ScoreMatrix(store, {})
    others_NJ = make(matrix, numbers)
    made_NJ = matrix.make(3, "q", {"note": 2}, parts_of(-numbers, begun := []))  # with another note: not to be taken
    assert begun == [0]
    assert np.array_equal(made_NJ, -numbers)
    assert np.array_equal(others_NJ, numbers)


@pytest.mark.parametrize("damage", ["flip", "cut", "json", "absent", "list"])
def test_damaged_scores_are_made_again(store, numbers, damage):
    matrix = ScoreMatrix(store, {})
    make(matrix, numbers)
    file = matrix.path / "scores.npy"
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[:-4])
    elif damage == "absent":
        file.unlink()
    else:
        (matrix.path / "scores.json").write_text("{" if damage == "json" else "[]")
    assert matrix.load() is None
    assert np.array_equal(make(matrix, numbers), numbers)
    assert matrix.load() is not None


@pytest.mark.parametrize("kept", [None, {}, [], {"note": 2}, "absent"])
@pytest.mark.parametrize("verify", [True, False])
def test_scores_with_a_damaged_note_are_made_again(store, numbers, kept, verify):
    matrix = ScoreMatrix(store, {})
    make(matrix, numbers)
    doc = json.loads((matrix.path / "scores.json").read_text())
    del doc["kept"]
    (matrix.path / "scores.json").write_text(json.dumps(doc if kept == "absent" else doc | {"kept": kept}))
    assert matrix.load(verify=verify) is None
    make(matrix, numbers)
    assert matrix.load()[1] == {"note": 1}


@pytest.mark.parametrize("name", ["scores.npy", "scores.json"])
@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b"\x93NUMPY\x01\x00\x04\x00\x27\x27\x27\n"])
def test_what_is_no_file_of_scores_is_not_there(store, numbers, name, content):
    matrix = ScoreMatrix(store, {})
    make(matrix, numbers)
    (matrix.path / name).write_bytes(content)
    assert matrix.load(verify=False) is None


def test_forged_scores_of_another_shape_are_not_taken(store, numbers):
    """Even unverified: what is mapped has the store's rows."""
    matrix = ScoreMatrix(store, {})
    make(matrix, numbers)
    np.save(matrix.path / "scores.npy", numbers[:-1])
    assert matrix.load(verify=False) is None
    np.save(matrix.path / "scores.npy", np.array([{}], dtype=object), allow_pickle=True)
    assert matrix.load(verify=False) is None


@pytest.mark.parametrize("name", ["scores.json", "progress.json"])
@pytest.mark.parametrize("in_use", [False, True])
def test_scores_of_another_state_of_the_store_are_removed_unless_they_are_being_written(store, numbers, name, in_use):
    old = ScoreMatrix(store, {})
    make(old, numbers)
    doc = json.loads((old.path / "scores.json").read_text())
    doc["made_of"]["manifest"] = "0" * 64
    (old.path / "scores.json").rename(old.path / name)
    (old.path / name).write_text(json.dumps(doc))
    lock = lock_folder(old.path) if in_use else None
    make(ScoreMatrix(store, {"new": True}), numbers)
    assert (old.path / "scores.npy").exists() == old.path.exists() == in_use
    if lock is not None:
        os.close(lock)


def test_a_scan_that_has_just_begun_says_what_it_is_of(store, numbers):
    matrix = ScoreMatrix(store, {"of": "it"})

    def parts(first):
        assert json.loads((matrix.path / "progress.json").read_text())["made_of"]["of"] == "it"
        yield 0, numbers

    matrix.make(numbers.shape[1], "q", {}, parts)
    assert matrix.load() is not None


def test_scores_stay_in_memory_while_another_process_writes_them(store, numbers):
    matrix = ScoreMatrix(store, {})
    matrix.path.mkdir(parents=True)
    lock = lock_folder(matrix.path)
    try:
        assert np.array_equal(make(matrix, numbers), numbers)
    finally:
        os.close(lock)
    assert matrix.load() is None


def test_scores_stay_in_memory_where_nothing_can_be_written(store, numbers):
    scores_folder(store).write_text("a file in the folder's place")
    assert np.array_equal(make(ScoreMatrix(store, {}), numbers), numbers)


@pytest.mark.parametrize("seconds", [0, 60])
def test_scores_outlast_a_deletion_that_removes_them_while_they_are_made(store, numbers, monkeypatch, seconds):
    monkeypatch.setattr("less.score_matrix._SECONDS_BETWEEN", seconds)

    def parts(first):
        yield from parts_of(numbers[:20], [])(first)
        remove_made_from(store.path)
        yield 20, numbers[20:]

    assert np.array_equal(ScoreMatrix(store, {}).make(3, "q", {}, parts), numbers)
    assert not scores_folder(store).exists()


@pytest.mark.parametrize("name", ["progress.json", "scores.json"])
def test_scores_outlast_a_failure_to_say_that_they_are_kept(store, numbers, name, monkeypatch):
    real = ScoreMatrix._write_json

    def fail(self, file, doc):
        if file == name:
            raise StoreError("cannot write")
        real(self, file, doc)

    monkeypatch.setattr(ScoreMatrix, "_write_json", fail)
    assert np.array_equal(make(ScoreMatrix(store, {}), numbers), numbers)
    assert ScoreMatrix(store, {}).load() is None


def test_an_error_of_the_scan_itself_is_not_taken_for_one_of_keeping(store, numbers):
    def parts(first):
        yield 0, numbers[:10]
        raise StoreError("a shard is gone")

    with pytest.raises(StoreError, match="a shard is gone"):
        ScoreMatrix(store, {}).make(3, "q", {}, parts)


def test_room_for_all_scores_is_taken_before_the_first_is_written(store):
    matrix = ScoreMatrix(store, {})
    scores_NJ = np.ones((store.num_rows, 20_000), np.float32)

    def parts(first):
        assert (matrix.path / "scores.npy").stat().st_blocks * 512 >= scores_NJ.nbytes
        yield 0, scores_NJ

    assert np.array_equal(matrix.make(20_000, "q", {}, parts), scores_NJ)


def test_scores_stay_in_memory_where_the_disk_fills_up(store, numbers, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    matrix = ScoreMatrix(store, {})
    assert np.array_equal(make(matrix, numbers), numbers)
    assert [file.name for file in matrix.path.iterdir()] == [".lock"]


def test_nothing_that_a_link_leads_to_is_written_or_removed(store, numbers, tmp_path, monkeypatch):
    monkeypatch.setattr("less.score_matrix._SECONDS_BETWEEN", 0)
    stale, killed, linked = (ScoreMatrix(store, {"a": n}) for n in range(3))
    outside = tmp_path / "outside"
    shutil.copytree(make(stale, numbers) is not None and stale.path, outside)
    doc = json.loads((outside / "scores.json").read_text())
    doc["made_of"]["manifest"] = "0" * 64
    (outside / "scores.json").write_text(json.dumps(doc))
    with pytest.raises(Dies):
        make(killed, numbers, die_at=20)
    (killed.path / "scores.npy").rename(outside / "partly.npy")
    (killed.path / "scores.npy").symlink_to(outside / "partly.npy")
    linked.path.symlink_to(outside)
    before = {file.name: file.read_bytes() for file in outside.iterdir()}
    for matrix in (killed, linked):
        assert np.array_equal(make(matrix, numbers), numbers)
    assert {file.name: file.read_bytes() for file in outside.iterdir()} == before


def test_scores_of_another_state_are_locked_until_they_are_gone(store, numbers, monkeypatch):
    old = ScoreMatrix(store, {})
    make(old, numbers)
    doc = json.loads((old.path / "scores.json").read_text())
    doc["made_of"]["manifest"] = "0" * 64
    (old.path / "scores.json").write_text(json.dumps(doc))
    held, real_open, real_close = {}, lock_folder, os.close
    at_removal = []

    def noted_lock(folder):
        held[lock := real_open(folder)] = folder
        return lock

    def noted_close(descriptor):
        if folder := held.pop(descriptor, None):
            at_removal.append((folder == old.path, folder.exists()))
        real_close(descriptor)

    monkeypatch.setattr("less.score_matrix.lock_folder", noted_lock)
    monkeypatch.setattr(os, "close", noted_close)
    make(ScoreMatrix(store, {"new": True}), numbers)
    assert at_removal == [(True, False), (False, True)]


class TestSelection:
    @pytest.fixture
    def call(self, store, tiny_targets, tiny_run):
        def call(function=score, **changes):
            return function(**{"datastore": store, "targets": tiny_targets, "progress": False} | changes)

        return call

    def test_of_another_size_loads_no_model_and_scans_nothing(self, call, monkeypatch):
        first = call(select, count=2)
        for name in ("open_base_model", "iter_scores"):
            monkeypatch.setattr(scoring_module, name, lambda *_, **__: 1 / 0)
        (again,) = call(select, count=5)
        assert again.positions[:2].tolist() == first[0].positions.tolist()
        assert np.array_equal(again.influence.scores_NJ, first[0].influence.scores_NJ)

    def test_without_kept_scores_is_the_same(self, call, store):
        kept, not_kept = call(), call(keep_scores=False)
        assert np.array_equal(call().scores_NJ, not_kept.scores_NJ)
        assert np.array_equal(kept.scores_NJ, not_kept.scores_NJ)

    @pytest.mark.parametrize(
        "changes", [{"normalize": "none"}, {"aggregate": "cosine-of-mean"}, {"system_prompt": "You add numbers."}]
    )
    def test_by_another_formula_is_not_taken_from_the_first(self, call, changes):
        assert not np.array_equal(call().scores_NJ, call(**changes).scores_NJ)

    def test_from_scores_with_a_damaged_note_is_the_same(self, call, store):
        first = call()
        (file,) = scores_folder(store).glob("*/scores.json")
        doc = json.loads(file.read_text())
        for kept in ({}, [], {"dead_targets": 1}, {"dead_targets": [[]]}):
            file.write_text(json.dumps(doc | {"kept": kept}))
            assert np.array_equal(call().scores_NJ, first.scores_NJ)

    def test_with_a_given_model_still_holds_it_to_the_store(self, call, tiny_model):
        call()
        with torch.no_grad():
            tiny_model.model.layers[1].self_attn.q_proj.weight.add_(0.1)
        with pytest.raises(ProvenanceError, match="is not the model"):
            call(model=tiny_model)
