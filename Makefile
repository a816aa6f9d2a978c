# One virtual environment of its own, .venv, serves every target; it is made anew when what it holds changes.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.made
WORKERS ?= 2

.DEFAULT_GOAL := test
.PHONY: demo test test-all lint docs browser clean

$(STAMP): pyproject.toml constraints.txt
	rm -rf .venv
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e ".[demo,dev]"
	touch $@

demo: $(STAMP)
	$(BIN)/lensor demo

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-logo

test: lint
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow"

test-all: lint
	$(BIN)/python -m tests.sweep
	$(BIN)/python -m pytest -n $(WORKERS)

# The site, in docs/_build; a warning is an error.
docs: $(STAMP)
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build

# One test looks at a page in a browser; without one it is skipped. Debian's, which only root may install.
browser:
	apt-get update -qq
	apt-get install -qq --no-install-recommends chromium chromium-driver >/dev/null

clean:
	rm -rf .venv .pytest_cache .ruff_cache .import_linter_cache .hypothesis build dist docs/_build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
