"""`gradsift evaluate`: what it prints in 80 columns, what it writes, and its figure."""

import json
import shutil

import pytest

from cli.evaluation_figure import evaluation_figure, percent

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def command(tiny_store, tiny_target_file, tiny_rows, write_rows, tmp_path):
    shutil.copytree(tiny_store, tmp_path / "store")
    rows = [{**row, "answer": row["messages"][1]["content"]} for row in tiny_rows[30:36]]
    return [
        "evaluate", "--datastore", tmp_path / "store", "--targets", tiny_target_file,
        "--eval", write_rows(tmp_path / "eval.jsonl", rows), "--output", tmp_path / "out", "--seeds", 1,
        "--epochs", 1, "--batch-size", 2, "--learning-rate", 1e-2, "--fractions", "0.1", "--eval-rows", 4,
    ]  # fmt: skip


def narrow(out, folder):
    """The longest line that is not a path."""
    return max(len(line) for line in out.splitlines() if str(folder) not in line)


def test_says_what_each_method_gains_and_writes_it_down(gradsift, command, tmp_path):
    methods = "less,less:adam-sparse:none,length"
    done = gradsift(*command, "--methods", methods)
    assert done.code == 0, done
    assert narrow(done.out, tmp_path) <= 80
    assert not any(line != line.rstrip() for line in done.out.splitlines())
    for how in ("rows", "tokens"):
        assert f"tones: 10% of the {how}; loss before training " in done.out
    for method in (*methods.split(","), "random"):
        assert done.out.count(f"\n{method} ") == 2, method
    assert "correct" not in done.out
    found = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert {arm["method"] for arm in found["arms"]} == {*methods.split(","), "random"}
    assert len({arm["loss"] for arm in found["arms"]}) > 2
    assert (tmp_path / "out/evaluation.png").read_bytes().startswith(PNG)
    assert done.out.splitlines()[-2:] == [
        f"written: {tmp_path / 'out' / f'evaluation.{end}'}" for end in ("json", "png")
    ]
    assert "trials: " in done.err
    again = gradsift(*command, "--methods", methods)
    assert again.out == done.out
    assert "trials: " not in again.err


def test_says_what_the_quantiles_and_the_answers_show(gradsift, command, tmp_path):
    done = gradsift(
        *command, "--methods", "length", "--match", "rows", "--quantiles", 3, "--quantile-methods", "length",
        "--answer-rows", 2, "--max-new-tokens", 3,
    )  # fmt: skip
    assert done.code == 0, done
    assert narrow(done.out, tmp_path) <= 80
    assert "does a higher score teach more?" in done.out
    (line,) = [line for line in done.out.splitlines() if line.startswith("tones  ")]
    assert line.split()[:3] == ["tones", "length", "3"]
    header = next(line for line in done.out.splitlines() if "method" in line)
    assert header.split()[-1] == "correct"
    assert "%" in next(line for line in done.out.splitlines() if line.startswith("random "))


def test_random_rows_alone_have_a_figure_too(gradsift, command, tmp_path):
    done = gradsift(*command, "--methods", "random", "--match", "rows", "--quiet")
    assert (done.code, done.out) == (0, ""), done
    (warning,) = done.err.splitlines()
    assert warning.startswith("warning: some trainings have 2 optimizer steps")
    assert (tmp_path / "out/evaluation.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--methods", "best"], "method must be one of"),
        (["--fractions", "2"], "fractions must be above 0 and below 1"),
        (["--fractions", "much"], "--fractions"),
        (["--seeds", 0], "seeds must be at least 1"),
        (["--epochs", 0], "epochs must be at least 1"),
        (["--eval", "another.jsonl"], "as many --eval as --targets"),
        (["--quantiles", 3, "--methods", "rds"], "quantile_methods must be among the methods"),
    ],
)
def test_a_wrong_option_is_one_line_before_any_training(gradsift, command, more, expected, tmp_path):
    assert expected in gradsift(*command, *more).error
    assert not [*tmp_path.glob("out/trials/*")]


def outcome(targets, methods, budgets):
    interval = {"value": 0.1, "low": 0.05, "high": 0.2}
    return {
        "start": {target: {} for target in targets},
        "settings": {"methods": [*methods, "random"]},
        "arms": [
            {"target": target, "fraction": fraction, "match": match, "method": method, "over_random": interval}
            for target in targets for fraction, match in budgets for method in [*methods, "random"]
        ],
    }  # fmt: skip


@pytest.mark.parametrize("targets", [["a"], ["a", "b", "c"]])
@pytest.mark.parametrize("methods", [[], ["less"], ["less", "rds", "bm25", "length", "less:sgd-sparse:none"]])
@pytest.mark.parametrize(
    "budgets", [[(0.05, "rows")], [(f, m) for f in (0.005, 0.05, 0.1) for m in ("rows", "tokens")]]
)
def test_the_figure_has_a_panel_for_each_target_and_a_mark_for_each_arm(targets, methods, budgets):
    figure = evaluation_figure(outcome(targets, methods, budgets))
    assert [panel.get_title(loc="left") for panel in figure.axes] == targets
    for panel in figure.axes:
        marks = [line for line in panel.lines if line.get_marker() == "o"]
        assert sum(len(line.get_xdata()) for line in marks) == len(methods) * len(budgets)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [f"{percent(f)} of the {m}" for f, m in budgets]
    looks = [
        (line.get_color(), line.get_markerfacecolor()) for line in figure.axes[0].lines if line.get_marker() == "o"
    ]
    assert len({*looks}) == len(budgets)


@pytest.mark.parametrize(("fraction", "text"), [(0.05, "5%"), (0.005, "0.5%"), (0.07, "7%"), (0.29, "29%")])
def test_a_small_budget_is_not_rounded_to_nothing(fraction, text):
    assert percent(fraction) == text
