# Everything from a fresh checkout: needs git, make and a python3 of 3.11 or newer, nothing else.
.DEFAULT_GOAL := help
.PHONY: help install demo test suite heavy lint clean

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Python compiles what is imported, once; pip would compile thirty thousand files that nobody does.
unexport PYTHONDONTWRITEBYTECODE
MINUTES ?= 8
OUT ?= runs/demo
SCENES ?= runs/scenes
# On CPUs two processes are faster than one with all threads.
PROCESSES ?= $(shell command -v nvidia-smi >/dev/null 2>&1 || echo 2)
WORKERS = $(shell $(BIN)/python -c 'import os; print(min(8, os.cpu_count() + 1))')

help:
	@echo "make install            make .venv and install"
	@echo "make demo [MINUTES=8]   train on generated scenes for so many minutes, evaluate, write $(OUT)/report.html"
	@echo "make test               lint, types and the whole test suite"
	@echo "make heavy              the tests that take minutes"
	@echo "make clean              remove .venv, runs and caches"

install: $(STAMP)

$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no python3 of 3.11 or newer is on the PATH; install one, or make PYTHON=…" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a few minutes the first time)"
	@# The pip that comes with Python 3.11 takes three times as long to choose among 250 packages.
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --upgrade pip
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -e '.[dev]'
	@# Its own dependencies are forty packages that no test needs.
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps 'lmms-eval>=0.7,<0.8'
	@$(BIN)/python -c 'import vlm.cli, vlm.train.loop, vlm.eval.run' >/dev/null
	@touch $@

demo: $(STAMP)
	@test -d $(SCENES) || { set -x; $(BIN)/vlm data scenes $(SCENES); }
	@rm -rf $(OUT)
	$(BIN)/vlm train configs/demo.yaml minutes=$(MINUTES) data.train=$(SCENES)/train data.val=$(SCENES)/val \
		out=$(OUT) $(if $(PROCESSES),--processes $(PROCESSES))
	$(BIN)/vlm eval $(OUT)/model vqa caption retrieval --data $(SCENES) --out $(OUT)/eval \
		$(if $(PROCESSES),--processes $(PROCESSES))
	$(BIN)/vlm report $(OUT)

# Side by side, for the type checker takes one core and half a minute.
test: $(STAMP)
	@$(MAKE) --no-print-directory --jobs 2 lint suite

# A worker that dies ends the run, and its test is named: with another in its place pytest-xdist may wait for ever
# (its issue 1378). Files come in the order that tests/conftest.py gives them. A worker more than there are cores, for some
# tests wait.
suite: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --max-worker-restart 0

heavy: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m heavy

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) runs build dist .pytest_cache .mypy_cache .ruff_cache *.egg-info
