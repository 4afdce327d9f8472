"""A certificate: what a sound store is told, and what each kind of unsound one."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from datastore import Datastore, DatastoreWriter, ShardKey, delete_rows
from datastore.errors import DamagedStoreError, DataError, ProvenanceError, SettingError
from less import build_datastore, score, verify
from less.scan import influence_scores
from less.verification.certificate import BOUNDS


@pytest.fixture(autouse=True)
def no_power_cut(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def store(tmp_path_factory, build, tiny_pool):
    """A sound store, unprojected, of several shards."""
    folder = tmp_path_factory.mktemp("store") / "ds"
    build(folder, tiny_pool, projection="none")
    return folder


@pytest.fixture(scope="module")
def certificate(store):
    return verify(datastore=store, sample=12, progress=False)


def rewritten(source: Path, target: Path, change) -> Path:
    """A store with the same settings and valid checksums, each shard passed through `change`."""
    store = Datastore.open(source)
    with DatastoreWriter.open(
        target,
        settings=store.settings,
        environment=store.environment,
        feature_sets=store.feature_sets,
        checkpoints=store.checkpoints,
        shard_rows=store.manifest.shard_rows,
    ) as writer:
        for entry in store.sources:
            writer.add_source(entry)
        for key in writer.missing_shards():
            writer.write_shard(key, change(key, store.shard(key)))
        for name, checkpoint in writer.missing_directions():
            writer.write_direction(name, checkpoint, store.direction(name, checkpoint))
        writer.seal()
    return target


class TestASoundStore:
    def test_without_projection_is_right_in_every_number(self, certificate):
        assert certificate.gradient.worst < 1e-5
        assert certificate.stored_gradient_norm.worst < 1e-5
        assert certificate.update.worst < 1e-5
        assert certificate.stored_update_norm.worst < 1e-5
        assert certificate.stored_features.worst < 1e-4
        assert certificate.cosine < 1e-5
        assert certificate.spearman.value == pytest.approx(1)
        assert certificate.top_overlap.value == 1
        assert certificate.num_top == 3  # the ceiling of a fifth of 12
        assert not certificate.zero_gradients
        assert not certificate.not_finite
        assert not certificate.zero_parameters
        assert certificate.contaminated is None
        assert "WRONG" not in "\n".join(certificate.verdicts)

    def test_is_scored_against_other_rows_of_it_where_there_are_no_targets(self, certificate):
        probes = [where for places in certificate.queries.values() for where in places]
        assert len(set(probes)) == 8
        assert len(set(certificate.rows)) == 12
        assert not {*probes} & {*certificate.rows}

    def test_with_projection_has_the_error_of_chance_in_its_cosines(self, tmp_path, build, tiny_pool, tiny_targets):
        build(tmp_path / "ds", tiny_pool, proj_dim=256, feature_dtype="float16")
        found = verify(datastore=tmp_path / "ds", sample=24, targets=tiny_targets, progress=False)
        assert found.gradient.worst < 1e-5
        assert 1e-5 < found.stored_features.worst < 1e-3  # float16's rounding
        assert found.expected_cosine == 1 / 16
        assert 0.2 < found.cosine / found.expected_cosine < 2
        assert 0 < found.spearman.low <= found.spearman.value <= found.spearman.high <= 1

    @pytest.mark.parametrize("rule", ["adam-less", "adam-no-momentum", "sgd", "sign"])
    def test_is_right_under_every_update_rule(self, rule, tmp_path, build, tiny_rows):
        build(tmp_path / "ds", tiny_rows[:14], update_rule=rule, projection="none")
        found = verify(datastore=tmp_path / "ds", sample=6, data=tiny_rows[:14], progress=False)
        assert found.gradient.worst < 1e-5
        assert found.update.worst < 1e-5
        assert found.stored_features.worst < 1e-2
        assert "WRONG" not in "\n".join(found.verdicts)
        assert np.isnan(found.explained["momentum"]) == (rule in ("adam-no-momentum", "sgd", "sign"))

    def test_of_some_layers_is_held_to_those_layers(self, tmp_path, build, tiny_pool):
        build(tmp_path / "ds", tiny_pool, layers="last:1", projection="none")
        found = verify(datastore=tmp_path / "ds", sample=4, progress=False)
        assert found.stored_gradient_norm.worst < 1e-5
        assert found.cosine < 1e-5
        assert found.proj_dim < Datastore.open(tmp_path / "ds").settings["model"]["num_params"] + 1

    def test_gives_the_same_certificate_for_the_same_seed(self, certificate, store):
        again = verify(datastore=store, sample=12, progress=False)
        assert again.as_json() == certificate.as_json()
        other = verify(datastore=store, sample=12, seed=1, progress=False)
        assert other.rows != certificate.rows

    def test_is_sampled_whole_where_it_is_small(self, store, tiny_targets):
        found = verify(datastore=store, sample=1000, targets=tiny_targets, progress=False)
        assert len(found.rows) == found.num_rows == 40

    def test_has_the_exact_scores_of_a_scoring(self, store, tiny_targets):
        """Both sides of the comparison are the scores that `score` gives where there is no projection."""
        few = tiny_targets[:4]  # two of each subtask: all of them are used
        found = verify(datastore=store, sample=40, targets=few, progress=False)
        scores = score(datastore=store, targets=few, progress=False)
        assert [*found.queries] == ["targets/a", "targets/b"]
        assert found.explained["length"] == pytest.approx(r_squared_of_length(scores), abs=1e-5)


def r_squared_of_length(scores) -> float:
    return float(np.corrcoef(scores.score_N, np.log(scores.rows.num_supervised_N))[0, 1] ** 2)


class TestTargets:
    def test_are_at_most_two_of_each_of_at_most_eight_subtasks(self, store, tiny_targets):
        many = [{**row, "subtask": f"s{n % 10}"} for n, row in enumerate(tiny_targets * 6)]
        found = verify(datastore=store, sample=2, targets={"many": many}, progress=False)
        assert len(found.queries) == 8
        assert {len(places) for places in found.queries.values()} == {2}
        assert found.num_subtasks == 10
        assert "16 targets of 8 of 10 subtasks" in found.verdicts[0]

    def test_that_stand_in_the_pool_are_found_there(self, store, tiny_rows, tiny_targets):
        found = verify(datastore=store, sample=2, targets=[*tiny_targets[:2], tiny_rows[17]], progress=False)
        assert [pair.id for pair in found.contaminated if pair.target_id == "row-17"] == ["row-17"]
        assert any("pool.jsonl:18" in line for line in found.verdicts)
        assert found.values["contaminated"] == len(found.contaminated)

    def test_that_stand_in_a_deleted_row_are_not_found(self, store, tiny_rows, tiny_targets, tmp_path):
        folder = shutil.copytree(store, tmp_path / "ds")
        delete_rows(folder, [(0, 17)])
        found = verify(datastore=folder, sample=2, targets=[*tiny_targets[:2], tiny_rows[17]], progress=False)
        assert "row-17" not in [pair.id for pair in found.contaminated]

    def test_that_are_not_in_the_pool_are_not_found(self, store):
        strange = {"messages": [{"role": "user", "content": f"{'zebra ' * 9}"}, {"role": "assistant", "content": "no"}]}
        found = verify(datastore=store, sample=2, targets=[strange], require={"contaminated": 0}, progress=False)
        assert found.contaminated == ()
        assert not found.missed

    def test_without_a_direction_are_refused(self, store, tiny_targets, monkeypatch):
        import less.verification.recompute as verification

        real = verification.gradients_ref

        def nothing(model, batch):
            losses_B, blocks = real(model, batch)
            return losses_B, {name: grads * 0 for name, grads in blocks.items()}

        monkeypatch.setattr(verification, "gradients_ref", nothing)
        with pytest.raises(DataError, match=r"memory\[\d\]: its gradient has norm 0 at checkpoint-.*--seed"):
            verify(datastore=store, sample=2, targets=tiny_targets, progress=False)


class TestAnUnsoundStore:
    def test_with_other_features_and_right_checksums_is_caught(self, store, tmp_path):
        rng = np.random.default_rng(0)

        def other(key: ShardKey, shard):
            features_NK = rng.standard_normal(shard.features_NK.shape).astype(np.float32)
            return replace(shard, features_NK=features_NK / np.linalg.norm(features_NK, axis=1, keepdims=True))

        found = verify(datastore=rewritten(store, tmp_path / "ds", other), sample=6, progress=False)
        assert found.gradient.worst < 1e-5
        assert found.stored_gradient_norm.worst < 1e-5
        assert found.stored_features.worst > 1
        assert found.cosine > 1e-2
        assert [line for line in found.verdicts if line.startswith("stored features: WRONG by up to 1.")]

    def test_with_rows_that_have_changed_places_is_caught(self, store, tmp_path):
        columns = ("features_NK", "norms_N", "grad_norms_N", "update_norms_N", "losses_N")

        def shifted(key: ShardKey, shard):
            return replace(shard, **{name: np.roll(getattr(shard, name), 1, axis=0) for name in columns})

        found = verify(datastore=rewritten(store, tmp_path / "ds", shifted), sample=6, progress=False)
        assert found.stored_gradient_norm.worst > 0.01
        assert found.stored_update_norm.worst > 1e-4
        assert found.stored_features.worst > 0.01

    def test_with_one_norm_that_is_wrong_names_the_row(self, store, tmp_path):
        def scaled(key: ShardKey, shard):
            factor = np.where(shard.rows_N == 5, 1.5, 1).astype(np.float32)
            return replace(shard, grad_norms_N=shard.grad_norms_N * factor)

        found = verify(datastore=rewritten(store, tmp_path / "ds", scaled), sample=1000, seed=3, progress=False)
        where = f"{'pool.jsonl:6'} at "
        probes = [place for places in found.queries.values() for place in places]
        assert "pool.jsonl:6" not in probes  # seed 3 has it in the sample
        assert found.stored_gradient_norm.worst == pytest.approx(0.5, abs=1e-3)
        assert found.stored_gradient_norm.where.startswith(where)
        assert any(where in line and "WRONG" in line for line in found.verdicts)

    def test_that_is_damaged_is_refused_with_the_files_name(self, store, tmp_path):
        folder = Path(shutil.copytree(store, tmp_path / "ds"))
        file = sorted((folder / "shards").rglob("*.safetensors"))[1]
        content = bytearray(file.read_bytes())
        content[-500] ^= 1
        file.write_bytes(content)
        with pytest.raises(DamagedStoreError, match=file.name):
            verify(datastore=folder, progress=False)

    def test_whose_fast_path_is_wrong_is_caught(self, store, monkeypatch):
        import less.verification.recompute as verification

        real = verification.per_sample_gradients

        def doubled(model, batch, sink, layers=None):
            return real(model, batch, lambda name, grads_Bp: sink(name, grads_Bp * 1.01), layers)

        monkeypatch.setattr(verification, "per_sample_gradients", doubled)
        found = verify(datastore=store, sample=4, progress=False)
        assert found.gradient.worst == pytest.approx(0.01, abs=1e-4)
        assert found.gradient.median == pytest.approx(0.01, abs=1e-4)

    def test_whose_rows_have_no_or_no_finite_gradient_says_so(self, store, monkeypatch):
        import less.verification.recompute as verification

        real, seen = verification.gradients_ref, []

        def spoilt(model, batch):
            losses_B, blocks = real(model, batch)
            seen.append(batch)
            factor = {9: 0.0, 10: float("nan")}.get(len(seen), 1.0)  # the 8 probes come first
            return losses_B, {name: grads * factor for name, grads in blocks.items()}

        monkeypatch.setattr(verification, "gradients_ref", spoilt)
        found = verify(datastore=store, sample=6, progress=False)
        assert len(found.zero_gradients) == len(found.not_finite) == 1
        assert not {*found.zero_gradients} & {*found.not_finite}
        assert found.gradient.worst == float("inf")
        assert np.isfinite(found.cosine)
        assert json.loads(json.dumps(found.as_json(), allow_nan=False))["gradient"]["worst"] is None
        assert sum("WARNING: the gradient is" in line for line in found.verdicts) == 2


class TestTheAdapter:
    def test_whose_b_is_zero_has_modules_without_a_gradient(self, tmp_path, tiny_run, tiny_model_folder, tiny_rows):
        run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
        for folder in run.glob("checkpoint-*"):
            file = folder / "adapter_model.safetensors"
            tensors = load_file(file)
            save_file(
                {name: t * 0 if "layers.1.mlp.up_proj.lora_B" in name else t for name, t in tensors.items()}, file
            )
        build_datastore(
            model=tiny_model_folder, checkpoints=run, data=tiny_rows[:12], datastore=tmp_path / "ds", proj_dim=64,
            progress=False,
        )  # fmt: skip
        found = verify(
            datastore=tmp_path / "ds", data=tiny_rows[:12], sample=4, require={"zero_modules": 0}, progress=False
        )
        (module,) = found.zero_modules
        assert module.endswith("layers.1.mlp.up_proj")
        assert found.untrained == found.zero_modules
        assert [*found.zero_parameters] == Datastore.open(tmp_path / "ds").checkpoints
        assert {names for names in found.zero_parameters.values()} == {(f"{module}.lora_A.weight",)}
        assert found.missed == ("zero_modules",)
        assert any("1 adapter module with a gradient of exactly zero" in line for line in found.verdicts)

    def test_with_another_optimizer_state_is_refused(self, store, tiny_run, tmp_path):
        run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
        file = next(run.glob("checkpoint-*/optimizer.pt"))
        saved = torch.load(file, weights_only=True)
        for state in saved["state"].values():
            state["exp_avg"] *= 2
        torch.save(saved, file)
        with pytest.raises(ProvenanceError, match="optimizer state is not the one that"):
            verify(datastore=store, checkpoints=run, sample=2, progress=False)


class TestVarianceExplained:
    def test_of_a_score_that_is_the_length_is_one(self, store, monkeypatch):
        import less.verification.audit as verification

        def lengths(opened, feature_set, queries_JK, weights, **options):
            scores_NJ = influence_scores(opened, feature_set, queries_JK, weights, **options)
            scores_NJ[:, :-1] = np.log(opened.rows(feature_set).num_supervised_N)[:, None]
            return scores_NJ

        monkeypatch.setattr(verification, "influence_scores", lengths)
        found = verify(datastore=store, sample=2, progress=False)
        assert found.explained["length"] == pytest.approx(1, abs=1e-6)
        assert found.explained["all"] == pytest.approx(1, abs=1e-6)
        assert found.explained["norm"] < 0.99
        assert any(line.startswith("WARNING: length explains 1.00") for line in found.verdicts)

    def test_of_a_score_that_is_the_shared_direction_is_one(self, store, monkeypatch):
        import less.verification.audit as verification

        def directions(opened, feature_set, queries_JK, weights, **options):
            scores_NJ = influence_scores(opened, feature_set, queries_JK, weights, **options)
            expected_N = np.zeros(opened.num_rows)
            for name, weight in weights.items():
                direction_K = opened.direction(feature_set, name)
                blocks = [block.features_nK for block in opened.iter_blocks(feature_set, name)]
                expected_N += weight * (np.concatenate(blocks) @ direction_K) / np.linalg.norm(direction_K)
            assert np.allclose(scores_NJ[:, -1], expected_N, atol=1e-5)
            scores_NJ[:, :-1] = scores_NJ[:, -1:]
            return scores_NJ

        monkeypatch.setattr(verification, "influence_scores", directions)
        found = verify(datastore=store, sample=2, progress=False)
        assert found.explained["momentum"] == pytest.approx(1, abs=1e-6)
        assert any("follows Adam's momentum" in line for line in found.verdicts)

    def test_is_a_share(self, certificate):
        assert {*certificate.explained} == {"length", "norm", "momentum", "all"}
        parts = [certificate.explained[name] for name in ("length", "norm", "momentum")]
        assert all(0 <= part <= 1 for part in parts)
        assert max(parts) <= certificate.explained["all"] + 1e-9


class TestBounds:
    def test_are_for_every_value_of_a_certificate(self, certificate):
        assert [*certificate.values] == [*BOUNDS]

    def test_that_are_missed_are_named_with_what_was_got_and_required(self, certificate):
        found = replace(certificate, require={"gradient": 1e-3, "spearman": 1.5, "cosine": 0.0})
        assert found.missed == ("spearman", "cosine")
        assert "required: spearman at least 1.5, got 1: MISSED" in found.verdicts
        assert "required: gradient at most 0.001, got" in "\n".join(found.verdicts)

    def test_are_missed_where_there_is_no_value_to_hold(self, certificate):
        nothing = replace(certificate.spearman, value=float("nan"))
        assert replace(certificate, spearman=nothing, require={"spearman": -1.0}).missed == ("spearman",)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"require": {"gradeint": 1}}, "cannot require 'gradeint'; expected one of gradient, "),
            ({"require": {"gradient": float("nan")}}, "bound of gradient must be a number, got nan"),
            ({"require": {"contaminated": 0}}, "there are no targets"),
            ({"sample": 1}, "sample must be at least 2 rows, got 1"),
            ({"seed": -1}, "seed must be at least 0"),
        ],
    )
    def test_and_settings_without_a_meaning_are_refused_before_anything_is_read(self, changes, message, tmp_path):
        with pytest.raises(SettingError, match=message):
            verify(datastore=tmp_path / "nowhere", **changes)


def test_a_store_of_embeddings_is_refused_by_name(store, tmp_path):
    opened = Datastore.open(store)
    (name,) = opened.feature_sets
    settings = json.loads(json.dumps(opened.settings))
    settings["feature_sets"][name] = {"embedding": {"layer": "final"}, "dtype": "float32"}
    opened.manifest.settings.clear()
    opened.manifest.settings.update(settings)
    with pytest.raises(SettingError, match=f"{name} of .* holds embeddings, there is no gradient to verify; `gradsift"):
        verify(datastore=opened, progress=False)


def test_a_store_of_one_row_needs_targets(build, tmp_path, tiny_rows, tiny_targets):
    build(tmp_path / "ds", tiny_rows[:1])
    with pytest.raises(DataError, match="has one row, and no other to score it with; give targets"):
        verify(datastore=tmp_path / "ds", data=tiny_rows[:1], progress=False)
    found = verify(datastore=tmp_path / "ds", data=tiny_rows[:1], targets=tiny_targets, progress=False)
    assert len(found.rows) == 1
    assert np.isnan(found.spearman.value)
    assert "the scores of the sample have no order to compare" in "\n".join(found.verdicts)


def test_rows_in_memory_have_to_be_given_again(build, tmp_path, tiny_rows):
    build(tmp_path / "ds", tiny_rows[:10])
    with pytest.raises(DataError, match="was given in memory"):
        verify(datastore=tmp_path / "ds", progress=False)


def test_bfloat16_is_recomputed_in_bfloat16(build, tmp_path, tiny_rows):
    build(tmp_path / "ds", tiny_rows[:12], dtype="bfloat16")
    found = verify(datastore=tmp_path / "ds", data=tiny_rows[:12], sample=4, progress=False)
    assert found.dtype == "bfloat16"
    assert 1e-5 < found.gradient.worst < 0.1
    assert any(line.startswith("bfloat16: one rounding changes a number by up to 3.9e-03") for line in found.verdicts)


def test_the_users_model_is_given_back_as_it_was(store, tiny_model, tiny_tokenizer):
    before = {name: (p.clone(), p.requires_grad) for name, p in tiny_model.named_parameters()}
    verify(datastore=store, model=tiny_model, tokenizer=tiny_tokenizer, sample=2, progress=False)
    after = dict(tiny_model.named_parameters())
    assert after.keys() == before.keys()
    for name, (tensor, requires_grad) in before.items():
        assert torch.equal(after[name], tensor)
        assert (after[name].requires_grad, after[name].grad) == (requires_grad, None)
