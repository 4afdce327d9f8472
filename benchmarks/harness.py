"""What the speed benchmarks share: interleaved rounds, medians, ratios, and a gate before any number.

Every way of doing the same work runs once a round, in turn, so that whatever else the machine does falls on all of
them alike. The first round warms up and is judged by the gate: a way whose result is wrong is never timed. Ratios
are taken within a round and their median is reported; absolute times are for orientation only.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["agree_on_plan", "machine", "machine_in_words", "options", "table", "timed", "write_report"]


def options(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds, after one that warms up")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--smoke", action="store_true", help="one round of a tiny made-up case: does it run?")
    parser.add_argument("--json", type=Path, help="where to write the result; a page of the same name goes beside it")
    return parser


def timed(
    ways: Mapping[str, Callable[[], Any]],
    *,
    against: str,
    rounds: int,
    gate: Callable[[dict[str, Any]], None],
    wait: Callable[[], None] = lambda: None,
    before: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, Any]]:
    """Seconds and ratios of each way.

    Args:
        ways: name → the work; returns its result.
        against: the way that ratios are taken to.
        rounds: how often each is timed.
        gate: raises if the results of the first round do not agree.
        wait: returns once the device has finished.
        before: makes each run start alike; not timed.

    Returns:
        For each way `seconds` (median), `ratio` (median over rounds) and `ratios`.
    """

    def run(work: Callable[[], Any]) -> tuple[float, Any]:
        before()
        wait()
        start = time.perf_counter()
        result = work()
        wait()
        return time.perf_counter() - start, result

    gate({name: run(work)[1] for name, work in ways.items()})
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, work in ways.items():
            seconds[name].append(run(work)[0])
    found = {}
    for name, own in seconds.items():
        ratios = [one / other for one, other in zip(own, seconds[against], strict=True)]
        found[name] = {
            "seconds": round(statistics.median(own), 3),
            "ratio": round(statistics.median(ratios), 3),
            "ratios": [round(ratio, 3) for ratio in ratios],
        }
    return found


def machine(*others: str) -> dict[str, Any]:
    """What ran it: hardware, and the versions of our own packages and of `others`."""
    import torch

    names = Path("/proc/cpuinfo")
    model = [line.split(":")[1].strip() for line in names.read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": model[0] if model else platform.machine(),
        "cores": len(model),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {name: version_of(name) for name in ("torch", "transformers", "peft", "gradsift", *others)},
    }


def version_of(package: str) -> str | None:
    """Of an installed package; None where it is not, as ours may be that runs from its folder."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine_in_words(where: dict[str, Any]) -> str:
    """What `machine` found, as the end of a paragraph."""
    versions = ", ".join(f"{name} {v or 'not installed'}" for name, v in where["versions"].items())
    return f"{where['gpu'] or where['cpu']}, {where['threads']} of {where['cores']} cores; {versions}."


def table(results: dict[str, dict[str, Any]], **more: str) -> list[str]:
    """The lines of a page's table of what `timed` found.

    Args:
        results: from `timed`.
        more: key in a way's results → title of one more column; a column without any number is left out.
    """
    columns = {key: title for key, title in more.items() if any(found.get(key) for found in results.values())}
    lines = ["| " + " | ".join(["way", "seconds", "ratio", "ratios of the rounds", *columns.values()]) + " |"]
    lines.append("| " + " | ".join(["---"] * (4 + len(columns))) + " |")
    for name, found in results.items():
        cells = [name, f"{found['seconds']:.2f}", f"{found['ratio']:.2f}", ", ".join(map(str, found["ratios"]))]
        cells += ["" if found.get(key) is None else f"{found[key]:,}" for key in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def agree_on_plan(work: Path, plan: dict[str, Any]) -> None:
    """Write down what is done in a folder, or stop where it holds something else."""
    file = work / "plan.json"
    work.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        file.write_text(json.dumps(plan), encoding="utf-8")
    kept = json.loads(file.read_text(encoding="utf-8"))
    for key, value in json.loads(json.dumps(plan)).items():
        if kept.get(key) != value:
            raise SystemExit(f"{work} was begun with other {key}; give another --work")


def write_report(report: dict[str, Any], page: str, path: Path | None) -> None:
    """Print the page; write it and the numbers, if asked to."""
    print(page)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(page, encoding="utf-8")
