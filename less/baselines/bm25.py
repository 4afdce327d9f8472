"""BM25: the words that a row shares with the targets, rare ones more.

    score(z, j) = mean over targets v in subtask j of  BM25(words of v, z) / number of words of v

BM25 with Lucene's idf, k₁ = 1.5, b = 0.75 (Robertson & Zaragoza 2009; Kamphuis et al. 2020), from `bm25s`. The sum over
a query's words is made a mean: else a subtask with long targets would win every row when the highest subtask counts.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from less.words import words_of

__all__ = ["bm25_scores"]


def bm25_scores(
    texts: Iterable[str], targets: Sequence[str], subtask_M: Sequence[int], num_subtasks: int
) -> NDArray[np.float32]:
    """Scores of N rows for J subtasks.

    Args:
        texts: of the N rows.
        targets: of the M targets.
        subtask_M: the subtask of each target, 0 ≤ j < num_subtasks.
        num_subtasks: J.

    Returns:
        scores_NJ, float32; 0 for a row that shares no word.
    """
    import bm25s

    rows = [words_of(text) for text in texts]
    scores_NJ = np.zeros((len(rows), num_subtasks), np.float32)
    if not any(rows):  # `bm25s` cannot index what has no word
        return scores_NJ
    index = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
    index.index(rows, show_progress=False)
    num_targets_J = np.bincount(subtask_M, minlength=num_subtasks)
    known = index.vocab_dict
    for text, j in zip(targets, subtask_M, strict=True):
        words = words_of(text)
        if shared := [word for word in words if word in known]:
            scores_NJ[:, j] += index.get_scores(shared) / (len(words) * num_targets_J[j])
    return scores_NJ
