"""What the LM head says of reply tokens: their log-probabilities, and how alike its errors are.

    residual r = ∂ log p(y) / ∂(W h) = (e_y − π) ⊙ ∂l/∂(W h),   l the logits, π = softmax(l)
    α_ij = ⟨r_i, r_j⟩ = Σ_v r_iv r_jv

for tokens i, j of one pair. The vocabulary is taken in blocks, with a running maximum as in an online softmax
(Milakov & Gimelshein 2018): neither logits nor probabilities of all reply tokens over the whole vocabulary exist.
The head itself is `less.lm_head.Unembedding`.
"""

import torch
from torch import Tensor, nn

from ches.embeddings import Embeddings
from less.lm_head import Unembedding

__all__ = ["residual_products", "residual_products_ref"]

_BLOCK_VALUES = 2**22
"""Logits that exist at a time: 16 MB in float32."""


@torch.no_grad()
def residual_products(
    head: Unembedding, embeddings: Embeddings, *, alphas: bool = True
) -> tuple[Tensor, list[Tensor] | None]:
    """Log-probability of every reply token, and α of every pair, in one pass over the vocabulary.

    Args:
        head: the model's.
        embeddings: of a batch.
        alphas: False leaves α out.

    Returns:
        log_probs_S, float32; and for each pair alpha_ij, (n⁺, n⁺ + n⁻) float64: chosen tokens against chosen and
        rejected ones. None in its place without `alphas`.
    """
    hidden_SD, token_S = embeddings.hidden_SD, embeddings.token_S
    num_tokens, vocabulary = len(hidden_SD), len(head.weight_VD)
    step = max(_BLOCK_VALUES // max(num_tokens, 1), 256)
    max_S = torch.full((num_tokens,), -torch.inf, device=hidden_SD.device)
    sum_S = torch.zeros(num_tokens, device=hidden_SD.device)
    whole = [(chosen, slice(chosen.start, rejected.stop)) for chosen, rejected in embeddings.spans]
    products = [hidden_SD.new_zeros((c.stop - c.start, w.stop - w.start), dtype=torch.float32) for c, w in whole]
    for start in range(0, vocabulary, step):
        logits_SV = head.logits(hidden_SD, start, start + step)
        new_max_S = torch.maximum(max_S, logits_SV.amax(dim=1))
        shrink_S = torch.exp(max_S - new_max_S)
        weights_SV = torch.exp(logits_SV - new_max_S[:, None])
        sum_S = sum_S * shrink_S + weights_SV.sum(dim=1)
        max_S = new_max_S
        if alphas:
            weights_SV *= head.slopes(logits_SV)
            for (chosen, pair), product_ij in zip(whole, products, strict=True):
                product_ij *= shrink_S[chosen, None] * shrink_S[pair]
                product_ij += weights_SV[chosen] @ weights_SV[pair].T
    log_sum_S = max_S + torch.log(sum_S)
    own_S, alpha = torch.empty_like(max_S), []
    for (chosen, pair), product_ij in zip(whole, products, strict=True):
        num_chosen = chosen.stop - chosen.start
        # Row i of these square matrices is a position, column j the token that position j predicts.
        logits_ij = head.logits_of(hidden_SD[pair], token_S[pair])
        own_S[pair] = logits_ij.diagonal()
        if not alphas:
            continue
        prob_ij = torch.exp(logits_ij - log_sum_S[pair, None]).double()
        slope_ij = torch.as_tensor(head.slopes(logits_ij), device=logits_ij.device).expand_as(logits_ij).double()
        own_slope_i = slope_ij.diagonal()
        one_ij = (token_S[pair, None] == token_S[pair]).double()
        both_ij = product_ij.double() / (sum_S[chosen, None].double() * sum_S[pair].double())
        # ⟨(e_yi − π_i) d_i, (e_yj − π_j) d_j⟩ multiplied out
        at_yi_ij = own_slope_i[:, None] * slope_ij.T * (one_ij - prob_ij.T)
        at_yj_ij = slope_ij * own_slope_i * prob_ij
        alpha.append((at_yi_ij - at_yj_ij)[:num_chosen] + both_ij)
    return own_S - log_sum_S, alpha if alphas else None


@torch.no_grad()
def residual_products_ref(head: Unembedding, embeddings: Embeddings) -> tuple[Tensor, list[Tensor]]:
    """`residual_products`, slowly: whole residual vectors in float64."""
    logits_SV = head.logits(embeddings.hidden_SD).double()
    one_hot_SV = nn.functional.one_hot(embeddings.token_S, logits_SV.shape[1])
    residuals_SV = (one_hot_SV - logits_SV.softmax(dim=1)) * head.slopes(logits_SV)
    log_probs_S = logits_SV.log_softmax(dim=1).gather(1, embeddings.token_S[:, None])[:, 0]
    alpha = [residuals_SV[c] @ residuals_SV[c.start : r.stop].T for c, r in embeddings.spans]
    return log_probs_S.float(), alpha
