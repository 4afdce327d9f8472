"""Select from a finished store and write what was selected, with the reasons beside it.

    store + targets → InfluenceScores → Candidates → Choice → Selection → files

The pool's text is read once, for the selected rows, when they are written; and once before, if a column of it is
selected by. Scoring is `less.scoring`'s business, the strategies are `less.selection`'s.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from datastore import Datastore
from datastore.errors import SettingError
from datastore.similarity import GradientSpace
from datastore.sketch import SignSketch
from less.checkpoints import EvidenceWarning
from less.data.records import Record
from less.data.sources import JSON_LINES, json_of
from less.data.targets import SkippedRow, TargetSet
from less.data.writing import check_outputs, dataset_of, write_lines, write_selected
from less.influence import InfluenceScores
from less.methods import LOOKS_AT_TARGETS, method_of, open_scorer
from less.pool import Pool
from less.scoring import ScoreConfig
from less.selection import Candidates, Choice, Labels, SelectConfig, choose, num_to_select, ranks
from less.selection.candidates import Features
from less.statistics import spearman

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["COMBINATIONS", "Selection", "select"]

COMBINATIONS = ("max", "round-robin")
LENGTH_SAMPLE = 100_000
FEW_ROWS = 30
MOSTLY = 0.5
"""Of the variance of ranks."""
SKETCH_DIM = 4096
"""Columns of a row that is compared with others: a similarity ρ is then off by (1 − ρ²) / 64, root mean square."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The rows selected for one target set, or for several together, best first."""

    name: str
    """The target set, or their names joined by `+`."""
    positions: NDArray[np.int64]
    """Positions among the store's scored rows."""
    scores: NDArray[np.float32]
    """Their influence scores."""
    choice: Choice
    """Why each was taken, what was passed over, and what could not be had."""
    away: NDArray[np.float32] | None
    """How much each points to the negative targets, if there are any."""
    influence: InfluenceScores
    """The scores of every row."""
    pool: Pool
    """Where the rows themselves are."""
    num_targets: int
    """Targets that were used."""
    skipped_targets: tuple[SkippedRow, ...]
    """Targets left out, each with its reason."""
    output: Path | None
    """The file written, if any."""

    @cached_property
    def records(self) -> tuple[Record, ...]:
        """The rows themselves, as they stand in the pool; where a file has them, read when they are first asked for.

        Raises:
            DataError: the pool has changed since.
        """
        return tuple(self.iter_records())

    def iter_records(self) -> Iterator[Record]:
        """`records`, with some of them in memory at a time."""
        return self.pool.iter_take(self.influence.rows, self.positions)

    @cached_property
    def subtasks(self) -> tuple[str, ...]:
        """The subtask that gives each its score."""
        return tuple(self.influence.subtasks[j] for j in self.choice.column_of.tolist())

    @property
    def ids(self) -> tuple[str, ...]:
        """Labels of the selected rows."""
        return tuple(record.id for record in self.records)

    @property
    def columns(self) -> list[dict[str, Any]]:
        """What is added to each row: `influence_score`, `influence_rank` (from 1), `influence_subtask`,
        `influence_reason`, and with negative targets `influence_away`."""
        return list(self.iter_columns())

    def iter_columns(self) -> Iterator[dict[str, Any]]:
        """`columns`, one at a time."""
        subtasks, reasons = self.influence.subtasks, self.choice.reasons
        taken = zip(self.scores, self.choice.column_of, self.choice.reason_of, strict=True)
        for n, (score, column, reason) in enumerate(taken):
            added: dict[str, Any] = {
                "influence_score": float(score),
                "influence_rank": n + 1,
                "influence_subtask": subtasks[column],
                "influence_reason": reasons[reason],
            }
            yield added if self.away is None else added | {"influence_away": float(self.away[n])}

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
    config: str | Path | None = None,
    combine: str | None = None,
    away_from: Any = None,
    data: Any = None,
    model: "str | Path | PreTrainedModel | None" = None,
    tokenizer: "str | Path | PreTrainedTokenizerBase | None" = None,
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
        config: a TOML file of `SelectConfig`'s fields; those among `settings` stand in place of the file's.
        combine: None for a selection each; `max` ranks by the best subtask of any target set; `round-robin`
            lets the target sets take turns.
        away_from: negative targets, given like `targets`: rows whose gradients point to them score lower or are left
            out, see `SelectConfig.away_weight` and `away_above`.
        data: the pool, where it is not where the build found it (needed for rows given in memory).
        model, tokenizer, checkpoints: where they are not where the build found them.
        progress: show progress on standard error.
        **settings: fields of `SelectConfig`, such as `fraction`, `count` or `token_budget`, one of which is needed, and
            of `ScoreConfig`; `seed` is of both.

    Returns:
        one `Selection` a target set, or a list of one with `combine`.

    Raises:
        DataError: no usable target, or the pool has changed since the build.
        ProvenanceError: the model or a checkpoint is not the one that the store was built with.
        SettingError: a setting does not fit, or the pool has no such column.
        TypeError: no such setting.
    """
    store = datastore if isinstance(datastore, Datastore) else Datastore.open(datastore)
    if combine is not None and combine not in COMBINATIONS:
        raise SettingError(f"combine must be one of {', '.join(COMBINATIONS)}, got {combine!r}")
    scoring, strategy, compared_by = _configs(settings, config, by_turns=combine == "round-robin")
    num_set_aside = store.num_set_aside
    if strategy.token_budget is None:  # what cannot be had is said before anything is computed
        num_to_select(store.num_rows, fraction=strategy.fraction, count=strategy.count, num_set_aside=num_set_aside)
    if away_from is None and (strategy.away_weight is not None or strategy.away_above is not None):
        raise SettingError("away_weight and away_above are about negative targets; give those with --away-from")
    method = method_of(store, scoring)
    if away_from is not None and method not in LOOKS_AT_TARGETS:
        raise SettingError(
            f"the method {method} does not look at targets, so it cannot tell which rows point to those of away_from; "
            f"choose one of {', '.join(LOOKS_AT_TARGETS)}, or leave out --away-from"
        )
    pool = Pool(store, data)
    labels = _labels_of(pool, store, strategy.columns)
    scorer = open_scorer(
        store, scoring, model=model, tokenizer=tokenizer, checkpoints=checkpoints, pool=pool, progress=progress
    )
    target_sets = scorer.load_targets(targets)
    avoided = [] if away_from is None else _named_apart(scorer.load_targets(away_from), target_sets)
    _warn_of_other_targets(store, [*target_sets, *avoided])
    names = [t.name for t in target_sets]
    names = names if combine is None else ["+".join(names)]
    output_files = _files(output, names, (*JSON_LINES, ".parquet"))
    score_files = _files(scores, names, JSON_LINES)
    inputs = [source.location for source in pool.sources] + [config, *_paths_in(targets), *_paths_in(away_from)]
    check_outputs([*output_files, *score_files], inputs)
    influence, scored_sets = scorer.score([*target_sets, *avoided])
    target_sets, avoided = scored_sets[: len(target_sets)], scored_sets[len(target_sets) :]
    away_N = influence.of(*(t.name for t in avoided)).score_N if avoided else None
    features_of = _features_of(store, compared_by, scoring.verify) if strategy.needs_features else None
    groups = [[t] for t in target_sets] if combine is None else [target_sets]
    selections = []
    for group, name, output_file, score_file in zip(groups, names, output_files, score_files, strict=True):
        own = influence.of(*(t.name for t in group))
        candidates = Candidates.of(
            own, away_N=away_N, labels=labels, features_of=features_of, num_set_aside=num_set_aside
        )
        if scoring.method not in ("length", "random"):
            _warn_of_length(name, own)
        choice = choose(candidates, strategy)
        selection = Selection(
            name=name,
            positions=choice.positions,
            scores=choice.scores,
            choice=choice,
            away=None if away_N is None else away_N[choice.positions],
            influence=own,
            pool=pool,
            num_targets=sum(len(t.ids) for t in group),
            skipped_targets=tuple(row for t in [*group, *avoided] for row in t.skipped),
            output=output_file,
        )
        if output_file is None:
            _ = selection.records
        else:
            write_selected(output_file, selection.iter_records(), selection.iter_columns(), pool.kind)
        if score_file is not None:
            write_lines(score_file, _score_lines(store, own, away_N, choice))
        selections.append(selection)
    return selections


def _warn_of_length(name: str, influence: InfluenceScores) -> None:
    """A ranking that lengths explain has to be better than lengths alone to be worth its cost."""
    some = slice(None, None, max(1, len(influence.score_N) // LENGTH_SAMPLE))
    correlation = spearman(influence.score_N[some], influence.rows.num_supervised_N[some])
    if len(influence.score_N) >= FEW_ROWS and correlation**2 >= MOSTLY:
        longer = "longer" if correlation > 0 else "shorter"
        warnings.warn(
            f"{name}: the ranking is mostly length: it prefers {longer} replies (Spearman {correlation:.2f} with "
            "the number of supervised tokens). Hold it against `--method length` with `gradsift evaluate`",
            EvidenceWarning,
            stacklevel=3,
        )


def _configs(
    settings: dict[str, Any], file: str | Path | None, *, by_turns: bool
) -> tuple[ScoreConfig, SelectConfig, str | None]:
    """The settings of scoring and of choosing, and by which features rows are compared with each other.

    `TypeError` for a word that neither has.
    """
    of_scoring, of_choosing = ({field.name for field in fields(kind)} for kind in (ScoreConfig, SelectConfig))
    if strange := settings.keys() - of_scoring - of_choosing:
        raise TypeError(f"select() got an unexpected keyword argument {min(strange)!r}")
    chosen = {name: value for name, value in settings.items() if name in of_choosing}
    strategy = SelectConfig(**chosen) if file is None else SelectConfig.load(file, **chosen)
    if by_turns:
        if strategy.turns == "subtask":
            raise SettingError(
                "combine round-robin lets target sets take turns, and turns is 'subtask'; give one of them"
            )
        strategy = replace(strategy, turns="target-set")
    scoring = {name: value for name, value in settings.items() if name in of_scoring}
    compared_by = scoring.get("feature_set")
    if strategy.needs_features and scoring.get("method") not in (None, "less"):
        scoring["feature_set"] = None  # a baseline scores by none, and refuses one
    return ScoreConfig(**scoring), strategy, compared_by


def _named_apart(avoided: Sequence[TargetSet], target_sets: Sequence[TargetSet]) -> list[TargetSet]:
    """The negative sets under names that no target set has."""
    if same := {t.name for t in avoided} & {t.name for t in target_sets}:
        raise SettingError(f"{min(same)} is both to be learnt and to be avoided; name another file for one of them")
    return [replace(t, name=f"away from {t.name}") for t in avoided]


def _labels_of(pool: Pool, store: Datastore, columns: Sequence[str]) -> dict[str, Labels]:
    """Each row's values in these columns of the pool.

    Raises:
        SettingError: no row has such a column.
    """
    if not columns:
        return {}
    known: dict[str, None] = {}

    def iter_values() -> Iterator[list[Any]]:
        for record in pool.iter_records(store.rows(verify=False)):
            own = record.columns or {}
            known.update(dict.fromkeys(own))
            yield [own.get(name) for name in columns]

    labels = Labels.of_columns(iter_values(), len(columns))
    if missing := [name for name in columns if name not in known]:
        raise SettingError(f"the pool has no column {missing[0]!r} to select by; it has {', '.join(known)}")
    return dict(zip(columns, labels, strict=True))


def _features_of(store: Datastore, feature_set: str | None, verify: bool) -> Features:
    """Rows as vectors whose inner products are similarities in gradient space, wide ones sketched."""
    space = GradientSpace(store, feature_set, verify=verify)
    sketch = SignSketch(list(space.weights), space.width // len(space.weights), SKETCH_DIM, seed=0)
    width = min(SKETCH_DIM, space.width)

    def features_of(positions: NDArray[np.int64]) -> NDArray[np.float32]:
        found_nd = np.empty((len(positions), width), np.float32)
        for start in range(0, len(positions), space.rows_at_once):
            vectors_nX = space.vectors(positions[start : start + space.rows_at_once])
            found_nd[start : start + len(vectors_nX)] = vectors_nX if width == space.width else sketch.unit(vectors_nX)
        return found_nd

    return features_of


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


def _score_lines(
    store: Datastore, influence: InfluenceScores, away_N: NDArray[np.float32] | None, choice: Choice
) -> Iterator[str]:
    """One JSON object a candidate, in the pool's order, each with the same fields; a skipped row has no scores.

    `selected` is a row's rank in the selection, `passed_over` the rule that left it out when its turn had come.
    """
    rank_N, ids, position = ranks(influence.score_N), iter(influence.rows.ids), 0
    selected_N = np.zeros(len(rank_N), np.int64)
    selected_N[choice.positions] = np.arange(1, len(choice.positions) + 1)
    rules, rule_N = [None, *choice.passed_over], np.zeros(len(rank_N), np.int32)
    for code, positions in enumerate(choice.passed_over.values(), start=1):
        rule_N[positions] = code
    nothing = {"selected": None, "passed_over": None, "skipped": None} | ({} if away_N is None else {"away": None})
    for span in store.manifest.ranges:
        skipped = {row.row: row for row in store.left_out(span)}
        for row in range(span.start, span.stop):
            line: dict[str, Any]
            if row in skipped:
                line = {"id": skipped[row].id, "score": None, "subtask": None, "rank": None, "scores": {}}
                line |= nothing | {"skipped": skipped[row].reason}
            else:
                line = {
                    "id": next(ids),
                    "score": float(influence.score_N[position]),
                    "subtask": influence.subtasks[influence.column_N[position]],
                    "rank": int(rank_N[position]),
                    "scores": dict(zip(influence.subtasks, influence.scores_NJ[position].tolist(), strict=True)),
                    **nothing,
                    "selected": int(selected_N[position]) or None,
                    "passed_over": rules[rule_N[position]],
                }
                if away_N is not None:
                    line["away"] = float(away_N[position])
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


def _paths_in(given: Any) -> list[str | Path]:
    """The files among what is given as targets."""
    if isinstance(given, Mapping):
        return [path for part in given.values() for path in _paths_in(part)]
    if isinstance(given, list | tuple):
        return [path for part in given for path in _paths_in(part) if not isinstance(part, Mapping)]
    return [given] if isinstance(given, str | Path) else []
