"""`evaluate`: select by each method, train on each selection from the same start, measure the targets' held-out rows.

What a selection is, is `plan`'s business, what a training is, `trial`'s, what is done already, `ledger`'s, and what it
all says, `summary`'s.
"""

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from datastore import Datastore
from datastore.errors import SettingError
from less.adapters import load_adapter_config
from less.checkpoints import EvidenceWarning, as_paths, checkpoint_folders
from less.data.writing import write_lines
from less.evaluation.held_out import HeldOut, load_held_out_sets
from less.evaluation.ledger import Ledger
from less.evaluation.plan import MATCHES, Arm, Trial, arms_of, parse_method, plan_trials, quantile_arms
from less.evaluation.summary import Evaluation, summarize
from less.evaluation.trial import Measured, measure, run_trial
from less.influence import InfluenceScores
from less.methods import open_scorer
from less.pool import Pool
from less.progress import Progress
from less.provenance import holds_gradients, running_on
from less.scoring import METHODS, ScoreConfig, load_target_sets, open_base_model, open_renderer
from less.training import WarmupConfig, lora_config

__all__ = ["EvaluateConfig", "evaluate"]

RESULT = "evaluation.json"
FEW_STEPS = 10


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Settings of an experiment."""

    methods: Sequence[str] = ("less", "rds", "bm25", "length", "random")
    """Each `less`, `less:FEATURE_SET`, `less:FEATURE_SET:none` (not normalised) or a baseline; random is added."""
    fractions: Sequence[float] = (0.05,)
    """Budgets, of the pool."""
    match: Sequence[str] = MATCHES
    """rows: as many rows for each method; tokens: as many supervised tokens."""
    seeds: int = 3
    """Trainings of each selection, each with its own start and order; `random` draws other rows for each."""
    quantiles: int = 0
    """Parts of the score's range to train on separately, such as 10; 0 leaves the quantile test out."""
    quantile_methods: Sequence[str] = ("less",)
    """Whose scores the quantile test is of; each must be among `methods`."""
    epochs: int = 4
    """Passes over a selection."""
    learning_rate: float = 2e-5
    """At its peak."""
    batch_size: int = 32
    """Rows of one optimizer step."""
    lora_rank: int | None = None
    """R; None is the adapter of the checkpoints, without them 128 on all linear layers."""
    eval_rows: int | None = None
    """At most so many held-out rows of each set, drawn once; None takes all."""
    answer_rows: int = 0
    """At most so many of them are answered, where they have an `answer`: generating is slow."""
    max_new_tokens: int = 256
    """Of an answer."""
    system_prompt: str | None = None
    """keep, none or a text, for targets and held-out rows; None: as for the pool."""
    device: str = "auto"
    """auto, cpu or cuda."""
    tokens_per_batch: int | None = None
    """Padded tokens computed at once; None chooses by device."""
    verify: bool = True
    """Check the checksum of every shard that is read."""
    trust_remote_code: bool = False
    """Let code that comes with the model run."""

    def __post_init__(self) -> None:
        methods = tuple(dict.fromkeys([*self.methods, "random"]))
        quantile_methods = tuple(dict.fromkeys(self.quantile_methods)) if self.quantiles else ()
        for name, given in (
            ("methods", methods), ("fractions", self.fractions), ("match", self.match),
            ("quantile_methods", quantile_methods),
        ):  # fmt: skip
            object.__setattr__(self, name, tuple(dict.fromkeys(given)))  # what is named twice is not measured twice
        for method in methods:
            if (name := parse_method(method)["method"]) not in METHODS:
                raise SettingError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
        for name, fits, expected in (
            ("fractions", self.fractions and all(0 < f < 1 for f in self.fractions), "above 0 and below 1"),
            ("match", self.match and set(self.match) <= set(MATCHES), f"some of {', '.join(MATCHES)}"),
            ("seeds", self.seeds >= 1, "at least 1"),
            ("quantiles", self.quantiles == 0 or self.quantiles >= 3, "0 or at least 3"),
            ("quantile_methods", set(quantile_methods) <= set(methods), f"among the methods {', '.join(methods)}"),
            ("eval_rows", self.eval_rows is None or self.eval_rows >= 1, "at least 1"),
            ("answer_rows", self.answer_rows >= 0, "at least 0"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("lora_rank", self.lora_rank is None or self.lora_rank >= 1, "at least 1"),
        ):
            if not fits:
                raise SettingError(f"{name} must be {expected}, got {getattr(self, name)!r}")
        self.training(seed=0)  # its own settings are checked before any work too

    def training(self, seed: int) -> WarmupConfig:
        """Of one trial."""
        return WarmupConfig(
            epochs=self.epochs, learning_rate=self.learning_rate, batch_size=self.batch_size, seed=seed,
            tokens_per_batch=self.tokens_per_batch,
        )  # fmt: skip

    @property
    def scoring(self) -> dict[str, Any]:
        """What the scorers are told."""
        names = ("system_prompt", "device", "tokens_per_batch", "verify", "trust_remote_code")
        return {name: getattr(self, name) for name in names}


def evaluate(
    *,
    datastore: str | Path | Datastore,
    targets: Any,
    held_out: Any,
    output: str | Path,
    model: str | Path | PreTrainedModel | None = None,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    checkpoints: str | Path | Sequence[str | Path] | None = None,
    data: Any = None,
    progress: bool = True,
    **settings: Any,
) -> Evaluation:
    """Train on what each method selects, and say what the targets gain by it.

    Args:
        datastore: a sealed store.
        targets: a file, data set or list of dicts; several as a list, or as a dict that names them.
        held_out: rows of each target set that the loss is measured on, in the same order, or by the same names.
        output: a folder: finished trials, scores, and `evaluation.json`.
        model, tokenizer, checkpoints, data: where they are not where the build found them.
        progress: show progress on standard error.
        **settings: fields of `EvaluateConfig`.

    Raises:
        GradsiftError: see `datastore.errors`.
        SettingError: a setting is out of range, or `held_out` does not fit the targets.
    """
    config, folder = EvaluateConfig(**settings), Path(output)
    store = datastore if isinstance(datastore, Datastore) else Datastore.open(datastore)
    pool, as_the_pool = Pool(store, data), ScoreConfig(**config.scoring | {"system_prompt": None})
    base = open_base_model(store, as_the_pool, model)
    max_length = store.settings["rendering"]["max_length"]
    renderer = open_renderer(store, ScoreConfig(**config.scoring), model, tokenizer, max_length)
    pool_renderer = open_renderer(store, as_the_pool, base, renderer.tokenizer, max_length)
    target_sets = load_target_sets(targets, renderer, strict=False)
    names = [t.name for t in target_sets]
    held_out_of = load_held_out_sets(
        held_out, names, renderer,
        most=config.eval_rows, num_answers=config.answer_rows, max_new_tokens=config.max_new_tokens,
    )  # fmt: skip
    ledger, lora = Ledger(folder, held_out_of), _lora_of(store, checkpoints, config)
    known: dict[str, Tensor] = {}  # the targets' features are the same for every feature set

    def scores_of(method: str, seed: int = 0) -> InfluenceScores:
        asked = ScoreConfig(**config.scoring, **parse_method(method), seed=seed)
        scorer = open_scorer(
            store, asked, model=base, tokenizer=renderer.tokenizer, checkpoints=checkpoints, pool=pool,
            progress=progress, known=known,
        )  # fmt: skip
        made_of = [
            [source.sha256 for source in store.sources], [t.sha256 for t in target_sets], names, asked.method,
            asked.feature_set, asked.normalize, asked.seed, asked.system_prompt,
        ]  # fmt: skip
        return ledger.scores(made_of, store, lambda: scorer.score(target_sets)[0])

    arms, rows = _all_arms(config, scores_of, names), store.rows(verify=False)
    decides = {
        "model": store.settings["model"]["fingerprint"],
        "dtype": store.settings["model"]["dtype"],
        "rendering": store.settings["rendering"],
        "lora": {name: _plain(getattr(lora, name)) for name in ("r", "lora_alpha", "lora_dropout", "target_modules")},
        "training": {name: getattr(config, name) for name in ("epochs", "learning_rate", "batch_size")},
    }
    trials, keys = plan_trials(arms, rows, [entry.sha256 for entry in store.sources], decides)
    _warn_of_short_trials(trials, config)
    start_key = f"start-{hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:18]}"
    start = ledger.measured(start_key, partial(_measure_base, base, renderer.tokenizer, config=config))
    missing = [trial for trial in trials if ledger.missing(trial)]
    num_rows = config.epochs * sum(len(trial.positions) for trial in missing)
    with Progress(total=num_rows, description=f"{len(missing)} trials", enabled=progress) as bar:
        for trial in ledger.one_by_one(missing):
            if not (own := ledger.missing(trial)):  # another process has done it
                bar.advance(config.epochs * len(trial.positions))
                continue
            rendered = [pool_renderer.render_record(record) for record in pool.take(rows, trial.positions)]
            found = run_trial(
                base, renderer.tokenizer, rendered, own, lora=lora, training=config.training(trial.seed),
                max_new_tokens=config.max_new_tokens, bar=bar,
            )  # fmt: skip
            ledger.write(trial.key, found)
    evaluation = summarize(
        arms, [ledger.read(key)[arm.target] for arm, key in zip(arms, keys, strict=True)], start, rows,
        settings={
            name: value for name, value in asdict(config).items() if name not in ("device", "trust_remote_code")
        } | {"lora": decides["lora"], "num_trials": len(trials)},
        environment=running_on(base.device),
        held_out={name: len(own.rendered) for name, own in held_out_of.items()},
    )  # fmt: skip
    write_lines(folder / RESULT, [json.dumps(evaluation.to_json(), indent=1)])
    return evaluation


def _all_arms(config: EvaluateConfig, scores_of: Any, targets: Sequence[str]) -> list[Arm]:
    """Every arm, seed after seed, so that an experiment that is not finished has whole seeds to show."""
    scores = {method: scores_of(method) for method in config.methods if method != "random"}
    arms: list[Arm] = []
    for seed in range(config.seeds):
        of_seed = scores | {"random": scores_of("random", seed)}
        for target in targets:
            for method in config.methods:
                arms += arms_of(
                    of_seed[method], method=method, target=target, fractions=config.fractions, match=config.match,
                    seed=seed,
                )  # fmt: skip
            for method in config.quantile_methods:
                arms += quantile_arms(
                    of_seed[method], method=method, target=target, fraction=min(config.fractions),
                    num_quantiles=config.quantiles, seed=seed,
                )  # fmt: skip
    return arms


def _lora_of(store: Datastore, checkpoints: Any, config: EvaluateConfig) -> LoraConfig:
    """The adapter to train: the store's, or of the rank asked for."""
    if config.lora_rank is None and (checkpoints or holds_gradients(store)):
        first = as_paths(checkpoints or store.environment["checkpoints"])[0]
        lora = load_adapter_config(checkpoint_folders(first)[0])
        lora.init_lora_weights = True
        return lora
    default = WarmupConfig()
    return lora_config(replace(default, lora_rank=config.lora_rank or default.lora_rank, lora_alpha=None))


def _measure_base(base: PreTrainedModel, tokenizer: Any, held_out: HeldOut, *, config: EvaluateConfig) -> Measured:
    """What the base model gives before any training; its mode is given back."""
    was_training = base.training
    base.eval()
    try:
        return measure(base, tokenizer, held_out, config.tokens_per_batch, config.max_new_tokens)
    finally:
        base.train(was_training)


def _warn_of_short_trials(trials: Sequence[Trial], config: EvaluateConfig) -> None:
    fewest = min(config.epochs * ceil(len(trial.positions) / config.batch_size) for trial in trials)
    if fewest < FEW_STEPS:
        warnings.warn(
            f"some trainings have {fewest} optimizer steps, fewer than {FEW_STEPS}, the first at a learning rate of 0: "
            "they hardly teach anything. Raise --epochs or --fractions, or lower --batch-size",
            EvidenceWarning,
            stacklevel=3,
        )


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | frozenset | list | tuple) else value
