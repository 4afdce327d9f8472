"""Stores made of stores have the rows of these and the bytes of a build, however often they were begun."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_stores import ENVIRONMENT, SETTINGS, build_store, fill, make_shard, open_writer, source, tree

from datastore import Datastore
from datastore.coding import CodedRows, as_float32, encode
from datastore.deletion import delete_rows, verify_deleted
from datastore.derive import Renumbered, compact_store, convert_store, merge_stores, split_store
from datastore.errors import DamagedStoreError, ProvenanceError, SettingError, StoreError, StoreLockedError

SKIP = {("checkpoint-10", 0): {1: "not finite", 4: "zero norm"}, ("checkpoint-2", 1): {0: "not JSON"}}
WEIGHTED = SETTINGS | {
    "feature_sets": {name: {"update_rule": name, "dtype": "float32"} for name in ("adam", "sgd")},
    "checkpoints": {"checkpoint-2": {"weight": 0.25, "step": 2}, "checkpoint-10": {"weight": 0.75, "step": 10}},
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    path = build_store(tmp_path / "ds", source("pool", 7), source("more", 4), skip=SKIP)
    delete_rows(path, [(0, 2), (1, 3)])
    return path


def rows_of(path):
    store = Datastore.open(path)
    rows = store.rows()
    names = [store.sources[number].name for number in rows.sources_N]
    features = [as_float32(block.features_nK) for block in store.iter_blocks("adam", store.checkpoints[-1])]
    return list(zip(names, rows.rows_N.tolist(), rows.ids, strict=True)), np.concatenate(features)


# --- merge and split


def test_a_store_split_and_merged_again_has_the_same_bytes(folder, tmp_path):
    parts = split_store(Datastore.open(folder), tmp_path / "parts")
    assert [part.name for part in parts] == ["pool", "more"]
    assert [rows_of(part)[0] for part in parts] == [
        [("pool", 0, "id-0"), ("pool", 3, "id-3"), ("pool", 5, "id-5"), ("pool", 6, "id-6")],
        [("more", 1, "id-1"), ("more", 2, "id-2")],
    ]
    merge_stores(tmp_path / "merged", [Datastore.open(part) for part in parts])
    assert tree(tmp_path / "merged") == tree(folder)
    for part in parts:
        assert not verify_deleted(part).problems


def test_a_merged_store_has_the_bytes_of_a_build_and_grows_like_one(tmp_path):
    one = build_store(tmp_path / "one", source("pool", 7))
    two = build_store(tmp_path / "two", source("more", 4), source("third", 2), environment={"machine": "second"})
    merge_stores(tmp_path / "all", [Datastore.open(one), Datastore.open(two)])
    merged = Datastore.open(tmp_path / "all")
    assert merged.manifest.environments == [ENVIRONMENT, {"machine": "second"}]
    assert [entry.name for entry in merged.sources] == ["pool", "more", "third"]
    for block, others in zip(merged.iter_aligned("sgd", merged.checkpoints), _blocks(one, two), strict=True):
        for ours, theirs in zip(block, others, strict=True):
            np.testing.assert_array_equal(ours.features_nK, theirs.features_nK)
    with open_writer(tmp_path / "all") as writer:
        assert writer.is_sealed
        writer.add_source(source("fourth", 5))
        assert {key.source for key in writer.missing_shards()} == {3}
        fill(writer)
        writer.seal()
    assert Datastore.open(tmp_path / "all").num_rows == 18


def _blocks(*paths):
    for path in paths:
        store = Datastore.open(path)
        yield from store.iter_aligned("sgd", store.checkpoints)


def test_stores_of_other_settings_or_of_one_source_are_not_merged(folder, tmp_path):
    other = build_store(tmp_path / "other", source("third", 2), settings=SETTINGS | {"dtype": "float32"}, shard_rows=2)
    with pytest.raises(ProvenanceError) as caught:
        merge_stores(tmp_path / "out", [Datastore.open(folder), Datastore.open(other)])
    assert f'settings.dtype is "float16" in {folder} and "float32" in {other}' in str(caught.value)
    assert "shard_rows is 3" in str(caught.value)
    same = build_store(tmp_path / "same", source("third", 2), source("more", 4))
    with pytest.raises(ProvenanceError, match=rf"the source more \(sha256 .*\) is in {folder} and in {same}"):
        merge_stores(tmp_path / "out", [Datastore.open(folder), Datastore.open(same)])
    with pytest.raises(SettingError, match="two stores or more"):
        merge_stores(tmp_path / "out", [Datastore.open(folder)])
    assert not (tmp_path / "out").exists()


def test_sources_of_one_name_get_folders_of_their_own(tmp_path):
    named = [replace(source(content, 2, content), name=name, location=None) for name, content in (
        ("a/pool.jsonl", "one"), ("b/pool.jsonl", "two"), ("../..", "three"), ("ünï cöde", "four"),
    )]  # fmt: skip
    path = build_store(tmp_path / "ds", *named)
    parts = split_store(Datastore.open(path), tmp_path / "parts")
    assert len(set(parts)) == 4
    assert all(part.parent == tmp_path / "parts" and part.name[0].isalnum() for part in parts)
    assert [part.name for part in parts][:2] == ["pool-0", "pool-1"]


def test_a_source_that_is_called_like_another_with_its_number_gets_a_folder_of_its_own(tmp_path):
    named = [replace(source(name, 2), name=name, location=None) for name in ("x/a.jsonl", "y/a.jsonl", "a-1.jsonl")]
    store = Datastore.open(build_store(tmp_path / "ds", *named))
    parts = split_store(store, tmp_path / "parts")
    assert [part.name for part in parts] == ["a-0", "a-1", "a-1-2"]
    assert [Datastore.open(part).sources for part in parts] == [[one] for one in named]


# --- what all of them hold to


def derivations(path):
    """Each command on the store in `path`, as a call on the new folder."""
    third = path.with_name("third")
    if not third.exists():
        build_store(third, source("third", 2))
    store = Datastore.open(path)
    kept = np.setdiff1d(np.arange(7), [2])

    def named(start, stop):
        return [(f"new-{n}", f"new-{n}") for n in range(start, stop)]

    edited = Renumbered(entry=source("edited", 6), rows_R=kept, named=named)
    others = Renumbered(entry=source("rest", 3), rows_R=np.arange(3), named=named)
    return {
        "merge": lambda out: merge_stores(out, [store, Datastore.open(third)]),
        "split": lambda out: split_store(store, out),
        "convert": lambda out: convert_store(store, out, feature_dtype="int8"),
        "compact": lambda out: compact_store(store, out, {0: edited, 1: others}),
    }


NAMES = ["merge", "split", "convert", "compact"]


class Killed(BaseException):
    """The end of the process."""


@pytest.mark.parametrize("name", NAMES)
def test_one_that_was_killed_goes_on_to_the_same_bytes(folder, tmp_path, monkeypatch, name):
    derive = derivations(folder)[name]
    before = tree(folder)
    count, real = [0], os.replace

    def dying(*args):
        count[0] += 1
        if count[0] > dying.moment:
            raise Killed
        return real(*args)

    monkeypatch.setattr(os, "replace", dying)
    dying.moment = 10**9
    derive(tmp_path / "whole")
    num_steps, final = count[0], tree(tmp_path / "whole")
    for moment in range(0, num_steps, 5):
        count[0], dying.moment = 0, moment
        with pytest.raises(Killed):
            derive(tmp_path / "killed")
        dying.moment = 10**9
        derive(tmp_path / "killed")
        assert tree(tmp_path / "killed") == final, moment
        shutil.rmtree(tmp_path / "killed")
    assert tree(folder) == before


@pytest.mark.parametrize("name", NAMES)
def test_a_second_writer_another_store_and_the_store_itself_are_refused(folder, tmp_path, name):
    derive = derivations(folder)[name]
    derive(tmp_path / "out")
    place = tmp_path / "out" if name != "split" else tmp_path / "out" / "pool"
    before = tree(tmp_path / "out")
    derive(tmp_path / "out")
    assert tree(tmp_path / "out") == before
    known = Datastore.open(place).manifest
    options = {"settings": known.settings, "feature_sets": known.feature_sets, "checkpoints": known.checkpoints}
    with open_writer(place, **options), pytest.raises(StoreLockedError, match=rf"written by process {os.getpid()}"):
        derive(tmp_path / "out")
    with open_writer(place, **options) as writer:
        writer.add_source(source("strange", 2))
    with pytest.raises(StoreError, match="is a datastore with another source, strange"):
        derive(tmp_path / "out")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "pool").write_text("years of work")
    with pytest.raises(StoreError):
        derive(tmp_path / "thesis")
    if name != "split":
        with pytest.raises(SettingError, match="is the store that is read"):
            derive(folder)


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_store_is_not_copied(folder, tmp_path, name):
    derive = derivations(folder)[name]
    key = next(Datastore.open(folder).manifest.shard_keys())
    data = bytearray((folder / key.path).read_bytes())
    data[-2] ^= 1
    (folder / key.path).write_bytes(data)
    with pytest.raises(DamagedStoreError, match="checksum"):
        derive(tmp_path / "out")


def test_progress_is_told_from_the_first_to_the_last_shard(folder, tmp_path):
    told = []
    convert_store(Datastore.open(folder), tmp_path / "out", feature_dtype="int8", watch=lambda *at: told.append(at))
    assert told == [(done, 20) for done in range(21)]
    told.clear()
    split_store(Datastore.open(folder), tmp_path / "parts", watch=lambda *at: told.append(at))
    assert (told[0], told[-1]) == ((0, 20), (20, 20))
    assert told == sorted(told)


# --- convert


def wide(path, dtype, **changes):
    """A store of rows of 16 float32 numbers, coded as `dtype`."""
    narrow = {name: entry | {"dtype": dtype} for name, entry in WEIGHTED["feature_sets"].items()}
    with open_writer(path, **{"settings": WEIGHTED | {"feature_sets": narrow}} | changes) as writer:
        writer.add_source(source("pool", 5))
        for key in writer.missing_shards():
            shard = make_shard(key, {1: "not finite"})
            seed = [len(key.feature_set), len(key.checkpoint), key.start]
            rows_NK = np.random.default_rng(seed).standard_normal((len(shard.ids), 16)).astype(np.float32)
            rows_NK /= np.linalg.norm(rows_NK, axis=1, keepdims=True)
            writer.write_shard(key, replace(shard, features_NK=encode(rows_NK, dtype)))
        for name, checkpoint in writer.missing_directions():
            writer.write_direction(name, checkpoint, np.arange(16, dtype=np.float32))
        writer.seal()
    return path


@pytest.mark.parametrize("dtype", ["float16", "int8", "int4", "binary"])
def test_converted_from_float32_a_store_has_the_bytes_of_a_build_with_fewer_bits(tmp_path, dtype):
    convert_store(Datastore.open(wide(tmp_path / "full", "float32")), tmp_path / "small", feature_dtype=dtype)
    assert tree(tmp_path / "small") == tree(wide(tmp_path / "built", dtype))


@pytest.mark.parametrize(
    ("first", "second", "error"), [("float16", "int8", 0.02), ("int8", "int4", 0.2), ("int4", "binary", 1.0)]
)
def test_converted_from_fewer_bits_the_rows_are_near_and_the_shards_say_so(tmp_path, first, second, error):
    full = wide(tmp_path / "full", "float32")
    convert_store(Datastore.open(full), tmp_path / "first", feature_dtype=first)
    convert_store(Datastore.open(tmp_path / "first"), tmp_path / "second", feature_dtype=second)
    store = Datastore.open(tmp_path / "second")
    assert {entry.dtype for entry in store.manifest.features.values()} == {second}
    assert all(entry.notes == {"converted_from": first} for entry in store.manifest.shards.values())
    (_, exact), (_, coded) = rows_of(full), rows_of(tmp_path / "second")
    assert np.linalg.norm(coded - exact, axis=1).max() < error
    block = next(store.iter_blocks("adam", "checkpoint-2"))
    assert isinstance(block.features_nK, CodedRows)


def test_more_bits_a_width_that_does_not_fit_and_nothing_to_do_are_refused(folder, tmp_path):
    store = Datastore.open(folder)
    out = tmp_path / "out"
    with pytest.raises(
        SettingError, match=r"adam of .* has float16 features; expected that or fewer bits, got float32"
    ):
        convert_store(store, out, feature_dtype="float32")
    with pytest.raises(SettingError, match="K = 5 is no multiple"):
        convert_store(store, out, feature_dtype="binary")
    with pytest.raises(SettingError, match="has these features already"):
        convert_store(store, out, feature_dtype="float16")
    with pytest.raises(SettingError, match="has these features already"):
        convert_store(store, out, checkpoints=["checkpoint-10", "checkpoint-2"])
    with pytest.raises(SettingError, match="has no checkpoint 'checkpoint-3'; it has checkpoint-2, checkpoint-10"):
        convert_store(store, out, checkpoints=["checkpoint-3"])
    with pytest.raises(SettingError, match="has no feature set 'x'"):
        convert_store(store, out, feature_sets=["x"])
    with pytest.raises(SettingError, match="feature_dtype must be one of"):
        convert_store(store, out, feature_dtype="int2")
    assert not out.exists()


def test_some_feature_sets_at_some_checkpoints_are_what_a_build_of_these_has(tmp_path):
    full = wide(tmp_path / "full", "float32", environment={"checkpoints": ["/run/2", "/run/10"]})
    convert_store(
        Datastore.open(full),
        tmp_path / "part",
        feature_sets=["sgd"],
        checkpoints=["checkpoint-10"],
        feature_dtype="int8",
    )
    expected = WEIGHTED | {
        "feature_sets": {"sgd": {"update_rule": "sgd", "dtype": "int8"}},
        "checkpoints": {"checkpoint-10": {"weight": 1.0, "step": 10}},
    }
    store = Datastore.open(tmp_path / "part")
    assert (store.settings, store.feature_sets, store.checkpoints) == (expected, ["sgd"], ["checkpoint-10"])
    assert store.environment == {"checkpoints": ["/run/10"]}
    assert len(store.manifest.shards) == 2
    store.verify()


def test_checkpoints_without_weight_are_not_kept_alone(tmp_path):
    idle = {name: {"weight": weight} for name, weight in (("checkpoint-2", 0.0), ("checkpoint-10", 1.0))}
    full = wide(tmp_path / "full", "float32")
    shutil.rmtree(full)
    with open_writer(full, settings=WEIGHTED | {"checkpoints": idle}) as writer:
        writer.add_source(source())
        fill(writer)
        writer.seal()
    with pytest.raises(SettingError, match="checkpoint-2 have no weight"):
        convert_store(Datastore.open(full), tmp_path / "out", checkpoints=["checkpoint-2"])


def test_rows_set_aside_stay_so_in_every_store_that_is_made_of_theirs(tmp_path):
    skip = {(at, 0): {0: "prefilter", 5: "prefilter"} for at in ("checkpoint-2", "checkpoint-10")}
    two = {"settings": WEIGHTED, "shard_rows": 3}
    build_store(tmp_path / "ds", source("pool", 7), source("more", 4), skip=skip, **two)
    delete_rows(tmp_path / "ds", [(0, 5)])
    store = Datastore.open(tmp_path / "ds")
    pool, more = split_store(store, tmp_path / "parts")
    merge_stores(tmp_path / "merged", [Datastore.open(pool), Datastore.open(more)])
    assert tree(tmp_path / "merged") == tree(tmp_path / "ds")
    convert_store(store, tmp_path / "small", checkpoints=["checkpoint-10"])
    for path in (pool, tmp_path / "small"):
        made = Datastore.open(path)
        assert made.num_set_aside == 1
        assert made.left_out(made.manifest.ranges[0])[0].id == "pool:0"


def test_room_is_asked_for_the_rows_that_have_features(tmp_path, monkeypatch):
    skip = {(at, 0): {row: "prefilter" for row in range(3, 30)} for at in ("checkpoint-2", "checkpoint-10")}
    build_store(tmp_path / "ds", source("pool", 30), source("more", 4), skip=skip)
    delete_rows(tmp_path / "ds", [(0, 0), (0, 20)])
    store, third = Datastore.open(tmp_path / "ds"), build_store(tmp_path / "third", source("third", 2))
    kept = np.setdiff1d(np.arange(30), [0, 20])
    edited = Renumbered(entry=source("edited", 28), rows_R=kept, named=lambda *place: [("", "")] * len(range(*place)))
    asked = []
    monkeypatch.setattr("datastore.derive.check_free_space", lambda folder, num_bytes: asked.append(num_bytes))
    split_store(store, tmp_path / "split")
    merge_stores(tmp_path / "merged", [store, Datastore.open(third)])
    compact_store(store, tmp_path / "compact", {0: edited})
    convert_store(store, tmp_path / "small", feature_dtype="int8")
    rows_of_each = [2, 4, 2 + 4 + 2, 2 + 4, 2 + 4]
    bytes_of_a_row = [2 * 5] * 4 + [5 + 4]
    assert asked == [2 * 2 * n * size for n, size in zip(rows_of_each, bytes_of_a_row, strict=True)]


@pytest.mark.parametrize("name", NAMES)
def test_a_rerun_that_copies_nothing_leaves_a_store_that_another_machine_has_mended(folder, tmp_path, name):
    derive, out = derivations(folder)[name], tmp_path / "out"
    derive(out)
    mended = Datastore.open(out / "pool" if name == "split" else out)
    key = next(mended.manifest.shard_keys())
    shard = mended.shard(key)
    (mended.path / key.path).unlink()
    fixed = mended.manifest.fixed()
    with open_writer(mended.path, **fixed, environment={"machine": "another"}) as writer:
        writer.write_shard(key, shard)
        writer.seal()
    before = tree(out)
    derive(out)
    assert tree(out) == before
    assert Datastore.open(mended.path).environment == {"machine": "another"}


# --- compact


@settings(max_examples=8, deadline=None)
@given(gone=st.sets(st.integers(0, 8), max_size=8), shard_rows=st.integers(1, 10))
def test_a_compacted_store_has_the_rows_that_are_left_under_their_new_numbers(tmp_path_factory, gone, shard_rows):
    path = tmp_path_factory.mktemp("ds")
    skip = {("checkpoint-10", 0): {1: "not finite"}, ("checkpoint-2", 0): {7: "zero norm"}}
    for of_checkpoint in skip.values():
        of_checkpoint |= {2: "prefilter", 5: "prefilter"}
    build_store(path / "ds", source("pool", 9), source("more", 4), skip=skip, shard_rows=shard_rows)
    delete_rows(path / "ds", [(0, row) for row in gone] + [(1, row) for row in range(4)])
    left = [row for row in range(9) if row not in gone]
    edited = Renumbered(
        entry=source("edited", len(left)),
        rows_R=np.array(left),
        named=lambda start, stop: [(f"kept-{left[n]}", f"edited:{n + 1}") for n in range(start, stop)],
    )
    old = Datastore.open(path / "ds")
    compact_store(old, path / "out", {0: edited} if gone else {})
    new = Datastore.open(path / "out")
    new.verify()
    assert "deleted" not in new.manifest.to_json()
    assert "deleted" not in new.manifest.counts["num_skipped"]
    assert new.manifest.settings_hash == old.manifest.settings_hash
    rows = new.rows()
    assert [left[row] for row in rows.rows_N] == old.rows().rows_N.tolist()
    if gone:
        assert list(rows.ids) == [f"kept-{left[row]}" for row in rows.rows_N]
        assert [(left[r.row], r.where, r.id, r.reason) for r in new.skipped] == [
            (row, f"edited:{left.index(row) + 1}", f"kept-{row}", reason)
            for row, reason in ((1, "not finite"), (7, "zero norm"))
            if row in left
        ]
        entries = [row for rows in new.manifest.ranges for row in new.left_out(rows) if row.reason == "prefilter"]
        assert [(left[row.row], row.id) for row in entries] == [(row, f"kept-{row}") for row in (2, 5) if row in left]
    assert new.num_set_aside == len({2, 5} - gone)
    for checkpoint in new.checkpoints:
        ours, theirs = new.stats("sgd", checkpoint), old.stats("sgd", checkpoint)
        np.testing.assert_array_equal(ours.losses_N, theirs.losses_N)
        blocks = [[b.features_nK for b in store.iter_blocks("sgd", checkpoint)] for store in (new, old)]
        if new.num_rows:
            np.testing.assert_array_equal(*(np.concatenate(parts) for parts in blocks))
    raw = tree(path / "out")
    assert not any(b"more" in data for data in raw.values())


def test_compacting_needs_a_deletion_rows_that_are_left_and_their_file(folder, tmp_path):
    clean = build_store(tmp_path / "clean")
    with pytest.raises(SettingError, match="has no deleted row: it is compact already"):
        compact_store(Datastore.open(clean), tmp_path / "out")
    with pytest.raises(SettingError, match=r"1 of 7 rows of pool are deleted .* with --data"):
        compact_store(Datastore.open(folder), tmp_path / "out")
    delete_rows(clean, [(0, row) for row in range(7)])
    with pytest.raises(SettingError, match=r"every row of .* is deleted"):
        compact_store(Datastore.open(clean), tmp_path / "out")
    assert not Path(tmp_path / "out").exists()
