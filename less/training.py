"""Warm-up: LoRA training on a fraction of the pool, so that gradients are taken where training would go.

    θ ← AdamW(θ, ∇ L),    L = 1/|batch| · Σ_z ℓ(z; θ),    ℓ(z) = mean NLL over z's supervised tokens

The defaults are those of the LESS authors' code (Xia et al., ICML 2024): a short rise of the learning rate,
then linear decay, and one checkpoint an epoch. Hugging Face's Trainer does the training, so that a run is
what anyone's run is; its loss alone is replaced. A Trainer's own loss weighs a row by its tokens and pads a
batch to its longest row; here every row weighs the same, and a batch is cut by length into pieces of a token
budget, which changes memory and time but not the gradient. What a run leaves is read by `less.checkpoints`.
"""

import json
import random
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from math import ceil, isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from datastore import SkippedRow
from datastore.errors import DataError, SettingError
from less.adapters import lora_model
from less.checkpoints import EvidenceWarning
from less.data.batching import BatchBudget, collate, plan_batches
from less.data.records import RowProblem, Source, open_source, skip
from less.data.rendering import Rendered, Renderer
from less.data.writing import write_lines
from less.gradients import token_losses
from less.lm_head import find_unembedding
from less.loading import LoadingConfig, load_model
from less.models import model_fingerprint
from less.progress import Progress

if TYPE_CHECKING:
    import datasets

__all__ = ["WarmupConfig", "WarmupResult", "fine_tune", "lora_config", "randomness", "warmup"]

RECORD = "warmup.json"
_FEW_STEPS = 50
_UNRECORDED = ("device", "tokens_per_batch", "strict", "trust_remote_code", "chat_template")


@dataclass(frozen=True, kw_only=True)
class WarmupConfig(LoadingConfig):
    """Settings of a warm-up. All that decides the run is held by it."""

    fraction: float = 0.05
    """Of the pool's rows to train on, rounded up."""
    epochs: int = 4
    """Passes over them; each ends in a checkpoint."""
    learning_rate: float = 2e-5
    """At its peak."""
    warmup_ratio: float = 0.03
    """Of the steps, in which the learning rate rises from 0 to its peak, before it falls linearly to 0."""
    batch_size: int = 32
    """Rows of one optimizer step."""
    lora_rank: int = 128
    """R."""
    lora_alpha: float | None = None
    """The adapter is scaled by alpha / R; None is 4 R."""
    lora_dropout: float = 0.1
    """In training only."""
    target_modules: str | Sequence[str] = "all-linear"
    """all-linear (but for the LM head), or names of linear layers: a list, or a string with commas."""
    seed: int = 0
    """Chooses the rows, their order, the adapter's start and its dropout."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_alpha is None:
            object.__setattr__(self, "lora_alpha", 4 * self.lora_rank)
        if self.target_modules != "all-linear":
            named = self.target_modules
            names = named.split(",") if isinstance(named, str) else named
            object.__setattr__(self, "target_modules", tuple(name.strip() for name in names))
        for name, fits, expected in (
            ("fraction", 0 < self.fraction <= 1, "above 0 and at most 1"),
            ("epochs", self.epochs >= 1, "at least 1"),
            ("learning_rate", 0 < self.learning_rate < float("inf"), "positive and finite"),
            ("warmup_ratio", 0 <= self.warmup_ratio < 1, "at least 0 and below 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("lora_rank", self.lora_rank >= 1, "at least 1"),
            ("lora_alpha", 0 < (self.lora_alpha or 0) < float("inf"), "positive and finite"),
            ("lora_dropout", 0 <= self.lora_dropout < 1, "at least 0 and below 1"),
            ("target_modules", self.target_modules and all(self.target_modules), "all-linear or layer names"),
            ("seed", 0 <= self.seed < 2**32, "at least 0 and below 2**32"),
        ):
            if not fits:
                raise SettingError(f"{name} must be {expected}, got {getattr(self, name)!r}")


@dataclass(frozen=True, kw_only=True)
class WarmupResult:
    """What a warm-up left behind."""

    output: Path
    """The run's folder."""
    checkpoints: list[Path]
    """One an epoch, in step order."""
    num_rows: int
    """Rows trained on."""
    num_steps: int
    """Optimizer steps of the whole run."""
    num_computed: int
    """Optimizer steps taken by this call; 0 when the run was complete."""
    skipped: tuple[SkippedRow, ...]
    """Rows that were drawn but cannot be used, each with its reason."""
    final_loss: float
    """Of the last step: the mean over its rows."""


def warmup(
    *,
    model: "str | Path | PreTrainedModel",
    data: "str | Path | datasets.Dataset | Sequence[dict[str, Any]]",
    output: str | Path,
    tokenizer: "str | Path | PreTrainedTokenizerBase | None" = None,
    progress: bool = True,
    **settings: Any,
) -> WarmupResult:
    """Train a LoRA adapter on a random fraction of a pool, with a checkpoint after every epoch.

    A run that is complete is left as it is; one that was interrupted goes on from its last checkpoint. A
    model that is passed in comes back without the adapter, and the global random state is left as it was.

    Args:
        model: the base model: a folder, a hub name, or a loaded model.
        data: the pool: a file, a hub name, a `datasets.Dataset`, or a list of dicts.
        output: the run's folder, with `checkpoint-<step>` folders and `warmup.json`: settings and rows.
        tokenizer: where it is not the model's own.
        progress: show progress on standard error.
        **settings: fields of `WarmupConfig`.

    Raises:
        TypeError: a setting that `WarmupConfig` does not have.
        GradsiftError: see `datastore.errors`; every problem of the whole call comes before any training.
    """
    known = sorted(field.name for field in fields(WarmupConfig))
    if unknown := sorted(settings.keys() - set(known)):
        raise TypeError(f"warmup() has no setting {unknown[0]!r}; expected some of {', '.join(known)}")
    config = WarmupConfig(**settings)
    run = Path(output)
    source = open_source(data)
    base, renderer = load_model(model, tokenizer, config)
    recorded = _recorded_settings(config, source, base, renderer)
    record = _open_record(run, recorded)
    num_computed = 0
    if record.get("result") is None:
        with randomness(config.seed), lora_model(base, lora_config(config)) as adapted:
            rendered, skipped = _draw(source, renderer, config, progress)
            num_steps = config.epochs * ceil(len(rendered) / config.batch_size)
            if num_steps < _FEW_STEPS:
                warnings.warn(
                    f"a warm-up of {num_steps} optimizer steps, fewer than {_FEW_STEPS}: much of Γ is then "
                    "the start of Adam's moments. Raise --fraction or --epochs, or lower --batch-size",
                    EvidenceWarning,
                    stacklevel=2,
                )
            trainer = _trainer(adapted, list(rendered.values()), config, run)
            record = {"settings": recorded, "rows": list(rendered), "skipped": [*map(asdict, skipped)]}
            write_lines(run / RECORD, [json.dumps(record)])
            num_computed = _train(trainer, progress)
        record["result"] = {"num_steps": num_steps, "final_loss": trainer.last_loss}
        write_lines(run / RECORD, [json.dumps(record)])
    return WarmupResult(
        output=run,
        checkpoints=_checkpoints(run),
        num_rows=len(record["rows"]),
        num_computed=num_computed,
        skipped=tuple(SkippedRow(**row) for row in record["skipped"]),
        **record["result"],
    )


def _recorded_settings(
    config: WarmupConfig, source: Source, base: PreTrainedModel, renderer: Renderer
) -> dict[str, Any]:
    """What makes two runs the same run, as JSON reads it back."""
    settings = {name: value for name, value in asdict(config).items() if name not in _UNRECORDED}
    settings |= renderer.provenance()
    settings |= {"dtype": str(base.dtype), "model": model_fingerprint(base), "data": source.sha256}
    return json.loads(json.dumps(settings))


def _open_record(run: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The record of the run in this folder, empty for a new one; another run's folder is refused."""
    file = run / RECORD
    if not file.is_file():
        if run.exists() and (not run.is_dir() or any(not p.name.startswith(".") for p in run.iterdir())):
            raise SettingError(f"--output {run} holds something else; expected a new or an empty folder")
        return {}
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        before = record["settings"]
    except (ValueError, KeyError, TypeError) as err:
        raise SettingError(f"{file} is damaged ({err!r}); delete {run}, or choose another --output") from err
    differing = [
        f"{name} is {before.get(name)!r} there and {settings.get(name)!r} here"
        for name in sorted(before.keys() | settings.keys())
        if before.get(name) != settings.get(name)
    ]
    if differing:
        raise SettingError(
            f"--output {run} holds a warm-up with other settings: {'; '.join(differing)}. Give the same to "
            "go on with it, or choose another --output"
        )
    return record


def _draw(
    source: Source, renderer: Renderer, config: WarmupConfig, progress: bool
) -> tuple[dict[int, Rendered], list[SkippedRow]]:
    """Usable rows by number, drawn by the seed without replacement; a row that is no use is replaced."""
    order = np.random.default_rng(config.seed).permutation(source.num_rows).tolist()
    wanted = ceil(Fraction(str(config.fraction)) * source.num_rows)
    rendered: dict[int, Rendered] = {}
    skipped: list[SkippedRow] = []
    with Progress(total=wanted, description="rendering", enabled=progress) as bar:
        while order and len(rendered) < wanted:
            missing = wanted - len(rendered)
            drawn, order = sorted(order[:missing]), order[missing:]
            for record in source.take(drawn):
                try:
                    row = rendered[record.number] = renderer.render_record(record)
                except RowProblem as problem:
                    skipped.append(skip(record, problem, strict=config.strict))
                else:
                    bar.advance(1, row.num_tokens)
    if not rendered:
        raise DataError(
            f"{source.name} has no usable row: all {len(skipped)} were skipped, the first, "
            f"{skipped[0].where}, for {skipped[0].reason!r} ({skipped[0].detail})"
        )
    return {number: rendered[number] for number in sorted(rendered)}, skipped


class _RowMeanTrainer(Trainer):
    """A Trainer whose loss is the mean over a batch's rows of each row's own mean loss."""

    def __init__(self, *, rendered: list[Rendered], budget: BatchBudget, **kwargs: Any) -> None:
        super().__init__(train_dataset=range(len(rendered)), data_collator=lambda rows: {"rows": rows}, **kwargs)
        self.rendered, self.budget = rendered, budget
        self.bar: Progress | None = None

    def training_step(self, model: nn.Module, inputs: dict[str, list[int]], *_: Any) -> Tensor:
        """Add a batch's gradient, piece by piece; returns its loss."""
        model.train()
        rows = inputs["rows"]
        total = torch.zeros((), device=self.args.device)
        for piece in plan_batches([self.rendered[row].num_tokens for row in rows], self.budget):
            batch = collate(self.rendered, [rows[i] for i in piece])
            head = find_unembedding(model, batch.input_ids_BT.numel())
            loss = token_losses(model, batch.to(self.args.device), head).sum() / len(rows)
            loss.backward()
            total += loss.detach()
            if self.bar:
                self.bar.advance(len(piece), batch.num_tokens)
        if not isfinite(total.item()):
            raise SettingError(
                f"the loss is {total.item()} at step {self.state.global_step + 1}; lower --learning-rate, or "
                "use --dtype float32"
            )
        return total

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted."""
        return 0

    @property
    def last_loss(self) -> float:
        """The loss logged last."""
        return next(entry["loss"] for entry in reversed(self.state.log_history) if "loss" in entry)


def fine_tune(model: PeftModel, rendered: list[Rendered], config: WarmupConfig, bar: Progress | None = None) -> float:
    """Train `model`'s adapter on these rows as a warm-up does, and write nothing.

    Args:
        model: from `less.adapters.lora_model`; left in training mode.
        rendered: the rows; the same seed takes as many of them in the same order.
        config: of the training; what says which rows and which adapter is not used.
        bar: told of rows and tokens.

    Returns:
        the loss of the last step.

    Raises:
        SettingError: the loss is not finite.
    """
    with tempfile.TemporaryDirectory() as folder, randomness(config.seed):
        trainer = _trainer(model, rendered, config, Path(folder), save_strategy="no")
        trainer.bar = bar
        trainer.train()
    return trainer.last_loss


def _trainer(
    model: PeftModel, rendered: list[Rendered], config: WarmupConfig, run: Path, save_strategy: str = "epoch"
) -> _RowMeanTrainer:
    device = model.device
    if device.index:
        raise SettingError(
            f"--device {device}: the Trainer trains on the first GPU that it sees; set "
            f"CUDA_VISIBLE_DEVICES={device.index} and use --device cuda"
        )
    arguments = TrainingArguments(
        output_dir=str(run),
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=config.warmup_ratio,  # below 1 it is a ratio
        optim="adamw_torch",
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=config.seed,
        data_seed=config.seed,
        logging_steps=1,  # the learning-rate weights need every step
        save_strategy=save_strategy,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
    )
    if arguments.world_size > 1:
        raise SettingError(f"a warm-up is one process, got {arguments.world_size}; start it without torchrun")
    arguments._n_gpu = min(arguments.n_gpu, 1)  # else DataParallel, with its own batch size
    trainer = _RowMeanTrainer(
        model=model,
        args=arguments,
        rendered=rendered,
        budget=BatchBudget.on(device, config.tokens_per_batch),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _train(trainer: _RowMeanTrainer, progress: bool) -> int:
    """Train to the end, from the last complete checkpoint if there is one; returns the steps taken."""
    complete = [folder for folder in _checkpoints(Path(trainer.args.output_dir)) if _is_complete(folder)]
    last = complete[-1] if complete else None
    steps_done = _step(last) if last else 0
    epochs_done = steps_done // ceil(len(trainer.rendered) / trainer.args.per_device_train_batch_size)
    num_rows = len(trainer.rendered) * (int(trainer.args.num_train_epochs) - epochs_done)
    with Progress(total=num_rows, description="warm-up", enabled=progress) as trainer.bar:
        if last:
            trainer.bar.note(f"going on from {last}")
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    return trainer.state.global_step - steps_done


def _checkpoints(run: Path) -> list[Path]:
    return sorted(run.glob("checkpoint-*"), key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _is_complete(checkpoint: Path) -> bool:
    """The Trainer writes its state last."""
    try:
        return bool(json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return False


def lora_config(config: WarmupConfig) -> LoraConfig:
    """The adapter that a warm-up trains."""
    targets = config.target_modules
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
    )


@contextmanager
def randomness(seed: int) -> Iterator[None]:
    """Within it, the generators of Python, NumPy and torch start from `seed`; then they are as before."""
    before, numpy_before = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            set_seed(seed)
            yield
    finally:
        random.setstate(before)
        np.random.set_state(numpy_before)  # noqa: NPY002
