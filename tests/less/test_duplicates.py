"""Near-duplicates are the groups that comparing every pair gives, told so that a person can drop rows by them."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from datastore import Datastore, GradientSpace, IndexConfig, build_index
from datastore.build import json_hash
from datastore.errors import DamagedStoreError, DataError, ProvenanceError, SettingError, StoreError
from less import NearDuplicatesConfig, build_embeddings, near_duplicates


@pytest.fixture(autouse=True)
def no_power_cut(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def stores(tmp_path_factory, build, tiny_rows):
    """An indexed store that no test may write to: two feature sets, of a pool in two sources with repeats."""
    folder = tmp_path_factory.mktemp("stores")
    first, second = folder / "first.jsonl", folder / "second.jsonl"
    again = [tiny_rows[30], {**tiny_rows[30], "id": "third time"}, {**tiny_rows[3], "id": "row-2"}]
    for path, rows in ((first, [*tiny_rows[:20], {"id": "wordless"}]), (second, [*tiny_rows[20:], *again])):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    build(folder / "ds", [first, second], update_rule=["adam", "sgd"])
    for feature_set in ("adam-sparse", "sgd-sparse"):
        build_index(Datastore.open(folder / "ds"), feature_set)
    return folder


@pytest.fixture
def copy(stores, tmp_path):
    """A store that may be spoilt, and its index."""
    shutil.copytree(stores / "ds.index", tmp_path / "ds.index")
    return Path(shutil.copytree(stores / "ds", tmp_path / "ds"))


@pytest.fixture
def ask(stores):
    def call(threshold=0.9999, **changes):
        options = {"datastore": stores / "ds", "feature_set": "sgd-sparse", "threshold": threshold}
        return near_duplicates(progress=False, **options | changes)

    return call


def groups_ref(space, threshold):
    """Every pair compared, and each row joined to all that it can be reached from."""
    similarities = {}
    vectors = np.concatenate([some.copy() for _, some in space.iter_vectors()])
    groups = [{n} for n in range(len(vectors))]
    for a in range(len(vectors)):
        for b in range(a + 1, len(vectors)):
            similarities[a, b] = float((vectors[a] * vectors[b]).sum())
            if similarities[a, b] >= threshold:
                joined = groups[a] | groups[b]
                for n in joined:
                    groups[n] = joined
    unique = {min(group): sorted(group) for group in groups if len(group) > 1}
    return sorted(unique.values(), key=lambda group: (-len(group), group[0])), similarities


@pytest.mark.parametrize("feature_set", ["adam-sparse", "sgd-sparse"])
@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95, 0.9999])
def test_the_groups_are_those_of_comparing_every_pair(ask, stores, feature_set, threshold):
    store = Datastore.open(stores / "ds")
    rows = store.rows(feature_set)
    expected, similarities = groups_ref(GradientSpace(store, feature_set), threshold)
    found = ask(threshold, feature_set=feature_set)
    at = {key: n for n, key in enumerate(zip(rows.sources_N.tolist(), rows.rows_N.tolist(), strict=True))}
    told = [[at[row.source, row.row] for row in (group.first, *group.others)] for group in found.groups]
    assert told == expected
    for group, positions in zip(found.groups, expected, strict=True):
        exact = [similarities[positions[0], n] for n in positions[1:]]
        assert [near.similarity for near in group.others] == pytest.approx(exact, abs=1e-6)
        assert group.similarities == pytest.approx((min(exact), max(exact)), abs=1e-6)
        assert group.least.similarity == min(near.similarity for near in group.others)
        assert group.num_rows == len(positions)
    assert found.num_others == sum(len(group) - 1 for group in expected)
    by_way = [s for group in expected for n in group[1:] if (s := similarities[group[0], n]) < threshold - 1e-4]
    assert found.num_by_way == len(by_way)
    assert by_way or (feature_set, threshold) != ("sgd-sparse", 0.5)  # there are chains to tell of
    assert (found.num_rows, found.feature_set, found.threshold) == (43, feature_set, threshold)


def test_a_row_that_repeats_another_is_told_with_its_place_and_the_row_that_stays(ask, stores, tiny_rows):
    found = ask()
    thrice, twice = (group for group in found.groups if any(near.same_tokens for near in group.others))
    assert (thrice.first.id, thrice.first.where) == ("row-30", "second.jsonl:11")
    assert [(near.id, near.where, near.source, near.row) for near in thrice.others] == [
        ("row-30", "second.jsonl:21", 1, 20), ("third time", "second.jsonl:22", 1, 21),
    ]  # fmt: skip
    assert (twice.first.id, twice.first.where) == ("row-3", "first.jsonl:4")
    assert [(near.id, near.where, near.same_tokens) for near in twice.others] == [("row-2", "second.jsonl:23", True)]
    assert all(near.similarity == pytest.approx(1, abs=1e-5) for near in (*thrice.others, *twice.others))
    assert thrice.first.text == "\n".join(turn["content"] for turn in tiny_rows[30]["messages"])
    assert found.num_same_tokens == 3
    assert found.num_ids_shared == 2  # row-30, and row-2, which another row has that is in no group


def test_the_file_has_a_line_for_each_row_that_would_go(ask, tmp_path):
    found = ask(0.5, output=tmp_path / "alike.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "alike.jsonl").read_text().splitlines()]
    assert len(lines) == found.num_others > 3
    assert len({(line["source"], line["row"]) for line in lines}) == len(lines)
    told = [(number, near, group) for number, group in enumerate(found.groups, 1) for near in group.others]
    for line, (number, near, group) in zip(lines, told, strict=True):
        assert (line["id"], line["where"], line["similarity"]) == (near.id, near.where, near.similarity)
        assert (line["group"], line["group_rows"]) == (number, group.num_rows)
        assert line["like"] == vars(group.first)
        assert (line["like"]["source"], line["like"]["row"]) < (line["source"], line["row"])


def test_rows_that_are_nothing_but_momentum_are_alike_by_momentum(ask, stores, monkeypatch):
    store = Datastore.open(stores / "ds")
    assert ask(feature_set="sgd-sparse").num_by_momentum == 0
    assert {near.from_momentum for group in ask().groups for near in group.others} == {None}
    position = np.array([3])

    def own_feature(self, feature_set, checkpoint):
        return GradientSpace(store, feature_set, checkpoint).vectors(position)[0]

    monkeypatch.setattr(Datastore, "direction", own_feature)
    found = ask(feature_set="adam-sparse")
    (group,) = (group for group in found.groups if group.first.id == "row-3")
    for near in group.others:
        assert near.from_momentum == pytest.approx(near.similarity, abs=1e-5)
    assert found.num_by_momentum >= len(group.others)


def test_an_index_of_one_checkpoint_gives_similarity_and_momentum_at_that_one(ask, copy):
    store = Datastore.open(copy)
    name = store.checkpoints[0]
    build_index(store, "adam-sparse", config=IndexConfig(checkpoint=name))
    found = ask(0.9, datastore=copy, feature_set="adam-sparse")
    space = GradientSpace(store, "adam-sparse", name)
    expected, similarities = groups_ref(space, 0.9)
    assert [group.num_rows for group in found.groups] == [len(group) for group in expected]
    assert found.found_by == f"the index (flat at {name})"
    direction_K = store.direction("adam-sparse", name)
    unit_K = direction_K / np.linalg.norm(direction_K)
    a_K, b_K = space.vectors(np.array(expected[0][:2]))
    near = found.groups[0].others[0]
    assert near.similarity == pytest.approx(similarities[expected[0][0], expected[0][1]], abs=1e-6)
    assert near.from_momentum == pytest.approx((a_K @ unit_K) * (b_K @ unit_K), abs=1e-5)


def test_an_ivf_that_looks_into_some_lists_only_says_so(build, tiny_rows, tmp_path):
    rows = tiny_rows * 2
    build(tmp_path / "ds", rows, update_rule=["sgd"])
    build_index(Datastore.open(tmp_path / "ds"), config=IndexConfig(type="ivf", dim=16, recall=0.01))
    found = near_duplicates(datastore=tmp_path / "ds", data=rows, threshold=0.9999, progress=False)
    assert found.found_by == "the index (ivf), which looks into 1 of 2 lists for each row and so can miss some"
    assert found.num_same_tokens == 40  # copies are in one list
    assert found.num_ids_shared == 40


def test_where_none_are_alike_there_is_no_group_and_an_empty_file(build, tiny_rows, tmp_path):
    rows = [tiny_rows[n] for n in (0, 1, 2)]
    build(tmp_path / "ds", rows, update_rule=["sgd"])
    build_index(Datastore.open(tmp_path / "ds"))
    asked = {"datastore": tmp_path / "ds", "data": rows, "progress": False, "threshold": 1.0}
    found = near_duplicates(output=tmp_path / "alike.jsonl", **asked)
    assert (found.groups, found.num_others, found.num_same_tokens, found.num_ids_shared) == ((), 0, 0, 0)
    assert (tmp_path / "alike.jsonl").read_bytes() == b""
    with pytest.raises(DataError, match="given in memory"):
        near_duplicates(**asked | {"data": None})


def test_of_embeddings_are_found_too(tiny_model_folder, stores, tmp_path):
    build_embeddings(model=tiny_model_folder, data=stores / "second.jsonl", datastore=tmp_path / "ds", progress=False)
    build_index(Datastore.open(tmp_path / "ds"))
    found = near_duplicates(datastore=tmp_path / "ds", threshold=0.99999, progress=False)
    alike = [(group.first.id, near.id) for group in found.groups for near in group.others if near.same_tokens]
    assert sorted(alike) == [("row-30", "row-30"), ("row-30", "third time")]
    assert found.num_by_momentum == 0


@pytest.mark.parametrize("threshold", [0, -0.5, 1.01, float("nan")])
def test_a_threshold_out_of_range_is_refused(threshold):
    with pytest.raises(SettingError, match="threshold must be above 0 and at most 1, got"):
        NearDuplicatesConfig(threshold=threshold)


def test_without_an_index_the_error_names_the_command_that_makes_one(ask, copy):
    shutil.rmtree(copy.with_name("ds.index"))
    with pytest.raises(StoreError, match=r"no index at .*ds\.index.sgd-sparse\. Make one with `gradsift index`"):
        ask(datastore=copy)


def test_an_index_of_another_state_of_the_store_is_refused(ask, copy):
    path = copy.with_name("ds.index") / "sgd-sparse" / "index.json"
    doc = json.loads(path.read_text()) | {"manifest_sha256": "00"}
    doc.pop("sha256")
    path.write_text(json.dumps(doc | {"sha256": json_hash(doc)}))
    with pytest.raises(ProvenanceError, match=r"the store has changed since; run `gradsift index` again"):
        ask(datastore=copy)


def test_a_damaged_index_or_shard_is_refused(ask, copy):
    shard = min(path for path in copy.rglob("*.safetensors") if "sgd-sparse" in str(path))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DamagedStoreError, match="checksum"):
        ask(datastore=copy)
    (copy.with_name("ds.index") / "sgd-sparse" / "index.faiss").write_bytes(b"x")
    with pytest.raises(DamagedStoreError, match=r"index\.faiss is damaged"):
        ask(datastore=copy)


def test_a_pool_that_has_changed_is_refused_before_the_search(ask, monkeypatch):
    monkeypatch.setattr("datastore.index.GradientIndex.near_duplicates", None)
    with pytest.raises(DataError, match="no source of"):
        ask(data=[{"messages": []}])
