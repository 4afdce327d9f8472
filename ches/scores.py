"""From preference pairs and the model that DPO starts from to a file of scores.

    pairs → tokens → embeddings (one forward pass) → measures → the rows again, with the measures as columns

Rows are taken in ranges of `shard_rows`; within a range, pairs of like length share a batch. What a range gave is
kept beside the output until the whole is written, so that a killed run goes on where it was and gives the same
numbers. What a measure means is left to `measures`, how pairs become tokens to `tokens`, the file to `scored`.
"""

import hashlib
import math
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ches.embeddings import can_share_prompts, embed_replies, sequence_tokens
from ches.measures import (
    TokenTerms,
    alpha_ches_terms,
    ches_terms,
    edit_distance,
    last_hidden,
    length_difference,
    ln_ches_terms,
)
from ches.pairs import pair_of
from ches.scored import (
    ATTRIBUTED,
    MEASURES,
    PROBLEM,
    TRUNCATED,
    Example,
    Manifest,
    Parts,
    ScoredRange,
    columns_of,
    extremes,
    finished,
    pair_columns,
    write_scored,
)
from ches.tokens import PairRenderer, PairTokens
from ches.unembedding import Unembedding, residual_products
from datastore import SkippedRow
from datastore.errors import CheckpointError, DataError, SettingError
from datastore.files import hash_file
from less.data.batching import run_in_batches
from less.data.records import Record, RowProblem, Source, open_source, skip
from less.data.rendering import RenderConfig
from less.data.writing import dataset_of
from less.models import (
    context_length,
    first_line,
    load_base_model,
    load_tokenizer,
    lora_layers,
    model_fingerprint,
)
from less.progress import Progress
from less.provenance import location_of

if TYPE_CHECKING:
    import datasets

__all__ = ["ChesConfig", "PairScores", "score_pairs"]

TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 16384}
"""Default budget by device type: large enough to fill it."""


@dataclass(frozen=True, kw_only=True)
class ChesConfig:
    """Settings of a scoring run. All but the last three decide the scores and are held by the output."""

    measures: str | Sequence[str] = tuple(MEASURES)
    """Of ches, ln_ches, alpha_ches, last_hidden, edit_distance, length_difference and logp; without alpha_ches and
    logp the LM head is never run."""
    tokens: str = "trainer"
    """trainer: the reply's tokens as TRL's DPOTrainer trains on them. reference: the paper's, up to and with the
    end-of-turn token."""
    max_length: int = 1024
    """Tokens of prompt and reply together; the end is cut, as DPOTrainer does."""
    system_prompt: str = "keep"
    """keep, none, or the text to put in place of each row's own."""
    chat_template: str | None = None
    """tulu, chatml or a file; None takes the tokenizer's own."""
    dtype: str = "auto"
    """Of the weights: float32, bfloat16, or auto (bfloat16 on CUDA, float32 on the CPU)."""
    tokens_per_batch: int | None = None
    """Padded tokens in one batch; None chooses by device."""
    shard_rows: int = 1024
    """Rows that are kept together while the work goes on: what a killed run loses at most."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    strict: bool = False
    """Stop at the first pair that cannot be scored."""
    trust_remote_code: bool = False
    """Let code that comes with the model run."""

    def __post_init__(self) -> None:
        if unknown := [name for name in self.measure_names if name not in MEASURES]:
            raise SettingError(f"measures must be among {', '.join(MEASURES)}, got {unknown[0]!r}")
        if not self.measure_names:
            raise SettingError(f"no measure was asked for; expected some of {', '.join(MEASURES)}")
        if self.tokens not in ("trainer", "reference"):
            raise SettingError(f"tokens must be trainer or reference, got {self.tokens!r}")
        for name in ("max_length", "shard_rows", "tokens_per_batch"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise SettingError(f"{name} must be at least 1, got {value}")

    @property
    def measure_names(self) -> tuple[str, ...]:
        """The measures asked for, in the order of the columns."""
        asked = (self.measures,) if isinstance(self.measures, str) else tuple(self.measures)
        known = [name for name in MEASURES if name in asked]
        return (*known, *(name for name in asked if name not in MEASURES))

    @property
    def rendering(self) -> RenderConfig:
        """How pairs become tokens."""
        return RenderConfig(
            max_length=self.max_length, system_prompt=self.system_prompt, chat_template=self.chat_template
        )


@dataclass(frozen=True, kw_only=True)
class PairScores:
    """The scores of a data set's pairs."""

    records: tuple[Record, ...]
    """The rows that are objects, in order: only such can carry columns."""
    columns: tuple[dict[str, Any], ...]
    """What is added to each of them: the measures and `ches_problem`."""
    problems: tuple[SkippedRow, ...]
    """Rows that were not scored, and rows with a truncated reply, each with its reason."""
    num_rows: int
    """Rows of the input."""
    num_scored: int
    """Rows with measures."""
    num_computed: int
    """Rows computed by this call; 0 when the output was complete."""
    rewritten: bool
    """Whether prompt, chosen and rejected were replaced, since DPOTrainer would read the layout otherwise."""
    output: Path | None
    """The file written, if any."""
    seconds: float
    """Wall time."""

    @cached_property
    def dataset(self) -> "datasets.Dataset":
        """The rows with their scores.

        Raises:
            DataError: a column has values of several types.
        """
        return dataset_of(self.records, self.columns)


def score_pairs(
    *,
    model: "str | Path | PreTrainedModel | PeftModel",
    data: "str | Path | datasets.Dataset | Sequence[dict[str, Any]]",
    output: str | Path | None = None,
    tokenizer: "str | Path | PreTrainedTokenizerBase | None" = None,
    adapter: str | Path | None = None,
    progress: bool = True,
    **settings: Any,
) -> PairScores:
    """Score every preference pair under the model that DPO will start from.

    An output that is complete is left as it is; one that was interrupted is completed.

    Args:
        model: a folder, a hub name, or a loaded model, with or without a PEFT adapter.
        data: pairs in any layout that `ches.pairs` knows: a file, a hub name, a `datasets.Dataset`, a list of dicts.
        output: .jsonl or .parquet file; None writes nothing.
        tokenizer: where it is not the model's own.
        adapter: folder of a PEFT adapter on top of `model`, where DPO starts from one.
        progress: show progress on standard error.
        **settings: fields of `ChesConfig`.

    Raises:
        DataError: the data cannot be read, or no pair of it can be scored.
        ProvenanceError: the output was made, or begun, with other settings.
        UnsupportedError: alpha_ches or logp are asked for and the model's LM head is not linear.
        GradsiftError: see `datastore.errors`.
    """
    start = time.monotonic()
    config = ChesConfig(**settings)
    source = open_source(data)
    output = None if output is None else Path(output)
    if output is not None and source.location is not None and output.resolve() == Path(source.location):
        raise SettingError(f"--output {output} is the data itself, which it would overwrite; choose another name")
    words = load_tokenizer(
        (location_of(_base_of(model)) if tokenizer is None else tokenizer), trust_remote_code=config.trust_remote_code
    )
    with _ready(model, adapter, config) as loaded:
        renderer = PairRenderer(
            words, config.rendering, tokens=config.tokens, context_length=context_length(loaded.config)
        )
        scorer = PairScorer(loaded, renderer, config)
        if output is None:
            return _joined(source, *scorer.score(source, None, progress), None, start)
        decides = scorer.settings(source)
        if (manifest := finished(output, decides)) is not None:
            return _from_file(output, manifest, config, start)
        with Parts.open(output, decides) as parts:
            ranges, num_computed = scorer.score(source, parts, progress)
            try:
                scores = _joined(source, ranges, num_computed, output, start)
            except DataError:
                parts.remove()  # there is nothing in them, and they would bind the next try to these settings
                raise
            write_scored(output, scores.records, scores.columns, source.kind)
            Manifest(
                settings=decides,
                environment=scorer.environment(model, adapter),
                source={name: getattr(source, name) for name in ("name", "kind", "location", "sha256", "num_rows")},
                output=asdict(hash_file(output)),
                num_scored=scores.num_scored,
                rewritten=scores.rewritten,
                problems=[asdict(row) for row in scores.problems],
                examples=[asdict(example) for example in extremes(e for part in ranges for e in part.examples)],
            ).write(output)
            parts.remove()
    return scores


class PairScorer:
    """What stays the same from range to range."""

    def __init__(self, model: PreTrainedModel | PeftModel, renderer: PairRenderer, config: ChesConfig) -> None:
        self.model, self.renderer, self.config = model, renderer, config
        self.tokens_per_batch = config.tokens_per_batch or TOKENS_PER_BATCH.get(model.device.type, 2048)
        self.measures = config.measure_names
        self.head = Unembedding.of(model) if {"alpha_ches", "logp"} & {*self.measures} else None
        self.shares_prompts = can_share_prompts(model)

    def settings(self, source: Source) -> dict[str, Any]:
        """All that decides the scores, as JSON."""
        return {
            "model": {
                "fingerprint": model_fingerprint(_base_of(self.model)),
                "dtype": str(self.model.dtype).removeprefix("torch."),
                "adapter_sha256": _adapter_hash(self.model),
            },
            "rendering": self.renderer.provenance(),
            "measures": list(self.measures),
            "tokens_per_batch": self.tokens_per_batch,
            "shard_rows": self.config.shard_rows,
            "source": {"sha256": source.sha256, "num_rows": source.num_rows},
        }

    def environment(self, model: Any, adapter: str | Path | None) -> dict[str, Any]:
        """Where things lay and what ran, as JSON."""
        device = self.model.device
        return {
            "model": location_of(_base_of(model)),
            "adapter": None if adapter is None else location_of(Path(adapter)),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "threads": torch.get_num_threads(),
            "shares_prompts": self.shares_prompts,
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("torch", "transformers", "peft", "gradsift")},
            },
        }

    def score(self, source: Source, parts: Parts | None, progress: bool) -> tuple[list[ScoredRange], int]:
        """Every range of the source, and how many rows had to be computed."""
        step = self.config.shard_rows
        spans = [range(at, min(at + step, source.num_rows)) for at in range(0, source.num_rows, step)]
        found = {rows: parts.load(rows) if parts else None for rows in spans}
        missing = [rows for rows in spans if found[rows] is None]
        num_computed = sum(map(len, missing))
        with Progress(total=num_computed, description="pairs", unit="pairs", enabled=progress) as bar:
            for rows in missing:
                scored = found[rows] = self.score_range(source, rows, bar)
                if parts is not None:
                    parts.save(rows, scored)
        return [part for part in found.values() if part is not None], num_computed

    def score_range(self, source: Source, rows: range, bar: Progress) -> ScoredRange:
        """The rows of one range."""
        columns: dict[int, dict[str, Any]] = {}
        records: list[Record] = []
        pairs: list[PairTokens] = []
        problems: list[SkippedRow] = []
        rewritten = False

        def reject(record: Record, problem: RowProblem) -> None:
            problems.append(skip(record, problem, strict=self.config.strict))
            if record.columns is not None:
                columns[record.number] = {**dict.fromkeys(columns_of(self.measures)), PROBLEM: problem.reason}

        for record in source.iter_records(rows.start, rows.stop):
            try:
                if record.problem is not None:
                    raise record.problem
                pair = pair_of(record.columns or {})
                rewritten = rewritten or pair.rewritten
                pairs.append(self.renderer.render(pair))
                records.append(record)
            except RowProblem as problem:
                reject(record, problem)
        bar.advance(len(problems))
        measured: dict[int, Measured] = {}

        def compute(members: list[int]) -> None:
            measured.update(zip(members, self.measure([pairs[n] for n in members]), strict=True))
            bar.advance(len(members), sum(pairs[n].num_tokens for n in members))

        lengths = [sequence_tokens(pair, share_prompts=self.shares_prompts) for pair in pairs]
        num_retries = run_in_batches(lengths, self.tokens_per_batch, compute)
        examples = []
        for n, record in enumerate(records):
            values = measured[n].values
            if bad := [f"{name} {value}" for name, value in values.items() if not math.isfinite(value)]:
                reject(record, RowProblem("not finite", ", ".join(bad)))
                continue
            remark = _truncation(pairs[n])
            columns[record.number] = {**values, PROBLEM: remark and remark.reason}
            if remark is not None:
                problems.append(skip(record, remark, strict=False))
            examples.append(Example(row=record.number, values=values, chosen={}, rejected={}))
        at = {record.number: n for n, record in enumerate(records)}
        return ScoredRange(
            columns=[columns.get(number) for number in rows],
            problems=[asdict(problem) for problem in sorted(problems, key=lambda row: row.row)],
            examples=[self._in_full(e, pairs[at[e.row]], measured[at[e.row]].terms) for e in extremes(examples)],
            rewritten=rewritten,
            num_retries=num_retries,
        )

    def measure(self, pairs: Sequence[PairTokens]) -> "Iterator[Measured]":
        """The measures of each pair of a batch."""
        asked = {*self.measures}
        embeddings = embed_replies(self.model, pairs, share_prompts=self.shares_prompts)
        log_probs_S = alphas = None
        if self.head is not None:
            log_probs_S, alphas = residual_products(self.head, embeddings, alphas="alpha_ches" in asked)
        spans = list(embeddings.spans)
        for n, (pair, (chosen_TD, rejected_TD)) in enumerate(zip(pairs, embeddings.pairs, strict=True)):
            num_chosen, num_rejected = embeddings.sizes[n]
            values: dict[str, float] = {}
            terms: dict[str, TokenTerms] = {}
            if asked & {"ches", "ln_ches"}:
                terms["ches"] = ches_terms(chosen_TD, rejected_TD)
                values["ches"], values["ln_ches"] = terms["ches"].total, ln_ches_terms(terms["ches"]).total
            if alphas is not None:
                terms["alpha_ches"] = alpha_ches_terms(chosen_TD, rejected_TD, alphas[n])
                values["alpha_ches"] = terms["alpha_ches"].total
            if "last_hidden" in asked:
                values["last_hidden"] = last_hidden(chosen_TD, rejected_TD)
            if "edit_distance" in asked:
                values["edit_distance"] = edit_distance(pair.chosen.counted_ids, pair.rejected.counted_ids)
            values["length_difference"] = length_difference(num_chosen, num_rejected)
            values["length_chosen"], values["length_rejected"] = num_chosen, num_rejected
            if log_probs_S is not None:
                for name, span in zip(("logp_chosen", "logp_rejected"), spans[n], strict=True):
                    values[name] = float(log_probs_S[span].double().sum())
            yield Measured({name: _rounded(values[name]) for name in columns_of(self.measures)}, terms)

    def _in_full(self, example: Example, pair: PairTokens, terms: dict[str, TokenTerms]) -> Example:
        """An example with its tokens and their terms."""
        values = {name: example.values[name] for name in ATTRIBUTED if name in example.values}
        sides: dict[str, dict[str, list[Any]]] = {}
        for side, reply in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            texts = self.renderer.token_texts(pair, reply)
            parts = {name: [_rounded(x) for x in getattr(t, f"{side}_T").tolist()] for name, t in terms.items()}
            sides[side] = {"tokens": texts, **parts}
        return Example(row=example.row, values=values, chosen=sides["chosen"], rejected=sides["rejected"])


@dataclass(frozen=True)
class Measured:
    """What one pair gave."""

    values: dict[str, float]
    """Its columns."""
    terms: dict[str, TokenTerms]
    """`ches` and `alpha_ches` token by token, where they were computed."""


@contextmanager
def _ready(
    model: "str | Path | PreTrainedModel | PeftModel", adapter: str | Path | None, config: ChesConfig
) -> "Iterator[PreTrainedModel | PeftModel]":
    """The model with its adapter, in evaluation mode; a model that was given is given back as it was."""
    if isinstance(model, PeftModel) and adapter is not None:
        raise SettingError("the model given has an adapter already; leave out --adapter, or give its base model")
    base = load_base_model(
        _base_of(model), dtype=config.dtype, device=config.device, trust_remote_code=config.trust_remote_code
    )
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


def _base_of(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _adapter_hash(model: nn.Module) -> str | None:
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


def _truncation(pair: PairTokens) -> RowProblem | None:
    cut = [side for side, reply in (("chosen", pair.chosen), ("rejected", pair.rejected)) if reply.truncated]
    return RowProblem(TRUNCATED, f"{' and '.join(cut)}: the end is cut, as in training") if cut else None


def _rounded(value: float) -> float:
    """To 9 digits: more than the forward pass has, and half the bytes of a double's text."""
    return value if isinstance(value, int) or not math.isfinite(value) else float(f"{value:.9g}")


def _joined(
    source: Source, ranges: Sequence[ScoredRange], num_computed: int, output: Path | None, start: float
) -> PairScores:
    """The ranges as one, with the rows that they belong to."""
    found = [columns for part in ranges for columns in part.columns]
    rewritten = any(part.rewritten for part in ranges)
    records, columns = [], []
    for record, own in zip(source.iter_records(), found, strict=True):
        if own is not None:
            records.append(record)
            columns.append({**pair_columns(record), **own} if rewritten else own)
    problems = tuple(SkippedRow(**entry) for part in ranges for entry in part.problems)
    num_scored = sum(own is not None and own[PROBLEM] in (None, TRUNCATED) for own in found)
    if not num_scored:
        raise DataError(
            f"no pair of {source.location or source.name} can be scored; the first: {problems[0].where}: "
            f"{problems[0].reason}: {problems[0].detail}"
        )
    return PairScores(
        records=tuple(records),
        columns=tuple(columns),
        problems=problems,
        num_rows=source.num_rows,
        num_scored=num_scored,
        num_computed=num_computed,
        rewritten=rewritten,
        output=output,
        seconds=time.monotonic() - start,
    )


def _from_file(output: Path, manifest: Manifest, config: ChesConfig, start: float) -> PairScores:
    """The scores of a finished file."""
    names = [*columns_of(config.measure_names), PROBLEM]
    records = tuple(open_source(output).iter_records())
    return PairScores(
        records=records,
        columns=tuple({name: (record.columns or {}).get(name) for name in names} for record in records),
        problems=tuple(SkippedRow(**entry) for entry in manifest.problems),
        num_rows=manifest.source["num_rows"],
        num_scored=manifest.num_scored,
        num_computed=0,
        rewritten=manifest.rewritten,
        output=output,
        seconds=time.monotonic() - start,
    )
