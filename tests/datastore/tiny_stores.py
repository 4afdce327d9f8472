"""Small stores, made of numbers that follow from their key."""

from pathlib import Path
from typing import Any

import numpy as np

from datastore import DatastoreWriter, Shard, ShardKey, SkippedRow, SourceEntry
from datastore.shards import SET_ASIDE

SETTINGS: dict[str, Any] = {"model": {"name": "tiny", "fingerprint": "f00d"}, "dtype": "float16"}
ENVIRONMENT = {"machine": "test", "numpy": "any"}
K = 5


def source(name: str = "pool", num_rows: int = 7, content: str | None = None) -> SourceEntry:
    sha256 = (content or name).encode().hex().ljust(64, "0")
    return SourceEntry(name=name, kind="jsonl", location=f"/data/{name}.jsonl", sha256=sha256, num_rows=num_rows)


def skipped_row(row: int, reason: str = "not finite") -> SkippedRow:
    return SkippedRow(row=row, where=f"pool.jsonl:{row + 1}", id=f"pool:{row}", reason=reason, detail="nan")


def make_shard(key: ShardKey, skip: dict[int, str] | None = None, dtype: Any = np.float16) -> Shard:
    """Rows that differ by key; those in `skip` (row → reason) are skipped, or set aside for that reason."""
    skip = {row: reason for row, reason in (skip or {}).items() if key.start <= row < key.stop}
    rows = np.array([row for row in range(key.start, key.stop) if row not in skip], np.int64)
    seed = [len(key.feature_set), sum(key.checkpoint.encode()), key.source, key.start]
    features_NK = np.random.default_rng(seed).standard_normal((key.stop - key.start, K))[rows - key.start]
    norms_N = np.linalg.norm(features_NK, axis=1)
    return Shard(
        rows_N=rows,
        ids=[f"id-{row}" for row in rows],
        digests_N=(rows * 1_000_003).astype(np.uint64),
        features_NK=(features_NK / norms_N[:, None]).astype(dtype),
        norms_N=norms_N.astype(np.float32),
        grad_norms_N=(norms_N + 1).astype(np.float32),
        update_norms_N=(norms_N + 2).astype(np.float32),
        losses_N=(norms_N + 3).astype(np.float32),
        num_tokens_N=(rows + 10).astype(np.int32),
        num_supervised_N=(rows + 1).astype(np.int32),
        truncated_N=rows % 2 == 1,
        skipped=[skipped_row(row, reason) for row, reason in sorted(skip.items()) if reason != SET_ASIDE],
        set_aside={row: f"pool:{row}" for row, reason in sorted(skip.items()) if reason == SET_ASIDE},
    )


def open_writer(path: Path, **changes: Any) -> DatastoreWriter:
    options: dict[str, Any] = {
        "settings": SETTINGS,
        "environment": ENVIRONMENT,
        "feature_sets": ["adam", "sgd"],
        "checkpoints": ["checkpoint-2", "checkpoint-10"],
        "shard_rows": 3,
    }
    return DatastoreWriter.open(path, **options | changes)


def fill(writer: DatastoreWriter, skip: dict[tuple[str, int], dict[int, str]] | None = None) -> None:
    """Compute what is missing; `skip` maps (checkpoint, source) to rows and reasons."""
    for key in writer.missing_shards():
        writer.write_shard(key, make_shard(key, (skip or {}).get((key.checkpoint, key.source))))
    for feature_set, checkpoint in writer.missing_directions():
        writer.write_direction(feature_set, checkpoint, np.arange(K, dtype=np.float32))


def build_store(path: Path, *sources: SourceEntry, skip: Any = None, **changes: Any) -> Path:
    with open_writer(path, **changes) as writer:
        for one in sources or (source(),):
            writer.add_source(one)
        fill(writer, skip)
        writer.seal()
    return path


def tree(path: Path) -> dict[str, bytes]:
    """Every file of a store by its name, the empty lock included."""
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
