"""Which tokens a row gives, and which of them carry loss. Warm-up, gradients and CHES all ask this module.

    text   = the tokenizer's chat template, applied to the whole conversation once
    tokens = tokenizer(text, add_special_tokens=False), as `apply_chat_template` does
    spans  = each assistant turn, from the end of its generation prompt to the end of its end-of-turn token
    token i carries loss  ⇔  its characters overlap a span, and i > 0: nothing predicts the first token

A turn's span is found in the first of these ways that applies:

1. Marks. A template with `{% generation %}` says itself what the model writes.
2. Prefixes. The messages before the turn, rendered with a generation prompt, begin the text and end where the
   turn starts; the messages up to and with the turn begin it too and end after its end-of-turn token.
3. A sentinel, where they do not begin the text: templates drop old reasoning, move the system prompt, refuse
   a chat without an answer. With a sentinel for the turn, what surrounds the sentinel surrounds the turn.

Else the row is skipped: "span not found". Neither the pad id (often pad = eos) nor a search for the content
ever decides. Rendering is left to `templates`, reading a row to `conversations`, padding to `batching`.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from datastore.errors import ModelError, SettingError
from less.data.conversations import Conversation, RowProblem, conversation_of
from less.data.sources import Record
from less.data.templates import ChatTemplate

__all__ = ["RenderConfig", "Rendered", "Renderer", "token_texts", "tokens_of", "vocabulary_sha256"]

_SENTINEL = "gradsift7sentinel"  # no white space and no mark-up: templates pass it on as it is


@dataclass(frozen=True, kw_only=True)
class RenderConfig:
    """How rows become tokens. Part of what a datastore records."""

    max_length: int = 2048
    """Tokens of a row that are kept, from its start; the model's context may lower it."""
    system_prompt: str = "keep"
    """"keep": each row's own. "none": none, nor the template's default if an empty one can hold its place.
    Else the text that every row gets in place of its own."""
    chat_template: str | None = None
    """"tulu", "chatml" or the path of a Jinja file; None: the tokenizer's own."""
    template_date: str = "2025-01-01"
    """The day that a template is told when it asks for today's date, ISO format."""


@dataclass(frozen=True)
class Rendered:
    """The tokens of one row."""

    input_ids: list[int]
    """Token ids, cut to the length limit."""
    supervised: list[bool]
    """Which of them carry loss. Never the first: nothing predicts it."""
    truncated: bool
    """Whether tokens were cut off."""

    @property
    def num_tokens(self) -> int:
        """Tokens kept."""
        return len(self.input_ids)

    @property
    def num_supervised(self) -> int:
        """Tokens that carry loss."""
        return sum(self.supervised)


class Renderer:
    """Renders conversations with one tokenizer and one set of settings.

    Args:
        tokenizer: a fast Hugging Face tokenizer. It is not changed.
        config: the settings.
        context_length: the most tokens that the model takes, if known.

    Raises:
        ModelError: the tokenizer has no character offsets, or there is no chat template that works with it.
        SettingError: a setting is out of range, or the template has no place for the system prompt asked for.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, config: RenderConfig, *, context_length: int | None = None
    ) -> None:
        if config.max_length < 1:
            raise SettingError(f"max length must be positive, got {config.max_length}")
        if not tokenizer.is_fast:
            raise ModelError(
                f"{type(tokenizer).__name__} is a slow tokenizer, without character offsets; "
                "expected a fast one (a model folder with tokenizer.json)"
            )
        self.max_length = min(config.max_length, context_length or config.max_length)
        self.tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer, config.chat_template, config.template_date)
        self._system_prompt = config.system_prompt
        self._learn_turns()
        self._learn_system_prompt()

    def provenance(self) -> dict[str, Any]:
        """What decides the tokens. JSON-able; no date if no template asks for it."""
        return {
            "vocabulary_sha256": vocabulary_sha256(self.tokenizer),
            "template_sha256": self._template.sha256,
            "max_length": self.max_length,
            "system_prompt": self._system_prompt,
            "template_date": self._template.date,
        }

    def render_record(self, record: Record) -> Rendered:
        """The tokens of a row.

        Raises:
            RowProblem: the row cannot be read, holds no conversation, or cannot be rendered.
        """
        if record.problem is not None:
            raise record.problem
        return self.render(conversation_of(record.columns or {}))

    def render(self, conversation: Conversation) -> Rendered:
        """The tokens of a conversation.

        Raises:
            RowProblem: "field missing", "span not found", "no supervised token"; "not JSON" if not Unicode.
        """
        input_ids, supervised = self.tokens_and_marks(conversation)
        limit = self.max_length
        if not any(supervised[:limit]):
            raise RowProblem("no supervised token", f"none in the first {limit} of the row's {len(input_ids)} tokens")
        return Rendered(input_ids[:limit], supervised[:limit], truncated=len(input_ids) > limit)

    def tokens_and_marks(self, conversation: Conversation, *, first: int = 0) -> tuple[list[int], list[bool]]:
        """All tokens of a conversation, not cut, and which of them are supervised; `first` as in `text_and_spans`.

        Raises:
            RowProblem: "field missing" or "span not found"; "not JSON" if not Unicode.
        """
        text, spans = self.text_and_spans(conversation, first=first)
        tokens = tokens_of(self.tokenizer, [text], add_special_tokens=False, return_offsets_mapping=True)
        supervised = _overlapping(tokens["offset_mapping"][0], spans)
        supervised[:1] = [False]
        return tokens["input_ids"][0], supervised

    def text_and_spans(self, conversation: Conversation, *, first: int = 0) -> tuple[str, list[tuple[int, int]]]:
        """The rendered text, and the characters of it that carry loss: (start, end) of each span, in order.

        With `first`, only the assistant turns from message `first` on count.

        Raises:
            RowProblem: "field missing" or "span not found".
        """
        chat = self._with_system_prompt(conversation)
        num_before = len(
            self._with_system_prompt(replace(conversation, messages=conversation.messages[:first])).messages
        )
        text = self._template.text(chat)
        turns = [turn for turn, message in enumerate(chat.messages) if message["role"] == "assistant"]
        spans = self._template.marks(chat)
        if spans is None:
            spans = [self._span(chat, turn, text) for turn in turns if turn >= num_before]
        elif any(turn < num_before for turn in turns):
            before = self._prefix(chat, num_before, text)
            if before is None:
                raise RowProblem("span not found", "the template renders the prompt otherwise once a reply follows")
            spans = [span for span in spans if span[0] >= len(before)]
        if not spans:
            raise RowProblem("span not found", "the template's {% generation %} marks enclose nothing here")
        return text, spans

    def text(self, conversation: Conversation, *, generation_prompt: bool = False) -> str:
        """The rendered text; with `generation_prompt`, up to where the next reply starts.

        Raises:
            RowProblem: "field missing".
        """
        return self._template.text(self._with_system_prompt(conversation), generation_prompt=generation_prompt)

    def _learn_turns(self) -> None:
        """Asks the template how it opens a turn and how it closes one."""
        question, reply = Conversation(messages=[_turn("user", "Hello")]), _turn("assistant", _SENTINEL)
        asked = self._template.try_text(question)
        prompted = self._template.try_text(question, generation_prompt=True)
        self._has_generation_prompt = asked is None or asked != prompted

        answered = self._template.try_text(Conversation(messages=[*question.messages, reply]))
        _, shown, tail = (answered or "").partition(_SENTINEL)
        if answered is not None and not shown:
            raise ModelError(
                "the chat template leaves out an assistant's text (some for images do); "
                "name another: --chat-template tulu|chatml|FILE"
            )
        added = self.tokenizer.added_tokens_decoder.values()
        special = _pattern_of(token.content for token in added if token.special)
        match = re.match(rf"\s*{special}+", tail)
        closing = match.group() if match else tail.rstrip()
        self._after_closing = tail[len(closing) :]
        # In the middle of a chat some templates close a turn with another special token than at its end.
        another = rf"\s*{special}"
        patterns = [re.escape(closing), another] if closing else [] if shown else [another]
        self._closing = re.compile("|".join(patterns))

    def _learn_system_prompt(self) -> None:
        """Asks the template whether it has a system prompt of its own, and whether it shows ours."""
        user, reply = _turn("user", "Hello"), _turn("assistant", "Hello")
        default = self._template.try_text(Conversation(messages=[user, reply]))
        silenced = self._template.try_text(Conversation(messages=[_turn("system", ""), user, reply]))
        self._has_default_system_prompt = bool(default and silenced and len(silenced) < len(default))
        if self._system_prompt not in ("keep", "none"):
            wanted = _turn("system", self._system_prompt)
            shown = self._template.try_text(Conversation(messages=[wanted, user, reply])) or ""
            if self._system_prompt.strip() not in shown:
                raise SettingError(
                    f"the chat template shows no system prompt, got --system-prompt {self._system_prompt!r}; "
                    "use keep or none"
                )

    def _with_system_prompt(self, chat: Conversation) -> Conversation:
        if self._system_prompt == "keep":
            return chat
        messages = [message for message in chat.messages if message["role"] not in ("system", "developer")]
        if self._system_prompt != "none":
            messages = [_turn("system", self._system_prompt), *messages]
        elif self._has_default_system_prompt:
            messages = [_turn("system", ""), *messages]
        return replace(chat, messages=messages)

    def _span(self, chat: Conversation, turn: int, text: str) -> tuple[int, int]:
        """The characters of one assistant turn: each end by its prefix, or by the sentinel if that fails."""
        before = None
        if self._has_generation_prompt:
            before = self._prefix(chat, turn, text, generation_prompt=True)
        whole = text if turn + 1 == len(chat.messages) else self._prefix(chat, turn + 1, text)
        if before is None or whole is None:
            start, end = self._content(chat, turn, text)
        if before is not None:
            start = len(before)
        if whole is not None:
            end = len(whole.removesuffix(self._after_closing).rstrip())
        elif closing := self._closing.match(text, end):
            end = closing.end()
        else:
            raise RowProblem("span not found", f"no end-of-turn token follows turn {turn + 1} (assistant)")
        if start >= end or self._closing.fullmatch(text, start, end):
            raise RowProblem("span not found", f"the template renders turn {turn + 1} (assistant) as nothing")
        return start, end

    def _prefix(
        self, chat: Conversation, num_messages: int, text: str, *, generation_prompt: bool = False
    ) -> str | None:
        """The first messages alone, rendered, if `text` begins so."""
        beginning = replace(chat, messages=chat.messages[:num_messages])
        prefix = self._template.try_text(beginning, generation_prompt=generation_prompt)
        return prefix if prefix is not None and text.startswith(prefix) else None

    def _content(self, chat: Conversation, turn: int, text: str) -> tuple[int, int]:
        """The characters whose place a sentinel takes: the turn's reasoning, content and tool calls."""
        messages = [*chat.messages[:turn], _turn("assistant", _SENTINEL), *chat.messages[turn + 1 :]]
        probe = self._template.try_text(replace(chat, messages=messages)) or ""
        before, found, after = probe.partition(_SENTINEL)
        end = len(text) - len(after)
        unique = found and _SENTINEL not in after
        if not unique or end < len(before) or not text.startswith(before) or not text.endswith(after):
            raise RowProblem("span not found", f"the template hides where turn {turn + 1} (assistant) is")
        return len(before), end


def tokens_of(tokenizer: PreTrainedTokenizerBase, texts: list[str], **options: Any) -> Any:
    """The `input_ids` of each text, and whatever the tokenizer's `options` ask for beside them.

    Raises:
        RowProblem: "not JSON": half a surrogate pair is no Unicode, and no tokenizer takes it.
    """
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise RowProblem("not JSON", f"the text holds half a surrogate pair: {error}") from None
    return tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, verbose=False, **options)


def vocabulary_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of the tokens and their ids."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text of each token where it stands: some tokenizers write no space before the first token of a text."""
    texts = []
    for at in range(len(ids)):
        before = tokenizer.decode(ids[at - 1 : at]) if at else ""
        texts.append(tokenizer.decode(ids[max(at - 1, 0) : at + 1]).removeprefix(before))
    return texts


def _turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _pattern_of(tokens: Iterable[str]) -> str:
    """One of `tokens`, the longest that fits."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return f"(?:{'|'.join(map(re.escape, longest_first)) or '(?!)'})"


def _overlapping(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Whether each token's characters overlap one of the spans."""
    inside = bytearray(max(end for _, end in spans))
    for start, end in spans:
        inside[start:end] = b"\1" * (end - start)
    marks, previous_end = [], 0
    for start, end in offsets:
        if start == end:  # white space that the tokenizer has trimmed from its offsets
            start = min(start, previous_end)
        if start < end:
            marks.append(inside.find(1, start, end) >= 0)
        else:  # a token without characters, such as a word mark: it belongs to what surrounds it
            marks.append(inside[start - 1 : start + 1] == b"\1\1")
        previous_end = end
    return marks
