# One virtual environment of its own, .venv, serves every target; it is made anew when what it holds changes.
#
#   make test      lint and all but the slow tests; `make test-all` runs the slow ones, too
#   make peers     the libraries that tests compare Lensor with, into .venv; `make test` installs them itself
#   make browser   Debian's Chromium, for the tests of pages; needs root
#   make tex       Debian's TeX, for the tests of TikZ pictures; needs root
#
# Both `make test` and CI fail if a test is skipped that is not listed in tests/support/skips.py.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.made
PEERS := .venv/.peers
WORKERS ?= 2
PYTEST := CI=$${CI:-true} $(BIN)/python -m pytest -n $(WORKERS)
APT := DEBIAN_FRONTEND=noninteractive apt-get -qq -o Acquire::Retries=3 -o DPkg::Lock::Timeout=600

.DEFAULT_GOAL := test
.PHONY: demo test test-all lint docs peers browser tex clean

$(STAMP): pyproject.toml benchmarks/pyproject.toml constraints.txt
	rm -rf .venv
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e ".[demo,dev]" -e ./benchmarks
	touch $@

# BackPACK asks for torchvision and does not import it; none fits the CPU build of torch, and one that does not fit
# breaks transformers. curvlinops asks for BackPACK. So these two come alone, and what else they need before them.
# One test reads torchvision's models, which needs no more than its Python files, in a process of its own.
$(PEERS): $(STAMP)
	$(BIN)/pip install --quiet -c constraints.txt einconv einops linear_operator opacus scipy tqdm unfoldNd
	$(BIN)/pip install --quiet -c constraints.txt --no-deps backpack-for-pytorch curvlinops-for-pytorch
	$(BIN)/pip install --quiet -c constraints.txt --no-deps --target .venv/torchvision torchvision
	touch $@

peers: $(PEERS)

demo: $(STAMP)
	$(BIN)/python -m examples.demo

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-logo

test: lint $(PEERS)
	$(PYTEST) -m "not slow"

test-all: lint $(PEERS)
	$(BIN)/python -m tests.sweeps.operations
	$(PYTEST)

# The site, in docs/_build; a warning is an error.
docs: $(STAMP)
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build

# Where these two are not installed, the tests that need them are skipped.
browser:
	$(APT) update
	$(APT) install --no-install-recommends chromium chromium-driver >/dev/null

# The class `standalone` of LaTeX is in the large package; it brings TikZ, too.
tex:
	$(APT) update
	$(APT) install --no-install-recommends texlive-latex-extra >/dev/null

clean:
	rm -rf .venv .pytest_cache .ruff_cache .import_linter_cache .hypothesis build dist docs/_build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
