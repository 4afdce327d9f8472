"""Nearest rows are exact, ties included, and FAISS is found out when it is broken."""

import subprocess
import sys
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_stores import K, build_store, fill, make_shard, open_writer, source

from datastore import Datastore, nearest_rows, search
from datastore.errors import GradsiftError, SettingError

AT = ("adam", "checkpoint-2")


def queries(M, seed=0):
    return np.random.default_rng(seed).standard_normal((M, K)).astype(np.float32)


@pytest.mark.parametrize("num_rows", [1, 63, 101])
@pytest.mark.parametrize("M", [1, 5, 65])
def test_nearest_rows_equal_the_reference(tmp_path, monkeypatch, num_rows, M):
    skip = {("checkpoint-10", 0): {row: "not finite" for row in range(1, num_rows, 7)}}
    store = Datastore.open(build_store(tmp_path, source(num_rows=num_rows), skip=skip, shard_rows=16))
    monkeypatch.setattr(search, "QUERIES_AT_ONCE", 32)
    for k in (1, 7, num_rows, num_rows + 3):
        scores_Mk, positions_Mk = nearest_rows(store, *AT, queries(M), k)
        expected_Mk, expected_positions_Mk = search.nearest_rows_ref(store, *AT, queries(M), k)
        assert (scores_Mk.dtype, positions_Mk.dtype) == (np.float32, np.int64)
        np.testing.assert_allclose(scores_Mk, expected_Mk, atol=1e-5)
        np.testing.assert_array_equal(positions_Mk, expected_positions_Mk)


@settings(max_examples=30, deadline=None)
@given(
    values=st.lists(st.integers(-1, 1), min_size=1, max_size=20),
    shard_rows=st.integers(1, 8),
    k=st.integers(1, 21),
)
def test_equal_scores_go_to_the_earlier_row(tmp_path_factory, values, shard_rows, k):
    folder = tmp_path_factory.mktemp("ds")
    with open_writer(folder, shard_rows=shard_rows) as writer:
        writer.add_source(source(num_rows=len(values)))
        for key in writer.missing_shards():
            features_NK = np.zeros((key.stop - key.start, K), np.float16)
            features_NK[:, 0] = values[key.start : key.stop]
            writer.write_shard(key, replace(make_shard(key), features_NK=features_NK))
        fill(writer)
        writer.seal()
    _, positions_Mk = nearest_rows(Datastore.open(folder), *AT, np.eye(1, K, dtype=np.float32), k)
    expected = sorted(range(len(values)), key=lambda row: (-values[row], row))[:k]
    assert positions_Mk.tolist() == [expected]


def test_a_store_without_a_scored_row_has_no_nearest(tmp_path):
    skip = {("checkpoint-2", 0): dict.fromkeys(range(7), "zero norm")}
    scores_Mk, positions_Mk = nearest_rows(Datastore.open(build_store(tmp_path, skip=skip)), *AT, queries(2), 3)
    assert scores_Mk.shape == positions_Mk.shape == (2, 0)


@pytest.mark.parametrize(
    ("queries_MK", "k"),
    [
        (queries(2), 0),
        (queries(2)[:, 1:], 1),
        (queries(2)[0], 1),
        (queries(2).astype(np.float64), 1),
        (queries(2) * np.nan, 1),
    ],
)
def test_questions_that_make_no_sense_are_refused(tmp_path, queries_MK, k):
    with pytest.raises(SettingError, match=r"(k|queries) must be"):
        nearest_rows(Datastore.open(build_store(tmp_path)), *AT, queries_MK, k)


def fake_faiss(num_gpus):
    """A module in the place of FAISS that notes who was called."""
    faiss = ModuleType("faiss")
    faiss.__version__, faiss.METRIC_INNER_PRODUCT, faiss.calls = "1.15.1", 0, set()

    def product(name):
        def multiply(*arrays, metric):
            faiss.calls.add(name)
            return arrays[-2] @ arrays[-1].T

        return multiply

    faiss.pairwise_distances, faiss.pairwise_distance_gpu = product("cpu"), product("gpu")
    faiss.StandardGpuResources, faiss.get_num_gpus = object, lambda: num_gpus
    return faiss


@pytest.mark.parametrize(("num_gpus", "called"), [(0, {"cpu"}), (1, {"gpu"})])
def test_the_gpu_is_called_only_where_there_is_one(tmp_path, monkeypatch, num_gpus, called):
    faiss = fake_faiss(num_gpus)
    monkeypatch.setitem(sys.modules, "faiss", faiss)
    store = Datastore.open(build_store(tmp_path))
    found = nearest_rows(store, *AT, queries(3), 2)
    np.testing.assert_array_equal(found[1], search.nearest_rows_ref(store, *AT, queries(3), 2)[1])
    assert faiss.calls == called


def test_two_distributions_of_faiss_are_refused(monkeypatch):
    installed = {"faiss-cpu": "1.15.1", "faiss-gpu": "1.15.0"}

    def version(name):
        if name not in installed:
            raise PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(search, "version", version)
    with pytest.raises(GradsiftError, match=r"faiss-cpu 1.15.1 and faiss-gpu 1.15.0 .* `pip uninstall --yes"):
        search.import_faiss()


@pytest.mark.parametrize(("module", "problem"), [(ModuleType("faiss"), "in part"), (None, "cannot be imported")])
def test_what_is_left_of_an_uninstalled_faiss_is_refused(monkeypatch, module, problem):
    monkeypatch.setitem(sys.modules, "faiss", module)
    with pytest.raises(GradsiftError, match=rf"{problem}.*pip install faiss-cpu` or `faiss-gpu`"):
        search.import_faiss()


def test_only_a_search_imports_faiss_and_nothing_imports_torch():
    code = (
        "import datastore, sys\n"
        "import datastore.errors\n"
        "assert not {'numpy', 'safetensors'} & set(sys.modules)\n"
        "for name in datastore.__all__: getattr(datastore, name)\n"
        "assert not {'faiss', 'torch'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
