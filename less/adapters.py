"""LoRA adapters on a base model: put on, loaded from a checkpoint, taken off again.

Adapters whose per-sample gradients the hooks could not see rightly are refused here, by name: it is better to
stop than to miscount. Which parameters an adapter has, and in which order, is `less.models.ParamLayout`.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from datastore.errors import CheckpointError, UnsupportedError
from less.models import first_line, lora_layers, lora_parameters

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

__all__ = [
    "ADAPTER_CONFIG", "ADAPTER_WEIGHTS", "adapted_model", "load_adapter_config", "load_adapter_weights", "lora_model",
]  # fmt: skip

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


@contextmanager
def lora_model(base: "PreTrainedModel", config: "LoraConfig") -> "Iterator[PeftModel]":
    """`base` with an untrained LoRA adapter; afterwards, whatever happens, the base is as it was.

    Adapter weights are kept in float32 whatever the base's dtype, as PEFT trains them.

    Raises:
        UnsupportedError: the adapter does not fit the model, or its per-sample gradients would be wrong.
    """
    from peft import get_peft_model

    required_grad = {name: p.requires_grad for name, p in base.named_parameters()}
    use_cache, training = getattr(base.config, "use_cache", None), base.training
    try:
        try:
            with torch.random.fork_rng(range(torch.cuda.device_count())):  # fresh weights draw from it
                model = get_peft_model(base, config)
        except ValueError as err:
            raise UnsupportedError(f"target_modules do not fit this model: {first_line(err)}") from err
        _refuse_unsupported_layers(model)
        yield model
    finally:
        # PEFT's own `unload` needs the PeftModel, and a failure half-way through the injection leaves none.
        for name, layer in lora_layers(base).items():
            base.set_submodule(name, layer.get_base_layer())
        vars(base).pop("peft_config", None)
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(required_grad[name])
        if use_cache is not None:
            base.config.use_cache = use_cache  # the Trainer turns it off
        base.train(training)


@contextmanager
def adapted_model(base: "PreTrainedModel", folder: Path) -> "Iterator[PeftModel]":
    """`base` with the LoRA adapter of a checkpoint folder; the base is given back as it was.

    Raises:
        CheckpointError: the folder holds no adapter, or one that does not fit the model.
        UnsupportedError: an adapter whose per-sample gradients would be wrong.
    """
    with lora_model(base, load_adapter_config(folder)) as model:
        load_adapter_weights(model, folder)
        yield model.eval()


def load_adapter_weights(model: nn.Module, folder: Path) -> None:
    """Overwrite `model`'s LoRA weights with those saved in `folder`, every name and shape checked.

    Raises:
        CheckpointError: the file is missing or damaged, or its parameters are not the model's.
    """
    file = folder / ADAPTER_WEIGHTS
    if not file.is_file():
        raise CheckpointError(f"{folder}: no {ADAPTER_WEIGHTS}; expected a folder as the Trainer or PEFT saves it")
    try:
        saved = load_file(file)
    except SafetensorError as err:
        raise CheckpointError(f"{file} is damaged: {err}; copy it again from where it was trained") from err
    parameters = lora_parameters(model)
    for name in sorted(saved.keys() | parameters.keys()):
        if name not in saved:
            raise CheckpointError(f"{file} lacks {name}, which its {ADAPTER_CONFIG} asks for on this model")
        if name not in parameters:
            raise CheckpointError(f"{file} holds {name}, which this model has not; is it the right base model?")
        if saved[name].shape != parameters[name].shape:
            raise CheckpointError(
                f"{name} has shape {tuple(saved[name].shape)} in {file} and {tuple(parameters[name].shape)} "
                "on this model; is it the right base model?"
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])


def load_adapter_config(folder: Path) -> "LoraConfig":
    """The shape of a checkpoint's adapter, without dropout, for weights that come from a file.

    Raises:
        CheckpointError: there is none; UnsupportedError: see `lora_model`.
    """
    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        raise CheckpointError(f"{folder}: no {ADAPTER_CONFIG}; expected a checkpoint of a PEFT LoRA model")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as err:
        raise CheckpointError(f"{file} is not JSON: {err}") from err
    _refuse_unsupported_config(raw, file)
    from peft import LoraConfig

    config = LoraConfig.from_pretrained(str(folder))
    config.inference_mode = False
    config.init_lora_weights = False  # the weights come from the file
    config.base_model_name_or_path = None  # the base is known by its fingerprint, not by where it lay in training
    config.lora_dropout = 0.0
    return config


def _refuse_unsupported_config(raw: dict[str, Any], file: Path) -> None:
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise UnsupportedError(f"{file}: adapter type {kind} is not supported; only LORA is")
    reasons = {
        "use_dora": "DoRA rescales the whole weight, so a row's gradient is not a sum over its tokens",
        "modules_to_save": "modules trained whole have no LoRA gradient",
        "target_parameters": "LoRA on bare parameters (routed experts) mixes the rows of a batch",
        "trainable_token_indices": "trained token embeddings have no LoRA gradient",
        "lora_bias": "a LoRA bias is not part of the gradient",
        "use_qalora": "QALoRA pools the input of A",
        "use_bdlora": "block-diagonal LoRA is another function",
        "alora_invocation_tokens": "activated LoRA applies to some tokens only",
        "monteclora_config": "MonteCLoRA samples its weights",
        "velora_config": "VeLoRA compresses activations",
        "kasa_config": "KaSA changes the base weights",
        "arrow_config": "Arrow routes between adapters",
    }
    for key, why in reasons.items():
        if raw.get(key):
            raise UnsupportedError(f"{file}: {key} = {raw[key]!r} is not supported ({why}); train plain LoRA")
    if raw.get("bias", "none") != "none":
        raise UnsupportedError(
            f"{file}: bias = {raw['bias']!r} is not supported (trained biases have no LoRA gradient); "
            "train with bias='none'"
        )
    start = raw.get("init_lora_weights")
    if isinstance(start, str) and start.split("_")[0] in {"pissa", "olora", "corda", "loftq"}:
        raise UnsupportedError(
            f"{file}: init_lora_weights = {start!r} changes the base weights; convert the adapter to plain "
            "LoRA with PEFT's path_initial_model_for_weight_conversion"
        )


def _refuse_unsupported_layers(model: "PeftModel") -> None:
    head = model.get_base_model().get_output_embeddings()
    for name, layer in lora_layers(model).items():
        kind = type(layer).__name__
        if kind not in {"Linear", "Linear4bit", "Linear8bitLt"}:
            raise UnsupportedError(
                f"{name}: LoRA on {type(layer.get_base_layer()).__name__} ({kind}) is not supported; "
                "only linear layers are. Leave it out of target_modules"
            )
        if layer is head:
            raise UnsupportedError(f"{name}: LoRA on the LM head is not supported; leave it out of target_modules")
        if layer.lora_variant:
            raise UnsupportedError(f"{name}: LoRA variant {layer.lora_variant} is not supported; train plain LoRA")
