"""Building a store: what decides its features, what does not, and what happens when something goes wrong."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch

from datastore import Datastore
from datastore.coding import as_float32, encode
from datastore.errors import (
    CheckpointError,
    DataError,
    DiskFullError,
    ModelError,
    OptimizerStateError,
    ProvenanceError,
    RowError,
    SettingError,
    StoreError,
    StoreLockedError,
)
from less import BuildConfig
from less.models import load_base_model, load_tokenizer

NAME = "adam-sparse"


@pytest.fixture(autouse=True)
def no_power_cut(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def rows(tiny_rows):
    return tiny_rows[:18]


def write_lines(path: Path, lines) -> Path:
    """Rows as JSON; text as it is."""
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def pool(tmp_path_factory, rows):
    return write_lines(tmp_path_factory.mktemp("data") / "pool.jsonl", rows)


@pytest.fixture(scope="module")
def reference(tmp_path_factory, build, pool):
    """A finished store; no test may write to it."""
    folder = tmp_path_factory.mktemp("reference") / "ds"
    build(folder, pool)
    return folder


def tree(folder, but=(".lock",)):
    files = (file for file in Path(folder).rglob("*") if file.is_file() and file.name not in but)
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def shards(folder):
    return {name: content for name, content in tree(folder).items() if name.endswith(".safetensors")}


def features(folder, name=NAME):
    """φ, not normalised, of every row by checkpoint and id."""
    store = Datastore.open(folder)
    ids, found = store.rows().ids, {}
    for checkpoint in store.checkpoints:
        for block in store.iter_blocks(name, checkpoint):
            vectors_nK = np.asarray(block.features_nK, np.float64) * block.norms_n[:, None]
            found.update(zip(((checkpoint, i) for i in ids[block.start : block.stop]), vectors_nK, strict=True))
    return found


def assert_close(found, expected, bound=2e-5):
    assert found.keys() == expected.keys()
    errors = {key: np.linalg.norm(found[key] - phi) / np.linalg.norm(phi) for key, phi in expected.items()}
    assert max(errors.values()) < bound, max(errors, key=errors.get)


class TestFeaturesDoNotDependOn:
    @pytest.mark.parametrize("shard_rows", [1, 7, 1000])
    def test_the_shard_size(self, build, pool, reference, tmp_path, shard_rows):
        build(tmp_path / "ds", pool, shard_rows=shard_rows)
        assert_close(features(tmp_path / "ds"), features(reference))

    @pytest.mark.parametrize("tokens_per_batch", [1, 100, 10_000])
    def test_the_batch_size(self, build, pool, reference, tmp_path, tokens_per_batch):
        build(tmp_path / "ds", pool, tokens_per_batch=tokens_per_batch)
        assert_close(features(tmp_path / "ds"), features(reference))

    def test_the_order_of_the_rows(self, build, rows, reference, tmp_path):
        shuffled = [rows[n] for n in np.random.default_rng(0).permutation(len(rows))]
        build(tmp_path / "ds", shuffled)
        assert list(Datastore.open(tmp_path / "ds").rows().ids) == [row["id"] for row in shuffled]
        assert_close(features(tmp_path / "ds"), features(reference))

    def test_skipped_rows_beside_them(self, build, rows, reference, tmp_path):
        data = write_lines(tmp_path / "p.jsonl", ["{", *rows[:3], {"messages": []}, *rows[3:], "[]"])
        build(tmp_path / "ds", data)
        assert_close(features(tmp_path / "ds"), features(reference))

    def test_where_the_data_come_from(self, build, rows, reference, tmp_path):
        import datasets

        for number, data in enumerate((rows, tuple(rows), datasets.Dataset.from_list(rows))):
            build(tmp_path / f"{number}", data)
            assert shards(tmp_path / f"{number}").keys() == shards(reference).keys()
            assert_close(features(tmp_path / f"{number}"), features(reference), bound=1e-12)

    def test_parquet_or_json_lines(self, build, rows, reference, tmp_path):
        import datasets

        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "p.parquet")
        build(tmp_path / "ds", tmp_path / "p.parquet")
        assert_close(features(tmp_path / "ds"), features(reference), bound=1e-12)

    def test_the_model_being_loaded_already(self, build, pool, reference, tmp_path, tiny_model, tiny_tokenizer):
        build(tmp_path / "ds", pool, model=tiny_model, tokenizer=tiny_tokenizer)
        assert shards(tmp_path / "ds") == shards(reference)

    def test_the_other_feature_sets_of_the_build(self, build, pool, tmp_path):
        rules, kinds = ["adam", "sgd", "sign"], ["sparse", "rademacher", "none"]
        build(tmp_path / "all", pool, update_rule=rules, projection=kinds)
        together = Datastore.open(tmp_path / "all")
        assert len(together.feature_sets) == 9
        for rule, kind in (("adam", "sparse"), ("adam", "none"), ("sgd", "rademacher"), ("sign", "sparse")):
            build(tmp_path / "one", pool, update_rule=rule, projection=kind)
            (name,) = Datastore.open(tmp_path / "one").feature_sets
            assert name in together.feature_sets
            assert_close(features(tmp_path / "all", name), features(tmp_path / "one", name), bound=1e-12)
            for checkpoint in together.checkpoints:
                alone_K = Datastore.open(tmp_path / "one").direction(name, checkpoint)
                assert np.array_equal(together.direction(name, checkpoint), alone_K)
            shutil.rmtree(tmp_path / "one")


def test_two_identical_builds_give_identical_files(build, pool, reference, tmp_path):
    build(tmp_path / "ds", pool)
    assert tree(tmp_path / "ds") == tree(reference)


def test_what_is_stored_of_a_row(build, pool, rows, reference, tmp_path, tiny_tokenizer):
    store = Datastore.open(reference)
    table = store.rows()
    assert list(table.ids) == [row["id"] for row in rows]
    assert table.rows_N.tolist() == list(range(len(rows)))
    for row, num_tokens, num_supervised in zip(rows, table.num_tokens_N, table.num_supervised_N, strict=True):
        text = tiny_tokenizer.apply_chat_template(row["messages"], tokenize=False)
        assert num_tokens == len(text.encode()) - text.count("</s>") * (len("</s>") - 1)
        assert num_supervised == len(row["messages"][1]["content"]) + 1  # bytes, and the end of the turn
    assert not table.truncated_N.any()
    build(tmp_path / "none", pool, projection="none", max_length=45)
    none = Datastore.open(tmp_path / "none")
    stats = none.stats("adam-none", none.checkpoints[0])
    assert np.allclose(stats.norms_N, stats.update_norms_N, rtol=1e-5)
    assert (stats.losses_N > 0).all()
    table = none.rows()
    assert table.truncated_N.any()
    assert (table.num_tokens_N[table.truncated_N] == 45).all()
    assert none.num_rows + len(none.skipped) == len(rows)


@pytest.mark.parametrize(("kind", "dtype"), [("none", "float32"), ("sparse", "int8")])
def test_stored_numbers_are_of_eight_bits_but_for_checking(build, rows, tmp_path, kind, dtype):
    build(tmp_path / "ds", rows[:2], projection=kind, feature_dtype="auto")
    manifest = json.loads((tmp_path / "ds" / "manifest.json").read_text())
    assert [entry["dtype"] for entry in manifest["features"].values()] == [dtype]


@pytest.mark.parametrize("dtype", ["float16", "int8", "int4", "binary"])
def test_a_build_stores_what_the_codec_makes_of_its_features(build, rows, tmp_path, dtype):
    for name in ("float32", dtype):
        build(tmp_path / name, rows[:6], feature_dtype=name)
    whole, coded = (Datastore.open(tmp_path / name) for name in ("float32", dtype))
    (name,), (checkpoint, *_) = whole.feature_sets, whole.checkpoints
    blocks = zip(whole.iter_blocks(name, checkpoint), coded.iter_blocks(name, checkpoint), strict=True)
    for block, found in blocks:
        expected_nK = as_float32(encode(block.features_nK, dtype))
        assert np.allclose(as_float32(found.features_nK), expected_nK, rtol=1e-3, atol=1e-6)


class TestSecondRun:
    def test_of_a_finished_build_does_nothing(self, build, pool, reference):
        def state():
            return {file: file.stat().st_mtime_ns for file in reference.rglob("*.*") if file.name != ".lock"}

        before = state()
        result = build(reference, pool)
        assert state() == before
        assert (result.num_computed, result.num_scored, result.num_rows) == (0, 18, 18)

    def test_needs_no_model_time_for_what_is_there(self, build, pool, reference, monkeypatch):
        def fail(*_, **__):
            raise AssertionError("a backward pass")

        monkeypatch.setattr("less.gradients.token_losses", fail)
        assert build(reference, pool).num_computed == 0

    @pytest.mark.parametrize(
        ("changes", "messages"),
        [
            ({"max_length": 99}, [r"rendering\.max_length is 256 in the store and 99 in this command"]),
            ({"system_prompt": "none"}, [r'rendering\.system_prompt is "keep" in the store and "none"']),
            ({"seed": 5}, [r"projection\.seed is 0 in the store and 5"]),
            ({"tokens_per_batch": 300}, ["tokens_per_batch is 256 in the store and 300"]),
            ({"shard_rows": 9}, ["shard_rows is 8 in the store and 9"]),
            ({"feature_dtype": "float16"}, [r'dtype is "float32" in the store and "float16"']),
            ({"dtype": "bfloat16"}, [r'model\.dtype is "float32" in the store and "bfloat16"']),
            ({"chat_template": "chatml"}, [r"rendering\.template_sha256 is "]),
            ({"checkpoint_weights": [0.5, 0.5]}, [r"weight is 0\.\d+ in the store and 0\.5"]),
            ({"update_rule": "sgd"}, ['"adam-sparse" in the store and "sgd-sparse"']),
            ({"proj_dim": 32}, [r"feature_sets\.adam-sparse\.projection\.proj_dim is 64 in the store and 32"]),
            (
                {"max_length": 99, "seed": 5},
                [r"max_length is 256 in the store and 99", "seed is 0 in the store and 5"],
            ),
        ],
    )
    def test_with_other_settings_is_refused_naming_each_with_both_values(
        self, build, pool, reference, changes, messages
    ):
        before = tree(reference)
        for message in messages:
            with pytest.raises(ProvenanceError, match=message):
                build(reference, pool, **changes)
        assert tree(reference) == before

    def test_with_another_model_or_checkpoint_is_refused(self, build, pool, reference, tiny_model, tiny_run):
        with torch.no_grad():
            tiny_model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
        with pytest.raises(ProvenanceError, match=r"model\.fingerprint is .* in the store and "):
            build(reference, pool, model=tiny_model)
        with pytest.raises(ProvenanceError, match="checkpoints"):
            build(reference, pool, checkpoints=sorted(tiny_run.glob("checkpoint-*"))[-1])

    def test_after_the_source_changed_is_refused(self, build, rows, tmp_path):
        data = write_lines(tmp_path / "p.jsonl", rows[:4])
        build(tmp_path / "ds", data)
        before = tree(tmp_path / "ds")
        write_lines(data, rows[:5])
        with pytest.raises(ProvenanceError, match=r"p\.jsonl has changed since"):
            build(tmp_path / "ds", data)
        assert tree(tmp_path / "ds") == before

    def test_from_another_place_with_the_same_content_is_the_same(self, build, rows, tmp_path):
        build(tmp_path / "ds", write_lines(tmp_path / "p.jsonl", rows[:4]))
        assert build(tmp_path / "ds", write_lines(tmp_path / "copy.jsonl", rows[:4])).num_computed == 0


class TestAppending:
    @pytest.fixture
    def old(self, tmp_path, rows):
        return write_lines(tmp_path / "old.jsonl", rows[:10])

    @pytest.fixture
    def new(self, tmp_path, rows):
        return write_lines(tmp_path / "new.jsonl", rows[10:])

    @pytest.mark.parametrize("name_the_old", [True, False])
    def test_computes_the_new_rows_only(self, build, old, new, tmp_path, name_the_old):
        build(tmp_path / "ds", old)
        before = shards(tmp_path / "ds")
        result = build(tmp_path / "ds", [old, new] if name_the_old else new)
        assert (result.num_computed, result.num_rows, result.num_scored) == (8 * 2, 18, 18)
        after = shards(tmp_path / "ds")
        assert before.items() <= after.items()
        build(tmp_path / "whole", [old, new])
        assert tree(tmp_path / "whole") == tree(tmp_path / "ds")
        for data in (old, new, [old, new], [new, old]):
            assert build(tmp_path / "ds", data).num_computed == 0

    def test_that_stops_half_way_leaves_the_old_store_readable(self, build, old, new, tmp_path):
        build(tmp_path / "ds", old)
        ids = list(Datastore.open(tmp_path / "ds").rows().ids)
        new.write_text(new.read_text() + "{\n")
        with pytest.raises(RowError):
            build(tmp_path / "ds", new, strict=True, shard_rows=8)
        assert list(Datastore.open(tmp_path / "ds").rows().ids) == ids
        result = build(tmp_path / "ds", [old, new])
        assert (result.num_rows, result.num_scored) == (19, 18)

    def test_the_same_content_twice_is_refused(self, build, old, tmp_path, rows):
        copy = write_lines(tmp_path / "copy.jsonl", rows[:10])
        with pytest.raises(DataError, match=r"old\.jsonl and copy\.jsonl have the same content"):
            build(tmp_path / "ds", [old, copy])

    def test_a_refused_command_leaves_no_trace_that_blocks_the_right_one(self, build, old, new, tmp_path, rows):
        build(tmp_path / "ds", old)
        (tmp_path / "ds" / "manifest.json").unlink()
        last = sorted((tmp_path / "ds" / "shards").rglob("*.safetensors"))[-1]
        last.unlink()
        with pytest.raises(StoreError, match=r"lacks rows of old\.jsonl"):
            build(tmp_path / "ds", new)
        assert build(tmp_path / "ds", old).num_scored == 10
        write_lines(old, rows[:11])
        with pytest.raises(ProvenanceError, match=r"old\.jsonl has changed"):
            build(tmp_path / "ds", [new, old])
        write_lines(old, rows[:10])
        assert build(tmp_path / "ds", old).num_computed == 0


def test_a_build_killed_at_any_time_and_started_again_gives_the_same_bytes(
    build, pool, tiny_model_folder, tiny_run, tmp_path
):
    expected, folder = tmp_path / "expected", tmp_path / "killed"
    build(expected, pool, shard_rows=1)
    code = (
        "import sys, torch; torch.set_num_threads(int(sys.argv[5]));"
        "from less import build_datastore; model, checkpoints, data, datastore = sys.argv[1:5];"
        "build_datastore(model=model, checkpoints=checkpoints, data=data, datastore=datastore, proj_dim=64,"
        " shard_rows=1, tokens_per_batch=256, feature_dtype='float32', progress=False)"
    )
    arguments = [tiny_model_folder, tiny_run, pool, folder, torch.get_num_threads()]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=Path(__file__).parents[2],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while len(list(folder.rglob("*.safetensors"))) < 7:
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.001)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = shards(folder)
    assert 7 <= len(done) < len(shards(expected))
    assert not (folder / "manifest.json").exists()
    with pytest.raises(StoreError, match="not finished"):
        Datastore.open(folder)
    made = {name: (folder / name).stat().st_mtime_ns for name in done}
    result = build(folder, pool, shard_rows=1)
    assert 0 < result.num_computed < 2 * 18
    assert {name: (folder / name).stat().st_mtime_ns for name in done} == made
    assert tree(folder) == tree(expected)


BAD_LINES = [
    ("not JSON", "{not json"),
    ("not JSON", '{"id": "cut", "messages": [{"role": "user", "con'),
    ("not an object", "[1, 2]"),
    ("no messages", '{"id": "text-only", "text": "hello"}'),
    ("no messages", '{"messages": "hello"}'),
    ("no messages", '{"messages": []}'),
    ("unknown role", '{"messages": [{"role": "wizard", "content": "x"}, {"role": "assistant", "content": "y"}]}'),
    ("empty turn", '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": " "}]}'),
    ("no assistant turn", '{"messages": [{"role": "user", "content": "x"}]}'),
    (
        "no supervised token",
        json.dumps({"messages": [{"role": "user", "content": "x" * 300}, {"role": "assistant", "content": "y"}]}),
    ),
]


@pytest.fixture(scope="module")
def bad_lines(rows):
    """Good rows among the bad, a blank line, an id twice and a row three times."""
    good = [json.dumps(row) for row in rows[:6]]
    again = {**rows[2], "id": "another label"}
    same_id = {**rows[4], "id": "row-1", "messages": rows[5]["messages"] + rows[4]["messages"]}
    bad = [line for _, line in BAD_LINES]
    return [good[0], "", *bad[:4], *good[1:4], *bad[4:], good[4], json.dumps(again), json.dumps(same_id), good[2]]


@pytest.fixture(scope="module")
def built(tmp_path_factory, build, bad_lines):
    folder = tmp_path_factory.mktemp("bad")
    return folder / "ds", build(folder / "ds", write_lines(folder / "p.jsonl", bad_lines))


class TestBadRows:
    def test_are_counted_by_reason(self, built, bad_lines):
        folder, result = built
        assert [row.reason for row in result.skipped] == [reason for reason, _ in BAD_LINES]
        assert (result.num_rows, result.num_scored) == (len(bad_lines) - 1, len(bad_lines) - 1 - len(BAD_LINES))
        counts = Datastore.open(folder).manifest.counts["num_skipped"]
        assert counts == {
            "not JSON": 2, "not an object": 1, "no messages": 3, "unknown role": 1, "empty turn": 1,
            "no assistant turn": 1, "no supervised token": 1,
        }  # fmt: skip

    def test_say_where_they_are(self, built, bad_lines):
        _, result = built
        for row in result.skipped:
            file, line = row.where.split(":")
            assert (file, bad_lines[int(line) - 1]) in {("p.jsonl", bad) for _, bad in BAD_LINES}
            assert row.detail
        assert [row.where for row in result.skipped[:3]] == ["p.jsonl:3", "p.jsonl:4", "p.jsonl:5"]

    def test_are_in_no_block(self, built):
        folder, result = built
        store = Datastore.open(folder)
        bad = {row.row for row in result.skipped}
        assert not bad & set(store.rows().rows_N.tolist())
        assert len(features(folder)) == 2 * len(set(store.rows().ids))

    def test_repeated_ids_and_duplicates_are_kept_and_counted(self, built):
        _, result = built
        assert result.num_repeated_ids == 2  # "row-1" and "row-2" again
        assert result.num_duplicates == 2  # row 2's messages three times

    @pytest.mark.parametrize(("reason", "line"), BAD_LINES)
    def test_stop_a_strict_build(self, build, rows, tmp_path, reason, line):
        data = write_lines(tmp_path / "p.jsonl", [rows[0], "", line])
        with pytest.raises(RowError, match=rf"p\.jsonl:3: {reason}"):
            build(tmp_path / "ds", data, strict=True)
        assert not (tmp_path / "ds" / "manifest.json").exists()

    def test_stop_no_build_that_skips_them_after_a_strict_one(self, build, rows, tmp_path):
        data = write_lines(tmp_path / "p.jsonl", [*rows[:9], "{"])
        with pytest.raises(RowError):
            build(tmp_path / "ds", data, strict=True)
        assert build(tmp_path / "ds", data).num_scored == 9

    def test_in_memory_are_skipped_too(self, build, rows, tmp_path):
        result = build(tmp_path / "ds", [rows[0], {"text": "x"}, None, rows[1]])
        assert [(row.row, row.reason) for row in result.skipped] == [(1, "no messages"), (2, "not an object")]


class TestRowsWithoutADirection:
    @pytest.mark.parametrize("value", [float("inf"), float("nan")])
    def test_a_loss_that_is_not_finite_skips_its_row_alone(
        self, build, rows, reference, tmp_path, tiny_model, tiny_tokenizer, value
    ):
        (token,) = tiny_tokenizer("Q", add_special_tokens=False).input_ids
        with torch.no_grad():
            tiny_model.get_input_embeddings().weight[token] = value
        bad = {**rows[3], "id": "bad", "messages": [{"role": "user", "content": "Q"}, rows[3]["messages"][1]]}
        result = build(tmp_path / "ds", [*rows[:5], bad, *rows[5:]], model=tiny_model, tokens_per_batch=10_000)
        assert [(row.id, row.row, row.reason) for row in result.skipped] == [("bad", 5, "not finite")]
        assert_close(features(tmp_path / "ds"), features(reference))
        with pytest.raises(RowError, match=r"memory\[5\]: not finite"):
            build(tmp_path / "strict", [*rows[:5], bad], model=tiny_model, strict=True)

    def test_a_gradient_of_zero_skips_its_row_in_every_feature_set(self, build, rows, tmp_path, tiny_model):
        embedding = tiny_model.get_input_embeddings().weight
        tokenizer = load_tokenizer(tiny_model.name_or_path)
        frame = tokenizer("<|user|>z</s>\n<|assistant|>z</s>\n", add_special_tokens=False).input_ids
        with torch.no_grad():  # what the dead row is made of embeds to nothing, so no layer sees anything of it
            embedding[frame] = 0
        dead = {"id": "dead", "messages": [{"role": "user", "content": "z"}, {"role": "assistant", "content": "z"}]}
        result = build(tmp_path / "ds", [rows[0], dead, rows[1]], model=tiny_model, update_rule=["adam", "sgd"])
        assert [(row.id, row.reason) for row in result.skipped] == [("dead", "zero norm")]
        store = Datastore.open(tmp_path / "ds")
        for name in store.feature_sets:
            assert {i for _, i in features(tmp_path / "ds", name)} == {"row-0", "row-1"}


class TestTheUsersModel:
    @staticmethod
    def state(model):
        return {
            "training": model.training,
            "modules": [(name, type(module), module.training) for name, module in model.named_modules()],
            "grads": {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()},
            "use_cache": model.config.use_cache,
            "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
            "attributes": sorted(vars(model)),
        }

    @pytest.mark.parametrize("training", [False, True])
    @pytest.mark.parametrize("fails", [False, True])
    def test_is_given_back_as_it_was(self, build, rows, tmp_path, tiny_model, training, fails):
        tiny_model.train(training)
        tiny_model.lm_head.weight.requires_grad_(False)
        before = self.state(tiny_model)
        weights = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
        if fails:
            with pytest.raises(RowError):
                build(tmp_path / "ds", [*rows[:9], {}], model=tiny_model, strict=True)
        else:
            build(tmp_path / "ds", rows[:3], model=tiny_model)
        assert self.state(tiny_model) == before
        after = tiny_model.state_dict()
        assert after.keys() == weights.keys()
        assert all(torch.equal(after[name], tensor) for name, tensor in weights.items())

    def test_that_was_never_saved_needs_its_tokenizer(self, build, rows, tmp_path, tiny_model, tiny_tokenizer):
        tiny_model.name_or_path = tiny_model.config._name_or_path = ""
        with pytest.raises((ModelError, SettingError), match="tokenizer"):
            build(tmp_path / "ds", rows[:2], model=tiny_model)
        build(tmp_path / "ds", rows[:2], model=tiny_model, tokenizer=tiny_tokenizer)
        environment = Datastore.open(tmp_path / "ds").environment
        assert (environment["model"], environment["tokenizer"]) == ("", "")

    def test_training_goes_on_where_it_was(self, build, rows, tmp_path, tiny_model):
        torch.manual_seed(7)
        expected = torch.rand(3)
        torch.manual_seed(7)
        build(tmp_path / "ds", rows[:2], model=tiny_model)
        assert torch.equal(torch.rand(3), expected)


class TestWholeCommand:
    """Problems of the whole command come before any work: no shard is written."""

    @pytest.fixture
    def own_run(self, tmp_path, tiny_run):
        return Path(shutil.copytree(tiny_run, tmp_path / "run"))

    @pytest.fixture(autouse=True)
    def nothing_is_computed(self, monkeypatch, tmp_path):
        yield
        assert not list(tmp_path.rglob("s0000-*.safetensors"))

    def test_missing_optimizer_state(self, build, pool, own_run, tmp_path):
        last = sorted(own_run.glob("checkpoint-*"), key=lambda p: int(p.name[11:]))[-1]
        (last / "optimizer.pt").unlink()
        with pytest.raises(OptimizerStateError, match=rf"{last.name} has no optimizer state.*sgd and sign"):
            build(tmp_path / "ds", pool, checkpoints=own_run)

    @pytest.mark.parametrize("how", ["shape", "garbage", "cut", "other optimizer"])
    def test_broken_optimizer_state(self, build, pool, own_run, tmp_path, how):
        file = sorted(own_run.glob("checkpoint-*"), key=lambda p: int(p.name[11:]))[-1] / "optimizer.pt"
        if how == "garbage":
            file.write_bytes(b"nothing")
        elif how == "cut":
            file.write_bytes(file.read_bytes()[:-1000])
        else:
            state = torch.load(file, weights_only=True)
            if how == "shape":
                state["state"][3]["exp_avg"] = state["state"][3]["exp_avg"].T.contiguous()
            else:
                state["state"][3] = {"momentum_buffer": torch.zeros(2)}
            torch.save(state, file)
        with pytest.raises(OptimizerStateError, match=str(file)) as caught:
            build(tmp_path / "ds", pool, checkpoints=own_run)
        if how == "shape":
            assert "lora_" in str(caught.value)

    def test_no_such_checkpoint(self, build, pool, tmp_path):
        with pytest.raises(CheckpointError, match="no checkpoint at"):
            build(tmp_path / "ds", pool, checkpoints=tmp_path / "nowhere")
        with pytest.raises(SettingError, match="no checkpoint is given"):
            build(tmp_path / "ds", pool, checkpoints=[])

    def test_no_such_model(self, build, pool, tmp_path):
        with pytest.raises(ModelError, match="nowhere"):
            build(tmp_path / "ds", pool, model=tmp_path / "nowhere")

    @pytest.mark.parametrize("content", ["", "\n \n\n"])
    def test_an_empty_pool(self, build, tmp_path, content):
        (tmp_path / "p.jsonl").write_text(content)
        with pytest.raises(DataError, match="holds no rows"):
            build(tmp_path / "ds", tmp_path / "p.jsonl")

    def test_no_pool(self, build, tmp_path):
        with pytest.raises(DataError, match="no data was given"):
            build(tmp_path / "ds", [])
        with pytest.raises(DataError, match="there is no file or folder"):
            build(tmp_path / "ds", tmp_path / "nowhere.jsonl")

    def test_two_writers(self, build, pool, tmp_path):
        (tmp_path / "ds").mkdir()
        with open(tmp_path / "ds" / ".lock", "w") as lock:
            lock.write("process 12345 on somewhere")
            lock.flush()
            fcntl.flock(lock, fcntl.LOCK_EX)
            with pytest.raises(StoreLockedError, match="being written by process 12345"):
                build(tmp_path / "ds", pool)

    def test_a_full_disk(self, build, pool, tmp_path, monkeypatch):
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 9000, 9000))
        # 18 rows of 64 float32 at two checkpoints need 9216 bytes
        with pytest.raises(DiskFullError, match="not enough room"):
            build(tmp_path / "ds", pool)

    def test_a_folder_of_something_else(self, build, pool, tmp_path):
        (tmp_path / "ds").mkdir()
        (tmp_path / "ds" / "thesis.tex").write_text("x")
        with pytest.raises(StoreError, match=r"not a datastore: it has thesis\.tex"):
            build(tmp_path / "ds", pool)

    def test_a_model_without_a_chat_template(self, build, pool, tmp_path, tiny_model_folder, tiny_tokenizer):
        tokenizer = load_tokenizer(tiny_model_folder)
        tokenizer.chat_template = None
        with pytest.raises(ModelError, match="chat template"):
            build(tmp_path / "ds", pool, tokenizer=tokenizer)


def test_rules_without_moments_need_no_optimizer_state(build, pool, reference, tiny_run, tmp_path):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    for file in run.rglob("optimizer.pt"):
        file.unlink()
    build(tmp_path / "without", pool, checkpoints=run, update_rule=["sgd", "sign"])
    build(tmp_path / "with", pool, update_rule=["sgd", "sign"])
    for name in ("sgd-sparse", "sign-sparse"):
        assert_close(features(tmp_path / "without", name), features(tmp_path / "with", name), bound=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"update_rule": "adamw"}, "update rule must be one of adam, .* got 'adamw'"),
        ({"update_rule": ["adam", "adam"]}, "adam-sparse is asked for twice"),
        ({"projection": "gaussian"}, "gaussian"),
        ({"proj_dim": 0}, "got 0"),
        ({"seed": -1}, "got -1"),
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"shard_rows": 0}, "shard_rows must be at least 1, got 0"),
        ({"tokens_per_batch": 0}, "tokens_per_batch must be at least 1, got 0"),
        ({"feature_dtype": "int2"}, "feature_dtype must be one of float32, float16, int8, int4, binary, got 'int2'"),
    ],
)
def test_settings_out_of_range_are_refused_with_the_value(settings, message):
    with pytest.raises(SettingError, match=message):
        BuildConfig(**settings)


def test_a_base_in_another_precision_gives_nearly_the_same_features(build, pool, reference, tmp_path):
    build(tmp_path / "ds", pool, dtype="bfloat16")
    found, expected = features(tmp_path / "ds"), features(reference)
    cosines = [found[key] @ phi / np.linalg.norm(found[key]) / np.linalg.norm(phi) for key, phi in expected.items()]
    assert min(cosines) > 0.97
    assert load_base_model(Datastore.open(reference).environment["model"]).dtype == torch.float32
