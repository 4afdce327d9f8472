"""What is gathered for the cheaper features is what the engine would make, and how they are judged."""

import importlib
import json
import math
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from less import build_datastore, score
from less.adam import update_direction_ref
from less.adapters import adapted_model
from less.checkpoints import find_checkpoints
from less.data import RenderConfig, Renderer, collate
from less.data.records import Memory
from less.gradients import gradients_ref
from less.influence import influence_scores_ref
from less.models import ParamLayout, load_base_model, load_tokenizer
from less.moments import load_adam_state

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SUBTASKS = [0, 1, 0, 1]  # of the first two targets of each


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("fidelity_cheaper")


def run(bench, *arguments):
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tiny run's weak evidence, and matplotlib's of its fonts
        patch.setattr(sys, "argv", ["fidelity_cheaper.py", *map(str, arguments)])
        patch.setattr(bench, "RANGE_ROWS", 16)
        bench.main()


@pytest.fixture(scope="module")
def stages(tmp_path_factory, tiny_model_folder, tiny_run, tiny_pool, tiny_targets):
    """Arguments of the stages, and where they work."""
    data = tmp_path_factory.mktemp("data")
    (data / "target_tones.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_targets))
    work = tmp_path_factory.mktemp("work")
    common = ["--work", work, "--model", tiny_model_folder, "--run", tiny_run, "--pool", tiny_pool]
    gather = [*common, "--rows", "40", "--data", data, "--targets", "tones:2", "--last", "1", "--widths", "64", "128"]
    return {"work": work, "gather": ["gather", *gather], "cost": ["cost", *common, "--rows", "6", "--rounds", "1"]}


@pytest.fixture(scope="module")
def gathered(bench, stages):
    run(bench, *stages["gather"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "RANGE_ROWS", 16)
        return bench.Gathered.read(stages["work"])


@pytest.fixture(scope="module")
def references(tiny_model_folder, tiny_run, tiny_rows, tiny_targets):
    """By checkpoint: layout, Γ of the first rows and g of the targets by autograd, a row at a time."""
    model = load_base_model(tiny_model_folder)
    renderer = Renderer(load_tokenizer(tiny_model_folder), RenderConfig())

    def gradients(adapted, rows):
        rendered = [renderer.render_record(record) for record in Memory(rows).iter_records()]
        blocks = [gradients_ref(adapted, collate(rendered, [n]))[1] for n in range(len(rendered))]
        return torch.cat([torch.cat(list(own.values()), dim=1) for own in blocks])

    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoints = find_checkpoints([tiny_run])
    for checkpoint in checkpoints:
        with adapted_model(model, checkpoint.path) as adapted:
            layout = ParamLayout.of(adapted)
            state = load_adam_state(checkpoint.path, adapted, layout)
            moments = (torch.cat([part[n].flatten() for n in layout.names]) for part in (state.m, state.v))
            constants = {"step": state.step, "beta1": state.beta1, "beta2": state.beta2, "eps": state.eps}
            grads_NP, targets_MP = gradients(adapted, tiny_rows[:5]), gradients(adapted, tiny_targets[:4])
            gammas_NP = update_direction_ref("adam", grads_NP, *moments, **constants)
            found[checkpoint.name] = (checkpoint.weight, layout, gammas_NP.numpy(), targets_MP.numpy(), grads_NP)
    return found


@pytest.mark.parametrize("layers", ["all", "last:1", "mlp"])
@pytest.mark.parametrize("checkpoints", [slice(None), slice(-1, None)])
def test_the_exact_score_is_the_definition_on_gradients_of_autograd(bench, gathered, references, layers, checkpoints):
    names = list(references)[checkpoints]
    weights, layouts, gammas, targets, _ = zip(*(references[name] for name in names), strict=True)
    chosen = bench.choose_layers(gathered.plan["layers"], layers)
    columns = np.concatenate(
        [np.arange(layouts[0].num_params)[layouts[0].slice(n)] for n in layouts[0].names if bench.layer_of(n) in chosen]
    )
    shares = weights if len(weights) > 1 else [1.0]
    own, wanted = ([rows[:, columns] for rows in side] for side in (gammas, targets))
    expected_NJ = influence_scores_ref(own, wanted, shares, SUBTASKS)
    found_NJ = gathered.scores(bench.Variant(layers, None), names)
    assert gathered.subtasks == [["tones", "a"], ["tones", "b"]]
    np.testing.assert_allclose(found_NJ[:5], expected_NJ, atol=1e-5)


def test_plain_gradients_are_kept_as_they_are(bench, gathered, references):
    weights, _, _, targets, grads = zip(*references.values(), strict=True)
    expected_NJ = influence_scores_ref([g.numpy() for g in grads], targets, weights, SUBTASKS)
    found_NJ = gathered.scores(bench.EXACT, list(references), rule="sgd")
    np.testing.assert_allclose(found_NJ[:5], expected_NJ, atol=1e-5)


@pytest.mark.filterwarnings("ignore::less.checkpoints.EvidenceWarning")
@pytest.mark.parametrize(("layers", "width"), [("all", 64), ("all", 128), ("last:1", 128), ("self_attn", 128)])
def test_a_variant_scores_as_a_store_of_it_does(
    bench, gathered, tmp_path, tiny_model_folder, tiny_run, tiny_rows, tiny_targets, layers, width
):
    build_datastore(
        model=tiny_model_folder, checkpoints=tiny_run, data=tiny_rows, datastore=tmp_path / "store", proj_dim=width,
        layers=layers, feature_dtype="float32", progress=False,
    )  # fmt: skip
    expected = score(datastore=tmp_path / "store", targets={"tones": tiny_targets[:4]}, progress=False)
    found_NJ = gathered.scores(bench.Variant(layers, width), list(gathered.plan["checkpoints"]))
    np.testing.assert_allclose(found_NJ, expected.scores_NJ, atol=1e-5)
    np.testing.assert_allclose(gathered.best(found_NJ)["tones"], expected.score_N, atol=1e-5)


def test_an_interrupted_run_goes_on_and_one_of_other_rows_is_refused(bench, gathered, stages):
    lost, kept = (sorted(stages["work"].glob("*/rows-*.npz"))[n] for n in (1, 0))
    before, unchanged = dict(np.load(lost)), kept.stat().st_mtime_ns
    lost.unlink()
    run(bench, *stages["gather"])
    assert kept.stat().st_mtime_ns == unchanged
    for name, array in np.load(lost).items():
        np.testing.assert_array_equal(array, before[name])
    with pytest.raises(SystemExit, match="begun with other pool_rows"):
        run(bench, *stages["gather"], "--rows", "39")


@pytest.mark.slow
def test_the_report_joins_costs_and_ranks(bench, gathered, stages, tmp_path, capsys):
    run(bench, *stages["cost"])
    run(bench, "report", "--work", stages["work"], "--json", tmp_path / "out.json", "--resamples", "20")
    report = json.loads((tmp_path / "out.json").read_text())
    full, *_ = (w for w in report["results"] if (w["layers"], w["proj_dim"], w["checkpoints"]) == ("all", 128, "all"))
    assert full["cost"] == 1
    assert report["case"]["rows"] == 40
    half = [w for w in report["results"] if w["proj_dim"] == 128 and w["layers"] == "all" and w["checkpoints"] != "all"]
    assert [w["cost"] for w in half] == [0.5, 0.5]
    assert "| all layers, K = 128 | all | 1.00 |" in capsys.readouterr().out
    assert (tmp_path / "out.png").stat().st_size > 1000


def test_layers_that_do_not_add_up_are_not_timed(bench):
    class Store:
        feature_sets, checkpoints = ("adam-sparse",), ("checkpoint-1",)

        def __init__(self, norm):
            self.update_norms_N = np.array([norm])

        def stats(self, *_):
            return self

    norms = {"last:1": 4.0, bench.ATTENTION: 3.0, bench.MLP: 4.0, "all": 5.0}
    variants = bench.variants_of([1], [8])
    bench.check_stores({v.name: Store(norms[v.layers]) for v in variants}, variants)
    for layers, wrong in ((bench.MLP, 4.1), ("last:1", 5.1)):
        with pytest.raises(SystemExit, match="nothing is timed"):
            bench.check_stores({v.name: Store((norms | {layers: wrong})[v.layers]) for v in variants}, variants)


def test_the_set_up_is_taken_off_both_sides_of_a_ratio(bench):
    seconds = {"full": [10.0, 20.0], "set-up": [2.0, 4.0], "half": [6.0, 12.0]}
    ratios = {
        name: {"cpu_ratios": [a / b for a, b in zip(own, seconds["full"], strict=True)]}
        for name, own in seconds.items()
    }
    net = bench.net_costs({"results": ratios})
    assert net == pytest.approx({"full": 1, "set-up": 0, "half": 0.5})


SCORES = st.lists(st.tuples(st.floats(-1, 1), st.floats(-1, 1)), min_size=2, max_size=60)


@given(SCORES)
def test_f95_is_the_smallest_share_that_keeps_95_percent(bench, rows):
    exact_N, found_N = (np.array(column) for column in zip(*rows, strict=True))
    num_rows, count = len(rows), math.ceil(len(rows) / 20)
    with np.errstate(invalid="ignore"):  # Spearman has no value where one side is constant
        judged = bench.judge(exact_N, found_N)

    def best(scores_N, most):
        return set(sorted(range(num_rows), key=lambda n: (-scores_N[n], n))[:most])

    top = best(exact_N, count)
    enough = (k for k in range(1, num_rows + 1) if len(top & best(found_N, k)) >= 0.95 * count)
    assert judged["f95"] == next(enough) / num_rows
    assert judged["top"] == pytest.approx(len(top & best(found_N, count)) / count)


def test_the_exact_score_itself_is_perfect_and_its_reverse_is_the_worst(bench):
    exact_N = np.random.default_rng(0).normal(size=100)
    assert bench.judge(exact_N, exact_N) == pytest.approx({"spearman": 1, "top": 1, "f95": 0.05})
    assert bench.judge(exact_N, -exact_N) == pytest.approx({"spearman": -1, "top": 0, "f95": 1})
    assert bench.recall_curve(exact_N, exact_N) == dict.fromkeys(map(str, bench.CURVE), 1)
