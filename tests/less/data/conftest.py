"""Tiny tokenizers, and the chat templates of well-known models cut down to what makes each one hard."""

from collections.abc import Callable
from functools import cache

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|end|>", "<|return|>"]
CORPUS = ["The quick brown fox jumps over the lazy dog. Hello there! user assistant system naïve 日本語 🙂 \n\n 42"]


def byte_level_tokenizer(
    template: str | dict[str, str] | None, *, trim_offsets: bool = False, eos: str = "<|im_end|>"
) -> PreTrainedTokenizerFast:
    """A GPT-2 style tokenizer whose pad token is its eos token."""
    tokenizer = Tokenizer.from_str(trained_on_the_corpus())
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos, pad_token=eos)
    fast.chat_template = template
    return fast


@cache
def trained_on_the_corpus() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer.to_str()


CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

TEMPLATES = {
    "chatml": CHATML,
    # SmolLM2: a system prompt of its own
    "default system": (
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe a fox.<|im_end|>\n' }}{% endif %}"
    )
    + CHATML,
    # Llama 2: no generation prompt, spaces around the reply, white space trimmed
    "llama-2": (
        "{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + message['content'].strip() + ' ' + '</s>' }}{% endif %}{% endfor %}"
    ),
    # Gemma: another name for the assistant, refuses a system prompt
    "gemma": (
        "{{ bos_token }}{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
        "{{ '<|im_start|>' + role + '\n' + message['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
    ),
    # Qwen 3: an empty thought before the last reply, old thoughts dropped, tool calls
    "qwen-3": (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}"
        "{% set content = (message.content or '').split('</think>')[-1].lstrip('\n') %}"
        "{{ '<|im_start|>assistant\n' }}{% if loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{{ content }}{% for call in message.tool_calls or [] %}"
        "{% if content or not loop.first %}{{ '\n' }}{% endif %}"
        "{{ '<tool_call>' + call.function.name + '</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
        "{% else %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    # gpt-oss: the last turn ends with another token than the others
    "gpt-oss": (
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content }}"
        "{{ '<|return|>' if loop.last and message.role == 'assistant' else '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    # Mistral: no generation prompt, and the system prompt moves to the last question
    "mistral": (
        "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
        "{% set chat = messages[1:] if system else messages %}{% set last = namespace(user=-1) %}"
        "{% for message in chat if message.role == 'user' %}{% set last.user = message %}{% endfor %}"
        "{{ bos_token }}{% for message in chat %}{% if message.role == 'user' %}"
        "{{ '[INST] ' + (system if message == last.user else '') + message.content + '[/INST]' }}"
        "{% else %}{{ ' ' + message.content + '</s>' }}{% endif %}{% endfor %}"
    ),
    # Phi 3: text after the last end-of-turn token
    "phi-3": (
        "{% for message in messages %}"
        "{{ '<|' + message.role + '|>\n' + message.content + '<|end|>\n' }}{% endfor %}"
        "{{ '<|assistant|>\n' if add_generation_prompt else '</s>' }}"
    ),
    # Command R: two tokens close a turn
    "cohere": (
        "{% for message in messages %}"
        "{{ '<|' + message.role + '|>' + message.content + '<|end|></s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    ),
    # Refuses whatever does not end with a reply
    "answers only": ("{% if messages[-1].role != 'assistant' %}{{ raise_exception('no answer') }}{% endif %}" + CHATML),
    # Ignores add_generation_prompt, but has a header
    "no generation prompt": (
        "{% for message in messages %}{{ '### ' + message.role + ':\n' + message.content + '</s>\n' }}{% endfor %}"
    ),
    # Nothing closes a turn
    "open ended": (
        "{% for message in messages %}{{ message.role + ': ' + message.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    ),
    "marked": (
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
        "{% if message.role == 'assistant' %}"
        "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
        "{% else %}{{ message.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}


@pytest.fixture(scope="session")
def tokenizer_with() -> Callable[..., PreTrainedTokenizerFast]:
    """`tokenizer_with(template)`: the name of one above, or a template itself."""
    return lambda template, **options: byte_level_tokenizer(
        TEMPLATES.get(template, template) if isinstance(template, str) else template, **options
    )
