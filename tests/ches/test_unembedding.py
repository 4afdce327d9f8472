"""Log-probabilities and alpha are those of the model's own logits, whatever the head and the blocks."""

import random

import peft
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from ches import unembedding as module
from ches.embeddings import Embeddings, embed_replies
from ches.measures import alpha_ches_terms
from ches.tokens import PairTokens, Reply
from ches.unembedding import residual_products, residual_products_ref
from datastore.errors import UnsupportedError
from less.lm_head import Unembedding, lm_head

VOCABULARY = 601  # no multiple of the least block of 256
SIZE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
HEADS = {
    "plain": ("llama", {}),
    "soft cap": ("gemma2", {"final_logit_softcapping": 2.0, "head_dim": 8, "attn_implementation": "eager"}),
    "scaled": ("cohere", {"logit_scale": 0.4}),
    "divided": ("granite", {"logits_scaling": 3.0}),
    "bias": ("phi", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
}


def build(name):
    kind, more = HEADS[name]
    fields = {**SIZE, **more}
    options = {key: fields.pop(key) for key in ("attn_implementation",) if key in fields}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields), **options).eval()
        if lm_head(model).bias is not None:
            nn.init.normal_(lm_head(model).bias)
    return model


@pytest.fixture(scope="module", params=HEADS)
def model(request):
    return build(request.param)


def reply(*ids):
    return Reply(input_ids=list(ids), counted=[True] * len(ids), truncated=False)


def long_pair(num_prompt, num_chosen, num_rejected):
    rng = random.Random(0)
    prompt, chosen, rejected = (
        [rng.randrange(VOCABULARY) for _ in range(n)] for n in (num_prompt, num_chosen, num_rejected)
    )
    return PairTokens(prompt_ids=prompt, chosen=reply(*chosen), rejected=reply(*rejected))


PAIRS = [
    PairTokens(prompt_ids=[3, 5], chosen=reply(7), rejected=reply(600)),
    PairTokens(prompt_ids=[4], chosen=reply(9, 9, 9, 2), rejected=reply(9, 2, 9)),  # tokens that repeat
    PairTokens(prompt_ids=[6, 6], chosen=reply(8, 0), rejected=reply(8, 0, 8, 8, 0, 255, 256)),
    long_pair(5, 13, 21),
]


def tokens_of(pair):
    """Of the chosen and the rejected reply, the ids of the whole sequence and how many the prompt has."""
    return [(pair.prompt_ids + r.input_ids, len(pair.prompt_ids)) for r in (pair.chosen, pair.rejected)]


def log_probs(model, ids, start):
    """Of the tokens from `start` on, by the model's own logits, with their graph."""
    logits_TV = model(input_ids=torch.tensor([ids])).logits[0].double()
    targets = torch.tensor(ids[start:])
    return logits_TV.log_softmax(-1)[start - 1 : -1].gather(1, targets[:, None])[:, 0]


def whole_products(chosen_TD, alpha, rejected_TD):
    """Size of the two terms of alpha_ches, against which an error is to be judged."""
    products_ij = chosen_TD.double() @ torch.cat([chosen_TD, rejected_TD]).double().T * alpha
    own, other = products_ij[:, : len(chosen_TD)].sum(), products_ij[:, len(chosen_TD) :].sum()
    return float(own.abs() + other.abs())


@pytest.mark.parametrize("block_values", [1, 300 * 55, 2**22])
def test_any_block_gives_the_whole_residuals(model, block_values, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_VALUES", block_values)
    head, embeddings = Unembedding.of(model), embed_replies(model, PAIRS, share_prompts=True)
    log_probs_S, alphas = residual_products(head, embeddings)
    expected_S, expected = residual_products_ref(head, embeddings)
    torch.testing.assert_close(log_probs_S, expected_S, rtol=1e-5, atol=1e-5)
    assert len(alphas) == len(PAIRS)
    for pair, ours, theirs in zip(PAIRS, alphas, expected, strict=True):
        assert ours.dtype == torch.float64
        assert ours.shape == (pair.chosen.num_counted, pair.chosen.num_counted + pair.rejected.num_counted)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_log_probs_are_those_of_the_model_with_and_without_alpha(model):
    embeddings = embed_replies(model, PAIRS, share_prompts=True)
    expected_S = torch.cat([log_probs(model, *tokens) for pair in PAIRS for tokens in tokens_of(pair)]).float()
    for alphas in (True, False):
        log_probs_S, found = residual_products(Unembedding.of(model), embeddings, alphas=alphas)
        torch.testing.assert_close(log_probs_S, expected_S.detach(), rtol=1e-5, atol=1e-5)
        assert (found is not None) == alphas


@pytest.mark.parametrize("name", ["plain", "soft cap", "scaled", "divided", "bias"])
def test_alpha_ches_is_the_inner_product_of_the_gradients_of_the_head(name):
    model = build(name)
    weight = lm_head(model).weight
    assert weight is not model.get_input_embeddings().weight
    embeddings = embed_replies(model, PAIRS, share_prompts=True)
    _, alphas = residual_products(Unembedding.of(model), embeddings)
    for pair, alpha, (chosen_TD, rejected_TD) in zip(PAIRS, alphas, embeddings.pairs, strict=True):
        plus, minus = (
            torch.autograd.grad(log_probs(model, *tokens).sum(), weight)[0].double() for tokens in tokens_of(pair)
        )
        expected = float((plus * (minus - plus)).sum())
        scale = float((plus * minus).sum().abs() + (plus * plus).sum())
        assert scale > 1e-3
        found = alpha_ches_terms(chosen_TD, rejected_TD, alpha).total
        assert abs(found - expected) <= 1e-4 * scale
        assert abs(scale - whole_products(chosen_TD, alpha, rejected_TD)) <= 1e-4 * scale


def test_the_heads_under_test_are_what_their_names_say():
    """Were caps, scales and biases without effect here, the other tests would show little."""
    heads = {name: Unembedding.of(build(name)) for name in HEADS}
    assert heads["soft cap"].cap == 2.0
    assert heads["scaled"].scale == 0.4
    assert heads["divided"].scale == pytest.approx(1 / 3)
    assert heads["bias"].bias_V.norm() > 1
    capped, model = heads["soft cap"], build("soft cap")
    hidden_SD = embed_replies(model, PAIRS, share_prompts=True).hidden_SD
    logits_SV = capped.logits(hidden_SD)
    assert logits_SV.abs().max() > 1.9
    slopes_SV = capped.slopes(logits_SV)
    assert 0 <= slopes_SV.min() < 0.1 < 0.9 < slopes_SV.max() <= 1


@pytest.mark.parametrize("cap", [None, 1.5])
def test_slopes_are_the_derivative_of_the_logits(cap):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weight_VD, bias_V, hidden_SD = torch.randn(9, 4), torch.randn(9), torch.randn(5, 4)
    head = Unembedding(weight_VD=weight_VD, bias_V=bias_V, scale=0.7, cap=cap)
    scores_SV = (hidden_SD @ weight_VD.T + bias_V).requires_grad_()
    logits_SV = 0.7 * scores_SV if cap is None else cap * torch.tanh(0.7 * scores_SV / cap)
    torch.testing.assert_close(head.logits(hidden_SD), logits_SV.detach())
    (expected_SV,) = torch.autograd.grad(logits_SV.sum(), scores_SV)
    slopes_SV = torch.as_tensor(head.slopes(logits_SV.detach())).expand_as(expected_SV)
    torch.testing.assert_close(slopes_SV, expected_SV, rtol=1e-4, atol=1e-6)


def test_identical_replies_give_alpha_ches_of_zero_and_alpha_within_its_bounds():
    model = build("plain")
    head = Unembedding.of(model)
    embeddings = embed_replies(model, [PairTokens(prompt_ids=[4], chosen=reply(9, 2, 7), rejected=reply(9, 2, 7))],
                               share_prompts=False)  # fmt: skip
    _, (alpha,) = residual_products(head, embeddings)
    assert ((alpha >= -2) & (alpha <= 2)).all()
    ((chosen_TD, rejected_TD),) = embeddings.pairs
    size = whole_products(chosen_TD, alpha, rejected_TD)
    assert abs(alpha_ches_terms(chosen_TD, rejected_TD, alpha).total) <= 1e-6 * size


def test_a_certain_and_a_hopeless_prediction_stay_finite():
    """Probabilities that round to one and to zero, and logits far beyond what exp can hold."""
    weight_VD = torch.zeros(VOCABULARY, 2)
    weight_VD[5, 0], weight_VD[6, 1] = 1, 1
    head = Unembedding(weight_VD=weight_VD, bias_V=None, scale=1.0, cap=None)
    hidden_SD = torch.tensor([[500.0, 0.0], [0.0, 500.0], [500.0, 0.0], [-500.0, -500.0]])
    embeddings = Embeddings(hidden_SD=hidden_SD, token_S=torch.tensor([5, 5, 6, 600]), sizes=[(2, 2)])
    log_probs_S, (alpha,) = residual_products(head, embeddings)
    expected_S, (expected,) = residual_products_ref(head, embeddings)
    torch.testing.assert_close(log_probs_S, expected_S)
    torch.testing.assert_close(alpha, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(alpha[:, :3], torch.tensor([[0.0, 0, 0], [0, 2, -2]], dtype=torch.float64))


def test_no_block_of_logits_is_larger_than_its_limit(monkeypatch):
    model = build("plain")
    head, embeddings = Unembedding.of(model), embed_replies(model, PAIRS, share_prompts=True)
    num_tokens, sizes = len(embeddings.token_S), []
    for name in ("logits", "logits_of"):
        whole = getattr(Unembedding, name)

        def watched(self, *args, whole=whole):
            result = whole(self, *args)
            sizes.append(result.numel())
            return result

        monkeypatch.setattr(Unembedding, name, watched)
    for limit in (2**22, 400 * num_tokens, 1):
        monkeypatch.setattr(module, "_BLOCK_VALUES", limit)
        sizes.clear()
        residual_products(head, embeddings)
        assert max(sizes) <= max(limit, 256 * num_tokens)
        if limit < VOCABULARY * num_tokens:
            assert max(sizes) < VOCABULARY * num_tokens


def test_bfloat16_heads_are_read_in_their_own_dtype():
    model = build("soft cap").to(torch.bfloat16)
    head, embeddings = Unembedding.of(model), embed_replies(model, PAIRS, share_prompts=False)
    assert head.weight_VD.dtype == torch.bfloat16
    log_probs_S, alphas = residual_products(head, embeddings)
    assert log_probs_S.dtype == torch.float32
    expected_S, expected = residual_products_ref(head, embeddings)
    torch.testing.assert_close(log_probs_S, expected_S, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(alphas, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


class Tempered(LlamaForCausalLM):
    """A head with a scale that no field of the configuration tells."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 1.02
        return out


def sequential():
    model = build("plain")
    model.set_output_embeddings(nn.Sequential(lm_head(model)))
    return model


def lora_on_the_head():
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"], init_lora_weights=False)
    return peft.get_peft_model(build("plain"), config).eval()


def tempered():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Tempered(AutoConfig.for_model("llama", **SIZE)).eval()


def told_of_a_cap_it_has_not():
    model = build("plain")
    model.config.final_logit_softcapping = 2.0
    return model


@pytest.mark.parametrize("make", [sequential, lora_on_the_head, tempered, told_of_a_cap_it_has_not])
def test_a_head_that_the_formula_does_not_fit_is_refused_by_name(make):
    model = make()
    with pytest.raises(UnsupportedError, match=f"{type(model).__name__}: .*alpha_ches and logp .*--measures"):
        Unembedding.of(model)
    assert not lm_head(model)._forward_pre_hooks
