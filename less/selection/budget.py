"""How much is selected: so many rows, or rows of so many tokens."""

from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor

import numpy as np
from numpy.typing import NDArray

from datastore.errors import SettingError

__all__ = ["Budget", "num_to_select", "select_tokens"]


@dataclass(frozen=True)
class Budget:
    """At most `total` rows, or rows that hold at most `total` tokens.

    The walk ends at the first row that would go over. So what is selected is a beginning of the order, a greater budget
    only adds rows to it, and of tokens less than that one row's are left over.
    """

    total: int
    """Rows, or tokens."""
    num_tokens_N: NDArray[np.integer] | None = None
    """Tokens of each row; None where rows are counted."""

    @property
    def unit(self) -> str:
        """What `total` counts."""
        return "rows" if self.num_tokens_N is None else "tokens"

    def cost(self, row: int) -> int:
        """What a row takes of it."""
        return 1 if self.num_tokens_N is None else int(self.num_tokens_N[row])

    def at_least(self, share: float) -> int:
        """The ceiling of a share of it, exact in the share's decimal digits."""
        return ceil(Fraction(str(share)) * self.total)

    def at_most(self, share: float) -> int:
        """The floor of a share of it, exact in the share's decimal digits."""
        return floor(Fraction(str(share)) * self.total)

    def num_that_fit(self, positions: NDArray[np.int64]) -> int:
        """How many of these rows, in their order, fit into it."""
        if self.num_tokens_N is None:
            return min(len(positions), self.total)
        held = self.num_tokens_N[positions].cumsum(dtype=np.int64)
        return int(np.searchsorted(held, self.total, side="right"))


def num_to_select(
    num_rows: int, *, fraction: float | None = None, count: int | None = None, num_set_aside: int = 0
) -> int:
    """How many of `num_rows` scored rows are wanted: `count`, or the ceiling of `fraction` of those and the set aside.

    The ceiling is exact in the decimal digits of `fraction`: 0.07 of 100 rows is 7.

    Args:
        num_rows: scored rows.
        fraction: above 0 and at most 1.
        count: at least 1.
        num_set_aside: rows that would have scores too if a prefilter had not left them out.

    Raises:
        SettingError: not exactly one of the two is given, it is out of range, or the prefilter has left fewer rows.
    """
    if (fraction is None) == (count is None):
        raise SettingError("give either a fraction or a count of rows to select, not both and not neither")
    if fraction is not None:
        if not 0 < fraction <= 1:
            raise SettingError(f"fraction must be above 0 and at most 1, got {fraction}")
        wanted = ceil(Fraction(str(fraction)) * (num_rows + num_set_aside))
    else:
        assert count is not None
        wanted = count
    if num_set_aside and wanted > num_rows:
        raise SettingError(
            f"{wanted} rows are asked for, and the prefilter of the build has left {num_rows} of "
            f"{num_rows + num_set_aside}; select at most those, or build another store with a greater --prefilter"
        )
    if fraction is None and not 1 <= wanted <= num_rows:
        raise SettingError(f"count must be between 1 and the {num_rows} scored rows, got {count}")
    return wanted


def select_tokens(
    scores_N: NDArray[np.floating], num_tokens_N: NDArray[np.integer], budget: float
) -> NDArray[np.int64]:
    """Positions of the best rows, best first, until they hold at least `budget` tokens; ties go to the earlier row.

    The row that reaches the budget is taken: methods are compared at no less than what each was given. A user's token
    budget is a limit, `Budget`, and stops before that row.

    Args:
        scores_N: higher is better.
        num_tokens_N: tokens of each row, such as those that carry loss.
        budget: above 0; where all rows together hold less, all are taken.
    """
    order_N = np.argsort(-scores_N, kind="stable")
    return order_N[: 1 + int(np.searchsorted(num_tokens_N[order_N].cumsum(dtype=np.int64), budget))]
