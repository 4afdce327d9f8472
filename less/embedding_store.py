"""From a pool to a sealed datastore of embeddings: one forward pass of the base model, no checkpoint, no adapter.

The store is one like any other, with the feature set `rds` at the one "checkpoint" `base`: what reads a store reads
this one. What an embedding is, is `less.embeddings`' business; the store of gradients is built by `less.pipeline`.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from datastore import Datastore, DatastoreWriter, ShardKey, check_free_space
from datastore.coding import check_feature_dtype, row_bytes
from datastore.errors import DataError, SettingError
from datastore.overlap import WriteBehind, read_ahead
from less.data.batching import BatchBudget
from less.embeddings import EMBEDDINGS, embedding_features
from less.loading import LoadingConfig, load_model
from less.pool import entry_of, open_sources
from less.progress import Progress
from less.provenance import record_embedding_settings, record_environment
from less.row_ranges import RowRange, compute_shards, render_range

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["BASE", "EmbeddingConfig", "build_embeddings"]

BASE = "base"
"""What stands in the place of a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class EmbeddingConfig(LoadingConfig):
    """Settings of a store of embeddings. All that decides the embeddings is held by the store."""

    shard_rows: int = 1024
    """Source rows in one shard: what a killed build loses at most."""
    feature_dtype: str = "float16"
    """Of stored unit rows: float32, float16, int8, int4 or binary."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shard_rows < 1:
            raise SettingError(f"shard_rows must be at least 1, got {self.shard_rows}")
        check_feature_dtype(self.feature_dtype)


def build_embeddings(
    *,
    model: "str | Path | PreTrainedModel",
    data: "str | Path | datasets.Dataset | Sequence[Any]",
    datastore: str | Path,
    tokenizer: "str | Path | PreTrainedTokenizerBase | None" = None,
    deleted: Mapping[str, Collection[int]] | None = None,
    progress: bool = True,
    **settings: Any,
) -> Datastore:
    """Embed a pool with the base model and keep the embeddings, and each row's loss, in a datastore.

    A store that is complete is left as it is; one that was interrupted is completed; new `data` is appended.

    Args:
        model: the base model: a folder, a hub name, or a loaded model.
        data: a file, a hub name, a `datasets.Dataset`, a list of dicts, or a list of such.
        datastore: the store's folder.
        tokenizer: where it is not the model's own.
        deleted: rows that the store is not to hold, by the sha256 of their source.
        progress: show progress on standard error.
        **settings: fields of `EmbeddingConfig`.

    Raises:
        GradsiftError: see `datastore.errors`.
    """
    config = EmbeddingConfig(**settings)
    given = open_sources(data)
    base, renderer = load_model(model, tokenizer, config)
    budget = BatchBudget.on(base.device, config.tokens_per_batch)
    width = base.get_input_embeddings().weight.shape[1]
    environment = record_environment(
        model=model, tokenizer=tokenizer, checkpoints=[], rendering=config.rendering, device=base.device
    )
    asked: dict[str, Any] = {
        "settings": record_embedding_settings(
            base=base,
            renderer=renderer,
            feature_set=EMBEDDINGS,
            checkpoint=BASE,
            dtype=config.feature_dtype,
            tokens_per_batch=budget.max_tokens,
        ),
        "feature_sets": [EMBEDDINGS],
        "checkpoints": [BASE],
        "shard_rows": config.shard_rows,
    }
    was_training = base.training
    base.eval()
    try:
        with DatastoreWriter.open(datastore, environment=environment, **asked) as writer:
            numbers = writer.add_sources([entry_of(source) for source in given])
            sources = dict(zip(numbers, given, strict=True))
            writer.delete({number: (deleted or {}).get(source.sha256, []) for number, source in sources.items()})
            missing = list(writer.missing_shards())
            if strange := next((key for key in missing if key.source not in sources), None):
                raise DataError(
                    f"{writer.path} still lacks rows of {writer.build.sources[strange.source].name}, which is not "
                    "among the data given; add it with --data"
                )
            num_rows = sum(key.stop - key.start for key in missing)
            check_free_space(writer.path, num_rows * row_bytes(config.feature_dtype, width))

            def render(key: ShardKey) -> tuple[ShardKey, RowRange]:
                rows = range(key.start, key.stop)
                gone = writer.build.deleted_rows(key.source, key.start, key.stop)
                return key, render_range(sources[key.source], rows, renderer, strict=config.strict, deleted=gone)

            with (
                Progress(total=num_rows, description="embeddings", enabled=progress) as bar,
                WriteBehind() as write_behind,
            ):
                for key, rows in read_ahead(render, missing):
                    shards = compute_shards(
                        rows,
                        partial(embedding_features, base),
                        widths={EMBEDDINGS: width},
                        dtypes={EMBEDDINGS: config.feature_dtype},
                        device=base.device,
                        budget=budget,
                        strict=config.strict,
                        bar=bar,
                    )
                    write_behind(writer.write_shard, key, shards[EMBEDDINGS])
                for name, checkpoint in writer.missing_directions():
                    write_behind(writer.write_direction, name, checkpoint, np.zeros(width, np.float32))
            writer.seal()
    finally:
        base.train(was_training)
    return Datastore.open(datastore)
