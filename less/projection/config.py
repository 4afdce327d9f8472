"""The settings of a projection. No torch here: the command line reads this to name its options."""

from dataclasses import dataclass

from datastore.errors import SettingError

__all__ = ["PROJECTIONS", "ProjectionConfig"]

PROJECTIONS = ("sparse", "rademacher", "none")


@dataclass(frozen=True, kw_only=True)
class ProjectionConfig:
    """Which random matrix Π is used. Two stores can be compared only where all of this is equal."""

    kind: str = "sparse"
    """`sparse`: one signed non-zero a coordinate; `rademacher`: dense ±1/√K; `none`: K = P, small models."""
    proj_dim: int = 32768
    """K, the width of the features. Rms error of a cosine: about 1/√K. Not read by `none`."""
    seed: int = 0
    """Chooses the matrix, 0 ≤ seed < 2**63. Not read by `none`."""

    def __post_init__(self) -> None:
        if self.kind not in PROJECTIONS:
            raise SettingError(f"unknown projection: got {self.kind!r}, expected one of {', '.join(PROJECTIONS)}")
        if not 1 <= self.proj_dim < 2**31:  # a column number is one 32-bit word of the hash
            raise SettingError(
                f"projection dimension out of range: got {self.proj_dim}, expected 1 ≤ K < 2**31 (often 32768)"
            )
        if not 0 <= self.seed < 2**63:
            raise SettingError(f"projection seed out of range: got {self.seed}, expected 0 ≤ seed < 2**63")
