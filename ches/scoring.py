"""Numbers of preference pairs: a range of rows, batch by batch.

    pairs → tokens → embeddings (one forward pass) → measures

Within a range, pairs of like length share a batch; batches never cross ranges, so that a range gives the same
numbers whenever it is computed. What a measure means is left to `measures`, the file to `scored` and `scores`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from ches.embeddings import can_share_prompts, embed_replies, sequence_tokens
from ches.loading import adapter_hash, base_of
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
from ches.scored import ATTRIBUTED, MEASURES, PROBLEM, TRUNCATED, Example, ScoredRange, columns_of, extremes
from ches.tokens import TOKENS, PairRenderer, PairTokens
from ches.unembedding import residual_products
from datastore import SkippedRow
from datastore.errors import SettingError
from less.data.batching import BatchBudget, run_in_batches
from less.data.records import Record, RowProblem, Source, skip
from less.lm_head import Unembedding
from less.loading import LoadingConfig
from less.models import model_fingerprint
from less.progress import Progress
from less.provenance import location_of, running_on

__all__ = ["ChesConfig", "Measured", "PairScorer"]


@dataclass(frozen=True, kw_only=True)
class ChesConfig(LoadingConfig):
    """Settings of a scoring run. All that decides the scores is held by the output."""

    measures: str | Sequence[str] = tuple(MEASURES)
    """Of ches, ln_ches, alpha_ches, last_hidden, edit_distance, length_difference and logp; without alpha_ches and
    logp the LM head is never run."""
    tokens: str = "trainer"
    """trainer: the reply's tokens as TRL's DPOTrainer trains on them. reference: the paper's, up to and with the
    end-of-turn token."""
    max_length: int = 1024
    """Tokens of prompt and reply together; the end is cut, as DPOTrainer does."""
    shard_rows: int = 1024
    """Rows that are kept together while the work goes on: what a killed run loses at most."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := [name for name in self.measure_names if name not in MEASURES]:
            raise SettingError(f"measures must be among {', '.join(MEASURES)}, got {unknown[0]!r}")
        if not self.measure_names:
            raise SettingError(f"no measure was asked for; expected some of {', '.join(MEASURES)}")
        if self.tokens not in TOKENS:
            raise SettingError(f"tokens must be {' or '.join(TOKENS)}, got {self.tokens!r}")
        if self.shard_rows < 1:
            raise SettingError(f"shard_rows must be at least 1, got {self.shard_rows}")

    @property
    def measure_names(self) -> tuple[str, ...]:
        """The measures asked for, in the order of the columns."""
        asked = (self.measures,) if isinstance(self.measures, str) else tuple(self.measures)
        known = [name for name in MEASURES if name in asked]
        return (*known, *(name for name in asked if name not in MEASURES))


class PairScorer:
    """What stays the same from range to range."""

    def __init__(self, model: PreTrainedModel | PeftModel, renderer: PairRenderer, config: ChesConfig) -> None:
        self.model, self.renderer, self.config = model, renderer, config
        self.budget = BatchBudget.on(model.device, config.tokens_per_batch)
        self.measures = config.measure_names
        self.head = Unembedding.of(model) if {"alpha_ches", "logp"} & {*self.measures} else None
        self.shares_prompts = can_share_prompts(model)

    def settings(self, source: Source) -> dict[str, Any]:
        """All that decides the scores, as JSON."""
        return {
            "model": {
                "fingerprint": model_fingerprint(base_of(self.model)),
                "dtype": str(self.model.dtype).removeprefix("torch."),
                "adapter_sha256": adapter_hash(self.model),
            },
            "rendering": self.renderer.provenance(),
            "measures": list(self.measures),
            "tokens_per_batch": self.budget.max_tokens,
            "shard_rows": self.config.shard_rows,
            "source": {"sha256": source.sha256, "num_rows": source.num_rows},
        }

    def environment(self, model: Any, adapter: str | Path | None) -> dict[str, Any]:
        """Where things lay and what ran, as JSON."""
        return {
            "model": location_of(base_of(model)),
            "adapter": None if adapter is None else location_of(Path(adapter)),
            "shares_prompts": self.shares_prompts,
            **running_on(self.model.device),
        }

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
        num_retries = run_in_batches(lengths, self.budget, compute)
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


def _truncation(pair: PairTokens) -> RowProblem | None:
    cut = [side for side, reply in (("chosen", pair.chosen), ("rejected", pair.rejected)) if reply.truncated]
    return RowProblem(TRUNCATED, f"{' and '.join(cut)}: the end is cut, as in training") if cut else None


def _rounded(value: float) -> float:
    """To 9 digits: more than the forward pass has, and half the bytes of a double's text."""
    return value if isinstance(value, int) or not math.isfinite(value) else float(f"{value:.9g}")
