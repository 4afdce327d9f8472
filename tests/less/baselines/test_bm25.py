"""BM25 against its formula, a word at a time, on texts that are hard to get right."""

from math import log

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from less.baselines.bm25 import bm25_scores
from less.words import words_of

K1, B = 1.5, 0.75
AWKWARD = [
    "",
    "red",
    "red red red red red red red red",
    "Red! (green), blue; red-green...",
    "…!? -- \n\t",
    "naïve café 日本語 текст",
    "STRASSE straße Straße",
    "a much longer row of words in which red stands once among a great many that no one asked for",
    "x_1 = 3.14; x_2 = 42",
    "green",
]


def bm25_ref(query: list[str], text: list[str], texts: list[list[str]]) -> float:
    """Σ over the query's words of idf · tf / (tf + k₁ (1 − b + b |z| / mean |z|)).

    idf = ln(1 + (N − df + ½) / (df + ½))
    """
    mean_length = sum(map(len, texts)) / len(texts)
    total = 0.0
    for word in query:
        tf, df = text.count(word), sum(word in other for other in texts)
        if tf:
            idf = log(1 + (len(texts) - df + 0.5) / (df + 0.5))
            total += idf * tf / (tf + K1 * (1 - B + B * len(text) / mean_length))
    return total


def scores_ref(texts, targets, subtask_M, num_subtasks):
    rows = [words_of(text) for text in texts]
    scores_NJ = np.zeros((len(texts), num_subtasks))
    for n, row in enumerate(rows):
        for j in range(num_subtasks):
            own = [words_of(v) for v, subtask in zip(targets, subtask_M, strict=True) if subtask == j]
            scores_NJ[n, j] = sum(bm25_ref(words, row, rows) / len(words) for words in own if words) / len(own)
    return scores_NJ


@pytest.mark.parametrize(
    ("targets", "subtask_M", "num_subtasks"),
    [
        (["red"], [0], 1),
        (["red red green unheard-of"], [0], 1),
        (["", "red", "unheard of"], [0, 0, 0], 1),
        (["straße", "Naïve 日本語", "green, blue and 42"], [1, 0, 1], 2),
        (["!?"], [0], 1),
    ],
)
def test_scores_are_the_formulas_on_awkward_texts(targets, subtask_M, num_subtasks):
    found_NJ = bm25_scores(AWKWARD, targets, subtask_M, num_subtasks)
    assert found_NJ.dtype == np.float32
    np.testing.assert_allclose(found_NJ, scores_ref(AWKWARD, targets, subtask_M, num_subtasks), rtol=1e-5, atol=1e-7)


WORDS = st.lists(st.sampled_from(["a", "b", "c", "dd", "é"]), max_size=6).map(" ".join)


@settings(deadline=None, max_examples=60)
@given(st.lists(WORDS, min_size=1, max_size=8), st.lists(WORDS, min_size=1, max_size=3), st.data())
def test_scores_are_the_formulas_on_any_texts(texts, targets, data):
    subtask_M = [0, *data.draw(st.lists(st.integers(0, 1), min_size=len(targets) - 1, max_size=len(targets) - 1))]
    num_subtasks = max(subtask_M) + 1
    found_NJ = bm25_scores(texts, targets, subtask_M, num_subtasks)
    expected_NJ = scores_ref(texts, targets, subtask_M, num_subtasks) if any(map(words_of, texts)) else 0 * found_NJ
    np.testing.assert_allclose(found_NJ, expected_NJ, rtol=1e-5, atol=1e-7)


@settings(deadline=None, max_examples=60)
@given(st.lists(WORDS, min_size=1, max_size=8), WORDS)
def test_a_row_that_shares_a_word_scores_above_every_row_that_shares_none(texts, target):
    score_N = bm25_scores(texts, [target], [0], 1)[:, 0]
    shares_N = np.array([bool({*words_of(text)} & {*words_of(target)}) for text in texts])
    assert (score_N[shares_N] > 0).all()
    assert (score_N[~shares_N] == 0).all()


def test_a_target_counts_by_its_words_and_not_by_how_many_there_are():
    texts = ["red green", "blue blue", "teal"]
    once = bm25_scores(texts, ["red blue"], [0], 1)
    np.testing.assert_allclose(bm25_scores(texts, ["red blue " * 50], [0], 1), once, rtol=1e-5)
    half = bm25_scores(texts, ["red blue unknown words"], [0], 1)
    np.testing.assert_allclose(half, once / 2, rtol=1e-5)


@pytest.mark.parametrize("texts", [[""], ["", "?!"], ["", "", ""]])
def test_rows_without_any_word_score_nothing(texts):
    assert not bm25_scores(texts, ["red"], [0], 1).any()


@pytest.mark.parametrize(
    ("text", "target"),
    [("Don't PANIC", "panic"), ("STRASSE", "straße"), ("cafe\u0301", "CAFÉ"), ("日本語 3.5", "日本語"), ("x-1", "X 2")],
)
def test_case_punctuation_and_the_way_a_letter_is_written_do_not_count(text, target):
    assert bm25_scores([text, "else"], [target], [0], 1)[0, 0] > 0
