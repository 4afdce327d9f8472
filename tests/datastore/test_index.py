"""An index finds what the exact scan finds, says how often it does not, and is refused where it is not the store's."""

import hashlib
import json
import os
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from math import sqrt
from pathlib import Path

import faiss
import numpy as np
import pytest
from tiny_stores import SETTINGS, fill, make_shard, open_writer, source

from datastore import Datastore, index
from datastore.build import json_hash
from datastore.errors import (
    DamagedStoreError,
    DataError,
    FormatVersionError,
    ProvenanceError,
    SettingError,
    StoreError,
)
from datastore.index import GradientIndex, IndexConfig, build_index, index_folder, near_duplicates_ref
from datastore.sketch import SignSketch

K = 96
WEIGHTED = SETTINGS | {"checkpoints": {"checkpoint-2": {"weight": 0.7}, "checkpoint-10": {"weight": 0.3}}}


def clustered(num_rows, seed=0, num_clusters=12, spread=0.7, copies=0):
    """Unit rows around some centres; the last `copies` repeat the first."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((num_clusters, K))
    rows_NK = centres[rng.integers(num_clusters, size=num_rows)] + spread * rng.standard_normal((num_rows, K))
    rows_NK[num_rows - copies :] = rows_NK[:copies]
    return rows_NK / np.linalg.norm(rows_NK, axis=1, keepdims=True)


def make_store(path, num_rows=300, *, shard_rows=64, rows_of=None, **options):
    """A store whose rows at each checkpoint are `rows_of(checkpoint)`."""
    rows_of = rows_of or (lambda name: clustered(num_rows, seed=len(name), **options))
    with open_writer(path, settings=WEIGHTED, shard_rows=shard_rows, feature_sets=["adam"]) as writer:
        known = writer.build.sources[0].num_rows if writer.build.sources else 0
        writer.add_source(source("more" if known else "pool", num_rows=num_rows))
        for key in writer.missing_shards():
            rows_nK = rows_of(key.checkpoint)[key.start : key.stop].astype(np.float16)
            writer.write_shard(key, replace(make_shard(key), features_NK=rows_nK))
        for at in writer.missing_directions():
            writer.write_direction(*at, np.zeros(K, np.float32))
        writer.seal()
    return Datastore.open(path)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """300 rows of 2 × 96; no test may write to it."""
    return make_store(tmp_path_factory.mktemp("stores") / "ds", copies=20)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("stores") / "ds", 5000, shard_rows=1024, num_clusters=50, copies=40)


def recall(found_Mk, expected_Mk):
    return np.mean([len(np.intersect1d(a, b)) for a, b in zip(found_Mk, expected_Mk, strict=True)]) / found_Mk.shape[1]


class TestSketch:
    @pytest.mark.parametrize(("proj_dim", "dim"), [(96, 32), (101, 32), (63, 64), (64, 64), (5, 1), (200, 7)])
    def test_is_its_matrix(self, proj_dim, dim):
        sketch = SignSketch(["a", "b"], proj_dim, dim, 3)
        matrix_XY = sketch.matrix_ref()
        assert (np.abs(matrix_XY).sum(axis=1) == 1).all()  # a column of x goes to one place, with a sign
        vectors_nX = np.random.default_rng(0).standard_normal((7, 2 * proj_dim)).astype(np.float32)
        np.testing.assert_allclose(sketch(vectors_nX), vectors_nX @ matrix_XY, atol=1e-5)

    def test_has_no_bias_and_the_error_that_is_stated(self):
        dim, wide, rng = 64, 640, np.random.default_rng(1)
        for rho in (0.0, 0.5, 0.9, 0.99):
            x, noise = np.linalg.qr(rng.standard_normal((wide, 2)))[0].T
            pair = np.stack([x, rho * x + sqrt(1 - rho**2) * noise]).astype(np.float32)
            errors, products = [], []
            for seed in range(400):
                a, b = SignSketch(["c"], wide, dim, seed)(pair)
                products.append(a @ b)
                errors.append(a @ b / np.linalg.norm(a) / np.linalg.norm(b) - rho)
            assert np.mean(products) == pytest.approx(rho, abs=4 * sqrt((1 + rho**2) / dim / 400))
            assert np.var(products) <= 1.3 * (1 + rho**2) / dim
            assert np.sqrt(np.mean(np.square(errors))) == pytest.approx((1 - rho**2) / sqrt(dim), rel=0.2)

    def test_is_keyed_by_seed_and_checkpoint_and_never_changes(self):
        first, other, again = (SignSketch([name], 64, 8, seed) for name, seed in (("a", 0), ("b", 0), ("a", 1)))
        assert not np.array_equal(first.signs_X, other.signs_X)
        assert not np.array_equal(first.signs_X, again.signs_X)
        both = SignSketch(["a", "b"], 64, 8, 0)
        np.testing.assert_array_equal(both.signs_X, np.concatenate([first.signs_X, other.signs_X]))
        found = SignSketch(["checkpoint-2"], 12, 4, 0).matrix_ref()
        assert (found @ np.arange(1, 5)).tolist() == [
            -4,
            -1,
            2,
            3,
            -1,
            -2,
            3,
            4,
            4,
            -1,
            2,
            -3,
        ]  # indexes on disk depend on it


class TestNeighbours:
    @pytest.mark.parametrize("k", [1, 10, 35, 299, 400])
    @pytest.mark.parametrize("checkpoint", [None, "checkpoint-10"])
    def test_flat_without_a_sketch_are_those_of_the_exact_scan(self, store, tmp_path, checkpoint, k):
        built = build_index(store, config=IndexConfig(dim=0, checkpoint=checkpoint), folder=tmp_path)
        assert (built.entry.recall, built.entry.is_sketch) == (1, False)
        positions = np.arange(0, 300, 7)
        found, expected = built.neighbours(positions, k), built.space.nearest(positions, k)
        assert (found[0].dtype, found[1].dtype) == (np.float32, np.int64)
        np.testing.assert_array_equal(found[1], expected[1])
        np.testing.assert_array_equal(found[0], expected[0])

    @pytest.mark.parametrize("kind", ["flat", "ivf", "ivf-sq8"])
    @pytest.mark.parametrize("dim", [0, 32])
    def test_are_found_as_often_as_is_stated(self, large, tmp_path, kind, dim):
        config = IndexConfig(type=kind, dim=dim, recall=0.9)
        built = build_index(large, config=config, folder=tmp_path)
        entry = built.entry
        assert entry.recall >= 0.9
        assert entry.num_lists == (1 if kind == "flat" else 128)
        assert entry.num_probes < max(entry.num_lists, 2)
        positions = np.random.default_rng(5).permutation(5000)[:200]
        similarities, found = built.neighbours(positions, 10)
        exact, expected = built.space.nearest(positions, 10)
        assert recall(found, expected) >= entry.recall - 0.04  # both are known to some 0.01
        for m in range(0, 200, 40):
            row = built.space.vectors(positions[m : m + 1])[0]
            np.testing.assert_array_equal(similarities[m], built.space.similarities(row, found[m]))
        assert (similarities <= exact).all()
        assert (np.diff(similarities) <= 0).all()

    def test_of_many_equal_rows_are_the_earliest(self, tmp_path):
        rows_NK = clustered(900)
        rows_NK[100:800] = rows_NK[50]
        store = make_store(tmp_path / "ds", 900, rows_of=lambda checkpoint: rows_NK)
        for config in (IndexConfig(dim=0), IndexConfig(dim=32), IndexConfig(type="ivf", dim=32)):
            similarities, positions = build_index(store, config=config).neighbours(np.array([50, 799]), 10)
            assert positions.tolist() == [[*range(100, 110)], [50, *range(100, 109)]]
            np.testing.assert_allclose(similarities, 1, atol=1e-6)

    def test_are_as_many_as_asked_for_whatever_the_lists_hold(self, large, tmp_path):
        built = build_index(large, config=IndexConfig(type="ivf", recall=0.01), folder=tmp_path)
        assert built.entry.num_probes == 1
        similarities, positions = built.neighbours(np.array([3, 4]), 3000)
        assert positions.shape == similarities.shape == (2, 3000)
        assert all(len({*row}) == 3000 for row in positions.tolist())

    @pytest.mark.parametrize("num_rows", [1, 2, 11, 39])
    @pytest.mark.parametrize("kind", ["flat", "ivf", "ivf-sq8"])
    def test_of_a_small_store_are_all_others(self, tmp_path, kind, num_rows, capfd):
        built = build_index(make_store(tmp_path / "ds", num_rows), config=IndexConfig(type=kind, dim=16))
        _, positions = built.neighbours(np.arange(num_rows), 50)
        assert positions.shape == (num_rows, num_rows - 1)
        assert [sorted(row) for row in positions.tolist()] == [
            [p for p in range(num_rows) if p != own] for own in range(num_rows)
        ]
        assert built.entry.recall == 1
        assert capfd.readouterr().err == ""  # FAISS warns of small training sets by itself

    def test_that_make_no_sense_are_refused(self, store, tmp_path):
        built = build_index(store, folder=tmp_path)
        for positions, k in (([0], 0), ([300], 1), ([-1], 1)):
            with pytest.raises(SettingError, match=r"(k|positions) must be"):
                built.neighbours(np.array(positions), k)


class TestNearDuplicates:
    @pytest.mark.parametrize("threshold", [0.3, 0.6, 0.7, 0.999, 1.0])
    @pytest.mark.parametrize("dim", [0, 64])
    def test_of_flat_are_the_groups_that_all_pairs_make(self, store, tmp_path, dim, threshold):
        built = build_index(store, config=IndexConfig(dim=dim), folder=tmp_path)
        found, expected = built.near_duplicates(threshold), near_duplicates_ref(built.space, threshold)
        assert len(expected.positions_D) >= 20
        np.testing.assert_array_equal(found.positions_D, expected.positions_D)
        np.testing.assert_array_equal(found.firsts_D, expected.firsts_D)
        np.testing.assert_allclose(found.similarities_D, expected.similarities_D, atol=1e-6)
        assert (np.diff(found.positions_D) > 0).all()
        assert (found.firsts_D < found.positions_D).all()
        assert not np.isin(found.firsts_D, found.positions_D).any()

    @pytest.mark.parametrize("kind", ["ivf", "ivf-sq8"])
    def test_of_an_ivf_are_nearly_all(self, store, tmp_path, kind):
        built = GradientIndex.open(
            store, folder=build_index(store, config=IndexConfig(type=kind), folder=tmp_path).folder
        )
        expected = near_duplicates_ref(built.space, 0.8).positions_D
        for _ in range(2):
            found = built.near_duplicates(0.8).positions_D
            assert np.isin(found, expected).all()
            assert len(found) >= 0.95 * len(expected) > 18

    def test_of_a_chain_are_one_group_whose_ends_are_told_to_be_unlike(self, tmp_path):
        angles = np.deg2rad([0, 100, 15, 30, 45])  # each of the last four like the one before it, not its ends
        rows_NK = np.zeros((5, K))
        rows_NK[:, :2] = np.stack([np.cos(angles), np.sin(angles)], axis=1)[[4, 1, 2, 3, 0]]
        built = build_index(make_store(tmp_path / "ds", 5, rows_of=lambda name: rows_NK))
        found = built.near_duplicates(0.96)
        assert found.positions_D.tolist() == [2, 3, 4]
        assert found.firsts_D.tolist() == [0, 0, 0]
        np.testing.assert_allclose(found.similarities_D, np.cos(np.deg2rad([30, 15, 45])), atol=1e-3)

    def test_are_compared_once_with_the_first_of_their_group(self, tmp_path, monkeypatch):
        rows_NK = clustered(60)
        rows_NK[10:50] = rows_NK[10]
        built = build_index(make_store(tmp_path / "ds", 60, rows_of=lambda name: rows_NK))
        compared, real = [], built.space.similarities

        def counting(vector_X, positions_P):
            compared.append(len(positions_P))
            return real(vector_X, positions_P)

        monkeypatch.setattr(built.space, "similarities", counting)
        assert built.near_duplicates(0.999).firsts_D.tolist() == [10] * 39
        assert sum(compared) <= 2 * 39 + 5  # of 780 pairs

    def test_tell_of_the_rows_that_were_looked_for(self, store, tmp_path):
        looked = []
        build_index(store, folder=tmp_path).near_duplicates(0.99, advance=looked.append)
        assert sum(looked) == 300

    @pytest.mark.parametrize("kind", ["flat", "ivf"])
    def test_are_looked_for_in_no_more_rows_than_memory_is_stated_for(self, store, tmp_path, monkeypatch, kind):
        built = build_index(store, config=IndexConfig(type=kind), folder=tmp_path)
        expected, looked = built.near_duplicates(0.99), []
        monkeypatch.setattr(index, "MAX_FOUND", 7 * 300)
        found = built.near_duplicates(0.99, advance=looked.append)
        assert (max(looked), sum(looked)) == (7, 300)
        np.testing.assert_array_equal(found.firsts_D, expected.firsts_D)
        monkeypatch.setattr(index, "MAX_FOUND", 299)
        looked.clear()
        built.near_duplicates(0.99, advance=looked.append)
        assert looked == [1] * 300

    def test_take_eight_bytes_a_row_to_group(self):
        tracemalloc.start()
        try:
            groups = index._Groups(100_000)
            assert tracemalloc.get_traced_memory()[0] < 10 * 100_000
        finally:
            tracemalloc.stop()
        groups.join(99_999, 5)
        assert groups.first(99_999) == 5

    def test_above_no_similarity_are_not_looked_for(self, store, tmp_path):
        built = build_index(store, folder=tmp_path)
        for threshold in (0, 1.1, float("nan")):
            with pytest.raises(SettingError, match="threshold must be above 0 and at most 1"):
                built.near_duplicates(threshold)


class TestFiles:
    @pytest.fixture
    def folder(self, store, tmp_path):
        return build_index(store, config=IndexConfig(type="ivf", dim=32), folder=tmp_path / "index").folder

    @pytest.fixture
    def opened(self, store, folder):
        return lambda **options: GradientIndex.open(store, folder=folder, **options)

    def edit(self, folder, **changes):
        """A forgery: other values under a checksum that is right."""
        doc = json.loads((folder / "index.json").read_text()) | changes
        doc["sha256"] = json_hash({name: doc[name] for name in doc if name != "sha256"})
        (folder / "index.json").write_text(json.dumps(doc))

    def replace_index(self, folder, other):
        data = faiss.serialize_index(other).tobytes()
        (folder / "index.faiss").write_bytes(data)
        sha256 = hashlib.sha256(data).hexdigest()
        self.edit(folder, file={"sha256": sha256, "num_bytes": len(data)})

    def test_are_the_same_for_the_same_store_and_lie_beside_it(self, tmp_path):
        store = make_store(tmp_path / "ds")
        built = build_index(store, config=IndexConfig(dim=32))
        assert built.folder == index_folder(store, "adam") == tmp_path / "ds.index" / "adam"
        before = {file.name: file.read_bytes() for file in built.folder.iterdir()}
        assert sorted(before) == ["index.faiss", "index.json"]
        build_index(store, config=IndexConfig(dim=32))
        assert {file.name: file.read_bytes() for file in built.folder.iterdir()} == before
        Datastore.open(tmp_path / "ds").verify()

    def test_give_what_was_built(self, store, opened, folder):
        built, found = build_index(store, config=IndexConfig(type="ivf", dim=32), folder=folder), opened()
        assert found.entry == built.entry
        for ours, theirs in zip(found.neighbours(np.arange(9), 5), built.neighbours(np.arange(9), 5), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        doc = json.loads((folder / "index.json").read_text())
        assert (doc["format"], doc["version"], doc["feature_set"]) == ("gradsift-index", 1, "adam")
        assert doc["faiss"] == faiss.__version__
        assert doc["manifest_sha256"] == json.loads((store.path / "manifest.json").read_text())["sha256"]

    def test_of_a_store_that_has_grown_are_refused(self, tmp_path):
        build_index(make_store(tmp_path / "ds"))
        grown = make_store(tmp_path / "ds", 30)
        with pytest.raises(ProvenanceError, match=r"the store has changed since; run `gradsift index` again"):
            GradientIndex.open(grown)
        build_index(grown)
        assert GradientIndex.open(grown).entry.num_rows == 330

    def test_that_are_not_there_are_named_with_the_command(self, store, tmp_path):
        with pytest.raises(StoreError, match=r"no index at .*\. Make one with `gradsift index`") as refused:
            GradientIndex.open(store, folder=tmp_path)
        assert not isinstance(refused.value, DamagedStoreError)

    @pytest.mark.parametrize("at", [0.0, 0.3, 0.999])
    def test_with_a_changed_byte_never_reach_faiss(self, opened, folder, monkeypatch, at):
        data = bytearray((folder / "index.faiss").read_bytes())
        data[int(at * len(data))] ^= 1
        (folder / "index.faiss").write_bytes(data)
        monkeypatch.setattr(faiss, "deserialize_index", None)
        with pytest.raises(
            DamagedStoreError, match=r"index\.faiss is damaged: its checksum .*Run `gradsift index` again"
        ):
            opened()

    @pytest.mark.parametrize("size", [0, 1, 100, -1])
    def test_that_are_cut_are_damaged_even_where_nothing_is_verified(self, opened, folder, size):
        data = (folder / "index.faiss").read_bytes()
        (folder / "index.faiss").write_bytes(data[:size])
        with pytest.raises(DamagedStoreError, match=r"index\.faiss is damaged"):
            opened(verify=False)
        (folder / "index.faiss").unlink()
        with pytest.raises(DamagedStoreError, match="it is missing"):
            opened()

    @pytest.mark.parametrize("text", ["", "{", "[]", "{}", "[" * 100_000, '{"format": "gradsift-index", "version": 1}'])
    def test_with_other_json_are_damaged(self, opened, folder, text):
        (folder / "index.json").write_text(text)
        with pytest.raises(DamagedStoreError, match=r"index\.json is damaged"):
            opened()

    def test_with_an_edited_field_are_damaged(self, opened, folder):
        doc = json.loads((folder / "index.json").read_text())
        (folder / "index.json").write_text(json.dumps(doc | {"recall": 1.0}))
        with pytest.raises(DamagedStoreError, match="its checksum is not that of its content"):
            opened()

    @pytest.mark.parametrize(
        "changes",
        [
            {"type": "flat", "num_lists": 1, "num_probes": 1}, {"type": "ivf-sq8"}, {"type": "hnsw"}, {"dim": 31},
            {"dim": 0}, {"num_rows": 299}, {"num_lists": 3}, {"num_probes": 99}, {"num_candidates": 1}, {"extra": 1},
            {"weights": {}}, {"weights": {"checkpoint-2": 0.5, "checkpoint-10": 0.5}}, {"recall": "high"},
        ],
    )  # fmt: skip
    def test_that_say_something_else_of_faiss_file_are_damaged(self, opened, folder, changes):
        self.edit(folder, **changes)
        with pytest.raises(DamagedStoreError, match="is damaged"):
            opened()

    def test_of_a_newer_version_say_so(self, opened, folder):
        self.edit(folder, version=2)
        with pytest.raises(FormatVersionError, match="format version 2; this gradsift reads up to 1"):
            opened()

    def test_that_name_rows_beyond_the_store_are_damaged(self, opened, folder):
        forged = faiss.deserialize_index(np.fromfile(folder / "index.faiss", np.uint8))
        forged.make_direct_map()
        vectors_NY = forged.reconstruct_n(0, 300)
        forged.set_direct_map_type(faiss.DirectMap.NoMap)
        forged.reset()
        forged.add_with_ids(vectors_NY, np.arange(300) + 1000)
        self.replace_index(folder, forged)
        with pytest.raises(DamagedStoreError, match="names a row beyond the 300 of the store"):
            opened().neighbours(np.array([0]), 5)
        with pytest.raises(DamagedStoreError, match=r"index\.faiss is damaged"):
            opened().near_duplicates(0.9)

    def test_that_are_no_index_are_damaged(self, opened, folder):
        noise = np.random.default_rng(0).bytes(3000)
        (folder / "index.faiss").write_bytes(noise)
        self.edit(folder, file={"sha256": hashlib.sha256(noise).hexdigest(), "num_bytes": 3000})
        with pytest.raises(DamagedStoreError, match=r"index\.faiss is damaged"):
            opened()
        self.replace_index(folder, faiss.IndexFlatL2(32))
        with pytest.raises(DamagedStoreError, match=r"index\.faiss is damaged"):
            opened()

    def test_are_whole_or_not_there_when_the_builder_is_killed(self, store, folder, monkeypatch):
        monkeypatch.setattr(index, "write_json", None)  # killed between the two files
        with pytest.raises(TypeError):
            build_index(store, config=IndexConfig(dim=16), folder=folder)
        with pytest.raises(StoreError, match="no index at"):
            GradientIndex.open(store, folder=folder)


def test_rows_are_counted_as_they_are_read(store, tmp_path):
    counted = []
    build_index(store, folder=tmp_path, advance=counted.append)
    assert sum(counted) == 300


def test_a_damaged_shard_stops_the_build_and_leaves_the_old_index(tmp_path):
    store = make_store(tmp_path / "ds")
    build_index(store)
    shard = next((tmp_path / "ds").rglob("*0000000064-0000000128.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-200] ^= 1
    shard.write_bytes(data)
    fresh = Datastore.open(tmp_path / "ds")
    with pytest.raises(DamagedStoreError, match="checksum"):
        build_index(fresh)
    GradientIndex.open(fresh)
    build_index(fresh, config=IndexConfig(verify=False))


def test_an_index_that_cannot_be_written_stops_before_a_row_is_read(store, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write"):
        build_index(store, folder=tmp_path / "file" / "index", advance=pytest.fail)


def test_a_store_without_rows_has_no_index(tmp_path):
    with open_writer(tmp_path / "ds", settings=WEIGHTED) as writer:
        writer.add_source(source())
        fill(writer, {("checkpoint-2", 0): dict.fromkeys(range(7), "zero norm")})
        writer.seal()
    with pytest.raises(DataError, match="has no row"):
        build_index(Datastore.open(tmp_path / "ds"), "adam")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"type": "hnsw"}, "type must be one of flat, ivf, ivf-sq8, got 'hnsw'"),
        ({"dim": -1}, "dim must be at least 1, or 0 for no sketch, got -1"),
        ({"recall": 0}, "recall must be above 0 and at most 1, got 0"),
        ({"recall": 1.1}, "got 1.1"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        IndexConfig(**settings)


def test_importing_it_loads_no_faiss():
    code = "import sys, datastore.index; assert not {'faiss', 'torch'} & set(sys.modules)"
    root = Path(index.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(root)})
