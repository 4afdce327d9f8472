"""Which trials an experiment needs: the rows that each method selects at each budget, each distinct set once.

A budget is a fraction f of the pool, and can be held in two ways: the best ⌈f N⌉ rows, or the best rows until they hold
f of the pool's supervised tokens, since a method that picks long rows trains longer on as many of them. The quantile
test samples ⌈f N⌉ rows from each quantile of a method's scores. Rows are taken in the pool's order, so that two
selections of the same rows are one trial.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datastore import RowTable
from datastore.errors import SettingError
from less.influence import InfluenceScores
from less.selection import num_to_select, select_tokens, select_top

__all__ = ["Arm", "Trial", "arms_of", "parse_method", "plan_trials", "quantile_arms"]

MATCHES = ("rows", "tokens")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One selection: what a method chooses for a target set at a budget, with one seed of training."""

    method: str
    """As the user wrote it."""
    target: str
    """Name of the target set, whose held-out rows are measured."""
    fraction: float
    """Of the pool."""
    match: str
    """rows, tokens, or quantile."""
    quantile: int | None
    """From 0, the lowest scores; None outside the quantile test."""
    seed: int
    """Of the training, and of what is random in the selection."""
    positions: NDArray[np.int64]
    """The rows, ascending."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One training: distinct rows and a seed, and what is to be measured after it."""

    key: str
    """Hash of all that decides its result."""
    positions: NDArray[np.int64]
    """The rows, ascending."""
    seed: int
    """Of the training."""
    targets: tuple[str, ...]
    """Names of the target sets to measure."""


def parse_method(spec: str) -> dict[str, Any]:
    """`less[:FEATURE_SET[:none]]` or another method's name as fields of `ScoreConfig`.

    Raises:
        SettingError: it is not of this form.
    """
    method, *rest = spec.split(":")
    if rest and (method != "less" or len(rest) > 2 or (len(rest) == 2 and rest[1] not in ("none", "cosine"))):
        raise SettingError(f"method {spec!r}: expected less, less:FEATURE_SET, less:FEATURE_SET:none, or a baseline")
    return {"method": method} | dict(zip(("feature_set", "normalize"), rest, strict=False))


def arms_of(
    scores: InfluenceScores, *, method: str, target: str, fractions: Sequence[float], match: Sequence[str], seed: int
) -> list[Arm]:
    """The selections of one method for one target set."""
    score_N, num_supervised_N = scores.of(target).score_N, scores.rows.num_supervised_N
    arms = []
    for fraction in fractions:
        for how in match:
            if how == "rows":
                positions = select_top(score_N, num_to_select(len(score_N), fraction=fraction))
            else:
                budget = ceil(Fraction(str(fraction)) * int(num_supervised_N.sum()))  # exact, as `num_to_select` is
                positions = select_tokens(score_N, num_supervised_N, budget)
            arms.append(
                Arm(
                    method=method,
                    target=target,
                    fraction=fraction,
                    match=how,
                    quantile=None,
                    seed=seed,
                    positions=np.sort(positions),
                )
            )
    return arms


def quantile_arms(
    scores: InfluenceScores, *, method: str, target: str, fraction: float, num_quantiles: int, seed: int
) -> list[Arm]:
    """⌈fraction · N⌉ rows, or all there are, drawn by the seed from each quantile of a method's scores.

    Raises:
        SettingError: there are more quantiles than rows.
    """
    score_N = scores.of(target).score_N
    if num_quantiles > len(score_N):
        raise SettingError(f"quantiles must be at most the {len(score_N)} rows of the store, got {num_quantiles}")
    count = num_to_select(len(score_N), fraction=fraction)
    ascending = np.argsort(score_N, kind="stable")
    generator = np.random.default_rng(seed)
    arms = []
    for quantile, members in enumerate(np.array_split(ascending, num_quantiles)):
        drawn = generator.choice(members, size=min(count, len(members)), replace=False)
        arms.append(
            Arm(
                method=method,
                target=target,
                fraction=fraction,
                match="quantile",
                quantile=quantile,
                seed=seed,
                positions=np.sort(drawn),
            )
        )
    return arms


def plan_trials(
    arms: Iterable[Arm], rows: RowTable, sources: Sequence[str], settings: Mapping[str, Any]
) -> tuple[list[Trial], list[str]]:
    """The distinct trials of some arms, in their order, and the key of each arm's trial.

    Args:
        arms: selections.
        rows: of the store.
        sources: sha256 of each source of the store; with the row number it names a row in any store of the pool.
        settings: all else that decides a trial's result.
    """
    found: dict[str, Trial] = {}
    keys = []
    for arm in arms:
        named = [
            [sources[source], row]
            for source, row in zip(
                rows.sources_N[arm.positions].tolist(), rows.rows_N[arm.positions].tolist(), strict=True
            )
        ]
        text = json.dumps([named, arm.seed, settings], sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()[:24]
        known = found.get(key)
        targets = tuple(sorted({arm.target, *(known.targets if known else ())}))
        found[key] = Trial(key=key, positions=arm.positions, seed=arm.seed, targets=targets)
        keys.append(key)
    return list(found.values()), keys
