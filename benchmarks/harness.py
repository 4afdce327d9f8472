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
from importlib.metadata import version
from pathlib import Path
from typing import Any

__all__ = ["machine", "machine_in_words", "options", "table", "timed", "write_report"]


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
) -> dict[str, dict[str, Any]]:
    """Seconds and ratios of each way.

    Args:
        ways: name → the work; returns its result.
        against: the way that ratios are taken to.
        rounds: how often each is timed.
        gate: raises if the results of the first round do not agree.
        wait: returns once the device has finished.

    Returns:
        For each way `seconds` (median), `ratio` (median over rounds) and `ratios`.
    """
    gate({name: work() for name, work in ways.items()})
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, work in ways.items():
            wait()
            start = time.perf_counter()
            work()
            wait()
            seconds[name].append(time.perf_counter() - start)
    found = {}
    for name, own in seconds.items():
        ratios = [one / other for one, other in zip(own, seconds[against], strict=True)]
        found[name] = {
            "seconds": round(statistics.median(own), 3),
            "ratio": round(statistics.median(ratios), 3),
            "ratios": [round(ratio, 3) for ratio in ratios],
        }
    return found


def machine() -> dict[str, Any]:
    """What ran it."""
    import torch

    names = Path("/proc/cpuinfo")
    model = [line.split(":")[1].strip() for line in names.read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": model[0] if model else platform.machine(),
        "cores": len(model),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "gradsift")},
    }


def machine_in_words(where: dict[str, Any]) -> str:
    """What `machine` found, as the end of a paragraph."""
    versions = ", ".join(f"{name} {v}" for name, v in where["versions"].items())
    return f"{where['gpu'] or where['cpu']}, {where['threads']} of {where['cores']} cores; {versions}."


def table(results: dict[str, dict[str, Any]]) -> list[str]:
    """The lines of a page's table of what `timed` found."""
    return [
        "| way | seconds | ratio | ratios of the rounds |",
        "| --- | --- | --- | --- |",
        *(
            f"| {name} | {found['seconds']:.2f} | {found['ratio']:.2f} | {', '.join(map(str, found['ratios']))} |"
            for name, found in results.items()
        ),
    ]


def write_report(report: dict[str, Any], page: str, path: Path | None) -> None:
    """Print the page; write it and the numbers, if asked to."""
    print(page)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(page, encoding="utf-8")
