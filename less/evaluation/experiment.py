"""`evaluate`: select by each method, train on each selection from the same start, measure the targets' held-out rows.

Every finished trial is a file, so an interrupted experiment goes on where it was, and the same command started several
times shares the work: a trial is done by the process that holds its lock. What a selection is, is `plan`'s business,
what a training is, `trial`'s, and what it all says, `summary`'s.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from datastore import Datastore
from datastore.errors import DataError, SettingError
from less.adapters import load_adapter_config
from less.checkpoints import as_paths, checkpoint_folders
from less.data.records import RowProblem, open_source
from less.data.rendering import Rendered, Renderer
from less.data.targets import TargetSet
from less.data.writing import write_lines
from less.evaluation.plan import MATCHES, Arm, Trial, arms_of, parse_method, plan_trials, quantile_arms
from less.evaluation.summary import Evaluation, summarize
from less.evaluation.trial import HeldOut, Measured, measure, run_trial
from less.influence import InfluenceScores
from less.methods import open_scorer
from less.pool import Pool
from less.progress import Progress
from less.provenance import holds_gradients, running_on
from less.scoring import METHODS, ScoreConfig, load_target_sets, open_base_model, open_renderer
from less.training import WarmupConfig, lora_config

__all__ = ["EvaluateConfig", "evaluate"]

RESULT = "evaluation.json"


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
    config = EvaluateConfig(**settings)
    store = datastore if isinstance(datastore, Datastore) else Datastore.open(datastore)
    pool, folder = Pool(store, data), Path(output)
    base = open_base_model(store, ScoreConfig(**config.scoring), model)
    max_length = store.settings["rendering"]["max_length"]
    renderer = open_renderer(store, ScoreConfig(**config.scoring), model, tokenizer, max_length)
    loaded_tokenizer = renderer.tokenizer
    target_sets = load_target_sets(targets, renderer, strict=False)
    held_out_of = _held_out_sets(target_sets, held_out, renderer, config)
    lora = _lora_of(store, checkpoints, config)

    known: dict[str, Tensor] = {}  # the targets' features are the same for every feature set

    def scores_of(method: str, seed: int = 0) -> InfluenceScores:
        asked = ScoreConfig(**config.scoring, **parse_method(method), seed=seed)
        scorer = open_scorer(
            store, asked, model=base, tokenizer=loaded_tokenizer, checkpoints=checkpoints, pool=pool,
            progress=progress, known=known,
        )  # fmt: skip
        return _kept_scores(folder / "scores", store, asked, target_sets, scorer)

    arms = _all_arms(config, scores_of, [t.name for t in target_sets])
    rows = store.rows(verify=False)
    decides = {
        "model": store.settings["model"]["fingerprint"],
        "dtype": store.settings["model"]["dtype"],
        "rendering": store.settings["rendering"],
        "lora": {name: _plain(getattr(lora, name)) for name in ("r", "lora_alpha", "lora_dropout", "target_modules")},
        "training": {n: getattr(config, n) for n in ("epochs", "learning_rate", "batch_size")},
    }
    trials, keys = plan_trials(arms, rows, [entry.sha256 for entry in store.sources], decides)
    trials_folder = folder / "trials"
    trials_folder.mkdir(parents=True, exist_ok=True)

    def rendered_rows(trial: Trial) -> list[Rendered]:
        return [pool_renderer.render_record(record) for record in pool.take(rows, trial.positions)]

    as_the_pool = ScoreConfig(**config.scoring | {"system_prompt": None})
    pool_renderer = open_renderer(store, as_the_pool, base, loaded_tokenizer, max_length)
    start = _start(trials_folder, base, loaded_tokenizer, held_out_of, decides, config)
    missing = [trial for trial in trials if _missing(trials_folder, trial, held_out_of)]
    num_rows = config.epochs * sum(len(trial.positions) for trial in missing)
    with Progress(total=num_rows, description=f"{len(missing)} trials", enabled=progress) as bar:
        for trial in _one_by_one(trials_folder, missing):
            own = _missing(trials_folder, trial, held_out_of)
            if not own:  # another process has done it
                bar.advance(config.epochs * len(trial.positions))
                continue
            measured = run_trial(
                base, loaded_tokenizer, rendered_rows(trial), [held_out_of[name] for name in own], lora=lora,
                training=config.training(trial.seed), max_new_tokens=config.max_new_tokens, bar=bar,
            )  # fmt: skip
            _write_trial(trials_folder, trial.key, measured, held_out_of)
    results = {trial.key: _read_trial(trials_folder, trial.key, held_out_of) for trial in trials}
    evaluation = summarize(
        arms, [results[key][arm.target] for arm, key in zip(arms, keys, strict=True)], start, rows,
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


def _held_out_sets(
    target_sets: Sequence[TargetSet], held_out: Any, renderer: Renderer, config: EvaluateConfig
) -> dict[str, HeldOut]:
    """The held-out rows of each target set, by its name."""
    names = [t.name for t in target_sets]
    if isinstance(held_out, Mapping):
        given = dict(held_out)
    else:
        several = isinstance(held_out, list | tuple) and not any(isinstance(row, dict) for row in held_out)
        parts = list(held_out) if several else [held_out]
        given = dict(zip(names, parts, strict=False)) if len(parts) == len(names) else {}
    if set(given) != set(names):
        num_given = sum(name in given for name in names)
        raise SettingError(
            f"there are {len(names)} target sets ({', '.join(names)}) and held-out rows for {num_given or 'none'} of "
            "them; give as many --eval as --targets, in the same order, or by the same names"
        )
    return {name: _load_held_out(name, given[name], renderer, config) for name in names}


def _load_held_out(name: str, data: Any, renderer: Renderer, config: EvaluateConfig) -> HeldOut:
    source = open_source(data)
    found: list[tuple[Rendered, str | None]] = []
    for record in source.iter_records():
        try:
            rendered = renderer.render_record(record)
        except RowProblem:
            continue
        if not rendered.truncated:
            answer = (record.columns or {}).get("answer")
            found.append((rendered, None if answer is None else str(answer)))
    if not found:
        raise DataError(f"none of the {source.num_rows} held-out rows in {source.name} can be used whole")
    if config.eval_rows is not None and config.eval_rows < len(found):
        drawn = np.random.default_rng(0).choice(len(found), size=config.eval_rows, replace=False)
        found = [found[n] for n in sorted(drawn.tolist())]
    asked = [(row, answer) for row, answer in found if answer is not None][: config.answer_rows]
    prompts = [row.input_ids[: _start_of_last_turn(row)] for row, _ in asked]
    decides: list[Any] = [[row.input_ids, row.supervised] for row, _ in found] + [[answer for _, answer in asked]]
    if asked:
        decides.append(config.max_new_tokens)
    digest = hashlib.sha256(json.dumps(decides).encode())
    return HeldOut(
        name=name,
        rendered=[row for row, _ in found],
        prompts=prompts,
        answers=[str(answer) for _, answer in asked],
        sha256=digest.hexdigest(),
    )


def _start_of_last_turn(row: Rendered) -> int:
    """Where the row's last reply begins: what is before it, earlier replies too, is its prompt."""
    end = row.num_tokens - row.supervised[::-1].index(True)
    return end - next((n for n, is_reply in enumerate(row.supervised[:end][::-1]) if not is_reply), end)


def _lora_of(store: Datastore, checkpoints: Any, config: EvaluateConfig) -> LoraConfig:
    """The adapter to train: the store's, or of the rank asked for."""
    if config.lora_rank is None and (checkpoints or holds_gradients(store)):
        first = as_paths(checkpoints or store.environment["checkpoints"])[0]
        lora = load_adapter_config(checkpoint_folders(first)[0])
        lora.init_lora_weights = True
        return lora
    default = WarmupConfig()
    return lora_config(replace(default, lora_rank=config.lora_rank or default.lora_rank, lora_alpha=None))


def _kept_scores(
    folder: Path, store: Datastore, config: ScoreConfig, target_sets: Sequence[TargetSet], scorer: Any
) -> InfluenceScores:
    """Scores of an earlier run with the same store and targets, or new ones, kept for the next."""
    made_of = json.dumps(
        [store.manifest.settings_hash, [s.sha256 for s in store.sources], [t.sha256 for t in target_sets],
         [t.name for t in target_sets], config.method, config.feature_set, config.normalize, config.seed,
         config.system_prompt],
    )  # fmt: skip
    file = folder / f"{hashlib.sha256(made_of.encode()).hexdigest()[:24]}.npz"
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder / "scores.lock", wait=True):  # of all methods: two of them may build the same embeddings
        if file.exists():
            with np.load(file) as kept:
                return InfluenceScores(
                    rows=store.rows(verify=False), scores_NJ=kept["scores_NJ"],
                    subtasks=tuple(kept["subtasks"].tolist()), target_sets=tuple(kept["target_sets"].tolist()),
                )  # fmt: skip
        influence, _ = scorer.score(target_sets)
        part = file.with_suffix(f".{os.getpid()}.tmp")
        with open(part, "wb") as stream:
            np.savez(
                stream, scores_NJ=influence.scores_NJ, subtasks=np.array(influence.subtasks),
                target_sets=np.array(influence.target_sets),
            )  # fmt: skip
        part.replace(file)
    return influence


def _start(
    folder: Path, base: PreTrainedModel, tokenizer: Any, held_out: dict[str, HeldOut], decides: dict[str, Any],
    config: EvaluateConfig,
) -> dict[str, Measured]:  # fmt: skip
    """What the base model gives before any training."""
    key = "start-" + hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:18]
    was_training = base.training
    base.eval()
    try:
        with _lock(folder / f"{key}.lock", wait=True):
            known = _read_trial(folder, key, held_out)
            found = {
                name: measure(base, tokenizer, own, config.tokens_per_batch, config.max_new_tokens)
                for name, own in held_out.items() if name not in known
            }  # fmt: skip
            if found:
                _write_trial(folder, key, found, held_out)
    finally:
        base.train(was_training)
    return known | found


def _missing(folder: Path, trial: Trial, held_out: dict[str, HeldOut]) -> list[str]:
    known = _read_trial(folder, trial.key, held_out)
    return [name for name in trial.targets if name not in known]


def _read_trial(folder: Path, key: str, held_out: dict[str, HeldOut]) -> dict[str, Measured]:
    """What a finished trial measured on these held-out rows, by target set."""
    file = folder / f"{key}.json"
    if not file.exists():
        return {}
    by_sha256 = json.loads(file.read_text(encoding="utf-8"))
    return {name: Measured(**by_sha256[own.sha256]) for name, own in held_out.items() if own.sha256 in by_sha256}


def _write_trial(folder: Path, key: str, measured: dict[str, Measured], held_out: dict[str, HeldOut]) -> None:
    file = folder / f"{key}.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    found = {held_out[name].sha256: asdict(own) for name, own in measured.items()}
    write_lines(file, [json.dumps(known | found)])


def _one_by_one(folder: Path, trials: Sequence[Trial]) -> Iterator[Trial]:
    """Trials that no other process works on, each while its lock is held; those of others are waited for at the end."""
    for wait in (False, True):
        left = []
        for trial in trials:
            with _lock(folder / f"{trial.key}.lock", wait=wait) as is_ours:
                if is_ours:
                    yield trial
                else:
                    left.append(trial)
        trials = left


@contextmanager
def _lock(path: Path, *, wait: bool) -> Iterator[bool]:
    while True:
        with open(path, "w", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            if not os.fstat(file.fileno()).st_nlink:  # who held it has removed it: another may hold a new one
                continue
            yield True
            path.unlink(missing_ok=True)
            return


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | frozenset | list | tuple) else value
