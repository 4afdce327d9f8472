"""What is corrupted and how, the two judgements against their definitions, and the whole script."""

import importlib
import json
import sys
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datastore.errors import DataError, SettingError
from less import InfluenceScores, score
from less.adam import UPDATE_RULES

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
STAGES_OF_A_TEST = ("provenance", "corrupted")


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("evidence_planted")


def row(n, reply, dataset="t0", subtask="a"):
    turns = [{"role": "user", "content": f"question {n}"}, {"role": "assistant", "content": reply}]
    return {"id": str(n), "dataset": dataset, "subtask": subtask, "messages": turns}


def reply(row):
    return row["messages"][-1]["content"]


# ---- what is corrupted

a_row = st.tuples(
    st.sampled_from(["yes", "no", "one two", "a b c d e f g h i", " led by\nspace\tand more words to come"]),
    st.sampled_from(["t0", "dolly"]),
    st.sampled_from(["a", "b", None]),
)
some_rows = st.lists(a_row, min_size=1, max_size=40).map(lambda own: [row(n, *parts) for n, parts in enumerate(own)])


@given(some_rows, st.sampled_from([0.2, 0.5, 1.0]), st.integers(0, 3))
def test_nothing_but_the_last_reply_of_a_drawn_row_is_changed(bench, rows, fraction, seed):
    before = json.dumps(rows)
    changed, done = bench.corrupt(rows, fraction, seed)
    assert json.dumps(rows) == before
    for old, new, entry in zip(rows, changed, done, strict=True):
        assert (reply(old) == reply(new)) == (entry["kind"] == "clean")
        assert bench.with_reply(new, reply(old)) == old
        assert entry["words"] == len(reply(old).split())
    kinds = Counter(entry["kind"] for entry in done)
    assert kinds["swapped"] <= round(fraction * len(rows) / 2)
    assert kinds["cut"] <= round(fraction * len(rows) / 2)
    assert bench.corrupt(rows, fraction, seed) == (changed, done)


@given(some_rows, st.integers(0, 3))
def test_swapped_rows_only_exchange_replies_within_a_dataset(bench, rows, seed):
    changed, done = bench.corrupt(rows, 1.0, seed)
    for dataset in ("t0", "dolly"):
        own = [n for n, entry in enumerate(done) if entry["kind"] == "swapped" and rows[n]["dataset"] == dataset]
        assert Counter(reply(rows[n]) for n in own) == Counter(reply(changed[n]) for n in own)


@given(some_rows, st.integers(0, 3))
def test_a_swap_leaves_the_subtask_only_where_more_than_half_of_it_says_the_same(bench, rows, seed):
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    replies, tasks = [reply(row) for row in rows], [bench.task_of(row) for row in rows]
    given = bench.partners(order, replies, tasks)
    for task in set(tasks):
        own = [n for n in order if tasks[n] == task]
        most = max(Counter(replies[n] for n in own).values())
        strangers = [n for n in own if n not in given or tasks[given[n]] != task]
        assert len(strangers) == max(0, 2 * most - len(own))
    assert all(replies[n] != replies[other] and tasks[n][0] == tasks[other][0] for n, other in given.items())


def test_a_row_alone_in_its_subtask_gets_a_reply_of_its_dataset(bench):
    rows = [row(0, "x", subtask="a"), row(1, "y", subtask="b"), row(2, "z", "dolly", "a")]
    given = bench.partners([0, 1, 2], [reply(row) for row in rows], [bench.task_of(row) for row in rows])
    assert given == {0: 1, 1: 0}


@given(st.lists(st.text("ab\n é."), max_size=30).map(" ".join).filter(lambda text: text.strip()))
def test_a_cut_reply_is_the_first_quarter_of_its_words_and_at_least_one(bench, text):
    short = bench.cut(text)
    assert text.startswith(short)
    assert short.split() == text.split()[: max(1, len(text.split()) // 4)]
    assert not short[-1].isspace()


def test_of_many_rows_a_fifth_is_corrupted_half_of_them_each_way_and_by_the_seed(bench):
    rows = [row(n, f"reply {n} is long", subtask="ab"[n % 2]) for n in range(100)]
    kinds = [[entry["kind"] for entry in bench.corrupt(rows, 0.2, seed)[1]] for seed in (0, 1)]
    assert Counter(kinds[0]) == {"clean": 80, "swapped": 10, "cut": 10}
    assert kinds[0] != kinds[1]


def test_a_reply_of_one_word_is_never_cut_nor_held_against_those_that_are(bench):
    rows = [row(n, "yes" if n % 3 else f"no {n}") for n in range(30)]
    _, done = bench.corrupt(rows, 0.4, 0)
    assert sum(entry["kind"] == "cut" for entry in done) == 6
    assert all(entry["words"] > 1 for entry in done if entry["kind"] == "cut")
    is_cut_N, could_be_N = bench.comparable(done, "cut")
    assert is_cut_N.sum() == 6
    assert all(done[n]["words"] > 1 and done[n]["kind"] == "clean" for n in np.flatnonzero(could_be_N))
    is_swapped_N, could_be_N = bench.comparable(done, "swapped")
    assert is_swapped_N.sum() + could_be_N.sum() + is_cut_N.sum() == 30


def test_a_row_that_does_not_end_with_the_assistant_is_refused_by_its_id(bench):
    with pytest.raises(DataError, match=r"7: the last turn is of user, expected .* leave the row out"):
        bench.corrupt([{**row(7, "x"), "messages": [{"role": "user", "content": "x"}]}], 0.2, 0)


# ---- the judgements


def scored(bench, tasks, scores, targets, subtasks):
    """Scores of a made-up store; those with one column do not look at the target."""
    num_rows = len(tasks)
    by_method = {
        method: InfluenceScores(
            rows=None,
            scores_NJ=np.asarray(own, np.float32).reshape(num_rows, -1),
            subtasks=tuple(subtasks) if np.ndim(own) == 2 else ("set",),
            target_sets=("set",) * (len(subtasks) if np.ndim(own) == 2 else 1),
        )
        for method, own in scores.items()
    }
    return bench.Scored(
        tasks=tasks, rows_N=np.arange(num_rows), targets={"set": targets}, scores=by_method, case={}
    )  # fmt: skip


def test_planted_tasks_are_found_by_the_truth_and_judged_against_bm25(bench):
    tasks = [("t0", "a")] * 6 + [("t0", "b")] * 5 + [("t0", "rare")] * 2 + [("cot", "a")] * 7
    truth_NJ = np.array([[task == ("t0", subtask) for subtask in ("a", "b", "rare")] for task in tasks], float)
    half_NJ = truth_NJ * [1, -1, 1]
    by_dataset_N = np.array([dataset == "t0" for dataset, _ in tasks], float)
    targets = [row(n, "x", "t0", subtask) for n, subtask in enumerate(["b", "a", "rare"])]
    methods = {"truth": truth_NJ, "bm25": half_NJ, "blind": by_dataset_N}
    found = bench.judge_provenance(scored(bench, tasks, methods, targets, ["a", "b", "rare"]), "set", 50)
    assert found["subtasks"] == {"a": 6, "b": 5}
    assert found["chance"]["r_precision"] == pytest.approx((6 / 20 + 5 / 20) / 2)
    own = found["methods"]
    for measure in bench.MEASURES:
        assert own["truth"][measure]["mean"] == {"value": 1, "low": 1, "high": 1}
        assert own["bm25"][measure]["by_subtask"] == [1, 0]
        assert own["truth"][measure]["less_bm25"]["value"] == 0.5
    assert own["blind"]["auc_within_dataset"]["mean"]["value"] == 0.5
    assert own["blind"]["auc"]["by_subtask"][0] == pytest.approx((7 + 7 / 2) / 14)  # 7 of cot below, 7 of t0 tie
    with pytest.raises(DataError, match="no subtask of the targets set has 5 rows"):
        bench.judge_provenance(
            scored(bench, tasks[6:], {"bm25": half_NJ[6:]}, targets[1:], ["a", "b", "rare"]), "set", 5
        )


def test_targets_of_two_datasets_are_refused(bench):
    mixed = scored(bench, [("t0", "a")], {"bm25": [0]}, [row(0, "x"), row(1, "x", "dolly")], ["a"])
    with pytest.raises(DataError, match="the targets set are of dolly, t0, expected one dataset"):
        mixed.dataset_of("set")


def test_corrupted_rows_are_told_apart_within_a_dataset_by_the_highest_score_over_subtasks(bench):
    kinds = ["clean", "clean", "swapped", "cut", "clean", "swapped"]
    done = [{"kind": kind, "words": words} for kind, words in zip(kinds, [1, 4, 2, 4, 9, 9], strict=True)]
    tasks = [("t0", "a")] * 4 + [("cot", "")] * 2
    methods = {"truth": [[1, 0], [0, 2], [0, 0.5], [0.5, 0], [0, 0], [3, 3]], "length": [1, 4, 2, 1, 9, 9]}
    made_up = scored(bench, tasks, methods, [row(0, "x")], ["a", "b"])

    def found(kind, scope):
        return bench.judge_corrupted(made_up, done, "set", kind, scope, 20)

    swapped, cut, everywhere = found("swapped", "own"), found("cut", "own"), found("swapped", "all")
    assert (swapped["clean"], swapped["corrupted"]) == (2, 1)
    assert swapped["methods"]["truth"]["auc"]["value"] == 1
    assert swapped["methods"]["length"]["auc"]["value"] == 0.5
    assert swapped["methods"]["truth"]["less_length"]["value"] == 0.5
    assert (cut["clean"], cut["corrupted"]) == (1, 1)
    assert (everywhere["clean"], everywhere["corrupted"]) == (3, 2)
    assert everywhere["methods"]["truth"]["auc"]["value"] == pytest.approx(2 / 6, abs=1e-4)


def test_a_method_is_named_only_where_its_whole_interval_lies_on_one_side(bench):
    found = {
        "adam none": {"low": 0.51, "high": 0.9},
        "rds": {"low": 0.4, "high": 0.6},
        "length": {"low": 0.1, "high": 0.49},
        "random": {"low": None, "high": None},
    }
    assert bench.those(found, 0.5, 1) == "`adam` inner product"
    assert bench.those(found, 0.5, -1) == "length"
    assert bench.those({}, 0, 1) == "none"


# ---- the whole script


def run(bench, *arguments):
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few steps of a warm-up, and matplotlib's fonts
        patch.setattr(sys, "argv", ["evidence_planted.py", *map(str, arguments)])
        bench.main()


@pytest.fixture(scope="module")
def made(bench, tmp_path_factory, tiny_model_folder, tiny_rows):
    folder = tmp_path_factory.mktemp("planted")
    labels = [{"dataset": "t0", "subtask": "ab"[n % 2]} if n % 4 else {"dataset": "dolly"} for n in range(40)]
    rows = [own | label for own, label in zip(tiny_rows, labels, strict=True)]
    long = row("long", "word " * 40)
    targets = [own for own in rows if own["dataset"] == "t0"][:4]
    for name, own in (("pool", [long, *rows]), ("target", [*targets, long])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in own))
    work = folder / "work"
    prepare = [
        "prepare", "--work", work, "--model", tiny_model_folder, "--pool", folder / "pool.jsonl", "--rows", 32,
        "--warmup-rows", 8, "--max-tokens", 120, "--fraction", 0.5, "--proj-dim", 64, "--lora-rank", 2,
    ]  # fmt: skip
    run(bench, *prepare)
    run(bench, "build", "--work", work)
    few = [
        "--work",
        work,
        "--targets",
        f"t0={folder / 'target.jsonl'}",
        "--max-target-tokens",
        "t0=120",
        "--resamples",
        9,
    ]
    run(bench, "corrupted", *few)
    run(bench, "provenance", *few, "--store", work / "store")
    run(bench, "report", "--work", work, "--json", folder / "out.json")
    return SimpleNamespace(folder=folder, work=work, prepare=prepare, few=few, rows=rows, targets=targets)


def test_both_tests_are_on_the_page_with_every_method(bench, made):
    found = json.loads((made.folder / "out.json").read_text())
    methods = [f"{rule} {kind}" for rule in UPDATE_RULES for kind in ("cosine", "none")] + list(bench.BASELINES)
    assert list(found["provenance"]["results"]["t0"]["methods"]) == methods
    assert found["provenance"]["results"]["t0"]["subtasks"].keys() == {"a", "b"}
    assert [list(own["methods"]) for own in found["corrupted"]["results"]] == [methods] * 4
    assert found["corrupted"]["case"]["targets"] == {"t0": 4}
    page = (made.folder / "out.md").read_text()
    assert page.count("| `adam-less` inner product |") == page.count("| perplexity |") == 3
    assert "out.png" in page
    assert (made.folder / "out.png").stat().st_size > 1000
    assert "NaN" not in (made.folder / "out.json").read_text()
    assert str(made.folder.parent) not in (made.folder / "out.json").read_text()


def test_the_store_is_of_corrupted_rows_and_the_warm_up_of_clean_ones_that_are_not_in_it(bench, made):
    pool, changed, warmed = (
        [json.loads(line) for line in (made.work / f"{name}.jsonl").read_text().splitlines()]
        for name in ("pool", "corrupted", "warmup")
    )
    assert pool + warmed == made.rows
    done = json.loads((made.work / "corruption.json").read_text())["rows"]
    assert (changed, done) == bench.corrupt(pool, 0.5, 0)
    build = json.loads((made.work / "store" / "build.json").read_text())
    assert [source["name"] for source in build["sources"]] == ["corrupted.jsonl"]


@pytest.mark.filterwarnings("ignore::less.checkpoints.EvidenceWarning")
def test_scores_are_those_of_the_library(made):
    for rule, normalize in (("adam", "none"), ("sign", "cosine")):
        expected = score(
            datastore=made.work / "store", targets={"t0": made.targets}, feature_set=f"{rule}-sparse",
            normalize=normalize, progress=False,
        )  # fmt: skip
        kept = np.load(made.work / "corrupted" / f"{rule}-{normalize}.npz")
        np.testing.assert_allclose(kept["scores_NJ"], expected.scores_NJ, rtol=1e-5)
        assert tuple(kept["subtasks"]) == expected.subtasks


def test_what_is_finished_is_kept_and_other_settings_are_refused(bench, made):
    own = {name: made.work / name / "bm25.npz" for name in STAGES_OF_A_TEST}
    rds = made.work / "corrupted" / "rds.npz"
    before = {name: file.stat().st_mtime_ns for name, file in own.items()}
    with np.load(rds) as kept:
        scores_NJ = kept["scores_NJ"]
    rds.unlink()
    run(bench, *made.prepare)
    run(bench, "corrupted", *made.few)
    assert {name: file.stat().st_mtime_ns for name, file in own.items()} == before
    np.testing.assert_array_equal(np.load(rds)["scores_NJ"], scores_NJ)
    with pytest.raises(SystemExit, match="begun with other fraction"):
        run(bench, *made.prepare, "--fraction", 0.25)
    with pytest.raises(SystemExit, match="begun with other targets"):
        run(bench, "corrupted", *made.few, "--max-target-tokens", "t0=500")
    with pytest.raises(SettingError, match="no target set 'bbh' to limit; there are t0"):
        run(bench, "corrupted", *made.few, "--max-target-tokens", "bbh=500")
    with pytest.raises(SystemExit, match="has no result yet"):
        run(bench, "report", "--work", made.folder / "nothing", "--json", made.folder / "no.json")
