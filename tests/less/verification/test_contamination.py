"""Near-duplicates of targets: the planted ones are found, the others are not, and all as the definition says."""

from hypothesis import given, settings
from hypothesis import strategies as st

from less.data.records import open_source
from less.verification.contamination import near_duplicates, near_duplicates_ref
from less.words import words_of

WORDS = [f"word{n}" for n in range(60)]


def chat(*turns, **columns):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": turn} for n, turn in enumerate(turns)], **columns}


def found(targets, pool, search=near_duplicates):
    return search(open_source(targets).iter_records(), open_source(pool).iter_records())


def pairs(targets, pool):
    return [(pair.id, pair.target_id, pair.share, pair.num_targets) for pair in found(targets, pool)]


ASKED, ANSWERED = " ".join(WORDS[:12]), " ".join(WORDS[12:20])  # 20 words: 13 runs
TARGET = chat(ASKED, ANSWERED, id="t")


def test_a_copy_is_found_whatever_its_case_marks_and_layout():
    loud = "«" + ASKED.upper().replace(" ", ",\n ") + "?»"
    pool = [
        chat("nothing", "of it", id="other"),
        chat(loud, ANSWERED, id="chat"),
        {"instruction": ASKED, "output": ANSWERED, "id": "alpaca"},
        {"conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": ANSWERED}], "id": "sharegpt"},
    ]
    assert pairs([TARGET], pool) == [(name, "t", 1.0, 1) for name in ("chat", "alpaca", "sharegpt")]


def test_unicode_forms_of_a_word_are_one_word():
    assert words_of("Cafe\u0301 STRASSE ﬁne") == words_of("CAFÉ straße fine") == ["café", "strasse", "fine"]
    assert words_of("snake_case, 3.5!") == ["snake", "case", "3", "5"]


def test_a_row_is_flagged_from_half_of_the_runs_on():
    target = chat(" ".join(WORDS[:10]), " ".join(WORDS[10:17]), id="t")  # 17 words: 10 runs
    for num_words, share in ((11, 0.4), (12, 0.5), (13, 0.6)):
        pool = [chat(" ".join(WORDS[:num_words]), "and something else altogether", id="row")]
        expected = [("row", "t", share, 1)] if share >= 0.5 else []
        assert pairs([target], pool) == expected


def test_the_same_words_in_another_order_are_no_near_duplicate():
    assert not pairs([TARGET], [chat(" ".join(reversed(WORDS[:12])), ANSWERED)])


def test_a_long_row_that_holds_a_short_target_is_flagged_and_not_the_reverse():
    long = chat(" ".join(WORDS), "yes", id="long")
    short = chat(" ".join(WORDS[5:16]), " ".join(WORDS[16:19]), id="short")
    assert pairs([short], [long]) == [("long", "short", 1.0, 1)]
    assert not pairs([long], [short])


def test_a_target_of_fewer_than_eight_words_is_met_by_equal_text_only():
    target = chat("two plus two", "four", id="t")
    pool = [
        chat("Two plus two?", "Four.", id="same"),
        chat("two plus two", "five", id="other"),
        chat("what is two plus two", "four", id="longer"),
    ]
    assert pairs([target], pool) == [("same", "t", 1.0, 1)]


def test_a_system_prompt_that_all_share_makes_no_near_duplicates():
    system = {"role": "system", "content": " ".join(WORDS[:40])}
    target = {"messages": [system, *chat("one two three", "four five six seven eight nine")["messages"]]}
    row = {"messages": [system, *chat("ten", "eleven")["messages"]]}
    assert not pairs([target], [row])
    assert len(pairs([target], [target])) == 1


def test_a_row_names_the_target_that_it_holds_most_of():
    part = chat(" ".join([*WORDS[:14], *WORDS[50:54]]), "x", id="part")
    pool = [chat(ASKED, ANSWERED, id="row")]
    assert pairs([part, TARGET], pool) == [("row", "t", 1.0, 2)]
    (pair,) = found([part, TARGET], pool)
    assert (pair.where, pair.target_where) == ("memory[0]", "memory[1]")


def test_rows_and_targets_without_a_chat_or_a_word_are_passed_over():
    bad = [{"text": "x"}, None, chat("?!", "…")]
    assert not pairs(bad, [*bad, TARGET])
    assert pairs([*bad, TARGET], [*bad, TARGET]) == [("t", "t", 1.0, 1)]


few_words = st.lists(st.sampled_from("abc"), min_size=0, max_size=30).map(" ".join)
chats = st.lists(st.builds(chat, few_words, few_words), min_size=1, max_size=5)


@settings(max_examples=200, deadline=None)
@given(chats, chats)
def test_equals_the_definition(targets, pool):
    targets = [row | {"id": f"target-{n}"} for n, row in enumerate(targets)]
    assert found(targets, pool) == found(targets, pool, near_duplicates_ref)


@settings(max_examples=50, deadline=None)
@given(few_words, few_words, few_words)
def test_every_row_with_a_word_is_a_near_duplicate_of_itself(asked, answered, before):
    row = chat(asked or "x", answered or "y")
    assert len(pairs([row], [row])) == 1
    if len(words_of(f"{asked or 'x'} {answered or 'y'}")) >= 8:
        assert len(pairs([row], [chat(f"{before} {row['messages'][0]['content']}", answered or "y")])) == 1
