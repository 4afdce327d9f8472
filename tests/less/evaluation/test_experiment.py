"""`evaluate` as a whole on the tiny model: what it writes, that it goes on, that processes share the work."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

import less.evaluation.experiment as experiment
from datastore import Datastore
from datastore.errors import DataError, ProvenanceError, SettingError
from less import build_embeddings, evaluate
from less.checkpoints import EvidenceWarning
from less.evaluation import ledger
from less.evaluation.experiment import EvaluateConfig
from less.evaluation.ledger import Ledger, _lock
from less.models import load_base_model, lora_layers

REPOSITORY = Path(__file__).parents[3]
pytestmark = pytest.mark.filterwarnings("ignore::less.checkpoints.EvidenceWarning")  # of short trainings


@pytest.fixture(autouse=True)
def no_power_cut(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def files(tiny_store, tiny_pool, tiny_targets, tiny_rows, tmp_path_factory):
    """A store that embeddings may be put beside, its targets, and held-out rows of which some have an answer."""
    folder = tmp_path_factory.mktemp("files")
    shutil.copytree(tiny_store, folder / "store")
    write_jsonl(folder / "tones.jsonl", tiny_targets)
    rows = [{**row, "id": f"held-out-{n}"} for n, row in enumerate(tiny_rows[25:33])]
    for row in rows[:3]:
        row["answer"] = row["messages"][1]["content"]
    write_jsonl(folder / "eval.jsonl", rows)
    write_jsonl(folder / "other_eval.jsonl", rows[4:])
    return folder


SETTINGS = {
    "methods": ["less", "rds"], "fractions": [0.1], "seeds": 2, "epochs": 1, "batch_size": 2, "learning_rate": 1e-2,
    "eval_rows": 5, "answer_rows": 2, "max_new_tokens": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def run(files):
    def call(output, **changes):
        options = {
            "datastore": files / "store", "targets": files / "tones.jsonl", "held_out": files / "eval.jsonl",
            "progress": False, **SETTINGS,
        }  # fmt: skip
        return evaluate(output=output, **options | changes)

    return call


@pytest.fixture(scope="module")
def done(run, tmp_path_factory):
    """A finished experiment, which no test writes to."""
    folder = tmp_path_factory.mktemp("experiment") / "done"
    return folder, run(folder)


@pytest.fixture
def trained(monkeypatch):
    """(rows, seed) of every training from now on."""
    seen, real = [], experiment.run_trial

    def watched(base, tokenizer, rows, *args, **kwargs):
        seen.append((tuple(tuple(row.input_ids) for row in rows), kwargs["training"].seed))
        return real(base, tokenizer, rows, *args, **kwargs)

    monkeypatch.setattr(experiment, "run_trial", watched)
    return seen


def results(folder):
    """Every file but those that tell who works on what."""
    found = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in found}


@contextmanager
def held(path):
    """The lock of another process."""
    with open(path, "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class TestTheOutcome:
    def test_has_every_method_at_every_budget(self, done):
        folder, found = done
        assert [(arm.method, arm.match) for arm in found.arms] == [
            (method, match) for method in ("less", "rds", "random") for match in ("rows", "tokens")
        ]
        for arm in found.arms:
            assert arm.drop.low <= arm.drop.value <= arm.drop.high
            assert arm.loss == pytest.approx(found.start["tones"]["loss"] - arm.drop.value, rel=1e-5)
            assert arm.accuracy in (0, 0.25, 0.5, 0.75, 1)
            assert arm.num_rows == 4 or arm.match == "tokens"
        assert found.start["tones"]["rows"] == 5
        assert [arm.over_random.value for arm in found.arms[-2:]] == [0, 0]
        assert json.loads((folder / "evaluation.json").read_text()) == json.loads(json.dumps(found.to_json()))

    def test_is_written_without_nan_and_without_lock_files(self, done):
        def forbidden(word):
            raise AssertionError(word)

        json.loads((done[0] / "evaluation.json").read_text(), parse_constant=forbidden)
        assert not [*done[0].rglob("*.lock"), *done[0].rglob("*.tmp")]

    def test_is_the_same_to_the_byte_in_a_new_folder(self, done, run, tmp_path):
        run(tmp_path / "again")
        assert results(tmp_path / "again") == results(done[0])

    def test_is_the_same_from_an_embedding_store_for_the_same_selections(self, done, run, files, trained, tmp_path):
        """Trials are known by rows, seed and settings, not by the store that selected them."""
        folder = shutil.copytree(done[0], tmp_path / "out")
        store = Datastore.open(files / "store")
        checkpoints = store.environment["checkpoints"]
        build_embeddings(
            model=store.environment["model"], data=store.sources[0].location, datastore=tmp_path / "embeddings",
            shard_rows=16, progress=False,
        )  # fmt: skip
        found = run(folder, datastore=tmp_path / "embeddings", checkpoints=checkpoints, methods=["rds"])
        assert not trained
        assert found.arms[0].loss == done[1].arms[2].loss


class TestGoingOn:
    def test_trains_nothing_when_all_is_done(self, done, run, tmp_path, monkeypatch):
        folder = shutil.copytree(done[0], tmp_path / "out")
        for name in ("run_trial", "measure"):
            monkeypatch.setattr(experiment, name, lambda *_, **__: 1 / 0)
        monkeypatch.setattr("less.baselines.scorer.rds_scores", lambda *_, **__: 1 / 0)
        monkeypatch.setattr("less.scoring.iter_scores", lambda *_, **__: 1 / 0)
        assert run(folder) == done[1]
        assert results(folder) == results(done[0])

    def test_does_what_a_killed_run_has_left(self, done, run, tmp_path, monkeypatch):
        real, calls = experiment.run_trial, []

        def dies_later(*args, **kwargs):
            calls.append(args)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        monkeypatch.setattr(experiment, "run_trial", dies_later)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out")
        assert not (tmp_path / "out/evaluation.json").exists()
        monkeypatch.setattr(experiment, "run_trial", real)
        num_trials = run(tmp_path / "out").settings["num_trials"]
        assert num_trials > 4
        assert results(tmp_path / "out") == results(done[0])

    def test_trains_only_what_is_new(self, done, run, trained, tmp_path):
        folder = shutil.copytree(done[0], tmp_path / "out")
        found = run(folder, seeds=3)
        assert {seed for _, seed in trained} == {2}
        assert len(trained) == found.settings["num_trials"] - done[1].settings["num_trials"]

    @pytest.mark.parametrize("changes", [{"held_out": "other_eval.jsonl"}, {"max_new_tokens": 1}, {"eval_rows": 4}])
    def test_measures_again_what_is_measured_otherwise(self, run, files, trained, changes, tmp_path):
        small = {"methods": [], "match": ["rows"], "seeds": 1}
        first = run(tmp_path / "out", **small)
        changes = {name: files / value if name == "held_out" else value for name, value in changes.items()}
        run(tmp_path / "out", **small | changes)
        assert len(trained) == 2
        assert run(tmp_path / "out", **small) == first  # what was there is still there
        assert len(trained) == 2


class TestOneTraining:
    def test_serves_every_method_that_selects_the_same_rows(self, run, trained, tmp_path):
        """`less:NAME` is `less` with its only feature set named."""
        found = run(tmp_path / "out", methods=["less", "less:adam-sparse"], match=["rows"], seeds=1)
        assert len(trained) == found.settings["num_trials"] == 2
        plain, named, _ = found.arms
        assert (plain.method, named.method) == ("less", "less:adam-sparse")
        assert (plain.loss, plain.drop, plain.accuracy) == (named.loss, named.drop, named.accuracy)

    def test_serves_every_target_set(self, run, files, trained, tmp_path):
        found = run(
            tmp_path / "out", targets={"x": files / "tones.jsonl", "y": files / "tones.jsonl"},
            held_out={"y": files / "other_eval.jsonl", "x": files / "eval.jsonl"},
            methods=["length"], match=["rows"], seeds=1,
        )  # fmt: skip
        assert len(trained) == 2
        losses = {(arm.target, arm.method): arm.loss for arm in found.arms}
        assert losses["x", "length"] != losses["y", "length"]
        assert [found.start[name]["rows"] for name in ("x", "y")] == [5, 4]

    def test_leaves_a_model_that_is_passed_in_as_it_was(self, run, tiny_model_folder, tmp_path):
        base = load_base_model(tiny_model_folder).train()
        run(tmp_path / "out", model=base, methods=["rds"], match=["rows"], seeds=1)
        assert base.training
        assert not lora_layers(base)
        assert not hasattr(base, "peft_config")

    def test_finds_a_model_that_has_moved_with_its_tokenizer(self, run, files, tiny_model_folder, tmp_path):
        shutil.copytree(tiny_model_folder, tmp_path / "model")
        build_embeddings(
            model=tmp_path / "model", data=Datastore.open(files / "store").sources[0].location,
            datastore=tmp_path / "store", progress=False,
        )  # fmt: skip
        (tmp_path / "model").rename(tmp_path / "moved")
        found = run(
            tmp_path / "out", datastore=tmp_path / "store", model=tmp_path / "moved", methods=["length"],
            match=["rows"], seeds=1, lora_rank=2,
        )  # fmt: skip
        assert [arm.method for arm in found.arms] == ["length", "random"]

    def test_of_a_few_steps_is_warned_of(self, run, tmp_path):
        with pytest.warns(EvidenceWarning, match="2 optimizer steps, fewer than 10"):
            run(tmp_path / "out", methods=["random"], seeds=1, match=["rows"])

    def test_has_the_quantiles_as_its_own_arms(self, run, tmp_path):
        found = run(
            tmp_path / "out", methods=["length"], quantiles=3, quantile_methods=["length"], match=["rows"], seeds=1
        )
        (test,) = found.quantiles
        assert (test.method, len(test.drops)) == ("length", 3)
        assert found.settings["num_trials"] == 5
        assert [arm.method for arm in found.arms] == ["length", "random"]


class TestHeldOutRows:
    def one(self, rows, run, tmp_path, **changes):
        changes = {"methods": [], "match": ["rows"], "seeds": 1, "eval_rows": None} | changes
        return run(tmp_path / "out", held_out=rows, **changes).start["tones"]

    def test_that_cannot_be_used_whole_are_left_out(self, run, tiny_rows, tmp_path):
        long = {"prompt": "mix " + "red " * 100, "completion": "teal"}
        with pytest.warns(EvidenceWarning, match="2 of the 4 held-out rows of tones cannot be used whole"):
            assert self.one([tiny_rows[0], {"id": "bare"}, long, tiny_rows[1]], run, tmp_path)["rows"] == 2

    def test_of_which_none_can_be_used_are_an_error(self, run, tmp_path):
        with pytest.raises(DataError, match=r"none of the 1 held-out rows"):
            self.one([{"id": "bare"}], run, tmp_path)

    def test_are_asked_for_the_last_reply_of_a_conversation(self, run, tiny_rows, tmp_path, monkeypatch):
        first, second = (row["messages"] for row in tiny_rows[:2])
        asked = []
        real = experiment.measure

        def watched(model, tokenizer, held_out, *args):
            asked.extend(tokenizer.decode(prompt) for prompt in held_out.prompts)
            return real(model, tokenizer, held_out, *args)

        monkeypatch.setattr(experiment, "measure", watched)
        self.one([{"messages": [*first, *second], "answer": "x"}], run, tmp_path)
        assert len(asked) == 1
        assert asked[0].endswith("<|assistant|>")
        assert first[1]["content"] in asked[0]
        assert second[0]["content"] in asked[0]

    @pytest.mark.parametrize(
        ("held_out", "num_given"),
        [
            ([["a"], ["b"]], "none"),
            ({"other": []}, "none"),
            ({}, "none"),
            ([], "none"),
        ],
    )
    def test_that_do_not_fit_the_targets_are_refused(self, run, held_out, num_given, tmp_path):
        with pytest.raises(SettingError, match=rf"1 target sets \(tones\) and held-out rows for {num_given} of them"):
            run(tmp_path / "out", held_out=held_out)

    def test_of_one_set_of_two_are_refused(self, run, files, tmp_path):
        targets = {"x": files / "tones.jsonl", "y": files / "tones.jsonl"}
        with pytest.raises(SettingError, match=r"2 target sets \(x, y\) and held-out rows for 1 of them"):
            run(tmp_path / "out", targets=targets, held_out={"x": files / "eval.jsonl"})


class TestSeveralProcesses:
    def test_share_the_trials_and_end_with_the_same_result(self, done, run, files, trained, tmp_path):
        output = tmp_path / "out"
        script = (
            "import json, sys, less.evaluation.experiment as experiment\n"
            "from less import evaluate\n"
            "real, count = experiment.run_trial, []\n"
            "experiment.run_trial = lambda *args, **kwargs: (count.append(1), real(*args, **kwargs))[1]\n"
            "evaluate(**json.loads(sys.argv[1]))\n"
            "print(len(count))\n"
        )
        options = {
            "datastore": files / "store", "targets": files / "tones.jsonl", "held_out": files / "eval.jsonl",
            "output": output, "progress": False, **SETTINGS,
        }  # fmt: skip
        shutil.rmtree(files / "store.rds", ignore_errors=True)  # both want it
        with subprocess.Popen(
            [sys.executable, "-c", script, json.dumps(options, default=str)], cwd=REPOSITORY, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"},
        ) as other:  # fmt: skip
            deadline = time.monotonic() + 240
            while other.poll() is None and not (output / "scores").exists():  # from there on the work is shared
                assert time.monotonic() < deadline
                time.sleep(0.02)
            found = run(output)
            out, err = other.communicate(timeout=240)
        assert other.returncode == 0, err
        assert len(trained) + int(out.splitlines()[-1]) == done[1].settings["num_trials"]
        assert found == done[1]
        assert results(output) == results(done[0])

    def test_wait_at_the_end_for_a_trial_that_another_works_on(self, tmp_path):
        trials = [experiment.Trial(key=key, positions=None, seed=0, targets=()) for key in "abc"]
        work = Ledger(tmp_path, {}).one_by_one(trials)
        with held(tmp_path / "trials" / "a.lock"):
            assert [next(work).key, next(work).key] == ["b", "c"]
        assert next(work).key == "a"
        assert next(work, None) is None
        assert not list((tmp_path / "trials").iterdir())

    def test_do_not_hold_one_lock_both_when_its_file_was_taken_away(self, tmp_path):
        """The file that a waiting process has opened is not the one that the next process makes."""
        path = tmp_path / "lock"
        real = ledger.fcntl.flock

        def slow(file, how):
            if path.exists() and path.stat().st_size == 0 and not os.listdir(tmp_path).count("stolen"):
                (tmp_path / "stolen").touch()
                path.unlink()  # its holder is done, just before this process gets the lock
            return real(file, how)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ledger.fcntl, "flock", slow)
            with _lock(path, wait=True) as is_ours:
                assert is_ours
                with _lock(path, wait=False) as is_theirs:
                    assert not is_theirs
        assert not path.exists()

    def test_of_which_one_is_killed_leave_its_trial_to_the_others(self, tmp_path):
        with pytest.raises(KeyboardInterrupt), _lock(tmp_path / "lock", wait=False):
            raise KeyboardInterrupt
        assert (tmp_path / "lock").exists()
        with _lock(tmp_path / "lock", wait=False) as is_ours:
            assert is_ours


class TestSettings:
    def test_take_what_is_named_twice_once_and_random_always(self):
        config = EvaluateConfig(
            methods=["rds", "less", "rds"], fractions=[0.1, 0.1], match=["rows", "rows"], quantiles=3,
            quantile_methods=["rds", "rds"],
        )  # fmt: skip
        assert config.methods == ("rds", "less", "random")
        assert (config.fractions, config.match, config.quantile_methods) == ((0.1,), ("rows",), ("rds",))

    @pytest.mark.parametrize(
        "wrong",
        [
            {"methods": ["best"]}, {"methods": ["rds:x"]}, {"fractions": []}, {"fractions": [0]}, {"fractions": [1]},
            {"match": []}, {"match": ["words"]}, {"seeds": 0}, {"quantiles": 2},
            {"quantiles": 3, "quantile_methods": ["bm25"], "methods": ["less"]}, {"eval_rows": 0}, {"answer_rows": -1},
            {"max_new_tokens": 0}, {"epochs": 0}, {"learning_rate": 0}, {"batch_size": 0}, {"lora_rank": 0},
            {"tokens_per_batch": 0},
        ],
    )  # fmt: skip
    def test_out_of_range_are_refused_before_any_work(self, run, wrong, tmp_path, monkeypatch):
        monkeypatch.setattr(experiment, "open_base_model", lambda *_, **__: 1 / 0)
        with pytest.raises(SettingError, match=next(iter(wrong)).removesuffix("s")):
            run(tmp_path / "out", **wrong)
        assert not (tmp_path / "out").exists()

    def test_of_another_model_are_refused(self, run, tiny_model_folder, tmp_path):
        base = load_base_model(tiny_model_folder)
        base.lm_head.weight.data[0] += 1
        with pytest.raises(ProvenanceError, match="not the model"):
            run(tmp_path / "out", model=base)
