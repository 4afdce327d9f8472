"""A deleted row is gone for good: from every file, whenever the process dies, whoever reads or writes meanwhile."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_stores import SETTINGS, K, build_store, fill, make_shard, open_writer, source, tree

from datastore import Datastore
from datastore.beside import remove_store
from datastore.deletion import delete_rows, find_rows, verify_deleted
from datastore.errors import DamagedStoreError, SettingError, StoreError, StoreLockedError

SKIP = {
    ("checkpoint-10", 0): {1: "not finite", 4: "zero norm"},
    ("checkpoint-2", 1): {0: "prefilter"},
    ("checkpoint-10", 1): {0: "prefilter"},
}
GONE = [(0, 2), (0, 4), (1, 0)]


def build_all(path: Path) -> Path:
    """A store, and beside it everything that is made from one."""
    build_store(path, source("pool", 7), source("more", 4), skip=SKIP)
    build_store(path.with_name("ds.rds"), source("more", 4), source("pool", 7), settings=SETTINGS | {"rds": 1})
    build_store(path.with_name("ds.prefilter"), source("pool", 7), settings=SETTINGS | {"cheap": 1})
    (path.with_name("ds.prefilter") / "places.safetensors").write_bytes(b"ranks")
    make_index_and_scores(path)
    return path


def make_index_and_scores(path: Path) -> None:
    sha256 = Datastore.open(path).manifest.sha256
    for name, file, doc in (
        ("ds.index/adam", "index", {"manifest_sha256": sha256}),
        ("ds.scores/0f", "scores", {"made_of": {"manifest": sha256}}),
    ):
        folder = path.with_name(name.split("/")[0]) / name.split("/")[1]
        folder.mkdir(parents=True)
        (folder / f"{file}.json").write_text(json.dumps(doc))
        (folder / ("index.faiss" if file == "index" else "scores.npy")).write_bytes(b"numbers")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build_all(tmp_path_factory.mktemp("built") / "ds").parent


@pytest.fixture
def folder(built, tmp_path):
    return Path(shutil.copytree(built, tmp_path / "all")) / "ds"


def copy_of(built, to):
    return Path(shutil.copytree(built, to)) / "ds"


def keys_of(path):
    rows = Datastore.open(path).rows()
    return list(zip(rows.sources_N.tolist(), rows.rows_N.tolist(), strict=True))


# --- what a deletion leaves


def test_deleted_rows_are_in_no_shard_and_no_list_and_the_others_are_as_they_were(folder):
    before = Datastore.open(folder)
    old = {key: before.shard(key) for key in before.manifest.shard_keys()}
    delete_rows(folder, GONE)
    after = Datastore.open(folder)
    after.verify()
    assert keys_of(folder) == [(0, 0), (0, 3), (0, 5), (0, 6), (1, 1), (1, 2), (1, 3)]
    assert after.manifest.deleted == {"0": [2, 4], "1": [0]}
    assert after.manifest.settings_hash == before.manifest.settings_hash
    entries = [(row.row, row.where, row.id, row.detail) for row in after.skipped if row.reason == "deleted"]
    assert entries == [(2, "pool[2]", "", ""), (4, "pool[4]", "", ""), (0, "more[0]", "", "")]
    assert after.manifest.counts["num_skipped"] == {"not finite": 1, "deleted": 3}
    gone = {0: [2, 4], 1: [0]}
    for (key, was), new_key in zip(old.items(), after.manifest.shard_keys(), strict=True):
        shard, keep = after.shard(new_key), ~np.isin(was.rows_N, gone[key.source])
        np.testing.assert_array_equal(shard.features_NK, was.features_NK[keep])
        np.testing.assert_array_equal(shard.rows_N, was.rows_N[keep])
        np.testing.assert_array_equal(shard.losses_N, was.losses_N[keep])
        assert shard.ids == [label for label, kept in zip(was.ids, keep, strict=True) if kept]
    raw = b"".join(data for name, data in tree(folder).items() if "manifest" not in name and "build" not in name)
    assert b"id-4" not in raw
    assert b"pool:4" not in raw


def test_only_ranges_with_deleted_rows_are_written_anew(folder):
    before = tree(folder)
    delete_rows(folder, [(0, 2)])
    after = tree(folder)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    shards = {name for name in changed if name.startswith("shards/")}
    assert changed - shards == {"build.json", "manifest.json"}
    assert len(shards) == 8  # four old, four new
    assert all("/s0000-0000000000-0000000003" in name for name in shards)
    assert {len(name.split("/")[-1]) for name in shards & after.keys()} == {
        len("s0000-0000000000-0000000003-01234567.safetensors")
    }


def test_what_is_made_from_the_store_goes_and_the_embeddings_lose_the_rows_too(folder):
    delete_rows(folder, GONE)
    assert sorted(entry.name for entry in folder.parent.iterdir()) == ["ds", "ds.rds"]
    assert keys_of(folder.with_name("ds.rds")) == [(0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 3), (1, 5), (1, 6)]
    Datastore.open(folder.with_name("ds.rds")).verify()


def test_what_else_lies_in_those_folders_is_left_and_reported(folder):
    (folder.with_name("ds.index") / "adam" / "note.txt").write_text("mine")
    delete_rows(folder, GONE)
    assert tree(folder.with_name("ds.index")) == {"adam/note.txt": b"mine"}
    report = verify_deleted(folder)
    assert [Path(path).name for path in report.problems] == ["note.txt"]


def test_unfinished_embeddings_are_removed(folder):
    rds = folder.with_name("ds.rds")
    with open_writer(rds, settings=SETTINGS | {"rds": 1}) as writer:
        writer.add_source(source("new", 3))
    delete_rows(folder, GONE)
    assert not rds.exists()


@settings(max_examples=6, deadline=None)
@given(
    steps=st.lists(st.sets(st.tuples(st.integers(0, 1), st.integers(0, 3)), min_size=1), min_size=1, max_size=3),
    shard_rows=st.integers(1, 5),
)
def test_deleting_in_steps_or_at_once_or_twice_gives_the_same_bytes(tmp_path_factory, steps, shard_rows):
    path = tmp_path_factory.mktemp("ds")
    for name in ("steps", "once"):
        build_store(path / name, source("pool", 4), source("more", 4), shard_rows=shard_rows)
    for rows in [*steps, steps[0]]:
        delete_rows(path / "steps", rows)
    gone = set.union(*steps)
    delete_rows(path / "once", gone)
    assert tree(path / "steps") == tree(path / "once")
    assert set(keys_of(path / "once")) == {(s, row) for s in range(2) for row in range(4)} - gone
    assert not verify_deleted(path / "steps").problems


def test_a_damaged_shard_that_is_computed_anew_does_not_bring_a_row_back(folder):
    delete_rows(folder, GONE)
    whole = tree(folder)
    for file in folder.glob("shards/*/*/*.safetensors"):
        file.unlink()
    with open_writer(folder) as writer:
        for key in writer.missing_shards():
            skip = SKIP.get((key.checkpoint, key.source), {}) | dict.fromkeys(key.deleted, "deleted")
            shard = make_shard(key, skip)
            gone = {row.row: row for row in writer.build.deleted_rows(key.source, key.start, key.stop)}
            shard.skipped[:] = [gone.get(row.row, row) for row in shard.skipped]
            writer.write_shard(key, shard)
        writer.seal()
    assert tree(folder) == whole
    with open_writer(folder) as writer:
        key = next(key for key in writer.build.shard_keys() if key.deleted)
        with pytest.raises(ValueError, match=r"lists the rows \(\) as deleted, expected \(2,\)"):
            writer.write_shard(key, make_shard(key))


def test_a_damaged_shard_stops_a_deletion_which_the_build_then_finishes(folder):
    old = next(Datastore.open(folder).manifest.shard_keys())
    data = bytearray((folder / old.path).read_bytes())
    data[-1] ^= 1
    (folder / old.path).write_bytes(data)
    with pytest.raises(StoreError, match=r"lacks 1 files, the first shards/adam/checkpoint-2/s0000-0{10}-0000000003-"):
        delete_rows(folder, [(0, 2)])
    assert verify_deleted(folder, [(0, 2)]).problems
    with open_writer(folder) as writer:
        (key,) = writer.missing_shards()
        assert key.deleted == (2,)
        shard = make_shard(key, {2: "deleted"})
        shard.skipped[:] = writer.build.deleted_rows(0, 0, 3)
        writer.write_shard(key, shard)
        writer.seal()
    assert not verify_deleted(folder, [(0, 2)]).problems


def test_every_row_can_be_deleted_and_the_store_grows_afterwards(folder):
    delete_rows(folder, [(0, row) for row in range(7)] + [(1, row) for row in range(4)])
    assert Datastore.open(folder).num_rows == 0
    with open_writer(folder) as writer:
        writer.add_source(source("third", 2))
        fill(writer)
        writer.seal()
    assert keys_of(folder) == [(2, 0), (2, 1)]
    assert not verify_deleted(folder).problems


def test_a_source_added_later_keeps_the_deletions(folder):
    delete_rows(folder, GONE)
    with open_writer(folder) as writer:
        assert writer.add_source(source("pool", 7)) == 0
        assert writer.is_sealed
        writer.add_source(source("third", 2))
        fill(writer)
        assert writer.seal().deleted == {"0": [2, 4], "1": [0]}


# --- a process that dies


class Killed(BaseException):
    """No handler may swallow it, and nothing can be done after it."""


def kill_at(patch, moment):
    """Every operation on a file from the one numbered `moment` on does not happen; returns how many there were."""
    count = [0]

    def dying(real):
        def call(*args, **options):
            count[0] += 1
            if count[0] > moment:
                raise Killed
            return real(*args, **options)

        return call

    for name in ("replace", "unlink", "rmdir"):
        patch.setattr(os, name, dying(getattr(os, name)))
    return count


def without_locks(path):
    return {name: data for name, data in tree(path).items() if not name.endswith(".lock")}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """One shard, and one in the embeddings beside it; an index, scores and a prefilter."""
    path = tmp_path_factory.mktemp("small") / "ds"
    options = {"feature_sets": ["adam"], "checkpoints": ["checkpoint-2"]}
    build_store(path, source("pool", 3), **options)
    build_store(path.with_name("ds.rds"), source("pool", 3), **options, settings=SETTINGS | {"rds": 1})
    build_store(path.with_name("ds.prefilter"), source("pool", 3), **options, settings=SETTINGS | {"cheap": 1})
    make_index_and_scores(path)
    return path.parent


def reopen_and_seal(path):
    """What a build that has nothing to add does."""
    with open_writer(path, feature_sets=["adam"], checkpoints=["checkpoint-2"]) as writer:
        writer.add_source(source("pool", 3))
        assert not writer.missing_shards()
        writer.seal()


@pytest.mark.parametrize("finish", [lambda path: delete_rows(path, [(0, 1)]), reopen_and_seal], ids=["delete", "build"])
def test_a_deletion_killed_anywhere_leaves_a_store_that_opens_and_is_completed(small, tmp_path, monkeypatch, finish):
    whole = copy_of(small, tmp_path / "whole")
    old = tree(whole)
    with monkeypatch.context() as patch:
        count = kill_at(patch, 10**9)
        delete_rows(whole, [(0, 1)])
    final = without_locks(whole.parent)
    assert count[0] > 20
    seen = set()
    for moment in range(count[0]):
        path = copy_of(small, tmp_path / str(moment))
        with monkeypatch.context() as patch:
            kill_at(patch, moment)
            with pytest.raises(Killed):
                delete_rows(path, [(0, 1)])
        store = Datastore.open(path)
        store.verify()
        seen.add(store.num_rows)
        is_done = without_locks(path.parent) == final
        assert bool(verify_deleted(path, [(0, 1)]).problems) != is_done, moment
        if b"id-1" in b"".join(tree(path).values()):  # the label still leads to the row
            found = find_rows(store, ["id-1"])
            assert {*found.rows, *found.deleted} == {(0, 1)}, moment
        intended = (path / "build.json").read_bytes() != old["build.json"]
        finish(path)
        if intended or finish is not reopen_and_seal:
            assert without_locks(path.parent) == final, moment
            assert not verify_deleted(path, [(0, 1)]).problems
        else:
            assert tree(path) == old
    assert seen == {3, 2}


def test_a_removal_killed_anywhere_is_completed_by_the_next(tmp_path, monkeypatch):
    store = build_store(tmp_path / "store", source("pool", 3))
    (store / "ranks.safetensors").write_bytes(b"ranks")
    whole = shutil.copytree(store, tmp_path / "whole")
    with monkeypatch.context() as patch:
        count = kill_at(patch, 10**9)
        remove_store(whole)
    assert not whole.exists()
    assert count[0] > 10
    for moment in range(count[0]):
        path = shutil.copytree(store, tmp_path / str(moment))
        with monkeypatch.context() as patch:
            kill_at(patch, moment)
            with pytest.raises(Killed):
                remove_store(path)
        assert path.exists()
        remove_store(path)
        assert not path.exists(), moment


def test_a_folder_that_is_no_store_is_not_removed(tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    remove_store(tmp_path)
    remove_store(tmp_path / "absent")
    assert tree(tmp_path) == {"note.txt": b"mine"}


# --- others at work


def test_a_reader_from_before_goes_on_with_what_it_has_and_is_told_where_it_cannot(folder):
    reader, other = Datastore.open(folder), Datastore.open(folder)
    blocks = other.iter_blocks("adam", "checkpoint-2")
    first = next(blocks)
    held = first.features_nK.copy()
    delete_rows(folder, GONE)
    np.testing.assert_array_equal(first.features_nK, held)
    for use in (
        lambda: list(reader.iter_blocks("adam", "checkpoint-2")),
        reader.rows,
        lambda: reader.stats("sgd", "checkpoint-2"),
    ):
        with pytest.raises(StoreError, match=r"has changed since it was opened; open it again") as caught:
            use()
        assert not isinstance(caught.value, DamagedStoreError)
    assert reader.direction("adam", "checkpoint-2").shape == (K,)
    assert Datastore.open(folder).num_rows == 7


def test_a_reader_never_sees_a_store_between_its_manifests(folder, monkeypatch):
    """Rows are deleted after the manifest is read and before its files are looked at."""
    real, done = Datastore._size_problem, []

    def deleting(self, path, entry):
        if not done:
            done.append(path)
            delete_rows(folder, GONE)
        return real(self, path, entry)

    monkeypatch.setattr(Datastore, "_size_problem", deleting)
    assert Datastore.open(folder).num_rows == 7


def test_a_second_writer_is_refused(folder):
    with open_writer(folder), pytest.raises(StoreLockedError, match=rf"being written by process {os.getpid()}"):
        delete_rows(folder, GONE)
    with (
        open_writer(folder.with_name("ds.rds"), settings=SETTINGS | {"rds": 1}),
        pytest.raises(StoreLockedError, match=r"ds\.rds is being written"),
    ):
        delete_rows(folder, GONE)
    assert verify_deleted(folder, GONE).problems
    delete_rows(folder, GONE)
    assert not verify_deleted(folder, GONE).problems


def test_rows_cannot_be_deleted_while_others_are_being_added(folder):
    with open_writer(folder) as writer:
        writer.add_source(source("third", 2))
    with pytest.raises(StoreError, match="is not finished: rows of third were being added"):
        delete_rows(folder, GONE)
    assert "deleted" not in json.loads((folder / "build.json").read_text())


@pytest.mark.parametrize("row", [(0, 7), (2, 0), (0, -1), (-1, 0)])
def test_a_row_that_there_is_not_is_refused_and_nothing_is_deleted(folder, row):
    before = tree(folder.parent)
    with pytest.raises(SettingError, match=r"source|ascend"):
        delete_rows(folder, [(0, 0), row])
    assert {name: data for name, data in tree(folder.parent).items()} == before


def test_a_link_in_the_place_of_an_index_is_refused(folder, tmp_path):
    shutil.move(folder.with_name("ds.index"), tmp_path / "elsewhere")
    folder.with_name("ds.index").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match=r"ds\.index is a link; expected a folder"):
        delete_rows(folder, GONE)
    assert (tmp_path / "elsewhere" / "adam" / "index.faiss").exists()
    assert verify_deleted(folder, GONE).problems


def test_rows_are_deleted_from_what_lies_beside_a_store_by_whatever_name_it_is_reached(folder, tmp_path):
    (tmp_path / "mine").symlink_to(folder)
    delete_rows(tmp_path / "mine", GONE)
    assert sorted(entry.name for entry in folder.parent.iterdir()) == ["ds", "ds.rds"]
    assert not verify_deleted(folder, GONE).problems


def test_files_behind_a_link_are_not_taken_for_stale_shards(folder, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "s0000-0000000000-0000000009.safetensors").write_bytes(b"mine")
    (folder / "shards" / "adam" / "linked").symlink_to(outside)
    delete_rows(folder, GONE)
    assert tree(outside) == {"s0000-0000000000-0000000009.safetensors": b"mine"}
    assert any("linked" in path for path in verify_deleted(folder).problems)


def test_stale_shards_are_removed_by_any_writer_and_nothing_else(folder):
    clean = tree(folder)
    place = folder / "shards/adam/checkpoint-2"
    for name in ("s0000-0000000000-0000000009.safetensors", "s0000-0000000000-0000000003-0123abcd.safetensors"):
        (place / name).write_bytes(b"junk")
    (place / "note.txt").write_text("mine")
    open_writer(folder).close()
    assert tree(folder) == clean | {"shards/adam/checkpoint-2/note.txt": b"mine"}
    assert folder.with_name("ds.index").exists()  # no row was deleted, so nothing that is made from rows goes


# --- finding rows


def test_labels_and_keys_are_found_skipped_rows_and_repeated_labels_too(folder):
    store = Datastore.open(folder)
    found = find_rows(store, ["id-2", "id-3", "pool:4"], [(1, 1)])
    assert found.rows == {
        (0, 2): "id-2",
        (0, 3): "id-3",
        (0, 4): "pool:4",
        (1, 1): "id-1",
        (1, 2): "id-2",
        (1, 3): "id-3",
    }
    assert found.repeated == {"id-2": 2, "id-3": 2}
    aside = find_rows(store, ["pool:0"])
    assert aside.rows == find_rows(store, [], [(1, 0)]).rows == {(1, 0): "pool:0"}
    delete_rows(folder, found.rows)
    again = find_rows(Datastore.open(folder), [], [(0, 2), (0, 0)])
    assert (again.rows, again.deleted) == ({(0, 0): "id-0"}, [(0, 2)])


def test_an_unknown_label_is_named_and_can_be_passed_over(folder):
    store = Datastore.open(folder)
    with pytest.raises(SettingError, match=r"has no row 'nobody', '0:7', '9:0'|has no row '0:7', '9:0', 'nobody'"):
        find_rows(store, ["id-0", "nobody"], [(0, 7), (9, 0)])
    found = find_rows(store, ["id-0", "pool:0", "nobody"], [(9, 0)], ignore_missing=True)
    assert set(found.unknown) == {"nobody", "9:0"}
    assert set(found.rows) == {(0, 0), (1, 0)}
    delete_rows(folder, [(0, 0)])
    with pytest.raises(SettingError, match=r"1 rows are deleted and have no label any more"):
        find_rows(Datastore.open(folder), ["nobody"])


# --- the proof


def test_the_proof_finds_a_row_wherever_it_is_left(folder, built):
    delete_rows(folder, GONE)
    report = verify_deleted(folder, labels=["id-2x"])
    assert report.rows == GONE
    assert not report.problems
    assert report.looked_at == {
        "build.json and manifest.json of ds": 2, "shards of ds": 20,
        "build.json and manifest.json of ds.rds": 2, "shards of ds.rds": 20,
    }  # fmt: skip
    assert any("backups" in place for place in report.cannot_see)
    old = "shards/adam/checkpoint-2/s0000-0000000000-0000000003.safetensors"
    hidden = folder / "somewhere" / "else"
    hidden.mkdir(parents=True)
    for place in (hidden / "kept.bin", folder / old, folder.with_name("ds.rds") / "shards" / "copy"):
        shutil.copy(built / "ds" / old, place)
    (folder / ".manifest.json.tmp").write_text("{")
    shutil.copytree(built / "ds.scores", folder.with_name("ds.scores"))
    shutil.copytree(built / "ds.prefilter", folder.with_name("ds.prefilter"))
    found = verify_deleted(folder).problems
    for part in ("else/kept.bin", f"ds/{old}", ".manifest.json.tmp", "ds.scores/0f/scores.npy", "ds.prefilter/places"):
        assert any(part in path for path in found), part
    assert any("ds.prefilter/shards/" in path and problem == "it has the row 0:2" for path, problem in found.items())
    assert found[str(hidden / "kept.bin")] == "it has the row 0:2"


def test_the_proof_fails_for_rows_and_labels_that_were_never_deleted(folder):
    report = verify_deleted(folder, [(0, 1)], ["id-3"])
    texts = " ".join(report.problems.values())
    assert "it has the row 0:1" in texts
    assert "it has the label id-3" in texts
    assert "does not say that 0:1 are deleted" in report.problems[str(folder / "build.json")]
    assert verify_deleted(folder).problems == {}  # nothing was deleted, nothing is searched for
    with pytest.raises(SettingError):
        verify_deleted(folder, [(0, 7)])


def test_a_row_that_was_set_aside_is_searched_for_and_deleted_like_any_other(folder, built):
    both = {"rows": [(1, 0)], "labels": ["pool:0"]}
    texts = verify_deleted(folder, **both).problems
    shards = [text for file, text in texts.items() if "/ds/shards/" in file]
    assert shards == ["it has the row 1:0; it has the label pool:0"] * 4
    delete_rows(folder, [(1, 0)])
    assert not verify_deleted(folder, **both).problems
    after = Datastore.open(folder)
    assert (after.num_set_aside, after.manifest.counts["num_skipped"]["deleted"]) == (0, 1)
    assert "set_aside" not in (folder / "manifest.json").read_text()
    old = "shards/adam/checkpoint-2/s0001-0000000000-0000000003.safetensors"
    shutil.copy(built / "ds" / old, folder / "kept.bin")
    assert verify_deleted(folder, **both).problems == {
        str(folder / "kept.bin"): "it has the row 1:0; it has the label pool:0"
    }


def test_the_label_of_a_row_set_aside_leads_to_it_while_its_deletion_is_not_finished(folder, monkeypatch):
    with monkeypatch.context() as patch:
        kill_at(patch, 3 * 6)  # six files are in place: build.json, four shards, manifest.json
        with pytest.raises(Killed):
            delete_rows(folder, [(1, 0)])
    store = Datastore.open(folder)
    assert (store.num_set_aside, store.manifest.deleted) == (0, {"1": [0]})
    assert find_rows(store, ["pool:0"]).deleted == [(1, 0)]
    delete_rows(folder, [(1, 0)])
    assert find_rows(Datastore.open(folder), ["pool:0"], ignore_missing=True).unknown == ["pool:0"]


def test_an_index_that_does_not_say_what_it_is_of_proves_nothing(folder):
    delete_rows(folder, GONE)
    make_index_and_scores(folder)
    assert not verify_deleted(folder).problems
    (folder.with_name("ds.scores") / "0f" / "scores.json").write_text("[" * 100_000)
    assert sorted(Path(path).name for path in verify_deleted(folder).problems) == ["scores.json", "scores.npy"]


@pytest.mark.parametrize("name", ["ds.rds", "ds.prefilter"])
def test_a_folder_that_a_removal_left_empty_is_no_problem(folder, name):
    delete_rows(folder, GONE)
    place = folder.with_name(name)
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    (place / ".lock").touch()
    assert not verify_deleted(folder).problems
    (place / "note.txt").touch()
    assert list(verify_deleted(folder).problems) == [str(place)]


def test_a_search_looks_at_every_key_a_few_times_however_many_there_are(folder):
    looks = []

    class Key(tuple):
        def __iter__(self):
            looks.append(self)
            return super().__iter__()

    rows = [Key((0, row)) for row in range(7)] + [Key((1, row)) for row in range(4)]
    verify_deleted(folder, rows)
    assert 0 < len(looks) <= 5 * len(rows)


def test_what_is_damaged_proves_nothing(folder):
    delete_rows(folder, GONE)
    key = next(Datastore.open(folder).manifest.shard_keys())
    data = bytearray((folder / key.path).read_bytes())
    data[-1] ^= 1
    (folder / key.path).write_bytes(data)
    assert "checksum" in verify_deleted(folder).problems[str(folder / key.path)]
    (folder / key.path).unlink()
    with pytest.raises(DamagedStoreError):
        verify_deleted(folder)
