"""Every claim of `less.data.rendering`, on templates that make each of them hard to keep."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from datastore.errors import ModelError, SettingError
from less.data import Conversation, Record, RenderConfig, Renderer, RowProblem, conversation_of
from less.data.rendering import _overlapping
from less.data.templates import BUILTIN_TEMPLATES

SHARED = Path(os.environ.get("GRADSIFT_SHARED", Path(__file__).parents[3] / "../shared"))


REPLIES = "{% for message in messages %}{{ message.content + '</s>' }}{% endfor %}"


def chat(*contents, system=None):
    roles = ("user", "assistant")
    turns = [{"role": roles[number % 2], "content": content} for number, content in enumerate(contents)]
    return Conversation(messages=([{"role": "system", "content": system}] if system else []) + turns)


def spans_of(tokenizer, conversation, **config):
    text, spans = Renderer(tokenizer, RenderConfig(**config)).text_and_spans(conversation)
    return [text[start:end] for start, end in spans]


def learnt(tokenizer, rendered):
    """The text of each run of supervised tokens."""
    runs, run = [], []
    for token, supervised in [*zip(rendered.input_ids, rendered.supervised, strict=True), (None, False)]:
        if supervised:
            run.append(token)
        elif run:
            runs.append(tokenizer.decode(run))
            run = []
    return runs


def supervised_ref(offsets, spans):
    """Character by character; a token of trimmed white space owns what its predecessor left."""
    marks = []
    for number, (start, end) in enumerate(offsets):
        if start == end:
            start = min(start, offsets[number - 1][1] if number else 0)
        characters = [any(s <= at < e for s, e in spans) for at in range(start, end)]
        neighbours = [any(s <= at < e for s, e in spans) for at in (start - 1, start)]
        marks.append(any(characters) if characters else all(neighbours))
    return marks


EXPECTED = {
    "chatml": ["Hello.<|im_end|>", "42 foxes<|im_end|>"],
    "default system": ["Hello.<|im_end|>", "42 foxes<|im_end|>"],
    "llama-2": ["Hello. </s>", "42 foxes </s>"],
    "gemma": ["Hello.<|im_end|>", "42 foxes<|im_end|>"],
    "qwen-3": ["Hello.<|im_end|>", "<think>\n\n</think>\n\n42 foxes<|im_end|>"],
    "gpt-oss": ["Hello.<|end|>", "42 foxes<|return|>"],
    "mistral": ["Hello.</s>", "42 foxes</s>"],
    "phi-3": ["Hello.<|end|>", "42 foxes<|end|>"],
    "cohere": ["Hello.<|end|></s>", "42 foxes<|end|></s>"],
    "answers only": ["Hello.<|im_end|>", "42 foxes<|im_end|>"],
    "no generation prompt": ["Hello.</s>", "42 foxes</s>"],
    "open ended": [" Hello.", " 42 foxes"],
    "marked": ["Hello.<|im_end|>", "42 foxes<|im_end|>"],
    "tulu": ["Hello.<|im_end|>", "42 foxes<|im_end|>"],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_every_assistant_turn_is_supervised_with_its_end_of_turn_token_and_nothing_else(name, tokenizer_with):
    tokenizer = tokenizer_with(BUILTIN_TEMPLATES.get(name, name))
    conversation = chat("Hi, say Hello.", "Hello.", "How many?", "42 foxes")
    assert spans_of(tokenizer, conversation) == EXPECTED[name]


@pytest.mark.parametrize("name", EXPECTED)
def test_the_tokens_are_those_of_apply_chat_template(name, tokenizer_with):
    tokenizer = tokenizer_with(BUILTIN_TEMPLATES.get(name, name))
    conversation = chat("naïve 日本語?", "🙂 yes", "and\n\n", "  no ")
    rendered = Renderer(tokenizer, RenderConfig()).render(conversation)
    assert rendered.input_ids == tokenizer.apply_chat_template(conversation.messages)["input_ids"]
    assert rendered.num_tokens == len(rendered.supervised)
    assert not rendered.truncated


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_multi_byte_characters_and_trimmed_spaces_are_supervised_whole(trim_offsets, tokenizer_with):
    tokenizer = tokenizer_with("chatml", trim_offsets=trim_offsets)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    reply = "  🙂  日本語 \n\n end  "
    rendered = Renderer(tokenizer, RenderConfig()).render(chat("🙂", reply))
    assert learnt(tokenizer, rendered) == [reply + "<|im_end|>"]


def test_the_content_is_never_searched_for(tokenizer_with):
    """The reply stands in the question, and in a header."""
    tokenizer = tokenizer_with("chatml")
    for reply in ("assistant", "user", "Hello"):
        conversation = chat("Hello user assistant", reply, "assistant", reply)
        assert spans_of(tokenizer, conversation) == [reply + "<|im_end|>"] * 2
        text, spans = Renderer(tokenizer, RenderConfig()).text_and_spans(conversation)
        assert all(text[:start].endswith("<|im_start|>assistant\n") for start, _ in spans)


def test_turns_that_a_template_rewrites_are_found_by_the_sentinel(tokenizer_with):
    conversation = chat("Why?", "<think>\nhm\n</think>\n\nSo.", "Sure?", "<think>\nyes\n</think>\n\nYes.")
    assert spans_of(tokenizer_with("qwen-3"), conversation) == [
        "So.<|im_end|>",
        "<think>\n\n</think>\n\nYes.<|im_end|>",
    ]
    moved = chat("One?", "1", "Two?", "2", system="Count.")
    assert spans_of(tokenizer_with("mistral"), moved) == ["1</s>", "2</s>"]


def test_tool_calls_are_part_of_the_turn(tokenizer_with):
    call = {"type": "function", "function": {"name": "fox", "arguments": {}}}
    conversation = Conversation(
        messages=[
            {"role": "user", "content": "Call it."},
            {"role": "assistant", "tool_calls": [call, call]},
            {"role": "tool", "content": "Hello"},
            {"role": "assistant", "content": "It came."},
        ]
    )
    assert spans_of(tokenizer_with("qwen-3"), conversation) == [
        "<tool_call>fox</tool_call>\n<tool_call>fox</tool_call><|im_end|>",
        "<think>\n\n</think>\n\nIt came.<|im_end|>",
    ]


def test_a_turn_that_cannot_be_located_is_a_problem_of_its_row(tokenizer_with):
    counts = "{{ messages | map(attribute='content') | join | length }}{{ messages[1].content }}"
    with pytest.raises(RowProblem, match=r"hides where turn 2 \(assistant\) is") as caught:
        spans_of(tokenizer_with(counts), chat("a", "b", "c", "d"))
    assert caught.value.reason == "span not found"
    unmarked = "{% generation %}{% endgeneration %}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(RowProblem) as caught:
        spans_of(tokenizer_with(unmarked), chat("a", "b"))
    assert caught.value.reason == "span not found"


def test_a_template_that_shows_nothing_of_a_turn_is_not_trusted(tokenizer_with):
    calls = Conversation(messages=[*chat("a").messages, {"role": "assistant", "tool_calls": [{}], "content": ""}])
    with pytest.raises(RowProblem, match=r"renders turn 2 .* as nothing"):
        spans_of(tokenizer_with("chatml"), calls)
    with pytest.raises(ModelError, match="leaves out an assistant's text"):
        Renderer(tokenizer_with("{% for m in messages %}{{ m.content[0].text }}</s>{% endfor %}"), RenderConfig())


def test_in_every_template_that_trl_knows_the_replies_are_supervised_and_nothing_else(tokenizer_with):
    module = pytest.importorskip("trl.chat_template_utils")
    named = {name: text for name, text in vars(module).items() if name.endswith("_chat_template")}
    assert named
    conversation = chat("Question one", "Reply one", "Question two", "Reply two")
    for name, template in named.items():
        if isinstance(template, str):
            try:
                text = "".join(spans_of(tokenizer_with(template), conversation))
            except (ModelError, RowProblem):
                assert any(family in name for family in ("idefics", "llava", "smolvlm")), name
            else:
                assert (text.count("Reply one"), text.count("Reply two")) == (1, 1), name
                assert "Question" not in text, name


def test_generation_marks_decide_over_prefixes(tokenizer_with):
    last_only = (
        "{% for m in messages %}{% if m.role == 'assistant' and loop.last %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '<|end|>' }}{% endfor %}"
    )
    assert spans_of(tokenizer_with(last_only), chat("a", "b", "c", "d")) == ["d"]


def test_generation_marks_give_the_mask_of_apply_chat_template(tokenizer_with):
    tokenizer, conversation = tokenizer_with("marked"), chat("Hi 🙂", "日本語 fox", "and?", "42")
    masks = tokenizer.apply_chat_template(conversation.messages, return_assistant_tokens_mask=True)
    rendered = Renderer(tokenizer, RenderConfig()).render(conversation)
    assert rendered.supervised == [bool(mark) for mark in masks["assistant_masks"]]


def test_the_date_is_fixed_and_recorded(tokenizer_with):
    dated = (
        "\n{% set form = '%d %B %Y' %}{{ strftime_now(form) }} "
        "{{ strftime_now('%Y') if strftime_now is defined }}{{ '\n' }}{{ '%\\n' }}" + REPLIES
    )
    renderer = Renderer(tokenizer_with(dated), RenderConfig(template_date="2024-02-29"))
    text, _ = renderer.text_and_spans(chat("a", "b"))
    assert text == "\n29 February 2024 2024\n%\na</s>b</s>"
    assert renderer.provenance()["template_date"] == "2024-02-29"
    assert Renderer(tokenizer_with("chatml"), RenderConfig()).provenance()["template_date"] is None
    with pytest.raises(SettingError, match="ISO date"):
        Renderer(tokenizer_with(dated), RenderConfig(template_date="yesterday"))
    unforeseen = Renderer(tokenizer_with("{{ strftime_now(messages[0].content) }}"), RenderConfig())
    with pytest.raises(RowProblem, match="unforeseen date format %H"):
        unforeseen.render(chat("%H", "b"))


@pytest.mark.parametrize("name", ["chatml", "default system", "gemma", "marked", "qwen-3"])
def test_system_prompt_none_leaves_no_system_text(name, tokenizer_with):
    renderer = Renderer(tokenizer_with(name), RenderConfig(system_prompt="none"))
    with_one, _ = renderer.text_and_spans(chat("a", "b", system="Be kind."))
    without, _ = renderer.text_and_spans(chat("a", "b"))
    assert with_one == without
    assert "kind" not in without
    assert "fox" not in without
    assert ("system" in without) == (name == "default system")


def test_a_system_prompt_given_replaces_the_rows_own(tokenizer_with):
    renderer = Renderer(tokenizer_with("default system"), RenderConfig(system_prompt="Be brief."))
    text, _ = renderer.text_and_spans(chat("a", "b", system="Be kind."))
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na<|im_end|>")
    assert text == renderer.text_and_spans(chat("a", "b"))[0]
    assert renderer.provenance()["system_prompt"] == "Be brief."
    with pytest.raises(SettingError, match="shows no system prompt"):
        Renderer(tokenizer_with("gemma"), RenderConfig(system_prompt="Be brief."))


def test_system_prompt_keep_shows_the_templates_default(tokenizer_with):
    renderer = Renderer(tokenizer_with("default system"), RenderConfig())
    assert "Be a fox." in renderer.text_and_spans(chat("a", "b"))[0]
    assert "Be a fox." not in renderer.text_and_spans(chat("a", "b", system="Be kind."))[0]


def test_truncation_keeps_the_start_and_skips_a_row_without_supervised_tokens(tokenizer_with):
    tokenizer = tokenizer_with("chatml")
    conversation = chat("Hello there!", "The quick brown fox jumps over the lazy dog.")
    full = Renderer(tokenizer, RenderConfig()).render(conversation)
    first = full.supervised.index(True)
    cut = Renderer(tokenizer, RenderConfig(max_length=first + 1)).render(conversation)
    assert cut.truncated
    assert cut.input_ids == full.input_ids[: first + 1]
    assert cut.num_supervised == 1
    short = Renderer(tokenizer, RenderConfig(), context_length=first)
    assert short.max_length == short.provenance()["max_length"] == first
    with pytest.raises(RowProblem, match=f"first {first} of the row's {full.num_tokens} tokens") as caught:
        short.render(conversation)
    assert caught.value.reason == "no supervised token"


def test_the_first_token_is_never_supervised(tokenizer_with):
    bare = tokenizer_with(REPLIES)
    rendered = Renderer(bare, RenderConfig()).render(Conversation(messages=[{"role": "assistant", "content": "Hello"}]))
    assert not rendered.supervised[0]
    assert all(rendered.supervised[1:])


def test_whatever_a_template_raises_is_a_problem_of_its_row(tokenizer_with):
    for template in (
        "{{ messages[0].content + none }}",
        "{{ 1 / 0 }}",
        "{{ raise_exception('no') }}",
        "{{ x.y.z }}",
    ):
        renderer = Renderer(tokenizer_with(template), RenderConfig())
        with pytest.raises(RowProblem) as caught:
            renderer.render(chat("a", "b"))
        assert caught.value.reason == "field missing"
    half = Renderer(tokenizer_with("chatml"), RenderConfig())
    with pytest.raises(RowProblem, match="surrogate"):
        half.render(chat("a", "\ud800"))


def test_a_row_passes_tools_and_variables_but_no_settings_to_the_template(tokenizer_with):
    template = "{{ tools | length if tools else 0 }}{{ mood }}" + REPLIES
    renderer = Renderer(tokenizer_with(template), RenderConfig())
    row = {
        "prompt": "a",
        "completion": "b",
        "tools": '[{"name": "t"}]',
        "chat_template_kwargs": {"mood": "glad"},
    }
    text, _ = renderer.text_and_spans(conversation_of(row))
    assert text == "1glada</s>b</s>"
    with pytest.raises(RowProblem, match="may not set tokenize"):
        renderer.render(conversation_of(row | {"chat_template_kwargs": {"tokenize": True}}))


def test_a_tokenizer_with_several_templates_picks_the_one_for_tools(tokenizer_with):
    renderer = Renderer(tokenizer_with({"default": "plain " + REPLIES, "tool_use": "tools " + REPLIES}), RenderConfig())
    assert renderer.text_and_spans(chat("a", "b"))[0].startswith("plain")
    with_tools = Conversation(messages=chat("a", "b").messages, tools=[{"name": "t"}])
    assert renderer.text_and_spans(with_tools)[0].startswith("tools")


def test_builtin_and_file_templates_stand_in_for_the_tokenizers_own(tokenizer_with, tmp_path):
    tokenizer = tokenizer_with(None, eos="</s>")
    with pytest.raises(ModelError, match=r"--chat-template tulu\|chatml\|FILE"):
        Renderer(tokenizer, RenderConfig())
    tulu, _ = Renderer(tokenizer, RenderConfig(chat_template="tulu")).text_and_spans(chat(" a ", "b"))
    assert tulu == "<|user|>\na\n<|assistant|>\nb</s>\n"
    chatml = Renderer(tokenizer, RenderConfig(chat_template="chatml"))
    assert (
        chatml.text_and_spans(chat("a", "b"))[0]
        == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    )
    file = tmp_path / "mine.jinja"
    file.write_text(REPLIES)
    mine = Renderer(tokenizer, RenderConfig(chat_template=str(file)))
    assert mine.text_and_spans(chat("a", "b"))[0] == "a</s>b</s>"
    assert mine.provenance()["template_sha256"] != chatml.provenance()["template_sha256"]
    json.dumps(mine.provenance())
    with pytest.raises(SettingError, match="cannot read the chat template"):
        Renderer(tokenizer, RenderConfig(chat_template=str(tmp_path / "absent.jinja")))
    with pytest.raises(ModelError, match=r"not valid Jinja.*line 1"):
        Renderer(tokenizer_with("{% for %}"), RenderConfig())
    with pytest.raises(SettingError, match="max length must be positive, got 0"):
        Renderer(tokenizer_with("chatml"), RenderConfig(max_length=0))


def test_a_record_with_a_problem_raises_it(tokenizer_with):
    problem = RowProblem("not JSON", "line 1")
    record = Record(number=0, where="a:1", columns=None, problem=problem)
    with pytest.raises(RowProblem) as caught:
        Renderer(tokenizer_with("chatml"), RenderConfig()).render_record(record)
    assert caught.value is problem


@given(data=st.data())
def test_the_overlap_rule_equals_its_reference(data):
    lengths = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=30), label="lengths")
    offsets, at = [], 0
    for length in lengths:
        gap = data.draw(st.integers(0, 1))
        start = max(at - data.draw(st.integers(0, 1)), 0) if length else at + gap
        offsets.append((start, max(start + length, at)) if length else (start, start))
        at = offsets[-1][1]
    cuts = sorted(data.draw(st.sets(st.integers(0, at + 2), min_size=2, max_size=6), label="cuts"))
    spans = list(zip(cuts[::2], cuts[1::2], strict=False))
    assert _overlapping(offsets, spans) == supervised_ref(offsets, spans)


@settings(max_examples=60, deadline=None)
@given(
    replies=st.lists(st.text("ab 🙂é\n日.", min_size=1).filter(lambda reply: reply[0].strip()), min_size=1, max_size=3),
    trim_offsets=st.booleans(),
)
def test_any_replies_come_back_from_the_supervised_tokens(replies, trim_offsets, tokenizer_with):
    tokenizer = tokenizer_with("chatml", trim_offsets=trim_offsets)
    conversation = chat(*(text for reply in replies for text in (reply, reply)))
    rendered = Renderer(tokenizer, RenderConfig()).render(conversation)
    assert learnt(tokenizer, rendered) == [reply + "<|im_end|>" for reply in replies]


def test_a_sentencepiece_style_tokenizer_supervises_the_reply_and_its_eos():
    folder = SHARED / "models/stories260K"
    if not folder.exists():
        pytest.skip(f"{folder} is not there; set GRADSIFT_SHARED to the folder that holds models/")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rendered = Renderer(tokenizer, RenderConfig()).render(chat("Tell me.", "Once upon a time.", "And?", "The end."))
    assert [run.strip() for run in learnt(tokenizer, rendered)] == ["Once upon a time.</s>", "The end.</s>"]
