"""The certificate of a datastore: what `less.verification.recompute` found, in numbers, in words, and against bounds.

An error is relative: ‖found - exact‖ / ‖exact‖. Bounds are held against the worst of the errors, and against the point
value of a statistic with an interval. How the numbers come about is `less.verification.recompute`'s business.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from math import hypot, isfinite, nan
from pathlib import Path
from typing import Any

from datastore.coding import ROUNDING
from datastore.errors import SettingError
from less.statistics import Interval
from less.verification.contamination import NearDuplicate

__all__ = ["BOUNDS", "Certificate", "Errors", "check_bounds"]

BOUNDS: dict[str, str] = {
    "gradient": "at most",
    "stored_gradient_norm": "at most",
    "update": "at most",
    "stored_update_norm": "at most",
    "stored_features": "at most",
    "cosine": "at most",
    "spearman": "at least",
    "top_overlap": "at least",
    "zero_gradients": "at most",
    "not_finite": "at most",
    "zero_modules": "at most",
    "explained_by_length": "at most",
    "explained_by_norm": "at most",
    "explained_by_momentum": "at most",
    "explained": "at most",
    "contaminated": "at most",
}
"""The values that can be required, and on which side of its bound each must lie."""

# What is right: of the worst row and of the one in the middle. In bfloat16 a logit of 20 is known to 0.06, and so the
# probability of a reply of one token to some percent: on SmolLM2-135M right gradients of such rows differ by 0.2.
_SOUND = {"float32": (1e-3, 1e-3), "bfloat16": (5e-1, 1e-1)}
_SOUND_FEATURES = {"float32": (1e-2, 1e-2), "bfloat16": (5e-1, 5e-1)}  # `sign` makes much of a rounding near zero
_MUCH = 0.5  # of a score's variance
_NUM_NAMED = 3


def check_bounds(require: Mapping[str, float]) -> None:
    """Raise `SettingError` for a name that is no value of a certificate, or a bound that is no number."""
    for name, bound in require.items():
        if name not in BOUNDS:
            raise SettingError(f"cannot require {name!r}; expected one of {', '.join(BOUNDS)}")
        if not isfinite(bound):
            raise SettingError(f"the bound of {name} must be a number, got {bound}")


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Relative errors of the sampled rows at every checkpoint."""

    worst: float
    """The largest; infinite where a number is not finite."""
    median: float
    """The one in the middle."""
    where: str
    """Row and checkpoint of the worst."""


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """What a sample of S rows, recomputed by the slow reference, says of a datastore."""

    datastore: Path
    """The store."""
    feature_set: str
    """The feature set that was looked at."""
    num_rows: int
    """N, the store's scored rows."""
    num_files: int
    """Files whose checksums are right: all of them."""
    seed: int
    """It chose the sample."""
    dtype: str
    """Of the base weights, in the build as here."""
    feature_dtype: str
    """Of the stored unit rows."""
    projection: str
    """sparse, rademacher or none."""
    proj_dim: int
    """K."""
    checkpoints: tuple[str, ...]
    """Names of the checkpoints."""
    rows: tuple[str, ...]
    """Where a person finds each of the sampled rows."""
    queries: dict[str, tuple[str, ...]]
    """The sampled targets, by subtask: where each is found. Rows of the store where no targets were given."""
    num_subtasks: int | None
    """Subtasks of the targets, of which some were sampled; None where no targets were given."""
    gradient: Errors
    """g of the batched hooks against autograd's, a row at a time."""
    stored_gradient_norm: Errors
    """The stored ‖g‖ against autograd's."""
    update: Errors
    """Γ as a build computes it against the formula in float64, both of autograd's g."""
    stored_update_norm: Errors
    """The stored ‖Γ‖ against the formula's."""
    stored_features: Errors
    """The stored features, with their norms, against Π Γ of the formula's Γ."""
    cosine: float
    """Root mean square, over rows, subtasks and checkpoints, of a stored row's cosine less the exact one."""
    spearman: Interval
    """Of the score by the stored rows and the exact one, over the sample."""
    top_overlap: Interval
    """Share of the best rows of the sample by the exact score that are among the best by the stored rows."""
    num_top: int
    """The best rows: a fifth of the sample."""
    zero_gradients: tuple[str, ...]
    """Sampled rows whose exact gradient is zero at some checkpoint."""
    not_finite: tuple[str, ...]
    """Sampled rows whose exact gradient is not finite at some checkpoint; they have no part in cosines and scores."""
    skipped: dict[str, int]
    """Rows of the pool that have no features, by reason."""
    zero_parameters: dict[str, tuple[str, ...]]
    """By checkpoint, the LoRA parameters whose gradient is exactly zero in every sampled row."""
    untrained: tuple[str, ...]
    """Modules with such a parameter whose B is zero: no gradient reaches A there."""
    explained: dict[str, float]
    """R² of the score of all N rows: by `length`, `norm`, `momentum`, and by `all`; NaN where there is none."""
    contaminated: tuple[NearDuplicate, ...] | None
    """Pool rows that near-duplicate a target; None where no targets were given."""
    require: dict[str, float]
    """The bounds that were asked for."""

    @property
    def zero_modules(self) -> tuple[str, ...]:
        """LoRA modules with a parameter whose gradient is zero in every sampled row at some checkpoint."""
        names = (name.rpartition(".lora_")[0] for found in self.zero_parameters.values() for name in found)
        return tuple(dict.fromkeys(names))

    @property
    def values(self) -> dict[str, float]:
        """What a bound is held against, by the names of `BOUNDS`; NaN where there is no value."""
        return {
            "gradient": self.gradient.worst,
            "stored_gradient_norm": self.stored_gradient_norm.worst,
            "update": self.update.worst,
            "stored_update_norm": self.stored_update_norm.worst,
            "stored_features": self.stored_features.worst,
            "cosine": self.cosine,
            "spearman": self.spearman.value,
            "top_overlap": self.top_overlap.value,
            "zero_gradients": len(self.zero_gradients),
            "not_finite": len(self.not_finite),
            "zero_modules": len(self.zero_modules),
            "explained_by_length": self.explained["length"],
            "explained_by_norm": self.explained["norm"],
            "explained_by_momentum": self.explained["momentum"],
            "explained": self.explained["all"],
            "contaminated": nan if self.contaminated is None else len(self.contaminated),
        }

    @property
    def missed(self) -> tuple[str, ...]:
        """Names of the bounds that are not kept; where there is no value, none is kept but that of momentum.

        A rule without momentum has no shared direction, which then explains nothing.
        """
        values = self.values

        def is_kept(name: str, bound: float) -> bool:
            if name == "explained_by_momentum" and values[name] != values[name]:
                return True
            return values[name] >= bound if BOUNDS[name] == "at least" else values[name] <= bound

        return tuple(name for name, bound in self.require.items() if not is_kept(name, bound))

    @property
    def verdicts(self) -> list[str]:
        """The findings as sentences, a line each, and one for every bound."""
        return [*self._about(), *self._numbers(), *self._ranks(), *self._rows(), *self._explained(), *self._bounds()]

    def as_json(self) -> dict[str, Any]:
        """All of it; null for what has no value."""
        doc = asdict(self) | {
            "datastore": str(self.datastore),
            "expected_cosine": self.expected_cosine,
            "zero_modules": self.zero_modules,
            "values": self.values,
            "missed": self.missed,
            "verdicts": self.verdicts,
        }
        return _plain(doc)

    @property
    def expected_cosine(self) -> float:
        """The rms error of a cosine of two unit vectors seen through a random projection, 1/√K."""
        return 0.0 if self.projection == "none" else self.proj_dim**-0.5

    def _about(self) -> Iterator[str]:
        num_targets = sum(map(len, self.queries.values()))
        if self.num_subtasks is None:
            against = f"{num_targets} other rows of the store, each as a target"
        else:
            against = f"{num_targets} targets of {len(self.queries)} of {self.num_subtasks} subtasks"
        sampled = f"{len(self.rows)} of {self.num_rows:,} rows at {_count(len(self.checkpoints), 'checkpoint')}"
        yield f"sample: {sampled} against {against}; {self.feature_set}, {self.dtype}, seed {self.seed}"
        yield f"checksums: all {self.num_files:,} files are as they were sealed"

    def _numbers(self) -> Iterator[str]:
        of = f"worst of {_count(len(self.rows), 'row')} × {_count(len(self.checkpoints), 'checkpoint')}"
        sound, sound_features = _SOUND[self.dtype], _SOUND_FEATURES[self.dtype]
        rounding = ROUNDING[self.feature_dtype]
        sound_stored = hypot(sound_features[0], 3 * rounding), hypot(sound_features[1], 1.5 * rounding)
        yield f"gradients: {_judged(self.gradient, sound)} of their norm ({of}; median {self.gradient.median:.1e})"
        yield f"stored gradient norms: {_judged(self.stored_gradient_norm, sound)}"
        updates = _judged(self.update, _SOUND["float32"])
        yield f"update directions: {updates} of their norm, as the formula in float64 has them"
        yield f"stored norms of update directions: {_judged(self.stored_update_norm, sound_features)}"
        kept = (
            "whole"
            if self.feature_dtype == "float32"
            else f"as {self.feature_dtype}, which moves a row by {rounding:.0e}"
        )
        yield f"stored features: {_judged(self.stored_features, sound_stored)}; they are kept {kept}"
        if self.dtype == "bfloat16":
            yield (
                "bfloat16: one rounding changes a number by up to 3.9e-03 and a pass makes many, so two right "
                "gradients differ, most where a reply is one token; here up to {:g} is called right, and {:g} of the "
                "row in the middle".format(*sound)
            )

    def _ranks(self) -> Iterator[str]:
        if self.projection == "none":
            moved = f"projection: there is none, and a stored row's cosine is off by {self.cosine:.1e} (rms)"
        else:
            moved = (
                f"projection: K = {self.proj_dim:,} moves a cosine by {self.cosine:.4f} (rms; chance moves that of two "
                f"unit vectors by 1/√K = {self.expected_cosine:.4f})"
            )
        yield moved
        if self.spearman.value != self.spearman.value:
            yield "ranks: the scores of the sample have no order to compare"
            return
        yield f"ranks: the sample's scores agree {self.spearman} with the exact ones (Spearman, and its 95% interval)"
        yield (
            f"best rows: of the {self.num_top} best of the sample by the exact score, {self.top_overlap} are the best "
            "by the store's"
        )

    def _rows(self) -> Iterator[str]:
        for rows, what in ((self.zero_gradients, "zero"), (self.not_finite, "not finite")):
            if rows:
                yield f"WARNING: the gradient is {what} in {_count(len(rows), 'sampled row')}: {_named(rows)}"
        if not self.zero_gradients and not self.not_finite:
            yield "sampled rows: no gradient is zero or not finite"
        skipped = ", ".join(f"{count:,} {reason}" for reason, count in self.skipped.items())
        yield f"skipped rows of the pool: {skipped or 'none'}"
        if not (modules := self.zero_modules):
            yield "adapter: every parameter has a gradient in some sampled row"
        else:
            why = ""
            if self.untrained:
                why = (
                    f". In {len(self.untrained)} of them B is zero, so that no gradient reaches A: the adapter was "
                    "never trained there"
                )
            yield (
                f"WARNING: {_count(len(modules), 'adapter module')} with a gradient of exactly zero in every sampled "
                f"row: {_named(modules)}{why}"
            )
        if self.contaminated:
            pairs = [f"{pair.where} ({pair.share:.2f} of {pair.target_where})" for pair in self.contaminated]
            yield (
                f"WARNING: {_count(len(pairs), 'row')} of the pool hold half of a target's 8-word runs or more: "
                f"{_named(pairs)}"
            )
        elif self.contaminated is not None:
            yield "contamination: no scored row of the pool holds half of a target's 8-word runs"

    def _explained(self) -> Iterator[str]:
        found = {name: value for name, value in self.explained.items() if value == value}
        if "all" not in found:
            yield "scores: they are all the same"
            return
        titles = {"length": "length", "norm": "the norm of the gradient", "momentum": "the shared momentum direction"}
        parts = ", ".join(f"{titles[name]} {found[name]:.2f}" for name in titles if name in found)
        yield f"the score's variance over all {self.num_rows:,} rows is explained by {parts}; all: {found['all']:.2f}"
        for name, consequence in (
            ("length", "much of a ranking by it is a ranking by supervised tokens"),
            ("norm", "much of a ranking by it is a ranking by ‖g‖"),
            ("momentum", "rows differ less by what is their own than by how far each follows Adam's momentum"),
        ):
            if found.get(name, 0) > _MUCH:
                yield f"WARNING: {titles[name]} explains {found[name]:.2f} of the score's variance: {consequence}"

    def _bounds(self) -> Iterator[str]:
        for name, bound in self.require.items():
            verdict = "MISSED" if name in self.missed else "kept"
            yield f"required: {name} {BOUNDS[name]} {bound:g}, got {self.values[name]:.3g}: {verdict}"


def _judged(errors: Errors, sound: tuple[float, float]) -> str:
    if errors.worst <= sound[0] and errors.median <= sound[1]:
        return f"right to {errors.worst:.1e}"
    return f"WRONG by up to {errors.worst:.1e} ({errors.where})"


def _named(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(names[:_NUM_NAMED]) + (", …" if len(names) > _NUM_NAMED else "")


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _plain(value: Any) -> Any:
    """As JSON has it."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value
