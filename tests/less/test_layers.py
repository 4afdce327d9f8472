"""Features of some of the LoRA layers: which layers they are, and that nothing else of a store changes."""

import numpy as np
import pytest

from datastore import Datastore
from datastore.errors import ProvenanceError, SettingError
from less import build_datastore, score
from less.adapters import adapted_model
from less.checkpoints import find_checkpoints
from less.models import ParamLayout, choose_layers, load_base_model

NAMES = [f"base.layers.{n}.{part}" for n in range(12) for part in ("self_attn.q_proj", "mlp.up_proj")] + ["base.final"]


class TestTheChoice:
    def test_all_are_all(self):
        assert choose_layers(NAMES, "all") == set(NAMES)

    @pytest.mark.parametrize("num_blocks", [1, 3, 12])
    def test_the_last_blocks_are_those_of_the_highest_numbers(self, num_blocks):
        expected = {name for name in NAMES[:-1] if int(name.split(".")[2]) >= 12 - num_blocks}
        assert choose_layers(NAMES, f"last:{num_blocks}") == expected
        assert len(expected) == 2 * num_blocks

    def test_a_regular_expression_is_searched_in_the_names(self):
        assert choose_layers(NAMES, "self_attn") == {name for name in NAMES if "self_attn" in name}
        assert choose_layers(NAMES, r"layers\.[01]\..*up_proj$") == {NAMES[1], NAMES[3]}

    @pytest.mark.parametrize(
        ("layers", "message"),
        [
            ("last:0", "on 12 blocks"),
            ("last:13", "on 12 blocks"),
            ("(", "regular expression"),
            ("k_proj", "none of the LoRA layers' names, such as base.layers.0.self_attn.q_proj"),
            ("last", "none of the LoRA layers' names"),
        ],
    )
    def test_what_finds_none_is_an_error(self, layers, message):
        with pytest.raises(SettingError, match=message):
            choose_layers(NAMES, layers)


@pytest.fixture(scope="module")
def stores(tmp_path_factory, tiny_model_folder, tiny_run, tiny_rows):
    """Unprojected features of all layers and of the last block's."""
    built = {}
    for layers in ("all", "last:1"):
        folder = tmp_path_factory.mktemp("stores") / "store"
        build_datastore(
            model=tiny_model_folder, checkpoints=tiny_run, data=tiny_rows[:10], datastore=folder, projection="none",
            layers=layers, progress=False,
        )  # fmt: skip
        built[layers] = Datastore.open(folder)
    return built


@pytest.fixture(scope="module")
def coordinates(tiny_model_folder, tiny_run):
    """Which of the P coordinates belong to the last block."""
    checkpoint = find_checkpoints([tiny_run])[0]
    with adapted_model(load_base_model(tiny_model_folder), checkpoint.path) as model:
        layout, own = ParamLayout.of(model), ParamLayout.of(model, "last:1")
    return np.concatenate([np.arange(layout.num_params)[layout.slice(name)] for name in own.names])


def vectors(store, checkpoint):
    (block,) = store.iter_blocks("adam-none", checkpoint)
    return block.features_nK * block.norms_n[:, None]


def test_features_of_some_layers_are_those_coordinates_of_all(stores, coordinates):
    for checkpoint in stores["all"].checkpoints:
        found, full = vectors(stores["last:1"], checkpoint), vectors(stores["all"], checkpoint)
        assert found.shape[1] == len(coordinates) < full.shape[1]
        np.testing.assert_allclose(found, full[:, coordinates], rtol=1e-5, atol=1e-7)


def test_targets_are_seen_through_the_same_layers(stores, tiny_targets):
    store = stores["last:1"]
    found = score(datastore=store, targets=tiny_targets, progress=False)
    everything = score(datastore=stores["all"], targets=tiny_targets, progress=False)
    assert found.scores_NJ.shape == everything.scores_NJ.shape
    assert not np.allclose(found.scores_NJ, everything.scores_NJ)


def test_a_store_of_other_layers_is_another_store(stores, tiny_model_folder, tiny_run, tiny_rows):
    with pytest.raises(ProvenanceError, match="layers"):
        build_datastore(
            model=tiny_model_folder, checkpoints=tiny_run, data=tiny_rows[:10], datastore=stores["last:1"].path,
            projection="none", progress=False,
        )  # fmt: skip


def test_the_last_checkpoint_alone_has_all_the_weight(tmp_path, tiny_model_folder, tiny_run, tiny_rows, stores):
    build_datastore(
        model=tiny_model_folder, checkpoints=f"{tiny_run}:last", data=tiny_rows[:10], datastore=tmp_path / "store",
        projection="none", progress=False,
    )  # fmt: skip
    store = Datastore.open(tmp_path / "store")
    (name,) = store.checkpoints
    assert name == stores["all"].checkpoints[-1]
    assert store.settings["checkpoints"][name]["weight"] == 1
    np.testing.assert_array_equal(vectors(store, name), vectors(stores["all"], name))
