"""Contamination: rows of a pool that hold much of a target's own text.

    share(row, target) = |S(row) ∩ S(target)| / |S(target)|,    S: the distinct runs of 8 words

A row is a near-duplicate of a target whose share is at least one half. A target of fewer than 8 words has no run: a row
is its near-duplicate where it has just the same words. Words are letters and digits, without case; of a chat all turns
count but the system prompt, which whole data sets have in common. Runs of 8 words are what PaLM's authors looked for,
with a share of 0.7 (Chowdhery et al. 2022, §8). Rows with the same wording around them as a short target can be flagged
for that wording alone, so the share and the place are told. A text without spaces between its words is hardly found.

Memory is the targets' runs; the pool is read once.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from less.data.conversations import RowProblem, conversation_of
from less.data.records import Record
from less.words import words_of

__all__ = ["NearDuplicate", "near_duplicates", "near_duplicates_ref"]

RUN_WORDS = 8
LEAST_SHARE = 0.5

_Run = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class NearDuplicate:
    """A row of the pool, and the target that it holds most of."""

    where: str
    """Where a person finds the row."""
    id: str
    """Its label."""
    target_where: str
    """Where a person finds the target; the first of those with the highest share."""
    target_id: str
    """Its label."""
    share: float
    """Of the target's distinct runs; 1 for a short target."""
    num_targets: int
    """Targets of which the row is a near-duplicate."""


def near_duplicates(targets: Iterable[Record], pool: Iterable[Record]) -> list[NearDuplicate]:
    """The rows of a pool that are near-duplicates of a target, in the pool's order.

    Args:
        targets: read once, before the pool; one that holds no chat or no word has no near-duplicate.
        pool: streamed; a row that holds no chat is none.
    """
    known: list[Record] = []
    num_runs: list[int] = []
    holding: dict[_Run, list[int]] = defaultdict(list)  # a run → the targets that have it
    short: dict[_Run, list[int]] = defaultdict(list)  # all words → the targets that are just those
    for target, words in _with_words(targets):
        runs = _runs(words)
        for run in runs:
            holding[run].append(len(known))
        if not runs:
            short[tuple(words)].append(len(known))
        known.append(target)
        num_runs.append(len(runs))
    found = []
    for row, words in _with_words(pool):
        counts = Counter(target for run in _runs(words) & holding.keys() for target in holding[run])
        shares = {target: count / num_runs[target] for target, count in counts.items()}
        shares = {target: share for target, share in shares.items() if share >= LEAST_SHARE}
        if len(words) < RUN_WORDS:
            shares |= dict.fromkeys(short.get(tuple(words), ()), 1.0)
        if shares:
            best = min(shares, key=lambda target: (-shares[target], target))
            found.append(_pair(row, known[best], shares[best], len(shares)))
    return found


def near_duplicates_ref(targets: Iterable[Record], pool: Iterable[Record]) -> list[NearDuplicate]:
    """`near_duplicates` as the formula says it: every row with every target, run by run."""
    known = [(target, words) for target, words in _with_words(targets)]
    found = []
    for row, row_words in _with_words(pool):
        row_runs = [row_words[n : n + RUN_WORDS] for n in range(len(row_words) - RUN_WORDS + 1)]
        pairs = []
        for target, words in known:
            runs: list[list[str]] = []
            for n in range(len(words) - RUN_WORDS + 1):
                if words[n : n + RUN_WORDS] not in runs:
                    runs.append(words[n : n + RUN_WORDS])
            num_shared = sum(run in row_runs for run in runs)
            share = num_shared / len(runs) if runs else float(words == row_words)
            if share >= LEAST_SHARE:
                pairs.append((share, target))
        if pairs:
            share, target = max(pairs, key=lambda pair: pair[0])
            found.append(_pair(row, target, share, len(pairs)))
    return found


def _with_words(records: Iterable[Record]) -> Iterator[tuple[Record, list[str]]]:
    """The records that say something, and their words."""
    for record in records:
        try:
            words = words_of(conversation_of(record.columns or {}).text)
        except RowProblem:
            continue
        if words:
            yield record, words


def _runs(words: list[str]) -> set[_Run]:
    return set(zip(*(words[start:] for start in range(RUN_WORDS)), strict=False))


def _pair(row: Record, target: Record, share: float, num_targets: int) -> NearDuplicate:
    return NearDuplicate(
        where=row.where, id=row.id, target_where=target.where, target_id=target.id, share=share, num_targets=num_targets
    )
