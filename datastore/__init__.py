"""The datastore: gradient features on disk. `FORMAT.md` is its specification; `errors` the project's errors.

>>> store = Datastore.open("ds")
>>> for block in store.iter_blocks("adam", "checkpoint-26"):
...     scores_n = block.features_nK @ targets_K

Names load their module on first use, so that `datastore.errors` costs no numpy. FAISS loads with a search.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datastore.build import Build, SourceEntry
    from datastore.coding import CodedRows
    from datastore.deletion import delete_rows, find_rows, verify_deleted
    from datastore.derive import compact_store, convert_store, merge_stores, split_store
    from datastore.files import check_free_space
    from datastore.index import GradientIndex, IndexConfig, build_index
    from datastore.manifest import Manifest, RowRange
    from datastore.search import nearest_rows
    from datastore.shards import Shard, ShardKey, SkippedRow
    from datastore.similarity import GradientSpace
    from datastore.store import Block, Datastore, RowIds, RowStats, RowTable
    from datastore.writer import DatastoreWriter

__all__ = [
    "Block",
    "Build",
    "CodedRows",
    "Datastore",
    "DatastoreWriter",
    "GradientIndex",
    "GradientSpace",
    "IndexConfig",
    "Manifest",
    "RowIds",
    "RowRange",
    "RowStats",
    "RowTable",
    "Shard",
    "ShardKey",
    "SkippedRow",
    "SourceEntry",
    "build_index",
    "check_free_space",
    "compact_store",
    "convert_store",
    "delete_rows",
    "find_rows",
    "merge_stores",
    "nearest_rows",
    "split_store",
    "verify_deleted",
]

_MODULES = {
    "build": ("Build", "SourceEntry"),
    "coding": ("CodedRows",),
    "deletion": ("delete_rows", "find_rows", "verify_deleted"),
    "derive": ("compact_store", "convert_store", "merge_stores", "split_store"),
    "files": ("check_free_space",),
    "index": ("GradientIndex", "IndexConfig", "build_index"),
    "manifest": ("Manifest", "RowRange"),
    "search": ("nearest_rows",),
    "shards": ("Shard", "ShardKey", "SkippedRow"),
    "similarity": ("GradientSpace",),
    "store": ("Block", "Datastore", "RowIds", "RowStats", "RowTable"),
    "writer": ("DatastoreWriter",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
