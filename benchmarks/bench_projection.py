"""Seconds to turn a batch's per-sample gradients into features: Γ, Π and both norms, beside moving the bytes.

    python benchmarks/bench_projection.py --rank 128 --rows 16 --json benchmarks/results/NAME.json

    copy              the gradients copied once: what a pass over them costs, read and written
    sparse            ours, as `less.features` calls it: on CUDA the kernel, which reads them once and writes nothing
    sparse, PyTorch   ours without kernels (on a CPU the same as `sparse`, and left out)
    index-scatter     the same Π by `index_add_`, with columns and signs looked up
    rademacher        ours, dense, for context: at `--dense-dim`, its time grows with K

The gradients are random, in the shapes of LoRA on every linear layer of SmolLM2-135M, with the rule `adam`. They
are kept, so every way but the kernel has to copy them first. The gate: all ways of the sparse Π agree to 1e-5 of
a feature's norm, and the dense features have the norms that they should have.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from harness import machine, machine_in_words, options, timed, write_report
from torch import Tensor

from less.adam import PreparedRule, UpdateRule
from less.models import ParamLayout, resolve_device
from less.projection import ProjectionConfig, Projector, make_projector
from less.projection.hashing import hash_index, make_key
from less.projection.sparse import SparseProjector

FLOAT_BYTES = 4


@dataclass(frozen=True)
class Features:
    """What one way gives for a batch."""

    features_BK: Tensor
    grad_norms_B: Tensor
    update_norms_B: Tensor


class WithoutKernels(SparseProjector):
    """The twin in PyTorch, on any device."""

    @staticmethod
    def _runs_kernels(device: torch.device) -> bool:
        return False


@dataclass(frozen=True)
class Case:
    """Gradients of one batch, and Γ of each parameter."""

    layout: ParamLayout
    grads: dict[str, Tensor]
    rules: dict[str, PreparedRule]
    config: ProjectionConfig
    device: torch.device

    @classmethod
    def random(cls, layout: ParamLayout, num_rows: int, config: ProjectionConfig, device: torch.device) -> "Case":
        """Gradients and moments as large as each other."""
        rule = UpdateRule(name="adam", beta1=0.9, beta2=0.999, eps=1e-8, step=100)
        grads, rules = {}, {}
        for name, size in zip(layout.names, layout.sizes, strict=True):
            m_p, v_p = torch.randn(size, device=device) * 1e-3, torch.randn(size, device=device).square() * 1e-6
            grads[name], rules[name] = torch.randn(num_rows, size, device=device) * 1e-3, rule.prepare(m_p, v_p)
        return cls(layout, grads, rules, config, device)

    @property
    def num_rows(self) -> int:
        """B."""
        return len(next(iter(self.grads.values())))

    def by_projector(self, projector: Projector) -> Features:
        """As `less.features` does it."""
        sums = projector.new_sums(self.num_rows, self.device)
        for name, grads_Bp in self.grads.items():
            projector.add_updates_(sums, grads_Bp, name, self.rules[name])
        return Features(sums.features_BK, sums.grad_norms_B, sums.update_norms_B)

    def by_scatter(self, columns: dict[str, Tensor], signs: dict[str, Tensor]) -> Features:
        """With each coordinate's column and sign looked up."""
        features_BK = torch.zeros(self.num_rows, self.config.proj_dim, device=self.device)
        grad_squares_B, update_squares_B = torch.zeros(2, self.num_rows, device=self.device)
        for name, grads_Bp in self.grads.items():
            grad_squares_B += torch.linalg.vector_norm(grads_Bp, dim=1).square()
            updates_Bp = self.rules[name].apply_(grads_Bp.clone())
            update_squares_B += torch.linalg.vector_norm(updates_Bp, dim=1).square()
            features_BK.index_add_(1, columns[name], updates_Bp.mul_(signs[name]))
        return Features(features_BK, grad_squares_B.sqrt(), update_squares_B.sqrt())

    def looked_up(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The column and the sign of every coordinate, by the definition."""
        columns, signs, dim, seed = {}, {}, self.config.proj_dim, self.config.seed
        for name, size in zip(self.layout.names, self.layout.sizes, strict=True):
            index = torch.arange(size, device=self.device)
            columns[name] = (index + hash_index(make_key(seed, name, "rotation"), index // dim) % dim) % dim
            signs[name] = 1.0 - 2.0 * (hash_index(make_key(seed, name, "sign"), index) >> 31)
        return columns, signs


def main() -> None:
    """Measure, and write the table."""
    parser = options(__doc__)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rows", type=int, default=16, help="rows of a batch")
    parser.add_argument("--proj-dim", type=int, default=8192)
    parser.add_argument("--dense-dim", type=int, default=32, help="K of the dense projection")
    parser.add_argument("--batches", type=int, help="batches each way does in a round (default: 1, on CUDA 20)")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    if args.smoke:
        args.rounds, args.rank, args.rows, args.proj_dim = 1, 4, 3, 101
    device = resolve_device(args.device)
    on_gpu = device.type == "cuda"
    num_batches = args.batches or (20 if on_gpu else 1)
    layout = (
        llama_layout(args.rank, num_layers=1, hidden=32, kv=16, inner=48) if args.smoke else llama_layout(args.rank)
    )
    case = Case.random(layout, args.rows, ProjectionConfig(proj_dim=args.proj_dim), device)

    results = timed(
        {name: repeated(work, num_batches) for name, work in ways_of(case, args.dense_dim, on_gpu=on_gpu).items()},
        against="copy",
        rounds=args.rounds,
        gate=lambda found: check(found, args.dense_dim),
        wait=torch.cuda.synchronize if on_gpu else lambda: None,
    )
    grad_bytes = FLOAT_BYTES * args.rows * layout.num_params
    moved = {"copy": 2 * grad_bytes, "sparse": grad_bytes + 2 * FLOAT_BYTES * layout.num_params}
    for name, num_bytes in moved.items():
        seconds = results[name]["seconds"] / num_batches
        results[name]["gigabytes_per_second"] = round(num_bytes / seconds / 1e9, 1) if seconds else None
    report = {
        "what": "seconds for Γ, Π and both norms of a batch's per-sample gradients, and the ratio to copying them",
        "case": {
            "layers": "LoRA on every linear layer" + (" of a tiny Llama" if args.smoke else " of SmolLM2-135M"),
            "rank": args.rank,
            "parameters": len(layout.names),
            "grad_dim": layout.num_params,
            "rows": args.rows,
            "proj_dim": args.proj_dim,
            "dense_dim": args.dense_dim,
            "device": str(device),
            "batches": num_batches,
            "rounds": args.rounds,
            "bytes_a_batch": moved,
        },
        "machine": machine(),
        "results": results,
    }
    write_report(report, as_markdown(report), args.json)


def llama_layout(
    rank: int, *, num_layers: int = 30, hidden: int = 576, kv: int = 192, inner: int = 1536
) -> ParamLayout:
    """LoRA on every linear layer of a Llama, by default of SmolLM2-135M: q, k, v, o, gate, up, down."""
    sizes = [(hidden, hidden), (hidden, kv), (hidden, kv), (hidden, hidden)]  # in, out
    sizes += [(hidden, inner), (hidden, inner), (inner, hidden)]
    shapes = {}
    for n in range(num_layers):
        for linear, (inputs, outputs) in enumerate(sizes):
            shapes[f"layers.{n}.linear.{linear}.lora_A.weight"] = (rank, inputs)
            shapes[f"layers.{n}.linear.{linear}.lora_B.weight"] = (outputs, rank)
    return ParamLayout(tuple(shapes), tuple(shapes.values()))


def ways_of(case: Case, dense_dim: int, *, on_gpu: bool) -> dict[str, Callable[[], Features | None]]:
    """Every way by its name, made ready."""
    buffers = {name: torch.empty_like(grads_Bp) for name, grads_Bp in case.grads.items()}
    sparse = make_projector(case.config, case.layout)
    twin = WithoutKernels(case.config, case.layout)
    dense = make_projector(ProjectionConfig(kind="rademacher", proj_dim=dense_dim), case.layout)
    looked_up = case.looked_up()

    def copy() -> None:
        for name, grads_Bp in case.grads.items():
            buffers[name].copy_(grads_Bp)

    ways: dict[str, Callable[[], Features | None]] = {"copy": copy, "sparse": lambda: case.by_projector(sparse)}
    if on_gpu:
        ways["sparse, PyTorch"] = lambda: case.by_projector(twin)
    ways["index-scatter"] = lambda: case.by_scatter(*looked_up)
    ways["rademacher"] = lambda: case.by_projector(dense)
    return ways


def repeated(work: Callable[[], Any], times: int) -> Callable[[], Any]:
    """The last of as many results."""

    def run() -> Any:
        for _ in range(times - 1):
            work()
        return work()

    return run


def check(found: dict[str, Features | None], dense_dim: int) -> None:
    """The gate."""
    expected = found["index-scatter"]
    for name, own in found.items():
        if own is None:
            continue
        pairs = [(own.grad_norms_B, expected.grad_norms_B), (own.update_norms_B, expected.update_norms_B)]
        if name != "rademacher":
            pairs.append((own.features_BK, expected.features_BK))
        for a, b in pairs:
            error = float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b))
            if not error <= 1e-5:
                raise SystemExit(f"{name} disagrees with index-scatter by {error:.1e}; nothing is timed")
    dense = found["rademacher"]
    ratios_B = torch.linalg.vector_norm(dense.features_BK, dim=1).square() / dense.update_norms_B.square()
    worst = float((ratios_B - 1).abs().max()) / sqrt(2 / dense_dim)
    if not worst <= 6:
        raise SystemExit(f"rademacher: a squared norm is off by {worst:.1f} standard errors; nothing is timed")


def as_markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    case = report["case"]
    megabytes = {name: num_bytes / 1e6 for name, num_bytes in case["bytes_a_batch"].items()}
    lines = [
        f"# Γ and Π of {case['rows']} rows: {case['layers']}, rank {case['rank']}",
        "",
        f"{case['parameters']} parameters, P = {case['grad_dim']:,}, K = {case['proj_dim']:,} (rademacher: "
        f"{case['dense_dim']}). A batch's floor is {megabytes['sparse']:,.1f} MB read; the copy moves "
        f"{megabytes['copy']:,.1f} MB. Seconds are of {case['batches']} batch(es), median of {case['rounds']} "
        "interleaved rounds. " + machine_in_words(report["machine"]),
        "",
        "| way | seconds | ratio to a copy | ratios of the rounds | GB/s |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {name} | {found['seconds']:.3f} | {found['ratio']:.2f} | {', '.join(map(str, found['ratios']))} "
            f"| {found.get('gigabytes_per_second') or ''} |"
            for name, found in report["results"].items()
        ),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
