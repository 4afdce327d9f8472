"""Two stages: which rows get exact features, that these are the plain build's, and what is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from math import ceil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from datastore import Datastore
from datastore.deletion import delete_rows, verify_deleted
from datastore.errors import DataError, ProvenanceError, RowError, SettingError, StoreError
from less import BuildConfig, EvidenceWarning, explain, score, select
from less.checkpoints import find_checkpoints
from less.compaction import compact
from less.data.rendering import Renderer
from less.prefilter import cheap_folder
from less.scoring import Scorer
from less.selection import num_to_select

FRACTION, NUM_ROWS, NUM_KEPT = 0.3, 40, 12


@pytest.fixture(autouse=True)
def no_power_cut(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def two_stage(build, tiny_target_file):
    def call(folder, data, **changes):
        return build(folder, data, **{"prefilter": FRACTION, "targets": tiny_target_file} | changes)

    return call


@pytest.fixture(scope="module")
def stores(tmp_path_factory, build, two_stage, tiny_pool, tiny_run):
    """Finished stores, which no test may write to: the plain build, its weightiest checkpoint alone, the two stages."""
    folder = tmp_path_factory.mktemp("stores")
    build(folder / "plain", tiny_pool)
    build(folder / "one", tiny_pool, checkpoints=heaviest(tiny_run))
    two_stage(folder / "ds", tiny_pool)
    return folder


def heaviest(run):
    return max(find_checkpoints([run]), key=lambda checkpoint: checkpoint.weight).path


def cheap(folder):
    return folder.with_name(f"{folder.name}.prefilter")


def tree(folder):
    files = (file for file in Path(folder).rglob("*") if file.is_file() and file.name != ".lock")
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def kept_rows(folder):
    return Datastore.open(folder).rows().rows_N.tolist()


def set_aside(folder):
    store = Datastore.open(folder)
    rows = [row for rows in store.manifest.ranges for row in store.left_out(rows) if row.reason == "prefilter"]
    assert store.num_set_aside == len(rows)
    return {row.row: row.id for row in rows}


def vectors(folder):
    """φ, not normalised, by checkpoint and row."""
    store, found = Datastore.open(folder), {}
    rows = store.rows().rows_N.tolist()
    for checkpoint in store.checkpoints:
        for block in store.iter_blocks(store.feature_sets[0], checkpoint):
            vectors_nK = block.features_nK * block.norms_n[:, None]
            found.update(zip(((checkpoint, n) for n in rows[block.start : block.stop]), vectors_nK, strict=True))
    return found


def scores_of(folder, targets):
    return score(datastore=folder, targets=targets, progress=False)


def nothing_is_computed(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("a backward pass")

    monkeypatch.setattr("less.gradients.token_losses", fail)


class TestTheRowsKept:
    def test_are_those_that_the_weightiest_checkpoint_ranks_best(self, stores, tiny_target_file):
        score_N = scores_of(stores / "one", tiny_target_file).score_N
        order = np.argsort(-score_N, kind="stable")
        assert kept_rows(stores / "ds") == sorted(order[:NUM_KEPT].tolist())
        assert set_aside(stores / "ds") == {row: f"row-{row}" for row in order[NUM_KEPT:].tolist()}
        places = load_file(cheap(stores / "ds") / "places.safetensors")
        np.testing.assert_array_equal(places["rows_P"][np.argsort(places["ranks_P"])], order)
        np.testing.assert_array_equal(places["scores_P"], score_N)

    def test_have_the_features_of_the_plain_build(self, stores):
        found, plain = vectors(stores / "ds"), vectors(stores / "plain")
        assert len(found) == NUM_KEPT * 2
        for key, phi_K in found.items():
            assert np.linalg.norm(phi_K - plain[key]) < 2e-5 * np.linalg.norm(plain[key])

    def test_of_the_whole_pool_are_the_plain_store(self, two_stage, stores, tiny_pool, tiny_target_file, tmp_path):
        two_stage(tmp_path / "ds", tiny_pool, prefilter=1)
        assert not set_aside(tmp_path / "ds")
        found, plain = (scores_of(folder, tiny_target_file) for folder in (tmp_path / "ds", stores / "plain"))
        np.testing.assert_array_equal(found.scores_NJ, plain.scores_NJ)
        assert not np.allclose(found.score_N, scores_of(stores / "one", tiny_target_file).score_N)

    def test_are_chosen_by_the_layers_asked_for(self, build, two_stage, stores, tiny_pool, tiny_run, tmp_path):
        # Targets that the last block's attention ranks otherwise than all layers do, so that the choice shows.
        layers = "layers.1.self_attn"
        build(tmp_path / "few", tiny_pool, checkpoints=heaviest(tiny_run), layers=layers)
        targets = [json.loads(line) for line in tiny_pool.read_text().splitlines()[:2]]
        two_stage(tmp_path / "ds", tiny_pool, targets=targets, prefilter_layers=layers)
        by_few, by_all = (
            set(np.argsort(-scores_of(folder, targets).score_N, kind="stable")[:NUM_KEPT].tolist())
            for folder in (tmp_path / "few", stores / "one")
        )
        assert set(kept_rows(tmp_path / "ds")) == by_few != by_all
        assert Datastore.open(cheap(tmp_path / "ds")).settings["model"]["layers"] == layers
        assert Datastore.open(tmp_path / "ds").settings["model"]["layers"] == "all"

    def test_are_the_best_of_each_target_set_in_turns(self, two_stage, stores, tiny_pool, tiny_rows, tmp_path):
        targets = {"some": tiny_rows[:2], "others": [tiny_rows[33]]}
        two_stage(tmp_path / "ds", tiny_pool, targets=targets)
        found = scores_of(stores / "one", targets)
        orders = {name: np.argsort(-found.of(name).score_N, kind="stable").tolist() for name in targets}
        expected = []
        while len(expected) < NUM_KEPT:
            own = orders["others" if len(expected) % 2 else "some"]
            expected.append(next(row for row in own if row not in expected))
        assert kept_rows(tmp_path / "ds") == sorted(expected)
        assert set(expected) != set(np.argsort(-found.score_N, kind="stable")[:NUM_KEPT].tolist())

    def test_are_a_fraction_of_those_that_can_be_used(self, two_stage, tiny_rows, tmp_path):
        bad = ["{", '{"id": "wordless"}', "[]"]
        lines = [bad[0], *map(json.dumps, tiny_rows[:11]), *bad[1:]]
        pool = tmp_path / "p.jsonl"
        pool.write_text("".join(f"{line}\n" for line in lines))
        result = two_stage(tmp_path / "ds", pool)
        assert (result.num_rows, result.num_scored) == (14, ceil(0.3 * 11))
        reasons = {row.row: row.reason for row in result.skipped}
        assert {n: reason for n, reason in reasons.items() if reason != "prefilter"} == {
            0: "not JSON", 12: "no messages", 13: "not an object",
        }  # fmt: skip
        with pytest.raises(RowError, match=r"p\.jsonl:1: not JSON"):
            two_stage(tmp_path / "strict", pool, strict=True)

    def test_alone_are_rendered_and_computed_again(self, two_stage, tiny_pool, tmp_path, monkeypatch):
        rendered, real = [], Renderer.render_record

        def render_record(self, record):
            rendered.append(record.id)
            return real(self, record)

        monkeypatch.setattr(Renderer, "render_record", render_record)
        result = two_stage(tmp_path / "ds", tiny_pool, strict=True)  # no row set aside stops it
        assert result.num_computed == NUM_ROWS + NUM_KEPT
        rendered = [name for name in rendered if name.startswith("row-")]
        assert len(rendered) == NUM_ROWS + NUM_KEPT
        assert set(rendered[NUM_ROWS:]) == set(Datastore.open(tmp_path / "ds").rows().ids)

    def test_alone_need_room_on_the_disk(self, two_stage, tiny_pool, tmp_path, monkeypatch):
        asked = []
        monkeypatch.setattr("less.pipeline.check_free_space", lambda folder, num_bytes: asked.append(num_bytes))
        two_stage(tmp_path / "ds", tiny_pool)
        assert asked == [NUM_ROWS * 64 * 4, 2 * NUM_KEPT * 64 * 4]

    def test_come_from_all_sources(self, two_stage, stores, tiny_rows, tmp_path):
        parts = [tiny_rows[:25], tiny_rows[25:]]
        two_stage(tmp_path / "ds", parts)
        rows = Datastore.open(tmp_path / "ds").rows()
        assert set(rows.sources_N.tolist()) == {0, 1}
        assert (rows.rows_N + 25 * rows.sources_N).tolist() == kept_rows(stores / "ds")


def test_a_pool_without_a_usable_row_is_said_to_have_none(two_stage, tmp_path):
    with pytest.raises(DataError, match=r"no row of the data can be used \(2 no messages\)"):
        two_stage(tmp_path / "ds", [{"text": "x"}, {"text": "y"}])


def test_the_cheap_store_is_a_store_of_its_own(two_stage, tiny_pool, tiny_target_file, stores, tmp_path):
    two_stage(tmp_path / "ds", tiny_pool, projection=["none", "sparse"], update_rule=["sgd", "adam"])
    assert Datastore.open(tmp_path / "ds").feature_sets == ["sgd-none", "sgd-sparse", "adam-none", "adam-sparse"]
    store = Datastore.open(cheap(tmp_path / "ds"))
    assert (store.feature_sets, len(store.checkpoints), store.num_rows) == (["sgd-sparse"], 1, NUM_ROWS)
    assert store.settings["prefilter"] is None
    (selection,) = select(datastore=cheap(stores / "ds"), targets=tiny_target_file, count=NUM_KEPT, progress=False)
    assert sorted(selection.positions.tolist()) == kept_rows(stores / "ds")
    store.verify()


class TestGoingOn:
    def test_does_nothing_where_the_store_is_complete(self, two_stage, stores, tiny_pool, monkeypatch, tmp_path):
        copy = shutil.copytree(stores / "ds", tmp_path / "ds")  # without its cheap store
        before = tree(copy)
        nothing_is_computed(monkeypatch)
        assert two_stage(copy, tiny_pool).num_computed == 0
        assert tree(copy) == before
        assert not cheap(copy).exists()

    def test_keeps_the_rows_that_were_chosen_before(self, two_stage, stores, tiny_pool, monkeypatch, tmp_path):
        copy = shutil.copytree(stores / "ds", tmp_path / "ds")
        shutil.copytree(cheap(stores / "ds"), cheap(copy))
        expected = tree(copy)
        (copy / "manifest.json").unlink()
        for file in sorted(copy.rglob("s0000-*.safetensors"))[1::2]:
            file.unlink()
        monkeypatch.setattr(Scorer, "score", None)  # on another machine its last bits are others
        assert 0 < two_stage(copy, tiny_pool).num_computed < 2 * NUM_KEPT
        assert tree(copy) == expected

    def test_chooses_for_other_targets_from_the_same_cheap_store(
        self, two_stage, stores, tiny_pool, tiny_rows, tmp_path
    ):
        shutil.copytree(cheap(stores / "ds"), cheap(tmp_path / "ds"))
        result = two_stage(tmp_path / "ds", tiny_pool, targets=tiny_rows[:1])
        assert result.num_computed == NUM_KEPT
        assert kept_rows(tmp_path / "ds") != kept_rows(stores / "ds")

    @pytest.mark.parametrize("stage", ["cheap", "exact"])
    def test_after_a_kill_gives_the_same_store(
        self, two_stage, tiny_rows, tiny_model_folder, tiny_run, tiny_target_file, tmp_path, stage
    ):
        pool = tmp_path / "pool.jsonl"
        pool.write_text("".join(json.dumps(row) + "\n" for row in tiny_rows[:14]))
        expected, folder = tmp_path / "expected" / "ds", tmp_path / "killed" / "ds"
        whole = two_stage(expected, pool, shard_rows=1)
        code = (
            "import sys, torch; torch.set_num_threads(int(sys.argv[6]));"
            "from less import build_datastore; model, checkpoints, data, datastore, targets = sys.argv[1:6];"
            "build_datastore(model=model, checkpoints=checkpoints, data=data, datastore=datastore, proj_dim=64,"
            f" shard_rows=1, tokens_per_batch=256, feature_dtype='float32', prefilter={FRACTION}, targets=targets,"
            " progress=False)"
        )
        arguments = [tiny_model_folder, tiny_run, pool, folder, tiny_target_file, torch.get_num_threads()]
        watched = {"cheap": cheap(folder), "exact": folder}[stage]
        process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)], cwd=Path(__file__).parents[2],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 120
            while len(list(watched.rglob("s0000-*.safetensors"))) < 5:
                assert process.poll() is None, "it ended before it could be killed"
                assert time.monotonic() < deadline
                time.sleep(0.001)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert not (watched / "manifest.json").exists()
        assert (cheap(folder) / "manifest.json").exists() == (stage == "exact")
        assert 0 < two_stage(folder, pool, shard_rows=1).num_computed < whole.num_computed == 14 + 5
        assert tree(folder) == tree(expected)
        assert tree(cheap(folder)) == tree(cheap(expected))


class TestRefusals:
    """Each before any work, with nothing written."""

    @pytest.fixture
    def copy(self, stores, tmp_path, monkeypatch):
        shutil.copytree(cheap(stores / "ds"), cheap(tmp_path / "ds"))
        copy = shutil.copytree(stores / "ds", tmp_path / "ds")
        before = tree(tmp_path)
        nothing_is_computed(monkeypatch)
        yield copy
        assert tree(tmp_path) == before

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"prefilter": 0.2}, r"prefilter\.fraction is 0\.3 in the store and 0\.2 in this command"),
            ({"prefilter_layers": "last:1"}, r'prefilter\.layers is "all" in the store and "last:1"'),
            ({"prefilter": None, "targets": None}, r"prefilter is \{.*\"fraction\":0\.3.* in the store and null"),
            ({"seed": 5}, r"projection\.seed is 0 in the store and 5"),
        ],
    )
    def test_of_other_settings_name_each(self, two_stage, copy, tiny_pool, changes, message):
        with pytest.raises(ProvenanceError, match=message) as refused:
            two_stage(copy, tiny_pool, **changes)
        assert "prefilter.kept_rows" not in str(refused.value)

    def test_of_other_targets_name_the_set(self, two_stage, copy, tiny_pool, tiny_rows):
        with pytest.raises(ProvenanceError, match=r'prefilter\.targets\.tones is "\w+" in the store and "'):
            two_stage(copy, tiny_pool, targets={"tones": tiny_rows[:3]})
        with pytest.raises(ProvenanceError, match=r"prefilter\.targets\.sums is absent in the store and "):
            two_stage(copy, tiny_pool, targets={"sums": tiny_rows[:3]})

    def test_of_new_data_name_it_and_the_way_out(self, two_stage, copy, tiny_pool, tiny_rows):
        for data in ([tiny_pool, tiny_rows[:3]], tiny_rows[:3]):
            with pytest.raises(StoreError, match=r"memory is new to .* of pool\.jsonl: .* choose another --datastore"):
                two_stage(copy, data)

    def test_of_a_plain_store(self, two_stage, stores, tiny_pool, tmp_path, monkeypatch):
        copy = shutil.copytree(stores / "plain", tmp_path / "ds")
        nothing_is_computed(monkeypatch)
        with pytest.raises(ProvenanceError, match=r'prefilter is null in the store and \{"checkpoint"'):
            two_stage(copy, tiny_pool)
        assert not cheap(copy).exists()

    def test_of_a_folder_of_something_else(self, two_stage, tiny_pool, tmp_path):
        (tmp_path / "ds").mkdir()
        (tmp_path / "ds" / "thesis.tex").write_text("x")
        with pytest.raises(StoreError, match=r"not a datastore: it has thesis\.tex"):
            two_stage(tmp_path / "ds", tiny_pool)
        assert not cheap(tmp_path / "ds").exists()

    def test_of_an_unfinished_store_without_part_of_its_data(self, two_stage, tiny_rows, tmp_path, monkeypatch):
        parts = [tiny_rows[:25], tiny_rows[25:]]
        two_stage(tmp_path / "ds", parts)
        (tmp_path / "ds" / "manifest.json").unlink()
        next((tmp_path / "ds").rglob("s0001-*.safetensors")).unlink()
        with pytest.raises(StoreError, match=r"was begun with memory too; add it with --data"):
            two_stage(tmp_path / "ds", parts[0])
        two_stage(tmp_path / "ds", parts[::-1])

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"targets": None}, "prefilter is 0.3 and there are no targets .*--targets"),
            ({"prefilter": None}, "targets are given and no prefilter.*--prefilter 0.2"),
            ({"targets": []}, "no target was given"),
            ({"prefilter_layers": "layers.9"}, "found in none of the LoRA layers"),
            ({"layers": "layers.9"}, "found in none of the LoRA layers"),
        ],
    )
    def test_of_a_command_that_lacks_half(self, two_stage, tiny_pool, tmp_path, changes, message):
        with pytest.raises((SettingError, DataError), match=message):
            two_stage(tmp_path / "ds", tiny_pool, **changes)
        assert not list(tmp_path.rglob("s0000-*"))

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"prefilter": 0}, "prefilter must be above 0 and at most 1, got 0"),
            ({"prefilter": 1.01}, "got 1.01"),
            ({"prefilter": float("nan")}, "got nan"),
            ({"prefilter_layers": "last:1"}, "prefilter_layers is 'last:1' and there is no prefilter"),
        ],
    )
    def test_of_values_out_of_range(self, settings, message):
        with pytest.raises(SettingError, match=message):
            BuildConfig(**settings)

    def test_of_a_bad_checkpoint_come_before_the_first_stage(self, two_stage, tiny_pool, tiny_run, tmp_path):
        run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
        first = min(run.glob("checkpoint-*"), key=lambda folder: int(folder.name[11:]))
        (first / "optimizer.pt").unlink()
        with pytest.raises(Exception, match=rf"{first.name} has no optimizer state"):
            two_stage(tmp_path / "ds", tiny_pool, checkpoints=run)
        assert not cheap(tmp_path / "ds").exists()


class TestSelecting:
    @pytest.mark.parametrize("fraction", [0.05, 0.2, 0.3])
    def test_a_fraction_is_of_the_pool(self, stores, tiny_target_file, fraction):
        (selection,) = select(datastore=stores / "ds", targets=tiny_target_file, fraction=fraction, progress=False)
        assert len(selection.ids) == ceil(fraction * NUM_ROWS)

    @pytest.mark.parametrize("size", [{"fraction": 0.31}, {"count": NUM_KEPT + 1}])
    def test_more_than_was_kept_is_refused_by_the_prefilters_name(self, stores, tiny_target_file, size):
        with pytest.raises(SettingError, match=r"13 rows .* prefilter .* left 12 of 40; .*--prefilter"):
            select(datastore=stores / "ds", targets=tiny_target_file, progress=False, **size)

    def test_for_other_targets_warns_of_them_alone(self, stores, tiny_target_file, tiny_rows):
        targets = {"sums": tiny_rows[:2], "tones": tiny_target_file}
        with pytest.warns(EvidenceWarning, match=r"^sums: the rows of .* were chosen for other targets \(tones\)"):
            select(datastore=stores / "ds", targets=targets, count=2, progress=False)

    def test_writes_why_a_row_has_no_score(self, stores, tiny_target_file, tmp_path):
        select(
            datastore=stores / "ds", targets=tiny_target_file, count=2, progress=False, scores=tmp_path / "s.jsonl"
        )  # fmt: skip
        lines = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
        assert [line["row"] for line in lines] == list(range(NUM_ROWS))
        left_out = {line["row"]: line["id"] for line in lines if line.get("skipped") == "prefilter"}
        assert left_out == set_aside(stores / "ds")
        assert {line["id"] for line in lines if line["score"] is not None} == set(
            Datastore.open(stores / "ds").rows().ids
        )

    @pytest.mark.parametrize("of", ["id", "key"])
    def test_explains_that_a_row_was_set_aside(self, stores, of):
        row = min(set_aside(stores / "ds"))
        asked = f"row-{row}" if of == "id" else f"0:{row}"
        with pytest.raises(
            SettingError, match=rf"pool\.jsonl\[{row}\] has no features in .* skipped: prefilter\. Choose"
        ):
            explain(datastore=stores / "ds", row=asked, progress=False)


def test_every_shard_of_a_range_has_the_same_rows_set_aside(stores):
    store = Datastore.open(stores / "ds")
    for rows in store.manifest.ranges:
        keys = [key for key in store.manifest.shard_keys() if (key.start, key.stop) == (rows.start, rows.stop)]
        shards = [store.shard(key) for key in keys]
        assert len(shards) == 2
        assert {*shards[0].set_aside} == {*rows.rows_set_aside} > set()
        assert shards[0].set_aside == shards[1].set_aside
    assert not store.skipped


def test_the_manifest_has_no_label_of_a_row_that_was_set_aside(stores):
    text = (stores / "ds" / "manifest.json").read_text()
    assert not [label for label in set_aside(stores / "ds").values() if f'"{label}"' in text]


def test_a_row_that_was_set_aside_is_deleted_and_the_store_compacted(stores, tiny_pool, tmp_path):
    copy = shutil.copytree(stores / "ds", tmp_path / "ds")
    gone, kept = min(set_aside(copy)), kept_rows(copy)
    delete_rows(copy, [(0, gone)])
    assert not verify_deleted(copy, labels=[f"row-{gone}"]).problems
    edited = tmp_path / "edited.jsonl"
    lines = tiny_pool.read_text().splitlines(keepends=True)
    edited.write_text("".join(line for n, line in enumerate(lines) if n != gone))
    new = compact(datastore=copy, output=tmp_path / "out", data=edited, progress=False)
    assert new.num_set_aside == NUM_ROWS - NUM_KEPT - 1
    assert kept_rows(new.path) == [row - (row > gone) for row in kept]
    assert set(set_aside(new.path).values()) == {f"row-{n}" for n in range(NUM_ROWS)} - {
        f"row-{row}" for row in [gone, *kept]
    }
    swapped = lines[:gone] + lines[gone + 1 :]
    out = [row - (row > gone) for row in set_aside(copy)]
    swapped[out[0]], swapped[out[1]] = swapped[out[1]], swapped[out[0]]
    edited.write_text("".join(swapped))
    with pytest.raises(DataError, match=rf"edited\.jsonl:{out[0] + 1} is not row"):
        compact(datastore=copy, output=tmp_path / "other", data=edited, progress=False)


@pytest.mark.parametrize(
    ("num_rows", "num_set_aside", "fraction", "expected"), [(50, 950, 0.05, 50), (10, 9, 0.5, 10), (3, 0, 1.0, 3)]
)
def test_a_fraction_counts_what_was_set_aside(num_rows, num_set_aside, fraction, expected):
    assert num_to_select(num_rows, fraction=fraction, num_set_aside=num_set_aside) == expected


def test_the_cheap_store_lies_beside_the_exact_one_by_whatever_name_that_is_reached(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "ds")
    assert cheap_folder(tmp_path / "link") == (tmp_path / "elsewhere" / "ds.prefilter").resolve()
