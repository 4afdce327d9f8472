"""The loss made a few tokens at a time is the loss, and so is its gradient; another kind of head keeps its own way."""

import pytest
import torch
from torch import nn

from less import lm_head as module
from less.lm_head import Unembedding, find_unembedding, linear_cross_entropy, linear_cross_entropy_ref, lm_head

HEADS = {
    "plain": {"scale": 1.0, "cap": None},
    "scaled": {"scale": 0.3, "cap": None},
    "capped": {"scale": 1.0, "cap": 4.0},
    "scaled and capped": {"scale": 2.0, "cap": 3.0},
}

MANY = 10**6


def case(num_tokens, *, bias=False, dtype=torch.float32, vocabulary=101, **head):
    generator = torch.Generator().manual_seed(num_tokens)
    weight_VD = torch.randn(vocabulary, 17, generator=generator).to(dtype)
    bias_V = torch.randn(vocabulary, generator=generator).to(dtype) if bias else None
    hidden_SD = torch.randn(num_tokens, 17, generator=generator).to(dtype).requires_grad_()
    token_S = torch.randint(0, vocabulary, (num_tokens,), generator=generator)
    return Unembedding(weight_VD=weight_VD, bias_V=bias_V, **head), hidden_SD, token_S


def gradient(loss, head, hidden_SD, token_S):
    nll_S = loss(head, hidden_SD, token_S)
    weight_S = torch.linspace(-1, 2, len(token_S))
    return nll_S.detach(), torch.autograd.grad((nll_S * weight_S).sum(), hidden_SD)[0]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("num_tokens", [1, 2, 63])
def test_loss_and_gradient_are_those_of_all_logits_at_once(name, num_tokens, bias, monkeypatch):
    monkeypatch.setattr(module, "_LOGITS_AT_ONCE", 5 * 101)
    found = gradient(linear_cross_entropy, *case(num_tokens, bias=bias, **HEADS[name]))
    expected = gradient(linear_cross_entropy_ref, *case(num_tokens, bias=bias, **HEADS[name]))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=5e-6)


def test_bfloat16_is_as_exact_as_all_logits_at_once():
    found = gradient(linear_cross_entropy, *case(40, dtype=torch.bfloat16, **HEADS["plain"]))
    expected = gradient(linear_cross_entropy_ref, *case(40, dtype=torch.bfloat16, **HEADS["plain"]))
    assert found[0].dtype == torch.float32
    assert found[1].dtype == torch.bfloat16
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    assert (found[1] - expected[1]).float().norm() < 0.01 * expected[1].float().norm()


def test_no_more_logits_exist_at_a_time_than_are_allowed(monkeypatch):
    monkeypatch.setattr(module, "_LOGITS_AT_ONCE", 7 * 101 + 3)
    sizes, whole = [], Unembedding.logits
    monkeypatch.setattr(Unembedding, "logits", lambda *args: sizes.append(len(whole(*args))) or whole(*args))
    linear_cross_entropy(*case(50, **HEADS["plain"]))
    assert sizes == [7] * 7 + [1]


def test_without_a_graph_no_gradient_is_made():
    with torch.no_grad():
        assert not linear_cross_entropy(*case(9, **HEADS["plain"])).requires_grad


def test_a_head_that_is_no_formula_is_none_and_is_tried_out_once(tiny_model, monkeypatch):
    tiny_model.lm_head = nn.Sequential(tiny_model.lm_head, nn.Softplus())
    assert find_unembedding(tiny_model, MANY) is None
    monkeypatch.setattr(Unembedding, "of", None)
    assert find_unembedding(tiny_model, MANY) is None


def test_the_formula_is_for_many_logits_only(tiny_model):
    most = module._LOGITS_AT_ONCE // tiny_model.config.vocab_size
    assert find_unembedding(tiny_model, most) is None
    assert find_unembedding(tiny_model, most + 1) is not None


def test_a_known_head_has_the_weights_of_now(tiny_model):
    assert torch.equal(find_unembedding(tiny_model, MANY).weight_VD, tiny_model.lm_head.weight)
    with torch.no_grad():
        lm_head(tiny_model).weight.mul_(3)
    assert torch.equal(find_unembedding(tiny_model, MANY).weight_VD, tiny_model.lm_head.weight)


def test_trying_out_draws_no_random_numbers_and_leaves_every_mode_as_it_was(tiny_model):
    tiny_model.train()
    tiny_model.model.layers[0].eval()
    modes, state = [m.training for m in tiny_model.modules()], torch.get_rng_state()
    tiny_model.model.layers[1].self_attn.attention_dropout = 0.5
    Unembedding.of(tiny_model)
    assert [m.training for m in tiny_model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
