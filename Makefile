# The commands that set everything up. Needs Python 3.11 and the package index; no NPU.
#   make demo       run the demo checkpoint in MindFormers' inference model on the CPU
#   make test       lint, unit tests, and all tests with the newest MindFormers; transformers and torch as reference
#   make test-all   make test, and what can differ with the other MindFormers releases
#   make format     what ruff changes by itself

PYTHON ?= $(shell command -v python3.11 || command -v python3)
NEWEST := 1.9.0
MINDFORMERS ?= $(NEWEST)
VENV := .venv
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-warn-conflicts
REQUIREMENTS = $(wildcard requirements/mindformers-$*.txt)

.PHONY: help demo test test-all format
help:
	@sed -n 's/^#   //p' Makefile

# One environment, with one release of MindFormers at a time. Of what a 2.x release requires, the package index lacks
# some: a file in requirements/ has the rest.
$(VENV)/.installed-%: pyproject.toml
	@echo "setting up $(VENV) with MindFormers $*: about 3 GB, a few minutes"
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable ".[test]" $(if $(REQUIREMENTS),--requirement $(REQUIREMENTS),"mindformers==$*")
	$(if $(REQUIREMENTS),$(PIP) --no-deps "mindformers==$*")
	@rm -f $(VENV)/.installed-*
	@touch $@

demo: $(VENV)/.installed-$(MINDFORMERS)
	$(VENV)/bin/python scripts/run_infer.py --model_dir demo/qwen3-demo --use_training_conversion --test_mode both

test: $(VENV)/.installed-$(NEWEST)
	$(VENV)/bin/nox --session lint unit newest judge

test-all: test
	$(VENV)/bin/nox --session others

format: $(VENV)/.installed-$(NEWEST)
	$(VENV)/bin/nox --session format
