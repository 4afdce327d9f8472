"""The measures of a preference pair: how alike its replies are in the eyes of the model.

h_k is the final hidden embedding that predicts the k-th of the n reply tokens, S = Σ_k h_k their sum, + the chosen
and − the rejected reply, as in Razin et al., "Unintentional Unalignment: Likelihood Displacement in Direct
Preference Optimization", ICLR 2025 (below: the paper).

    ches        ⟨S⁺, S⁻⟩ − ‖S⁺‖²
    ln_ches     ⟨S⁺, S⁻⟩ / (n⁺ n⁻) − ‖S⁺‖² / (n⁺)²
    alpha_ches  ⟨G⁺, G⁻ − G⁺⟩,  G = Σ_k r_k h_kᵀ,  r_k = e_yk − softmax(W h_k)

Higher means that DPO is expected to push more probability off the chosen reply. All three are sums over reply
tokens, so each is given token by token: chosen token k adds −⟨S⁺, h⁺_k⟩ to `ches`, rejected token k adds ⟨S⁺, h⁻_k⟩.
The two terms nearly cancel: an error is to be judged against ⟨S⁺, S⁻⟩ and ‖S⁺‖², and sums are kept in float64.

Where embeddings come from is left to `embeddings`, the products ⟨r_i, r_j⟩ to `unembedding`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rapidfuzz.distance import Levenshtein
from torch import Tensor

from datastore.errors import SettingError

__all__ = [
    "TokenTerms",
    "alpha_ches_terms",
    "ches_scores",
    "ches_terms",
    "edit_distance",
    "last_hidden",
    "length_difference",
    "ln_ches_terms",
]


@dataclass(frozen=True)
class TokenTerms:
    """What each reply token adds to a measure; float64."""

    chosen_T: Tensor
    rejected_T: Tensor

    @property
    def total(self) -> float:
        """The measure."""
        return float(self.chosen_T.sum() + self.rejected_T.sum())


def ches_scores(
    chosen_BTD: Tensor,
    rejected_BTD: Tensor,
    chosen_mask_BT: Tensor,
    rejected_mask_BT: Tensor,
    *,
    length_normalized: bool = False,
) -> Tensor:
    """CHES of a batch of pairs, from hidden states that you have already (Definition 2 of the paper).

    Args:
        chosen_BTD, rejected_BTD: final hidden states, the input of the LM head; any float dtype. The two may
            differ in T. What stands outside the masks makes no difference, NaN included.
        chosen_mask_BT, rejected_mask_BT: true at the positions that *predict* a reply token: from the last
            prompt token to the last token but one. Padding may be anywhere.
        length_normalized: means in place of sums: `ln_ches` (Definition 3).

    Returns:
        scores_B, float64; NaN where a reply has no position.

    Raises:
        SettingError: the shapes do not fit each other.
    """

    def summed(hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        if hidden_BTD.ndim != 3 or hidden_BTD.shape[:2] != mask_BT.shape:
            raise SettingError(
                f"hidden states of shape {tuple(hidden_BTD.shape)} and a mask of shape {tuple(mask_BT.shape)}; "
                "expected (B, T, D) and (B, T)"
            )
        mask_BT1 = mask_BT.bool()[:, :, None]
        total_BD = hidden_BTD.where(mask_BT1, 0).sum(dim=1, dtype=torch.float64)
        counts_B1 = mask_BT1.sum(dim=1)
        return total_BD / counts_B1 if length_normalized else total_BD.where(counts_B1 > 0, torch.nan)

    if chosen_BTD.shape[::2] != rejected_BTD.shape[::2]:
        raise SettingError(
            f"chosen of shape {tuple(chosen_BTD.shape)} and rejected of shape {tuple(rejected_BTD.shape)}; "
            "expected the same number of pairs and the same hidden size"
        )
    chosen_BD, rejected_BD = summed(chosen_BTD, chosen_mask_BT), summed(rejected_BTD, rejected_mask_BT)
    return (chosen_BD * (rejected_BD - chosen_BD)).sum(dim=1)


def ches_terms(chosen_TD: Tensor, rejected_TD: Tensor) -> TokenTerms:
    """`ches` of one pair, token by token: ⟨S⁺, S⁻⟩ − ‖S⁺‖² (Definition 2).

    A long rejected reply has a long S⁻: raw CHES follows the difference of lengths closely.
    """
    total_D = chosen_TD.sum(dim=0, dtype=torch.float64)
    return TokenTerms(-(chosen_TD.double() @ total_D), rejected_TD.double() @ total_D)


def ln_ches_terms(terms: TokenTerms) -> TokenTerms:
    """`ln_ches` of one pair, token by token: ⟨S⁺, S⁻⟩ / (n⁺ n⁻) − ‖S⁺‖² / (n⁺)² (Definition 3, Appendix A).

    The measure by which the paper filters. It is CHES of mean embeddings, and ranks quite otherwise than `ches`.

    Args:
        terms: those of `ches`.
    """
    num_chosen, num_rejected = len(terms.chosen_T), len(terms.rejected_T)
    return TokenTerms(terms.chosen_T / num_chosen**2, terms.rejected_T / (num_chosen * num_rejected))


def alpha_ches_terms(chosen_TD: Tensor, rejected_TD: Tensor, alpha_ij: Tensor) -> TokenTerms:
    """`alpha_ches` of one pair, token by token: Σ_ij α⁻_ij ⟨h⁺_i, h⁻_j⟩ − Σ_ij α⁺_ij ⟨h⁺_i, h⁺_j⟩ (Theorem 6).

    α_ij = ⟨r_i, r_j⟩ weighs each product of embeddings by how alike the two predictions err; `ches` is the case of
    all weights one. The sum is ⟨G⁺, G⁻ − G⁺⟩ with G = ∂ log p(y) / ∂W: minus the unembedding part of the first-order
    change of log p(chosen) in a step of DPO, up to a positive factor.

    Args:
        chosen_TD, rejected_TD: the embeddings.
        alpha_ij: (n⁺, n⁺ + n⁻), chosen tokens against chosen and rejected ones, from `unembedding`.
    """
    products_ij = chosen_TD.double() @ torch.cat([chosen_TD, rejected_TD]).double().T
    weighted_T = (products_ij * alpha_ij).sum(dim=0)
    num_chosen = len(chosen_TD)
    return TokenTerms(-weighted_T[:num_chosen], weighted_T[num_chosen:])


def last_hidden(chosen_TD: Tensor, rejected_TD: Tensor) -> float:
    """Inner product of the two embeddings that predict the replies' last tokens (the paper, §5)."""
    return float(chosen_TD[-1].double() @ rejected_TD[-1].double())


def edit_distance(chosen_ids: Sequence[int], rejected_ids: Sequence[int]) -> float:
    """Levenshtein distance of the replies' tokens over the longer one's length: 0 the same, 1 nothing alike.

    The paper's predictor of displacement is its negative (§5): here *low* means alike.
    """
    return Levenshtein.normalized_distance(chosen_ids, rejected_ids)


def length_difference(num_chosen: int, num_rejected: int) -> int:
    """n⁻ − n⁺, in tokens: no measure of the paper, but what any other has to be held against."""
    return num_rejected - num_chosen
