"""A scored file as one HTML page: how the pairs' scores are spread, whether to believe them, which pairs are risky.

    scored rows + manifest → numbers → figures and examples → templates/pair_report.html.j2 → one file

The page loads nothing and runs nothing, and whatever text comes from data is made visible and escaped. The scores
are `ches.scores`' business, and dropping pairs is `ches.filtering`'s.
"""

import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup, escape
from numpy.typing import NDArray

from ches.pairs import Pair, pair_of
from ches.ranks import spearman
from ches.scored import ATTRIBUTED, LENGTHS, PROBLEM, TRUNCATED, Manifest, manifest_path
from cli.figures import CLIP, agreement, data_uri, density, histogram, shown_range
from cli.showing import one_line
from datastore import SkippedRow
from datastore.errors import DataError, SettingError, StoreError
from less.data import RowProblem, open_source, write_lines
from less.data.records import Source
from less.data.sources import json_of

__all__ = ["PairReport", "write_report"]

_MEASURES = {
    "ches": "⟨S⁺, S⁻⟩ − ‖S⁺‖², where S is the sum of a reply’s final hidden embeddings",
    "ln_ches": "the same of the means S / n: ⟨S⁺, S⁻⟩ / (n⁺ n⁻) − ‖S⁺‖² / n⁺²",
    "alpha_ches": "minus the LM head’s part of the first-order change of log p(chosen) under a DPO step",
    "last_hidden": "inner product of the two replies’ last hidden embeddings",
    "edit_distance": "edits from one reply’s tokens to the other’s, over the longer one’s length; 0 is identical",
}
"""What pairs can be ranked by, each with what it is."""
_RISKIER_IF_LOW = ("edit_distance",)
_BESIDE = (*LENGTHS, "logp_chosen", "logp_rejected")
_MAIN = "ln_ches"
_NOT_A_ROW = ("not JSON", "not an object")  # a line of the source that is one of these has none in the scored file
_QUANTILES = {"min": 0.0, "5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95, "max": 1.0}

_CLOSELY = 0.7  # |Spearman| from which a measure is said to follow a length
_LITTLE = 0.3  # Spearman below which two measures are said to agree little
_FEW_PAIRS = 30
_MUCH_TRUNCATION = 0.05

_PLACES_SHOWN = 5
_REASONS_SHOWN = 30
_CHARS_SHOWN, _CHARS_OF_THE_END, _CHARS_OF_A_HEAD = 4000, 1000, 40  # of a text
_TOKENS_SHOWN = 400  # of a reply, if they have no more characters than a text
_STRONGEST_SHOWN = 5
_TINTS = 5  # of a token, either way
_STRAY = 1e-6  # of the contributions' absolute sum: how far rounding may take their sum from the score


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
    table = _Table.read(source)
    main = measure or next(name for name in (_MAIN, *_MEASURES) if name in table.measures)
    if main not in table.measures:
        raise SettingError(f"{source.name} has no measure {main!r}; choose from {', '.join(table.measures)}")
    made, remark = _find_making(Path(scored).expanduser(), source, table)
    verdict = tuple(_verdict(table, main, made))
    riskiest, safest = _extremes(table, main, num_examples)
    page = _template().render(
        scored=source.name,
        made=made,
        remark=remark,
        table=table,
        counts=(_count(table.num_rows, "row"), _count(table.num_scored, "pair")),
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
        meanings=_MEASURES,
        quantiles=list(_QUANTILES),
        lengths=LENGTHS,
        with_tokens=ATTRIBUTED,
        riskier_if_low=_RISKIER_IF_LOW,
        clip=CLIP,
        closely=_CLOSELY,
        little=_LITTLE,
    )
    write_lines(output, [page])
    return PairReport(
        output=Path(output), num_rows=table.num_rows, num_scored=table.num_scored, measure=main, verdict=verdict
    )


# The scored file and its manifest


@dataclass(frozen=True, kw_only=True)
class _Table:
    """The numbers of a scored file: a value for each row, NaN for null."""

    columns: dict[str, NDArray[np.float64]]
    problems: list[str | None]
    rhos: dict[frozenset[str], float] = field(default_factory=dict)

    @classmethod
    def read(cls, source: Source) -> "_Table":
        values: dict[str, list[float]] = {}
        problems = []
        for record in source.iter_records():
            row = record.columns or {}
            values = values or {name: [] for name in (*_MEASURES, *_BESIDE) if name in row}
            if not {*LENGTHS, PROBLEM, *values} <= row.keys() or not _MEASURES.keys() & values.keys():
                found = ", ".join(map(str, row)) or str(record.problem or "no columns")
                raise DataError(
                    f"{record.where} has {one_line(found, 120)}; expected {', '.join(LENGTHS)}, {PROBLEM} and "
                    "measures, the same in every row: score the pairs first, with gradsift ches score"
                )
            for name, column in values.items():
                column.append(_number(record.where, name, row[name]))
            problems.append(None if row[PROBLEM] is None else str(row[PROBLEM]))
        return cls(columns={name: np.array(column) for name, column in values.items()}, problems=problems)

    @property
    def measures(self) -> list[str]:
        return [name for name in _MEASURES if name in self.columns]

    @property
    def num_rows(self) -> int:
        return len(self.problems)

    @property
    def num_scored(self) -> int:
        return int(np.any([~np.isnan(self.columns[name]) for name in self.measures], axis=0).sum())

    def known(self, name: str) -> NDArray[np.float64]:
        """The values that are not null."""
        return self.columns[name][~np.isnan(self.columns[name])]

    def both(self, x: str, y: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Two columns, of the rows that have both."""
        both_N = ~np.isnan(self.columns[x]) & ~np.isnan(self.columns[y])
        return self.columns[x][both_N], self.columns[y][both_N]

    def rho(self, x: str, y: str) -> float:
        """Spearman's correlation of two columns, over the rows that have both."""
        names = frozenset((x, y))
        if names not in self.rhos:
            self.rhos[names] = spearman(*self.both(x, y))
        return self.rhos[names]

    def rho_of_risk(self, x: str, y: str) -> float:
        """The same, of two columns turned so that higher means riskier."""
        return self.rho(x, y) * math.prod(-1 for name in (x, y) if name in _RISKIER_IF_LOW)


def _number(where: str, name: str, value: Any) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e300:
        raise DataError(
            f"{where}: {name} is {one_line(repr(value), 60)}, expected a number or null; "
            "score the pairs again, with gradsift ches score"
        )
    return float(value)


@dataclass(frozen=True, kw_only=True)
class _Making:
    """How the scores were made, as far as the page tells of it."""

    source: str
    facts: dict[str, str]
    max_length: int
    problems: list[SkippedRow]
    examples: dict[int, dict[str, Any]]
    """What each token contributes, by row of the scored file."""

    @classmethod
    def of(cls, manifest: Manifest, table: _Table) -> "_Making":
        """Raises KeyError, TypeError, ValueError or AttributeError where the manifest is not as it should be."""
        settings, environment, source = manifest.settings, manifest.environment, manifest.source
        model, rendering = settings["model"], settings["rendering"]
        texts = ("where", "id", "reason", "detail")
        problems = [
            SkippedRow(row=int(problem["row"]), **{name: str(problem[name]) for name in texts})
            for problem in manifest.problems
        ]
        examples = {example["row"]: example for example in manifest.examples}
        return cls(
            source=str(source["name"]),
            facts={
                "source": f"{source['name']}, {source['num_rows']:,} rows, sha256 {source['sha256'][:12]}",
                "model": f"{environment['model']}, fingerprint {model['fingerprint'][:12]}",
                "adapter": str(environment["adapter"] or "none"),
                "dtype": f"{model['dtype']}, on {environment['device']}",
                "token mode": str(rendering["tokens"]),
                "max length": f"{rendering['max_length']:,} tokens",
                "system prompt": _beginning(rendering["system_prompt"], 200),
                "versions": ", ".join(f"{name} {version}" for name, version in environment["versions"].items()),
            },
            max_length=rendering["max_length"],
            problems=problems,
            examples={line: examples[row] for line, row in enumerate(_source_rows(table, problems)) if row in examples},
        )


def _source_rows(table: _Table, problems: Sequence[SkippedRow]) -> Iterator[int]:
    """For each line of the scored file the row of the source that it came from."""
    absent = {problem.row for problem in problems if problem.reason in _NOT_A_ROW}
    row = 0
    for problem in table.problems:
        # Text with half a surrogate pair is "not JSON" as well, but such a row is in the scored file.
        while row in absent and problem not in _NOT_A_ROW:
            row += 1
        yield row
        row += 1


def _find_making(scored: Path, source: Source, table: _Table) -> tuple[_Making | None, str]:
    """What the manifest beside the scored file says; or None, and what the page says of that."""
    unknown = "so model, settings and the contributions of single tokens are not known here"
    name = manifest_path(scored).name
    try:
        manifest = Manifest.load(scored)
        if manifest is None:
            return None, f"There is no manifest {name} beside the scores, {unknown}."
        if manifest.output["sha256"] != source.sha256:
            return None, (
                f"The manifest {name} is not of these scores: it is of a file with sha256 "
                f"{manifest.output['sha256'][:12]}, and this one has {source.sha256[:12]}, {unknown}."
            )
        return _Making.of(manifest, table), ""
    except (StoreError, KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else one_line(str(error), 300)
        return None, f"The manifest {name} cannot be used ({what}), {unknown}."


# What the numbers say


def _verdict(table: _Table, main: str, made: _Making | None) -> Iterator[str]:
    """Whether to believe the scores, in sentences."""
    num_scored = table.num_scored
    if num_scored == 0:
        yield "No pair was scored: there is nothing to rank. The reasons are at the end."
        return
    if num_scored < _FEW_PAIRS:
        yield f"Correlations say little here: only {_count(num_scored, 'pair')} could be compared."
    yield _on_length_difference(table, main)
    for name, length in product(table.measures, LENGTHS[1:]):
        if abs(rho := table.rho(name, length)) >= _CLOSELY:
            yield f"`{name}` follows {length.replace('length_', 'the length of the ')} reply {_spearman(rho)}."
    others = [(name, table.rho_of_risk(main, name)) for name in table.measures if name != main]
    if unlike := [f"`{name}` ({_signed(rho)})" for name, rho in others if rho < _LITTLE]:
        yield f"`{main}`, which ranks the pairs below, agrees little with {_listed(unlike)}: what is risky differs."
    yield _on_truncation(table.problems.count(TRUNCATED), num_scored, made)


def _on_length_difference(table: _Table, main: str) -> str:
    rhos = {name: table.rho(name, "length_difference") for name in table.measures}
    if all(math.isnan(rho) for rho in rhos.values()):
        return "Whether a measure follows the length difference cannot be said: the one or the other does not vary."
    close = [name for name, rho in rhos.items() if abs(rho) >= _CLOSELY]
    if not close:
        name = max(rhos, key=lambda name: abs(np.nan_to_num(rhos[name])))
        return f"No measure follows the length difference closely; `{name}` does so most {_spearman(rhos[name])}."
    names = _listed([f"`{name}` {_spearman(rhos[name])}" for name in close])
    follow, order = ("follows", "its order is") if len(close) == 1 else ("follow", "their orders are")
    known = [name for name in dict.fromkeys((*ATTRIBUTED, main)) if not math.isnan(rhos.get(name, math.nan))]
    others = [name for name in known if all(not abs(table.rho(name, length)) >= _CLOSELY for length in LENGTHS)]
    instead = _listed([f"`{name}` ({_signed(rhos[name])})" for name in others], "or")
    return (
        f"{names} {follow} the length difference closely: {order} largely one by length. Rank within strata of length "
        f"(`gradsift ches filter --length-strata`){f', or by {instead}' if instead else ''}."
    )


def _on_truncation(num_truncated: int, num_scored: int, made: _Making | None) -> str:
    if num_truncated == 0:
        return "No reply was truncated."
    limit = f" at {made.max_length:,} tokens" if made else ""
    advice = " Score again with a larger `--max-length`." if num_truncated >= _MUCH_TRUNCATION * num_scored else ""
    return (
        f"{_count(num_truncated, 'pair')} ({num_truncated / num_scored:.1%}) had a reply truncated{limit}: "
        f"the score tells of the beginning only.{advice}"
    )


def _lines(table: _Table) -> list[dict[str, Any]]:
    """The table of measures: one line a column, numbers as text."""
    lines = []
    for name in table.columns:
        known = table.known(name)
        digits = _digits(known)
        cuts = np.quantile(known, list(_QUANTILES.values())) if len(known) else [math.nan] * len(_QUANTILES)
        lines.append(
            {
                "name": name,
                "count": f"{len(known):,}",
                "quantiles": [_decimal(value, digits) for value in cuts],
                "rhos": [(abs(rho) >= _CLOSELY, _signed(rho)) for rho in (table.rho(name, x) for x in LENGTHS)],
            }
        )
    return lines


def _extremes(table: _Table, main: str, count: int) -> tuple[list[int], list[int]]:
    """Rows of the riskiest pairs and of the safest, each from its end; none is in both. Ties: the earlier row first."""
    risk_N = table.columns[main] * (-1 if main in _RISKIER_IF_LOW else 1)
    num_ranked = int((~np.isnan(risk_N)).sum())
    riskiest = np.argsort(-risk_N, kind="stable")[: min(count, math.ceil(num_ranked / 2))].tolist()
    upwards = np.argsort(risk_N, kind="stable")[:num_ranked]  # NaN comes last in any order
    return riskiest, upwards[~np.isin(upwards, riskiest)][:count].tolist()


# Figures


def _panels(table: _Table) -> list[dict[str, Any]]:
    """A histogram of each measure, and the measure against the length difference."""
    panels = []
    for name in table.measures:
        known = table.known(name)
        if not len(known):
            continue
        label = f"{name} (← riskier)" if name in _RISKIER_IF_LOW else f"{name} (riskier →)"
        lengths, values = table.both("length_difference", name)
        rho = _signed(table.rho(name, "length_difference"))
        digits = _digits(known)
        panels.append(
            {
                "name": name,
                "rho": rho,
                "beyond": _beyond(known),
                "beyond_either": _beyond(lengths, values),
                "histogram": data_uri(histogram(known, label=label)),
                "histogram_alt": f"{len(known):,} values of {name}, median {_decimal(float(np.median(known)), digits)}",
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
    return f"; {_count(count, 'pair')} at the rim" if count else ""


def _agreement(table: _Table) -> dict[str, str]:
    names = [*table.measures, "length_difference"]
    rhos = np.array([[table.rho_of_risk(x, y) for x in names] for y in names])
    labels = [f"−{name}" if name in _RISKIER_IF_LOW else name for name in names]
    pairs = [f"{labels[i]} and {labels[j]} {_signed(rhos[i, j])}" for i in range(len(names)) for j in range(i)]
    return {"figure": data_uri(agreement(rhos, labels)), "alt": "Spearman: " + ", ".join(pairs)}


# Pairs


def _examples(source: Source, table: _Table, main: str, made: _Making | None, rows: list[int]) -> list[dict[str, Any]]:
    """All that is shown of these pairs."""
    digits = {name: _digits(table.known(name)) for name in table.columns}
    examples = []
    for row, record in zip(rows, source.take(rows), strict=True):
        try:
            pair, problem = pair_of(record.columns or {}), ""
        except RowProblem as found:
            pair, problem = Pair(prompt="", chosen="", rejected=""), str(found)
        prompt = _turns(pair.prompt)
        tools = [("tools", _cut(json_of(pair.tools)))] if pair.tools else []
        score, attribution = float(table.columns[main][row]), made.examples.get(row) if made else None
        examples.append(
            {
                "id": _beginning(record.id, 120),
                "where": record.where,
                "values": {name: _decimal(float(table.columns[name][row]), digits[name]) for name in table.columns},
                "truncated": table.problems[row] == TRUNCATED,
                "beginning": _beginning(prompt[-1][1], 160) if prompt else "",
                "problem": problem,
                "prompt": tools + prompt,
                "replies": {"chosen": _turns(pair.chosen), "rejected": _turns(pair.rejected)},
                "tokens": _token_view(attribution, main, score, digits[main]) if attribution else None,
            }
        )
    return examples


def _turns(said: list[dict[str, Any]] | str) -> list[tuple[str, str]]:
    """(role, text) of each turn, of many only the last; a text without turns has the role "".

    What a turn holds beside its text, such as a tool call, is shown as JSON.
    """
    if isinstance(said, str):
        return [("", _cut(said))]
    turns: list[tuple[str, str]] = []
    room = _CHARS_SHOWN
    for number, turn in reversed(list(enumerate(said))):
        content = turn.get("content")
        others = {name: value for name, value in turn.items() if name not in ("role", "content") and value is not None}
        parts = [content if isinstance(content, str) else "" if content is None else json_of(content)]
        parts += [json_of(others)] if others else []
        text = _cut("\n".join(part for part in parts if part))
        room -= len(text) + _CHARS_OF_A_HEAD
        if room < 0 and turns:
            return [("", f"[… {_count(number + 1, 'earlier turn')} left out …]"), *turns]
        turns.insert(0, (str(turn.get("role", "")), text))
    return turns


def _beginning(text: str, width: int) -> str:
    """As one line; the page cuts it where its own width ends."""
    flat = " ".join(text[: 4 * width].split())
    return flat if len(flat) <= width else f"{flat[:width]}…"


def _cut(text: str) -> str:
    """A text, without its middle if it is too long for the page."""
    left_out = len(text) - _CHARS_SHOWN
    if left_out <= 0:
        return text
    head, tail = text[: _CHARS_SHOWN - _CHARS_OF_THE_END], text[-_CHARS_OF_THE_END:]
    return f"{head}\n[… {left_out:,} characters left out …]\n{tail}"


@dataclass(frozen=True, kw_only=True)
class _TokenView:
    """The two replies token by token, each token with what it contributes to the score."""

    replies: dict[str, list[tuple[str, str, str]]]
    """For chosen and rejected: (text, contribution, tint) of each token that is shown."""
    rest: dict[str, str]
    """For each reply how many tokens are not shown, and the sum of their contributions; "" if all are."""
    sums: dict[str, str]
    """The sum of each reply."""
    total: str
    """The sum of both: the score."""
    strongest: dict[str, list[tuple[str, str]]]
    """For each reply the tokens that contribute most, either way, with what they contribute."""


def _token_view(attribution: dict[str, Any], main: str, score: float, digits: int | None) -> _TokenView | str:
    """The tokens of a pair; or why they cannot be shown, in a sentence."""
    try:
        tokens = {side: [str(token) for token in attribution[side]["tokens"]] for side in ("chosen", "rejected")}
        parts = {side: _contributions(attribution, side, main) for side in tokens}
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return f"The manifest has no contributions to {main} for this pair."
    everything = np.concatenate(list(parts.values()))
    total = float(everything.sum())
    if any(len(tokens[side]) != len(parts[side]) or not len(tokens[side]) for side in tokens) or not (
        abs(total - score) <= _STRAY * np.abs(everything).sum()
    ):
        return f"The contributions in the manifest do not sum to this pair’s {main}, so they are not shown."
    scale, fine = float(np.quantile(np.abs(everything), 0.95)) or 1.0, _digits(everything)
    replies, rest, strongest = {}, {}, {}
    for side, parts_T in parts.items():
        texts = [_token(token) for token in tokens[side]]
        num_shown = min(_TOKENS_SHOWN, int(np.searchsorted(np.cumsum([len(text) for text in texts]), _CHARS_SHOWN)))
        left_out = _decimal(float(parts_T[num_shown:].sum()), digits, sign=True)
        rest[side] = f"{_count(len(texts) - num_shown, 'more token')}: {left_out}" if num_shown < len(texts) else ""
        shown = [(text, _decimal(part, fine, sign=True)) for text, part in zip(texts, parts_T.tolist(), strict=True)]
        tints = [_tint(part / scale) for part in parts_T[:num_shown].tolist()]
        replies[side] = [(text, part, tint) for (text, part), tint in zip(shown, tints, strict=False)]
        order = np.argsort(-np.abs(parts_T), kind="stable")[:_STRONGEST_SHOWN].tolist()
        strongest[side] = [(_beginning(shown[at][0], 40), shown[at][1]) for at in order]
    return _TokenView(
        replies=replies,
        rest=rest,
        strongest=strongest,
        sums={side: _decimal(float(parts_T.sum()), digits, sign=True) for side, parts_T in parts.items()},
        total=_decimal(total, digits),
    )


def _contributions(attribution: dict[str, Any], side: str, main: str) -> NDArray[np.float64]:
    """What each token of a reply adds to the measure.

    ches is ⟨S⁺, S⁻⟩ - ‖S⁺‖² and ln_ches ⟨S⁺, S⁻⟩/(n⁺n⁻) - ‖S⁺‖²/n⁺²: a token's part of ln_ches is its part of ches
    over n⁺ and its own reply's length.
    """
    if main != "ln_ches":
        return np.array(attribution[side][main], dtype=np.float64)
    num_chosen, num_own = len(attribution["chosen"]["tokens"]), len(attribution[side]["tokens"])
    return np.array(attribution[side]["ches"], dtype=np.float64) / (num_chosen * num_own)


def _token(text: str) -> str:
    """A token's text; a newline gets a sign, so that there is something to tint."""
    return text.replace("\n", "⏎\n")


def _tint(part: float) -> str:
    """A class of the style sheet: `r1` to `r5` raise the score, `f1` to `f5` lower it; none for almost nothing."""
    level = min(_TINTS, math.ceil(abs(part) * _TINTS - 0.25))
    return f"{'r' if part > 0 else 'f'}{level}" if level > 0 else ""


# Rows with a problem


def _problems(source: Source, table: _Table, made: _Making | None) -> list[dict[str, Any]]:
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
                "reason": _beginning(reason, 80),
                "count": f"{count:,}",
                "places": [(place.where, _beginning(place.id, 120), _beginning(place.detail, 300)) for place in places],
                "more": count > len(places),
            }
        )
    return lines


# Text on the page


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["quoted_as_code"] = _quoted_as_code
    return environment.get_template("pair_report.html.j2")


_UNUSUAL = re.compile(r"[^\x20-\x7e\n\t]")
_JOINERS = "\u200c\u200d"  # Persian and emoji need them


def _visible(value: Any) -> Any:
    """Text with a picture or a number for each character that has no shape of its own or turns others around."""
    return value if isinstance(value, Markup) or not isinstance(value, str) else _UNUSUAL.sub(_picture, value)


def _picture(match: re.Match[str]) -> str:
    character = match[0]
    code, category = ord(character), unicodedata.category(character)
    if (category[0] == "C" and character not in _JOINERS) or category in ("Zl", "Zp"):
        return chr(0x2400 + code) if code < 0x20 else f"⟨U+{code:04X}⟩"
    return character


def _quoted_as_code(sentence: str) -> Markup:
    """`name` → <code>name</code>."""
    parts = [escape(part) for part in sentence.split("`")]
    return Markup("").join(Markup("<code>{}</code>").format(part) if n % 2 else part for n, part in enumerate(parts))


def _digits(values: NDArray[np.float64]) -> int | None:
    """Decimals that show four digits of the larger values, none of counts; None where that asks for powers of ten."""
    if np.all(values == np.round(values)) and np.all(np.abs(values) < 1e9):
        return 0
    exponent = math.floor(math.log10(float(np.quantile(np.abs(values), 0.75)) or 1.0))
    return min(max(3 - exponent, 0), 6) if -4 < exponent < 9 else None


def _decimal(value: float, digits: int | None, *, sign: bool = False) -> str:
    """A number for people: `−12,345`, `0.125`, `1.250e−07`; `–` for NaN."""
    if math.isnan(value):
        return "–"
    style = ".3e" if digits is None else f",.{digits}f"
    return f"{value:{'+' if sign else ''}z{style}}".replace("-", "−")


def _signed(rho: float) -> str:
    return _decimal(rho, 2)


def _spearman(rho: float) -> str:
    return f"(Spearman {_signed(rho)})"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _listed(names: Sequence[str], last: str = "and") -> str:
    """`a, b and c`."""
    return f" {last} ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
