"""`gradsift index`, `explain` and `near-duplicates`: what they print, what they write, and what they refuse."""

import json
import shutil
from pathlib import Path

import pytest

from datastore import Datastore, GradientIndex


@pytest.fixture
def store(tiny_store, tmp_path):
    """A copy of the tiny store, to be indexed."""
    return Path(shutil.copytree(tiny_store, tmp_path / "ds"))


def in_one_line(text):
    return " ".join(text.split())


@pytest.mark.parametrize("kind", ["flat", "ivf", "ivf-sq8"])
def test_index_says_what_it_finds_and_writes_it_beside_the_store(gradsift, store, kind):
    done = gradsift("index", store, "--type", kind, "--dim", 64)
    assert done.code == 0, done
    index = GradientIndex.open(Datastore.open(store))
    assert (index.entry.type, index.entry.dim) == (kind, 64)
    assert "adam-sparse: 40 rows, 64 columns" in done.out
    assert f"orders 40 rows exactly and finds {index.entry.recall:.2f} of a row's 10 nearest" in done.out
    assert ("lists" in done.out) == (kind != "flat")
    assert f"written: {store}.index/adam-sparse (" in done.out
    assert "index: 40 of 40 rows" in done.err
    assert gradsift("index", store, "--quiet").out == ""
    assert GradientIndex.open(Datastore.open(store)).entry.dim == 512  # no sketch of 1,024 columns is needed


def test_index_tells_when_it_finds_less_than_was_asked_for(gradsift, store, monkeypatch):
    from datastore import index

    monkeypatch.setattr(index, "CANDIDATES", (10,))
    done = gradsift("index", store, "--dim", 1, "--recall", 0.99)
    assert "note: less than the 0.99 asked for" in done.out


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--type", "rabitq"), "'rabitq' is not one of"),
        (("--dim", -1), "dim must be at least 1"),
        (("--recall", 2), "recall must be above 0"),
        (("--feature-set", "sgd"), "no 'sgd'; choose one with --feature-set"),
        (("--checkpoint", "last"), "has no checkpoint 'last'"),
    ],
)
def test_index_refuses_in_one_line(gradsift, store, options, expected):
    assert expected in gradsift("index", store, *options).error


def test_explain_shows_a_row_in_eighty_columns(gradsift, store, tiny_target_file, tmp_path):
    done = gradsift("explain", store, "--row", "row-7", "--targets", tiny_target_file, "--json", tmp_path / "e.json")
    assert done.code == 0, done
    lines = done.out.splitlines()
    assert max(len(line) for line in lines if str(tmp_path) not in line) <= 80
    assert not any(line != line.rstrip() for line in lines)
    doc = json.loads((tmp_path / "e.json").read_text())
    assert lines[0] == "row-7: pool.jsonl:8, row 7 of source 0"
    assert lines[1].startswith("  mix ")
    (ranked,) = doc["target_sets"]
    said = f"tones: score {ranked['score']:.4f}, rank {ranked['rank']} of 40, by {ranked['subtask']}"
    assert said in done.out
    for begin in (
        "adam-sparse, what the store holds of it", "subtasks: score, and its parts by checkpoint",
        "targets that pull most", "nearest rows in gradient space", "found by a scan of all 40 rows",
    ):  # fmt: skip
        assert sum(line.startswith(begin) for line in lines) == 1, begin
    for near in doc["neighbours"]:
        assert f"{near['similarity']:.4f}" in done.out
        assert near["id"] in done.out
    for target in doc["targets"]:
        assert f"{target['id']} (tones.jsonl:{int(target['id'][-1]) + 1})" in done.out
    assert lines[-1] == f"written: {tmp_path / 'e.json'}"
    quiet = gradsift("explain", store, "--row", "row-7", "--quiet")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")


def test_explain_without_targets_shows_the_row_and_its_neighbours_by_the_index(gradsift, store):
    gradsift("index", store)
    done = gradsift("explain", store, "--row", "0:7", "--neighbours", 3)
    assert done.out.startswith("row-7: ")
    assert "score" not in done.out
    assert "found by the index (flat), which finds 1.00 of a row's 10 nearest" in done.out
    assert "note: most of this is Adam's momentum" in done.out
    assert "nearest" not in gradsift("explain", store, "--row", "0:7", "--neighbours", 0).out


def test_explain_of_several_target_sets_names_each(gradsift, store, tiny_target_file, write_rows, tiny_rows, tmp_path):
    more = write_rows(tmp_path / "sums.jsonl", tiny_rows[:2])
    done = gradsift("explain", store, "--row", "row-7", "--targets", tiny_target_file, "--targets", more)
    assert "\ntones: score " in done.out
    assert "\nsums: score " in done.out
    assert "tones/a" in done.out


def test_explain_shows_no_text_that_would_command_a_terminal(gradsift, build_of, write_rows, tmp_path):
    nasty = "\x1b[2J\x07\u202e" + "[bold]x[/bold] " * 8
    rows = [
        {"id": f"{n}{nasty}" * 3, "messages": [{"role": "user", "content": f"{nasty}{n}"},
                                               {"role": "assistant", "content": "ab"[n % 2]}]}
        for n in range(6)
    ]  # fmt: skip
    pool = write_rows(tmp_path / "pool.jsonl", rows)
    targets = write_rows(tmp_path / "t.jsonl", [{**rows[0], "subtask": nasty}])
    build_of(pool, tmp_path / "ds")
    done = gradsift("explain", tmp_path / "ds", "--row", "0:1", "--targets", targets)
    assert done.code == 0, done
    assert not {"\x1b", "\x07", "\u202e"} & set(done.out)
    assert "[bold]x[/bold]" in done.out
    assert max(map(len, done.out.splitlines())) <= 80
    line = gradsift("explain", tmp_path / "ds", "--row", "nowhere").error
    assert "\x1b" not in line


@pytest.fixture
def build_of(tiny_model_folder, tiny_run):
    from less import build_datastore

    def build(pool, folder):
        build_datastore(
            model=tiny_model_folder, checkpoints=tiny_run, data=pool, datastore=folder, proj_dim=64,
            tokens_per_batch=1024, progress=False,
        )  # fmt: skip

    return build


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--row", "row-77"), "has no row 'row-77'; expected an id such as row-0, row-1"),
        (("--row", "row-7", "--neighbours", -1), "neighbours must be at least 0"),
        (("--row", "row-7", "--json", "none/e.json"), "its folder is not there"),
        (("--row", "row-7", "--targets", "nowhere.jsonl"), "there is no file or folder nowhere.jsonl"),
        ((), "Missing option '--row'"),
    ],
)
def test_explain_refuses_in_one_line(gradsift, store, options, expected):
    assert expected in gradsift("explain", store, *options).error


def test_a_damaged_index_is_one_line_with_the_way_out(gradsift, store):
    gradsift("index", store)
    file = Path(f"{store}.index") / "adam-sparse" / "index.faiss"
    file.write_bytes(b"\0" * file.stat().st_size)
    line = gradsift("explain", store, "--row", "row-7").error
    assert "index.faiss is damaged: its checksum is not the one in index.json. Run `gradsift index` again" in line
    assert gradsift("index", store).code == 0
    assert gradsift("explain", store, "--row", "row-7").code == 0


@pytest.fixture
def repeats(build_of, write_rows, tiny_rows, tmp_path):
    """A store of 24 rows, of which two repeat one each, and its index."""
    from datastore import build_index

    rows = [*tiny_rows[:22], {**tiny_rows[4], "id": "again"}, tiny_rows[9]]
    build_of(write_rows(tmp_path / "pool.jsonl", rows), tmp_path / "ds")
    build_index(Datastore.open(tmp_path / "ds"))
    return tmp_path / "ds"


def test_near_duplicates_shows_groups_in_eighty_columns(gradsift, repeats, tiny_rows, tmp_path):
    done = gradsift("near-duplicates", repeats, "--threshold", 0.9999, "--output", tmp_path / "alike.jsonl")
    assert done.code == 0, done
    lines = done.out.splitlines()
    assert max(len(line) for line in lines if str(tmp_path) not in line) <= 80
    assert not any(line != line.rstrip() for line in lines)
    said = in_one_line(done.out)
    assert said.startswith(
        "adam-sparse: 4 of 24 rows are alike, in 2 groups (similarity of 0.9999 or more, found by the index (flat)) "
        "the first row of each would stay, 2 would go, 2 of them with the very tokens of the row that would stay"
    )
    at = lines.index("2 rows, similarity 1.0000, the same tokens")
    text = in_one_line("\n".join(turn["content"] for turn in tiny_rows[4]["messages"]))
    for line, place in zip(lines[at + 1 : at + 3], ("pool.jsonl:5", "pool.jsonl:23"), strict=True):
        where, shown = line.split(maxsplit=1)
        assert where == place
        assert text.startswith(shown.removesuffix("…"))
    assert "note: 1 of the rows that would go have the id of a row that would stay" in said
    assert "most of the similarity is Adam's momentum, which all rows share; a feature set without it" in said
    written = [json.loads(line) for line in (tmp_path / "alike.jsonl").read_text().splitlines()]
    assert [(row["id"], row["row"], row["like"]["row"]) for row in written] == [("again", 22, 4), ("row-9", 23, 9)]
    assert lines[-1] == f"written: {tmp_path / 'alike.jsonl'}"
    assert "near-duplicates: 24 of 24 rows" in done.err
    quiet = gradsift("near-duplicates", repeats, "--quiet")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")


def test_near_duplicates_tells_of_rows_that_are_alike_by_way_of_others(gradsift, repeats):
    def chained(threshold):
        said = in_one_line(gradsift("near-duplicates", repeats, "--threshold", threshold).out)
        return "alike by way of other rows; a higher --threshold joins fewer" in said

    assert [threshold for threshold in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95) if chained(threshold)]
    assert not chained(0.9999)


def test_near_duplicates_of_unlike_rows_is_a_sentence(gradsift, build_of, write_rows, tiny_rows, tmp_path):
    build_of(write_rows(tmp_path / "pool.jsonl", tiny_rows[:2]), tmp_path / "ds")
    gradsift("index", tmp_path / "ds")
    done = gradsift("near-duplicates", tmp_path / "ds", "--threshold", 1)
    said = "adam-sparse: none of the 2 rows are alike (similarity of 1 or more, found by the index (flat))\n"
    assert in_one_line(done.out) == in_one_line(said)


def test_near_duplicates_shows_no_text_that_would_command_a_terminal(gradsift, build_of, write_rows, tmp_path):
    nasty = "\x1b[2J\x07\u202e" + "[bold]x[/bold] " * 8
    rows = [
        {"id": nasty * 3, "messages": [{"role": "user", "content": nasty.replace(" ", "\n")},
                                       {"role": "assistant", "content": "b"}]}
        for _ in range(6)
    ]  # fmt: skip
    long = tmp_path / ("\x1bpool [red]\n" + "long name " * 12 + ".jsonl")
    build_of(write_rows(long, rows), tmp_path / "ds")
    gradsift("index", tmp_path / "ds")
    done = gradsift("near-duplicates", tmp_path / "ds", "--output", tmp_path / "alike.jsonl")
    assert done.code == 0, done
    assert not {"\x1b", "\x07", "\u202e"} & set(done.out)
    assert "[bold]x[/bold]" in done.out
    assert any(line.startswith("  …") and ".jsonl:1 " in line for line in done.out.splitlines())  # the end is kept
    assert max(len(line) for line in done.out.splitlines() if str(tmp_path) not in line) <= 80
    assert len((tmp_path / "alike.jsonl").read_text().splitlines()) == 5


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), "no index at"),
        (("--threshold", 0), "threshold must be above 0 and at most 1, got 0.0"),
        (("--threshold", "nan"), "threshold must be above 0 and at most 1, got nan"),
        (("--threshold", "high"), "'high' is not a valid float"),
        (("--feature-set", "sgd"), "no 'sgd'; choose one with --feature-set"),
        (("--output", "none/alike.jsonl"), "its folder is not there"),
    ],
)
def test_near_duplicates_refuses_in_one_line(gradsift, store, options, expected):
    assert expected in gradsift("near-duplicates", store, *options).error


def test_near_duplicates_of_a_store_without_an_index_names_the_command_that_makes_one(gradsift, store):
    assert "Make one with `gradsift index`" in gradsift("near-duplicates", store).error
    gradsift("index", store)
    assert gradsift("near-duplicates", store).code == 0
    gradsift("datastore", "delete", store, "--row", "0:3")
    assert "Make one with `gradsift index`" in gradsift("near-duplicates", store).error


def test_the_rows_that_would_go_can_be_deleted_by_their_numbers(gradsift, repeats, tmp_path):
    command = ["near-duplicates", repeats, "--threshold", 0.9999]
    gradsift(*command, "--output", tmp_path / "alike.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "alike.jsonl").read_text().splitlines()]
    named = [word for row in rows for word in ("--row", f"{row['source']}:{row['row']}")]
    assert gradsift("datastore", "delete", repeats, *named).code == 0
    gradsift("index", repeats)
    assert "none of the 22 rows are alike" in gradsift(*command).out
