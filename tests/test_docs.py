"""The README is true: its code runs, its commands exist, its numbers come from committed files."""

import json
import re
import shlex
import shutil
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from cli.main import gradsift

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def pair(number: int) -> dict:
    return {
        "prompt": [{"role": "user", "content": f"mix {number} colours"}],
        "chosen": [{"role": "assistant", "content": "red and green" * (1 + number % 3)}],
        "rejected": [{"role": "assistant", "content": f"no {number}" * (1 + number % 2)}],
    }


@pytest.fixture
def here(tmp_path, monkeypatch, tiny_pool, tiny_target_file) -> Path:
    """A folder with the files that the README's commands name."""
    shutil.copy(tiny_pool, tmp_path / "pool.jsonl")
    shutil.copy(tiny_target_file, tmp_path / "target.jsonl")
    shutil.copy(tiny_target_file, tmp_path / "eval.jsonl")
    lines = (json.dumps(pair(n)) + "\n" for n in range(8))
    (tmp_path / "pairs.jsonl").write_text("".join(lines), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore::less.checkpoints.EvidenceWarning")
def test_the_commands_run_as_they_stand(here, tiny_model_folder):
    commands = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("gradsift ")]
    steps = [" ".join(command.split(" --")[0].split()[1:]) for command in commands]
    assert steps == ["warmup", "build-datastore", "select", "evaluate", "ches score", "ches report", "ches filter"]
    for command in commands:
        words = shlex.split(command.replace(MODEL, str(tiny_model_folder)))[1:]
        result = CliRunner().invoke(gradsift, words, catch_exceptions=False)
        assert result.exit_code == 0, result.output
    assert len((here / "selected.jsonl").read_text().splitlines()) == 2
    assert len((here / "kept.jsonl").read_text().splitlines()) == 2
    assert (here / "report.html").exists()
    assert (here / "experiment" / "evaluation.png").exists()


@pytest.mark.filterwarnings("ignore::less.checkpoints.EvidenceWarning")
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:(datasets|dill|multiprocess|pyarrow|pandas).*")
def test_the_python_example_of_a_selection_runs_as_it_stands(here, tiny_model_folder, capsys):
    run(blocks("python")[0], tiny_model_folder)
    assert "row-" in capsys.readouterr().out
    assert (here / "selected.jsonl").exists()


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:(datasets|dill|multiprocess|pyarrow|pandas).*")
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing.* is deprecated:FutureWarning")  # TRL's own default
def test_the_python_example_of_training_on_pairs_runs_as_it_stands(here, tiny_model_folder):
    code = blocks("python")[1].replace(
        'output_dir="dpo"', 'output_dir="dpo", use_cpu=True, bf16=False, report_to="none"'
    )
    variables = run(code, tiny_model_folder)
    assert len(variables["kept"].dataset) == 2
    assert any("displacement/chosen_losing" in entry for entry in variables["trainer"].state.log_history)


def run(code: str, model: Path) -> dict:
    variables: dict = {}
    exec(compile(code.replace(MODEL, str(model)), "README.md", "exec"), variables)
    return variables


def test_every_command_is_named_in_the_readme():
    assert isinstance(gradsift, click.Group)
    names = [
        f"{name} {inner}" if isinstance(command, click.Group) else name
        for name, command in gradsift.commands.items()
        for inner in getattr(command, "commands", [""])
    ]
    missing = [name for name in names if f"gradsift {name}" not in README and f"make {name}" not in README]
    assert not missing


def test_every_file_that_the_pages_link_to_exists():
    for page in (ROOT / "README.md", ROOT / "benchmarks" / "README.md", ROOT / "CHANGELOG.md"):
        text = page.read_text(encoding="utf-8")
        links = re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r"`(results/[^`]+)`", text)
        for link in links:
            assert "://" in link or (page.parent / link).exists(), f"{page.name} links to {link}"


def test_the_changelog_speaks_of_this_version():
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    assert version
    assert f"## {version[1]}" in (ROOT / "CHANGELOG.md").read_text()
