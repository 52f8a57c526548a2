# Every target makes its own virtual environment first and keeps it until pyproject.toml changes.
#   make demo            the whole chain on a shipped model, from nothing to a report
#   make demo-emoji      the same on coloured emoji
#   make bench           parity, speed, memory and size of Stable Diffusion 1.5's denoiser on this machine
#   make test            the tests
#   make test VENV=DIR   the same in an environment of your own

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# Python compiles a module when it is first imported; to compile all modules of all packages takes longer than the rest.
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check --quiet --no-compile
SOURCES := edadm_cli kernels tests docs benchmarks examples
PROGRAMS := $(wildcard benchmarks/*.py benchmarks/*/*.py)

.DEFAULT_GOAL := help
.PHONY: help demo demo-emoji bench test lint type format docs kernels study table clean

help:
	@sed -n 's/^#   //p' $(firstword $(MAKEFILE_LIST))
	@echo 'make lint | type | format | docs | kernels | study | table | clean'

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("edadm needs Python 3.11 or newer; say which with PYTHON=") \
	if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	$(INSTALL) --editable '.[dev]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-docs: pyproject.toml | $(VENV)/bin/python
	$(INSTALL) --editable '.[docs]'
	@touch $@ $(VENV)/.installed

demo: $(VENV)/.installed
	$(BIN)/edadm run --model digits-sd --bits w4a8 --num-images 500
	@echo "The report: $(CURDIR)/runs/digits-sd/report.html"

# Coloured emoji from words. The recipe quick learns nothing; RECIPE=default learns for an hour or more on two cores.
RECIPE ?= quick
demo-emoji: $(VENV)/.installed
	$(BIN)/edadm run --model emoji-sd --bits w4a8 --recipe $(RECIPE) --num-images 32
	@echo "The report: $(CURDIR)/runs/emoji-sd/report.html"

# 24 GB of memory for Stable Diffusion; MODEL=digits-sd needs one.
MODEL ?= sd15-random
bench: $(VENV)/.installed
	$(BIN)/edadm bench --model $(MODEL) --bits w8a8,w4a8

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/mypy $(PROGRAMS)

type: $(VENV)/.installed-dev
	$(BIN)/mypy
	$(BIN)/mypy $(PROGRAMS)

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

# The reference of commands is compared with --help, and the site is built into site/; a warning is an error.
docs: $(VENV)/.installed-docs
	$(BIN)/python docs/cli_reference.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# Which denoisers of diffusers work, from tiny random pipelines: the table in docs/models.md.
JOBS ?= 2
table: $(VENV)/.installed
	$(BIN)/python benchmarks/denoisers.py --jobs $(JOBS)
	$(BIN)/python benchmarks/denoisers.py --engine --jobs $(JOBS)

# Every kernel compiled for the architectures given, its machine code judged; no GPU needed.
ARCH ?= 80 86 89 90
kernels: $(VENV)/.installed
	$(BIN)/python -m edadm_kernels.codegen --arch $(ARCH)

# Every recipe, bit width and seed on both shipped models: hours on a CPU, goes on after a kill.
study: $(VENV)/.installed
	$(BIN)/python benchmarks/recipes.py --model digits-sd --out studies/digits-sd
	$(BIN)/python benchmarks/recipes.py --model digits-ddpm --out studies/digits-ddpm

clean:
	rm -rf .venv build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
