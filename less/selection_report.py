"""What a selection took from its pool: the facts of its report.

    store + selected rows + every candidate's scores → SelectionReport

Nothing is computed again: scores are read as `less.ranking` wrote them, lengths and norms as the store holds them. The
pool is streamed for the values of its columns, and only the rows that are shown are kept. The page that shows the facts
is left to the caller.
"""

import hashlib
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
from less.selection import ranks
from less.statistics import spearman

__all__ = [
    "AwayFacts",
    "ColumnFacts",
    "SelectionReport",
    "ShownRow",
    "Spread",
    "SubtaskFacts",
    "ValueFacts",
    "report_selection",
]

DEFAULT_COLUMNS = ("dataset", "subtask", "skill")
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_ADDED = "influence_"  # what the names of the columns that `select` adds begin with
_CHARS_OF_A_VALUE = 80
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
class AwayFacts:
    """What negative targets did. Scores for them: the higher, the more a row points to what is to be avoided."""

    mean_pool: float
    """Mean score for them over all scored rows."""
    mean_selected: float
    """Over the selected rows."""
    mean_best: float
    """Over as many rows, the best by score alone."""
    mean_passed_over: float | None
    """Over those of the best by score that were not selected; None where all were."""


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
            name: [asdict(item) for item in value] if name in ("spreads", "columns", "subtasks") else value
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
    found = _Scores.read(open_source(scores), rows)
    pool = Pool(store, data)
    source = open_source(selected)
    taken = _Taken.read(source, rows)
    if strange := set(taken.subtasks) - set(found.names):
        raise DataError(
            f"rows of {source.name} were taken for {min(strange)!r}, and the scores are for {', '.join(found.names)}; "
            "give the files that one gradsift select wrote"
        )
    by_value = _by_value(pool, rows, taken, columns)
    positions = taken.positions
    is_selected_N = np.zeros(store.num_rows, bool)
    is_selected_N[positions] = True
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
                subtask=found.names[found.best_N[n]] if n not in place else taken.subtasks[place[n]],
                selected_rank=place[n] + 1 if n in place else None,
                reason=taken.reasons[place[n]] if n in place else None,
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
        subtasks=_subtasks(found, taken, is_selected_N),
        away=_away(found, is_selected_N, best[:num_selected]),
        top=shown(positions[:num_top]),
        bottom=shown(positions[max(num_top, num_selected - num_ends) :]),
        below=shown(best[~is_selected_N[best]][:num_below]),
        score_N=score_N,
        is_selected_N=is_selected_N,
        num_supervised_N=rows.num_supervised_N,
        grad_norm_N=norm_N,
    )


@dataclass(frozen=True, kw_only=True)
class _Scores:
    """The lines of a file of scores, of the store's scored rows."""

    names: list[str]
    scores_NJ: NDArray[np.float32]
    score_N: NDArray[np.float32]
    best_N: NDArray[np.int64]
    away_N: NDArray[np.float32] | None
    skipped: dict[str, int]

    @classmethod
    def read(cls, source: Source, rows: RowTable) -> "_Scores":
        """`DataError` where the file is not of these rows."""
        names: list[str] = []
        values, away, score = array("f"), array("f"), array("f")
        skipped: Counter[str] = Counter()
        for record in source.iter_records():
            line = record.columns or {}
            if "skipped" in line:
                skipped[str(line["skipped"])] += 1
                continue
            n = len(score)
            key = (line.get("source"), line.get("row"))
            if not {"score", "scores"} <= line.keys() or not isinstance(line["scores"], dict) or not line["scores"]:
                raise DataError(f"{record.where} has no scores; expected what gradsift select --scores writes")
            if n >= len(rows.ids) or key != (rows.sources_N[n], rows.rows_N[n]):
                expected = f"{rows.sources_N[n]}:{rows.rows_N[n]}" if n < len(rows.ids) else "no more rows"
                raise DataError(
                    f"{record.where} is row {key[0]}:{key[1]}, expected {expected}: the scores are not of this store, "
                    "or rows were added or deleted since; select again with --scores"
                )
            names = names or list(line["scores"])
            try:
                values.extend(line["scores"][name] for name in names)
                score.append(line["score"])
                if "away" in line:
                    away.append(line["away"])
            except (KeyError, TypeError):
                raise DataError(f"{record.where} has other scores than the lines before; select again") from None
        if len(score) != len(rows.ids):
            raise DataError(
                f"{source.name} has the scores of {len(score):,} rows, and the store has {len(rows.ids):,}; give the "
                "file that gradsift select --scores wrote for this store"
            )
        scores_NJ = np.frombuffer(values, np.float32).reshape(len(score), len(names))
        return cls(
            names=names,
            scores_NJ=scores_NJ,
            score_N=np.frombuffer(score, np.float32),
            best_N=scores_NJ.argmax(axis=1),
            away_N=np.frombuffer(away, np.float32) if len(away) == len(score) else None,
            skipped=dict(skipped.most_common()),
        )


@dataclass(frozen=True, kw_only=True)
class _Taken:
    """The selected rows, best first: where they stand among the scored ones, and why they were taken."""

    positions: NDArray[np.int64]
    subtasks: list[str]
    reasons: list[str]
    where: list[str]
    contents: dict[bytes, list[int]]
    """Places in `positions`, still -1, by the hash of the row's own columns: rows that no id tells apart."""

    @classmethod
    def read(cls, source: Source, rows: RowTable) -> "_Taken":
        """`DataError` where a row has not what `select` adds."""
        num_of, at = Counter(rows.ids), {name: n for n, name in enumerate(rows.ids)}
        found: list[int] = []
        subtasks, reasons, where = [], [], []
        contents: dict[bytes, list[int]] = {}
        for record in source.iter_records():
            line = record.columns or {}
            if not {"influence_score", "influence_subtask"} <= line.keys():
                raise DataError(f"{record.where} has no influence_score; expected what gradsift select --output writes")
            name = None if line.get("id") is None else str(line["id"])
            if name is not None and num_of[name] == 1:
                found.append(at[name])
            else:
                contents.setdefault(_content(line), []).append(len(found))
                found.append(-1)
            subtasks.append(str(line["influence_subtask"]))
            reasons.append(str(line.get("influence_reason", "")))
            where.append(record.where)
        return cls(
            positions=np.array(found, np.int64), subtasks=subtasks, reasons=reasons, where=where, contents=contents
        )


def _content(columns: Mapping[str, Any]) -> bytes:
    """A hash of a row's own columns. A null counts as missing, since Parquet fills gaps with them."""
    own = {name: value for name, value in columns.items() if value is not None and not name.startswith(_ADDED)}
    return hashlib.sha256(json_of(own, sort_keys=True).encode()).digest()


def _by_value(pool: Pool, rows: RowTable, taken: _Taken, asked: Sequence[str]) -> tuple[ColumnFacts, ...]:
    """Selected against pool by value; the pool is streamed once, and `taken.positions` completed by it."""
    names = tuple(dict.fromkeys(asked)) or DEFAULT_COLUMNS
    waiting = {key: places[::-1] for key, places in taken.contents.items()}
    codes: dict[str, dict[str, int]] = {name: {} for name in names}
    code_of = {name: array("i") for name in names}
    known: dict[str, None] = {}
    for n, record in enumerate(pool.iter_records(rows)):
        own = record.columns or {}
        known.update(dict.fromkeys(own))
        for name in names:
            of_name, value = codes[name], own.get(name)
            text = (
                "(none)" if value is None else (value if isinstance(value, str) else json_of(value))[:_CHARS_OF_A_VALUE]
            )
            room = len(of_name) < _MOST_VALUES
            code_of[name].append(of_name.setdefault(text, len(of_name)) if room else of_name.get(text, -1))
        if waiting and (places := waiting.get(_content(own))):
            taken.positions[places.pop()] = n
    if (lost := np.flatnonzero(taken.positions < 0)).size:
        raise DataError(
            f"{taken.where[lost[0]]} is no scored row of the store; give the selection that was made from it, with its "
            "columns as gradsift select wrote them"
        )
    if len(np.unique(taken.positions)) < len(taken.positions):
        raise DataError("the selection has the same row of the store twice; expected what gradsift select wrote")
    if missing := [name for name in asked if name not in known]:
        raise SettingError(f"the pool has no column {missing[0]!r} to compare by; it has {', '.join(known)}")
    found = []
    if len(pool.sources) > 1:
        sources = [source.name for source in pool.sources]
        found.append(_column("source", sources, rows.sources_N, taken.positions))
    for name in names:
        if name in known:
            code_N = np.frombuffer(code_of[name], np.int32)
            found.append(_column(name, list(codes[name]), code_N, taken.positions))
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


def _subtasks(found: _Scores, taken: _Taken, is_selected_N: NDArray[np.bool_]) -> tuple[SubtaskFacts, ...]:
    num_taken = Counter(taken.subtasks)
    num_best = np.bincount(found.best_N, minlength=len(found.names))
    mean_pool, mean_selected = (
        scores.mean(axis=0, dtype=np.float64) for scores in (found.scores_NJ, found.scores_NJ[is_selected_N])
    )
    return tuple(
        SubtaskFacts(
            subtask=name,
            num_pool=int(num_best[j]),
            num_selected=num_taken[name],
            mean_pool=float(mean_pool[j]),
            mean_selected=float(mean_selected[j]),
        )
        for j, name in enumerate(found.names)
    )


def _away(found: _Scores, is_selected_N: NDArray[np.bool_], best: NDArray[np.int64]) -> AwayFacts | None:
    if found.away_N is None:
        return None
    away_N, passed_over = found.away_N, best[~is_selected_N[best]]
    return AwayFacts(
        mean_pool=float(away_N.mean()),
        mean_selected=float(away_N[is_selected_N].mean()),
        mean_best=float(away_N[best].mean()),
        mean_passed_over=float(away_N[passed_over].mean()) if passed_over.size else None,
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
