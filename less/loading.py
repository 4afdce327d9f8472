"""The base model and the renderer of its rows, as every build and training begins."""

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from less.data.rendering import RenderConfig, Renderer
from less.models import context_length, load_base_model, load_tokenizer
from less.provenance import location_of

__all__ = ["load_model"]


def load_model(
    model: "str | Path | PreTrainedModel",
    tokenizer: "str | Path | PreTrainedTokenizerBase | None",
    rendering: RenderConfig,
    *,
    dtype: str,
    device: str,
    trust_remote_code: bool,
) -> tuple[PreTrainedModel, Renderer]:
    """The base model, and what renders rows with its tokenizer or the one given.

    Args:
        model, dtype, device, trust_remote_code: as in `less.models.load_base_model`.
        tokenizer: where it is not the model's own.
        rendering: how rows become tokens; the model's context may lower its length limit.

    Raises:
        ModelError: there is no such model or tokenizer.
        SettingError: `dtype` or `device` contradict a loaded model, or a setting of the rendering is out of range.
    """
    base = load_base_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    own = location_of(model) if tokenizer is None else tokenizer
    loaded = load_tokenizer(own, trust_remote_code=trust_remote_code)
    return base, Renderer(loaded, rendering, context_length=context_length(base.config))
