"""The preference pair that a row holds, whichever of the usual layouts the row has.

    prompt, chosen, rejected    three texts, or three lists of messages                        TRL
    chosen, rejected            two texts, or two conversations; what both begin with is       TRL
                                the prompt
    prompt, chosen, rejected    two conversations, and their prompt once more beside them      UltraFeedback
    prompt, chosen, rejected    a list of messages among texts, or a text among lists
    chosen, rejected            "\\n\\nHuman: ...\\n\\nAssistant: ...", read turn by turn         Anthropic

The first two are read as `DPOTrainer` of TRL 1.16 reads them, to the character. It would misread the others, and
ShareGPT's turns and contents in parts with them: such a pair is `rewritten`. `tools` and `chat_template_kwargs` go
with lists of messages. Nulls count as missing. What the pair is in tokens is left to `tokens`.
"""

import re
import reprlib
from dataclasses import dataclass, field
from typing import Any

from less.data.conversations import RowProblem, message_of, template_arguments, without_nulls

__all__ = ["Pair", "pair_of"]

_TRANSCRIPT_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_TRANSCRIPT_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One preference pair: all three are lists of messages, or all three are text."""

    prompt: list[dict[str, Any]] | str
    """What both replies answer; a text may be empty, a list is not."""
    chosen: list[dict[str, Any]] | str
    """The preferred reply: what is said after `prompt`, by tools and users too if a list goes on so."""
    rejected: list[dict[str, Any]] | str
    """The other reply, never the same."""
    tools: list[Any] | None = None
    """JSON schemas for the chat template. Some templates tell an empty list from None, so it is kept."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables for the chat template."""
    rewritten: bool = False
    """Whether `DPOTrainer` would read the row otherwise, or not at all: for training to see what was scored, these
    three have to replace the row's columns."""

    @property
    def conversational(self) -> bool:
        """Whether a chat template applies."""
        return isinstance(self.prompt, list)


def pair_of(columns: dict[str, Any]) -> Pair:
    """The pair in one row. The row is not changed.

    Raises:
        RowProblem: "empty reply", "same replies", "no common prompt", "no assistant turn", "no messages",
            "unknown role", "empty turn" or "field missing".
    """
    row = without_nulls(columns)
    for name in ("chosen", "rejected"):
        if not isinstance(row.get(name), (str, list)):
            found = reprlib.repr(row[name]) if name in row else "missing"
            raise RowProblem("field missing", f"{name} is {found}, expected text or a list of messages")
    prompt: Any = row.get("prompt")
    chosen, rejected = row["chosen"], row["rejected"]
    if not isinstance(prompt, (str, list, type(None))):
        raise RowProblem("field missing", f"prompt is {reprlib.repr(prompt)}, expected text or a list of messages")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise RowProblem(
            "field missing", "one of chosen and rejected is text, the other a list; expected two of a kind"
        )

    if isinstance(chosen, str):
        transcripts = _transcripts(prompt, chosen, rejected)
        if transcripts is not None:
            prompt, chosen, rejected = transcripts
        elif isinstance(prompt, list):
            chosen, rejected = [_turn("assistant", chosen)], [_turn("assistant", rejected)]
    if isinstance(chosen, str):
        prompt, chosen, rejected = _texts(prompt, chosen, rejected)
    else:
        prompt, chosen, rejected = _messages(prompt, chosen, rejected)
    tools, kwargs = template_arguments(row) if isinstance(prompt, list) else (None, {})
    return Pair(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        tools=tools,
        chat_template_kwargs=kwargs,
        rewritten=(prompt, chosen, rejected) != _as_trl_reads(columns),
    )


def _texts(prompt: str | None, chosen: str, rejected: str) -> tuple[str, str, str]:
    _refuse_empty(chosen=chosen, rejected=rejected)
    _refuse_same(chosen, rejected)
    if prompt is None:
        at = _end_of_prompt(chosen, rejected)
        prompt, chosen, rejected = chosen[:at], chosen[at:], rejected[at:]
        _refuse_empty(chosen=chosen, rejected=rejected)
    return prompt, chosen, rejected


def _messages(prompt: Any, chosen: list[Any], rejected: list[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    _refuse_empty(chosen=chosen, rejected=rejected)
    chosen, rejected = _checked("chosen", chosen), _checked("rejected", rejected)
    _refuse_same(chosen, rejected)
    if isinstance(prompt, str):  # whole conversations hold it once more
        replies_only = chosen[0]["role"] == rejected[0]["role"] == "assistant"
        prompt = [_turn("user", prompt)] if replies_only else None
    if prompt:
        prompt = _checked("prompt", prompt)
        if chosen[: len(prompt)] == prompt == rejected[: len(prompt)]:
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
            _refuse_empty(chosen=chosen, rejected=rejected)
    else:
        at = _end_of_prompt(chosen, rejected)
        prompt, chosen, rejected = chosen[:at], chosen[at:], rejected[at:]
    for name, reply in (("chosen", chosen), ("rejected", rejected)):
        if all(message["role"] != "assistant" for message in reply):
            roles = ", ".join(message["role"] for message in reply)
            raise RowProblem("no assistant turn", f"the {name} reply has the roles {roles}")
    if not prompt:
        raise RowProblem("no common prompt", "chosen and rejected begin with different turns, and there is no prompt")
    return prompt, chosen, rejected


def _transcripts(prompt: Any, chosen: str, rejected: str) -> tuple[list[Any], list[Any], list[Any]] | None:
    """The pair in two transcripts, or None where they are something else, or the rest of `prompt`."""
    if isinstance(prompt, str) and not (prompt.strip() in chosen and prompt.strip() in rejected):
        return None
    first, second = _turns_of(chosen), _turns_of(rejected)
    if first is None or second is None:
        return None
    at = _end_of_prompt(first, second)
    for name, reply in (("chosen", first[at:]), ("rejected", second[at:])):
        if any(turn["role"] != "assistant" for turn in reply):
            roles = ", ".join(turn["role"] for turn in reply)
            detail = f"past the turns that both transcripts share, {name} has the roles {roles}; expected a reply only"
            raise RowProblem("no common prompt", detail)
    return first[:at], first[at:], second[at:]


def _turns_of(text: str) -> list[dict[str, Any]] | None:
    """The turns of a transcript; None unless a human begins it and the assistant speaks."""
    before, *parts = _TRANSCRIPT_TURN.split(text)
    speakers, contents = parts[::2], parts[1::2]
    if before or speakers[:1] != ["Human"] or "Assistant" not in speakers:
        return None
    return [
        _turn(_TRANSCRIPT_ROLES[speaker], content.strip()) for speaker, content in zip(speakers, contents, strict=True)
    ]


def _end_of_prompt(chosen: Any, rejected: Any) -> int:
    """How much of two texts or conversations is their prompt: TRL's `extract_prompt`, its slips included.

    Neither may be empty. Where one is the beginning of the other, the last character or turn of the shorter one
    stays in both replies. A space before the first difference belongs to the replies, and before the very first
    character TRL looks at the last one: the end is then -1, and the chosen reply a mere space.
    """
    at = 0
    for at, (one, other) in enumerate(zip(chosen, rejected, strict=False)):
        if one != other:
            return at - 1 if chosen[at - 1] == " " else at
    return at


def _as_trl_reads(columns: dict[str, Any]) -> tuple[Any, Any, Any]:
    """The row's prompt, chosen and rejected in the eyes of `DPOTrainer`, nulls in messages left out."""
    prompt, chosen, rejected = (_turns_without_nulls(columns.get(name)) for name in ("prompt", "chosen", "rejected"))
    if "prompt" not in columns:
        at = _end_of_prompt(chosen, rejected)
        prompt, chosen, rejected = chosen[:at], chosen[at:], rejected[at:]
    return prompt, chosen, rejected


def _turns_without_nulls(said: Any) -> Any:
    if not isinstance(said, list):
        return said
    return [without_nulls(turn) if isinstance(turn, dict) else turn for turn in said]


def _checked(name: str, turns: list[Any]) -> list[dict[str, Any]]:
    messages = []
    for number, turn in enumerate(turns, start=1):
        try:
            messages.append(message_of(turn, number))
        except RowProblem as problem:
            is_reply = name != "prompt" and number == len(turns)
            reason = "empty reply" if is_reply and problem.reason == "empty turn" else problem.reason
            raise RowProblem(reason, f"{name}: {problem.detail}") from None
    return messages


def _refuse_empty(**replies: str | list[Any]) -> None:
    for name, reply in replies.items():
        if not (reply.strip() if isinstance(reply, str) else reply):
            raise RowProblem("empty reply", f"nothing is said in {name}")


def _refuse_same(chosen: str | list[Any], rejected: str | list[Any]) -> None:
    if chosen == rejected:
        raise RowProblem("same replies", "chosen and rejected are the same")


def _turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}
