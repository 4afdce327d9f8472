"""A selection as one HTML page: what it took from the pool, whether lengths explain it, and rows to read.

    SelectionReport → figures, tables and rows as text → templates/selection_report.html.j2 → one file

The page loads nothing and runs nothing, and whatever text comes from data is made visible and escaped. The facts are
`less.selection_report`'s business.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cli.figures import CLIP, compared, data_uri, density
from cli.report_text import (
    beginning,
    count_of,
    cut,
    decimal,
    digits_of,
    quoted_as_code,
    report_template,
    signed,
    turns_shown,
)
from datastore.errors import SettingError
from less.data import RowProblem, conversation_of, write_lines
from less.data.sources import json_of
from less.ranking import FEW_ROWS
from less.selection import AWAY
from less.selection_report import QUANTILES, ColumnFacts, SelectionReport, ShownRow

__all__ = ["write_selection_page"]

_VALUES_SHOWN = 12
_IN_WORDS = {
    AWAY: "points to the negative targets",
    "duplicate": "duplicate of a row that was taken",
    "near-duplicate": "near-duplicate of a row that was taken",
}
_UNITS = {"supervised tokens": "supervised tokens", "gradient norm": "gradient norm ‖g‖"}


def write_selection_page(
    report: SelectionReport, output: str | os.PathLike[str], *, selected: str = "the selection"
) -> None:
    """Writes the page.

    Args:
        report: the facts.
        output: an .html file, replaced if there.
        selected: what the page calls the selection: the file's name.

    Raises:
        SettingError: `output` does not end in .html.
    """
    if Path(output).suffix != ".html":
        raise SettingError(f"a report is a web page, got the name {os.fspath(output)!r}; end it in .html")
    verdict = [*report.warnings, *_verdict(report)]
    page = report_template("selection_report.html.j2").render(
        selected=selected,
        report=report,
        verdict=[quoted_as_code(sentence) for sentence in verdict],
        num_warnings=len(report.warnings),
        skipped=[(reason, f"{count:,}") for reason, count in report.skipped.items()],
        quantiles=[{0.5: "median"}.get(q, f"{q:.0%}") for q in QUANTILES],
        spreads=_spreads(report),
        panels=_panels(report),
        columns=[_column(facts, report) for facts in report.columns],
        subtasks=_subtasks(report),
        rules=_rules(report),
        away=_away(report),
        groups=[
            ("The first of the selection", _shown(report, report.top)),
            ("The last of the selection", _shown(report, report.bottom)),
            ("The best that were not selected", _shown(report, report.below)),
        ],
        clip=CLIP,
    )
    write_lines(output, [page])


def _verdict(report: SelectionReport) -> list[str]:
    """What is true of any selection, in sentences."""
    share = report.num_selected / report.num_rows
    left = report.num_selected - report.num_best_taken
    found = [f"{count_of(report.num_selected, 'row')} of {report.num_rows:,} selected ({share:.1%})."]
    if left:
        found[0] += (
            f" {count_of(left, 'row')} of the best {report.num_selected:,} by score {'was' if left == 1 else 'were'} "
            "passed over for others: rules, turns or negative targets decided as well."
        )
    known = {s.name: s.with_score for s in report.spreads if s.name in _UNITS and s.with_score is not None}
    if report.num_rows < FEW_ROWS:
        found.append(f"With fewer than {FEW_ROWS} rows, correlations say little.")
    elif known and not report.warnings and not any(math.isnan(rho) for rho in known.values()):
        said = ", ".join(f"{name} {signed(rho)}" for name, rho in known.items())
        neither = "Neither length nor gradient norm explains" if len(known) > 1 else "Length does not explain"
        found.append(f"{neither} most of the ranking (Spearman of the score with {said}).")
    return found


def _spreads(report: SelectionReport) -> list[dict[str, Any]]:
    lines = []
    for spread in report.spreads:
        digits = 0 if "tokens" in spread.name else digits_of(np.array([*spread.pool, *spread.selected]))
        lines.append(
            {
                "name": spread.name,
                "pool": [decimal(value, digits) for value in spread.pool],
                "selected": [decimal(value, digits) for value in spread.selected],
                "rho": "" if spread.with_score is None else signed(spread.with_score),
            }
        )
    return lines


def _panels(report: SelectionReport) -> list[dict[str, str]]:
    """Selected over pool for score, length and norm; and the score against the latter two."""
    values = {"score": report.score_N, "supervised tokens": report.num_supervised_N}
    if report.grad_norm_N is not None:
        values["gradient norm"] = report.grad_norm_N
    panels = []
    rho_of = {spread.name: spread.with_score for spread in report.spreads}
    for name, x_N in values.items():
        wide = x_N.astype(np.float64)
        of_selected, of_pool = (
            decimal(float(np.median(v)), digits_of(wide)) for v in (wide[report.is_selected_N], wide)
        )
        panel = {
            "name": name,
            "figure": data_uri(compared(wide, report.is_selected_N, label=_UNITS.get(name, "influence score"))),
            "alt": f"{name}: median {of_selected} of the selected rows, {of_pool} of the pool",
            "caption": f"Median {of_selected} of the selected rows, {of_pool} of the pool.",
            "scatter": "",
        }
        if name != "score":
            rho = rho_of[name]
            said = signed(math.nan if rho is None else rho)
            drawn = density(
                wide,
                report.score_N.astype(np.float64),
                xlabel=_UNITS[name],
                ylabel="influence score",
                counted="rows",
                is_selected_N=report.is_selected_N,
            )
            panel |= {
                "scatter": data_uri(drawn),
                "scatter_alt": f"score against {name}: Spearman {said}",
                "scatter_caption": f"Score against {name}: Spearman {said}. Selected rows in orange.",
            }
        panels.append(panel)
    return panels


def _column(facts: ColumnFacts, report: SelectionReport) -> dict[str, Any]:
    """The values that most selected rows have and those that most rows have; the others together."""
    most = sorted(facts.values, key=lambda v: -v.num_pool)[: _VALUES_SHOWN // 2]
    kept = [value for n, value in enumerate(facts.values) if n < _VALUES_SHOWN // 2 or value in most]
    lines = [_share_line(v.value, v.num_pool, v.num_selected, report) for v in kept]
    if (num_others := len(facts.values) - len(kept)) == 1:
        lines = [_share_line(v.value, v.num_pool, v.num_selected, report) for v in facts.values]
    elif num_others:
        num_pool = report.num_rows - sum(v.num_pool for v in kept)
        num_selected = report.num_selected - sum(v.num_selected for v in kept)
        lines.append(_share_line(f"({num_others:,} other values)", num_pool, num_selected, report))
    return {"name": facts.column, "lines": lines, "num_untold": facts.num_untold}


def _share_line(name: str, num_pool: int, num_selected: int, report: SelectionReport) -> dict[str, Any]:
    in_pool, in_selected = num_pool / report.num_rows, num_selected / report.num_selected
    return {
        "name": beginning(name, 60) or "(empty)",
        "num_pool": f"{num_pool:,}",
        "num_selected": f"{num_selected:,}",
        "pool": f"{in_pool:.1%}",
        "selected": f"{in_selected:.1%}",
        "widths": (f"{100 * in_pool:.2f}", f"{100 * in_selected:.2f}"),
        "lift": f"{in_selected / in_pool:.2f}" if num_pool else "–",
    }


def _subtasks(report: SelectionReport) -> list[dict[str, str]]:
    means = np.array([mean for facts in report.subtasks for mean in (facts.mean_pool, facts.mean_selected)])
    digits = digits_of(means)
    return [
        _share_line(facts.subtask, facts.num_pool, facts.num_selected, report)
        | {"mean_pool": decimal(facts.mean_pool, digits), "mean_selected": decimal(facts.mean_selected, digits)}
        for facts in report.subtasks
    ]


def _rules(report: SelectionReport) -> list[dict[str, str]]:
    digits = digits_of(np.array([facts.mean_score for facts in report.rules])) if report.rules else 0
    away = [facts.mean_away for facts in report.rules if facts.mean_away is not None]
    return [
        {
            "rule": beginning(_IN_WORDS.get(facts.rule, facts.rule), 80),
            "num_rows": f"{facts.num_rows:,}",
            "mean_score": decimal(facts.mean_score, digits),
            "best_rank": f"{facts.best_rank:,}",
            "mean_away": "" if facts.mean_away is None else decimal(facts.mean_away, digits_of(np.array(away))),
        }
        for facts in report.rules
    ]


def _away(report: SelectionReport) -> list[tuple[str, str, str]] | None:
    """Rows, how many they are, and their mean score for the negative targets."""
    if report.away is None:
        return None
    facts = report.away
    lines = [
        ("all scored rows", report.num_rows, facts.mean_pool),
        ("the best by score alone, as many as are selected", report.num_selected, facts.mean_best),
        ("the selected rows", report.num_selected, facts.mean_selected),
        ("left out since they reach the threshold", facts.num_forbidden, facts.mean_forbidden),
        ("of the best by score alone, ranked behind others", facts.num_outranked, facts.mean_outranked),
    ]
    known = [(name, number, mean) for name, number, mean in lines if mean is not None]
    digits = digits_of(np.array([mean for _, _, mean in known]))
    return [(name, f"{number:,}", decimal(mean, digits)) for name, number, mean in known]


def _shown(report: SelectionReport, rows: Sequence[ShownRow]) -> list[dict[str, Any]]:
    """Rows as text."""
    digits = digits_of(report.score_N.astype(np.float64))
    found = []
    for row in rows:
        columns = row.record.columns or {}
        try:
            chat = conversation_of(columns)
            turns = ([("tools", cut(json_of(chat.tools)))] if chat.tools else []) + turns_shown(chat.messages)
            asked = next((m.get("content") or "" for m in chat.messages if m["role"] == "user"), "")
        except RowProblem:  # a store of embeddings may hold rows that are no chats
            turns, asked = [("", cut(json_of(columns)))], json_of(columns)
        values = {
            "score": decimal(row.score, digits),
            "rank by score": f"{row.rank:,}",
            "subtask": beginning(row.subtask, 80),
            "supervised tokens": f"{row.num_supervised:,}",
        }
        if row.grad_norm is not None:
            values["gradient norm"] = f"{row.grad_norm:.4g}"
        if row.away is not None:
            values["score for negative targets"] = decimal(row.away, digits)
        if row.reason:
            values["taken"] = beginning(row.reason, 160)
        if row.passed_over:
            values["left out by the rule"] = beginning(_IN_WORDS.get(row.passed_over, row.passed_over), 160)
        values |= {"line": row.record.where, "id": beginning(row.id, 120)}
        found.append(
            {
                "place": f"{row.rank if row.selected_rank is None else row.selected_rank:,}",
                "score": values["score"],
                "beginning": beginning(asked, 160),
                "id": beginning(row.id, 120),
                "values": values,
                "turns": turns,
            }
        )
    return found
