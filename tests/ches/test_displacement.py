"""The callback sees what training does to fixed pairs, and does nothing to training."""

import numpy as np
import pytest
import torch

from ches import DisplacementCallback, score_pairs
from datastore.errors import DataError

# TRL 1.16's own default sets it
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")


def pair(number):
    words = ["red", "green", "blue", "amber", "violet", "teal"]
    return {
        "prompt": [{"role": "user", "content": f"mix {words[number % 6]} {words[number % 5]}"}],
        "chosen": [{"role": "assistant", "content": " ".join(words[: 1 + number % 3])}],
        "rejected": [{"role": "assistant", "content": " ".join(words[2 : 4 + number % 2])}],
    }


TRAINED, PROBE = [pair(n) for n in range(8)], [pair(n) for n in range(4, 12)]


@pytest.fixture
def make_trainer(tiny_model_folder, tiny_tokenizer, tmp_path):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    def make(peft_config=None, **settings):
        torch.manual_seed(0)
        return DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(tiny_model_folder),
            args=DPOConfig(
                output_dir=str(tmp_path), per_device_train_batch_size=4, learning_rate=1e-2,
                report_to="none", bf16=False, gradient_checkpointing=False, disable_tqdm=True, save_strategy="no",
                use_cpu=True, **{"logging_steps": 2, "max_steps": 5, **settings},
            ),
            peft_config=peft_config,
            train_dataset=Dataset.from_list(TRAINED),
            processing_class=tiny_tokenizer,
        )  # fmt: skip

    return make


def logps(model, tokenizer):
    columns = score_pairs(
        model=model, tokenizer=tokenizer, data=PROBE, measures=["logp"], max_length=1024, progress=False
    ).columns
    return [np.array([row[name] for row in columns]) for name in ("logp_chosen", "logp_rejected")]


@pytest.fixture
def followed(make_trainer, tiny_tokenizer):
    """A trainer after its run, its callback, and the probe's log-probabilities before and after."""
    trainer = make_trainer()
    before = logps(trainer.model, tiny_tokenizer)
    callback = DisplacementCallback(trainer, PROBE)
    trainer.add_callback(callback)
    trainer.train()
    return trainer, callback, before, logps(trainer.model, tiny_tokenizer)


def test_it_follows_the_probe_from_the_start_to_the_end_at_every_log(followed):
    _, callback, before, after = followed
    assert [found.step for found in callback.history] == [0, 2, 4, 5]
    for found, expected in ((callback.history[0], before), (callback.history[-1], after)):
        np.testing.assert_allclose(found.chosen_N, expected[0], rtol=1e-5)
        np.testing.assert_allclose(found.rejected_N, expected[1], rtol=1e-5)
    assert not np.allclose(before[0], after[0], rtol=1e-3)


def test_what_it_logs_is_what_the_definition_says(followed):
    trainer, _, (chosen_N, rejected_N), after = followed
    logged = {entry["step"]: entry for entry in trainer.state.log_history if "displacement/chosen_losing" in entry}
    assert sorted(logged) == [2, 4, 5]
    assert logged[5]["displacement/chosen_losing"] == np.mean(after[0] < chosen_N)
    assert logged[5]["displacement/chosen_change"] == pytest.approx(np.mean(after[0] - chosen_N), rel=1e-4)
    assert logged[5]["displacement/rejected_change"] == pytest.approx(np.mean(after[1] - rejected_N), rel=1e-4)


def test_trls_own_metrics_stay_with_the_loss(followed):
    trainer, *_ = followed
    with_loss = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in with_loss] == [2, 4]
    assert all("rewards/margins" in entry for entry in with_loss)


def test_training_goes_as_without_it(followed, make_trainer):
    trainer, *_ = followed
    alone = make_trainer()
    alone.train()
    for ours, theirs in zip(trainer.model.parameters(), alone.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert trainer.model.training == alone.model.training


def test_it_follows_a_lora_adapter(make_trainer, tiny_tokenizer):
    from peft import LoraConfig

    trainer = make_trainer(max_steps=2, peft_config=LoraConfig(r=4, target_modules="all-linear"))
    trainer.add_callback(callback := DisplacementCallback(trainer, PROBE))
    trainer.train()
    np.testing.assert_allclose(callback.history[-1].chosen_N, logps(trainer.model, tiny_tokenizer)[0], rtol=1e-5)
    assert not np.allclose(callback.history[0].chosen_N, callback.history[-1].chosen_N, rtol=1e-3)


def test_it_reads_lengths_from_the_trainer_and_lists_what_it_cannot_follow(make_trainer):
    trainer = make_trainer(max_length=40)
    bad = {**pair(0), "chosen": [{"role": "assistant", "content": ""}]}
    callback = DisplacementCallback(trainer, [pair(0), bad, pair(1)])
    assert [row.reason for row in callback.skipped] == ["empty reply"]
    callback.on_train_begin(trainer.args, trainer.state, trainer.control)
    assert len(callback.history[0].chosen_N) == 2
    with pytest.raises(DataError, match="empty reply"):
        DisplacementCallback(trainer, [bad])


def test_it_measures_in_evaluation_mode_and_gives_the_model_back(make_trainer):
    trainer = make_trainer()
    callback = DisplacementCallback(trainer, PROBE)
    trainer.model.train()
    callback.on_train_begin(trainer.args, trainer.state, trainer.control)
    assert trainer.model.training
