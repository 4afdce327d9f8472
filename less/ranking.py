"""Select from a finished store and write what was selected, with the reasons beside it.

    store + targets → InfluenceScores → Selection → files

The pool's text is read once, for the selected rows, when they are written. Scoring is `less.scoring`'s
business, the strategies are `less.selection`'s.
"""

import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from datastore import Datastore
from datastore.errors import SettingError
from less.checkpoints import EvidenceWarning
from less.data.records import Record, Source
from less.data.sources import JSON_LINES, json_of
from less.data.targets import SkippedRow, TargetSet
from less.data.writing import dataset_of, write_lines, write_selected
from less.influence import InfluenceScores
from less.methods import open_scorer
from less.pool import Pool
from less.scoring import ScoreConfig
from less.selection import SET_ASIDE, num_to_select, ranks, select_round_robin, select_top

if TYPE_CHECKING:
    import datasets

__all__ = ["COMBINATIONS", "Selection", "select"]

COMBINATIONS = ("max", "round-robin")


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The rows selected for one target set, or for several together, best first."""

    name: str
    """The target set, or their names joined by `+`."""
    positions: NDArray[np.int64]
    """Positions among the store's scored rows."""
    scores: NDArray[np.float32]
    """Their influence scores."""
    subtasks: tuple[str, ...]
    """The subtask that gives each its score."""
    records: tuple[Record, ...]
    """The rows themselves, as they stand in the pool."""
    influence: InfluenceScores
    """The scores of every row."""
    skipped_targets: tuple[SkippedRow, ...]
    """Targets left out, each with its reason."""
    output: Path | None
    """The file written, if any."""

    @property
    def ids(self) -> tuple[str, ...]:
        """Labels of the selected rows."""
        return tuple(record.id for record in self.records)

    @property
    def columns(self) -> list[dict[str, Any]]:
        """What is added to each row: `influence_score`, `influence_rank` (from 1), `influence_subtask`."""
        return [
            {"influence_score": float(score), "influence_rank": rank, "influence_subtask": subtask}
            for rank, (score, subtask) in enumerate(zip(self.scores, self.subtasks, strict=True), start=1)
        ]

    @cached_property
    def dataset(self) -> "datasets.Dataset":
        """The selected rows, with these columns; None where a row lacks a column of another.

        Raises:
            DataError: a column has values of several types.
        """
        return dataset_of(self.records, self.columns)


def select(
    *,
    datastore: str | Path | Datastore,
    targets: Any,
    output: str | Path | None = None,
    scores: str | Path | None = None,
    fraction: float | None = None,
    count: int | None = None,
    combine: str | None = None,
    data: Any = None,
    model: str | Path | PreTrainedModel | None = None,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    checkpoints: str | Path | Sequence[str | Path] | None = None,
    progress: bool = True,
    **settings: Any,
) -> list[Selection]:
    """Select the most influential rows of a store: for each target set, or one selection for all.

    Args:
        datastore: a sealed store.
        targets: a file, data set or list of dicts; several as a list, or as a dict that names them.
        output: a .jsonl or .parquet file, or a folder for one file a selection; None writes nothing.
        scores: likewise, a .jsonl file or a folder, for one line a candidate.
        fraction: of the scored rows and those that a prefilter set aside, above 0 and at most 1; the ceiling is taken.
        count: number of rows; one of `fraction` and `count` is needed.
        combine: None for a selection each; `max` ranks by the best subtask of any target set; `round-robin`
            lets the target sets take turns.
        data: the pool, where it is not where the build found it (needed for rows given in memory).
        model, tokenizer, checkpoints: where they are not where the build found them.
        progress: show progress on standard error.
        **settings: fields of `ScoreConfig`.

    Returns:
        one `Selection` a target set, or a list of one with `combine`.

    Raises:
        DataError: no usable target, or the pool has changed since the build.
        ProvenanceError: the model or a checkpoint is not the one that the store was built with.
        SettingError: fraction, count or output do not fit.
    """
    store = datastore if isinstance(datastore, Datastore) else Datastore.open(datastore)
    num_set_aside = store.manifest.counts["num_skipped"].get(SET_ASIDE, 0)
    num_selected = num_to_select(store.num_rows, fraction=fraction, count=count, num_set_aside=num_set_aside)
    if combine is not None and combine not in COMBINATIONS:
        raise SettingError(f"combine must be one of {', '.join(COMBINATIONS)}, got {combine!r}")
    config, pool = ScoreConfig(**settings), Pool(store, data)
    scorer = open_scorer(
        store, config, model=model, tokenizer=tokenizer, checkpoints=checkpoints, pool=pool, progress=progress
    )
    target_sets = scorer.load_targets(targets)
    _warn_of_other_targets(store, target_sets)
    names = [t.name for t in target_sets]
    names = names if combine is None else ["+".join(names)]
    output_files = _files(output, names, (*JSON_LINES, ".parquet"))
    score_files = _files(scores, names, JSON_LINES)
    _check_writable([*output_files, *score_files], pool.sources)
    influence, target_sets = scorer.score(target_sets)
    groups = [[t] for t in target_sets] if combine is None else [target_sets]
    selections = []
    for group, name, output_file, score_file in zip(groups, names, output_files, score_files, strict=True):
        own = influence.of(*(t.name for t in group))
        positions, subtask_of = _choose(own, num_selected, by_turns=combine == "round-robin")
        selection = Selection(
            name=name,
            positions=positions,
            scores=own.scores_NJ[positions, subtask_of],
            subtasks=tuple(own.subtasks[j] for j in subtask_of),
            records=tuple(pool.take(own.rows, positions)),
            influence=own,
            skipped_targets=tuple(row for t in group for row in t.skipped),
            output=output_file,
        )
        if output_file is not None:
            write_selected(output_file, selection.records, selection.columns, pool.kind)
        if score_file is not None:
            write_lines(score_file, _score_lines(store, own))
        selections.append(selection)
    return selections


def _warn_of_other_targets(store: Datastore, target_sets: Sequence[TargetSet]) -> None:
    """The rows that a prefilter kept are good for its own targets: others may miss their best."""
    prefilter = store.settings.get("prefilter")
    if prefilter is None:
        return
    if strange := [t.name for t in target_sets if t.sha256 not in prefilter["targets"].values()]:
        warnings.warn(
            f"{', '.join(strange)}: the rows of {store.path} were chosen for other targets "
            f"({', '.join(prefilter['targets'])}), and the best ones for these may have been set aside. Build a store "
            "with these --targets, or without --prefilter",
            EvidenceWarning,
            stacklevel=3,
        )


def _choose(influence: InfluenceScores, count: int, *, by_turns: bool) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions of the selected rows, and the column that gives each its score."""
    if not by_turns:
        positions = select_top(influence.score_N, count)
        return positions, influence.scores_NJ[positions].argmax(axis=1)
    sets = list(dict.fromkeys(influence.target_sets))
    columns_S = [np.array([j for j, name in enumerate(influence.target_sets) if name == s]) for s in sets]
    best_NS = np.stack([influence.scores_NJ[:, columns].max(axis=1) for columns in columns_S], axis=1)
    positions, picked_by = select_round_robin(best_NS, count)
    subtask_of = [
        columns_S[s][influence.scores_NJ[n, columns_S[s]].argmax()] for n, s in zip(positions, picked_by, strict=True)
    ]
    return positions, np.array(subtask_of, np.int64)


def _score_lines(store: Datastore, influence: InfluenceScores) -> Iterator[str]:
    """One JSON object a candidate, in the pool's order; a skipped row has its reason in place of scores."""
    rows, rank_N = influence.rows, ranks(influence.score_N)
    position = 0
    for span in store.manifest.ranges:
        skipped = {row.row: row for row in span.skipped}
        for row in range(span.start, span.stop):
            line: dict[str, Any]
            if row in skipped:
                line = {"id": skipped[row].id, "score": None, "subtask": None, "rank": None, "scores": {}}
                line["skipped"] = skipped[row].reason
            else:
                line = {
                    "id": rows.ids[position],
                    "score": float(influence.score_N[position]),
                    "subtask": influence.subtask_N[position],
                    "rank": int(rank_N[position]),
                    "scores": dict(zip(influence.subtasks, influence.scores_NJ[position].tolist(), strict=True)),
                }
                position += 1
            yield json_of(line | {"source": span.source, "row": row})


def _files(path: str | Path | None, names: Sequence[str], suffixes: Sequence[str]) -> list[Path | None]:
    """The file of each selection: `path` itself, or one by name inside it where it names a folder.

    Raises:
        SettingError: a single file was named for several selections, its format is not among those of
            `suffixes`, or a selection's name cannot name a file.
    """
    if path is None:
        return [None] * len(names)
    path = Path(path)
    if path.is_dir() or not path.suffix:
        for name in names:
            if f"{name}.jsonl" != Path(f"{name}.jsonl").name:
                raise SettingError(f"the target set {name!r} cannot name a file in {path}; give it another name")
        return [path / f"{name}.jsonl" for name in names]
    if path.suffix not in suffixes:
        raise SettingError(f"cannot write {path}: a file must end in {', '.join(suffixes)}, a folder has no suffix")
    if len(names) > 1:
        raise SettingError(
            f"{path} is one file, and {len(names)} target sets give a selection each; name a folder, or make one "
            f"selection with --combine {' or '.join(COMBINATIONS)}"
        )
    return [path]


def _check_writable(files: Sequence[Path | None], sources: Sequence[Source]) -> None:
    """Raise `SettingError` for a file that cannot be written, is asked for twice, or is the pool itself."""
    pool = {source.location: source.name for source in sources if source.location is not None}
    wanted: set[Path] = set()
    for file in files:
        if file is None:
            continue
        path = file.absolute().resolve()
        if path in wanted:
            raise SettingError(f"{file} is asked for both the selection and the scores; name another for one of them")
        wanted.add(path)
        if found := pool.keys() & {str(path), *map(str, path.parents)}:
            raise SettingError(f"{file} would write over the pool's {pool[min(found)]}; name another file")
        above = next(folder for folder in path.parents if folder.exists())
        if path.is_dir() or not above.is_dir() or not os.access(above, os.W_OK):
            raise SettingError(f"{file} cannot be written; name a file in a folder that can be")
