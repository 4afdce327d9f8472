"""From preference pairs and the model that DPO starts from to a file of scores.

    pairs → PairScorer, range by range → the rows again, with the measures as columns

What a range of `shard_rows` gave is kept beside the output until the whole is written, so that a killed run goes on
where it was and gives the same numbers. How a range is computed is left to `scoring`, the file to `scored`.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ches.loading import base_of, ready_model
from ches.scored import (
    PROBLEM,
    TRUNCATED,
    Manifest,
    Parts,
    ScoredRange,
    columns_of,
    extremes,
    finished,
    pair_columns,
    write_scored,
)
from ches.scoring import ChesConfig, PairScorer
from ches.tokens import PairRenderer
from datastore import SkippedRow
from datastore.errors import DataError, SettingError
from datastore.files import hash_file
from less.data.records import Record, Source, open_source
from less.data.sources import SUFFIXES
from less.data.writing import dataset_of
from less.models import context_length, load_tokenizer
from less.progress import Progress
from less.provenance import location_of

if TYPE_CHECKING:
    import datasets

__all__ = ["PairScores", "score_pairs"]


@dataclass(frozen=True, kw_only=True)
class PairScores:
    """The scores of a data set's pairs."""

    records: tuple[Record, ...] = field(repr=False)
    """The rows that are objects, in order: only such can carry columns."""
    columns: tuple[dict[str, Any], ...] = field(repr=False)
    """What is added to each of them: the measures and `ches_problem`."""
    problems: tuple[SkippedRow, ...] = field(repr=False)
    """Rows that were not scored, and rows with a truncated reply, each with its reason."""
    num_rows: int
    """Rows of the input."""
    num_scored: int
    """Rows with measures."""
    num_computed: int
    """Rows computed by this call; 0 when the output was complete."""
    rewritten: bool
    """Whether prompt, chosen and rejected were replaced, since DPOTrainer would read the layout otherwise."""
    output: Path | None
    """The file written, if any."""
    seconds: float
    """Wall time."""

    @cached_property
    def dataset(self) -> "datasets.Dataset":
        """The rows with their scores.

        Raises:
            DataError: a column has values of several types.
        """
        return dataset_of(self.records, self.columns)


def score_pairs(
    *,
    model: "str | Path | PreTrainedModel | PeftModel",
    data: "str | Path | datasets.Dataset | Sequence[dict[str, Any]]",
    output: str | Path | None = None,
    tokenizer: "str | Path | PreTrainedTokenizerBase | None" = None,
    adapter: str | Path | None = None,
    progress: bool = True,
    **settings: Any,
) -> PairScores:
    """Score every preference pair under the model that DPO will start from.

    An output that is complete is left as it is; one that was interrupted is completed.

    Args:
        model: a folder, a hub name, or a loaded model, with or without a PEFT adapter.
        data: pairs in any layout that `ches.pairs` knows: a file, a hub name, a `datasets.Dataset`, a list of dicts.
        output: .jsonl or .parquet file; None writes nothing.
        tokenizer: where it is not the model's own.
        adapter: folder of a PEFT adapter on top of `model`, where DPO starts from one.
        progress: show progress on standard error.
        **settings: fields of `ChesConfig`.

    Raises:
        DataError: the data cannot be read, or no pair of it can be scored.
        ProvenanceError: the output was made, or begun, with other settings.
        UnsupportedError: alpha_ches or logp are asked for and the model's LM head is not linear.
        GradsiftError: see `datastore.errors`.
    """
    start = time.monotonic()
    config = ChesConfig(**settings)
    source = open_source(data)
    output = None if output is None else _checked(Path(output), source)
    named = location_of(base_of(model)) if tokenizer is None else tokenizer
    words = load_tokenizer(named, trust_remote_code=config.trust_remote_code)
    with ready_model(
        model, adapter, dtype=config.dtype, device=config.device, trust_remote_code=config.trust_remote_code
    ) as loaded:
        renderer = PairRenderer(
            words, config.rendering, tokens=config.tokens, context_length=context_length(loaded.config)
        )
        scorer = PairScorer(loaded, renderer, config)
        if output is None:
            return _joined(source, *_score_ranges(scorer, source, None, progress), None, start)
        decides = scorer.settings(source)
        if (manifest := finished(output, decides)) is not None:
            return _from_file(output, manifest, config, start)
        with Parts.open(output, decides) as parts:
            ranges, num_computed = _score_ranges(scorer, source, parts, progress)
            try:
                scores = _joined(source, ranges, num_computed, output, start)
            except DataError:
                parts.remove()  # there is nothing in them, and they would bind the next try to these settings
                raise
            write_scored(output, scores.records, scores.columns)
            Manifest(
                settings=decides,
                environment=scorer.environment(model, adapter),
                num_retries=sum(part.num_retries for part in ranges),
                source={name: getattr(source, name) for name in ("name", "kind", "location", "sha256", "num_rows")},
                output=asdict(hash_file(output)),
                num_scored=scores.num_scored,
                rewritten=scores.rewritten,
                problems=[asdict(row) for row in scores.problems],
                examples=[asdict(example) for example in extremes(e for part in ranges for e in part.examples)],
            ).write(output)
            parts.remove()
    return scores


def _checked(output: Path, source: Source) -> Path:
    if output.suffix not in SUFFIXES:
        raise SettingError(f"--output {output}: expected a name that ends in {', '.join(SUFFIXES)}")
    if source.location is not None and output.resolve() == Path(source.location):
        raise SettingError(f"--output {output} is the data itself, which it would overwrite; choose another name")
    return output


def _score_ranges(
    scorer: PairScorer, source: Source, parts: Parts | None, progress: bool
) -> tuple[list[ScoredRange], int]:
    """Every range of the source, and how many rows had to be computed."""
    step = scorer.config.shard_rows
    spans = [range(at, min(at + step, source.num_rows)) for at in range(0, source.num_rows, step)]
    found = {rows: parts.load(rows) if parts else None for rows in spans}
    missing = [rows for rows in spans if found[rows] is None]
    num_computed = sum(map(len, missing))
    with Progress(total=num_computed, description="pairs", unit="pairs", enabled=progress) as bar:
        for rows in missing:
            scored = found[rows] = scorer.score_range(source, rows, bar)
            if parts is not None:
                parts.save(rows, scored)
    return [part for part in found.values() if part is not None], num_computed


def _joined(
    source: Source, ranges: Sequence[ScoredRange], num_computed: int, output: Path | None, start: float
) -> PairScores:
    """The ranges as one, with the rows that they belong to."""
    found = [columns for part in ranges for columns in part.columns]
    rewritten = any(part.rewritten for part in ranges)
    records, columns = [], []
    for record, own in zip(source.iter_records(), found, strict=True):
        if own is not None:
            records.append(record)
            columns.append({**pair_columns(record), **own} if rewritten else own)
    problems = tuple(SkippedRow(**entry) for part in ranges for entry in part.problems)
    num_scored = sum(own is not None and own[PROBLEM] in (None, TRUNCATED) for own in found)
    if not num_scored:
        raise DataError(
            f"no pair of {source.location or source.name} can be scored; the first: {problems[0].where}: "
            f"{problems[0].reason}: {problems[0].detail}"
        )
    return PairScores(
        records=tuple(records),
        columns=tuple(columns),
        problems=problems,
        num_rows=source.num_rows,
        num_scored=num_scored,
        num_computed=num_computed,
        rewritten=rewritten,
        output=output,
        seconds=time.monotonic() - start,
    )


def _from_file(output: Path, manifest: Manifest, config: ChesConfig, start: float) -> PairScores:
    """The scores of a finished file."""
    names = [*columns_of(config.measure_names), PROBLEM]
    records = tuple(open_source(output).iter_records())
    return PairScores(
        records=records,
        columns=tuple({name: (record.columns or {}).get(name) for name in names} for record in records),
        problems=tuple(SkippedRow(**entry) for entry in manifest.problems),
        num_rows=manifest.source["num_rows"],
        num_scored=manifest.num_scored,
        num_computed=0,
        rewritten=manifest.rewritten,
        output=output,
        seconds=time.monotonic() - start,
    )
