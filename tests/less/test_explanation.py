"""An explanation adds up: its parts are the score that select ranks by, and its neighbours are the nearest rows."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from datastore import Datastore, GradientIndex, GradientSpace, IndexConfig, build_index
from datastore.errors import DamagedStoreError, DataError, SettingError
from less import ExplainConfig, build_embeddings, explain, score, select
from less.features import gradient_features
from less.scoring import Scorer


@pytest.fixture(autouse=True)
def no_power_cut(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def stores(tmp_path_factory, build, tiny_rows):
    """Stores that no test may write to: two feature sets, of a pool in two sources with repeats."""
    folder = tmp_path_factory.mktemp("stores")
    first, second = folder / "first.jsonl", folder / "second.jsonl"
    wordless = {"id": "wordless", "text": "x"}
    for path, rows in ((first, [*tiny_rows[:20], wordless]), (second, [*tiny_rows[20:], tiny_rows[3]])):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    build(folder / "ds", [first, second], update_rule=["adam", "sgd"])
    return folder


@pytest.fixture
def copy(stores, tmp_path):
    """A store that may be indexed and spoilt."""
    return Path(shutil.copytree(stores / "ds", tmp_path / "ds"))


@pytest.fixture
def ask(stores, tiny_target_file):
    def call(row="row-7", **changes):
        options = {"datastore": stores / "ds", "feature_set": "adam-sparse", "targets": tiny_target_file}
        return explain(row=row, progress=False, **options | changes)

    return call


class TestInfluence:
    @pytest.mark.parametrize("feature_set", ["adam-sparse", "sgd-sparse"])
    def test_is_the_score_and_rank_of_select_and_its_parts_add_up(self, ask, stores, tiny_target_file, feature_set):
        targets = {"tones": tiny_target_file, "sums": [json.loads(tiny_target_file.read_text().splitlines()[0])]}
        scores = score(datastore=stores / "ds", targets=targets, feature_set=feature_set, progress=False)
        selections = select(datastore=stores / "ds", targets=targets, feature_set=feature_set, count=40, progress=False)
        for name in ("row-7", "row-33"):
            found = ask(name, targets=targets, feature_set=feature_set)
            position = scores.rows.ids.index(name)
            assert (found.id, found.num_rows) == (name, 41)
            for target_set, selection in zip(found.target_sets, selections, strict=True):
                place = selection.positions.tolist().index(position)
                assert target_set.name == selection.name
                assert target_set.rank == place + 1
                assert target_set.score == selection.scores[place]
                assert target_set.subtask == selection.subtasks[place]
            assert {(pull.target_set, pull.subtask) for pull in found.subtasks} == {
                ("tones", "a"), ("tones", "b"), ("sums", "a"),
            }  # fmt: skip
            for pull in found.subtasks:
                j = list(zip(scores.target_sets, scores.subtasks, strict=True)).index((pull.target_set, pull.subtask))
                assert pull.score == scores.scores_NJ[position, j]
                assert pull.rank == 1 + np.count_nonzero(scores.scores_NJ[:, j] > pull.score)
                assert [*pull.by_checkpoint] == [facts.name for facts in found.checkpoints]
                assert sum(pull.by_checkpoint.values()) == pytest.approx(pull.score, abs=1e-6)
            assert [pull.score for pull in found.subtasks] == sorted((p.score for p in found.subtasks), reverse=True)

    def test_of_a_subtask_is_the_mean_of_its_targets(self, ask):
        found = ask(top_targets=99)
        assert len(found.targets) == 5
        for pull in found.subtasks:
            own = [target.contribution for target in found.targets if target.subtask == pull.subtask]
            assert len(own) == pull.num_targets
            assert np.mean(own) == pytest.approx(pull.score, abs=1e-6)
        for target in found.targets:
            weighted = [facts.weight * target.cosines[facts.name] for facts in found.checkpoints]
            assert target.contribution == pytest.approx(sum(weighted), abs=1e-9)
            assert max(map(abs, target.cosines.values())) <= 1
        assert [t.contribution for t in found.targets] == sorted((t.contribution for t in found.targets), reverse=True)
        assert ask(top_targets=2).targets == found.targets[:2]
        assert ask(top_targets=0).targets == ()

    def test_splits_into_the_momentum_that_all_rows_share_and_the_rest(self, ask, stores, tiny_target_file):
        found, store = ask(), Datastore.open(stores / "ds")
        position = store.rows("adam-sparse").ids.index("row-7")
        for facts in found.checkpoints:
            direction_K = store.direction("adam-sparse", facts.name)
            row_K = next(iter(GradientSpace(store, "adam-sparse", facts.name).vectors(np.array([position]))))
            cosine = row_K @ direction_K / np.linalg.norm(direction_K)
            assert facts.momentum_cosine == pytest.approx(cosine, abs=1e-5)
            assert 0 < abs(facts.momentum_cosine) <= 1
        for pull in found.subtasks:
            assert pull.from_momentum not in (None, pull.score)

    def test_of_a_row_that_is_nothing_but_momentum_is_all_momentum(self, ask, stores, monkeypatch):
        store = Datastore.open(stores / "ds")
        position = np.array([store.rows("adam-sparse").ids.index("row-7")])

        def own_feature(self, feature_set, checkpoint):
            return GradientSpace(store, feature_set, checkpoint).vectors(position)[0]

        monkeypatch.setattr(Datastore, "direction", own_feature)
        found = ask(neighbours=3)
        assert [facts.momentum_cosine for facts in found.checkpoints] == pytest.approx([1, 1])
        for pull in found.subtasks:
            assert pull.from_momentum == pytest.approx(pull.score, abs=1e-5)
        for near in found.neighbours:
            assert near.from_momentum == pytest.approx(near.similarity, abs=1e-5)

    def test_of_plain_gradients_has_no_momentum(self, ask):
        found = ask(feature_set="sgd-sparse")
        assert all(facts.momentum_cosine is None for facts in found.checkpoints)
        assert all(pull.from_momentum is None for pull in found.subtasks)
        assert all(near.from_momentum is None for near in found.neighbours)

    def test_leaves_out_targets_without_a_direction_and_says_so(self, ask, copy, monkeypatch):
        real = Scorer.target_features

        def with_a_dead_one(self, target_sets):
            for name, features_MK in real(self, target_sets):
                features_MK = features_MK.clone()
                features_MK[1] = 0
                yield name, features_MK

        monkeypatch.setattr(Scorer, "target_features", with_a_dead_one)
        found = ask(top_targets=9, datastore=copy)
        assert {target.id for target in found.targets} == {f"target-{n}" for n in (0, 2, 3, 4)}
        assert [(row.id, row.reason) for row in found.skipped_targets] == [("target-1", "zero norm")]
        assert {pull.subtask: pull.num_targets for pull in found.subtasks} == {"a": 3, "b": 1}

    def test_computes_each_target_once_a_checkpoint(self, ask, copy, monkeypatch):
        computed = []

        def counting(model, batch, feature_sets):
            computed.append(len(batch.input_ids_BT))
            return gradient_features(model, batch, feature_sets)

        monkeypatch.setattr("less.scoring.gradient_features", counting)
        ask(datastore=copy)
        assert sum(computed) == 5 * 2


class TestNeighbours:
    def test_are_those_of_the_scan_and_of_the_index(self, ask, copy):
        store = Datastore.open(copy)
        space = GradientSpace(store, "adam-sparse")
        position = np.array([store.rows("adam-sparse").ids.index("row-7")])
        similarities, positions = space.nearest_ref(position, 6)
        scanned = ask(datastore=copy, targets=None, neighbours=6)
        assert scanned.neighbours_by == "a scan of all 41 rows"
        assert [near.similarity for near in scanned.neighbours] == similarities[0].tolist()
        rows = store.rows("adam-sparse")
        assert [(near.source, near.row) for near in scanned.neighbours] == [
            (rows.sources_N[n], rows.rows_N[n]) for n in positions[0].tolist()
        ]
        build_index(store, "adam-sparse", config=IndexConfig(type="ivf", dim=32))
        indexed = ask(datastore=copy, targets=None, neighbours=6)
        assert indexed.neighbours == scanned.neighbours
        assert indexed.neighbours_by == "the index (ivf), which finds 1.00 of a row's 10 nearest"
        other = ask(datastore=copy, targets=None, feature_set="sgd-sparse")
        assert other.neighbours_by == "a scan of all 41 rows"
        assert "neighbours" not in str(ask(targets=None, neighbours=0).neighbours)

    def test_tell_a_row_with_the_same_tokens(self, ask):
        found = ask("0:3", targets=None, neighbours=40)
        nearest = found.neighbours[0]
        assert (nearest.id, nearest.source, nearest.row, nearest.same_tokens) == ("row-3", 1, 20, True)
        assert nearest.similarity == pytest.approx(1, abs=1e-5)
        assert nearest.text == found.text
        assert nearest.where == "second.jsonl:21"
        assert not any(near.same_tokens for near in found.neighbours[1:])
        assert len(found.neighbours) == 40

    def test_are_scanned_for_where_the_index_is_of_another_state_of_the_store(self, ask, copy):
        store = Datastore.open(copy)
        built = build_index(store, "adam-sparse")
        doc = json.loads((built.folder / "index.json").read_text()) | {"manifest_sha256": "00"}
        doc.pop("sha256")
        from datastore.build import json_hash

        (built.folder / "index.json").write_text(json.dumps(doc | {"sha256": json_hash(doc)}))
        found = ask(datastore=copy, targets=None)
        assert "a scan of all 41 rows (the index is of another state" in found.neighbours_by
        assert "`gradsift index` again" in found.neighbours_by
        assert found.neighbours == ask(targets=None).neighbours

    def test_by_an_index_of_one_checkpoint_say_so(self, ask, copy):
        store = Datastore.open(copy)
        build_index(store, "adam-sparse", config=IndexConfig(checkpoint=store.checkpoints[0]))
        found = ask(datastore=copy, targets=None)
        assert f"(flat at {store.checkpoints[0]})" in found.neighbours_by
        cosine = found.checkpoints[0].momentum_cosine
        near = found.neighbours[0]
        other = ask(f"{near.source}:{near.row}", datastore=copy, targets=None).checkpoints[0].momentum_cosine
        assert near.from_momentum == pytest.approx(cosine * other, abs=1e-5)

    def test_of_a_damaged_index_are_refused(self, ask, copy):
        folder = build_index(Datastore.open(copy), "adam-sparse").folder
        (folder / "index.faiss").write_bytes(b"x")
        with pytest.raises(DamagedStoreError, match=r"index\.faiss is damaged"):
            ask(datastore=copy, targets=None)
        with pytest.raises(DamagedStoreError):
            GradientIndex.open(Datastore.open(copy), "adam-sparse")

    def test_of_embeddings_are_found_and_their_score_is_not_explained(
        self, tiny_model_folder, stores, tiny_target_file, tmp_path
    ):
        build_embeddings(
            model=tiny_model_folder, data=stores / "first.jsonl", datastore=tmp_path / "ds", progress=False
        )
        found = explain(datastore=tmp_path / "ds", row="row-7", progress=False)
        assert len(found.neighbours) == 5
        assert [facts.momentum_cosine for facts in found.checkpoints] == [None]
        with pytest.raises(SettingError, match=r"holds embeddings.*leave out --targets"):
            explain(datastore=tmp_path / "ds", row="row-7", targets=tiny_target_file, progress=False)


class TestFacts:
    def test_are_those_of_the_store_and_the_pool(self, ask, stores, tiny_rows):
        store, found = Datastore.open(stores / "ds"), ask("row-25", targets=None)
        rows = store.rows("adam-sparse")
        n = rows.ids.index("row-25")
        assert (found.source, found.row, found.where) == (1, 5, "second.jsonl:6")
        assert found.text == "\n".join(turn["content"] for turn in tiny_rows[25]["messages"])
        assert (found.num_tokens, found.num_supervised) == (rows.num_tokens_N[n], rows.num_supervised_N[n])
        for facts in found.checkpoints:
            stats = store.stats("adam-sparse", facts.name)
            assert (facts.loss, facts.grad_norm, facts.update_norm) == (
                stats.losses_N[n], stats.grad_norms_N[n], stats.update_norms_N[n],
            )  # fmt: skip
        assert sum(facts.weight for facts in found.checkpoints) == pytest.approx(1)
        assert (found.target_sets, found.subtasks, found.targets) == ((), (), ())

    def test_become_json(self, ask):
        doc = json.loads(json.dumps(ask().as_json(), allow_nan=False))
        assert doc["id"] == "row-7"
        assert len(doc["neighbours"]) == len(doc["targets"]) == 5
        assert [*doc["subtasks"][0]["by_checkpoint"]] == [facts["name"] for facts in doc["checkpoints"]]

    def test_without_targets_load_no_model(self, ask, monkeypatch):
        monkeypatch.setattr("less.explanation.open_scorer", None)
        ask(targets=None)


class TestFindingARow:
    @pytest.mark.parametrize("row", ["0:7", (0, 7), "row-7"])
    def test_by_id_or_by_source_and_number(self, ask, row):
        assert ask(row, targets=None, neighbours=0).id == "row-7"

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ("row-3", r"2 rows of .* have the id 'row-3': 0:3, 1:20 .*Choose one, as in --row 0:3"),
            (
                "row-99",
                r"has no row 'row-99'; expected an id such as row-0, row-1, or SOURCE:NUMBER.*0: first.jsonl, 1: ",
            ),
            ("wordless", r"first\.jsonl:21 has no features .* skipped: no messages"),
            ("0:20", r"first\.jsonl:21 has no features .* skipped: no messages"),
            ((0, 20), r"first\.jsonl:21 has no features .* skipped: no messages"),
            ("2:0", "has no row '2:0'"),
            ((1, 21), "has no row '1:21'"),
            ("", "has no row ''"),
        ],
    )
    def test_that_is_not_there_says_what_there_is(self, ask, row, message):
        with pytest.raises(SettingError, match=message):
            ask(row, targets=None)

    def test_an_id_that_looks_like_a_key_goes_first(self, build, tiny_rows, tmp_path):
        rows = [{**tiny_rows[n], "id": name} for n, name in enumerate(["0:1", "a", "x", "x"])]
        build(tmp_path / "ds", rows)
        asked = {"datastore": tmp_path / "ds", "data": rows, "neighbours": 1, "progress": False}
        assert explain(row="0:1", **asked).row == 0
        assert explain(row=(0, 1), **asked).row == 1
        with pytest.raises(SettingError, match="as in --row 0:2"):
            explain(row="x", **asked)


def test_a_pool_that_has_changed_is_refused(ask, stores, tmp_path):
    with pytest.raises(DataError, match="no source of"):
        ask(targets=None, data=[{"messages": []}])


@pytest.mark.parametrize("settings", [{"neighbours": -1}, {"top_targets": -1}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(SettingError, match="must be at least 0, got -1"):
        ExplainConfig(**settings)


def test_the_feature_set_has_to_be_named_where_there_are_several(ask):
    with pytest.raises(SettingError, match=r"adam-sparse, sgd-sparse, none was chosen; .*--feature-set"):
        ask(feature_set=None)
