"""The packages: what they offer, in which direction they import, and what they do without."""

import ast
import importlib
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("cli", "ches", "less", "datastore")  # each may import itself and those to its right
PACKAGES = ("ches", "cli", "datastore", "less", "less.data", "less.projection", "less.selection")
CORE = ("ches", "less", "datastore")
ABSENT = ("click", "rich", "datasets", "faiss", "pyarrow")


def modules_of(*packages):
    for package in packages:
        yield package
        path = [str(ROOT / package.replace(".", "/"))]
        yield from (m.name for m in pkgutil.walk_packages(path, f"{package}.") if not m.name.endswith("__main__"))


def imports_of(file):
    """(imported module, whether it is imported for typing only) of every import statement, nested ones too."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield node.module, node in typing_only
        elif isinstance(node, ast.Import):
            yield from ((alias.name, node in typing_only) for alias in node.names)


def python(code, *args, **environment):
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.mark.parametrize("name", list(modules_of(*LAYERS)))
def test_every_module_imports_and_says_what_it_is(name):
    module = importlib.import_module(name)
    assert module.__doc__
    for public in getattr(module, "__all__", ()):
        assert hasattr(module, public), public


@pytest.mark.parametrize("name", PACKAGES)
def test_public_names_are_sorted_and_equal_no_submodule(name):
    package = importlib.import_module(name)
    public = getattr(package, "__all__", [])
    assert list(public) == sorted(public, key=lambda n: (not n.isupper(), n))  # constants, classes, functions
    assert not {*public} & {m.name for m in pkgutil.iter_modules(package.__path__)}


@pytest.mark.parametrize("package", LAYERS)
def test_imports_go_one_way(package):
    allowed = LAYERS[LAYERS.index(package) :]
    for file in sorted((ROOT / package).rglob("*.py")):
        for module, _ in imports_of(file):
            top = module.split(".")[0]
            assert top not in LAYERS or top in allowed, f"{file.relative_to(ROOT)} imports {module}"


def test_the_datastore_knows_no_torch():
    for file in (ROOT / "datastore").glob("*.py"):
        assert not {module.split(".")[0] for module, _ in imports_of(file)} & {"torch", "transformers", "peft"}


@pytest.mark.parametrize("name", ["cli.main", "datastore", "less", "ches", "less.projection"])
def test_importing_a_package_loads_no_torch(name):
    done = python(f"import sys, {name}; print([m for m in ('torch', 'transformers', 'faiss') if m in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("name", ["less.ranking", "less.selection_report", "less.explanation", "less.duplicates"])
def test_what_works_on_kept_scores_loads_no_library_of_models(name):
    """They take seconds, and a selection of which the scores are kept needs none of them."""
    heavy = ("peft", "datasets", "transformers.modeling_utils", "transformers.trainer")
    done = python(f"import sys, {name}; print([m for m in {heavy} if m in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


def test_the_core_does_without_what_only_some_need(tmp_path):
    """A bare torch image: rows of a JSON Lines file are read, rendered, batched and written."""
    code = f"""
import importlib, sys
for name in {ABSENT}:
    sys.modules[name] = None
for name in {list(modules_of(*CORE))}:
    importlib.import_module(name)
from pathlib import Path
from less.data import open_source, write_selected
folder = Path(sys.argv[1])
(folder / "pool.jsonl").write_text('{{"id": 1, "messages": []}}\\n{{"id": 2}}\\n')
source = open_source(folder / "pool.jsonl")
write_selected(folder / "out.jsonl", source.take([1, 0]), [{{"influence_rank": 1}}, {{"influence_rank": 2}}])
from datastore.errors import DataError
(folder / "pool.parquet").write_bytes(b"PAR1")
try:
    open_source(folder / "pool.parquet")
except DataError as error:
    print(error)
"""
    done = python(code, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "without the package pyarrow" in done.stdout
    assert (tmp_path / "out.jsonl").read_text().splitlines()[0] == '{"id": 2, "influence_rank": 1}'


def test_the_command_refuses_another_less_package(tmp_path):
    (tmp_path / "less").mkdir()
    (tmp_path / "less" / "__init__.py").write_text("raise RuntimeError('this is the wrong package')")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}]; from cli.main import main; main(['--help'])"
    done = python(f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert str(tmp_path) in done.stderr
    assert "virtual environment" in done.stderr
