"""Floating-point operations that a forward and backward pass needs, and a GPU's most: model FLOP utilisation.

Of a row with T tokens, S of them supervised (a multiplication and an addition are two):

    linear layers   2 N T forward, 2 N T for the gradient of their inputs; N weights, without embedding and head
    LoRA            2 P T forward, 2 P T for the gradient of inputs, 2 P T for that of A and B; P parameters
    attention       2 T² H forward in each layer (T²/2 pairs, it is causal; scores and values, H wide), twice backward
    head            2 V D S forward, 2 V D S for the gradient of its input

Frozen weights take no gradient. Padding, recomputation and the logits of other tokens are work, but not the model's:
they count in the time alone.
"""

from collections.abc import Sequence

import torch
from torch import nn

from less.lm_head import lm_head
from less.models import lora_parameters

__all__ = ["gpu_peak_flops", "model_flops"]

_PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
"""bfloat16, dense, of the SXM form, by a word of the device's name; H100 PCIe and NVL have less."""


def model_flops(model: nn.Module, rows: Sequence[tuple[int, int]]) -> int:
    """FLOPs of a forward and backward pass over rows of (T, S) tokens.

    Args:
        model: a LoRA model.
        rows: tokens and supervised tokens of each.
    """
    head, config = lm_head(model), model.config.get_text_config()
    num_lora = sum(p.numel() for p in lora_parameters(model).values())
    linears = (m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "lora_" not in name)
    num_linear = sum(module.weight.numel() for module in linears if module is not head)
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    total = 0
    for num_tokens, num_supervised in rows:
        total += (4 * num_linear + 6 * num_lora) * num_tokens
        total += 6 * config.num_hidden_layers * width * num_tokens**2
        total += 4 * head.weight.numel() * num_supervised
    return total


def gpu_peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Most FLOPs a second of the GPU in bfloat16, where its name says; else, and for other types, None."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    if "PCIe" in name or "NVL" in name:
        return None
    return next((peak for word, peak in _PEAKS.items() if word in name), None)
