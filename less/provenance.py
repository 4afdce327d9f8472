"""What a store records of how its features were made, and how it is held to it when it is used again.

Settings decide the numbers: a store built with one of them changed is another store. The environment says
where things lay and what ran: it is kept to find them again and to explain a difference, never compared.
"""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from datastore import Datastore
from datastore.errors import ProvenanceError, StoreError
from less.checkpoints import Checkpoint
from less.data.rendering import RenderConfig, Renderer
from less.features import FeatureSetConfig
from less.models import ParamLayout, model_fingerprint
from less.moments import AdamState
from less.projection import ProjectionConfig, Projector, make_projector

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "check_checkpoints",
    "check_model",
    "check_template",
    "constants_of",
    "holds_gradients",
    "location_of",
    "record_embedding_settings",
    "record_environment",
    "record_settings",
    "recorded_projector",
    "running_on",
]


def record_settings(
    *,
    base: "PreTrainedModel",
    layout: ParamLayout,
    layers: str,
    renderer: Renderer,
    adam: Mapping[Checkpoint, dict[str, Any] | None],
    feature_sets: Mapping[FeatureSetConfig, tuple[Projector, str]],
    tokens_per_batch: int,
    prefilter: dict[str, Any] | None,
) -> dict[str, Any]:
    """The settings of a build, as JSON.

    Args:
        base, layout, renderer: the model, the order of its LoRA parameters, and how rows become tokens.
        layers: which LoRA layers the layout is of.
        adam: Adam's constants at each checkpoint, None where no update rule needs them.
        feature_sets: the projector and the stored dtype of each.
        tokens_per_batch: it decides which rows share a batch, and so the last bits of a feature.
        prefilter: how rows were chosen and which, None for all of them; see `less.prefilter`.
    """
    return {
        "model": {
            "fingerprint": model_fingerprint(base),
            "param_layout": layout.hash,
            "num_params": layout.num_params,
            "layers": layers,
            "dtype": str(base.dtype).removeprefix("torch."),
        },
        "rendering": renderer.provenance(),
        "checkpoints": {
            checkpoint.name: {
                "step": checkpoint.step,
                "weight": checkpoint.weight,
                "adapter_sha256": checkpoint.adapter_sha256,
                "optimizer_sha256": checkpoint.optimizer_sha256 if constants else None,
                "adam": constants,
            }
            for checkpoint, constants in adam.items()
        },
        "feature_sets": {
            fs.name: {"update_rule": fs.update_rule, "projection": projector.provenance(), "dtype": dtype}
            for fs, (projector, dtype) in feature_sets.items()
        },
        "tokens_per_batch": tokens_per_batch,
        "prefilter": prefilter,
    }


def record_embedding_settings(
    *,
    base: "PreTrainedModel",
    renderer: Renderer,
    feature_set: str,
    checkpoint: str,
    dtype: str,
    tokens_per_batch: int,
) -> dict[str, Any]:
    """The settings of a store of embeddings, as JSON: those of a build, without what an adapter decides.

    Args:
        base, renderer: the model, and how rows become tokens.
        feature_set, checkpoint: the names under which the embeddings stand.
        dtype: of the stored rows.
        tokens_per_batch: as in `record_settings`.
    """
    return {
        "model": {
            "fingerprint": model_fingerprint(base),
            "param_layout": None,
            "num_params": 0,
            "layers": None,
            "dtype": str(base.dtype).removeprefix("torch."),
        },
        "rendering": renderer.provenance(),
        "checkpoints": {
            checkpoint: {"step": 0, "weight": 1.0, "adapter_sha256": None, "optimizer_sha256": None, "adam": None}
        },
        "feature_sets": {
            feature_set: {
                "embedding": {"pooling": "position-weighted mean", "layer": "final", "version": 1},
                "dtype": dtype,
            }
        },
        "tokens_per_batch": tokens_per_batch,
        "prefilter": None,
    }


def holds_gradients(store: Datastore) -> bool:
    """Whether a store's features are of gradients, not embeddings; `StoreError` where its settings do not say."""
    feature_sets = store.settings.get("feature_sets")
    if not isinstance(feature_sets, dict) or not all(isinstance(entry, dict) for entry in feature_sets.values()):
        raise StoreError(
            f"{store.path} was not built by gradsift: its settings do not say what its feature sets "
            f"{', '.join(store.feature_sets)} are made of. Build one with `gradsift build-datastore`"
        )
    return all("update_rule" in entry for entry in feature_sets.values())


def constants_of(state: AdamState | None) -> dict[str, Any] | None:
    """β, ε and t of an Adam state: all of it but the moments."""
    return None if state is None else {name: getattr(state, name) for name in ("step", "beta1", "beta2", "eps")}


def record_environment(
    *,
    model: "str | Path | PreTrainedModel",
    tokenizer: "str | Path | PreTrainedTokenizerBase | None",
    checkpoints: Sequence[Checkpoint],
    rendering: RenderConfig,
    device: torch.device,
) -> dict[str, Any]:
    """Where model, tokenizer and checkpoints lay, and the machine and versions that computed, as JSON."""
    template = rendering.chat_template
    return {
        "model": location_of(model),
        "tokenizer": location_of(model if tokenizer is None else tokenizer),
        "checkpoints": [str(checkpoint.path.resolve()) for checkpoint in checkpoints],
        "rendering": asdict(rendering) | {"chat_template": template and location_of(template)},
        **running_on(device),
    }


def running_on(device: torch.device) -> dict[str, Any]:
    """The machine and versions that compute, as JSON."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "peft", "gradsift")},
        },
    }


def location_of(thing: "str | Path | PreTrainedModel | PreTrainedTokenizerBase") -> str:
    """Where to load a model, tokenizer or template again: an absolute path, or the hub's name for it.

    Empty for an object that was never loaded from anywhere.
    """
    if not isinstance(thing, str | Path):
        thing = str(thing.name_or_path or "")
    if not str(thing):
        return ""
    return str(Path(thing).resolve()) if Path(thing).exists() else str(thing)


def check_model(store: Datastore, model: "PreTrainedModel") -> None:
    """Raise `ProvenanceError` unless `model` has the weights that the store was built with."""
    found, expected = model_fingerprint(model), store.settings["model"]["fingerprint"]
    if found != expected:
        raise ProvenanceError(
            f"{location_of(model) or 'what was given'} is not the model that {store.path} was built with: "
            f"fingerprint {found[:12]}, expected {expected[:12]}. Give the right one with --model"
        )


def check_template(store: Datastore, renderer: Renderer) -> None:
    """Raise `ProvenanceError` unless targets are rendered with the pool's tokenizer and chat template."""
    found, expected = renderer.provenance(), store.settings["rendering"]
    for key, what in (("template_sha256", "chat template"), ("vocabulary_sha256", "tokenizer's vocabulary")):
        if found[key] != expected[key]:
            raise ProvenanceError(
                f"the {what} is not the one that {store.path} was built with: sha256 {found[key][:12]}, expected "
                f"{expected[key][:12]}. Restore it, or give the right --tokenizer"
            )


def check_checkpoints(store: Datastore, found: Sequence[Checkpoint]) -> None:
    """Raise `ProvenanceError` unless these are the adapters of the store, in its order."""
    expected = [store.settings["checkpoints"][name]["adapter_sha256"] for name in store.checkpoints]
    if [checkpoint.adapter_sha256 for checkpoint in found] != expected:
        raise ProvenanceError(
            f"{', '.join(str(checkpoint.path) for checkpoint in found)}: not the checkpoints that {store.path} was "
            f"built with ({', '.join(store.checkpoints)}): the adapters' weights differ. Give the right --checkpoints"
        )


def recorded_projector(store: Datastore, feature_set: str, layout: ParamLayout) -> Projector:
    """The store's own Π for a feature set; `ProvenanceError` where this version would make another."""
    if layout.hash != store.settings["model"]["param_layout"]:
        raise ProvenanceError(
            f"the adapter's parameters are not those that {store.path} was built with: {layout.num_params:,} of "
            f"them, expected {store.settings['model']['num_params']:,}. Give the right --checkpoints"
        )
    recorded = store.settings["feature_sets"][feature_set]["projection"]
    config = ProjectionConfig(kind=recorded["kind"], proj_dim=recorded["proj_dim"], seed=recorded["seed"] or 0)
    projector = make_projector(config, layout)
    if projector.provenance() != recorded:
        raise ProvenanceError(
            f"this version projects as {projector.provenance()}, {store.path} was built with {recorded}. "
            "Use the version that built it, or build it again"
        )
    return projector
