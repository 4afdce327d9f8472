"""Down an order of the rows: take each unless a rule forbids it, stop when the budget is full."""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from less.selection.budget import Budget
from less.selection.orders import Gone
from less.selection.rules import Rule

__all__ = ["Order", "Walk"]


class Order(Protocol):
    """Whose turn it is."""

    def next(self, gone: Gone) -> tuple[int, int] | None:
        """The row that is to be asked about, and the number of the turn; None where there is no more."""

    def took(self, row: int) -> None:
        """The row was taken, which ends its turn; one that is passed over does not."""

    def upcoming(self, count: int, gone: Gone) -> list[int]:
        """About so many of the rows that may come next, as far as they are known."""


@dataclass
class Walk:
    """What has been taken and passed over so far. Several orders may be walked down, one after the other."""

    budget: Budget
    """When to stop."""
    rules: Sequence[Rule]
    """Asked in their order; the first that forbids a row is the one that counts."""
    gone: Gone
    """Rows that have been taken or passed over."""
    positions: list[int] = field(default_factory=list)
    """The rows taken, in order."""
    turns: list[int] = field(default_factory=list)
    """The turn of each."""
    used: int = 0
    """What they take of the budget."""
    is_full: bool = False
    """Whether it stopped for the budget: the next row would go over."""
    passed_over: "dict[str, array[int]]" = field(default_factory=dict)
    """Rows not taken, by rule, in order."""

    def go(self, order: Order, is_enough: Callable[[], bool] = lambda: False) -> int:
        """Walk until it is enough, the budget is full or the order has no more.

        Returns:
            how many rows were taken.
        """
        before = len(self.positions)
        while not self.is_full and not is_enough():
            found = order.next(self.gone)
            if found is None:
                break
            row, turn = found
            rule = self._forbidding(row, order)
            self.gone[row] = 1  # not before: an order that is asked what comes next must find the row there
            if rule is not None:
                self.passed_over.setdefault(rule, array("q")).append(row)
            elif self.used + self.budget.cost(row) > self.budget.total:
                self.is_full = True
            else:
                self._take(row, turn)
                order.took(row)
        return len(self.positions) - before

    def _forbidding(self, row: int, order: Order) -> str | None:
        for rule in self.rules:
            name = rule.forbids(row, lambda count: order.upcoming(count, self.gone))
            if name is not None:
                return name
        return None

    def _take(self, row: int, turn: int) -> None:
        self.positions.append(row)
        self.turns.append(turn)
        self.used += self.budget.cost(row)
        self.is_full = self.used == self.budget.total
        for rule in self.rules:
            rule.took(row)
