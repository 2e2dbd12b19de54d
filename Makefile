PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test test-fast lint docs
setup: .venv/.installed

# torch first and on its own: a resolver that is free to choose would fetch gigabytes of CUDA libraries.
.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

demo: setup
	$(BIN)/halfstep demo -o demo

# Two workers with one thread each: small networks are faster so than with all cores in turn.
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

test: setup
	$(PYTEST)

test-fast: setup
	$(PYTEST) -m "not slow"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
