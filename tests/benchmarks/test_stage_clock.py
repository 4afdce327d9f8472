"""Every second of a build belongs to one stage, and to the right one."""

import importlib
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

import less.features
import less.gradients
from datastore import DatastoreWriter
from less.adapters import adapted_model
from less.checkpoints import find_checkpoints
from less.data import RenderConfig, Renderer, collate
from less.data.records import Memory
from less.features import FeatureSet, FeatureSetConfig, gradient_features
from less.models import ParamLayout
from less.projection import ProjectionConfig, make_projector
from less.projection.sparse import SparseProjector

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def clocks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("stage_clock")


@pytest.fixture
def one_batch(tiny_model, tiny_run, tiny_tokenizer):
    """Computes the features of one batch: 14 LoRA layers, 28 parameters."""
    rows = [{"prompt": "a" * (n + 1), "completion": "b" * (n + 2)} for n in range(4)]
    renderer = Renderer(tiny_tokenizer, RenderConfig(), context_length=64)
    rendered = [renderer.render_record(record) for record in Memory(rows).iter_records()]
    batch = collate(rendered, range(4))
    with adapted_model(tiny_model, find_checkpoints([tiny_run])[0].path) as adapted:
        layout = ParamLayout.of(adapted)
        config = FeatureSetConfig(update_rule="sgd", projection=ProjectionConfig(proj_dim=16))
        projector = make_projector(config.projection, layout)
        feature_set = FeatureSet.prepare(config, layout, projector, None, torch.device("cpu"))
        yield lambda: gradient_features(adapted, batch, [feature_set])


def slowed(work, seconds):
    def run(*args, **kwargs):
        time.sleep(seconds)
        return work(*args, **kwargs)

    return run


def test_stages_interrupt_each_other_and_add_up_to_the_whole(clocks):
    clock = clocks.StageClock(torch.device("cpu"))
    clock._mark()
    start = time.perf_counter()
    with clock.stage(clocks.FORWARD):
        time.sleep(0.02)
        with clock.stage(clocks.HEAD):
            time.sleep(0.03)
        time.sleep(0.02)
    time.sleep(0.01)
    clock._mark()
    whole, found = time.perf_counter() - start, clock.seconds()
    assert found[clocks.FORWARD] >= 0.04
    assert found[clocks.HEAD] >= 0.03
    assert found[clocks.SETTING_UP] >= 0.01
    assert sum(found.values()) == pytest.approx(whole, abs=0.02)


def stages_of(clocks, model, work):
    clock = clocks.StageClock(torch.device("cpu"))
    with clock.watching(model):
        work()
    assert clock._stages == [clocks.REST]
    return clock.seconds()


def test_a_slow_projection_is_the_projections_time(clocks, tiny_model, one_batch, monkeypatch):
    before = stages_of(clocks, tiny_model, one_batch)
    assert all(before[stage] > 0 for stage in (clocks.FORWARD, clocks.HEAD, clocks.BACKWARD, clocks.GRADIENTS))
    monkeypatch.setattr(SparseProjector, "add_updates_", slowed(SparseProjector.add_updates_, 0.02))
    found = stages_of(clocks, tiny_model, one_batch)
    assert found[clocks.PROJECTION] >= 28 * 0.02
    assert found[clocks.GRADIENTS] < 14 * 0.02


def test_a_slow_loss_is_the_heads_time(clocks, tiny_model, one_batch, monkeypatch):
    monkeypatch.setattr(less.gradients.F, "cross_entropy", slowed(less.gradients.F.cross_entropy, 0.5))
    found = stages_of(clocks, tiny_model, one_batch)
    assert found[clocks.HEAD] >= 0.5 > found[clocks.FORWARD]


def test_a_slow_gradient_of_the_head_is_not_the_other_layers(clocks, tiny_model, one_batch):
    def delay(module, args):
        if args[0].requires_grad:
            args[0].register_hook(lambda grad: time.sleep(0.5))

    hook = tiny_model.lm_head.register_forward_pre_hook(delay)
    found = stages_of(clocks, tiny_model, one_batch)
    hook.remove()
    assert found[clocks.HEAD] >= 0.5 > found[clocks.BACKWARD]


def test_the_second_forward_pass_of_plain_steps_is_not_the_heads(clocks, tiny_model):
    def step():
        tiny_model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()

    hook = tiny_model.model.layers[0].register_forward_pre_hook(lambda module, args: time.sleep(0.5))
    clock = clocks.StageClock(torch.device("cpu"))
    with clock.watching(tiny_model), clock.stage(clocks.FORWARD):
        step()
        step()
    hook.remove()
    found = clock.seconds()
    assert found[clocks.FORWARD] >= 1
    assert 0 < found[clocks.HEAD] < 0.5
    assert found[clocks.BACKWARD] > 0


def test_layers_that_are_not_wanted_count_as_backward_alone(clocks, tiny_model, one_batch, monkeypatch):
    monkeypatch.setattr(ParamLayout, "layers", frozenset({"base_model.model.model.layers.0.self_attn.q_proj"}))
    slow = slowed(less.gradients._StreamingLora.backward, 0.05)
    monkeypatch.setattr(less.gradients._StreamingLora, "backward", staticmethod(slow))
    found = stages_of(clocks, tiny_model, one_batch)
    assert 0.05 <= found[clocks.GRADIENTS] < 6 * 0.05
    assert found[clocks.BACKWARD] >= 6 * 0.05  # the layers after the first, whose inputs have a gradient


def test_what_runs_in_another_thread_is_beside_and_in_no_stage(clocks, tiny_model, monkeypatch):
    monkeypatch.setattr(Renderer, "render_record", lambda self, record: time.sleep(0.3))
    clock = clocks.StageClock(torch.device("cpu"))
    with clock.watching(tiny_model):
        Renderer.render_record(None, None)
        thread = threading.Thread(target=lambda: Renderer.render_record(None, None))
        thread.start()
        thread.join()
    found = clock.seconds()
    assert 0.3 <= found[clocks.RENDERING] < 0.6
    assert 0.3 <= clock.beside[clocks.RENDERING] < 0.6
    assert found[clocks.SETTING_UP] >= 0.3


def test_nothing_is_watched_afterwards(clocks, tiny_model):
    def watched():
        return (
            less.features.per_sample_gradients, less.gradients.token_losses, Tensor.backward,
            less.gradients._StreamingLora.backward, Renderer.render_record, DatastoreWriter.write_shard,
            DatastoreWriter.seal,
        )  # fmt: skip

    before = watched()
    with clocks.StageClock(torch.device("cpu")).watching(tiny_model):
        assert not any(now is then for now, then in zip(watched(), before, strict=True))
    assert watched() == before
    assert not tiny_model.lm_head._forward_pre_hooks
