"""Similarity in gradient space: the weighted sum of cosines, row by row and by a scan."""

import numpy as np
import pytest
from tiny_stores import SETTINGS, K, build_store, fill, make_shard, open_writer, source

from datastore import Datastore, nearest_rows
from datastore.coding import encode
from datastore.errors import DataError, SettingError
from datastore.similarity import GradientSpace

WEIGHTS = {"checkpoint-2": 0.6, "checkpoint-10": 0.2}
WEIGHTED = SETTINGS | {"checkpoints": {name: {"weight": weight} for name, weight in WEIGHTS.items()}}


@pytest.fixture
def store(tmp_path):
    """101 rows in ranges of 16, from two sources; of some ranges one shard has a row that the other lacks."""
    skip = {("checkpoint-10", 0): {row: "not finite" for row in range(1, 63, 7)}}
    sources = source(num_rows=63), source("more", num_rows=47)
    return Datastore.open(build_store(tmp_path / "ds", *sources, skip=skip, shard_rows=16, settings=WEIGHTED))


def cosines(store, feature_set, checkpoint):
    features_NK = np.concatenate([b.features_nK for b in store.iter_blocks(feature_set, checkpoint)]).astype(np.float64)
    features_NK /= np.linalg.norm(features_NK, axis=1, keepdims=True)
    return features_NK @ features_NK.T


def test_it_is_the_weighted_sum_of_cosines_over_checkpoints(store):
    space = GradientSpace(store, "adam")
    expected_NN = sum(weight / 0.8 * cosines(store, "adam", name) for name, weight in WEIGHTS.items())
    everything = np.arange(store.num_rows)
    vectors_NX = space.vectors(everything)
    assert vectors_NX.shape == (store.num_rows, 2 * K)
    np.testing.assert_allclose(vectors_NX @ vectors_NX.T, expected_NN, atol=1e-6)
    np.testing.assert_allclose(space.similarities(vectors_NX[5], everything), expected_NN[5], atol=1e-6)
    (one,) = GradientSpace(store, "adam", "checkpoint-10").weights.values()
    assert one == 1


def test_the_vectors_of_some_rows_are_those_of_the_scan(store, monkeypatch):
    monkeypatch.setattr("datastore.similarity.VALUES_AT_ONCE", 7 * 2 * K)
    space = GradientSpace(store, "sgd")
    parts = [(start, vectors_nX.copy()) for start, vectors_nX in space.iter_vectors()]
    assert max(len(vectors_nX) for _, vectors_nX in parts) == 7
    vectors_NX = np.concatenate([vectors_nX for _, vectors_nX in parts])
    assert [start for start, _ in parts] == [0, *np.cumsum([len(v) for _, v in parts])[:-1]]
    positions = np.random.default_rng(0).permutation(store.num_rows)
    np.testing.assert_array_equal(space.vectors(positions), vectors_NX[positions])
    assert space.vectors(positions[:0]).shape == (0, 2 * K)


@pytest.mark.parametrize("k", [1, 7, 100, 105])
def test_the_nearest_rows_of_a_scan_equal_the_reference(store, monkeypatch, k):
    monkeypatch.setattr("datastore.similarity.VALUES_AT_ONCE", 7 * 2 * K)
    space = GradientSpace(store, "adam")
    positions = np.array([0, 17, 17, store.num_rows - 1])
    found, expected = space.nearest(positions, k), space.nearest_ref(positions, k)
    assert found[0].shape == (4, min(k, store.num_rows - 1))
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_array_equal(found[0], expected[0])
    assert not (found[1] == positions[:, None]).any()


def test_at_one_checkpoint_they_are_those_of_the_plain_scan(store):
    space = GradientSpace(store, "adam", "checkpoint-2")
    positions = np.arange(0, store.num_rows, 9)
    similarities, found = space.nearest(positions, 5)
    scores, plain = nearest_rows(store, "adam", "checkpoint-2", space.vectors(positions), 6)
    assert (plain[:, 0] == positions).all()
    np.testing.assert_allclose(similarities, scores[:, 1:], atol=2e-3)  # unit rows are stored in float16
    assert (found == plain[:, 1:]).mean() > 0.9


def test_a_row_that_is_there_twice_is_the_nearest_and_equal_rows_come_in_order(tmp_path):
    with open_writer(tmp_path, settings=WEIGHTED, shard_rows=4) as writer:
        writer.add_source(source(num_rows=30))
        for key in writer.missing_shards():
            shard = make_shard(key)
            for place, row in enumerate(range(key.start, key.stop)):
                shard.features_NK[place] = np.eye(K)[row % 3]
            writer.write_shard(key, shard)
        fill(writer)
        writer.seal()
    similarities, positions = GradientSpace(Datastore.open(tmp_path), "adam").nearest(np.array([4]), 12)
    assert positions.tolist() == [[1, 7, 10, 13, 16, 19, 22, 25, 28, 0, 2, 3]]
    assert similarities.tolist() == [[1] * 9 + [0] * 3]


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_rows_in_few_bits_are_as_similar_as_their_codes(tmp_path, dtype):
    wide = 64
    with open_writer(tmp_path, settings=WEIGHTED) as writer:
        writer.add_source(source())
        for key in writer.missing_shards():
            rows_NK = np.random.default_rng(key.start).standard_normal((key.stop - key.start, wide))
            rows_NK /= np.linalg.norm(rows_NK, axis=1, keepdims=True)
            shard = make_shard(key)
            object.__setattr__(shard, "features_NK", encode(rows_NK, dtype))
            writer.write_shard(key, shard)
        for at in writer.missing_directions():
            writer.write_direction(*at, np.zeros(wide, np.float32))
        writer.seal()
    space = GradientSpace(Datastore.open(tmp_path), "adam")
    vectors_NX = space.vectors(np.arange(space.num_rows))
    np.testing.assert_allclose(np.linalg.norm(vectors_NX, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(space.nearest(np.arange(7), 3)[1], space.nearest_ref(np.arange(7), 3)[1])


def test_what_makes_no_sense_is_refused(store, tmp_path):
    with pytest.raises(SettingError, match=r"holds the feature sets adam, sgd, none was chosen; .*--feature-set"):
        GradientSpace(store)
    with pytest.raises(SettingError, match="no 'sign'"):
        GradientSpace(store, "sign")
    with pytest.raises(SettingError, match="has no checkpoint 'last'; it has checkpoint-2, checkpoint-10"):
        GradientSpace(store, "adam", "last")
    space = GradientSpace(store, "adam")
    for positions, k in (([0], 0), ([-1], 1), ([store.num_rows], 1), ([[0]], 1)):
        with pytest.raises(SettingError, match=r"(k|positions) must be"):
            space.nearest(np.array(positions), k)
    weightless = Datastore.open(build_store(tmp_path / "weightless"))
    with pytest.raises(
        SettingError, match=r"says nothing of the weights of its checkpoints checkpoint-2, checkpoint-10"
    ):
        GradientSpace(weightless, "adam")
    skip = {("checkpoint-2", 0): dict.fromkeys(range(7), "zero norm")}
    with pytest.raises(DataError, match="has no row: all 7 of its pool were skipped"):
        GradientSpace(Datastore.open(build_store(tmp_path / "none", skip=skip)), "adam", "checkpoint-2")
