"""The Triton kernels against their twins in PyTorch: the same bits on integers, the same numbers on floats.

Compiled where there is a CUDA device. Under Triton's interpreter, on the CPU, where TRITON_INTERPRET=1 was set
before triton was imported: `test_kernels_on_a_cpu.py` runs this file so, in a process of its own.
"""

import os
from math import prod

import pytest
import torch
from torch import Tensor

from less.adam import UPDATE_RULES, PreparedRule, UpdateRule
from less.features import FeatureSet, FeatureSetConfig, gradient_features
from less.models import ParamLayout
from less.projection import PROJECTIONS, ProjectionConfig, Projector, make_projector
from less.projection.hashing import absorb, hash_index, make_key

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED:
    pytestmark = pytest.mark.gpu
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; see test_kernels_on_a_cpu.py", allow_module_level=True)

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
kernels = pytest.importorskip("less.projection.kernels")

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")

# rows, coordinates, K: with and without a tail of rows, coordinates, columns, chunks and parts
SIZES = [
    (1, 1, 1),
    (1, 63, 1),
    (3, 101, 63),
    (2, 640, 64),
    (3, 1001, 20),
    (33, 300, 129),
    (17, 2048, 1000),
    (2, 4097, 4097),
    (1, 9000, 8192),
]


@pytest.fixture
def by_kernel(monkeypatch):
    """Chooses: on a GPU by the device, as everyone's code does; under the interpreter by hand."""

    def choose(wanted: bool) -> torch.device:
        if INTERPRETED:
            monkeypatch.setattr(Projector, "_runs_kernels", staticmethod(lambda device: wanted))
        return DEVICE if wanted else torch.device("cpu")

    return choose


def projector_of(kind: str, num_params: int, dim: int) -> Projector:
    return make_projector(ProjectionConfig(kind=kind, proj_dim=dim), ParamLayout(("a",), ((num_params,),)))


def integers(*shape: int) -> Tensor:
    """Small integers as float32: sums of them and of their squares are exact in any order."""
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(prod(shape))).float()


def floats(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(prod(shape))) * scale


def rule_of(name: str, num_params: int, *, eps: float = 1e-8) -> UpdateRule:
    if name in ("sgd", "sign"):
        return UpdateRule(name=name).prepare(None, None)
    m_P, v_P = floats(num_params, scale=1e-3), floats(num_params, scale=1e-3).square()
    return UpdateRule(name=name, beta1=0.9, beta2=0.999, eps=eps, step=7).prepare(m_P, v_P)


def on(device: torch.device, rule: PreparedRule) -> PreparedRule:
    mu_P, nu_P = (None if moments is None else moments.to(device) for moments in (rule.mu_P, rule.nu_P))
    return PreparedRule(rule.name, mu_P, nu_P, rule.kappa, rule.eps)


def summed(projector: Projector, grads_Bp: Tensor, rule: PreparedRule, device: torch.device) -> tuple[Tensor, ...]:
    """Features and both squared norms, of one parameter; its gradients are still there afterwards."""
    sums = projector.new_sums(len(grads_Bp), device)
    own_Bp = grads_Bp.to(device, copy=True)
    projector.add_updates_(sums, own_Bp, "a", on(device, rule))
    assert torch.equal(own_Bp.cpu().nan_to_num(), grads_Bp.nan_to_num())
    found = (sums.features_BK, sums.grad_squares_SB.sum(0), sums.update_squares_SB.sum(0))
    return tuple(tensor.cpu() for tensor in found)


def worst_row_error(found_BK: Tensor, expected_BK: Tensor) -> float:
    return ((found_BK - expected_BK).norm(dim=1) / expected_BK.norm(dim=1)).max().item()


@triton.jit(do_not_specialize=("key0", "key1"))
def hash_kernel(words, columns, index, column, key0: tl.uint32, key1: tl.uint32, N: tl.constexpr):
    at = tl.arange(0, N)
    word = kernels.hash_index(key0.to(tl.uint32), key1.to(tl.uint32), tl.load(index + at))
    tl.store(words + at, word.to(tl.int64))
    tl.store(columns + at, kernels.absorb(word, tl.load(column + at).to(tl.uint32)).to(tl.int64))


@pytest.mark.parametrize("key", [(1, 0), (2**31, 2**31 - 1), (2**32 - 1, 16), make_key(0, "a", "sign")])
def test_the_kernels_hash_is_the_hash(key) -> None:
    near = torch.arange(-64, 64)
    index = torch.cat([n + near for n in (64, 2**31, 2**32, 2**40, 2**62, 3 * 2**32, 10**12, 10**15)])
    column = torch.arange(len(index)) * 4194301
    words, columns = torch.full_like(index, -1).to(DEVICE), torch.full_like(index, -1).to(DEVICE)
    hash_kernel[(1,)](words, columns, index.to(DEVICE), column.to(DEVICE), *key, N=len(index))
    assert torch.equal(words.cpu(), hash_index(key, index))
    assert torch.equal(columns.cpu(), absorb(hash_index(key, index), column))


@pytest.mark.parametrize(("num_rows", "num_params", "dim"), SIZES)
def test_sparse_and_its_norms_are_exact(by_kernel, num_rows, num_params, dim) -> None:
    projector, grads_Bp = projector_of("sparse", num_params, dim), integers(num_rows, num_params)
    rule = rule_of("sgd", num_params)
    expected = summed(projector, grads_Bp, rule, by_kernel(False))
    found = summed(projector, grads_Bp, rule, by_kernel(True))
    assert torch.equal(found[0], expected[0])
    for squares_B in found[1:]:
        assert torch.equal(squares_B, grads_Bp.square().sum(1))


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dim", [20, 129])
@pytest.mark.parametrize("kind", ["sparse", "rademacher"])
def test_nothing_is_read_or_written_outside_the_block(by_kernel, kind, dim, strided) -> None:
    projector, rows_Bp = projector_of(kind, 101, dim), integers(3, 101)
    expected_BK = torch.zeros(3, dim)
    by_kernel(False)
    projector.project_add_(expected_BK, rows_Bp, "a")
    shape_in, shape_out = (5, 301), (5, 3 * dim)
    poisoned_in, poisoned_out = (
        torch.full(shape[::-1] if strided else shape, float("nan"), device=by_kernel(True))
        for shape in (shape_in, shape_out)
    )
    block_Bp = (poisoned_in.T if strided else poisoned_in)[1:4, 100:201]
    out_BK = (poisoned_out.T if strided else poisoned_out)[1:4, dim : 2 * dim]
    block_Bp.copy_(rows_Bp)
    out_BK.zero_()
    projector.project_add_(out_BK, block_Bp, "a")
    assert torch.equal(out_BK.cpu(), expected_BK)
    assert torch.equal(block_Bp.cpu(), rows_Bp)
    assert poisoned_out.isnan().sum() == poisoned_out.numel() - out_BK.numel()


@pytest.mark.parametrize(("num_rows", "num_params", "dim"), [(17, 300, 129), (3, 1001, 20)])
@pytest.mark.parametrize("rule", UPDATE_RULES)
def test_every_update_rule_is_its_twin(by_kernel, rule, num_rows, num_params, dim) -> None:
    projector, grads_Bp = projector_of("sparse", num_params, dim), floats(num_rows, num_params, scale=1e-2)
    grads_Bp[:, ::7] = 0
    prepared = rule_of(rule, num_params)
    expected = summed(projector, grads_Bp, prepared, by_kernel(False))
    found = summed(projector, grads_Bp, prepared, by_kernel(True))
    if rule == "sign":
        assert torch.equal(found[0], expected[0])
    assert worst_row_error(found[0], expected[0]) < (1e-6 if INTERPRETED else 1e-5)
    for own, other in zip(found[1:], expected[1:], strict=True):
        assert torch.allclose(own, other, rtol=1e-5)


@pytest.mark.parametrize("rule", ["adam", "adam-no-momentum"])
def test_tiny_second_moments_are_not_taken_for_zero_where_epsilon_is(by_kernel, rule) -> None:
    projector, grads_Bp = projector_of("sparse", 64, 64), torch.full((2, 64), 1e-21)
    moments = torch.full((64,), 1e-21), torch.full((64,), 1e-42)
    prepared = UpdateRule(name=rule, beta1=0.9, beta2=0.999, eps=0, step=7).prepare(*moments)
    assert 0 < prepared.nu_P.max() < 2**-126  # subnormal
    expected = summed(projector, grads_Bp, prepared, by_kernel(False))
    found = summed(projector, grads_Bp, prepared, by_kernel(True))
    assert expected[2].sqrt().max() < 100
    assert worst_row_error(found[0], expected[0]) < 1e-4


def test_a_coordinate_without_any_gradient_has_no_update(by_kernel) -> None:
    prepared = UpdateRule(name="adam", beta1=0.9, beta2=0.999, eps=0, step=7).prepare(torch.zeros(64), torch.zeros(64))
    found = summed(projector_of("sparse", 64, 20), torch.zeros(2, 64), prepared, by_kernel(True))
    assert not any(tensor.any() for tensor in found)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's numpy
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("rule", UPDATE_RULES)
def test_a_bad_value_stays_visible_in_its_row_alone(by_kernel, rule, bad) -> None:
    grads_Bp = floats(3, 101)
    grads_Bp[1, 50] = bad
    projector = projector_of("sparse", 101, 20)
    features_BK, grad_squares_B, update_squares_B = summed(projector, grads_Bp, rule_of(rule, 101), by_kernel(True))
    for squares_B in (features_BK.square().sum(1), grad_squares_B, update_squares_B):
        assert squares_B.isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("kind", ["sparse", "rademacher"])
def test_the_same_call_gives_the_same_bits(by_kernel, kind) -> None:
    projector, grads_Bp = projector_of(kind, 501, 20), floats(17, 501)
    first = summed(projector, grads_Bp, rule_of("adam", 501), by_kernel(True))
    again = summed(projector, grads_Bp, rule_of("adam", 501), by_kernel(True))
    for own, other in zip(first, again, strict=True):
        assert torch.equal(own, other)


@pytest.mark.parametrize("kind", ["sparse", "rademacher"])
def test_parameters_add_up(by_kernel, kind) -> None:
    """Several sizes into the same sums, so that some parameters use fewer parts of them than others."""
    layout = ParamLayout(("a", "b", "c"), ((1, 16), (700,), (31, 2)))
    projector = make_projector(ProjectionConfig(kind=kind, proj_dim=16), layout)
    rows_BP, rule = integers(3, layout.num_params), rule_of("sgd", 0)
    found = []
    for device in (by_kernel(False), by_kernel(True)):
        sums = projector.new_sums(3, device)
        for name in layout.names:
            projector.add_updates_(sums, rows_BP[:, layout.slice(name)].to(device), name, rule)
        found.append(torch.cat([sums.features_BK, sums.grad_norms_B[:, None], sums.update_norms_B[:, None]], 1).cpu())
    assert torch.equal(*found)  # 1/√16 is exact, so the dense projection's sums are too


def test_every_program_has_a_place_of_its_own(by_kernel) -> None:
    """Else they would race on a GPU, which one at a time they do not."""
    projector, grads_Bp = projector_of("sparse", 12 * 200, 200), integers(17, 12 * 200)
    device = by_kernel(True)
    sums = projector.new_sums(17, device)
    projector.add_updates_(sums, grads_Bp.to(device), "a", rule_of("sgd", 2400))
    num_parts, num_tiles = 3, 2
    assert sums.features_SBK.shape == (num_parts, 17, 200)
    assert sums.features_SBK.any(2).all()
    for squares_SB in (sums.grad_squares_SB, sums.update_squares_SB):
        assert squares_SB.shape == (num_parts * num_tiles, 17)
        assert (squares_SB > 0).all()


def test_sums_have_several_parts_where_programs_are_few() -> None:
    assert kernels.num_parts(16, 8192, 2**19) == 8
    assert kernels.num_parts(16, 8192, 2**13) == 1
    assert kernels.num_parts(2**20, 8192, 2**19) == 1
    assert kernels.num_parts(3, 20, 1001) == 12


@pytest.mark.parametrize(("num_rows", "num_params", "dim"), [(1, 1, 1), (3, 101, 63), (17, 130, 129), (33, 64, 256)])
def test_the_dense_projection_is_exact(by_kernel, num_rows, num_params, dim) -> None:
    projector, rows_Bp = projector_of("rademacher", num_params, dim), integers(num_rows, num_params)
    found = []
    for device in (by_kernel(False), by_kernel(True)):
        out_BK = torch.zeros(num_rows, dim, device=device)
        projector.project_add_(out_BK, rows_Bp.to(device), "a")
        found.append(out_BK.cpu())
    assert torch.equal(*found)


def test_the_dense_projection_of_floats_is_its_twin(by_kernel) -> None:
    projector, rows_Bp = projector_of("rademacher", 1001, 63), floats(3, 1001)
    expected = summed(projector, rows_Bp, rule_of("adam", 1001), by_kernel(False))
    found = summed(projector, rows_Bp, rule_of("adam", 1001), by_kernel(True))
    assert worst_row_error(found[0], expected[0]) < 1e-5


@pytest.mark.parametrize("kind", ["sparse", "rademacher"])
def test_blocks_of_the_wrong_shape_or_dtype_are_refused(by_kernel, kind) -> None:
    projector, device = projector_of(kind, 63, 20), by_kernel(True)
    sums = projector.new_sums(3, device)
    for wrong in (torch.zeros(3, 62), torch.zeros(1, 63), torch.zeros(3, 63, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="a: got"):
            projector.add_updates_(sums, wrong.to(device), "a", rule_of("sgd", 63))


def test_the_trial_tells_right_kernels_from_wrong_ones(monkeypatch) -> None:
    assert kernels.agree_with_twins(DEVICE)
    absorb = kernels.hashing.absorb
    with monkeypatch.context() as patched:
        patched.setattr(kernels.hashing, "absorb", lambda *words: absorb(*words) ^ 2**31)
        assert not kernels.agree_with_twins(DEVICE)
    with monkeypatch.context() as patched:
        patched.setattr(kernels, "add_rademacher_", lambda *args: None)
        assert not kernels.agree_with_twins(DEVICE)


def test_no_rows_are_no_work(by_kernel) -> None:
    projector, device = projector_of("sparse", 63, 20), by_kernel(True)
    sums = projector.new_sums(0, device)
    projector.add_updates_(sums, torch.zeros(0, 63, device=device), "a", rule_of("sgd", 63))
    assert sums.features_BK.shape == (0, 20)


def test_features_of_a_model_are_those_without_kernels(by_kernel, tiny_model_folder, tiny_run, tiny_pool) -> None:
    """Several feature sets from one backward pass, which therefore share the gradients; and no sign is stored."""
    from less.adapters import adapted_model
    from less.checkpoints import find_checkpoints
    from less.data import RenderConfig, Renderer, collate, open_source
    from less.models import load_base_model, load_tokenizer
    from less.moments import load_adam_state

    renderer = Renderer(load_tokenizer(tiny_model_folder), RenderConfig())
    batch = collate([renderer.render_record(record) for record in open_source(tiny_pool).iter_records(0, 5)], range(5))
    checkpoint = find_checkpoints([tiny_run])[-1]
    found = []
    for wanted in (False, True):
        device = by_kernel(wanted)
        with adapted_model(
            load_base_model(tiny_model_folder, dtype="float32", device=device.type), checkpoint.path
        ) as model:
            layout = ParamLayout.of(model)
            state = load_adam_state(checkpoint.path, model, layout)
            configs = [
                FeatureSetConfig(update_rule=rule, projection=ProjectionConfig(kind=kind, proj_dim=64))
                for rule in ("adam", "sgd")
                for kind in PROJECTIONS
            ]
            sets = [FeatureSet.prepare(c, layout, make_projector(c.projection, layout), state, device) for c in configs]
            found.append(gradient_features(model, batch.to(device), sets))
            assert not (wanted and any(getattr(fs.projector, "_plans", None) for fs in sets))
    twin, own = found
    for name in twin.features_BK:
        assert worst_row_error(own.features_BK[name].cpu(), twin.features_BK[name]) < 1e-4
        assert torch.allclose(own.update_norms_B[name].cpu(), twin.update_norms_B[name], rtol=1e-4)
    assert torch.allclose(own.grad_norms_B.cpu(), twin.grad_norms_B, rtol=1e-4)
