"""Keep the preference pairs that promise little displacement, and draw a random control beside them.

    scored rows → FilterResult → the kept rows, and as many drawn at random from the same rows

The lowest values of a measure are kept (Razin et al., "Unintentional Unalignment: Likelihood Displacement in
DPO", ICLR 2025, §6, keep the lowest 5% by length-normalised CHES). A fraction is of the ranked rows, those that
have a finite value of the measure. The control is a plain random subset and may share rows with the kept ones:
a gain from filtering is one over training on it. Computing the measures is `ches.scores`' business.
"""

import math
import os
import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from datastore import SkippedRow
from datastore.errors import DataError, SettingError
from less.data.records import Record, Source, open_source
from less.data.sources import SUFFIXES
from less.data.writing import dataset_of, write_selected
from less.selection import num_to_select

if TYPE_CHECKING:
    import datasets

__all__ = ["LENGTHS", "QUANTILES", "FilterConfig", "FilterResult", "GroupSummary", "filter_pairs"]

LENGTHS = ("length_chosen", "length_rejected", "length_difference")
"""Columns whose means are reported, in tokens."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Quantiles of the measure that are reported."""


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """Settings of a filter; exactly one of `keep_lowest`, `drop_highest` and `below` is given."""

    measure: str = "ln_ches"
    """A column of numbers, high where displacement is to be expected; `-NAME` stands for the negative of NAME."""
    keep_lowest: float | None = None
    """Fraction of the ranked rows to keep, above 0 and at most 1; the ceiling is taken."""
    drop_highest: float | None = None
    """Fraction of the ranked rows to drop, between 0 and 1; the ceiling is taken."""
    below: float | None = None
    """Keep what is below this value."""
    length_strata: int | None = None
    """Rank within this many bins of (nearly) equal count of length_difference. Rows of one length_difference stay
    in one bin, that of their middle place: where many are alike, bins are uneven or fewer."""
    seed: int = 0
    """Of the random control."""

    def __post_init__(self) -> None:
        rules = {name: getattr(self, name) for name in ("keep_lowest", "drop_highest", "below")}
        given = [name for name, value in rules.items() if value is not None]
        if len(given) != 1:
            raise SettingError(f"give one of {', '.join(rules)}, got {' and '.join(given) or 'none of them'}")
        if self.keep_lowest is not None and not 0 < self.keep_lowest <= 1:
            raise SettingError(f"keep_lowest must be above 0 and at most 1, got {self.keep_lowest}")
        if self.drop_highest is not None and not 0 < self.drop_highest < 1:
            raise SettingError(f"drop_highest must be between 0 and 1, got {self.drop_highest}")
        if self.below is not None and not math.isfinite(self.below):
            raise SettingError(f"below must be a finite number, got {self.below}")
        if self.length_strata is not None and self.below is not None:
            raise SettingError(
                "length_strata ranks rows within bins and below does not rank; use keep_lowest or drop_highest"
            )
        if self.length_strata is not None and self.length_strata < 2:
            raise SettingError(f"length_strata must be at least 2, got {self.length_strata}")
        if self.seed < 0:
            raise SettingError(f"seed must be at least 0, got {self.seed}")
        if self.measure == "edit_distance":
            raise SettingError(
                "edit_distance is low where the replies are alike, so its lowest values are the pairs most at risk; "
                "for the pairs that differ most, name the measure -edit_distance"
            )


@dataclass(frozen=True, kw_only=True)
class GroupSummary:
    """What a group of ranked rows is like: all, kept, dropped or the control."""

    num_rows: int
    """How many rows it has."""
    quantiles: tuple[float, ...] | None
    """Of the measure, at `QUANTILES`; None for an empty group."""
    mean_lengths: dict[str, float | None]
    """Mean of each column of `LENGTHS` over the rows that have it; None if none has."""


@dataclass(frozen=True, kw_only=True)
class FilterResult:
    """Which rows were kept, and what that did to the measure and to the lengths."""

    config: FilterConfig
    """The settings."""
    kept: NDArray[np.int64]
    """Row numbers in the scored data, ascending; so are all those below."""
    dropped: NDArray[np.int64]
    """Ranked rows that were not kept."""
    control: NDArray[np.int64] | None
    """As many ranked rows as were kept, drawn at random: from each bin as many as were kept of it. May share rows
    with `kept`."""
    unranked: tuple[SkippedRow, ...]
    """Rows without a finite value of the measure, never kept, each with its reason: `ches_problem`, if it has one."""
    threshold: float
    """The highest value that was kept; with `length_strata`, over all bins."""
    strata: tuple[int, ...]
    """Ranked rows in each bin, from the lowest length_difference; empty without `length_strata`."""
    summary: dict[str, GroupSummary]
    """Of `all` ranked rows, `kept`, `dropped`, and `control` if there is one."""
    records: tuple[Record, ...]
    """The kept rows as they stand in the scored data."""
    control_records: tuple[Record, ...] | None
    """The control's."""
    output: Path | None
    """The file of the kept rows, if any."""
    control_output: Path | None
    """The file of the control, if any."""

    @cached_property
    def dataset(self) -> "datasets.Dataset":
        """The kept rows for TRL's `DPOTrainer`; None where a row lacks a column of another.

        Raises:
            DataError: a column has values of several types.
        """
        return dataset_of(self.records, [{}] * len(self.records))

    @cached_property
    def control_dataset(self) -> "datasets.Dataset":
        """The control likewise.

        Raises:
            DataError: a column has values of several types.
            SettingError: no control was asked for.
        """
        if self.control_records is None:
            raise SettingError("no control was drawn; filter with random_control=True, or a path to write it to")
        return dataset_of(self.control_records, [{}] * len(self.control_records))


def filter_pairs(
    scored: Any,
    *,
    output: str | os.PathLike[str] | None = None,
    random_control: str | os.PathLike[str] | bool | None = None,
    **settings: Any,
) -> FilterResult:
    """Keep the pairs of lowest value, in the order of the data, every column as it is.

    Ties go to the earlier row. With `length_strata` the bins share the number of kept (or dropped) rows by size,
    each within one row of its part, and the total is what it would be without.

    Args:
        scored: what `score_pairs` made: a file, a `datasets.Dataset` or a list of dicts.
        output: a .jsonl or .parquet file for the kept rows; None writes nothing.
        random_control: likewise for the control; True only draws it, None and False do without.
        **settings: fields of `FilterConfig`.

    Raises:
        DataError: the measure is not there, or no row has a finite value of it.
        SettingError: the settings do not fit each other or the data, a file cannot be written, or nothing is kept.
    """
    config = FilterConfig(**settings)
    source = open_source(scored)
    output = None if output is None else Path(output)
    control_output = None if random_control is None or isinstance(random_control, bool) else Path(random_control)
    draw = control_output is not None or random_control is True
    _check_files(output, control_output, source)
    ranked, unranked = _rank(source, config)
    bins = [np.arange(ranked.num_rows)]
    if config.length_strata is not None:
        bins = _bins(ranked.lengths_N3[:, LENGTHS.index("length_difference")], config.length_strata)
    kept_N = _keep(ranked.value_N, bins, config)
    control_N = _draw(kept_N, bins, config.seed) if draw else None
    groups = {"all": np.ones_like(kept_N), "kept": kept_N, "dropped": ~kept_N}
    if control_N is not None:
        groups["control"] = control_N
    result = FilterResult(
        config=config,
        kept=ranked.row_N[kept_N],
        dropped=ranked.row_N[~kept_N],
        control=None if control_N is None else ranked.row_N[control_N],
        unranked=unranked,
        threshold=float(ranked.value_N[kept_N].max()),
        strata=() if config.length_strata is None else tuple(len(members) for members in bins),
        summary={name: ranked.summary(group_N) for name, group_N in groups.items()},
        records=tuple(source.take(ranked.row_N[kept_N].tolist())),
        control_records=None if control_N is None else tuple(source.take(ranked.row_N[control_N].tolist())),
        output=output,
        control_output=control_output,
    )
    for path, records in ((output, result.records), (control_output, result.control_records)):
        if path is not None and records is not None:
            write_selected(path, records, [{}] * len(records), source.kind)
    return result


@dataclass(frozen=True, kw_only=True)
class _Ranked:
    """The rows that have the measure."""

    row_N: NDArray[np.int64]
    value_N: NDArray[np.float64]
    lengths_N3: NDArray[np.float64]
    """Columns of `LENGTHS`; NaN where a row has none."""

    @property
    def num_rows(self) -> int:
        return len(self.row_N)

    def summary(self, group_N: NDArray[np.bool_]) -> GroupSummary:
        value_G, lengths_G3 = self.value_N[group_N], self.lengths_N3[group_N]
        known = [column[~np.isnan(column)] for column in lengths_G3.T]
        return GroupSummary(
            num_rows=len(value_G),
            quantiles=tuple(np.quantile(value_G, QUANTILES).tolist()) if len(value_G) else None,
            mean_lengths={
                name: float(column.mean()) if len(column) else None for name, column in zip(LENGTHS, known, strict=True)
            },
        )


def _rank(source: Source, config: FilterConfig) -> tuple[_Ranked, tuple[SkippedRow, ...]]:
    """The rows that can be ranked, and the others with their reasons."""
    column, sign = config.measure.removeprefix("-"), -1.0 if config.measure.startswith("-") else 1.0
    needed = (column,) if config.length_strata is None else (column, "length_difference")
    rows, values, lengths, unranked = [], [], [], []
    found: set[str] = set()
    for record in source.iter_records():
        columns = record.columns or {}
        found.update(columns.keys() & needed)
        missing = next((name for name in needed if _number(columns.get(name)) is None), None)
        if missing is not None:
            unranked.append(_unranked(record, missing))
            continue
        rows.append(record.number)
        values.append(sign * float(columns[column]))
        lengths.append([math.nan if (n := _number(columns.get(name))) is None else n for name in LENGTHS])
    where = source.location or source.name
    if absent := [name for name in needed if name not in found]:
        there = ", ".join(_numeric_columns(source)) or "none"
        raise DataError(
            f"{where} has no column {absent[0]}, only these of numbers: {there}. Have it measured with gradsift ches "
            "score --measures, or name another measure"
        )
    if not rows:
        reasons = ", ".join(dict.fromkeys(row.reason for row in unranked))
        raise DataError(
            f"none of the {len(unranked)} rows of {where} can be ranked by {config.measure} ({reasons}); expected a "
            "finite number. Measure them with gradsift ches score --measures"
        )
    if config.length_strata is not None and config.length_strata > len(rows):
        raise SettingError(
            f"length_strata is {config.length_strata}, but only {len(rows)} rows are ranked; expected at most as many"
        )
    ranked = _Ranked(row_N=np.array(rows, np.int64), value_N=np.array(values), lengths_N3=np.array(lengths))
    return ranked, tuple(unranked)


def _unranked(record: Record, missing: str) -> SkippedRow:
    columns = record.columns or {}
    value, told = columns.get(missing), columns.get("ches_problem")
    detail = f"{missing} is {reprlib.repr(value)}"
    if record.problem is not None:
        reason, detail = record.problem.reason, record.problem.detail
    elif isinstance(told, str) and told:
        reason = told
    else:
        reason = f"no {missing}" if value is None else f"{missing} is not a finite number"
    return SkippedRow(row=record.number, where=record.where, id=record.id, reason=reason, detail=detail)


def _number(value: Any) -> float | None:
    """A finite number as float, else None."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _numeric_columns(source: Source) -> Iterable[str]:
    """Names of the columns that hold a number in some row, in the order they are met."""
    return dict.fromkeys(
        name
        for record in source.iter_records()
        for name, value in (record.columns or {}).items()
        if _number(value) is not None
    )


def _bins(length_difference_N: NDArray[np.float64], num_bins: int) -> list[NDArray[np.int64]]:
    """Positions in each bin, ascending. Row i of n in order belongs to bin floor((i + ½) num_bins / n), rows of one
    value to that of their middle."""
    _, value_of_N, counts = np.unique(length_difference_N, return_inverse=True, return_counts=True)
    twice_middle = 2 * np.cumsum(counts) - counts
    bin_N = (twice_middle * num_bins // (2 * len(length_difference_N)))[value_of_N]
    return [np.flatnonzero(bin_N == index) for index in np.unique(bin_N)]


def _keep(value_N: NDArray[np.float64], bins: Sequence[NDArray[np.int64]], config: FilterConfig) -> NDArray[np.bool_]:
    """Which rows are kept.

    Raises:
        SettingError: none is.
    """
    kept_N = np.zeros(len(value_N), bool)
    if config.below is not None:
        kept_N = value_N < config.below
        if not kept_N.any():
            raise SettingError(
                f"below {config.below} keeps none of the {len(value_N)} ranked rows: the lowest {config.measure} is "
                f"{value_N.min()}; raise it"
            )
        return kept_N
    sizes = [len(members) for members in bins]
    fraction = config.drop_highest if config.keep_lowest is None else config.keep_lowest
    # a ceiling for each bin would add up to more than the fraction of all rows
    upto = [num_to_select(total, fraction=fraction) for total in accumulate(sizes)]
    if config.drop_highest is not None and upto[-1] == len(value_N):
        raise SettingError(f"drop_highest {config.drop_highest} drops all {len(value_N)} ranked rows; lower it")
    for members, size, share in zip(bins, sizes, np.diff([0, *upto]).tolist(), strict=True):
        lowest_first = members[np.argsort(value_N[members], kind="stable")]
        kept_N[lowest_first[: size - share if config.keep_lowest is None else share]] = True
    return kept_N


def _draw(kept_N: NDArray[np.bool_], bins: Sequence[NDArray[np.int64]], seed: int) -> NDArray[np.bool_]:
    """As many rows of each bin as were kept of it, at random."""
    generator = np.random.default_rng(seed)
    drawn_N = np.zeros_like(kept_N)
    for members in bins:
        drawn_N[generator.choice(members, int(kept_N[members].sum()), replace=False)] = True
    return drawn_N


def _check_files(output: Path | None, control: Path | None, source: Source) -> None:
    """Raise `SettingError` for a file of another format, or that would write over the input or the other file."""
    files = {}
    for name, path in (("output", output), ("random_control", control)):
        if path is None:
            continue
        if path.suffix not in SUFFIXES:
            raise SettingError(f"{name} cannot be {path}: expected a name that ends in {', '.join(SUFFIXES)}")
        resolved = files[name] = path.absolute().resolve()
        if source.location in {str(resolved), *map(str, resolved.parents)}:
            raise SettingError(f"{name} {path} would write over the scored rows, {source.name}; name another file")
    if len(set(files.values())) < len(files):
        raise SettingError(f"output and random_control are both {output}; name another file for one of them")
