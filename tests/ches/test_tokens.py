"""The tokens of pairs. What `DPOTrainer` itself makes of the same rows is the oracle of the trainer's mode."""

import copy
import functools
import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import AutoTokenizer

from ches.pairs import Pair, pair_of
from ches.tokens import PairRenderer
from datastore.errors import ModelError, SettingError
from less.data import Record, RenderConfig, RowProblem, open_source
from less.data.templates import BUILTIN_TEMPLATES

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:(datasets|dill|multiprocess|pyarrow|pandas).*")

TEMPLATES = {
    **BUILTIN_TEMPLATES,
    # Llama 3: white space trimmed, nothing after the end-of-turn token
    "trimmed": (
        "{% for m in messages %}{{ '<' + m.role + '>\n\n' + m.content | trim + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>\n\n' }}{% endif %}"
    ),
    # Phi 3: text after the last end-of-turn token, which is not the eos token
    "tail": (
        "{% for m in messages %}{{ '<' + m.role + '>\n' + m.content + '<end>\n' }}{% endfor %}"
        "{{ '<assistant>\n' if add_generation_prompt else eos_token }}"
    ),
    # Gemma 4: the generation prompt ends with an empty thought, which the whole conversation drops
    "thought": (
        "{% for m in messages %}{{ '<' + m.role + '>' + m.content + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant><think></think>' }}{% endif %}"
    ),
    # Qwen 3: an empty thought before the last reply only
    "last thought": (
        "{% for m in messages %}{{ '<' + m.role + '>' }}"
        "{% if m.role == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
        "{{ m.content + eos_token + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
    ),
    "no generation prompt": (
        "{% for m in messages %}{{ '### ' + m.role + ': ' + m.content + eos_token + '\n' }}{% endfor %}"
    ),
    "system of its own": (
        "{% if messages[0].role != 'system' %}{{ '<system>Be a fox.' + eos_token }}{% endif %}"
        "{% for m in messages %}{{ '<' + m.role + '>' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
    ),
    "marked": (
        "{% for m in messages %}{{ '<' + m.role + '>' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% else %}{{ m.content + eos_token }}{% endif %}"
        "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
    ),
    "tools": (
        "{% if tools is not none %}{{ '<tools>' + tools | tojson }}{% endif %}{{ mood }}{% for m in messages %}"
        "{{ '<' + m.role + '>' + (m.content or '') }}{% for call in m.tool_calls or [] %}{{ call.function.name }}"
        "{% endfor %}{{ eos_token + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
    ),
}
CLOSING = {"chatml": "<|im_end|>", "tail": "<end>"}  # of a turn, where it is not the eos token


def user(content):
    return {"role": "user", "content": content}


def said(content):
    return {"role": "assistant", "content": content}


def explicit(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


CHATS = [
    explicit([user("Which colour?")], [said("Red.")], [said("Blue.")]),
    explicit([{"role": "system", "content": "Be brief."}, user("Which?")], [said("Red.")], [said("Red, or blue.")]),
    explicit([user("One?"), said("Red."), user("Two?"), said("Blue."), user("So?")], [said("Red.")], [said("🙂 日本")]),
    explicit([user("  white space \n")], [said("\n\nfirst")], [said(" and last \n ")]),
    explicit([user("Which?")], [said("Red."), user("Sure?"), said("Yes.")], [said("Blue.")]),
    explicit([user("It is"), said("so ")], [said("red")], [said("blue")]),
]
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "look"}}]}
LAYOUTS = {
    "explicit texts": [
        explicit("The sky is", " blue.", " red."),
        explicit("The sky ", " blue.", "red.</s>"),
        explicit("Twice", " a</s>b", " b </s>"),
        explicit("", "blue", "red"),
    ],
    "implicit texts": [
        {"chosen": "The sky is blue.", "rejected": "The sky is red."},
        {"chosen": "The sky is blue.", "rejected": "The sky is blue. Or red."},
        {"chosen": "blue", "rejected": "red"},
    ],
    "implicit conversations": [
        {"chosen": [user("Which?"), said("Red.")], "rejected": [user("Which?"), said("Blue.")]},
        {
            "chosen": [user("Which?"), said("Red."), user("Sure?"), said("Yes.")],
            "rejected": [user("Which?"), said("Red."), user("Sure?"), said("No.")],
        },
        {
            "chosen": [user("Which?"), said("Red.")],
            "rejected": [user("Which?"), said("Red."), user("Sure?"), said("No.")],
        },
    ],
    "tools": [
        {**explicit([user("Look.")], [CALL, {"role": "tool", "content": "rose"}, said("Red.")], [said("No.")]), **given}
        for given in ({"tools": '[{"name": "look"}]'}, {"tools": "[]"})
    ],
    "no tools": [{**explicit([user("Look.")], [said("Red.")], [said("No.")]), "tools": []}],
    "variables": [
        {**explicit([user("Which?")], [said("Red.")], [said("Blue.")]), "chat_template_kwargs": {"mood": "glad"}}
    ],
    "UltraFeedback": [explicit("Which?", [user("Which?"), said("Red.")], [user("Which?"), said("Blue.")])],
    "Anthropic": [
        {"chosen": f"\n\nHuman: Which?\n\nAssistant: {red}", "rejected": f"\n\nHuman: Which?\n\nAssistant: {blue}"}
        for red, blue in (("Red.", "Blue."), ("Red", "Red, or"))
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer_of(tiny_tokenizer, stories260k):
    """`tokenizer_of(name, template)`: tokens are bytes, or pieces of words after a first token for each text."""
    tokenizers = {"bytes": tiny_tokenizer, "pieces": AutoTokenizer.from_pretrained(stories260k)}

    def tokenizer_of(name, template="chatml"):
        tokenizer = copy.deepcopy(tokenizers[name])
        tokenizer.chat_template = TEMPLATES.get(template)
        tokenizer.add_tokens([*CLOSING.values()], special_tokens=True)
        return tokenizer

    return tokenizer_of


@pytest.fixture(scope="module")
def trained_on(tmp_path_factory, tiny_model_folder):
    """What `DPOTrainer` trains on, by row number: the prompt's ids, and of both replies ids and which of them count."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    output = str(tmp_path_factory.mktemp("dpo"))

    def trained_on(tokenizer, rows, max_length):
        args = trl.DPOConfig(
            output, max_length=max_length, report_to="none", use_cpu=True, bf16=False, activation_checkpointing=False
        )
        trainer = trl.DPOTrainer(
            str(tiny_model_folder), args=args, processing_class=copy.deepcopy(tokenizer),
            train_dataset=datasets.Dataset.from_list([{**row, "row": n} for n, row in enumerate(rows)]),
        )  # fmt: skip
        found = {}
        for example in trainer.train_dataset:
            batch = trainer.data_collator([example])
            rows_of_batch = zip(
                batch["input_ids"], batch["attention_mask"].bool(), batch["completion_mask"], strict=True
            )
            replies = [(ids[there].tolist(), mask[there][1:].bool().tolist()) for ids, there, mask in rows_of_batch]
            found[example["row"]] = (example["prompt_ids"], *replies)
        return found

    return trained_on


def sequences(pair):
    """Ids of both whole sequences, and for each id but the first whether it counts."""
    for reply in (pair.chosen, pair.rejected):
        counts = [False] * len(pair.prompt_ids) + reply.counted
        assert not counts[0]
        yield pair.prompt_ids + reply.input_ids, counts[1:]


def rendered(tokenizer, rows, **options):
    """As `trained_on`."""
    config = RenderConfig(**{name: options.pop(name) for name in ("max_length", "system_prompt") if name in options})
    renderer, found = PairRenderer(tokenizer, config, **options), {}
    for n, row in enumerate(rows):
        try:
            pair = renderer.render(pair_of(row))
        except RowProblem as problem:
            if problem.reason != "no supervised token":
                raise
        else:
            found[n] = (pair.prompt_ids, *sequences(pair))
    return found


def counted_text(tokenizer, row, **options):
    """The text that counts, chosen and rejected."""
    ((_, *replies),) = rendered(tokenizer, [row], **options).values()
    return [tokenizer.decode(list(itertools.compress(ids[1:], counts))) for ids, counts in replies]


@pytest.mark.parametrize("words", ["bytes", "pieces"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_conversations_give_the_tokens_that_the_trainer_trains_on(template, words, tokenizer_of, trained_on):
    tokenizer = tokenizer_of(words, template)
    whole = rendered(tokenizer, CHATS)
    assert len(whole) == len(CHATS)
    assert whole == trained_on(tokenizer, CHATS, 2048)
    limit = len(whole[0][0]) + 2
    cut = rendered(tokenizer, CHATS, max_length=limit)
    assert [len(ids) for ids, _ in cut[0][1:]] == [limit, limit]
    assert cut == trained_on(tokenizer, CHATS, limit)


@pytest.mark.parametrize("words", ["bytes", "pieces"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_tokens_that_the_trainer_trains_on(layout, words, tokenizer_of, trained_on):
    """Where the row is rewritten, the trainer has to be given the columns that the pair puts in its place."""
    tokenizer, rows = tokenizer_of(words, "tools"), LAYOUTS[layout]
    for_training = [
        explicit(pair.prompt, pair.chosen, pair.rejected) if pair.rewritten else row
        for row, pair in ((row, pair_of(row)) for row in rows)
    ]
    found = rendered(tokenizer, rows)
    assert len(found) == len(rows)
    assert found == trained_on(tokenizer, for_training, 1024)


@pytest.mark.parametrize(("file", "max_length"), [("pref_hh_harmless.jsonl", 256), ("pref_persona.jsonl", 96)])
def test_real_pairs_give_the_tokens_that_the_trainer_trains_on(file, max_length, shared_data, stories260k, trained_on):
    tokenizer = AutoTokenizer.from_pretrained(stories260k)
    rows = [record.columns for record in open_source(shared_data / file).iter_records(0, 256)]
    rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]
    found = rendered(tokenizer, rows, max_length=max_length)
    lengths = [len(ids) for _, *replies in found.values() for ids, _ in replies]
    assert max_length in lengths  # some are cut
    assert min(lengths) < max_length
    assert found == trained_on(tokenizer, rows, max_length)


def test_a_tokenizer_that_closes_every_text_by_itself_is_followed(tiny_tokenizer, trained_on):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A </s>", special_tokens=[("</s>", 0)]
    )
    rows = LAYOUTS["explicit texts"]
    assert rendered(tokenizer, rows) == trained_on(tokenizer, rows, 1024)


def test_a_system_prompt_given_is_the_trainers_when_its_rows_have_it(tokenizer_of, trained_on):
    tokenizer = tokenizer_of("bytes", "system of its own")
    rows = [
        {
            **row,
            "prompt": [{"role": "system", "content": "Rhyme."}, *(m for m in row["prompt"] if m["role"] != "system")],
        }
        for row in CHATS
    ]
    assert rendered(tokenizer, CHATS, system_prompt="Rhyme.") == trained_on(tokenizer, rows, 1024)


@pytest.mark.parametrize("words", ["bytes", "pieces"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_in_reference_mode_a_reply_counts_with_its_end_of_turn_token_and_nothing_after(template, words, tokenizer_of):
    tokenizer = tokenizer_of(words, template)
    thought = "<think></think>" if template == "last thought" else ""
    for row in CHATS[:3]:
        replies = [thought + row[name][0]["content"] + CLOSING.get(template, "</s>") for name in ("chosen", "rejected")]
        assert counted_text(tokenizer, row, tokens="reference") == replies


@pytest.mark.parametrize("template", ["tulu", "marked"])
def test_in_reference_mode_only_the_assistants_turns_of_a_long_reply_count(template, tokenizer_of):
    row = explicit([user("One?"), said("1"), user("Two?")], [said("2"), user("Sure?"), said("Yes")], [said("3")])
    assert counted_text(tokenizer_of("bytes", template), row, tokens="reference") == ["2</s>Yes</s>", "3</s>"]


def test_marks_that_cannot_be_told_from_the_prompts_are_a_problem(tokenizer_of):
    tokenizer = tokenizer_of("bytes", "marked")
    tokenizer.chat_template = "{{ messages | length }}" + TEMPLATES["marked"]
    renderer = PairRenderer(tokenizer, RenderConfig(), tokens="reference")
    assert renderer.token_texts(pair := renderer.render(pair_of(CHATS[0])), pair.chosen)[:4] == ["R", "e", "d", "."]
    with pytest.raises(RowProblem, match="span not found: the template renders the prompt otherwise"):
        renderer.render(pair_of(CHATS[2]))


@pytest.mark.parametrize("tokens", ["trainer", "reference"])
def test_sequences_that_part_within_the_prompt_share_no_more_than_they_have_in_common(tokens, tokenizer_of):
    tokenizer = tokenizer_of("bytes", "tulu")
    tokenizer.chat_template = "{{ 'Turns: ' ~ messages | length }}" + TEMPLATES["tulu"]
    row = explicit([user("One?")], [said("1"), user("Sure?"), said("Yes")], [said("2")])
    pair = PairRenderer(tokenizer, RenderConfig(), tokens=tokens).render(pair_of(row))
    assert tokenizer.decode(pair.prompt_ids) == "Turns: "
    whole = [tokenizer.apply_chat_template(row["prompt"] + row[name])["input_ids"] for name in ("chosen", "rejected")]
    assert [ids for ids, _ in sequences(pair)] == whole
    if tokens == "reference":
        assert [tokenizer.decode(reply.counted_ids) for reply in (pair.chosen, pair.rejected)] == [
            "1</s>Yes</s>",
            "2</s>",
        ]


@pytest.mark.parametrize("tokens", ["trainer", "reference"])
def test_what_replies_begin_with_alike_counts_in_both(tokens, tokenizer_of):
    row = explicit([user("Which?")], [said("Red rose.")], [said("Red sky.")])
    counted = counted_text(tokenizer_of("bytes", "trimmed"), row, tokens=tokens)
    assert counted == ["Red rose.</s>", "Red sky.</s>"]


WORDS = st.lists(st.sampled_from(["Red", " sky", " ", "\n", "\n\n", "🙂", "</s>", "<assistant>"]), min_size=1).map(
    "".join
)
WORDS = WORDS.filter(str.strip)


@pytest.fixture(scope="module")
def renderer_of(tokenizer_of):
    """One for each tokenizer, template and mode."""
    return functools.cache(
        lambda words, template, tokens: PairRenderer(tokenizer_of(words, template), RenderConfig(), tokens=tokens)
    )


@settings(deadline=None, max_examples=60)
@given(
    words=st.sampled_from(["bytes", "pieces"]),
    template=st.sampled_from(["chatml", "trimmed", "last thought", "marked"]),
    turns=st.lists(WORDS, max_size=2),
    replies=st.tuples(WORDS, WORDS),
)
def test_the_sequences_are_the_templates_and_the_reference_counts_no_token_that_the_trainer_does_not(
    renderer_of, words, template, turns, replies
):
    prompt = [turn for text in turns for turn in (user("Which?"), said(text))] + [user("So?")]
    pair = Pair(prompt=prompt, chosen=[said(replies[0])], rejected=[said(replies[1])])
    trainer, reference = (renderer_of(words, template, tokens) for tokens in ("trainer", "reference"))
    tokenizer = trainer._tokenizer
    whole = [tokenizer.apply_chat_template(prompt + reply)["input_ids"] for reply in (pair.chosen, pair.rejected)]
    if whole[0] == whole[1]:
        for renderer in (trainer, reference):
            with pytest.raises(RowProblem, match="token for token"):
                renderer.render(pair)
        return
    by_trainer, by_reference = trainer.render(pair), reference.render(pair)
    for found in (by_trainer, by_reference):
        assert [ids for ids, _ in sequences(found)] == whole
        assert found.num_tokens == sum(map(len, whole)) - len(found.prompt_ids)
        for reply in (found.chosen, found.rejected):
            assert reply.num_counted == len(reply.counted_ids)
    for (_, more), (_, fewer) in zip(sequences(by_trainer), sequences(by_reference), strict=True):
        assert all(counts or not also for counts, also in zip(more, fewer, strict=True))


@pytest.mark.parametrize("tokens", ["trainer", "reference"])
def test_each_sequence_is_cut_by_itself_and_a_reply_cut_away_is_a_problem(tokens, tokenizer_of):
    tokenizer = tokenizer_of("bytes", "trimmed")
    pair = pair_of(explicit([user("Which?")], [said("Red.")], [said("Blue, or red.")]))
    whole = PairRenderer(tokenizer, RenderConfig(), tokens=tokens).render(pair)
    start = len(whole.prompt_ids)
    limit = start + len(whole.chosen.input_ids)
    for options in ({"config": RenderConfig(max_length=limit)}, {"config": RenderConfig(), "context_length": limit}):
        renderer = PairRenderer(tokenizer, tokens=tokens, **options)
        cut = renderer.render(pair)
        assert cut.chosen == whole.chosen
        assert cut.rejected.truncated
        assert cut.rejected.input_ids == whole.rejected.input_ids[: limit - start]
        assert renderer.provenance()["max_length"] == limit
    assert not whole.chosen.truncated
    assert not whole.rejected.truncated
    for max_length in (start, 1):
        with pytest.raises(RowProblem, match=f"none of the chosen reply in the first {max_length} of {limit} tokens"):
            PairRenderer(tokenizer, RenderConfig(max_length=max_length), tokens=tokens).render(pair)


def test_nothing_predicts_the_first_token_of_a_sequence(tiny_tokenizer):
    renderer = PairRenderer(tiny_tokenizer, RenderConfig())
    pair = renderer.render(pair_of(explicit("", "blue", "red")))
    assert pair.prompt_ids == []
    assert pair.chosen.counted == [False, True, True, True, True]
    with pytest.raises(RowProblem, match="no supervised token"):
        PairRenderer(tiny_tokenizer, RenderConfig(max_length=1)).render(pair_of(explicit("", "blue", "red")))


@pytest.mark.parametrize("tokens", ["trainer", "reference"])
def test_texts_need_no_template_and_are_the_same_in_both_modes(tokens, tokenizer_of):
    bare = tokenizer_of("bytes", None)
    renderer = PairRenderer(bare, RenderConfig(), tokens=tokens)
    pair = renderer.render(pair_of(explicit("The sky is", " blue", " red")))
    assert bare.decode(pair.prompt_ids) == "The sky is"
    assert [bare.decode(reply.counted_ids) for reply in (pair.chosen, pair.rejected)] == [" blue</s>", " red</s>"]
    assert renderer.provenance()["template_sha256"] is None
    with pytest.raises(ModelError, match=r"--chat-template tulu\|chatml\|FILE"):
        renderer.render(pair_of(CHATS[0]))
    with_template = PairRenderer(bare, RenderConfig(chat_template="chatml"), tokens=tokens)
    assert with_template.render(pair_of(CHATS[0])).prompt_ids
    assert with_template.provenance().keys() == renderer.provenance().keys()


def test_texts_need_an_eos_token(tokenizer_of):
    tokenizer = tokenizer_of("bytes", "chatml")
    tokenizer.eos_token = None
    renderer = PairRenderer(tokenizer, RenderConfig())
    assert renderer.render(pair_of(CHATS[0])).num_tokens
    with pytest.raises(ModelError, match="no eos token to close a reply with"):
        renderer.render(pair_of(explicit("The sky is", " blue", " red")))


def test_the_texts_of_the_reply_tokens_are_those_where_they_stand(tokenizer_of):
    renderer = PairRenderer(tokenizer_of("pieces", "trimmed"), RenderConfig())
    pair = renderer.render(pair_of(explicit([user("Which?")], [said("Red sky. Red sky.")], [said("No.")])))
    texts = renderer.token_texts(pair, pair.chosen)
    assert len(texts) == pair.chosen.num_counted
    assert "".join(texts) == "Red sky. Red sky.</s>"


def test_what_decides_the_tokens_is_recorded(tokenizer_of):
    dated = tokenizer_of("bytes", "chatml")
    dated.chat_template = "{{ strftime_now('%Y') }}" + TEMPLATES["chatml"]
    renderer = PairRenderer(dated, RenderConfig(template_date="2024-02-29"), tokens="reference")
    recorded = json.loads(json.dumps(renderer.provenance()))
    assert (recorded["tokens"], recorded["template_date"]) == ("reference", "2024-02-29")
    assert dated.decode(renderer.render(pair_of(CHATS[0])).prompt_ids).startswith("2024<|im_start|>")
    plain = PairRenderer(tokenizer_of("bytes", "chatml"), RenderConfig()).provenance()
    assert plain["tokens"] == "trainer"
    assert plain["template_sha256"] != recorded["template_sha256"]
    assert plain["vocabulary_sha256"] == recorded["vocabulary_sha256"]


def test_settings_out_of_range_are_refused_at_once(tokenizer_of):
    tokenizer = tokenizer_of("bytes", "chatml")
    with pytest.raises(SettingError, match="tokens must be trainer or reference, got 'paper'"):
        PairRenderer(tokenizer, RenderConfig(), tokens="paper")
    with pytest.raises(SettingError, match="max length must be positive"):
        PairRenderer(tokenizer, RenderConfig(max_length=0))
    with pytest.raises(SettingError, match="cannot read the chat template"):
        PairRenderer(tokenizer, RenderConfig(chat_template="nowhere.jinja"))


def test_a_row_that_cannot_be_read_or_holds_no_pair_has_a_problem(tokenizer_of):
    renderer = PairRenderer(tokenizer_of("bytes", "chatml"), RenderConfig())
    unread = Record(number=0, where="x:1", columns=None, problem=RowProblem("not JSON", "line"))
    with pytest.raises(RowProblem, match="not JSON: line"):
        renderer.render_record(unread)
    with pytest.raises(RowProblem, match="chosen is missing"):
        renderer.render_record(Record(number=0, where="x:1", columns={"prompt": "a"}))
    assert renderer.render_record(Record(number=0, where="x:1", columns=CHATS[0])).num_tokens


@pytest.mark.parametrize("tokens", ["trainer", "reference"])
def test_a_pair_that_cannot_be_rendered_has_a_problem(tokens, tokenizer_of):
    tokenizer = tokenizer_of("bytes", "trimmed")
    renderer = PairRenderer(tokenizer, RenderConfig(), tokens=tokens)
    half = [explicit("a", "b", "\ud800"), explicit([user("a")], [said("b")], [said("\ud800")])]
    for row in half:
        with pytest.raises(RowProblem, match="surrogate"):
            renderer.render(pair_of(row))
    with pytest.raises(RowProblem, match="same replies"):
        renderer.render(pair_of(explicit([user("a")], [said("b")], [said(" b")])))
    with pytest.raises(RowProblem, match="may not set tokenize"):
        renderer.render(pair_of({**CHATS[0], "chat_template_kwargs": {"tokenize": True}}))
    tokenizer.chat_template = "{{ raise_exception('no') if messages | length > 2 }}" + TEMPLATES["trimmed"]
    with pytest.raises(RowProblem, match="the chat template refuses the row: no"):
        PairRenderer(tokenizer, RenderConfig(), tokens=tokens).render(pair_of(CHATS[2]))
