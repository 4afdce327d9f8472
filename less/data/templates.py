"""A chat template as a function from a conversation to text, the same text every day.

Transformers renders; this module picks the template, fixes the date that it is told, and turns whatever it
raises into the problem of one row. What the text means, token by token, is left to `rendering`.
"""

import datetime
import hashlib
import inspect
import json
import re
from pathlib import Path

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from datastore.errors import ModelError, SettingError
from less.data.conversations import Conversation, RowProblem

__all__ = ["BUILTIN_TEMPLATES", "ChatTemplate"]

BUILTIN_TEMPLATES = {
    "tulu": (
        "{% for message in messages %}"
        "{% if message['role'] not in ('system', 'user', 'assistant') %}"
        "{{ raise_exception('the tulu template has no role ' + message['role']) }}"
        "{% endif %}"
        "{{ '<|' + message['role'] + '|>\n' + message['content'] | trim }}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
        "{{ '\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}
"""For models without one. `tulu` is the format that LESS used; it closes a turn with the eos token."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TAKEN = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {"documents"}


class ChatTemplate:
    """The chat template of a tokenizer, or another in its place.

    Args:
        tokenizer: gives the special tokens, and the template where no other is named.
        name: "tulu", "chatml" or the path of a Jinja file; None: the tokenizer's own.
        date: the day that a template is told when it asks for today's date, ISO format.

    Raises:
        ModelError: there is no template, it is not valid Jinja, or it needs a token that the tokenizer lacks.
        SettingError: `name` cannot be read, or `date` is not a date.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str | None, date: str) -> None:
        self._tokenizer = tokenizer
        self._named = None if name is None else _read(name, tokenizer)
        source = self._named or tokenizer.chat_template or {}
        sources = [source] if isinstance(source, str) else [source[key] for key in sorted(source)]
        if not sources:
            raise ModelError(
                "the tokenizer has no chat template; name the one that the model was trained with: "
                "--chat-template tulu|chatml|FILE"
            )
        self._dated = {source: _compiled(source, date) for source in sources}
        self.date = date if any("strftime_now" in source for source in sources) else None
        self.sha256 = hashlib.sha256(json.dumps(sources).encode()).hexdigest()

    def text(self, chat: Conversation, *, generation_prompt: bool = False) -> str:
        """The whole conversation as text; with `generation_prompt`, up to where the next reply starts.

        Raises:
            RowProblem: "field missing", for whatever reason the template does not take the conversation.
        """
        if taken := sorted(_TAKEN & chat.chat_template_kwargs.keys()):
            raise RowProblem("field missing", f"chat_template_kwargs may not set {', '.join(taken)}")
        try:
            return self._tokenizer.apply_chat_template(
                chat.messages,
                tools=chat.tools,
                chat_template=self._source(chat),
                add_generation_prompt=generation_prompt,
                tokenize=False,
                **chat.chat_template_kwargs,
            )
        except Exception as error:  # a template is foreign code: it may raise anything
            raise RowProblem("field missing", f"the chat template refuses the row: {error}") from None

    def try_text(self, chat: Conversation, *, generation_prompt: bool = False) -> str | None:
        """As `text`, or None where the template does not take the conversation."""
        try:
            return self.text(chat, generation_prompt=generation_prompt)
        except RowProblem:
            return None

    def marks(self, chat: Conversation) -> list[tuple[int, int]] | None:
        """The characters of `text(chat)` between `{% generation %}` marks; None if the template has none."""
        source = self._source(chat)
        if not _GENERATION.search(source):
            return None
        _, (spans,) = render_jinja_template(
            conversations=[chat.messages],
            tools=chat.tools,
            chat_template=source,
            return_assistant_tokens_mask=True,
            **{**self._tokenizer.special_tokens_map, **chat.chat_template_kwargs},
        )
        return [(start, end) for start, end in spans if start < end]

    def _source(self, chat: Conversation) -> str:
        return self._dated[self._tokenizer.get_chat_template(self._named, chat.tools)]


def _read(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    if name == "tulu" and not tokenizer.eos_token:
        raise ModelError("the tulu template closes a turn with the eos token, and the tokenizer has none; use chatml")
    if name in BUILTIN_TEMPLATES:
        return BUILTIN_TEMPLATES[name]
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(
            f"cannot read the chat template {name!r}: {error}; expected tulu, chatml or a Jinja file"
        ) from error


def _compiled(source: str, date: str) -> str:
    """`source` with its date fixed, once it is known to compile."""
    try:
        render_jinja_template(conversations=[[]], chat_template=source)
    except jinja2.TemplateSyntaxError as error:
        raise ModelError(f"the chat template is not valid Jinja: {error} (line {error.lineno})") from error
    except Exception:  # it compiles, but does not take a chat without messages
        pass
    return _with_date(source, date) if "strftime_now" in source else source


def _with_date(source: str, date: str) -> str:
    """`source` after a macro `strftime_now` that knows one day.

    Transformers hands no functions to a template, so the answers are written into it: one for each of its
    string literals that could be a date format.
    """
    try:
        day = datetime.datetime.fromisoformat(date)
    except ValueError as error:
        raise SettingError(f"template date must be an ISO date like 2025-01-01, got {date!r}") from error
    literals = {token.value for token in jinja2.Environment().lexer.tokenize(source) if token.type == "string"}
    answers = json.dumps({literal: day.strftime(literal) for literal in sorted(literals) if "%" in literal})
    macro = (
        f"{{% macro strftime_now(format) %}}{{% set answers = {answers} %}}"
        "{{ answers[format] if format in answers else raise_exception('unforeseen date format ' + format) }}"
        "{% endmacro %}\n"  # Jinja drops this line end, so the template still begins a line
    )
    return macro + source
