"""RDS+ against cosines by hand in float64, and stores of embeddings beside stores of gradients."""

import json
import os
import shutil

import numpy as np
import pytest
import torch

import less.embedding_store
from datastore import Datastore
from datastore.errors import DataError, ProvenanceError
from less import build_embeddings, score, select
from less.baselines.rds import at_rows_of, embedding_store, embeddings_folder, rds_scores
from less.data.conversations import conversation_of
from less.data.rendering import RenderConfig, Renderer
from less.embedding_store import BASE
from less.embeddings import EMBEDDINGS, embedding_features_ref
from less.models import load_base_model, load_tokenizer
from less.pool import Pool


@pytest.fixture(autouse=True)
def no_power_cut(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def embed(tiny_model_folder):
    def call(folder, data, **changes):
        options = {"model": tiny_model_folder, "shard_rows": 16, "tokens_per_batch": 256, "progress": False}
        return build_embeddings(datastore=folder, data=data, **options | changes)

    return call


@pytest.fixture(scope="module")
def embeddings(embed, tiny_pool, tmp_path_factory):
    """A store of embeddings of the tiny pool, in float32, which no test writes to."""
    return embed(tmp_path_factory.mktemp("embeddings") / "store", tiny_pool, feature_dtype="float32")


@pytest.fixture(scope="module")
def base(tiny_model_folder):
    return load_base_model(tiny_model_folder).eval()


@pytest.fixture(scope="module")
def units(tiny_model_folder, base):
    """Unit embeddings of rows by the formula, in float64."""
    renderer = Renderer(load_tokenizer(tiny_model_folder), RenderConfig())

    def of(rows):
        found = [embedding_features_ref(base, renderer.render(conversation_of(row)).input_ids) for row in rows]
        return torch.nn.functional.normalize(torch.stack(found), dim=1).numpy()

    return of


@pytest.fixture
def copied(tiny_store, tmp_path):
    """A store of gradients without embeddings beside it."""
    return shutil.copytree(tiny_store, tmp_path / "store")


@pytest.fixture
def num_embedded(monkeypatch):
    """Rows of pools that are embedded from now on."""
    counted = []
    real = less.embedding_store.embedding_features

    def counting(model, batch):
        counted.extend(batch.rows)
        return real(model, batch)

    monkeypatch.setattr(less.embedding_store, "embedding_features", counting)
    return lambda: len(counted)


class TestScores:
    def test_are_cosines_with_the_subtasks_mean_unit_target(self, embeddings, units, tiny_rows, tiny_targets):
        found = score(datastore=embeddings, targets={"tones": tiny_targets}, progress=False)
        assert found.subtasks == ("a", "b")
        cosine_NM = units(tiny_rows) @ units(tiny_targets).T
        for j, subtask in enumerate(found.subtasks):
            own = [m for m, target in enumerate(tiny_targets) if target["subtask"] == subtask]
            np.testing.assert_allclose(found.scores_NJ[:, j], cosine_NM[:, own].mean(axis=1), rtol=0, atol=1e-6)

    def test_can_be_the_cosine_with_the_mean_target(self, embeddings, units, tiny_rows, tiny_targets):
        found = score(datastore=embeddings, targets={"tones": tiny_targets}, aggregate="cosine-of-mean", progress=False)
        plain = score(datastore=embeddings, targets={"tones": tiny_targets}, progress=False)
        assert np.abs(found.scores_NJ).max() <= 1 + 1e-6
        assert (found.score_N > plain.score_N).all()  # the mean of unit vectors is shorter than 1

    def test_do_not_depend_on_the_batch(self, embeddings, tiny_targets):
        one, many = (
            score(datastore=embeddings, targets={"t": tiny_targets}, tokens_per_batch=size, progress=False).scores_NJ
            for size in (1, 4096)
        )
        np.testing.assert_allclose(one, many, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("fails", [True, False])
    def test_give_the_model_back_in_its_mode(self, embeddings, tiny_model_folder, training, fails, monkeypatch):
        renderer = Renderer(load_tokenizer(tiny_model_folder), RenderConfig())
        target = renderer.render(conversation_of({"prompt": "mix red", "completion": "jade"}))
        model = load_base_model(tiny_model_folder).train(training)
        if fails:
            monkeypatch.setattr("less.baselines.rds.collate", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                rds_scores(embeddings, model, [target], [0], 1)
        else:
            rds_scores(embeddings, model, [target], [0], 1)
        assert model.training == training


class TestTheStoreBeside:
    def test_is_made_once(self, copied, tiny_target_file, tiny_rows, num_embedded):
        options = {"datastore": copied, "targets": tiny_target_file, "count": 40, "method": "rds", "progress": False}
        (first,) = select(**options)
        assert num_embedded() == len(tiny_rows)
        folder = embeddings_folder(Datastore.open(copied))
        assert (folder.name, folder.parent) == ("store.rds", copied.parent)
        (second,) = select(**options)
        (third,) = select(**options | {"tokens_per_batch": 64})  # of the targets: the embeddings stay
        assert num_embedded() == len(tiny_rows)
        assert first.ids == second.ids == third.ids
        np.testing.assert_array_equal(first.scores, second.scores)
        score(datastore=copied, targets=tiny_target_file, method="perplexity", progress=False)
        assert num_embedded() == len(tiny_rows)

    def test_ranks_as_a_store_of_embeddings_does(self, copied, embed, tiny_pool, tiny_target_file, tmp_path):
        beside = score(datastore=copied, targets=tiny_target_file, method="rds", progress=False)
        embed(tmp_path / "own", tiny_pool)
        own = score(datastore=tmp_path / "own", targets=tiny_target_file, progress=False)
        np.testing.assert_array_equal(own.scores_NJ, beside.scores_NJ)
        assert list(own.rows.ids) == list(beside.rows.ids)

    def test_is_completed_when_the_pool_has_grown(self, build, tiny_rows, tiny_target_file, num_embedded, tmp_path):
        (tmp_path / "more.jsonl").write_text(json.dumps(tiny_rows[30]) + "\n")
        (tmp_path / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_rows[:5]))
        options = {"datastore": tmp_path / "ds", "targets": tiny_target_file, "method": "rds", "progress": False}
        build(tmp_path / "ds", tmp_path / "pool.jsonl")
        first = score(**options)
        build(tmp_path / "ds", [tmp_path / "pool.jsonl", tmp_path / "more.jsonl"])
        grown = score(**options)
        assert num_embedded() == 6
        np.testing.assert_array_equal(grown.scores_NJ[:5], first.scores_NJ)
        assert grown.rows.ids[5] == "row-30"

    def test_is_rendered_as_the_pool_was(self, build, tiny_rows, tiny_target_file, tmp_path):
        rows = [{**row, "system": "be brief", "prompt": "mix", "completion": "teal"} for row in tiny_rows[:4]]
        rows = [{name: row[name] for name in ("id", "system", "prompt", "completion")} for row in rows]
        build(tmp_path / "ds", rows, system_prompt="none", max_length=110, chat_template="chatml")
        store = Datastore.open(tmp_path / "ds")
        score(datastore=store, data=rows, targets=tiny_target_file, method="rds", progress=False)
        beside = Datastore.open(tmp_path / "ds.rds")
        assert beside.settings["rendering"] == store.settings["rendering"]
        np.testing.assert_array_equal(beside.rows().digests_N, store.rows().digests_N)

    def test_is_rendered_by_the_pools_tokenizer_where_that_is_not_the_models(
        self, build, tiny_model_folder, tiny_tokenizer, tiny_rows, tmp_path
    ):
        """The model may be given again; the tokenizer is still the store's."""
        other = load_tokenizer(tiny_model_folder)
        other.chat_template = str(other.chat_template).replace("<|", "<<")
        other.save_pretrained(tmp_path / "tokenizer")
        build(tmp_path / "ds", tiny_rows[:4], tokenizer=tmp_path / "tokenizer")
        options = {"datastore": tmp_path / "ds", "data": tiny_rows[:4], "targets": tiny_rows[:2], "progress": False}
        for method in ("rds", "perplexity"):
            score(**options, method=method, model=tiny_model_folder)
        store, beside = Datastore.open(tmp_path / "ds"), Datastore.open(tmp_path / "ds.rds")
        assert beside.settings["rendering"] == store.settings["rendering"]
        np.testing.assert_array_equal(beside.rows().digests_N, store.rows().digests_N)

    def test_that_was_made_otherwise_is_refused(self, copied, embed, tiny_pool, tiny_target_file):
        embed(copied.with_name("store.rds"), tiny_pool, max_length=16)
        with pytest.raises(ProvenanceError, match="max_length"):
            score(datastore=copied, targets=tiny_target_file, method="rds", progress=False)

    def test_of_a_store_of_embeddings_is_the_store(self, embeddings, base, tiny_model_folder):
        pool = Pool(embeddings, None)
        assert embedding_store(embeddings, base, load_tokenizer(tiny_model_folder), pool) is embeddings

    def test_of_another_model_is_refused(self, embeddings, tiny_model, tiny_model_folder):
        with torch.no_grad():
            tiny_model.lm_head.weight[0] += 1
        with pytest.raises(ProvenanceError, match="not the model"):
            embedding_store(embeddings, tiny_model, load_tokenizer(tiny_model_folder), Pool(embeddings, None))


@pytest.fixture(scope="module")
def parts(tiny_rows, tmp_path_factory):
    """Three files; in the second, a row that cannot be used."""
    folder = tmp_path_factory.mktemp("parts")
    rows = [tiny_rows[:5], [tiny_rows[9], {"id": "bare"}, tiny_rows[10], tiny_rows[11]], tiny_rows[20:22]]
    for n, own in enumerate(rows):
        (folder / f"part-{n}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    return [folder / f"part-{n}.jsonl" for n in range(3)]


class TestAtRowsOf:
    def test_finds_each_row_where_sources_stand_in_another_order(self, build, embed, parts, tmp_path):
        build(tmp_path / "ds", parts[:2])
        store, other = Datastore.open(tmp_path / "ds"), embed(tmp_path / "own", [parts[2], parts[1], parts[0]])
        positions_N = at_rows_of(store, other)
        ours, theirs = store.rows(), other.rows()
        assert [theirs.ids[n] for n in positions_N] == list(ours.ids)
        np.testing.assert_array_equal(theirs.digests_N[positions_N], ours.digests_N)
        assert positions_N.tolist() != sorted(positions_N.tolist())

    def test_finds_each_row_where_the_store_has_skipped_some(self, build, embed, parts, tmp_path, monkeypatch):
        """A gradient that is not finite costs a row its features, and not its embedding."""
        import less.pipeline

        real = less.pipeline.gradient_features

        def broken(model, batch, feature_sets):
            features = real(model, batch, feature_sets)
            for own in features.features_BK.values():
                own[[row == 2 for row in batch.rows]] = float("nan")
            return features

        monkeypatch.setattr(less.pipeline, "gradient_features", broken)
        build(tmp_path / "ds", parts[0])
        store, whole = Datastore.open(tmp_path / "ds"), embed(tmp_path / "own", parts[0])
        assert [row.row for row in store.skipped] == [2]
        assert at_rows_of(store, whole).tolist() == [0, 1, 3, 4]
        with pytest.raises(DataError, match=r"1 rows of .*own have no embedding in .*ds, such as row-2"):
            at_rows_of(whole, store)

    def test_says_which_row_is_missing(self, build, embed, parts, tmp_path):
        build(tmp_path / "ds", parts[:2])
        with pytest.raises(DataError, match=r"5 rows of .* have no embedding in .*own, such as row-0: see `gradsift"):
            at_rows_of(Datastore.open(tmp_path / "ds"), embed(tmp_path / "own", parts[1]))

    def test_says_so_where_nothing_is_embedded(self, build, embed, parts, tmp_path):
        build(tmp_path / "ds", parts[0])
        nothing = embed(tmp_path / "own", [{"id": "bare"}])
        assert nothing.num_rows == 0
        with pytest.raises(DataError, match="5 rows"):
            at_rows_of(Datastore.open(tmp_path / "ds"), nothing)

    def test_is_the_identity_on_the_store_itself(self, embeddings):
        assert at_rows_of(embeddings, embeddings).tolist() == [*range(embeddings.num_rows)]
        losses_N = embeddings.stats(EMBEDDINGS, BASE).losses_N
        assert (losses_N > 0).all()
