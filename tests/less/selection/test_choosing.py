"""`choose` against its slow twin in every composition, and each strategy against brute force."""

import re
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datastore.errors import SettingError
from less.selection import Candidates, Labels, SelectConfig, choose, select_round_robin, select_top
from less.selection.candidates import Scores
from less.selection.diversity import Samples, stretched
from less.selection.reference import choose_ref
from less.selection.similarity import HeldFeatures, Nearest

SINGLE = st.one_of(st.none(), st.sampled_from("abc"))
SEVERAL = st.lists(st.sampled_from(["add", "read", "plan", "rhyme"]), max_size=4)


@st.composite
def any_candidates(draw, max_rows=14):
    num_rows, num_columns = draw(st.integers(1, max_rows)), draw(st.integers(1, 3))

    def array(low, high, *shape, dtype=np.float32):
        size = int(np.prod(shape))
        return np.array(draw(st.lists(st.integers(low, high), min_size=size, max_size=size)), dtype).reshape(shape)

    features_Nd = array(-1, 1, num_rows, 3) / 2  # products are exact: ties are ties in any order of summing
    return Candidates(
        scores_NJ=array(-2, 3, num_rows, num_columns),
        subtasks=[f"task {j}" for j in range(num_columns)],
        target_sets=sorted(draw(st.lists(st.sampled_from("st"), min_size=num_columns, max_size=num_columns))),
        away_N=draw(st.sampled_from([None, array(-2, 2, num_rows)])),
        num_tokens_N=array(1, 5, num_rows, dtype=np.int32),
        digests_N=array(0, 6, num_rows, dtype=np.uint64),
        labels={
            "dataset": Labels.of(draw(st.lists(SINGLE, min_size=num_rows, max_size=num_rows))),
            "skill": Labels.of(draw(st.lists(SEVERAL, min_size=num_rows, max_size=num_rows))),
        },
        features_of=lambda rows: features_Nd[rows],
    )


@st.composite
def any_config(draw, candidates, **fixed):
    def amounts():
        column = draw(st.sampled_from(["dataset", "skill"]))
        names = candidates.labels[column].names
        value = f"{draw(st.sampled_from(names))}:" if names and draw(st.booleans()) else ""
        amount = draw(st.sampled_from(["0", "1", "2", "0.2", "0.34", "0.5", "1.0"]))
        return f"{column}={value}{amount}"

    size = draw(st.sampled_from(["fraction", "count", "token_budget"]))
    value = {
        "fraction": st.sampled_from([0.1, 0.3, 1.0]),
        "count": st.integers(1, candidates.num_rows),
        "token_budget": st.integers(1, 30),
    }[size]
    order = draw(
        st.sampled_from(
            [
                {},
                {"turns": "subtask"},
                {"turns": "target-set"},
                {"balance": "dataset"},
                {"balance": "skill"},
                {"balance_pairs": "skill"},
                {"diversity": "mmr", "diversity_weight": draw(st.sampled_from([0.0, 0.25, 0.5, 1.0]))},
                {"diversity": "facility-location"},
            ]
        )
    )
    rules = {
        "quotas": [amounts() for _ in range(draw(st.integers(0, 2)))],
        "caps": {(a := amounts()).rpartition(":")[0] or a.split("=")[0]: a for _ in range(draw(st.integers(0, 2)))},
        "min_score": draw(st.sampled_from([None, None, 0.0, 1.0])),
        "duplicates": draw(st.sampled_from([None, "exact"])),
        "near_duplicates": draw(st.sampled_from([None, 0.25, 0.5])),
        "diversity_candidates": draw(st.integers(1, 3)),
        "seed": draw(st.integers(0, 3)),
    }
    rules["caps"] = list(rules["caps"].values())
    if candidates.away_N is not None:
        rules["away_above"] = draw(st.sampled_from([None, 1.0]))
        rules["away_weight"] = draw(st.sampled_from([None, 0.5]))
    fields = {size: draw(value), **order, **rules, **fixed}
    try:
        return SelectConfig(**fields)
    except SettingError:  # a quota above a cap
        return SelectConfig(**fields | {"quotas": []})


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_composition_is_that_of_the_slow_twin(data):
    candidates = data.draw(any_candidates())
    config = data.draw(any_config(candidates))
    choice = choose(candidates, config)
    positions, why, passed_over = choose_ref(candidates, config)
    assert choice.positions.tolist() == positions
    assert choice.why == why
    assert {rule: rows.tolist() for rule, rows in choice.passed_over.items()} == passed_over


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_what_is_chosen_keeps_every_promise_of_its_config(data):
    candidates = data.draw(any_candidates())
    config = data.draw(any_config(candidates))
    choice = choose(candidates, config)
    taken = choice.positions.tolist()
    num_tokens_N, x_Nd = candidates.num_tokens_N, candidates.features_of(np.arange(candidates.num_rows))
    assert len(set(taken)) == len(taken) == len(choice.why) == len(choice.scores)
    total = config.token_budget or config.count or -(-int(config.fraction * 10) * candidates.num_rows // 10)
    used = int(num_tokens_N[taken].sum()) if config.token_budget else len(taken)
    assert used <= total
    if config.duplicates:
        assert len(set(candidates.digests_N[taken].tolist())) == len(taken)
    if config.away_above is not None:
        assert (candidates.away_N[taken] < config.away_above).all()
    if config.min_score is not None:
        assert (choice.scores >= config.min_score).all()
    if config.near_duplicates is not None:
        assert all(x_Nd[a] @ x_Nd[b] < config.near_duplicates for a, b in combinations(taken, 2))
    own_caps = {(cap.column, cap.value) for cap in config.all_caps}
    for cap in config.all_caps:
        labels = candidates.labels[cap.column]
        for code, name in enumerate(labels.names):
            if cap.value == name or (cap.value is None and (cap.column, name) not in own_caps):
                own = [row for row in taken if code in labels.of_row(row)]
                is_share = isinstance(cap.amount, float)
                held = int(num_tokens_N[own].sum()) if is_share and config.token_budget else len(own)
                assert held <= (cap.amount * total + 1e-9 if is_share else cap.amount)
    scores = Scores(candidates.scores_NJ, candidates.away_N, config.away_factor)
    fine_N = np.zeros(candidates.num_rows) if scores.fine_N is None else scores.fine_N
    assert np.array_equal(choice.scores, candidates.scores_NJ[taken, choice.column_of] - fine_N[taken])


@given(any_candidates(), st.data())
def test_without_any_rule_the_best_are_taken(candidates, data):
    count = data.draw(st.integers(1, candidates.num_rows))
    choice = choose(replace(candidates, away_N=None), SelectConfig(count=count))
    best_N = candidates.scores_NJ.max(axis=1)
    assert choice.positions.tolist() == select_top(best_N, count).tolist()
    assert np.array_equal(choice.scores, best_N[choice.positions])
    assert choice.why == [f"best for task {j}" for j in candidates.scores_NJ[choice.positions].argmax(axis=1)]
    assert choice.notes == ()


@given(any_candidates(), st.data())
def test_turns_of_subtasks_are_the_round_robin(candidates, data):
    count = data.draw(st.integers(1, candidates.num_rows))
    choice = choose(replace(candidates, away_N=None), SelectConfig(count=count, turns="subtask"))
    positions, columns = select_round_robin(candidates.scores_NJ, count)
    assert np.array_equal(choice.positions, positions)
    assert np.array_equal(choice.column_of, columns)


@given(any_candidates(), st.data())
def test_balanced_values_differ_by_one_row_at_most_while_they_last(candidates, data):
    choice = choose(candidates, SelectConfig(count=data.draw(st.integers(1, candidates.num_rows)), balance="dataset"))
    labels = candidates.labels["dataset"]
    sizes = {name: len(labels.rows_with(code)) for code, name in enumerate(labels.names)}
    taken = {name: choice.why.count(f"turn of dataset {name}") for name in labels.names}
    most = max(taken.values(), default=0)
    assert all(taken[name] in (most, most - 1) or taken[name] == sizes[name] for name in labels.names)
    if "best of those without dataset" in choice.why:
        assert taken == sizes


@given(any_candidates(), st.data())
def test_quotas_are_met_with_the_best_as_far_as_the_pool_has_them(candidates, data):
    labels = candidates.labels["dataset"]
    if not labels.names:
        return
    name = data.draw(st.sampled_from(labels.names))
    need, count = data.draw(st.integers(1, 8)), data.draw(st.integers(1, candidates.num_rows))
    choice = choose(candidates, SelectConfig(count=count, quotas=[f"dataset={name}:{need}"]))
    rows = labels.rows_with(labels.names.index(name))
    held = np.isin(choice.positions, rows).sum()
    assert held >= min(need, len(rows), count)
    assert (held < need) == any(
        note.startswith(f"quota dataset={name}: {held} of {need} rows") for note in choice.notes
    )
    own = [
        row for row, why in zip(choice.positions.tolist(), choice.why, strict=True) if why == f"quota dataset={name}"
    ]
    best_N = Scores(candidates.scores_NJ, candidates.away_N, 1.0).best_N
    assert own == rows[select_top(best_N[rows], len(own))].tolist()


@given(any_candidates(), st.integers(1, 40))
def test_a_greater_token_budget_only_adds_rows(candidates, budget):
    less = choose(candidates, SelectConfig(token_budget=budget)).positions.tolist()
    more = choose(candidates, SelectConfig(token_budget=budget + 3)).positions.tolist()
    assert more[: len(less)] == less


@given(any_candidates(), st.data())
def test_mmr_that_asks_for_the_score_alone_is_the_order_by_score(candidates, data):
    count = data.draw(st.integers(1, candidates.num_rows))
    by_score = choose(candidates, SelectConfig(count=count)).positions
    diverse = choose(candidates, SelectConfig(count=count, diversity="mmr", diversity_weight=1.0)).positions
    assert np.array_equal(diverse, by_score)


@settings(max_examples=60, deadline=None)
@given(any_candidates(), st.integers(1, 10), st.floats(0, 1))
def test_mmr_takes_the_row_of_the_greatest_marginal_relevance(candidates, count, weight):
    count = min(count, candidates.num_rows)
    candidates = replace(candidates, away_N=None)
    config = SelectConfig(count=count, diversity="mmr", diversity_weight=weight, diversity_candidates=14)
    taken = choose(candidates, config).positions.tolist()
    x_Nd = candidates.features_of(np.arange(candidates.num_rows))
    reward_N = stretched(candidates.scores_NJ.max(axis=1))
    likeness_NN = np.maximum(x_Nd @ x_Nd.T, 0).astype(float)
    for n, row in enumerate(taken):
        near_N = likeness_NN[:, taken[:n]].max(axis=1, initial=0)
        value_N = weight * reward_N - (1 - weight) * near_N
        value_N[taken[:n]] = -np.inf
        assert row == value_N.argmax()


def test_facility_location_comes_near_the_best_set_there_is():
    generator = np.random.default_rng(0)
    num_rows, count, shares = 12, 4, []
    for seed in range(12):
        x_Nd = generator.standard_normal((num_rows, 3)).astype(np.float32)
        likeness_NN = np.maximum(x_Nd @ x_Nd.T, 0)

        def f(rows, likeness_NN=likeness_NN):
            return likeness_NN[:, list(rows)].max(axis=1).sum()

        candidates = plain(num_rows, features_of=lambda rows, x_Nd=x_Nd: x_Nd[rows])
        config = SelectConfig(count=count, diversity="facility-location", diversity_candidates=3, seed=seed)
        best = max(map(f, combinations(range(num_rows), count)))
        shares.append(f(choose(candidates, config).positions) / best)
        assert np.array_equal(choose(candidates, config).positions, choose(candidates, config).positions)
    assert np.mean(shares) > 1 - 1 / np.e - 0.1
    assert np.mean(shares) > 0.85  # what is measured; a random set has some 0.7
    assert max(shares) <= 1


def plain(num_rows, **more):
    scores_N1 = np.arange(num_rows, 0, -1, dtype=np.float32)[:, None]
    return Candidates(scores_NJ=scores_N1, subtasks=["task"], target_sets=["task"], **more)


def test_samples_are_of_rows_that_are_left_and_the_same_for_a_seed():
    rows_n = np.array([3, 5, 8, 9])
    gone = bytearray(10)
    gone[5] = 1
    assert {row for seed in range(20) for row in Samples(rows_n, 2, seed).draw(gone)} == {3, 8, 9}
    assert Samples(np.arange(1000), 2, 7).draw(bytearray(1000)) == Samples(np.arange(1000), 2, 7).draw(bytearray(1000))
    assert Samples(np.arange(1000), 2, 7).draw(bytearray(1000)) == [43, 314, 325, 786, 901]  # on any machine
    for row in (3, 8, 9):
        gone[row] = 1
    assert Samples(rows_n, 2, 0).draw(gone) == []


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 40))
def test_nearest_is_the_greatest_product_whenever_it_is_asked_for(seed, num_taken):
    generator = np.random.default_rng(seed)
    x_Nd = (generator.integers(-2, 3, (50, 3)) / 2).astype(np.float32)
    near = Nearest(HeldFeatures(lambda rows: x_Nd[rows]), 50, 4)
    for n, row in enumerate(generator.permutation(50)[:num_taken].tolist(), start=1):
        near.take(row)
        some = generator.permutation(50)[: n % 7].tolist()
        near.bring_up_to_date(some)
        assert all(near.num_missing(row) == 0 for row in some)
    near.bring_up_to_date(list(range(50)))
    taken = near._taken[:num_taken]
    assert [near.of(row) for row in range(50)] == np.maximum(x_Nd @ taken.T, 0).max(axis=1).tolist()


def test_near_duplicates_are_found_across_many_blocks():
    generator = np.random.default_rng(0)
    kinds_Kd = generator.standard_normal((700, 32)).astype(np.float32)
    kinds_Kd /= np.linalg.norm(kinds_Kd, axis=1, keepdims=True)
    kind_N = generator.integers(0, 700, 3000)
    candidates = plain(3000, features_of=lambda rows: kinds_Kd[kind_N[rows]])
    choice = choose(candidates, SelectConfig(count=3000, near_duplicates=0.99))
    firsts = np.unique(kind_N, return_index=True)[1]
    assert choice.positions.tolist() == sorted(firsts.tolist())
    assert choice.passed_over["near-duplicate"].tolist() == np.setdiff1d(np.arange(3000), firsts).tolist()
    assert choice.notes == (f"{len(firsts)} of 3,000 rows: no other row passes near_duplicates",)


def test_a_row_that_points_to_what_is_to_be_avoided_scores_lower_or_is_left_out():
    away_N = np.array([0, 0.9, -0.9, 0.2], np.float32)
    candidates = Candidates(
        scores_NJ=np.array([[0.3], [0.9], [0.2], [0.4]], np.float32), subtasks=["a"], target_sets=["a"], away_N=away_N
    )
    assert choose(candidates, SelectConfig(count=4)).positions.tolist() == [0, 2, 3, 1]
    choice = choose(candidates, SelectConfig(count=3, away_above=0.2))
    assert choice.positions.tolist() == [0, 2]
    assert {rule: rows.tolist() for rule, rows in choice.passed_over.items()} == {"away": [1, 3]}
    assert choice.notes == (
        "away: 2 of 4 rows score 0.2 or more for what is to be avoided",
        "2 of 3 rows: no other row passes the rules",
    )


def test_what_cannot_be_had_is_noted_and_no_error():
    labels = {"dataset": Labels.of(["a", "a", "b", "b", "b"])}
    candidates = plain(5, labels=labels, num_tokens_N=np.full(5, 10))
    notes = choose(candidates, SelectConfig(count=4, quotas=["dataset=a:3"])).notes
    assert notes == ("quota dataset=a: 2 of 3 rows, the pool has no more",)
    notes = choose(candidates, SelectConfig(count=2, quotas=["dataset=b:3"])).notes
    assert notes == ("quota dataset=b: 2 of 3 rows, the budget is full",)
    notes = choose(candidates, SelectConfig(count=5, quotas=["dataset=b:3"], min_score=2)).notes
    assert notes[0] == "quota dataset=b: 2 of 3 rows, the rules leave no more"
    assert notes[1] == "4 of 5 rows: no other row passes min_score"
    notes = choose(candidates, SelectConfig(count=5, caps=["dataset=0.1"])).notes
    assert notes == (
        "cap dataset=0.1 is 0 of 5 rows: none is taken",
        "0 of 5 rows: no other row passes the rules",
    )
    assert choose(candidates, SelectConfig(token_budget=9)).notes == (
        "no row was taken: the first has more than 9 tokens",
    )
    assert choose(candidates, SelectConfig(token_budget=50)).notes == ()
    assert choose(candidates, SelectConfig(token_budget=60)).notes == ("50 of 60 tokens: the pool has no more",)


def test_shares_of_a_token_budget_are_tokens_and_rows_are_rows():
    candidates = plain(6, labels={"dataset": Labels.of("aaabbb")}, num_tokens_N=np.array([4, 4, 4, 1, 1, 1]))
    choice = choose(candidates, SelectConfig(token_budget=10, caps=["dataset=a:0.4"]))
    assert choice.positions.tolist() == [0, 3, 4, 5]
    choice = choose(candidates, SelectConfig(token_budget=10, quotas=["dataset=b:0.2"]))
    assert choice.positions.tolist() == [3, 4, 0, 1]
    choice = choose(candidates, SelectConfig(token_budget=10, quotas=["dataset=b:1"]))
    assert choice.positions.tolist() == [3, 0, 1]


def test_a_values_own_cap_stands_in_place_of_its_columns():
    candidates = plain(6, labels={"dataset": Labels.of("aaabbb")})
    choice = choose(candidates, SelectConfig(count=5, caps=["dataset=1", "dataset=b:2"]))
    assert choice.positions.tolist() == [0, 3, 4]
    passed_over = {rule: rows.tolist() for rule, rows in choice.passed_over.items()}
    assert passed_over == {"cap dataset=a": [1, 2], "cap dataset=b": [5]}


def test_a_fraction_counts_the_rows_that_a_prefilter_set_aside():
    assert len(choose(plain(10, num_set_aside=10), SelectConfig(fraction=0.3)).positions) == 6


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"count": 7}, "count must be between 1 and the 6 scored rows, got 7"),
        ({"token_budget": 7}, "token_budget needs the tokens"),
        ({"count": 1, "balance": "skill"}, "there is no column 'skill' to select by; the rows have dataset"),
        ({"count": 1, "quotas": ["dataset=c:1"]}, "dataset=c:1: no row has the dataset 'c'; there are a, b"),
        ({"count": 1, "caps": ["dataset=c:1"]}, "no row has the dataset 'c'"),
        ({"count": 1, "away_above": 0.2}, "away_above and away_weight need negative targets"),
        ({"count": 1, "duplicates": "exact"}, "duplicates needs a digest"),
        ({"count": 1, "near_duplicates": 0.9}, "near_duplicates needs gradient features"),
        ({"count": 1, "diversity": "mmr"}, "diversity needs gradient features"),
    ],
)
def test_what_is_asked_for_and_is_not_there_is_refused(fields, words):
    candidates = plain(6, labels={"dataset": Labels.of("aaabbb")})
    with pytest.raises(SettingError, match=re.escape(words)):
        choose(candidates, SelectConfig(**fields))


@pytest.mark.parametrize("fields", [{"diversity": "mmr"}, {"near_duplicates": 0.9}])
def test_features_that_would_not_fit_are_refused_before_they_are_read(fields, monkeypatch):
    read = []

    def features_of(rows):
        read.append(len(rows))
        return np.ones((len(rows), 64), np.float32)

    monkeypatch.setattr("less.selection.similarity.MOST_BYTES", 64 * 4 * 1000)
    with pytest.raises(SettingError, match=r"rows of 64 values need .* GiB to be compared"):
        choose(plain(2000, features_of=features_of), SelectConfig(count=1001, **fields))
    assert sum(read) <= 256
