"""A store after a deletion: what is built, selected and compacted from it has nothing of the deleted rows."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from datastore import Datastore
from datastore.deletion import delete_rows, verify_deleted
from datastore.derive import convert_store, merge_stores
from datastore.errors import DataError, SettingError, StoreError
from less import build_datastore, build_embeddings, select
from less.compaction import compact
from less.data.sources import Arrow, Chunk

GONE = [(0, 3), (0, 17)]


def files_of(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.fixture
def build(tiny_model_folder, tiny_run):
    def build(pool, folder, **changes):
        settings = {"proj_dim": 64, "shard_rows": 8, "tokens_per_batch": 512} | changes
        return build_datastore(
            model=tiny_model_folder, checkpoints=tiny_run, data=pool, datastore=folder, progress=False, **settings
        )

    return build


@pytest.fixture
def deleted(tiny_store, tmp_path):
    """A copy of the tiny store without two rows."""
    path = Path(shutil.copytree(tiny_store, tmp_path / "ds"))
    delete_rows(path, GONE)
    return path


@pytest.fixture
def write(tmp_path):
    def write(name, rows):
        path = tmp_path / name
        path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
        return path

    return write


def without(rows, *numbers):
    return [row for number, row in enumerate(rows) if number not in numbers]


def test_a_build_computes_a_lost_shard_anew_without_the_deleted_row(build, tiny_pool, tiny_target_file, tmp_path):
    build(tiny_pool, tmp_path / "ds")
    delete_rows(tmp_path / "ds", GONE)
    before = Datastore.open(tmp_path / "ds")
    kept = before.rows()
    key = next(key for key in before.manifest.shard_keys() if key.deleted)
    features_NK = before.shard(key).features_NK.decode()
    (tmp_path / "ds" / key.path).unlink()
    build(tiny_pool, tmp_path / "ds")
    after = Datastore.open(tmp_path / "ds")
    assert list(after.rows().ids) == list(kept.ids)
    np.testing.assert_allclose(after.shard(key).features_NK.decode(), features_NK, atol=2e-2)
    assert not verify_deleted(tmp_path / "ds", labels=["row-3", "row-17"]).problems
    (chosen,) = select(
        datastore=tmp_path / "ds", targets=tiny_target_file, count=38, scores=tmp_path / "s.jsonl", progress=False
    )
    assert {record.id for record in chosen.records} == {f"row-{n}" for n in range(40)} - {"row-3", "row-17"}
    lines = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert [(line["row"], line["id"]) for line in lines if line.get("skipped") == "deleted"] == [(3, ""), (17, "")]


@pytest.mark.parametrize("when", ["before", "after"])
def test_embeddings_beside_the_store_have_no_deleted_row_whenever_they_are_made(
    tiny_store, tiny_target_file, tmp_path, when
):
    path = Path(shutil.copytree(tiny_store, tmp_path / "ds"))

    def by_embeddings():
        return select(datastore=path, targets=tiny_target_file, count=5, method="rds", progress=False)

    if when == "before":
        by_embeddings()
        assert Datastore.open(tmp_path / "ds.rds").num_rows == 40
    delete_rows(path, GONE)
    by_embeddings()
    rds = Datastore.open(tmp_path / "ds.rds")
    assert (rds.num_rows, rds.manifest.deleted) == (38, {"0": [3, 17]})
    assert not verify_deleted(path, labels=["row-3", "row-17"]).problems


def test_a_store_of_embeddings_forgets_rows_like_any_other(tiny_model_folder, tiny_pool, tmp_path):
    arguments = {"model": tiny_model_folder, "data": tiny_pool, "datastore": tmp_path / "rds", "progress": False}
    build_embeddings(**arguments)
    delete_rows(tmp_path / "rds", GONE)
    for file in (tmp_path / "rds").glob("shards/*/*/*.safetensors"):
        file.unlink()
    assert build_embeddings(**arguments).num_rows == 38
    assert not verify_deleted(tmp_path / "rds", labels=["row-3"]).problems


def test_a_prefilter_is_not_ranked_again_for_a_row_that_was_deleted(build, tiny_pool, tiny_target_file, tmp_path):
    options = {"prefilter": 0.5, "targets": tiny_target_file}
    build(tiny_pool, tmp_path / "ds", **options)
    row = Datastore.open(tmp_path / "ds").rows().rows_N[0]
    delete_rows(tmp_path / "ds", [(0, int(row))])
    assert not (tmp_path / "ds.prefilter").exists()
    assert build(tiny_pool, tmp_path / "ds", **options).num_computed == 0
    next((tmp_path / "ds").glob("shards/*/*/*.safetensors")).unlink()
    with pytest.raises(StoreError, match="rows were deleted from it, which its prefilter would rank again"):
        build(tiny_pool, tmp_path / "ds", **options)
    assert not (tmp_path / "ds.prefilter").exists()


def test_a_float32_store_converted_has_the_bytes_of_a_build_with_fewer_bits_and_grows(
    build, tiny_rows, write, tmp_path
):
    pool, more = write("pool.jsonl", tiny_rows[:12]), write("more.jsonl", tiny_rows[12:20])
    build(pool, tmp_path / "full", feature_dtype="float32")
    build(pool, tmp_path / "built", feature_dtype="int4")
    convert_store(Datastore.open(tmp_path / "full"), tmp_path / "small", feature_dtype="int4")
    assert files_of(tmp_path / "small") == files_of(tmp_path / "built")
    for name in ("small", "built"):
        assert build([pool, more], tmp_path / name, feature_dtype="int4").num_scored == 20
    assert files_of(tmp_path / "small") == files_of(tmp_path / "built")


def test_a_merged_store_has_the_bytes_of_one_build_and_grows(build, tiny_rows, write, tmp_path):
    pools = [write(f"pool{n}.jsonl", tiny_rows[10 * n : 10 * n + 10]) for n in range(3)]
    for number in range(2):
        build(pools[number], tmp_path / f"ds{number}")
    merge_stores(tmp_path / "all", [Datastore.open(tmp_path / f"ds{number}") for number in range(2)])
    build(pools[:2], tmp_path / "built")
    assert files_of(tmp_path / "all") == files_of(tmp_path / "built")
    assert build(pools, tmp_path / "all").num_computed == 2 * 10


# --- compact


def test_a_compacted_store_is_what_a_build_of_the_edited_pool_gives(
    build, tiny_rows, write, tiny_target_file, tmp_path
):
    bad = [{"id": "bare"}, "not json\n"]
    rows = [*tiny_rows[:10], *bad, *tiny_rows[10:20], {"messages": tiny_rows[0]["messages"]}]
    gone = [3, 10, 13]
    pool, edited = write("pool.jsonl", rows), write("edited.jsonl", without(rows, *gone))
    build(pool, tmp_path / "ds", feature_dtype="float32", tokens_per_batch=64)
    delete_rows(tmp_path / "ds", [(0, row) for row in gone])
    new = compact(datastore=tmp_path / "ds", output=tmp_path / "out", data=edited, progress=False)
    build(edited, tmp_path / "built", feature_dtype="float32", tokens_per_batch=64)
    other = Datastore.open(tmp_path / "built")
    assert list(new.rows().ids) == list(other.rows().ids)
    assert new.rows().ids[-1] == "edited:19"
    for name in ("rows_N", "digests_N", "num_tokens_N"):
        np.testing.assert_array_equal(getattr(new.rows(), name), getattr(other.rows(), name))
    assert new.skipped == other.skipped
    assert new.sources == other.sources
    assert new.manifest.settings_hash == other.manifest.settings_hash
    for ours, theirs in zip(
        new.iter_blocks("adam-sparse", new.checkpoints[0]),
        other.iter_blocks("adam-sparse", new.checkpoints[0]),
        strict=True,
    ):
        np.testing.assert_allclose(ours.features_nK, theirs.features_nK, atol=1e-4)
    pool.unlink()  # the edited pool is enough from here on
    (chosen,) = select(datastore=tmp_path / "out", targets=tiny_target_file, count=3, progress=False)
    assert len(chosen.records) == 3
    assert build(edited, tmp_path / "out", feature_dtype="float32", tokens_per_batch=64).num_computed == 0
    text = b"".join(files_of(tmp_path / "out").values())
    for trace in (b"row-3\\", b"row-11", b"pool", b"bare", b"deleted"):
        assert trace not in text, trace


def test_a_data_set_with_a_dot_in_its_name_is_compacted_though_a_skipped_row_has_no_id(build, tiny_rows, tmp_path):
    def pool(name, rows):
        table = pa.Table.from_pylist(rows)
        return Arrow(name, "dataset", None, [Chunk(num_rows=len(rows), load=lambda: table)])

    rows = [*tiny_rows[:5], {"id": None, "messages": None}, *tiny_rows[5:8]]
    build([pool("org/pool-1.0", rows)], tmp_path / "ds")
    assert [row.id for row in Datastore.open(tmp_path / "ds").skipped] == ["pool-1.0:5"]
    delete_rows(tmp_path / "ds", [(0, 2)])
    edited = pool("org/pool-1.1", without(rows, 2))
    new = compact(datastore=tmp_path / "ds", output=tmp_path / "out", data=[edited], progress=False)
    assert new.num_rows == 7
    assert [row.id for row in new.skipped] == ["pool-1.1:4"]


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda rows: without(rows, 3), r"has 39 rows, expected 38: the 40 of pool.jsonl without the 2"),
        (lambda rows: without(rows, 3, 18), r"edited.jsonl:17 is not row 18 of pool.jsonl"),
        (lambda rows: [rows[1], rows[0], *without(rows, 0, 1, 3, 17)], r"edited.jsonl:1 is not row 0"),
        (lambda rows: [*without(rows, 3, 17, 39), {"id": "row-39"}], r"edited.jsonl:38 is not row 39"),
        (lambda rows: [{**row, "messages": row["messages"][:1]} for row in without(rows, 3, 17)], "is not row 0"),
    ],
    ids=range(5),
)
def test_a_file_that_is_not_the_pool_without_the_deleted_rows_is_refused(
    deleted, tiny_rows, write, tmp_path, edit, expected
):
    with pytest.raises(DataError, match=expected):
        compact(datastore=deleted, output=tmp_path / "out", data=write("edited.jsonl", edit(tiny_rows)), progress=False)
    assert not (tmp_path / "out").exists()


def test_as_many_files_as_sources_that_lost_rows(deleted, tiny_pool, tiny_rows, write, tmp_path):
    files = [write("one.jsonl", tiny_rows[:2]), write("two.jsonl", tiny_rows[:3])]
    with pytest.raises(SettingError, match=r"2 files are given, expected one for each source .*: pool.jsonl"):
        compact(datastore=deleted, output=tmp_path / "out", data=files, progress=False)
    with pytest.raises(SettingError, match="with --data"):
        compact(datastore=deleted, output=tmp_path / "out", progress=False)
