"""Score a finished store's rows against targets by one of the baselines: the counterpart of `less.scoring.Scorer`.

Rows are those of the store, so that a baseline chooses among the very rows that gradients choose among.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datastore import Datastore
from datastore.errors import DataError, SettingError
from less.baselines.bm25 import bm25_scores
from less.baselines.orders import length_scores, random_scores
from less.baselines.rds import at_rows_of, embedding_store, rds_scores
from less.data.conversations import conversation_of
from less.data.targets import TargetSet, columns_of
from less.embedding_store import BASE
from less.embeddings import EMBEDDINGS
from less.influence import InfluenceScores
from less.pool import Pool
from less.scoring import ScoreConfig, load_target_sets, open_base_model, open_renderer

__all__ = ["NEEDS_MODEL", "NEEDS_POOL", "BaselineScorer"]

NEEDS_MODEL = frozenset({"rds", "perplexity"})
NEEDS_POOL = frozenset({"rds", "perplexity", "bm25"})
LOOKS_AT_TARGETS = frozenset({"rds", "bm25"})


class BaselineScorer:
    """A store, one baseline, and the settings of one scoring.

    Args:
        store: a sealed store, of gradients or of embeddings.
        config: `method` names the baseline.
        model, tokenizer: where they are not where the build found them.
        pool: the store's pool; needed by the methods in `NEEDS_POOL`.
        progress: show progress on standard error.

    Raises:
        DataError: the store has no row.
        ProvenanceError: the model or the tokenizer is not the one that the store was built with.
        SettingError: a prefilter has chosen the store's rows.
    """

    def __init__(
        self, store: Datastore, config: ScoreConfig, model: Any, tokenizer: Any, pool: Pool | None, progress: bool
    ) -> None:
        self.store, self.config, self.pool, self.progress = store, config, pool, progress
        if store.num_rows == 0:
            raise DataError(
                f"{store.path} has no row to score: all {store.manifest.counts['num_rows']} of its pool were skipped"
            )
        if store.settings.get("prefilter"):
            raise SettingError(
                f"the rows of {store.path} were chosen by a prefilter, by gradients: {config.method} among them is no "
                f"baseline. Use the store of all rows, {store.path}.prefilter"
            )
        self.model = open_base_model(store, config, model) if config.method in NEEDS_MODEL else None
        max_length = store.settings["rendering"]["max_length"]
        self.renderer = open_renderer(store, config, model, tokenizer, max_length)

    def load_targets(self, targets: Any) -> list[TargetSet]:
        """The target sets, each with a name of its own."""
        return load_target_sets(targets, self.renderer, self.config.strict)

    def score(self, target_sets: Sequence[TargetSet]) -> tuple[InfluenceScores, list[TargetSet]]:
        """Scores of every row; a method that does not look at targets has one column for each set.

        Returns:
            the scores, and the target sets as they are.

        Raises:
            DataError: a row's text or embedding cannot be had any more.
        """
        if self.config.method in LOOKS_AT_TARGETS:
            columns, subtask_M = columns_of(target_sets)
            scores_NJ = (self._rds if self.config.method == "rds" else self._bm25)(target_sets, subtask_M, len(columns))
        else:
            columns = [(t.name, t.name) for t in target_sets]
            scores_NJ = np.repeat(self._order()[:, None], len(columns), axis=1)
        influence = InfluenceScores(
            rows=self.store.rows(verify=self.config.verify),
            scores_NJ=scores_NJ,
            subtasks=tuple(subtask for _, subtask in columns),
            target_sets=tuple(name for name, _ in columns),
        )
        return influence, list(target_sets)

    def _order(self) -> NDArray[np.float32]:
        if self.config.method == "length":
            return length_scores(self.store.rows(verify=self.config.verify))
        if self.config.method == "random":
            return random_scores(self.store.num_rows, self.config.seed)
        embeddings = self._embeddings()
        return embeddings.stats(EMBEDDINGS, BASE, verify=self.config.verify).losses_N[
            at_rows_of(self.store, embeddings)
        ]

    def _bm25(
        self, target_sets: Sequence[TargetSet], subtask_M: Sequence[int], num_subtasks: int
    ) -> NDArray[np.float32]:
        assert self.pool is not None
        rows = self.store.rows(verify=self.config.verify)
        texts = (conversation_of(record.columns or {}).text for record in self.pool.iter_records(rows))
        return bm25_scores(texts, [text for t in target_sets for text in t.text_of], subtask_M, num_subtasks)

    def _rds(
        self, target_sets: Sequence[TargetSet], subtask_M: Sequence[int], num_subtasks: int
    ) -> NDArray[np.float32]:
        assert self.model is not None
        embeddings = self._embeddings()
        scores_NJ = rds_scores(
            embeddings,
            self.model,
            [row for t in target_sets for row in t.rendered],
            subtask_M,
            num_subtasks,
            aggregate=self.config.aggregate,
            tokens_per_batch=self.config.tokens_per_batch,
            verify=self.config.verify,
            progress=self.progress,
        )
        return scores_NJ[at_rows_of(self.store, embeddings)]

    def _embeddings(self) -> Datastore:
        assert self.model is not None
        assert self.pool is not None
        return embedding_store(
            self.store,
            self.model,
            self.renderer.tokenizer,
            self.pool,
            tokens_per_batch=self.config.tokens_per_batch,
            progress=self.progress,
        )
