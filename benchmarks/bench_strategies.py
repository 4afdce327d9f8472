"""Seconds and memory of every selection strategy over a million rows, beside the plain best rows.

    OMP_NUM_THREADS=1 python benchmarks/bench_strategies.py --rounds 1 --json benchmarks/results/strategies_cpu.json

    top                 the best 5% of the rows by their best subtask
    min score … pairs   one strategy each, as `STRATEGIES` has them
    near-duplicates     1% of the rows, each compared with all that were taken
    mmr, facility       1% of the rows, out of the best 4%
    composed            balance over skills, with a quota, caps, a threshold for negative targets and duplicates
    labels              `Labels.of` of a column of a million lists, which comes before balance, quotas and caps

The rows are made up: scores of J subtasks in five target sets, datasets of uneven sizes, none to three skills a row, a
twentieth of the rows copies of others, features of some rows close to others'. Every run starts from bare arrays. The
gate: on a few hundred rows of the same making each strategy chooses what its slow twin `choose_ref` does; over all rows
its choice keeps what its config promises. Memory is the peak of the process's resident set above what it was before the
strategy began, which leaves out the candidates' own arrays.
"""

import ctypes
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import machine, machine_in_words, options, table, timed, write_report
from numpy.typing import NDArray

from less.selection import Candidates, Choice, Labels, SelectConfig, choose
from less.selection.reference import choose_ref

FRACTION, FEATURES_FRACTION, TWIN_ROWS = 0.05, 0.01, 240
NEAR = 0.95
STRATEGIES: dict[str, dict[str, Any]] = {
    "top": {},
    "min score": {"min_score": 0.0},
    "token budget": {"token_budget": FRACTION},  # of all tokens
    "turns of subtasks": {"turns": "subtask"},
    "turns of target sets": {"turns": "target-set"},
    "negative targets, weight": {"away_weight": 1.0},
    "negative targets, threshold": {"away_above": 0.01},
    "exact duplicates": {"duplicates": "exact"},
    "caps": {"caps": ["dataset=0.1"]},
    "quotas": {"quotas": ["dataset=0.02"]},
    "balance, one value a row": {"balance": "dataset"},
    "balance, several values": {"balance": "skill"},
    "balance, pairs": {"balance_pairs": "skill"},
    "composed": {
        "balance": "skill",
        "quotas": ["dataset=d3:0.1"],
        "caps": ["dataset=0.2"],
        "away_above": 0.01,
        "duplicates": "exact",
    },
    "near-duplicates": {"near_duplicates": NEAR, "fraction": FEATURES_FRACTION},
    "mmr": {"diversity": "mmr", "fraction": FEATURES_FRACTION},
    "facility location": {"diversity": "facility-location", "fraction": FEATURES_FRACTION},
}


def main() -> None:
    """Measure, and write the page."""
    parser = options(__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--subtasks", type=int, default=50)
    parser.add_argument("--width", type=int, default=256, help="of the features")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.smoke:
        args.rounds, args.rows, args.subtasks, args.width = 1, 2000, 6, 16
    check_against_twin(args.subtasks, args.width)
    pool = MadeUpPool(args.rows, args.subtasks, args.width)
    ways = {name: partial(pool.choose, fields) for name, fields in STRATEGIES.items()}
    meters = {name: Meter(work) for name, work in [*ways.items(), ("labels", pool.read_labels)]}
    results = timed(meters, against="top", rounds=args.rounds, gate=pool.check)
    for name, meter in meters.items():
        results[name] |= meter.measured()
    report = {
        "what": "seconds of each selection strategy, the ratio to plain top-k, and peak memory above the start",
        "case": {
            "rows": args.rows,
            "subtasks": args.subtasks,
            "width": args.width,
            "rounds": args.rounds,
            "fraction": FRACTION,
            "features_fraction": FEATURES_FRACTION,
            "strategies": STRATEGIES,
            "load_average": round(os.getloadavg()[1], 1),
        },
        "machine": machine("numpy"),
        "results": results,
    }
    write_report(report, as_markdown(report), args.json)


class MadeUpPool:
    """Arrays of rows, the same for the same sizes."""

    def __init__(self, num_rows: int, num_subtasks: int, width: int) -> None:
        """Draw them."""
        generator = np.random.default_rng(0)
        self.num_rows = num_rows
        quality_N1 = generator.standard_normal((num_rows, 1), dtype=np.float32)
        self.scores_NJ = generator.standard_normal((num_rows, num_subtasks), dtype=np.float32)
        self.scores_NJ = 0.02 * (self.scores_NJ + quality_N1)
        self.subtasks = [f"task {j}" for j in range(num_subtasks)]
        self.target_sets = [f"set {j * 5 // num_subtasks}" for j in range(num_subtasks)]
        self.away_N = 0.01 * generator.standard_normal(num_rows, dtype=np.float32)
        self.num_tokens_N = np.minimum(1 + generator.lognormal(5, 1, num_rows), 2048).astype(np.int32)
        copied_N = np.arange(num_rows)
        copies = generator.choice(num_rows, num_rows // 20, replace=False)
        copied_N[copies] = generator.integers(0, num_rows, len(copies))
        self.scores_NJ = self.scores_NJ[copied_N]
        self.digests_N = copied_N.astype(np.uint64) * np.uint64(11400714819323198485)
        names = np.array([f"d{n}" for n in range(20)])
        sizes = 1 / np.arange(1, 21)
        self.dataset = names[generator.choice(20, num_rows, p=sizes / sizes.sum())].tolist()
        drawn = generator.integers(0, 40, (num_rows, 3)).tolist()
        num_skills = generator.integers(0, 4, num_rows).tolist()
        self.skill = [[f"s{s}" for s in own[:num]] for own, num in zip(drawn, num_skills, strict=True)]
        self.labels = {"dataset": Labels.of(self.dataset), "skill": Labels.of(self.skill)}
        # a row is one of N/2 kinds and a little of its own, so that about half of the rows have one that is like them
        self.kind_N = generator.integers(0, max(1, num_rows // 2), num_rows)
        self.kinds_Kd = np.empty((max(1, num_rows // 2), width), np.float16)
        for start in range(0, len(self.kinds_Kd), 8192):
            block = generator.standard_normal((min(8192, len(self.kinds_Kd) - start), width), dtype=np.float32)
            self.kinds_Kd[start : start + 8192] = block / np.linalg.norm(block, axis=1, keepdims=True)
        self.own_Nd = (0.1 * generator.standard_normal((64, width)) / width**0.5).astype(np.float32)

    def features_of(self, positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """Unit rows."""
        features_nd = self.kinds_Kd[self.kind_N[positions]] + self.own_Nd[positions % 64]
        return features_nd / np.linalg.norm(features_nd, axis=1, keepdims=True)

    def candidates(self, *, away: bool) -> Candidates:
        """From the bare arrays, without what an earlier run has kept with its labels."""
        return Candidates(
            scores_NJ=self.scores_NJ,
            subtasks=self.subtasks,
            target_sets=self.target_sets,
            away_N=self.away_N if away else None,
            num_tokens_N=self.num_tokens_N,
            digests_N=self.digests_N,
            labels={name: Labels(own.starts_N1, own.codes_L, own.names) for name, own in self.labels.items()},
            features_of=self.features_of,
        )

    def config(self, fields: dict[str, Any]) -> SelectConfig:
        """A strategy's config, where its size depends on the rows."""
        if "token_budget" in fields:
            return SelectConfig(**fields | {"token_budget": int(fields["token_budget"] * self.num_tokens_N.sum())})
        return SelectConfig(**{"fraction": FRACTION} | fields)

    def choose(self, fields: dict[str, Any]) -> Choice:
        """One strategy."""
        has_away = any(name.startswith("away") for name in fields)
        return choose(self.candidates(away=has_away), self.config(fields))

    def read_labels(self) -> Labels:
        """From Python's lists, as a pool's rows hold them."""
        return Labels.of(self.skill)

    def check(self, found: dict[str, Any]) -> None:
        """The gate over all rows."""
        for name, choice in found.items():
            if isinstance(choice, Choice) and (problem := self.problem_of(STRATEGIES[name], choice)):
                raise SystemExit(f"{name}: {problem}; nothing is timed")

    def problem_of(self, fields: dict[str, Any], choice: Choice) -> str | None:
        """What a choice breaks of its config's promises."""
        taken, config = choice.positions, self.config(fields)
        size = len(taken) if config.token_budget is None else int(self.num_tokens_N[taken].sum())
        total = config.token_budget or -(-self.num_rows * round(1000 * (config.fraction or 0)) // 1000)
        best_N = self.scores_NJ.max(axis=1)
        if len(np.unique(taken)) < len(taken):
            return "a row is taken twice"
        if size > total or (size < total and not choice.notes and config.token_budget is None):
            return f"{size} are taken of {total}"
        if set(fields) <= {"min_score"} and not np.array_equal(taken, np.argsort(-best_N, kind="stable")[:size]):
            return "the rows taken are not the best"
        if config.duplicates and len(np.unique(self.digests_N[taken])) < len(taken):
            return "two rows taken are the same"
        if config.away_above is not None and self.away_N[taken].max() >= config.away_above:
            return "a row taken points to what is to be avoided"
        for code in range(len(self.labels["dataset"].names)):
            held = np.isin(self.labels["dataset"].rows_with(code), taken).sum()
            if any(held > cap.amount * total for cap in config.all_caps):
                return "a cap is broken"
            if any(held < quota.amount * total for quota in config.all_quotas if quota.value is None):
                return "a quota is not met"
        if config.near_duplicates is not None:
            some, x_nd = taken[:: max(1, len(taken) // 500)], self.features_of(taken)
            products = self.features_of(some) @ x_nd.T
            products[some[:, None] == taken] = 0
            if products.max() >= config.near_duplicates:
                return "two rows taken are alike"
        return None


def check_against_twin(num_subtasks: int, width: int) -> None:
    """The gate on a few rows: what `choose_ref` chooses, in its order and for its reasons."""
    pool = MadeUpPool(TWIN_ROWS, min(num_subtasks, 6), width)
    for name, fields in STRATEGIES.items():
        choice = pool.choose(fields)
        away = any(field.startswith("away") for field in fields)
        positions, why, passed_over = choose_ref(pool.candidates(away=away), pool.config(fields))
        found = {rule: rows.tolist() for rule, rows in choice.passed_over.items()}
        if (choice.positions.tolist(), choice.why, found) != (positions, why, passed_over):
            raise SystemExit(f"{name}: the rows are not those of choose_ref; nothing is timed")


class Meter:
    """A way whose CPU time and peak memory are written down, with how many rows it took and passed over."""

    def __init__(self, work: Callable[[], Any]) -> None:
        """Nothing has run yet."""
        self.work = work
        self.peaks: list[int | None] = []
        self.cpu_seconds: list[float] = []
        self.numbers: dict[str, int] = {}

    def __call__(self) -> Any:
        """The work's result."""
        before = resident_bytes("VmRSS", reset_peak=True)
        cpu = time.process_time()
        result = self.work()
        self.cpu_seconds.append(time.process_time() - cpu)
        peak = resident_bytes("VmHWM")
        self.peaks.append(None if before is None or peak is None else peak - before)
        if isinstance(result, Choice):
            self.numbers = {"taken": len(result.positions), "passed_over": sum(map(len, result.passed_over.values()))}
        return result

    def measured(self) -> dict[str, Any]:
        """CPU seconds of the timed rounds, all but the first; peak megabytes over all; the numbers of rows."""
        known = [peak for peak in self.peaks if peak is not None]
        return {
            "cpu_seconds": round(statistics.median(self.cpu_seconds[1:]), 2),
            "peak_mb": round(max(known) / 1e6) if known else None,
            **self.numbers,
        }


def resident_bytes(field: str, *, reset_peak: bool = False) -> int | None:
    """A line of /proc/self/status in bytes (Linux; elsewhere None)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    if reset_peak:
        # what an earlier run has freed and the allocator has kept would hide as much of this one's need
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    lines = [line for line in status.read_text().splitlines() if line.startswith(f"{field}:")]
    return int(lines[0].split()[1]) * 1024


def as_markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    case = report["case"]
    lines = [
        f"# Selection strategies over {case['rows']:,} rows × {case['subtasks']} subtasks",
        "",
        f"Made-up scores, labels and features of width {case['width']:,}. {case['fraction']:.0%} of the rows are "
        f"taken; {case['features_fraction']:.0%} where features are compared, by mmr and facility location out of "
        f"the best {4 * case['features_fraction']:.0%}. Ratios are to `top`; median of {case['rounds']} interleaved "
        "rounds. "
        "Peak: resident memory above the start, without the candidates' own arrays, of which the scores are "
        f"{4 * case['rows'] * case['subtasks'] / 1e6:,.0f} MB. Passed over: rows that the walk came to and a rule "
        f"forbade. Load average at the end {case['load_average']}: where it is far above the threads in use, others "
        "had the cores too, and CPU seconds say more than seconds. " + machine_in_words(report["machine"]),
        "",
        *table(
            report["results"],
            cpu_seconds="CPU seconds",
            peak_mb="peak, MB",
            taken="rows taken",
            passed_over="rows passed over",
        ),
        "",
        "| strategy | config |",
        "| --- | --- |",
        *(
            f"| {name} | {', '.join(f'{key} = {value}' for key, value in fields.items())} |"
            for name, fields in case["strategies"].items()
            if fields
        ),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
