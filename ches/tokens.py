"""Which tokens a preference pair gives, and which of them count as its replies.

    sequence of a reply = prompt ids + reply ids, cut to the length limit, its start kept
    token k counts      ⇒  the position before it enters the sums S± and log p: n± positions in all

`trainer`, what `DPOTrainer` of TRL 1.16 trains on:

    sequences = ids of template(prompt + chosen) and of template(prompt + rejected);   counted from `start` on
    start     = where they leave the ids of template(prompt, generation prompt), the earlier of the two

    so that white space and other tokens after the end-of-turn token count too. For text, template(x) = x with the
    eos token after a reply that does not end with it, and the tokenizer adds its special tokens.

`reference`, what the paper's own script sums over (Razin et al. 2025, Definition 2): the same sequences, but counted
are only the tokens that `less` calls supervised, in the replies' assistant turns: content and end-of-turn token.
Text is taken as in `trainer`.

Rendering and spans are left to `less.data.rendering`, reading a row to `pairs`, the sums to `scores`.
"""

from dataclasses import dataclass
from itertools import compress
from typing import Any

from transformers import PreTrainedTokenizerBase

from ches.pairs import Pair, pair_of
from datastore.errors import ModelError, SettingError
from less.data.conversations import Conversation, RowProblem
from less.data.rendering import RenderConfig, Renderer, token_texts, tokens_of, vocabulary_sha256
from less.data.sources import Record

__all__ = ["TOKENS", "PairRenderer", "PairTokens", "Reply"]

TOKENS = ("trainer", "reference")
"""Whose reply tokens count."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The tokens of one reply."""

    input_ids: list[int]
    """The ids after those that both replies share as their prompt, cut to the length limit."""
    counted: list[bool]
    """Which of them are reply tokens. Never the first of a sequence: nothing predicts it."""
    truncated: bool
    """Whether tokens were cut off."""

    @property
    def counted_ids(self) -> list[int]:
        """The ids of the reply tokens."""
        return list(compress(self.input_ids, self.counted))

    @property
    def num_counted(self) -> int:
        """How many there are."""
        return sum(self.counted)


@dataclass(frozen=True, kw_only=True)
class PairTokens:
    """The tokens of one pair."""

    prompt_ids: list[int]
    """The ids that both sequences begin with; none of them counts."""
    chosen: Reply
    """The preferred reply."""
    rejected: Reply
    """The other one."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the pair, the prompt's once."""
        return len(self.prompt_ids) + len(self.chosen.input_ids) + len(self.rejected.input_ids)


class PairRenderer:
    """Turns pairs into tokens, with one tokenizer and one set of settings.

    With `tokens="trainer"` they are `DPOTrainer`'s own, but for two things: a date that the template asks for is
    `config.template_date`, and `config` may name another template or system prompt than the tokenizer's and the
    row's. `DPOTrainer` has to be given the same `max_length`, and to keep the start, as is its default.

    Args:
        tokenizer: a fast Hugging Face tokenizer; for pairs of text any. It is not changed.
        config: the settings.
        tokens: "trainer" or "reference", as above.
        context_length: the most tokens that the model takes, if known.

    Raises:
        SettingError: a setting is out of range, or the template has no place for the system prompt asked for.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: RenderConfig,
        *,
        tokens: str = "trainer",
        context_length: int | None = None,
    ) -> None:
        if tokens not in TOKENS:
            raise SettingError(f"tokens must be {' or '.join(TOKENS)}, got {tokens!r}")
        self.max_length = min(config.max_length, context_length or config.max_length)
        self._tokenizer = tokenizer
        self._system_prompt = config.system_prompt
        self._tokens = tokens
        self._chats: Renderer | ModelError
        try:
            self._chats = Renderer(tokenizer, config, context_length=context_length)
        except ModelError as error:  # raised at the first conversation: text needs no template
            self._chats = error

    def provenance(self) -> dict[str, Any]:
        """What decides the tokens: that of `Renderer`, and `tokens`. JSON-able; no template if there is none."""
        if isinstance(self._chats, Renderer):
            rendering = self._chats.provenance()
        else:
            rendering = {
                "vocabulary_sha256": vocabulary_sha256(self._tokenizer),
                "template_sha256": None,
                "max_length": self.max_length,
                "system_prompt": self._system_prompt,
                "template_date": None,
            }
        return {**rendering, "tokens": self._tokens}

    def render_record(self, record: Record) -> PairTokens:
        """The tokens of a row.

        Raises:
            RowProblem: the row cannot be read, holds no pair, or cannot be rendered.
            ModelError: as `render`.
        """
        if record.problem is not None:
            raise record.problem
        return self.render(pair_of(record.columns or {}))

    def render(self, pair: Pair) -> PairTokens:
        """The tokens of a pair.

        Raises:
            RowProblem: "field missing", "span not found", "same replies" (token for token), "no supervised token"
                (a reply has none within the length limit); "not JSON" if not Unicode.
            ModelError: it is a conversation and there is no chat template that works with the tokenizer, or it is
                text and the tokenizer has no eos token.
        """
        if pair.conversational and self._tokens == "reference":
            chosen, rejected, start = self._reference(pair)
        else:
            chosen, rejected, start = self._trainer(pair)
        if chosen[0] == rejected[0]:
            raise RowProblem("same replies", "chosen and rejected are the same token for token")
        return PairTokens(
            prompt_ids=chosen[0][:start],
            chosen=self._reply("chosen", *chosen, start),
            rejected=self._reply("rejected", *rejected, start),
        )

    def token_texts(self, pair: PairTokens, reply: Reply) -> list[str]:
        """The text of each reply token of `pair`'s `reply`, as it stands there."""
        texts = token_texts(self._tokenizer, [*pair.prompt_ids[-1:], *reply.input_ids])[-len(reply.input_ids) :]
        return [text for text, counts in zip(texts, reply.counted, strict=True) if counts]

    def _reply(self, name: str, input_ids: list[int], counted: list[bool], start: int) -> Reply:
        limit, num_tokens = self.max_length, len(input_ids)
        reply = Reply(input_ids=input_ids[start:limit], counted=counted[start:limit], truncated=num_tokens > limit)
        if not reply.num_counted:
            raise RowProblem(
                "no supervised token", f"none of the {name} reply in the first {limit} of {num_tokens} tokens"
            )
        return reply

    def _trainer(self, pair: Pair) -> tuple[tuple[list[int], list[bool]], tuple[list[int], list[bool]], int]:
        """For each reply its whole sequence and which of it counts; then where the replies start."""
        texts = self._chat_texts(pair) if pair.conversational else self._plain_texts(pair)
        encoded = tokens_of(self._tokenizer, texts, add_special_tokens=not pair.conversational)
        prompt, *sequences = encoded["input_ids"]
        start = min(_num_common(prompt, sequence) for sequence in sequences)
        first = max(start, 1)  # nothing predicts the first token of a sequence
        chosen, rejected = ((ids, [at >= first for at in range(len(ids))]) for ids in sequences)
        return chosen, rejected, start

    def _reference(self, pair: Pair) -> tuple[tuple[list[int], list[bool]], tuple[list[int], list[bool]], int]:
        """As `_trainer`."""
        chats, first = self._renderer(), len(pair.prompt)
        chosen, rejected = (
            chats.tokens_and_marks(self._chat(pair, reply), first=first) for reply in (pair.chosen, pair.rejected)
        )
        unmarked = (next((at for at, mark in enumerate(marks) if mark), len(marks)) for _, marks in (chosen, rejected))
        return chosen, rejected, min(_num_common(chosen[0], rejected[0]), *unmarked)

    def _chat_texts(self, pair: Pair) -> list[str]:
        chats = self._renderer()
        prompt = chats.text(self._chat(pair, []), generation_prompt=True)
        return [prompt, *(chats.text(self._chat(pair, reply)) for reply in (pair.chosen, pair.rejected))]

    def _plain_texts(self, pair: Pair) -> list[str]:
        eos = self._tokenizer.eos_token
        if not eos:
            raise ModelError(
                "the tokenizer has no eos token to close a reply with; set one (`eos_token` in "
                "tokenizer_config.json), or give the pairs as lists of messages"
            )
        prompt: Any = pair.prompt
        replies: tuple[Any, Any] = (pair.chosen, pair.rejected)
        return [prompt, *(prompt + (reply if reply.endswith(eos) else reply + eos) for reply in replies)]

    def _chat(self, pair: Pair, reply: Any) -> Conversation:
        return Conversation(
            messages=pair.prompt + reply, tools=pair.tools, chat_template_kwargs=pair.chat_template_kwargs
        )

    def _renderer(self) -> Renderer:
        if isinstance(self._chats, ModelError):
            raise self._chats
        return self._chats


def _num_common(ids: list[int], others: list[int]) -> int:
    """How many leading ids are the same."""
    pairs = enumerate(zip(ids, others, strict=False))
    return next((at for at, (one, other) in pairs if one != other), min(len(ids), len(others)))
