"""Seconds and memory of the exact scan, for each way of keeping features.

    python benchmarks/bench_scan.py --store FOLDER --json benchmarks/results/scan_cpu.json

Stores of the same random unit rows, kept as float32, float16, int8, int4 and binary, are scanned for J subtasks at
once (`less.scan.iter_scores`), from the system's memory, in interleaved rounds; `int8, verified` also checks every
shard's checksum. The gate: the scores of the first and the last shard are those of the rows that are stored. Memory is
what the process holds beyond its start, sampled every 10 ms, without pages of mapped files and without the scores;
that of a store an eighth as long stands beside it.
"""

import argparse
import tempfile
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_select import CHECKPOINT, FEATURE_SET, random_shard
from harness import machine, machine_in_words, options, timed, write_report
from numpy.typing import NDArray

from datastore import Datastore, DatastoreWriter, SourceEntry
from datastore.coding import FEATURE_DTYPES, as_float32, encode, row_bytes
from less.scan import iter_scores

Edges = tuple[NDArray[np.float32], NDArray[np.float32]]
"""Scores of the first and of the last shard."""


def main() -> None:
    """Measure, and write the page."""
    parser = options(__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--proj-dim", type=int, default=1024)
    parser.add_argument("--shard-rows", type=int, default=1024)
    parser.add_argument("--subtasks", type=int, default=50)
    parser.add_argument("--store", type=Path, help="folder that keeps the made-up stores for another run")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.smoke:
        args.rounds, args.rows, args.proj_dim, args.shard_rows, args.subtasks = 1, 300, 64, 32, 3
    with tempfile.TemporaryDirectory() as temporary:
        found = measure(args, args.store or Path(temporary))
    write_report(found, page_of(found), args.json)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Every way, timed and weighed."""
    generator = torch.Generator().manual_seed(1)
    query_JK = torch.nn.functional.normalize(torch.randn(args.subtasks, args.proj_dim, generator=generator), dim=1)
    stores = {dtype: make_store(folder, args, dtype, args.rows) for dtype in FEATURE_DTYPES}
    ways = {dtype: partial(scan, store, query_JK) for dtype, store in stores.items()}
    ways["int8, verified"] = lambda: scan(Datastore.open(stores["int8"].path), query_JK, verify=True)

    def gate(found: dict[str, Edges]) -> None:
        for name, edges in found.items():
            check(name, stores[name.split(",")[0]], query_JK, edges)

    results = timed(ways, against="float16", rounds=args.rounds, gate=gate)
    for name, own in results.items():
        dtype = name.split(",")[0]
        small = make_store(folder, args, dtype, max(1, args.rows // 8))
        own["row_bytes"] = row_bytes(dtype, args.proj_dim)
        own["peak_bytes"] = peak_anonymous(ways[name])
        own["peak_bytes_of_an_eighth"] = peak_anonymous(partial(scan, small, query_JK, verify="verified" in name))
    return {
        "what": __doc__.splitlines()[0], "rows": args.rows, "proj_dim": args.proj_dim, "subtasks": args.subtasks,
        "shard_rows": args.shard_rows, "rounds": args.rounds, "threads": args.threads, "machine": machine(),
        "results": results,
    }  # fmt: skip


def make_store(folder: Path, args: argparse.Namespace, dtype: str, num_rows: int) -> Datastore:
    """Random unit rows kept as `dtype`; made unless they are there."""
    with DatastoreWriter.open(
        folder / f"{num_rows}x{args.proj_dim}-{dtype}",
        settings={"rows": "random unit rows", "proj_dim": args.proj_dim, "dtype": dtype},
        environment={},
        feature_sets=[FEATURE_SET],
        checkpoints=[CHECKPOINT],
        shard_rows=args.shard_rows,
    ) as writer:
        writer.add_source(SourceEntry(name="random", kind="memory", location=None, sha256="00" * 32, num_rows=num_rows))
        for key in writer.missing_shards():
            shard = random_shard(key, args.proj_dim)
            writer.write_shard(key, replace(shard, features_NK=encode(as_float32(shard.features_NK), dtype)))
        for at in writer.missing_directions():
            writer.write_direction(*at, np.zeros(args.proj_dim, np.float32))
        writer.seal()
    return Datastore.open(folder / f"{num_rows}x{args.proj_dim}-{dtype}")


def scan(store: Datastore, query_JK: torch.Tensor, *, verify: bool = False) -> Edges:
    """All scores, of which the first and the last shard's are kept."""
    parts = iter_scores(store, FEATURE_SET, {CHECKPOINT: query_JK}, {CHECKPOINT: 1.0}, verify=verify)
    _, first_nJ = next(parts)
    _, last_nJ = deque(parts, maxlen=1).pop()
    return first_nJ, last_nJ


def check(name: str, store: Datastore, query_JK: torch.Tensor, edges: Edges) -> None:
    """Stop unless the scores are those of the stored rows."""
    blocks = list(store.iter_blocks(FEATURE_SET, CHECKPOINT, verify=False))
    for block, found_nJ in zip((blocks[0], blocks[-1]), edges, strict=True):
        worst = np.abs(as_float32(block.features_nK) @ query_JK.numpy().T - found_nJ).max()
        if worst > 3e-4:
            raise SystemExit(f"{name}: scores are off by {worst:.1e}; nothing is timed")


def peak_anonymous(work: Callable[[], Any]) -> int:
    """Most bytes that the process holds while it works, beyond the start, without pages of mapped files."""
    done, peak = threading.Event(), [0]

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], anonymous_bytes())

    work()  # what is made once stays
    start = anonymous_bytes()
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return max(0, peak[0] - start)


def anonymous_bytes() -> int:
    """Resident memory of this process that is no file's."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("/proc/self/status has no RssAnon: memory can be measured on Linux only")


def page_of(found: dict[str, Any]) -> str:
    """The report as a page."""
    lines = [
        f"# The exact scan of {found['rows']:,} rows", "",
        f"Random unit rows, K = {found['proj_dim']:,}, {found['shard_rows']:,} to a shard, one checkpoint, "
        f"{found['subtasks']} subtasks at once, {found['threads']} thread(s); median of {found['rounds']} interleaved "
        "rounds, ratios to float16. Memory is beyond the process's own and the scores, without mapped files; beside it "
        "that of a store an eighth as long.", "",
        machine_in_words(found["machine"]), "",
        "| kept as | bytes a row | seconds | ratio | ratios of the rounds | memory, MB | of an eighth, MB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for name, own in found["results"].items():
        cells = [name, f"{own['row_bytes']:,}", f"{own['seconds']:.2f}", f"{own['ratio']:.2f}"]
        cells.append(", ".join(f"{ratio:.2f}" for ratio in own["ratios"]))
        cells += [f"{own[key] / 1e6:.0f}" for key in ("peak_bytes", "peak_bytes_of_an_eighth")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
