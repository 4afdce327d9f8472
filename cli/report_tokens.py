"""The replies of one pair token by token: what each adds to the pair's score.

Contributions that do not sum to the score are not shown. Which pairs are shown is left to `pair_report`.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cli.report_text import CHARS_SHOWN, beginning, count_of, decimal, digits_of

__all__ = ["TokenView", "token_view"]

_TOKENS_SHOWN = 400  # of a reply, if they have no more characters than a text
_STRONGEST_SHOWN = 5
_TINTS = 5  # of a token, either way
_STRAY = 1e-6  # of the contributions' absolute sum: how far rounding may take their sum from the score


@dataclass(frozen=True, kw_only=True)
class TokenView:
    """The two replies token by token, each token with what it contributes to the score."""

    replies: dict[str, list[tuple[str, str, str]]]
    """For chosen and rejected: (text, contribution, tint) of each token that is shown."""
    rest: dict[str, str]
    """For each reply how many tokens are not shown, and the sum of their contributions; "" if all are."""
    sums: dict[str, str]
    """The sum of each reply."""
    total: str
    """The sum of both: the score."""
    strongest: dict[str, list[tuple[str, str]]]
    """For each reply the tokens that contribute most, either way, with what they contribute."""


def token_view(attribution: dict[str, Any], main: str, score: float, digits: int | None) -> TokenView | str:
    """The tokens of a pair; or why they cannot be shown, in a sentence."""
    try:
        tokens = {side: [str(token) for token in attribution[side]["tokens"]] for side in ("chosen", "rejected")}
        parts = {side: _contributions(attribution, side, main) for side in tokens}
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return f"The manifest has no contributions to {main} for this pair."
    everything = np.concatenate(list(parts.values()))
    total = float(everything.sum())
    if any(len(tokens[side]) != len(parts[side]) or not len(tokens[side]) for side in tokens) or not (
        abs(total - score) <= _STRAY * np.abs(everything).sum()
    ):
        return f"The contributions in the manifest do not sum to this pair’s {main}, so they are not shown."
    scale, fine = float(np.quantile(np.abs(everything), 0.95)) or 1.0, digits_of(everything)
    replies, rest, strongest = {}, {}, {}
    for side, parts_T in parts.items():
        texts = [_token(token) for token in tokens[side]]
        num_shown = min(_TOKENS_SHOWN, int(np.searchsorted(np.cumsum([len(text) for text in texts]), CHARS_SHOWN)))
        left_out = decimal(float(parts_T[num_shown:].sum()), digits, sign=True)
        rest[side] = f"{count_of(len(texts) - num_shown, 'more token')}: {left_out}" if num_shown < len(texts) else ""
        shown = [(text, decimal(part, fine, sign=True)) for text, part in zip(texts, parts_T.tolist(), strict=True)]
        tints = [_tint(part / scale) for part in parts_T[:num_shown].tolist()]
        replies[side] = [(text, part, tint) for (text, part), tint in zip(shown, tints, strict=False)]
        order = np.argsort(-np.abs(parts_T), kind="stable")[:_STRONGEST_SHOWN].tolist()
        strongest[side] = [(beginning(shown[at][0], 40), shown[at][1]) for at in order]
    return TokenView(
        replies=replies,
        rest=rest,
        strongest=strongest,
        sums={side: decimal(float(parts_T.sum()), digits, sign=True) for side, parts_T in parts.items()},
        total=decimal(total, digits),
    )


def _contributions(attribution: dict[str, Any], side: str, main: str) -> NDArray[np.float64]:
    """What each token of a reply adds to the measure.

    ches is ⟨S⁺, S⁻⟩ - ‖S⁺‖² and ln_ches ⟨S⁺, S⁻⟩/(n⁺n⁻) - ‖S⁺‖²/n⁺²: a token's part of ln_ches is its part of ches
    over n⁺ and its own reply's length.
    """
    if main != "ln_ches":
        return np.array(attribution[side][main], dtype=np.float64)
    num_chosen, num_own = len(attribution["chosen"]["tokens"]), len(attribution[side]["tokens"])
    return np.array(attribution[side]["ches"], dtype=np.float64) / (num_chosen * num_own)


def _token(text: str) -> str:
    """A token's text; a newline gets a sign, so that there is something to tint."""
    return text.replace("\n", "⏎\n")


def _tint(part: float) -> str:
    """A class of the style sheet: `r1` to `r5` raise the score, `f1` to `f5` lower it; none for almost nothing."""
    level = min(_TINTS, math.ceil(abs(part) * _TINTS - 0.25))
    return f"{'r' if part > 0 else 'f'}{level}" if level > 0 else ""
