"""Embeddings of rows: position-weighted means of final hidden states, from one forward pass of the base model.

    φ(z) = Σ_i i · h_i / Σ_i i,     i = 1 … T over all tokens of the row

h is the input of the LM head: the last layer's state after the final norm. This is RDS+ (Ivison et al. 2025,
"Large-Scale Data Selection for Instruction Tuning"); the weights are those of SGPT (Muennighoff 2022). Candidates and
targets are embedded alike. They take the place of gradient features in a store, so that the same scan ranks by them.
"""

import torch
from torch import Tensor, nn

from less.data.batching import Batch
from less.features import BatchFeatures
from less.gradients import token_losses
from less.lm_head import find_unembedding, lm_head

__all__ = ["EMBEDDINGS", "embedding_features", "embedding_features_ref"]

EMBEDDINGS = "rds"
"""The feature set's name in a store."""


@torch.no_grad()
def embedding_features(model: nn.Module, batch: Batch) -> BatchFeatures:
    """Embeddings and losses of a batch of B rows, float32, under the feature set `rds`.

    An embedding has no gradient: its own norm stands in the place of ‖g‖ and ‖Γ‖.

    Args:
        model: a causal language model in evaluation mode, without an adapter.
        batch: B rows of T tokens, padded on either side.
    """
    head = find_unembedding(model, batch.input_ids_BT.numel())  # its trial run is not for the hook
    seen: list[Tensor] = []
    hook = lm_head(model).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        losses_B = token_losses(model, batch, head)
    finally:
        hook.remove()
    weights_BT = (batch.attention_mask_BT.cumsum(dim=1) * batch.attention_mask_BT).float()
    weights_BT /= weights_BT.sum(dim=1, keepdim=True)
    hidden_BTD = seen[0].float().masked_fill(batch.attention_mask_BT[..., None] == 0, 0)  # padding may hold NaN
    embeddings_BD = torch.einsum("bt,btd->bd", weights_BT, hidden_BTD)
    norms_B = torch.linalg.vector_norm(embeddings_BD, dim=1)
    return BatchFeatures(
        losses_B=losses_B,
        grad_norms_B=norms_B,
        update_norms_B={EMBEDDINGS: norms_B},
        features_BK={EMBEDDINGS: embeddings_BD},
    )


@torch.no_grad()
def embedding_features_ref(model: nn.Module, input_ids: list[int]) -> Tensor:
    """One row's embedding as the formula says it, from the model's own hidden states: (D,) float64."""
    hidden_TD = model(input_ids=torch.tensor([input_ids]), output_hidden_states=True).hidden_states[-1][0].double()
    total = torch.zeros_like(hidden_TD[0])
    for position, hidden_D in enumerate(hidden_TD, start=1):
        total += position * hidden_D
    return total / sum(range(1, len(input_ids) + 1))
