"""Per-sample gradients of the LoRA parameters, in batches, streamed one block at a time.

For one LoRA branch y = s · B (A x), with δ the gradient of the loss with respect to y, row b's gradient is

    dB_b = s · Σ_t δ_bt (A x_bt)ᵀ            (out, R)
    dA_b =     Σ_t (s · Bᵀ δ_bt) x_btᵀ       (R, in)

one batched matrix product each. The loss of a batch is the *sum* over rows of each row's mean negative
log-likelihood, so a row's gradient does not depend on its batch-mates. A block, the (B, p) gradients of one
parameter, is handed on as soon as the backward pass yields it and then forgotten: the (B, P) matrix never
exists. What is made of a block is `less.features`' business. `gradients_ref` is the oracle: autograd, one
row at a time, through PEFT's own forward.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from datastore.errors import UnsupportedError
from less.data.batching import Batch
from less.lm_head import Unembedding, find_unembedding, linear_cross_entropy, lm_head
from less.models import lora_layers, lora_parameters

__all__ = ["BlockSink", "gradients_ref", "per_sample_gradients", "token_losses"]

BlockSink = Callable[[str, Tensor], None]
"""Takes a parameter's name and its (B, p) float32 gradients; may overwrite them, must not keep them."""


def per_sample_gradients(model: PeftModel, batch: Batch, sink: BlockSink) -> Tensor:
    """Run one batch forward and backward, handing each parameter's per-sample gradients to `sink`.

    Args:
        model: a LoRA model from `less.models.adapted_model`, in evaluation mode.
        batch: B rows of T tokens, every row with a supervised token.
        sink: called once for each LoRA parameter, last layer first, within the backward pass.

    Returns:
        losses_B: each row's mean negative log-likelihood over its supervised tokens, float32.

    Raises:
        UnsupportedError: a LoRA layer is called twice in one forward pass, is not called, or sees rows
            that are not the batch's (routed experts).
    """
    seen: set[str] = set()
    head = find_unembedding(model, batch.input_ids_BT.numel())  # its trial run is not for the streaming layers
    with _streaming_lora(model, batch.input_ids_BT.shape, sink, seen), torch.enable_grad():
        losses_B = token_losses(model, batch, head)
        missing = lora_layers(model).keys() - seen
        if missing:
            raise UnsupportedError(
                f"{min(missing)}: this LoRA layer takes no part in the forward pass, so it has no gradient; "
                "leave it out of target_modules"
            )
        losses_B.sum().backward()
    return losses_B.detach()


def token_losses(model: nn.Module, batch: Batch, head: Unembedding | None) -> Tensor:
    """Each row's mean negative log-likelihood over its supervised tokens, with its graph.

    A hook on the LM head's input takes the positions that predict a supervised token. With a `head` their loss is
    made from the embeddings and the model's own head gets nothing to do; without, it runs on those positions only,
    and scaling and soft-capping that the model does after it stay as the model has them.

    Args:
        model: a causal language model.
        batch: B rows of T tokens, every row with a supervised token.
        head: from `less.lm_head.find_unembedding`, where the logits of all those tokens would be too many.

    Returns:
        losses_B, float32.
    """
    targets_BT = batch.supervised_BT[:, 1:]
    row_S, position_S = targets_BT.nonzero(as_tuple=True)
    token_S = batch.input_ids_BT[:, 1:][row_S, position_S]
    num_supervised_B = targets_BT.sum(dim=1)
    predicting: list[Tensor] = []

    def keep_predicting_positions(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden_BTD, *rest = args
        predicting.append(hidden_BTD[row_S, position_S])
        return (hidden_BTD[:, :0] if head else predicting[0].unsqueeze(0), *rest)

    positions = {} if batch.position_ids_BT is None else {"position_ids": batch.position_ids_BT}
    hook = lm_head(model).register_forward_pre_hook(keep_predicting_positions)
    try:
        logits_1SV = model(
            input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, use_cache=False, **positions
        ).logits
    finally:
        hook.remove()
    if head is None:
        nll_S = F.cross_entropy(logits_1SV[0].float(), token_S, reduction="none")
    else:
        nll_S = linear_cross_entropy(head, predicting[0], token_S)
    weighted_S = nll_S / num_supervised_B[row_S]
    return torch.zeros(len(targets_BT), device=nll_S.device).index_add(0, row_S, weighted_S)


def gradients_ref(model: PeftModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """`per_sample_gradients`, slowly: autograd, a row at a time, unpadded, whole logits, PEFT's forward.

    Returns:
        losses_B and, by parameter name, its (B, p) gradients; float32.
    """
    parameters = lora_parameters(model)
    losses, grads = [], []
    with _requiring_grad(list(parameters.values())), torch.enable_grad():
        for ids_T, mask_T, supervised_T in zip(
            batch.input_ids_BT, batch.attention_mask_BT.bool(), batch.supervised_BT, strict=True
        ):
            ids_1T, supervised_1T = ids_T[mask_T][None], supervised_T[mask_T][None]
            logits_TV = model(input_ids=ids_1T, use_cache=False).logits[0].float()
            labels_T = ids_1T[0, 1:].masked_fill(~supervised_1T[0, 1:], -100)
            loss = F.cross_entropy(logits_TV[:-1], labels_T)
            losses.append(loss.detach())
            grads.append(torch.autograd.grad(loss, list(parameters.values())))
    blocks = {name: torch.stack([row[i].reshape(-1) for row in grads]) for i, name in enumerate(parameters)}
    return torch.stack(losses), blocks


class _StreamingLora(torch.autograd.Function):
    """base + s · B A x, whose backward pass gives per-sample weight gradients to a sink instead of autograd.

    It computes no gradient of x where nothing before it is adapted, which ends the backward pass at the
    first adapted layer.
    """

    @staticmethod
    def forward(
        ctx: Any, base_BTO: Tensor, x_BTI: Tensor, a_RI: Tensor, b_OR: Tensor, scaling: float,
        sink_a: Callable[[Tensor], None], sink_b: Callable[[Tensor], None],
    ) -> Tensor:  # fmt: skip
        h_BTR = scaling * (x_BTI.to(a_RI.dtype) @ a_RI.T)
        ctx.save_for_backward(x_BTI, h_BTR, a_RI, b_OR)
        ctx.scaling, ctx.sink_a, ctx.sink_b = scaling, sink_a, sink_b
        return (base_BTO + h_BTR @ b_OR.T).to(base_BTO.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_BTO,) = grad_outputs
        x_BTI, h_BTR, a_RI, b_OR = ctx.saved_tensors
        grad32_BTO = grad_BTO.to(b_OR.dtype)
        ctx.sink_b((grad32_BTO.mT @ h_BTR).flatten(1))  # (B, O·R)
        grad_h_BTR = ctx.scaling * (grad32_BTO @ b_OR)
        ctx.sink_a((grad_h_BTR.mT @ x_BTI.to(a_RI.dtype)).flatten(1))  # (B, R·I)
        grad_x_BTI = (grad_h_BTR @ a_RI).to(x_BTI.dtype) if ctx.needs_input_grad[1] else None
        return grad_BTO, grad_x_BTI, None, None, None, None, None


@contextmanager
def _streaming_lora(model: PeftModel, shape_BT: torch.Size, sink: BlockSink, seen: set[str]) -> Iterator[None]:
    """Within it, every LoRA layer of `model` runs `_StreamingLora`."""
    layers = lora_layers(model)

    def forward(name: str, layer: LoraLayer, x_BTI: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if name in seen:
            raise UnsupportedError(
                f"{name}: this LoRA layer is called twice in one forward pass; its update direction is not a "
                "sum over the calls. Leave it out of target_modules"
            )
        if x_BTI.shape[:-1] != shape_BT:
            raise UnsupportedError(
                f"{name}: this LoRA layer sees rows of shape {tuple(x_BTI.shape)}, expected "
                f"{tuple(shape_BT)} tokens: routed experts are not supported. Leave it out of target_modules"
            )
        seen.add(name)
        base_BTO = layer.base_layer(x_BTI, *args, **kwargs)
        adapter = layer.active_adapters[0]
        return _StreamingLora.apply(
            base_BTO, x_BTI, layer.lora_A[adapter].weight, layer.lora_B[adapter].weight,
            layer.scaling[adapter], partial(sink, f"{name}.lora_A.weight"), partial(sink, f"{name}.lora_B.weight"),
        )  # fmt: skip

    # The weights take no gradient from autograd; requiring one is what makes it record the graph.
    with _requiring_grad(list(lora_parameters(model).values())), _exact_float32():
        for name, layer in layers.items():
            layer.forward = partial(forward, name, layer)
        try:
            yield
        finally:
            for layer in layers.values():
                del layer.forward


@contextmanager
def _requiring_grad(parameters: list[Tensor]) -> Iterator[None]:
    before = [p.requires_grad for p in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, required in zip(parameters, before, strict=True):
            parameter.requires_grad_(required)


@contextmanager
def _exact_float32() -> Iterator[None]:
    """No TF32: float32 products on CUDA keep float32's 24 bits."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
