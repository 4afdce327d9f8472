"""The ways to score a store's rows against targets, each in the place of any other.

`less` is gradient influence (`less.scoring`); the rest are what it has to beat (`less.baselines`). Whatever the method,
the result is one `InfluenceScores`, and all that follows (selection, files, evaluation) is the same.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from datastore import Datastore
from datastore.errors import SettingError
from less.baselines.scorer import LOOKS_AT_TARGETS as _BASELINES
from less.baselines.scorer import NEEDS_POOL, BaselineScorer
from less.data.targets import TargetSet
from less.influence import InfluenceScores
from less.pool import Pool
from less.provenance import holds_gradients
from less.scoring import ScoreConfig, Scorer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["LOOKS_AT_TARGETS", "TargetScorer", "method_of", "open_scorer", "score"]


LOOKS_AT_TARGETS = ("less", *sorted(_BASELINES))
"""Methods whose scores are of the targets; the others rank alike whatever these are."""


class TargetScorer(Protocol):
    """What every method offers."""

    def load_targets(self, targets: Any) -> list[TargetSet]:
        """The target sets, rendered as the store's pool was."""

    def score(self, target_sets: Sequence[TargetSet]) -> tuple[InfluenceScores, list[TargetSet]]:
        """Scores of every row for every subtask, and the target sets without the targets that cannot be used."""


def score(
    *,
    datastore: "str | Path | Datastore",
    targets: Any,
    model: "str | Path | PreTrainedModel | None" = None,
    tokenizer: "str | Path | PreTrainedTokenizerBase | None" = None,
    checkpoints: "str | Path | Sequence[str | Path] | None" = None,
    data: Any = None,
    progress: bool = True,
    **settings: Any,
) -> InfluenceScores:
    """Scores of every scored row of a store for every subtask of the targets.

    Args:
        datastore: a sealed store.
        targets: a file, data set or list of dicts; several as a list, or as a dict that names them.
        model: where it is not where the build found it; likewise `tokenizer`, `checkpoints` and the pool, `data`.
        progress: show progress on standard error.
        **settings: fields of `ScoreConfig`.

    Raises:
        DataError: no usable target; the pool has changed, where the method reads it.
        ProvenanceError: the model or a checkpoint is not the one that the store was built with.
        SettingError: the store has no features for the method.
    """
    store = datastore if isinstance(datastore, Datastore) else Datastore.open(datastore)
    config = ScoreConfig(**settings)
    pool = Pool(store, data) if method_of(store, config) in NEEDS_POOL else None
    scorer = open_scorer(
        store, config, model=model, tokenizer=tokenizer, checkpoints=checkpoints, pool=pool, progress=progress
    )
    influence, _ = scorer.score(scorer.load_targets(targets))
    return influence


def method_of(store: Datastore, config: ScoreConfig) -> str:
    """The method asked for, or the one that the store's features are for."""
    return config.method or ("less" if holds_gradients(store) else "rds")


def open_scorer(
    store: Datastore,
    config: ScoreConfig,
    *,
    model: Any = None,
    tokenizer: Any = None,
    checkpoints: Any = None,
    pool: Pool | None = None,
    progress: bool = False,
    known: dict[str, Tensor] | None = None,
) -> TargetScorer:
    """The scorer of `config.method`, with its models loaded and held to the store.

    Args:
        store: a sealed store.
        config: of scoring.
        model, tokenizer, checkpoints: where they are not where the build found them.
        pool: the store's pool, which some methods read.
        progress: show progress on standard error.
        known: shared by the scorers of one store's feature sets; see `less.scoring.Scorer`.

    Raises:
        GradsiftError: see `less.scoring.Scorer` and `less.baselines.scorer.BaselineScorer`.
    """
    method = method_of(store, config)
    if method != "less":
        return BaselineScorer(store, replace(config, method=method), model, tokenizer, pool, progress)
    if not holds_gradients(store):
        raise SettingError(
            f"{store.path} holds embeddings and no gradients, so there is nothing for the method less; use "
            "--method rds, or build a store with `gradsift build-datastore`"
        )
    return Scorer(store, config, model, tokenizer, checkpoints, progress, known)
