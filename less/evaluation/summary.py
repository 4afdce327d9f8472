"""What the trials say: the loss drop of each method, its difference from random rows, and the quantile test.

    drop          = mean held-out loss of the base model − mean held-out loss after training
    over random   = drop of the method − drop of random rows at the same budget, seed by seed
    quantile test = Spearman, over quantiles, of the quantile's place (lowest scores first) with its mean drop

Intervals are 95%, percentile bootstrap over held-out rows and, where there are several, over seeds, drawn anew
together: they say how far another sample of rows and trainings would have moved the number. They do not cover another
pool, other targets or another model. With three seeds they are coarse.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import nan
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datastore import RowTable
from less.evaluation.plan import Arm
from less.evaluation.trial import Measured
from less.statistics import Interval, spearman

__all__ = ["ArmSummary", "Evaluation", "QuantileSummary", "summarize"]

NUM_RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class ArmSummary:
    """One method for one target set at one budget, over all seeds."""

    target: str
    """Name of the target set."""
    fraction: float
    """Of the pool."""
    match: str
    """rows or tokens."""
    method: str
    """As asked for."""
    num_rows: float
    """Rows trained on, mean over seeds."""
    num_supervised: float
    """Supervised tokens among them, mean over seeds."""
    loss: float
    """Mean held-out loss after training."""
    drop: Interval
    """Of the held-out loss, from the base model's, in nats per token."""
    over_random: Interval
    """Drop less that of random rows; of random rows 0."""
    over: dict[str, Interval]
    """By another method, drop less that method's, of the same held-out rows and seeds."""
    accuracy: float
    """Share of correct answers, mean over seeds; NaN where none was asked for."""


@dataclass(frozen=True, kw_only=True)
class QuantileSummary:
    """The quantile test of one method for one target set."""

    target: str
    """Name of the target set."""
    method: str
    """Whose scores."""
    drops: list[Interval]
    """Of each quantile, the lowest scores first."""
    trend: Interval
    """Spearman of the quantile's place with its drop: 1 where a higher score always teaches more."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The outcome of an experiment."""

    arms: list[ArmSummary]
    """Methods at budgets."""
    quantiles: list[QuantileSummary]
    """The quantile test."""
    start: dict[str, dict[str, float]]
    """By target set, the base model's mean `loss` and `accuracy`, and the `rows` held out."""
    settings: dict[str, Any]
    """Of the experiment."""
    environment: dict[str, Any]
    """Machine and versions."""

    def to_json(self) -> dict[str, Any]:
        """All of it; NaN as null."""
        return _without_nan(asdict(self))


def summarize(
    arms: Sequence[Arm],
    results: Sequence[Measured],
    start: dict[str, Measured],
    rows: RowTable,
    *,
    settings: dict[str, Any],
    environment: dict[str, Any],
    held_out: dict[str, int],
    num_resamples: int = NUM_RESAMPLES,
) -> Evaluation:
    """Means, differences and intervals.

    Args:
        arms: the selections.
        results: what the trial of each measured for its target set.
        start: by target set, what the base model gives.
        rows: of the store.
        settings, environment: to be kept with it.
        held_out: rows of each target set that were measured.
        num_resamples: of the bootstrap.
    """
    groups: dict[tuple[Any, ...], list[tuple[Arm, Measured]]] = {}
    for arm, result in zip(arms, results, strict=True):
        groups.setdefault((arm.target, arm.fraction, arm.match, arm.method, arm.quantile), []).append((arm, result))
    drop_SE = {
        key: np.asarray(start[key[0]].losses) - np.array([result.losses for _, result in own])
        for key, own in groups.items()
    }
    summaries = []
    for (target, fraction, match, method, quantile), own in groups.items():
        if quantile is not None:
            continue
        ours, random = (drop_SE[target, fraction, match, name, None] for name in (method, "random"))
        correct = [np.mean(result.correct) for _, result in own if result.correct]
        summaries.append(
            ArmSummary(
                target=target,
                fraction=fraction,
                match=match,
                method=method,
                num_rows=float(np.mean([len(arm.positions) for arm, _ in own])),
                num_supervised=float(np.mean([rows.num_supervised_N[arm.positions].sum() for arm, _ in own])),
                loss=float(np.mean([result.losses for _, result in own])),
                drop=_interval(ours, num_resamples),
                over_random=_interval(ours - random, num_resamples),
                over={
                    other[3]: _interval(ours - drops, num_resamples)
                    for other, drops in drop_SE.items()
                    if other[:3] == (target, fraction, match) and other[3] != method and other[4] is None
                },
                accuracy=float(np.mean(correct)) if correct else nan,
            )
        )
    tests: dict[tuple[str, str], list[NDArray[np.float64]]] = {}
    for (target, _, _, method, quantile), drops in drop_SE.items():
        if quantile is not None:
            tests.setdefault((target, method), []).append(drops)
    return Evaluation(
        arms=summaries,
        quantiles=[
            QuantileSummary(
                target=target,
                method=method,
                drops=[_interval(drops, num_resamples) for drops in own],
                trend=_trend(np.stack(own), num_resamples),
            )
            for (target, method), own in tests.items()
        ],
        start={
            name: {
                "loss": float(np.mean(own.losses)),
                "accuracy": float(np.mean(own.correct)) if own.correct else nan,
                "rows": held_out[name],
            }
            for name, own in start.items()
        },
        settings=settings,
        environment=environment,
    )


def _draws(shape_SE: tuple[int, int], num_resamples: int) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Seeds and held-out rows, drawn with replacement."""
    generator = np.random.default_rng(0)
    return [
        (generator.integers(shape_SE[0], size=shape_SE[0]), generator.integers(shape_SE[1], size=shape_SE[1]))
        for _ in range(num_resamples)
    ]


def _interval(values_SE: NDArray[np.float64], num_resamples: int) -> Interval:
    """The mean over seeds and rows."""
    means = [values_SE[seeds][:, rows].mean() for seeds, rows in _draws(values_SE.shape, num_resamples)]
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(value=float(values_SE.mean()), low=float(low), high=float(high))


def _trend(drops_QSE: NDArray[np.float64], num_resamples: int) -> Interval:
    """Spearman over quantiles."""
    place_Q = np.arange(len(drops_QSE))
    found = [
        spearman(place_Q, drops_QSE[:, seeds][:, :, rows].mean(axis=(1, 2)))
        for seeds, rows in _draws(drops_QSE.shape[1:], num_resamples)
    ]
    usable = [rho for rho in found if not np.isnan(rho)]  # equal drops have no order
    low, high = np.quantile(usable, [0.025, 0.975]) if 2 * len(usable) > len(found) else (nan, nan)
    return Interval(value=spearman(place_Q, drops_QSE.mean(axis=(1, 2))), low=float(low), high=float(high))


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(own) for own in value]
    return None if isinstance(value, float) and np.isnan(value) else value
