"""A scored file: the pairs as they came, with the measures as columns, and a manifest beside it.

    SCORED                  every row of the input, in its order, with the columns of `columns_of` and `ches_problem`
    SCORED.manifest.json    how it was made, the rows with a problem, and the extreme pairs token by token
    SCORED.parts/           finished ranges of rows while the work goes on; gone once SCORED is whole

A row that cannot be scored has nulls and its reason in `ches_problem`; a row with a truncated reply has both its
measures and the reason "truncated reply". Scores are compared within one file only: they depend on the model, its
dtype, the chat template and the length limit, all of which the manifest names.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from ches.pairs import pair_of
from datastore.build import differences
from datastore.errors import DamagedStoreError, FormatVersionError, ProvenanceError, StoreError
from datastore.files import hash_file, lock_folder, make_folder, write_atomic
from less.data.records import Record, RowProblem, write_selected

__all__ = [
    "ATTRIBUTED",
    "MEASURES",
    "NUM_EXAMPLES",
    "PROBLEM",
    "TRUNCATED",
    "Example",
    "Manifest",
    "Parts",
    "ScoredRange",
    "columns_of",
    "extremes",
    "finished",
    "manifest_path",
    "pair_columns",
    "write_scored",
]

FORMAT, VERSION = "gradsift-ches-scores", 1
PROBLEM = "ches_problem"
TRUNCATED = "truncated reply"
LENGTHS = ("length_difference", "length_chosen", "length_rejected")
"""Columns that are always there: no score means much without them."""
ATTRIBUTED = ("ches", "ln_ches", "alpha_ches")
"""Measures that are sums over tokens."""
MEASURES = {
    "ches": ("ches",),
    "ln_ches": ("ln_ches",),
    "alpha_ches": ("alpha_ches",),
    "last_hidden": ("last_hidden",),
    "edit_distance": ("edit_distance",),
    "length_difference": ("length_difference",),
    "logp": ("logp_chosen", "logp_rejected"),
}
"""What can be asked for, and the columns that it fills."""
NUM_EXAMPLES = 10
"""Riskiest, and as many safest, pairs of each attributed measure that are kept token by token."""


def columns_of(measures: Sequence[str]) -> list[str]:
    """The columns that a scored file has for these measures, in its order, `ches_problem` left out."""
    asked = [column for measure in MEASURES if measure in measures for column in MEASURES[measure]]
    scores = [column for column in asked if not column.startswith("logp") and column not in LENGTHS]
    return [*scores, *LENGTHS, *(column for column in asked if column.startswith("logp"))]


@dataclass(frozen=True, kw_only=True)
class Example:
    """One pair token by token: what each token adds to each measure that is a sum over tokens."""

    row: int
    """Row number in the source."""
    values: dict[str, float]
    """The measures themselves."""
    chosen: dict[str, list[Any]]
    """`tokens`, the text of each, and under each of `ches` and `alpha_ches` that was measured its terms."""
    rejected: dict[str, list[Any]]
    """Likewise."""


@dataclass(frozen=True, kw_only=True)
class ScoredRange:
    """What one range of rows gave."""

    columns: list[dict[str, Any] | None]
    """For each row its columns with `ches_problem`; None for a row that is no JSON object."""
    problems: list[dict[str, Any]]
    """Rows with a problem: the fields of a `SkippedRow`."""
    examples: list[Example]
    """The extreme pairs of the range."""
    rewritten: bool
    """Whether a row has a layout that DPOTrainer would read otherwise."""
    num_retries: int
    """Batches halved for want of GPU memory."""

    @classmethod
    def from_json(cls, doc: dict[str, Any]) -> Self:
        """The inverse of `dataclasses.asdict`."""
        return cls(**{**doc, "examples": [Example(**example) for example in doc["examples"]]})


def extremes(examples: Iterable[Example], count: int = NUM_EXAMPLES) -> list[Example]:
    """The `count` riskiest and `count` safest under each attributed measure, each once, in row order."""
    known = {example.row: example for example in examples}
    chosen: set[int] = set()
    for measure in ATTRIBUTED:
        ranked = sorted(
            (row for row in known if measure in known[row].values), key=lambda row: (known[row].values[measure], row)
        )
        chosen |= {*ranked[:count], *ranked[-count:]}
    return [known[row] for row in sorted(chosen)]


class Parts:
    """Finished ranges of an unfinished output: the folder `OUTPUT.parts`, held by one process at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    @contextmanager
    def open(cls, output: Path, settings: Mapping[str, Any]) -> Iterator[Self]:
        """The parts of `output`, if they were made with these settings.

        Raises:
            ProvenanceError: they were made with others, each of which is named.
            StoreLockedError: another process is at work on them.
        """
        folder = parts_folder(output)
        make_folder(folder)
        lock = lock_folder(folder)
        try:
            asked = json.loads(json.dumps(settings))
            if (made := folder / "settings.json").exists():
                found = _read(made)
                if different := differences(found, asked, str(folder)):
                    raise ProvenanceError(
                        f"{output} was begun with other settings: {'; '.join(different)}. Rerun with those, choose "
                        f"another --output, or delete {folder} to begin again"
                    )
            else:
                _write(made, asked)
            yield cls(folder)
        finally:
            if not any(folder.glob("*-*.json")):  # nothing that a rerun could go on from
                shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)

    def load(self, rows: range) -> ScoredRange | None:
        """What a range gave, if it is finished."""
        path = self._path(rows)
        return ScoredRange.from_json(_read(path)) if path.exists() else None

    def save(self, rows: range, scored: ScoredRange) -> None:
        """Keep what a range gave."""
        _write(self._path(rows), asdict(scored))

    def remove(self) -> None:
        """Leave nothing behind."""
        shutil.rmtree(self.folder)

    def _path(self, rows: range) -> Path:
        return self.folder / f"{rows.start:010d}-{rows.stop:010d}.json"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What is known of a scored file, in `SCORED.manifest.json`."""

    settings: dict[str, Any]
    """All that decides the scores: model, rendering, token mode, measures, source."""
    environment: dict[str, Any]
    """Machine and versions; recorded, never compared."""
    source: dict[str, Any]
    """Name, kind, location, sha256 and number of rows of the input."""
    output: dict[str, Any]
    """sha256 and bytes of the scored file."""
    num_scored: int
    """Rows with measures."""
    num_retries: int
    """Batches halved for want of GPU memory: it shows in the last digits."""
    rewritten: bool
    """Whether prompt, chosen and rejected were replaced, since DPOTrainer would read the layout otherwise."""
    problems: list[dict[str, Any]]
    """Rows with a problem: row, where, id, reason, detail."""
    examples: list[dict[str, Any]]
    """The extreme pairs, as `Example`."""

    @classmethod
    def load(cls, scored: str | Path) -> Self | None:
        """The manifest beside a scored file; None where there is none.

        Raises:
            DamagedStoreError: it cannot be read.
            FormatVersionError: a newer version wrote it.
        """
        path = manifest_path(scored)
        if not path.exists():
            return None
        doc = _read(path)
        if doc.get("format") == FORMAT and isinstance(doc.get("version"), int) and doc["version"] > VERSION:
            raise FormatVersionError(
                f"{path} has format version {doc['version']}; this gradsift reads up to {VERSION}. "
                "Upgrade it: `pip install --upgrade gradsift`"
            )
        fields = {name: value for name, value in doc.items() if name not in ("format", "version")}
        if doc.get("format") != FORMAT or fields.keys() != cls.__dataclass_fields__.keys():
            raise _damaged(path, f"it is not a manifest of the format {FORMAT}")
        return cls(**fields)

    def write(self, scored: Path) -> None:
        """Write it beside the scored file."""
        _write(manifest_path(scored), {"format": FORMAT, "version": VERSION, **asdict(self)})


def manifest_path(scored: str | Path) -> Path:
    """Where the manifest of a scored file lies."""
    return Path(scored).with_name(f"{Path(scored).name}.manifest.json")


def parts_folder(output: Path) -> Path:
    """Where the ranges of an unfinished output lie."""
    return output.with_name(f"{output.name}.parts")


def finished(output: Path, settings: Mapping[str, Any]) -> Manifest | None:
    """The manifest of `output` if it is whole and was made with these settings; None if it is still to be made.

    Raises:
        ProvenanceError: it was made with others, or is another file: it would be overwritten.
    """
    if not output.exists():
        return None
    manifest = Manifest.load(output)
    if manifest is None and parts_folder(output).exists():
        return None  # the run was killed after it wrote the rows and before it wrote the manifest
    if manifest is None:
        raise ProvenanceError(f"{output} exists and is no scored file; choose another --output, or delete it")
    if different := differences(manifest.settings, json.loads(json.dumps(settings)), str(output)):
        raise ProvenanceError(
            f"{output} was made with other settings: {'; '.join(different)}. Choose another --output, or delete it"
        )
    if hash_file(output).sha256 != manifest.output["sha256"]:
        raise ProvenanceError(f"{output} has been changed since it was scored; choose another --output, or delete it")
    shutil.rmtree(parts_folder(output), ignore_errors=True)  # of a run killed after its very last file
    return manifest


def write_scored(output: Path, records: Sequence[Record], columns: Sequence[dict[str, Any]]) -> None:
    """Write the rows with their columns."""
    try:
        write_selected(output, records, columns)
    except OSError as error:
        raise StoreError(f"cannot write {output}: {error.strerror or error}. Choose another --output") from error


def pair_columns(record: Record) -> dict[str, Any]:
    """`prompt`, `chosen` and `rejected` as they were scored; nulls where the row holds no pair.

    What such a row says is text where the others have messages: no table can hold both.
    """
    try:
        pair = pair_of(record.columns or {})
    except RowProblem:
        return dict.fromkeys(("prompt", "chosen", "rejected"))
    return {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}


def _read(path: Path) -> dict[str, Any]:
    try:
        doc = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from None
    if not isinstance(doc, dict):
        raise _damaged(path, "it is no JSON object")
    return doc


def _damaged(path: Path, what: str) -> DamagedStoreError:
    return DamagedStoreError(f"{path} is damaged: {what}. Delete it and rerun the same `gradsift ches score` command")


def _write(path: Path, doc: Mapping[str, Any]) -> None:
    write_atomic(path, [json.dumps(doc, ensure_ascii=True, allow_nan=False).encode() + b"\n"])
