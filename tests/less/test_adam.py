"""Γ is what the optimizer does: checked against AdamW itself, against the formulas, and at the corners."""

import copy
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from datastore.errors import SettingError
from less.adam import (
    NEEDS_MOMENTS,
    UPDATE_RULES,
    UpdateRule,
    update_direction,
    update_direction_ref,
)

CONSTANTS = {"step": 7, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
ADAM_CONSTANTS = [
    # step, beta1, beta2, eps
    (0, 0.9, 0.999, 1e-8),
    (1, 0.9, 0.999, 1e-8),
    (3, 0.9, 0.95, 1e-6),
    (3, 0.0, 0.999, 1e-8),
    (5, 0.95, 0.0, 1e-3),
    (50, 0.8, 0.99, 0.0),
    (300, 0.9, 0.999, 1e-8),
]


def gradients_and_moments(num_rows: int, num_params: int, scale: float = 1e-3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_rows * 10007 + num_params)
    grads_BP = torch.randn(num_rows, num_params, generator=generator) * scale
    m_P = torch.randn(num_params, generator=generator) * scale / 3
    v_P = torch.rand(num_params, generator=generator) * scale**2
    return grads_BP, m_P, v_P


@pytest.mark.parametrize(("step", "beta1", "beta2", "eps"), ADAM_CONSTANTS)
def test_adam_is_one_step_of_adamw(step: int, beta1: float, beta2: float, eps: float) -> None:
    torch.manual_seed(step)
    num_params, learning_rate = 63, 1e-2
    theta = torch.nn.Parameter(torch.randn(num_params, dtype=torch.float64))

    def adamw(parameter: torch.nn.Parameter) -> torch.optim.AdamW:
        return torch.optim.AdamW([parameter], lr=learning_rate, betas=(beta1, beta2), eps=eps, weight_decay=0)

    optimizer = adamw(theta)
    for _ in range(step):
        theta.grad = torch.randn(num_params, dtype=torch.float64) * 1e-3
        optimizer.step()
    nothing_P = torch.zeros(num_params, dtype=torch.float64)
    state = optimizer.state[theta] or {"exp_avg": nothing_P, "exp_avg_sq": nothing_P, "step": 0}
    assert int(state["step"]) == step

    grads_BP = torch.randn(3, num_params) * 1e-3
    steps_BP = torch.empty(3, num_params, dtype=torch.float64)
    for row, grad_P in enumerate(grads_BP):
        trial = torch.nn.Parameter(theta.detach().clone())
        trial_optimizer = adamw(trial)
        trial_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        trial.grad = grad_P.double()
        trial_optimizer.step()
        steps_BP[row] = (theta - trial).detach() / learning_rate

    args = ("adam", grads_BP, state["exp_avg"], state["exp_avg_sq"])
    constants = {"step": step, "beta1": beta1, "beta2": beta2, "eps": eps}
    torch.testing.assert_close(update_direction_ref(*args, **constants), steps_BP, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(update_direction(*args, **constants).double(), steps_BP, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", UPDATE_RULES)
@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("num_params", [1, 63, 101, 4097])
@pytest.mark.parametrize(("step", "beta1", "beta2", "eps"), ADAM_CONSTANTS)
def test_update_direction_is_its_formula_to_a_few_float32_roundings(
    rule: str, num_rows: int, num_params: int, step: int, beta1: float, beta2: float, eps: float
) -> None:
    grads_BP, m_P, v_P = gradients_and_moments(num_rows, num_params)
    constants = {"step": step, "beta1": beta1, "beta2": beta2, "eps": eps}
    expected_BP = update_direction_ref(rule, grads_BP, m_P, v_P, **constants)
    actual_BP = update_direction(rule, grads_BP, m_P, v_P, **constants)
    assert actual_BP.dtype == torch.float32
    # m and g may cancel: roundings are relative to the sum of their sizes
    sizes_BP = update_direction_ref(rule, grads_BP.abs(), m_P.abs(), v_P, **constants)
    assert ((actual_BP - expected_BP).abs() <= 6 * 2**-24 * sizes_BP).all()


def test_adam_less_is_the_authors_code_whatever_the_checkpoint_used() -> None:
    grads_BP, m_P, v_P = gradients_and_moments(3, 101)
    authors_BP = (0.9 * m_P + 0.1 * grads_BP) / torch.sqrt(0.999 * v_P + 0.001 * grads_BP**2 + 1e-8)
    for constants in (CONSTANTS, {"step": 0, "beta1": 0.5, "beta2": 0.5, "eps": 1.0}):
        actual_BP = update_direction("adam-less", grads_BP, m_P, v_P, **constants)
        torch.testing.assert_close(actual_BP, authors_BP, rtol=1e-6, atol=1e-7)


def test_adam_no_momentum_is_adam_without_m() -> None:
    grads_BP, m_P, v_P = gradients_and_moments(3, 101)
    without_BP = update_direction("adam-no-momentum", grads_BP, m_P, v_P, **CONSTANTS)
    assert torch.equal(without_BP, update_direction("adam", grads_BP, m_P * 0, v_P, **CONSTANTS))
    assert torch.equal(without_BP, update_direction("adam-no-momentum", grads_BP, None, v_P, **CONSTANTS))


def test_sgd_and_sign_need_no_moments() -> None:
    grads_BP = torch.tensor([[1.5, 0.0, -2.0]])
    assert torch.equal(update_direction("sgd", grads_BP, None, None, **CONSTANTS), grads_BP)
    signs_BP = update_direction("sign", grads_BP, None, None, **CONSTANTS)
    assert torch.equal(signs_BP, torch.tensor([[1.0, 0.0, -1.0]]))


@pytest.mark.parametrize("rule", UPDATE_RULES)
def test_update_direction_leaves_its_inputs_and_apply_reuses_its_own(rule: str) -> None:
    grads_BP, m_P, v_P = gradients_and_moments(3, 101)
    copies = grads_BP.clone(), m_P.clone(), v_P.clone()
    expected_BP = update_direction(rule, grads_BP, m_P, v_P, **CONSTANTS)
    for tensor, before in zip((grads_BP, m_P, v_P), copies, strict=True):
        assert torch.equal(tensor, before)
    prepared = UpdateRule(name=rule, **CONSTANTS).prepare(m_P, v_P)
    actual_BP = prepared.apply_(grads_BP)
    assert actual_BP is grads_BP
    assert torch.equal(actual_BP, expected_BP)
    assert torch.equal(m_P, copies[1])
    assert torch.equal(v_P, copies[2])


@pytest.mark.parametrize("rule", UPDATE_RULES)
def test_the_shared_direction_is_that_of_a_zero_gradient(rule: str) -> None:
    _, m_P, v_P = gradients_and_moments(1, 101)
    shared_BP = UpdateRule(name=rule, **CONSTANTS).prepare(m_P, v_P).apply_(torch.zeros(1, 101))
    expected_BP = update_direction_ref(rule, torch.zeros(1, 101), m_P, v_P, **CONSTANTS)
    torch.testing.assert_close(shared_BP.double(), expected_BP, rtol=1e-6, atol=0)
    assert shared_BP.any() == (rule in ("adam", "adam-less"))


@pytest.mark.parametrize("rule", UPDATE_RULES)
@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_a_parameter_that_never_had_a_gradient_stays_where_it_is(rule: str, eps: float) -> None:
    nothing_P = torch.zeros(5)
    updates_BP = update_direction(rule, torch.zeros(2, 5), nothing_P, nothing_P, **CONSTANTS | {"eps": eps})
    assert torch.equal(updates_BP, torch.zeros(2, 5))


@pytest.mark.parametrize("scale", [1e-15, 1e-12, 1e-6, 1.0, 1e6])
def test_without_eps_adam_does_not_depend_on_the_scale_of_gradients(scale: float) -> None:
    grads_BP, m_P, v_P = (t.double() for t in gradients_and_moments(3, 101, scale=1.0))
    constants = CONSTANTS | {"eps": 0.0}
    expected_BP = update_direction_ref("adam", grads_BP, m_P, v_P, **constants)
    scaled = (grads_BP * scale).float(), (m_P * scale).float(), (v_P * scale**2).float()
    actual_BP = update_direction("adam", *scaled, **constants)
    torch.testing.assert_close(actual_BP.double(), expected_BP, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("rule", UPDATE_RULES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_is_never_hidden(rule: str, bad: float) -> None:
    grads_BP, m_P, v_P = gradients_and_moments(2, 63)
    grads_BP[1, 5] = bad
    updates_BP = update_direction(rule, grads_BP, m_P, v_P, **CONSTANTS)
    assert not updates_BP[1, 5].isfinite()
    assert updates_BP.isfinite().sum() == updates_BP.numel() - 1


def test_moments_may_keep_their_parameters_shape_and_dtype() -> None:
    grads_BP, m_P, v_P = gradients_and_moments(3, 12)
    flat_BP = update_direction("adam", grads_BP, m_P, v_P, **CONSTANTS)
    shaped_BP = update_direction("adam", grads_BP, m_P.double().reshape(3, 4), v_P.reshape(3, 4), **CONSTANTS)
    assert torch.equal(flat_BP, shaped_BP)


def test_a_rule_takes_its_constants_from_the_checkpoint() -> None:
    state = SimpleNamespace(m={}, v={}, step=7, beta1=0.8, beta2=0.99, eps=1e-6)
    expected = UpdateRule(name="adam", step=7, beta1=0.8, beta2=0.99, eps=1e-6)
    assert UpdateRule.of("adam", state) == expected  # type: ignore[arg-type]
    assert UpdateRule.of("sgd", None) == UpdateRule(name="sgd")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "adamw"}, "unknown update rule: got 'adamw', expected one of adam, adam-less"),
        ({"beta1": 1.0}, "got beta1 = 1.0, expected 0 ≤ beta1 < 1"),
        ({"beta2": -0.1}, "got beta2 = -0.1, expected 0 ≤ beta2 < 1"),
        ({"eps": -1e-8}, "got eps = -1e-08, expected eps ≥ 0"),
        ({"eps": float("inf")}, "got eps = inf, expected eps ≥ 0"),
        ({"step": -1}, "got step = -1, expected step ≥ 0"),
    ],
)
def test_a_bad_rule_is_refused_by_value(changes: dict, message: str) -> None:
    with pytest.raises(SettingError) as caught:
        UpdateRule(**{"name": "adam", **CONSTANTS, **changes})
    assert message in str(caught.value)


def test_constants_that_were_not_given_are_not_guessed() -> None:
    with pytest.raises(SettingError, match="got beta1 = nan"):
        UpdateRule(name="adam")


@pytest.mark.parametrize("rule", sorted(NEEDS_MOMENTS))
def test_a_rule_without_its_moments_is_refused(rule: str) -> None:
    for attempt in (
        lambda: UpdateRule.of(rule, None),
        lambda: UpdateRule(name=rule, **CONSTANTS).prepare(torch.zeros(3), None),
    ):
        with pytest.raises(SettingError, match=f"update rule {rule} needs Adam moments"):
            attempt()


def test_the_names_of_rules_and_projections_load_no_torch() -> None:
    program = (
        "import sys; from less.adam import UPDATE_RULES, UpdateRule; "
        "from less.projection import PROJECTIONS, ProjectionConfig; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
