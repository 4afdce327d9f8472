"""The LM head as a formula, and the loss of what it predicts without the logits of all tokens.

    logits l = cap(s · (W h + b)),   cap(z) = c · tanh(z / c) or z
    loss   −log p(y) = log Σ_v exp(l_v) − l_y
    ∂loss/∂h = Wᵀ ((softmax(l) − e_y) ⊙ ∂l/∂(W h))

A few tokens at a time: their logits, their loss and its gradient, and the logits are gone. For a vocabulary of 128k
and 2,000 tokens the logits alone would be 1 GB. The model's own logits of a few tokens say whether the formula is its
head; where it is not, and where the logits are few, the model's own way serves.
"""

from dataclasses import dataclass
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from datastore.errors import UnsupportedError

__all__ = ["Unembedding", "find_unembedding", "linear_cross_entropy", "linear_cross_entropy_ref", "lm_head"]

_LOGITS_AT_ONCE = 2**24
"""64 MB in float32: enough tokens for a matrix product to run at full speed."""


def lm_head(model: nn.Module) -> nn.Module:
    """The module that turns final hidden embeddings into logits; for a PEFT model, its base's.

    Raises:
        UnsupportedError: there is none.
    """
    from peft import PeftModel

    base = model.get_base_model() if isinstance(model, PeftModel) else model
    head = base.get_output_embeddings()  # type: ignore[operator]
    if head is None:
        raise UnsupportedError(f"{type(base).__name__} has no LM head; expected a causal language model")
    return head


@dataclass(frozen=True, kw_only=True)
class Unembedding:
    """The LM head as a formula."""

    weight_VD: Tensor
    bias_V: Tensor | None
    scale: float
    """s."""
    cap: float | None
    """c; None where logits are not capped."""

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module) -> Self:
        """The head of `model`.

        Raises:
            UnsupportedError: the model's logits are not what the formula gives.
        """
        config, head = model.config.get_text_config(), lm_head(model)  # type: ignore[operator, union-attr]
        scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
        cap = getattr(config, "final_logit_softcapping", None)
        found = cls.of_linear(head, scale, cap) if isinstance(head, nn.Linear) else None
        seen: list[Tensor] = []
        modes = [(module, module.training) for module in model.modules()]
        hook = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            model.eval()  # no dropout: it would draw from the caller's random numbers
            logits_TV = model(input_ids=torch.tensor([[5, 9, 6, 7]], device=next(model.parameters()).device)).logits[0]
        finally:
            hook.remove()
            for module, training in modes:
                module.training = training
        tolerance = 1e-3 if logits_TV.dtype == torch.float32 else 0.01  # of rounding only: it is the same product
        if found is None or (found.logits(seen[0][0]) - logits_TV).norm() > tolerance * logits_TV.float().norm():
            raise UnsupportedError(
                f"{type(model).__name__}: its logits are not those of a linear LM head with scale and soft cap, so "
                "alpha_ches and logp would be wrong; ask for the other --measures"
            )
        return found

    @classmethod
    def of_linear(cls, head: nn.Linear, scale: float, cap: float | None) -> Self:
        """The formula with a module's weights of now."""
        bias_V = None if head.bias is None else head.bias.detach()
        return cls(weight_VD=head.weight.detach(), bias_V=bias_V, scale=scale, cap=cap)

    def logits(self, hidden_SD: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """(S, v) float32: logits of the tokens `start` to `stop` of the vocabulary."""
        bias = None if self.bias_V is None else self.bias_V[start:stop]
        return self._capped(nn.functional.linear(hidden_SD, self.weight_VD[start:stop], bias).float())

    def logits_of(self, hidden_SD: Tensor, token_K: Tensor) -> Tensor:
        """(S, K) float32: logits of the tokens named."""
        bias = None if self.bias_V is None else self.bias_V[token_K]
        return self._capped(nn.functional.linear(hidden_SD, self.weight_VD[token_K], bias).float())

    def slopes(self, logits: Tensor) -> Tensor | float:
        """∂l/∂(W h) where the logits are l."""
        return self.scale if self.cap is None else self.scale * (1 - (logits / self.cap) ** 2)

    def _capped(self, scores: Tensor) -> Tensor:
        scaled = scores if self.scale == 1 else scores * self.scale
        return scaled if self.cap is None else self.cap * torch.tanh(scaled / self.cap)


_FOUND: WeakKeyDictionary[nn.Module, tuple[float, float | None] | None] = WeakKeyDictionary()
"""Scale and cap of the heads that were tried out."""


def find_unembedding(model: nn.Module, num_tokens: int) -> Unembedding | None:
    """The head of `model` with its weights of now, tried out once for each model.

    None where the logits of `num_tokens` tokens are few enough to exist at once, or where the head is no formula: the
    model's own way serves there.
    """
    head = lm_head(model)
    if num_tokens * model.config.get_text_config().vocab_size <= _LOGITS_AT_ONCE:  # type: ignore[operator, union-attr]
        return None
    if head not in _FOUND:
        try:
            formula = Unembedding.of(model)
            _FOUND[head] = formula.scale, formula.cap
        except UnsupportedError:
            _FOUND[head] = None
    known = _FOUND[head]
    if known is None or not isinstance(head, nn.Linear):
        return None
    return Unembedding.of_linear(head, *known)


def linear_cross_entropy(head: Unembedding, hidden_SD: Tensor, token_S: Tensor) -> Tensor:
    """Negative log-likelihood of each token, with its graph to the embeddings.

    Args:
        head: the model's; it takes no gradient.
        hidden_SD: the embeddings that predict the tokens.
        token_S: int64.

    Returns:
        nll_S, float32.
    """
    return _LinearCrossEntropy.apply(hidden_SD, token_S, head)


def linear_cross_entropy_ref(head: Unembedding, hidden_SD: Tensor, token_S: Tensor) -> Tensor:
    """`linear_cross_entropy`, from all logits at once."""
    return nn.functional.cross_entropy(head.logits(hidden_SD), token_S, reduction="none")


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradient of a token's loss is made beside it, while its logits are there."""

    @staticmethod
    def forward(ctx: Any, hidden_SD: Tensor, token_S: Tensor, head: Unembedding) -> Tensor:
        nll_S = torch.empty(len(hidden_SD), device=hidden_SD.device)
        grad_SD = torch.empty_like(hidden_SD) if ctx.needs_input_grad[0] else None
        step = max(_LOGITS_AT_ONCE // len(head.weight_VD), 1)
        for start in range(0, len(hidden_SD), step):
            part = slice(start, start + step)
            logits_sV, token_s1 = head.logits(hidden_SD[part]), token_S[part, None]
            log_sum_s1 = logits_sV.logsumexp(dim=1, keepdim=True)
            nll_S[part] = (log_sum_s1 - logits_sV.gather(1, token_s1))[:, 0]
            if grad_SD is not None:
                slopes = head.slopes(logits_sV)
                log_probs_sV = logits_sV.sub_(log_sum_s1)
                own_s1 = log_probs_sV.gather(1, token_s1).expm1()  # p − 1 to all digits, however close p is to 1
                errors_sV = log_probs_sV.exp_().scatter_(1, token_s1, own_s1)
                if head.cap is not None or head.scale != 1:
                    errors_sV *= slopes
                grad_SD[part] = errors_sV.to(hidden_SD.dtype) @ head.weight_VD
        ctx.save_for_backward(grad_SD)
        return nll_S

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, None, None]:
        (grad_SD,) = ctx.saved_tensors
        return (grad_SD * grad_outputs[0][:, None]).to(grad_SD.dtype), None, None
