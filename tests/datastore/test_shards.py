"""A shard comes back as it was written, and nothing else is taken for one."""

import json
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from tiny_stores import K, make_shard, skipped_row

from datastore import ShardKey
from datastore.coding import encode
from datastore.errors import DamagedStoreError
from datastore.files import open_tensors
from datastore.shards import (
    bits_of,
    drop_rows,
    open_direction,
    open_shard,
    rows_of,
    set_rows_aside,
    write_direction,
    write_shard,
)

HASH = "5e" * 32


def key_of(start=0, stop=4, **changes):
    fixed = {"feature_set": "adam", "checkpoint": "checkpoint-2", "source": 0, "start": start, "stop": stop}
    return ShardKey(**{**fixed, **changes})


@pytest.fixture
def written(tmp_path):
    key = key_of()
    write_shard(tmp_path, key, HASH, make_shard(key, {1: "not finite"}))
    return tmp_path / key.path


def assert_same(ours, theirs):
    for item in fields(ours):
        a, b = getattr(ours, item.name), getattr(theirs, item.name)
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
        else:
            assert a == b


@settings(max_examples=25, deadline=None)
@given(
    skip=st.sets(st.integers(0, 8)),
    set_aside=st.sets(st.integers(0, 8)),
    labels=st.lists(st.text(), min_size=9, max_size=9),
    dtype=st.sampled_from([np.float16, np.float32]),
    notes=st.dictionaries(st.text(), st.integers() | st.text()),
)
def test_a_shard_comes_back_as_it_was_written(tmp_path_factory, skip, set_aside, labels, dtype, notes):
    folder, key = tmp_path_factory.mktemp("shard"), key_of(stop=9)
    shard = make_shard(key, dict.fromkeys(skip, "not finite"), dtype)
    shard = set_rows_aside(replace(shard, ids=labels[: len(shard.ids)], notes=notes), set_aside)
    assert shard.set_aside.keys() == set_aside - skip
    entry = write_shard(folder, key, HASH, shard)
    assert_same(open_shard(folder, key, HASH, entry.sha256), shard)
    first = (folder / key.path).read_bytes()
    assert write_shard(folder, key, HASH, shard) == entry
    assert (folder / key.path).read_bytes() == first


def test_a_label_that_is_no_valid_text_comes_back(tmp_path):
    key = key_of(stop=1)
    write_shard(tmp_path, key, HASH, replace(make_shard(key), ids=["\ud800"]))
    assert open_shard(tmp_path, key, HASH).ids == ["\ud800"]


def test_features_are_a_view_of_the_file_and_cannot_alter_it(written):
    before = written.read_bytes()
    features_NK = open_shard(written.parents[3], key_of(), HASH).features_NK
    assert isinstance(features_NK, np.memmap)
    features_NK[:] = 0
    assert written.read_bytes() == before


@pytest.mark.parametrize(
    "change",
    [
        {"losses_N": np.array([1, np.nan, 1], np.float32)},
        {"features_NK": np.full((3, K), np.inf, np.float16)},
        {"features_NK": np.zeros((3, K), np.float64)},
        {"features_NK": np.zeros((3, 0), np.float16)},
        {"features_NK": np.zeros(3, np.float16)},
        {"norms_N": np.ones(2, np.float32)},
        {"rows_N": np.array([2, 0, 3])},
        {"rows_N": np.array([0, 2, 2])},
        {"rows_N": np.array([0, 2, 4])},
        {"ids": ["a", "b"]},
        {"skipped": []},
        {"skipped": [skipped_row(1), skipped_row(1)]},
        {"set_aside": {0: "id-0"}},
        {"set_aside": {1: "pool:1"}},
        {"set_aside": {4: "id-4"}},
        {"set_aside": {-1: "id-3"}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_shard_that_does_not_fit_its_key_is_not_written(tmp_path, change):
    key = key_of()
    with pytest.raises(ValueError, match=r"shard shards/adam"):
        write_shard(tmp_path, key, HASH, replace(make_shard(key, {1: "not finite"}), **change))
    assert not list(tmp_path.iterdir())


def refused(path, **changes):
    with pytest.raises(DamagedStoreError) as caught:
        open_shard(path.parents[3], key_of(), HASH, **changes)
    message = str(caught.value)
    assert str(path) in message
    assert "rerun the same `gradsift build-datastore` command" in message
    return message


@pytest.mark.parametrize("keep", [0, 5, 8, 100, -1])
def test_a_truncated_file_is_refused(written, keep):
    written.write_bytes(written.read_bytes()[:keep])
    refused(written)


def test_bytes_after_the_end_are_refused(written):
    written.write_bytes(written.read_bytes() + b"\0")
    refused(written)


def test_a_missing_file_is_refused(written):
    written.unlink()
    assert "it is missing" in refused(written)


def test_an_altered_byte_is_refused_where_the_checksum_is_known(written):
    data = bytearray(written.read_bytes())
    data[-4] ^= 1
    written.write_bytes(data)
    assert "checksum" in refused(written, sha256="00" * 32)


def edited(value, edit):
    """What `edit` makes of a value: a list in its place, or the value it changed."""
    new = edit(value)
    return new if isinstance(new, list) else value


def rewrite_header(path, edit):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    text = json.dumps(edited(header, edit)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def rewrite_metadata(path, edit):
    def edit_header(header):
        metadata = json.loads(header["__metadata__"]["gradsift"])
        header["__metadata__"]["gradsift"] = json.dumps(edited(metadata, edit))

    rewrite_header(path, edit_header)


@pytest.mark.parametrize(
    "edit",
    [
        lambda header: header["features_NK"].update(shape=[5, 3]),
        lambda header: header["features_NK"].update(shape=[15]),
        lambda header: header["features_NK"].update(shape=[3, 1, 5]),
        lambda header: header["features_NK"].update(shape=[3, 2**62]),
        lambda header: header["features_NK"].update(data_offsets=[0, 2**63]),
        lambda header: header["rows_N"].update(data_offsets=[8, 32]),
        lambda header: header["rows_N"].update(dtype="F64"),
        lambda header: header["rows_N"].update(dtype="U64"),
        lambda header: header["norms_N"].update(dtype="I32"),
        lambda header: header["norms_N"].update(dtype="F999"),
        lambda header: header.update(extra=header.pop("norms_N")),
        lambda header: header.pop("truncated_N"),
        lambda header: header.pop("__metadata__"),
        lambda header: header.update(__metadata__={"other": "{}"}),
        lambda header: header.update(__metadata__={"gradsift": "{"}),
        lambda header: header.update(__metadata__={"gradsift": "[" * 100_000}),
        lambda header: ["not", "an", "object"],
    ],
)
def test_a_hostile_header_is_refused(written, edit):
    rewrite_header(written, edit)
    refused(written)


@pytest.mark.parametrize(
    "edit",
    [
        lambda metadata: metadata.pop("ids"),
        lambda metadata: metadata.update(ids=["a", "b", 3]),
        lambda metadata: metadata.update(ids="abc"),
        lambda metadata: metadata.update(notes=[]),
        lambda metadata: metadata.update(notes="text"),
        lambda metadata: metadata.update(extra=1),
        lambda metadata: metadata["skipped"][0].update(row=2),
        lambda metadata: metadata["skipped"][0].update(row="1"),
        lambda metadata: metadata["skipped"][0].update(row=True),
        lambda metadata: metadata["skipped"][0].pop("reason"),
        lambda metadata: metadata["key"].update(start=1),
        lambda metadata: metadata["key"].update(checkpoint="checkpoint-3"),
        lambda metadata: metadata.update(settings_hash="00"),
        lambda metadata: [],
    ],
)
def test_metadata_of_another_shard_or_of_none_are_refused(written, edit):
    rewrite_metadata(written, edit)
    refused(written)


@pytest.mark.parametrize(
    "edit",
    [
        lambda metadata: metadata.update(set_aside="60"),
        lambda metadata: metadata.update(set_aside="10"),
        lambda metadata: metadata.update(set_aside="28"),
        lambda metadata: metadata.update(set_aside="2000"),
        lambda metadata: metadata.update(set_aside=32),
        lambda metadata: metadata.pop("set_aside"),
        lambda metadata: metadata.update(set_aside_ids=[]),
        lambda metadata: metadata.update(set_aside_ids=["a", "b"]),
        lambda metadata: metadata.update(set_aside_ids=[1]),
        lambda metadata: metadata.pop("set_aside_ids"),
    ],
    ids=range(10),
)
def test_metadata_that_set_aside_other_rows_than_are_left_are_refused(tmp_path, edit):
    key = key_of()
    write_shard(tmp_path, key, HASH, make_shard(key, {1: "not finite", 2: "prefilter"}))
    assert open_shard(tmp_path, key, HASH).set_aside == {2: "pool:2"}
    rewrite_metadata(tmp_path / key.path, edit)
    refused(tmp_path / key.path)


@given(rows=st.sets(st.integers(0, 40)), start=st.sampled_from([0, 7, 10**12]), more=st.integers(1, 20))
def test_rows_come_back_from_their_bits(rows, start, more):
    rows = {start + row for row in rows}
    stop = max(rows, default=start) + more
    bits = bits_of(rows, start, stop)
    assert len(bits) in (0, 2 * -(-(stop - start) // 8))
    assert rows_of(bits, start, stop) == sorted(rows)
    assert bool(bits) == bool(rows)


def test_the_first_row_of_a_range_is_the_highest_bit():
    assert bits_of([16], 16, 25) == "8000"
    assert bits_of([24, 23], 16, 25) == "0180"


@pytest.mark.parametrize(
    "bits", ["0000", "8", "80", "800000", "8040", "80 0", "zz00", "0x80", "ÿ000", "8O00", " 8000", "AB00"]
)
def test_bits_that_no_rows_have_are_refused(bits):
    with pytest.raises(ValueError, match=r"expected 4 hexadecimal digits, .* rows from 16 to 25 and for no other"):
        rows_of(bits, 16, 25)


def test_a_row_that_was_set_aside_can_be_dropped(tmp_path):
    shard = make_shard(key_of(), {1: "prefilter", 2: "prefilter"})
    dropped = drop_rows(shard, [skipped_row(2, "deleted")])
    assert (dropped.set_aside, [row.row for row in dropped.skipped]) == ({1: "pool:1"}, [2])
    write_shard(tmp_path, key_of(deleted=(2,)), HASH, dropped)


def test_a_header_that_claims_to_be_huge_is_refused(written):
    written.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    refused(written)


def test_a_file_of_safetensors_that_is_no_shard_is_refused(written):
    save_file({"weight": np.zeros((2, 2), np.float32)}, written)
    assert "its header has no or an unknown '__metadata__'" in refused(written)


def test_a_direction_comes_back_and_is_bound_to_its_place(tmp_path):
    direction_K = np.arange(K, dtype=np.float32)
    entry = write_direction(tmp_path, "adam", "checkpoint-2", HASH, direction_K)
    np.testing.assert_array_equal(open_direction(tmp_path, "adam", "checkpoint-2", HASH, entry.sha256), direction_K)
    (tmp_path / "directions/adam/checkpoint-2.safetensors").rename(
        tmp_path / "directions/adam/checkpoint-3.safetensors"
    )
    with pytest.raises(DamagedStoreError, match="checkpoint-3"):
        open_direction(tmp_path, "adam", "checkpoint-3", HASH)
    for bad in (direction_K.astype(np.float64), direction_K[None], direction_K * np.nan):
        with pytest.raises(ValueError, match="direction_K"):
            write_direction(tmp_path, "adam", "checkpoint-2", HASH, bad)


@settings(max_examples=60, deadline=None)
@given(at=st.integers(0, 1200), value=st.integers(0, 255))
def test_no_single_altered_byte_does_more_than_an_error(tmp_path_factory, at, value):
    folder, key = tmp_path_factory.mktemp("shard"), key_of()
    write_shard(folder, key, HASH, make_shard(key))
    data = bytearray((folder / key.path).read_bytes())
    data[at % len(data)] = value
    (folder / key.path).write_bytes(data)
    try:
        open_shard(folder, key, HASH)
        open_tensors(folder / key.path)
    except DamagedStoreError:
        pass


class TestOfFewBits:
    @pytest.fixture(params=["int8", "int4", "binary"])
    def coded(self, request, tmp_path):
        features_NK = np.random.default_rng(0).standard_normal((3, 16)).astype(np.float32)
        features_NK /= np.linalg.norm(features_NK, axis=1)[:, None]
        shard = replace(make_shard(key_of(stop=3)), features_NK=encode(features_NK, request.param))
        write_shard(tmp_path, key_of(stop=3), HASH, shard)
        return tmp_path / key_of(stop=3).path, shard

    def test_features_come_back_as_they_were(self, coded):
        file, shard = coded
        found = open_shard(file.parents[3], key_of(stop=3), HASH).features_NK
        assert found.dtype == shard.features_NK.dtype
        assert isinstance(found.codes_NX, np.memmap)
        assert np.array_equal(found.decode(), shard.features_NK.decode())

    @pytest.mark.parametrize("scale", [np.nan, np.inf])
    def test_a_scale_that_is_not_finite_is_refused(self, coded, tmp_path, scale):
        _, shard = coded
        features = replace(shard.features_NK, scales_N=np.full(3, scale, np.float32))
        with pytest.raises(ValueError, match="not finite"):
            write_shard(tmp_path, key_of(stop=3), HASH, replace(shard, features_NK=features))

    @pytest.mark.parametrize(
        "alter",
        [
            lambda header: header.pop("scales_N"),
            lambda header: header["scales_N"].update(dtype="I32"),
            lambda header: header.update(features_NK=header["scales_N"]),
        ],
    )
    def test_codes_without_their_scales_are_damage(self, coded, alter):
        file, _ = coded
        rewrite_header(file, alter)
        with pytest.raises(DamagedStoreError):
            open_shard(file.parents[3], key_of(stop=3), HASH)
