"""The model under study: base weights, one LoRA adapter on top, and the order of its P parameters.

    y = W x + s · B (A x)        A: (R, in), B: (out, R), s = alpha / R (LoRA, Hu et al. 2022, §4.1)

`ParamLayout` is the seam of the whole engine: a gradient row, an Adam moment and a column of the projection
mean nothing without the order of parameters that it fixes. Adapters whose gradients the hooks could not see
rightly are refused here, by name. Training is `less.training`'s business, Adam's moments are
`less.checkpoints`'.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from datastore.errors import CheckpointError, ModelError, SettingError, UnsupportedError

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "ParamLayout",
    "adapted_model",
    "context_length",
    "load_adapter_weights",
    "load_base_model",
    "load_config",
    "load_tokenizer",
    "lora_layers",
    "lora_model",
    "lora_parameters",
    "model_fingerprint",
    "resolve_device",
    "resolve_dtype",
]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_FINGERPRINT_VALUES = 1024  # values read of each weight: enough to tell models apart, cheap at 70B


@dataclass(frozen=True)
class ParamLayout:
    """Names and shapes of the LoRA parameters, in the order in which they make up a gradient of length P."""

    names: tuple[str, ...]
    """As PEFT saves them: without the adapter's own name."""
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, model: nn.Module) -> "ParamLayout":
        """The layout of `model`'s LoRA parameters, in `named_parameters` order."""
        parameters = lora_parameters(model)
        return cls(tuple(parameters), tuple(tuple(p.shape) for p in parameters.values()))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of coordinates of each parameter."""
        return tuple(prod(shape) for shape in self.shapes)

    @cached_property
    def offsets(self) -> dict[str, int]:
        """First coordinate of each parameter within the P."""
        offsets, total = {}, 0
        for name, size in zip(self.names, self.sizes, strict=True):
            offsets[name] = total
            total += size
        return offsets

    @property
    def num_params(self) -> int:
        """P, the length of one gradient."""
        return sum(self.sizes)

    def slice(self, name: str) -> slice:
        """The columns of a (B, P) matrix that belong to parameter `name`."""
        start = self.offsets[name]
        return slice(start, start + self.sizes[self.names.index(name)])

    @cached_property
    def hash(self) -> str:
        """sha256 over names and shapes, in order."""
        return hashlib.sha256(json.dumps([self.names, self.shapes]).encode()).hexdigest()


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """`auto` is CUDA where there is one, else the CPU.

    Raises:
        SettingError: no such kind of device, or CUDA was asked for and there is none.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as err:
        raise SettingError(f"--device {device}: not a device; expected auto, cpu, cuda or cuda:N") from err
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise SettingError(f"--device {device}: this machine has no usable CUDA device; use --device cpu")
    return resolved


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on CUDA and float32 on the CPU.

    Raises:
        SettingError: neither auto, float32 nor bfloat16.
    """
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype not in _DTYPES:
        raise SettingError(f"dtype must be auto, float32 or bfloat16, got {dtype!r}")
    return _DTYPES[dtype]


def load_config(name: str | Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The configuration of a model, without its weights.

    Raises:
        ModelError: none is found there.
    """
    try:
        return AutoConfig.from_pretrained(str(name), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as err:
        raise ModelError(f"no model is found at {str(name)!r}: {_first_line(err)}") from err


def load_tokenizer(
    tokenizer: str | Path | PreTrainedTokenizerBase, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer itself, or the one kept in the folder or hub repository of that name.

    Raises:
        ModelError: none is found there.
    """
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
    try:
        return AutoTokenizer.from_pretrained(str(tokenizer), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as err:
        raise ModelError(f"no tokenizer can be loaded from {str(tokenizer)!r}: {_first_line(err)}") from err


def load_base_model(
    model: str | Path | PreTrainedModel,
    *,
    dtype: str = "auto",
    device: str | torch.device = "auto",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The base model, on `device`, in evaluation mode.

    Args:
        model: a folder, a hub name, or a loaded model. A loaded model is used as it is: `dtype` and
            `device` must then be `auto` or agree with it.
        dtype: auto, float32 or bfloat16 (see `resolve_dtype`).
        device: auto, cpu, cuda or cuda:N.
        trust_remote_code: allow code that comes with the model to run.

    Raises:
        ModelError: no such model, or a PEFT model where its base is expected.
        SettingError: `dtype` or `device` contradict a loaded model.
    """
    if isinstance(model, PeftModel):
        raise ModelError(
            "got a PEFT model, expected its base model: adapters are taken from the checkpoints. "
            "Pass `model.unload()` or the base model's name"
        )
    if isinstance(model, PreTrainedModel):
        for word, asked, found in (
            ("device", str(device), str(model.device)),
            ("dtype", dtype, str(model.dtype).removeprefix("torch.")),
        ):
            if asked != "auto" and asked != found and asked != found.split(":")[0]:
                raise SettingError(f"{word} is {asked} but the model given is on {found}; leave it at auto")
        return model.eval()
    where = resolve_device(device)
    if not isinstance(model, str | Path):
        raise ModelError(f"model must be a name, a folder or a transformers model, got {type(model).__name__}")
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            str(model), dtype=resolve_dtype(dtype, where), trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, ImportError, KeyError, SafetensorError) as err:
        raise ModelError(f"no causal language model can be loaded from {str(model)!r}: {_first_line(err)}") from err
    return loaded.to(where).eval()


def context_length(config: PretrainedConfig) -> int | None:
    """Most tokens that a model's positions allow, or None where its configuration does not say."""
    config = config.get_text_config()
    for key in ("max_position_embeddings", "n_positions", "max_seq_len"):
        if isinstance(length := getattr(config, key, None), int) and length > 0:
            return length
    return None


def model_fingerprint(model: nn.Module) -> str:
    """sha256 over the name, shape and up to 1024 evenly spaced values of every base weight.

    The values are rounded to bfloat16 first, so a model has one fingerprint in either dtype. LoRA weights
    are left out: a checkpoint has its own hash.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            continue
        name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        flat = parameter.detach().reshape(-1)
        stride = max(1, flat.numel() // _FINGERPRINT_VALUES)
        sample = flat[::stride][:_FINGERPRINT_VALUES].to("cpu", torch.bfloat16).view(torch.int16)
        digest.update(json.dumps([name, list(parameter.shape)]).encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def lora_model(base: PreTrainedModel, config: LoraConfig) -> Iterator[PeftModel]:
    """`base` with an untrained LoRA adapter; afterwards, whatever happens, the base is as it was.

    Adapter weights are kept in float32 whatever the base's dtype, as PEFT trains them.

    Raises:
        UnsupportedError: the adapter does not fit the model, or its per-sample gradients would be wrong.
    """
    required_grad = {name: p.requires_grad for name, p in base.named_parameters()}
    use_cache, training = getattr(base.config, "use_cache", None), base.training
    try:
        try:
            model = get_peft_model(base, config)
        except ValueError as err:
            raise UnsupportedError(f"target_modules do not fit this model: {_first_line(err)}") from err
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
def adapted_model(base: PreTrainedModel, folder: Path) -> Iterator[PeftModel]:
    """`base` with the LoRA adapter of a checkpoint folder; the base is given back as it was.

    Raises:
        CheckpointError: the folder holds no adapter, or one that does not fit the model.
        UnsupportedError: an adapter whose per-sample gradients would be wrong.
    """
    with lora_model(base, _load_adapter_config(folder)) as model:
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


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Every module that carries a LoRA adapter, by its PEFT name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def lora_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The LoRA parameters in `named_parameters` order, under the names PEFT saves them by."""
    return {
        re.sub(r"(\.lora_[AB])\.default\.", r"\1.", name): parameter
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }


def _load_adapter_config(folder: Path) -> LoraConfig:
    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        raise CheckpointError(f"{folder}: no {ADAPTER_CONFIG}; expected a checkpoint of a PEFT LoRA model")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as err:
        raise CheckpointError(f"{file} is not JSON: {err}") from err
    _refuse_unsupported_config(raw, file)
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


def _refuse_unsupported_layers(model: PeftModel) -> None:
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


def _first_line(err: BaseException) -> str:
    return (str(err).strip() or type(err).__name__).splitlines()[0]
