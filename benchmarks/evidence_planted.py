"""Planted truth: does a score find the rows of its own task, and does it tell a corrupted reply from a sound one?

    python benchmarks/evidence_planted.py prepare    --work DIR --model M --pool POOL
    python benchmarks/evidence_planted.py build      --work DIR
    python benchmarks/evidence_planted.py corrupted  --work DIR --targets NAME=FILE ...
    python benchmarks/evidence_planted.py provenance --work DIR --store STORE --targets NAME=FILE ...
    python benchmarks/evidence_planted.py report     --work DIR --json benchmarks/results/NAME.json

Two tests whose right answer is known before any training, for every way of scoring: five update rules, each as cosine
and as inner product (`none`), and what they have to beat: rds, bm25, length, perplexity (highest first) and random
numbers.

**Provenance.** A target's right rows are the pool's rows of its own dataset and subtask. For each subtask with at
least five of them, from the subtask's own scores of all rows of a finished store:

    R-precision   of the R best rows, the share that are among the R right ones      chance: R / N
    AUC           P(a right row scores above another one), over all rows and over those of the target's dataset

The mean over subtasks, with its 95% percentile bootstrap interval over subtasks; a score is **better or worse than**
`bm25` where the interval of the difference, over the same resamples, leaves 0 out. Chance and bm25 are no formality:
what one task's rows share is above all their wording, which bm25 sees best, so this test shows that a score means
something, not that a selection trains well.

**Corrupted replies** ("shirkers", Kaur et al., Instruct-SkillMix, 2024). Of a pool's rows a fraction is drawn. Half
of those are swapped: each gets the reply of another one of the same dataset and subtask, or where there is none that
differs, of the same dataset; a row for which there is none at all stays as it is and counts as clean. The other half,
drawn from the rows with at least two words in their reply, is cut to the first quarter of its words, at least one.
The warm-up trains on other rows of the pool, all clean, so that no row that is scored was trained on. With score(z)
the highest over a target's subtasks, as in a selection, over the rows of the target's dataset and over all rows, for
either kind:

    AUC           P(a clean row scores above a corrupted one); 0.5 is chance, below it a score prefers what is corrupted

Clean rows are those that could have been corrupted so: for the cut ones, those with two words or more. Intervals are
over rows. A score **prefers clean rows** where the interval lies above 0.5, **prefers corrupted ones** where it lies
below, and is **better or worse than** `length` where the interval of the difference, over the same resamples, leaves
0 out. Intervals are not corrected for the number of scores.

Expected, said before the first run:

1. Cut: `length` needs no model to see it (AUC far above 0.5), so a score shows something of its own only where it is
   better than `length`; inner products favour short rows, so they prefer cut ones.
2. Swapped: drawn rows only exchange replies, so `length` and `random` know nothing (0.5) and bm25 hardly anything;
   `perplexity` prefers swapped rows. Whether a gradient or an embedding tells them apart is open.
3. Provenance: bm25 first, then rds, then the gradients, `adam`'s no better than `sgd`'s; `length` and `random` at
   chance.

What is finished is kept: a stage that is started again does what is missing.
"""

import argparse
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from evidence_datamodel import short_rows
from evidence_first_order import as_json, in_words
from harness import agree_on_plan, machine, machine_in_words, write_report
from numpy.typing import NDArray

from datastore import Datastore
from datastore.errors import DataError, SettingError
from less import InfluenceScores, ScoreConfig, build_datastore, build_embeddings, warmup
from less.adam import UPDATE_RULES
from less.data import RenderConfig, Renderer, RowProblem, open_source
from less.influence import NORMALIZERS
from less.methods import open_scorer
from less.models import load_tokenizer
from less.pool import Pool
from less.scoring import open_renderer
from less.statistics import NUM_RESAMPLES, auc, bootstrap, r_precision

BASELINES = ("rds", "bm25", "length", "perplexity", "random")
LEAST_RIGHT_ROWS = 5
KINDS = ("swapped", "cut")
MEASURES = {"r_precision": "R-precision", "auc": "AUC", "auc_within_dataset": "AUC within the dataset"}

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def main() -> None:
    """Run one stage."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    stages = parser.add_subparsers(required=True)
    own = stage(stages, "prepare", prepare)
    own.add_argument("--model", required=True)
    own.add_argument("--label", help="what to call the model on the page; the folder's name by default")
    own.add_argument("--pool", type=Path, required=True)
    own.add_argument("--rows", type=int, default=600)
    own.add_argument("--warmup-rows", type=int, default=120, help="further rows, which only the warm-up sees")
    own.add_argument("--max-tokens", type=int, default=192, help="of a row, before it is corrupted")
    own.add_argument("--fraction", type=float, default=0.2, help="of the rows, to corrupt")
    own.add_argument("--seed", type=int, default=0, help="of the draw of rows to corrupt")
    own.add_argument("--dtype", default="auto")
    own.add_argument("--lora-rank", type=int, default=8)
    own.add_argument("--epochs", type=int, default=2, help="of the warm-up, and so the number of checkpoints")
    own.add_argument("--batch-size", type=int, default=4)
    own.add_argument("--learning-rate", type=float, default=2e-4)
    own.add_argument("--proj-dim", type=int, default=32768)
    stage(stages, "build", build)
    for name, work_on in (("corrupted", corrupted), ("provenance", provenance)):
        own = stage(stages, name, work_on)
        own.add_argument("--targets", nargs="+", required=True, metavar="NAME=FILE")
        own.add_argument(
            "--max-target-tokens", nargs="+", default=[], metavar="NAME=TOKENS", help="longer targets are left out"
        )
        own.add_argument("--resamples", type=int, default=NUM_RESAMPLES)
    own.add_argument("--store", type=Path, required=True, help="of sound rows")
    own.add_argument("--label", help="what to call its model on the page; the folder's name by default")
    own = stage(stages, "report", report)
    own.add_argument("--json", type=Path, required=True, help="a page and a picture go beside it")
    args = parser.parse_args()
    args.work_on(args)


def stage(stages: Any, name: str, work_on: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
    """The parser of one stage."""
    own: argparse.ArgumentParser = stages.add_parser(name)
    own.set_defaults(work_on=work_on)
    own.add_argument("--work", type=Path, required=True)
    return own


# ---- rows, some with a corrupted reply, and their store


def prepare(args: argparse.Namespace) -> None:
    """Draw the rows, corrupt a copy, and write down what was done to which."""
    plan = {name: value for name, value in vars(args).items() if name not in ("work_on", "work", "pool")}
    plan["label"] = args.label or Path(args.model).name
    agree_on_plan(args.work, plan | {"pool": open_source(args.pool).sha256})
    if (args.work / "corruption.json").exists():
        return
    renderer = Renderer(load_tokenizer(args.model), RenderConfig(max_length=10**6))
    rendered, lines = short_rows(args.pool, args.rows + args.warmup_rows, args.max_tokens, renderer)
    write(args.work / "pool.jsonl", lines[: args.rows])
    write(args.work / "warmup.jsonl", lines[args.rows :])
    rows, done = corrupt([json.loads(line) for line in lines[: args.rows]], args.fraction, args.seed)
    write(args.work / "corrupted.jsonl", (json.dumps(row) + "\n" for row in rows))
    tokens = {"pool": rendered[: args.rows], "warmup": rendered[args.rows :]}
    found = {"rows": done, "tokens": {name: sum(row.num_tokens for row in own) for name, own in tokens.items()}}
    write(args.work / "corruption.json", [json.dumps(found)])


def build(args: argparse.Namespace) -> None:
    """The warm-up on clean rows, and the stores of the corrupted pool: every rule in one pass, and embeddings."""
    plan = json.loads((args.work / "plan.json").read_text(encoding="utf-8"))
    shared = {"model": plan["model"], "dtype": plan["dtype"], "max_length": 2 * plan["max_tokens"]}
    warmup(
        data=args.work / "warmup.jsonl", output=args.work / "run", fraction=1.0, epochs=plan["epochs"],
        batch_size=plan["batch_size"], learning_rate=plan["learning_rate"], lora_rank=plan["lora_rank"], **shared,
    )  # fmt: skip
    shared |= {"data": args.work / "corrupted.jsonl", "shard_rows": 128}
    build_embeddings(datastore=args.work / "store.rds", **shared)
    build_datastore(
        datastore=args.work / "store", checkpoints=args.work / "run", update_rule=UPDATE_RULES,
        proj_dim=plan["proj_dim"], **shared,
    )  # fmt: skip


def corrupt(rows: Sequence[dict], fraction: float, seed: int) -> tuple[list[dict], list[dict]]:
    """The rows, some with another reply, and what was done to each.

    Returns:
        the rows; for each its `kind`, clean, swapped or cut, the `words` of its reply as it was, and for a swapped one
        whether the other reply is of the same subtask, `same_subtask`.

    Raises:
        DataError: a row does not end with the assistant's turn.
    """
    replies = [reply_of(row) for row in rows]
    done: list[dict] = [{"kind": "clean", "words": len(reply.split())} for reply in replies]
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    num_of_each = round(fraction * len(rows) / 2)
    to_swap = order[:num_of_each]
    to_cut = [n for n in order[num_of_each:] if done[n]["words"] > 1][:num_of_each]
    changed = list(rows)
    for n, other in partners(to_swap, replies, [task_of(row) for row in rows]).items():
        changed[n] = with_reply(rows[n], replies[other])
        done[n] |= {"kind": "swapped", "same_subtask": task_of(rows[n]) == task_of(rows[other])}
    for n in to_cut:
        changed[n] = with_reply(rows[n], cut(replies[n]))
        done[n]["kind"] = "cut"
    return changed, done


def partners(members: Sequence[int], replies: Sequence[str], tasks: Sequence[tuple[str, str]]) -> dict[int, int]:
    """Whose reply each of these rows gets: all together they only change places.

    A row gets one of its own task; where there is none that differs, one of its dataset; else it is not in the result.
    """
    given: dict[int, int] = {}
    for group_of in (lambda n: tasks[n], lambda n: tasks[n][0]):
        groups: dict[Any, list[int]] = defaultdict(list)
        for n in members:
            if n not in given:
                groups[group_of(n)].append(n)
        for group in groups.values():
            given |= rotated(group, replies)
    return given


def rotated(group: Sequence[int], replies: Sequence[str]) -> dict[int, int]:
    """Whose reply each row of a group gets, where it differs from its own.

    With equal replies side by side, a step as long as the longest run of them leaves no row with its own, unless that
    run is more than half of the group.
    """
    counts = Counter(replies[n] for n in group)  # in the order of the group, which is random
    ring = [n for reply in counts for n in group if replies[n] == reply]
    step = max(counts.values())
    others = ring[step:] + ring[:step]
    return {n: other for n, other in zip(ring, others, strict=True) if replies[n] != replies[other]}


def cut(reply: str) -> str:
    """The first quarter of a reply's words, at least one."""
    words = list(re.finditer(r"\S+", reply))
    return reply[: words[max(1, len(words) // 4) - 1].end()]


def task_of(row: Mapping[str, Any]) -> tuple[str, str]:
    """Its dataset and subtask; a row without a subtask is of its dataset's own."""
    return row["dataset"], row.get("subtask") or ""


def reply_of(row: Mapping[str, Any]) -> str:
    """What the assistant says last."""
    last = (row.get("messages") or [{}])[-1]
    if last.get("role") != "assistant":
        raise DataError(
            f"{row.get('id')}: the last turn is of {last.get('role')}, expected messages that end with the "
            "assistant's; leave the row out"
        )
    content: str = last["content"]
    return content


def with_reply(row: Mapping[str, Any], reply: str) -> dict[str, Any]:
    """The row with another last turn."""
    *others, last = row["messages"]
    return {**row, "messages": [*others, {**last, "content": reply}]}


def write(file: Path, lines: Iterable[str]) -> None:
    """Whole or not at all."""
    part = file.with_suffix(".part")
    part.write_text("".join(lines), encoding="utf-8")
    part.replace(file)


# ---- scores


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A store's N rows, with every method's scores for the same targets."""

    tasks: list[tuple[str, str]]
    """Dataset and subtask of each row."""
    rows_N: NDArray[np.int64]
    """Number of each row in its source."""
    targets: dict[str, list[dict]]
    """The rows of each target set."""
    scores: dict[str, InfluenceScores]
    """By method."""
    case: dict[str, Any]
    """What was scored, for the page."""

    @property
    def datasets_N(self) -> NDArray[np.str_]:
        """Dataset of each row."""
        return np.array([dataset for dataset, _ in self.tasks])

    def dataset_of(self, name: str) -> str:
        """The one dataset that a target set's rows are of."""
        found = {row["dataset"] for row in self.targets[name]}
        if len(found) > 1:
            raise DataError(f"the targets {name} are of {', '.join(sorted(found))}, expected one dataset; split them")
        return str(found.pop())

    def of_set(self, method: str, name: str) -> Floats:
        """score(z): the highest over the target set's subtasks, (N,)."""
        return self.scores[method].of(name).score_N.astype(np.float64)

    def of_subtask(self, method: str, name: str, subtask: str) -> Floats:
        """Scores for one subtask, (N,); a method that does not look at targets has the same for all."""
        own = self.scores[method].of(name)
        column = own.subtasks.index(subtask) if subtask in own.subtasks else own.subtasks.index(name)
        return own.scores_NJ[:, column].astype(np.float64)


def score_all(folder: Path, store_folder: Path, args: argparse.Namespace) -> Scored:
    """Every method's scores; those that `folder` holds are not computed again."""
    store = Datastore.open(store_folder)
    rows = store.rows()
    most = {name: int(tokens) for name, _, tokens in (spec.partition("=") for spec in args.max_target_tokens)}
    targets = read_targets(store, args.targets, most)
    plan = {
        "store": [entry.sha256 for entry in store.sources],
        "settings": store.settings,
        "targets": {name: [row["id"] for row in own] for name, own in targets.items()},
    }
    agree_on_plan(folder, plan)
    pool, known, scores = Pool(store, None), {}, {}
    for method, settings in methods_of(store).items():
        file = folder / f"{method.replace(' ', '-')}.npz"
        if not file.exists():
            scorer = open_scorer(store, ScoreConfig(**settings), pool=pool, progress=True, known=known)
            found, _ = scorer.score(scorer.load_targets(targets))
            part = file.with_suffix(".part.npz")
            np.savez(part, scores_NJ=found.scores_NJ, subtasks=found.subtasks, target_sets=found.target_sets)
            part.replace(file)
            print(f"scored by {method}", flush=True)
        with np.load(file) as kept:
            subtasks, sets = (tuple(kept[key].tolist()) for key in ("subtasks", "target_sets"))
            scores[method] = InfluenceScores(
                rows=rows, scores_NJ=kept["scores_NJ"], subtasks=subtasks, target_sets=sets
            )
    features = store.settings["feature_sets"][store.feature_sets[0]]["projection"]
    return Scored(
        tasks=[task_of(record.columns or {}) for record in pool.take(rows, np.arange(store.num_rows))],
        rows_N=rows.rows_N,
        targets=targets,
        scores=scores,
        case={
            "model": Path(store.environment["model"]).name,
            "dtype": store.settings["model"]["dtype"],
            "rows": store.num_rows,
            "tokens": int(rows.num_tokens_N.sum()),
            "checkpoints": len(store.checkpoints),
            "projection": f"{features['kind']}, K = {features['proj_dim']:,}",
            "targets": {name: len(own) for name, own in targets.items()},
            "max_target_tokens": most,
            "resamples": args.resamples,
        },
    )


def read_targets(store: Datastore, wanted: Sequence[str], most: Mapping[str, int]) -> dict[str, list[dict]]:
    """The rows of each NAME=FILE that can be used and have at most so many tokens, where there is a limit for the name.

    Raises:
        DataError: a file has no such row.
        SettingError: a limit is for none of them.
    """
    files = dict(spec.split("=", 1) for spec in wanted)
    if strange := most.keys() - files.keys():
        raise SettingError(f"there is no target set {min(strange)!r} to limit; there are {', '.join(files)}")
    renderer = open_renderer(store, ScoreConfig(), None, None, None)
    targets: dict[str, list[dict]] = {name: [] for name in files}
    for name, file in files.items():
        for record in open_source(file).iter_records():
            try:
                num_tokens = renderer.render_record(record).num_tokens
            except RowProblem:
                continue
            if num_tokens <= most.get(name, num_tokens):
                targets[name].append(record.columns or {})
        if not targets[name]:
            raise DataError(f"{file} has no target of at most {most.get(name)} tokens; allow for longer ones")
    return targets


def methods_of(store: Datastore) -> dict[str, dict[str, str]]:
    """Settings of scoring by method's name: every rule that the store has, cosine and inner product, and baselines."""
    rules = {store.settings["feature_sets"][name]["update_rule"]: name for name in store.feature_sets}
    gradients = {
        f"{rule} {normalize}": {"method": "less", "feature_set": name, "normalize": normalize}
        for rule, name in rules.items()
        for normalize in NORMALIZERS
    }
    return gradients | {name: {"method": name} for name in BASELINES}


# ---- provenance


def provenance(args: argparse.Namespace) -> None:
    """How often the rows of a target's own task come first."""
    scored = score_all(args.work / "provenance", args.store, args)
    case = scored.case | ({"model": args.label} if args.label else {})
    results = {name: judge_provenance(scored, name, args.resamples) for name in scored.targets}
    write(args.work / "provenance.json", [json.dumps({"case": case, "results": results}, indent=1)])


def judge_provenance(scored: Scored, name: str, resamples: int) -> dict[str, Any]:
    """Each measure's mean over the subtasks of a target set, by method, with its difference from bm25's."""
    dataset = scored.dataset_of(name)
    own_N = scored.datasets_N == dataset
    right_of = {}
    for subtask in sorted({task_of(row)[1] for row in scored.targets[name]}):
        right_N = np.array([task == (dataset, subtask) for task in scored.tasks])
        if right_N.sum() >= LEAST_RIGHT_ROWS:
            right_of[subtask] = right_N
    if not right_of:
        raise DataError(f"no subtask of the targets {name} has {LEAST_RIGHT_ROWS} rows in the store; use a larger pool")
    values: dict[str, dict[str, Floats]] = {}
    for method in scored.scores:
        columns = [(scored.of_subtask(method, name, subtask), right_N) for subtask, right_N in right_of.items()]
        values[method] = {
            "r_precision": np.array([r_precision(score_N, right_N) for score_N, right_N in columns]),
            "auc": np.array([auc(score_N, right_N) for score_N, right_N in columns]),
            "auc_within_dataset": np.array([auc(score_N[own_N], right_N[own_N]) for score_N, right_N in columns]),
        }
    chance = float(np.mean([right_N.mean() for right_N in right_of.values()]))
    return {
        "dataset": dataset,
        "subtasks": {subtask: int(right_N.sum()) for subtask, right_N in right_of.items()},
        "chance": {"r_precision": round(chance, 4), "auc": 0.5, "auc_within_dataset": 0.5},
        "methods": {
            method: {
                measure: {
                    "mean": as_json(bootstrap(np.mean, own_J, num_resamples=resamples)),
                    "less_bm25": as_json(bootstrap(np.mean, own_J - values["bm25"][measure], num_resamples=resamples)),
                    "by_subtask": [round(value, 4) for value in own_J.tolist()],
                }
                for measure, own_J in found.items()
            }
            for method, found in values.items()
        },
    }


# ---- corrupted replies


def corrupted(args: argparse.Namespace) -> None:
    """How often a clean row scores above a corrupted one."""
    scored = score_all(args.work / "corrupted", args.work / "store", args)
    corruption = json.loads((args.work / "corruption.json").read_text(encoding="utf-8"))
    plan = json.loads((args.work / "plan.json").read_text(encoding="utf-8"))
    done = [corruption["rows"][n] for n in scored.rows_N.tolist()]
    swapped = [row for row in done if row["kind"] == "swapped"]
    case = scored.case | {
        "model": plan["label"],
        "plan": {name: value for name, value in plan.items() if name != "model"},
        "warmup_tokens": corruption["tokens"]["warmup"],
        "swapped": len(swapped),
        "swapped_within_the_subtask": sum(row["same_subtask"] for row in swapped),
        "cut": sum(row["kind"] == "cut" for row in done),
    }
    results = [judge_corrupted(scored, done, name, kind, scope, args.resamples) for name in scored.targets
               for scope in ("own", "all") for kind in KINDS]  # fmt: skip
    write(args.work / "corrupted.json", [json.dumps({"case": case, "results": results}, indent=1)])


def comparable(done: Sequence[Mapping[str, Any]], kind: str) -> tuple[Bools, Bools]:
    """Which rows are corrupted so, and which are clean and could have been: (N,) each."""
    kinds_N, words_N = np.array([row["kind"] for row in done]), np.array([row["words"] for row in done])
    return kinds_N == kind, (kinds_N == "clean") & (words_N >= (2 if kind == "cut" else 0))


def judge_corrupted(
    scored: Scored, done: Sequence[Mapping[str, Any]], name: str, kind: str, scope: str, resamples: int
) -> dict[str, Any]:
    """AUC of clean above corrupted rows of one kind, by method, with its difference from that of `length`."""
    dataset = scored.dataset_of(name)
    inside_N = scored.datasets_N == dataset if scope == "own" else np.ones(len(done), bool)
    is_corrupted_N, is_clean_N = comparable(done, kind)
    judged_N = inside_N & (is_corrupted_N | is_clean_N)
    clean_n = is_clean_N[judged_N]
    scores = {method: scored.of_set(method, name)[judged_N] for method in scored.scores}

    def over_length(score_n: Floats, length_n: Floats, clean_n: Bools) -> float:
        return auc(score_n, clean_n) - auc(length_n, clean_n)

    return {
        "targets": name,
        "dataset": dataset,
        "scope": scope,
        "kind": kind,
        "clean": int(clean_n.sum()),
        "corrupted": int((~clean_n).sum()),
        "methods": {
            method: {
                "auc": as_json(bootstrap(auc, score_n, clean_n, num_resamples=resamples)),
                "less_length": as_json(
                    bootstrap(over_length, score_n, scores["length"], clean_n, num_resamples=resamples)
                ),
            }
            for method, score_n in scores.items()
        },
    }


# ---- the page


def report(args: argparse.Namespace) -> None:
    """The page and the picture of the tests that were run."""
    parts = {}
    for name in ("provenance", "corrupted"):
        if (file := args.work / f"{name}.json").exists():
            parts[name] = json.loads(file.read_text(encoding="utf-8"))
    if not parts:
        raise SystemExit(f"{args.work} has no result yet; run the stage provenance or corrupted first")
    found = {"what": "planted truth: rows of the target's task, and corrupted replies", "machine": machine()} | parts
    picture = args.json.with_suffix(".png")
    write_report(found, as_markdown(found, picture.name), args.json)
    draw(found, picture)


def as_markdown(found: Mapping[str, Any], picture: str) -> str:
    """The report as a page."""
    lines = ["# Planted truth", "", machine_in_words(found["machine"]), "", f"![Every method's results]({picture})", ""]
    for name, page_of in (("provenance", provenance_page), ("corrupted", corrupted_page)):
        if name in found:
            lines += page_of(found[name])
    return "\n".join(lines) + "\n"


def case_in_words(case: Mapping[str, Any]) -> str:
    """What was scored, as a sentence."""
    limits = {name: f" (of at most {most} tokens)" for name, most in case["max_target_tokens"].items()}
    targets = ", ".join(f"{name} {count}{limits.get(name, '')}" for name, count in case["targets"].items())
    return (
        f"{case['model']} ({case['dtype']}), {case['rows']:,} rows ({case['tokens']:,} tokens), {case['checkpoints']} "
        f"checkpoints, features {case['projection']}. Targets: {targets}."
    )


def provenance_page(part: Mapping[str, Any]) -> list[str]:
    """The lines of the first test."""
    case = part["case"]
    lines = ["## Provenance", "", case_in_words(case), ""]
    for name, own in part["results"].items():
        sizes = list(own["subtasks"].values())
        lines += [
            f"### {name}", "",
            f"{len(sizes)} subtasks with {min(sizes)} to {max(sizes)} right rows. Means over them with their 95% "
            f"interval over subtasks, {case['resamples']:,} resamples; beside them the difference from bm25.", "",
            "| method | " + " | ".join(f"{title} | less bm25" for title in MEASURES.values()) + " |",
            "| --- |" + " --- |" * 2 * len(MEASURES),
        ]  # fmt: skip
        for method, found in own["methods"].items():
            cells = [in_words(found[measure][key]) for measure in MEASURES for key in ("mean", "less_bm25")]
            lines.append(f"| {method_in_words(method)} | " + " | ".join(cells) + " |")
        lines.append("| chance | " + " | | ".join(f"{own['chance'][measure]:.2f}" for measure in MEASURES) + " | |")
        lines.append("")
        for measure in ("r_precision", "auc_within_dataset"):
            differences = {method: found[measure]["less_bm25"] for method, found in own["methods"].items()}
            lines.append(f"- {MEASURES[measure]}: better than bm25 {those(differences, 0, 1)}; worse "
                         f"{those(differences, 0, -1)}.")  # fmt: skip
        lines.append("")
    return lines


def corrupted_page(part: Mapping[str, Any]) -> list[str]:
    """The lines of the second test."""
    case = part["case"]
    plan = case["plan"]
    lines = [
        "## Corrupted replies", "",
        f"{case_in_words(case)} Rows of at most {plan['max_tokens']} tokens, {case['swapped']} swapped "
        f"({case['swapped_within_the_subtask']} within their subtask, the others within their dataset) and "
        f"{case['cut']} cut. Warm-up: {plan['epochs']} epochs of {plan['warmup_rows']} other rows, all clean "
        f"({case['warmup_tokens']:,} tokens), batches of {plan['batch_size']}, learning rate "
        f"{plan['learning_rate']:g}, rank {plan['lora_rank']}.", "",
        f"AUC of clean above corrupted rows with its 95% interval over rows, {case['resamples']:,} resamples; beside "
        "it the difference from `length`. Below 0.5 a method prefers what is corrupted.", "",
    ]  # fmt: skip
    tests = {(own["targets"], own["scope"], own["kind"]): own for own in part["results"]}
    for name, scope in dict.fromkeys((name, scope) for name, scope, _ in tests):
        both = [tests[name, scope, kind] for kind in KINDS]
        where = f"rows of {both[0]['dataset']}" if scope == "own" else "all rows"
        lines += [
            f"### {name}, {where}", "",
            "| method | "
            + " | ".join(f"{own['corrupted']} {own['kind']}, {own['clean']} clean | less length" for own in both)
            + " |",
            "| --- |" + " --- |" * 2 * len(both),
        ]  # fmt: skip
        for method in both[0]["methods"]:
            cells = [in_words(own["methods"][method][key]) for own in both for key in ("auc", "less_length")]
            lines.append(f"| {method_in_words(method)} | " + " | ".join(cells) + " |")
        lines.append("")
        for own in both:
            aucs = {method: found["auc"] for method, found in own["methods"].items()}
            over_length = {method: found["less_length"] for method, found in own["methods"].items()}
            lines.append(
                f"- {own['kind'].capitalize()}: clean rows are preferred by {those(aucs, 0.5, 1)}; corrupted ones by "
                f"{those(aucs, 0.5, -1)}. Better than length: {those(over_length, 0, 1)}; worse: "
                f"{those(over_length, 0, -1)}."
            )
        lines.append("")
    return lines


def those(found: Mapping[str, Mapping[str, float | None]], chance: float, sign: int) -> str:
    """The methods whose whole interval lies on one side of chance."""
    end = "low" if sign > 0 else "high"
    names = [name for name, own in found.items() if own[end] is not None and sign * (own[end] - chance) > 0]
    return ", ".join(map(method_in_words, names)) or "none"


def method_in_words(method: str) -> str:
    """Its name on the page."""
    rule, _, normalize = method.partition(" ")
    return {"cosine": f"`{rule}` cosine", "none": f"`{rule}` inner product"}.get(normalize, method)


def draw(found: Mapping[str, Any], path: Path) -> None:
    """A panel for each of the main measures, every method with its interval, a mark for each target set."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    panels: dict[str, dict[str, tuple[float, dict[str, Any]]]] = {}  # title → target set → chance, intervals by method
    for name, own in found.get("provenance", {"results": {}})["results"].items():
        for measure in ("r_precision", "auc_within_dataset"):
            intervals = {method: values[measure]["mean"] for method, values in own["methods"].items()}
            panels.setdefault(f"provenance: {MEASURES[measure]}", {})[name] = (own["chance"][measure], intervals)
    for own in found.get("corrupted", {"results": []})["results"]:
        if own["scope"] == "own":
            intervals = {method: values["auc"] for method, values in own["methods"].items()}
            title = f"{own['kind']} replies: AUC within the dataset"
            panels.setdefault(title, {})[own["targets"]] = (0.5, intervals)
    methods = list(next(iter(next(iter(panels.values())).values()))[1])
    sets = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    figure, axes = plt.subplots(1, len(panels), figsize=(3.1 * len(panels) + 1.6, 5.2), dpi=100, sharey=True)
    for axis, (title, panel) in zip(np.atleast_1d(axes), panels.items(), strict=True):
        for name, (chance, intervals) in panel.items():
            colour, shift = f"C{sets.index(name)}", 0.16 * (2 * sets.index(name) - len(sets) + 1)
            axis.axvline(chance, color=colour, linewidth=0.8, linestyle=":")
            for place, method in enumerate(reversed(methods)):
                value, low, high = (intervals[method][key] for key in ("value", "low", "high"))
                if value is not None:
                    axis.plot(value, place + shift, "o", color=colour, markersize=4, label=name if not place else None)
                if low is not None:
                    axis.hlines(place + shift, low, high, color=colour, linewidth=1.3, alpha=0.6)
        axis.set_title(title, fontsize=9)
        axis.set_yticks(range(len(methods)), [method_in_words(name).replace("`", "") for name in reversed(methods)])
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", alpha=0.25)
    figure.tight_layout()
    marks = np.atleast_1d(axes)[0].get_legend_handles_labels()
    figure.legend(*marks, frameon=False, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=len(sets),
                  title="targets; bars: 95% intervals; dotted: chance")  # fmt: skip
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    main()
