"""Are the numbers the definition's? Every update rule on a real small model, against slow references.

    python benchmarks/fidelity_exact.py --model stories260K --data FOLDER --json benchmarks/results/NAME.json

FOLDER holds `pool.jsonl` (its first `--rows` are used), `target_dolly.jsonl` and `target_gsm8k.jsonl` (every
second target is used). For each update rule:

    gradient error   batched gradients against autograd, a row at a time: worst ‖g - g_ref‖ / ‖g_ref‖; for `sign`,
                     coordinates that rounding decides (below 1e-5 of the row's root mean square) count as stored
    step error       Γ against (θ_before - θ_after) / lr of one float64 step of torch.optim.AdamW (adam only)
    score error      scores of an unprojected store against the definition in float64: worst |difference|
    bias             of projected inner products, mean over seeds, in units of its standard error 1/√(K·seeds)
    rms error        of projected scores, in units of 1/√K; the same for rademacher; their ratio
    shortfall        how far below the exact top-5% threshold the lowest exact score among the selected rows lies,
                     in rms errors: for seed 0, which is what a store has by default, and the worst of all seeds
    Spearman, top-5% of projected against exact scores: reported, no gate, since with Adam scores lie close together
"""

import argparse
import json
import platform
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from datastore import Datastore
from less import build_datastore, score, warmup
from less.adam import UPDATE_RULES, update_direction_ref
from less.adapters import adapted_model
from less.checkpoints import find_checkpoints
from less.data import RenderConfig, Renderer, collate, load_targets, open_source
from less.gradients import gradients_ref
from less.models import ParamLayout, load_base_model, load_tokenizer
from less.moments import AdamState, load_adam_state
from less.projection import ProjectionConfig, make_projector
from less.selection import select_top

NUM_SEEDS = 20
NUM_DENSE_SEEDS = 5
FRACTION = 0.05
STEPPED_ROWS = 20  # rows that a real optimizer steps with
ROUNDING = 1e-5  # of a row's root mean square coordinate


@dataclass(frozen=True)
class Exact:
    """The reference: gradients by autograd and everything else in float64, for C checkpoints."""

    layout: ParamLayout
    weights: list[float]
    states: list[AdamState]
    grads_NP: list[torch.Tensor]
    targets_MP: list[torch.Tensor]
    subtask_M: list[int]


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--proj-dim", type=int, default=1024)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        report = measure(args.model, args.data, Path(work), args.rows, args.proj_dim)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    args.json.with_suffix(".md").write_text(as_markdown(report), encoding="utf-8")
    print(as_markdown(report))


def measure(
    model: Path, data: Path, work: Path, num_rows: int, proj_dim: int, rules: Sequence[str] = UPDATE_RULES
) -> dict:
    """All measures for each of `rules`."""
    pool = work / "pool.jsonl"
    pool.write_bytes(b"".join((data / "pool.jsonl").read_bytes().splitlines(keepends=True)[:num_rows]))
    lines = [line for name in ("dolly", "gsm8k") for line in (data / f"target_{name}.jsonl").read_text().splitlines()]
    targets = [json.loads(line) for line in lines[::2]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warmup(
            model=model, data=pool, output=work / "run", fraction=0.5, epochs=2, batch_size=4, learning_rate=1e-3,
            lora_rank=8, max_length=512, progress=False,
        )  # fmt: skip
    built = build_datastore(
        model=model, checkpoints=work / "run", data=pool, datastore=work / "store", update_rule=list(rules),
        projection="none", max_length=512, tokens_per_batch=2048, progress=False,
    )  # fmt: skip
    store = Datastore.open(work / "store")
    exact = reference(model, work / "run", pool, targets, store)
    return {
        "model": model.name,
        "num_rows": num_rows,
        "num_scored": built.num_scored,
        "num_params": exact.layout.num_params,
        "num_targets": len(exact.subtask_M),
        "num_subtasks": max(exact.subtask_M) + 1,
        "num_seeds": NUM_SEEDS,
        "proj_dim": proj_dim,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, no GPU",
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "gradsift")},
        "rules": {rule: measure_rule(rule, store, exact, targets, proj_dim) for rule in rules},
    }


def reference(model: Path, run: Path, pool: Path, targets: list[dict], store: Datastore) -> Exact:
    """Gradients of the store's rows and of the targets by autograd, a row at a time."""
    base = load_base_model(model)
    renderer = Renderer(load_tokenizer(model), RenderConfig(max_length=512))
    records = open_source(pool).take(store.rows().rows_N.tolist())
    rows = [renderer.render_record(record) for record in records]
    wanted = load_targets(targets, renderer)
    grads_NP, targets_MP, states = [], [], []
    checkpoints = find_checkpoints([run])
    for checkpoint in checkpoints:
        with adapted_model(base, checkpoint.path) as adapted:
            layout = ParamLayout.of(adapted)
            states.append(load_adam_state(checkpoint.path, adapted, layout))
            for rendered, into in ((rows, grads_NP), (wanted.rendered, targets_MP)):
                grads = [gradients_ref(adapted, collate(rendered, [n]))[1] for n in range(len(rendered))]
                into.append(torch.cat([torch.cat(list(blocks.values()), dim=1) for blocks in grads]))
    subtask_M = [wanted.subtasks.index(name) for name in wanted.subtask_of]
    weights = [checkpoint.weight for checkpoint in checkpoints]
    return Exact(layout, weights, states, grads_NP, targets_MP, subtask_M)


def measure_rule(rule: str, store: Datastore, exact: Exact, targets: list[dict], proj_dim: int) -> dict:
    """The measures of one update rule."""
    name, stored_NP, gammas_NP = f"{rule}-none", [], []
    for c, checkpoint in enumerate(store.checkpoints):
        blocks = [b.features_nK * b.norms_n[:, None] for b in store.iter_blocks(name, checkpoint)]
        stored_NP.append(torch.from_numpy(np.concatenate(blocks)))
        moments = flat_moments(exact, c)
        gammas_NP.append(update_direction_ref(rule, exact.grads_NP[c], *moments, **constants(exact.states[c])))
        if rule == "sign":
            gammas_NP[c] = torch.where(signless(exact.grads_NP[c]), stored_NP[c].double().sign(), gammas_NP[c])
    expected_NJ = scores_of(gammas_NP, exact.targets_MP, exact)
    found = score(datastore=store, targets=targets, feature_set=name, progress=False)
    result = {
        "update_error": max(relative_error(s, g) for s, g in zip(stored_NP, gammas_NP, strict=True)),
        "score_error": float(np.abs(found.scores_NJ - expected_NJ).max()),
    }
    if rule == "adam":
        result["step_error"] = max(
            relative_error(stored_NP[c][:STEPPED_ROWS], optimizer_steps(exact, c)) for c in range(len(stored_NP))
        )
    result |= projected(exact, gammas_NP, expected_NJ, proj_dim)
    return result


def signless(grads_NP: torch.Tensor) -> torch.Tensor:
    """Where a coordinate lies below the rounding of a gradient: its sign there is whichever the rounding left."""
    return grads_NP.abs() < ROUNDING * grads_NP.square().mean(dim=1, keepdim=True).sqrt()


def projected(exact: Exact, gammas_NP: list[torch.Tensor], expected_NJ: np.ndarray, proj_dim: int) -> dict:
    """Bias, rms error and selection of scores seen through Π, over the seeds."""
    count = -(-len(expected_NJ) // round(1 / FRACTION))
    exact_N = expected_NJ.max(axis=1)
    top, threshold = set(select_top(exact_N, count).tolist()), np.sort(exact_N)[-count]
    inner_NM, scale_NM = inner_products(gammas_NP[0], exact.targets_MP[0])
    errors, inner_errors, agreement, lowest = [], [], [], []
    for seed in range(NUM_SEEDS):
        phi, psi = project(exact, "sparse", proj_dim, seed, gammas_NP)
        scores_NJ = scores_of(phi, psi, exact)
        picked = select_top(scores_NJ.max(axis=1), count)
        errors.append(scores_NJ - expected_NJ)
        lowest.append(exact_N[picked].min())
        agreement.append((spearman(scores_NJ.max(axis=1), exact_N), len(top & set(picked.tolist())) / count))
        inner_errors.append((inner_products(phi[0], psi[0])[0] - inner_NM) / scale_NM)
    dense_errors = [
        scores_of(*project(exact, "rademacher", proj_dim, seed, gammas_NP), exact) - expected_NJ
        for seed in range(NUM_DENSE_SEEDS)
    ]
    rms_best = root_mean_square([(e + expected_NJ).max(axis=1) - exact_N for e in errors])
    shortfalls = [float(max(0.0, threshold - low) / rms_best) for low in lowest]
    bias_NM = np.mean(inner_errors, axis=0)
    standard_error = 1 / np.sqrt(proj_dim * NUM_SEEDS)
    return {
        "bias": float(np.abs(bias_NM.mean()) / standard_error),
        "bias_rms": root_mean_square(bias_NM) / standard_error,
        "rms_error": root_mean_square(errors) * np.sqrt(proj_dim),
        "rms_error_rademacher": root_mean_square(dense_errors) * np.sqrt(proj_dim),
        "ratio": root_mean_square(errors) / root_mean_square(dense_errors),
        "shortfall": shortfalls[0],
        "worst_shortfall": max(shortfalls),
        "spearman": float(np.mean([rank for rank, _ in agreement])),
        "overlap": float(np.mean([share for _, share in agreement])),
    }


def project(
    exact: Exact, kind: str, proj_dim: int, seed: int, gammas_NP: list[torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Π of every candidate and of every target at every checkpoint, in float32 as a build would have them."""
    projector = make_projector(ProjectionConfig(kind=kind, proj_dim=proj_dim, seed=seed), exact.layout)
    sides = []
    for rows_NP in (gammas_NP, exact.targets_MP):
        sides.append([torch.zeros(len(at_NP), projector.dim) for at_NP in rows_NP])
        for features_NK, at_NP in zip(sides[-1], rows_NP, strict=True):
            for name in exact.layout.names:
                projector.project_add_(features_NK, at_NP[:, exact.layout.slice(name)].float(), name)
    return sides[0], sides[1]


def scores_of(phi: list[torch.Tensor], psi: list[torch.Tensor], exact: Exact) -> np.ndarray:
    """The score's definition, in float64, by matrix products."""
    total_NM = torch.zeros(len(phi[0]), len(psi[0]), dtype=torch.float64)
    for weight, phi_NK, psi_MK in zip(exact.weights, phi, psi, strict=True):
        total_NM += weight * unit(phi_NK) @ unit(psi_MK).T
    columns = [
        [m for m, subtask in enumerate(exact.subtask_M) if subtask == j] for j in range(max(exact.subtask_M) + 1)
    ]
    return torch.stack([total_NM[:, members].mean(dim=1) for members in columns], dim=1).numpy()


def inner_products(x_NP: torch.Tensor, y_MP: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """⟨x, y⟩ and ‖x‖‖y‖ of every pair, in float64."""
    x_NP, y_MP = x_NP.double(), y_MP.double()
    return (x_NP @ y_MP.T).numpy(), (x_NP.norm(dim=1)[:, None] * y_MP.norm(dim=1)).numpy()


def root_mean_square(values: object) -> float:
    """Over all entries."""
    return float(np.sqrt(np.mean(np.square(values))))


def optimizer_steps(exact: Exact, c: int) -> torch.Tensor:
    """(θ_before - θ_after) / lr of one real AdamW step with each of the first rows' gradients, in float64."""
    state, (m_P, v_P) = exact.states[c], flat_moments(exact, c)
    moved, rate = [], 1e-3
    for grad_P in exact.grads_NP[c][:STEPPED_ROWS].double():
        theta_P = torch.zeros_like(grad_P, requires_grad=True)
        optimizer = torch.optim.AdamW(
            [theta_P], lr=rate, betas=(state.beta1, state.beta2), eps=state.eps, weight_decay=0.0
        )
        optimizer.state[theta_P] = {
            "step": torch.tensor(float(state.step)), "exp_avg": m_P.double(), "exp_avg_sq": v_P.double()
        }  # fmt: skip
        theta_P.grad = grad_P
        optimizer.step()
        moved.append(-theta_P.detach() / rate)
    return torch.stack(moved)


def flat_moments(exact: Exact, c: int) -> tuple[torch.Tensor, torch.Tensor]:
    """m and v of a checkpoint as vectors of length P."""
    state = exact.states[c]
    return tuple(torch.cat([part[n].flatten() for n in exact.layout.names]) for part in (state.m, state.v))


def constants(state: AdamState) -> dict:
    """β, ε and t."""
    return {"step": state.step, "beta1": state.beta1, "beta2": state.beta2, "eps": state.eps}


def relative_error(found_NP: torch.Tensor, expected_NP: torch.Tensor) -> float:
    """Worst row: ‖found - expected‖ / ‖expected‖."""
    found_NP, expected_NP = found_NP.double(), expected_NP.double()
    return float(((found_NP - expected_NP).norm(dim=1) / expected_NP.norm(dim=1)).max())


def unit(rows: torch.Tensor) -> torch.Tensor:
    """Rows of norm 1, float64."""
    return torch.nn.functional.normalize(rows.double(), dim=1)


def spearman(a_N: np.ndarray, b_N: np.ndarray) -> float:
    """Rank correlation."""
    ranks = [np.argsort(np.argsort(values)) for values in (a_N, b_N)]
    return float(np.corrcoef(*ranks)[0, 1])


def as_markdown(report: dict) -> str:
    """The report as a page."""
    rows = [
        f"# Exactness on {report['model']}",
        "",
        f"{report['num_scored']} scored of the first {report['num_rows']} rows of the pool, {report['num_targets']} "
        f"targets in {report['num_subtasks']} subtasks, P = {report['num_params']:,}, two checkpoints, "
        f"K = {report['proj_dim']}, {report['num_seeds']} seeds. {report['machine']}; "
        + ", ".join(f"{name} {v}" for name, v in report["versions"].items()) + ".",
        "",
        "| rule | ‖Γ-Γ_ref‖/‖Γ_ref‖ | against AdamW | score error | bias / s.e. | rms · √K | rademacher | ratio "
        "| shortfall / rms | worst of the seeds | Spearman | top 5% |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for rule, m in report["rules"].items():
        step = f"{m['step_error']:.1e}" if "step_error" in m else ""
        rows.append(
            f"| {rule} | {m['update_error']:.1e} | {step} | {m['score_error']:.1e} | {m['bias']:.2f} | "
            f"{m['rms_error']:.2f} | {m['rms_error_rademacher']:.2f} | {m['ratio']:.2f} | {m['shortfall']:.1f} | "
            f"{m['worst_shortfall']:.1f} | {m['spearman']:.3f} | {m['overlap']:.2f} |"
        )
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    main()
