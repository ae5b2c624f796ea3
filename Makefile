# Two commands do everything on a fresh machine: `make demo`, `make test`.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q -c constraints.txt

.PHONY: demo test test-avx2 lint bench docs clean
demo: .venv/demo
	$(BIN)/python examples/demo.py

test: .venv/test
	$(BIN)/python -m pytest -n auto --dist loadfile

# The tests that could tell processors apart, as one without AVX-512 would run them.
test-avx2: .venv/test
	tests/processor/as_avx2 $(BIN)/python -m pytest -n auto --dist loadfile -m processor

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/test
	$(BIN)/python benchmarks/run.py

docs: .venv/test
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/round_trips.py

.venv/python:
	$(PYTHON) -c 'import sys; sys.exit("surgery needs Python 3.11 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	touch $@

.venv/demo: .venv/python pyproject.toml constraints.txt
	$(PIP) -e '.[demo]'
	touch $@

.venv/test: .venv/python pyproject.toml constraints.txt
	$(PIP) -e '.[test]'
	touch $@

clean:
	rm -rf .venv demo-out dist build
