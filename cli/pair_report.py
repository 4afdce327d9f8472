"""A scored file as one HTML page: how the pairs' scores are spread, whether to believe them, which pairs are risky.

    scored rows + manifest → numbers → figures and examples → templates/pair_report.html.j2 → one file

The page loads nothing and runs nothing, and whatever text comes from data is made visible and escaped. The scores
are `ches.scores`' business, and dropping pairs is `ches.filtering`'s.
"""

import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ches.pairs import Pair, pair_of
from ches.scored import ATTRIBUTED, LENGTHS, TRUNCATED
from cli.figures import CLIP, agreement, data_uri, density, histogram, shown_range
from cli.report_table import MEASURES, RISKIER_IF_LOW, Making, ScoredTable, find_making
from cli.report_text import (
    beginning,
    count_of,
    cut,
    decimal,
    digits_of,
    in_brackets,
    listed,
    report_template,
    signed,
    turns_shown,
)
from cli.report_tokens import token_view
from datastore import SkippedRow
from datastore.errors import SettingError
from less.data import RowProblem, open_source, write_lines
from less.data.records import Source
from less.data.sources import json_of

__all__ = ["PairReport", "write_report"]

_MAIN = "ln_ches"
_QUANTILES = {"min": 0.0, "5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95, "max": 1.0}

_CLOSELY = 0.7  # |Spearman| from which a measure is said to follow a length
_LITTLE = 0.3  # Spearman below which two measures are said to agree little
_FEW_PAIRS = 30
_MUCH_TRUNCATION = 0.05

_PLACES_SHOWN = 5
_REASONS_SHOWN = 30


@dataclass(frozen=True, kw_only=True)
class PairReport:
    """What a page says in short."""

    output: Path
    """The page."""
    num_rows: int
    """Rows of the scored file."""
    num_scored: int
    """Rows with a measure."""
    measure: str
    """What the pairs are ranked by."""
    verdict: tuple[str, ...]
    """Whether to believe the scores: sentences, with names in `back quotes`."""


def write_report(
    scored: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    measure: str | None = None,
    num_examples: int = 10,
) -> PairReport:
    """Writes the page about a scored file.

    Args:
        scored: a .jsonl or .parquet file that `gradsift ches score` wrote, its manifest beside it.
        output: an .html file, replaced if there.
        measure: what the pairs are ranked by; None: `ln_ches`, or else the first measure that is there.
        num_examples: how many pairs are shown of the riskiest, and how many of the safest.

    Raises:
        DataError: the file is absent, or lacks the columns of a scored file.
        SettingError: the file has no such measure, or `output` does not end in .html.
    """
    if Path(output).suffix != ".html":
        raise SettingError(f"a report is a web page, got the name {os.fspath(output)!r}; end it in .html")
    source = open_source(scored)
    table = ScoredTable.read(source)
    main = measure or next(name for name in (_MAIN, *MEASURES) if name in table.measures)
    if main not in table.measures:
        raise SettingError(f"{source.name} has no measure {main!r}; choose from {', '.join(table.measures)}")
    made, remark = find_making(Path(scored).expanduser(), source, table)
    verdict = tuple(_verdict(table, main, made))
    riskiest, safest = _extremes(table, main, num_examples)
    page = report_template("pair_report.html.j2").render(
        scored=source.name,
        made=made,
        remark=remark,
        table=table,
        counts=(count_of(table.num_rows, "row"), count_of(table.num_scored, "pair")),
        main=main,
        verdict=verdict,
        lines=_lines(table),
        panels=_panels(table),
        agreement=_agreement(table) if table.num_scored else None,
        groups={
            "riskiest": _examples(source, table, main, made, riskiest),
            "safest": _examples(source, table, main, made, safest),
        },
        problems=_problems(source, table, made),
        meanings=MEASURES,
        quantiles=list(_QUANTILES),
        lengths=LENGTHS,
        with_tokens=ATTRIBUTED,
        riskier_if_low=RISKIER_IF_LOW,
        clip=CLIP,
        closely=_CLOSELY,
        little=_LITTLE,
    )
    write_lines(output, [page])
    return PairReport(
        output=Path(output), num_rows=table.num_rows, num_scored=table.num_scored, measure=main, verdict=verdict
    )


# What the numbers say


def _verdict(table: ScoredTable, main: str, made: Making | None) -> Iterator[str]:
    """Whether to believe the scores, in sentences."""
    num_scored = table.num_scored
    if num_scored == 0:
        yield "No pair was scored: there is nothing to rank. The reasons are at the end."
        return
    if num_scored < _FEW_PAIRS:
        yield f"Correlations say little here: only {count_of(num_scored, 'pair')} could be compared."
    yield _on_length_difference(table, main)
    for name, length in product(table.measures, LENGTHS[1:]):
        if abs(rho := table.rho(name, length)) >= _CLOSELY:
            yield f"`{name}` follows {length.replace('length_', 'the length of the ')} reply {in_brackets(rho)}."
    others = [(name, table.rho_of_risk(main, name)) for name in table.measures if name != main]
    if unlike := [f"`{name}` ({signed(rho)})" for name, rho in others if rho < _LITTLE]:
        yield f"`{main}`, which ranks the pairs below, agrees little with {listed(unlike)}: what is risky differs."
    yield _on_truncation(table.problems.count(TRUNCATED), num_scored, made)


def _on_length_difference(table: ScoredTable, main: str) -> str:
    rhos = {name: table.rho(name, "length_difference") for name in table.measures}
    if all(math.isnan(rho) for rho in rhos.values()):
        return "Whether a measure follows the length difference cannot be said: the one or the other does not vary."
    close = [name for name, rho in rhos.items() if abs(rho) >= _CLOSELY]
    if not close:
        name = max(rhos, key=lambda name: abs(np.nan_to_num(rhos[name])))
        return f"No measure follows the length difference closely; `{name}` does so most {in_brackets(rhos[name])}."
    names = listed([f"`{name}` {in_brackets(rhos[name])}" for name in close])
    follow, order = ("follows", "its order is") if len(close) == 1 else ("follow", "their orders are")
    known = [name for name in dict.fromkeys((*ATTRIBUTED, main)) if not math.isnan(rhos.get(name, math.nan))]
    others = [name for name in known if all(not abs(table.rho(name, length)) >= _CLOSELY for length in LENGTHS)]
    instead = listed([f"`{name}` ({signed(rhos[name])})" for name in others], "or")
    return (
        f"{names} {follow} the length difference closely: {order} largely one by length. Rank within strata of length "
        f"(`gradsift ches filter --length-strata`){f', or by {instead}' if instead else ''}."
    )


def _on_truncation(num_truncated: int, num_scored: int, made: Making | None) -> str:
    if num_truncated == 0:
        return "No reply was truncated."
    limit = f" at {made.max_length:,} tokens" if made else ""
    advice = " Score again with a larger `--max-length`." if num_truncated >= _MUCH_TRUNCATION * num_scored else ""
    return (
        f"{count_of(num_truncated, 'pair')} ({num_truncated / num_scored:.1%}) had a reply truncated{limit}: "
        f"the score tells of the beginning only.{advice}"
    )


def _lines(table: ScoredTable) -> list[dict[str, Any]]:
    """The table of measures: one line a column, numbers as text."""
    lines = []
    for name in table.columns:
        known = table.known(name)
        digits = digits_of(known)
        cuts = np.quantile(known, list(_QUANTILES.values())) if len(known) else [math.nan] * len(_QUANTILES)
        lines.append(
            {
                "name": name,
                "count": f"{len(known):,}",
                "quantiles": [decimal(value, digits) for value in cuts],
                "rhos": [(abs(rho) >= _CLOSELY, signed(rho)) for rho in (table.rho(name, x) for x in LENGTHS)],
            }
        )
    return lines


def _extremes(table: ScoredTable, main: str, count: int) -> tuple[list[int], list[int]]:
    """Rows of the riskiest pairs and of the safest, each from its end; none is in both. Ties: the earlier row first."""
    risk_N = table.columns[main] * (-1 if main in RISKIER_IF_LOW else 1)
    num_ranked = int((~np.isnan(risk_N)).sum())
    riskiest = np.argsort(-risk_N, kind="stable")[: min(count, math.ceil(num_ranked / 2))].tolist()
    upwards = np.argsort(risk_N, kind="stable")[:num_ranked]  # NaN comes last in any order
    return riskiest, upwards[~np.isin(upwards, riskiest)][:count].tolist()


# Figures


def _panels(table: ScoredTable) -> list[dict[str, Any]]:
    """A histogram of each measure, and the measure against the length difference."""
    panels = []
    for name in table.measures:
        known = table.known(name)
        if not len(known):
            continue
        label = f"{name} (← riskier)" if name in RISKIER_IF_LOW else f"{name} (riskier →)"
        lengths, values = table.both("length_difference", name)
        rho = signed(table.rho(name, "length_difference"))
        digits = digits_of(known)
        panels.append(
            {
                "name": name,
                "rho": rho,
                "beyond": _beyond(known),
                "beyond_either": _beyond(lengths, values),
                "histogram": data_uri(histogram(known, label=label)),
                "histogram_alt": f"{len(known):,} values of {name}, median {decimal(float(np.median(known)), digits)}",
                "scatter": data_uri(
                    density(lengths, values, xlabel="length difference (rejected − chosen, tokens)", ylabel=name)
                ),
                "scatter_alt": f"{name} against the length difference: Spearman {rho}",
            }
        )
    return panels


def _beyond(*columns: NDArray[np.float64]) -> str:
    """What the caption says of the pairs beyond the axes, if there are any."""
    inside_N = np.ones(len(columns[0]), dtype=bool)
    for values_N in columns:
        low, high = shown_range(values_N)
        inside_N &= (values_N >= low) & (values_N <= high)
    count = int((~inside_N).sum())
    return f"; {count_of(count, 'pair')} at the rim" if count else ""


def _agreement(table: ScoredTable) -> dict[str, str]:
    names = [*table.measures, "length_difference"]
    rhos = np.array([[table.rho_of_risk(x, y) for x in names] for y in names])
    labels = [f"−{name}" if name in RISKIER_IF_LOW else name for name in names]
    pairs = [f"{labels[i]} and {labels[j]} {signed(rhos[i, j])}" for i in range(len(names)) for j in range(i)]
    return {"figure": data_uri(agreement(rhos, labels)), "alt": "Spearman: " + ", ".join(pairs)}


# Pairs


def _examples(
    source: Source, table: ScoredTable, main: str, made: Making | None, rows: list[int]
) -> list[dict[str, Any]]:
    """All that is shown of these pairs."""
    digits = {name: digits_of(table.known(name)) for name in table.columns}
    examples = []
    for row, record in zip(rows, source.take(rows), strict=True):
        try:
            pair, problem = pair_of(record.columns or {}), ""
        except RowProblem as found:
            pair, problem = Pair(prompt="", chosen="", rejected=""), str(found)
        prompt = turns_shown(pair.prompt)
        tools = [("tools", cut(json_of(pair.tools)))] if pair.tools else []
        score, attribution = float(table.columns[main][row]), made.examples.get(row) if made else None
        examples.append(
            {
                "id": beginning(record.id, 120),
                "where": record.where,
                "values": {name: decimal(float(table.columns[name][row]), digits[name]) for name in table.columns},
                "truncated": table.problems[row] == TRUNCATED,
                "beginning": beginning(prompt[-1][1], 160) if prompt else "",
                "problem": problem,
                "prompt": tools + prompt,
                "replies": {"chosen": turns_shown(pair.chosen), "rejected": turns_shown(pair.rejected)},
                "tokens": token_view(attribution, main, score, digits[main]) if attribution else None,
            }
        )
    return examples


# Rows with a problem


def _problems(source: Source, table: ScoredTable, made: Making | None) -> list[dict[str, Any]]:
    """For each reason how many rows have it, the most frequent first, and the first of these rows."""
    if made:
        counts = Counter(problem.reason for problem in made.problems)
    else:
        counts = Counter(problem for problem in table.problems if problem)
    lines = []
    for reason, count in counts.most_common(_REASONS_SHOWN):
        if made:
            places = [problem for problem in made.problems if problem.reason == reason][:_PLACES_SHOWN]
        else:
            rows = [row for row, problem in enumerate(table.problems) if problem == reason][:_PLACES_SHOWN]
            places = [
                SkippedRow(row=record.number, where=record.where, id=record.id, reason=reason, detail="")
                for record in source.take(rows)
            ]
        lines.append(
            {
                "reason": beginning(reason, 80),
                "count": f"{count:,}",
                "places": [(place.where, beginning(place.id, 120), beginning(place.detail, 300)) for place in places],
                "more": count > len(places),
            }
        )
    return lines
