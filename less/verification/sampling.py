"""What is recomputed: rows of the store, and the targets that they are held against."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from datastore import RowTable
from datastore.errors import ProvenanceError
from less.data.conversations import RowProblem
from less.data.records import Record
from less.data.rendering import Rendered, Renderer
from less.data.targets import TargetSet
from less.pool import Pool

__all__ = ["MAX_SUBTASKS", "Probes", "Sample", "choose_probes", "open_sample", "rows_as_probes"]

MAX_SUBTASKS = 8
TARGETS_EACH = 2


@dataclass(frozen=True)
class Sample:
    """Rows of the store; the three run in parallel."""

    positions: NDArray[np.int64]
    records: list[Record]
    rendered: list[Rendered]


@dataclass(frozen=True)
class Probes:
    """The targets of each of J subtasks; the three run in parallel."""

    names: list[str]
    rendered: list[list[Rendered]]
    where: list[list[str]]
    num_subtasks: int | None
    """Of which these were chosen; None for rows of the store."""


def open_sample(pool: Pool, rows: RowTable, positions: NDArray[np.int64], renderer: Renderer) -> Sample:
    """The rows at these positions as the build saw them."""
    records = pool.take(rows, positions)
    rendered = []
    for record in records:
        try:
            rendered.append(renderer.render_record(record))
        except RowProblem as problem:
            raise ProvenanceError(
                f"{record.where} has features in the store and cannot be rendered now ({problem}). "
                "Use the version and the tokenizer that built it, or build it again"
            ) from None
    return Sample(positions, records, rendered)


def rows_as_probes(sample: Sample) -> Probes:
    """Each row as a subtask of its own."""
    where = [record.where for record in sample.records]
    return Probes(where, [[row] for row in sample.rendered], [[place] for place in where], None)


def choose_probes(target_sets: Sequence[TargetSet], generator: np.random.Generator) -> Probes:
    """Some targets of some subtasks."""
    subtasks = [(t, subtask) for t in target_sets for subtask in t.subtasks]
    probes = Probes([], [], [], len(subtasks))
    for number in np.sort(generator.permutation(len(subtasks))[:MAX_SUBTASKS]).tolist():
        target_set, subtask = subtasks[number]
        members = [n for n, own in enumerate(target_set.subtask_of) if own == subtask]
        picked = [members[n] for n in np.sort(generator.permutation(len(members))[:TARGETS_EACH]).tolist()]
        probes.names.append(f"{target_set.name}/{subtask}")
        probes.rendered.append([target_set.rendered[n] for n in picked])
        probes.where.append([target_set.where_of[n] for n in picked])
    return probes
