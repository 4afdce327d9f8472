"""Likelihood displacement as it happens: a callback that follows fixed pairs while DPO trains.

    Δ⁺ = log p(chosen) now − at the start,    Δ⁻ likewise for rejected

DPO widens log p(chosen) − log p(rejected), and may do so while both fall: Δ⁺ < 0 is displacement (Razin et al.
2025, §2). TRL logs means over whatever batches went by; here the same pairs are asked at every logging step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn
from transformers import TrainerCallback

from ches.embeddings import can_share_prompts, embed_replies, sequence_tokens
from ches.tokens import PairRenderer, PairTokens
from ches.unembedding import residual_products
from datastore import SkippedRow
from datastore.errors import DataError
from less.data.batching import BatchBudget, run_in_batches
from less.data.records import RowProblem, open_source, skip
from less.data.rendering import RenderConfig
from less.lm_head import Unembedding
from less.models import context_length

__all__ = ["DisplacementCallback", "ProbeLogps", "pair_log_probs"]

_NO_LIMIT = 2**31


@dataclass(frozen=True, eq=False)
class ProbeLogps:
    """The log-probabilities of the probe's replies at one step, sums over reply tokens; float64."""

    step: int
    """Optimizer steps taken."""
    chosen_N: NDArray[np.float64]
    rejected_N: NDArray[np.float64]


class DisplacementCallback(TrainerCallback):
    """Logs how the replies of fixed pairs gain and lose probability while TRL's `DPOTrainer` trains.

        trainer = DPOTrainer(...)
        trainer.add_callback(DisplacementCallback(trainer, probe=rows[:256]))

    Whenever the trainer logs, and once more at the end, it logs beside the loss:

        displacement/chosen_losing      share of the pairs whose chosen reply has less probability than at the start
        displacement/chosen_change      mean of Δ⁺, in nats a reply
        displacement/rejected_change    mean of Δ⁻

    A measurement is a forward pass over the probe in evaluation mode, and changes nothing in training. Every process
    of a distributed run does it; weights must be whole in each, as in data parallelism.

    Args:
        trainer: gives the model, the tokenizer and `max_length`, and takes the logs.
        probe: pairs in any layout of `ches.pairs`; those that cannot be used are listed in `skipped`.
        tokens_per_batch: padded tokens in one batch; None chooses by device.

    Raises:
        DataError: no pair of the probe can be used.
    """

    def __init__(self, trainer: Any, probe: Any, *, tokens_per_batch: int | None = None) -> None:
        config = trainer.model.config
        renderer = PairRenderer(
            trainer.processing_class,
            RenderConfig(max_length=trainer.args.max_length or _NO_LIMIT),
            context_length=context_length(config),
        )
        self._trainer, self._tokens_per_batch = trainer, tokens_per_batch
        self._pairs: list[PairTokens] = []
        self.skipped: list[SkippedRow] = []
        """Pairs of the probe that are not followed, each with its reason."""
        self.history: list[ProbeLogps] = []
        """Every measurement, the start first; pairs in the probe's order."""
        source = open_source(probe)
        for record in source.iter_records():
            try:
                self._pairs.append(renderer.render_record(record))
            except RowProblem as problem:
                self.skipped.append(skip(record, problem, strict=False))
        if not self._pairs:
            raise DataError(
                f"none of the {source.num_rows} pairs of the probe can be used; the first: "
                f"{self.skipped[0].reason}: {self.skipped[0].detail}"
            )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure what the rest is held against."""
        self.history = [self._measured(state.global_step)]

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Measure beside every log of the training loss."""
        if logs and "loss" in logs:
            self._follow(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure what training came to."""
        self._follow(state.global_step)

    def _follow(self, step: int) -> None:
        if self.history[-1].step == step:
            return
        self.history.append(now := self._measured(step))
        start = self.history[0]
        self._trainer.log(
            {
                "displacement/chosen_losing": float(np.mean(now.chosen_N < start.chosen_N)),
                "displacement/chosen_change": float(np.mean(now.chosen_N - start.chosen_N)),
                "displacement/rejected_change": float(np.mean(now.rejected_N - start.rejected_N)),
            }
        )

    def _measured(self, step: int) -> ProbeLogps:
        model = self._trainer.accelerator.unwrap_model(self._trainer.model)
        was_training = model.training
        model.eval()
        try:
            chosen_N, rejected_N = pair_log_probs(model, self._pairs, self._tokens_per_batch)
        finally:
            model.train(was_training)
        return ProbeLogps(step, chosen_N, rejected_N)


def pair_log_probs(
    model: nn.Module, pairs: Sequence[PairTokens], tokens_per_batch: int | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """log p(chosen) and log p(rejected) of every pair, sums over reply tokens.

    Args:
        model: in evaluation mode.
        pairs: their tokens.
        tokens_per_batch: padded tokens in one batch; None chooses by device.

    Returns:
        chosen_N and rejected_N, float64, in nats.

    Raises:
        UnsupportedError: the LM head is not linear.
    """
    head, sharing = Unembedding.of(model), can_share_prompts(model)
    device = next(model.parameters()).device
    log_probs_N2 = np.empty((len(pairs), 2))

    def compute(members: list[int]) -> None:
        embeddings = embed_replies(model, [pairs[n] for n in members], share_prompts=sharing)
        log_probs_S = residual_products(head, embeddings, alphas=False)[0].double().cpu()
        for n, spans in zip(members, embeddings.spans, strict=True):
            log_probs_N2[n] = [float(log_probs_S[span].sum()) for span in spans]

    lengths = [sequence_tokens(pair, share_prompts=sharing) for pair in pairs]
    run_in_batches(lengths, BatchBudget.on(device, tokens_per_batch), compute)
    return log_probs_N2[:, 0], log_probs_N2[:, 1]
