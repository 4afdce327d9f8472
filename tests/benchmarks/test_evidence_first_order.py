"""What is predicted for a step is what the step does, by slow references; trials are kept, drawn and judged rightly."""

import importlib
import json
import sys
import warnings
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from datastore.errors import SettingError
from less import build_datastore
from less.adam import UPDATE_RULES, update_direction_ref
from less.adapters import adapted_model
from less.data import collate
from less.gradients import gradients_ref
from less.models import ParamLayout
from less.moments import load_adam_state

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
RATE = 1e-4


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("evidence_first_order")


def run(bench, arguments, *more):
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tiny run's weak evidence, and matplotlib's of its fonts
        patch.setattr(
            sys,
            "argv",
            ["evidence_first_order.py", *map(str, arguments), "--smoke", "--resamples", "5", *map(str, more)],
        )
        bench.main()


@pytest.fixture(scope="module")
def store(tmp_path_factory, tiny_model_folder, tiny_run, tiny_pool):
    """Every rule, not projected: what is stored is exact."""
    folder = tmp_path_factory.mktemp("store") / "store"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        build_datastore(
            model=tiny_model_folder, checkpoints=tiny_run, data=tiny_pool, datastore=folder, update_rule=UPDATE_RULES,
            projection="none", progress=False,
        )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def arguments(tmp_path_factory, store, tiny_target_file):
    work = tmp_path_factory.mktemp("work")
    targets = [f"tones={tiny_target_file}:3", f"all={tiny_target_file}"]
    return ["--store", store, "--targets", *targets, "--work", work / "work", "--json", work / "out.json"]


@pytest.fixture(scope="module")
def report(bench, arguments):
    run(bench, arguments, "--learning-rate", RATE)
    return json.loads(arguments[-1].read_text())


@pytest.fixture
def case(bench, store):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return bench.Case.open(store)


@pytest.fixture
def at_a_checkpoint(bench, case, tiny_target_file):
    """A stepper at the first checkpoint, exact predictions there, the targets, and rows 0 to 3."""
    targets = bench.Targets.load([f"tones={tiny_target_file}:2", f"all={tiny_target_file}"], case.renderer)
    folder = case.checkpoints[0].path
    with adapted_model(case.model, folder) as model:
        layout = ParamLayout.of(model)
        state = load_adam_state(folder, model, layout)
        rules = {
            case.rules[name]: bench.FeatureSet.prepare(
                bench.FeatureSetConfig(update_rule=case.rules[name], projection=projector.config),
                layout, projector, state, model.device,
            )
            for name, projector in case.projectors(layout).items()
        }  # fmt: skip
        exact = bench.Exact.of(rules, targets.gradients(model), targets)
        yield bench.Stepper(model, state, RATE), exact, targets, case.rendered(range(4))


def reference_gradient(model, rendered):
    """Of one row, by autograd, unpadded: (P,)."""
    return torch.cat([block[0] for block in gradients_ref(model, collate([rendered], [0]))[1].values()])


def reference_update(stepper, rule, gradient_P):
    """Γ of one gradient by the formulas, in float64: (P,)."""
    state = stepper.state
    m_P, v_P = (torch.cat([moments[name].flatten() for name in stepper.parameters]) for moments in (state.m, state.v))
    constants = {"step": state.step, "beta1": state.beta1, "beta2": state.beta2, "eps": state.eps}
    return update_direction_ref(rule, gradient_P[None], m_P, v_P, **constants)[0]


@pytest.mark.parametrize("rule", UPDATE_RULES)
def test_an_exact_prediction_is_the_definition_on_gradients_of_autograd(at_a_checkpoint, rule):
    stepper, exact, targets, rendered = at_a_checkpoint
    stepper.restore()
    update_P = reference_update(stepper, rule, reference_gradient(stepper.model, rendered[0]))
    wanted_MP = torch.stack([reference_gradient(stepper.model, row).double() for row in targets.rendered])
    products_M = wanted_MP @ update_P
    cosines_M = products_M / wanted_MP.norm(dim=1) / update_P.norm()
    found = exact.predictions(stepper.gradient([rendered[0]]))[rule]
    for kind, values_M in (("none", products_M), ("cosine", cosines_M)):
        expected = list(targets.means(values_M.numpy()).values())
        assert found[kind] == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_the_first_step_is_the_update_direction_and_afterwards_the_checkpoint_is_back(bench, at_a_checkpoint):
    stepper, exact, targets, rendered = at_a_checkpoint
    before = targets.losses(stepper.model)
    optimizer = stepper.restore()
    gradient = stepper.gradient([rendered[2]])
    optimizer.step()
    taken_P = torch.cat([(stepper.start[n] - p.detach()).flatten() for n, p in stepper.parameters.items()]) / RATE
    flat_P = torch.cat([block.flatten() for block in gradient.values()])
    torch.testing.assert_close(taken_P.double(), reference_update(stepper, "adam", flat_P), rtol=1e-2, atol=2e-3)
    trial = bench.Trial("row", "row", [[2]] * 3, [1, 3])
    first, second = (stepper.run(trial, rendered, targets, exact) for _ in range(2))
    assert first["losses"] == second["losses"]
    assert first["losses"]["1"] != first["losses"]["3"]
    np.testing.assert_array_equal(targets.losses(stepper.model), before)


def test_a_step_that_is_not_what_was_predicted_stops_everything(bench, at_a_checkpoint):
    stepper, exact, _, rendered = at_a_checkpoint
    trial = bench.Trial("row", "row", [[1]], [1])
    bench.check_step(stepper, rendered, exact, trial)
    with pytest.raises(SystemExit, match="a step is not Γ"):
        bench.check_step(stepper, rendered, bench.Exact({"adam": exact.rules["sgd"]}, exact.queries), trial)


def test_the_gradient_of_a_batch_is_the_mean_of_its_rows_whatever_their_lengths(at_a_checkpoint):
    stepper, _, _, rendered = at_a_checkpoint
    stepper.restore()
    found_P = torch.cat([block.flatten() for block in stepper.gradient(list(rendered.values())).values()])
    expected_P = torch.stack([reference_gradient(stepper.model, row) for row in rendered.values()]).mean(dim=0)
    torch.testing.assert_close(found_P, expected_P, rtol=1e-4, atol=1e-6)


def test_what_adam_predicts_for_a_small_step_is_what_happens(report):
    one_step = next(o for o in report["outcomes"] if (o["kind"], o["steps"]) == ("row", 1))
    adam = one_step["ways"]["adam none"]
    assert adam["slope"]["value"] == pytest.approx(1, abs=0.05)
    assert adam["pearson"]["value"] > 0.99
    assert adam["exact"]["pearson"]["value"] == pytest.approx(adam["pearson"]["value"], abs=1e-3)  # not projected
    assert one_step["trials"] == 6
    assert [(o["kind"], o["trials"]) for o in report["outcomes"]] == [
        ("row", 6), ("row", 4), ("batch of 3", 4), ("3 in turn", 4),
    ]  # fmt: skip


def test_every_rule_and_score_is_on_the_page(report, arguments):
    ways = report["outcomes"][0]["ways"]
    assert list(ways) == [f"{rule} {kind}" for rule in UPDATE_RULES for kind in ("none", "cosine")]
    page = arguments[-1].with_suffix(".md").read_text()
    for rule in UPDATE_RULES:
        assert page.count(f"| `{rule}` | cosine |") == 4  # a row, a batch, and the two tables of all outcomes
    assert "NaN" not in arguments[-1].read_text()
    assert arguments[-1].with_suffix(".png").stat().st_size > 1000


def test_an_interrupted_run_goes_on_and_more_steps_are_added_to_it(bench, report, arguments):
    trials = arguments[arguments.index("--work") + 1] / "trials"
    rows = sorted(trials.glob("row-*.json"), key=lambda file: len(json.loads(file.read_text())["losses"]))
    lost, kept = rows[0], rows[1]
    before, unchanged = json.loads(lost.read_text()), kept.stat().st_mtime_ns
    lost.unlink()
    run(bench, arguments, "--learning-rate", RATE)
    assert kept.stat().st_mtime_ns == unchanged
    again = json.loads(lost.read_text())
    assert (again["losses"], again["exact"]) == (before["losses"], before["exact"])
    run(bench, arguments, "--learning-rate", RATE, "--rows-long", 6)
    assert all("3" in json.loads(file.read_text())["losses"] for file in rows)
    with pytest.raises(SystemExit, match="begun with other learning rate"):
        run(bench, arguments, "--learning-rate", 2 * RATE)


def test_another_pool_is_refused(case, tmp_path):
    (tmp_path / "other.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(SettingError, match=r"other\.jsonl is not the pool of"):
        case.rendered([0], tmp_path / "other.jsonl")


def test_targets_are_evenly_spaced(bench, case, tiny_target_file, tiny_targets):
    found = bench.Targets.load([f"few={tiny_target_file}:2", f"all={tiny_target_file}"], case.renderer)
    ids = [row["id"] for row in tiny_targets]
    assert found.ids == [ids[0], ids[2], *ids]
    assert found.set_M == [0, 0, 1, 1, 1, 1, 1]
    assert found.means(np.arange(7.0)) == {"few": 0.5, "all": 4}
    with pytest.raises(SettingError, match="expected NAME=FILE"):
        bench.Targets.load([str(tiny_target_file)], case.renderer)


def plan(**changes):
    settings = {"rows": 5, "rows_long": 3, "steps": [1, 4], "batch_rows": [2], "batches": 3, "turns": 5, "seed": 0}
    return Namespace(**settings | changes)


@given(st.integers(1, 9), st.integers(0, 9), st.integers(1, 4))
def test_a_smaller_plan_is_part_of_a_larger_one(bench, rows, rows_long, batches):
    small = bench.trials_of(plan(rows=rows, rows_long=rows_long, batches=batches), 12)
    large = {trial.name: trial for trial in bench.trials_of(plan(rows=10, rows_long=10, batches=4), 12)}
    for trial in small:
        assert set(trial.measured) <= set(large[trial.name].measured)
        assert trial.steps == large[trial.name].steps[: len(trial.steps)]
    assert sum(trial.kind == "row" for trial in small) == rows


def test_a_store_with_fewer_rows_than_are_asked_for_is_refused(bench):
    with pytest.raises(SettingError, match="the store has 4 rows"):
        bench.trials_of(plan(), 4)


def test_the_prediction_for_several_steps_is_the_sum_of_their_rows(bench):
    scores_NJ = np.random.default_rng(0).normal(size=(12, 2))
    for trial in bench.trials_of(plan(), 12):
        for num_steps in trial.measured:
            expected = np.zeros(2)
            for rows in trial.steps[:num_steps]:
                for row in rows:
                    expected += scores_NJ[row] / len(rows)
            np.testing.assert_allclose(trial.predicted(scores_NJ, num_steps), expected)
    turns = next(trial for trial in bench.trials_of(plan(), 12) if trial.kind == "2 in turn")
    assert turns.steps[0] == turns.steps[2] == turns.steps[4] != turns.steps[1]


def test_a_perfect_prediction_is_judged_perfect(bench):
    actual_TJ = np.random.default_rng(0).normal(size=(30, 2))
    found = bench.agreement(3 * actual_TJ, actual_TJ, 20)
    assert found["pearson"] == found["spearman"] == {"value": 1, "low": 1, "high": 1}
    assert bench.slope(4 * actual_TJ, actual_TJ) == pytest.approx(0.25)
    assert bench.gain(actual_TJ, -actual_TJ, actual_TJ) == pytest.approx(2)


def test_the_verdict_follows_the_intervals(bench):
    def entry(low, high, less=None):
        interval = {"value": (low + high) / 2, "low": low, "high": high}
        own = {"pearson": interval}
        return own if less is None else own | {"less_adam": {"value": 0, "low": less[0], "high": less[1]}}

    ways = {
        "adam none": entry(0.2, 0.4),
        "sgd none": entry(-0.1, 0.3, (-0.2, -0.1)),
        "sign cosine": entry(0.5, 0.6, (0.1, 0.2)),
    }
    (sentence,) = bench.verdicts([{"kind": "row", "steps": 5, "ways": ways}])
    assert sentence == (
        "5 steps: not foreseen by `sgd` inner; better than `adam`'s inner products: `sign` cosine; worse: `sgd` inner."
    )
