"""The benchmark of the commands runs, weighs what it says, and times nothing that is wrong."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from datastore import Datastore

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("bench_commands")


@pytest.fixture
def case(bench, tmp_path):
    """Of 400 rows, as if the commands had written the best of them by a made-up score; no store is needed for it."""
    made = object.__new__(bench.Case)
    made.num_rows, made.block_rows, made.out = 400, 100, tmp_path
    made.halves = {"first": 200, "second": 200}
    made.pools = [tmp_path / f"{name}.jsonl" for name in made.halves]
    rows = []
    for pool, (name, num) in zip(made.pools, made.halves.items(), strict=True):
        bench.write_pool(pool, name, num, made.block_rows)
        rows += [json.loads(line) for line in pool.read_text().splitlines()]
    made.rows = [row | {"influence_score": 1 - n / 1000} for n, row in enumerate(rows)]
    return made


def write(case, **selections):
    for name, rows in selections.items():
        (case.out / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def test_the_smoke_run_weighs_every_command(bench, tmp_path):
    script, out = BENCHMARKS / "bench_commands.py", tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, script, "--smoke", "--store", tmp_path / "kept", "--json", out],
        capture_output=True, text=True, timeout=480, cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(BENCHMARKS.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert list(report["results"]) == ["help", "read", *bench.COMMANDS]
    assert list(report["life"]) == list(bench.LIFE)
    for own in (report["results"] | report["life"]).values():
        assert own["seconds"] > 0
        assert own["peak_bytes"] > 0
    assert report["results"]["select"]["peak_bytes"] > report["results"]["help"]["peak_bytes"]
    page = out.with_suffix(".md").read_text()
    assert "| datastore verify-deleted, by id |" in page
    assert f"Above {bench.BOUND_BYTES} bytes a row: " in page
    store = Datastore.open(tmp_path / "kept" / "400x64" / "store")
    assert store.num_rows == 400  # rows were deleted from a copy
    store.verify()
    assert not [path.name for path in (tmp_path / "kept").iterdir() if path.name.startswith("tmp")]


def test_memory_and_time_of_another_process_are_seen(bench):
    words = [sys.executable, "-c", "held = bytearray(b'x') * 90_000_000; import time; time.sleep(0.5)"]
    heavy, light = bench.run(words, 1), bench.run([sys.executable, "-c", "import time; time.sleep(0.5)"], 1)
    assert 85e6 < heavy.peak_bytes - light.peak_bytes < 95e6
    assert heavy.seconds > 0.5 > light.cpu_seconds > 0


def test_pages_of_a_mapped_file_are_not_counted(bench, tmp_path):
    (tmp_path / "file").write_bytes(bytes(60_000_000))
    words = "import mmap, time; file = open({!r}, 'rb'); held = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)"
    words += "; sum(held[n] for n in range(0, len(held), 4096)); time.sleep(0.3)"
    found = bench.run([sys.executable, "-c", words.format(str(tmp_path / "file"))], 1)
    assert found.peak_bytes < 30e6


def test_a_command_that_fails_stops_the_benchmark_with_what_it_said(bench):
    with pytest.raises(SystemExit, match="ended with 3: no such store"):
        bench.run([sys.executable, "-c", "print('no such store'); raise SystemExit(3)"], 1)


def test_a_row_costs_what_a_larger_store_adds(bench):
    runs = [[bench.Run(seconds=s, cpu_seconds=s, peak_bytes=peak)] for s, peak in ((8.0, 190_000), (1.5, 50_000))]
    found = bench.compared(*runs, 1600)
    assert found["bytes_a_row"] == 100
    assert (found["seconds"], found["seconds_of_an_eighth"]) == (8, 1.5)


def test_copies_have_the_text_of_a_row_of_their_block_and_near_copies_their_own(bench, case):
    hows = [bench.original_of(n, 100) for n in range(100)]
    assert [how for _, how in hows] == ["own"] * 90 + ["near"] * 5 + ["exact"] * 5
    assert [original for original, _ in hows[90:]] == [5, 6, 7, 8, 9, 0, 1, 2, 3, 4]
    texts = [row["messages"] for row in case.rows[100:200]]
    assert texts[95:] == texts[:5]
    assert texts[90] != texts[5]
    assert len({row["id"] for row in case.rows}) == 400


def selections(case):
    apart = [row for row in case.rows if row["id"] not in ("first-0000002",)][:4]
    rules = [row | {"dataset": f"d{n % 7}"} for n, row in enumerate(case.rows[:20])]
    return {
        "large": case.rows[:20], "small": case.rows[:4], "scored": case.rows[:20], "rules": rules, "apart": apart,
        "scores": case.rows,
    }  # fmt: skip


def test_what_the_commands_should_write_passes_the_gate(case):
    write(case, **selections(case))
    (case.out / "report.json").write_text(json.dumps({"num_rows": 400, "num_selected": 20}))
    case.check()


@pytest.mark.parametrize(
    ("name", "spoilt", "words"),
    [
        ("small", lambda rows: rows[1:5], "select again: the smaller selection is not the beginning"),
        ("small", lambda rows: rows[:3], "select again: 3 rows are selected of 4"),
        ("large", lambda rows: [*rows[:19], rows[0]], "select: 19 rows are selected of 20"),
        ("scored", lambda rows: rows[1:21], "select, scores: the selection is not the one"),
        ("rules", lambda rows: [row | {"dataset": "d1"} for row in rows[:20]], "the cap or the quota is broken"),
        ("rules", lambda rows: [*rows[:19], rows[95]], "select, rules: two rows have one text"),
        ("apart", lambda rows: [*rows[4:7], rows[90 + 1]], "select, near-duplicates: two rows are alike"),
        ("scores", lambda rows: rows[1:], "select, scores: 399 rows have a line of 400"),
    ],
)
def test_a_selection_that_is_wrong_is_not_timed(case, name, spoilt, words):
    write(case, **selections(case) | {name: spoilt(case.rows)})
    (case.out / "report.json").write_text(json.dumps({"num_rows": 400, "num_selected": 20}))
    with pytest.raises(SystemExit, match=rf"{words}.*; nothing is timed"):
        case.check()


def test_a_selection_after_a_deletion_goes_on_where_the_other_ends(bench, case):
    before = case.rows[:20]
    left = [row for n, row in enumerate(before) if n not in (3, 7)]
    bench.check_same("later", case.rows[:3] + case.rows[4:7] + case.rows[8:22], left)
    for wrong in (case.rows[22:42], case.rows[1:3] + case.rows[4:7] + case.rows[8:22]):
        with pytest.raises(SystemExit, match="later: the rows selected are not those"):
            bench.check_same("later", wrong, left)
    scored = [row | {"influence_score": row["influence_score"] + 1e-4} for row in before]
    with pytest.raises(SystemExit, match="or score otherwise; nothing is timed"):
        bench.check_same("later", scored, before)


def test_a_deleted_row_that_is_selected_stops_the_benchmark(case):
    write(case, large=case.rows[:20], later=case.rows[:20])
    case.deleted = [case.rows[5]["id"]]
    with pytest.raises(SystemExit, match="select, rows deleted: a deleted row is selected; nothing is timed"):
        case.check_step("select, rows deleted")
