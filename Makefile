# Two commands do all on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
CORE   := $(VENV)/.core
COMPILED := $(VENV)/.compiled
STAMP  := $(VENV)/.installed
# It says what it fetches, so that minutes of it do not look like a hang.
PIP    := $(BIN)/pip install --disable-pip-version-check --progress-bar on -c constraints.txt
PACKAGES := compression optim coordinator node
CORES  := $(shell nproc)

.PHONY: help setup demo test test-fast simulate soak learning lint types rules bench publish findings clean
.DEFAULT_GOAL := help

help:            ## show this list
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 14

setup: $(STAMP) $(COMPILED)  ## make .venv with everything in it: command, extras, tools for tests and lint

# What the demo needs: thinwire itself, and its CPU kernels compiled.
$(CORE): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "thinwire needs Python 3.11 or newer: make setup PYTHON=python3.12" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing thinwire into $(VENV): some 60 packages, about 1.5 GB, a minute or two on a fast connection."
	$(PIP) -e '.[cpu]'
	touch $@

# Again when a kernel has changed: every worker of the tests would compile it for itself.
$(COMPILED): $(CORE) $(wildcard compression/*/*_cpu.py optim/*/*_cpu.py)
	$(BIN)/python -m thinwire.node.doctor.compiling
	touch $@

# The links show checkers and editors the packages under their own name, which an editable install does not.
$(STAMP): $(CORE)
	@echo "Installing the extras, and what tests and lint need: some 130 packages, about 2 GB."
	$(PIP) -e '.[cpu,hf,plot,tensorboard,wandb,ray,test,lint]'
	rm -rf $(VENV)/lint && mkdir -p $(VENV)/lint/thinwire
	ln -s $(addprefix $(CURDIR)/,$(PACKAGES)) $(VENV)/lint/thinwire
	touch $@

demo: $(COMPILED)    ## a coordinator and 4 nodes on this machine, real text, live table (a minute)
	$(BIN)/thinwire demo

# One worker more than there are cores: with as many, a quarter of their time went by in waits.
# Where the environment forbids it, every process of the tests would compile all that it imports.
test test-fast: export PYTHONDONTWRITEBYTECODE =

test: setup      ## every test that this machine can run; says what it skipped and why
	$(BIN)/python -m pytest -n $(or $(JOBS),$(shell expr $(CORES) + 1)) --dist loadfile --no-loadscope-reorder

test-fast: setup ## the quick ones: no swarms of processes, no long computations
	$(BIN)/python -m pytest -n 2 -m "not swarm and not slow"

N       ?= 10000
FIRST   ?= 1000

simulate: setup  ## N=10000 generated schedules of a committee's seats from seed FIRST=1000 on, on all cores
	$(BIN)/python -m tests.coordinator.quorum.schedules $(N) --first $(FIRST) --jobs $(or $(JOBS),$(CORES))

SECONDS ?= 120
PEERS   ?= 4
EVERY   ?= 10
SEED    ?= 1
SEATS   ?= 1

soak: setup      ## faults in a swarm of real processes: SECONDS=120 PEERS=4 EVERY=10 SEED=1 SEATS=1 are the defaults
	$(BIN)/python -m tests.chaos.soak --seconds $(SECONDS) --peers $(PEERS) --every $(EVERY) --seed $(SEED) --seats $(SEATS)

learning: setup  ## strategies against references in plain torch, on all cores, then their parts: an hour; what does not hold
	mkdir -p build
	$(BIN)/thinwire bench learning -o build/learning.md
	$(BIN)/python -m tests.learning

# mypy takes longer than all the rest, and one core.
lint: setup      ## ruff, mypy (strict), import-linter, circles among imports
	@$(MAKE) --no-print-directory -j2 types rules

types:
	cd $(VENV)/lint && ../bin/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache \
	  --explicit-package-bases --namespace-packages $(addprefix -p thinwire.,$(PACKAGES))

rules:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m tests.support.imports
	cd $(VENV)/lint && PYTHONPATH=. ../bin/lint-imports --config $(CURDIR)/pyproject.toml --no-cache

PUBLISHED := tests/benchmarks/published.json

bench: setup     ## speed and memory, beside the published figures: says what got worse
	$(BIN)/thinwire bench all --against $(PUBLISHED)

publish: setup   ## measure, and make these the published figures
	mkdir -p build
	$(BIN)/thinwire bench all --json > build/published.json
	mv build/published.json $(PUBLISHED)

findings:        ## what libraries of this field do that one would not guess: each in an environment of its own
	@for script in findings/*.sh; do echo "== $$script"; bash "$$script" || exit 1; done

clean:           ## remove what setup and the tests made
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
