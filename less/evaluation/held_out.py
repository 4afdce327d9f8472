"""Rows of the target that trials are measured on, and never trained on."""

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from datastore.errors import DataError, SettingError
from less.checkpoints import EvidenceWarning
from less.data.records import RowProblem, open_source
from less.data.rendering import Rendered, Renderer

__all__ = ["HeldOut", "load_held_out_sets"]


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Rows that a trial is measured on, and never trained on."""

    name: str
    """The target set that they belong to."""
    rendered: list[Rendered]
    """Their tokens."""
    prompts: list[list[int]]
    """Token ids up to the reply, of the rows whose answer is to be checked."""
    answers: list[str]
    """Their answers; as many as `prompts`."""
    sha256: str
    """Of the rows' tokens and answers."""


def load_held_out_sets(
    held_out: Any,
    names: Sequence[str],
    renderer: Renderer,
    *,
    most: int | None = None,
    num_answers: int = 0,
    max_new_tokens: int = 0,
) -> dict[str, HeldOut]:
    """The held-out rows of each target set, by its name.

    Args:
        held_out: a file, data set or list of dicts; several in the order of `names`, or by name.
        names: of the target sets.
        renderer: renders them as it does the targets. A row that it cannot render whole is left out, with a warning.
        most: rows of each set at most, drawn once; None takes all.
        num_answers: rows with an `answer` that are to be answered, at most.
        max_new_tokens: of an answer.

    Raises:
        DataError: none of a set's rows can be used.
        SettingError: the sets are not those of the targets.
    """
    if isinstance(held_out, Mapping):
        given = dict(held_out)
    else:
        several = isinstance(held_out, list | tuple) and not any(isinstance(row, dict) for row in held_out)
        parts = list(held_out) if several else [held_out]
        given = dict(zip(names, parts, strict=False)) if len(parts) == len(names) else {}
    if set(given) != set(names):
        num_given = sum(name in given for name in names)
        raise SettingError(
            f"there are {len(names)} target sets ({', '.join(names)}) and held-out rows for {num_given or 'none'} of "
            "them; give as many --eval as --targets, in the same order, or by the same names"
        )
    return {name: _load(name, given[name], renderer, most, num_answers, max_new_tokens) for name in names}


def _load(name: str, data: Any, renderer: Renderer, most: int | None, num_answers: int, max_new_tokens: int) -> HeldOut:
    source = open_source(data)
    found: list[tuple[Rendered, str | None]] = []
    for record in source.iter_records():
        try:
            rendered = renderer.render_record(record)
        except RowProblem:
            continue
        if not rendered.truncated:
            answer = (record.columns or {}).get("answer")
            found.append((rendered, None if answer is None else str(answer)))
    if not found:
        raise DataError(f"none of the {source.num_rows} held-out rows in {source.name} can be used whole")
    if num_left_out := source.num_rows - len(found):
        warnings.warn(
            f"{num_left_out} of the {source.num_rows} held-out rows of {name} cannot be used whole and are left out",
            EvidenceWarning,
            stacklevel=4,
        )
    if most is not None and most < len(found):
        drawn = np.random.default_rng(0).choice(len(found), size=most, replace=False)
        found = [found[n] for n in sorted(drawn.tolist())]
    asked = [(row, answer) for row, answer in found if answer is not None][:num_answers]
    prompts = [row.input_ids[: _start_of_last_turn(row)] for row, _ in asked]
    decides: list[Any] = [[row.input_ids, row.supervised] for row, _ in found] + [[answer for _, answer in asked]]
    if asked:
        decides.append(max_new_tokens)
    digest = hashlib.sha256(json.dumps(decides).encode())
    return HeldOut(
        name=name,
        rendered=[row for row, _ in found],
        prompts=prompts,
        answers=[str(answer) for _, answer in asked],
        sha256=digest.hexdigest(),
    )


def _start_of_last_turn(row: Rendered) -> int:
    """Where the row's last reply begins: what is before it, earlier replies too, is its prompt."""
    end = row.num_tokens - row.supervised[::-1].index(True)
    return end - next((n for n, is_reply in enumerate(row.supervised[:end][::-1]) if not is_reply), end)
