"""Orders of a pool that do not look at the targets: what a selection for a target has to beat.

length        supervised tokens: "Long Is More for Alignment" (Zhao et al. 2024)
perplexity    mean negative log-likelihood of the reply under the base model: Top-PPL (Ivison et al. 2025)
random        a uniform number in [0, 1)
"""

import numpy as np
from numpy.typing import NDArray

from datastore import RowTable

__all__ = ["length_scores", "random_scores"]


def length_scores(rows: RowTable) -> NDArray[np.float32]:
    """Supervised tokens of each row, (N,)."""
    return rows.num_supervised_N.astype(np.float32)


def random_scores(num_rows: int, seed: int) -> NDArray[np.float32]:
    """A number for each row, (N,): a pool that is longer at its end keeps those of the rows before."""
    return np.random.default_rng(seed).random(num_rows, dtype=np.float32)
