"""Checkpoints: a LoRA adapter and its learning-rate weight, as the Trainer saves them.

    w_c = mean learning rate of the steps since the run's previous checkpoint, normalised over c

Reading the adapter itself is `less.adapters`' business, Adam's moments are `less.moments`'.
"""

import hashlib
import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

from datastore.errors import CheckpointError, SettingError
from less.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from less.moments import optimizer_file, read_optimizer

__all__ = ["Checkpoint", "EvidenceWarning", "as_paths", "checkpoint_folders", "find_checkpoints"]

_TRAINER_STATE = "trainer_state.json"
_ADAPTER_FIELDS = (
    "peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "rank_pattern",
    "alpha_pattern", "layers_to_transform", "layers_pattern",
)  # fmt: skip


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


def as_paths(checkpoints: str | Path | Sequence[str | Path]) -> list[Path]:
    """One folder or several as a list of paths."""
    return [Path(p) for p in ([checkpoints] if isinstance(checkpoints, str | Path) else checkpoints)]


def find_checkpoints(paths: Sequence[str | Path], weights: Sequence[float] | None = None) -> list[Checkpoint]:
    """Every checkpoint under `paths`, in the order given and, within a run, in step order.

    A weight is the mean of the learning rates that the Trainer logged for the steps of its interval. Where a
    step is not logged it is the average of the rates kept in the optimizer's file at both ends of the
    interval, and an `EvidenceWarning` says so. An interval begins at the same run's previous checkpoint in
    the list, else at the run's start.

    Args:
        paths: run folders (all their `checkpoint-<step>`; `RUN:last` for the last one alone), or single checkpoint or
            adapter folders.
        weights: one for each checkpoint found, in place of the learning rates; normalised.

    Raises:
        CheckpointError: nothing there, a checkpoint is incomplete or given twice, its adapter is of another
            shape than the first one's, or no learning rate can be found.
        SettingError: no path is given; `weights` has the wrong length, a negative or infinite member, or
            only zeros.
    """
    folders = [folder for path in paths for folder in checkpoint_folders(Path(path))]
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
            optimizer_sha256=_sha256(file) if (file := optimizer_file(log.folder)) else None,
            weight=share,
        )
        for log, name, share in zip(logs, _labels(folders), shares, strict=True)
    ]


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


def checkpoint_folders(path: Path) -> list[Path]:
    """The checkpoints of a run folder in step order, of `RUN:last`, or a checkpoint folder itself.

    Raises:
        CheckpointError: there is none.
    """
    if path.name.endswith(":last") and not path.exists():
        return checkpoint_folders(path.with_name(path.name.removesuffix(":last")))[-1:]
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint at {path}; expected a run folder, RUN:last or a checkpoint folder")
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
    file = optimizer_file(folder)
    group = read_optimizer(file)[1][0] if file else {}
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
