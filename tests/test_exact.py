"""The numbers are the definition's, on a real small model and real rows, for every update rule."""

import pytest

from benchmarks.fidelity_exact import measure
from less.adam import UPDATE_RULES

pytestmark = pytest.mark.slow

PROJ_DIM = 256


@pytest.fixture(scope="module")
def report(stories260k, shared_data, tmp_path_factory):
    return measure(stories260k, shared_data, tmp_path_factory.mktemp("exact"), num_rows=200, proj_dim=PROJ_DIM)


@pytest.fixture(params=UPDATE_RULES)
def measured(request, report):
    return report["rules"][request.param] | {"rule": request.param}


def test_almost_every_row_is_scored(report):
    assert report["num_scored"] > 150
    assert report["num_subtasks"] == 9


def test_gradients_and_update_directions_equal_autograds(measured):
    assert measured["update_error"] < 1e-5


def test_adams_update_direction_is_one_step_of_the_real_optimizer(report):
    assert report["rules"]["adam"]["step_error"] < 1e-5


def test_unprojected_scores_are_the_definitions(measured):
    assert measured["score_error"] < 1e-5


def test_projected_inner_products_are_unbiased(measured):
    assert measured["bias"] < 4
    assert measured["bias_rms"] < 1.3


def test_projected_scores_err_no_more_than_the_bound_and_the_dense_projection(measured):
    assert measured["rms_error"] <= 1.3
    assert measured["ratio"] <= 1.25


def test_no_selected_row_lies_far_below_the_exact_threshold(measured):
    assert 0 <= measured["shortfall"] <= 4
