"""Features in few bits: what each byte of a stored row is worth, on the real gradients of a finished store.

    python benchmarks/fidelity_storage.py --store DS --feature-set adam-sparse --targets gsm8k=FILE bbh=FILE --json ...

Rows of K columns are kept as float32, float16, int8, int4 or binary (`datastore.coding`), and as FAISS's scalar
quantizers keep them. Narrower rows are made by folding: columns K / 2^h apart are added with random signs, which is a
sparse projection again. So a byte can be spent on columns or on bits:

    Spearman    with the score of the rows as float32 at the full K, the highest over a set's subtasks
    top 5%      share of that score's best 5% that is among the way's own                  chance: 0.05
    scan        seconds per million rows and checkpoint, the store's subtasks as queries, one interleaved run

What the projection to K costs already is not seen here, but in `fidelity_cheaper.py`. Intervals: 95%, percentile
bootstrap over the pool's rows.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import machine, machine_in_words, options, timed, write_report
from numpy.typing import NDArray

from datastore import Block, Datastore
from datastore.coding import CODES_A_BYTE, FEATURE_DTYPES, as_float32, encode, row_bytes
from datastore.search import import_faiss
from less.data.targets import columns_of
from less.influence import subtask_queries
from less.methods import open_scorer
from less.scan import _Scan
from less.scoring import ScoreConfig
from less.statistics import bootstrap, spearman, top_overlap

FRACTION = 0.05
FAISS_CODECS = {"FAISS QT_8bit": "QT_8bit", "FAISS QT_4bit": "QT_4bit"}
Rows = dict[str, NDArray[np.float32]]


def main() -> None:
    """Measure and write the report."""
    parser = options(__doc__)
    parser.add_argument("--store", type=Path, required=True, help="a store of float16 or float32 features")
    parser.add_argument("--feature-set", help="which of its feature sets")
    parser.add_argument("--targets", nargs="+", required=True, metavar="NAME=FILE")
    parser.add_argument("--halvings", type=int, default=3, help="how often K is halved")
    parser.add_argument("--resamples", type=int, default=500)
    parser.add_argument("--label", default="", help="what the store is of, in words")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = measure(args)
    write_report(found, page_of(found, args.json.stem if args.json else "storage"), args.json)
    if args.json:
        draw(found, args.json.with_suffix(".png"))


def measure(args: Any) -> dict[str, Any]:
    """Every way's fidelity, bytes and time."""
    store = Datastore.open(args.store)
    scorer = open_scorer(store, ScoreConfig(feature_set=args.feature_set), progress=False)
    sets = scorer.load_targets({name: Path(file) for name, _, file in (t.partition("=") for t in args.targets)})
    columns, subtask_M = columns_of(sets)
    weights = {checkpoint.name: checkpoint.weight for checkpoint in scorer.checkpoints}
    psi = {name: psi_MK.numpy() for name, psi_MK in scorer.target_features(sets)}
    rows = {
        name: np.concatenate([as_float32(b.features_nK) for b in store.iter_blocks(scorer.feature_set, name)])
        for name in weights
    }
    sets_J = [name for name, _ in columns]

    def queries(psi_MK: NDArray[np.float32]) -> NDArray[np.float32]:
        return subtask_queries(
            torch.from_numpy(psi_MK), subtask_M, len(columns), aggregate="mean-of-cosines", normalize="cosine"
        ).numpy()

    def scores(own: Rows, queries_JK: Rows) -> dict[str, NDArray[np.float32]]:
        scores_NJ = np.sum([weight * own[name] @ queries_JK[name].T for name, weight in weights.items()], axis=0)
        columns_of_set = {name: [j for j, at in enumerate(sets_J) if at == name] for name in sets_J}
        return {name: scores_NJ[:, own_columns].max(axis=1) for name, own_columns in columns_of_set.items()}

    width = next(iter(rows.values())).shape[1]
    exact = scores(rows, {name: queries(psi_MK) for name, psi_MK in psi.items()})
    ways = []
    for halvings in range(args.halvings + 1):
        K = width >> halvings
        if width % (1 << halvings) or K % max(CODES_A_BYTE.values()):
            break
        folded = {name: unit(fold(rows_NK, K)) for name, rows_NK in rows.items()}
        queries_JK = {name: queries(fold(psi_MK, K)) for name, psi_MK in psi.items()}
        codecs: dict[str, Callable[[NDArray[np.float32]], NDArray[np.float32]]] = {
            dtype: lambda x, dtype=dtype: as_float32(encode(x, dtype)) for dtype in FEATURE_DTYPES
        }
        if not halvings:
            codecs |= {name: partial(through_faiss, kind) for name, kind in FAISS_CODECS.items()}
        for dtype, through in codecs.items():
            found = scores({name: through(own_NK) for name, own_NK in folded.items()}, queries_JK)
            size = row_bytes(dtype, K) if dtype in FEATURE_DTYPES else K // (2 if "4bit" in dtype else 1)
            agreement = judged(exact, found, args.resamples)
            ways.append({"dtype": dtype, "proj_dim": K, "row_bytes": size, "sets": agreement})
    name = next(iter(weights))
    return {
        "what": __doc__.splitlines()[0], "label": args.label, "feature_set": scorer.feature_set,
        "num_rows": store.num_rows, "checkpoints": len(weights), "num_subtasks": len(columns),
        "kurtosis": kurtosis(rows[name]), "ways": ways, "rounds": args.rounds,
        "scan": scan_times(rows[name], queries(psi[name]), args.rounds), "machine": machine("faiss-cpu"),
    }  # fmt: skip


def judged(exact: Mapping[str, NDArray], found: Mapping[str, NDArray], num_resamples: int) -> dict[str, Any]:
    """Agreement of each set's scores with the exact ones."""
    result: dict[str, Any] = {}
    for name, exact_N in exact.items():
        count = max(1, round(FRACTION * len(exact_N)))
        statistics = {"spearman": spearman, "top_overlap": partial(top_overlap, count=count)}
        result[name] = {}
        for key, statistic in statistics.items():
            own = bootstrap(statistic, exact_N, found[name], num_resamples=num_resamples)
            result[name][key] = {"value": own.value, "low": own.low, "high": own.high}
    return result


def fold(rows_NK: NDArray[np.float32], width: int) -> NDArray[np.float32]:
    """Columns that are `width` apart added, each with a random sign of its own."""
    if rows_NK.shape[1] == width:
        return rows_NK
    signs_K = np.random.Generator(np.random.Philox(key=7)).choice(np.array([-1, 1], np.float32), rows_NK.shape[1])
    return (rows_NK * signs_K).reshape(len(rows_NK), -1, width).sum(axis=1)


def unit(rows_NK: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows of length 1."""
    return rows_NK / np.linalg.norm(rows_NK, axis=1)[:, None]


def kurtosis(rows_NK: NDArray[np.float32]) -> float:
    """Mean over rows of the fourth moment of their coordinates over the squared second: 3 for a normal distribution."""
    return float(np.mean((rows_NK**4).mean(axis=1) / (rows_NK**2).mean(axis=1) ** 2))


def through_faiss(kind: str, rows_NK: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows coded and decoded by one of FAISS's scalar quantizers, trained on them."""
    faiss = import_faiss()
    quantizer = faiss.ScalarQuantizer(rows_NK.shape[1], getattr(faiss.ScalarQuantizer, kind))
    quantizer.train(rows_NK)
    decoded: NDArray[np.float32] = quantizer.decode(quantizer.compute_codes(rows_NK))
    return decoded


def scan_times(rows_NK: NDArray[np.float32], query_JK: NDArray[np.float32], rounds: int) -> dict[str, Any]:
    """Seconds of `less.scan` over these rows, kept in each way; stops if one gives other scores than its rows have."""
    stored = {dtype: encode(rows_NK, dtype) for dtype in FEATURE_DTYPES}

    def scan(dtype: str) -> NDArray[np.float32]:
        scores_NJ = np.zeros((len(rows_NK), len(query_JK)), np.float32)
        block = Block(start=0, features_nK=stored[dtype], norms_n=np.ones(len(rows_NK), np.float32))
        _Scan(torch.from_numpy(query_JK), torch.device("cpu")).add(block, "cosine", scores_NJ)
        return scores_NJ

    def gate(found: dict[str, NDArray[np.float32]]) -> None:
        for dtype, scores_NJ in found.items():
            worst = np.abs(scores_NJ - as_float32(stored[dtype]) @ query_JK.T).max()
            if worst > 3e-4 * np.linalg.norm(query_JK, axis=1).max():
                raise SystemExit(f"the scan of {dtype} rows is off by {worst:.1e}; nothing is timed")

    ways = {dtype: partial(scan, dtype) for dtype in FEATURE_DTYPES}
    results = timed(ways, against="float16", rounds=rounds, gate=gate)
    for dtype, own in results.items():
        own["seconds_a_million_rows"] = round(own["seconds"] * 1e6 / len(rows_NK), 1)
        own["row_bytes"] = row_bytes(dtype, rows_NK.shape[1])
    return results


def page_of(found: dict[str, Any], stem: str) -> str:
    """The report as a page."""
    names = list(found["ways"][0]["sets"])
    width = found["ways"][0]["proj_dim"]
    lines = [
        "# What a byte of a stored row is worth", "",
        f"{found['label']}: {found['num_rows']:,} rows at {found['checkpoints']} checkpoints, {found['feature_set']}, "
        f"{found['num_subtasks']} subtasks of {', '.join(names)}. Kurtosis of a row's coordinates: "
        f"{found['kurtosis']:.2f} (a normal distribution has 3).", "",
        machine_in_words(found["machine"]), "",
        f"Against the scores of the same rows as float32 at K = {width:,}; mean over the target sets, in brackets the "
        "worst of them. Sorted by bytes.", "", f"![Fidelity by bytes]({stem}.png)", "",
        "| bytes a row and checkpoint | kept as | K | Spearman | top 5% |", "| --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for way in sorted(found["ways"], key=lambda way: (-way["row_bytes"], way["dtype"])):
        cells = [f"{way['row_bytes']:,}", way["dtype"], f"{way['proj_dim']:,}"]
        for key, digits in (("spearman", 4), ("top_overlap", 3)):
            values = [own[key]["value"] for own in way["sets"].values()]
            cells.append(f"{np.mean(values):.{digits}f} ({min(values):.{digits}f})")
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "", f"## Time of the scan, K = {width:,}", "",
        f"{found['num_subtasks']} queries, rows in memory, ratio to float16 in {found['rounds']} interleaved rounds. "
        "Coded rows are multiplied as integers, with queries of two digits.", "",
        "| kept as | bytes a row | seconds a million rows | ratio |", "| --- | --- | --- | --- |",
    ]  # fmt: skip
    for dtype, own in found["scan"].items():
        lines.append(f"| {dtype} | {own['row_bytes']:,} | {own['seconds_a_million_rows']} | {own['ratio']:.2f} |")
    lines += ["", "## By target set, with 95% intervals", "", "| set | kept as | K | Spearman | top 5% |"]
    lines += ["| --- | --- | --- | --- | --- |"]
    for name in names:
        for way in found["ways"]:
            own = way["sets"][name]
            cells = [name, way["dtype"], f"{way['proj_dim']:,}"]
            cells += [
                f"{own[key]['value']:.{d}f} [{own[key]['low']:.{d}f}, {own[key]['high']:.{d}f}]"
                for key, d in (("spearman", 4), ("top_overlap", 3))
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def draw(found: dict[str, Any], path: Path) -> None:
    """Loss of rank agreement over bytes, a line for each way of keeping a number."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for dtype in dict.fromkeys(way["dtype"] for way in found["ways"]):
        ways = [way for way in found["ways"] if way["dtype"] == dtype]
        lost = [1 - np.mean([own["spearman"]["value"] for own in way["sets"].values()]) for way in ways]
        axes.plot([way["row_bytes"] for way in ways], np.maximum(lost, 1e-6), marker="o", label=dtype)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("bytes a row and checkpoint")
    axes.set_ylabel("1 − Spearman with float32 at the full K (lower is better)")
    axes.legend(title="kept as")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
