"""Bergson's way to gradients of LoRA parameters on the disk: `bergson.collect_gradients`, over given batches.

Its settings are those that ask least of it: the plain gradient without an optimizer's moments, and of each adapter
matrix a 16 × 16 projection, the width of its own examples. Bergson is no dependency of this project.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from peft import PeftModel

from less.data.rendering import Rendered
from less.models import lora_layers

__all__ = ["PROJ_DIM", "collect", "is_importable"]

PROJ_DIM = 16


def is_importable() -> bool:
    """Whether it is installed, beside the `datasets` that it wants rows in."""
    return find_spec("bergson") is not None and find_spec("datasets") is not None


def collect(
    model: PeftModel, rendered: Sequence[Rendered], batches: list[list[int]], folder: Path, *, proj_dim: int = PROJ_DIM
) -> Any:
    """Write the index of these rows to `folder`; returns the gradients as it opens them.

    Args:
        model: a LoRA model.
        rendered: the rows.
        batches: which of them go together.
        folder: where to; its parent exists.
        proj_dim: side of each matrix's projection, 0 for none.
    """
    from bergson import GradientProcessor, IndexConfig, collect_gradients, load_gradients
    from datasets import Dataset

    rows = [
        {
            "input_ids": row.input_ids,
            "labels": [token if own else -100 for token, own in zip(row.input_ids, row.supervised, strict=True)],
            "length": row.num_tokens,
        }
        for row in rendered
    ]
    config = IndexConfig(run_path=str(folder), projection_dim=proj_dim, loss_reduction="mean")
    config.partial_run_path.mkdir()
    matrices = {
        f"{name.removeprefix('base_model.')}.lora_{which}.default" for name in lora_layers(model) for which in "AB"
    }
    before = [parameter.requires_grad for parameter in model.parameters()]
    embedding = model.get_input_embeddings()
    try:
        model.requires_grad_(False)
        embedding.requires_grad_(True)  # as its own loader does: hooks fire where a gradient passes
        collect_gradients(
            model, Dataset.from_list(rows), GradientProcessor(projection_dim=proj_dim), config, batches=batches,
            target_modules=matrices,
        )  # fmt: skip
    finally:
        for parameter, required in zip(model.parameters(), before, strict=True):
            parameter.requires_grad_(required)
    config.partial_run_path.rename(folder)
    return load_gradients(folder)
