"""What is shipped: the wheel holds the four packages, their data, and nothing else."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("ches", "cli", "datastore", "less")


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory) -> set[str]:
    folder = tmp_path_factory.mktemp("wheel")
    for name in (*PACKAGES, "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder / "dist", folder]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = (folder / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_the_four_packages_and_nothing_else(wheel_names):
    assert {name.split("/")[0].split("-")[0] for name in wheel_names} == {*PACKAGES, "gradsift"}


def test_the_wheel_holds_every_module(wheel_names):
    modules = {str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert modules <= wheel_names


def test_the_wheel_holds_the_data_that_the_commands_and_readers_need(wheel_names):
    needed = {"datastore/FORMAT.md", "cli/sample/README.md", "cli/templates/pair_report.html.j2"}
    needed |= {f"{package}/py.typed" for package in PACKAGES}
    sample = {str(path.relative_to(ROOT)) for path in (ROOT / "cli" / "sample").glob("*.jsonl")}
    assert len(sample) == 3
    assert needed | sample <= wheel_names
