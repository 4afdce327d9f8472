"""What forbids a row. Once forbidden a row stays so, whatever is taken later: each row is asked for once.

A rule answers with its name for the report, or None, and is told of every row that is taken.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from datastore.errors import SettingError
from less.selection.budget import Budget
from less.selection.candidates import Labels
from less.selection.config import Amount
from less.selection.similarity import BLOCK, Nearest

__all__ = ["AWAY", "ROUNDING", "Away", "Caps", "ExactDuplicates", "NearDuplicates", "Rule", "Upcoming", "code_of"]

AWAY = "away"
"""What rows that point to negative targets are passed over by."""
ROUNDING = 1e-6
"""What the product of a unit row with itself may lack of 1."""

Upcoming = Callable[[int], list[int]]
"""About so many of the rows that come next, the one in question first; none where that is not known."""


class Rule(Protocol):
    """What the walk asks."""

    def forbids(self, row: int, upcoming: Upcoming) -> str | None:
        """The rule's name if the row may not be taken."""

    def took(self, row: int) -> None:
        """The row has been taken."""


class Away:
    """Rows that point to what is to be avoided: away(z) ≥ threshold; He et al. 2024 find rows that break a model so."""

    def __init__(self, away_N: NDArray[np.float32], threshold: float) -> None:
        """Forbid rows from the threshold on."""
        self._forbidden = (away_N >= threshold).tobytes()
        self.num_forbidden = self._forbidden.count(1)

    def forbids(self, row: int, upcoming: Upcoming) -> str | None:
        """`away`."""
        return AWAY if self._forbidden[row] else None

    def took(self, row: int) -> None:
        """Nothing to do."""


class ExactDuplicates:
    """Rows whose tokens are those of a row taken before. Cost: one look-up a row."""

    def __init__(self, digests_N: NDArray[np.uint64]) -> None:
        """Start with nothing taken."""
        self._digests_N, self._taken = digests_N, set[int]()

    def forbids(self, row: int, upcoming: Upcoming) -> str | None:
        """`duplicate`."""
        return "duplicate" if int(self._digests_N[row]) in self._taken else None

    def took(self, row: int) -> None:
        """Remember its tokens."""
        self._taken.add(int(self._digests_N[row]))


class NearDuplicates:
    """Rows with ⟨x_z, x_s⟩ ≥ threshold for a row s taken before: of two that are alike the later in the order goes.

    Exact: every row asked for is compared with every row taken, in blocks. Cost: rows looked at · rows taken · d
    products; memory: `less.selection.similarity`. As in SemDeDup (Abbas et al. 2023, §3) one row of a group of likes
    is kept, here in gradient space, without its clusters, and the one that is ranked best.
    """

    def __init__(self, near: Nearest, threshold: float | None) -> None:
        """With None for the threshold nothing is forbidden, and `near` is kept up to date for others."""
        self._near, self._threshold = near, threshold

    def forbids(self, row: int, upcoming: Upcoming) -> str | None:
        """`near-duplicate`."""
        if self._threshold is None:
            return None
        near = self._near
        if row not in near.features or near.num_missing(row) > BLOCK:
            rows = upcoming(BLOCK) or [row]
            near.features.hold_block(rows)
            near.bring_up_to_date(rows)
        near.bring_up_to_date([row])
        return "near-duplicate" if near.of(row) >= self._threshold - ROUNDING else None

    def took(self, row: int) -> None:
        """Later rows are compared with it too."""
        self._near.take(row)


class Caps:
    """Rows with a value of which the selection holds as many as it may. Of several values each must have room."""

    def __init__(self, column: str, labels: Labels, caps: Sequence[Amount], budget: Budget) -> None:
        """Limits of one column.

        Args:
            column: its name.
            labels: its values.
            caps: of this column; a value's own stands in place of that for every value.
            budget: shares are of it.

        Raises:
            SettingError: there is no such value.
        """
        self._names = [f"cap {column}={name}" for name in labels.names]
        self._labels, self._budget = labels, budget
        self._left: dict[int, list[int]] = {}  # by code: rows left, tokens left; one of them without limit
        self.notes: list[str] = []
        for cap in sorted(caps, key=lambda cap: cap.value is not None):
            codes = range(len(labels.names)) if cap.value is None else [code_of(labels, cap)]
            limit = budget.at_most(cap.amount) if isinstance(cap.amount, float) else cap.amount
            if limit == 0 and cap.amount:
                self.notes.append(f"cap {cap} is 0 of {budget.total:,} {budget.unit}: none is taken")
            for code in codes:
                self._left[code] = [budget.total, limit] if cap.in_tokens(budget) else [limit, -1]

    def forbids(self, row: int, upcoming: Upcoming) -> str | None:
        """`cap column=value`."""
        for code in self._labels.of_row(row):
            if code in self._left:
                rows, tokens = self._left[code]
                if rows < 1 or 0 <= tokens < self._budget.cost(row):
                    return self._names[code]
        return None

    def took(self, row: int) -> None:
        """Each of its values has so much less room."""
        for code in self._labels.of_row(row):
            if code in self._left:
                left = self._left[code]
                left[0] -= 1
                if left[1] > 0:
                    left[1] -= self._budget.cost(row)


def code_of(labels: Labels, amount: Amount) -> int:
    """The code of the value that a quota or a cap names.

    Raises:
        SettingError: no row has it, which is a misspelling more often than a wish.
    """
    codes: Mapping[str | None, int] = {name: code for code, name in enumerate(labels.names)}
    if amount.value not in codes:
        known = ", ".join(labels.names[:20]) + (", …" if len(labels.names) > 20 else "")
        raise SettingError(f"{amount}: no row has the {amount.column} {amount.value!r}; there are {known or 'none'}")
    return codes[amount.value]
