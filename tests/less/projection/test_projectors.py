"""What every projection promises: it is its matrix, exactly; it keeps inner products; it never changes."""

import json
from collections.abc import Callable
from math import prod, sqrt

import pytest
import torch
from torch import Tensor

from datastore.errors import SettingError
from less.models import ParamLayout
from less.projection import PROJECTIONS, ProjectionConfig, Projector, make_projector

RANDOM = ("sparse", "rademacher")


def layout_of(**shapes: tuple[int, ...]) -> ParamLayout:
    return ParamLayout(tuple(shapes), tuple(shapes.values()))


def projector_of(kind: str, layout: ParamLayout, proj_dim: int, seed: int = 0) -> Projector:
    return make_projector(ProjectionConfig(kind=kind, proj_dim=proj_dim, seed=seed), layout)


def project(projector: Projector, rows_BP: Tensor) -> Tensor:
    out_BK = torch.zeros(len(rows_BP), projector.dim, device=rows_BP.device)
    for name in projector.layout.names:
        projector.project_add_(out_BK, rows_BP[:, projector.layout.slice(name)], name)
    return out_BK


def integers(*shape: int) -> Tensor:
    """Small integers as float32: sums of them are exact in any order, so equality is a fair demand."""
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(prod(shape))).float()


def unit_rows(num_rows: int, num_params: int) -> Tensor:
    rows_BP = torch.randn(num_rows, num_params, generator=torch.Generator().manual_seed(num_rows))
    return rows_BP / rows_BP.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("num_params", [1, 63, 101, 4097])
@pytest.mark.parametrize("proj_dim", [1, 20, 64, 512, 8192])
@pytest.mark.parametrize("kind", RANDOM)
def test_projecting_is_multiplying_by_the_matrix(kind: str, num_rows: int, num_params: int, proj_dim: int) -> None:
    if kind == "rademacher":  # its matrix is dense, and slow to write down
        num_params = min(num_params, 300 if proj_dim == 8192 else 1025)
    projector = projector_of(kind, layout_of(a=(num_params,)), proj_dim)
    rows_BP = integers(num_rows, num_params)
    matrix_PK = projector.matrix_ref()
    assert matrix_PK.shape == (num_params, proj_dim)
    # ±1/√K is not exact: the sum with ±1 is, and is scaled once
    scale = proj_dim**-0.5 if kind == "rademacher" else 1.0
    torch.testing.assert_close(matrix_PK.abs().amax(1), torch.full((num_params,), scale))
    assert torch.equal(project(projector, rows_BP), (rows_BP @ matrix_PK.sign()) * scale)


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_features_are_the_sum_over_parameters_in_any_order(kind: str) -> None:
    layout = layout_of(a=(7, 9), b=(101,), c=(1,), d=(4, 33))
    projector = projector_of(kind, layout, proj_dim=64)
    rows_BP = integers(3, layout.num_params)
    expected_BK = rows_BP @ projector.matrix_ref()
    assert torch.equal(project(projector, rows_BP), expected_BK)

    out_BK = integers(3, projector.dim)
    before_BK = out_BK.clone()
    for name in reversed(layout.names):
        projector.project_add_(out_BK, rows_BP[:, layout.slice(name)], name)
    assert torch.equal(out_BK, before_BK + expected_BK)


@pytest.mark.parametrize("kind", RANDOM)
def test_a_parameter_has_the_same_rows_in_every_layout(kind: str) -> None:
    alone = projector_of(kind, layout_of(b=(63,)), proj_dim=20)
    among = projector_of(kind, layout_of(a=(101,), b=(9, 7), c=(5,)), proj_dim=20)
    assert torch.equal(among.matrix_ref()[101 : 101 + 63], alone.matrix_ref())
    rows_BP = integers(3, 63)
    out_BK = torch.zeros(3, 20)
    among.project_add_(out_BK, rows_BP, "b")
    assert torch.equal(out_BK, project(alone, rows_BP))


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_no_projection_reads_or_writes_outside_its_block(kind: str) -> None:
    layout = layout_of(a=(101,))
    projector = projector_of(kind, layout, proj_dim=20)
    rows_BP = integers(3, 101)
    poisoned_in = torch.full((5, 301), float("nan"))
    poisoned_in[1:4, 100:201] = rows_BP
    poisoned_out = torch.full((5, 3 * projector.dim), float("nan"))
    out_BK = poisoned_out[1:4, projector.dim : 2 * projector.dim]
    out_BK.zero_()
    block_BP = poisoned_in[1:4, 100:201]
    projector.project_add_(out_BK, block_BP, "a")
    assert torch.equal(out_BK, project(projector, rows_BP))
    assert torch.equal(block_BP, rows_BP)
    assert poisoned_out.isnan().sum() == poisoned_out.numel() - out_BK.numel()


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_a_row_does_not_depend_on_its_batch(kind: str) -> None:
    projector = projector_of(kind, layout_of(a=(4097,)), proj_dim=512)
    rows_BP = integers(33, 4097)
    features_BK = project(projector, rows_BP)
    assert torch.equal(features_BK[17:18], project(projector, rows_BP[17:18]))


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_a_bad_value_reaches_the_features_of_its_row_alone(kind: str) -> None:
    projector = projector_of(kind, layout_of(a=(101,)), proj_dim=20)
    rows_BP = integers(3, 101)
    rows_BP[1, 50] = float("nan")
    assert project(projector, rows_BP).isfinite().all(dim=1).tolist() == [True, False, True]


GRADIENTS: dict[str, Callable[[], Tensor]] = {
    "dense": lambda: unit_rows(16, 3000),
    # a rank-one gradient whose rows are as long as a chunk: the same pattern in each of them
    "rank one": lambda: torch.einsum("br,bk->brk", unit_rows(16, 47), unit_rows(16, 64)[:, :64]).flatten(1),
    "few coordinates": lambda: torch.nn.functional.normalize(
        unit_rows(16, 3000) * (torch.arange(3000) % 300 == 0), dim=1
    ),
}


def inner_product_errors(kind: str, rows_BP: Tensor, proj_dim: int, num_seeds: int) -> Tensor:
    """⟨Πx, Πy⟩ - ⟨x, y⟩ of all pairs x ≠ y of unit rows, (num_seeds, pairs)."""
    layout = layout_of(a=(1000,), b=(rows_BP.shape[1] - 1000,))
    pairs = torch.triu_indices(len(rows_BP), len(rows_BP), offset=1).unbind()
    exact = (rows_BP @ rows_BP.T)[pairs]
    errors = []
    for seed in range(num_seeds):
        features_BK = project(projector_of(kind, layout, proj_dim, seed), rows_BP)
        errors.append((features_BK @ features_BK.T)[pairs] - exact)
    return torch.stack(errors)


@pytest.mark.parametrize("gradients", GRADIENTS)
@pytest.mark.parametrize("kind", RANDOM)
def test_inner_products_are_unbiased_over_seeds(kind: str, gradients: str) -> None:
    rows_BP, proj_dim, num_seeds = GRADIENTS[gradients](), 64, 40
    errors = inner_product_errors(kind, rows_BP, proj_dim, num_seeds)
    mean_errors = errors.mean(0) * sqrt(proj_dim * num_seeds)  # about standard normal
    assert mean_errors.abs().max() < 5
    norms = torch.stack(
        [
            project(projector_of(kind, layout_of(a=(rows_BP.shape[1],)), proj_dim, seed), rows_BP).norm(dim=1)
            for seed in range(num_seeds)
        ]
    )
    assert (norms.square().mean() - 1).abs() < 5 * sqrt(2 / proj_dim / num_seeds)


@pytest.mark.parametrize("gradients", GRADIENTS)
@pytest.mark.parametrize("proj_dim", [20, 64, 512])
def test_rms_error_is_about_one_over_the_root_of_k(gradients: str, proj_dim: int) -> None:
    rows_BP = GRADIENTS[gradients]()
    sparse, rademacher = (
        inner_product_errors(kind, rows_BP, proj_dim, num_seeds=24).square().mean().sqrt()
        for kind in ("sparse", "rademacher")
    )
    assert sparse <= 1.3 / sqrt(proj_dim)
    assert sparse <= 1.25 * rademacher


def test_pinned_sparse_projection() -> None:
    """Stores built today are extended tomorrow: these literals may change only with HASH_VERSION."""
    projector = projector_of("sparse", layout_of(a=(47,)), proj_dim=20)
    matrix_PK = projector.matrix_ref()
    assert matrix_PK.abs().argmax(1)[[0, 20, 40]].tolist() == [12, 19, 18]
    assert matrix_PK.sum(1)[:16].int().tolist() == [1, -1, -1, 1, -1, -1, 1, 1, -1, -1, -1, 1, -1, -1, -1, -1]
    features_K = project(projector, torch.arange(47.0)[None])[0]
    # fmt: off
    assert features_K.int().tolist() == [
        -71, 12, 11, 32, 9, -39, -41, 13, 13, 13, -13, 51, -33, 33, -37, 39, -41, 33, 5, 68,
    ]
    # fmt: on


def test_pinned_rademacher_projection() -> None:
    projector = projector_of("rademacher", layout_of(a=(47,)), proj_dim=36, seed=1)
    # fmt: off
    assert projector.matrix_ref()[1].sign().int().tolist() == [
        1, -1, -1, 1, 1, 1, -1, -1, 1, -1, 1, 1, 1, -1, 1, 1, -1, 1,
        -1, -1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, -1, -1, -1,
    ]
    features_K = project(projector, torch.arange(47.0)[None])[0] * 6
    assert features_K.round().int().tolist() == [
        -149, 131, 71, -97, 79, 139, -441, -113, 89, 281, -217, -337, 19, 57, -187, -315, 47, -173,
        -27, 53, 31, -105, -83, -357, 325, -281, -11, 475, 11, -131, -229, -179, 217, -37, 229, -97,
    ]
    # fmt: on


@pytest.mark.parametrize("kind", RANDOM)
def test_parameters_and_seeds_have_independent_rows(kind: str) -> None:
    num_params, proj_dim = 1024, 32
    layout = layout_of(a=(num_params,), b=(num_params,))
    first_PK = projector_of(kind, layout, proj_dim).matrix_ref()
    other_PK = projector_of(kind, layout, proj_dim, seed=1).matrix_ref()
    for one_pK, two_pK in (
        (first_PK[:num_params], first_PK[num_params:]),
        (first_PK[:num_params], other_PK[:num_params]),
    ):
        products_pp = one_pK @ two_pK.T  # of rows of unit length: mean 0, variance 1/K
        assert products_pp.mean().abs() < 4 / sqrt(proj_dim) / num_params
        assert products_pp.diagonal().mean().abs() < 4 / sqrt(proj_dim * num_params)
        assert abs(products_pp.square().mean() * proj_dim - 1) < 0.01


@pytest.mark.parametrize("kind", RANDOM)
def test_signs_are_balanced_in_rows_and_columns(kind: str) -> None:
    matrix_PK = projector_of(kind, layout_of(a=(2048,)), proj_dim=64).matrix_ref().sign()
    assert matrix_PK.sum().abs() < 4 * sqrt(matrix_PK.abs().sum())
    deviations_K = matrix_PK.sum(0) / matrix_PK.abs().sum(0).sqrt()
    assert deviations_K.abs().max() < 4.5


def test_sparse_has_one_nonzero_a_row_and_fills_columns_evenly() -> None:
    matrix_PK = projector_of("sparse", layout_of(a=(64 * 7 + 5,)), proj_dim=64).matrix_ref()
    assert (matrix_PK != 0).sum(1).unique().tolist() == [1]
    assert set((matrix_PK != 0).sum(0).tolist()) == {7, 8}


def test_none_keeps_every_coordinate_in_its_place() -> None:
    layout = layout_of(a=(7, 9), b=(4,))
    projector = projector_of("none", layout, proj_dim=8192)
    assert projector.dim == layout.num_params == 67
    rows_BP = integers(3, 67)
    assert torch.equal(project(projector, rows_BP), rows_BP)


def test_provenance_is_what_decides_the_matrix() -> None:
    layout = layout_of(a=(7, 9))
    for kind in RANDOM:
        projector = projector_of(kind, layout, proj_dim=20, seed=5)
        assert projector.dim == 20
        assert projector.provenance() == {"kind": kind, "proj_dim": 20, "seed": 5, "version": 1}
        assert projector.config == ProjectionConfig(kind=kind, proj_dim=20, seed=5)
    none = projector_of("none", layout, proj_dim=20, seed=5).provenance()
    assert none == {"kind": "none", "proj_dim": 63, "seed": None, "version": None}
    assert json.loads(json.dumps(none)) == none


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"kind": "gaussian"},
            "unknown projection: got 'gaussian', expected one of sparse, rademacher, none",
        ),
        ({"proj_dim": 0}, "projection dimension out of range: got 0, expected 1"),
        ({"proj_dim": -1}, "projection dimension out of range: got -1, expected 1"),
        ({"proj_dim": 2**31}, "projection dimension out of range: got 2147483648, expected 1"),
        ({"seed": -1}, "projection seed out of range: got -1, expected 0 ≤ seed < 2**63"),
        ({"seed": 2**63}, "projection seed out of range: got 9223372036854775808"),
    ],
)
def test_a_bad_setting_is_refused_at_birth(changes: dict, message: str) -> None:
    with pytest.raises(SettingError) as caught:
        ProjectionConfig(**changes)
    assert message in str(caught.value)


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_a_block_of_the_wrong_shape_or_dtype_is_refused(kind: str) -> None:
    projector = projector_of(kind, layout_of(a=(63,)), proj_dim=20)
    out_BK = torch.zeros(3, projector.dim)
    with pytest.raises(ValueError, match=r"a: got a block of \(3, 62\)"):
        projector.project_add_(out_BK, torch.zeros(3, 62), "a")
    with pytest.raises(ValueError, match=r"a: got a block of \(1, 63\)"):  # would broadcast
        projector.project_add_(out_BK, torch.zeros(1, 63), "a")
    with pytest.raises(ValueError, match=r"got torch\.bfloat16 for torch\.float32"):
        projector.project_add_(out_BK, torch.zeros(3, 63, dtype=torch.bfloat16), "a")
    assert not out_BK.any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("proj_dim", [1, 20, 64, 512, 8192])
@pytest.mark.parametrize("kind", PROJECTIONS)
def test_cpu_and_gpu_project_to_the_same_bits(kind: str, proj_dim: int) -> None:
    projector = projector_of(kind, layout_of(a=(63, 65), b=(4097,)), proj_dim)
    rows_BP = integers(3, projector.layout.num_params)
    assert torch.equal(project(projector, rows_BP.cuda()).cpu(), project(projector, rows_BP))
