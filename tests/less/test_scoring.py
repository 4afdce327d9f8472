"""Scoring a store: which model, checkpoints, template and targets it takes, and which it refuses."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from datastore import Datastore
from datastore.errors import (
    DamagedStoreError,
    DataError,
    GradsiftError,
    ModelError,
    ProvenanceError,
    RowError,
    SettingError,
    StoreError,
)
from less import build_datastore, score, select
from less.features import gradient_features
from less.models import load_tokenizer
from less.scoring import ScoreConfig, Scorer


@pytest.fixture(autouse=True)
def no_power_cut(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def scores(tiny_store, tiny_targets):
    def call(**changes):
        fixed = {"datastore": tiny_store, "targets": tiny_targets, "keep_scores": False, "progress": False}
        return score(**fixed | changes)

    return call


@pytest.fixture(scope="module")
def expected(tiny_store, tiny_targets):
    return score(datastore=tiny_store, targets=tiny_targets, progress=False)


@pytest.fixture(scope="module")
def two_sets(tmp_path_factory, tiny_model_folder, tiny_run, tiny_rows):
    """A store with two feature sets."""
    folder = tmp_path_factory.mktemp("two") / "ds"
    build_datastore(
        model=tiny_model_folder, checkpoints=tiny_run, data=tiny_rows[:12], datastore=folder,
        update_rule=["adam", "sgd"], proj_dim=64, progress=False,
    )  # fmt: skip
    return folder


def write_lines(path: Path, lines) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    return path


class TestScoresDoNotDependOn:
    def test_how_the_targets_are_given(self, scores, expected, tiny_targets, tiny_target_file):
        import datasets

        ways = [tuple(tiny_targets), tiny_target_file, str(tiny_target_file), [tiny_target_file]]
        ways += [{"x": tiny_targets}, {"x": tiny_target_file}, datasets.Dataset.from_list(tiny_targets)]
        for targets in ways:
            found = scores(targets=targets)
            assert found.subtasks == expected.subtasks == ("a", "b")
            assert np.allclose(found.scores_NJ, expected.scores_NJ, atol=1e-7)

    @pytest.mark.parametrize("tokens_per_batch", [1, 100, 100_000])
    def test_the_batch_size_of_the_targets(self, scores, expected, tokens_per_batch):
        assert np.allclose(scores(tokens_per_batch=tokens_per_batch).scores_NJ, expected.scores_NJ, atol=1e-6)

    def test_the_order_of_the_targets_but_for_that_of_the_columns(self, scores, expected, tiny_targets):
        found = scores(targets=tiny_targets[::-1])
        columns = [found.subtasks.index(name) for name in expected.subtasks]
        assert np.allclose(found.scores_NJ[:, columns], expected.scores_NJ, atol=1e-6)

    def test_the_model_being_loaded_already_or_named(
        self, scores, expected, tiny_model, tiny_tokenizer, tiny_model_folder, tiny_run
    ):
        tiny_model.train()
        loaded = scores(model=tiny_model, tokenizer=tiny_tokenizer)
        named = scores(model=tiny_model_folder, tokenizer=str(tiny_model_folder), checkpoints=tiny_run)
        assert np.array_equal(loaded.scores_NJ, expected.scores_NJ)
        assert np.array_equal(named.scores_NJ, expected.scores_NJ)

    def test_where_model_and_checkpoints_lie(self, scores, expected, tiny_model_folder, tiny_run, tmp_path):
        model = shutil.copytree(tiny_model_folder, tmp_path / "model")
        run = shutil.copytree(tiny_run, tmp_path / "run")
        assert np.array_equal(scores(model=model, checkpoints=run).scores_NJ, expected.scores_NJ)

    def test_the_optimizer_state_being_there_still(self, scores, expected, tiny_run, tmp_path):
        run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
        for file in run.rglob("optimizer.pt"):
            file.unlink()
        assert np.array_equal(scores(checkpoints=run).scores_NJ, expected.scores_NJ)

    def test_other_target_sets_beside_them(self, scores, expected, tiny_targets, tiny_rows):
        others = tiny_rows[:3]
        both = scores(targets={"mine": tiny_targets, "others": others})
        assert both.target_sets == ("mine", "mine", "others")
        assert both.subtasks == ("a", "b", "others")
        assert np.allclose(both.of("mine").scores_NJ, expected.scores_NJ, atol=1e-6)
        alone = scores(targets=others)
        assert np.allclose(both.of("others").scores_NJ, alone.scores_NJ, atol=1e-6)

    def test_an_open_store_or_its_path(self, scores, expected, tiny_store):
        assert np.array_equal(scores(datastore=Datastore.open(tiny_store)).scores_NJ, expected.scores_NJ)
        assert np.array_equal(scores(datastore=str(tiny_store)).scores_NJ, expected.scores_NJ)


class TestAnotherModel:
    def test_is_refused_by_fingerprint(self, scores, tiny_model):
        with torch.no_grad():
            tiny_model.model.layers[1].self_attn.q_proj.weight.add_(0.1)
        with pytest.raises(ProvenanceError, match=r"is not the model that .*fingerprint .*, expected .*--model"):
            scores(model=tiny_model)

    def test_is_refused_where_there_is_none(self, scores, tmp_path):
        with pytest.raises(ModelError, match="nowhere"):
            scores(model=tmp_path / "nowhere")

    def test_of_another_precision_is_refused(self, scores, tiny_model):
        with pytest.raises(SettingError, match="dtype is float32 but the model given is on bfloat16"):
            scores(model=tiny_model.to(torch.bfloat16))


class TestOtherCheckpoints:
    def test_in_another_order_or_number_are_refused(self, scores, tiny_run):
        first, last = sorted(tiny_run.glob("checkpoint-*"), key=lambda p: int(p.name[11:]))
        for checkpoints in ([last, first], first, [last]):
            with pytest.raises(ProvenanceError, match=f"{first.name}, {last.name}.*Give the right --checkpoints"):
                scores(checkpoints=checkpoints)

    def test_with_other_weights_are_refused(self, scores, tiny_run, tmp_path):
        from safetensors.torch import load_file, save_file

        run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
        file = next(run.glob("checkpoint-*/adapter_model.safetensors"))
        tensors = load_file(file)
        name = next(iter(tensors))
        save_file(tensors | {name: tensors[name] + 1e-3}, file)
        with pytest.raises(ProvenanceError, match="the adapters' weights differ"):
            scores(checkpoints=run)

    def test_under_other_folder_names_are_the_same(self, scores, expected, tiny_run, tmp_path):
        copies = []
        for number, folder in enumerate(sorted(tiny_run.glob("checkpoint-*"), key=lambda p: int(p.name[11:]))):
            copies.append(shutil.copytree(folder, tmp_path / f"c{number}"))
        assert np.array_equal(scores(checkpoints=copies).scores_NJ, expected.scores_NJ)


class TestTheTemplate:
    def test_that_differs_is_refused(self, scores, tiny_model_folder):
        tokenizer = load_tokenizer(tiny_model_folder)
        tokenizer.chat_template = tokenizer.chat_template.replace("<|", "[|")
        with pytest.raises(ProvenanceError, match=r"the chat template is not the one that .* sha256"):
            scores(tokenizer=tokenizer)

    def test_of_the_build_is_used_for_the_targets(self, tmp_path, tiny_model_folder, tiny_run, tiny_rows, tiny_targets):
        build_datastore(
            model=tiny_model_folder, checkpoints=tiny_run, data=tiny_rows[:4], datastore=tmp_path / "ds",
            chat_template="chatml", system_prompt="Mix well.", max_length=100, proj_dim=64, progress=False,
        )  # fmt: skip
        scorer = Scorer(Datastore.open(tmp_path / "ds"), ScoreConfig(), None, None, None, False)
        (targets,) = scorer.load_targets(tiny_targets)
        text = load_tokenizer(tiny_model_folder).decode(targets.rendered[0].input_ids)
        assert text.startswith("<|im_start|>system\nMix well.")
        assert max(row.num_tokens for row in targets.rendered) <= 100


def test_the_targets_may_have_a_system_prompt_of_their_own(scores, expected, tiny_targets):
    def with_system(text):
        said = {"role": "system", "content": text}
        return [{**row, "messages": [said, *row["messages"]]} for row in tiny_targets]

    own = scores(system_prompt="Speak in colours.")
    assert not np.allclose(own.scores_NJ, expected.scores_NJ, atol=1e-3)
    assert np.allclose(own.scores_NJ, scores(targets=with_system("Speak in colours.")).scores_NJ, atol=1e-6)
    kept, dropped = (scores(targets=with_system("Be brief."), system_prompt=prompt) for prompt in (None, "none"))
    assert np.allclose(dropped.scores_NJ, expected.scores_NJ, atol=1e-6)
    assert not np.allclose(kept.scores_NJ, expected.scores_NJ, atol=1e-3)


class TestCheckpointWeights:
    def test_take_the_place_of_the_stores(self, scores, expected, tiny_store):
        first, last = (scores(checkpoint_weights=weights).scores_NJ for weights in ([1, 0], [0, 1]))
        store = Datastore.open(tiny_store)
        w1, w2 = (store.settings["checkpoints"][name]["weight"] for name in store.checkpoints)
        assert np.allclose(w1 * first + w2 * last, expected.scores_NJ, atol=1e-6)
        assert not np.allclose(first, last, atol=1e-3)

    @pytest.mark.parametrize("weights", [(3, 1), np.array([0.75, 0.25])])
    def test_are_normalised(self, scores, weights):
        found_NJ = scores(checkpoint_weights=weights).scores_NJ
        assert np.allclose(found_NJ, scores(checkpoint_weights=[0.75, 0.25]).scores_NJ, atol=1e-7)

    @pytest.mark.parametrize("weights", [[1], [1, 1, 1], [-1, 2], [0, 0], [float("nan"), 1], []])
    def test_out_of_range_are_refused(self, scores, weights):
        with pytest.raises(SettingError, match=r"checkpoint.weights"):
            scores(checkpoint_weights=weights)


class TestTheFeatureSet:
    def test_must_be_chosen_where_there_are_several(self, scores, two_sets):
        with pytest.raises(SettingError, match=r"adam-sparse, sgd-sparse, none was chosen.*--feature-set"):
            scores(datastore=two_sets)
        with pytest.raises(SettingError, match="no 'adam'"):
            scores(datastore=two_sets, feature_set="adam")

    def test_decides_the_scores(self, scores, two_sets):
        adam, sgd = (scores(datastore=two_sets, feature_set=f"{rule}-sparse") for rule in ("adam", "sgd"))
        assert not np.allclose(adam.scores_NJ, sgd.scores_NJ, atol=1e-3)

    def test_of_the_only_kind_may_be_named(self, scores, expected):
        assert np.array_equal(scores(feature_set="adam-sparse").scores_NJ, expected.scores_NJ)


class TestAggregates:
    def test_agree_nearly_and_are_not_the_same(self, scores, expected):
        other = scores(aggregate="cosine-of-mean")
        assert not np.array_equal(other.scores_NJ, expected.scores_NJ)
        for j in range(2):
            assert np.corrcoef(other.scores_NJ[:, j], expected.scores_NJ[:, j])[0, 1] > 0.9

    def test_normalize_none_favours_rows_of_large_gradients(self, scores, expected, tiny_store):
        store = Datastore.open(tiny_store)
        plain = scores(normalize="none", checkpoint_weights=[1, 0])
        cosine = scores(aggregate="cosine-of-mean", checkpoint_weights=[1, 0])
        norms_N = store.stats(store.feature_sets[0], store.checkpoints[0]).norms_N
        ratio_NJ = plain.scores_NJ / (norms_N[:, None] * cosine.scores_NJ)
        assert np.allclose(ratio_NJ, np.median(ratio_NJ, axis=0), rtol=1e-3)  # the mean target's norm

    @pytest.mark.parametrize(
        "changes",
        [
            {"aggregate": "max"}, {"normalize": "l2"}, {"aggregate": "cosine-of-mean", "normalize": "none"},
            {"tokens_per_batch": 0},
        ],
    )  # fmt: skip
    def test_without_a_meaning_are_refused_before_a_model_is_loaded(self, scores, changes, tmp_path):
        with pytest.raises(SettingError):
            scores(model=tmp_path / "nowhere", **changes)


class TestBadTargets:
    def test_are_skipped_and_listed(self, expected, tiny_store, tiny_targets, tmp_path):
        file = write_lines(tmp_path / "t.jsonl", ["{", *tiny_targets[:2], {"messages": []}, *tiny_targets[2:], "[]"])
        scorer = Scorer(Datastore.open(tiny_store), ScoreConfig(), None, None, None, False)
        (targets,) = scorer.load_targets(file)
        assert [(row.where, row.reason) for row in targets.skipped] == [
            ("t.jsonl:1", "not JSON"), ("t.jsonl:4", "no messages"), ("t.jsonl:8", "not an object"),
        ]  # fmt: skip
        assert np.allclose(scorer.score([targets])[0].scores_NJ, expected.scores_NJ, atol=1e-6)

    def test_in_memory_are_skipped_too(self, scores, expected, tiny_targets):
        found = scores(targets=[*tiny_targets, {"text": "x"}, None])
        assert np.allclose(found.scores_NJ, expected.scores_NJ, atol=1e-6)

    def test_stop_a_strict_scoring(self, scores, tiny_targets):
        with pytest.raises(RowError, match=r"memory\[5\]: no messages"):
            scores(targets=[*tiny_targets, {"text": "x"}], strict=True)

    def test_alone_are_an_error_that_counts_the_reasons(self, scores, tiny_targets, tmp_path):
        file = write_lines(tmp_path / "t.jsonl", ["{", "[]", "{}", '{"a": 1}'])
        for targets in (file, [tiny_targets, file]):
            with pytest.raises(DataError, match=r"none of the 4 targets in .*t\.jsonl can be used: 2 no messages"):
                scores(targets=targets)

    @pytest.mark.parametrize("targets", [[], {}, [[]], {"x": []}])
    def test_none_at_all_is_an_error(self, scores, targets):
        with pytest.raises(DataError):
            scores(targets=targets)

    @pytest.fixture
    def kill(self, monkeypatch):
        """Targets whose gradient is made zero (or not finite) at the second checkpoint only."""
        import less.scoring as scoring

        def kill(rows, value=0.0):
            seen = []

            def features_of(model, batch, feature_sets):
                features = gradient_features(model, batch, feature_sets)
                for row, features_K in zip(batch.rows, features.features_BK[feature_sets[0].name], strict=True):
                    seen.append(row)
                    if row in rows and seen.count(row) == 2:
                        features_K.fill_(value)
                return features

            monkeypatch.setattr(scoring, "gradient_features", features_of)

        return kill

    @pytest.mark.parametrize(("value", "reason"), [(0.0, "zero norm"), (float("nan"), "not finite")])
    def test_without_a_direction_are_skipped_and_listed(self, tiny_store, tiny_targets, scores, kill, value, reason):
        expected = scores(targets=[t for n, t in enumerate(tiny_targets) if n not in (0, 3)])
        kill({0, 3}, value)
        (selection,) = select(datastore=tiny_store, targets=tiny_targets, count=3, keep_scores=False, progress=False)
        assert [(row.id, row.reason) for row in selection.skipped_targets] == [
            ("target-0", reason),
            ("target-3", reason),
        ]
        assert np.allclose(selection.influence.scores_NJ, expected.scores_NJ, atol=1e-6)

    def test_without_a_direction_stop_a_strict_scoring(self, scores, kill):
        kill({2})
        with pytest.raises(RowError, match=r"memory\[2\]: zero norm: gradient norm 0 at checkpoint-"):
            scores(strict=True)

    def test_of_which_none_has_a_direction_are_an_error(self, scores, kill):
        kill(range(5))
        with pytest.raises(DataError, match="no target is left"):
            scores()


def test_two_target_sets_of_one_name_are_refused(scores, tiny_targets, tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
    files = [write_lines(tmp_path / folder / "tones.jsonl", tiny_targets) for folder in ("x", "y")]
    with pytest.raises(SettingError, match="two target sets have one name among tones, tones"):
        scores(targets=files)
    assert scores(targets={"x": files[0], "y": files[1]}).target_sets == ("x", "x", "y", "y")


class TestTheStore:
    def test_that_is_damaged_is_never_scored(self, scores, tiny_store, tmp_path):
        folder = Path(shutil.copytree(tiny_store, tmp_path / "ds"))
        file = sorted((folder / "shards").rglob("*.safetensors"))[1]
        content = bytearray(file.read_bytes())
        content[-500] ^= 1
        file.write_bytes(content)
        with pytest.raises(DamagedStoreError, match=file.name):
            scores(datastore=folder)
        file.unlink()
        with pytest.raises(DamagedStoreError, match="missing"):
            scores(datastore=folder)

    def test_that_is_not_there_or_not_finished_is_an_error(self, scores, tiny_store, tmp_path):
        with pytest.raises(StoreError, match="no datastore at"):
            scores(datastore=tmp_path / "nowhere")
        folder = Path(shutil.copytree(tiny_store, tmp_path / "ds"))
        (folder / "manifest.json").unlink()
        with pytest.raises(StoreError, match="not finished"):
            scores(datastore=folder)

    def test_without_a_scored_row_is_an_error(self, tmp_path, tiny_model_folder, tiny_run, tiny_targets):
        try:  # the build may refuse such a pool as well
            build_datastore(
                model=tiny_model_folder, checkpoints=tiny_run, data=[{"text": "x"}], datastore=tmp_path / "ds",
                proj_dim=64, progress=False,
            )  # fmt: skip
        except DataError:
            return
        with pytest.raises(DataError, match="no row to score"):
            score(datastore=tmp_path / "ds", targets=tiny_targets, progress=False)

    def test_of_a_model_without_a_name_asks_for_the_model(
        self, tmp_path, tiny_model, tiny_tokenizer, tiny_run, tiny_rows, tiny_targets
    ):
        import warnings

        tiny_model.name_or_path = tiny_model.config._name_or_path = ""
        common = {"datastore": tmp_path / "ds", "progress": False}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*base_model_name_or_path.*")
            build_datastore(
                model=tiny_model,
                tokenizer=tiny_tokenizer,
                checkpoints=tiny_run,
                data=tiny_rows[:4],
                proj_dim=64,
                **common,
            )
            with pytest.raises(SettingError, match="--model"):
                score(targets=tiny_targets, **common)
            with pytest.raises(SettingError, match="--tokenizer"):
                score(targets=tiny_targets, model=tiny_model, **common)
            score(targets=tiny_targets, model=tiny_model, tokenizer=tiny_tokenizer, **common)


def test_the_tokenizer_of_the_build_is_found_again_when_the_model_is_given(
    tmp_path, tiny_model_folder, tiny_run, tiny_rows, tiny_targets
):
    """A tokenizer that was named beside the model stays the one to use, whichever model is given."""
    words = tmp_path / "words"
    tokenizer = load_tokenizer(tiny_model_folder)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|", "[|")
    tokenizer.save_pretrained(words)
    build_datastore(
        model=tiny_model_folder, tokenizer=words, checkpoints=tiny_run, data=tiny_rows[:4],
        datastore=tmp_path / "ds", proj_dim=64, progress=False,
    )  # fmt: skip
    model = shutil.copytree(tiny_model_folder, tmp_path / "moved")
    moved = score(datastore=tmp_path / "ds", targets=tiny_targets, model=model, progress=False)
    assert np.array_equal(
        moved.scores_NJ, score(datastore=tmp_path / "ds", targets=tiny_targets, progress=False).scores_NJ
    )


def test_an_unknown_setting_is_an_error(scores):
    with pytest.raises((TypeError, GradsiftError), match="nonsense"):
        scores(nonsense=1)


def test_the_users_model_is_given_back_as_it_was(scores, tiny_model, tiny_tokenizer):
    tiny_model.eval()
    tiny_model.lm_head.weight.requires_grad_(False)
    before = {name: (p.clone(), p.requires_grad) for name, p in tiny_model.named_parameters()}
    scores(model=tiny_model, tokenizer=tiny_tokenizer)
    after = dict(tiny_model.named_parameters())
    assert after.keys() == before.keys()
    for name, (tensor, requires_grad) in before.items():
        assert torch.equal(after[name], tensor)
        assert (after[name].requires_grad, after[name].grad) == (requires_grad, None)
