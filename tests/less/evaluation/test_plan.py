"""Which trials an experiment needs, from scores that are made up."""

from decimal import Decimal

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from datastore import RowTable
from datastore.errors import SettingError
from less.evaluation.plan import Arm, arms_of, parse_method, plan_trials, quantile_arms
from less.influence import InfluenceScores

SOURCES = ["sha-of-a", "sha-of-b"]


def table(keys, num_supervised=None):
    """Rows with these (source, row)."""
    count = len(keys)
    return RowTable(
        sources_N=np.array([source for source, _ in keys], np.int32),
        rows_N=np.array([row for _, row in keys], np.int64),
        ids=[f"{source}-{row}" for source, row in keys],
        num_tokens_N=np.full(count, 9, np.int32),
        num_supervised_N=np.array([1] * count if num_supervised is None else num_supervised, np.int32),
        truncated_N=np.zeros(count, bool),
        digests_N=np.arange(count, dtype=np.uint64),
    )


def scores(columns, num_supervised=None):
    """Scores by target set."""
    scores_NJ = np.array([*columns.values()], np.float32).T
    rows = table([(0, n) for n in range(len(scores_NJ))], num_supervised)
    return InfluenceScores(rows, scores_NJ, tuple(columns), tuple(columns))


def arm(positions, *, seed=0, method="less", target="t"):
    return Arm(
        method=method, target=target, fraction=0.1, match="rows", quantile=None, seed=seed,
        positions=np.array(positions, np.int64),
    )  # fmt: skip


class TestArms:
    def test_of_matched_rows_are_the_best_in_the_pools_order(self):
        found = scores({"t": [0.1, 0.9, 0.3, 0.8, 0.9, 0.0], "other": [9, 8, 7, 6, 5, 4]})
        half, third = arms_of(found, method="m", target="t", fractions=(0.5, 1 / 3), match=("rows",), seed=3)
        assert half.positions.tolist() == [1, 3, 4]
        assert third.positions.tolist() == [1, 4]
        assert (half.method, half.target, half.fraction, half.match, half.quantile, half.seed) == (
            "m", "t", 0.5, "rows", None, 3,
        )  # fmt: skip

    def test_of_matched_tokens_stop_at_the_first_row_that_reaches_the_budget(self):
        found = scores({"t": [6, 5, 4, 3, 2, 1]}, num_supervised=[1, 4, 1, 1, 2, 1])
        sizes = {
            fraction: len(
                arms_of(found, method="m", target="t", fractions=(fraction,), match=("tokens",), seed=0)[0].positions
            )
            for fraction in (0.1, 0.11, 0.5, 0.51, 0.6, 0.61, 0.99)
        }
        assert sizes == {0.1: 1, 0.11: 2, 0.5: 2, 0.51: 3, 0.6: 3, 0.61: 4, 0.99: 6}

    @example(Decimal("0.07"), [1] * 100)  # in floating point 0.07 · 100 is more than 7
    @given(st.decimals("0.01", "0.99", places=2), st.lists(st.integers(1, 50), min_size=1, max_size=40))
    def test_of_matched_tokens_hold_the_budget_and_not_a_row_more(self, fraction, num_supervised):
        found = scores({"t": [*range(len(num_supervised))]}, num_supervised)
        (own,) = arms_of(found, method="m", target="t", fractions=(float(fraction),), match=("tokens",), seed=0)
        held = [num_supervised[n] for n in own.positions]  # the lowest score, taken last, is first
        assert sum(held) >= fraction * sum(num_supervised) > sum(held[1:])

    def test_come_for_every_budget_and_way_to_match(self):
        found = arms_of(
            scores({"t": range(10)}), method="m", target="t", fractions=(0.1, 0.3), match=("rows", "tokens"), seed=0
        )
        assert [(own.fraction, own.match) for own in found] == [
            (0.1, "rows"), (0.1, "tokens"), (0.3, "rows"), (0.3, "tokens"),
        ]  # fmt: skip


class TestQuantiles:
    def test_are_disjoint_parts_of_the_order_that_cover_it(self):
        score_N = np.random.default_rng(0).permutation(47)
        arms = quantile_arms(scores({"t": score_N}), method="m", target="t", fraction=0.99, num_quantiles=5, seed=0)
        assert [own.quantile for own in arms] == [0, 1, 2, 3, 4]
        taken = np.concatenate([own.positions for own in arms])
        assert sorted(taken.tolist()) == [*range(47)]
        tops = [score_N[own.positions].max() for own in arms]
        bottoms = [score_N[own.positions].min() for own in arms]
        assert all(top < bottom for top, bottom in zip(tops[:-1], bottoms[1:], strict=True))

    @given(st.integers(3, 8), st.integers(8, 60), st.floats(0.01, 0.5), st.integers(0, 5))
    def test_are_drawn_from_their_own_part_as_many_as_the_budget(self, num_quantiles, num_rows, fraction, seed):
        score_N = np.random.default_rng(1).integers(0, 20, num_rows)  # with ties
        arms = quantile_arms(
            scores({"t": score_N}), method="m", target="t", fraction=fraction, num_quantiles=num_quantiles, seed=seed
        )
        parts = np.array_split(np.argsort(score_N, kind="stable"), num_quantiles)
        for own, part in zip(arms, parts, strict=True):
            assert own.positions.tolist() == sorted(set(own.positions.tolist()))
            assert set(own.positions.tolist()) <= set(part.tolist())
            assert len(own.positions) == min(len(part), int(np.ceil(round(fraction * num_rows, 9))))

    def test_are_drawn_anew_by_each_seed_and_alike_by_the_same(self):
        found = scores({"t": range(100)})
        drawn = [
            [
                own.positions.tolist()
                for own in quantile_arms(found, method="m", target="t", fraction=0.1, num_quantiles=4, seed=seed)
            ]
            for seed in (0, 0, 1)
        ]
        assert drawn[0] == drawn[1] != drawn[2]

    def test_more_than_rows_are_refused(self):
        with pytest.raises(SettingError, match="at most the 4 rows of the store, got 5"):
            quantile_arms(scores({"t": range(4)}), method="m", target="t", fraction=0.5, num_quantiles=5, seed=0)


class TestTrials:
    ROWS = table([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)])

    def plan(self, arms, rows=None, sources=SOURCES, settings=None):
        return plan_trials(arms, rows or self.ROWS, sources, {"epochs": 1} if settings is None else settings)

    def test_of_the_same_rows_and_seed_are_one_whatever_the_method_and_target(self):
        arms = [arm([0, 2]), arm([0, 2], method="rds", target="u"), arm([0, 2], seed=1), arm([0, 3])]
        trials, keys = self.plan(arms)
        assert keys[0] == keys[1]
        assert len({*keys}) == len(trials) == 3
        assert [trial.key for trial in trials] == [keys[0], keys[2], keys[3]]
        assert trials[0].targets == ("t", "u")
        assert (trials[1].seed, trials[1].targets) == (1, ("t",))
        assert trials[2].positions.tolist() == [0, 3]

    def test_have_the_same_key_in_any_store_of_the_pool(self):
        """There a row was skipped, so that positions differ, and the sources may have other numbers."""
        _, keys = self.plan([arm([0, 2, 4])])
        fewer = table([(0, 0), (0, 2), (1, 1)])
        assert self.plan([arm([0, 1, 2])], fewer)[1] == keys
        renumbered = table([(1, 0), (1, 1), (1, 2), (0, 0), (0, 1)])
        assert self.plan([arm([0, 2, 4])], renumbered, SOURCES[::-1])[1] == keys

    def test_have_another_key_where_anything_differs(self):
        (key,) = self.plan([arm([0, 2])])[1]
        others = [
            self.plan([arm([0, 1])]),
            self.plan([arm([0, 2], seed=1)]),
            self.plan([arm([0, 2])], sources=["sha-of-c", "sha-of-b"]),
            self.plan([arm([0, 2])], settings={"epochs": 2}),
        ]
        assert key not in {keys[0] for _, keys in others}
        assert self.plan([arm([0, 2])], settings={"epochs": 1})[1] == [key]


@pytest.mark.parametrize(
    ("spec", "fields"),
    [
        ("less", {"method": "less"}),
        ("less:sgd-sparse", {"method": "less", "feature_set": "sgd-sparse"}),
        ("less:sgd-sparse:none", {"method": "less", "feature_set": "sgd-sparse", "normalize": "none"}),
        ("rds", {"method": "rds"}),
    ],
)
def test_a_method_is_written_with_its_feature_set(spec, fields):
    assert parse_method(spec) == fields


@pytest.mark.parametrize("spec", ["rds:x", "less:a:b", "less:a:none:c", "bm25:none"])
def test_a_method_written_otherwise_is_refused(spec):
    with pytest.raises(SettingError, match="expected less, less:FEATURE_SET"):
        parse_method(spec)
