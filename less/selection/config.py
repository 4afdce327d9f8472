"""The settings of a selection, in Python, in a TOML file and on the command line.

    fraction = 0.05
    balance = "skill"
    quotas = ["dataset=gsm8k:0.3"]
    caps = ["dataset=0.5", "dataset=t0:100"]
    near_duplicates = 0.95

An amount of rows is written COLUMN=VALUE:AMOUNT, or COLUMN=AMOUNT for every value of the column. A whole number is
rows; a number with a point is a share of the budget, in the budget's unit: of rows, or with a token budget of tokens.
"""

import json
import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from datastore.errors import SettingError
from less.selection.budget import Budget

__all__ = ["Amount", "SelectConfig"]

_SIZES = ("fraction", "count", "token_budget")
_ORDERS = ("turns", "balance", "balance_pairs", "diversity")
_WORDS = {
    "turns": ("subtask", "target-set"),
    "duplicates": ("exact",),
    "diversity": ("mmr", "facility-location"),
}
_FORMS = "expected COLUMN=VALUE:AMOUNT or COLUMN=AMOUNT, the amount in rows (100) or as a share of the budget (0.3)"


@dataclass(frozen=True)
class Amount:
    """So many rows with a value of a column, or so much of the budget."""

    column: str
    """Of the pool."""
    value: str | None
    """None: each value that the column has."""
    amount: int | float
    """An int is rows; a float is a share of the budget, above 0 and at most 1."""

    def __post_init__(self) -> None:
        if isinstance(self.amount, bool) or not isinstance(self.amount, (int, float)):
            raise SettingError(f"the amount of {self.column} must be a number, got {self.amount!r}")
        if isinstance(self.amount, float) and not 0 < self.amount <= 1:
            raise SettingError(
                f"the share of {self.what} must be above 0 and at most 1, got {self.amount}; rows are a whole number"
            )
        if self.amount < 0:
            raise SettingError(f"the rows of {self.what} must be at least 0, got {self.amount}")

    @classmethod
    def parse(cls, text: str) -> Self:
        """From its text. A value may hold any sign; the column ends at the first `=`, the value at the last `:`.

        Raises:
            SettingError: it is not of this form, or the amount is out of range.
        """
        column, equals, rest = text.partition("=")
        value, colon, amount = rest.rpartition(":")
        if not column or not equals or (colon and not value):
            raise SettingError(f"{_FORMS}, got {text!r}")
        try:
            number: int | float = int(amount)
        except ValueError:
            try:
                number = float(amount)
            except ValueError:
                raise SettingError(f"{_FORMS}, got {text!r}") from None
        return cls(column, value or None, number)

    @property
    def what(self) -> str:
        """The column and the value."""
        return self.column if self.value is None else f"{self.column}={self.value}"

    def __str__(self) -> str:
        return f"{self.column}={self.amount}" if self.value is None else f"{self.what}:{self.amount}"

    def in_tokens(self, budget: Budget) -> bool:
        """Whether it is tokens that count: a share of a token budget."""
        return isinstance(self.amount, float) and budget.unit == "tokens"


@dataclass(frozen=True, kw_only=True)
class SelectConfig:
    """A selection: walk down an order of the rows, take each unless a rule forbids it, stop when the budget is full.

    Three fields say how much (one of them is needed), four whose turn it is (one of them, or none for the best score
    first), the rest what is asked for first and what is forbidden.
    """

    fraction: float | None = None
    """Of the scored rows and those that a prefilter set aside, above 0 and at most 1; the ceiling is taken."""
    count: int | None = None
    """Number of rows."""
    token_budget: int | None = None
    """The most supervised tokens that the selection may hold. It ends before the first row that would go over."""
    turns: str | None = None
    """`subtask` or `target-set`: these take turns, each adding its best row that is left."""
    balance: str | None = None
    """A column whose values take turns; a row of several values counts for the one whose turn it is."""
    balance_pairs: str | None = None
    """A column of several values a row, such as skills: unordered pairs of a row's values take turns."""
    diversity: str | None = None
    """`mmr` or `facility-location`: rows that are unlike those taken come first."""
    diversity_weight: float = 0.5
    """λ of `mmr`, from 0 to 1: how much the score counts beside being unlike; 1 is the order by score."""
    diversity_candidates: int = 4
    """How many times the budget the best rows hold that diversity chooses from, which bounds its cost."""
    seed: int = 0
    """Of what `facility-location` samples."""
    quotas: Sequence[Amount | str] = ()
    """At least so many rows of the selection have this value: they are taken first, best first, as far as there are."""
    caps: Sequence[Amount | str] = ()
    """At most so many rows of the selection have this value. A value's own cap stands in place of its column's."""
    min_score: float | None = None
    """Rows whose score, as ranked, is below are not taken."""
    away_weight: float | None = None
    """Of max(0, away), which is taken off every score. None: 1, or 0 where `away_above` is given."""
    away_above: float | None = None
    """Rows whose score for what is to be avoided is this or more are not taken."""
    duplicates: str | None = None
    """`exact`: a row whose tokens are those of a taken row is not taken."""
    near_duplicates: float | None = None
    """A row is not taken whose similarity in gradient space to a taken row is this or more; above 0, at most 1."""

    def __post_init__(self) -> None:
        for name in ("quotas", "caps"):
            given = getattr(self, name)
            if isinstance(given, (str, Amount)) or not isinstance(given, Sequence):
                raise SettingError(f"{name} must be a list of amounts, got {given!r}; {_FORMS}")
            if strange := [amount for amount in given if not isinstance(amount, (str, Amount))]:
                raise SettingError(f"{name} must be a list of amounts, got {strange[0]!r} in it; {_FORMS}")
            object.__setattr__(self, name, tuple(Amount.parse(a) if isinstance(a, str) else a for a in given))
        _check_one(self, _SIZES, needed=True)
        _check_one(self, _ORDERS, needed=False)
        for name, words in _WORDS.items():
            if getattr(self, name) is not None and getattr(self, name) not in words:
                raise SettingError(f"{name} must be {' or '.join(words)}, got {getattr(self, name)!r}")
        for name in ("balance", "balance_pairs"):
            if getattr(self, name) is not None and not (isinstance(getattr(self, name), str) and getattr(self, name)):
                raise SettingError(f"{name} must name a column, got {getattr(self, name)!r}")
        for name in ("count", "token_budget", "diversity_candidates"):
            _check_number(self, name, int, lambda number: number >= 1, "at least 1")
        _check_number(self, "seed", int, lambda number: number >= 0, "at least 0")
        for name in ("fraction", "near_duplicates"):
            _check_number(self, name, float, lambda number: 0 < number <= 1, "above 0 and at most 1")
        _check_number(self, "diversity_weight", float, lambda number: 0 <= number <= 1, "from 0 to 1")
        _check_number(self, "away_weight", float, lambda number: 0 <= number < math.inf, "at least 0")
        for name in ("min_score", "away_above"):
            _check_number(self, name, float, math.isfinite, "finite")
        for cap in self.all_caps:
            for quota in self.all_quotas:
                if (
                    (quota.column, quota.value) == (cap.column, cap.value)
                    and type(quota.amount) is type(cap.amount)
                    and quota.amount > cap.amount
                ):
                    raise SettingError(
                        f"quota {quota} asks for more than cap {cap} lets through; raise the cap or lower the quota"
                    )
        if repeated := _repeated([cap.what for cap in self.all_caps]):
            raise SettingError(f"there are two caps for {repeated}; give one")

    @classmethod
    def load(cls, path: str | Path, **overrides: Any) -> Self:
        """From a TOML file whose keys are the fields.

        Args:
            path: the file.
            **overrides: fields that stand in place of the file's; None leaves the file's. A size stands in place of
                whichever size the file has, and likewise whose turn it is.

        Raises:
            SettingError: the file cannot be read, a key is not known, or a value is out of range.
        """
        try:
            with open(path, "rb") as file:
                found = tomllib.load(file)
        except (OSError, ValueError) as error:
            raise SettingError(f"cannot read settings from {path}: {error}; expected a TOML file") from error
        known = [field.name for field in fields(cls)]
        if strange := [key for key in found if key not in known]:
            raise SettingError(f"{path}: there is no setting {strange[0]!r}; there are {', '.join(known)}")
        given = {name: value for name, value in overrides.items() if value is not None}
        for group in (_SIZES, _ORDERS):
            if any(name in given for name in group):
                found = {name: value for name, value in found.items() if name not in group}
        try:
            return cls(**found | given)
        except SettingError as error:
            raise SettingError(f"{path}: {error}") from error

    def to_toml(self) -> str:
        """What `load` reads back as the same settings: the fields that are not at their defaults."""
        lines = []
        for field in fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                lines.append(f"{field.name} = {_toml_of(value)}\n")
        return "".join(lines)

    @property
    def all_quotas(self) -> tuple[Amount, ...]:
        """`quotas`, each in parts."""
        return tuple(a for a in self.quotas if isinstance(a, Amount))

    @property
    def all_caps(self) -> tuple[Amount, ...]:
        """`caps`, each in parts."""
        return tuple(a for a in self.caps if isinstance(a, Amount))

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the pool that have to be read."""
        named = [self.balance, self.balance_pairs, *(a.column for a in (*self.all_quotas, *self.all_caps))]
        return tuple(dict.fromkeys(name for name in named if name is not None))

    @property
    def needs_features(self) -> bool:
        """Whether similarities in gradient space are asked for."""
        return self.near_duplicates is not None or self.diversity is not None

    @property
    def away_factor(self) -> float:
        """`away_weight`, or what None stands for."""
        if self.away_weight is not None:
            return self.away_weight
        return 1.0 if self.away_above is None else 0.0


def _check_one(config: SelectConfig, names: Sequence[str], *, needed: bool) -> None:
    given = [name for name in names if getattr(config, name) is not None]
    if len(given) > 1 or (needed and not given):
        got = ", ".join(f"{name} {getattr(config, name)!r}" for name in given) or "none of them"
        what = "one" if needed else "at most one"
        raise SettingError(f"give {what} of {', '.join(names)}, got {got}")


def _check_number(config: SelectConfig, name: str, kind: type, is_right: Any, range_in_words: str) -> None:
    value = getattr(config, name)
    if value is None:
        return
    fits = isinstance(value, int) if kind is int else isinstance(value, (int, float))
    if isinstance(value, bool) or not fits or not is_right(value):
        what = "a whole number, " if kind is int else ""
        raise SettingError(f"{name} must be {what}{range_in_words}, got {value!r}")


def _repeated(names: Sequence[str]) -> str | None:
    return next((name for n, name in enumerate(names) if name in names[:n]), None)


def _toml_of(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(_toml_of(str(one)) for one in value)}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
