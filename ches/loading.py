"""The model that DPO starts from, with or without an adapter on top, ready for forward passes."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from datastore.errors import CheckpointError, SettingError
from less.models import first_line, load_base_model, lora_layers

__all__ = ["adapter_hash", "base_of", "ready_model"]


@contextmanager
def ready_model(
    model: "str | Path | PreTrainedModel | PeftModel",
    adapter: str | Path | None,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> "Iterator[PreTrainedModel | PeftModel]":
    """The model with its adapter, in evaluation mode; a model that was given is given back as it was.

    Args:
        model: a folder, a hub name, or a loaded model, with or without a PEFT adapter.
        adapter: folder of a PEFT adapter of any kind to put on top.
        dtype, device, trust_remote_code: as in `less.models.load_base_model`.

    Raises:
        CheckpointError: the folder holds no adapter for this model.
        ModelError: there is no such model.
        SettingError: there are two adapters, or `dtype` or `device` contradict a loaded model.
    """
    if isinstance(model, PeftModel) and adapter is not None:
        raise SettingError("the model given has an adapter already; leave out --adapter, or give its base model")
    base = load_base_model(base_of(model), dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    loaded: PreTrainedModel | PeftModel = model if isinstance(model, PeftModel) else base
    training, on_top = loaded.training, None
    learning = [(parameter, parameter.requires_grad) for parameter in loaded.parameters()]
    try:
        if adapter is not None:
            loaded = on_top = _with_adapter(loaded, adapter)
        yield loaded.eval()
    finally:
        if on_top is not None:
            loaded = on_top.unload()
        for parameter, learns in learning:  # an adapter on top freezes what is below
            parameter.requires_grad_(learns)
        loaded.train(training)


def _with_adapter(base: PreTrainedModel, adapter: str | Path) -> PeftModel:
    try:
        return PeftModel.from_pretrained(base, str(adapter))
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as err:
        raise CheckpointError(
            f"no adapter for this model can be loaded from {adapter}: {first_line(err)}; expected a folder as PEFT "
            "saves it (adapter_config.json, adapter_model.safetensors)"
        ) from err


def base_of(model: Any) -> Any:
    """What a PEFT model is an adapter of; anything else as it is."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def adapter_hash(model: nn.Module) -> str | None:
    """sha256 over the weights of the active adapters and LoRA's factors alpha / R; None without an adapter."""
    if not isinstance(model, PeftModel):
        return None
    digest = hashlib.sha256()
    for adapter in model.active_adapters:
        weights = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
        for name, tensor in sorted(weights.items()):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().numpy().tobytes())
        for name, layer in lora_layers(model).items():
            digest.update(f"{name} {layer.scaling.get(adapter)}".encode())
    return digest.hexdigest()
