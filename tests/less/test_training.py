"""Warm-up: the loss by definition, the rows by the seed, a folder that HF's Trainer could have written."""

import json
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from datastore.errors import DataError, RowError, SettingError, UnsupportedError
from less import training
from less.adapters import adapted_model
from less.checkpoints import EvidenceWarning, find_checkpoints
from less.data.batching import collate
from less.data.records import open_source
from less.data.rendering import RenderConfig, Renderer
from less.gradients import gradients_ref
from less.models import ParamLayout, lora_layers
from less.moments import load_adam_state
from less.training import WarmupConfig, WarmupResult, warmup

pytestmark = pytest.mark.filterwarnings("ignore:a warm-up of:less.checkpoints.EvidenceWarning")

SMALL: dict[str, Any] = {
    "fraction": 0.5, "epochs": 2, "batch_size": 8, "learning_rate": 1e-2, "lora_rank": 2, "progress": False,
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any, tiny_rows: list[dict]) -> Callable[..., WarmupResult]:
    """Warm up the tiny model on the tiny rows: 20 of 40 rows, 3 steps an epoch, unless told otherwise."""

    def call(**settings: Any) -> WarmupResult:
        given = {
            "model": tiny_model,
            "tokenizer": tiny_tokenizer,
            "data": tiny_rows,
            "output": tmp_path / "run",
        }
        return warmup(**given | SMALL | settings)

    return call


def adapter(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "adapter_model.safetensors")


def assert_same_adapter(one: Path, other: Path) -> None:
    ours, theirs = adapter(one), adapter(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


class TestTraining:
    def test_leaves_a_checkpoint_an_epoch_whose_every_rate_is_logged(self, run: Any) -> None:
        result = run(epochs=3, lora_rank=4)
        assert [c.name for c in result.checkpoints] == ["checkpoint-3", "checkpoint-6", "checkpoint-9"]
        assert (result.num_rows, result.num_steps, result.num_computed, result.skipped) == (20, 9, 9, ())
        with warnings.catch_warnings():
            warnings.simplefilter("error", EvidenceWarning)
            found = find_checkpoints([result.output])
        rates = np.array([0, 8, 7, 6, 5, 4, 3, 2, 1])  # one warm-up step of nine, then linear decay
        np.testing.assert_allclose([c.weight for c in found], rates.reshape(3, 3).sum(1) / rates.sum())
        config = json.loads((found[0].path / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 16, 0.1)

    def test_lowers_the_loss(self, run: Any) -> None:
        result = run(epochs=10)
        log = json.loads((result.checkpoints[-1] / "trainer_state.json").read_text())["log_history"]
        assert result.final_loss == log[-1]["loss"] < 0.8 * log[0]["loss"]

    @pytest.mark.parametrize("tokens_per_batch", [1, 150, 100_000])
    def test_follows_the_mean_over_rows_of_their_mean_losses(
        self, run: Any, tiny_model: Any, tiny_tokenizer: Any, tiny_rows: list[dict], tokens_per_batch: int
    ) -> None:
        result = run(epochs=1, batch_size=20, lora_dropout=0.0, tokens_per_batch=tokens_per_batch)
        renderer = Renderer(tiny_tokenizer, RenderConfig())
        numbers = json.loads((result.output / "warmup.json").read_text())["rows"]
        rendered = [renderer.render_record(record) for record in open_source(tiny_rows).take(numbers)]
        (checkpoint,) = find_checkpoints([result.output])
        with adapted_model(tiny_model, checkpoint.path) as model:  # the one step had rate 0: the start
            m = load_adam_state(checkpoint.path, model, ParamLayout.of(model)).m
            losses_B, grads = gradients_ref(model, collate(rendered, range(20), pad_id=0))
        mean_P = torch.cat([grads[name].mean(0) for name in m])
        clipped_P = mean_P * min(1.0, 1.0 / mean_P.norm().item())
        expected_P = 0.1 * clipped_P  # (1 - β1) g
        assert result.final_loss == pytest.approx(losses_B.mean().item(), rel=1e-5)
        found_P = torch.cat([moment.flatten() for moment in m.values()])
        assert (found_P - expected_P).norm() <= 1e-6 * expected_P.norm()

    def test_drops_out(self, run: Any, tmp_path: Path) -> None:
        with_dropout = run(lora_dropout=0.5, output=tmp_path / "with")
        assert with_dropout.final_loss != run(lora_dropout=0.0).final_loss

    def test_keeps_adapters_in_float32_on_a_bfloat16_base(self, run: Any, tiny_model_folder: Path) -> None:
        result = run(model=tiny_model_folder, dtype="bfloat16", epochs=1)
        assert {t.dtype for t in adapter(result.checkpoints[0]).values()} == {torch.float32}
        assert json.loads((result.output / "warmup.json").read_text())["settings"]["dtype"] == "torch.bfloat16"

    def test_adapts_the_modules_asked_for(self, run: Any) -> None:
        names = adapter(run(epochs=1, target_modules="q_proj, v_proj").checkpoints[0])
        assert {name.split(".")[-3] for name in names} == {"q_proj", "v_proj"}

    def test_stops_when_it_diverges(self, run: Any, tiny_model: Any) -> None:
        with torch.no_grad():
            tiny_model.lm_head.weight.fill_(torch.inf)
        with pytest.raises(SettingError, match="the loss is nan at step 1; lower --learning-rate"):
            run()

    def test_prints_nothing_unless_asked(self, run: Any, capfd: pytest.CaptureFixture[str]) -> None:
        run()
        assert capfd.readouterr() == ("", "")

    def test_warns_of_few_steps(self, run: Any) -> None:
        with pytest.warns(EvidenceWarning, match="6 optimizer steps, fewer than 50") as caught:
            run()
        assert [w.filename for w in caught if w.category is EvidenceWarning] == [__file__]


class TestCallersBelongings:
    def test_model_comes_back_as_it_was(self, run: Any, tiny_model: Any) -> None:
        tiny_model.lm_head.weight.requires_grad_(False)
        before = {name: (p.requires_grad, p.clone()) for name, p in tiny_model.named_parameters()}
        modules = [type(module) for module in tiny_model.modules()]
        run()
        assert [type(module) for module in tiny_model.modules()] == modules
        assert not hasattr(tiny_model, "peft_config")
        assert tiny_model.config.use_cache
        assert not tiny_model.training
        after = dict(tiny_model.named_parameters())
        assert after.keys() == before.keys()
        assert all(after[n].requires_grad == grad and torch.equal(after[n], p) for n, (grad, p) in before.items())

    def test_random_states_are_left_alone(self, run: Any) -> None:
        def states() -> tuple[Any, ...]:
            return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002

        before = states()
        run()
        assert states() == before

    def test_random_states_do_not_matter(self, run: Any, tmp_path: Path) -> None:
        first = run()
        torch.manual_seed(123)
        assert_same_adapter(first.checkpoints[-1], run(output=tmp_path / "again").checkpoints[-1])


class TestRows:
    @pytest.mark.parametrize(("fraction", "num_rows"), [(0.05, 2), (0.051, 3), (0.3, 12), (1, 40), (1e-9, 1)])
    def test_are_the_ceiling_of_the_fraction(self, run: Any, fraction: float, num_rows: int) -> None:
        assert run(fraction=fraction, epochs=1).num_rows == num_rows

    def test_are_drawn_by_the_seed(self, run: Any, tmp_path: Path) -> None:
        drawn = []
        for seed in (0, 1):
            folder = run(seed=seed, epochs=1, output=tmp_path / str(seed)).output
            drawn.append(json.loads((folder / "warmup.json").read_text())["rows"])
        assert all(rows == sorted(set(rows)) for rows in drawn)
        assert drawn[0] != drawn[1]

    def test_that_cannot_be_used_are_replaced_and_reported(self, run: Any, tiny_rows: list[dict]) -> None:
        rows = [{"id": f"bad-{n}"} if n % 2 else row for n, row in enumerate(tiny_rows)]
        result = run(data=rows, fraction=0.4, epochs=1)
        assert result.num_rows == 16
        assert result.skipped
        assert all(row.row % 2 and row.id == f"bad-{row.row}" for row in result.skipped)
        assert {row.reason for row in result.skipped} == {"no messages"}
        record = json.loads((result.output / "warmup.json").read_text())
        assert not any(number % 2 for number in record["rows"])
        assert [row["row"] for row in record["skipped"]] == [row.row for row in result.skipped]

    def test_that_cannot_be_used_stop_a_strict_run(self, run: Any, tiny_rows: list[dict], tmp_path: Path) -> None:
        with pytest.raises(RowError, match=r"memory\[0\]"):
            run(data=[{}, *tiny_rows], fraction=1, strict=True)
        assert not (tmp_path / "run").exists()

    def test_none_usable(self, run: Any) -> None:
        with pytest.raises(DataError, match="no usable row: all 3 were skipped"):
            run(data=[{}, {}, {}])


class TestSecondCall:
    def test_finds_a_finished_run_and_does_nothing(self, run: Any, tmp_path: Path) -> None:
        first = run()
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        second = run(tokens_per_batch=64)
        assert second.num_computed == 0
        assert {**vars(second), "num_computed": 6} == vars(first)
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before

    @pytest.mark.parametrize("torn", [False, True])
    def test_goes_on_after_an_interruption(
        self, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torn: bool
    ) -> None:
        whole = run(epochs=3, output=tmp_path / "whole", lora_dropout=0.5)
        step = training._RowMeanTrainer.training_step

        def interrupted(self: Any, *args: Any) -> torch.Tensor:
            if self.state.global_step == 7:
                raise KeyboardInterrupt
            return step(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(training._RowMeanTrainer, "training_step", interrupted)
            with pytest.raises(KeyboardInterrupt):
                run(epochs=3, lora_dropout=0.5)
        if torn:
            (tmp_path / "run" / "checkpoint-6" / "trainer_state.json").write_text('{"epoch":')
        resumed = run(epochs=3, lora_dropout=0.5)
        assert resumed.num_computed == (6 if torn else 3)
        assert resumed.final_loss == whole.final_loss
        for ours, theirs in zip(resumed.checkpoints, whole.checkpoints, strict=True):
            assert_same_adapter(ours, theirs)
        assert [c.weight for c in find_checkpoints([resumed.output])] == [
            c.weight for c in find_checkpoints([whole.output])
        ]

    def test_completes_the_record_of_a_run_that_was_killed_at_its_end(self, run: Any, tmp_path: Path) -> None:
        first = run()
        record = json.loads((tmp_path / "run" / "warmup.json").read_text())
        del record["result"]
        (tmp_path / "run" / "warmup.json").write_text(json.dumps(record))
        assert vars(run()) == {**vars(first), "num_computed": 0}
        assert "result" in json.loads((tmp_path / "run" / "warmup.json").read_text())

    def test_with_other_settings_is_refused_by_name(self, run: Any, tiny_rows: list[dict]) -> None:
        run()
        with pytest.raises(SettingError, match=r"epochs is 2 there and 3 here; learning_rate is 0\.01 there and 0\.1"):
            run(epochs=3, learning_rate=0.1)
        with pytest.raises(SettingError, match=r"data is .* choose another --output"):
            run(data=tiny_rows[:-1])
        with pytest.raises(SettingError, match="template_sha256 is"):
            run(chat_template="chatml")

    def test_leaves_foreign_folders_alone(self, run: Any, tmp_path: Path) -> None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "thesis.tex").touch()
        with pytest.raises(SettingError, match="holds something else"):
            run()
        shutil.rmtree(tmp_path / "run")
        (tmp_path / "run").touch()
        with pytest.raises(SettingError, match="holds something else"):
            run()

    def test_finds_a_damaged_record(self, run: Any, tmp_path: Path) -> None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "warmup.json").write_text("[]")
        with pytest.raises(SettingError, match="is damaged"):
            run()


class TestConfig:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("fraction", 0), ("fraction", 1.01), ("epochs", 0), ("learning_rate", 0.0), ("warmup_ratio", 1.0),
            ("learning_rate", float("nan")), ("batch_size", 0), ("lora_rank", -1), ("lora_alpha", 0),
            ("lora_dropout", 1.0), ("target_modules", "q_proj,,v_proj"), ("target_modules", ()),
            ("max_length", 0), ("seed", -1), ("tokens_per_batch", 0),
        ],
    )  # fmt: skip
    def test_names_the_setting_and_its_value(self, name: str, value: object) -> None:
        with pytest.raises(SettingError, match=f"^{name} must be .*, got "):
            WarmupConfig(**{name: value})

    def test_reads_target_modules(self) -> None:
        assert WarmupConfig().target_modules == "all-linear"
        assert WarmupConfig(target_modules="q_proj, v_proj") == WarmupConfig(target_modules=["q_proj", "v_proj"])

    def test_unknown_names_are_answered_with_the_known(self, run: Any) -> None:
        with pytest.raises(TypeError, match=r"no setting 'lr'; expected some of batch_size, .*warmup_ratio"):
            run(lr=1)

    def test_modules_that_are_not_there_or_cannot_be_used(self, run: Any, tiny_model: Any) -> None:
        with pytest.raises(UnsupportedError, match=r"target_modules do not fit this model: .*nope"):
            run(target_modules="nope")
        with pytest.raises(UnsupportedError, match=r"LlamaRMSNorm.* is not supported"):
            run(target_modules="q_proj,post_attention_layernorm")
        with pytest.raises(UnsupportedError, match="LM head"):
            run(target_modules="lm_head")
        assert not hasattr(tiny_model, "peft_config")
        assert not lora_layers(tiny_model)
