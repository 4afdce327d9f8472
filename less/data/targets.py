"""The target set: a few examples of the wanted capability, in subtasks.

A target's subtask is its `subtask` column, or the set's name where it has none.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from datastore.errors import DataError, RowError
from less.data.conversations import RowProblem, conversation_of
from less.data.records import open_source
from less.data.rendering import Rendered, Renderer

__all__ = ["SkippedRow", "TargetSet", "columns_of", "load_targets"]


@dataclass(frozen=True)
class SkippedRow:
    """A target that cannot be used, and why."""

    where: str
    """File and line, or name and row number."""
    id: str
    """Its label."""
    reason: str
    """One of `REASONS`."""
    detail: str
    """What was found."""


@dataclass(frozen=True)
class TargetSet:
    """Rendered targets. `rendered`, `subtask_of`, `ids`, `where_of` and `text_of` run in parallel."""

    name: str
    """The set's name."""
    rendered: list[Rendered]
    """The usable targets, in the order of the source."""
    subtask_of: list[str]
    """The subtask of each."""
    ids: list[str]
    """The label of each."""
    where_of: list[str]
    """Where a person finds each."""
    text_of: list[str]
    """What its turns say."""
    skipped: list[SkippedRow]
    """The targets that cannot be used."""
    sha256: str
    """Hash of the source."""

    @property
    def subtasks(self) -> list[str]:
        """The subtasks, each once, in the order in which they first appear."""
        return list(dict.fromkeys(self.subtask_of))

    def without(self, problems: Mapping[int, RowProblem]) -> "TargetSet":
        """The set without the targets that turned out to have a problem, which are listed as skipped."""
        kept = [n for n in range(len(self.ids)) if n not in problems]
        found = [SkippedRow(self.where_of[n], self.ids[n], p.reason, p.detail) for n, p in problems.items()]
        return replace(
            self,
            rendered=[self.rendered[n] for n in kept],
            subtask_of=[self.subtask_of[n] for n in kept],
            ids=[self.ids[n] for n in kept],
            where_of=[self.where_of[n] for n in kept],
            text_of=[self.text_of[n] for n in kept],
            skipped=[*self.skipped, *found],
        )


def columns_of(target_sets: Sequence[TargetSet]) -> tuple[list[tuple[str, str]], list[int]]:
    """(set, subtask) of each of the J columns that the sets have in a score matrix, and the column of each target."""
    columns = [(t.name, subtask) for t in target_sets for subtask in t.subtasks]
    return columns, [columns.index((t.name, subtask)) for t in target_sets for subtask in t.subtask_of]


def load_targets(
    data: str | os.PathLike[str] | Sequence[dict[str, Any]] | Any,
    renderer: Renderer,
    *,
    name: str | None = None,
    strict: bool = False,
) -> TargetSet:
    """Reads and renders the targets in `data`, which is anything that `open_source` takes.

    Args:
        data: the rows.
        renderer: renders them; its settings may differ from the pool's.
        name: the set's name; None: the stem of the file's name, or "targets" for rows in memory.
        strict: a target that cannot be used is an error, instead of being skipped and listed.

    Raises:
        DataError: no target can be used, or `data` cannot be read.
        RowError: a target cannot be used, under `strict`.
    """
    source = open_source(data)
    if name is None:
        name = "targets" if source.kind == "memory" else source.stem
    targets = TargetSet(
        name=name, rendered=[], subtask_of=[], ids=[], where_of=[], text_of=[], skipped=[], sha256=source.sha256
    )
    for record in source.iter_records():
        try:
            rendered = renderer.render_record(record)
        except RowProblem as problem:
            if strict:
                raise RowError(f"{record.where}: {problem}; mend the row, or leave strict mode to skip it") from None
            targets.skipped.append(SkippedRow(record.where, record.id, problem.reason, problem.detail))
            continue
        subtask = (record.columns or {}).get("subtask")
        targets.rendered.append(rendered)
        targets.subtask_of.append(name if subtask is None else str(subtask))
        targets.ids.append(record.id)
        targets.where_of.append(record.where)
        targets.text_of.append(conversation_of(record.columns or {}).text)
    if not targets.rendered:
        counts = Counter(row.reason for row in targets.skipped)
        first = targets.skipped[0]
        raise DataError(
            f"none of the {source.num_rows} targets in {source.location or source.name} can be used: "
            f"{', '.join(f'{count} {reason}' for reason, count in counts.most_common())}; "
            f"the first: {first.where}: {first.reason}: {first.detail}"
        )
    return targets
