"""Checkpoints: a LoRA adapter, its learning-rate weight and its Adam moments, as the Trainer saves them.

    w_c      = mean learning rate of the steps since the run's previous checkpoint, normalised over c
    m_t, v_t = the optimizer's `exp_avg` and `exp_avg_sq` after t = `step` optimizer steps

`optimizer.pt` knows its parameters by number only, in the order in which the Trainer grouped them for weight
decay. Two layers of equal shape can trade places there without a trace, so the grouping is replayed with the
Trainer's own code, never guessed from shapes. Whatever leaves the match in doubt is refused. Reading the
adapter itself is `less.models`' business, what is made of the moments `less.adam`'s.
"""

import hashlib
import json
import re
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from datastore.errors import CheckpointError, OptimizerStateError, SettingError
from less.models import ADAPTER_CONFIG, ADAPTER_WEIGHTS, ParamLayout, lora_parameters

__all__ = ["AdamState", "Checkpoint", "EvidenceWarning", "find_checkpoints", "load_adam_state"]

_TRAINER_STATE = "trainer_state.json"
_OPTIMIZER_FILES = ("optimizer.pt", "optimizer.bin")  # .bin: FSDP with a full state dict
_SHARDED = ("global_step*", "optimizer_*", "pytorch_model_fsdp*")
_ADAPTER_FIELDS = (
    "peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "rank_pattern",
    "alpha_pattern", "layers_to_transform", "layers_pattern",
)  # fmt: skip
_WITHOUT_MOMENTS = "--update-rule sgd and sign work without Adam moments"


class EvidenceWarning(UserWarning):
    """The result can be computed, but it stands on weaker evidence than it should."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One checkpoint folder and its share in the influence score."""

    path: Path
    """The folder, absolute."""
    name: str
    """The folder's name, made unique within the list it was found with."""
    step: int
    """Optimizer steps taken, as the Trainer counts them; 0 for a bare adapter."""
    adapter_sha256: str
    """Of `adapter_model.safetensors`."""
    optimizer_sha256: str | None
    """Of the optimizer's file; None where there is none."""
    weight: float
    """w_c; the weights of a list sum to 1."""


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


def find_checkpoints(paths: Sequence[str | Path], weights: Sequence[float] | None = None) -> list[Checkpoint]:
    """Every checkpoint under `paths`, in the order given and, within a run, in step order.

    A weight is the mean of the learning rates that the Trainer logged for the steps of its interval. Where a
    step is not logged it is the average of the rates kept in the optimizer's file at both ends of the
    interval, and an `EvidenceWarning` says so. An interval begins at the same run's previous checkpoint in
    the list, else at the run's start.

    Args:
        paths: run folders (all their `checkpoint-<step>`), or single checkpoint or adapter folders.
        weights: one for each checkpoint found, in place of the learning rates; normalised.

    Raises:
        CheckpointError: nothing there, a checkpoint is incomplete or given twice, its adapter is of another
            shape than the first one's, or no learning rate can be found.
        SettingError: no path is given; `weights` has the wrong length, a negative or infinite member, or
            only zeros.
    """
    folders = [folder for path in paths for folder in _checkpoint_folders(Path(path))]
    if not folders:
        raise SettingError("no checkpoint is given; expected run or checkpoint folders")
    for index, folder in enumerate(folders):
        if folder in folders[:index]:
            raise CheckpointError(f"{folder} is given twice; give each checkpoint once")
    _refuse_mixed_adapters(folders)
    logs = [_TrainingLog.read(folder) for folder in folders]
    estimated: list[str] = []
    if weights is None:
        weights, estimated = _mean_learning_rates(logs) if len(logs) > 1 else ([1.0], [])
    shares = _normalised(weights, folders)
    if estimated:
        warnings.warn(
            f"{', '.join(estimated)}: not every step's learning rate is logged, so the weight is the average "
            "of the rates at both ends of the interval. Log every step, or give --checkpoint-weights",
            EvidenceWarning,
            stacklevel=2,
        )
    return [
        Checkpoint(
            path=log.folder,
            name=name,
            step=log.step,
            adapter_sha256=_sha256(log.folder / ADAPTER_WEIGHTS),
            optimizer_sha256=_sha256(file) if (file := _optimizer_file(log.folder)) else None,
            weight=share,
        )
        for log, name, share in zip(logs, _labels(folders), shares, strict=True)
    ]


def load_adam_state(checkpoint: Checkpoint, model: nn.Module, layout: ParamLayout) -> AdamState:
    """The Adam moments of `checkpoint`, matched to parameters by name, else by the Trainer's order.

    Args:
        checkpoint: from `find_checkpoints`.
        model: the LoRA model that the checkpoint's adapter fits, as `less.models.adapted_model` makes it.
        layout: `ParamLayout.of(model)`.

    Returns:
        float32 moments on the CPU, in layout order.

    Raises:
        OptimizerStateError: no optimizer state, a damaged one, another optimizer's, or one that does not fit
            the parameters. The file is read with `weights_only=True`: no code in it can run.
    """
    file = _optimizer_file(checkpoint.path)
    if file is None:
        shards = [shard for pattern in _SHARDED for shard in checkpoint.path.glob(pattern)]
        found = f"only a sharded state, {shards[0].name}" if shards else "no optimizer state"
        raise OptimizerStateError(
            f"{checkpoint.path} has {found}; expected {' or '.join(_OPTIMIZER_FILES)}, as the Trainer saves "
            f"it without save_only_model. {_WITHOUT_MOMENTS}"
        )
    states, groups = _read_optimizer(file)
    try:
        _refuse_other_optimizers(states, groups)
        return _adam_state(states, groups, model, layout)
    except OptimizerStateError as err:
        raise OptimizerStateError(f"{file}: {err}. {_WITHOUT_MOMENTS}") from None
    except (KeyError, TypeError, ValueError) as err:
        raise OptimizerStateError(f"{file} is malformed ({err!r}). {_WITHOUT_MOMENTS}") from err


@dataclass(frozen=True)
class _TrainingLog:
    """What `trainer_state.json` tells of a checkpoint's run so far; no entries for a bare adapter."""

    folder: Path
    step: int
    entries: list[dict[str, Any]] | None

    @classmethod
    def read(cls, folder: Path) -> "_TrainingLog":
        file = folder / _TRAINER_STATE
        if not file.is_file():
            return cls(folder, 0, None)
        state = _read_json(file)
        try:
            return cls(folder, int(state["global_step"]), list(state["log_history"]))
        except (KeyError, TypeError, ValueError) as err:
            raise CheckpointError(f"{file} is not a Trainer's state: {err!r}; copy the checkpoint again") from err

    def follows(self, other: "_TrainingLog") -> bool:
        """Whether `other` is an earlier checkpoint of the same run: this log then begins with the other's."""
        if self.entries is None or other.entries is None or other.step >= self.step:
            return False
        if not other.entries:
            return self.folder.parent == other.folder.parent
        return repr(self.entries[: len(other.entries)]) == repr(other.entries)  # repr: NaN equals itself

    def mean_logged_rate(self, start: int) -> float | None:
        """Mean learning rate of steps start+1 to step, or None where one of them is not logged.

        The rate logged with step s is the one that step s used (`Trainer._run_epoch` reads it before the
        scheduler's step).
        """
        rates = {e["step"]: e["learning_rate"] for e in self.entries or () if "learning_rate" in e}
        steps = range(start + 1, self.step + 1)
        return fmean(rates[s] for s in steps) if steps and all(s in rates for s in steps) else None


def _checkpoint_folders(path: Path) -> list[Path]:
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint at {path}; expected a run folder or a checkpoint folder")
    steps = {p: int(p.name[11:]) for p in path.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)}
    if not steps and not (path / ADAPTER_CONFIG).is_file():
        raise CheckpointError(
            f"{path} is not a LoRA checkpoint; expected checkpoint-<step> folders in it, or {ADAPTER_CONFIG}"
        )
    return [folder.resolve() for folder in sorted(steps, key=steps.__getitem__) or [path]]


def _refuse_mixed_adapters(folders: list[Path]) -> None:
    """All checkpoints of a list share one ParamLayout and one scaling."""
    first: dict[str, Any] = {}
    for folder in folders:
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder} has no {name}; expected a complete checkpoint of a LoRA model")
        config = _read_json(folder / ADAPTER_CONFIG)
        first = first or config
        for field in _ADAPTER_FIELDS:
            here, there = (sorted(v) if isinstance(v := c.get(field), list) else v for c in (config, first))
            if here != there:
                raise CheckpointError(
                    f"{folders[0]} and {folder} hold different adapters: {field} is {there!r} and {here!r}; "
                    "expected checkpoints of one adapter"
                )


def _normalised(weights: Sequence[float], folders: list[Path]) -> list[float]:
    if len(weights) != len(folders):
        names = ", ".join(folder.name for folder in folders)
        raise SettingError(f"--checkpoint-weights has {len(weights)} values, expected one for each checkpoint: {names}")
    if any(not isfinite(w) or w < 0 for w in weights) or not any(weights):
        raise SettingError(
            f"checkpoint weights must be finite, not negative and not all zero, got {list(weights)}; set "
            "them with --checkpoint-weights"
        )
    return [weight / sum(weights) for weight in weights]


def _mean_learning_rates(logs: list[_TrainingLog]) -> tuple[list[float], list[str]]:
    """Mean learning rate of each checkpoint's interval, and the names of those that had to be estimated."""
    rates, estimated = [], []
    for log in logs:
        if log.entries is None:
            raise CheckpointError(
                f"{log.folder} has no {_TRAINER_STATE} with its learning rates; give --checkpoint-weights"
            )
        before = max((other for other in logs if log.follows(other)), key=lambda o: o.step, default=None)
        rate = log.mean_logged_rate(before.step if before else 0)
        if rate is None:
            estimated.append(log.folder.name)
            start = _kept_rate(before.folder, "lr") if before else _kept_rate(log.folder, "initial_lr")
            rate = (start + _kept_rate(log.folder, "lr")) / 2
        rates.append(rate)
    return rates, estimated


def _kept_rate(folder: Path, key: str) -> float:
    """`lr` (of the next step) or `initial_lr` (of the schedule's start), as the optimizer's file keeps it."""
    file = _optimizer_file(folder)
    group = _read_optimizer(file)[1][0] if file else {}
    if key not in group:
        raise CheckpointError(
            f"{folder}: {_TRAINER_STATE} does not log every step's learning rate, and its optimizer state "
            f"(if any) keeps no {key}; give --checkpoint-weights"
        )
    return float(group[key])


def _labels(folders: list[Path]) -> list[str]:
    labels: list[str] = []
    for folder in folders:
        label, number = folder.name, 2
        while label in labels:
            label, number = f"{folder.name}.{number}", number + 1
        labels.append(label)
    return labels


def _optimizer_file(folder: Path) -> Path | None:
    return next((folder / name for name in _OPTIMIZER_FILES if (folder / name).is_file()), None)


def _read_optimizer(file: Path) -> tuple[dict[Any, dict[str, Any]], list[dict[str, Any]]]:
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


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as err:
        raise CheckpointError(f"{file} is not JSON: {err}; copy the checkpoint again") from err
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds a {type(content).__name__}; expected an object")
    return content


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
