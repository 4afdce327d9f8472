"""Texts and numbers as a report shows them: cut, made visible, with sensible digits; and the page's template."""

import math
import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup, escape
from numpy.typing import NDArray

from less.data.sources import json_of

__all__ = [
    "CHARS_SHOWN",
    "beginning",
    "count_of",
    "cut",
    "decimal",
    "digits_of",
    "in_brackets",
    "listed",
    "pictured",
    "quoted_as_code",
    "report_template",
    "signed",
    "turns_shown",
]

CHARS_SHOWN = 4000
"""Of a text."""
_CHARS_OF_THE_END = 1000
_CHARS_OF_A_HEAD = 40  # of a turn


def beginning(text: str, width: int) -> str:
    """As one line; the page cuts it where its own width ends."""
    flat = " ".join(text[: 4 * width].split())
    return flat if len(flat) <= width else f"{flat[:width]}…"


def cut(text: str) -> str:
    """A text, without its middle if it is too long for the page."""
    left_out = len(text) - CHARS_SHOWN
    if left_out <= 0:
        return text
    head, tail = text[: CHARS_SHOWN - _CHARS_OF_THE_END], text[-_CHARS_OF_THE_END:]
    return f"{head}\n[… {left_out:,} characters left out …]\n{tail}"


_UNUSUAL = re.compile(r"[^\x20-\x7e\n\t]")
_JOINERS = "\u200c\u200d"  # Persian and emoji need them


def pictured(value: Any) -> Any:
    """Text with a picture or a number for each character that has no shape of its own or turns others around."""
    return value if isinstance(value, Markup) or not isinstance(value, str) else _UNUSUAL.sub(_picture, value)


def _picture(match: re.Match[str]) -> str:
    character = match[0]
    code, category = ord(character), unicodedata.category(character)
    if (category[0] == "C" and character not in _JOINERS) or category in ("Zl", "Zp"):
        return chr(0x2400 + code) if code < 0x20 else f"⟨U+{code:04X}⟩"
    return character


def quoted_as_code(sentence: str) -> Markup:
    """`name` → <code>name</code>."""
    parts = [escape(pictured(part)) for part in sentence.split("`")]
    return Markup("").join(Markup("<code>{}</code>").format(part) if n % 2 else part for n, part in enumerate(parts))


def digits_of(values: NDArray[np.float64]) -> int | None:
    """Decimals that show four digits of the larger values, none of counts; None where that asks for powers of ten."""
    if np.all(values == np.round(values)) and np.all(np.abs(values) < 1e9):
        return 0
    exponent = math.floor(math.log10(float(np.quantile(np.abs(values), 0.75)) or 1.0))
    return min(max(3 - exponent, 0), 6) if -4 < exponent < 9 else None


def decimal(value: float, digits: int | None, *, sign: bool = False) -> str:
    """A number for people: `−12,345`, `0.125`, `1.250e−07`; `–` for NaN."""
    if math.isnan(value):
        return "–"
    style = ".3e" if digits is None else f",.{digits}f"
    return f"{value:{'+' if sign else ''}z{style}}".replace("-", "−")


def signed(rho: float) -> str:
    """A correlation, to two digits."""
    return decimal(rho, 2)


def in_brackets(rho: float) -> str:
    """`(Spearman 0.95)`."""
    return f"(Spearman {signed(rho)})"


def count_of(number: int, what: str) -> str:
    """`1 pair`, `1,024 pairs`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def listed(names: Sequence[str], last: str = "and") -> str:
    """`a, b and c`."""
    return f" {last} ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def turns_shown(said: list[dict[str, Any]] | str) -> list[tuple[str, str]]:
    """(role, text) of each turn, of many only the last; a text without turns has the role "".

    What a turn holds beside its text, such as a tool call, is shown as JSON.
    """
    if isinstance(said, str):
        return [("", cut(said))]
    turns: list[tuple[str, str]] = []
    room = CHARS_SHOWN
    for number, turn in reversed(list(enumerate(said))):
        content = turn.get("content")
        others = {name: value for name, value in turn.items() if name not in ("role", "content") and value is not None}
        parts = [content if isinstance(content, str) else "" if content is None else json_of(content)]
        parts += [json_of(others)] if others else []
        text = cut("\n".join(part for part in parts if part))
        room -= len(text) + _CHARS_OF_A_HEAD
        if room < 0 and turns:
            return [("", f"[… {count_of(number + 1, 'earlier turn')} left out …]"), *turns]
        turns.insert(0, (str(turn.get("role", "")), text))
    return turns


@cache
def report_template(name: str) -> Template:
    """A page's template: every value in it is escaped and made visible."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=pictured,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["quoted_as_code"] = quoted_as_code
    return environment.get_template(name)
