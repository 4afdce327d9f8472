"""What tests share: a tiny random Llama with a byte tokenizer, a pool for it, a run of checkpoints, a store.

Everything is made in process. Real data and models are taken from the folder `shared` beside the checkout, or
from GRADSIFT_SHARED; a test that wants them skips itself where they are absent.
"""

import json
import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # on a busy machine, threads that spin take five times as long

SHARED = Path(os.environ.get("GRADSIFT_SHARED", Path(__file__).resolve().parents[2] / "shared"))

TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def pytest_collection_modifyitems(items):
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _shared(path: str) -> Path:
    if not (SHARED / path).exists():
        pytest.skip(f"{path} is not in the shared folder (set GRADSIFT_SHARED)")
    return SHARED / path


@pytest.fixture(scope="session")
def stories260k() -> Path:
    return _shared("models/stories260K")


@pytest.fixture(scope="session")
def shared_pool() -> Path:
    return _shared("data/pool.jsonl")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    return _shared("data")


def byte_tokenizer():
    """A fast tokenizer whose tokens are bytes, with pad = eos, as in many real models."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"</s>": 0, **{symbol: i + 1 for i, symbol in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")
    fast.chat_template = TEMPLATE
    return fast


@pytest.fixture(scope="session")
def tiny_tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory) -> Path:
    """Two-layer Llama with grouped-query attention and an untied head, random weights, saved with its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-model")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.1, pad_token_id=0,
                eos_token_id=0,
            )
        )  # fmt: skip
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_model(tiny_model_folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model_folder).eval()


_WORDS = [
    "red",
    "green",
    "blue",
    "amber",
    "violet",
    "teal",
    "ochre",
    "plum",
    "umber",
    "jade",
    "lilac",
    "coral",
    "mauve",
    "sienna",
    "indigo",
    "pearl",
]


def tiny_row(number: int) -> dict:
    """A row whose length and content vary with its number."""
    asked = " ".join(_WORDS[(number * 7 + i * 3) % 16] for i in range(1 + number % 5))
    answer = " ".join(_WORDS[(number * 5 + i) % 16] for i in range(1 + number % 3))
    return {
        "id": f"row-{number}",
        "kind": _WORDS[number % 4],
        "messages": [{"role": "user", "content": f"mix {asked}"}, {"role": "assistant", "content": answer}],
    }


@pytest.fixture(scope="session")
def tiny_rows() -> list[dict]:
    return [tiny_row(n) for n in range(40)]


@pytest.fixture(scope="session")
def tiny_targets() -> list[dict]:
    return [{**tiny_row(100 + n), "id": f"target-{n}", "subtask": "ab"[n % 2]} for n in range(5)]


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_pool(tmp_path_factory, tiny_rows) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("pool") / "pool.jsonl", tiny_rows)


@pytest.fixture(scope="session")
def tiny_target_file(tmp_path_factory, tiny_targets) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("targets") / "tones.jsonl", tiny_targets)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, tiny_model_folder, tiny_pool) -> Path:
    """Two checkpoints of rank 4 on every linear layer, by our own warm-up."""
    import warnings

    from less import warmup

    run = tmp_path_factory.mktemp("run") / "run"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warmup(
            model=tiny_model_folder, data=tiny_pool, output=run, fraction=0.5, epochs=2, batch_size=4,
            learning_rate=1e-2, lora_rank=4, lora_dropout=0.0, progress=False,
        )  # fmt: skip
    return run


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory, tiny_model_folder, tiny_run, tiny_pool) -> Path:
    """A sealed store of the tiny pool; tests must not write to it."""
    from less import build_datastore

    folder = tmp_path_factory.mktemp("store") / "store"
    build_datastore(
        model=tiny_model_folder, checkpoints=tiny_run, data=tiny_pool, datastore=folder,
        proj_dim=256, shard_rows=16, tokens_per_batch=256, progress=False,
    )  # fmt: skip
    return folder
