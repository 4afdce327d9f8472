"""The facts about a selection are those of the files it was written to and of the store it was made from."""

import json
import os

import numpy as np
import pytest

from datastore import Datastore
from datastore.errors import DataError, SettingError
from less import build_datastore, build_embeddings, report_selection, select
from less.selection_report import QUANTILES
from less.statistics import spearman


@pytest.fixture(autouse=True)
def no_power_cut(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_store, tiny_target_file):
    """A selection of ten rows of the tiny store, as `select` writes it."""
    folder = tmp_path_factory.mktemp("made")
    (selection,) = select(
        datastore=tiny_store, targets=tiny_target_file, output=folder / "s.jsonl", scores=folder / "all.jsonl",
        count=10, progress=False,
    )  # fmt: skip
    return folder, selection


@pytest.fixture
def ask(made, tiny_store):
    folder, _ = made

    def call(**changes):
        options = {"datastore": tiny_store, "selected": folder / "s.jsonl", "scores": folder / "all.jsonl"}
        return report_selection(**options | changes)

    return call


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_scores_and_places_are_those_of_the_selection(ask, made):
    _, selection = made
    found = ask()
    assert np.array_equal(found.score_N, selection.influence.score_N)
    assert np.array_equal(np.flatnonzero(found.is_selected_N), np.sort(selection.positions))
    assert (found.num_rows, found.num_selected, found.num_best_taken) == (40, 10, 10)
    shown = [*found.top, *found.bottom]
    assert [row.id for row in shown] == list(selection.ids)
    assert [row.selected_rank for row in shown] == [*range(1, 11)]
    assert [row.subtask for row in shown] == list(selection.subtasks)
    assert all(row.record.columns["id"] == row.id for row in [*shown, *found.below])
    assert [row.rank for row in found.below] == [11, 12, 13, 14, 15]
    assert not {row.id for row in found.below} & set(selection.ids)


def test_lengths_and_norms_are_the_stores(ask, made, tiny_store):
    store, found = Datastore.open(tiny_store), ask()
    rows, chosen = store.rows(), found.is_selected_N
    norm_N = sum(
        store.settings["checkpoints"][name]["weight"] * store.stats("adam-sparse", name).grad_norms_N
        for name in store.checkpoints
    )
    values = {
        "score": found.score_N, "supervised tokens": rows.num_supervised_N, "tokens": rows.num_tokens_N,
        "gradient norm": norm_N,
    }  # fmt: skip
    assert [spread.name for spread in found.spreads] == list(values)
    for spread in found.spreads:
        x_N = values[spread.name]
        assert spread.pool == pytest.approx(np.quantile(x_N, QUANTILES), rel=1e-5)
        assert spread.selected == pytest.approx(np.quantile(x_N[chosen], QUANTILES), rel=1e-5)
        if spread.name != "score":
            assert spread.with_score == pytest.approx(spearman(found.score_N, x_N), abs=1e-3)


def test_every_row_is_counted_once_by_value_and_by_subtask(ask, made, tiny_rows):
    _, selection = made
    found = ask(columns=["kind"])
    (column,) = found.columns
    assert column.column == "kind"
    assert {v.value: v.num_pool for v in column.values} == {name: 10 for name in {row["kind"] for row in tiny_rows}}
    kinds = [record.columns["kind"] for record in selection.records]
    assert {v.value: v.num_selected for v in column.values} == {v.value: kinds.count(v.value) for v in column.values}
    assert [v.num_selected for v in column.values] == sorted((v.num_selected for v in column.values), reverse=True)
    assert sum(s.num_pool for s in found.subtasks) == 40
    assert {s.subtask: s.num_selected for s in found.subtasks} == {
        name: selection.subtasks.count(name) for name in selection.influence.subtasks
    }
    for j, facts in enumerate(found.subtasks):
        scores_N = selection.influence.scores_NJ[:, j]
        assert facts.mean_pool == pytest.approx(scores_N.mean(), rel=1e-5)
        assert facts.mean_selected == pytest.approx(scores_N[found.is_selected_N].mean(), rel=1e-5)


@pytest.mark.parametrize("kind", ["long", "short", "large", "none"])
def test_a_ranking_that_lengths_or_norms_explain_is_warned_of(ask, made, tiny_store, tmp_path, kind):
    folder, _ = made
    first = ask()
    order = {"long": first.num_supervised_N, "short": -first.num_supervised_N, "large": first.grad_norm_N}
    value_N = order.get(kind, np.random.default_rng(3).permutation(40)).astype(float)
    lines = [
        line | {"score": value, "scores": {"a": value}, "subtask": "a"}
        for line, value in zip(lines_of(folder / "all.jsonl"), value_N.tolist(), strict=True)
    ]
    score_of = {line["id"]: line["score"] for line in lines}
    selected = [
        row | {"influence_subtask": "a", "influence_score": score_of[row["id"]]} for row in lines_of(folder / "s.jsonl")
    ]
    found = ask(scores=write(tmp_path / "all.jsonl", lines), selected=write(tmp_path / "s.jsonl", selected))
    said = " ".join(found.warnings)
    of = {spread.name: spread.with_score for spread in found.spreads}
    assert ("mostly length" in said) == (of["supervised tokens"] ** 2 >= 0.5)
    assert ("gradient's norm" in said) == (of["gradient norm"] ** 2 >= 0.5)
    expected = {"long": "longer replies (Spearman 1.00", "short": "shorter replies (Spearman −1.00", "large": "large"}
    assert expected.get(kind, "") in said
    assert bool(said) == (kind != "none")


def test_negative_targets_are_told_of(tiny_store, tiny_target_file, tiny_rows, tmp_path):
    (selection,) = select(
        datastore=tiny_store, targets=tiny_target_file, away_from=tiny_rows[:3], output=tmp_path / "s.jsonl",
        scores=tmp_path / "all.jsonl", count=10, away_weight=2.0, progress=False,
    )  # fmt: skip
    found = report_selection(datastore=tiny_store, selected=tmp_path / "s.jsonl", scores=tmp_path / "all.jsonl")
    away_N = np.array([line["away"] for line in lines_of(tmp_path / "all.jsonl")])
    assert found.away.mean_selected == pytest.approx(selection.away.mean(), rel=1e-5)
    best = np.argsort(-found.score_N, kind="stable")[:10]
    outranked = best[~found.is_selected_N[best]]
    assert found.num_best_taken == 10 - len(outranked) < 10
    assert found.away.mean_best == pytest.approx(away_N[best].mean(), rel=1e-5)
    assert found.away.num_outranked == len(outranked)
    assert found.away.mean_outranked == pytest.approx(away_N[outranked].mean(), rel=1e-5)
    assert (found.away.num_forbidden, found.away.mean_forbidden, found.rules) == (0, None, ())
    assert [row.away for row in found.below[: len(outranked)]] == pytest.approx(away_N[outranked])
    assert [row.id for row in found.top] == list(selection.ids[: len(found.top)])


def test_what_each_rule_left_out_is_told(tiny_store, tiny_target_file, tiny_rows, tmp_path):
    options = {"datastore": tiny_store, "targets": tiny_target_file, "progress": False}
    (plain,) = select(count=40, away_from=tiny_rows[:3], **options)
    threshold = float(np.quantile(plain.away, 0.75))
    (selection,) = select(
        away_from=tiny_rows[:3], away_above=threshold, caps=["kind=3"], count=12, output=tmp_path / "s.jsonl",
        scores=tmp_path / "all.jsonl", **options,
    )  # fmt: skip
    found = report_selection(datastore=tiny_store, selected=tmp_path / "s.jsonl", scores=tmp_path / "all.jsonl")
    lines = lines_of(tmp_path / "all.jsonl")
    assert len(found.rules) > 1
    assert {facts.rule: facts.num_rows for facts in found.rules} == {
        rule: len(rows) for rule, rows in selection.choice.passed_over.items()
    }
    for facts in found.rules:
        own = [line for line in lines if line["passed_over"] == facts.rule]
        assert facts.mean_score == pytest.approx(np.mean([line["score"] for line in own]), rel=1e-5)
        assert facts.mean_away == pytest.approx(np.mean([line["away"] for line in own]), rel=1e-5)
        assert facts.best_rank == min(line["rank"] for line in own)
    forbidden = [line["away"] for line in lines if line["passed_over"] == "away"]
    assert (found.away.num_forbidden, min(forbidden) >= threshold) == (len(forbidden), True)
    assert found.away.mean_forbidden == pytest.approx(np.mean(forbidden), rel=1e-5)
    of_row = {line["id"]: line["passed_over"] for line in lines}
    assert [row.passed_over for row in found.below] == [of_row[row.id] for row in found.below]
    assert json.loads(json.dumps(found.to_json()))["rules"][0]["num_rows"] == found.rules[0].num_rows


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_rows_that_no_id_tells_apart_are_found_by_their_rank(
    tiny_model_folder, tiny_run, tiny_rows, tiny_target_file, tmp_path, suffix
):
    pool = [{name: row[name] for name in row if name != "id"} for row in tiny_rows[:12]]
    pool += [row | {"id": "same"} for row in tiny_rows[12:20]]
    source = write(tmp_path / "pool.jsonl", pool)
    build_datastore(
        model=tiny_model_folder, checkpoints=tiny_run, data=source, datastore=tmp_path / "ds", proj_dim=64,
        tokens_per_batch=256, progress=False,
    )  # fmt: skip
    (selection,) = select(
        datastore=tmp_path / "ds", targets=tiny_target_file, output=tmp_path / f"s{suffix}",
        scores=tmp_path / "all.jsonl", count=7, progress=False,
    )  # fmt: skip
    found = report_selection(datastore=tmp_path / "ds", selected=tmp_path / f"s{suffix}", scores=tmp_path / "all.jsonl")
    assert np.array_equal(np.flatnonzero(found.is_selected_N), np.sort(selection.positions))
    assert [row.record.number for row in found.top] == [record.number for record in selection.records][:4]


def test_a_store_of_embeddings_has_no_gradient_norm(tiny_model_folder, tiny_pool, tiny_target_file, tmp_path):
    build_embeddings(model=tiny_model_folder, data=tiny_pool, datastore=tmp_path / "ds", progress=False)
    options = {"datastore": tmp_path / "ds", "scores": tmp_path / "all.jsonl"}
    select(targets=tiny_target_file, output=tmp_path / "s.jsonl", method="rds", count=5, progress=False, **options)
    found = report_selection(selected=tmp_path / "s.jsonl", **options)
    assert found.grad_norm_N is None
    assert [spread.name for spread in found.spreads] == ["score", "supervised tokens", "tokens"]
    assert {row.grad_norm for row in found.top} == {None}


def test_json_holds_the_facts_and_neither_texts_nor_arrays(ask):
    found = ask()
    told = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert told["num_selected"] == 10
    assert [row["id"] for row in told["top"]] == [row.id for row in found.top]
    assert not [name for name in told if name.endswith("_N")]
    assert "record" not in told["top"][0]


class TestRefuses:
    def test_scores_of_another_store(self, ask, made, tmp_path):
        lines = lines_of(made[0] / "all.jsonl")
        with pytest.raises(DataError, match=r"row 0:1, expected 0:0: the scores are not of this store"):
            ask(scores=write(tmp_path / "a.jsonl", lines[1:]))
        with pytest.raises(DataError, match=r"the scores of 39 rows, and the store has 40"):
            ask(scores=write(tmp_path / "b.jsonl", lines[:-1]))
        with pytest.raises(DataError, match=r"s\.jsonl:1 has no scores"):
            ask(scores=made[0] / "s.jsonl")

    def test_scores_whose_lines_do_not_fit_together(self, ask, made, tmp_path):
        lines = lines_of(made[0] / "all.jsonl")
        n = next(n for n, line in enumerate(lines) if n and line["selected"] is None)
        for strange in (
            {"scores": {"a": 1.0}}, {"scores": {"a": None, "b": 1.0}}, {"scores": {"a": "x", "b": "y"}},
            {"score": float("nan")}, {"score": None}, {"selected": []}, {"selected": -1}, {"selected": 1.5},
        ):  # fmt: skip
            with pytest.raises(DataError, match=rf"b\.jsonl:{n + 1} has other scores than the lines before"):
                ask(scores=write(tmp_path / "b.jsonl", [*lines[:n], lines[n] | strange, *lines[n + 1 :]]))
        for strange in ({"source": [0, 1]}, {"row": "0"}, {"row": True}):
            with pytest.raises(DataError, match="the scores are not of this store"):
                ask(scores=write(tmp_path / "c.jsonl", [*lines[:n], lines[n] | strange, *lines[n + 1 :]]))
        with pytest.raises(DataError, match=r"d\.jsonl:1 has no scores"):
            ask(scores=write(tmp_path / "d.jsonl", [{k: v for k, v in line.items() if k != "id"} for line in lines]))

    def test_a_selection_that_the_scores_were_not_written_with(self, ask, made, tmp_path):
        rows = lines_of(made[0] / "s.jsonl")
        no_ids = [{name: value for name, value in row.items() if name != "id"} for row in rows]
        assert ask(selected=write(tmp_path / "no ids.jsonl", no_ids)).num_selected == 10
        for name, strange, message in (
            ("another row", [rows[0], rows[1] | {"id": "other"}, *rows[2:]], "is not the row of rank 2 in another row"),
            ("other targets", [rows[0] | {"influence_subtask": "other"}, *rows[1:]], "is not the row of rank 1"),
            ("another score", [no_ids[0] | {"influence_score": 0.9}, *rows[1:]], "is not the row of rank 1 in another"),
            ("no number", [rows[0] | {"influence_score": "high"}], "1 has the score 'high'"),
            ("a row twice", [rows[0], rows[0]], "2 has the rank 1, expected 2"),
            ("too few", rows[:-1], "is not the row of rank 10 in too few"),
            ("too many", [*rows, rows[-1] | {"influence_rank": 11}], "has 11 rows, and all.jsonl says that 10 are"),
        ):
            with pytest.raises(DataError, match=message):
                ask(selected=write(tmp_path / f"{name}.jsonl", strange))
        with pytest.raises(DataError, match=r"all\.jsonl:1 has no influence_rank"):
            ask(selected=made[0] / "all.jsonl")

    def test_two_rows_of_one_rank(self, ask, made, tmp_path):
        lines, rows = lines_of(made[0] / "all.jsonl"), lines_of(made[0] / "s.jsonl")
        second, third = (next(line for line in lines if line["selected"] == rank) for rank in (2, 3))
        third["selected"], third["id"], third["scores"] = 2, second["id"], second["scores"]
        with pytest.raises(DataError, match="ranks are not 1 to 10"):
            ask(scores=write(tmp_path / "a.jsonl", lines), selected=write(tmp_path / "s.jsonl", rows))

    def test_a_column_that_the_pool_lacks(self, ask):
        with pytest.raises(SettingError, match="no column 'colour' to compare by; it has id, kind, messages"):
            ask(columns=["colour"])
