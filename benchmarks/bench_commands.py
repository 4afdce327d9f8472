"""Seconds and memory of the commands over a million rows, each in a process of its own, beside an eighth of the rows.

    python benchmarks/bench_commands.py --threads 2 --store FOLDER --json benchmarks/results/commands_cpu.json

    help            `gradsift --help`: a process that begins and ends
    read            every byte of the store read once, into one buffer that is used again
    inspect …       and the other commands, called as a user calls them: `COMMANDS` and `LIFE` have their words

The commands that leave the store as it is run in turn, round after round, at both sizes: `select` begins each round
without kept scores, `select again` finds those that it left. The life of a store (deletion, compaction, other stores
made of it) is run through once. Memory is the most that the process holds that is no file's, looked at every 10 ms:
(peak(N) − peak(N/8)) / (7N/8) is what a row costs, and what is left is what any pool costs.

The rows' features are random, the rest is real: a made-up model is trained and a small store built with it, and the
large ones have its settings, a pool of two JSONL files on the disk with the digests of its tokens, and copies and near
copies among the rows. The gate, on what the first round and each step of a store's life have written: a smaller
selection is the beginning of a larger one, rules and thresholds hold, a deleted row is nowhere in a later selection and
the others stay where they were, a compacted store selects the same rows, what was split and merged has the same bytes.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import machine, machine_in_words, options, write_report
from made_up_models import letter_tokenizer, random_llama

from datastore import Datastore, DatastoreWriter, Shard, ShardKey
from datastore.coding import encode
from less import build_datastore, warmup
from less.data.records import Source, open_source
from less.data.rendering import RenderConfig, Renderer
from less.pool import entry_of
from less.row_ranges import RowRange, content_digest, render_range

LARGE, SMALL, NEAR, MOST_DELETED = 0.05, 0.01, 0.95, 100
ALIKE = 20  # one row in so many is a copy of another, and as many are nearly one
EPSILON = 2e-6  # where int8 is multiplied as floats, a row's score may end in other bits in another block
BOUND_BYTES = 150  # a row may cost a command this much
SELECT, _FROM_COPY, _FROM_COMPACT = (
    ["select", "--datastore", store, "--targets", "{out}/targets.jsonl", "--quiet"]
    for store in ("{store}", "{copy}", "{out}/compact")
)
COMMANDS: dict[str, list[str]] = {
    "inspect": ["inspect", "{store}", "--quiet"],
    "inspect, verified": ["inspect", "{store}", "--verify", "--quiet"],
    "select": [*SELECT, "--fraction", f"{LARGE}", "--output", "{out}/large.jsonl"],
    "select again": [*SELECT, "--fraction", f"{SMALL}", "--output", "{out}/small.jsonl"],
    "select, rules": [
        *SELECT, "--fraction", f"{LARGE}", "--balance", "skill", "--quota", "dataset=d3:0.1", "--cap", "dataset=0.2",
        "--duplicates", "exact", "--output", "{out}/rules.jsonl",
    ],
    "select, near-duplicates": [
        *SELECT, "--fraction", f"{SMALL}", "--near-duplicates", f"{NEAR}", "--output", "{out}/apart.jsonl",
    ],
    "select, scores": [
        *SELECT, "--fraction", f"{LARGE}", "--output", "{out}/scored.jsonl", "--scores", "{out}/scores.jsonl",
    ],
    "report": [
        "report", "--datastore", "{store}", "--selected", "{out}/scored.jsonl", "--scores", "{out}/scores.jsonl",
        "--output", "{out}/report.html", "--json", "{out}/report.json", "--quiet",
    ],
}  # fmt: skip
LIFE: dict[str, list[str]] = {
    "datastore delete": ["datastore", "delete", "{copy}", "--ids", "{out}/deleted.txt", "--quiet"],
    "datastore verify-deleted": ["datastore", "verify-deleted", "{copy}", "--quiet"],
    "datastore verify-deleted, by id": [
        "datastore", "verify-deleted", "{copy}", "--ids", "{out}/deleted.txt", "--quiet",
    ],
    "select, rows deleted": [*_FROM_COPY, "--fraction", f"{LARGE}", "--output", "{out}/later.jsonl"],
    "datastore compact": [
        "datastore", "compact", "{copy}", "{out}/compact", "--data", "{out}/edited-first.jsonl",
        "--data", "{out}/edited-second.jsonl", "--quiet",
    ],
    "select, compacted": [*_FROM_COMPACT, "--fraction", f"{LARGE}", "--output", "{out}/compacted.jsonl"],
    "datastore convert": [
        "datastore", "convert", "{store}", "{out}/int4", "--feature-dtype", "int4", "--quiet",
    ],
    "datastore split": ["datastore", "split", "{store}", "--output", "{out}/halves", "--quiet"],
    "datastore merge": ["datastore", "merge", "{out}/merged", "{out}/halves/first", "{out}/halves/second", "--quiet"],
}  # fmt: skip
READ = """
import pathlib, sys
buffer = bytearray(2**20)
for path in sorted(pathlib.Path(sys.argv[1]).rglob("*.safetensors")):
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
"""


def main() -> None:
    """Measure, and write the page."""
    parser = options(__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--proj-dim", type=int, default=1024)
    parser.add_argument("--subtasks", type=int, default=50)
    parser.add_argument("--store", type=Path, help="folder that keeps the made-up stores for another run")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.rows < 1600:
        raise SystemExit(f"--rows must be at least 1600, so that rules bind in an eighth of them, got {args.rows}")
    sizes = [args.rows, args.rows // 8]
    if args.smoke:
        args.rounds, args.rows, args.proj_dim, args.subtasks = 0, 400, 64, 3  # the round that warms up
        sizes = [args.rows]  # every process takes seconds to begin
    shard_rows = 32 if args.smoke else 1024
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.store or Path(temporary)).absolute()
        real = make_real(folder / f"real-{args.proj_dim}-{shard_rows}", args.proj_dim, shard_rows)
        with tempfile.TemporaryDirectory(dir=folder) as work:  # beside the stores: their files are linked, not copied
            cases = [Case(folder, Path(work), real, num, args.subtasks) for num in sizes]
            results = in_rounds(cases, args.rounds, args.threads)
            life = through_life(cases, args.threads)
            large = cases[0]
            report = {
                "what": "seconds and peak memory of each command, and bytes of memory a row",
                "case": {
                    "rows": large.num_rows,
                    "an_eighth": cases[-1].num_rows,
                    "proj_dim": args.proj_dim,
                    "checkpoints": len(real.checkpoints),
                    "shard_rows": shard_rows,
                    "subtasks": args.subtasks,
                    "rounds": args.rounds,
                    "threads": args.threads,
                    "deleted": len(large.deleted),
                    "bytes": large.sizes(),
                    "load_average": round(os.getloadavg()[1], 1),
                },
                "machine": machine("numpy"),
                "results": {name: compared(runs[0], runs[-1], large.num_rows) for name, runs in results.items()},
                "life": {name: compared(runs[0], runs[-1], large.num_rows) for name, runs in life.items()},
            }
    write_report(report, as_markdown(report), args.json)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one process took."""

    seconds: float
    """Until it had ended."""
    cpu_seconds: float
    """Of all its threads."""
    peak_bytes: int
    """Most resident memory that was no file's."""


def run(words: Sequence[str], threads: int) -> Run:
    """Run a command and look at its memory every 10 ms; `SystemExit` with what it said if it fails."""
    environment = {"PYTHONPATH": str(Path(__file__).resolve().parents[1]), "OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryFile() as output:
        start, peak = time.perf_counter(), 0
        process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, env=os.environ | environment)
        while True:
            pid, status, used = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(0.01)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            raise SystemExit(f"{' '.join(words)} ended with {process.returncode}: {output.read().decode()[-2000:]}")
    return Run(seconds=seconds, cpu_seconds=used.ru_utime + used.ru_stime, peak_bytes=peak)


def anonymous_bytes(pid: int) -> int:
    """Resident memory of a process that is no file's; 0 once it has ended."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def make_real(folder: Path, proj_dim: int, shard_rows: int) -> Datastore:
    """A store that was built with a made-up model, in two checkpoints: its settings are those of the large ones."""
    store = folder / "store"
    if not (store / "manifest.json").exists():
        model = folder / "model"
        random_llama("tiny", device=torch.device("cpu"), dtype=torch.float32).save_pretrained(model)
        letter_tokenizer().save_pretrained(model)
        write_pool(folder / "pool.jsonl", "real", 40, 40)
        trained = warmup(
            model=model, data=folder / "pool.jsonl", output=folder / "run", fraction=1.0, epochs=2, progress=False
        )
        build_datastore(
            model=model, checkpoints=trained.output, data=folder / "pool.jsonl", datastore=store, proj_dim=proj_dim,
            shard_rows=shard_rows, feature_dtype="int8", progress=False,
        )  # fmt: skip
    return Datastore.open(store)


def original_of(n: int, num_rows: int) -> tuple[int, str]:
    """The row of a block that row n of it is made after, and how: `own`, `near` or `exact`."""
    part = num_rows // ALIKE
    if n >= num_rows - part:
        return n - (num_rows - part), "exact"
    if n >= num_rows - 2 * part:
        return n - (num_rows - 2 * part) + part, "near"
    return n, "own"


def write_pool(path: Path, name: str, num_rows: int, block_rows: int) -> None:
    """Short conversations, a line each; an exact copy has the text of its original."""
    if path.exists():
        return
    generator = np.random.default_rng([num_rows, *name.encode()])
    alphabet = np.array(list("abcdefghijklmnop"))
    shares = 1 / np.arange(1, 21)
    shares /= shares.sum()
    part = path.with_suffix(".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(part, "w", encoding="utf-8") as file:
        for start in range(0, num_rows, block_rows):
            rows = range(start, min(start + block_rows, num_rows))
            letters = generator.choice(alphabet, (len(rows), 72))
            lengths = generator.integers([16, 4], [49, 25], (len(rows), 2)).tolist()
            datasets = generator.choice(20, len(rows), p=shares).tolist()
            skills = generator.integers(0, 40, (len(rows), 3)).tolist()
            num_skills = generator.integers(0, 4, len(rows)).tolist()
            for n, row in enumerate(rows):
                original, how = original_of(n, len(rows))
                m = original if how == "exact" else n
                asked, replied = lengths[m]
                turns = [("user", letters[m, :asked]), ("assistant", letters[m, 48 : 48 + replied])]
                line = {
                    "id": f"{name}-{row:07d}",
                    "messages": [{"role": role, "content": "".join(text)} for role, text in turns],
                    "dataset": f"d{datasets[n]}",
                    "skill": [f"s{skill}" for skill in skills[n][: num_skills[n]]],
                }
                file.write(json.dumps(line) + "\n")
    part.rename(path)


class Case:
    """A store of some size that the commands take for a real one, its pool, and what the commands write."""

    def __init__(self, folder: Path, work: Path, real: Datastore, num_rows: int, num_subtasks: int) -> None:
        """Make pool and store, unless they are there."""
        self.num_rows, self.block_rows = num_rows, real.manifest.shard_rows
        self.halves = {"first": num_rows - num_rows // 2, "second": num_rows // 2}
        path = folder / f"{num_rows}x{real.proj_dim(real.feature_sets[0])}"
        self.store, self.out = path / "store", work / str(num_rows)
        self.copy = self.out / "copy"
        self.pools = [path / f"{name}.jsonl" for name in self.halves]
        for pool, (name, num) in zip(self.pools, self.halves.items(), strict=True):
            write_pool(pool, name, num, self.block_rows)
        make_store(self.store, self.pools, real)
        few = self.out / "few.jsonl"
        write_pool(few, "target", 2 * num_subtasks, 2 * num_subtasks)
        with open(few, encoding="utf-8") as rows, open(self.out / "targets.jsonl", "w", encoding="utf-8") as targets:
            for n, row in enumerate(rows):
                targets.write(json.dumps(json.loads(row) | {"subtask": f"task {n % num_subtasks}"}) + "\n")
        self.deleted: list[str] = []

    def words(self, words: Sequence[str]) -> list[str]:
        """A command with its places filled in, as it is run."""
        places = {"store": self.store, "copy": self.copy, "out": self.out}
        return [sys.executable, "-m", "cli.main", *(word.format(**places) for word in words)]

    def ways(self) -> dict[str, list[str]]:
        """The commands that leave the store as it is, beside the yardsticks."""
        yardsticks = {
            "help": self.words(["--help"]),
            "read": [sys.executable, "-c", READ, str(self.store)],
        }
        return yardsticks | {name: self.words(words) for name, words in COMMANDS.items()}

    def selected(self, name: str) -> list[dict[str, Any]]:
        """The rows that a selection has written."""
        with open(self.out / f"{name}.jsonl", encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    @cached_property
    def large(self) -> list[dict[str, Any]]:
        """The first selection."""
        return self.selected("large")

    def sizes(self) -> dict[str, int]:
        """Bytes of what was read and written."""
        places = {
            "store": [path for path in self.store.rglob("*") if path.is_file()],
            "manifest": [self.store / "manifest.json"],
            "pool": self.pools,
            "kept scores": list(scores_of(self.store).glob("*/scores.npy")),
            "--scores": [self.out / "scores.jsonl"],
        }
        return {name: sum(path.stat().st_size for path in paths) for name, paths in places.items()}

    def check(self) -> None:
        """The gate over what the first round has written."""
        num_large, num_small = (-(-self.num_rows * round(100 * share) // 100) for share in (LARGE, SMALL))
        small, rules, apart, scored = (self.selected(name) for name in ("small", "rules", "apart", "scored"))
        for name, rows, expected in (
            ("select", self.large, num_large), ("select again", small, num_small), ("select, rules", rules, num_large),
            ("select, near-duplicates", apart, num_small), ("select, scores", scored, num_large),
        ):  # fmt: skip
            if len(rows) != expected or len(set(ids(rows))) != expected:
                refuse(name, f"{len(set(ids(rows)))} rows are selected of {expected}")
        if ids(small) != ids(self.large)[:num_small]:
            refuse("select again", "the smaller selection is not the beginning of the larger one")
        if scored != self.large:
            refuse("select, scores", "the selection is not the one without --scores")
        if len({json.dumps(row["messages"]) for row in rules}) < num_large:
            refuse("select, rules", "two rows have one text")
        held = Counter(row["dataset"] for row in rules)
        if max(held.values()) > 0.2 * num_large or held["d3"] < 0.1 * num_large:
            refuse("select, rules", f"the cap or the quota is broken by {held.most_common(3)}")
        if len({self.original(row) for row in apart}) < num_small:
            refuse("select, near-duplicates", "two rows are alike")
        with open(self.out / "scores.jsonl", "rb") as file:
            if (found := sum(1 for _ in file)) != self.num_rows:
                refuse("select, scores", f"{found} rows have a line of {self.num_rows}")
        facts = json.loads((self.out / "report.json").read_text(encoding="utf-8"))
        if (facts["num_rows"], facts["num_selected"]) != (self.num_rows, num_large):
            refuse("report", f"it is of {facts['num_selected']} of {facts['num_rows']} rows")

    def original(self, row: dict[str, Any]) -> tuple[str, int]:
        """Half of the pool and number of the row that a row is made after."""
        name, _, number = row["id"].partition("-")
        start = int(number) - int(number) % self.block_rows
        return name, start + original_of(int(number) - start, min(self.block_rows, self.halves[name] - start))[0]

    def begin_life(self) -> None:
        """Choose what to delete, half of it among the selected rows; a copy to delete from; the pool without it."""
        num, selected = min(MOST_DELETED, self.num_rows // 20) // 2, ids(self.large)
        lines_of = {pool: pool.read_bytes().splitlines(keepends=True) for pool in self.pools}
        names_of = {pool: [json.loads(line)["id"] for line in lines] for pool, lines in lines_of.items()}
        taken = set(selected)
        others = [name for names in names_of.values() for name in names if name not in taken]
        self.deleted = [own[n] for own in (selected, others) for n in np.linspace(0, len(own) - 1, num).astype(int)]
        (self.out / "deleted.txt").write_text("".join(f"{name}\n" for name in self.deleted), encoding="utf-8")
        gone = set(self.deleted)
        for pool, lines in lines_of.items():
            kept = [line for line, name in zip(lines, names_of[pool], strict=True) if name not in gone]
            (self.out / f"edited-{pool.name}").write_bytes(b"".join(kept))
        for own, copy in ((self.store, self.copy), (scores_of(self.store), scores_of(self.copy))):
            shutil.copytree(own, copy, copy_function=os.link)  # no file of a store is ever written into

    def check_step(self, name: str) -> None:
        """The gate over what a step of the store's life has done."""
        if name == "datastore delete" and scores_of(self.copy).exists():
            refuse(name, "scores of deleted rows are still beside the store")
        if name == "select, rows deleted":
            gone, later = set(self.deleted), self.selected("later")
            if gone & set(ids(later)):
                refuse(name, "a deleted row is selected")
            check_same(name, later, [row for row in self.large if row["id"] not in gone])
        if name == "select, compacted":
            check_same(name, self.selected("compacted"), self.selected("later"))
            for folder in (self.copy, self.out / "compact"):
                shutil.rmtree(folder)
                shutil.rmtree(scores_of(folder))
        if name == "datastore convert":
            converted = Datastore.open(self.out / "int4")
            found = {entry.dtype for entry in converted.manifest.features.values()}, converted.num_rows
            if found != ({"int4"}, self.num_rows):
                refuse(name, f"it holds {found}")
            shutil.rmtree(self.out / "int4")
        if name == "datastore merge":
            if Datastore.open(self.out / "merged").manifest.files != Datastore.open(self.store).manifest.files:
                refuse(name, "the files are not those of the store that was split")
            for part in ("halves", "merged"):
                shutil.rmtree(self.out / part)


def scores_of(store: Path) -> Path:
    """Where a store's kept scores lie."""
    return store.with_name(f"{store.name}.scores")


def ids(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Their labels."""
    return [row["id"] for row in rows]


def refuse(name: str, why: str) -> None:
    """Stop: what a command has written is wrong."""
    raise SystemExit(f"{name}: {why}; nothing is timed")


def check_same(name: str, found: Sequence[dict[str, Any]], expected: Sequence[dict[str, Any]]) -> None:
    """Stop unless two selections of one ranking differ in length only: the longer goes on where the other ends."""
    score_of, known = ({row["id"]: row["influence_score"] for row in rows} for rows in (found, expected))
    for own, other in ((score_of, known), (known, score_of)):
        last = min(other.values())
        if any(score - other.get(label, last) > EPSILON for label, score in own.items()):
            refuse(name, "the rows selected are not those of the store before, or score otherwise")


def make_store(folder: Path, pools: Sequence[Path], real: Datastore) -> None:
    """Random unit rows, rendered as a real store's, under its settings; unless they are there."""
    if (folder / "manifest.json").exists():
        return
    sources = [open_source(pool) for pool in pools]
    renderer = Renderer(letter_tokenizer(), RenderConfig(), context_length=real.settings["rendering"]["max_length"])
    with DatastoreWriter.open(
        folder,
        settings=real.settings,
        environment=real.environment,
        feature_sets=real.feature_sets,
        checkpoints=real.checkpoints,
        shard_rows=real.manifest.shard_rows,
    ) as writer:
        numbers = writer.add_sources([entry_of(source) for source in sources])
        source_of: dict[int, Source] = dict(zip(numbers, sources, strict=True))

        def place(key: ShardKey) -> tuple[int, int, int]:
            return key.source, key.start, key.stop

        # rendering is most of the work: a range is rendered once, for all its checkpoints
        for (number, start, stop), keys in groupby(sorted(writer.missing_shards(), key=place), key=place):
            rows = render_range(source_of[number], range(start, stop), renderer, strict=True)
            for key in keys:
                checkpoint, dim = real.checkpoints.index(key.checkpoint), real.proj_dim(key.feature_set)
                writer.write_shard(key, made_up_shard(key, rows, checkpoint, dim))
        for at in writer.missing_directions():
            writer.write_direction(*at, real.direction(*at))
        writer.seal()


def made_up_shard(key: ShardKey, rows: RowRange, checkpoint: int, dim: int) -> Shard:
    """Rendered rows with random unit features, copies and near copies like their originals, and norms of one."""
    generator = np.random.default_rng((key.source, key.start, checkpoint))
    features_NK = generator.standard_normal((key.stop - key.start, dim), dtype=np.float32)
    for n in range(len(features_NK)):
        original, how = original_of(n, len(features_NK))
        if how != "own":
            features_NK[n] = features_NK[original] + (0.1 * features_NK[n] if how == "near" else 0)
    features_NK /= np.linalg.norm(features_NK, axis=1, keepdims=True)
    ones_N = np.ones(len(features_NK), np.float32)
    return Shard(
        rows_N=np.arange(key.start, key.stop),
        ids=[record.id for record in rows.records],
        digests_N=np.array([content_digest(row) for row in rows.rendered], np.uint64),
        features_NK=encode(features_NK, "int8"),
        norms_N=ones_N,
        grad_norms_N=ones_N,
        update_norms_N=ones_N,
        losses_N=ones_N,
        num_tokens_N=np.array([row.num_tokens for row in rows.rendered], np.int32),
        num_supervised_N=np.array([row.num_supervised for row in rows.rendered], np.int32),
        truncated_N=np.array([row.truncated for row in rows.rendered], bool),
    )


def in_rounds(cases: Sequence[Case], num_rounds: int, threads: int) -> dict[str, list[list[Run]]]:
    """The timed runs of each command for each case: of all rounds but the first, which is judged by the gate."""
    runs: dict[str, list[list[Run]]] = {name: [[] for _ in cases] for name in cases[0].ways()}
    for _ in range(num_rounds + 1):
        for n, case in enumerate(cases):
            forget(scores_of(case.store))
            for name, words in case.ways().items():
                runs[name][n].append(said(name, case, run(words, threads)))
            if len(runs["report"][n]) == 1:
                case.check()
    return {name: [own[1:] or own for own in each] for name, each in runs.items()}


def through_life(cases: Sequence[Case], threads: int) -> dict[str, list[list[Run]]]:
    """One run of each step for each case, judged as soon as it is done."""
    runs: dict[str, list[list[Run]]] = {}
    for case in cases:
        case.begin_life()
    for name, words in LIFE.items():
        runs[name] = [[said(name, case, run(case.words(words), threads))] for case in cases]
        for case in cases:
            case.check_step(name)
    return runs


def forget(folder: Path) -> None:
    """Remove a folder, if it is there."""
    if folder.exists():
        shutil.rmtree(folder)


def said(name: str, case: Case, own: Run) -> Run:
    """A run, with a line on standard error: an hour's work, should the rest fail."""
    print(
        f"{case.num_rows:,} rows, {name}: {own.seconds:.1f} s, {own.peak_bytes / 1e6:.0f} MB",
        file=sys.stderr,
        flush=True,
    )
    return own


def compared(large: Sequence[Run], small: Sequence[Run], num_rows: int) -> dict[str, Any]:
    """Medians of the runs over N rows and over N/8, the highest peaks, and what a row adds to these."""
    peaks = [max(own.peak_bytes for own in runs) for runs in (large, small)]
    return {
        "seconds": round(statistics.median(own.seconds for own in large), 2),
        "rounds": [round(own.seconds, 2) for own in large],
        "seconds_of_an_eighth": round(statistics.median(own.seconds for own in small), 2),
        "cpu_seconds": round(statistics.median(own.cpu_seconds for own in large), 2),
        "peak_bytes": peaks[0],
        "peak_bytes_of_an_eighth": peaks[1],
        "bytes_a_row": round((peaks[0] - peaks[1]) / (num_rows - num_rows // 8)),
    }


def as_markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    case, results, life = report["case"], report["results"], report["life"]
    sizes = ", ".join(f"{name} {num / 1e6:,.1f} MB" for name, num in case["bytes"].items())
    dear = [name for name, own in (results | life).items() if own["bytes_a_row"] > BOUND_BYTES]
    lines = [
        f"# The commands over {case['rows']:,} rows", "",
        f"Each in a process of its own, beside {case['an_eighth']:,} rows. int8 features, K = {case['proj_dim']:,}, "
        f"{case['checkpoints']} checkpoints, {case['shard_rows']:,} rows to a shard, two files, "
        f"{case['subtasks']} subtasks of two targets; the model is tiny, so that a target's gradients cost next to "
        f"nothing. On the disk: {sizes}. Files are read from the system's memory. Memory is the most that a process "
        "holds that is no file's; bytes a row are what it grows by, a little less than a row's where the smaller peak "
        "is the model's. "
        f"Above {BOUND_BYTES} bytes a row: {'; '.join(dear) or 'none'}. "
        f"Load average at the end {case['load_average']}: where it is far above the threads in use, others had the "
        "cores too, and CPU seconds say more than seconds.", "",
        machine_in_words(report["machine"]), "",
        f"Median of {case['rounds']} interleaved rounds:", "",
        *table_of(results), "",
        f"The life of a store, once: {case['deleted']} rows are deleted, half of them among the selected ones.", "",
        *table_of(life), "",
        "| command | words |", "| --- | --- |",
        *(f"| {name} | `{' '.join(words)}` |" for name, words in (COMMANDS | LIFE).items()),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def table_of(results: dict[str, dict[str, Any]]) -> list[str]:
    """The lines of a table of what `compared` found."""
    columns = ["command", "seconds", "of an eighth", "CPU seconds", "memory, MB", "of an eighth, MB", "bytes a row"]
    lines = [f"| {' | '.join(columns)} |", f"| {' | '.join('---' for _ in columns)} |"]
    for name, own in results.items():
        cells = [f"{own[key]:.2f}" for key in ("seconds", "seconds_of_an_eighth", "cpu_seconds")]
        cells += [f"{own[key] / 1e6:.0f}" for key in ("peak_bytes", "peak_bytes_of_an_eighth")]
        lines.append(f"| {' | '.join([name, *cells, format(own['bytes_a_row'], ',')])} |")
    return lines


if __name__ == "__main__":
    main()
