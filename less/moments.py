"""Adam's moments of the LoRA parameters, as a checkpoint keeps them.

    m_t, v_t = the optimizer's `exp_avg` and `exp_avg_sq` after t = `step` optimizer steps

`optimizer.pt` knows its parameters by number only, in the order in which the Trainer grouped them for weight
decay. Two layers of equal shape can trade places there without a trace, so the grouping is replayed with the
Trainer's own code, never guessed from shapes. Whatever leaves the match in doubt is refused. What is made of
the moments is `less.adam`'s business.
"""

import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from datastore.errors import OptimizerStateError
from less.models import ParamLayout, lora_parameters

__all__ = ["AdamState", "load_adam_state", "optimizer_file", "read_optimizer"]

_OPTIMIZER_FILES = ("optimizer.pt", "optimizer.bin")  # .bin: FSDP with a full state dict
_SHARDED = ("global_step*", "optimizer_*", "pytorch_model_fsdp*")
_WITHOUT_MOMENTS = "--update-rule sgd and sign work without Adam moments"


@dataclass(frozen=True, kw_only=True, eq=False)
class AdamState:
    """Adam's moments of every LoRA parameter at a checkpoint."""

    m: dict[str, Tensor]
    """`exp_avg` by parameter name, in layout order, float32."""
    v: dict[str, Tensor]
    """`exp_avg_sq`, alike."""
    step: int
    """t, the optimizer's own count of its steps."""
    beta1: float
    beta2: float
    eps: float

    def to(self, device: str | torch.device) -> "AdamState":
        """The same state with its moments on `device`."""
        m, v = ({name: t.to(device) for name, t in moments.items()} for moments in (self.m, self.v))
        return AdamState(m=m, v=v, step=self.step, beta1=self.beta1, beta2=self.beta2, eps=self.eps)


def load_adam_state(folder: Path, model: nn.Module, layout: ParamLayout) -> AdamState:
    """The Adam moments of a checkpoint, matched to parameters by name, else by the Trainer's order.

    Args:
        folder: the checkpoint's folder.
        model: the LoRA model that the checkpoint's adapter fits, as `less.adapters.adapted_model` makes it.
        layout: `ParamLayout.of(model)`.

    Returns:
        float32 moments on the CPU, in layout order.

    Raises:
        OptimizerStateError: no optimizer state, a damaged one, another optimizer's, or one that does not fit
            the parameters. The file is read with `weights_only=True`: no code in it can run.
    """
    file = optimizer_file(folder)
    if file is None:
        shards = [shard for pattern in _SHARDED for shard in folder.glob(pattern)]
        found = f"only a sharded state, {shards[0].name}" if shards else "no optimizer state"
        raise OptimizerStateError(
            f"{folder} has {found}; expected {' or '.join(_OPTIMIZER_FILES)}, as the Trainer saves "
            f"it without save_only_model. {_WITHOUT_MOMENTS}"
        )
    states, groups = read_optimizer(file)
    try:
        _refuse_other_optimizers(states, groups)
        return _adam_state(states, groups, model, layout)
    except OptimizerStateError as err:
        raise OptimizerStateError(f"{file}: {err}. {_WITHOUT_MOMENTS}") from None
    except (KeyError, TypeError, ValueError) as err:
        raise OptimizerStateError(f"{file} is malformed ({err!r}). {_WITHOUT_MOMENTS}") from err


def optimizer_file(folder: Path) -> Path | None:
    """A checkpoint's optimizer file, if it has one."""
    return next((folder / name for name in _OPTIMIZER_FILES if (folder / name).is_file()), None)


def read_optimizer(file: Path) -> tuple[dict[Any, dict[str, Any]], list[dict[str, Any]]]:
    """States by parameter key and the groups that hold parameters, memory-mapped where the file allows."""
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        groups = [dict(group) for group in saved["param_groups"] if group["params"]]
        states = {key: dict(state) for key, state in saved["state"].items()}
        if not groups:
            raise ValueError("no parameters")
    except Exception as err:  # a torn or hostile file can fail in any way
        forbidden = re.search(r"GLOBAL \S+", str(err))
        found = forbidden[0] if forbidden else type(err).__name__
        raise OptimizerStateError(
            f"{file} is damaged or no optimizer's plain state dict ({found}), and no other pickle is read; "
            f"copy it again from where it was trained. {_WITHOUT_MOMENTS}"
        ) from err
    return states, groups


def _refuse_other_optimizers(states: dict[Any, dict[str, Any]], groups: list[dict[str, Any]]) -> None:
    keys = sorted({str(key) for state in states.values() for key in state})
    if "state1" in keys or "state2" in keys:
        raise OptimizerStateError("bitsandbytes' state1 and state2 are not supported; train with adamw_torch")
    if any(group.get("amsgrad") for group in groups):
        raise OptimizerStateError("Adam with amsgrad is not supported; train without it")
    # RAdam's states have the same keys as Adam's; of the two only Adam's groups know amsgrad.
    if keys not in ([], ["exp_avg", "exp_avg_sq", "step"]) or any("amsgrad" not in group for group in groups):
        raise OptimizerStateError(
            f"not torch's Adam or AdamW: found {', '.join(keys)}; expected step, exp_avg and exp_avg_sq"
        )


def _adam_state(
    states: dict[Any, dict[str, Any]], groups: list[dict[str, Any]], model: nn.Module, layout: ParamLayout
) -> AdamState:
    settings = sorted({(*map(float, group["betas"]), float(group["eps"])) for group in groups})
    if len(settings) > 1:
        raise OptimizerStateError(f"parameter groups disagree on (beta1, beta2, eps): {settings}; expected one")
    name_of = _parameter_names(groups, model)
    by_name = {name_of[key]: state for key, state in states.items()}
    if extra := by_name.keys() - set(layout.names):
        raise OptimizerStateError(f"moments of {min(extra)}, which is no LoRA parameter of this adapter")
    if lacking := [name for name in layout.names if name not in by_name]:
        raise OptimizerStateError(
            f"no moments of {lacking[0]} ({len(lacking)} of {len(layout.names)} parameters lack theirs): it "
            "was frozen or never used in training"
        )
    steps = {int(by_name[name]["step"]): name for name in layout.names}
    if len(steps) > 1:
        counts = ", ".join(f"{step} of {name}" for step, name in sorted(steps.items())[:2])
        raise OptimizerStateError(f"parameters took different numbers of steps ({counts}); expected one number")
    m, v = (
        {
            name: _checked_moment(by_name[name][key], f"{key} of {name}", shape)
            for name, shape in zip(layout.names, layout.shapes, strict=True)
        }
        for key in ("exp_avg", "exp_avg_sq")
    )
    for name, moment in v.items():
        if moment.min() < 0:
            raise OptimizerStateError(f"exp_avg_sq of {name} is negative, which no square is; copy it again")
    ((beta1, beta2, eps),) = settings
    return AdamState(m=m, v=v, step=next(iter(steps)), beta1=beta1, beta2=beta2, eps=eps)


def _parameter_names(groups: list[dict[str, Any]], model: nn.Module) -> dict[Any, str]:
    """The layout's name of each parameter key in the optimizer's groups."""
    keys = [key for group in groups for key in group["params"]]
    if all(isinstance(key, str) for key in keys):
        names = keys
    elif all("param_names" in group for group in groups):
        names = [name for group in groups for name in group["param_names"]]
    else:
        replayed = [group for group in _trainer_groups(model) if group]
        names = [name for group in replayed for name in group]
        found, expected = [len(group["params"]) for group in groups], [len(group) for group in replayed]
        if found != expected:
            raise OptimizerStateError(
                f"groups of {found} parameters, where the Trainer makes {expected} of this adapter's: they "
                "cannot be matched. Is it the right base model, trained without groups of its own?"
            )
    return {key: _layout_name(name) for key, name in zip(keys, names, strict=True)}


def _trainer_groups(model: nn.Module) -> tuple[list[str], list[str]]:
    """LoRA parameters with and without weight decay, each in the order of `Trainer.create_optimizer`."""
    from transformers import Trainer

    decayed = set(Trainer.get_decay_parameter_names(None, model))  # its rule reads nothing of a Trainer
    groups: tuple[list[str], list[str]] = ([], [])
    name_of = {id(parameter): name for name, parameter in lora_parameters(model).items()}
    for name, parameter in model.named_parameters():
        if id(parameter) in name_of:
            groups[name not in decayed].append(name_of[id(parameter)])
    return groups


def _layout_name(name: str) -> str:
    """Without the marks of what wrapped the model in training, and without the adapter's own name."""
    name = re.sub(r"^module\.|_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.", "", name)
    return re.sub(r"(\.lora_[AB])\.[^.]+(?=\.weight$)", r"\1", name)


def _checked_moment(tensor: Any, what: str, shape: tuple[int, ...]) -> Tensor:
    if type(tensor) is not Tensor:
        raise OptimizerStateError(f"{what} is a {type(tensor).__name__}; expected a plain tensor")
    if tuple(tensor.shape) != shape:
        raise OptimizerStateError(
            f"{what} has shape {tuple(tensor.shape)} and the parameter {shape}; adapter, optimizer state and "
            "base model must come from one run"
        )
    if not tensor.isfinite().all():
        raise OptimizerStateError(f"{what} is not finite; use an earlier checkpoint")
    return tensor.to(torch.float32, copy=True)
