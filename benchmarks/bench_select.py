"""Seconds to rank a store, beside reading its bytes and beside the bare products; and where `gradsift select` goes.

    python benchmarks/bench_select.py --rows 1000000 --warm-rows 200000 --store FOLDER --model M --data POOL \\
        --targets TARGETS --json benchmarks/results/NAME.json

    read                every shard's file read once, into one buffer that is used again; nothing else
    gemm J              the products alone, in float32, of rows that are in memory: the machine's rate for this shape
    rank J              `influence_scores` for J subtasks, checksums verified, and `select_top` of 5% of the rows
    rank J, unverified  the same without checksums

The store is made up: random unit rows, one checkpoint, kept as a build keeps them unless `--feature-dtype` says
otherwise. Cold rounds drop its files from the page cache before each way, and check that the bytes then come from the
disk; warm rounds find the files in memory. What is read or multiplied is the same in every way. The gate: the scores of
some rows equal those of the stored rows in float64, and the rows selected are the best. The second part times the
stages of `gradsift select`, in fresh processes, on a small store of a model: the first time, and again with other
numbers of rows, when the scores are kept.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from harness import machine, machine_in_words, options, table, timed, write_report
from numpy.typing import NDArray

import less.ranking
import less.scoring
from cli.main import gradsift
from datastore import Datastore, DatastoreWriter, Shard, ShardKey, SourceEntry
from datastore.coding import FEATURE_DTYPES, as_float32, encode
from less.scan import influence_scores, iter_scores
from less.score_matrix import scores_folder
from less.selection import num_to_select, select_top

FEATURE_SET, CHECKPOINT = "random", "checkpoint-1"
FRACTION = 0.05
BUFFER_BYTES = 2**20  # the fastest of 256 KB, 1 MB and 16 MB: what is copied stays in the cache
START, MODEL, TARGETS, SCAN, WRITING, REST = (
    "imports", "model, tokenizer, targets' text", "target gradients", "scan", "writing the selection",
    "interpreter, command line, the rest",
)  # fmt: skip


def main() -> None:
    """Measure, and write the page."""
    parser = options(__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the store that is read from the disk")
    parser.add_argument("--warm-rows", type=int, default=200_000, help="of the one that is read from memory")
    parser.add_argument("--proj-dim", type=int, default=8192)
    parser.add_argument("--feature-dtype", choices=FEATURE_DTYPES, default="int8")
    parser.add_argument("--shard-rows", type=int, default=1024)
    parser.add_argument("--subtasks", type=int, nargs="+", default=[1, 27, 50], help="J, each a way")
    parser.add_argument("--store", type=Path, help="folder that keeps the made-up stores for another run")
    parser.add_argument("--model", help="of the second part, which is left out without it")
    parser.add_argument("--label", help="what to call the model on the page; the folder's name by default")
    parser.add_argument("--data", help="its pool, .jsonl")
    parser.add_argument("--targets", help="its targets")
    parser.add_argument("--pool-rows", type=int, default=500)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    if args.smoke:
        args.rounds, args.rows, args.warm_rows, args.proj_dim, args.shard_rows = 1, 150, 70, 40, 32
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.store or Path(temporary)
        results, case = {}, {}
        for name, num_rows in (("cold", args.rows), ("warm", args.warm_rows)):
            scan = Scan(folder / f"{num_rows}x{args.proj_dim}-{args.feature_dtype}", num_rows, args)
            results[name] = (cold if name == "cold" else warm)(scan, args)
            case[name] = {"rows": num_rows, "bytes": scan.num_bytes}
            print("\n".join(table(results[name])), file=sys.stderr, flush=True)  # an hour's work, should the rest fail
        if args.smoke:
            make_small_case(args, Path(temporary))
        select = select_stages(args, Path(temporary)) if args.model else None
    report = {
        "what": "seconds to rank a store, the ratio to reading its bytes, and seconds of `gradsift select` by stage",
        "case": {
            **case,
            "proj_dim": args.proj_dim,
            "feature_dtype": args.feature_dtype,
            "subtasks": args.subtasks,
            "shard_rows": args.shard_rows,
            "rounds": args.rounds,
            "fraction": FRACTION,
            "load_average": round(os.getloadavg()[1], 1),
        },
        "machine": machine(),
        "results": results,
        "select": select,
    }
    write_report(report, as_markdown(report), args.json)


class Scan:
    """A store of random unit rows, and what is done with it. Made unless it is there."""

    def __init__(self, folder: Path, num_rows: int, args: argparse.Namespace) -> None:
        self.num_rows, self.proj_dim, self.dtype = num_rows, args.proj_dim, args.feature_dtype
        rows = "random unit rows, numpy's default_rng((0, first row))"
        with DatastoreWriter.open(
            folder,
            settings={"rows": rows, "proj_dim": self.proj_dim, "dtype": self.dtype},
            environment={},
            feature_sets=[FEATURE_SET],
            checkpoints=[CHECKPOINT],
            shard_rows=args.shard_rows,
        ) as writer:
            source = SourceEntry(name="random", kind="memory", location=None, sha256="00" * 32, num_rows=num_rows)
            writer.add_source(source)
            for key in writer.missing_shards():
                shard = random_shard(key, self.proj_dim)
                writer.write_shard(key, replace(shard, features_NK=encode(as_float32(shard.features_NK), self.dtype)))
            for at in writer.missing_directions():
                writer.write_direction(*at, np.zeros(self.proj_dim, np.float32))
            writer.seal()
        store = Datastore.open(folder)
        self.folder, self.ranges = folder, store.manifest.ranges
        self.files = [folder / path for path in store.manifest.shards]
        self.num_bytes = sum(file.stat().st_size for file in self.files)

    def queries(self, num_subtasks: int) -> torch.Tensor:
        """Unit vectors, queries_JK."""
        queries_JK = torch.randn(num_subtasks, self.proj_dim, generator=torch.Generator().manual_seed(1))
        return torch.nn.functional.normalize(queries_JK, dim=1)

    def read(self) -> None:
        """Every byte once, as fast as one thread can."""
        buffer = bytearray(BUFFER_BYTES)
        for path in self.files:
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    def rank(self, num_subtasks: int, *, verify: bool = True) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """scores_NJ, and the positions selected; the store is opened anew, so that nothing counts as verified."""
        queries_JK = {CHECKPOINT: self.queries(num_subtasks)}
        store = Datastore.open(self.folder)
        scores_NJ = influence_scores(store, FEATURE_SET, queries_JK, {CHECKPOINT: 1.0}, verify=verify)
        return scores_NJ, select_top(scores_NJ.max(axis=1), num_to_select(self.num_rows, fraction=FRACTION))

    def products(self, num_subtasks: int) -> Callable[[], None]:
        """The multiplications of `rank`, of blocks that are in memory, more of them than a cache holds."""
        queries_JK = self.queries(num_subtasks)
        blocks = [torch.randn(self.ranges[0].num_scored, self.proj_dim) for _ in range(4)]

        def multiply() -> None:
            for n, rows in enumerate(self.ranges):
                queries_JK @ blocks[n % 4][: rows.num_scored].T

        return multiply

    def drop(self) -> None:
        """Put the files out of the page cache; they were flushed to the disk when they were written."""
        for path in self.files:
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)

    def check(self, found: dict[str, Any]) -> None:
        """The gate."""
        checked = [self.ranges[0], self.ranges[len(self.ranges) // 2], self.ranges[-1]]
        for name, result in found.items():
            if result is None:
                continue
            scores_NJ, positions = result
            queries_JK = self.queries(scores_NJ.shape[1]).numpy().astype(np.float64)
            for rows in checked:
                stored_NK = as_float32(encode(as_float32(unit_rows(rows.start, rows.stop, self.proj_dim)), self.dtype))
                worst = float(
                    np.abs(scores_NJ[rows.start : rows.stop] - stored_NK.astype(np.float64) @ queries_JK.T).max()
                )
                if not worst <= (
                    2e-6 if "float" in self.dtype else 1e-4
                ):  # where rows are integers, queries are rounded
                    raise SystemExit(f"{name}: a score is off by {worst:.1e}; nothing is timed")
            best = np.argsort(-scores_NJ.max(axis=1), kind="stable")[: len(positions)]
            if not np.array_equal(positions, best):
                raise SystemExit(f"{name}: the rows selected are not the best; nothing is timed")


def unit_rows(start: int, stop: int, proj_dim: int) -> NDArray[np.float16]:
    """The rows of a shard that begins at `start`."""
    rows_NK = np.random.default_rng((0, start)).standard_normal((stop - start, proj_dim), dtype=np.float32)
    return (rows_NK / np.linalg.norm(rows_NK, axis=1, keepdims=True)).astype(np.float16)


def random_shard(key: ShardKey, proj_dim: int) -> Shard:
    """Unit rows, and numbers that nobody looks at."""
    rows_N = np.arange(key.start, key.stop)
    ones_N = np.ones(len(rows_N), np.float32)
    return Shard(
        rows_N=rows_N,
        ids=[f"random:{row}" for row in rows_N],
        digests_N=rows_N.astype(np.uint64),
        features_NK=unit_rows(key.start, key.stop, proj_dim),
        norms_N=ones_N,
        grad_norms_N=ones_N,
        update_norms_N=ones_N,
        losses_N=ones_N,
        num_tokens_N=ones_N.astype(np.int32),
        num_supervised_N=ones_N.astype(np.int32),
        truncated_N=np.zeros(len(rows_N), bool),
    )


def cold(scan: Scan, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Every way beside reading, from the disk."""
    ways: dict[str, Callable[[], Any]] = {"read": scan.read}
    ways |= {f"rank {num}": partial(scan.rank, num) for num in args.subtasks}
    ways[f"rank {args.subtasks[-1]}, unverified"] = partial(scan.rank, args.subtasks[-1], verify=False)
    meters = {name: Meter(work) for name, work in ways.items()}
    results = timed(meters, against="read", rounds=args.rounds, gate=scan.check, before=scan.drop)
    for name, meter in meters.items():
        results[name] |= meter.medians() | {"from_disk": round(min(meter.disk_bytes) / scan.num_bytes, 3)}
        if results[name]["from_disk"] < 0.95 and not args.smoke:
            raise SystemExit(
                f"{name} read {results[name]['from_disk']:.0%} of the bytes from the disk; it was not cold"
            )
    return results


def warm(scan: Scan, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Every way beside reading, from memory, and its share of the rate of the bare products."""
    ways: dict[str, Callable[[], Any]] = {"read": scan.read}
    for num in args.subtasks:
        ways[f"gemm {num}"] = scan.products(num)
        ways[f"rank {num}"] = partial(scan.rank, num)
        ways[f"rank {num}, unverified"] = partial(scan.rank, num, verify=False)
    meters = {name: Meter(work) for name, work in ways.items()}
    results = timed(meters, against="read", rounds=args.rounds, gate=scan.check)
    for name, meter in meters.items():
        results[name] |= meter.medians()
        if name.startswith("rank"):
            gemm = results[f"gemm {name.removesuffix(', unverified').split()[1]}"]["ratios"]
            shares = [one / own for one, own in zip(gemm, results[name]["ratios"], strict=True)]
            results[name]["share_of_gemm"] = round(statistics.median(shares), 2)
    return results


class Meter:
    """A way whose CPU time and bytes read from the disk are written down."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.work = work
        self.cpu_seconds: list[float] = []
        self.disk_bytes: list[int] = []

    def __call__(self) -> Any:
        """The work's result."""
        disk, cpu = disk_bytes(), time.process_time()
        result = self.work()
        self.cpu_seconds.append(time.process_time() - cpu)
        self.disk_bytes.append(disk_bytes() - disk)
        return result

    def medians(self) -> dict[str, float]:
        """CPU seconds of the timed rounds: all but the first."""
        return {"cpu_seconds": round(statistics.median(self.cpu_seconds[1:]), 2)}


def disk_bytes() -> int:
    """Bytes that this process has made the disk read (Linux; elsewhere 0)."""
    counters = Path("/proc/self/io")
    lines = counters.read_text().splitlines() if counters.exists() else []
    return sum(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


def make_small_case(args: argparse.Namespace, folder: Path) -> None:
    """A random model, a pool and targets, as files."""
    from made_up_models import letter_tokenizer, random_llama

    random_llama("tiny", device=torch.device("cpu"), dtype=torch.float32).save_pretrained(folder / "model")
    letter_tokenizer().save_pretrained(folder / "model")
    rows = [{"prompt": "a" * (n % 7 + 1), "completion": "b" * (n % 5 + 1)} for n in range(20)]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    args.model, args.label, args.pool_rows = folder / "model", "made up", 20
    args.data = args.targets = folder / "rows.jsonl"


def select_stages(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Median seconds of each stage of `gradsift select` on a store of the model, each time in a fresh process."""
    from less import build_datastore, warmup  # here, since the processes that are timed import this file too

    with open(args.data, "rb") as lines:
        pool = [line for _, line in zip(range(args.pool_rows), lines, strict=False)]
    (folder / "pool.jsonl").write_bytes(b"".join(pool))
    with torch.enable_grad():
        run = warmup(
            model=args.model, data=folder / "pool.jsonl", output=folder / "run", fraction=min(1.0, 64 / len(pool)),
            epochs=1, progress=False,
        )  # fmt: skip
    built = build_datastore(
        model=args.model, checkpoints=run.output, data=folder / "pool.jsonl", datastore=folder / "ds",
        proj_dim=args.proj_dim, progress=False,
    )  # fmt: skip
    command = ["select", "--datastore", folder / "ds", "--targets", args.targets, "--quiet"]
    command += ["--output", folder / "selected.jsonl"]
    rounds: dict[str, list[dict[str, float]]] = {"first": [], "again": []}
    for _ in range(args.rounds + 1):
        shutil.rmtree(scores_folder(Datastore.open(folder / "ds")), ignore_errors=True)
        for way, fraction in (("first", FRACTION), ("again", 2 * FRACTION)):
            own = [str(part) for part in (*command, "--fraction", fraction)]
            rounds[way].append(run_staged(own, folder / "stages.json", args.threads))
    stages = {
        name: [round(statistics.median(seconds[name] for seconds in own[1:]), 3) for own in rounds.values()]
        for name in rounds["first"][0]
    }
    return {
        "model": args.label or Path(args.model).name,
        "pool_rows": built.num_scored,
        "targets": len(Path(args.targets).read_bytes().splitlines()),
        "store_bytes": built.num_bytes,
        "ways": list(rounds),
        "stages": stages,
    }


def run_staged(command: list[str], report: Path, num_threads: int) -> dict[str, float]:
    """Seconds of each stage of a command, run alone; the rest is what the stages leave of the whole."""
    code = "import time; begin = time.perf_counter(); import bench_select as b; b.staged(begin, {!r}, {!r})"
    own = Path(__file__).resolve().parent
    begin = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", code.format(command, str(report))],
        check=True,
        env=os.environ
        | {
            "PYTHONPATH": f"{own.parent}{os.pathsep}{own}",
            "OMP_NUM_THREADS": str(num_threads),
            "OMP_WAIT_POLICY": "PASSIVE",
        },
    )
    whole = time.perf_counter() - begin
    stages: dict[str, float] = json.loads(report.read_text())
    return {**stages, REST: whole - sum(stages.values()), "whole": whole}


def staged(begin: float, command: list[str], report: str) -> None:
    """Run a command in this process, and write the seconds of its stages; `begin`: before the imports."""
    seconds = {START: time.perf_counter() - begin, MODEL: 0.0, TARGETS: 0.0, SCAN: 0.0, WRITING: 0.0}
    inner = [0.0]  # of the stages at work, the seconds that belong to stages inside them

    def in_stage(name: str, work: Callable[..., Any], *, whole: Callable[[Any], Any] = lambda result: result) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            inner.append(0.0)
            try:
                return whole(work(*args, **kwargs))
            finally:
                took = time.perf_counter() - start
                seconds[name] += took - inner.pop()
                inner[-1] += took

        return run

    scorer = less.scoring.Scorer
    with (
        patch.object(scorer, "__init__", in_stage(MODEL, scorer.__init__)),
        patch.object(less.scoring, "open_base_model", in_stage(MODEL, less.scoring.open_base_model)),
        patch.object(scorer, "load_targets", in_stage(MODEL, scorer.load_targets)),
        patch.object(scorer, "target_features", in_stage(TARGETS, scorer.target_features, whole=list)),
        patch.object(less.scoring, "iter_scores", in_stage(SCAN, iter_scores, whole=list)),
        patch.object(Datastore, "rows", in_stage(SCAN, Datastore.rows)),
        patch.object(less.ranking, "write_selected", in_stage(WRITING, less.ranking.write_selected)),
    ):
        gradsift.main(command, standalone_mode=False)
    Path(report).write_text(json.dumps(seconds))


def as_markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    case, results, select = report["case"], report["results"], report["select"]
    lines = [
        f"# Ranking stores of {case['cold']['rows']:,} and {case['warm']['rows']:,} rows",
        "",
        f"Random unit rows, {case['feature_dtype']}, K = {case['proj_dim']:,}, {case['shard_rows']:,} to a shard, one "
        f"checkpoint; the best {case['fraction']:.0%} for J subtasks. Ratios are to reading the bytes; median of "
        f"{case['rounds']} interleaved rounds. "
        "CPU seconds are of all threads: those that read and check run beside the "
        f"{report['machine']['threads']} that multiply. Load average at the end {case['load_average']}: where it is "
        "far above the threads in use, others had the cores too. " + machine_in_words(report["machine"]),
        "",
        f"## From the disk: {case['cold']['bytes'] / 1e9:,.1f} GB",
        "",
        f"At least {min(own['from_disk'] for own in results['cold'].values()):.0%} of the bytes came from the disk and "
        "not from the page cache; the disk's host may have a cache of its own.",
        "",
        *table(results["cold"], cpu_seconds="CPU seconds"),
        "",
        f"## From memory: {case['warm']['bytes'] / 1e9:,.1f} GB",
        "",
        *table(
            {name: {"share_of_gemm": None} | own for name, own in results["warm"].items()},
            cpu_seconds="CPU seconds",
            share_of_gemm="share of the products' rate",
        ),
    ]
    if select:
        lines += [
            "",
            "## Where `gradsift select` goes",
            "",
            f"{select['model']}, {select['pool_rows']:,} rows in a store of {select['store_bytes'] / 1e6:,.1f} MB, "
            f"{select['targets']} targets; seconds of the command in a fresh process, median of {case['rounds']}: the "
            "first time, and again with another number of rows.",
            "",
            f"| stage | {' | '.join(select['ways'])} |",
            "| --- | --- | --- |",
            *(
                f"| {name} | {' | '.join(f'{own:.2f}' for own in seconds)} |"
                for name, seconds in select["stages"].items()
            ),
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
