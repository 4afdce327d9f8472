"""Checkpoints as anyone's trainer makes them: found, weighed, their moments put on the right parameter."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from datastore.errors import CheckpointError, OptimizerStateError, SettingError
from less.adapters import adapted_model
from less.checkpoints import Checkpoint, EvidenceWarning, find_checkpoints
from less.models import ParamLayout, lora_parameters
from less.moments import AdamState, load_adam_state

TOKENS = (torch.arange(96).reshape(12, 8) % 60).tolist()
ROWS = [{"input_ids": ids, "labels": ids} for ids in TOKENS]


class Wrapped(nn.Module):
    """A linear layer under a name that the Trainer's grouping takes for a bias or a norm."""

    def __init__(self, name: str, inner: nn.Linear) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, inner)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.get_submodule(self.name)(x)


def tiny_llama(odd_names: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if odd_names:
        first, second = model.model.layers
        first.mlp.up_proj = Wrapped("bias_head", first.mlp.up_proj)
        first.self_attn.q_proj = Wrapped("norm_proj", first.self_attn.q_proj)
        second.mlp.down_proj = Wrapped("in_norm", second.mlp.down_proj)
    return model


def lora(**settings: object) -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", **({"r": 2, "target_modules": "all-linear"} | settings))


def arguments(output: Path, **settings: object) -> dict[str, object]:
    return {
        "output_dir": str(output), "num_train_epochs": 2, "per_device_train_batch_size": 4,
        "learning_rate": 1e-2, "warmup_steps": 1, "logging_steps": 1, "save_strategy": "epoch",
        "report_to": "none", "disable_tqdm": True, "use_cpu": True,
    } | settings  # fmt: skip


def train(output: Path, *, odd_names: bool = False, adapter: str = "default", **settings: object) -> Trainer:
    model = get_peft_model(tiny_llama(odd_names), lora(), adapter_name=adapter)
    trainer = Trainer(model=model, args=TrainingArguments(**arguments(output, **settings)), train_dataset=ROWS)
    trainer.train()
    return trainer


def load(checkpoint: Checkpoint, base: LlamaForCausalLM | None = None) -> AdamState:
    with adapted_model(base or tiny_llama(), checkpoint.path) as model:
        return load_adam_state(checkpoint.path, model, ParamLayout.of(model))


def live_state(trainer: Trainer, key: str) -> dict[str, torch.Tensor]:
    """The optimizer's own state, by parameter object."""
    return {name: trainer.optimizer.state[p][key] for name, p in lora_parameters(trainer.model).items()}


def assert_equals_live(state: AdamState, trainer: Trainer) -> None:
    for moments, key in ((state.m, "exp_avg"), (state.v, "exp_avg_sq")):
        live = live_state(trainer, key)
        assert list(moments) == list(live)
        assert len({tuple(t.flatten().tolist()) for t in live.values()}) == len(live)  # a swap would show
        for name, moment in moments.items():
            assert moment.dtype == torch.float32
            torch.testing.assert_close(moment, live[name], rtol=0, atol=0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with checkpoints 3 and 6, every step logged. Not to be written to."""
    output = tmp_path_factory.mktemp("run")
    train(output)
    return output


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """The run's checkpoint 3, to be spoilt."""
    return Path(shutil.copytree(run / "checkpoint-3", tmp_path / "checkpoint-3"))


def edit_optimizer(folder: Path, edit: object) -> Checkpoint:
    saved = torch.load(folder / "optimizer.pt", weights_only=True)
    edit(saved)  # type: ignore[operator]
    torch.save(saved, folder / "optimizer.pt")
    return find_checkpoints([folder])[0]


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


class TestMoments:
    def test_are_those_of_the_live_optimizer(self, tmp_path: Path) -> None:
        trainer = train(tmp_path, adam_beta2=0.95, adam_epsilon=1e-6)
        state = load(find_checkpoints([tmp_path])[-1])
        assert_equals_live(state, trainer)
        assert (state.step, state.beta1, state.beta2, state.eps) == (6, 0.9, 0.95, 1e-6)

    def test_follow_the_grouping_by_weight_decay(self, tmp_path: Path) -> None:
        trainer = train(tmp_path, odd_names=True, num_train_epochs=1, weight_decay=0.1)
        assert all(group["params"] for group in trainer.optimizer.param_groups)
        assert_equals_live(load(find_checkpoints([tmp_path])[0], tiny_llama(odd_names=True)), trainer)

    def test_do_not_depend_on_the_adapters_name(self, tmp_path: Path) -> None:
        trainer = train(tmp_path, adapter="mine", num_train_epochs=1)
        folder = Path(shutil.move(tmp_path / "checkpoint-3" / "mine", tmp_path / "mine"))
        for file in ("optimizer.pt", "trainer_state.json"):
            shutil.copy(tmp_path / "checkpoint-3" / file, folder)
        live = [trainer.optimizer.state[p]["exp_avg"] for n, p in trainer.model.named_parameters() if "lora" in n]
        for moment, expected in zip(load(find_checkpoints([folder])[0]).m.values(), live, strict=True):
            assert torch.equal(moment, expected)

    @pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
    @pytest.mark.parametrize("keyed_by", ["name", "param_names"])
    def test_are_matched_by_name_where_there_are_names(self, copy: Path, prefix: str, keyed_by: str) -> None:
        expected = load(find_checkpoints([copy])[0])
        names = [prefix + name.replace(".weight", ".default.weight") for name in expected.m]

        def reverse_and_name(saved: dict) -> None:
            group, states = saved["param_groups"][0], saved["state"]
            order = list(reversed(range(len(names))))
            if keyed_by == "name":
                saved["state"] = {names[i]: states[i] for i in order}
                group["params"] = [names[i] for i in order]
            else:
                saved["state"] = {at: states[i] for at, i in enumerate(order)}
                group["param_names"] = [names[i] for i in order]

        found = load(edit_optimizer(copy, reverse_and_name))
        assert list(found.m) == list(expected.m)
        assert all(torch.equal(found.v[name], expected.v[name]) for name in expected.v)

    def test_are_found_in_an_fsdp_file(self, copy: Path) -> None:
        (copy / "optimizer.pt").rename(copy / "optimizer.bin")
        assert load(find_checkpoints([copy])[0]).step == 3

    def test_move_together(self, run: Path) -> None:
        state = load(find_checkpoints([run / "checkpoint-3"])[0]).to("meta")
        assert {t.device.type for t in (*state.m.values(), *state.v.values())} == {"meta"}

    @pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")
    def test_of_trl_are_those_of_the_live_optimizer(self, tmp_path: Path) -> None:
        trl = pytest.importorskip("trl")
        rows = Dataset.from_list([{"input_ids": ids} for ids in TOKENS])
        trainer = trl.SFTTrainer(
            model=tiny_llama(), processing_class=word_tokenizer(), peft_config=lora(r=4), train_dataset=rows,
            args=trl.SFTConfig(**arguments(tmp_path, num_train_epochs=1, bf16=False)),
        )  # fmt: skip
        trainer.train()
        assert_equals_live(load(find_checkpoints([tmp_path])[0]), trainer)


def word_tokenizer() -> object:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(62)} | {"<eos>": 62}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")


def other_keys(*keys: str) -> Callable[[dict], None]:
    def edit(saved: dict) -> None:
        saved["state"] = {i: dict.fromkeys(keys, torch.zeros(2)) for i in saved["state"]}

    return edit


class TestRefusals:
    @pytest.mark.parametrize(
        ("edit", "message"),
        [
            (other_keys("state1", "state2", "step"), "state1 and state2"),
            (other_keys("exp_avg_sq_row", "exp_avg_sq_col", "step"), "exp_avg_sq_col, exp_avg_sq_row, step"),
            (other_keys("momentum_buffer"), "found momentum_buffer"),
            (other_keys("exp_avg"), "expected step, exp_avg and exp_avg_sq"),
            (lambda s: s["param_groups"][0].pop("amsgrad"), "not torch's Adam"),
            (lambda s: s["param_groups"][0].update(amsgrad=True), "amsgrad"),
            (lambda s: s["param_groups"][0].pop("betas"), r"malformed \(KeyError\('betas'\)"),
            (lambda s: s["state"][3].update(step=torch.tensor(2.0)), r"\(2 of .*, 3 of .*\)"),
            (lambda s: s["state"].pop(5), r"no moments of .*layers\.0.*lora_B.* \(1 of 28"),
            (lambda s: s["state"][0].update(exp_avg=torch.zeros(8, 2)), r"\(8, 2\) and the parameter \(2, 8"),
            (lambda s: s["state"][0]["exp_avg_sq"].fill_(-1), "exp_avg_sq of .*lora_A.* is negative"),
            (lambda s: s["state"][0]["exp_avg"].fill_(torch.nan), "exp_avg of .* is not finite"),
            (lambda s: s["param_groups"][0]["params"].pop(), r"groups of \[27\] .* \[28\]"),
            (lambda s: s["state"].update({99: s["state"][0]}), "malformed"),
            (lambda s: s.pop("state"), "no optimizer's plain state dict"),
            (lambda s: s["param_groups"][0]["params"].clear(), r"state dict \(ValueError\)"),
        ],
    )  # fmt: skip
    def test_name_the_reason_and_the_way_out(self, copy: Path, edit: object, message: str) -> None:
        checkpoint = edit_optimizer(copy, edit)
        with pytest.raises(OptimizerStateError, match=message) as caught:
            load(checkpoint)
        assert str(copy / "optimizer.pt") in str(caught.value)
        assert "--update-rule sgd and sign" in str(caught.value)

    def test_groups_that_disagree(self, copy: Path) -> None:
        def split(saved: dict) -> None:
            group = saved["param_groups"][0]
            keys, names = group["params"], list(load(find_checkpoints([copy])[0]).m)
            saved["param_groups"] = [
                {**group, "params": keys[:9], "param_names": names[:9]},
                {**group, "params": keys[9:], "param_names": names[9:], "eps": 1e-6},
            ]

        with pytest.raises(OptimizerStateError, match=r"disagree on .*1e-08.*1e-06"):
            load(edit_optimizer(copy, split))

    def test_no_optimizer_state(self, copy: Path) -> None:
        (copy / "optimizer.pt").unlink()
        checkpoint = find_checkpoints([copy])[0]
        assert checkpoint.optimizer_sha256 is None
        with pytest.raises(OptimizerStateError, match=r"no optimizer state.*--update-rule sgd and sign"):
            load(checkpoint)

    @pytest.mark.parametrize("shards", ["global_step3", "optimizer_0", "pytorch_model_fsdp_0"])
    def test_sharded_optimizer_state(self, copy: Path, shards: str) -> None:
        (copy / "optimizer.pt").unlink()
        (copy / shards).mkdir()
        with pytest.raises(OptimizerStateError, match=f"only a sharded state, {shards}"):
            load(find_checkpoints([copy])[0])

    def test_never_run_code_of_the_file(self, copy: Path, tmp_path: Path) -> None:
        witness = tmp_path / "ran"

        class Hostile:
            def __reduce__(self) -> tuple:
                return os.mkdir, (str(witness),)

        torch.save({"state": {}, "param_groups": [Hostile()]}, copy / "optimizer.pt")
        with pytest.raises(OptimizerStateError, match=r"GLOBAL \w+\.mkdir"):
            load(find_checkpoints([copy])[0])
        assert not witness.exists()

    @pytest.mark.parametrize("content", [b"", b"garbage", None])
    def test_torn_file(self, copy: Path, content: bytes | None) -> None:
        file = copy / "optimizer.pt"
        file.write_bytes(file.read_bytes()[:1000] if content is None else content)
        with pytest.raises(OptimizerStateError, match="is damaged"):
            load(find_checkpoints([copy])[0])


class TestWeights:
    def test_are_the_mean_logged_rates(self, run: Path) -> None:
        found = find_checkpoints([run])
        assert [(c.name, c.step) for c in found] == [("checkpoint-3", 3), ("checkpoint-6", 6)]
        used = torch.tensor([0, 5, 4, 3, 2, 1]) / 5  # one warm-up step, then linear decay
        expected = used.reshape(2, 3).mean(1) / used.reshape(2, 3).mean(1).sum()
        torch.testing.assert_close(torch.tensor([c.weight for c in found]), expected)

    def test_log_the_rate_that_the_step_used(self, tmp_path: Path) -> None:
        used = []

        class Watched(Trainer):
            def training_step(self, *args: object, **kwargs: object) -> torch.Tensor:
                used.append(self.optimizer.param_groups[0]["lr"])
                return super().training_step(*args, **kwargs)

        trainer = Watched(
            model=get_peft_model(tiny_llama(), lora()),
            args=TrainingArguments(**arguments(tmp_path)),
            train_dataset=ROWS,
        )
        trainer.train()
        first, second = find_checkpoints([tmp_path])
        assert first.weight / second.weight == pytest.approx(sum(used[:3]) / sum(used[3:]))

    def test_fall_back_on_the_rates_at_both_ends(self, tmp_path: Path) -> None:
        train(tmp_path, logging_steps=10, warmup_steps=0)
        with pytest.warns(EvidenceWarning, match="checkpoint-3, checkpoint-6: not every step") as caught:
            first, second = find_checkpoints([tmp_path])
        assert caught[0].filename == __file__
        assert first.weight / second.weight == pytest.approx((1 + 0.5) / (0.5 + 0))
        shutil.rmtree(tmp_path / "checkpoint-3")
        assert find_checkpoints([tmp_path])[0].weight == 1.0  # alone it needs no rate, so no warning

    def test_need_a_source(self, tmp_path: Path, run: Path) -> None:
        for step in (3, 6):
            folder = Path(shutil.copytree(run / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}"))
            edit_json(folder / "trainer_state.json", log_history=[])
            (folder / "optimizer.pt").unlink()
        with pytest.raises(CheckpointError, match="--checkpoint-weights"):
            find_checkpoints([tmp_path])
        assert [c.weight for c in find_checkpoints([tmp_path], [3, 1])] == [0.75, 0.25]

    def test_begin_anew_with_each_run(self, run: Path, tmp_path: Path) -> None:
        train(tmp_path / "other", data_seed=7)
        both = find_checkpoints([run, tmp_path / "other"])
        assert [c.name for c in both] == ["checkpoint-3", "checkpoint-6", "checkpoint-3.2", "checkpoint-6.2"]
        assert both[0].weight == both[2].weight == pytest.approx(find_checkpoints([run])[0].weight / 2)
        across = find_checkpoints([run / "checkpoint-3", tmp_path / "other" / "checkpoint-6"])
        assert across[1].weight / across[0].weight == pytest.approx(2.5 / 3)  # all six steps, not the last three

    def test_do_not_depend_on_the_order_given(self, run: Path) -> None:
        forward = find_checkpoints([run / "checkpoint-3", run / "checkpoint-6"])
        assert find_checkpoints([run / "checkpoint-6", run / "checkpoint-3"]) == forward[::-1]

    @pytest.mark.parametrize("weights", [[1], [1, 2, 3], [-1, 2], [0, 0], [float("nan"), 1], [float("inf"), 1]])
    def test_out_of_range(self, run: Path, weights: list[float]) -> None:
        with pytest.raises(SettingError, match="--checkpoint-weights"):
            find_checkpoints([run], weights)


class TestFolders:
    def test_absent_or_empty(self, tmp_path: Path) -> None:
        with pytest.raises(SettingError, match="no checkpoint is given"):
            find_checkpoints([])
        with pytest.raises(CheckpointError, match=r"no checkpoint at .*nowhere"):
            find_checkpoints([tmp_path / "nowhere"])
        with pytest.raises(CheckpointError, match="expected checkpoint-<step> folders"):
            find_checkpoints([tmp_path])

    def test_given_twice(self, run: Path) -> None:
        with pytest.raises(CheckpointError, match="checkpoint-3 is given twice"):
            find_checkpoints([run, run / "checkpoint-3"])

    def test_in_step_order_and_beside_a_final_adapter(self, run: Path, tmp_path: Path) -> None:
        for step in (100, 20):
            shutil.copytree(run / "checkpoint-3", tmp_path / f"checkpoint-{step}")
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(run / "checkpoint-3" / file, tmp_path)  # as trainer.save_model() leaves them
        assert [c.name for c in find_checkpoints([tmp_path], [1, 1])] == ["checkpoint-20", "checkpoint-100"]

    def test_incomplete(self, copy: Path) -> None:
        (copy / "adapter_model.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"no adapter_model\.safetensors"):
            find_checkpoints([copy])

    def test_damaged_trainer_state(self, copy: Path) -> None:
        (copy / "trainer_state.json").write_text('{"global_step": 3}')
        with pytest.raises(CheckpointError, match="not a Trainer's state"):
            find_checkpoints([copy])

    def test_bare_adapter_stands_alone_or_with_weights(self, run: Path, copy: Path) -> None:
        (copy / "trainer_state.json").unlink()
        assert find_checkpoints([copy])[0].step == 0
        assert len(find_checkpoints([run / "checkpoint-6", copy], [1, 1])) == 2
        with pytest.raises(CheckpointError, match=r"no trainer_state\.json .*--checkpoint-weights"):
            find_checkpoints([run / "checkpoint-6", copy])

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("r", 4),
            ("lora_alpha", 99),
            ("target_modules", ["q_proj"]),
            ("use_rslora", True),
            ("rank_pattern", {"q": 1}),
        ],
    )
    def test_of_different_adapters(self, run: Path, copy: Path, field: str, value: object) -> None:
        edit_json(copy / "adapter_config.json", **{field: value})
        with pytest.raises(CheckpointError, match=rf"{field} is .* and "):
            find_checkpoints([run / "checkpoint-6", copy])

    def test_order_of_target_modules_does_not_matter(self, run: Path, copy: Path) -> None:
        targets = json.loads((copy / "adapter_config.json").read_text())["target_modules"]
        edit_json(copy / "adapter_config.json", target_modules=targets[::-1])
        assert len(find_checkpoints([run / "checkpoint-6", copy], [1, 1])) == 2
