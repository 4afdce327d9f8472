"""What tests of `less` share: a build with settings that make small stores of many shards."""

import pytest

from less import build_datastore


@pytest.fixture(scope="module")
def build(tiny_model_folder, tiny_run):
    def call(folder, data, **changes):
        options = {
            "model": tiny_model_folder, "checkpoints": tiny_run, "proj_dim": 64, "shard_rows": 8,
            "tokens_per_batch": 256, "feature_dtype": "float32", "progress": False,
        }  # fmt: skip
        return build_datastore(datastore=folder, data=data, **options | changes)

    return call
