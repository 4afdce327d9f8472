"""How many targets: how far does a selection depend on which few examples stand for the wanted capability?

    python benchmarks/evidence_targets.py --store DS --feature-set adam-sparse --examples gsm8k=FILE,FILE --json ...

Of all examples of a kind, two sets of n are drawn that have none in common; each ranks the store's rows by the mean of
its examples' scores. How well the two rankings agree is how much of a ranking is the capability's own:

    Spearman    between the two scores, over the rows
    top 5%      share of the one's best 5% that is among the other's                       chance: 0.05

Mean over draws, and the range that holds 95% of them. Nothing is trained.
"""

from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import machine, machine_in_words, options, write_report
from numpy.typing import NDArray

from datastore import Datastore
from less.data.targets import columns_of
from less.influence import subtask_queries
from less.methods import open_scorer
from less.scan import influence_scores
from less.scoring import ScoreConfig
from less.statistics import spearman, top_overlap

FRACTION = 0.05


def main() -> None:
    """Measure and write the report."""
    parser = options(__doc__)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--feature-set", help="which of its feature sets")
    parser.add_argument("--examples", nargs="+", required=True, metavar="NAME=FILE[,FILE...]")
    parser.add_argument("--most", type=int, default=48, help="examples of a kind, the first of its files")
    parser.add_argument("--sizes", nargs="+", type=int, default=[1, 2, 4, 8, 16, 24])
    parser.add_argument("--draws", type=int, default=50)
    parser.add_argument("--label", default="", help="what the store is of, in words")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = measure(args)
    write_report(found, page_of(found), args.json)


def measure(args: Namespace) -> dict[str, Any]:
    """Agreement of disjoint sets of examples, by kind and size."""
    store = Datastore.open(args.store)
    scorer = open_scorer(store, ScoreConfig(feature_set=args.feature_set, keep_scores=False))
    kinds = {}
    for name, _, files in (entry.partition("=") for entry in args.examples):
        sets = scorer.load_targets([Path(file) for file in files.split(",")])
        examples_NM = scores_of_each(scorer, sets)[:, : args.most]
        kinds[name] = {
            "examples": examples_NM.shape[1],
            "sizes": {
                str(size): agreement(examples_NM, size, args.draws)
                for size in args.sizes
                if 2 * size <= examples_NM.shape[1]
            },
        }
    return {
        "what": __doc__.splitlines()[0], "label": args.label, "feature_set": scorer.feature_set,
        "num_rows": store.num_rows, "checkpoints": len(scorer.checkpoints), "draws": args.draws, "kinds": kinds,
        "machine": machine(),
    }  # fmt: skip


def scores_of_each(scorer: Any, sets: Any) -> NDArray[np.float32]:
    """Σ_c w_c cos(φ_c, ψ_c) of every row with every example, (N, M)."""
    features, sets = scorer.usable_features(sets)
    num_examples = len(columns_of(sets)[1])
    queries = {
        name: subtask_queries(
            psi_MK, range(num_examples), num_examples, aggregate="mean-of-cosines", normalize="cosine"
        )
        for name, psi_MK in features.items()
    }
    weights = {checkpoint.name: checkpoint.weight for checkpoint in scorer.checkpoints}
    return influence_scores(scorer.store, scorer.feature_set, queries, weights)


def agreement(examples_NM: NDArray[np.float32], size: int, draws: int) -> dict[str, Any]:
    """Of two disjoint sets of `size` examples each."""
    generator = np.random.default_rng(size)
    count = max(1, round(FRACTION * len(examples_NM)))
    found: dict[str, list[float]] = {"spearman": [], "top_overlap": []}
    for _ in range(draws):
        order = generator.permutation(examples_NM.shape[1])
        one_N, other_N = (examples_NM[:, own].mean(axis=1) for own in (order[:size], order[size : 2 * size]))
        found["spearman"].append(spearman(one_N, other_N))
        found["top_overlap"].append(top_overlap(one_N, other_N, count))
    result = {}
    for key, values in found.items():
        low, high = np.quantile(values, [0.025, 0.975])
        result[key] = {"value": float(np.mean(values)), "low": float(low), "high": float(high)}
    return result


def page_of(found: dict[str, Any]) -> str:
    """The report as a page."""
    lines = [
        "# How many targets?", "",
        f"{found['label']}: {found['num_rows']:,} rows at {found['checkpoints']} checkpoints, {found['feature_set']}. "
        "Two sets of n examples of one kind, none in both, each rank the rows; how well the rankings agree, mean over "
        f"{found['draws']} draws, and in brackets the range of 95% of them. Chance is 0 and {FRACTION:g}.", "",
        machine_in_words(found["machine"]), "",
        "| examples of | in each set | Spearman | share of the top 5% |", "| --- | --- | --- | --- |",
    ]  # fmt: skip
    for name, kind in found["kinds"].items():
        for size, own in kind["sizes"].items():
            cells = [name, size]
            cells += [f"{v['value']:.2f} [{v['low']:.2f}, {v['high']:.2f}]".replace("-", "−") for v in own.values()]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
