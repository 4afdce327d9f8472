"""RDS+: cosine of a row's embedding with the targets' (Ivison et al. 2025), by the scan that ranks gradients.

    score(z, j) = mean over targets v in subtask j of  cos(φ(z), φ(v))

φ is `less.embeddings`. A store of gradients gets a store of embeddings beside it when they are first asked for,
`<DS>.rds`: the same pool, rendered alike; it holds the base model's loss on each row too.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from datastore import Datastore
from datastore.beside import EMBEDDINGS as BESIDE
from datastore.beside import beside
from datastore.build import BUILD, Build
from datastore.errors import DataError
from less.data.batching import BatchBudget, collate, run_in_batches
from less.data.rendering import Rendered
from less.embedding_store import BASE, build_embeddings
from less.embeddings import EMBEDDINGS, embedding_features
from less.influence import subtask_queries
from less.pool import Pool
from less.progress import Progress
from less.provenance import check_model, holds_gradients
from less.scan import influence_scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["at_rows_of", "embedding_store", "embeddings_folder", "rds_scores"]


def embeddings_folder(store: Datastore) -> Path:
    """Where the embeddings of a store of gradients lie: beside it."""
    return beside(store.path, BESIDE)


def embedding_store(
    store: Datastore,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    pool: Pool,
    *,
    tokens_per_batch: int | None = None,
    progress: bool = False,
) -> Datastore:
    """The embeddings of a store's pool: itself, or the one beside it, which is built or completed first.

    Raises:
        ProvenanceError: the model is not the store's, or the folder beside it was built otherwise.
    """
    check_model(store, model)
    if not holds_gradients(store):
        return store
    rendering: dict[str, Any] = {
        name: store.environment["rendering"][name] for name in ("max_length", "system_prompt", "chat_template")
    }
    folder = embeddings_folder(store)
    if (folder / BUILD).exists():  # else another batch size for the targets would ask for another store
        tokens_per_batch = Build.load(folder).settings.get("tokens_per_batch")
    return build_embeddings(
        model=model,
        tokenizer=tokenizer,
        data=pool.sources,
        datastore=folder,
        tokens_per_batch=tokens_per_batch,
        shard_rows=store.manifest.shard_rows,
        deleted={entry.sha256: store.manifest.deleted.get(str(n), []) for n, entry in enumerate(store.sources)},
        progress=progress,
        **rendering,
    )


def rds_scores(
    embeddings: Datastore,
    model: "PreTrainedModel",
    targets: Sequence[Rendered],
    subtask_M: Sequence[int],
    num_subtasks: int,
    *,
    aggregate: str = "mean-of-cosines",
    tokens_per_batch: int | None = None,
    verify: bool = True,
    progress: bool = False,
) -> NDArray[np.float32]:
    """Scores of every row of a store of embeddings for J subtasks.

    Args:
        embeddings: from `embedding_store`.
        model: the base model.
        targets: tokens of the M targets.
        subtask_M: the subtask of each, 0 ≤ j < num_subtasks.
        num_subtasks: J.
        aggregate: as in `less.influence.subtask_queries`.
        tokens_per_batch: padded tokens in one batch of targets.
        verify: check each shard's checksum.
        progress: show bars.

    Returns:
        scores_NJ, float32.
    """
    embeddings_MD = torch.empty(len(targets), embeddings.proj_dim(EMBEDDINGS))
    was_training = model.training
    model.eval()
    try:
        with Progress(total=len(targets), description="targets", enabled=progress) as bar:

            def embed(members: list[int]) -> None:
                batch = collate(targets, members)
                embeddings_MD[members] = embedding_features(model, batch.to(model.device)).features_BK[EMBEDDINGS].cpu()
                bar.advance(len(members), batch.num_tokens)

            run_in_batches([row.num_tokens for row in targets], BatchBudget.on(model.device, tokens_per_batch), embed)
    finally:
        model.train(was_training)
    query_JD = subtask_queries(embeddings_MD, subtask_M, num_subtasks, aggregate=aggregate, normalize="cosine")
    return influence_scores(embeddings, EMBEDDINGS, {BASE: query_JD}, {BASE: 1.0}, verify=verify, progress=progress)


def at_rows_of(store: Datastore, embeddings: Datastore) -> NDArray[np.int64]:
    """The position in `embeddings` of each row of `store`, (N,).

    Raises:
        DataError: a row has features in the one and no embedding in the other.
    """
    ours, theirs = _keys(store, embeddings)
    if (missing := np.flatnonzero(~np.isin(ours, theirs))).size:
        name = store.rows(verify=False).ids[missing[0]]
        raise DataError(
            f"{missing.size} rows of {store.path} have no embedding in {embeddings.path}, such as {name}: see "
            f"`gradsift inspect {embeddings.path}`, or select from that store itself"
        )
    order = np.argsort(theirs)
    return order[np.searchsorted(theirs, ours, sorter=order)]


def _keys(*stores: Datastore) -> list[NDArray[np.int64]]:
    """(source, row) of each position of each store in one number, the same for the same row."""
    entries = [entry for store in stores for entry in store.sources]
    numbers = {sha256: n for n, sha256 in enumerate(dict.fromkeys(entry.sha256 for entry in entries))}
    step = max(entry.num_rows for entry in entries)
    keys = []
    for store in stores:
        rows = store.rows(verify=False)
        number_of_source = np.array([numbers[entry.sha256] for entry in store.sources], np.int64)
        keys.append(number_of_source[rows.sources_N] * step + rows.rows_N)
    return keys
