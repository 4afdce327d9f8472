"""The linear datamodeling score against its definition, the scores against the library's, and the whole script."""

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
from peft import LoraConfig

from less import score
from less.adam import UPDATE_RULES
from less.data import RenderConfig, Renderer
from less.data.records import Memory
from less.models import load_base_model, load_tokenizer
from less.statistics import spearman

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("evidence_datamodel")


def run(bench, arguments, *more):
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # matplotlib's, of its fonts
        patch.setattr(
            sys, "argv", ["evidence_datamodel.py", *map(str, arguments), "--smoke", "--resamples", "5", *map(str, more)]
        )
        bench.main()


@pytest.fixture(scope="module")
def arguments(tmp_path_factory, tiny_model_folder, tiny_pool, tiny_target_file):
    work = tmp_path_factory.mktemp("work")
    return [
        "--model", tiny_model_folder, "--pool", tiny_pool, "--targets", f"tones={tiny_target_file}:3",
        f"all={tiny_target_file}", "--work", work / "work", "--json", work / "out.json",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def report(bench, arguments):
    run(bench, arguments)
    return json.loads(arguments[-1].read_text())


def test_every_score_is_on_the_page_beside_the_ceiling(bench, report, arguments):
    names = [f"{rule} {kind}" for rule in UPDATE_RULES for kind in ("none", "cosine")] + list(bench.BASELINES)
    assert list(report["results"]) == names
    assert report["case"]["rows_of_a_subset"] == 8
    assert -1 <= report["ceiling"]["one_with_another"]["value"] <= 1
    page = arguments[-1].with_suffix(".md").read_text()
    assert page.count("| `adam-less` cosine |") == page.count("| random |") == 1
    assert "**Ceiling.** One seed's losses agree with another's" in page
    assert "NaN" not in arguments[-1].read_text()
    assert arguments[-1].with_suffix(".png").stat().st_size > 1000


def test_models_are_kept_and_more_halves_are_added_to_them(bench, report, arguments):
    models = arguments[arguments.index("--work") + 1] / "models"
    files = sorted(models.glob("*.json"))
    assert len(files) == 2 * 4
    before, unchanged = json.loads(files[0].read_text()), files[1].stat().st_mtime_ns
    files[0].unlink()
    run(bench, arguments, "--subsets", 5)
    assert files[1].stat().st_mtime_ns == unchanged
    assert json.loads(files[0].read_text())["losses"] == before["losses"]
    assert len(list(models.glob("*.json"))) == 2 * 5
    with pytest.raises(SystemExit, match="begun with other learning_rate"):
        run(bench, arguments, "--learning-rate", 1)


@pytest.mark.filterwarnings("ignore::less.checkpoints.EvidenceWarning")
def test_scores_are_those_of_the_library_with_each_target_a_subtask(bench, report, arguments, tiny_targets):
    work = arguments[arguments.index("--work") + 1]
    case = bench.Case.open(work / "store")
    targets = bench.Targets.load(arguments[5:7], case.renderer)
    found = bench.scores_of_rows(case, targets)
    rows = {row["id"]: row for row in tiny_targets}
    wanted = [rows[name] | {"subtask": str(m)} for m, name in enumerate(targets.ids)]
    for rule in ("adam", "sign"):
        for normalize in ("none", "cosine"):
            expected = score(
                datastore=work / "store", targets=wanted, feature_set=f"{rule}-sparse", normalize=normalize,
                progress=False,
            )  # fmt: skip
            own = found[f"{rule} {normalize}"]
            np.testing.assert_allclose(own, expected.scores_NJ, rtol=1e-3, atol=1e-3 * np.abs(own).max())


def test_training_lowers_the_loss_and_its_seed_decides_it(bench, tiny_model_folder, tiny_rows):
    base = load_base_model(tiny_model_folder).eval()
    renderer = Renderer(load_tokenizer(tiny_model_folder), RenderConfig())
    rendered = [renderer.render_record(record) for record in Memory(tiny_rows[:8]).iter_records()]
    targets = bench.Targets(rendered, ["pool"] * 8, [str(n) for n in range(8)])
    weights = {name: parameter.clone() for name, parameter in base.named_parameters()}
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, target_modules="all-linear")
    settings = Namespace(learning_rate=1e-2, epochs=4, batch_rows=3)
    state = torch.random.get_rng_state()
    first, again, other = (bench.train(base, lora, rendered, targets, settings, [2, n, 0])[0] for n in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    assert first.mean() < targets.losses(base).mean() - 0.1
    assert torch.equal(torch.random.get_rng_state(), state)
    assert list(weights) == [name for name, _ in base.named_parameters()]
    assert all(torch.equal(parameter, weights[name]) for name, parameter in base.named_parameters())


@given(st.integers(1, 20), st.integers(2, 30))
def test_halves_have_half_of_the_rows_and_fewer_are_the_first_of_more(bench, num_subsets, num_rows):
    inside_SN = bench.halves(num_subsets, num_rows)
    assert (inside_SN.sum(axis=1) == num_rows // 2).all()
    np.testing.assert_array_equal(inside_SN, bench.halves(num_subsets + 3, num_rows)[:num_subsets])


def test_no_two_halves_are_the_same_and_every_row_is_in_some(bench):
    inside_SN = bench.halves(40, 60)
    assert len(np.unique(inside_SN, axis=0)) == 40
    assert (inside_SN.sum(axis=0) > 5).all()


def test_losses_that_are_sums_over_the_rows_are_foreseen_by_what_is_summed(bench):
    effects_NM = np.random.default_rng(0).normal(size=(20, 3))
    inside_SN = bench.halves(12, 20)
    losses_SM = 5 - inside_SN @ effects_NM
    args = Namespace(resamples=20)
    case = {"rows": 20, "set_of_target": ["a", "a", "b"], "targets": {"a": 2, "b": 1}}
    scores = {"adam none": effects_NM, "sgd none": -effects_NM}
    found = bench.judge(scores, np.stack([losses_SM, losses_SM]), case, args)
    assert found["results"]["adam none"]["lds"]["value"] == 1
    assert found["results"]["adam none"]["by_set"] == {"a": 1, "b": 1}
    assert found["results"]["sgd none"]["lds"]["value"] == -1
    assert found["results"]["sgd none"]["less_adam"]["value"] == -2
    assert found["ceiling"]["one_with_another"]["value"] == found["ceiling"]["perfect_score"] == 1


@given(st.integers(0, 10**6))
def test_lds_is_the_mean_over_targets_of_spearman_over_halves(bench, seed):
    predicted_SM, actual_SM = np.random.default_rng(seed).normal(size=(2, 7, 3))
    expected = sum(spearman(predicted_SM[:, m], actual_SM[:, m]) for m in range(3)) / 3
    assert bench.lds(predicted_SM, actual_SM) == pytest.approx(expected)
    assert bench.gain(predicted_SM, actual_SM, actual_SM) == pytest.approx(expected - 1)


@given(st.lists(st.lists(st.integers(0, 5), min_size=4, max_size=4), min_size=2, max_size=9))
def test_correlations_are_spearman_of_each_column_with_ties_and_without_an_order(bench, rows):
    values = np.array(rows, float)
    found_M = bench.correlations(values[:, :2], values[:, 2:])
    expected_M = [spearman(values[:, m], values[:, 2 + m]) for m in range(2)]
    np.testing.assert_allclose(found_M, expected_M, atol=1e-12)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_mean_of_some_seeds_agrees_with_as_many_others_as_spearman_and_brown_say(bench, count):
    generator = np.random.default_rng(0)
    truth_S = generator.normal(size=100_000)
    seeds_AS = truth_S + 1.5 * generator.normal(size=(2 * count, 100_000))
    r = np.corrcoef(seeds_AS[0], seeds_AS[-1])[0, 1]
    own, others = seeds_AS[:count].mean(axis=0), seeds_AS[count:].mean(axis=0)
    assert np.corrcoef(own, others)[0, 1] == pytest.approx(bench.spearman_brown(r, count), abs=0.02)
    assert np.corrcoef(own, truth_S)[0, 1] == pytest.approx(bench.spearman_brown(r, count) ** 0.5, abs=0.02)


def test_rows_that_are_too_long_are_left_out(bench, tiny_model_folder, tiny_pool, tiny_rows):
    renderer = Renderer(load_tokenizer(tiny_model_folder), RenderConfig())
    every = [renderer.render_record(record).num_tokens for record in Memory(tiny_rows).iter_records()]
    most = sorted(every)[20]
    rendered, lines = bench.short_rows(tiny_pool, 10, most, renderer)
    expected = [n for n, count in enumerate(every) if count <= most][:10]
    assert [json.loads(line)["id"] for line in lines] == [f"row-{n}" for n in expected]
    assert [row.num_tokens for row in rendered] == [every[n] for n in expected]
    with pytest.raises(SystemExit, match="ask for fewer --rows"):
        bench.short_rows(tiny_pool, 40, most, renderer)
