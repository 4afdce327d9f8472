"""Streamed features against the slow definition: Σ over parameters of Π Γ(g), row by row."""

import pytest
import torch

from datastore.errors import SettingError
from less.adam import UPDATE_RULES, update_direction_ref
from less.adapters import adapted_model
from less.checkpoints import find_checkpoints
from less.data import RenderConfig, Renderer, collate, open_source
from less.features import FeatureSet, FeatureSetConfig, gradient_features, shared_direction
from less.gradients import gradients_ref
from less.models import ParamLayout, load_base_model, load_tokenizer
from less.moments import load_adam_state
from less.projection import PROJECTIONS, ProjectionConfig, make_projector

CPU = torch.device("cpu")


class Setting:
    """A tiny model at its last checkpoint, rows, and each row's gradient by autograd."""

    def __init__(self, model, checkpoint, rendered):
        self.model, self.rendered = model, rendered
        self.layout = ParamLayout.of(model)
        self.state = load_adam_state(checkpoint.path, model, self.layout)
        self.losses_N, self.grads = gradients_ref(model, collate(rendered, range(len(rendered))))
        self.matrices = {}

    def feature_set(self, rule, kind="sparse", dim=101, seed=3):
        projection = ProjectionConfig(kind=kind, proj_dim=dim, seed=seed)
        config = FeatureSetConfig(update_rule=rule, projection=projection)
        state = None if rule in ("sgd", "sign") else self.state
        return FeatureSet.prepare(config, self.layout, make_projector(projection, self.layout), state, CPU)

    def updates_ref(self, rule, grads):
        """Γ of every parameter side by side, (N, P) float64."""
        parts = [
            update_direction_ref(
                rule, grads[name], self.state.m[name].flatten(), self.state.v[name].flatten(),
                step=self.state.step, beta1=self.state.beta1, beta2=self.state.beta2, eps=self.state.eps,
            )
            for name in self.layout.names
        ]  # fmt: skip
        return torch.cat(parts, dim=1)

    def projected_ref(self, updates_NP, projector):
        """Π of them, by the matrix that no one stores; a P×P matrix of ones on the diagonal is not multiplied."""
        if projector.config.kind == "none":
            return updates_NP
        if projector.config not in self.matrices:
            self.matrices[projector.config] = projector.matrix_ref().double()
        return updates_NP @ self.matrices[projector.config]

    def features(self, feature_sets, rows=None, padding_side="right"):
        rows = range(len(self.rendered)) if rows is None else rows
        return gradient_features(self.model, collate(self.rendered, rows, padding_side=padding_side), feature_sets)


@pytest.fixture(scope="module")
def setting(tiny_model_folder, tiny_run, tiny_pool):
    renderer = Renderer(load_tokenizer(tiny_model_folder), RenderConfig())
    rendered = [renderer.render_record(record) for record in open_source(tiny_pool).iter_records(0, 7)]
    checkpoint = find_checkpoints([tiny_run])[-1]
    with adapted_model(load_base_model(tiny_model_folder), checkpoint.path) as model:
        yield Setting(model, checkpoint, rendered)


def worst_row_error(found_BK, expected_BK):
    expected_BK = expected_BK.double()
    return ((found_BK - expected_BK).norm(dim=1) / expected_BK.norm(dim=1)).max().item()


@pytest.mark.parametrize("kind", PROJECTIONS)
@pytest.mark.parametrize("rule", UPDATE_RULES)
def test_features_are_the_projected_update_direction_of_autograds_gradient(setting, rule, kind):
    fs = setting.feature_set(rule, kind, dim=63)
    found = setting.features([fs])
    updates_NP = setting.updates_ref(rule, setting.grads)
    expected_NK = setting.projected_ref(updates_NP, fs.projector)
    assert found.features_BK[fs.name].dtype == torch.float32
    assert found.features_BK[fs.name].shape == expected_NK.shape
    # a coordinate of g within rounding of zero may have the other sign: a few flips among P
    bound = 0.05 if rule == "sign" else 2e-5
    assert worst_row_error(found.features_BK[fs.name], expected_NK) < bound
    assert torch.allclose(found.losses_B, setting.losses_N, rtol=1e-5)
    assert torch.allclose(found.update_norms_B[fs.name].double(), updates_NP.norm(dim=1), rtol=2e-3)
    grads_NP = torch.cat([setting.grads[name] for name in setting.layout.names], dim=1)
    assert torch.allclose(found.grad_norms_B, grads_NP.norm(dim=1), rtol=1e-5)


def test_many_feature_sets_from_one_pass_equal_each_alone_in_any_order(setting):
    sets = [setting.feature_set(rule, kind) for rule in UPDATE_RULES for kind in ("sparse", "rademacher")]
    for ordered in (sets, sets[::-1]):
        together = setting.features(ordered)
        assert list(together.features_BK) == [fs.name for fs in ordered]
        for fs in ordered:
            alone = setting.features([fs])
            assert torch.equal(together.features_BK[fs.name], alone.features_BK[fs.name])
            assert torch.equal(together.update_norms_B[fs.name], alone.update_norms_B[fs.name])
            assert torch.equal(together.grad_norms_B, alone.grad_norms_B)


@pytest.mark.parametrize("rule", ["adam", "sgd"])
def test_unprojected_features_have_the_update_directions_norm(setting, rule):
    fs = setting.feature_set(rule, "none")
    found = setting.features([fs])
    norms_B = found.features_BK[fs.name].norm(dim=1)
    assert torch.allclose(norms_B, found.update_norms_B[fs.name], rtol=1e-5)
    if rule == "sgd":
        assert torch.allclose(norms_B, found.grad_norms_B, rtol=1e-5)


@pytest.mark.parametrize("kind", PROJECTIONS)
@pytest.mark.parametrize("rule", UPDATE_RULES)
def test_the_shared_direction_is_the_feature_of_a_zero_gradient(setting, rule, kind):
    fs = setting.feature_set(rule, kind, dim=63)
    zeros = {name: torch.zeros(1, size) for name, size in zip(
        setting.layout.names, setting.layout.sizes, strict=True
    )}  # fmt: skip
    expected_1K = setting.projected_ref(setting.updates_ref(rule, zeros), fs.projector)
    direction_K = shared_direction(fs, setting.layout, CPU)
    assert direction_K.dtype == torch.float32
    assert torch.allclose(direction_K.double(), expected_1K[0], rtol=1e-4, atol=1e-4)
    assert bool(direction_K.any()) == (rule in ("adam", "adam-less"))


def test_adam_and_adam_without_momentum_differ_by_the_momentum_over_the_rows_own_root(setting):
    adam, own = setting.feature_set("adam", "none"), setting.feature_set("adam-no-momentum", "none")
    found = setting.features([adam, own])
    grads_NP = torch.cat([setting.grads[name] for name in setting.layout.names], dim=1).double()
    difference_NP = found.features_BK[adam.name] - found.features_BK[own.name]
    state = setting.state
    m_P, v_P = (
        torch.cat([moments[n].flatten() for n in setting.layout.names]).double() for moments in (state.m, state.v)
    )
    v_NP = (state.beta2 * v_P + (1 - state.beta2) * grads_NP**2) / (1 - state.beta2 ** (state.step + 1))
    expected_NP = state.beta1 * m_P / (1 - state.beta1 ** (state.step + 1)) / (v_NP.sqrt() + state.eps)
    assert worst_row_error(difference_NP, expected_NP) < 1e-4


@pytest.mark.parametrize("rule", ["adam", "adam-less", "sgd"])
def test_features_do_not_depend_on_batch_mates_order_or_padding_side(setting, rule):
    fs = setting.feature_set(rule)
    expected_NK = setting.features([fs]).features_BK[fs.name]
    ways = [[[row] for row in range(7)], [[6, 2], [0, 1, 3, 5, 4]], [[5, 3, 1, 0, 2, 4, 6]]]
    for batches in ways:
        for side in ("right", "left"):
            found_NK = torch.empty_like(expected_NK)
            for rows in batches:
                found_NK[rows] = setting.features([fs], rows, side).features_BK[fs.name]
            assert worst_row_error(found_NK, expected_NK) < 2e-5


def test_features_do_not_depend_on_the_embedding_of_the_padding(setting):
    fs = setting.feature_set("adam")
    batches = [collate(setting.rendered, range(7), pad_id=pad) for pad in (0, 17)]
    one, other = (gradient_features(setting.model, batch, [fs]).features_BK[fs.name] for batch in batches)
    assert worst_row_error(one, other) < 1e-6


def test_no_gradient_is_left_on_the_model(setting):
    setting.features([setting.feature_set("adam")])
    assert all(parameter.grad is None for parameter in setting.model.parameters())


def test_another_seed_gives_other_features(setting):
    one, other = (setting.feature_set("sgd", seed=seed) for seed in (0, 1))
    assert not torch.allclose(
        setting.features([one]).features_BK[one.name], setting.features([other]).features_BK[other.name]
    )


def test_rules_that_need_moments_are_refused_without_them(setting):
    projection = ProjectionConfig(kind="none")
    for rule in ("adam", "adam-less", "adam-no-momentum"):
        config = FeatureSetConfig(update_rule=rule, projection=projection)
        with pytest.raises(SettingError, match="needs Adam moments"):
            FeatureSet.prepare(config, setting.layout, make_projector(projection, setting.layout), None, CPU)


def test_a_feature_sets_name_says_rule_and_kind():
    def name(rule, **projection):
        return FeatureSetConfig(update_rule=rule, projection=ProjectionConfig(**projection)).name

    assert name("adam") == "adam-sparse"
    assert name("adam-no-momentum", kind="rademacher", proj_dim=64) == "adam-no-momentum-rademacher"
    assert name("sgd", kind="none") == "sgd-none"


@pytest.mark.gpu
def test_features_on_a_gpu_equal_those_on_the_cpu(tiny_model_folder, tiny_run, tiny_pool):
    renderer = Renderer(load_tokenizer(tiny_model_folder), RenderConfig())
    rendered = [renderer.render_record(record) for record in open_source(tiny_pool).iter_records(0, 7)]
    checkpoint = find_checkpoints([tiny_run])[-1]
    found = []
    for name in ("cpu", "cuda"):
        device = torch.device(name)
        base = load_base_model(tiny_model_folder, dtype="float32", device=name)
        with adapted_model(base, checkpoint.path) as model:
            layout = ParamLayout.of(model)
            state = load_adam_state(checkpoint.path, model, layout)
            sets = []
            for rule in ("adam", "adam-less", "sgd"):
                for kind in PROJECTIONS:
                    projection = ProjectionConfig(kind=kind, proj_dim=101)
                    config = FeatureSetConfig(update_rule=rule, projection=projection)
                    projector = make_projector(projection, layout)
                    sets.append(FeatureSet.prepare(config, layout, projector, state, device))
            batch = collate(rendered, range(7)).to(device)
            features = gradient_features(model, batch, sets).features_BK
            shared = {fs.name: shared_direction(fs, layout, device).cpu() for fs in sets}
            found.append(({name: f.cpu() for name, f in features.items()}, shared))
    (cpu, cpu_shared), (gpu, gpu_shared) = found
    for name in cpu:
        assert worst_row_error(gpu[name], cpu[name]) < 1e-4
        assert torch.allclose(gpu_shared[name], cpu_shared[name], rtol=1e-4, atol=1e-4)
