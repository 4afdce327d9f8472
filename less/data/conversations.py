"""The chat that a row holds, whichever of the usual layouts the row has.

    messages                        [{"role": "user", "content": ...}, ...]    OpenAI, TRL
    conversations                   [{"from": "human", "value": ...}, ...]     ShareGPT
    prompt, completion              two strings, or two lists of messages      TRL
    instruction, input, output      three strings                              Alpaca

The first layout that is there wins. `tools` and `chat_template_kwargs` beside it go to the chat template, and
`system` beside one of the last three is the system prompt. Nulls count as missing: `datasets` fills gaps with
them.
Whether a template accepts the chat is left to `rendering`.
"""

import json
import reprlib
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "REASONS",
    "ROLES",
    "Conversation",
    "RowProblem",
    "conversation_of",
    "message_of",
    "template_arguments",
    "without_nulls",
]

REASONS: tuple[str, ...] = (
    "not JSON",
    "not an object",
    "no messages",
    "unknown role",
    "empty turn",
    "no assistant turn",
    "field missing",  # a field that the template needs, or any other ground on which it refuses the row
    "span not found",  # an assistant turn cannot be located in the rendered text
    "no supervised token",  # none within the length limit
    "not finite",  # the loss, the gradient or a measure
    "zero norm",
    "empty reply",
    "same replies",
    "no common prompt",  # the two replies of a pair answer different prompts
    "truncated reply",  # a remark on a pair that has its measures all the same
)
"""Every reason for which a row is skipped or remarked on: a closed list, so that counts by reason can be compared."""

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
"""The roles of a turn; whether a template knows them all is its own affair."""

_SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
}


class RowProblem(Exception):
    """Why one row cannot be used: a signal inside the library, for a row to be skipped and reported."""

    def __init__(self, reason: str, detail: str = "") -> None:
        if reason not in REASONS:
            raise ValueError(f"unknown reason {reason!r}; expected one of {REASONS}")
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """A chat, ready for a chat template."""

    messages: list[dict[str, Any]]
    """The turns: known roles, text contents, no nulls, at least one assistant turn."""
    tools: list[Any] | None = None
    """JSON schemas of the tools that the assistant may call."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables for the template, such as `enable_thinking`."""

    @property
    def text(self) -> str:
        """What the turns say, one after the other, but for the system prompt, which whole data sets have in common."""
        said = (turn for turn in self.messages if turn["role"] not in ("system", "developer"))
        return "\n".join(turn.get("content") or "" for turn in said)


def conversation_of(columns: dict[str, Any]) -> Conversation:
    """The conversation in one row. The row is not changed.

    Raises:
        RowProblem: "no messages", "unknown role", "empty turn", "no assistant turn" or "field missing".
    """
    row = without_nulls(columns)
    messages = [message_of(turn, number) for number, turn in enumerate(_turns(row), start=1)]
    if not messages:
        raise RowProblem("no messages", "the list of turns is empty")
    if all(message["role"] != "assistant" for message in messages):
        raise RowProblem("no assistant turn", f"the roles are {', '.join(m['role'] for m in messages)}")
    tools, kwargs = template_arguments(row)
    return Conversation(messages=messages, tools=tools or None, chat_template_kwargs=kwargs)


def template_arguments(row: dict[str, Any]) -> tuple[list[Any] | None, dict[str, Any]]:
    """What a row tells the chat template beside the messages: its `tools` and its `chat_template_kwargs`.

    Raises:
        RowProblem: "field missing".
    """
    kwargs = row.get("chat_template_kwargs", {})
    if not isinstance(kwargs, dict):
        raise RowProblem("field missing", f"chat_template_kwargs is {reprlib.repr(kwargs)}, expected an object")
    return _tools(row.get("tools")), without_nulls(kwargs)


def _turns(row: dict[str, Any]) -> list[Any]:
    if "messages" in row:
        return _list_of_turns(row, "messages")
    system = _said_by("system", row["system"]) if row.get("system") else []
    if "conversations" in row:
        return system + _list_of_turns(row, "conversations")
    if "prompt" in row and "completion" in row:
        return system + _said_by("user", row["prompt"]) + _said_by("assistant", row["completion"])
    if "instruction" in row and "output" in row:
        asked = [part for part in (row["instruction"], row.get("input")) if part]
        not_text = [part for part in asked if not isinstance(part, str)]
        user = not_text[0] if not_text else "\n\n".join(asked)
        return system + _said_by("user", user) + _said_by("assistant", row["output"])
    raise RowProblem(
        "no messages",
        f"found the fields {', '.join(map(str, row)) or 'none'}; expected messages, conversations, "
        "prompt and completion, or instruction and output",
    )


def _list_of_turns(row: dict[str, Any], name: str) -> list[Any]:
    if not isinstance(row[name], list):
        raise RowProblem("no messages", f"{name} is {reprlib.repr(row[name])}, expected a list of turns")
    return row[name]


def _said_by(role: str, said: Any) -> list[Any]:
    return said if isinstance(said, list) else [{"role": role, "content": said}]


def _from_sharegpt(turn: dict[str, Any]) -> dict[str, Any]:
    if "from" not in turn or "role" in turn:
        return turn
    message = {{"from": "role", "value": "content"}.get(name, name): value for name, value in turn.items()}
    if isinstance(message["role"], str):
        message["role"] = _SHAREGPT_ROLES.get(message["role"], message["role"])
    return message


def message_of(turn: Any, number: int) -> dict[str, Any]:
    """One turn, OpenAI's or ShareGPT's, as a message without nulls whose content is text.

    Raises:
        RowProblem: "no messages", "unknown role", "empty turn" or "field missing": it cannot be rendered.
    """
    if not isinstance(turn, dict):
        raise RowProblem("no messages", f"turn {number} is {reprlib.repr(turn)}, expected an object")
    message = _from_sharegpt(without_nulls(turn))
    role = message.get("role")
    if role is None:
        raise RowProblem("field missing", f"turn {number} has no role")
    if role not in ROLES:
        raise RowProblem("unknown role", f"turn {number} has the role {role!r}; expected {', '.join(ROLES)}")
    if "content" in message:
        message["content"] = _text(message["content"], number)
    # An empty system prompt is a choice and an empty tool result is a result; speakers must say something.
    empty = "content" not in message or (role in ("user", "assistant") and not message["content"].strip())
    if empty and not message.get("tool_calls"):
        raise RowProblem("empty turn", f"turn {number} ({role}) has neither content nor tool_calls")
    return message


def _text(content: Any, number: int) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RowProblem("field missing", f"turn {number} has the content {reprlib.repr(content)}, expected text")
    for part in content:
        if not (isinstance(part, dict) and isinstance(part.get("text"), str)):
            found = (
                f"a part of type {part['type']!r}" if isinstance(part, dict) and "type" in part else reprlib.repr(part)
            )
            raise RowProblem("field missing", f"turn {number} has {found} in its content, expected text parts only")
    return "".join(part["text"] for part in content)


def _tools(tools: Any) -> list[Any] | None:
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError) as error:
            raise RowProblem("field missing", f"tools is a string, but not JSON: {error}") from None
    if tools is not None and not isinstance(tools, list):
        raise RowProblem("field missing", f"tools is {reprlib.repr(tools)}, expected a list of JSON schemas")
    return tools


def without_nulls(fields: dict[str, Any]) -> dict[str, Any]:
    """`fields` without those that are null."""
    return {name: value for name, value in fields.items() if value is not None}
