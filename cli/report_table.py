"""The numbers of a scored file, and how they were made, as its report needs them.

A value for each row, NaN for null; the manifest beside the file is used only if it is of this very file.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ches.scored import LENGTHS, PROBLEM, Manifest, manifest_path
from cli.report_text import beginning
from cli.showing import one_line
from datastore import SkippedRow
from datastore.errors import DataError, StoreError
from less.data.records import Source
from less.statistics import spearman

__all__ = ["MEASURES", "RISKIER_IF_LOW", "Making", "ScoredTable", "find_making"]

MEASURES = {
    "ches": "⟨S⁺, S⁻⟩ − ‖S⁺‖², where S is the sum of a reply’s final hidden embeddings",
    "ln_ches": "the same of the means S / n: ⟨S⁺, S⁻⟩ / (n⁺ n⁻) − ‖S⁺‖² / n⁺²",
    "alpha_ches": "minus the LM head’s part of the first-order change of log p(chosen) under a DPO step",
    "last_hidden": "inner product of the two replies’ last hidden embeddings",
    "edit_distance": "edits from one reply’s tokens to the other’s, over the longer one’s length; 0 is identical",
}
"""What pairs can be ranked by, each with what it is."""
RISKIER_IF_LOW = ("edit_distance",)
_BESIDE = (*LENGTHS, "logp_chosen", "logp_rejected")
_NOT_A_ROW = ("not JSON", "not an object")  # a line of the source that is one of these has none in the scored file


@dataclass(frozen=True, kw_only=True)
class ScoredTable:
    """The numbers of a scored file: a value for each row, NaN for null."""

    columns: dict[str, NDArray[np.float64]]
    problems: list[str | None]
    rhos: dict[frozenset[str], float] = field(default_factory=dict)

    @classmethod
    def read(cls, source: Source) -> "ScoredTable":
        """The numbers of `source`; `DataError` if it is no scored file."""
        values: dict[str, list[float]] = {}
        problems = []
        for record in source.iter_records():
            row = record.columns or {}
            values = values or {name: [] for name in (*MEASURES, *_BESIDE) if name in row}
            if not {*LENGTHS, PROBLEM, *values} <= row.keys() or not MEASURES.keys() & values.keys():
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
        """Those that are there."""
        return [name for name in MEASURES if name in self.columns]

    @property
    def num_rows(self) -> int:
        """Rows, scored or not."""
        return len(self.problems)

    @property
    def num_scored(self) -> int:
        """Rows with a measure."""
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
        return self.rho(x, y) * math.prod(-1 for name in (x, y) if name in RISKIER_IF_LOW)


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
class Making:
    """How the scores were made, as far as the page tells of it."""

    source: str
    facts: dict[str, str]
    max_length: int
    problems: list[SkippedRow]
    examples: dict[int, dict[str, Any]]
    """What each token contributes, by row of the scored file."""

    @classmethod
    def of(cls, manifest: Manifest, table: ScoredTable) -> "Making":
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
                "system prompt": beginning(rendering["system_prompt"], 200),
                "versions": ", ".join(f"{name} {version}" for name, version in environment["versions"].items()),
            },
            max_length=rendering["max_length"],
            problems=problems,
            examples={line: examples[row] for line, row in enumerate(_source_rows(table, problems)) if row in examples},
        )


def _source_rows(table: ScoredTable, problems: Sequence[SkippedRow]) -> Iterator[int]:
    """For each line of the scored file the row of the source that it came from."""
    absent = {problem.row for problem in problems if problem.reason in _NOT_A_ROW}
    row = 0
    for problem in table.problems:
        # Text with half a surrogate pair is "not JSON" as well, but such a row is in the scored file.
        while row in absent and problem not in _NOT_A_ROW:
            row += 1
        yield row
        row += 1


def find_making(scored: Path, source: Source, table: ScoredTable) -> tuple[Making | None, str]:
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
        return Making.of(manifest, table), ""
    except (StoreError, KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else one_line(str(error), 300)
        return None, f"The manifest {name} cannot be used ({what}), {unknown}."
