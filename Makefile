# Two commands do everything on a fresh machine: `make demo`, `make test`.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q -c constraints.txt

BROWSERS := chromium chromium-browser google-chrome google-chrome-stable chrome

.PHONY: demo test browser lint bench docs clean
demo: .venv/demo
	$(BIN)/python examples/demo.py

test: .venv/test browser
	$(BIN)/python -m pytest -n auto --dist loadfile

# The tests of pages open them. Debian's and Ubuntu's packages are the only source used.
browser:
	@for name in $(BROWSERS); do command -v $$name >/dev/null && exit 0; done; \
	command -v apt-get >/dev/null || { echo "the tests need one of: $(BROWSERS)" >&2; exit 1; }; \
	if [ "$$(id -u)" = 0 ]; then as=; else as=sudo; fi; \
	$$as apt-get update -q && $$as env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends chromium

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
