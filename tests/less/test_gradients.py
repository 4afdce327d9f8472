"""Batched per-sample gradients against autograd, one row at a time."""

import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

from datastore.errors import CheckpointError, UnsupportedError
from less.adapters import adapted_model
from less.data.batching import BatchBudget, collate, plan_batches
from less.data.rendering import Rendered
from less.gradients import gradients_ref, per_sample_gradients, token_losses
from less.lm_head import find_unembedding
from less.models import ParamLayout, model_fingerprint

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
}
ARCHITECTURES = {
    "llama": LlamaConfig(**SMALL, intermediate_size=48, num_key_value_heads=2),
    "llama-tied": LlamaConfig(**SMALL, intermediate_size=48, tie_word_embeddings=True),
    "mistral": MistralConfig(**SMALL, intermediate_size=48, num_key_value_heads=2, sliding_window=8),
    "qwen2": Qwen2Config(**SMALL, intermediate_size=48, num_key_value_heads=2),
    "gemma2-softcap": Gemma2Config(
        **SMALL, intermediate_size=48, num_key_value_heads=2, head_dim=8, final_logit_softcapping=5.0
    ),
    "gpt-neox": GPTNeoXConfig(**SMALL, intermediate_size=48),
    "gpt2-conv1d": GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2),
}


def saved_adapter(config, folder: Path, **lora):
    """A random base model, and a checkpoint folder of an adapter with random A and B."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config).eval()
    settings = {"r": 4, "lora_alpha": 12, "lora_dropout": 0.3, "target_modules": "all-linear", **lora}
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return model.unload(), folder


def random_rows(lengths=(23, 7, 2, 15, 11), vocab_size=97) -> list[Rendered]:
    generator = torch.Generator().manual_seed(1)
    rows = []
    for length in lengths:
        ids = torch.randint(0, vocab_size, (length,), generator=generator).tolist()
        supervised = (torch.rand(length, generator=generator) < 0.5).tolist()
        rows.append(Rendered(ids, [False, *supervised[1:-1], True], False))
    return rows


def streamed(model, batch):
    blocks: dict[str, torch.Tensor] = {}
    losses_B = per_sample_gradients(model, batch, lambda name, grads_BP: blocks.update({name: grads_BP.clone()}))
    return losses_B, blocks


def relative_error(found: dict, expected: dict) -> float:
    """Worst row: ‖found - expected‖ / ‖expected‖ over all parameters."""
    found_BP = torch.cat([found[name] for name in expected], dim=1)
    expected_BP = torch.cat(list(expected.values()), dim=1)
    return ((found_BP - expected_BP).norm(dim=1) / expected_BP.norm(dim=1)).max().item()


@pytest.fixture
def adapted(tmp_path):
    base, folder = saved_adapter(ARCHITECTURES["llama"], tmp_path)
    with adapted_model(base, folder) as model:
        yield model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_equal_autograd_of_each_row_alone(name, tmp_path):
    base, folder = saved_adapter(ARCHITECTURES[name], tmp_path, fan_in_fan_out=name == "gpt2-conv1d")
    rows = random_rows()
    with adapted_model(base, folder) as model:
        batch = collate(rows, range(len(rows)), pad_id=0)
        losses_B, blocks = streamed(model, batch)
        expected_losses_B, expected = gradients_ref(model, batch)
    assert blocks.keys() == expected.keys()
    assert torch.allclose(losses_B, expected_losses_B, rtol=1e-5)
    assert relative_error(blocks, expected) < 1e-5


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_are_exact_where_the_logits_never_exist_at_once(name, tmp_path, monkeypatch):
    monkeypatch.setattr("less.lm_head._LOGITS_AT_ONCE", 5 * 97)
    base, folder = saved_adapter(ARCHITECTURES[name], tmp_path, fan_in_fan_out=name == "gpt2-conv1d")
    with adapted_model(base, folder) as model:
        batch = collate(random_rows(), range(5), pad_id=0)
        losses_B, blocks = streamed(model, batch)
        expected_losses_B, expected = gradients_ref(model, batch)
        assert find_unembedding(model, 6) is not None
    assert torch.allclose(losses_B, expected_losses_B, rtol=1e-5)
    assert relative_error(blocks, expected) < 1e-5


def test_gradients_of_a_model_whose_head_is_no_formula_are_exact_too(tmp_path, monkeypatch):
    monkeypatch.setattr("less.lm_head._LOGITS_AT_ONCE", 0)
    base, folder = saved_adapter(ARCHITECTURES["llama"], tmp_path)
    base.lm_head = torch.nn.Sequential(base.lm_head, torch.nn.Tanh())
    with adapted_model(base, folder) as model:
        batch = collate(random_rows(), range(5), pad_id=0)
        _, blocks = streamed(model, batch)
        assert relative_error(blocks, gradients_ref(model, batch)[1]) < 1e-5


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["o_proj"]},
        {"target_modules": ["down_proj", "v_proj"], "use_rslora": True},
        {"target_modules": ["k_proj", "up_proj"], "layers_to_transform": [1]},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 5}},
    ],
    ids=["one-module", "rslora", "last-layer", "ranks-by-module"],
)
def test_gradients_equal_autograd_for_every_shape_of_adapter(lora, tmp_path):
    base, folder = saved_adapter(ARCHITECTURES["llama"], tmp_path, **lora)
    with adapted_model(base, folder) as model:
        batch = collate(random_rows(), range(5), pad_id=0)
        _, blocks = streamed(model, batch)
        assert list(ParamLayout.of(model).names) == list(gradients_ref(model, batch)[1])
        assert relative_error(blocks, gradients_ref(model, batch)[1]) < 1e-5


@pytest.mark.parametrize("layers", ["last:1", "self_attn", r"layers\.0\..*(gate|down)_proj"])
def test_gradients_of_some_layers_are_those_of_all_and_no_other_layer_streams(adapted, layers):
    batch = collate(random_rows(), range(5), pad_id=0)
    own, blocks = ParamLayout.of(adapted, layers), {}
    losses_B = per_sample_gradients(adapted, batch, lambda name, g: blocks.__setitem__(name, g.clone()), own.layers)
    all_losses_B, all_blocks = streamed(adapted, batch)
    assert blocks.keys() == set(own.names) < all_blocks.keys()
    assert torch.equal(losses_B, all_losses_B)
    assert all(torch.equal(blocks[name], all_blocks[name]) for name in blocks)


def test_the_backward_pass_ends_at_the_first_layer_that_is_wanted(adapted):
    batch, has_graph = collate(random_rows(), range(5), pad_id=0), []
    hooks = [
        block.register_forward_hook(lambda *args: has_graph.append(args[-1].requires_grad))
        for block in adapted.get_base_model().model.layers
    ]
    per_sample_gradients(adapted, batch, lambda *_: None, ParamLayout.of(adapted, "last:1").layers)
    for hook in hooks:
        hook.remove()
    assert has_graph == [False, True]


@pytest.mark.parametrize("budget", [1, 24, 46, 1000])
def test_a_rows_gradient_does_not_depend_on_its_batch_mates(adapted, budget):
    rows = random_rows()
    alone = {row: streamed(adapted, collate(rows, [row], pad_id=0))[1] for row in range(len(rows))}
    for members in plan_batches([row.num_tokens for row in rows], BatchBudget(max_tokens=budget, overhead=1000)):
        _, blocks = streamed(adapted, collate(rows, members, pad_id=0))
        for at, row in enumerate(members):
            own = {name: grads_BP[at : at + 1] for name, grads_BP in blocks.items()}
            assert relative_error(own, alone[row]) < 1e-5


def test_gradients_do_not_depend_on_the_padding_side_or_id(adapted):
    rows = random_rows()
    right = streamed(adapted, collate(rows, range(5), pad_id=0))
    for batch in (
        collate(rows, range(5), pad_id=0, padding_side="left"),
        collate(rows, range(5), pad_id=42),
    ):
        losses_B, blocks = streamed(adapted, batch)
        assert torch.allclose(losses_B, right[0], rtol=1e-5)
        assert relative_error(blocks, right[1]) < 1e-5


def test_blocks_come_last_layer_first_and_one_at_a_time(adapted):
    names: list[str] = []
    per_sample_gradients(adapted, collate(random_rows(), range(5), pad_id=0), lambda name, _: names.append(name))
    layers = [int(name.split(".layers.")[1].split(".")[0]) for name in names]
    assert layers == sorted(layers, reverse=True)
    assert len(names) == len(set(names)) == len(ParamLayout.of(adapted).names)


def test_nothing_is_left_behind_on_the_model(adapted):
    before = {name: p.requires_grad for name, p in adapted.named_parameters()}
    streamed(adapted, collate(random_rows(), range(5), pad_id=0))
    assert {name: p.requires_grad for name, p in adapted.named_parameters()} == before
    assert all(p.grad is None for p in adapted.parameters())
    assert all("forward" not in vars(module) for module in adapted.modules())
    assert not any(module._forward_pre_hooks for module in adapted.modules())


def test_the_base_model_is_given_back_as_it_was(tmp_path):
    base, folder = saved_adapter(ARCHITECTURES["llama"], tmp_path)
    base.requires_grad_(True)
    before, names = model_fingerprint(base), [name for name, _ in base.named_parameters()]
    with adapted_model(base, folder) as model:
        assert model_fingerprint(model) == before
    assert model_fingerprint(base) == before
    assert [name for name, _ in base.named_parameters()] == names
    assert all(p.requires_grad for p in base.parameters())


def test_the_loss_is_the_mean_over_a_rows_supervised_tokens(adapted):
    rows = random_rows()
    batch = collate(rows, range(5), pad_id=0)
    labels_BT = batch.input_ids_BT.masked_fill(~batch.supervised_BT, -100)
    expected = []
    for at, row in enumerate(rows):
        one = {
            "input_ids": batch.input_ids_BT[at : at + 1, : row.num_tokens],
            "labels": labels_BT[at : at + 1, : row.num_tokens],
        }
        expected.append(adapted(**one).loss.item())
    assert token_losses(adapted, batch, None).tolist() == pytest.approx(expected, rel=1e-5)


def test_bfloat16_weights_keep_float32_gradients_near_the_exact_ones(tmp_path):
    base, folder = saved_adapter(ARCHITECTURES["llama"], tmp_path)
    batch = collate(random_rows(), range(5), pad_id=0)
    with adapted_model(base, folder) as model:
        _, exact = streamed(model, batch)
    with adapted_model(base.to(torch.bfloat16), folder) as model:
        _, blocks = streamed(model, batch)
    assert all(grads_BP.dtype == torch.float32 for grads_BP in blocks.values())
    assert relative_error(blocks, exact) < 0.1


@pytest.mark.parametrize(
    ("lora", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "Embedding"),
        ({"target_modules": ["lm_head", "q_proj"]}, "LM head"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    ],
)
def test_an_adapter_that_hooks_cannot_see_is_refused_by_name(lora, named, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT has its own doubts about some of these
        base, folder = saved_adapter(ARCHITECTURES["llama"], tmp_path, **lora)
    with pytest.raises(UnsupportedError, match=named), adapted_model(base, folder):
        pass


def test_routed_experts_are_refused(tmp_path):
    config = AutoConfig.for_model(
        "qwen2_moe", **SMALL, intermediate_size=48, moe_intermediate_size=16, shared_expert_intermediate_size=16,
        num_experts=4, num_experts_per_tok=2, num_key_value_heads=2,
    )  # fmt: skip
    base, folder = saved_adapter(config, tmp_path)
    batch = collate(random_rows(), range(5), pad_id=0)
    with adapted_model(base, folder) as model, pytest.raises(UnsupportedError):
        streamed(model, batch)


def test_a_layer_called_twice_is_refused(adapted):
    layers = adapted.get_base_model().model.layers
    layers[1].mlp = layers[0].mlp
    with pytest.raises(UnsupportedError, match="twice"):
        streamed(adapted, collate(random_rows(), range(5), pad_id=0))


def test_an_adapter_of_another_model_is_refused(tmp_path):
    _, folder = saved_adapter(ARCHITECTURES["llama"], tmp_path)
    wider = LlamaConfig(**{**SMALL, "hidden_size": 64}, intermediate_size=48, num_key_value_heads=2)
    base = AutoModelForCausalLM.from_config(wider)
    with pytest.raises(CheckpointError, match=r"shape.*right base model"), adapted_model(base, folder):
        pass


@pytest.mark.gpu
def test_gradients_on_cuda_equal_those_on_the_cpu(tmp_path):
    base, folder = saved_adapter(ARCHITECTURES["llama"], tmp_path)
    batch = collate(random_rows(), range(5), pad_id=0)
    with adapted_model(base, folder) as model:
        _, expected = streamed(model, batch)
    with adapted_model(base.cuda(), folder) as model:
        _, found = streamed(model, batch.to("cuda"))
    assert relative_error({name: g.cpu() for name, g in found.items()}, expected) < 1e-4
