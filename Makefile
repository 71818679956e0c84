# One command each; the same on a laptop and in CI.
#
#   make run       a development server on http://127.0.0.1:8081 (/demo), with a key and a token to try
#   make test      the test suite
#                  COVERAGE=yes counts the lines that it reaches, and fails below 95 %
#   make check     format, lint, types, layering
#   make bench     the measurements, written to bench/results.md
#   make lock      the lock files anew, from pyproject.toml
#
# PYTHON=/path/to/python3.12 make run   chooses the interpreter (3.11 or newer)

PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 3
PYTEST_ARGS ?=
# Half as long again: what Python 3.11 has for it is told of every call.
COUNT_LINES := --cov --cov-report=term --cov-fail-under=95
RUN_ARGS ?=

.PHONY: help run test check format bench lock clean

help:
	@sed -n 's/^#   //p' Makefile

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; name it with PYTHON=…" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The package itself is installed editable, so only a change of pyproject.toml or of a lock counts.
# A lock names everything that is needed: without --no-deps, pip would resolve anew, and older ones prefer
# a release that came out since to the locked one where a package is asked for with an extra.
$(VENV)/.runtime: requirements.lock pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

$(VENV)/.development: requirements-dev.lock $(VENV)/.runtime
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements-dev.lock
	@touch $@

run: $(VENV)/.runtime
	$(BIN)/notifyd serve $(RUN_ARGS)

test: $(VENV)/.development
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(if $(COVERAGE),$(COUNT_LINES)) $(PYTEST_ARGS)

check: $(VENV)/.development
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.development
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.development
	$(BIN)/python -m bench

# Needs uv (`pip install uv`). The lock files hold for every platform, and name no package index, so
# that they install from whichever one pip is configured for. To upgrade: make lock UPGRADE=--upgrade
UV_COMPILE = uv pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes \
	--no-header --no-emit-index-url --no-emit-find-links --quiet $(UPGRADE)
lock:
	$(UV_COMPILE) --output-file requirements.lock
	$(UV_COMPILE) --group dev --constraint requirements.lock --output-file requirements-dev.lock

clean:
	rm -rf $(VENV) .coverage .coverage.* .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
