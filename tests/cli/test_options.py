"""Every command and option: named as the API names it, with its default, explained, and quick to ask about."""

import importlib
import os
import subprocess
import sys
import time
from dataclasses import fields
from inspect import cleandoc

import pytest

from cli.main import gradsift as group

COMMANDS = {
    name if inner is command else f"{name} {inner.name}": inner
    for name, command in group.commands.items()
    for inner in getattr(command, "commands", {name: command}).values()
}
REQUIRED = {
    "warmup": ["--model", "m", "--data", "p", "--output", "o"],
    "build-datastore": ["--model", "m", "--checkpoints", "r", "--data", "p", "--datastore", "d"],
    "build-embeddings": ["--model", "m", "--data", "p", "--datastore", "d"],
    "evaluate": ["--datastore", "d", "--targets", "t", "--eval", "e", "--output", "o"],
    "select": ["--datastore", "d", "--targets", "t", "--output", "o"],
    "render": ["--model", "m", "--data", "p"],
    "inspect": ["d"],
    "verify": ["d"],
    "index": ["d"],
    "explain": ["d", "--row", "r"],
    "near-duplicates": ["d"],
    "report": ["--datastore", "d", "--selected", "s", "--scores", "a", "--output", "o"],
    "datastore delete": ["d", "--id", "i"],
    "datastore verify-deleted": ["d"],
    "datastore compact": ["d", "o"],
    "datastore merge": ["o", "d"],
    "datastore split": ["d", "--output", "o"],
    "datastore convert": ["d", "o"],
    "quickstart": [],
    "ches score": ["--model", "m", "--data", "p", "--output", "o"],
    "ches report": ["--scored", "s", "--output", "o"],
    "ches filter": ["--scored", "s", "--output", "o", "--keep-lowest", "0.15"],
}
HEAVY = ("torch", "transformers", "peft", "datasets", "faiss", "pyarrow", "numpy", "rich", "matplotlib")
SHOWN = f"""
import sys
from cli.main import main
try:
    main(sys.argv[1:])
finally:
    print("LOADED", *(name for name in {HEAVY} if name in sys.modules))
"""


def parsed(name):
    with COMMANDS[name].make_context(name, list(REQUIRED[name])) as context:
        return context.params


def test_the_commands_are_those_of_the_issue():
    assert set(COMMANDS) == set(REQUIRED)


@pytest.mark.parametrize("name", REQUIRED)
def test_every_option_has_help_and_every_command_an_example(name):
    command = COMMANDS[name]
    assert command.help
    assert command.short_help.endswith(".")
    assert len(command.short_help) <= 60
    assert f"\n\b\ngradsift {name} " in cleandoc(command.help)
    for option in command.params:
        if option.param_type_name == "option":
            assert option.help, option.name
            assert option.help.split("  [default: ")[0].endswith("."), option.name
    assert {"--quiet", "--debug"} <= {text for option in command.params for text in option.opts}


@pytest.mark.parametrize(
    ("name", "config", "others"),
    [
        ("warmup", "less.WarmupConfig", {}),
        ("build-datastore", "less.BuildConfig", {"update_rule": ("adam",), "projection": ("sparse",)}),
        ("build-embeddings", "less.EmbeddingConfig", {}),
        ("select", "less.ScoreConfig", {"seed": None}),
        ("select", "less.SelectConfig", {"seed": None, "diversity_weight": None, "diversity_candidates": None}),
        ("evaluate", "less.EvaluateConfig", {}),
        ("verify", "less.VerifyConfig", {}),
        ("index", "datastore.IndexConfig", {}),
        ("explain", "less.ExplainConfig", {}),
        ("near-duplicates", "less.NearDuplicatesConfig", {}),
        ("ches score", "ches.ChesConfig", {}),
        ("ches filter", "ches.FilterConfig", {"keep_lowest": 0.15}),
    ],
)
def test_every_field_of_a_config_is_an_option_with_its_default(name, config, others):
    package, config = config.split(".")
    options = parsed(name)
    for field in fields(getattr(importlib.import_module(package), config)):
        assert field.name in options, f"{config}.{field.name} cannot be reached from `gradsift {name}`"
        assert options[field.name] == others.get(field.name, field.default), field.name


@pytest.mark.parametrize("name", [None, *REQUIRED])
def test_help_is_quick_fits_the_terminal_and_loads_nothing_heavy(name):
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", SHOWN, *(name.split() if name else []), "--help"],
        capture_output=True, text=True, timeout=60, env=os.environ | {"COLUMNS": "80"},
    )  # fmt: skip
    seconds = time.monotonic() - start
    assert done.returncode == 0, done.stderr
    *shown, loaded = done.stdout.splitlines()
    assert loaded == "LOADED"
    assert shown[0].startswith("Usage: gradsift")
    assert max(map(len, shown)) <= 80
    assert seconds < 3  # 0.1 on a quiet machine; the promise is 1


def test_version_and_no_arguments(gradsift):
    assert gradsift("--version").out.startswith("gradsift")
    assert "Commands:" in gradsift().out


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["warmup", "--data", "p", "--output", "o"], "'--model'"),
        (["select", "--dataset", "d"], "--dataset"),
        (["selct"], "selct"),
        (["warmup", "--epochs", "many"], "many"),
        (["build-datastore", "--update-rule", "adamw"], "adam-less"),
        (["build-datastore", "--checkpoint-weights", "1,x"], "comma-separated"),
        (["inspect"], "DS"),
    ],
)
def test_a_wrong_option_is_one_line(gradsift, args, expected):
    line = gradsift(*args).error
    assert expected in line
    assert line.endswith("--help")
