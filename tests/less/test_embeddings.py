"""Embeddings against the formula, and the store that keeps them: whole, resumed, appended to, refused."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig

import less.embedding_store
from datastore import Datastore
from datastore.errors import DataError, ProvenanceError, SettingError
from less import build_embeddings
from less.data.batching import collate
from less.data.conversations import conversation_of
from less.data.rendering import RenderConfig, Rendered, Renderer
from less.embedding_store import BASE
from less.embeddings import EMBEDDINGS, embedding_features, embedding_features_ref
from less.gradients import token_losses
from less.models import load_base_model, load_tokenizer
from less.provenance import holds_gradients

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
ARCHITECTURES = {
    "llama": LlamaConfig(**SMALL, intermediate_size=48, num_key_value_heads=2),
    "gemma2-softcap": Gemma2Config(
        **SMALL, intermediate_size=48, num_key_value_heads=2, head_dim=8, final_logit_softcapping=5.0
    ),
    "gpt2": GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2, pad_token_id=0),
}
LENGTHS = (23, 2, 64, 15, 63)


@pytest.fixture(autouse=True)
def no_power_cut(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(ARCHITECTURES[request.param]).eval()


@pytest.fixture(scope="module")
def rows():
    """Rows of awkward lengths; the last two of one length but one."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for length in LENGTHS:
        ids = torch.randint(1, 97, (length,), generator=generator).tolist()
        made.append(Rendered(ids, [False] * (length // 2) + [True] * (length - length // 2), False))
    return made


def embedded(model, batch):
    return embedding_features(model, batch).features_BK[EMBEDDINGS]


class TestAnEmbedding:
    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("members", [[0, 1, 2, 3, 4], [1], [4, 2], [3, 1, 0]])
    def test_is_the_formulas_in_any_batch(self, model, rows, members, side):
        found_BD = embedded(model, collate(rows, members, padding_side=side))
        assert found_BD.dtype == torch.float32
        for n, found_D in zip(members, found_BD, strict=True):
            expected_D = embedding_features_ref(model, rows[n].input_ids)
            assert (found_D - expected_D).norm() < 1e-5 * expected_D.norm()

    def test_weighs_a_later_token_more(self, model, rows):
        """The reference itself, against one that is written otherwise."""
        ids = rows[0].input_ids
        hidden_TD = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0].detach()
        weights_T = np.arange(1, len(ids) + 1) / np.arange(1, len(ids) + 1).sum()
        expected_D = np.average(hidden_TD.double().numpy(), axis=0, weights=weights_T)
        np.testing.assert_allclose(embedding_features_ref(model, ids).numpy(), expected_D, rtol=1e-6, atol=1e-9)
        assert not np.allclose(expected_D, hidden_TD.double().mean(dim=0).numpy(), rtol=0.05)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_takes_nothing_from_padding_even_nan(self, model, rows, side):
        batch = collate(rows, [0, 1, 3], padding_side=side)
        expected_BD = embedded(model, batch)
        padding_BT = batch.attention_mask_BT == 0

        def poison(_, args):
            if args[0].shape[:2] == padding_BT.shape:
                return (args[0].masked_fill(padding_BT[..., None], float("nan")),)
            return None

        hook = model.get_output_embeddings().register_forward_pre_hook(poison)
        try:
            found = embedding_features(model, batch)
        finally:
            hook.remove()
        assert padding_BT.any()
        torch.testing.assert_close(found.features_BK[EMBEDDINGS], expected_BD)
        assert found.losses_B.isfinite().all()

    def test_comes_with_the_loss_and_its_own_norm(self, model, rows):
        batch = collate(rows, range(len(rows)))
        found = embedding_features(model, batch)
        with torch.no_grad():
            torch.testing.assert_close(found.losses_B, token_losses(model, batch, None))
        for n, row in enumerate(rows):  # and by the model's own logits, a row at a time
            logits_TV = model(input_ids=torch.tensor([row.input_ids])).logits[0].detach()
            nll_T = torch.nn.functional.cross_entropy(logits_TV[:-1], torch.tensor(row.input_ids[1:]), reduction="none")
            assert found.losses_B[n] == pytest.approx(nll_T[row.supervised[1:]].mean().item(), rel=1e-5)
        norms_B = found.features_BK[EMBEDDINGS].norm(dim=1)
        torch.testing.assert_close(found.grad_norms_B, norms_B)
        torch.testing.assert_close(found.update_norms_B[EMBEDDINGS], norms_B)

    def test_is_the_same_where_the_loss_is_made_a_few_tokens_at_a_time(self, model, rows, monkeypatch):
        batch = collate(rows, range(len(rows)))
        expected = embedding_features(model, batch)
        monkeypatch.setattr("less.lm_head._LOGITS_AT_ONCE", 97 * 10)
        found = embedding_features(model, batch)
        torch.testing.assert_close(found.features_BK[EMBEDDINGS], expected.features_BK[EMBEDDINGS])
        torch.testing.assert_close(found.losses_B, expected.losses_B, rtol=1e-4, atol=1e-5)

    def test_leaves_no_hook_and_no_graph(self, model, rows):
        found = embedding_features(model, collate(rows, [0]))
        assert not found.features_BK[EMBEDDINGS].requires_grad
        assert not found.losses_B.requires_grad
        assert not model.get_output_embeddings()._forward_pre_hooks


def files(folder):
    found = (file for file in folder.rglob("*") if file.is_file() and file.name != ".lock")
    return {str(file.relative_to(folder)): file.read_bytes() for file in found}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def build(tiny_model_folder):
    def call(folder, data, **changes):
        options = {
            "model": tiny_model_folder, "shard_rows": 16, "tokens_per_batch": 256, "feature_dtype": "float32",
            "progress": False,
        }  # fmt: skip
        return build_embeddings(datastore=folder, data=data, **options | changes)

    return call


@pytest.fixture(scope="module")
def made(build, tiny_pool, tmp_path_factory):
    """A sealed store of the tiny pool, which no test writes to."""
    folder = tmp_path_factory.mktemp("embeddings") / "store"
    build(folder, tiny_pool)
    return folder


@pytest.fixture
def nothing_is_computed(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("a forward pass")

    monkeypatch.setattr(less.embedding_store, "embedding_features", fail)


class TestTheStore:
    def test_holds_every_rows_embedding_and_loss(self, made, build, tiny_model_folder, tiny_rows):
        store = Datastore.open(made)
        assert (store.feature_sets, store.checkpoints, store.num_rows) == ([EMBEDDINGS], [BASE], len(tiny_rows))
        assert not holds_gradients(store)
        stats, base = store.stats(EMBEDDINGS, BASE), load_base_model(tiny_model_folder).eval()
        renderer = Renderer(load_tokenizer(tiny_model_folder), RenderConfig())
        for block in store.iter_blocks(EMBEDDINGS, BASE):
            for n in range(block.start, block.stop, 5):
                row = renderer.render(conversation_of(tiny_rows[n]))
                expected_D = embedding_features_ref(base, row.input_ids).numpy()
                norm = np.linalg.norm(expected_D)
                assert np.linalg.norm(block.features_nK[n - block.start] - expected_D / norm) < 1e-5
                assert stats.norms_N[n] == pytest.approx(norm, rel=1e-5)
                with torch.no_grad():
                    loss = token_losses(base, collate([row], [0]), None).item()
                assert stats.losses_N[n] == pytest.approx(loss, rel=1e-4)
        assert not store.direction(EMBEDDINGS, BASE).any()

    def test_that_lost_a_shard_gets_it_back_to_the_byte(self, made, build, tiny_pool, tmp_path):
        folder = shutil.copytree(made, tmp_path / "store")
        whole = files(folder)
        shards = sorted(name for name in whole if name.startswith("shards/"))
        assert len(shards) == 3
        for name in shards[1:]:
            (folder / name).unlink()
        (folder / "manifest.json").unlink()
        build(folder, tiny_pool)
        assert files(folder) == whole

    def test_that_is_complete_is_left_as_it_is(self, made, build, tiny_pool, tmp_path, nothing_is_computed):
        folder = shutil.copytree(made, tmp_path / "store")
        before = {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file() and file.suffix}
        build(folder, tiny_pool)
        assert before == {file: file.stat().st_mtime_ns for file in before}

    def test_is_gone_on_with_where_it_was_killed(self, made, build, tiny_pool, tmp_path, monkeypatch):
        real, calls = less.embedding_store.embedding_features, []

        def dies_later(*args):
            if len(calls) == 4:
                raise KeyboardInterrupt
            calls.append(args)
            return real(*args)

        monkeypatch.setattr(less.embedding_store, "embedding_features", dies_later)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path / "store", tiny_pool)
        assert not (tmp_path / "store/manifest.json").exists()
        monkeypatch.setattr(less.embedding_store, "embedding_features", real)
        build(tmp_path / "store", tiny_pool)
        assert files(tmp_path / "store") == files(made)

    def test_gets_new_data_appended(self, made, build, tiny_pool, tiny_rows, tmp_path):
        folder = shutil.copytree(made, tmp_path / "store")
        before = files(folder)
        more = write_jsonl(tmp_path / "more.jsonl", [{**tiny_rows[3], "id": "again"}, {"id": "wordless"}])
        store = build(folder, [tiny_pool, more])
        assert (store.num_rows, [row.id for row in store.skipped]) == (len(tiny_rows) + 1, ["wordless"])
        after = files(folder)
        assert all(after[name] == content for name, content in before.items() if name.endswith(".safetensors"))
        stats = store.stats(EMBEDDINGS, BASE)
        assert stats.losses_N[-1] == pytest.approx(stats.losses_N[3], rel=1e-5)

    @pytest.mark.parametrize(
        ("changes", "named"),
        [
            ({"max_length": 32}, "max_length"),
            ({"system_prompt": "none"}, "system_prompt"),
            ({"chat_template": "chatml"}, "template"),
            ({"feature_dtype": "float16"}, "dtype"),
            ({"shard_rows": 8}, "shard_rows"),
        ],
    )
    def test_of_other_settings_is_refused_by_name(self, made, build, tiny_pool, tmp_path, changes, named):
        folder = shutil.copytree(made, tmp_path / "store")
        with pytest.raises(ProvenanceError, match=named):
            build(folder, tiny_pool, **changes)
        assert files(folder) == files(made)

    def test_that_lacks_rows_of_data_not_given_says_which(self, made, build, tiny_rows, tmp_path):
        folder = shutil.copytree(made, tmp_path / "store")
        next((folder / "shards").rglob("*.safetensors")).unlink()
        other = write_jsonl(tmp_path / "other.jsonl", tiny_rows[:2])
        with pytest.raises(DataError, match=r"pool\.jsonl.*--data"):
            build(folder, other)

    @pytest.mark.parametrize("training", [True, False])
    def test_gives_the_model_back_in_its_mode(
        self, build, tiny_model_folder, tiny_rows, training, tmp_path, monkeypatch
    ):
        base = load_base_model(tiny_model_folder).train(training)
        build(tmp_path / "store", tiny_rows[:3], model=base, tokenizer=tiny_model_folder)
        assert base.training == training

        def fail(*_):
            raise RuntimeError("broken")

        monkeypatch.setattr(less.embedding_store, "embedding_features", fail)
        with pytest.raises(RuntimeError, match="broken"):
            build(tmp_path / "broken", tiny_rows[:3], model=base, tokenizer=tiny_model_folder)
        assert base.training == training

    @pytest.mark.parametrize("changes", [{"max_length": 0}, {"shard_rows": 0}, {"feature_dtype": "int2"}])
    def test_of_a_setting_out_of_range_is_refused_before_any_work(self, build, tiny_pool, tmp_path, changes):
        with pytest.raises(SettingError, match=next(iter(changes))):
            build(tmp_path / "store", tiny_pool, **changes)
        assert not (tmp_path / "store").exists()
