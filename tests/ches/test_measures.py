"""The measures against the formulas of the paper, written out again here the slow way."""

import itertools
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from ches import score_pairs
from ches.measures import (
    alpha_ches_terms,
    ches_scores,
    ches_terms,
    edit_distance,
    last_hidden,
    length_difference,
    ln_ches_terms,
)
from datastore.errors import SettingError

# --- the definition, on real pairs ---


def slow_measures(model, tokenizer, row, *, tokens, max_length):
    """Every measure of a row, and the size of the terms that each is the difference of."""
    prompt_text = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(prompt_text, add_special_tokens=False).input_ids
    wholes = {}
    for side in ("chosen", "rejected"):
        text = tokenizer.apply_chat_template(row["prompt"] + row[side], tokenize=False)
        wholes[side] = tokenizer(text, add_special_tokens=False).input_ids
        assert wholes[side][: len(prompt)] == prompt
    sums, gradients, counts, lasts, log_probs, replies = {}, {}, {}, {}, {}, {}
    for side, ids in wholes.items():
        ids = ids[:max_length]
        stop = len(ids)
        if tokens == "reference" and tokenizer.eos_token_id in ids[len(prompt) :]:
            stop = len(prompt) + ids[len(prompt) :].index(tokenizer.eos_token_id) + 1
        with torch.no_grad():
            out = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
        hidden_TD = out.hidden_states[-1][0, len(prompt) - 1 : stop - 1].double()
        probs_TV = out.logits[0, len(prompt) - 1 : stop - 1].double().softmax(-1)
        replies[side] = ids[len(prompt) : stop]
        sums[side] = sum(hidden_TD)
        counts[side], lasts[side] = len(hidden_TD), hidden_TD[-1]
        log_probs[side] = sum(probs_TV[k, token].log().item() for k, token in enumerate(replies[side]))
        residuals_TV = torch.nn.functional.one_hot(torch.tensor(replies[side]), probs_TV.shape[1]) - probs_TV
        gradients[side] = residuals_TV.T @ hidden_TD
    plus, minus, num_plus, num_minus = sums["chosen"], sums["rejected"], counts["chosen"], counts["rejected"]
    terms = {
        "ches": ((plus @ minus).item(), (plus @ plus).item()),
        "ln_ches": ((plus @ minus).item() / (num_plus * num_minus), (plus @ plus).item() / num_plus**2),
        "alpha_ches": (
            (gradients["chosen"] * gradients["rejected"]).sum().item(), (gradients["chosen"] ** 2).sum().item(),
        ),
    }  # fmt: skip
    found = {name: (other - own, abs(other) + own) for name, (other, own) in terms.items()}
    found["last_hidden"] = (
        (lasts["chosen"] @ lasts["rejected"]).item(), (lasts["chosen"].norm() * lasts["rejected"].norm()).item(),
    )  # fmt: skip
    found["edit_distance"] = (slow_edits(*replies.values()) / max(num_plus, num_minus), 1)
    found["length_chosen"], found["length_rejected"] = (num_plus, 0), (num_minus, 0)
    found["length_difference"] = (num_minus - num_plus, 0)
    found["logp_chosen"], found["logp_rejected"] = ((value, abs(value)) for value in log_probs.values())
    return found


def slow_edits(one, other):
    """Levenshtein's distance, row by row."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, start=1):
        before, row = row, [i]
        for j, b in enumerate(other, start=1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (a != b)))
    return row[-1]


def assert_as_defined(folder, rows, *, tokens, max_length):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scores = score_pairs(model=model, data=rows, tokens=tokens, max_length=max_length, progress=False)
    num_cut = 0
    for row, columns in zip(rows, scores.columns, strict=True):
        num_cut += columns["ches_problem"] == "truncated reply"
        if columns["ches_problem"] not in (None, "truncated reply"):
            assert columns["ches"] is None
            continue
        found = slow_measures(model, tokenizer, row, tokens=tokens, max_length=max_length)
        assert columns.keys() == {*found, "ches_problem"}
        for name, (value, scale) in found.items():
            assert abs(columns[name] - value) <= 1e-4 * scale, (row.get("id"), name, columns[name], value)
    return scores.num_scored, num_cut


@pytest.mark.parametrize("tokens", ["trainer", "reference"])
def test_measures_of_real_pairs_are_those_of_the_definition(stories260k, shared_data, tokens):
    with open(shared_data / "pref_hh_harmless.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in itertools.islice(file, 64)]
    num_scored, num_cut = assert_as_defined(stories260k, rows, tokens=tokens, max_length=512)
    assert num_scored > 48  # this tokenizer makes some prompts longer than the model's context
    assert num_cut > 0


@pytest.mark.parametrize("tokens", ["trainer", "reference"])
@pytest.mark.parametrize("max_length", [60, 256])
def test_measures_are_those_of_the_definition_where_replies_are_cut(tiny_model_folder, tiny_rows, tokens, max_length):
    rows = [
        {"prompt": row["messages"][:1], "chosen": row["messages"][1:], "rejected": other["messages"][1:] + more}
        for row, other in itertools.pairwise(tiny_rows)
        for more in ([], [{"role": "assistant", "content": "and so on"}])
        if tokens == "trainer" or not more
    ]
    num_scored, num_cut = assert_as_defined(tiny_model_folder, rows, tokens=tokens, max_length=max_length)
    assert num_scored > 0.7 * len(rows)
    assert (num_cut > 5) == (max_length == 60)


# --- tensors ---


def random_pair(seed, num_chosen, num_rejected, dim=7):
    rng = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(count, dim, generator=rng) for count in (num_chosen, num_rejected))


def by_formula(chosen_TD, rejected_TD, *, length_normalized=False):
    plus, minus = ((h.double().mean(0) if length_normalized else h.double().sum(0)) for h in (chosen_TD, rejected_TD))
    return (plus @ minus - plus @ plus).item()


def placed(hidden_TD, width, start, fill):
    """The embeddings as one row of a batch, from `start` on, and its mask."""
    row_TD = torch.full((width, hidden_TD.shape[1]), fill, dtype=hidden_TD.dtype)
    row_TD[start : start + len(hidden_TD)] = hidden_TD
    mask_T = torch.zeros(width, dtype=torch.int64)
    mask_T[start : start + len(hidden_TD)] = 1
    return row_TD, mask_T


LENGTHS = [(1, 1), (3, 8), (9, 2), (5, 5)]


@pytest.mark.parametrize("fill", [0.0, 1e30, torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("length_normalized", [False, True])
def test_what_stands_outside_the_masks_makes_no_difference(fill, side, length_normalized):
    pairs = [random_pair(n, *lengths) for n, lengths in enumerate(LENGTHS)]
    batches = []
    for which, width in ((0, 12), (1, 15)):
        starts = {"left": lambda h, w: w - len(h), "right": lambda h, w: 0, "both": lambda h, w: (w - len(h)) // 2}
        rows = [placed(pair[which], width, starts[side](pair[which], width), fill) for pair in pairs]
        batches.append([torch.stack(parts) for parts in zip(*rows, strict=True)])
    (chosen_BTD, chosen_mask_BT), (rejected_BTD, rejected_mask_BT) = batches
    scores_B = ches_scores(
        chosen_BTD, rejected_BTD, chosen_mask_BT, rejected_mask_BT, length_normalized=length_normalized
    )
    assert scores_B.dtype == torch.float64
    expected = [by_formula(*pair, length_normalized=length_normalized) for pair in pairs]
    torch.testing.assert_close(scores_B, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_numbers_worked_out_by_hand():
    chosen_BTD = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])  # S+ = (1, 2)
    rejected_BTD = torch.tensor([[[3.0, 0.0]]])  # S- = (3, 0)
    masks = torch.ones(1, 2), torch.ones(1, 1, dtype=torch.bool)
    assert ches_scores(chosen_BTD, rejected_BTD, *masks).tolist() == [3 - 5]
    assert ches_scores(chosen_BTD, rejected_BTD, *masks, length_normalized=True).tolist() == [3 / 2 - 5 / 4]
    terms = ches_terms(chosen_BTD[0], rejected_BTD[0])
    assert terms.chosen_T.tolist() == [-1, -4]
    assert terms.rejected_T.tolist() == [3]
    assert ln_ches_terms(terms).chosen_T.tolist() == [-1 / 4, -1]
    assert ln_ches_terms(terms).rejected_T.tolist() == [3 / 2]
    assert last_hidden(chosen_BTD[0], rejected_BTD[0]) == 0
    alpha_ij = torch.tensor([[1.0, 0.5, 2.0], [0.5, 1.0, 7.0]])
    # h+_1 h+_1 = 1, h+_2 h+_2 = 4, h+_1 h+_2 = 0, h+_1 h- = 3, h+_2 h- = 0
    assert alpha_ches_terms(chosen_BTD[0], rejected_BTD[0], alpha_ij).total == 2 * 3 - 1 - 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_states_are_summed_in_double(dtype):
    """Sums in their own dtype would be off by a percent, and beyond float16's range."""
    chosen_TD, rejected_TD = (60 * h.abs().to(dtype) for h in random_pair(0, 800, 700))
    expected = by_formula(chosen_TD, rejected_TD)
    masks = torch.ones(1, 800), torch.ones(1, 700)
    score = ches_scores(chosen_TD[None], rejected_TD[None], *masks).item()
    assert score == pytest.approx(expected, rel=1e-12)
    assert ches_terms(chosen_TD, rejected_TD).total == pytest.approx(expected, rel=1e-12)
    scale = float(chosen_TD[-1].double().norm() * rejected_TD[-1].double().norm())
    exact = float(chosen_TD[-1].double() @ rejected_TD[-1].double())
    assert abs(last_hidden(chosen_TD, rejected_TD) - exact) <= 1e-12 * scale


@given(num=st.integers(1, 30), seed=st.integers(0, 1000), length_normalized=st.booleans())
def test_a_reply_against_itself_scores_zero(num, seed, length_normalized):
    reply_TD, _ = random_pair(seed, num, 1)
    mask = torch.ones(1, num)
    assert ches_scores(reply_TD[None], reply_TD[None], mask, mask, length_normalized=length_normalized).item() == 0
    terms = ches_terms(reply_TD, reply_TD)
    assert terms.total == pytest.approx(0, abs=1e-9)
    assert ln_ches_terms(terms).total == pytest.approx(0, abs=1e-9)


@given(num_chosen=st.integers(1, 20), num_rejected=st.integers(1, 20), seed=st.integers(0, 1000))
def test_terms_of_tokens_sum_to_the_measure(num_chosen, num_rejected, seed):
    chosen_TD, rejected_TD = random_pair(seed, num_chosen, num_rejected)
    terms = ches_terms(chosen_TD, rejected_TD)
    assert (len(terms.chosen_T), len(terms.rejected_T)) == (num_chosen, num_rejected)
    assert terms.total == pytest.approx(by_formula(chosen_TD, rejected_TD), rel=1e-9, abs=1e-9)
    means = by_formula(chosen_TD, rejected_TD, length_normalized=True)
    assert ln_ches_terms(terms).total == pytest.approx(means, rel=1e-9, abs=1e-9)
    ones = torch.ones(num_chosen, num_chosen + num_rejected)
    weighted = alpha_ches_terms(chosen_TD, rejected_TD, ones)
    torch.testing.assert_close(weighted.chosen_T, terms.chosen_T)
    torch.testing.assert_close(weighted.rejected_T, terms.rejected_T)


def test_a_reply_without_a_position_has_no_score():
    chosen_TD, rejected_TD = random_pair(0, 3, 4)
    states = chosen_TD.repeat(2, 1, 1), rejected_TD.repeat(2, 1, 1)
    masks = torch.tensor([[1, 1, 1], [0, 0, 0]]), torch.ones(2, 4)
    for length_normalized in (False, True):
        score, missing = ches_scores(*states, *masks, length_normalized=length_normalized).tolist()
        assert score == pytest.approx(by_formula(chosen_TD, rejected_TD, length_normalized=length_normalized))
        assert missing != missing


B, T, D = 2, 3, 4


@pytest.mark.parametrize(
    ("chosen", "rejected", "chosen_mask", "rejected_mask"),
    [
        ((B, T, D), (B, T, D + 1), (B, T), (B, T)),
        ((B, T, D), (B + 1, T, D), (B, T), (B + 1, T)),
        ((1, T, D), (B, T, D), (1, T), (B, T)),
        ((B, T, D), (B, T, D), (B, T + 1), (B, T)),
        ((B, T, D), (B, T, D), (B, T), (B,)),
        ((B, T, D), (B, T, D), (B, T), (B, T, 1)),
        ((T, D), (T, D), (T,), (T,)),
        ((B, 1, T, D), (B, 1, T, D), (B, 1), (B, 1)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(chosen, rejected, chosen_mask, rejected_mask):
    tensors = [torch.ones(shape) for shape in (chosen, rejected, chosen_mask, rejected_mask)]
    with pytest.raises(SettingError, match="expected"):
        ches_scores(*tensors)


@given(
    one=st.lists(st.integers(0, 3), min_size=1, max_size=9), other=st.lists(st.integers(0, 3), min_size=1, max_size=9)
)
def test_edit_distance_is_levenshteins_over_the_longer_length(one, other):
    assert edit_distance(one, other) == pytest.approx(slow_edits(one, other) / max(len(one), len(other)))
    assert edit_distance(one, one) == 0
    assert length_difference(len(one), len(other)) == len(other) - len(one)
