"""A reader sees exactly the scored rows, in pool order, and no byte that is not as it was sealed."""

import hashlib
import json
import shutil
import threading
import tracemalloc
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_stores import K, build_store, fill, make_shard, open_writer, skipped_row, source, tree

from datastore import Datastore, RowIds, RowStats, store
from datastore.build import json_hash
from datastore.deletion import delete_rows
from datastore.errors import DamagedStoreError, FormatVersionError, SettingError, StoreError

SKIP = {
    ("checkpoint-2", 0): {1: "not JSON", 6: "zero norm"},
    ("checkpoint-10", 0): {1: "not finite", 4: "not finite"},
    ("checkpoint-10", 1): {0: "zero norm", 1: "zero norm", 2: "zero norm"},
}
SHARD = "shards/adam/checkpoint-2/s0000-0000000000-0000000003.safetensors"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build_store(tmp_path_factory.mktemp("built"), source("pool", 7), source("more", 4), skip=SKIP)


@pytest.fixture
def folder(built, tmp_path):
    return Path(shutil.copytree(built, tmp_path / "ds"))


def features_of(opened, feature_set="adam", checkpoint="checkpoint-2", **options):
    blocks = list(opened.iter_blocks(feature_set, checkpoint, **options))
    return np.concatenate([block.features_nK for block in blocks]) if blocks else np.zeros((0, K))


def test_a_row_that_is_bad_at_any_checkpoint_is_nowhere(folder):
    opened = Datastore.open(folder)
    table = opened.rows()
    assert list(zip(table.sources_N, table.rows_N, strict=True)) == [(0, 0), (0, 2), (0, 3), (0, 5), (1, 3)]
    assert list(table.ids) == ["id-0", "id-2", "id-3", "id-5", "id-3"]
    assert table.num_tokens_N.tolist() == [10, 12, 13, 15, 13]
    assert table.num_supervised_N.tolist() == [1, 3, 4, 6, 4]
    assert table.truncated_N.tolist() == [False, False, True, True, True]
    assert table.digests_N.tolist() == [row * 1_000_003 for row in (0, 2, 3, 5, 3)]
    assert opened.num_rows == 5
    assert [(row.row, row.reason) for row in opened.skipped] == [
        (1, "not JSON"), (4, "not finite"), (6, "zero norm"),
        (0, "zero norm"), (1, "zero norm"), (2, "zero norm"),
    ]  # fmt: skip
    reasons = {"not JSON": 1, "not finite": 1, "zero norm": 4}
    assert opened.manifest.counts == {"num_rows": 11, "num_scored": 5, "num_skipped": reasons}


@settings(max_examples=20, deadline=None)
@given(
    num_rows=st.lists(st.integers(1, 9), min_size=1, max_size=2),
    shard_rows=st.integers(1, 10),
    bad=st.sets(st.tuples(st.sampled_from(["checkpoint-2", "checkpoint-10"]), st.integers(0, 1), st.integers(0, 8))),
)
def test_blocks_are_the_scored_rows_in_pool_order(tmp_path_factory, num_rows, shard_rows, bad):
    skip = {}
    for checkpoint, number, row in bad:
        skip.setdefault((checkpoint, number), {})[row] = "not finite"
    sources = [source(f"pool{number}", rows) for number, rows in enumerate(num_rows)]
    path = build_store(tmp_path_factory.mktemp("ds"), *sources, skip=skip, shard_rows=shard_rows)
    opened = Datastore.open(path)
    dropped = {(number, row) for _, number, row in bad}
    names = [item.name for item in fields(RowStats)]
    for feature_set in opened.feature_sets:
        for checkpoint in opened.checkpoints:
            expected, position = [], 0
            for key in opened.manifest.shard_keys():
                if (key.feature_set, key.checkpoint) == (feature_set, checkpoint):
                    shard = make_shard(key)
                    keep = [(key.source, row) not in dropped for row in shard.rows_N.tolist()]
                    expected.append([shard.features_NK[keep], *(getattr(shard, n)[keep] for n in names)])
            blocks = list(opened.iter_blocks(feature_set, checkpoint))
            for block in blocks:
                assert block.start == position
                position = block.stop
                assert block.features_nK.shape == (block.stop - block.start, K)
            assert position == opened.num_rows == len(opened.rows().ids)
            stats = opened.stats(feature_set, checkpoint)
            found = [features_of(opened, feature_set, checkpoint), *(getattr(stats, n) for n in names)]
            for ours, parts in zip(found, zip(*expected, strict=True), strict=True):
                np.testing.assert_array_equal(ours, np.concatenate(parts))


def test_labels_are_read_from_the_shards_when_they_are_asked_for(folder):
    ids = Datastore.open(folder).rows(verify=False).ids
    whole = ["id-0", "id-2", "id-3", "id-5", "id-3"]
    assert [ids[n] for n in range(-5, 5)] == whole * 2
    assert (ids[1:4], ids[::-2], ids[7:]) == (whole[1:4], whole[::-2], [])
    assert (len(ids), ids.index("id-3"), ids.count("id-3"), "id-1" in ids) == (5, 2, 2, False)
    with pytest.raises(IndexError):
        ids[5]
    fresh = Datastore.open(folder)
    ids = RowIds(fresh, "adam", verify=True)
    alter(folder / SHARD)
    for use in (lambda: list(ids), lambda: ids[1]):
        with pytest.raises(DamagedStoreError, match=rf"{SHARD} is damaged: its checksum"):
            use()
    assert len(ids) == 5


def test_nothing_is_copied_where_no_row_is_dropped(tmp_path):
    opened = Datastore.open(build_store(tmp_path))
    assert all(isinstance(block.features_nK, np.memmap) for block in opened.iter_blocks("adam", "checkpoint-2"))


def test_what_a_store_is_can_be_asked(folder):
    opened = Datastore.open(folder)
    assert opened.feature_sets == ["adam", "sgd"]
    assert opened.checkpoints == ["checkpoint-2", "checkpoint-10"]
    assert [one.name for one in opened.sources] == ["pool", "more"]
    assert opened.proj_dim("sgd") == K
    assert opened.num_bytes == sum(len(data) for name, data in tree(folder).items() if "/" in name)
    np.testing.assert_array_equal(opened.direction("adam", "checkpoint-2"), np.arange(K))
    for call in (
        lambda: opened.proj_dim("rademacher"),
        lambda: opened.direction("adam", "checkpoint-3"),
        lambda: opened.stats("rademacher", "checkpoint-2"),
        lambda: list(opened.iter_blocks("adam", "checkpoint-3")),
    ):
        with pytest.raises(SettingError, match=r"has no (feature set 'rademacher'|checkpoint 'checkpoint-3'); it has"):
            call()


def test_what_is_no_store_is_refused(tmp_path):
    (tmp_path / "file").write_text("text")
    for path in (tmp_path, tmp_path / "absent", tmp_path / "file"):
        with pytest.raises(StoreError, match=r"no datastore at .*: expected a folder with manifest.json"):
            Datastore.open(path)


def test_an_unfinished_build_says_how_to_resume(folder):
    (folder / "manifest.json").unlink()
    with pytest.raises(StoreError, match=r"is not finished: .* Rerun the same `gradsift build-datastore`"):
        Datastore.open(folder)


def test_files_that_the_manifest_does_not_list_do_not_matter(folder):
    (folder / "shards/adam/checkpoint-2/s0000-0000000000-0000000009.safetensors").write_bytes(b"junk")
    Datastore.open(folder).verify()


# --- damage


def alter(path, at=-4):
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def test_missing_and_truncated_files_are_all_named_on_opening(folder):
    (folder / SHARD).unlink()
    other = folder / "directions/sgd/checkpoint-10.safetensors"
    size = other.stat().st_size
    other.write_bytes(other.read_bytes()[:-1])
    with pytest.raises(DamagedStoreError) as caught:
        Datastore.open(folder)
    message = str(caught.value)
    assert f"{SHARD} is damaged: it is missing" in message
    assert f"checkpoint-10.safetensors is damaged: it has {size - 1} bytes, expected {size}" in message
    assert "Delete these files and rerun the same `gradsift build-datastore` command" in message


def test_an_altered_byte_is_found_before_its_features_are_handed_out(folder):
    alter(folder / SHARD)
    opened = Datastore.open(folder)
    for use in (
        lambda: next(opened.iter_blocks("adam", "checkpoint-2")),
        lambda: opened.stats("adam", "checkpoint-2"),
        lambda: opened.rows(),
        lambda: opened.verify(),
    ):
        with pytest.raises(DamagedStoreError, match=rf"{SHARD} is damaged: its checksum"):
            use()
    assert len(features_of(opened, "sgd")) == len(features_of(opened, verify=False)) == opened.num_rows


def test_an_altered_direction_is_found(folder):
    alter(folder / "directions/adam/checkpoint-2.safetensors")
    with pytest.raises(DamagedStoreError, match="checksum"):
        Datastore.open(folder).direction("adam", "checkpoint-2")


def test_verify_names_every_bad_file(folder):
    opened = Datastore.open(folder)
    bad = {SHARD, "directions/sgd/checkpoint-10.safetensors"}
    for path in bad:
        alter(folder / path)
    found = list(opened.iter_verify())
    assert {path for path, _, problem in found if problem} == bad
    assert sum(num_bytes for _, num_bytes, _ in found) == opened.num_bytes
    with pytest.raises(DamagedStoreError) as caught:
        opened.verify()
    assert all(path in str(caught.value) for path in bad)


def test_damage_is_mended_as_the_error_says(folder):
    whole = tree(folder)
    alter(folder / SHARD)
    (folder / SHARD).unlink()
    build_store(folder, source("pool", 7), source("more", 4), skip=SKIP)
    assert tree(folder) == whole


def test_the_blocks_before_a_damaged_shard_come_first_and_its_own_never(tmp_path):
    folder = build_store(tmp_path, source("pool", 30))
    alter(folder / "shards/adam/checkpoint-2/s0000-0000000012-0000000015.safetensors")
    blocks = Datastore.open(folder).iter_blocks("adam", "checkpoint-2")
    assert [next(blocks).start for _ in range(4)] == [0, 3, 6, 9]
    with pytest.raises(DamagedStoreError, match="0000000012"):
        next(blocks)


@pytest.mark.parametrize("verify", [True, False])
def test_only_a_few_shards_are_read_ahead_and_no_thread_outlives_the_blocks(tmp_path, monkeypatch, verify):
    folder = build_store(tmp_path, source("pool", 60))
    opened, before, real = [], threading.active_count(), store.open_shard
    monkeypatch.setattr(store, "open_shard", lambda *args: opened.append(args) or real(*args))
    blocks = Datastore.open(folder).iter_blocks("adam", "checkpoint-2", verify=verify)
    assert next(blocks).start == 0
    assert next(blocks).start == 3
    assert 2 <= len(opened) <= 2 + store.NUM_READERS
    blocks.close()
    assert threading.active_count() == before


def test_a_file_is_hashed_at_most_once(folder, monkeypatch):
    hashed = []
    real = hashlib.sha256

    def counting(data=b""):
        hashed.append(len(data))
        return real(data)

    opened = Datastore.open(folder)
    monkeypatch.setattr("datastore.files.hashlib.sha256", counting)
    for _ in range(2):
        features_of(opened)
        opened.rows()
        opened.stats("adam", "checkpoint-2")
    assert len(hashed) == len(opened.manifest.ranges)


# --- hostile manifests


def forge(folder, edit, *, seal=True):
    path = folder / "manifest.json"
    doc = json.loads(path.read_text())
    edit(doc)
    if seal:
        doc["sha256"] = json_hash({name: doc[name] for name in doc if name != "sha256"})
    path.write_text(json.dumps(doc))


def rename_shard(name):
    return lambda doc: doc["shards"].update({name: doc["shards"].pop(SHARD)})


def test_an_edited_manifest_is_refused(folder):
    forge(folder, lambda doc: doc["counts"].update(num_scored=6), seal=False)
    with pytest.raises(DamagedStoreError, match=r"manifest.json is damaged: its checksum .* Delete this file"):
        Datastore.open(folder)


@pytest.mark.parametrize(
    "edit",
    [
        rename_shard("/etc/passwd"),
        rename_shard("../outside.safetensors"),
        rename_shard("shards/adam/../../../outside.safetensors"),
        lambda doc: doc["shards"].pop(SHARD),
        lambda doc: doc["shards"].update(extra=doc["shards"][SHARD]),
        lambda doc: doc["shards"][SHARD].update(num_bytes="1"),
        lambda doc: doc["shards"][SHARD].pop("sha256"),
        lambda doc: doc["directions"].clear(),
        lambda doc: doc["features"].pop("sgd"),
        lambda doc: doc["ranges"].pop(),
        lambda doc: doc["ranges"].reverse(),
        lambda doc: doc["ranges"][0].update(stop=2),
        lambda doc: doc["ranges"][0]["skipped"][0].update(row=99),
        lambda doc: doc["ranges"][0]["skipped"].append(doc["ranges"][0]["skipped"][0]),
        lambda doc: doc["ranges"][0].update(skipped=None),
        lambda doc: doc["sources"][0].update(num_rows=10**18),
        lambda doc: doc["sources"][0].update(num_rows=-1),
        lambda doc: doc["sources"][0].update(location=3),
        lambda doc: doc.update(feature_sets=["adam", ".."]),
        lambda doc: doc.update(shard_rows=0),
        lambda doc: doc.update(shard_rows=True),
        lambda doc: doc.update(settings={"dtype": "float32"}),
        lambda doc: doc.update(settings_hash="00"),
        lambda doc: doc.update(counts={}),
        lambda doc: doc.pop("counts"),
        lambda doc: doc.update(environments="none"),
        lambda doc: doc.update(extra=1),
        lambda doc: doc.update(deleted={}),
        lambda doc: doc.update(deleted={"0": [0]}),
        lambda doc: doc.update(version="1"),
        lambda doc: doc.update(version=0),
        lambda doc: doc.update(format="zarr"),
    ],
)
def test_a_forged_manifest_is_refused(folder, edit):
    forge(folder, edit)
    with pytest.raises(DamagedStoreError, match=r"manifest.json is damaged"):
        Datastore.open(folder)


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda doc: doc.update(deleted={"0": [1]}), "skipped as deleted are not"),
        (lambda doc: doc.update(deleted={}), "skipped as deleted are not"),
        (lambda doc: doc.pop("deleted"), "skipped as deleted are not|lack or should not have"),
        (lambda doc: doc["deleted"].update({"0": [0, 2]}), "skipped as deleted are not"),
        (lambda doc: doc["deleted"].update({"0": [0, 0]}), "must ascend"),
        (lambda doc: doc["deleted"].update({"0": [-1, 0]}), "must ascend"),
        (lambda doc: doc["deleted"].update({"0": [0, 7]}), "must ascend"),
        (lambda doc: doc["deleted"].update({"0": []}), "must ascend"),
        (lambda doc: doc["deleted"].update({"0": [True]}), "expected int"),
        (lambda doc: doc["deleted"].update({"2": [0]}), "there are 2 sources"),
        (lambda doc: doc["deleted"].update({"00": [0]}), "there are 2 sources"),
        (lambda doc: doc["deleted"].update({"-1": [0]}), "there are 2 sources"),
        (lambda doc: doc["deleted"].update({"../0": [0]}), "there are 2 sources"),
        (lambda doc: doc["ranges"][0]["skipped"][0].update(id="id-0"), "skipped as deleted are not"),
        (lambda doc: doc["ranges"][0]["skipped"][0].update(reason="not JSON"), "skipped as deleted are not"),
        (lambda doc: doc["ranges"][1]["skipped"][0].update(reason="deleted"), "skipped as deleted are not"),
    ],
    ids=range(16),
)
def test_a_forged_deletion_is_refused(folder, edit, expected):
    delete_rows(folder, [(0, 0)])
    forge(folder, lambda doc: (edit(doc), doc.update(counts=counts_of(doc))))
    with pytest.raises(DamagedStoreError, match=rf"manifest.json is damaged: .*({expected})"):
        Datastore.open(folder)


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda doc: doc["features"]["adam"].update(proj_dim=0), "0 columns, expected 1 or more"),
        (lambda doc: doc["features"]["adam"].update(proj_dim=-5), "-5 columns"),
        (lambda doc: doc["features"]["adam"].update(proj_dim=10**19), "bytes for 1" + "0" * 19 + " columns"),
        (lambda doc: doc["features"]["adam"].update(dtype="float64"), "must be one of float32, .* got 'float64'"),
        (lambda doc: doc["features"]["adam"].update(dtype="int4"), "K = 5 is no multiple"),
        (lambda doc: doc["shards"][SHARD].update(num_rows=1), "has 1 rows, expected 2 to 3"),
        (lambda doc: doc["shards"][SHARD].update(num_rows=4), "has 4 rows, expected 2 to 3"),
        (lambda doc: doc["shards"][SHARD].update(num_bytes=19), "has 19 bytes for 2 rows"),
    ],
    ids=range(8),
)
def test_sizes_that_the_files_have_no_room_for_are_refused(folder, edit, expected):
    forge(folder, edit)
    with pytest.raises(DamagedStoreError, match=rf"manifest.json is damaged: .*{expected}"):
        Datastore.open(folder)


def test_more_rows_than_bytes_are_refused_as_the_manifest_is_read(tmp_path):
    num_rows = 10**19
    folder = build_store(tmp_path / "ds", source("pool", 3), feature_sets=["adam"], checkpoints=["checkpoint-2"])

    def edit(doc):
        doc["sources"][0]["num_rows"] = doc["ranges"][0]["stop"] = doc["shard_rows"] = num_rows
        doc["counts"] = counts_of(doc)
        doc["shards"][SHARD]["num_rows"] = num_rows
        rename_shard(SHARD.replace("0000000003", str(num_rows)))(doc)

    forge(folder, edit)
    with pytest.raises(DamagedStoreError, match=rf"manifest.json is damaged: .* bytes for {num_rows} rows"):
        Datastore.open(folder)


def test_a_short_manifest_that_implies_a_million_files_is_refused_before_they_are_named(folder):
    def edit(doc):
        doc["feature_sets"], doc["checkpoints"] = ([f"{kind}-{n}" for n in range(100)] for kind in "fc")
        doc["features"] = dict.fromkeys(doc["feature_sets"], doc["features"]["adam"])
        doc["sources"] = [doc["sources"][0] | {"num_rows": 300}]
        doc["ranges"] = [{"source": 0, "start": n, "stop": n + 3, "skipped": []} for n in range(0, 300, 3)]

    forge(folder, edit)
    tracemalloc.start()
    try:
        with pytest.raises(DamagedStoreError, match=r"its shards are 20, expected 1000000"):
            Datastore.open(folder)
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


def test_a_store_that_says_nothing_of_its_making_is_read_and_says_so_when_asked(tmp_path):
    folder = build_store(tmp_path / "ds")
    forge(folder, lambda doc: doc.update(environments=[]))
    opened = Datastore.open(folder)
    assert len(features_of(opened)) == 7
    with pytest.raises(StoreError, match="does not say what wrote it"):
        _ = opened.environment


def counts_of(doc):
    """What a forger would not forget."""
    skipped = [row["reason"] for rows in doc["ranges"] for row in rows["skipped"]]
    for rows in doc["ranges"]:
        skipped += ["prefilter"] * int(rows.get("set_aside", "0"), 16).bit_count()
    num_rows = sum(source["num_rows"] for source in doc["sources"])
    by_reason = {reason: skipped.count(reason) for reason in skipped}
    return {"num_rows": num_rows, "num_scored": num_rows - len(skipped), "num_skipped": by_reason}


def test_a_manifest_that_names_the_whole_shard_of_a_range_with_a_deleted_row_is_refused(folder):
    old = Path(shutil.copy(folder / SHARD, folder.parent / "old"))
    delete_rows(folder, [(0, 0)])
    (new,) = (
        path for path in Datastore.open(folder).manifest.shards if path.startswith(SHARD.removesuffix(".safetensors"))
    )
    shutil.copy(old, folder / SHARD)

    def whole(doc):
        entry = doc["shards"].pop(new)
        sha256 = hashlib.sha256(old.read_bytes()).hexdigest()
        doc["shards"][SHARD] = entry | {"sha256": sha256, "num_bytes": old.stat().st_size}

    forge(folder, whole)
    with pytest.raises(DamagedStoreError, match="its shards lack or should not have"):
        Datastore.open(folder)


@pytest.mark.parametrize("other", ["older edition", "another store", "another range"])
def test_another_shard_in_the_place_of_one_is_refused_even_with_a_forged_checksum(folder, tmp_path, other):
    old = {path: (folder / path).read_bytes() for path in Datastore.open(folder).manifest.shards}
    delete_rows(folder, [(0, 0)])
    (new,) = (
        path for path in Datastore.open(folder).manifest.shards if path.startswith(SHARD.removesuffix(".safetensors"))
    )
    if other == "another store":
        strange = build_store(tmp_path / "strange", source("pool", 7), settings={"dtype": "float32"})
        delete_rows(strange, [(0, 0)])
        data = (strange / new).read_bytes()
    else:
        data = old[SHARD if other == "older edition" else SHARD.replace("0-0000000003", "3-0000000006")]
    (folder / new).write_bytes(data)
    entry = {"sha256": hashlib.sha256(data).hexdigest(), "num_bytes": len(data)}
    forge(folder, lambda doc: doc["shards"][new].update(entry))
    for use in (
        lambda opened: opened.rows(),
        lambda opened: features_of(opened),
        lambda opened: features_of(opened, verify=False),
    ):
        with pytest.raises(DamagedStoreError, match=r"it holds|other settings"):
            use(Datastore.open(folder))


@pytest.mark.parametrize("text", [b"", b"{", b"null", b"\xff\xfe", b"[" * 100_000, b"9" * 5000], ids=range(6))
def test_a_manifest_that_is_no_json_is_refused(folder, text):
    (folder / "manifest.json").write_bytes(text)
    with pytest.raises(DamagedStoreError, match=r"manifest.json is damaged"):
        Datastore.open(folder)


def test_a_manifest_that_is_a_folder_is_refused(folder):
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").mkdir()
    with pytest.raises(DamagedStoreError, match=r"manifest.json is damaged"):
        Datastore.open(folder)


def test_a_newer_version_is_refused_by_its_number(folder):
    forge(folder, lambda doc: doc.update(version=2, something_new=[]), seal=False)
    with pytest.raises(FormatVersionError, match=r"format version 2; this gradsift reads up to 1. Upgrade"):
        Datastore.open(folder)


def test_a_link_out_of_the_folder_is_refused(folder, tmp_path):
    (folder / SHARD).rename(tmp_path / "outside.safetensors")
    (folder / SHARD).symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(DamagedStoreError, match="it is a link out of the datastore"):
        Datastore.open(folder)


def test_a_link_to_the_folder_itself_is_fine(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    Datastore.open(tmp_path / "link").verify()


def test_a_store_has_one_path_by_whatever_name_it_is_reached(folder, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    paths = [Datastore.open(name).path for name in (folder, tmp_path / "link", ".", "../ds/.")]
    assert paths == [folder.resolve()] * len(paths)


def test_an_error_in_opening_has_the_name_that_was_given(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(StoreError, match=r"/link is not finished"):
        Datastore.open(tmp_path / "link")
    (folder / "build.json").unlink()
    with pytest.raises(StoreError, match=r"no datastore at .*/link:"):
        Datastore.open(tmp_path / "link")


def test_a_shard_that_contradicts_the_manifest_is_refused(folder, monkeypatch):
    """Even one with the right checksum: the manifest was forged to fit it."""

    def edit(doc):
        doc["features"]["adam"]["proj_dim"] = K + 1

    forge(folder, edit)
    with pytest.raises(DamagedStoreError, match=rf"its features are \(2, {K}\), expected \(2, {K + 1}\)"):
        features_of(Datastore.open(folder))


def test_a_store_can_be_moved(folder, tmp_path):
    shutil.move(folder, tmp_path / "moved")
    Datastore.open(tmp_path / "moved").verify()


def test_every_column_has_a_dtype():
    names = {*store.RowTable.__annotations__, *store.RowStats.__annotations__} - {"sources_N", "ids"}
    assert names == set(store.COLUMN_DTYPES)


# --- rows set aside


def build_listed(path, *sources, skip):
    """A store of before: rows that were set aside are listed one by one among the skipped."""
    with open_writer(path) as writer:
        for one in sources:
            writer.add_source(one)
        for key in writer.missing_shards():
            shard = make_shard(key, skip.get((key.checkpoint, key.source)))
            listed = [*shard.skipped, *(skipped_row(row, "prefilter") for row in shard.set_aside)]
            shard = replace(shard, skipped=sorted(listed, key=lambda row: row.row), set_aside={})
            writer.write_shard(key, shard)
        fill(writer)
        writer.seal()
    return path


@settings(max_examples=20, deadline=None)
@given(
    bad=st.dictionaries(
        st.tuples(st.sampled_from(["checkpoint-2", "checkpoint-10"]), st.integers(0, 1), st.integers(0, 8)),
        st.sampled_from(["not finite", "zero norm", "prefilter", "prefilter"]),
    )
)
def test_a_store_that_lists_the_rows_set_aside_one_by_one_says_the_same(tmp_path_factory, bad):
    folder, skip = tmp_path_factory.mktemp("ds"), {}
    for (checkpoint, number, row), reason in bad.items():
        skip.setdefault((checkpoint, number), {})[row] = reason
    sources = [source("pool", 9), source("more", 4)]
    new = Datastore.open(build_store(folder / "new", *sources, skip=skip))
    old = Datastore.open(build_listed(folder / "old", *sources, skip=skip))
    assert new.manifest.counts == old.manifest.counts
    assert (new.num_set_aside, new.skipped) == (old.num_set_aside, old.skipped)
    for name in ("sources_N", "rows_N", "digests_N"):
        np.testing.assert_array_equal(getattr(new.rows(), name), getattr(old.rows(), name))
    assert list(new.rows().ids) == list(old.rows().ids)
    np.testing.assert_array_equal(features_of(new), features_of(old))
    for ours, theirs in zip(new.manifest.ranges, old.manifest.ranges, strict=True):
        found = [[(row.row, row.id, row.reason) for row in one] for one in (new.left_out(ours), old.left_out(theirs))]
        assert found[0] == found[1]
    assert "set_aside" not in (folder / "old" / "manifest.json").read_text()


def test_what_the_first_shard_says_of_a_row_counts(tmp_path):
    skip = {
        ("checkpoint-2", 0): {0: "prefilter", 1: "zero norm", 5: "prefilter"},
        ("checkpoint-10", 0): {0: "not finite", 1: "prefilter", 2: "prefilter"},
    }
    opened = Datastore.open(build_store(tmp_path / "ds", source("pool", 7), skip=skip))
    assert opened.rows().rows_N.tolist() == [3, 4, 6]
    assert opened.manifest.counts["num_skipped"] == {"prefilter": 3, "zero norm": 1}
    assert ([(row.row, row.reason) for row in opened.skipped], opened.num_set_aside) == ([(1, "zero norm")], 3)
    first, second, third = map(opened.left_out, opened.manifest.ranges)
    assert [(row.row, row.where, row.id, row.reason) for row in first] == [
        (0, "pool[0]", "pool:0", "prefilter"), (1, "pool.jsonl:2", "pool:1", "zero norm"),
        (2, "pool[2]", "pool:2", "prefilter"),
    ]  # fmt: skip
    assert ([row.row for row in second], third) == ([5], [])


def test_a_row_set_aside_takes_a_few_bits_of_the_manifest(tmp_path):
    skip = {("checkpoint-2", 0): dict.fromkeys(range(0, 960, 1), "prefilter")}
    sizes = [
        (build_store(tmp_path / name, source("pool", 1000), skip=skip, shard_rows=500) / "manifest.json").stat().st_size
        for name, skip in (("all", {}), ("few", skip))
    ]
    assert sizes[0] < sizes[1] < sizes[0] + 960 * 3 / 8


def test_a_manifest_that_sets_aside_a_row_which_every_shard_has_is_told_by_its_label(folder):
    forge(folder, lambda doc: (doc["ranges"][0].update(set_aside="20"), doc.update(counts=counts_of(doc))))
    opened = Datastore.open(folder)
    assert opened.num_rows == 4
    with pytest.raises(DamagedStoreError, match=r"manifest\.json is damaged: it has the row 2 set aside, and no shard"):
        opened.left_out(opened.manifest.ranges[0])


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda rows: rows.update(set_aside="40"), r"its rows \[1\] from 0 on are both skipped and set aside"),
        (lambda rows: rows.update(set_aside="10"), "expected 2 hexadecimal digits"),
        (lambda rows: rows.update(set_aside="2000"), "expected 2 hexadecimal digits"),
        (lambda rows: rows.update(set_aside="2"), "expected 2 hexadecimal digits"),
        (lambda rows: rows.update(set_aside="00"), "expected 2 hexadecimal digits"),
        (lambda rows: rows.update(set_aside="A0"), "expected 2 hexadecimal digits"),
        (lambda rows: rows.update(set_aside="-1"), "expected 2 hexadecimal digits"),
        (lambda rows: rows.update(set_aside=""), "do not fit its content"),
        (lambda rows: rows.update(set_aside=[2]), "expected str"),
        (lambda rows: rows.update(set_aside=None), "expected str"),
    ],
    ids=range(10),
)
def test_forged_bits_are_refused(folder, edit, expected):
    forge(folder, lambda doc: edit(doc["ranges"][0]))
    with pytest.raises(DamagedStoreError, match=rf"manifest.json is damaged: .*{expected}"):
        Datastore.open(folder)


def test_a_deleted_row_that_is_set_aside_too_is_refused(folder):
    delete_rows(folder, [(0, 0)])
    forge(folder, lambda doc: doc["ranges"][0].update(set_aside="80"))
    with pytest.raises(DamagedStoreError, match="both skipped and set aside"):
        Datastore.open(folder)
