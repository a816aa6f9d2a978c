# All targets use the virtual environment .venv. It is rebuilt when its requirements change.
#
#   make test      linters and all tests except the slow ones; `make test-all` runs these, too
#   make peers     install the libraries that tests compare Lensor with into .venv; `make test` does this
#   make browser   install Debian's Chromium for the tests of pages; needs root
#   make tex       install Debian's TeX for the tests of TikZ diagrams; needs root
#
# `make test` and CI fail if a test is skipped that tests/support/skips.py does not list.
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

# BackPACK requires torchvision but does not import it. No torchvision fits the CPU build of torch, and one that does
# not fit breaks transformers. curvlinops requires BackPACK, and laplace-torch requires both. All three are therefore
# installed without their dependencies, after the packages that they import. One test reads torchvision's models in a
# separate process; it needs only the Python files of torchvision.
$(PEERS): $(STAMP)
	$(BIN)/pip install --quiet -c constraints.txt accelerate asdfghjkl einconv einops linear_operator opacus pytorch-lightning scipy singd torchmetrics tqdm unfoldNd
	$(BIN)/pip install --quiet -c constraints.txt --no-deps backpack-for-pytorch curvlinops-for-pytorch laplace-torch
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
	$(BIN)/python -m tests.sweeps.patterns
	$(PYTEST)

# Build the site in docs/_build; a warning is an error. The reference imports the integrations, and these the peers.
docs: $(PEERS)
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build

# If these two are not installed, the tests that need them are skipped.
browser:
	$(APT) update
	$(APT) install --no-install-recommends chromium chromium-driver >/dev/null

# The large package contains the LaTeX class `standalone` and TikZ.
tex:
	$(APT) update
	$(APT) install --no-install-recommends texlive-latex-extra >/dev/null

clean:
	rm -rf .venv .pytest_cache .ruff_cache .import_linter_cache .hypothesis build dist docs/_build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
