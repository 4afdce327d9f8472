"""The model under study: base weights, one LoRA adapter on top, and the order of its P parameters.

    y = W x + s · B (A x)        A: (R, in), B: (out, R), s = alpha / R (LoRA, Hu et al. 2022, §4.1)

`ParamLayout` is the seam of the whole engine: a gradient row, an Adam moment and a column of the projection
mean nothing without the order of parameters that it fixes. Putting an adapter on is `less.adapters`' business.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers  # its names are loaded when they are used: `transformers.AutoModel`
from safetensors import SafetensorError
from torch import Tensor, nn

from datastore.errors import ModelError, SettingError

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "ParamLayout",
    "choose_layers",
    "context_length",
    "first_line",
    "layer_of",
    "load_base_model",
    "load_config",
    "load_tokenizer",
    "lora_layers",
    "lora_parameters",
    "model_fingerprint",
    "resolve_device",
    "resolve_dtype",
]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_FINGERPRINT_VALUES = 1024  # values read of each weight: enough to tell models apart, cheap at 70B


@dataclass(frozen=True)
class ParamLayout:
    """Names and shapes of the LoRA parameters, in the order in which they make up a gradient of length P."""

    names: tuple[str, ...]
    """As PEFT saves them: without the adapter's own name."""
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, model: nn.Module, layers: str = "all") -> "ParamLayout":
        """The layout of `model`'s LoRA parameters, in `named_parameters` order, or of those in some `layers`.

        Raises:
            SettingError: see `choose_layers`.
        """
        chosen = choose_layers(list(lora_layers(model)), layers)
        parameters = {name: p for name, p in lora_parameters(model).items() if layer_of(name) in chosen}
        return cls(tuple(parameters), tuple(tuple(p.shape) for p in parameters.values()))

    @cached_property
    def layers(self) -> frozenset[str]:
        """The LoRA layers that the parameters belong to."""
        return frozenset(map(layer_of, self.names))

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


def load_config(name: str | Path, *, trust_remote_code: bool = False) -> "PretrainedConfig":
    """The configuration of a model, without its weights.

    Raises:
        ModelError: none is found there.
    """
    try:
        return transformers.AutoConfig.from_pretrained(str(name), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as err:
        raise ModelError(f"no model is found at {str(name)!r}: {first_line(err)}") from err


def load_tokenizer(
    tokenizer: "str | Path | PreTrainedTokenizerBase", *, trust_remote_code: bool = False
) -> "PreTrainedTokenizerBase":
    """The tokenizer itself, or the one kept in the folder or hub repository of that name.

    Raises:
        ModelError: none is found there.
    """
    if isinstance(tokenizer, transformers.PreTrainedTokenizerBase):
        return tokenizer
    if not str(tokenizer):
        raise ModelError("the model has no name to load its tokenizer by; give the tokenizer too")
    try:
        return transformers.AutoTokenizer.from_pretrained(str(tokenizer), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as err:
        raise ModelError(f"no tokenizer can be loaded from {str(tokenizer)!r}: {first_line(err)}") from err


def load_base_model(
    model: "str | Path | PreTrainedModel",
    *,
    dtype: str = "auto",
    device: str | torch.device = "auto",
    trust_remote_code: bool = False,
) -> "PreTrainedModel":
    """The base model, on `device`.

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
    from peft import PeftModel

    if isinstance(model, PeftModel):
        raise ModelError(
            "got a PEFT model, expected its base model: adapters are taken from the checkpoints. "
            "Pass `model.unload()` or the base model's name"
        )
    if isinstance(model, transformers.PreTrainedModel):
        for word, asked, found in (
            ("device", str(device), str(model.device)),
            ("dtype", dtype, str(model.dtype).removeprefix("torch.")),
        ):
            if asked != "auto" and asked != found and asked != found.split(":")[0]:
                raise SettingError(f"{word} is {asked} but the model given is on {found}; leave it at auto")
        return model
    where = resolve_device(device)
    if isinstance(model, str | Path) and str(model)[:1] in "/.~" and not Path(model).is_dir():
        raise ModelError(f"there is no folder {model}; expected a model's folder or its name on the hub")
    if not isinstance(model, str | Path):
        raise ModelError(f"model must be a name, a folder or a transformers model, got {type(model).__name__}")
    try:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            str(model), dtype=resolve_dtype(dtype, where), trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, ImportError, KeyError, SafetensorError) as err:
        raise ModelError(f"no causal language model can be loaded from {str(model)!r}: {first_line(err)}") from err
    return loaded.to(where)


def context_length(config: "PretrainedConfig") -> int | None:
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


def lora_layers(model: nn.Module) -> "dict[str, LoraLayer]":
    """Every module that carries a LoRA adapter, by its PEFT name."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def lora_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The LoRA parameters in `named_parameters` order, under the names PEFT saves them by."""
    return {
        re.sub(r"(\.lora_[AB])\.default\.", r"\1.", name): parameter
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }


def layer_of(parameter: str) -> str:
    """The LoRA layer that a parameter belongs to."""
    return parameter.rpartition(".lora_")[0]


def choose_layers(names: Sequence[str], layers: str) -> frozenset[str]:
    """Those of the LoRA layers `names` that `layers` asks for.

    Args:
        names: as PEFT has them, such as `base_model.model.model.layers.3.self_attn.q_proj`.
        layers: `all`; `last:N`, those in the last N blocks, a block being known by the first number in a name; or a
            regular expression that is searched in the names.

    Raises:
        SettingError: there are no N blocks, it is no regular expression, or it finds none.
    """
    if layers == "all":
        return frozenset(names)
    if last := re.fullmatch(r"last:(\d+)", layers):
        block_of = {name: int(number[0]) for name in names if (number := re.search(r"(?<=\.)\d+(?=\.)", name))}
        blocks = sorted(set(block_of.values()))
        if not 1 <= int(last[1]) <= len(blocks):
            raise SettingError(f"layers {layers}: the adapter is on {len(blocks)} blocks, expected last:1 to that many")
        return frozenset(name for name, block in block_of.items() if block in blocks[-int(last[1]) :])
    try:
        found = frozenset(name for name in names if re.search(layers, name))
    except re.error as err:
        raise SettingError(f"layers {layers!r}: not all, last:N or a regular expression ({err})") from err
    if not found:
        raise SettingError(f"layers {layers!r}: found in none of the LoRA layers' names, such as {names[0]}")
    return found


def first_line(err: BaseException) -> str:
    """What an exception of a library says first; libraries add pages of advice."""
    return (str(err).strip() or type(err).__name__).splitlines()[0]
