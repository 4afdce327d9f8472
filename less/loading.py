"""The base model and the renderer of its rows, as every build and training begins."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from datastore.errors import SettingError
from less.data.rendering import RenderConfig, Renderer
from less.models import context_length, load_base_model, load_tokenizer
from less.provenance import location_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["LoadingConfig", "load_model"]


@dataclass(frozen=True, kw_only=True)
class LoadingConfig:
    """How a model is loaded and rows become its batches: what the settings of every run of a model have."""

    max_length: int = 2048
    """Tokens a row; longer rows are cut at the end."""
    system_prompt: str = "keep"
    """keep, none, or the text to put in place of each row's own."""
    chat_template: str | None = None
    """tulu, chatml or a file; None takes the tokenizer's own."""
    dtype: str = "auto"
    """Of the base weights: float32, bfloat16, or auto (bfloat16 on CUDA, float32 on the CPU)."""
    tokens_per_batch: int | None = None
    """Padded tokens computed at once; None chooses by device."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    strict: bool = False
    """Stop at the first row that cannot be used instead of leaving it out."""
    trust_remote_code: bool = False
    """Let code that comes with the model run."""

    def __post_init__(self) -> None:
        for name in ("max_length", "tokens_per_batch"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise SettingError(f"{name} must be at least 1, got {value}")

    @property
    def rendering(self) -> RenderConfig:
        """How rows become tokens."""
        return RenderConfig(
            max_length=self.max_length, system_prompt=self.system_prompt, chat_template=self.chat_template
        )


def load_model(
    model: "str | Path | PreTrainedModel",
    tokenizer: "str | Path | PreTrainedTokenizerBase | None",
    config: LoadingConfig,
) -> "tuple[PreTrainedModel, Renderer]":
    """The base model, and what renders rows with its tokenizer or the one given.

    Args:
        model: a folder, a hub name, or a loaded model.
        tokenizer: where it is not the model's own.
        config: how; the model's context may lower the length limit.

    Raises:
        ModelError: there is no such model or tokenizer.
        SettingError: `dtype` or `device` contradict a loaded model, or a setting of the rendering is out of range.
    """
    base = load_base_model(model, dtype=config.dtype, device=config.device, trust_remote_code=config.trust_remote_code)
    own = location_of(model) if tokenizer is None else tokenizer
    loaded = load_tokenizer(own, trust_remote_code=config.trust_remote_code)
    return base, Renderer(loaded, config.rendering, context_length=context_length(base.config))
