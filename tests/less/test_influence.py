"""The scan of a store against the definition, on stores of random features with known answers."""

import math

import numpy as np
import pytest
import torch

from datastore import Datastore, DatastoreWriter, Shard, SkippedRow, SourceEntry
from datastore.coding import FEATURE_DTYPES, as_float32, encode
from datastore.errors import DamagedStoreError, SettingError
from less import scan as scan_module
from less.influence import InfluenceScores, influence_scores_ref, subtask_queries
from less.scan import influence_scores, iter_scores

K, NUM_ROWS = 40, 23
WEIGHTS = {"checkpoint-5": 0.7, "checkpoint-9": 0.25, "checkpoint-11": 0.05}
SUBTASKS = [2, 0, 0, 1, 0, 0, 2, 0]  # sizes 5, 1, 2


def random_vectors(num_rows, seed, spread=3.0):
    """Rows whose norms differ by orders of magnitude, so that a forgotten normalisation shows."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((num_rows, K)) + 0.3
    return (rows * np.exp(spread * rng.standard_normal((num_rows, 1)))).astype(np.float32)


def write_store(folder, phis, dtype, skip=None, feature_set="adam", shard_rows=5):
    """φ by checkpoint as a store of two sources; `skip`: rows (of all rows in order) by checkpoint."""
    split = 13
    with DatastoreWriter.open(
        folder, settings={}, environment={}, feature_sets=[feature_set], checkpoints=list(phis), shard_rows=shard_rows
    ) as writer:
        for name, num_rows in (("one", split), ("two", NUM_ROWS - split)):
            sha256 = name.encode().hex().ljust(64, "0")
            writer.add_source(SourceEntry(name=name, kind="jsonl", location=name, sha256=sha256, num_rows=num_rows))
        for key in writer.missing_shards():
            offset = split * key.source
            bad = [row for row in range(key.start, key.stop) if row + offset in (skip or {}).get(key.checkpoint, ())]
            rows = np.array([row for row in range(key.start, key.stop) if row not in bad], np.int64)
            phi_NK = phis[key.checkpoint][rows + offset]
            norms_N = np.linalg.norm(phi_NK, axis=1).astype(np.float32)
            numbers = np.zeros(len(rows), np.float32)
            shard = Shard(
                rows_N=rows, ids=[f"{key.source}-{row}" for row in rows], digests_N=rows.astype(np.uint64),
                features_NK=encode(phi_NK / norms_N[:, None], dtype), norms_N=norms_N, grad_norms_N=numbers,
                update_norms_N=numbers, losses_N=numbers, num_tokens_N=np.ones(len(rows), np.int32),
                num_supervised_N=np.ones(len(rows), np.int32), truncated_N=np.zeros(len(rows), bool),
                skipped=[
                    SkippedRow(row=row, where=f"x:{row}", id=str(row), reason="not finite", detail="") for row in bad
                ],
            )  # fmt: skip
            writer.write_shard(key, shard)
        for name, checkpoint in writer.missing_directions():
            writer.write_direction(name, checkpoint, np.zeros(K, np.float32))
        writer.seal()
    return Datastore.open(folder)


@pytest.fixture(scope="module")
def phis():
    return {name: random_vectors(NUM_ROWS, seed) for seed, name in enumerate(WEIGHTS)}


@pytest.fixture(scope="module")
def psis():
    return {name: random_vectors(len(SUBTASKS), 10 + seed) for seed, name in enumerate(WEIGHTS)}


@pytest.fixture(scope="module")
def stores(tmp_path_factory, phis):
    folder = tmp_path_factory.mktemp("stores")
    return {dtype: write_store(folder / dtype, phis, dtype) for dtype in FEATURE_DTYPES}


def queries(psis, aggregate="mean-of-cosines", normalize="cosine"):
    return {
        name: subtask_queries(torch.from_numpy(psi_MK), SUBTASKS, 3, aggregate=aggregate, normalize=normalize)
        for name, psi_MK in psis.items()
    }


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-6), ("float16", 1e-3), ("int8", 1e-2)])
def test_the_scan_equals_the_definition(stores, phis, psis, dtype, bound):
    found_NJ = influence_scores(stores[dtype], "adam", queries(psis), WEIGHTS)
    expected_NJ = influence_scores_ref(list(phis.values()), list(psis.values()), list(WEIGHTS.values()), SUBTASKS)
    assert found_NJ.dtype == np.float32
    assert found_NJ.shape == (NUM_ROWS, 3)
    assert np.abs(found_NJ - expected_NJ).max() < bound


@pytest.mark.parametrize("exact_int8", [True, False])
@pytest.mark.parametrize("normalize", ["cosine", "none"])
@pytest.mark.parametrize("dtype", FEATURE_DTYPES)
def test_the_scan_multiplies_what_is_stored(stores, psis, monkeypatch, dtype, normalize, exact_int8):
    """Queries keep their precision, whatever the rows have lost and whichever way the processor multiplies."""
    monkeypatch.setattr("less.scan._multiplies_int8_exactly", lambda: exact_int8)
    queries_JK = queries(psis, normalize=normalize)
    found_NJ = influence_scores(stores[dtype], "adam", queries_JK, WEIGHTS, normalize=normalize)
    expected_NJ, scale_NJ = np.zeros((2, NUM_ROWS, 3))
    for name, weight in WEIGHTS.items():
        norms_N = stores[dtype].stats("adam", name).norms_N if normalize == "none" else np.ones(NUM_ROWS)
        blocks = [as_float32(block.features_nK) for block in stores[dtype].iter_blocks("adam", name)]
        rows_NK = np.concatenate(blocks).astype(np.float64) * norms_N[:, None]
        expected_NJ += weight * rows_NK @ queries_JK[name].numpy().T
        scale_NJ += weight * np.outer(np.linalg.norm(rows_NK, axis=1), queries_JK[name].norm(dim=1))
    assert (np.abs(found_NJ - expected_NJ) / scale_NJ).max() < (1e-6 if dtype.startswith("float") else 2e-4)


@pytest.mark.parametrize("first", [0, 5, 13, 18, 23])
def test_a_scan_can_begin_at_any_range(stores, psis, first):
    whole_NJ = influence_scores(stores["float16"], "adam", queries(psis), WEIGHTS)
    parts = list(iter_scores(stores["float16"], "adam", queries(psis), WEIGHTS, first=first))
    assert [start for start, _ in parts] == [start for start in (0, 5, 10, 13, 18) if start >= first]
    if parts:
        assert np.array_equal(np.concatenate([scores_nJ for _, scores_nJ in parts]), whole_NJ[first:])


def test_int8_products_are_exact_at_the_ends_of_their_range():
    """What `_multiplies_int8_exactly` asks, with the digits that a query can have."""
    query_JK = torch.tensor([[1.0, -1.0] * 2048, [1.0] * 4096])
    scan = scan_module._Scan(query_JK, torch.device("cpu"))
    scale_J, digits_DK = scan._query_digits()
    assert digits_DK.abs().max() <= 64
    assert torch.allclose((128 * digits_DK[:2].double() + digits_DK[2:]) * scale_J[:, None], query_JK.double())


def test_the_definition_itself_on_two_rows_by_hand():
    phi_NK, psi_MK = np.array([[3.0, 4.0], [0.0, 2.0]]), np.array([[1.0, 0.0], [0.0, 5.0], [2.0, 2.0]])
    found_NJ = influence_scores_ref([phi_NK, phi_NK], [psi_MK, -psi_MK], [0.75, 0.25], [0, 1, 1])
    r = math.sqrt(0.5)
    expected_NJ = 0.5 * np.array([[0.6, (0.8 + 1.4 * r) / 2], [0.0, (1 + r) / 2]])
    assert np.allclose(found_NJ, expected_NJ)


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("float16", 2e-3)])
def test_without_cosine_it_is_the_weighted_inner_product_with_the_mean_target(stores, phis, psis, dtype, bound):
    found_NJ = influence_scores(stores[dtype], "adam", queries(psis, normalize="none"), WEIGHTS, normalize="none")
    expected_NJ, scale_NJ = np.zeros((2, NUM_ROWS, 3))
    for name, weight in WEIGHTS.items():
        for j in range(3):
            members = [m for m, subtask in enumerate(SUBTASKS) if subtask == j]
            mean_K = psis[name][members].astype(np.float64).mean(axis=0)
            expected_NJ[:, j] += weight * phis[name].astype(np.float64) @ mean_K
            scale_NJ[:, j] += weight * np.linalg.norm(phis[name], axis=1) * np.linalg.norm(mean_K)
    assert (np.abs(found_NJ - expected_NJ) / scale_NJ).max() < bound


def test_cosine_of_mean_is_the_cosine_with_the_subtasks_mean_gradient(stores, phis, psis):
    found_NJ = influence_scores(stores["float32"], "adam", queries(psis, aggregate="cosine-of-mean"), WEIGHTS)
    expected_NJ = np.zeros((NUM_ROWS, 3))
    for name, weight in WEIGHTS.items():
        for j in range(3):
            members = [m for m, subtask in enumerate(SUBTASKS) if subtask == j]
            mean_K = psis[name][members].astype(np.float64).mean(axis=0)
            phi_NK = phis[name].astype(np.float64)
            norms_N = np.linalg.norm(phi_NK, axis=1) * np.linalg.norm(mean_K)
            expected_NJ[:, j] += weight * (phi_NK @ mean_K) / norms_N
    assert np.abs(found_NJ - expected_NJ).max() < 1e-6


def test_the_two_aggregates_agree_where_each_subtask_has_one_target(psis):
    one = {name: torch.from_numpy(psi_MK[:3]) for name, psi_MK in psis.items()}
    for psi_MK in one.values():
        mean, paper = (
            subtask_queries(psi_MK, [2, 0, 1], 3, aggregate=aggregate, normalize="cosine")
            for aggregate in ("mean-of-cosines", "cosine-of-mean")
        )
        assert torch.allclose(mean, paper, atol=1e-6)


def test_queries_of_tiny_gradients_keep_their_direction():
    psi_MK = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    for aggregate in ("mean-of-cosines", "cosine-of-mean"):
        large, small = (
            subtask_queries(scale * psi_MK, [0, 1, 0, 1], 2, aggregate=aggregate, normalize="cosine")
            for scale in (1.0, 1e-15)
        )
        assert torch.allclose(large, small, rtol=1e-4)


def test_targets_that_cancel_score_zero_against_their_mean():
    psi_MK = torch.tensor([[1.0, -2.0], [-1.0, 2.0]])
    query_1K = subtask_queries(psi_MK, [0, 0], 1, aggregate="cosine-of-mean", normalize="cosine")
    assert query_1K.tolist() == [[0, 0]]


def test_scores_are_linear_in_the_weights(stores, psis):
    alone = {name: influence_scores(stores["float32"], "adam", queries(psis), {name: 1.0}) for name in WEIGHTS}
    together_NJ = influence_scores(stores["float32"], "adam", queries(psis), WEIGHTS)
    assert np.allclose(together_NJ, sum(WEIGHTS[name] * s_NJ for name, s_NJ in alone.items()), atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8", "binary"])
def test_a_row_bad_at_any_checkpoint_is_left_out_and_the_others_keep_their_scores(tmp_path, stores, phis, psis, dtype):
    skip = {"checkpoint-5": [0, 7], "checkpoint-11": [7, 12, 13, 14, 15, 16, 17, 22]}  # 13 to 17: a whole shard
    store = write_store(tmp_path / "ds", phis, dtype, skip)
    kept = [row for row in range(NUM_ROWS) if row not in {0, 7, 12, 13, 14, 15, 16, 17, 22}]
    assert store.num_rows == len(kept)
    for normalize in ("cosine", "none"):
        queries_JK = queries(psis, normalize=normalize)
        whole_NJ = influence_scores(stores[dtype], "adam", queries_JK, WEIGHTS, normalize=normalize)
        found_NJ = influence_scores(store, "adam", queries_JK, WEIGHTS, normalize=normalize)
        assert np.allclose(found_NJ, whole_NJ[kept], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shard_rows", [1, 4, 100])
def test_scores_do_not_depend_on_the_shards(tmp_path, stores, phis, psis, shard_rows):
    store = write_store(tmp_path / "ds", phis, "float32", shard_rows=shard_rows)
    found_NJ = influence_scores(store, "adam", queries(psis), WEIGHTS)
    expected_NJ = influence_scores(stores["float32"], "adam", queries(psis), WEIGHTS)
    assert np.allclose(found_NJ, expected_NJ, atol=1e-6)


@pytest.mark.parametrize("chunk_values", [1, K, 2 * K, 3 * K + 1, 1000 * K])
@pytest.mark.parametrize("normalize", ["cosine", "none"])
@pytest.mark.parametrize("dtype", ["float16", "int8", "int4"])
def test_scores_do_not_depend_on_how_many_rows_are_multiplied_at_once(
    stores, psis, monkeypatch, dtype, chunk_values, normalize
):
    queries_JK = queries(psis, normalize=normalize)
    expected_NJ = influence_scores(stores[dtype], "adam", queries_JK, WEIGHTS, normalize=normalize)
    monkeypatch.setattr("less.scan.CHUNK_VALUES", chunk_values)
    found_NJ = influence_scores(stores[dtype], "adam", queries_JK, WEIGHTS, normalize=normalize)
    assert np.allclose(found_NJ, expected_NJ, rtol=1e-5, atol=1e-6)


def test_two_scans_are_equal_to_the_bit(stores, psis):
    one, other = (influence_scores(stores["float16"], "adam", queries(psis), WEIGHTS) for _ in range(2))
    assert np.array_equal(one, other)


def test_a_damaged_shard_is_never_scored(tmp_path, phis, psis):
    store = write_store(tmp_path / "ds", phis, "float32")
    file = sorted((tmp_path / "ds" / "shards").rglob("*.safetensors"))[4]
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    with pytest.raises(DamagedStoreError, match=file.name):
        influence_scores(store, "adam", queries(psis), WEIGHTS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"aggregate": "mean", "normalize": "cosine"}, "aggregate must be one of mean-of-cosines, cosine-of-mean"),
        ({"aggregate": "mean-of-cosines", "normalize": "l2"}, "normalize must be one of cosine, none, got 'l2'"),
        ({"aggregate": "cosine-of-mean", "normalize": "none"}, "no meaning with normalize none"),
    ],
)
def test_words_without_a_meaning_are_refused(words, message):
    with pytest.raises(SettingError, match=message):
        subtask_queries(torch.ones(2, 3), [0, 1], 2, **words)


class TestInfluenceScores:
    @pytest.fixture
    def scores(self, stores):
        scores_NJ = np.zeros((NUM_ROWS, 4), np.float32)
        scores_NJ[0], scores_NJ[1], scores_NJ[2] = (1, 4, 4, 2), (-4, -3, -2, -1), (5, 0, 0, 5)
        return InfluenceScores(
            rows=stores["float32"].rows(), scores_NJ=scores_NJ, subtasks=("x", "y", "x", "bbh"),
            target_sets=("mmlu", "mmlu", "gsm", "bbh"),
        )  # fmt: skip

    def test_the_score_is_the_highest_over_the_subtasks_and_the_first_wins_a_tie(self, scores):
        assert scores.score_N[:3].tolist() == [4, -1, 5]
        assert scores.column_N[:3].tolist() == [1, 3, 0]
        assert len(scores.column_N) == NUM_ROWS

    def test_one_target_sets_columns_keep_the_subtasks_names(self, scores):
        own = scores.of("mmlu")
        assert own.subtasks == ("x", "y")
        assert own.scores_NJ[:2].tolist() == [[1, 4], [-4, -3]]
        assert scores.of("bbh").score_N[:3].tolist() == [2, -1, 5]

    def test_columns_side_by_side_are_not_copied_and_others_are_right_too(self, scores):
        assert np.shares_memory(scores.of("gsm", "bbh").scores_NJ, scores.scores_NJ)
        apart = scores.of("bbh", "mmlu")
        assert apart.target_sets == ("mmlu", "mmlu", "bbh")
        assert np.array_equal(apart.scores_NJ, scores.scores_NJ[:, [0, 1, 3]])

    def test_several_target_sets_name_each_column_by_its_set(self, scores):
        both = scores.of("gsm", "mmlu", "bbh")
        assert both.subtasks == ("mmlu/x", "mmlu/y", "gsm/x", "bbh")
        assert both.target_sets == scores.target_sets
        assert np.array_equal(both.score_N, scores.score_N)

    def test_an_unknown_target_set_is_an_error_that_names_the_known(self, scores):
        with pytest.raises(KeyError, match=r"'t0'.*bbh.*gsm.*mmlu"):
            scores.of("t0")
