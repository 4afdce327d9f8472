"""A problem of the whole command: one line that names it and the way out, exit code 2, no traceback."""

import json
import shutil
from collections import namedtuple
from dataclasses import replace

import pytest

from datastore import DatastoreWriter
from datastore.build import Build
from datastore.manifest import Manifest


@pytest.fixture
def run(tiny_run, tmp_path):
    """A copy of the run, to be spoilt."""
    return shutil.copytree(tiny_run, tmp_path / "a-run")


@pytest.fixture
def store(tiny_store, tmp_path):
    """A copy of the store, to be spoilt."""
    return shutil.copytree(tiny_store, tmp_path / "a-store")


@pytest.fixture
def build(gradsift, tiny_model_folder, tiny_run, tiny_pool, tmp_path):
    def build(*more, model=tiny_model_folder, checkpoints=tiny_run, data=tiny_pool, datastore=tmp_path / "ds"):
        return gradsift(
            "build-datastore", "--model", model, "--checkpoints", checkpoints, "--data", data,
            "--datastore", datastore, "--proj-dim", 256, "--shard-rows", 16, "--tokens-per-batch", 256, *more,
        )  # fmt: skip

    return build


@pytest.fixture
def warmup(gradsift, tiny_model_folder, tiny_pool, tmp_path):
    def warmup(*more, model=tiny_model_folder, data=tiny_pool):
        return gradsift("warmup", "--model", model, "--data", data, "--output", tmp_path / "run", *more)

    return warmup


@pytest.fixture
def select(gradsift, tiny_store, tiny_target_file, tmp_path):
    def select(*more, datastore=tiny_store, targets=tiny_target_file):
        more = more or ("--count", 1)
        return gradsift(
            "select", "--datastore", datastore, "--targets", targets, "--output", tmp_path / "o.jsonl", *more
        )

    return select


def checkpoint_of(run, which=-1):
    return sorted(run.glob("checkpoint-*"), key=lambda folder: int(folder.name[11:]))[which]


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("absent", ["./no/such/folder", "nobody/no-such-model"])
def test_no_such_model(warmup, build, gradsift, tiny_pool, absent, tmp_path):
    for line in (
        warmup(model=absent).error,
        build(model=absent).error,
        gradsift("render", "--model", absent, "--data", tiny_pool).error,
    ):
        assert absent in line
    assert not (tmp_path / "ds").exists()
    assert not (tmp_path / "run").exists()


def test_no_such_checkpoint(build, tmp_path):
    assert "no checkpoint at" in build(checkpoints=tmp_path / "none").error
    (tmp_path / "empty").mkdir()
    assert "checkpoint-<step>" in build(checkpoints=tmp_path / "empty").error


@pytest.mark.parametrize("absent", ["none.jsonl", "./none", "nobody/no-such-data"])
def test_no_such_data(warmup, build, select, gradsift, tiny_model_folder, absent):
    for line in (
        warmup(data=absent).error,
        build(data=absent).error,
        select(targets=absent).error,
        gradsift("render", "--model", tiny_model_folder, "--data", absent).error,
    ):
        assert absent in line


def test_empty_pool(warmup, build, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n\n")
    assert "holds no rows" in warmup(data=empty).error
    assert "holds no rows" in build(data=empty).error


def test_a_pool_without_a_usable_row(warmup, build, write_rows, tmp_path):
    useless = write_rows(tmp_path / "useless.jsonl", [{"id": "a"}, {"id": "b"}])
    assert "useless.jsonl:1" in warmup("--fraction", 1, data=useless).error


def test_zero_targets(select, write_rows, tmp_path):
    assert "holds no rows" in select(targets=write_rows(tmp_path / "none.jsonl", [])).error
    line = select(targets=write_rows(tmp_path / "bad.jsonl", [{"id": "a"}])).error
    assert "no messages" in line
    assert "bad.jsonl:1" in line


@pytest.mark.parametrize("fraction", ["0", "-0.1", "1.5", "nan"])
def test_fraction_out_of_range(warmup, select, fraction):
    for line in (warmup("--fraction", fraction).error, select("--fraction", fraction).error):
        assert "fraction must be above 0 and at most 1, got" in line


def test_count_out_of_range(select):
    assert "count must be a whole number, at least 1, got 0" in select("--count", 0).error
    assert "count must be between 1 and the 40 scored rows, got 41" in select("--count", 41).error
    both = select("--count", 1, "--fraction", 0.1).error
    assert "give one of fraction, count, token_budget, got fraction 0.1, count 1" in both
    assert "give one of fraction, count, token_budget, got none of them" in select("--strict").error


@pytest.mark.parametrize(
    "options",
    [
        ("--epochs", 0), ("--learning-rate", 0), ("--batch-size", 0), ("--lora-rank", 0), ("--lora-dropout", 1),
        ("--warmup-ratio", 1), ("--max-length", 0), ("--seed", -1), ("--target-modules", "no_such_layer"),
        ("--device", "abacus"), ("--chat-template", "no-such-file"),
    ],
)  # fmt: skip
def test_settings_of_a_warmup_out_of_range(warmup, options, tmp_path):
    line = warmup(*options).error
    assert str(options[1]) in line
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.parametrize("options", [("--proj-dim", 0), ("--seed", -1), ("--max-length", 0), ("--shard-rows", 0)])
def test_settings_of_a_build_out_of_range(build, options, tmp_path):
    assert str(options[1]) in build(*options).error
    assert not (tmp_path / "ds").exists()


def test_no_chat_template(warmup, build, tiny_model_folder, tmp_path):
    bare = shutil.copytree(tiny_model_folder, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    for done in (warmup(model=bare), build(model=bare)):
        assert "no chat template" in done.error
        assert "--chat-template" in done.error
    assert build("--chat-template", "tulu", model=bare).code == 0


def test_optimizer_state_missing(build, run):
    (checkpoint_of(run) / "optimizer.pt").unlink()
    line = build(checkpoints=run).error
    assert "optimizer.pt" in line
    assert "--update-rule sgd" in line
    assert build("--update-rule", "sgd", checkpoints=run).code == 0


def test_optimizer_state_broken(build, run):
    file = checkpoint_of(run) / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:1000])
    line = build(checkpoints=run).error
    assert f"{file} is damaged" in line
    assert "copy it again" in line


def test_optimizer_state_that_does_not_fit(build, run):
    import torch

    file = checkpoint_of(run) / "optimizer.pt"
    state = torch.load(file, weights_only=True)
    state["state"][3]["exp_avg"] = torch.zeros(5, 7)
    torch.save(state, file)
    line = build(checkpoints=run).error
    assert "(5, 7)" in line
    assert "lora_" in line


def test_adapter_kinds_that_cannot_be_handled(build, run):
    for folder in run.glob("checkpoint-*"):
        edit(folder / "adapter_config.json", use_dora=True)
    assert "use_dora" in build(checkpoints=run).error
    for folder in run.glob("checkpoint-*"):
        edit(folder / "adapter_config.json", peft_type="IA3", use_dora=False)
    assert "IA3" in build(checkpoints=run).error


def test_adapter_weights_missing_or_broken(build, run):
    file = checkpoint_of(run) / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    assert str(file) in build(checkpoints=run).error
    file.unlink()
    assert "adapter_model.safetensors" in build(checkpoints=run).error


def test_checkpoint_weights_that_do_not_fit(build, select):
    assert "--checkpoint-weights has 1 values" in build("--checkpoint-weights", "1").error
    assert "--checkpoint-weights" in build("--checkpoint-weights", "0,0").error
    assert "--checkpoint-weights has 3 values" in select("--count", 1, "--checkpoint-weights", "1,1,1").error


def test_other_settings_than_the_stores(build, store):
    line = build("--max-length", 100, "--update-rule", "sgd", datastore=store).error
    assert "max_length" in line
    assert "sgd" in line
    assert "--datastore" in line


def test_other_settings_than_the_runs(gradsift, tiny_model_folder, tiny_pool, run):
    line = gradsift("warmup", "--model", tiny_model_folder, "--data", tiny_pool, "--output", run, "--epochs", 3).error
    assert "epochs" in line
    assert "--output" in line


def test_a_damaged_store(gradsift, select, store):
    shard = next(store.rglob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    for line in (select(datastore=store).error, gradsift("inspect", store, "--verify").error):
        assert str(shard.relative_to(store)) in line
        assert "gradsift build-datastore" in line
    shard.unlink()
    assert "it is missing" in gradsift("inspect", store).error
    (store / "manifest.json").write_text("{")
    assert "manifest.json is damaged" in gradsift("inspect", store).error


def test_a_manifest_from_a_newer_version(gradsift, select, build, store):
    for name in ("manifest.json", "build.json"):
        edit(store / name, version=99)
    for done in (gradsift("inspect", store), select(datastore=store), build(datastore=store)):
        assert "version 99" in done.error
        assert "pip install --upgrade gradsift" in done.error


@pytest.mark.parametrize(
    "settings", [{}, {"dtype": "float16", "model": "tiny"}, {"feature_sets": ["adam"]}, {"feature_sets": {"a": 1}}]
)
def test_a_store_with_the_settings_of_another_writer(gradsift, select, store, settings):
    replace(Manifest.load(store), settings=settings).write(store)
    assert "feature sets adam-sparse are made of" in select(datastore=store).error
    line = gradsift("inspect", store).error
    assert f"the settings and environments of {store} are not as" in line
    assert "--json" in line
    assert json.loads(gradsift("inspect", store, "--json").out)["settings"] == settings


@pytest.mark.parametrize(
    "environments", [[], [{"torch": "2.13.0"}], [{"model": "m", "device": "cpu", "versions": "1"}]]
)
def test_a_store_with_the_environments_of_another_writer(gradsift, select, store, environments):
    replace(Manifest.load(store), environments=environments).write(store)
    assert str(store) in gradsift("inspect", store).error
    assert json.loads(gradsift("inspect", store, "--json").out)["environment"] == (environments or [None])[0]
    if not environments:
        assert "does not say what wrote it" in select(datastore=store).error


def test_no_store_or_an_unfinished_one(gradsift, select, store, tmp_path):
    assert "gradsift build-datastore" in gradsift("inspect", tmp_path).error
    assert "gradsift build-datastore" in select(datastore=tmp_path / "none").error
    (store / "manifest.json").unlink()
    assert "is not finished" in gradsift("inspect", store).error


def test_a_full_disk(build, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**9, 10**9, 5))
    line = build().error
    assert "not enough room" in line
    assert "free some space" in line.lower()


def test_a_disk_that_fills_up_loses_nothing(build, monkeypatch, tmp_path):
    import builtins
    import errno

    real, opened = open, []

    def open_until_full(file, *args, **kwargs):
        if ".safetensors" in str(file) and {*"wx"} & {*(args[0] if args else "")}:
            opened.append(file)
            if len(opened) > 2:
                raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", open_until_full)
        assert "the disk is full" in build().error
    written = len(list((tmp_path / "ds").rglob("*.safetensors")))
    assert written == 2
    assert build().code == 0


def test_two_writers(build, store):
    known = Build.load(store)
    with DatastoreWriter.open(
        store, settings=known.settings, environment={}, feature_sets=known.feature_sets,
        checkpoints=known.checkpoints, shard_rows=known.shard_rows,
    ):  # fmt: skip
        line = build(datastore=store).error
    assert "is being written by process" in line
    assert "Wait for it" in line


def test_a_pool_that_changed_since_the_build(build, select, write_rows, tiny_rows, tmp_path):
    pool = write_rows(tmp_path / "pool.jsonl", tiny_rows[:8])
    assert build(data=pool).code == 0
    write_rows(pool, tiny_rows[:9])
    assert "has changed" in build(data=pool).error
    assert "has changed since the store was built" in select(datastore=tmp_path / "ds").error


def test_another_model_than_the_stores(select, tiny_model_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    other = shutil.copytree(tiny_model_folder, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file({name: w + 1 for name, w in weights.items()}, other / "model.safetensors", {"format": "pt"})
    assert "--model" in select("--count", 1, "--model", other).error


def test_an_output_that_cannot_be_written(gradsift, tiny_store, tiny_target_file, tmp_path):
    (tmp_path / "file").write_text("")
    command = ["select", "--datastore", tiny_store, "--targets", tiny_target_file, "--count", 1]
    assert str(tmp_path / "file") in gradsift(*command, "--output", tmp_path / "file" / "out.jsonl").error


def test_debug_shows_the_traceback(gradsift, tmp_path, monkeypatch):
    from cli.main import main
    from datastore.errors import StoreError

    with pytest.raises(StoreError):
        main(["inspect", str(tmp_path), "--debug"])


def test_memory_that_runs_out_names_the_way_out(gradsift, monkeypatch, tiny_store):
    def runs_out(*_):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB. See the manual")

    monkeypatch.setattr("datastore.store.Datastore.open", runs_out)
    assert gradsift("inspect", tiny_store).error == "error: CUDA out of memory; lower --tokens-per-batch"
    monkeypatch.setattr("datastore.store.Datastore.open", lambda *_: 1 / 0)
    from cli.main import main

    with pytest.raises(ZeroDivisionError):  # a mistake of ours keeps its traceback
        main(["inspect", str(tiny_store)])
