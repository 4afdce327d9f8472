"""CHES: which preference pairs will make DPO push probability off the answer it should prefer (Razin et al. 2025).

    from ches import score_pairs, filter_pairs, ches_scores, DisplacementCallback

The names below are loaded when they are first used, so that importing the package loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ches.displacement import DisplacementCallback
    from ches.filtering import FilterConfig, FilterResult, filter_pairs
    from ches.measures import ches_scores
    from ches.scores import PairScores, score_pairs
    from ches.scoring import ChesConfig

__all__ = [
    "ChesConfig",
    "DisplacementCallback",
    "FilterConfig",
    "FilterResult",
    "PairScores",
    "ches_scores",
    "filter_pairs",
    "score_pairs",
]

_HOME = {
    "ChesConfig": "scoring",
    "DisplacementCallback": "displacement",
    "FilterConfig": "filtering",
    "FilterResult": "filtering",
    "PairScores": "scores",
    "ches_scores": "measures",
    "filter_pairs": "filtering",
    "score_pairs": "scores",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
