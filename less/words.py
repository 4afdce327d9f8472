"""The words of a text: letters and digits in one Unicode form, without case; no stemming and no stop words.

What `bm25` matches and what near-duplicates are told by. A text without spaces between its words is one word.
"""

import re
import unicodedata

__all__ = ["words_of"]

_WORD = re.compile(r"[^\W_]+")


def words_of(text: str) -> list[str]:
    """Its words, in order."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
