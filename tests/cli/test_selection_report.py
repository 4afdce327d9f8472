"""The page about a selection: one closed file, hostile text as text, what the facts say in plain words."""

import base64
import json
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest

import cli.selection_report
from cli.figures import compared, data_uri, density
from cli.selection_report import write_selection_page
from datastore.errors import SettingError
from less import build_datastore, report_selection, select

MARK = "<script>'\"&{{7*7}}</p><b>\u202e\x07"
SHOWN = "<script>'\"&{{7*7}}</p><b>⟨U+202E⟩␇"


class Page(HTMLParser):
    """A page as a browser takes it apart."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags, self.texts = [], []
        self.feed(self.source)
        self.text = "".join(self.texts)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture
def undrawn(monkeypatch):
    """Pages without their figures, which take most of the time."""
    for name in ("compared", "density"):
        monkeypatch.setattr(cli.selection_report, name, lambda *args, **labels: None)
    monkeypatch.setattr(cli.selection_report, "data_uri", lambda figure: "data:,")


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_store, tiny_target_file):
    folder = tmp_path_factory.mktemp("made")
    select(
        datastore=tiny_store, targets=tiny_target_file, output=folder / "s.jsonl", scores=folder / "all.jsonl",
        count=10, progress=False,
    )  # fmt: skip
    report = report_selection(
        datastore=tiny_store, selected=folder / "s.jsonl", scores=folder / "all.jsonl", columns=["kind"]
    )
    return folder, report


@pytest.fixture
def command(made, tiny_store, tmp_path):
    folder, _ = made
    return [
        "report", "--datastore", tiny_store, "--selected", folder / "s.jsonl", "--scores", folder / "all.jsonl",
        "--output", tmp_path / "r.html",
    ]  # fmt: skip


def test_one_file_that_loads_nothing_and_runs_nothing(made, tmp_path):
    write_selection_page(made[1], tmp_path / "r.html")
    page = Page(tmp_path / "r.html")
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "base", "form", "a"}
    values = {(name, value) for _, attrs in page.tags for name, value in attrs.items()}
    assert not [name for name, _ in values if name.startswith("on")]
    assert all(value.startswith("data:") for name, value in values if name in ("src", "href"))
    assert "://" not in page.source
    assert not re.search(r"url\(|@import", page.source)
    (policy,) = [attrs["content"] for _, attrs in page.tags if "http-equiv" in attrs]
    assert policy.startswith("default-src 'none'")
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(images) == 5
    for image in images:
        assert len(image["alt"]) > 20
        ET.fromstring(base64.b64decode(image["src"].partition(",")[2]))
    write_selection_page(made[1], tmp_path / "again.html")
    assert (tmp_path / "again.html").read_bytes() == (tmp_path / "r.html").read_bytes()


def test_hostile_text_changes_no_tag_and_stands_as_text(
    tiny_model_folder, tiny_run, tiny_rows, tiny_target_file, tmp_path, write_rows, undrawn
):
    pages = []
    for mark in ("plain", MARK):
        folder = tmp_path / f"with-{len(mark)}"
        folder.mkdir()
        rows = [
            {
                **row,
                "id": f"{mark}{n}",
                "kind": mark,
                "messages": [{**turn, "content": mark} for turn in row["messages"]],
            }
            for n, row in enumerate(tiny_rows[:6])
        ]
        source = write_rows(folder / "pool.jsonl", rows)
        build_datastore(
            model=tiny_model_folder, checkpoints=tiny_run, data=source, datastore=folder / "ds", proj_dim=64,
            tokens_per_batch=256, progress=False,
        )  # fmt: skip
        options = {"datastore": folder / "ds", "selected": folder / "s.jsonl", "scores": folder / "all.jsonl"}
        select(
            datastore=folder / "ds", targets=[{**json.loads(tiny_target_file.read_text().splitlines()[0])}],
            output=options["selected"], scores=options["scores"], count=3, progress=False,
        )  # fmt: skip
        report = report_selection(**options, columns=["kind"])
        named = [replace(facts, subtask=mark) for facts in report.subtasks]
        report = replace(report, skipped={mark: 1}, subtasks=tuple(named), warnings=(f"{mark}.",))
        write_selection_page(report, folder / "r.html", selected=mark)
        pages.append(Page(folder / "r.html"))
    plain, hostile = pages
    assert [(tag, list(attrs)) for tag, attrs in hostile.tags] == [(tag, list(attrs)) for tag, attrs in plain.tags]
    assert hostile.text.count(SHOWN) > 20
    assert "\u202e" not in hostile.source
    assert "\x07" not in hostile.source


def test_a_warning_stands_first_and_is_marked(made, tmp_path, undrawn):
    report = replace(made[1], warnings=("The ranking is mostly length: see `--method length`.",))
    write_selection_page(report, tmp_path / "r.html")
    page = Page(tmp_path / "r.html")
    start = page.source.index('class="verdict"')
    assert page.source[start:].index("<b>Warning:</b> The ranking is mostly length") < 60
    assert "<code>--method length</code>" in page.source
    assert "explains most of the ranking" not in page.text
    write_selection_page(made[1], tmp_path / "r.html")
    assert "explains most of the ranking" in Page(tmp_path / "r.html").text or made[1].warnings
    assert ("Warning:" in Page(tmp_path / "r.html").text) == bool(made[1].warnings)


def test_of_few_rows_or_without_norms_no_more_is_said_than_is_known(made, tmp_path, undrawn):
    few = replace(made[1], num_rows=29, warnings=())
    length_only = replace(
        made[1], warnings=(), grad_norm_N=None, spreads=tuple(s for s in made[1].spreads if s.name != "gradient norm")
    )
    for report, expected in ((few, "correlations say little"), (length_only, "Length does not explain most")):
        write_selection_page(report, tmp_path / "r.html")
        text = Page(tmp_path / "r.html").text
        assert expected in text
        assert "Neither length nor" not in text


def test_rows_are_shown_with_their_text_and_only_so_many(made, tiny_rows, tmp_path, undrawn):
    report = made[1]
    write_selection_page(report, tmp_path / "r.html")
    page = Page(tmp_path / "r.html")
    shown = [*report.top, *report.bottom, *report.below]
    assert len([tag for tag, _ in page.tags if tag == "details"]) == len(shown) == 15
    for row in shown:
        assert row.record.columns["messages"][1]["content"] in page.text
    absent = {row["id"] for row in tiny_rows} - {row.id for row in shown}
    assert not [name for name in absent if f"<bdi>{name}</bdi>" in page.source]


def test_values_beyond_the_first_are_told_together(made, tmp_path, undrawn):
    report = made[1]
    (column,) = report.columns
    many = [replace(column.values[0], value=f"v{n}", num_pool=1, num_selected=n < 10) for n in range(40)]
    write_selection_page(replace(report, columns=(replace(column, values=tuple(many)),)), tmp_path / "r.html")
    page = Page(tmp_path / "r.html")
    assert "(34 other values)" in page.text
    assert "v5" in page.text
    assert "v30" not in page.text


def test_what_negative_targets_removed_is_told_where_there_were_any(
    gradsift, tiny_store, tiny_target_file, tiny_rows, write_rows, tmp_path, undrawn
):
    avoided = write_rows(tmp_path / "avoid.jsonl", tiny_rows[:3])
    ask = ["select", "--datastore", tiny_store, "--targets", tiny_target_file, "--away-from", avoided, "--count", 10]
    ask += ["--output", tmp_path / "s.jsonl", "--scores", tmp_path / "all.jsonl"]
    files = ["--selected", tmp_path / "s.jsonl", "--scores", tmp_path / "all.jsonl", "--output", tmp_path / "r.html"]
    pages = []
    rules = []
    for _ in range(2):
        done = gradsift(*ask, *rules)
        assert done.code == 0, done
        done = gradsift("report", "--datastore", tiny_store, *files)
        assert done.code == 0, done
        pages.append(Page(tmp_path / "r.html").text)
        pulls = [json.loads(line)["away"] for line in (tmp_path / "all.jsonl").read_text().splitlines()]
        rules = ["--away-above", np.median(pulls), "--cap", "kind=4"]
    weighed, ruled = pages
    assert "What negative targets removed" in weighed
    assert "of the best by score alone, ranked behind others" in weighed
    assert "score for negative targets" in weighed
    assert "What rules left out" not in weighed
    assert "What rules left out" in ruled
    assert "points to the negative targets" in ruled
    assert "left out by the rule" in ruled
    assert re.search(r"left out since they reach the threshold\s*\d+", ruled)


def test_the_command_says_what_it_wrote_and_can_be_quiet(gradsift, command, made, tmp_path, undrawn):
    done = gradsift(*command, "--json", tmp_path / "r.json")
    assert done.code == 0, done
    assert "10 of 40 rows selected" in done.out
    assert done.out.count("warning: ") == len(made[1].warnings)
    assert f"written: {tmp_path / 'r.html'}, {tmp_path / 'r.json'}" in done.out
    assert json.loads((tmp_path / "r.json").read_text())["num_selected"] == 10
    assert "kind" not in Page(tmp_path / "r.html").text
    done = gradsift(*command, "--column", "kind", "--quiet")
    assert (done.code, done.out, done.err) == (0, "", "")
    assert "kind" in Page(tmp_path / "r.html").text


def test_the_command_refuses_in_one_line(gradsift, command, made, tmp_path):
    assert "its folder is not there" in gradsift(*command, "--json", tmp_path / "no" / "r.json").error
    for name in ("s.jsonl", "all.jsonl"):
        before = (made[0] / name).read_bytes()
        assert "which is read" in gradsift(*command, "--json", made[0] / name).error
        assert (made[0] / name).read_bytes() == before
    assert "no column 'colour'" in gradsift(*command, "--column", "colour").error
    assert "end it in .html" in gradsift(*command, "--output", tmp_path / "r.txt").error
    assert "has no influence_rank" in gradsift(*command, "--selected", made[0] / "all.jsonl").error
    with pytest.raises(SettingError, match=r"end it in \.html"):
        write_selection_page(made[1], made[0] / "s.jsonl")


class TestFigures:
    def test_shares_of_pool_and_selection_each_add_up_to_all(self):
        x_N = np.concatenate([np.random.default_rng(0).normal(size=1000), [1e9, -1e9]])
        (axes,) = compared(x_N, x_N > 1, label="x").axes
        pool, selected = axes.patches
        for area in (pool, selected):
            corners = area.get_xy()
            heights = {}
            for (left, y0), (right, y1) in pairwise(corners):
                if y0 == y1 and right > left:
                    heights[left, right] = max(y0, heights.get((left, right), 0))
            assert sum(heights.values()) == pytest.approx(100)
        assert axes.get_xlim()[1] < 1e9

    def test_values_that_do_not_vary_can_be_drawn(self):
        x_N, chosen_N = np.full(3, 7.0), np.array([True, False, False])
        scatter = density(x_N, x_N, xlabel="x", ylabel="y", is_selected_N=chosen_N)
        for figure in (compared(x_N, chosen_N, label="x"), scatter):
            assert data_uri(figure).isascii()

    def test_selected_rows_are_inside_the_axes(self):
        x_N = np.arange(1000.0)
        (axes,) = density(x_N, x_N, xlabel="x", ylabel="y", is_selected_N=x_N > 990).axes
        assert axes.get_ylim()[1] > 999
        (axes,) = density(x_N, x_N, xlabel="x", ylabel="y").axes
        assert axes.get_ylim()[1] < 999 * 1.03
