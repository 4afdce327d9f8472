"""Update rules: from a gradient g to the update direction Γ, what the optimizer would do with it.

    adam               m' = β₁m + (1-β₁)g,  v' = β₂v + (1-β₂)g²
                       Γ = (m' / (1-β₁^(t+1))) / (√(v' / (1-β₂^(t+1))) + ε)
    adam-less          Γ = m' / √(v' + 1e-8), with β = 0.9, 0.999 whatever the checkpoint used
    adam-no-momentum   adam with m = 0: the term that all rows share is left out
    sgd, sign          g, sign(g)

m and v are a checkpoint's Adam moments after t = `step` steps. `adam` is what one `torch.optim.AdamW` step
without weight decay does to a parameter, divided by minus the learning rate (Kingma & Ba, 2015, algorithm 1).
`adam-less` is what the code of LESS computes (Xia et al., ICML 2024): no bias correction, ε inside the root.

Everything but g is fixed at a checkpoint, so it is folded into two coefficients a parameter and two scalars:

    Γ = (g + μ) / (√(ν + κ g²) + ε̂)

Pure and elementwise: any block of any layer, on any device. Reading moments from disk is `checkpoints`' work.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from datastore.errors import SettingError

if TYPE_CHECKING:  # the rules' names are wanted where torch is not
    from torch import Tensor

    from less.moments import AdamState

__all__ = [
    "NEEDS_MOMENTS",
    "UPDATE_RULES",
    "PreparedRule",
    "UpdateRule",
    "update_direction",
    "update_direction_ref",
]

UPDATE_RULES = ("adam", "adam-less", "adam-no-momentum", "sgd", "sign")
NEEDS_MOMENTS = frozenset({"adam", "adam-less", "adam-no-momentum"})

_LESS_BETA1, _LESS_BETA2, _LESS_EPS = 0.9, 0.999, 1e-8
_SMALLEST_NORMAL = 2.0**-126  # of float32


@dataclass(frozen=True, kw_only=True)
class UpdateRule:
    """A rule with its constants. `adam` and `adam-no-momentum` need all four, the others none of them."""

    name: str = "adam"
    """One of `UPDATE_RULES`."""
    beta1: float = math.nan
    """Decay of the first moment, 0 ≤ β₁ < 1."""
    beta2: float = math.nan
    """Decay of the second moment, 0 ≤ β₂ < 1."""
    eps: float = math.nan
    """What is added to the root, ≥ 0."""
    step: int = -1
    """Steps that the optimizer has taken: t in the formula, `step` in its state."""

    def __post_init__(self) -> None:
        if self.name not in UPDATE_RULES:
            raise SettingError(f"unknown update rule: got {self.name!r}, expected one of {', '.join(UPDATE_RULES)}")
        if self.name not in ("adam", "adam-no-momentum"):
            return
        for field, fits, expected in (
            ("beta1", 0 <= self.beta1 < 1, "0 ≤ beta1 < 1"),
            ("beta2", 0 <= self.beta2 < 1, "0 ≤ beta2 < 1"),
            ("eps", 0 <= self.eps < math.inf, "eps ≥ 0"),
            ("step", self.step >= 0, "step ≥ 0"),
        ):
            if not fits:
                raise SettingError(
                    f"update rule {self.name}: got {field} = {getattr(self, field)}, expected {expected}, "
                    "as the checkpoint's optimizer state has it"
                )

    @classmethod
    def of(cls, name: str, state: AdamState | None) -> UpdateRule:
        """The rule with a checkpoint's constants; `state` may be None for `sgd` and `sign`."""
        if state is None:
            if name in NEEDS_MOMENTS:
                raise _no_moments(name)
            return cls(name=name)
        return cls(name=name, beta1=state.beta1, beta2=state.beta2, eps=state.eps, step=state.step)

    def prepare(self, m_P: Tensor | None, v_P: Tensor | None) -> PreparedRule:
        """Fold the constants into the moments of one parameter, once a checkpoint.

        Args:
            m_P: first moments, any shape, flattened here; read by `adam` and `adam-less` only.
            v_P: second moments, as many; read by every rule but `sgd` and `sign`.

        Raises:
            SettingError: the rule needs a moment that is None.
        """
        if self.name not in NEEDS_MOMENTS:
            return PreparedRule(self.name)
        if v_P is None or (m_P is None and self.name != "adam-no-momentum"):
            raise _no_moments(self.name)
        if self.name == "adam-less":
            beta1, beta2, eps, correction1, correction2 = _LESS_BETA1, _LESS_BETA2, 0.0, 1.0, 1.0
        else:
            beta1, beta2, eps = self.beta1, self.beta2, self.eps
            correction1, correction2 = 1 - beta1 ** (self.step + 1), 1 - beta2 ** (self.step + 1)

        # Γ is divided through by g's own factor, so that the numerator is a plain sum
        scale = (1 - beta1) / correction1
        v_scale = 1 / (correction2 * scale**2)
        nu_P = v_P.flatten().float() * (beta2 * v_scale)
        if self.name == "adam-less":
            nu_P += _LESS_EPS * v_scale
        mu_P = None
        if m_P is not None and self.name != "adam-no-momentum":
            mu_P = m_P.flatten().float() * (beta1 / (1 - beta1))
        # a parameter that never had a gradient is 0/0 where eps = 0; this makes it 0 and changes nothing else
        eps = max(eps / scale, _SMALLEST_NORMAL)
        return PreparedRule(self.name, mu_P, nu_P, (1 - beta2) * v_scale, eps)


@dataclass(frozen=True, eq=False)
class PreparedRule:
    """A rule at one parameter of one checkpoint: Γ = (g + μ) / (√(ν + κ g²) + ε̂). See `UpdateRule`."""

    name: str
    mu_P: Tensor | None = None
    nu_P: Tensor | None = None
    kappa: float = 0.0
    eps: float = 0.0

    def apply_(self, grads_BP: Tensor) -> Tensor:
        """Turn gradients into update directions, in place: returns its input, overwritten.

        Γ(0), the direction that all rows share, is `apply_` of a row of zeros.

        Args:
            grads_BP: (B, P) float32, on the moments' device.
        """
        if self.name == "sgd":
            return grads_BP
        if self.name == "sign":
            signs_BP = grads_BP.sign()
            return grads_BP.mul_(0).add_(signs_BP)  # torch's sign(nan) is 0: a bad row must stay visible
        assert self.nu_P is not None
        root_BP = self.nu_P.addcmul(grads_BP, grads_BP, value=self.kappa).sqrt_().add_(self.eps)
        if self.mu_P is not None:
            grads_BP.add_(self.mu_P)
        return grads_BP.div_(root_BP)


def update_direction(
    rule: str,
    grads_BP: Tensor,
    m_P: Tensor | None,
    v_P: Tensor | None,
    *,
    step: int,
    beta1: float,
    beta2: float,
    eps: float,
) -> Tensor:
    """Γ of each row of `grads_BP`, (B, P) float32; the input is left as it was. Constants as in `UpdateRule`.

    Raises:
        SettingError: no such rule, a constant out of range, or a moment that the rule needs is None.
    """
    prepared = UpdateRule(name=rule, beta1=beta1, beta2=beta2, eps=eps, step=step).prepare(m_P, v_P)
    return prepared.apply_(grads_BP.float().clone())


def update_direction_ref(
    rule: str,
    grads_BP: Tensor,
    m_P: Tensor | None,
    v_P: Tensor | None,
    *,
    step: int,
    beta1: float,
    beta2: float,
    eps: float,
) -> Tensor:
    """`update_direction` as the formulas say it, in float64: (B, P)."""
    g_BP = grads_BP.double()
    if rule == "sgd":
        return g_BP
    if rule == "sign":
        return g_BP.sign()
    if rule == "adam-less":
        beta1, beta2 = 0.9, 0.999
    assert v_P is not None
    m_P = v_P * 0 if rule == "adam-no-momentum" or m_P is None else m_P
    m_BP = beta1 * m_P.double() + (1 - beta1) * g_BP
    v_BP = beta2 * v_P.double() + (1 - beta2) * g_BP**2
    if rule == "adam-less":
        return m_BP / (v_BP + 1e-8).sqrt()
    return (m_BP / (1 - beta1 ** (step + 1))) / ((v_BP / (1 - beta2 ** (step + 1))).sqrt() + eps)


def _no_moments(name: str) -> SettingError:
    return SettingError(
        f"update rule {name} needs Adam moments, got none: "
        "use a checkpoint that has its optimizer state, or the rule sgd or sign"
    )
