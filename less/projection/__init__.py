"""Random projections Π from P gradient coordinates to K features, with E[⟨Πx, Πy⟩] = ⟨x, y⟩.

    config.py       ProjectionConfig: which projection, of what width, from which seed
    projector.py    Projector, what every projection does; NoProjection
    sparse.py       one signed non-zero a coordinate, without scatter: the default
    rademacher.py   dense ±1/√K, generated on the fly: what the paper used
    kernels.py      both as Triton kernels, for CUDA
    hashing.py      the counter-based randomness under both

One Π serves all checkpoints, candidates and targets. It is a function of (seed, parameter name, index) and of
nothing else, so features built on a CPU, on a GPU, today or next year belong to the same space.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from less.projection.config import PROJECTIONS, ProjectionConfig

if TYPE_CHECKING:
    from less.models import ParamLayout
    from less.projection.projector import Projector

__all__ = ["PROJECTIONS", "ProjectionConfig", "Projector", "make_projector"]


def __getattr__(name: str) -> type:
    # what needs torch is imported on use, so that a command can name its options without it
    if name == "Projector":
        from less.projection.projector import Projector

        return Projector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def make_projector(config: ProjectionConfig, layout: ParamLayout) -> Projector:
    """The projection that `config` describes, for the parameters of `layout`."""
    if config.kind == "sparse":
        from less.projection.sparse import SparseProjector

        return SparseProjector(config, layout)
    if config.kind == "rademacher":
        from less.projection.rademacher import RademacherProjector

        return RademacherProjector(config, layout)
    from less.projection.projector import NoProjection

    return NoProjection(config, layout)
