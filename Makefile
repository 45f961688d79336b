# Everything a new checkout needs: make demo | test | lint | bench | bench-accuracy | clean. Requires
# only Linux, make and Python >= 3.11 with its venv module. Each target builds .venv on first use and again when
# pyproject.toml or constraints.txt change, or the checkout has moved.
#
#   make demo SECONDS=60          bounded demo
#   make test ARGS='tests/core'   part of the tests; anything pytest takes
#   make test PYTHON=python3.13   a particular interpreter (after make clean)

SHELL := /bin/sh
.SHELLFLAGS := -eu -c
.DELETE_ON_ERROR:
.NOTPARALLEL:
MAKEFLAGS += --no-builtin-rules

# Nothing of the caller's Python environment may leak in; mirrors and proxies set for pip still work.
unexport PYTHONPATH PYTHONHOME PYTHONSTARTUP VIRTUAL_ENV CONDA_PREFIX PIP_TARGET PIP_PREFIX MAKEFLAGS
export PYTHONNOUSERSITE = 1
export PIP_USER = 0
export PIP_REQUIRE_VIRTUALENV = 0
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PIP_ROOT_USER_ACTION = ignore

VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install -qq --constraint constraints.txt
CANDIDATES := python3.13 python3.12 python3.11 python3
PYTHON ?=
ARGS ?=

.PHONY: help demo test lint bench bench-accuracy format constraints clean
help:
	@sed -n 's/^# \{0,1\}//p' Makefile | sed -n '1,7p'

demo: $(VENV)/.runtime
	@exec $(VENV)/bin/flopledger demo $(if $(SECONDS),--seconds $(SECONDS))

test: $(VENV)/.development
	@exec $(RUN) -m pytest $(ARGS)

lint: $(VENV)/.development
	@failed=''; \
	for check in 'ruff check --quiet .' 'ruff format --quiet --check .' mypy pyright; do \
	  echo "lint: $$check"; $(RUN) -m $$check || failed="$$failed $${check%% *}"; \
	done; \
	echo "lint: import contracts"; $(VENV)/bin/lint-imports --no-logo || failed="$$failed lint-imports"; \
	if test -n "$$failed"; then echo "lint: failed:$$failed" >&2; exit 1; fi

bench: $(VENV)/.development
	@exec $(RUN) -m benchmarks $(ARGS)

# Metered against known FLOP and energy; a real GPU too, where its driver and a Python with PyTorch are:
#   make bench-accuracy ARGS='--python /opt/torch/bin/python --record traces'
bench-accuracy: $(VENV)/.development
	@exec $(RUN) -m benchmarks.accuracy $(ARGS)

format: $(VENV)/.development
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

# The newest versions that work together become the new pins. Run the tests before committing them.
constraints: $(VENV)/.development
	$(RUN) -m pip install --quiet --upgrade --upgrade-strategy eager pip hatchling
	$(RUN) -m pip install --quiet --upgrade --upgrade-strategy eager --group dev
	$(RUN) -m pip install --quiet --upgrade --upgrade-strategy eager --no-build-isolation --editable '.[all]'
	{ sed -n '/^#/p' constraints.txt; $(RUN) -m pip freeze --all --exclude-editable --exclude setuptools; } > constraints.new
	mv constraints.new constraints.txt

clean:
	rm -rf $(VENV) build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache .schemathesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- the environment -----------------------------------------------------------------------------

# Which checkout and interpreter the environment serves; a moved or copied checkout, or a vanished
# interpreter, makes a new one (an editable install remembers its absolute path).
STALE := $(shell test "$$(cat $(VENV)/.checkout 2>/dev/null)" = "$$(pwd -P)" && $(RUN) -c '' 2>/dev/null || echo stale)

$(VENV)/.checkout: $(if $(STALE),force)
	@found=''; \
	for candidate in $(if $(PYTHON),'$(PYTHON)',$(CANDIDATES)); do \
	  "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || continue; \
	  found="$$candidate"; \
	  "$$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1 && break; \
	  echo "make: $$candidate has no venv module, looking further" >&2; found="no-venv:$$candidate"; \
	done; \
	case "$$found" in \
	  '') echo "make: no Python >= 3.11 among: $(or $(PYTHON),$(CANDIDATES)). Install one (Debian: apt install python3 python3-venv)," \
	      "or name one: make PYTHON=/path/to/python3" >&2; exit 2;; \
	  no-venv:*) echo "make: $${found#no-venv:} cannot make virtual environments." \
	      "Install its venv module (Debian, Ubuntu: apt install python3-venv) and run make again." >&2; exit 2;; \
	esac; \
	echo "make: setting up $(VENV) with $$("$$found" --version) (once, a minute or two)" >&2; \
	if test -e $(VENV)/.checkout || ! $(RUN) -c '' 2>/dev/null; then rm -rf $(VENV); fi; \
	"$$found" -m venv $(VENV); \
	pwd -P > $@

$(VENV)/.build: $(VENV)/.checkout pyproject.toml constraints.txt
	@$(PIP) pip hatchling
	@touch $@

# What the daemons and the demo need.
$(VENV)/.runtime: $(VENV)/.build
	@$(PIP) --no-build-isolation --editable '.[agent,collector]'
	@touch $@

# Everything: all extras and the tools of tests, lint and benchmarks.
$(VENV)/.development: $(VENV)/.build
	@$(PIP) --group dev
	@$(PIP) --no-build-isolation --editable '.[all]'
	@touch $@ $(VENV)/.runtime

.PHONY: force
force:
