"""Every method behind one `select`: the same files, on either kind of store; what is refused, and the way out."""

import json
import os
import shutil
from itertools import product

import numpy as np
import pytest

from datastore import Datastore
from datastore.errors import DataError, SettingError
from less import build_datastore, build_embeddings, score, select
from less.baselines.orders import random_scores
from less.embedding_store import BASE
from less.embeddings import EMBEDDINGS
from less.methods import method_of
from less.scoring import METHODS, ScoreConfig

BASELINES = [method for method in METHODS if method != "less"]
BLIND = ["length", "perplexity", "random"]
ADDED = ("influence_score", "influence_rank", "influence_subtask", "influence_reason")


@pytest.fixture(autouse=True)
def no_power_cut(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def stores(tiny_store, tiny_model_folder, tiny_pool, tmp_path_factory):
    """The same pool's gradients and embeddings."""
    folder = tmp_path_factory.mktemp("stores")
    shutil.copytree(tiny_store, folder / "gradients")
    build_embeddings(
        model=tiny_model_folder, data=tiny_pool, datastore=folder / "embeddings", shard_rows=16, tokens_per_batch=256,
        progress=False,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def targets(tiny_targets, tiny_rows):
    """Two target sets, one with two subtasks."""
    return {"tones": tiny_targets, "sums": tiny_rows[20:23]}


@pytest.fixture(params=["gradients", "embeddings"])
def kind(request):
    return request.param


class TestEveryMethod:
    @pytest.mark.parametrize(
        ("kind", "method"), [("gradients", "less"), *product(("gradients", "embeddings"), BASELINES)]
    )
    def test_writes_the_same_files(self, stores, kind, method, targets, tiny_rows, tmp_path):
        selections = select(
            datastore=stores / kind, targets=targets, fraction=0.1, method=method, output=tmp_path / "out",
            scores=tmp_path / "scores", progress=False,
        )  # fmt: skip
        assert [selection.name for selection in selections] == ["tones", "sums"]
        for selection in selections:
            written = read_lines(tmp_path / "out" / f"{selection.name}.jsonl")
            lines = read_lines(tmp_path / "scores" / f"{selection.name}.jsonl")
            assert [line["id"] for line in lines] == [row["id"] for row in tiny_rows]
            assert sorted(line["rank"] for line in lines) == [*range(1, 41)]
            by_rank = sorted(lines, key=lambda line: line["rank"])
            assert [row["id"] for row in written] == [line["id"] for line in by_rank[:4]]
            for rank, row in enumerate(written, start=1):
                line = by_rank[rank - 1]
                assert {name: row[name] for name in row if name not in ADDED} in tiny_rows
                assert [row[name] for name in ADDED[:3]] == [line["score"], rank, line["subtask"]]
                assert row["influence_reason"] == f"best for {line['subtask']}"
                assert line["score"] == line["scores"][line["subtask"]] == max(line["scores"].values())
            columns = [selection.name] if method in BLIND or selection.name == "sums" else ["a", "b"]
            assert all([*line["scores"]] == columns for line in lines)
            ordered = [line["score"] for line in by_rank]
            assert ordered == sorted(ordered, reverse=True)

    @pytest.mark.parametrize("combine", ["max", "round-robin"])
    @pytest.mark.parametrize("method", BASELINES)
    def test_makes_one_selection_for_all_targets(self, stores, kind, method, targets, combine, tmp_path):
        (selection,) = select(
            datastore=stores / kind, targets=targets, count=5, method=method, combine=combine,
            output=tmp_path / "out.jsonl", scores=tmp_path / "scores.jsonl", progress=False,
        )  # fmt: skip
        written, lines = read_lines(tmp_path / "out.jsonl"), read_lines(tmp_path / "scores.jsonl")
        assert len({row["id"] for row in written}) == 5
        assert selection.name == "tones+sums"
        names = ["tones", "sums"] if method in BLIND else ["tones/a", "tones/b", "sums"]
        assert all([*line["scores"]] == names for line in lines)
        if combine == "round-robin":
            assert [row["influence_subtask"].split("/")[0] for row in written] == ["tones", "sums"] * 2 + ["tones"]
        else:
            best = sorted(lines, key=lambda line: -max(line["scores"].values()))[:5]
            assert [row["influence_score"] for row in written] == [line["score"] for line in best]

    @pytest.mark.parametrize("method", BASELINES)
    def test_ranks_alike_on_either_kind_of_store(self, stores, method, targets):
        gradients, embeddings = (
            score(datastore=stores / kind, targets=targets, method=method, progress=False)
            for kind in ("gradients", "embeddings")
        )
        np.testing.assert_allclose(gradients.scores_NJ, embeddings.scores_NJ, rtol=1e-5)  # losses by the batch size
        assert (gradients.subtasks, gradients.target_sets) == (embeddings.subtasks, embeddings.target_sets)
        assert list(gradients.rows.ids) == list(embeddings.rows.ids)

    def test_is_less_for_gradients_and_rds_for_embeddings_unless_named(self, stores, targets):
        for kind, method in (("gradients", "less"), ("embeddings", "rds")):
            store = Datastore.open(stores / kind)
            assert method_of(store, ScoreConfig()) == method
            unnamed, named = (
                score(datastore=store, targets=targets, progress=False, **more).scores_NJ
                for more in ({}, {"method": method})
            )
            np.testing.assert_array_equal(unnamed, named)


class TestWhatItRanksBy:
    def test_is_the_number_of_supervised_tokens(self, stores, kind, targets):
        store = Datastore.open(stores / kind)
        found = score(datastore=store, targets=targets, method="length", progress=False)
        for j in range(2):
            np.testing.assert_array_equal(found.scores_NJ[:, j], store.rows().num_supervised_N)

    def test_is_the_base_models_loss(self, stores, kind, targets):
        found = score(datastore=stores / kind, targets=targets, method="perplexity", progress=False)
        losses_N = Datastore.open(stores / "embeddings").stats(EMBEDDINGS, BASE).losses_N
        for j in range(2):
            np.testing.assert_allclose(found.scores_NJ[:, j], losses_N, rtol=1e-5)

    def test_is_a_number_by_the_seed_alone(self, stores, kind, targets, tiny_rows):
        for seed in (0, 5):
            found = score(datastore=stores / kind, targets=targets, method="random", seed=seed, progress=False)
            other = score(datastore=stores / kind, targets=tiny_rows[:1], method="random", seed=seed, progress=False)
            np.testing.assert_array_equal(found.scores_NJ, np.repeat(random_scores(40, seed)[:, None], 2, axis=1))
            np.testing.assert_array_equal(other.scores_NJ[:, 0], found.scores_NJ[:, 0])

    def test_is_the_words_shared(self, stores, kind, tiny_rows):
        target = {"prompt": "?", "completion": "umber"}
        found = score(datastore=stores / kind, targets=[target], method="bm25", progress=False)
        shares = ["umber" in " ".join(turn["content"] for turn in row["messages"]).split() for row in tiny_rows]
        assert 0 < sum(shares) < 40
        assert (found.score_N > 0).tolist() == shares

    @pytest.mark.parametrize("method", ["bm25", "length", "random"])
    def test_takes_no_model_where_none_is_needed(self, stores, kind, targets, method, monkeypatch):
        monkeypatch.setattr("less.scoring.load_base_model", lambda *_, **__: 1 / 0)
        assert np.isfinite(score(datastore=stores / kind, targets=targets, method=method, progress=False).score_N).all()

    @pytest.mark.parametrize(("method", "reads"), [("bm25", True), ("length", False), ("random", False)])
    def test_reads_the_pool_only_where_it_must(self, tiny_model_folder, tiny_rows, targets, method, reads, tmp_path):
        build_embeddings(model=tiny_model_folder, data=tiny_rows[:4], datastore=tmp_path / "ds", progress=False)
        options = {"datastore": tmp_path / "ds", "targets": targets, "method": method, "progress": False}
        if reads:
            with pytest.raises(DataError, match="in memory"):
                score(**options)
        else:
            score(**options)
        assert np.isfinite(score(**options, data=tiny_rows[:4]).score_N).all()


class TestRefused:
    def test_is_less_without_gradients(self, stores, targets):
        with pytest.raises(
            SettingError, match=r"holds embeddings and no gradients.*--method rds, or .*build-datastore"
        ):
            score(datastore=stores / "embeddings", targets=targets, method="less", progress=False)

    @pytest.mark.parametrize("method", BASELINES)
    @pytest.mark.parametrize(
        "setting", [{"feature_set": "adam-sparse"}, {"normalize": "none"}, {"checkpoint_weights": (1.0,)}]
    )
    def test_is_what_a_baseline_has_not(self, method, setting):
        with pytest.raises(
            SettingError, match=f"{next(iter(setting))} is .*the method {method} has none; leave it out"
        ):
            ScoreConfig(method=method, **setting)

    def test_is_what_rds_has_not_where_the_store_chooses_it(self, stores, targets):
        with pytest.raises(SettingError, match="the method rds has none"):
            score(datastore=stores / "embeddings", targets=targets, normalize="none", progress=False)

    def test_is_a_method_unknown(self):
        with pytest.raises(SettingError, match="method must be one of less, rds,"):
            ScoreConfig(method="best")

    @pytest.mark.parametrize("method", BASELINES)
    def test_is_every_baseline_on_a_prefiltered_store(self, prefiltered, tiny_target_file, method):
        with pytest.raises(SettingError, match=r"is no baseline\. Use the store of all rows, .*\.prefilter"):
            score(datastore=prefiltered, targets=tiny_target_file, method=method, progress=False)
        found = score(datastore=f"{prefiltered}.prefilter", targets=tiny_target_file, method="length", progress=False)
        assert len(found.score_N) == 12

    @pytest.mark.parametrize("method", ["length", "rds"])
    def test_is_a_store_without_a_row(self, tiny_model_folder, targets, method, tmp_path):
        build_embeddings(model=tiny_model_folder, data=[{"id": "bare"}], datastore=tmp_path / "ds", progress=False)
        with pytest.raises(DataError, match="no row to score"):
            score(datastore=tmp_path / "ds", targets=targets, method=method, data=[{"id": "bare"}], progress=False)


@pytest.fixture(scope="module")
def prefiltered(tiny_model_folder, tiny_run, tiny_rows, tiny_target_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prefiltered")
    (folder / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_rows[:12]))
    build_datastore(
        model=tiny_model_folder, checkpoints=tiny_run, data=folder / "pool.jsonl", datastore=folder / "ds",
        prefilter=0.5, targets=tiny_target_file, proj_dim=64, progress=False,
    )  # fmt: skip
    return folder / "ds"
