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

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datastore.errors import UnsupportedError
from less.data.batching import Batch
from less.lm_head import Unembedding, find_unembedding, linear_cross_entropy, lm_head
from less.models import layer_of, lora_layers, lora_parameters

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

__all__ = ["BlockSink", "gradients_ref", "per_sample_gradients", "token_losses"]

BlockSink = Callable[[str, Tensor], None]
"""Takes a parameter's name and its (B, p) float32 gradients; may overwrite them, must not keep them."""

_WAY_OUT = "leave it out of target_modules in training, or choose other --layers"


def per_sample_gradients(
    model: "PeftModel", batch: Batch, sink: BlockSink, layers: Collection[str] | None = None
) -> Tensor:
    """Run one batch forward and backward, handing each parameter's per-sample gradients to `sink`.

    Args:
        model: a LoRA model from `less.adapters.adapted_model`, in evaluation mode.
        batch: B rows of T tokens, every row with a supervised token.
        sink: called once for each LoRA parameter, last layer first, within the backward pass.
        layers: the LoRA layers whose gradients are wanted, None for all; the backward pass ends at the first of them.

    Returns:
        losses_B: each row's mean negative log-likelihood over its supervised tokens, float32.

    Raises:
        UnsupportedError: a LoRA layer among them is called twice in one forward pass, is not called, or sees rows
            that are not the batch's (routed experts).
    """
    unseen = set(lora_layers(model) if layers is None else layers)
    head = find_unembedding(model, batch.input_ids_BT.numel())  # its trial run is not for the streaming layers
    with _streaming_lora(model, batch.input_ids_BT.shape, sink, unseen), torch.enable_grad():
        losses_B = token_losses(model, batch, head)
        if unseen:
            raise UnsupportedError(
                f"{min(unseen)}: this LoRA layer takes no part in the forward pass, so it has no gradient; {_WAY_OUT}"
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
    row_S, position_S = batch.predicted_S2.T
    token_S = batch.input_ids_BT[row_S, position_S]
    num_predicted_B = batch.supervised_BT[:, 1:].sum(dim=1)
    predicting: list[Tensor] = []

    def keep_predicting_positions(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden_BTD, *rest = args
        predicting.append(hidden_BTD[row_S, position_S - 1])
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
    nll_BT = nll_S.new_zeros(batch.input_ids_BT.shape).index_put((row_S, position_S), nll_S)  # no order to sum in
    return nll_BT.sum(dim=1) / num_predicted_B


def gradients_ref(model: "PeftModel", batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """`per_sample_gradients`, slowly: autograd, a row at a time, unpadded, whole logits, PEFT's forward.

    Returns:
        losses_B and, by parameter name, its (B, p) gradients; float32.
    """
    parameters = lora_parameters(model)
    losses, grads = [], []
    with _requiring_grad(dict.fromkeys(parameters.values(), True)), torch.enable_grad():
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

    A and B require a gradient where theirs is wanted. No gradient of x is computed where none before it is, which
    ends the backward pass at the first layer that is wanted.
    """

    @staticmethod
    def forward(
        ctx: Any, base_BTO: Tensor, x_BTI: Tensor, a_RI: Tensor, b_OR: Tensor, scaling: float,
        sink_a: Callable[[Tensor], None], sink_b: Callable[[Tensor], None],
    ) -> Tensor:  # fmt: skip
        h_BTR = scaling * (x_BTI.to(a_RI.dtype) @ a_RI.T)
        kept = (x_BTI, h_BTR) if ctx.needs_input_grad[2] else (None, None)
        ctx.save_for_backward(*kept, a_RI, b_OR)
        ctx.scaling, ctx.sink_a, ctx.sink_b = scaling, sink_a, sink_b
        return (base_BTO + h_BTR @ b_OR.T).to(base_BTO.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_BTO,) = grad_outputs
        x_BTI, h_BTR, a_RI, b_OR = ctx.saved_tensors
        grad32_BTO = grad_BTO.to(b_OR.dtype)
        grad_h_BTR = ctx.scaling * (grad32_BTO @ b_OR)
        if x_BTI is not None:
            ctx.sink_b((grad32_BTO.mT @ h_BTR).flatten(1))  # (B, O·R)
            ctx.sink_a((grad_h_BTR.mT @ x_BTI.to(a_RI.dtype)).flatten(1))  # (B, R·I)
        grad_x_BTI = (grad_h_BTR @ a_RI).to(grad_BTO.dtype) if ctx.needs_input_grad[1] else None
        return grad_BTO, grad_x_BTI, None, None, None, None, None


@contextmanager
def _streaming_lora(model: "PeftModel", shape_BT: torch.Size, sink: BlockSink, unseen: set[str]) -> Iterator[None]:
    """Within it, every LoRA layer of `model` runs `_StreamingLora`; those of `unseen` leave it as they are called."""
    layers, wanted = lora_layers(model), frozenset(unseen)

    def forward(name: str, layer: "LoraLayer", x_BTI: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if name in wanted:
            if name not in unseen:
                raise UnsupportedError(
                    f"{name}: this LoRA layer is called twice in one forward pass, and its update direction is not a "
                    f"sum over the calls; {_WAY_OUT}"
                )
            if x_BTI.shape[:-1] != shape_BT:
                raise UnsupportedError(
                    f"{name}: this LoRA layer sees rows of shape {tuple(x_BTI.shape)}, expected "
                    f"{tuple(shape_BT)} tokens: routed experts are not supported; {_WAY_OUT}"
                )
            unseen.remove(name)
        base_BTO = layer.base_layer(x_BTI, *args, **kwargs)
        adapter = layer.active_adapters[0]
        return _StreamingLora.apply(
            base_BTO, x_BTI, layer.lora_A[adapter].weight, layer.lora_B[adapter].weight,
            layer.scaling[adapter], partial(sink, f"{name}.lora_A.weight"), partial(sink, f"{name}.lora_B.weight"),
        )  # fmt: skip

    # The weights take no gradient from autograd; requiring one is what makes it record the graph.
    wants_grad = {p: layer_of(name) in wanted for name, p in lora_parameters(model).items()}
    with _requiring_grad(wants_grad), _exact_float32():
        for name, layer in layers.items():
            layer.forward = partial(forward, name, layer)
        try:
            yield
        finally:
            for layer in layers.values():
                del layer.forward


@contextmanager
def _requiring_grad(required: dict[Tensor, bool]) -> Iterator[None]:
    before = {parameter: parameter.requires_grad for parameter in required}
    for parameter, required_now in required.items():
        parameter.requires_grad_(required_now)
    try:
        yield
    finally:
        for parameter, required_before in before.items():
            parameter.requires_grad_(required_before)


@contextmanager
def _exact_float32() -> Iterator[None]:
    """No TF32: float32 products on CUDA keep float32's 24 bits."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
