"""From scores to files: which rows are chosen, where they are written, and what stands in them."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from datastore import Datastore
from datastore.errors import DataError, SettingError
from less import build_datastore, ranking, select
from less.data.sources import Arrow, JsonLines
from less.influence import InfluenceScores
from less.scoring import Scorer

ADDED = ("influence_score", "influence_rank", "influence_subtask", "influence_reason")


@pytest.fixture(autouse=True)
def no_power_cut(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def write_lines(path: Path, lines) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    return path


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def build(tiny_model_folder, tiny_run):
    def call(folder, data, **changes):
        build_datastore(
            model=tiny_model_folder, checkpoints=tiny_run, data=data, datastore=folder,
            **{"proj_dim": 64, "shard_rows": 5, "progress": False} | changes,
        )  # fmt: skip
        return folder

    return call


@pytest.fixture(scope="module")
def lines(tiny_rows):
    """Twelve good rows, two bad ones, and one that stands there twice."""
    good = [json.dumps(row, separators=(",", ": ")) for row in tiny_rows[:12]]
    return [*good[:4], "{bad", *good[4:], '{"id": "wordless"}', good[2]]


@pytest.fixture(scope="module")
def pool(tmp_path_factory, lines):
    return write_lines(tmp_path_factory.mktemp("pool") / "pool.jsonl", lines)


@pytest.fixture(scope="module")
def store(tmp_path_factory, build, pool):
    return build(tmp_path_factory.mktemp("store") / "ds", pool)


@pytest.fixture(scope="module")
def targets(tiny_targets, tiny_rows):
    """Two target sets, one with two subtasks."""
    return {"tones": tiny_targets, "sums": tiny_rows[20:23]}


@pytest.fixture
def choose(store, targets):
    def call(**changes):
        options = {"datastore": store, "targets": targets, "count": 4, "progress": False}
        options |= changes
        if "fraction" in changes:
            del options["count"]
        return select(**options)

    return call


@pytest.fixture
def rigged(monkeypatch):
    """Put `scores_NJ` in place of the scan's."""

    def call(scores_NJ):
        real = Scorer.score

        def score(self, target_sets):
            found, _ = real(self, target_sets)
            assert found.scores_NJ.shape == np.shape(scores_NJ)
            given_NJ = np.array(scores_NJ, np.float32)
            return InfluenceScores(found.rows, given_NJ, found.subtasks, found.target_sets), target_sets

        monkeypatch.setattr(Scorer, "score", score)

    return call


class TestSelection:
    def test_is_one_for_each_target_set(self, choose, targets):
        tones, sums = choose()
        assert (tones.name, sums.name) == ("tones", "sums")
        assert tones.influence.subtasks == ("a", "b")
        assert sums.influence.subtasks == ("sums",)
        (alone,) = choose(targets={"sums": targets["sums"]})
        assert sums.ids == alone.ids
        assert np.allclose(sums.scores, alone.scores, atol=1e-6)

    @pytest.mark.parametrize("combine", [None, "max", "round-robin"])
    def test_holds_the_right_rows_best_first(self, choose, lines, combine):
        usable = [json.loads(line) for n, line in enumerate(lines) if n not in (4, 13)]
        for selection in choose(combine=combine):
            assert len(selection.positions) == len(set(selection.positions.tolist())) == 4
            assert [usable[position] for position in selection.positions] == [r.columns for r in selection.records]
            assert selection.ids == tuple(usable[position]["id"] for position in selection.positions)
            for position, score, subtask in zip(selection.positions, selection.scores, selection.subtasks, strict=True):
                column = selection.influence.subtasks.index(subtask)
                assert selection.influence.scores_NJ[position, column] == score
            if combine != "round-robin":
                assert (
                    selection.positions.tolist() == np.argsort(-selection.influence.score_N, kind="stable")[:4].tolist()
                )

    def test_of_a_fraction_takes_the_ceiling_of_the_scored_rows(self, choose):
        assert [len(s.ids) for s in choose(fraction=0.05)] == [1, 1]  # of 13, not of 15
        assert [len(s.ids) for s in choose(fraction=0.54)] == [8, 8]
        assert [len(s.ids) for s in choose(fraction=1.0)] == [13, 13]

    def test_combined_by_max_ranks_by_the_best_subtask_of_any_set(self, choose):
        tones, sums = choose(count=13)
        (both,) = choose(count=13, combine="max")
        assert both.name == "tones+sums"
        assert both.influence.subtasks == ("tones/a", "tones/b", "sums")
        expected_N = np.maximum(tones.influence.score_N, sums.influence.score_N)
        assert np.allclose(both.influence.score_N, expected_N)
        assert both.positions.tolist() == np.argsort(-expected_N, kind="stable").tolist()
        assert all(subtask in ("tones/a", "tones/b", "sums") for subtask in both.subtasks)

    def test_by_turns_lets_each_set_add_its_best_that_is_left(self, choose, rigged):
        scores_NJ = np.zeros((13, 3), np.float32)
        scores_NJ[:4] = [[0.1, 0.9, 0.8], [0.5, 0.1, 0.0], [0.0, 0.0, 0.7], [0.4, 0.6, 0.2]]
        rigged(scores_NJ)
        (both,) = choose(combine="round-robin")
        assert both.positions.tolist() == [0, 2, 3, 1]  # tones, sums, tones, sums: row 1 ties with the rest at 0
        assert both.subtasks == ("tones/b", "sums", "tones/b", "sums")
        assert both.scores.tolist() == pytest.approx([0.9, 0.7, 0.6, 0.0])
        assert [column["influence_rank"] for column in both.columns] == [1, 2, 3, 4]

    def test_gives_ties_to_the_earlier_row_and_the_first_subtask(self, choose, rigged):
        rigged(np.ones((13, 3)))
        for selection in choose():
            assert selection.positions.tolist() == [0, 1, 2, 3]
            assert set(selection.subtasks) == {selection.influence.subtasks[0]}

    def test_of_a_duplicate_takes_the_earlier_first(self, choose):
        for selection in choose(count=13):
            order = selection.positions.tolist()
            assert order.index(2) + 1 == order.index(12)  # the same row, with the same score
            assert selection.scores[order.index(2)] == pytest.approx(selection.scores[order.index(12)], abs=1e-5)

    def test_never_holds_a_skipped_row(self, choose):
        for selection in choose(fraction=1.0):
            assert "wordless" not in selection.ids
            assert len(selection.ids) == 13

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"count": 0}, "count must be a whole number, at least 1, got 0"),
            ({"count": 14}, "between 1 and the 13 scored rows, got 14"),
            ({"count": None}, "give one of fraction, count, token_budget, got none"),
            ({"away_above": 0.1}, "give those with --away-from"),
            ({"caps": ["shade=3"]}, "no column 'shade' to select by; it has id, kind, messages"),
            ({"fraction": 0.0}, "above 0 and at most 1, got 0"),
            ({"fraction": 1.5}, "got 1.5"),
            ({"combine": "mean"}, "combine must be one of max, round-robin, got 'mean'"),
        ],
    )
    def test_out_of_range_is_refused_before_a_model_is_loaded(self, choose, tmp_path, changes, message):
        with pytest.raises(SettingError, match=message):
            choose(model=tmp_path / "nowhere", **changes)

    def test_lists_the_skipped_targets_of_its_own_set(self, choose, targets):
        tones, sums = choose(targets={"tones": targets["tones"], "sums": [{"text": "x"}, *targets["sums"]]})
        assert not tones.skipped_targets
        assert [(row.where, row.reason) for row in sums.skipped_targets] == [("memory[0]", "no messages")]

    def test_does_not_read_the_pool_before_all_is_scored(self, choose, monkeypatch):
        scored = []
        real = Scorer.score

        def score(self, target_sets):
            for source in (JsonLines, Arrow):
                monkeypatch.setattr(source, "iter_records", None)
            found = real(self, target_sets)
            scored.append(True)
            return found

        real_take = JsonLines.take

        def take(self, numbers):
            numbers = list(numbers)
            assert scored
            assert len(numbers) == 4
            return real_take(self, numbers)

        monkeypatch.setattr(Scorer, "score", score)
        monkeypatch.setattr(JsonLines, "take", take)
        assert len(choose()) == 2


class TestStrategies:
    """Each reaches the rows that are written; what it chooses is tested in `tests/less/selection`."""

    @pytest.fixture
    def one(self, choose, targets):
        def call(**changes):
            (selection,) = choose(**{"targets": {"tones": targets["tones"]}, "count": 6} | changes)
            return selection

        return call

    @pytest.fixture
    def kinds(self, lines):
        rows = [json.loads(line) for line in lines if not line.startswith("{bad")]
        return {row["id"]: row.get("kind") for row in rows}

    def test_a_row_says_why_it_was_taken(self, one):
        assert {column["influence_reason"] for column in one().columns} <= {"best for a", "best for b"}

    def test_values_of_a_column_take_turns(self, one, kinds):
        selection = one(balance="kind")
        turns = [kinds[name] for name in selection.ids]
        assert selection.choice.why == [f"turn of kind {kind}" for kind in turns]
        assert turns[0] != turns[1]

    def test_a_cap_holds(self, one, kinds):
        first = kinds[one().ids[0]]
        capped = one(count=10, caps=[f"kind={first}:1"])
        assert [kinds[name] for name in capped.ids].count(first) == 1
        assert len(capped.choice.passed_over[f"cap kind={first}"])

    def test_a_token_budget_is_not_exceeded(self, one, store):
        rows = Datastore.open(store).rows()
        selection = one(count=None, token_budget=20)
        assert 0 < rows.num_supervised_N[selection.positions].sum() <= 20

    def test_an_exact_duplicate_is_left_out(self, one):
        everything, distinct = one(count=13), one(count=13, duplicates="exact")
        assert len(everything.ids) == 13
        assert len(distinct.ids) == 12
        assert [len(rows) for rows in distinct.choice.passed_over.values()] == [1]

    @pytest.mark.parametrize("dtype", ["int8", "float32"])
    def test_a_row_alike_in_gradient_space_is_left_out(self, build, pool, targets, tmp_path, dtype):
        store = build(tmp_path / "ds", pool, feature_dtype=dtype)
        (selection,) = select(
            datastore=store, targets=targets["sums"], count=13, near_duplicates=0.9999, progress=False
        )
        assert len(selection.ids) == 12
        assert {rule: len(rows) for rule, rows in selection.choice.passed_over.items()} == {"near-duplicate": 1}

    def test_equal_rows_are_alike_however_wide_they_are(self, build, pool, targets, tmp_path, monkeypatch):
        """A sketch of a unit row is no unit row: without its own norm, equal rows would be 0.95 to 1.05 alike."""
        monkeypatch.setattr("less.ranking.SKETCH_DIM", 16)
        store = build(tmp_path / "ds", pool)
        features_of = ranking._features_of(Datastore.open(store), None, True)
        vectors_nd = features_of(np.arange(13))
        assert vectors_nd.shape == (13, 16)
        assert np.square(vectors_nd).sum(axis=1) == pytest.approx(np.ones(13), abs=1e-5)
        (selection,) = select(datastore=store, targets=targets["sums"], count=13, near_duplicates=1.0, progress=False)
        assert len(selection.ids) == 12

    def test_a_baseline_compares_rows_by_the_feature_set_that_is_named(self, build, pool, targets, tmp_path):
        store = build(tmp_path / "ds", pool, update_rule=["adam", "sgd"])
        options = {"datastore": store, "targets": targets["sums"], "method": "bm25", "progress": False}
        with pytest.raises(SettingError, match="adam-sparse, sgd-sparse"):
            select(count=13, near_duplicates=0.9999, **options)
        (selection,) = select(count=13, near_duplicates=0.9999, feature_set="sgd-sparse", **options)
        assert len(selection.ids) == 12
        with pytest.raises(SettingError, match="the method bm25 has none"):
            select(count=3, feature_set="sgd-sparse", **options)

    def test_every_line_of_the_scores_says_what_became_of_its_row(self, one, kinds, tmp_path):
        first = kinds[one().ids[0]]
        selection = one(count=10, caps=[f"kind={first}:1"], scores=tmp_path / "scores.jsonl")
        lines = read_lines(tmp_path / "scores.jsonl")
        assert len({tuple(line) for line in lines}) == 1, "each line has the same fields"
        places = {line["id"]: line["selected"] for line in lines if line["selected"]}
        assert places == {name: rank for rank, name in enumerate(selection.ids, start=1)}
        scored = [line for line in lines if line["skipped"] is None]
        assert [line["score"] is None for line in lines] == [line["skipped"] is not None for line in lines]
        passed_over = [n for n, line in enumerate(scored) if line["passed_over"]]
        assert passed_over == sorted(selection.choice.passed_over[f"cap kind={first}"].tolist()) != []
        assert {scored[n]["passed_over"] for n in passed_over} == {f"cap kind={first}"}

    @pytest.mark.parametrize("diversity", ["mmr", "facility-location"])
    def test_diversity_takes_the_number_asked_for(self, one, diversity):
        selection = one(diversity=diversity)
        assert len(set(selection.positions.tolist())) == 6
        assert all(reason.startswith(f"{diversity}, best for ") for reason in selection.choice.why)

    def test_negative_targets_lower_the_rows_that_point_to_them(self, one, targets):
        plain, away = one(count=13), one(count=13, away_from={"bad": targets["sums"]}, away_weight=2.0)
        scores = dict(zip(plain.positions.tolist(), plain.scores.tolist(), strict=True))
        assert all("influence_away" in column for column in away.columns)
        for position, score, pull in zip(away.positions.tolist(), away.scores, away.away, strict=True):
            assert score == pytest.approx(scores[position] - 2 * max(pull, 0), abs=1e-5)
        assert away.influence.target_sets == ("tones", "tones")

    def test_negative_targets_forbid_the_rows_above_a_threshold(self, one, targets, tmp_path):
        pulls = one(count=13, away_from={"bad": targets["sums"]}).away
        threshold = float(np.median(pulls))
        selection = one(away_from={"bad": targets["sums"]}, away_above=threshold, scores=tmp_path / "scores.jsonl")
        assert (selection.away < threshold).all()
        assert all("away" in line for line in read_lines(tmp_path / "scores.jsonl") if line["score"] is not None)

    @pytest.mark.parametrize("method", ["length", "random"])
    def test_negative_targets_mean_nothing_to_a_method_that_looks_at_none(self, one, targets, method):
        with pytest.raises(SettingError, match=f"the method {method} does not look at targets.*less, bm25, rds"):
            one(away_from={"bad": targets["sums"]}, method=method)

    def test_round_robin_is_one_order_and_another_is_refused(self, one, tmp_path):
        (tmp_path / "s.toml").write_text('balance = "kind"\n')
        assert one(combine="round-robin", turns="target-set").ids == one(combine="round-robin").ids
        for other in ({"turns": "subtask"}, {"config": tmp_path / "s.toml"}, {"diversity": "mmr"}):
            with pytest.raises(SettingError, match=r"give (one|at most one)"):
                one(combine="round-robin", **other)

    def test_one_set_cannot_be_both_wanted_and_avoided(self, one, targets):
        with pytest.raises(SettingError, match="tones is both to be learnt and to be avoided"):
            one(away_from={"tones": targets["sums"]})

    def test_settings_come_from_a_file_and_words_stand_before_it(self, one, tmp_path):
        (tmp_path / "s.toml").write_text('count = 2\nduplicates = "exact"\n')
        assert one(count=None, config=tmp_path / "s.toml").ids == one(count=2, duplicates="exact").ids
        assert len(one(count=5, config=tmp_path / "s.toml").ids) == 5

    def test_an_unknown_setting_is_a_type_error(self, one):
        with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
            one(colour="red")


class TestDataset:
    def test_has_the_rows_with_the_columns_added(self, choose):
        (selection,) = choose(combine="max")
        assert selection.dataset.column_names == ["id", "kind", "messages", *ADDED]
        assert tuple(selection.dataset["id"]) == selection.ids
        assert selection.dataset["influence_rank"][:] == [1, 2, 3, 4]

    def test_has_every_rows_columns_and_nulls_for_what_a_row_lacks(self, build, tiny_rows, tmp_path, targets):
        first = [{**row, "left": n} for n, row in enumerate(tiny_rows[:3])]
        second = [{**row, "right": {"n": n}} for n, row in enumerate(tiny_rows[3:6])]
        build(tmp_path / "ds", [first, second])
        (selection,) = select(
            datastore=tmp_path / "ds", targets=targets["sums"], count=6, data=[first, second], progress=False
        )
        by_id = {row["id"]: row for row in selection.dataset}
        assert set(selection.dataset.column_names) == {"id", "kind", "messages", "left", "right", *ADDED}
        assert [by_id[f"row-{n}"]["left"] for n in range(6)] == [0, 1, 2, None, None, None]
        assert [by_id[f"row-{n}"]["right"] for n in range(3, 6)] == [{"n": 0}, {"n": 1}, {"n": 2}]

    def test_that_cannot_be_one_table_is_an_error_and_the_records_stay(self, build, tiny_rows, tmp_path, targets):
        data = [{**tiny_rows[0], "kind": 7}, tiny_rows[1]]
        build(tmp_path / "ds", data)
        (selection,) = select(datastore=tmp_path / "ds", targets=targets["sums"], count=2, data=data, progress=False)
        assert len(selection.records) == 2
        with pytest.raises(DataError, match="one table"):
            _ = selection.dataset


class TestOutput:
    def test_keeps_every_byte_of_a_line_but_for_the_columns_added(self, choose, lines, tmp_path):
        choose(combine="max", output=tmp_path / "out.jsonl")
        written = (tmp_path / "out.jsonl").read_text().splitlines()
        assert len(written) == 4
        for line in written:
            assert any(line.startswith(original[:-1]) for original in lines)

    def test_of_several_sets_is_a_folder_with_a_file_for_each(self, choose, tmp_path):
        tones, sums = choose(output=tmp_path / "deep" / "out", scores=tmp_path / "scores")
        assert sorted(f.name for f in (tmp_path / "deep" / "out").iterdir()) == ["sums.jsonl", "tones.jsonl"]
        assert sorted(f.name for f in (tmp_path / "scores").iterdir()) == ["sums.jsonl", "tones.jsonl"]
        assert tones.output == tmp_path / "deep" / "out" / "tones.jsonl"
        for selection in (tones, sums):
            assert tuple(row["id"] for row in read_lines(selection.output)) == selection.ids

    def test_of_several_sets_cannot_be_one_file(self, choose, tmp_path):
        for word in ("output", "scores"):
            with pytest.raises(SettingError, match=r"is one file, and 2 target sets .*--combine max or round-robin"):
                choose(**{word: tmp_path / "out.jsonl"})

    def test_of_one_set_may_be_a_file_or_a_folder(self, choose, targets, tmp_path):
        one = {"tones": targets["tones"]}
        (tmp_path / "there.jsonl").mkdir()
        for given, written in (
            ("out.jsonl", "out.jsonl"), ("out.json", "out.json"), ("out.ndjson", "out.ndjson"),
            ("new", "new/tones.jsonl"), ("there.jsonl", "there.jsonl/tones.jsonl"),
        ):  # fmt: skip
            (selection,) = choose(targets=one, output=tmp_path / given)
            assert selection.output == tmp_path / written
            assert [row["influence_rank"] for row in read_lines(selection.output)] == [1, 2, 3, 4]

    def test_may_be_parquet(self, choose, tmp_path):
        import pyarrow.parquet as pq

        (selection,) = choose(combine="max", output=tmp_path / "out.parquet")
        rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
        assert tuple(row["id"] for row in rows) == selection.ids
        assert [row["influence_score"] for row in rows] == [float(score) for score in selection.scores]
        assert [row["messages"] for row in rows] == [record.columns["messages"] for record in selection.records]

    def test_of_a_parquet_pool_keeps_its_types(self, build, tiny_rows, targets, tmp_path):
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.Table.from_pylist(tiny_rows[:6]).append_column(
            "day", pa.array(range(6), pa.date32())
        )  # fmt: skip
        pq.write_table(table, tmp_path / "pool.parquet")
        build(tmp_path / "ds", tmp_path / "pool.parquet")
        (selection,) = select(
            datastore=tmp_path / "ds", targets=targets["sums"], count=3, output=tmp_path / "out.parquet", progress=False
        )
        written = pq.read_table(tmp_path / "out.parquet")
        assert written.schema.field("day").type == pa.date32()
        assert tuple(written["id"].to_pylist()) == selection.ids

    def test_replaces_the_columns_of_an_earlier_selection(self, build, choose, targets, tmp_path):
        (first,) = choose(combine="max", count=6, output=tmp_path / "first.jsonl")
        build(tmp_path / "ds", tmp_path / "first.jsonl")
        (second,) = select(
            datastore=tmp_path / "ds",
            targets=targets["sums"],
            count=3,
            output=tmp_path / "second.jsonl",
            progress=False,
        )
        rows = read_lines(tmp_path / "second.jsonl")
        assert [list(row) for row in rows] == [["id", "kind", "messages", *ADDED]] * 3
        assert [row["influence_rank"] for row in rows] == [1, 2, 3]
        assert [row["influence_score"] for row in rows] == [float(score) for score in second.scores]
        assert {row["influence_subtask"] for row in rows} == {"targets"}
        assert second.dataset.column_names == ["id", "kind", "messages", *ADDED]
        assert {row["id"] for row in rows} <= set(first.ids)

    def test_replaces_an_older_file(self, choose, tmp_path):
        (tmp_path / "out.jsonl").write_text("old\n" * 100)
        choose(combine="max", output=tmp_path / "out.jsonl")
        assert len(read_lines(tmp_path / "out.jsonl")) == 4

    def test_never_takes_the_place_of_the_pool(self, build, lines, targets, tmp_path):
        pool = write_lines(tmp_path / "pool.jsonl", lines)
        build(tmp_path / "ds", pool)
        content = pool.read_bytes()
        (tmp_path / "link.jsonl").symlink_to(pool)
        for word in ("output", "scores"):
            for path in (pool, tmp_path / "link.jsonl", tmp_path / "ds" / ".." / "pool.jsonl"):
                with pytest.raises(SettingError, match=r"would write over .*pool\.jsonl, which is read"):
                    select(datastore=tmp_path / "ds", targets=targets["sums"], count=2, progress=False, **{word: path})
        assert pool.read_bytes() == content

    def test_never_takes_the_place_of_targets_or_settings(self, store, tiny_rows, tmp_path):
        wanted = write_lines(tmp_path / "sums.jsonl", tiny_rows[:4])
        avoided = write_lines(tmp_path / "bad.jsonl", tiny_rows[4:6])
        (tmp_path / "s.toml").write_text("count = 2\n")
        before = {file: file.read_bytes() for file in tmp_path.iterdir()}
        options = {"datastore": store, "targets": [wanted], "away_from": {"bad": avoided}, "progress": False}
        for word, path in (
            ("output", tmp_path), ("output", wanted), ("scores", tmp_path), ("scores", avoided), ("output", avoided),
        ):  # fmt: skip
            with pytest.raises(SettingError, match="which is read; name another file"):
                select(config=tmp_path / "s.toml", **options, **{word: path})
        assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before

    def test_is_read_again_only_from_the_pool_as_it_was(self, build, lines, targets, tmp_path):
        pool = write_lines(tmp_path / "own.jsonl", lines)
        build(tmp_path / "ds", pool)
        (selection,) = select(
            datastore=tmp_path / "ds", targets=targets["sums"], count=2, output=tmp_path / "o.jsonl", progress=False
        )
        write_lines(pool, lines[::-1])
        with pytest.raises(DataError, match="has changed while it was in use"):
            _ = selection.records
        pool.unlink()
        with pytest.raises(DataError, match="is no longer there"):
            _ = selection.ids

    def test_and_scores_cannot_be_one_file(self, choose, tmp_path):
        for path in (tmp_path / "both.jsonl", tmp_path / "folder"):
            with pytest.raises(SettingError, match="is asked for twice"):
                choose(combine="max", output=path, scores=path)

    def test_that_cannot_be_written_is_refused_before_the_targets_are_scored(self, choose, tmp_path, monkeypatch):
        monkeypatch.setattr(Scorer, "score", None)
        (tmp_path / "file").write_text("x")
        for word in ("output", "scores"):
            with pytest.raises(SettingError, match="cannot be written"):
                choose(combine="max", **{word: tmp_path / "file" / "out.jsonl"})
        with pytest.raises(SettingError, match="a file must end in"):
            choose(combine="max", scores=tmp_path / "scores.parquet")

    @pytest.mark.parametrize("name", ["../tones", "a/b", "/tones"])
    def test_never_leaves_its_folder_by_a_target_sets_name(self, choose, targets, tmp_path, name):
        with pytest.raises(SettingError, match="cannot name a file"):
            choose(targets={name: targets["tones"], "sums": targets["sums"]}, output=tmp_path / "out")

    def test_of_none_writes_nothing(self, choose, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert [selection.output for selection in choose()] == [None, None]
        assert not list(tmp_path.iterdir())


class TestScoresFile:
    def test_has_a_line_for_every_row_of_the_pool_in_its_order(self, choose, lines, tmp_path):
        (selection,) = choose(combine="max", scores=tmp_path / "s.jsonl")
        written = read_lines(tmp_path / "s.jsonl")
        assert [(line["source"], line["row"]) for line in written] == [(0, n) for n in range(len(lines))]
        ids = [json.loads(text)["id"] if n != 4 else "pool:4" for n, text in enumerate(lines)]
        assert [line["id"] for line in written] == ids
        assert {n: line["skipped"] for n, line in enumerate(written) if line["skipped"]} == {
            4: "not JSON", 13: "no messages",
        }  # fmt: skip
        for n in (4, 13):
            found = {name: written[n][name] for name in ("score", "subtask", "rank", "scores")}
            assert found == {"score": None, "subtask": None, "rank": None, "scores": {}}
        scored = [line for line in written if not line["skipped"]]
        assert sorted(line["rank"] for line in scored) == list(range(1, 14))
        for position, line in enumerate(scored):
            assert list(line["scores"]) == ["tones/a", "tones/b", "sums"]
            assert line["score"] == line["scores"][line["subtask"]] == max(line["scores"].values())
            assert np.float32(line["score"]) == selection.influence.score_N[position]
        best = sorted(scored, key=lambda line: line["rank"])[:4]
        assert tuple(line["id"] for line in best) == selection.ids

    def test_of_one_set_names_its_subtasks_plainly(self, choose, targets, tmp_path):
        choose(targets={"tones": targets["tones"]}, scores=tmp_path / "s.jsonl")
        assert list(read_lines(tmp_path / "s.jsonl")[0]["scores"]) == ["a", "b"]

    def test_gives_ties_ranks_in_the_pools_order(self, choose, rigged, tmp_path):
        rigged(np.ones((13, 3)))
        choose(combine="max", scores=tmp_path / "s.jsonl")
        ranks = [line["rank"] for line in read_lines(tmp_path / "s.jsonl") if line["rank"]]
        assert ranks == list(range(1, 14))

    def test_takes_any_id(self, build, tiny_rows, targets, tmp_path):
        ids = ["\ud800 half", "line\u2028end", "ünï", 7, None, True]
        rows = [{**row, "id": label} for row, label in zip(tiny_rows, ids, strict=False)]
        data = write_lines(tmp_path / "p.jsonl", rows)
        build(tmp_path / "ds", data)
        select(
            datastore=tmp_path / "ds", targets=targets["sums"], count=6, progress=False,
            scores=tmp_path / "s.jsonl", output=tmp_path / "o.jsonl",
        )  # fmt: skip
        lines = (tmp_path / "s.jsonl").read_bytes().decode().split("\n")[:-1]
        assert [json.loads(line)["id"] for line in lines] == ["\ud800 half", "line\u2028end", "ünï", "7", "p:4", "True"]
        written = (tmp_path / "o.jsonl").read_bytes().decode().split("\n")[:-1]
        assert {json.loads(line)["id"] for line in written} == set(ids)


class TestThePool:
    @pytest.fixture
    def own(self, build, tiny_rows, tmp_path):
        """A store of a file that the test may move or change."""
        file = write_lines(tmp_path / "own.jsonl", tiny_rows[:6])
        return build(tmp_path / "ds", file), file

    def test_that_moved_is_asked_for_and_taken_from_where_it_is(self, own, targets, tmp_path):
        folder, file = own
        common = {"datastore": folder, "targets": targets["sums"], "count": 2, "progress": False}
        (expected,) = select(**common)
        moved = file.rename(tmp_path / "moved.jsonl")
        with pytest.raises(DataError, match=r"own\.jsonl is no longer there; .*--data"):
            select(**common)
        for data in (moved, [moved], str(moved)):
            (found,) = select(**common, data=data)
            assert found.ids == expected.ids
            assert [r.raw for r in found.records] == [r.raw for r in expected.records]

    def test_that_changed_is_refused_before_scoring(self, own, targets, tiny_rows, tmp_path, monkeypatch):
        folder, file = own
        monkeypatch.setattr(Scorer, "score", None)
        write_lines(file, [*tiny_rows[:5], tiny_rows[7]])
        with pytest.raises(DataError, match=r"own\.jsonl has changed since the store was built: .*--data"):
            select(datastore=folder, targets=targets["sums"], count=2, output=tmp_path / "o.jsonl", progress=False)
        assert not (tmp_path / "o.jsonl").exists()

    def test_given_that_is_not_the_stores_is_refused(self, own, targets, tiny_rows, tmp_path):
        folder, _ = own
        other = write_lines(tmp_path / "other.jsonl", tiny_rows[:7])
        with pytest.raises(DataError, match=r"other\.jsonl is no source of .*own\.jsonl"):
            select(datastore=folder, targets=targets["sums"], count=2, data=other, progress=False)

    def test_in_memory_must_be_given_again(self, build, tiny_rows, targets, tmp_path):
        build(tmp_path / "ds", tiny_rows[:6])
        common = {"datastore": tmp_path / "ds", "targets": targets["sums"], "count": 2, "progress": False}
        with pytest.raises(DataError, match="memory was given in memory"):
            select(**common)
        (selection,) = select(**common, data=tiny_rows[:6], output=tmp_path / "o.jsonl")
        by_id = {row["id"]: row for row in tiny_rows}
        for row in read_lines(tmp_path / "o.jsonl"):
            assert {name: value for name, value in row.items() if name not in ADDED} == by_id[row["id"]]
        assert len(selection.ids) == 2

    def test_of_several_kinds_gives_each_row_from_its_source(self, build, tiny_rows, targets, tmp_path):
        import datasets

        file = write_lines(tmp_path / "a.jsonl", tiny_rows[:4])
        parquet = tmp_path / "b.parquet"
        datasets.Dataset.from_list(tiny_rows[4:8]).to_parquet(parquet)
        memory = tiny_rows[8:12]
        build(tmp_path / "ds", [file, parquet, memory])
        (selection,) = select(
            datastore=tmp_path / "ds", targets=targets["sums"], count=12, data=memory, progress=False,
            output=tmp_path / "o.jsonl",
        )  # fmt: skip
        rows = read_lines(tmp_path / "o.jsonl")
        assert tuple(row["id"] for row in rows) == selection.ids
        by_id = {row["id"]: row for row in tiny_rows}
        assert sorted(row["id"] for row in rows) == sorted(row["id"] for row in tiny_rows[:12])
        for row in rows:
            assert {name: value for name, value in row.items() if name not in ADDED} == by_id[row["id"]]

    def test_that_grew_after_a_selection_is_selected_from_whole(self, build, own, targets, tiny_rows, tmp_path):
        folder, _ = own
        build(folder, write_lines(tmp_path / "more.jsonl", tiny_rows[6:9]))
        (selection,) = select(datastore=folder, targets=targets["sums"], fraction=1.0, progress=False)
        assert sorted(selection.ids) == sorted(row["id"] for row in tiny_rows[:9])


def test_two_selections_are_equal_to_the_byte(choose, tmp_path):
    for name in ("one", "two"):
        choose(output=tmp_path / name, scores=tmp_path / name / "scores")
    for file in ("tones.jsonl", "sums.jsonl", "scores/tones.jsonl"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_the_store_is_only_read(choose, store, tmp_path):
    before = {f: f.stat().st_mtime_ns for f in store.rglob("*")}
    copy = shutil.copytree(store, tmp_path / "ds")
    for file in copy.rglob("*.*"):
        if file.is_file():
            file.chmod(0o444)
    choose(datastore=copy)
    choose(datastore=Datastore.open(store))
    assert {f: f.stat().st_mtime_ns for f in store.rglob("*")} == before
