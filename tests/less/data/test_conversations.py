"""Every usual layout gives the same conversation, and every bad row its own reason."""

import pickle

import pytest

from less.data import REASONS, RowProblem, conversation_of

ASKED = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SYSTEM = {"role": "system", "content": "Be kind."}
HI, HELLO = ASKED


@pytest.mark.parametrize(
    "row",
    [
        {"messages": ASKED},
        {"prompt": "Hi", "completion": "Hello"},
        {"prompt": [HI], "completion": [HELLO]},
        {"prompt": [HI], "completion": "Hello"},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"conversations": ASKED},
        {"instruction": "Hi", "output": "Hello"},
        {"instruction": "Hi", "input": "", "output": "Hello"},
        {"messages": [HI | {"name": None}, HELLO | {"tool_calls": None}], "tools": None, "prompt": "other"},
        {"messages": None, "prompt": "Hi", "completion": "Hello", "instruction": None},
        {
            "messages": [
                HI,
                {"role": "assistant", "content": [{"type": "text", "text": "Hel"}, {"text": "lo"}]},
            ]
        },
    ],
)
def test_every_layout_gives_the_same_messages(row):
    before = repr(row)
    conversation = conversation_of(row)
    assert conversation.messages == ASKED
    assert conversation.tools is None
    assert conversation.chat_template_kwargs == {}
    assert repr(row) == before


def test_alpaca_puts_the_input_after_the_instruction():
    row = {"system": "Be kind.", "instruction": "Add.", "input": "1 + 1", "output": "2"}
    assert conversation_of(row).messages == [
        SYSTEM,
        {"role": "user", "content": "Add.\n\n1 + 1"},
        {"role": "assistant", "content": "2"},
    ]


def test_sharegpt_roles_are_the_usual_ones():
    turns = [
        ("system", "a"),
        ("human", "b"),
        ("function_call", "c"),
        ("observation", ""),
        ("gpt", "d"),
        ("tool", "e"),
    ]
    row = {"conversations": [{"from": role, "value": value} for role, value in turns]}
    roles = [message["role"] for message in conversation_of(row).messages]
    assert roles == ["system", "user", "assistant", "tool", "assistant", "tool"]


def test_tools_may_be_json_text_and_variables_lose_their_nulls():
    row = {
        "messages": ASKED,
        "tools": '[{"name": "t"}]',
        "chat_template_kwargs": {"think": False, "style": None},
    }
    conversation = conversation_of(row)
    assert conversation.tools == [{"name": "t"}]
    assert conversation.chat_template_kwargs == {"think": False}


def test_an_assistant_turn_may_be_tool_calls_alone():
    calls = [{"function": {"name": "f", "arguments": {}}}]
    for content in ({"content": None}, {"content": ""}, {}):
        row = {"messages": [HI, {"role": "assistant", "tool_calls": calls, **content}]}
        assert conversation_of(row).messages[1]["tool_calls"] == calls


def test_an_empty_system_prompt_and_an_empty_tool_result_are_no_empty_turns():
    row = {"messages": [{"role": "system", "content": ""}, *ASKED, {"role": "tool", "content": ""}]}
    assert len(conversation_of(row).messages) == 4


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        ({}, "no messages", "found the fields none"),
        ({"text": "Hi", "prompt": "Hi"}, "no messages", "found the fields text, prompt"),
        ({"messages": []}, "no messages", "empty"),
        ({"messages": "Hi"}, "no messages", "'Hi'"),
        ({"messages": ["Hi"]}, "no messages", "turn 1"),
        (
            {"messages": [HI, {"role": "oracle", "content": "x"}]},
            "unknown role",
            "turn 2 has the role 'oracle'",
        ),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "unknown role", "alien"),
        ({"conversations": [{"from": ["gpt"], "value": "x"}]}, "unknown role", "gpt"),
        ({"messages": [{"content": "x"}]}, "field missing", "turn 1 has no role"),
        ({"messages": [HI, {"role": "assistant", "content": " \n"}]}, "empty turn", "turn 2 (assistant)"),
        ({"messages": [{"role": "user", "content": None}, HELLO]}, "empty turn", "turn 1 (user)"),
        ({"messages": [{"role": "system"}, *ASKED]}, "empty turn", "turn 1 (system)"),
        ({"instruction": "Hi", "output": ""}, "empty turn", "turn 2"),
        ({"messages": [HI, SYSTEM]}, "no assistant turn", "user, system"),
        (
            {"messages": [HI, {"role": "assistant", "content": 5}]},
            "field missing",
            "the content 5, expected text",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}, HELLO]},
            "field missing",
            "type 'image'",
        ),
        ({"messages": [{"role": "user", "content": [7]}, HELLO]}, "field missing", "has 7 in its content"),
        ({"instruction": 5, "output": "x"}, "field missing", "the content 5"),
        ({"messages": ASKED, "tools": "{"}, "field missing", "tools is a string, but not JSON"),
        ({"messages": ASKED, "tools": {"a": 1}}, "field missing", "expected a list of JSON schemas"),
        ({"messages": ASKED, "chat_template_kwargs": "x"}, "field missing", "expected an object"),
    ],
)
def test_a_bad_row_has_its_reason_and_says_what_was_found(row, reason, detail):
    with pytest.raises(RowProblem) as caught:
        conversation_of(row)
    assert caught.value.reason == reason
    assert detail in caught.value.detail


def test_a_problem_survives_pickling_and_has_a_known_reason():
    problem = pickle.loads(pickle.dumps(RowProblem("zero norm", "row 3")))
    assert (problem.reason, problem.detail, str(problem)) == ("zero norm", "row 3", "zero norm: row 3")
    assert str(RowProblem("zero norm")) == "zero norm"
    assert len(set(REASONS)) == len(REASONS)
    with pytest.raises(ValueError, match="unknown reason"):
        RowProblem("bad luck")
