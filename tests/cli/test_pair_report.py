"""The page about scored pairs: one closed file, hostile text as text, numbers that are those of the scores."""

import base64
import hashlib
import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import cli.figures
import cli.pair_report
from ches.scored import Manifest, manifest_path
from cli.figures import agreement, data_uri, density, histogram
from cli.pair_report import write_report
from datastore.errors import DataError, SettingError
from less.statistics import spearman

MEASURES = ("ches", "ln_ches", "alpha_ches", "last_hidden", "edit_distance")
LENGTHS = ("length_difference", "length_chosen", "length_rejected")


def pair(number, rng, **more):
    """A made-up scored row."""
    num_chosen, num_rejected = (int(n) for n in rng.integers(4, 60, 2))
    return {
        "id": f"pair-{number}",
        "prompt": [{"role": "user", "content": f"Question {number}?"}],
        "chosen": [{"role": "assistant", "content": f"One reply to {number}."}],
        "rejected": [{"role": "assistant", "content": f"Another reply to {number}."}],
        "ches": float(1000 * rng.normal()),
        "ln_ches": float(20 * rng.normal() - 50),
        "alpha_ches": float(rng.normal()),
        "last_hidden": float(3 + rng.random()),
        "edit_distance": float(rng.random()),
        "length_difference": num_rejected - num_chosen,
        "length_chosen": num_chosen,
        "length_rejected": num_rejected,
        "logp_chosen": -2.0 * num_chosen,
        "logp_rejected": -2.5 * num_rejected,
        "ches_problem": None,
        **more,
    }


def pairs(count, **more):
    rng = np.random.default_rng(0)
    return [pair(number, rng, **more) for number in range(count)]


def unscored(row, reason):
    """The row as it is written when it cannot be scored."""
    known = (*MEASURES, *LENGTHS, "logp_chosen", "logp_rejected")
    return {**row, **{name: None for name in known if name in row}, "ches_problem": reason}


def write_scored(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_manifest(scored, **more):
    """The manifest of a scored file, whose source had the same rows."""
    data = scored.read_bytes()
    fields = {
        "settings": {
            "model": {"fingerprint": "ab" * 32, "dtype": "float32", "adapter_sha256": None},
            "rendering": {"max_length": 1024, "system_prompt": "keep", "tokens": "trainer"},
        },
        "environment": {"model": "tiny/model", "adapter": None, "device": "cpu", "versions": {"torch": "2.0"}},
        "source": {"name": "pairs.jsonl", "sha256": "cd" * 32, "num_rows": data.count(b"\n")},
        "output": {"sha256": hashlib.sha256(data).hexdigest(), "num_bytes": len(data)},
        "num_scored": 0,
        "num_retries": 0,
        "rewritten": False,
        "problems": [],
        "examples": [],
    }
    Manifest(**{**fields, **more}).write(scored)


class Page(HTMLParser):
    """A page as a browser takes it apart."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        self.blocks: list[str] = []
        """The texts of elements of the class `text`."""
        self.parts: list[list[float]] = []
        """For each reply that is shown token by token, the contributions."""
        self._inside = None
        self.feed(self.source)
        self.text = "".join(self.texts)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        classes = (attrs.get("class") or "").split()
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        self._inside = "cell" if tag in ("td", "th") else "block" if "text" in classes else self._inside
        if "text" in classes:
            self.blocks.append("")
        if "tokens" in classes:
            self.parts.append([])
        if "data-part" in attrs:
            self.parts[-1].append(number(attrs["data-part"]))

    def handle_endtag(self, tag):
        if tag in ("td", "th", "p"):
            self._inside = None

    def handle_data(self, data):
        self.texts.append(data)
        if self._inside == "cell":
            self.rows[-1][-1] += data
        elif self._inside == "block":
            self.blocks[-1] += data

    def line(self, name):
        """The cells of the row of a table that begins with `name`."""
        (found,) = [row for row in self.rows if row and row[0] == name]
        return found[1:]

    def ids(self):
        """Of the pairs that are shown, from the first of the riskiest to the last of the safest."""
        return re.findall(r'<span class="id"><bdi>(.*?)</bdi></span></summary>', self.source)


def number(text):
    return float(text.replace("−", "-").replace(",", ""))


@pytest.fixture
def undrawn(monkeypatch):
    """Pages without their figures, which take most of the time."""
    for name in ("histogram", "density", "agreement"):
        monkeypatch.setattr(cli.pair_report, name, lambda *args, **labels: None)
    monkeypatch.setattr(cli.pair_report, "data_uri", lambda figure: "data:,")


@pytest.fixture
def show(tmp_path, undrawn):
    """From rows to the page about them; fields of a manifest, if one is wanted."""

    def make(rows, manifest=None, name="scored.jsonl", **options):
        scored = write_scored(tmp_path / name, rows)
        manifest_path(scored).unlink(missing_ok=True)
        if manifest is not None:
            write_manifest(scored, **manifest)
        make.report = write_report(scored, tmp_path / "page.html", **options)
        return Page(make.report.output)

    return make


def tokens_of(row, rng, num_chosen=6, num_rejected=9):
    """An example of a manifest, and the row with the scores that its contributions add up to."""
    sides = {}
    for side, count in (("chosen", num_chosen), ("rejected", num_rejected)):
        sides[side] = {
            "tokens": [f" word{n}" for n in range(count)],
            **{name: (100 * rng.normal(size=count)).tolist() for name in ("ches", "alpha_ches")},
        }
    sums = {name: [np.sum(sides[side][name]) for side in sides] for name in ("ches", "alpha_ches")}
    values = {
        "ches": sum(sums["ches"]),
        "ln_ches": sums["ches"][0] / num_chosen**2 + sums["ches"][1] / (num_chosen * num_rejected),
        "alpha_ches": sum(sums["alpha_ches"]),
    }
    return {**row, **values}, {"values": values, **sides}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A page with its figures, about many pairs."""
    folder = tmp_path_factory.mktemp("drawn")
    scored = write_scored(folder / "scored.jsonl", pairs(20_000))
    write_manifest(scored)
    write_report(scored, folder / "page.html")
    return Page(folder / "page.html")


class TestThePageIsClosed:
    def test_one_file_that_loads_nothing_and_runs_nothing(self, drawn):
        assert not {tag for tag, _ in drawn.tags} & {"script", "link", "iframe", "object", "embed", "base", "form", "a"}
        values = {(name, value) for _, attrs in drawn.tags for name, value in attrs.items()}
        assert not [name for name, _ in values if name.startswith("on")]
        assert all(value.startswith("data:") for name, value in values if name in ("src", "href"))
        assert "://" not in drawn.source
        assert not re.search(r"url\(|@import", drawn.source)
        (policy,) = [attrs["content"] for _, attrs in drawn.tags if "http-equiv" in attrs]
        assert policy.startswith("default-src 'none'")

    def test_figures_are_whole_and_say_what_they_show(self, drawn):
        images = [attrs for tag, attrs in drawn.tags if tag == "img"]
        assert len(images) == 2 * len(MEASURES) + 1
        for image in images:
            assert len(image["alt"]) > 20
            kind, _, data = image["src"].partition(",")
            assert kind == "data:image/svg+xml;base64"
            for element in ET.fromstring(base64.b64decode(data)).iter():
                links = [value for name, value in element.attrib.items() if name.endswith(("href", "src"))]
                assert all(link.startswith(("#", "data:")) for link in links)

    def test_the_same_scores_give_the_same_bytes(self, tmp_path):
        scored = write_scored(
            tmp_path / "scored.jsonl",
            [{name: row[name] for name in row if name not in MEASURES[:4]} for row in pairs(30)],
        )
        for name in ("a.html", "b.html"):
            write_report(scored, tmp_path / name)
        assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


class TestFigures:
    def test_a_histogram_counts_every_value_in_range_or_at_the_rim(self):
        x_N = np.concatenate([np.random.default_rng(0).normal(size=1000), [1e9, -1e9]])
        (axes,) = histogram(x_N, label="x").axes
        heights = [bar.get_height() for bar in axes.patches]
        assert sum(heights[: cli.figures._BINS]) == 1002
        assert axes.get_xlim()[1] < 4

    @pytest.mark.parametrize("count", [1, 2, cli.figures._POINTS + 1])
    def test_values_that_do_not_vary_can_be_drawn(self, count):
        x_N = np.full(count, 7.0)
        figures = (
            histogram(x_N, label="x"),
            density(x_N, x_N, xlabel="x", ylabel="y"),
            agreement(np.full((3, 3), np.nan), "abc"),
        )
        for figure in figures:
            assert data_uri(figure).isascii()

    def test_none_of_pyplots_state_is_touched(self):
        assert "pyplot" not in Path(cli.figures.__file__).read_text().replace("No state of pyplot", "")


MARKS = {
    "QQQ": "<script>'\"&{{7*7}}</p><b>\u202e\x07",
    "ZZZ": "<b onx='\"&\u202e",  # of file names, which hold no slash
    "JJJ": "<i>&",  # inside of JSON, which escapes quotes on its own
}
SHOWN = {
    "QQQ": "<script>'\"&{{7*7}}</p><b>⟨U+202E⟩␇",
    "ZZZ": "<b onx='\"&⟨U+202E⟩",
    "JJJ": "<i>&",
}


def everywhere(marks):
    """Rows, a file name and a manifest with a mark wherever text can come from."""
    q, z, j = (marks.get(name, name) for name in MARKS)
    rng = np.random.default_rng(1)
    rows = [
        pair(0, rng, prompt=q, chosen=f"a{q}", rejected=f"b{q}", id=q),
        pair(1, rng, tools=[{"name": j}], chosen=[{"role": "assistant", "content": "x", "tool_calls": [{"n": j}]}]),
        pair(2, rng, prompt=[{"role": "system", "content": q}, {"role": "user", "content": q}], ches_problem=q),
        unscored(pair(3, rng), q),
    ]
    rows[2], example = tokens_of(rows[2], rng)
    example["chosen"]["tokens"] = [q] * 6
    example["rejected"]["tokens"] = [q] * 9
    problem = {"row": 3, "where": q, "id": q, "reason": q, "detail": q}
    manifest = {
        "settings": {
            "model": {"fingerprint": q, "dtype": q, "adapter_sha256": None},
            "rendering": {"max_length": 64, "system_prompt": q, "tokens": q},
        },
        "environment": {"model": q, "adapter": q, "device": q, "versions": {q: q}},
        "source": {"name": q, "sha256": q, "num_rows": 4},
        "problems": [problem],
        "examples": [{"row": 2, **example}],
    }
    return rows, manifest, f"{z}.jsonl"


class TestHostileText:
    @pytest.mark.parametrize("with_manifest", [True, False])
    def test_changes_no_tag_and_stands_as_text_wherever_it_comes_from(self, show, with_manifest):
        pages = []
        for marks in ({}, MARKS):
            rows, manifest, name = everywhere(marks)
            pages.append(show(rows, manifest if with_manifest else None, name=name))
        plain, hostile = pages
        assert [(tag, list(attrs)) for tag, attrs in hostile.tags] == [(tag, list(attrs)) for tag, attrs in plain.tags]
        expected = plain.text
        for mark, shown in SHOWN.items():
            assert mark in expected
            expected = expected.replace(mark, shown)
        cut = re.compile(r"sha256 \S+|fingerprint \S+|⟨U\+202E⟩\S*␇?")  # hashes are shown by their beginning
        assert cut.sub("", hostile.text) == cut.sub("", expected)
        assert "\u202e" not in hostile.source
        assert "\x07" not in hostile.source

    @pytest.mark.parametrize(
        ("text", "shown"),
        [
            ("a\u202eb", "a⟨U+202E⟩b"),
            ("a\u200bb\ufeff", "a⟨U+200B⟩b⟨U+FEFF⟩"),
            ("a\x00b\x1b[31m\r\nc", "a␀b␛[31m␍\nc"),
            ("a\x7f\x85\u2028b", "a⟨U+007F⟩⟨U+0085⟩⟨U+2028⟩b"),
            ("half \ud800 a pair", "half ⟨U+D800⟩ a pair"),
            (
                "kept: é 日本 سلام\u200cها 👩\u200d👧 a\u00a0b\n\n\tx",
                "kept: é 日本 سلام\u200cها 👩\u200d👧 a\u00a0b\n\n\tx",
            ),
        ],
    )
    def test_characters_without_a_shape_of_their_own_are_made_visible(self, show, text, shown):
        rows = pairs(2)
        rows[0] |= {"prompt": text, "chosen": f"1{text}", "rejected": f"2{text}"}
        page = show(rows)
        assert page.blocks.count(shown) == page.blocks.count(f"1{shown}") == page.blocks.count(f"2{shown}") == 1

    def test_long_texts_keep_both_ends_and_say_how_much_is_left_out(self, show):
        rows = pairs(2)
        rows[0] |= {"prompt": "begin" + 100_000 * "x" + "end", "chosen": "a", "rejected": "b"}
        (block,) = [block for block in show(rows).blocks if block.startswith("begin")]
        assert block.endswith("end")
        left_out = number(re.search(r"… ([\d,]+) characters left out …", block)[1])
        assert left_out + block.count("x") == 100_000

    def test_of_many_turns_the_last_are_kept(self, show):
        rows = pairs(2)
        rows[0]["prompt"] = [{"role": "user", "content": f"turn {n} {100 * 'x'}"} for n in range(300)]
        page = show(rows)
        (left_out,) = re.findall(r"… (\d+) earlier turns left out …", page.text)
        assert f"turn {left_out} " in page.text
        assert f"turn {int(left_out) - 1} " not in page.text
        assert "turn 299 " in page.text
        assert page.text.count("turn ") < 50

    def test_a_pair_that_cannot_be_read_says_why(self, show):
        rows = pairs(3)
        rows[1]["rejected"] = rows[1]["chosen"]
        assert show(rows).text.count("The texts cannot be shown: same replies") == 1

    def test_texts_are_closed_until_they_are_asked_for(self, show):
        page = show(pairs(30))
        assert [attrs for tag, attrs in page.tags if tag == "details"] == [{}] * 20
        assert "may be offensive" in page.text


class TestSize:
    def test_of_a_page_about_many_pairs_is_bounded(self, drawn):
        assert len(drawn.source) < 2_000_000

    def test_of_a_page_about_long_hostile_texts_is_bounded(self, show):
        rng = np.random.default_rng(0)
        rows, examples = [], []
        for n in range(20):
            row, example = tokens_of(pair(n, rng, id="\u202e" * 10_000), rng, 500, 600)
            for side, text in (("chosen", "\u202e"), ("rejected", "&")):
                row[side] = text * 100_000
                example[side]["tokens"] = [text * 50] * len(example[side]["tokens"])
            rows.append({**row, "prompt": "\u202e" * 100_000})
            examples.append({"row": n, **example})
        show(rows, {"examples": examples})
        assert show.report.output.stat().st_size < 5_000_000
        show(rows)
        assert show.report.output.stat().st_size < 5_000_000


class TestAttribution:
    @pytest.mark.parametrize("measure", ["ches", "ln_ches", "alpha_ches"])
    @pytest.mark.parametrize("count", [3, 400, 401, 900])
    def test_contributions_sum_to_the_score(self, show, measure, count):
        row, example = tokens_of(pairs(1)[0], np.random.default_rng(count), 7, count)
        page = show([row], {"examples": [{"row": 0, **example}]}, measure=measure)
        assert [len(parts) for parts in page.parts] == [7, min(count, 400)]
        rest = re.findall(r"… ([\d,]+) more tokens?: (\S+)", page.text)
        assert [number(left) for left, _ in rest] == ([count - 400] if count > 400 else [])
        total = sum(map(sum, page.parts)) + sum(number(part) for _, part in rest)
        assert total == pytest.approx(row[measure], rel=1e-3, abs=1e-4 * sum(sum(map(abs, p)) for p in page.parts))
        chosen, rejected, together = re.search(
            r"chosen (\S+), rejected (\S+); together (\S+), the pair’s (\w+)", page.text
        ).groups()[:3]
        assert number(chosen) == pytest.approx(sum(page.parts[0]), rel=1e-2)
        assert together == page.line(measure)[1]  # of one pair, the least value
        assert number(chosen) + number(rejected) == pytest.approx(number(together), rel=1e-3, abs=0.02)

    def test_tints_go_by_sign_and_size(self, show):
        row, example = tokens_of(pairs(1)[0], np.random.default_rng(0))
        example["chosen"]["alpha_ches"], example["rejected"]["alpha_ches"] = [-9.0, -3, -0.1, 0, 3, 9], [0.0] * 9
        page = show([{**row, "alpha_ches": -0.1}], {"examples": [{"row": 0, **example}]}, measure="alpha_ches")
        tints = [attrs.get("class") for _, attrs in page.tags if "data-part" in attrs]
        assert tints[:6] == ["f5", "f2", None, None, "r2", "r5"]

    def test_every_character_of_the_tokens_is_there(self, show):
        row, example = tokens_of(pairs(1)[0], np.random.default_rng(0), 4, 1)
        example["chosen"]["tokens"] = ["A", " <b>", "\n", "end"]
        page = show([row], {"examples": [{"row": 0, **example}]})
        assert "A <b>⏎\nend" in page.blocks

    def test_contributions_to_another_score_are_not_shown(self, show):
        row, example = tokens_of(pairs(1)[0], np.random.default_rng(0))
        page = show([{**row, "ches": row["ches"] + 10}], {"examples": [{"row": 0, **example}]}, measure="ches")
        assert page.parts == []
        assert "do not sum to this pair’s ches" in page.text
        assert "One reply to 0." in page.blocks

    @pytest.mark.parametrize("broken", ["tokens", "ches"])
    def test_that_is_broken_is_not_shown(self, show, broken):
        row, example = tokens_of(pairs(1)[0], np.random.default_rng(0))
        del example["rejected"][broken]
        assert "no contributions to ln_ches" in show([row], {"examples": [{"row": 0, **example}]}).text

    def test_belongs_to_the_sources_row_where_lines_were_no_rows(self, show):
        """Lines 1 and 2 of the source are no JSON objects; line 4 is one, with text that is not Unicode."""
        rng = np.random.default_rng(0)
        row, example = tokens_of(pair(4, rng), rng)
        rows = [pair(0, rng), unscored(pair(3, rng), "not JSON"), row, pair(5, rng)]
        reasons = {1: "not JSON", 2: "not an object", 3: "not JSON"}
        problems = [{"row": n, "where": f"l{n}", "id": "x", "reason": r, "detail": ""} for n, r in reasons.items()]
        page = show(rows, {"problems": problems, "examples": [{"row": 4, **example}]})
        assert "".join(example["chosen"]["tokens"]) in page.blocks
        assert "One reply to 4." not in page.blocks
        assert "One reply to 5." in page.blocks


class TestNumbers:
    def test_of_the_table_are_numpys(self, show):
        rows = pairs(101)
        rows[5] = unscored(rows[5], "empty reply")
        page = show(rows)
        for name in (*MEASURES, *LENGTHS, "logp_chosen"):
            known = [row for row in rows if row[name] is not None]
            count, *cuts_and_rhos = page.line(name)
            cuts, rhos = cuts_and_rhos[:7], cuts_and_rhos[7:]
            assert int(count) == 100
            expected = np.quantile([row[name] for row in known], [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1])
            step = 10.0 ** -len(cuts[0].partition(".")[2])
            assert [number(cut) for cut in cuts] == pytest.approx(expected, abs=0.51 * step)
            assert step <= np.abs(expected).max() / 100 or name in LENGTHS
            for length, rho in zip(LENGTHS, rhos, strict=True):
                expected_rho = spearman([row[name] for row in known], [row[length] for row in known])
                assert number(rho) == pytest.approx(expected_rho, abs=0.0051)

    def test_a_null_counts_in_its_own_measure_only(self, show):
        rows = pairs(10)
        rows[3]["alpha_ches"] = None
        page = show(rows)
        assert (page.line("alpha_ches")[0], page.line("ches")[0]) == ("9", "10")
        assert show.report.num_scored == 10

    def test_agreement_is_of_risk_so_that_edit_distance_is_turned(self, show):
        rows = [{**row, "ches": n, "edit_distance": -n} for n, row in enumerate(pairs(9))]
        page = show(rows)
        (alt,) = [attrs["alt"] for tag, attrs in page.tags if tag == "img" and "Spearman: " in attrs["alt"]]
        assert "−edit_distance and ches 1.00" in alt

    def test_of_parquet_are_those_of_json_lines(self, show, tmp_path):
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = [*pairs(12), unscored(pairs(1)[0], "empty reply")]
        page = show(rows)
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "scored.parquet")
        write_report(tmp_path / "scored.parquet", tmp_path / "parquet.html")
        other = Page(tmp_path / "parquet.html")
        for name in MEASURES:
            assert other.line(name) == page.line(name)
        assert other.ids() == page.ids()


class TestRanking:
    def test_is_from_both_ends_and_ties_go_to_the_earlier_row(self, show):
        values = [3, 1, 2, 3, 1, 2, 5]
        rows = [{**row, "ln_ches": value} for value, row in zip(values, pairs(7), strict=True)]
        assert show(rows, num_examples=3).ids() == [f"pair-{n}" for n in (6, 0, 3, 1, 4, 2)]

    def test_shows_no_pair_twice(self, show):
        ids = show(pairs(7), num_examples=10).ids()
        assert sorted(ids) == [f"pair-{n}" for n in range(7)]

    def test_by_edit_distance_begins_with_the_most_alike(self, show):
        rows = [{**row, "edit_distance": n / 10} for n, row in enumerate(pairs(4))]
        assert show(rows, measure="edit_distance").ids() == ["pair-0", "pair-1", "pair-3", "pair-2"]

    @pytest.mark.parametrize(
        ("there", "expected"),
        [(MEASURES, "ln_ches"), (("last_hidden", "ches"), "ches"), (("edit_distance",), "edit_distance")],
    )
    def test_is_by_ln_ches_or_the_first_measure_there_is(self, show, there, expected):
        show([{name: row[name] for name in row if name not in MEASURES or name in there} for row in pairs(4)])
        assert show.report.measure == expected


class TestVerdict:
    @pytest.mark.parametrize("sign", [1, -1])
    def test_a_measure_is_said_to_follow_length_exactly_from_the_threshold_on(self, show, sign):
        rng, said = np.random.default_rng(5), []
        for noise in np.linspace(0.5, 1.6, 12):
            rows = pairs(60)
            for row in rows:
                row["ches"] = sign * (row["length_difference"] + noise * 22 * rng.normal())
            columns = {name: [row[name] for row in rows] for name in (*MEASURES, "length_difference")}
            rho = spearman(columns["ches"], columns["length_difference"])
            show(rows)
            (sentence,) = [s for s in show.report.verdict if "the length difference closely" in s]
            shown = f"(Spearman {rho:.2f})".replace("-", "−")
            assert sentence.startswith(f"`ches` {shown} follows" if abs(rho) >= 0.7 else "No measure follows")
            assert ("or by `ln_ches`" in sentence) == (abs(rho) >= 0.7)
            said.append(abs(rho) >= 0.7)
        assert {*said} == {True, False}

    def test_never_advises_a_measure_that_follows_the_length_of_a_reply(self, show):
        rows = [{**row, "ches": row["length_difference"], "ln_ches": -row["length_chosen"]} for row in pairs(60)]
        show(rows)
        (advice,) = [s for s in show.report.verdict if "Rank within strata" in s]
        assert "`ln_ches`" not in advice
        assert "`alpha_ches`" in advice
        assert "`ln_ches` follows the length of the chosen reply (Spearman −1.00)." in show.report.verdict

    def test_stands_on_the_page_with_its_thresholds(self, show):
        page = show(pairs(50))
        for sentence in show.report.verdict:
            assert sentence.replace("`", "") in page.text
        assert "0.7 or more" in page.text
        assert "below 0.3" in page.text

    def test_names_the_measures_that_rank_otherwise(self, show):
        rows = [
            {**row, "ln_ches": n, "ches": n, "alpha_ches": -n, "edit_distance": -n} for n, row in enumerate(pairs(40))
        ]
        show(rows)
        (sentence,) = [s for s in show.report.verdict if "agrees little" in s]
        assert "`alpha_ches` (−1.00)" in sentence
        assert "`ches`" not in sentence
        assert "edit_distance" not in sentence

    @pytest.mark.parametrize(("count", "advice"), [(0, False), (4, False), (5, True)])
    def test_counts_truncated_replies(self, show, count, advice):
        rows = [{**row, "ches_problem": "truncated reply" if n < count else None} for n, row in enumerate(pairs(100))]
        show(rows, {})
        last = show.report.verdict[-1]
        if count:
            assert last.startswith(f"{count} pairs ({count}.0%) had a reply truncated at 1,024 tokens")
        else:
            assert last == "No reply was truncated."
        assert ("larger `--max-length`" in last) == advice

    @pytest.mark.parametrize("count", [29, 30])
    def test_warns_of_few_pairs(self, show, count):
        show(pairs(count))
        assert ("only 29 pairs" in show.report.verdict[0]) == (count == 29)


class TestManifest:
    def test_tells_how_the_scores_were_made(self, show):
        text = show(pairs(3), {}).text
        for fact in ("tiny/model", "float32", "trainer", "1,024 tokens", "torch 2.0", "pairs.jsonl"):
            assert fact in text
        assert "is not known" not in text

    def test_that_is_missing_is_told(self, show):
        text = show(pairs(3)).text
        assert "no manifest scored.jsonl.manifest.json" in text
        assert "tiny/model" not in text

    @pytest.mark.parametrize(
        ("damage", "told"),
        [
            (lambda doc: doc | {"format": "another"}, "not a manifest"),
            (lambda doc: doc | {"version": 2}, "format version 2"),
            (lambda doc: [doc], "no JSON object"),
            (lambda doc: doc | {"settings": {}}, "it has no 'model'"),
            (lambda doc: doc | {"environment": [1]}, "cannot be used"),
            (lambda doc: doc | {"problems": [{"row": "x"}]}, "cannot be used"),
            (lambda doc: doc | {"output": {"sha256": "0" * 64}}, "is not of these scores"),
        ],
    )
    def test_that_is_damaged_or_anothers_is_told(self, tmp_path, undrawn, damage, told):
        scored = write_scored(tmp_path / "scored.jsonl", pairs(3))
        write_manifest(scored)
        path = manifest_path(scored)
        path.write_text(json.dumps(damage(json.loads(path.read_text()))))
        page = Page(write_report(scored, tmp_path / "page.html").output)
        assert told in page.text
        assert "contributions of single tokens are not known" in page.text
        assert "tiny/model" not in page.text
        assert page.line("ches")[0] == "3"

    def test_that_is_cut_off_is_told(self, tmp_path, undrawn):
        scored = write_scored(tmp_path / "scored.jsonl", pairs(3))
        manifest_path(scored).write_bytes(b'{"format": "gradsift-ch')
        assert "is damaged" in Page(write_report(scored, tmp_path / "page.html").output).text


class TestProblems:
    @pytest.mark.parametrize("with_manifest", [True, False])
    def test_are_counted_by_reason_with_their_first_places(self, show, with_manifest):
        rows = pairs(20)
        for n in range(2, 10):
            rows[n] = unscored(rows[n], "empty reply")
        rows[12]["ches_problem"] = "truncated reply"
        reasons = {n: row["ches_problem"] for n, row in enumerate(rows) if row["ches_problem"]}
        problems = [
            {"row": n, "where": f"pairs.jsonl:{n + 1}", "id": f"pair-{n}", "reason": r, "detail": "why"}
            for n, r in reasons.items()
        ]
        page = show(rows, {"problems": problems} if with_manifest else None)
        count, places = page.line("empty reply")
        name = "pairs" if with_manifest else "scored"
        assert count == "8"
        assert re.findall(rf"{name}\.jsonl:\d+", places) == [f"{name}.jsonl:{n}" for n in range(3, 8)]
        assert places.endswith("…")
        assert page.line("truncated reply")[0] == "1"
        assert show.report.num_scored == 12
        assert ("why" in places) == with_manifest

    def test_of_nothing_is_said_so(self, show):
        assert "Every row was scored" in show(pairs(3)).text


class TestFewScores:
    def test_none(self, show):
        page = show([unscored(row, "empty reply") for row in pairs(3)])
        assert show.report.num_scored == 0
        assert show.report.verdict == ("No pair was scored: there is nothing to rank. The reasons are at the end.",)
        assert not [tag for tag, _ in page.tags if tag in ("img", "details")]
        assert page.line("empty reply")[0] == "3"

    def test_none_of_the_measure_asked_for(self, show):
        page = show([{**row, "ches": None} for row in pairs(3)], measure="ches")
        assert page.line("ches") == ["0", *["–"] * 10]
        assert page.ids() == []

    @pytest.mark.parametrize("count", [1, 3])
    def test_one_or_all_the_same(self, show, count):
        page = show([pairs(1)[0]] * count)
        assert page.line("ches")[8:] == ["–"] * 3
        assert any("cannot be said" in sentence for sentence in show.report.verdict)
        assert len(page.ids()) == count


class TestRefuses:
    @pytest.mark.parametrize(
        ("row", "found"),
        [
            ({"prompt": "p"}, "has prompt;"),
            ({name: 1 for name in (*LENGTHS, "ches_problem")}, "has length_difference"),
            ({**pairs(1)[0], "ches": "high"}, "ches is 'high'"),
            ({**pairs(1)[0], "ches": True}, "ches is True"),
            ({**pairs(1)[0], "ches": 10**400}, "ches is 1000"),
        ],
    )
    def test_a_file_that_is_not_scored(self, tmp_path, row, found):
        scored = write_scored(tmp_path / "other.jsonl", [row])
        with pytest.raises(DataError) as refused:
            write_report(scored, tmp_path / "page.html")
        message = str(refused.value)
        assert message.startswith("other.jsonl:1")
        assert found in message
        assert "gradsift ches score" in message
        assert "\n" not in message
        assert not (tmp_path / "page.html").exists()

    def test_rows_with_other_measures_and_lines_that_are_no_rows(self, tmp_path):
        fewer = {name: value for name, value in pairs(1)[0].items() if name != "alpha_ches"}
        with pytest.raises(DataError, match=r"a\.jsonl:2 has .*the same in every row"):
            write_report(write_scored(tmp_path / "a.jsonl", [pairs(1)[0], fewer]), tmp_path / "page.html")
        (tmp_path / "b.jsonl").write_text(json.dumps(fewer) + "\n{no json\n")
        with pytest.raises(DataError, match=r"b\.jsonl:2 has not JSON: .*gradsift ches score"):
            write_report(tmp_path / "b.jsonl", tmp_path / "page.html")

    def test_a_measure_that_is_not_there(self, tmp_path):
        fewer = {name: value for name, value in pairs(1)[0].items() if name != "alpha_ches"}
        scored = write_scored(tmp_path / "scored.jsonl", [fewer])
        with pytest.raises(SettingError, match="no measure 'alpha_ches'; choose from ches, ln_ches, last_hidden"):
            write_report(scored, tmp_path / "page.html", measure="alpha_ches")

    def test_to_write_over_what_is_no_page(self, tmp_path):
        scored = write_scored(tmp_path / "scored.jsonl", pairs(2))
        before = scored.read_bytes()
        with pytest.raises(SettingError, match=r"end it in \.html"):
            write_report(scored, scored)
        assert scored.read_bytes() == before


class TestTheCommand:
    def test_says_the_verdict_and_where_the_page_is(self, gradsift, tmp_path, undrawn):
        scored = write_scored(tmp_path / "scored.jsonl", pairs(40))
        done = gradsift("ches", "report", "--scored", scored, "--output", tmp_path / "r.html", "--measure", "ches")
        assert done.code == 0, done
        assert "No reply was truncated." in done.out
        assert "40 of 40 rows scored, ranked by ches" in done.out
        assert str(tmp_path / "r.html") in done.out
        assert (tmp_path / "r.html").exists()

    def test_can_be_quiet(self, gradsift, tmp_path, undrawn):
        scored = write_scored(tmp_path / "scored.jsonl", pairs(3))
        done = gradsift("ches", "report", "--scored", scored, "--output", tmp_path / "r.html", "--quiet")
        assert (done.code, done.out, done.err) == (0, "", "")

    def test_refuses_an_unscored_file_in_one_line(self, gradsift, tmp_path):
        file = write_scored(tmp_path / "pairs.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}])
        line = gradsift("ches", "report", "--scored", file, "--output", tmp_path / "r.html").error
        assert "gradsift ches score" in line
