"""`FORMAT.md` is held to the byte: its example is built and compared."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_stores import build_store, make_shard, open_writer, tree

from datastore import Datastore, Shard, ShardKey, SkippedRow, SourceEntry
from datastore.coding import encode
from datastore.deletion import delete_rows
from datastore.files import open_tensors
from datastore.shards import set_rows_aside, write_shard

TEXT = (Path(__file__).parents[2] / "datastore" / "FORMAT.md").read_text()
EXAMPLE, SET_ASIDE, DELETION = re.split("## Row 2 of it .*", TEXT.split("## A store of three rows")[1])
BLOCKS = re.findall(r"```(?:json)?\n(.*?\n)```", EXAMPLE, re.DOTALL)
SHARD = "shards/adam/checkpoint-2/s0000-0000000000-0000000003.safetensors"
KEY = ShardKey(feature_set="adam", checkpoint="checkpoint-2", source=0, start=0, stop=1)
DIRECTION = "directions/adam/checkpoint-2.safetensors"


@pytest.fixture
def example(tmp_path):
    return build_example(tmp_path / "ds")


def build_example(path, set_aside=()):
    with open_writer(
        path,
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
        writer.write_shard(key, set_rows_aside(shard, set_aside))
        writer.write_direction("adam", "checkpoint-2", np.array([0.5, -0.5], np.float32))
        writer.seal()
    return path


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


def test_rows_set_aside_are_said_to_be_as_in_their_description(example, tmp_path):
    plain, found = tree(example), tree(build_example(tmp_path / "aside", [2]))
    assert plain.keys() == found.keys()
    assert {name for name in plain if plain[name] != found[name]} == {SHARD, "manifest.json"}
    of_range, counts, ids, of_shard = (
        json.loads(text if text[0] in "[{" else f"{{{text}}}")
        for text in re.findall(r"`([\"{\[][^`]+[\"}\]])`", SET_ASIDE)
    )
    before, after = (json.loads(files["manifest.json"]) for files in (plain, found))
    assert after["ranges"] == [before["ranges"][0] | of_range]
    assert after["counts"] == counts
    (before, _), (after, tensors) = (open_tensors(path / SHARD) for path in (example, tmp_path / "aside"))
    assert after == before | {"ids": ids} | of_shard
    assert tensors["rows_N"].tolist() == [0]


def test_a_deletion_has_the_names_of_its_description(example):
    before = tree(example)
    delete_rows(example, [(0, 2)])
    after = tree(example)
    (shard,) = re.findall(r"`(shards/\S+)`", DELETION)
    assert after.keys() - before.keys() == {shard}
    assert before.keys() - after.keys() == {SHARD}
    deleted, edition, entry = re.findall(r"`(\"[^`]+|\{[^`]+\})`", DELETION)
    metadata, tensors = open_tensors(example / shard)
    assert metadata["key"].items() > json.loads(f"{{{edition}}}").items()
    assert metadata["skipped"][1] == json.loads(entry)
    assert (metadata["ids"], tensors["rows_N"].tolist()) == (["a"], [0])
    for name in ("build.json", "manifest.json"):
        assert json.loads(after[name]).items() > json.loads(f"{{{deleted}}}").items()


def test_features_in_few_bits_have_the_bytes_of_their_description(tmp_path):
    section = TEXT.split("## Features in few bits")[1].split("## ")[0]
    row = [
        float(number.replace("−", "-")) for number in re.search(r"^\((.+?)\) is", section, re.MULTILINE)[1].split(",")
    ]
    lines = re.search(r"```\n(.*?)\n```", section, re.DOTALL)[1].splitlines()
    scales = re.search(r"with the scales (.+?)\.\n", section)[1].split(", ")
    features_NK = np.array([row]) / np.linalg.norm(row)
    assert len(lines) == 3
    for dtype, line, scale in zip(("int8", "int4", "binary"), lines, scales, strict=True):
        data, name = line.split("  # ")
        coded = encode(features_NK.astype(np.float32), dtype)
        shard = replace(make_shard(KEY), features_NK=coded)
        write_shard(tmp_path, KEY, "0" * 64, shard)
        tensors = load_file(tmp_path / KEY.path)
        assert tensors[name].tobytes().hex(" ") == data
        assert tensors["scales_N"][0] == pytest.approx(float(scale), abs=1e-6)
        assert "features_NK" not in tensors


def test_safetensors_alone_reads_a_shard(example):
    tensors = load_file(example / SHARD)
    assert tensors["rows_N"].tolist() == [0, 2]
    np.testing.assert_array_equal(tensors["features_NK"], np.array([[1, 0], [0.6, 0.8]], np.float16))


def test_the_example_reads_back(example):
    store = Datastore.open(example)
    assert (store.num_rows, store.proj_dim("adam"), [*store.rows().ids]) == (2, 2, ["a", "é"])
    assert store.manifest.counts == {"num_rows": 3, "num_scored": 2, "num_skipped": {"not JSON": 1}}
    assert store.manifest.shards[SHARD].notes == {"oom_retries": 1}


def test_the_same_input_gives_the_same_bytes(tmp_path):
    assert tree(build_store(tmp_path / "a")) == tree(build_store(tmp_path / "b"))
