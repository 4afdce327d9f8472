"""LESS: which rows of an instruction pool will teach a model a target capability (Xia et al., ICML 2024).

    from less import warmup, build_datastore, select, score

The names below are loaded when they are first used, so that importing the package loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from less.checkpoints import EvidenceWarning
    from less.compaction import compact
    from less.duplicates import AlikeRows, NearDuplicatesConfig, near_duplicates
    from less.embedding_store import EmbeddingConfig, build_embeddings
    from less.evaluation.experiment import EvaluateConfig, evaluate
    from less.evaluation.summary import Evaluation
    from less.explanation import ExplainConfig, Explanation, explain
    from less.influence import InfluenceScores
    from less.methods import score
    from less.pipeline import BuildConfig, BuildResult, build_datastore
    from less.ranking import Selection, select
    from less.scoring import ScoreConfig
    from less.selection import SelectConfig
    from less.selection_report import SelectionReport, report_selection
    from less.training import WarmupConfig, WarmupResult, warmup
    from less.verification.audit import VerifyConfig, verify
    from less.verification.certificate import Certificate

__all__ = [
    "AlikeRows",
    "BuildConfig",
    "BuildResult",
    "Certificate",
    "EmbeddingConfig",
    "EvaluateConfig",
    "Evaluation",
    "EvidenceWarning",
    "ExplainConfig",
    "Explanation",
    "InfluenceScores",
    "NearDuplicatesConfig",
    "ScoreConfig",
    "SelectConfig",
    "Selection",
    "SelectionReport",
    "VerifyConfig",
    "WarmupConfig",
    "WarmupResult",
    "build_datastore",
    "build_embeddings",
    "compact",
    "evaluate",
    "explain",
    "near_duplicates",
    "report_selection",
    "score",
    "select",
    "verify",
    "warmup",
]

_HOME = {
    "AlikeRows": "duplicates",
    "BuildConfig": "pipeline",
    "BuildResult": "pipeline",
    "Certificate": "verification.certificate",
    "EmbeddingConfig": "embedding_store",
    "EvaluateConfig": "evaluation.experiment",
    "Evaluation": "evaluation.summary",
    "EvidenceWarning": "checkpoints",
    "ExplainConfig": "explanation",
    "Explanation": "explanation",
    "InfluenceScores": "influence",
    "NearDuplicatesConfig": "duplicates",
    "ScoreConfig": "scoring",
    "SelectConfig": "selection",
    "Selection": "ranking",
    "SelectionReport": "selection_report",
    "VerifyConfig": "verification.audit",
    "WarmupConfig": "training",
    "WarmupResult": "training",
    "build_datastore": "pipeline",
    "build_embeddings": "embedding_store",
    "compact": "compaction",
    "evaluate": "evaluation.experiment",
    "explain": "explanation",
    "near_duplicates": "duplicates",
    "report_selection": "selection_report",
    "score": "methods",
    "select": "ranking",
    "verify": "verification.audit",
    "warmup": "training",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
