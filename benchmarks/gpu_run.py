"""Everything that is to be measured on a GPU, with one command: tests, projection, features.

    python benchmarks/gpu_run.py                            all of it, at most ten minutes
    python benchmarks/gpu_run.py --only tests,projection_r8
    python benchmarks/gpu_run.py --smoke                    tiny models on the CPU: does it run?

No data and no model is needed: weights are random, lengths are those of a real pool (`made_up_models`). Each step is a
process of its own with a time limit, and none stops the others. Results go to `results/gpu_*.json` and `.md`, what a
step that failed had printed to `.log`; the page of the whole run, `results/gpu_run.md`, is written anew after each.
The LESS way is timed on 4 rows and scaled by tokens: it takes one row at a time, however many there are.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import version_of

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
ATTENTION = "q_proj,k_proj,v_proj,o_proj"
_NUM_LAST_LINES = 3


@dataclass(frozen=True, kw_only=True)
class Step:
    """One measurement."""

    name: str
    """Of its files: `gpu_<name>.json`."""
    command: list[str]
    """What Python is called with."""
    limit_seconds: int
    """After which it is stopped."""
    headline: Callable[[dict[str, Any]], str] | None = None
    """What the page says of its report; None where it writes none."""


def main() -> None:
    """Run the steps and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="names of steps, with commas")
    parser.add_argument("--out", type=Path, help="the folder of results; for --smoke one that is thrown away")
    parser.add_argument("--smoke", action="store_true", help="tiny models on the CPU: does it run?")
    args = parser.parse_args()
    steps = smoke_steps() if args.smoke else gpu_steps()
    names = [step.name for step in steps]
    wanted = args.only.split(",") if args.only else names
    if unknown := [name for name in wanted if name not in names]:
        parser.error(f"--only: there is no step {unknown[0]!r}; expected some of {', '.join(names)}")
    with tempfile.TemporaryDirectory() as thrown_away:
        out = args.out or (Path(thrown_away) if args.smoke else HERE / "results")
        out.mkdir(parents=True, exist_ok=True)
        sys.exit(0 if run_all([step for step in steps if step.name in wanted], out) else 1)


def run_all(steps: list[Step], out: Path) -> bool:
    """Run them in turn; whether all were done."""
    about, outcomes = about_this_machine(), []
    print(*about, sep="\n", flush=True)
    for step in steps:
        outcomes.append(run(step, out))
        write_page(about, outcomes, out)
        print(f"{step.name}: {outcomes[-1]['outcome']} ({outcomes[-1]['seconds']} s)", flush=True)
    print((out / "gpu_run.md").read_text(encoding="utf-8"))
    return all(outcome["outcome"] == "done" for outcome in outcomes)


def gpu_steps() -> list[Step]:
    """The real thing."""

    def features(size: str, rank: int, targets: str, rows: int, limit_seconds: int) -> Step:
        command = ["bench_features.py", "--random-llama", size, "--dtype", "bfloat16", "--device", "cuda"]
        command += ["--rank", str(rank), "--lora-targets", targets, "--rows", str(rows), "--rounds", "2"]
        # PEFT keeps each LoRA layer's input in float32: with 16k tokens the plain step would need some 150 GB at 7B
        command += ["--tokens-per-batch", "8192", "--less-way", "--less-rows", "4", "--threads", "4"]
        return benchmark(f"features_{size}_r{rank}", command, limit_seconds, features_headline)

    def projection(rank: int, limit_seconds: int) -> Step:
        command = ["bench_projection.py", "--device", "cuda", "--rank", str(rank), "--rows", "16"]
        return benchmark(f"projection_r{rank}", command, limit_seconds, projection_headline)

    return [
        tests(["tests"], 120),
        projection(8, 40),
        projection(128, 50),
        features("1b", 8, "all-linear", 512, 70),
        features("1b", 128, ATTENTION, 512, 70),
        features("7b", 8, "all-linear", 256, 120),
        features("7b", 128, ATTENTION, 256, 120),
    ]


def smoke_steps() -> list[Step]:
    """The same steps but one size of model, as small as can be, on the CPU."""
    found = []
    for step in gpu_steps():
        if step.name == "tests":
            found.append(tests(["tests/less/projection/test_hashing.py"], 120))
        elif "7b" not in step.name:
            command = ["cpu" if word == "cuda" else word for word in step.command]
            command = ["float32" if word == "bfloat16" else word for word in command]
            found.append(benchmark(step.name, [*command[:-2], "--smoke"], 120, step.headline))
    return found


def tests(paths: list[str], limit_seconds: int) -> Step:
    """The tests that need a GPU. A file that cannot be imported here does not hide the others."""
    flags = ["-m", "gpu", "-q", "--continue-on-collection-errors", "-p", "no:cacheprovider"]
    return Step(name="tests", command=["-m", "pytest", *paths, *flags], limit_seconds=limit_seconds)


def benchmark(
    name: str, command: list[str], limit_seconds: int, headline: Callable[[dict[str, Any]], str] | None
) -> Step:
    """A script of this folder; where it writes to is told it last."""
    return Step(
        name=name, command=[str(HERE / command[0]), *command[1:], "--json", ""], limit_seconds=limit_seconds,
        headline=headline,
    )  # fmt: skip


def run(step: Step, out: Path) -> dict[str, Any]:
    """Run a step to its end or its limit, whatever comes of it."""
    report = out / f"gpu_{step.name}.json"
    command = [*step.command[:-1], str(report)] if step.headline else step.command
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    report.unlink(missing_ok=True)
    start = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=os.environ | environment | {"PYTHONPATH": path},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", timeout=step.limit_seconds,
        )  # fmt: skip
        outcome, output = "done" if done.returncode == 0 else f"failed ({done.returncode})", done.stdout
    except subprocess.TimeoutExpired as stopped:
        outcome = f"stopped after {step.limit_seconds} s"
        output = stopped.stdout.decode(errors="replace") if isinstance(stopped.stdout, bytes) else stopped.stdout or ""
    if outcome == "done" and step.headline and not report.exists():
        outcome = "failed (no report)"
    last = [line.strip() for line in output.splitlines() if line.strip()][-_NUM_LAST_LINES:]
    if outcome != "done":
        (out / f"gpu_{step.name}.log").write_text(output, encoding="utf-8")
        found = " / ".join(last)
    elif step.headline:
        found = step.headline(json.loads(report.read_text(encoding="utf-8")))
    else:
        found = last[-1].strip("= ") if last else ""
    return {
        "step": step.name, "outcome": outcome, "seconds": round(time.monotonic() - start, 1),
        "limit_seconds": step.limit_seconds, "found": found,
    }  # fmt: skip


def projection_headline(report: dict[str, Any]) -> str:
    """Bytes a second, beside a copy's."""
    results = report["results"]
    rates = {name: results[name]["gigabytes_per_second"] for name in ("sparse", "copy")}
    if not all(rates.values()):
        return "too short to give a rate"
    share = rates["sparse"] / rates["copy"]
    return (
        f"Γ, Π and norms at {rates['sparse']:,.0f} GB/s, a copy at {rates['copy']:,.0f} GB/s: {share:.2f} of it; "
        f"{results['sparse']['ratio']:.2f} of a copy's time"
    )


def features_headline(report: dict[str, Any]) -> str:
    """The ratio to the plain step, the share of Γ and Π, memory, and the other ways."""
    results, held = report["results"], report["memory"]
    ours = results["gradsift"]
    said = [f"{ours['ratio']:.2f} of the plain step", f"{ours['tokens_per_second'] or 0:,} tokens/s"]
    if ours["flop_utilisation"]:
        plain = results["plain"]["flop_utilisation"]
        said.append(f"{100 * ours['flop_utilisation']:.0f} % of the GPU's FLOPs (plain: {100 * plain:.0f} %)")
    shares = report["stages"]["shares"]
    said.append(f"Γ, Π, norms {100 * shares['Γ, Π, norms']:.1f} %, setting up {100 * shares['setting up']:.0f} %")
    said.append(
        f"features hold {held['for_features_bytes'] / 1e6:,.0f} MB (a layer's block is "
        f"{held['largest_layer_bytes'] / 1e6:,.0f} MB)"
    )
    if "LESS way" in results and ours["ratio"]:
        said.append(f"the LESS way takes {results['LESS way']['ratio'] / ours['ratio']:.1f} times ours")
    return "; ".join(said)


def about_this_machine() -> list[str]:
    """Hardware, versions, and what of our dependencies is missing."""
    import torch

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = [text.split(">")[0].split("=")[0].strip() for text in project["dependencies"]]
    versions = {name: version_of(name) for name in [*needed, "triton", "pytest", "hypothesis"]}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        device = f"{properties.name}, {properties.total_memory / 2**30:,.0f} GiB, CUDA {torch.version.cuda}"
    else:
        device = "No CUDA device: what needs one fails or skips itself"
    lines = [
        f"{device}; Python {platform.python_version()}; "
        + ", ".join(f"{name} {found}" for name, found in versions.items() if found)
        + "."
    ]
    if missing := [name for name, found in versions.items() if not found]:
        lines += ["", f"**Missing here: {', '.join(missing)}.** Steps that need one of them fail and say so."]
    return lines


def write_page(about: list[str], outcomes: list[dict[str, Any]], out: Path) -> None:
    """The page of the run so far."""
    cells = ([o["step"], o["outcome"], str(o["seconds"]), o["found"].replace("|", "\\|")] for o in outcomes)
    lines = [
        "# The GPU run",
        "",
        *about,
        "",
        "Random weights in bfloat16, rows with a real pool's lengths; rank 8 is on all linear layers, rank 128 on "
        "q, k, v and o. The LESS way is timed on 4 rows and scaled by tokens.",
        "",
        "| step | outcome | seconds | what was found |",
        "| --- | --- | --- | --- |",
        *("| " + " | ".join(row) + " |" for row in cells),
    ]
    (out / "gpu_run.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (out / "gpu_run.json").write_text(
        json.dumps({"about": about, "steps": outcomes}, indent=1) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
