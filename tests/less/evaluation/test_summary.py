"""What is said about trials, from losses that are made up."""

import json

import numpy as np
import pytest

from datastore import RowTable
from less.evaluation.plan import Arm
from less.evaluation.summary import summarize
from less.evaluation.trial import Measured

NUM_ROWS = 12
START = np.linspace(2.0, 3.0, NUM_ROWS)


def arm(method, seed, *, match="rows", quantile=None, positions=(0, 1), target="t"):
    return Arm(
        method=method, target=target, fraction=0.1, match=match, quantile=quantile, seed=seed,
        positions=np.array(positions),
    )  # fmt: skip


def measured(drop, correct=()):
    return Measured(losses=(START - drop).tolist(), correct=list(correct))


def summary(pairs, correct=(), **changes):
    arms, results = zip(*pairs, strict=True)
    count = 10
    rows = RowTable(
        sources_N=np.zeros(count, np.int32), rows_N=np.arange(count), ids=[""] * count,
        num_tokens_N=np.full(count, 9, np.int32), num_supervised_N=np.arange(1, count + 1, dtype=np.int32),
        truncated_N=np.zeros(count, bool), digests_N=np.zeros(count, np.uint64),
    )  # fmt: skip
    return summarize(
        arms, results, {"t": Measured(losses=START.tolist(), correct=list(correct))}, rows,
        **{"settings": {}, "environment": {}, "held_out": {"t": NUM_ROWS}, "num_resamples": 300} | changes,
    )  # fmt: skip


@pytest.fixture
def noise():
    generator = np.random.default_rng(0)
    return lambda: generator.normal(0, 0.05, NUM_ROWS)


@pytest.fixture
def trials(noise):
    """Three seeds of a method that drops by 0.3, and of random rows that drop by 0.1."""
    drops = {(name, seed): value + noise() for name, value in (("less", 0.3), ("random", 0.1)) for seed in range(3)}
    return drops, [(arm(name, seed, positions=(seed, 5)), measured(drop)) for (name, seed), drop in drops.items()]


class TestArms:
    def test_are_means_over_seeds(self, trials):
        drops, pairs = trials
        less, random = summary(pairs).arms
        ours, base = (np.array([drops[name, seed] for seed in range(3)]) for name in ("less", "random"))
        assert (less.method, random.method) == ("less", "random")
        assert less.drop.value == pytest.approx(ours.mean())
        assert less.over_random.value == pytest.approx((ours - base).mean())
        assert less.loss == pytest.approx((START - ours).mean())
        assert less.num_rows == 2
        assert less.num_supervised == pytest.approx(np.mean([n + 1 + 6 for n in range(3)]))

    def test_have_random_rows_at_zero(self, trials):
        random = summary(trials[1]).arms[1]
        assert (random.over_random.value, random.over_random.low, random.over_random.high) == (0, 0, 0)

    def test_have_intervals_around_their_values(self, trials):
        for own in summary(trials[1]).arms:
            for interval in (own.drop, own.over_random):
                assert interval.low <= interval.value <= interval.high
        less = summary(trials[1]).arms[0]
        assert 0.1 < less.over_random.low < less.over_random.high < 0.3

    def test_have_wider_intervals_where_seeds_differ_too(self, noise):
        """Drops that are the same on every row still have an interval: that of the seeds."""
        pairs = [(arm("random", seed), measured(np.full(NUM_ROWS, 0.1 * seed))) for seed in range(3)]
        (random,) = summary(pairs).arms
        assert random.drop.low < 0.05 < 0.15 < random.drop.high

    def test_are_subtracted_seed_by_seed(self):
        """What both drop by at a seed is not in the difference."""
        pairs = [
            (arm(name, seed), measured(np.full(NUM_ROWS, seed + gain)))
            for name, gain in (("less", 0.25), ("random", 0.0)) for seed in range(3)
        ]  # fmt: skip
        over = summary(pairs).arms[0].over_random
        assert [over.low, over.value, over.high] == pytest.approx([0.25] * 3)

    def test_are_held_against_random_rows_of_the_same_budget(self):
        pairs = [
            (arm(name, 0, match=match), measured(np.full(NUM_ROWS, drop)))
            for name, match, drop in (
                ("less", "rows", 0.5), ("less", "tokens", 0.4), ("random", "rows", 0.2), ("random", "tokens", 0.3)
            )
        ]  # fmt: skip
        found = {(own.method, own.match): own.over_random.value for own in summary(pairs).arms}
        assert found["less", "rows"] == pytest.approx(0.3)
        assert found["less", "tokens"] == pytest.approx(0.1)

    def test_count_right_answers(self):
        pairs = [
            (arm("less", 0), measured(0.1, [True, False, True, True])),
            (arm("less", 1), measured(0.1, [True, False, False, False])),
            (arm("random", 0), measured(0.0, [False] * 4)),
            (arm("random", 1), measured(0.0, [False] * 4)),
        ]
        found = summary(pairs, correct=[True, False, False, False])
        assert [own.accuracy for own in found.arms] == [0.5, 0]
        assert found.start["t"]["accuracy"] == 0.25
        assert found.start["t"]["loss"] == pytest.approx(START.mean())
        assert found.start["t"]["rows"] == NUM_ROWS


class TestQuantiles:
    def test_of_drops_that_rise_with_the_score_have_trend_1(self, noise):
        for sign in (1, -1):
            pairs = [(arm("random", seed), measured(0.0)) for seed in range(2)] + [
                (arm("less", seed, match="quantile", quantile=q), measured(sign * q + noise()))
                for seed in range(2) for q in range(5)
            ]  # fmt: skip
            (test,) = summary(pairs).quantiles
            assert (test.method, test.target) == ("less", "t")
            assert (test.trend.value, test.trend.low, test.trend.high) == (sign, sign, sign)
            assert [drop.value for drop in test.drops] == pytest.approx([sign * q for q in range(5)], abs=0.1)

    def test_are_no_arms(self):
        pairs = [(arm("random", 0), measured(0.0))]
        pairs += [(arm("less", 0, match="quantile", quantile=q), measured(q)) for q in range(3)]
        assert [own.method for own in summary(pairs).arms] == ["random"]

    def test_of_drops_without_order_have_no_trend(self):
        pairs = [(arm("random", 0), measured(0.0))]
        pairs += [(arm("less", 0, match="quantile", quantile=q), measured(0.0)) for q in range(3)]
        found = summary(pairs)
        assert np.isnan([found.quantiles[0].trend.value, found.quantiles[0].trend.low]).all()
        assert found.to_json()["quantiles"][0]["trend"] == {"value": None, "low": None, "high": None}


def test_json_has_null_and_never_nan(trials):
    found = summary(trials[1], settings={"fractions": (0.1, float("nan"))}).to_json()
    text = json.dumps(found, allow_nan=False)
    assert json.loads(text)["arms"][0]["accuracy"] is None
    assert json.loads(text)["start"]["t"]["accuracy"] is None
    assert json.loads(text)["settings"]["fractions"] == [0.1, None]


def test_the_same_trials_give_the_same_numbers(trials):
    assert summary(trials[1]).to_json() == summary(trials[1]).to_json()
