"""What a selection took from its pool: the facts of its report.

    store + selected rows + every candidate's scores → SelectionReport

Nothing is computed again: scores are read as `less.ranking` wrote them, lengths and norms as the store holds them. The
pool and the scores are streamed; some dozen bytes of each row are kept, and the rows that are shown. The page that
shows the facts is left to the caller.
"""

import math
import os
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datastore import Datastore, RowTable
from datastore.errors import DataError, SettingError
from datastore.similarity import choose_feature_set
from less.data.records import Record, Source, open_source
from less.data.sources import json_of
from less.pool import Pool
from less.provenance import holds_gradients
from less.ranking import FEW_ROWS, MOSTLY
from less.selection import AWAY, ranks
from less.statistics import spearman

__all__ = [
    "AwayFacts",
    "ColumnFacts",
    "RuleFacts",
    "SelectionReport",
    "ShownRow",
    "Spread",
    "SubtaskFacts",
    "ValueFacts",
    "report_selection",
]

DEFAULT_COLUMNS = ("dataset", "subtask", "skill")
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_CHARS_OF_A_VALUE = 80
_FIELDS = {"id", "score", "scores", "selected", "passed_over", "source", "row"}
_SAME = 1e-6
"""What one score may be off in two files."""
_WHOLE = "give the two files that one gradsift select wrote, as it wrote them"
_MOST_VALUES = 10_000  # of a column that are told apart; a column with more is no way to group rows


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How a number of each row is spread, in the pool and among the selected rows."""

    name: str
    """`score`, `supervised tokens`, `tokens` or `gradient norm`."""
    pool: tuple[float, ...]
    """Its quantiles at `QUANTILES` over all scored rows."""
    selected: tuple[float, ...]
    """The same over the selected ones."""
    with_score: float | None
    """Spearman's correlation with the score over all scored rows; None where there is none, or for the score itself."""


@dataclass(frozen=True, kw_only=True)
class ValueFacts:
    """Rows with one value of a column."""

    value: str
    """The value as text."""
    num_pool: int
    """Scored rows that have it."""
    num_selected: int
    """Selected rows that have it."""


@dataclass(frozen=True, kw_only=True)
class ColumnFacts:
    """Selected against pool, by the values of a column."""

    column: str
    """The column; `source` is where the rows come from."""
    values: tuple[ValueFacts, ...]
    """The values with the most selected rows first, then those with the most rows."""
    num_untold: int
    """Rows whose value came after the first ten thousand values."""


@dataclass(frozen=True, kw_only=True)
class SubtaskFacts:
    """What one subtask gives to the selection."""

    subtask: str
    """Its name, as in the scores."""
    num_pool: int
    """Scored rows that have their highest score for it."""
    num_selected: int
    """Rows that were selected for it."""
    mean_pool: float
    """Mean score for it over all scored rows."""
    mean_selected: float
    """Mean score for it over all selected rows."""


@dataclass(frozen=True, kw_only=True)
class RuleFacts:
    """Rows whose turn came, and that a rule left out."""

    rule: str
    """`away`, `duplicate`, `near-duplicate` or `cap column=value`."""
    num_rows: int
    """How many."""
    mean_score: float
    """Their mean score."""
    best_rank: int
    """The best rank by score among them."""
    mean_away: float | None
    """Their mean score for the negative targets, if there are any."""


@dataclass(frozen=True, kw_only=True)
class AwayFacts:
    """What negative targets did. Scores for them: the higher, the more a row points to what is to be avoided."""

    mean_pool: float
    """Mean score for them over all scored rows."""
    mean_selected: float
    """Over the selected rows."""
    mean_best: float
    """Over as many rows, the best by score alone."""
    num_forbidden: int
    """Rows left out since they reach the threshold; they are among the rules as well."""
    mean_forbidden: float | None
    """Over those; None where there are none."""
    num_outranked: int
    """Rows among the best by score alone that no rule left out and that were not selected: what is taken off for
    negative targets put others before them, or turns, quotas or diversity did."""
    mean_outranked: float | None
    """Over those; None where there are none."""


@dataclass(frozen=True, kw_only=True)
class ShownRow:
    """A row that is worth reading."""

    id: str
    """Its label."""
    record: Record
    """The row, as it stands in the pool."""
    score: float
    """Its score, without what negative targets take off."""
    rank: int
    """By that score among all scored rows, from 1."""
    subtask: str
    """The subtask that gives the score, or that it was selected for."""
    selected_rank: int | None
    """Its place in the selection, from 1; None where it was not selected."""
    reason: str | None
    """Why it was selected."""
    passed_over: str | None
    """The rule that left it out when its turn came, if one did."""
    away: float | None
    """Its score for the negative targets, if there are any."""
    num_supervised: int
    """Its tokens that carry loss."""
    grad_norm: float | None
    """‖g‖, averaged over checkpoints by their weights; None in a store of embeddings."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SelectionReport:
    """The facts about a selection."""

    datastore: Path
    """The store."""
    feature_set: str
    """Whose gradient norms are told."""
    num_rows: int
    """Scored rows, N."""
    num_selected: int
    """Selected ones."""
    skipped: Mapping[str, int]
    """Rows without a score, by reason."""
    num_best_taken: int
    """Selected rows that are among as many of the best by score: all of them where nothing but the score decides."""
    warnings: tuple[str, ...]
    """What should be known before the selection is used: plain sentences."""
    spreads: tuple[Spread, ...]
    """Score, lengths and gradient norm."""
    columns: tuple[ColumnFacts, ...]
    """By source, where there are several, and by columns of the pool."""
    subtasks: tuple[SubtaskFacts, ...]
    """In the order of the scores."""
    rules: tuple[RuleFacts, ...]
    """What each rule left out, the most rows first."""
    away: AwayFacts | None
    """What negative targets did, if there were any."""
    top: tuple[ShownRow, ...]
    """The first of the selection."""
    bottom: tuple[ShownRow, ...]
    """The last of the selection, none of which is in `top`."""
    below: tuple[ShownRow, ...]
    """The best by score of the rows that were not selected."""
    score_N: NDArray[np.float32] = field(metadata={"array": True})
    """Scores, in the pool's order, (N,)."""
    is_selected_N: NDArray[np.bool_] = field(metadata={"array": True})
    """Which rows are selected, (N,)."""
    num_supervised_N: NDArray[np.int32] = field(metadata={"array": True})
    """Tokens that carry loss, (N,)."""
    grad_norm_N: NDArray[np.float32] | None = field(metadata={"array": True})
    """‖g‖, as in `ShownRow`, (N,)."""

    def to_json(self) -> dict[str, Any]:
        """The facts as JSON, without the arrays and the texts of rows; null in place of NaN."""
        names = {item.name for item in fields(self) if not item.metadata}
        shown = {name: [_shown_json(row) for row in getattr(self, name)] for name in ("top", "bottom", "below")}
        rest = {name: getattr(self, name) for name in names - shown.keys()}
        plain = {
            name: [asdict(item) for item in value] if name in ("spreads", "columns", "subtasks", "rules") else value
            for name, value in rest.items()
        }
        plain["away"] = None if self.away is None else asdict(self.away)
        ordered = {item.name: (plain | shown)[item.name] for item in fields(self) if item.name in names}
        found: dict[str, Any] = _without_nan(ordered | {"datastore": str(self.datastore)})
        return found


def report_selection(
    *,
    datastore: str | os.PathLike[str] | Datastore,
    selected: Any,
    scores: str | os.PathLike[str],
    data: Any = None,
    feature_set: str | None = None,
    columns: Sequence[str] = (),
    num_ends: int = 10,
    num_below: int = 5,
    verify: bool = True,
) -> SelectionReport:
    """The facts about a selection.

    Args:
        datastore: the store that was selected from.
        selected: the rows that `select` wrote: a .jsonl or .parquet file.
        scores: the .jsonl file with a line for every candidate that the same `select` wrote.
        data: the pool, where it is not where the build found it (needed for rows given in memory).
        feature_set: whose gradient norms are told; needed where the store has several.
        columns: of the pool, to compare selected and pool by; none: `dataset`, `subtask` and `skill` where there are.
        num_ends: rows shown from either end of the selection.
        num_below: rows shown of the best that were not selected.
        verify: check the checksum of every file of the store that is read.

    Raises:
        DataError: the files are not of this store, or not what `select` writes; or the pool has changed.
        SettingError: no such feature set, or the pool has no such column.
    """
    store = datastore if isinstance(datastore, Datastore) else Datastore.open(datastore)
    feature_set = choose_feature_set(store, feature_set)
    rows = store.rows(feature_set, verify=verify)
    taken = _Taken.read(open_source(selected))
    found = _Scores.read(open_source(scores), rows, taken)
    pool = Pool(store, data)
    is_selected_N = found.selected_N > 0
    positions = np.flatnonzero(is_selected_N)
    positions = positions[np.argsort(found.selected_N[positions])]
    by_value = _by_value(pool, rows, positions, columns)
    score_N, rank_N = found.score_N, ranks(found.score_N)
    best = np.argsort(rank_N, kind="stable")
    norm_N = _norms(store, feature_set, verify)
    spreads = [_spread("score", score_N, is_selected_N, None)]
    spreads.append(_spread("supervised tokens", rows.num_supervised_N, is_selected_N, score_N))
    spreads.append(_spread("tokens", rows.num_tokens_N, is_selected_N, score_N))
    if norm_N is not None:
        spreads.append(_spread("gradient norm", norm_N, is_selected_N, score_N))

    def shown(wanted: NDArray[np.int64]) -> tuple[ShownRow, ...]:
        place = {int(positions[n]): int(n) for n in np.flatnonzero(np.isin(positions, wanted))}
        return tuple(
            ShownRow(
                id=rows.ids[n],
                record=record,
                score=float(score_N[n]),
                rank=int(rank_N[n]),
                subtask=found.subtasks[found.best_N[n]] if n not in place else taken.subtasks[place[n]],
                selected_rank=place[n] + 1 if n in place else None,
                reason=taken.reasons[place[n]] if n in place else None,
                passed_over=None if n in place else found.rule_of(n),
                away=None if found.away_N is None else float(found.away_N[n]),
                num_supervised=int(rows.num_supervised_N[n]),
                grad_norm=None if norm_N is None else float(norm_N[n]),
            )
            for n, record in zip(wanted.tolist(), pool.take(rows, wanted), strict=True)
        )

    num_selected = len(positions)
    num_top = min(num_ends, math.ceil(num_selected / 2))
    return SelectionReport(
        datastore=store.path,
        feature_set=feature_set,
        num_rows=store.num_rows,
        num_selected=num_selected,
        skipped=found.skipped,
        num_best_taken=int(is_selected_N[best[:num_selected]].sum()),
        warnings=tuple(_warnings(spreads, store.num_rows)),
        spreads=tuple(spreads),
        columns=by_value,
        subtasks=_subtasks(found, taken),
        rules=_rules(found, rank_N),
        away=_away(found, is_selected_N, best[:num_selected]),
        top=shown(positions[:num_top]),
        bottom=shown(positions[max(num_top, num_selected - num_ends) :]),
        below=shown(best[~is_selected_N[best]][:num_below]),
        score_N=score_N,
        is_selected_N=is_selected_N,
        num_supervised_N=rows.num_supervised_N,
        grad_norm_N=norm_N,
    )


class _Names:
    """Texts that many rows share, as numbers."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.codes = array("i")
        self._code_of: dict[str, int] = {}

    def append(self, name: str) -> None:
        """The next row has this one."""
        code = self._code_of.setdefault(name, len(self.names))
        if code == len(self.names):
            self.names.append(name)
        self.codes.append(code)

    def __getitem__(self, n: int) -> str:
        return self.names[self.codes[n]]


@dataclass(frozen=True, kw_only=True)
class _Taken:
    """The lines of a selection, best first: why each row was taken, and how it is known among the scores."""

    name: str
    ids: "array[int]"
    """A hash of the id, or 0 for a row that has none."""
    scores: "array[float]"
    subtasks: _Names
    reasons: _Names

    @classmethod
    def read(cls, source: Source) -> "_Taken":
        """`DataError` where a row has not what `select` adds, or is not in its place."""
        taken = cls(name=source.name, ids=array("q"), scores=array("f"), subtasks=_Names(), reasons=_Names())
        for rank, record in enumerate(source.iter_records(), start=1):
            line = record.columns or {}
            if not {"influence_rank", "influence_score", "influence_subtask"} <= line.keys():
                raise DataError(f"{record.where} has no influence_rank; expected what gradsift select --output writes")
            if line["influence_rank"] != rank:
                raise DataError(f"{record.where} has the rank {line['influence_rank']}, expected {rank}: {_WHOLE}")
            taken.ids.append(0 if line.get("id") is None else hash(str(line["id"])))
            taken.subtasks.append(str(line["influence_subtask"]))
            taken.reasons.append(str(line.get("influence_reason", "")))
            try:
                taken.scores.append(line["influence_score"])
            except TypeError:
                raise DataError(f"{record.where} has the score {line['influence_score']!r}: {_WHOLE}") from None
        return taken

    def __len__(self) -> int:
        return len(self.ids)

    def is_at(self, place: int, line: Mapping[str, Any]) -> bool:
        """Whether the row in this place, from 0, can be that of a line of the scores.

        Negative targets and nothing else take off from the score that a row has for the subtask it was taken for.
        """
        if self.ids[place] not in (0, hash(str(line["id"]))) or self.subtasks[place] not in line["scores"]:
            return False
        given, scored = self.scores[place], np.float32(line["scores"][self.subtasks[place]])
        return bool(given <= scored + _SAME if "away" in line else abs(given - scored) <= _SAME)


@dataclass(frozen=True, kw_only=True)
class _Scores:
    """The lines of a file of scores, of the store's scored rows."""

    subtasks: list[str]
    score_N: NDArray[np.float32]
    best_N: NDArray[np.int32]
    """The subtask of the highest score."""
    away_N: NDArray[np.float32] | None
    selected_N: NDArray[np.int32]
    """Rank in the selection, from 1; 0 for a row that is not in it."""
    rules: list[str]
    rule_N: NDArray[np.int32]
    """The rule that passed it over, from 1; 0 where none did."""
    sums_J: NDArray[np.float64]
    """Of all scores for each subtask."""
    sums_selected_J: NDArray[np.float64]
    """Of those of the selected rows."""
    skipped: dict[str, int]

    @classmethod
    def read(cls, source: Source, rows: RowTable, taken: _Taken) -> "_Scores":
        """`DataError` where the file is not of these rows, or was written with another selection."""
        lines = _ScoreLines(rows, taken)
        for record in source.iter_records():
            lines.add(record)
        if len(lines.score) != len(rows.rows_N):
            raise DataError(
                f"{source.name} has the scores of {len(lines.score):,} rows, and the store has {len(rows.rows_N):,}; "
                "give the file that gradsift select --scores wrote for this store"
            )
        selected_N = np.frombuffer(lines.selected, np.int32)
        if (num_known := int(np.count_nonzero(selected_N))) != len(taken):
            raise DataError(
                f"{taken.name} has {len(taken):,} rows, and {source.name} says that {num_known:,} are selected: "
                f"{_WHOLE}"
            )
        if not np.array_equal(np.sort(selected_N[selected_N > 0]), np.arange(1, num_known + 1)):
            raise DataError(f"{source.name} has selected rows whose ranks are not 1 to {num_known:,}: {_WHOLE}")
        return cls(
            subtasks=lines.subtasks,
            score_N=np.frombuffer(lines.score, np.float32),
            best_N=np.frombuffer(lines.best, np.int32),
            away_N=np.frombuffer(lines.away, np.float32) if lines.away else None,
            selected_N=selected_N,
            rules=list(lines.rules),
            rule_N=np.frombuffer(lines.rule, np.int32),
            sums_J=lines.sums_J,
            sums_selected_J=lines.sums_selected_J,
            skipped=dict(lines.skipped.most_common()),
        )

    def rule_of(self, position: int) -> str | None:
        """The rule that passed a row over."""
        code = int(self.rule_N[position])
        return self.rules[code - 1] if code else None


class _ScoreLines:
    """What is kept of the lines read so far: all but the scores for each subtask, which memory may not hold."""

    def __init__(self, rows: RowTable, taken: _Taken) -> None:
        self.rows, self.taken = rows, taken
        self.subtasks: list[str] = []
        self.score, self.away = array("f"), array("f")
        self.best, self.selected, self.rule = array("i"), array("i"), array("i")
        self.rules: dict[str, int] = {}
        self.sums_J = self.sums_selected_J = np.zeros(0)
        self.skipped: Counter[str] = Counter()

    def add(self, record: Record) -> None:
        """One line of the file."""
        line = record.columns or {}
        if line.get("skipped") is not None:
            self.skipped[str(line["skipped"])] += 1
            return
        if not line.keys() >= _FIELDS or not isinstance(line["scores"], dict) or not line["scores"]:
            raise DataError(f"{record.where} has no scores; expected what gradsift select --scores writes")
        self._check_key(record, line)
        try:
            self._add_numbers(line)
        except (KeyError, TypeError, ValueError, OverflowError):
            raise DataError(f"{record.where} has other scores than the lines before; select again") from None
        place = self.selected[-1] - 1
        if place >= len(self.taken) or (place >= 0 and not self.taken.is_at(place, line)):
            raise DataError(f"{record.where} is not the row of rank {place + 1} in {self.taken.name}: {_WHOLE}")

    def _check_key(self, record: Record, line: Mapping[str, Any]) -> None:
        n, rows = len(self.score), self.rows
        source, row, there = line["source"], line["row"], n < len(rows.rows_N)
        if not there or not type(source) is type(row) is int or (source, row) != (rows.sources_N[n], rows.rows_N[n]):
            expected = f"{rows.sources_N[n]}:{rows.rows_N[n]}" if there else "no more rows"
            raise DataError(
                f"{record.where} is row {source}:{row}, expected {expected}: the scores are not of this store, or rows "
                "were added or deleted since; select again with --scores"
            )

    def _add_numbers(self, line: Mapping[str, Any]) -> None:
        if not self.subtasks:
            self.subtasks = list(line["scores"])
            self.sums_J, self.sums_selected_J = np.zeros((2, len(self.subtasks)))
        scores_J = np.array([line["scores"][name] for name in self.subtasks], np.float32)
        self.best.append(int(scores_J.argmax()))
        self.score.append(line["score"])
        self.selected.append(0 if line["selected"] is None else line["selected"])
        rule = line["passed_over"]
        self.rule.append(0 if rule is None else self.rules.setdefault(str(rule), len(self.rules) + 1))
        if "away" in line:
            self.away.append(line["away"])
        # a null becomes NaN
        if not np.isfinite(scores_J).all() or not all(map(math.isfinite, (self.score[-1], *self.away[-1:]))):
            raise ValueError("a score is not finite")
        if len(line["scores"]) != len(self.subtasks) or (self.away and len(self.away) != len(self.score)):
            raise ValueError("other fields")
        if self.selected[-1] < 0:
            raise ValueError("no rank")
        self.sums_J += scores_J
        if self.selected[-1]:
            self.sums_selected_J += scores_J


def _by_value(
    pool: Pool, rows: RowTable, positions: NDArray[np.int64], asked: Sequence[str]
) -> tuple[ColumnFacts, ...]:
    """Selected against pool by value; the pool is streamed once."""
    names = tuple(dict.fromkeys(asked)) or DEFAULT_COLUMNS
    codes: dict[str, dict[str, int]] = {name: {} for name in names}
    code_of = {name: array("i") for name in names}
    known: dict[str, None] = {}
    for record in pool.iter_records(rows):
        own = record.columns or {}
        known.update(dict.fromkeys(own))
        for name in names:
            of_name, value = codes[name], own.get(name)
            text = (
                "(none)" if value is None else (value if isinstance(value, str) else json_of(value))[:_CHARS_OF_A_VALUE]
            )
            room = len(of_name) < _MOST_VALUES
            code_of[name].append(of_name.setdefault(text, len(of_name)) if room else of_name.get(text, -1))
    if missing := [name for name in asked if name not in known]:
        raise SettingError(f"the pool has no column {missing[0]!r} to compare by; it has {', '.join(known)}")
    found = []
    if len(pool.sources) > 1:
        sources = [source.name for source in pool.sources]
        found.append(_column("source", sources, rows.sources_N, positions))
    for name in names:
        if name in known:
            code_N = np.frombuffer(code_of[name], np.int32)
            found.append(_column(name, list(codes[name]), code_N, positions))
    return tuple(found)


def _column(name: str, values: Sequence[str], code_N: NDArray[np.int32], positions: NDArray[np.int64]) -> ColumnFacts:
    num_pool, num_selected = (
        np.bincount(code[code >= 0], minlength=len(values)) for code in (code_N, code_N[positions])
    )
    order = np.lexsort((-num_pool, -num_selected)).tolist()
    return ColumnFacts(
        column=name,
        values=tuple(
            ValueFacts(value=values[n], num_pool=int(num_pool[n]), num_selected=int(num_selected[n])) for n in order
        ),
        num_untold=int((code_N < 0).sum()),
    )


def _norms(store: Datastore, feature_set: str, verify: bool) -> NDArray[np.float32] | None:
    """Σ_c w_c ‖g_c‖ of every row."""
    if not holds_gradients(store):
        return None
    norm_N = np.zeros(store.num_rows, np.float32)
    for name in store.checkpoints:
        weight = np.float32(store.settings["checkpoints"][name]["weight"])
        norm_N += weight * store.stats(feature_set, name, verify=verify).grad_norms_N
    return norm_N


def _spread(
    name: str, x_N: NDArray[Any], is_selected_N: NDArray[np.bool_], score_N: NDArray[np.float32] | None
) -> Spread:
    pool, selected = (np.quantile(values, QUANTILES).tolist() for values in (x_N, x_N[is_selected_N]))
    correlation = None if score_N is None else spearman(score_N, x_N)
    return Spread(name=name, pool=tuple(pool), selected=tuple(selected), with_score=correlation)


def _warnings(spreads: Sequence[Spread], num_rows: int) -> list[str]:
    """What lengths or norms explain of the ranking, by the bound that `select` warns by."""
    found = []
    of = {spread.name: spread.with_score for spread in spreads}
    length, norm = of["supervised tokens"], of.get("gradient norm")
    if num_rows >= FEW_ROWS and length is not None and length**2 >= MOSTLY:
        longer = "longer" if length > 0 else "shorter"
        found.append(
            f"The ranking is mostly length: it prefers {longer} replies (Spearman {_signed(length)} with the number of "
            "supervised tokens). Hold it against `--method length` with `gradsift evaluate` before you train on it."
        )
    if num_rows >= FEW_ROWS and norm is not None and norm**2 >= MOSTLY:
        larger = "large" if norm > 0 else "small"
        found.append(
            f"The ranking is mostly the gradient's norm: it prefers rows of {larger} gradients (Spearman "
            f"{_signed(norm)} with ‖g‖), whatever the targets are. Read the rows below before you train on them."
        )
    return found


def _signed(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


def _subtasks(found: _Scores, taken: _Taken) -> tuple[SubtaskFacts, ...]:
    num_by_code = np.bincount(np.frombuffer(taken.subtasks.codes, np.int32), minlength=len(taken.subtasks.names))
    num_taken = Counter(dict(zip(taken.subtasks.names, num_by_code.tolist(), strict=True)))
    num_best = np.bincount(found.best_N, minlength=len(found.subtasks))
    return tuple(
        SubtaskFacts(
            subtask=name,
            num_pool=int(num_best[j]),
            num_selected=num_taken[name],
            mean_pool=float(found.sums_J[j] / len(found.score_N)),
            mean_selected=float(found.sums_selected_J[j] / len(taken)),
        )
        for j, name in enumerate(found.subtasks)
    )


def _rules(found: _Scores, rank_N: NDArray[np.int64]) -> tuple[RuleFacts, ...]:
    facts = []
    for code, rule in enumerate(found.rules, start=1):
        own = np.flatnonzero(found.rule_N == code)
        facts.append(
            RuleFacts(
                rule=rule,
                num_rows=len(own),
                mean_score=float(found.score_N[own].mean()),
                best_rank=int(rank_N[own].min()),
                mean_away=None if found.away_N is None else float(found.away_N[own].mean()),
            )
        )
    return tuple(sorted(facts, key=lambda facts: -facts.num_rows))


def _away(found: _Scores, is_selected_N: NDArray[np.bool_], best: NDArray[np.int64]) -> AwayFacts | None:
    if found.away_N is None:
        return None
    away_N = found.away_N
    forbidden = np.flatnonzero(found.rule_N == found.rules.index(AWAY) + 1) if AWAY in found.rules else best[:0]
    outranked = best[~is_selected_N[best] & (found.rule_N[best] == 0)]
    return AwayFacts(
        mean_pool=float(away_N.mean()),
        mean_selected=float(away_N[is_selected_N].mean()),
        mean_best=float(away_N[best].mean()),
        num_forbidden=len(forbidden),
        mean_forbidden=float(away_N[forbidden].mean()) if forbidden.size else None,
        num_outranked=len(outranked),
        mean_outranked=float(away_N[outranked].mean()) if outranked.size else None,
    )


def _shown_json(row: ShownRow) -> dict[str, Any]:
    own = {item.name: getattr(row, item.name) for item in fields(row) if item.name != "record"}
    return own | {"where": row.record.where}


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value
