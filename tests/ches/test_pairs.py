"""Every layout of a preference pair, and what cannot be one. TRL's own function is the oracle for implicit prompts."""

import copy
import itertools
import json

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ches.pairs import pair_of
from less.data import RowProblem

ASK, ALSO = {"role": "user", "content": "Which colour?"}, {"role": "user", "content": "Sure?"}
BE_BRIEF = {"role": "system", "content": "Be brief."}
RED, BLUE = {"role": "assistant", "content": "Red."}, {"role": "assistant", "content": "Blue."}
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {}}}]}
SEEN = {"role": "tool", "content": "rose"}
HUMAN, GPT = {"from": "human", "value": "Which colour?"}, {"from": "gpt", "value": "Red."}


def three(pair):
    return pair.prompt, pair.chosen, pair.rejected


def said(content):
    return {"role": "assistant", "content": content}


def explicit(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def hh(*turns):
    """A transcript, the human first."""
    return "".join(f"\n\n{('Human', 'Assistant')[n % 2]}: {text}" for n, text in enumerate(turns))


EXPLICIT = {
    "messages": explicit([ASK], [RED], [BLUE]),
    "several turns": explicit([BE_BRIEF, ASK, RED, ALSO], [RED], [BLUE]),
    "tool calls": explicit([ASK], [CALL, SEEN, RED], [BLUE]),
    "a prompt that ends with the assistant": explicit([ASK, RED], [BLUE], [RED]),
    "a field that ShareGPT knows, beside a role": explicit([ASK | {"from": "quiz"}], [RED], [BLUE]),
    "a question asked again in one reply only": explicit([ASK], [ASK, RED], [BLUE]),
    "text": explicit("The sky is", " blue", " red"),
    "text without a prompt": explicit("", "blue", "red"),
    "text that ends a transcript": explicit("\n\nHuman: Which?\n\nAssistant:", " Red.", " Blue."),
    "a transcript as part of the question": explicit(
        "Rate it.", "\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: c"
    ),
}


@pytest.mark.parametrize("layout", EXPLICIT)
def test_an_explicit_prompt_is_taken_as_it_stands(layout):
    row = EXPLICIT[layout]
    before = copy.deepcopy(row)
    pair = pair_of(row)
    assert three(pair) == tuple(before.values())
    assert not pair.rewritten
    assert pair.conversational == isinstance(row["prompt"], list)
    assert row == before


def test_an_implicit_prompt_is_what_both_conversations_begin_with():
    pair = pair_of({"chosen": [BE_BRIEF, ASK, RED, ALSO, RED], "rejected": [BE_BRIEF, ASK, RED, ALSO, BLUE]})
    assert three(pair) == ([BE_BRIEF, ASK, RED, ALSO], [RED], [BLUE])
    assert not pair.rewritten


def test_a_conversation_that_goes_on_keeps_the_last_shared_turn_in_both_replies():
    pair = pair_of({"chosen": [ASK, RED], "rejected": [ASK, RED, ALSO, BLUE]})
    assert three(pair) == ([ASK], [RED], [RED, ALSO, BLUE])


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("The sky is blue.", "The sky is red.", ("The sky is", " blue.", " red.")),
        ("The sky is blue.", "The sky is blunt.", ("The sky is blu", "e.", "nt.")),
        ("Yes", "Yes, of course", ("Ye", "s", "s, of course")),
        ("blue", "red", ("", "blue", "red")),
        ("x", "xy", ("", "x", "xy")),
    ],
)
def test_an_implicit_text_prompt_ends_where_trl_ends_it(chosen, rejected, expected):
    pair = pair_of({"chosen": chosen, "rejected": rejected})
    assert three(pair) == expected
    assert not pair.rewritten


@pytest.mark.parametrize(
    "texts",
    [
        ("\n\nAssistant: a\n\nHuman: b", "\n\nAssistant: a\n\nHuman: c"),
        ("\n\nHuman: a b", "\n\nHuman: a c"),
        ("Note.\n\nHuman: a\n\nAssistant: b", "Note.\n\nHuman: a\n\nAssistant: c"),
        ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a or b"),
        ("Human: a\nAssistant: b", "Human: a\nAssistant: c"),
    ],
)
def test_texts_of_which_not_both_are_transcripts_stay_texts(texts):
    pair = pair_of({"chosen": texts[0], "rejected": texts[1]})
    assert (pair.prompt + pair.chosen, pair.prompt + pair.rejected) == texts
    assert not pair.rewritten


def test_transcripts_of_which_not_both_hold_the_prompt_are_the_rest_of_it():
    row = explicit("Rate it.", hh("Rate it.", "a"), hh("Mark it.", "b"))
    for chosen, rejected in itertools.permutations((row["chosen"], row["rejected"])):
        assert three(pair_of(explicit("Rate it.", chosen, rejected))) == ("Rate it.", chosen, rejected)


@pytest.fixture(scope="module")
def extract_prompt():
    return pytest.importorskip("trl.data_utils").extract_prompt


@given(chosen=st.text("ab ", max_size=6), rejected=st.text("ab ", max_size=6))
def test_texts_without_a_prompt_are_split_as_trl_splits_them(extract_prompt, chosen, rejected):
    assume(chosen.strip() and rejected.strip() and chosen != rejected)
    split = extract_prompt({"chosen": chosen, "rejected": rejected})
    if split["chosen"].strip() and split["rejected"].strip():
        pair = pair_of({"chosen": chosen, "rejected": rejected})
        assert explicit(*three(pair)) == split
        assert not pair.rewritten
    else:
        with pytest.raises(RowProblem, match="empty reply"):
            pair_of({"chosen": chosen, "rejected": rejected})


TURNS = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": st.sampled_from("ab")})


@given(chosen=st.lists(TURNS, min_size=1, max_size=4), rejected=st.lists(TURNS, min_size=1, max_size=4))
def test_conversations_without_a_prompt_are_split_as_trl_splits_them(extract_prompt, chosen, rejected):
    assume(chosen != rejected)
    split = extract_prompt({"chosen": chosen, "rejected": rejected})
    problem = "" if split["prompt"] else "no common prompt"
    if not all("assistant" in [turn["role"] for turn in split[name]] for name in ("chosen", "rejected")):
        problem = "no assistant turn"
    if problem:
        with pytest.raises(RowProblem, match=problem):
            pair_of({"chosen": chosen, "rejected": rejected})
    else:
        pair = pair_of({"chosen": chosen, "rejected": rejected})
        assert explicit(*three(pair)) == split
        assert not pair.rewritten


REWRITTEN = {
    "UltraFeedback: a text beside conversations": (
        explicit("Which colour?", [ASK, RED], [ASK, BLUE]),
        ([ASK], [RED], [BLUE]),
    ),
    "a text that is not in the conversations": (
        explicit("About colours", [BE_BRIEF, ASK, RED], [BE_BRIEF, ASK, BLUE]),
        ([BE_BRIEF, ASK], [RED], [BLUE]),
    ),
    "messages beside conversations that hold them again": (
        explicit([ASK], [ASK, CALL, SEEN, RED], [ASK, CALL, SEEN, BLUE]),
        ([ASK], [CALL, SEEN, RED], [CALL, SEEN, BLUE]),
    ),
    "a text beside messages that answer it": (explicit("Which colour?", [RED], [BLUE]), ([ASK], [RED], [BLUE])),
    "messages beside texts that answer them": (explicit([ASK], "Red.", "Blue."), ([ASK], [RED], [BLUE])),
    "an empty list as the prompt": (explicit([], [ASK, RED], [ASK, BLUE]), ([ASK], [RED], [BLUE])),
    "a null as the prompt of texts": (explicit(None, "a b", "a c"), ("a", " b", " c")),
    "a null as the prompt of conversations": (explicit(None, [ASK, RED], [ASK, BLUE]), ([ASK], [RED], [BLUE])),
    "ShareGPT": (
        {"chosen": [HUMAN, GPT], "rejected": [ASK, BLUE]},
        ([ASK], [RED], [BLUE]),
    ),
    "text parts": (
        explicit([ASK], [said([{"type": "text", "text": "Red."}])], [BLUE]),
        ([ASK], [RED], [BLUE]),
    ),
    "Anthropic": (
        {
            "chosen": "\n\nHuman: Which colour?\n\nAssistant: Red.\n\nHuman: Sure?\n\nAssistant: Red.\n",
            "rejected": "\n\nHuman: Which colour?\n\nAssistant: Red.\n\nHuman: Sure? \n\nAssistant:  Blue.",
        },
        ([ASK, RED, ALSO], [RED], [BLUE]),
    ),
    "Anthropic, beside its prompt": (
        explicit(
            "\n\nHuman: Which colour?\n\nAssistant:",
            "\n\nHuman: Which colour?\n\nAssistant: Red.",
            "\n\nHuman: Which colour?\n\nAssistant: Blue.",
        ),
        ([ASK], [RED], [BLUE]),
    ),
    "Anthropic, beside the question": (
        explicit("Red or?", "Human: Red or?\n\nAssistant: Red.", "Human: Red or?\n\nAssistant: Blue."),
        ([{"role": "user", "content": "Red or?"}], [RED], [BLUE]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", REWRITTEN)
def test_a_layout_that_trl_would_misread_is_rewritten(layout):
    row, expected = REWRITTEN[layout]
    pair = pair_of(row)
    assert three(pair) == expected
    assert pair.rewritten
    again = pair_of(explicit(*three(pair)))
    assert three(again) == expected
    assert not again.rewritten


SAID = st.lists(
    st.sampled_from(["red", " ", "\n", "\n\n", "Human", "Human:", "\n\nHumans: ", "Assistant:", "é🙂"]), min_size=1
).map(lambda parts: "".join(parts).strip())
SAID = SAID.filter(lambda text: text and "\n\nHuman:" not in text and "\n\nAssistant:" not in text)


@given(st.lists(st.tuples(SAID, SAID), max_size=2), SAID, SAID, SAID)
def test_a_transcript_gives_back_the_turns_that_it_was_made_of(earlier, question, red, blue):
    messages = [ASK | {"content": question}]
    for asked, said in earlier:
        messages += [RED | {"content": said}, ASK | {"content": asked}]
    prompt = "".join(f"\n\n{'Human' if m['role'] == 'user' else 'Assistant'}: {m['content']}" for m in messages)
    row = {"chosen": f"{prompt}\n\nAssistant: {red}", "rejected": f"{prompt}\n\nAssistant: {blue}"}
    if red == blue:
        with pytest.raises(RowProblem, match="same replies"):
            pair_of(row)
    else:
        assert three(pair_of(row)) == (messages, [RED | {"content": red}], [RED | {"content": blue}])


def test_nulls_count_as_missing_and_do_not_make_a_row_other_than_trl_reads_it():
    padded = [message | {"tool_calls": None, "name": None} for message in (ASK, RED, BLUE)]
    pair = pair_of({**explicit(*[[message] for message in padded]), "tools": None, "chat_template_kwargs": None})
    assert three(pair) == ([ASK], [RED], [BLUE])
    assert (pair.tools, pair.chat_template_kwargs, pair.rewritten) == (None, {}, False)


@pytest.mark.parametrize("tools", [[], [{"name": "look"}]])
def test_tools_and_variables_go_with_conversations_and_an_empty_list_stays_one(tools):
    for given_as in (tools, json.dumps(tools)):
        row = {**explicit([ASK], [RED], [BLUE]), "tools": given_as, "chat_template_kwargs": {"think": False, "x": None}}
        pair = pair_of(row)
        assert pair.tools == tools
        assert pair.chat_template_kwargs == {"think": False}
        assert not pair.rewritten
    assert pair_of({**explicit("a", "b", "c"), "tools": tools}).tools is None


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        ({}, "field missing", "chosen is missing"),
        ({"prompt": "a", "chosen": "b"}, "field missing", "rejected is missing"),
        ({"chosen": "b", "rejected": None}, "field missing", "rejected is missing"),
        ({"chosen": 5, "rejected": "b"}, "field missing", "chosen is 5"),
        (explicit({"role": "user"}, "b", "c"), "field missing", "prompt is {'role': 'user'}"),
        (explicit("a", [RED], "Blue."), "field missing", "two of a kind"),
        (explicit([ASK], [RED], ["Blue."]), "no messages", "rejected: turn 1 is 'Blue.'"),
        (explicit(["Which?"], [RED], [BLUE]), "no messages", "prompt: turn 1"),
        (explicit([ASK], [RED | {"role": "oracle"}], [BLUE]), "unknown role", "chosen: turn 1 has the role"),
        (explicit([{"role": "user", "content": " "}], [RED], [BLUE]), "empty turn", "prompt: turn 1 (user)"),
        (explicit([ASK], [said(""), SEEN, RED], [BLUE]), "empty turn", "chosen: turn 1"),
        (explicit([ASK], [said([{"type": "image"}])], [BLUE]), "field missing", "'image'"),
        ({**explicit([ASK], [RED], [BLUE]), "tools": "{"}, "field missing", "tools is a string, but not JSON"),
        ({**explicit([ASK], [RED], [BLUE]), "chat_template_kwargs": 5}, "field missing", "expected an object"),
        (explicit([ASK], [], [BLUE]), "empty reply", "nothing is said in chosen"),
        (explicit([ASK], [RED], [said(" \n")]), "empty reply", "rejected: turn 1 (assistant)"),
        (explicit([ASK], [RED], [said(None)]), "empty reply", "rejected: turn 1 (assistant)"),
        (explicit([ASK], "Red.", ""), "empty reply", "rejected"),
        (explicit([ASK], [ASK], [ASK, RED]), "empty reply", "chosen"),
        (explicit("a", " \n", "b"), "empty reply", "chosen"),
        ({"chosen": "", "rejected": "b"}, "empty reply", "chosen"),
        ({"chosen": "a ", "rejected": "b"}, "empty reply", "chosen"),  # TRL's slip leaves " "
        ({"chosen": hh("a", "b"), "rejected": hh("a", " ")}, "empty reply", "rejected: turn 1"),
        (explicit([ASK], [RED], [RED]), "same replies", ""),
        (explicit("a", "b", "b"), "same replies", ""),
        ({"chosen": [ASK, RED], "rejected": [ASK, RED | {"name": None}]}, "same replies", ""),
        ({"chosen": hh("a", "b"), "rejected": hh("a", "b\n")}, "same replies", ""),
        (explicit([ASK], [ALSO], [BLUE]), "no assistant turn", "the chosen reply has the roles user"),
        ({"chosen": [ASK], "rejected": [ASK, BLUE]}, "no assistant turn", "the chosen reply has the roles user"),
        ({"chosen": [ASK, RED], "rejected": [ALSO, RED]}, "no common prompt", "begin with different turns"),
        (explicit("Which?", [RED], [ASK, BLUE]), "no common prompt", "begin with different turns"),
        ({"chosen": hh("a", "b"), "rejected": hh("c", "d")}, "no common prompt", "has the roles user, assistant"),
        (
            {"chosen": hh("a", "b", "c", "d"), "rejected": hh("a", "x", "c", "e")},
            "no common prompt",
            "chosen has the roles assistant, user, assistant",
        ),
        ({"chosen": hh("a", "b", "c"), "rejected": hh("a", "b", "d")}, "no common prompt", "chosen has the roles user"),
    ],
)  # fmt: skip
def test_a_row_without_a_usable_pair_has_its_reason(row, reason, detail):
    with pytest.raises(RowProblem) as caught:
        pair_of(row)
    assert caught.value.reason == reason
    assert detail in caught.value.detail
