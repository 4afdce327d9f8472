"""One forward pass over a batch gives what two forwards over each pair alone give, in every kind of model."""

import random
from contextlib import contextmanager

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from ches import embeddings as module
from ches.embeddings import can_share_prompts, embed_replies, embed_replies_ref, sequence_tokens
from ches.tokens import PairTokens, Reply
from datastore.errors import UnsupportedError
from less.lm_head import lm_head

VOCABULARY = 61
SIZE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
GPT_NEO = {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
HYBRID = {
    "num_hidden_layers": 4, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
# Longest pair of `SIZES`: 90 tokens, more than any of these has positions; longest prompt with one reply: 60.
SHARING = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 100, "attn_implementation": "eager"},
    "gemma2, window of 16": {"head_dim": 8, "sliding_window": 16, "attn_implementation": "eager"},
    "gemma3_text": {"head_dim": 8, "sliding_window": 100, "num_hidden_layers": 6},
    "gemma3_text, window of 16": {"head_dim": 8, "sliding_window": 16, "num_hidden_layers": 6},
    "mistral, window of 16": {"sliding_window": 16},
    "llama4_text, chunks of 16": {"attention_chunk_size": 16, "head_dim": 8, "num_local_experts": 2},
    "gpt_neo, window of 16": {**GPT_NEO, "window_size": 16},
    "gpt_neo": {**GPT_NEO, "window_size": 64},
    "gpt2": GPT2,
    "opt": {"ffn_dim": 48, "init_std": 0.2, "word_embed_proj_dim": 16},
    "phi3": {},
    "gpt_neox": {},
    "cohere": {},
    "granite": {"logits_scaling": 8.0},
    "olmo2": {},
    "mixtral": {"num_local_experts": 4},
}
APART = {
    "mamba": {"state_size": 8},
    "qwen3_next": HYBRID,
    "lfm2": {"block_ff_dim": 48, "layer_types": ["conv", "full_attention"]},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
}
SIZES = [(1, 1, 1), (7, 1, 20), (3, 20, 1), (0, 4, 5), (12, 9, 13), (20, 18, 19), (1, 2, 3), (5, 3, 2), (30, 30, 30)]
"""Tokens of prompt, chosen and rejected."""


def build(name):
    fields = {**SIZE, **{**SHARING, **APART}[name]}
    options = {key: fields.pop(key) for key in ("attn_implementation",) if key in fields}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(name.split(",")[0], **fields)
        return AutoModelForCausalLM.from_config(config, **options).eval()


def pair_of_sizes(prompt, chosen, rejected, seed=0, holes=False):
    rng = random.Random(seed)

    def ids(count):
        return [rng.randrange(1, VOCABULARY) for _ in range(count)]

    prompt_ids = ids(prompt)

    def reply(count):
        counted = [not holes or rng.random() < 0.6 for _ in range(count)]
        counted[-1] = True
        if not prompt_ids:
            counted[0] = False
        return Reply(input_ids=ids(count), counted=counted, truncated=False)

    return PairTokens(prompt_ids=prompt_ids, chosen=reply(chosen), rejected=reply(rejected))


PAIRS = [pair_of_sizes(*sizes, seed=n, holes=n % 2 == 1) for n, sizes in enumerate(SIZES)]


def assert_as_reference(model, pairs, embeddings, tolerance=1e-5):
    assert embeddings.sizes == [(pair.chosen.num_counted, pair.rejected.num_counted) for pair in pairs]
    assert embeddings.token_S.tolist() == [
        token for pair in pairs for reply in (pair.chosen, pair.rejected) for token in reply.counted_ids
    ]
    assert len(embeddings.hidden_SD) == len(embeddings.token_S)
    for pair, found in zip(pairs, embeddings.pairs, strict=True):
        for ours, theirs in zip(found, embed_replies_ref(model, pair), strict=True):
            assert ours.shape == theirs.shape
            assert ours.dtype == theirs.dtype
            error = (ours.float() - theirs.float()).norm(dim=1)
            assert (error <= tolerance * theirs.float().norm(dim=1)).all(), (len(pair.prompt_ids), error)


@pytest.fixture(scope="module")
def llama():
    return build("llama")


@pytest.mark.parametrize("name", [*SHARING, *APART])
def test_a_batch_gives_the_embeddings_of_each_pair_alone(name):
    model = build(name)
    sharing = can_share_prompts(model)
    assert sharing == (name in SHARING)
    assert_as_reference(model, PAIRS, embed_replies(model, PAIRS, share_prompts=sharing))


@pytest.mark.parametrize("name", ["mamba", "qwen3_next", "lfm2"])
def test_a_model_that_mixes_tokens_in_passing_never_shares_prompts_however_weakly_it_does(name):
    model = build(name)
    with torch.no_grad():  # as freshly initialised: what passes from token to token changes them by less than 0.1%
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter *= 0.1
    assert not can_share_prompts(model)


def test_embeddings_are_the_input_of_the_head_where_the_token_before_stands(llama):
    pair = PairTokens(
        prompt_ids=[7, 8],
        chosen=Reply(input_ids=[9, 10, 11], counted=[True, False, True], truncated=False),
        rejected=Reply(input_ids=[12], counted=[True], truncated=False),
    )
    (found,) = embed_replies(llama, [pair], share_prompts=True).pairs
    for ids, places, ours in (([7, 8, 9, 10, 11], [1, 3], found[0]), ([7, 8, 12], [1], found[1])):
        states_1TD = llama.model(input_ids=torch.tensor([ids])).last_hidden_state
        torch.testing.assert_close(ours, states_1TD[0, places], rtol=1e-5, atol=1e-6)


@given(
    sizes=st.lists(st.tuples(st.integers(0, 9), st.integers(2, 9), st.integers(2, 9)), min_size=1, max_size=6),
    seed=st.integers(0, 1000),
    holes=st.booleans(),
    sharing=st.booleans(),
    side=st.sampled_from(["left", "right"]),
)
@settings(max_examples=40, deadline=None)
def test_batch_order_padding_side_and_sharing_change_nothing(llama, sizes, seed, holes, sharing, side):
    pairs = [pair_of_sizes(*triple, seed=seed + n, holes=holes) for n, triple in enumerate(sizes)]
    assert_as_reference(llama, pairs, embed_replies(llama, pairs, share_prompts=sharing, padding_side=side))


@pytest.mark.parametrize("sharing", [True, False])
@pytest.mark.parametrize("name", ["gpt2", "opt", "gemma2", "gemma2, window of 16"])
def test_padding_side_changes_nothing_where_positions_or_windows_could_be_miscounted(name, sharing):
    model = build(name)
    assert_as_reference(model, PAIRS, embed_replies(model, PAIRS, share_prompts=sharing, padding_side="left"))


def test_prompts_are_shared_only_in_a_batch_whose_pairs_all_fit_the_window(monkeypatch):
    model, widths = build("mistral, window of 16"), []
    keep = module._attention_bias
    monkeypatch.setattr(
        module, "_attention_bias", lambda part, dtype: widths.append(part.shape[1]) or keep(part, dtype)
    )
    fits, too_long = pair_of_sizes(6, 5, 5, seed=1), pair_of_sizes(6, 5, 6, seed=2)
    for batch, expected in (([fits], [16]), ([too_long], []), ([fits, too_long], [])):
        widths.clear()
        assert_as_reference(model, batch, embed_replies(model, batch, share_prompts=True))
        assert widths == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_position_sees_one_at_least_padding_too(dtype):
    """Else a softmax over nothing: NaN, which no weight of zero takes out again."""
    part_BT = torch.tensor([[0, 0, 1, 1, 2, -1, -1], [-1, -1, -1, 0, 1, 2, 2], [1, 1, 1, 2, 2, -1, -1]])
    bias_B1TT = module._attention_bias(part_BT, dtype)
    assert bias_B1TT.dtype == dtype
    assert (bias_B1TT.amax(dim=-1) == 0).all()
    assert (bias_B1TT[0, 0, 4] == 0).tolist() == [True, True, False, False, True, False, False]


def test_bfloat16_is_near_to_float32(llama):
    half = build("llama").to(torch.bfloat16)
    assert can_share_prompts(half)
    for sharing in (True, False):
        found = embed_replies(half, PAIRS, share_prompts=sharing)
        assert found.hidden_SD.dtype == torch.bfloat16
        for pair, ours in zip(PAIRS, found.pairs, strict=True):
            for half_TD, whole_TD in zip(ours, embed_replies_ref(llama, pair), strict=True):
                assert (half_TD.float() - whole_TD).norm() <= 0.05 * whole_TD.norm() + 1e-6


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"], ["q_proj", "embed_tokens"]])
def test_an_adapter_takes_part(llama, targets):
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=targets, init_lora_weights=False, lora_alpha=64)
    model = peft.get_peft_model(build("llama"), config).eval()
    assert can_share_prompts(model)
    found = embed_replies(model, PAIRS, share_prompts=True)
    assert_as_reference(model, PAIRS, found)
    assert (found.hidden_SD - embed_replies(llama, PAIRS, share_prompts=True).hidden_SD).norm() > 1


def test_prefix_tuning_takes_part_with_prompts_apart():
    model = peft.get_peft_model(
        build("llama"), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    ).eval()
    with ignoring_advice():
        sharing = can_share_prompts(model)
        assert not sharing
        assert_as_reference(model, PAIRS, embed_replies(model, PAIRS, share_prompts=sharing))


def test_tokens_put_before_the_sequence_are_refused():
    model = peft.get_peft_model(
        build("llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    ).eval()
    with ignoring_advice(), pytest.raises(UnsupportedError, match="tokens of its own"):
        can_share_prompts(model)
    with ignoring_advice(), pytest.raises(UnsupportedError, match="tokens of its own"):
        embed_replies(model, PAIRS[:2], share_prompts=False)


@contextmanager
def ignoring_advice():
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Position ids are not supported", UserWarning)
        yield


def test_the_head_is_given_no_position_and_left_without_hooks(llama):
    seen = []
    spy = lm_head(llama).register_forward_hook(lambda _, args, logits: seen.append(logits.numel()))
    embed_replies(llama, PAIRS, share_prompts=True)
    spy.remove()
    assert seen == [0]
    assert not lm_head(llama)._forward_pre_hooks


def test_a_model_without_a_head_is_refused():
    bare = AutoModel.from_config(AutoConfig.for_model("llama", **SIZE))
    with pytest.raises(UnsupportedError, match="no LM head"):
        can_share_prompts(bare)


def test_a_failing_forward_pass_leaves_no_hook(llama, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no")

    monkeypatch.setattr(llama.model, "forward", fail)
    with pytest.raises(RuntimeError, match="no"):
        embed_replies(llama, PAIRS, share_prompts=True)
    assert not lm_head(llama)._forward_pre_hooks


def test_no_gradient_is_kept(llama):
    assert not embed_replies(llama, PAIRS, share_prompts=True).hidden_SD.requires_grad
    assert all(isinstance(p, nn.Parameter) and p.grad is None for p in llama.parameters())


def test_the_budget_counts_the_padded_tokens_of_a_pair():
    pair = pair_of_sizes(10, 4, 7)
    assert sequence_tokens(pair, share_prompts=True) == 10 + 4 + 7
    assert sequence_tokens(pair, share_prompts=False) == 2 * (10 + 7)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma2, window of 16", "qwen3_next"])
@pytest.mark.parametrize("sharing", [True, False])
def test_a_gpu_gives_the_embeddings_of_the_cpu(name, sharing):
    model = build(name)
    sharing = sharing and can_share_prompts(model)
    expected = embed_replies(model, PAIRS[:-1], share_prompts=sharing).hidden_SD
    found = embed_replies(model.cuda(), PAIRS[:-1], share_prompts=sharing).hidden_SD.cpu()
    assert (found - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.gpu
def test_a_gpu_shares_prompts_in_either_dtype():
    model = build("llama").cuda()
    assert can_share_prompts(model)
    assert can_share_prompts(model.bfloat16())
