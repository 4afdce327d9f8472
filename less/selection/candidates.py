"""What a selection may choose from: the scores of N rows, and what else the strategies ask of a row.

Scores come from `less.influence`. How they are read once negative targets count, is here too:

    score(z, j) = scores_NJ[z, j] - away_weight · max(0, away(z))

where away(z) is the highest score of z over the subtasks of the negative targets. A row is fined for pointing to what
is to be avoided, and is not rewarded for pointing away from it. He, Xia and Henderson (2024, "What is in Your Safe
Data?", bi-directional anchoring) rank benign rows likewise, by their gradients' similarity to harmful examples less
that to safe ones, with the sign turned: they look for the rows that break a model's alignment, here they stay behind.
"""

import json
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from datastore.errors import SettingError

if TYPE_CHECKING:
    from less.influence import InfluenceScores

__all__ = ["Candidates", "Features", "Labels", "Scores"]

Features = Callable[[NDArray[np.int64]], NDArray[np.float32]]
"""Positions of n rows → (n, d) float32, whose inner products are similarities in gradient space."""


@dataclass(frozen=True, eq=False)
class Labels:
    """Which values a column has in each of N rows: none, one or several."""

    starts_N1: NDArray[np.int64]
    """Row n has the entries from starts_N1[n] to starts_N1[n + 1]."""
    codes_L: NDArray[np.int32]
    """Each entry's place in `names`."""
    names: tuple[str, ...]
    """The distinct values as text."""

    @classmethod
    def of(cls, values: Iterable[Any]) -> Self:
        """From a column's values, in the order of the rows.

        Args:
            values: of each row None, a text, a number, or a list of these; numbers are told apart by their text, names
                are in the order in which they first occur, and a value that a row has twice counts once.

        Raises:
            SettingError: a value is of another type.
        """
        return cls.of_columns(((value,) for value in values), 1)[0]

    @classmethod
    def of_columns(cls, rows: Iterable[Sequence[Any]], num_columns: int) -> list[Self]:
        """`of` for several columns at once, from each row's values; of the rows nothing else is kept in memory."""
        columns: list[tuple[dict[str, int], array[int], array[int]]]
        columns = [({}, array("q", [0]), array("i")) for _ in range(num_columns)]
        for row, values in enumerate(rows):
            for (codes, starts, found), value in zip(columns, values, strict=True):
                several = value if isinstance(value, (list, tuple, np.ndarray)) else (value,)
                own = dict.fromkeys(_text_of(one, row) for one in several if one is not None)
                found.extend(codes.setdefault(name, len(codes)) for name in own)
                starts.append(len(found))
        return [cls(np.array(starts), np.array(found), tuple(codes)) for codes, starts, found in columns]

    @property
    def num_rows(self) -> int:
        """N."""
        return len(self.starts_N1) - 1

    @cached_property
    def sizes_N(self) -> NDArray[np.int64]:
        """How many values each row has."""
        return np.diff(self.starts_N1)

    @cached_property
    def rows_L(self) -> NDArray[np.int64]:
        """The row of each entry, ascending."""
        return np.repeat(np.arange(self.num_rows), self.sizes_N)

    def of_row(self, row: int) -> list[int]:
        """The codes of one row."""
        return self.codes_L[self.starts_N1[row] : self.starts_N1[row + 1]].tolist()

    def rows_with(self, code: int) -> NDArray[np.int64]:
        """The rows that have a value, ascending."""
        rows_L, starts = self._by_code
        return rows_L[starts[code] : starts[code + 1]]

    @cached_property
    def _by_code(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The rows of all values, value by value, and where each value's begin."""
        order_L = np.argsort(self.codes_L, kind="stable")
        starts = np.searchsorted(self.codes_L[order_L], np.arange(len(self.names) + 1))
        return self.rows_L[order_L], starts

    @cached_property
    def pairs(self) -> "Labels":
        """Every unordered pair of two values of a row as one value, named `a + b`; a row of one value has none.

        A row of m values has m (m - 1) / 2 pairs.
        """
        rows, keys = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for size in np.unique(self.sizes_N[self.sizes_N > 1]).tolist():
            own = np.flatnonzero(self.sizes_N == size)
            codes = np.sort(self.codes_L[self.starts_N1[own][:, None] + np.arange(size)], axis=1).astype(np.int64)
            first, second = np.triu_indices(size, 1)
            keys.append((codes[:, first] * len(self.names) + codes[:, second]).ravel())
            rows.append(np.repeat(own, len(first)))
        rows_P, keys_P = np.concatenate(rows), np.concatenate(keys)
        distinct, codes_P = np.unique(keys_P, return_inverse=True)
        order_P = np.argsort(rows_P, kind="stable")
        starts_N1 = np.searchsorted(rows_P[order_P], np.arange(self.num_rows + 1))
        both = (divmod(key, len(self.names)) for key in distinct.tolist())
        names = tuple(f"{self.names[a]} + {self.names[b]}" for a, b in both)
        return Labels(starts_N1, codes_P[order_P].astype(np.int32), names)


def _text_of(value: Any, row: int) -> str:
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, str):
        return value
    if isinstance(value, (bool, int, float)):
        return json.dumps(value)
    raise SettingError(
        f"a column to select by holds a {type(value).__name__} at position {row}; expected a text, a number, a list of "
        "these, or nothing. Name another column"
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidates:
    """N rows to select from."""

    scores_NJ: NDArray[np.float32]
    """score(z, j), higher is better."""
    subtasks: Sequence[str]
    """Name of each of the J columns."""
    target_sets: Sequence[str]
    """The target set that each of the J columns belongs to."""
    away_N: NDArray[np.float32] | None = None
    """The highest score over the subtasks of the negative targets."""
    num_tokens_N: NDArray[np.integer] | None = None
    """Supervised tokens."""
    digests_N: NDArray[np.uint64] | None = None
    """Equal for exact duplicates."""
    labels: Mapping[str, Labels] = field(default_factory=dict)
    """By the name of a column of the pool."""
    features_of: Features | None = None
    """For near-duplicates and diversity; every row it gives is as wide as any other."""
    num_set_aside: int = 0
    """Rows that would have scores too if a prefilter had not left them out: a fraction counts them."""

    def __post_init__(self) -> None:
        num_rows, num_columns = self.scores_NJ.shape
        for name, names in (("subtasks", self.subtasks), ("target_sets", self.target_sets)):
            if len(names) != num_columns:
                raise SettingError(f"{name} must name each of the {num_columns} columns of scores, got {len(names)}")
        lengths = {column: labels.num_rows for column, labels in self.labels.items()}
        arrays = {"away_N": self.away_N, "num_tokens_N": self.num_tokens_N, "digests_N": self.digests_N}
        lengths |= {name: len(array) for name, array in arrays.items() if array is not None}
        if wrong := [name for name, length in lengths.items() if length != num_rows]:
            raise SettingError(f"{wrong[0]} has {lengths[wrong[0]]} rows, expected {num_rows} as the scores have")
        with np.errstate(invalid="ignore"):
            finite_N = np.isfinite(self.scores_NJ.sum(axis=1))
        if not finite_N.all():
            raise SettingError(f"a score is not finite at position {int(finite_N.argmin())}; leave such rows out")

    @classmethod
    def of(cls, influence: "InfluenceScores", **more: Any) -> Self:
        """The rows of a store with their scores, tokens and digests.

        Args:
            influence: from `less.score`.
            **more: the fields that it does not have.
        """
        return cls(
            scores_NJ=influence.scores_NJ,
            subtasks=influence.subtasks,
            target_sets=influence.target_sets,
            num_tokens_N=influence.rows.num_supervised_N,
            digests_N=influence.rows.digests_N,
            **more,
        )

    @property
    def num_rows(self) -> int:
        """N."""
        return len(self.scores_NJ)

    def column(self, name: str) -> Labels:
        """The labels of a column.

        Raises:
            SettingError: they were not given.
        """
        if name not in self.labels:
            known = ", ".join(self.labels) or "none"
            raise SettingError(f"there is no column {name!r} to select by; the rows have {known}")
        return self.labels[name]


class Scores:
    """score(z, j) with the fine for what is to be avoided, made only where it is asked for."""

    def __init__(self, scores_NJ: NDArray[np.float32], away_N: NDArray[np.float32] | None, away_weight: float) -> None:
        self.scores_NJ = scores_NJ
        self.fine_N: NDArray[np.float32] | None = None
        if away_N is not None and away_weight:
            self.fine_N = (np.float32(away_weight) * np.maximum(away_N, 0)).astype(np.float32)

    @cached_property
    def best_N(self) -> NDArray[np.float32]:
        """The highest of each row over all columns: max_j score(z, j), LESS §4.2."""
        best_N = self.scores_NJ.max(axis=1)
        return best_N if self.fine_N is None else best_N - self.fine_N

    def best_of(self, columns: Sequence[int]) -> NDArray[np.float32]:
        """The highest of each row over some columns, best_N."""
        best_N = self.scores_NJ[:, columns[0]].copy()
        for j in columns[1:]:
            np.maximum(best_N, self.scores_NJ[:, j], out=best_N)
        return best_N if self.fine_N is None else best_N - self.fine_N

    def at(
        self, positions: NDArray[np.int64], columns: Sequence[int] | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Of some rows the highest over these columns, and the column that gives it; the first where several do."""
        own = self.scores_NJ[positions] if columns is None else self.scores_NJ[np.ix_(positions, np.asarray(columns))]
        place = own.argmax(axis=1)
        scores = own[np.arange(len(own)), place]
        if self.fine_N is not None:
            scores = scores - self.fine_N[positions]
        return scores, place if columns is None else np.asarray(columns, np.int64)[place]
