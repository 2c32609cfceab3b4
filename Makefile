# Two commands do all on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PACKAGES := compression optim coordinator node
JOBS   ?= $(shell nproc)

.PHONY: help setup demo test test-fast soak learning lint bench publish clean
.DEFAULT_GOAL := help

help:            ## show this list
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 14

setup: $(STAMP)  ## make .venv with the thinwire command in it

# The links show checkers and editors the packages under their own name, which an editable install does not.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "thinwire needs Python 3.11 or newer: make setup PYTHON=python3.12" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cpu,hf,plot,tensorboard,wandb,ray,test,lint]'
	rm -rf $(VENV)/lint && mkdir -p $(VENV)/lint/thinwire
	ln -s $(addprefix $(CURDIR)/,$(PACKAGES)) $(VENV)/lint/thinwire
	touch $@

demo: setup      ## a coordinator and 4 nodes on this machine, real text, live table (2 minutes)
	$(BIN)/thinwire demo

test: setup      ## every test that this machine can run; says what it skipped and why
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

test-fast: setup ## the quick ones: no swarms of processes, no long computations
	$(BIN)/python -m pytest -n 2 -m "not swarm and not slow"

SECONDS ?= 120
PEERS   ?= 4
EVERY   ?= 10
SEED    ?= 1

soak: setup      ## faults in a swarm of real processes: SECONDS=120 PEERS=4 EVERY=10 SEED=1 are the defaults
	$(BIN)/python -m tests.chaos.soak --seconds $(SECONDS) --peers $(PEERS) --every $(EVERY) --seed $(SEED)

learning: setup  ## long runs of what the methods are claimed to learn, an hour: losses, and claims that do not hold
	$(BIN)/python -m tests.learning

lint: setup      ## ruff, mypy (strict), import-linter, circles among imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m tests.support.imports
	cd $(VENV)/lint && ../bin/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache \
	  --explicit-package-bases --namespace-packages $(addprefix -p thinwire.,$(PACKAGES))
	cd $(VENV)/lint && PYTHONPATH=. ../bin/lint-imports --config $(CURDIR)/pyproject.toml --no-cache

PUBLISHED := tests/benchmarks/published.json

bench: setup     ## speed and memory, beside the published figures: says what got worse
	$(BIN)/thinwire bench all --against $(PUBLISHED)

publish: setup   ## measure, and make these the published figures
	mkdir -p build
	$(BIN)/thinwire bench all --json > build/published.json
	mv build/published.json $(PUBLISHED)

clean:           ## remove what setup and the tests made
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
