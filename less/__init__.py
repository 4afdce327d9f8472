"""LESS: which rows of an instruction pool will teach a model a target capability (Xia et al., ICML 2024).

    from less import warmup, build_datastore, select, score

The names below are loaded when they are first used, so that importing the package loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from less.checkpoints import EvidenceWarning
    from less.influence import InfluenceScores
    from less.pipeline import BuildConfig, BuildResult, build_datastore
    from less.ranking import Selection, select
    from less.scoring import ScoreConfig, score
    from less.training import WarmupConfig, WarmupResult, warmup

__all__ = [
    "BuildConfig",
    "BuildResult",
    "EvidenceWarning",
    "InfluenceScores",
    "ScoreConfig",
    "Selection",
    "WarmupConfig",
    "WarmupResult",
    "build_datastore",
    "score",
    "select",
    "warmup",
]

_HOME = {
    "BuildConfig": "pipeline",
    "BuildResult": "pipeline",
    "EvidenceWarning": "checkpoints",
    "InfluenceScores": "influence",
    "ScoreConfig": "scoring",
    "Selection": "ranking",
    "WarmupConfig": "training",
    "WarmupResult": "training",
    "build_datastore": "pipeline",
    "score": "scoring",
    "select": "ranking",
    "warmup": "training",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
