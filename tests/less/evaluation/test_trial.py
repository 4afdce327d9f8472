"""One trial: the same start and order for every method, held-out losses, answers; the base given back."""

import pytest
import torch

from less.data.batching import collate
from less.data.conversations import conversation_of
from less.data.rendering import RenderConfig, Renderer
from less.evaluation.held_out import HeldOut
from less.evaluation.trial import answer_of, measure, row_losses, run_trial
from less.gradients import token_losses
from less.models import load_base_model, load_tokenizer, lora_layers
from less.training import WarmupConfig, lora_config


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("The answer is 42.", "42"),
        ("The answer is: 42", "42"),
        ("the ANSWER IS 1,234,567!", "1234567"),
        ("answer is 12. No: the answer is 13.", "13"),
        ("The answer is 1\nSo the answer is 2\nDone.", "2"),
        ("The answer is\n  $18.50\nas asked", "18.50"),
        ("The answer is **-5**.", "-5"),
        ('"Paris"', "paris"),
        ("  New \t York\n", "new york"),
        ("1, 2 and 3", "1, 2 and 3"),
        ("The answer is", ""),
        ("(A)", "(a)"),
        ("", ""),
    ],
)
def test_an_answer_is_what_stands_behind_the_last_answer_is(reply, answer):
    assert answer_of(reply) == answer


def test_an_answer_compares_equal_to_itself_however_it_is_written():
    assert answer_of("So the answer is $1,000.") == answer_of("1000")
    assert answer_of("The answer is 10.") != answer_of("1")


@pytest.fixture(scope="module")
def tokenizer(tiny_model_folder):
    return load_tokenizer(tiny_model_folder)


@pytest.fixture(scope="module")
def rendered(tokenizer, tiny_rows):
    renderer = Renderer(tokenizer, RenderConfig())
    return [renderer.render(conversation_of(row)) for row in tiny_rows]


@pytest.fixture
def base(tiny_model_folder):
    return load_base_model(tiny_model_folder).eval()


def held_out(name, rows, answers=()):
    prompts = [row.input_ids[: row.supervised.index(True)] for row in rows[: len(answers)]]
    return HeldOut(name=name, rendered=rows, prompts=prompts, answers=list(answers), sha256=name)


@pytest.fixture
def train(base, tokenizer, rendered):
    def call(rows=None, *, seed=0, dropout=0.1, sets=None):
        return run_trial(
            base, tokenizer, rendered[:7] if rows is None else rows,
            sets or [held_out("some", rendered[30:34]), held_out("more", rendered[34:36])],
            lora=lora_config(WarmupConfig(lora_rank=2, lora_dropout=dropout)),
            training=WarmupConfig(epochs=1, batch_size=4, learning_rate=1e-2, seed=seed), max_new_tokens=4,
        )  # fmt: skip

    return call


class TestATrial:
    def test_of_the_same_rows_and_seed_gives_the_same_losses(self, train):
        torch.manual_seed(1)
        first = train()
        torch.manual_seed(2)
        assert train() == first
        assert train(seed=1) != first

    def test_starts_alike_and_trains_in_the_same_order_whatever_the_rows(self, base, tokenizer, rendered, monkeypatch):
        import less.evaluation.trial

        seen = []

        def watched(model, rows, config, bar):
            weights = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
            seen.append((weights, torch.initial_seed(), torch.rand(3).tolist()))

        monkeypatch.setattr(less.evaluation.trial, "fine_tune", watched)
        lora, training = lora_config(WarmupConfig(lora_rank=2)), WarmupConfig(seed=3)
        for rows in (rendered[:4], rendered[4:8]):
            run_trial(base, tokenizer, rows, [], lora=lora, training=training, max_new_tokens=1)
        first, second = seen
        assert first[1:] == second[1:]
        assert any(weight.any() for weight in first[0].values())
        for name, weight in first[0].items():
            assert torch.equal(weight, second[0][name])

    def test_takes_as_many_rows_in_the_same_order(self, train, rendered, monkeypatch):
        import less.training

        real, order = less.training.collate, []

        def watched(rows, members):
            order.append([*members])
            return real(rows, members)

        monkeypatch.setattr(less.training, "collate", watched)
        same_length = [next(r for r in rendered if r.num_tokens == n) for n in sorted({r.num_tokens for r in rendered})]
        train([same_length[0]] * 7)
        first, order[:] = [*order], []
        train([same_length[1]] * 7)
        assert order == first
        assert sorted(n for members in order for n in members) == [*range(7)]

    def test_teaches_what_it_is_trained_on(self, train, base, rendered):
        rows = rendered[:7]
        before = row_losses(base, rows)
        after = train(rows, sets=[held_out("own", rows)], dropout=0.0)["own"].losses
        assert sum(after) < sum(before)

    @pytest.mark.parametrize("training", [True, False])
    def test_gives_the_base_back_as_it_was(self, train, base, training):
        weights = {name: weight.clone() for name, weight in base.state_dict().items()}
        base.train(training)
        state = torch.get_rng_state()
        train()
        assert torch.equal(torch.get_rng_state(), state)
        assert base.training == training
        assert not lora_layers(base)
        assert not hasattr(base, "peft_config")
        assert base.state_dict().keys() == weights.keys()
        assert all(torch.equal(weight, weights[name]) for name, weight in base.state_dict().items())

    def test_that_fails_gives_the_base_back_too(self, train, base, monkeypatch):
        monkeypatch.setattr("less.evaluation.trial.measure", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train()
        assert not lora_layers(base)


class TestMeasured:
    @pytest.mark.parametrize("tokens_per_batch", [1, 100, 4096])
    def test_losses_are_each_rows_own_in_any_batch(self, base, rendered, tokens_per_batch):
        found = row_losses(base, rendered[:9], tokens_per_batch)
        with torch.no_grad():
            expected = [token_losses(base, collate([row], [0]), None).item() for row in rendered[:9]]
        assert found == pytest.approx(expected, rel=1e-5)

    def test_right_answers_are_counted(self, base, tokenizer, rendered):
        """What the model says greedily, a prompt at a time and without cache, is right; another answer is not."""
        rows = rendered[:4]
        replies = []
        for row in rows:
            ids = row.input_ids[: row.supervised.index(True)]
            start = len(ids)
            for _ in range(6):
                with torch.no_grad():
                    ids = [*ids, base(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item()]
                if ids[-1] == tokenizer.eos_token_id:
                    break
            replies.append(tokenizer.decode(ids[start:], skip_special_tokens=True))
        assert all(map(answer_of, replies))
        answers = [replies[0], "nothing of the kind", f"The answer is {replies[2]}", replies[3]]
        assert len({len(row.input_ids[: row.supervised.index(True)]) for row in rows}) > 1  # so that some are padded
        for tokens_per_batch in (1, None):
            found = measure(base, tokenizer, held_out("t", rows, answers), tokens_per_batch, 6)
            assert found.correct == [True, False, True, True]
            assert len(found.losses) == 4

    def test_no_answer_is_asked_for_where_there_is_none(self, base, tokenizer, rendered, monkeypatch):
        monkeypatch.setattr(type(base), "generate", lambda *_, **__: 1 / 0)
        assert measure(base, tokenizer, held_out("t", rendered[:2]), None, 6).correct == []
