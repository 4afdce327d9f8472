"""How like a row is to those taken, brought up to date when it is asked for.

    nearest(z) = max(0, max over taken rows s of ⟨x_z, x_s⟩)

x are the rows that `Candidates.features_of` gives. nearest(z) only grows, so a value that is out of date is a lower
bound, and what was taken since is compared in one product. Memory: 4 d bytes for each row taken and each row held,
and a few blocks; more than `MOST_BYTES` is refused before it is needed.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from datastore.errors import SettingError
from less.selection.candidates import Features

__all__ = ["BLOCK", "MOST_BYTES", "HeldFeatures", "Nearest"]

BLOCK = 256
"""Rows that are compared at once."""
MOST_BYTES = 4 * 2**30
"""Of features that are held, of rows taken and of rows chosen from each."""
_READ = 4096
"""Rows that are read at once, or taken rows that are multiplied at once."""


class HeldFeatures:
    """Features of some rows in memory; those of others are asked for."""

    def __init__(self, features_of: Features) -> None:
        """Hold nothing yet."""
        self._features_of = features_of
        self._places: list[dict[int, int]] = [{}, {}]  # of the rows held for good, and of the last block
        self._held: list[NDArray[np.float32]] = [np.empty((0, 0), np.float32)] * 2

    def hold(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Read these rows and keep them for good; features_nd.

        Raises:
            SettingError: they need more than `MOST_BYTES`.
        """
        first = self._read(rows[:1])
        held = room_for(len(rows), first.shape[1])
        for start in range(0, len(rows), _READ):
            held[start : start + _READ] = self._read(rows[start : start + _READ])
        self._places[0], self._held[0] = {row: n for n, row in enumerate(rows.tolist())}, held
        return held

    def hold_block(self, rows: Sequence[int]) -> None:
        """Read those of these rows that are not held for good, in place of the last block."""
        strange = [row for row in rows if row not in self._places[0]]
        if strange:
            self._places[1] = {row: n for n, row in enumerate(strange)}
            self._held[1] = self._read(np.array(strange, np.int64))

    def __contains__(self, row: int) -> bool:
        return row in self._places[0] or row in self._places[1]

    def of(self, rows: Sequence[int]) -> NDArray[np.float32]:
        """features_nd of these rows."""
        for places, held in zip(self._places, self._held, strict=True):
            if all(row in places for row in rows):
                return held[[places[row] for row in rows]]
        return self._read(np.array(rows, np.int64))

    def _read(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        return np.ascontiguousarray(self._features_of(rows), np.float32)


class Nearest:
    """nearest(z) of N rows."""

    def __init__(self, features: HeldFeatures, num_rows: int, capacity: int) -> None:
        """Start with nothing taken.

        Args:
            features: of the rows.
            num_rows: N.
            capacity: about how many will be taken.
        """
        self.features = features
        self.num_taken = 0
        self._nearest_N = np.zeros(num_rows, np.float32)
        self._upto_N = np.zeros(num_rows, np.int32)  # how many of the taken rows each has been compared with
        self._taken = np.empty((0, 0), np.float32)
        self._capacity = capacity

    def take(self, row: int) -> None:
        """One row more has been taken.

        Raises:
            SettingError: they need more than `MOST_BYTES`.
        """
        features_1d = self.features.of([row])
        if self.num_taken == len(self._taken):
            larger = room_for(max(self._capacity, 2 * self.num_taken, BLOCK), features_1d.shape[1])
            larger[: self.num_taken] = self._taken if self.num_taken else 0
            self._taken = larger
        self._taken[self.num_taken] = features_1d[0]
        self.num_taken += 1

    def of(self, row: int) -> float:
        """nearest(z) as last brought up to date."""
        return float(self._nearest_N[row])

    def num_missing(self, row: int) -> int:
        """Rows taken that it has not been compared with."""
        return self.num_taken - int(self._upto_N[row])

    def bring_up_to_date(self, rows: Sequence[int]) -> None:
        """Compare rows with all that has been taken since they last were."""
        upto_n = self._upto_N[rows]
        for upto in np.unique(upto_n[upto_n < self.num_taken]).tolist():
            own = [row for row, at in zip(rows, upto_n.tolist(), strict=True) if at == upto]
            features_nd = self.features.of(own)
            nearest_n = self._nearest_N[own]
            for start in range(upto, self.num_taken, _READ):
                taken_kd = self._taken[start : min(start + _READ, self.num_taken)]
                np.maximum(nearest_n, (features_nd @ taken_kd.T).max(axis=1), out=nearest_n)
            self._nearest_N[own] = nearest_n
            self._upto_N[own] = self.num_taken


def room_for(num_rows: int, width: int) -> NDArray[np.float32]:
    """Memory for features of so many rows, not written to.

    Raises:
        SettingError: it is more than `MOST_BYTES`.
    """
    if 4 * num_rows * width > MOST_BYTES:
        raise SettingError(
            f"{num_rows:,} rows of {width:,} values need {4 * num_rows * width / 2**30:.1f} GiB to be compared, more "
            f"than {MOST_BYTES / 2**30:g}; select fewer rows, lower diversity_candidates, or give narrower features"
        )
    return np.empty((num_rows, width), np.float32)
