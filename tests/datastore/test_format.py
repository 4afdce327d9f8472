"""`FORMAT.md` is held to the byte: its example is built and compared."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_stores import build_store, open_writer, tree

from datastore import Datastore, Shard, SkippedRow, SourceEntry

TEXT = (Path(__file__).parents[2] / "datastore" / "FORMAT.md").read_text()
EXAMPLE = TEXT.split("## A store of three rows")[1]
BLOCKS = re.findall(r"```(?:json)?\n(.*?\n)```", EXAMPLE, re.DOTALL)
SHARD = "shards/adam/checkpoint-2/s0000-0000000000-0000000003.safetensors"
DIRECTION = "directions/adam/checkpoint-2.safetensors"


@pytest.fixture
def example(tmp_path):
    with open_writer(
        tmp_path / "ds",
        settings={"dtype": "float16", "model": "tiny"},
        environment={"torch": "2.13.0"},
        feature_sets=["adam"],
        checkpoints=["checkpoint-2"],
        shard_rows=4,
    ) as writer:
        writer.add_source(
            SourceEntry(name="pool", kind="jsonl", location="/data/pool.jsonl", sha256="ab" * 32, num_rows=3)
        )
        (key,) = writer.missing_shards()
        skipped = SkippedRow(row=1, where="pool.jsonl:2", id="pool:1", reason="not JSON", detail="column 1")
        shard = Shard(
            rows_N=np.array([0, 2]),
            ids=["a", "é"],
            digests_N=np.array([1, 2], np.uint64),
            features_NK=np.array([[1, 0], [0.6, 0.8]], np.float16),
            norms_N=np.array([2, 0.5], np.float32),
            grad_norms_N=np.array([3, 1], np.float32),
            update_norms_N=np.array([4, 1.5], np.float32),
            losses_N=np.array([0.25, 2], np.float32),
            num_tokens_N=np.array([9, 8], np.int32),
            num_supervised_N=np.array([4, 3], np.int32),
            truncated_N=np.array([False, True]),
            skipped=[skipped],
            notes={"oom_retries": 1},
        )
        writer.write_shard(key, shard)
        writer.write_direction("adam", "checkpoint-2", np.array([0.5, -0.5], np.float32))
        writer.seal()
    return tmp_path / "ds"


def test_the_example_has_the_bytes_of_its_description(example):
    build, header, tensors, manifest = BLOCKS
    files = tree(example)
    assert files.pop(".lock") == b""
    assert files.pop("build.json").decode() == build
    assert files.pop("manifest.json").decode() == manifest
    assert json.loads(manifest)["settings_hash"] in EXAMPLE.split("```")[0]

    data = bytes.fromhex("".join(line.split("#")[0] for line in tensors.splitlines()))
    length, padding = (
        re.search(r"begins with `(.+?)`", EXAMPLE)[1],
        re.search(r"padded with (\d) spaces", EXAMPLE)[1],
    )
    assert files.pop(SHARD) == bytes.fromhex(length) + header.strip().encode() + b" " * int(padding) + data

    num_bytes, data = re.search(r"header of (\d+) bytes and the data `(.+?)`", EXAMPLE).groups()
    direction = files.pop(DIRECTION)
    assert direction[:8] == int(num_bytes).to_bytes(8, "little")
    assert direction[8 + int(num_bytes) :] == bytes.fromhex(data)
    assert not files


def test_safetensors_alone_reads_a_shard(example):
    tensors = load_file(example / SHARD)
    assert tensors["rows_N"].tolist() == [0, 2]
    np.testing.assert_array_equal(tensors["features_NK"], np.array([[1, 0], [0.6, 0.8]], np.float16))


def test_the_example_reads_back(example):
    store = Datastore.open(example)
    assert (store.num_rows, store.proj_dim("adam"), store.rows().ids) == (2, 2, ["a", "é"])
    assert store.manifest.counts == {"num_rows": 3, "num_scored": 2, "num_skipped": {"not JSON": 1}}
    assert store.manifest.shards[SHARD].notes == {"oom_retries": 1}


def test_the_same_input_gives_the_same_bytes(tmp_path):
    assert tree(build_store(tmp_path / "a")) == tree(build_store(tmp_path / "b"))
