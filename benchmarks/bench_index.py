"""Seconds to find the rows nearest to a row in gradient space: an index of each type beside an exact scan.

    python benchmarks/bench_index.py --rows 200000 --store FOLDER --json benchmarks/results/index_cpu.json

    scan                `GradientSpace.nearest`: every row is read and multiplied
    flat, ivf, ivf-sq8  `build_index` and `GradientIndex.neighbours`, which order their candidates by exact similarity
    sq8, hnsw           types that FAISS has and gradsift does not offer, given as many candidates to order exactly

The store is made up: unit rows around centres, with a spectrum that falls as a power and noise, float16, one
checkpoint, indexed without a sketch, or with one of `--dim` columns. Two questions are asked: the 10 rows nearest to
each of 100 at once, which a scan answers in one pass, and to a few of them one after another, as `explain` does. The
gate: the scan is right for some rows, and an index finds as much of what the scan finds as it said.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from harness import machine, machine_in_words, options, table, timed, write_report
from numpy.typing import NDArray

from datastore import Datastore, DatastoreWriter, GradientIndex, GradientSpace, IndexConfig, Shard, SourceEntry
from datastore.index import TYPES, build_index

FEATURE_SET, CHECKPOINT = "structured", "checkpoint-1"
K_NEAREST, NUM_CENTRES, NUM_ALONE = 10, 500, 10
OTHERS = {"sq8": "SQ8", "hnsw": "HNSW16,Flat"}

Found = tuple[NDArray[np.float32], NDArray[np.int64]]


def main() -> None:
    """Measure, and write the page."""
    parser = options(__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--proj-dim", type=int, default=256)
    parser.add_argument("--dim", type=int, default=0, help="columns of the indexes' sketch; 0 for none")
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--store", type=Path, help="folder that keeps the made-up store for another run")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    faiss.omp_set_num_threads(args.threads)
    if args.smoke:
        args.rounds, args.rows, args.proj_dim, args.queries = 1, 700, 24, 20
    with tempfile.TemporaryDirectory() as temporary:
        report = measure(args, (args.store or Path(temporary)) / f"{args.rows}x{args.proj_dim}")
    write_report(report, as_markdown(report), args.json)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Build every index once, then ask all of them in turn."""
    make_store(folder, args.rows, args.proj_dim)
    store = Datastore.open(folder)
    space = GradientSpace(store)
    asked_M = np.sort(np.random.default_rng(1).permutation(args.rows)[: args.queries])
    ways: dict[str, Callable[[NDArray[np.int64]], Found]] = {"scan": partial(space.nearest, k=K_NEAREST)}
    facts: dict[str, dict[str, Any]] = {"scan": {"bytes": store.num_bytes}}
    for name in TYPES:
        start = time.perf_counter()
        index = build_index(store, config=IndexConfig(type=name, dim=args.dim), folder=folder / "indexes" / name)
        entry = index.entry
        facts[name] = {"build_seconds": round(time.perf_counter() - start, 1), "bytes": entry.file.num_bytes}
        facts[name] |= {"stated": entry.recall, "lists": entry.num_lists, "probes": entry.num_probes}
        facts[name]["candidates"] = entry.num_candidates
        ways[name] = partial(index.neighbours, k=K_NEAREST)
        say(name, facts[name])
    count = max(facts[name]["candidates"] for name in TYPES)
    columns = index_columns(index)
    for name, factory in OTHERS.items():
        start = time.perf_counter()
        other = faiss.index_factory(columns.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        other.train(columns)
        other.add(columns)
        if name == "hnsw":
            other.hnsw.efSearch = count
        num_bytes = len(faiss.serialize_index(other))
        facts[name] = {"build_seconds": round(time.perf_counter() - start, 1), "bytes": num_bytes, "candidates": count}
        ways[name] = partial(ask, other, columns, space, count)
        say(name, facts[name])
    check = partial(gate, space, asked_M, facts)
    at_once = timed(
        {n: partial(way, asked_M) for n, way in ways.items()}, against="scan", rounds=args.rounds, gate=check
    )
    alone = timed(
        {name: partial(one_by_one, way, asked_M[:NUM_ALONE]) for name, way in ways.items()},
        against="scan",
        rounds=args.rounds,
        gate=lambda found: None,
    )
    for name, own in facts.items():
        at_once[name] |= own
        alone[name] |= {"seconds": round(alone[name]["seconds"] / min(NUM_ALONE, len(asked_M)), 5)}
    return {
        "what": "seconds to find the 10 nearest rows, the ratio to an exact scan, and the share of them found",
        "case": {"rows": args.rows, "proj_dim": args.proj_dim, "dim": args.dim, "queries": args.queries}
        | {"rounds": args.rounds, "centres": NUM_CENTRES},
        "machine": machine("faiss-cpu", "numpy"),
        "at_once": at_once,
        "alone": alone,
    }


def say(name: str, facts: dict[str, Any]) -> None:
    """One line on standard error as soon as it is known."""
    print(name, facts, file=sys.stderr, flush=True)


def make_store(folder: Path, num_rows: int, proj_dim: int) -> None:
    """A store of structured rows, unless it is there."""
    with DatastoreWriter.open(
        folder,
        settings={"rows": "unit rows around centres, numpy's default_rng((0, first row))", "proj_dim": proj_dim},
        environment={},
        feature_sets=[FEATURE_SET],
        checkpoints=[CHECKPOINT],
        shard_rows=8192,
    ) as writer:
        writer.add_source(
            SourceEntry(name="made up", kind="memory", location=None, sha256="00" * 32, num_rows=num_rows)
        )
        for key in writer.missing_shards():
            rows_N = np.arange(key.start, key.stop)
            ones_N = np.ones(len(rows_N), np.float32)
            shard = Shard(
                rows_N=rows_N, ids=[f"row:{row}" for row in rows_N], digests_N=rows_N.astype(np.uint64),
                features_NK=structured_rows(key.start, key.stop, proj_dim), norms_N=ones_N, grad_norms_N=ones_N,
                update_norms_N=ones_N, losses_N=ones_N, num_tokens_N=ones_N.astype(np.int32),
                num_supervised_N=ones_N.astype(np.int32), truncated_N=np.zeros(len(rows_N), bool),
            )  # fmt: skip
            writer.write_shard(key, shard)
        for at in writer.missing_directions():
            writer.write_direction(*at, np.zeros(proj_dim, np.float32))
        writer.seal()


@cache
def centres(proj_dim: int) -> NDArray[np.float32]:
    """Where rows lie around."""
    return np.random.default_rng(2).standard_normal((NUM_CENTRES, proj_dim), dtype=np.float32) * spectrum(proj_dim)


def spectrum(proj_dim: int) -> NDArray[np.float32]:
    """Standard deviations of the columns: 1/√place."""
    return (1 / np.sqrt(1 + np.arange(proj_dim))).astype(np.float32)


def structured_rows(start: int, stop: int, proj_dim: int) -> NDArray[np.float16]:
    """The rows of a shard that begins at `start`: a centre, as much of their own, noise in every column."""
    rng = np.random.default_rng((0, start))
    own_NK = rng.standard_normal((stop - start, proj_dim), dtype=np.float32) * spectrum(proj_dim)
    noise_NK = rng.standard_normal((stop - start, proj_dim), dtype=np.float32) * np.float32(0.3 / proj_dim**0.5)
    rows_NK = centres(proj_dim)[rng.integers(NUM_CENTRES, size=stop - start)] + own_NK + noise_NK
    return (rows_NK / np.linalg.norm(rows_NK, axis=1, keepdims=True)).astype(np.float16)


def index_columns(index: GradientIndex) -> NDArray[np.float32]:
    """What the last index was filled with, (N, dim), made again."""
    found_NY = np.empty((index.entry.num_rows, index.entry.dim), np.float32)
    for start, vectors_nX in index.space.iter_vectors():
        found_NY[start : start + len(vectors_nX)] = index.columns(vectors_nX)
    return found_NY


def ask(
    other: Any, columns_NY: NDArray[np.float32], space: GradientSpace, count: int, asked_M: NDArray[np.int64]
) -> Found:
    """The nearest rows by an index of FAISS's, ordered exactly."""
    _, near_Mk = other.search(columns_NY[asked_M], count + 1)
    vectors_MX = space.vectors(asked_M)
    found = [
        space.best(vector_X, near[(near >= 0) & (near != own)], K_NEAREST)
        for vector_X, near, own in zip(vectors_MX, near_Mk, asked_M, strict=True)
    ]
    return np.stack([scores for scores, _ in found]), np.stack([positions for _, positions in found])


def one_by_one(way: Callable[[NDArray[np.int64]], Found], asked_M: NDArray[np.int64]) -> None:
    """Each row is a question of its own."""
    for m in range(len(asked_M)):
        way(asked_M[m : m + 1])


def gate(
    space: GradientSpace, asked_M: NDArray[np.int64], facts: dict[str, dict[str, Any]], found: dict[str, Found]
) -> None:
    """Raise unless the scan is right, flat equals it, and an index finds as much as it said; note what each finds."""
    scores_Mk, positions_Mk = found["scan"]
    queries_qX = space.vectors(asked_M[:3])
    all_qN = np.concatenate([queries_qX @ vectors_nX.T for _, vectors_nX in space.iter_vectors()], axis=1)
    all_qN[np.arange(len(queries_qX)), asked_M[:3]] = -np.inf
    best_qk = -np.partition(-all_qN, K_NEAREST, axis=1)[:, :K_NEAREST]
    if not np.allclose(np.sort(best_qk), np.sort(scores_Mk[:3]), atol=1e-5):
        raise SystemExit("scan: it is not right; nothing is timed")
    for name, (_, positions) in found.items():
        shared = [len(np.intersect1d(a, b)) for a, b in zip(positions, positions_Mk, strict=True)]
        facts[name]["recall"] = round(sum(shared) / positions_Mk.size, 3)
        if facts[name]["recall"] < facts[name].get("stated", 0) - 0.05:
            raise SystemExit(
                f"{name}: it finds {facts[name]['recall']:.2f} of the nearest rows and says "
                f"{facts[name]['stated']:.2f}; nothing is timed"
            )


def as_markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    case = report["case"]
    columns = f"a sketch of {case['dim']:,} columns" if case["dim"] else "no sketch"
    lines = [
        "# Finding near rows",
        "",
        f"{case['rows']:,} rows × {case['proj_dim']}, float16, around {case['centres']} centres, made up; {columns}. "
        f"Medians of {case['rounds']} interleaved rounds; ratios to the scan within a round. *recall* is the share of "
        "a row's 10 nearest that was found, *stated* what the index said when it was built. `sq8` and `hnsw` are not "
        "offered. The scan's bytes are the store's.",
        "",
        f"## {case['queries']} rows at once",
        "",
        *table(
            report["at_once"], recall="recall", stated="stated", build_seconds="build, seconds", bytes="bytes",
            lists="lists", probes="looked into", candidates="ordered exactly",
        ),
        "",
        "## One row after another, seconds a row",
        "",
        "| way | milliseconds a row | ratio |",
        "| --- | --- | --- |",
        *(f"| {name} | {1000 * own['seconds']:.1f} | {own['ratio']:.3f} |" for name, own in report["alone"].items()),
        "",
        machine_in_words(report["machine"]),
        "",
    ]  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    main()
