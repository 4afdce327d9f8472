"""Random Llamas of real sizes, and rows with a real pool's lengths: what a benchmark needs where there is no data.

Time depends on shapes and lengths, not on what weights and words say. `pool_lengths.json` holds tokens and supervised
tokens of the first 1,000 rows of an instruction pool under SmolLM2's tokenizer and chat template: counts, no text.
"""

import json
import random
from functools import cache
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = ["SIZES", "letter_tokenizer", "pool_lengths", "random_llama", "rows_of_lengths"]

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 48, "vocab_size": 257,
    },
    "1b": {
        "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 8192, "vocab_size": 128256, "tie_word_embeddings": True,
    },
    "7b": {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "intermediate_size": 11008, "vocab_size": 32000,
    },
}  # fmt: skip
"""The shapes of Llama 3.2 1B and Llama 2 7B."""

# No role header: a row of one prompt and one reply has its letters and two end-of-turn tokens, one supervised.
_TEMPLATE = "{% for message in messages %}{{ message['content'] + eos_token }}{% endfor %}"


def random_llama(size: str, *, device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    """A Llama of one of `SIZES` in evaluation mode, its weights drawn on `device`."""
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES[size], max_position_embeddings=2048, pad_token_id=0, bos_token_id=0, eos_token_id=0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """One token a letter, and an end-of-turn token that pads too."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE({letter: n for n, letter in enumerate(["</s>", *letters])}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.add_special_tokens(["</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="</s>")
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


@cache
def pool_lengths() -> list[tuple[int, int]]:
    """(tokens, supervised tokens) of a real pool's rows."""
    return [tuple(pair) for pair in json.loads(Path(__file__).with_name("pool_lengths.json").read_text())]


def rows_of_lengths(lengths: list[tuple[int, int]], num_rows: int) -> list[dict[str, str]]:
    """Rows that `letter_tokenizer` renders to these lengths, taken in order and over again."""
    draw = random.Random(0)
    return [
        {
            "prompt": "".join(draw.choices("abcdefgh", k=num_tokens - num_supervised - 1)),
            "completion": "".join(draw.choices("ijklmnop", k=num_supervised - 1)),
        }
        for num_tokens, num_supervised in islice(cycle(lengths), num_rows)
    ]
