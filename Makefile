# The two commands that set everything up. Needs Python 3.11 and the package index; no NPU.
#   make demo    run the demo checkpoint in MindFormers' inference model on the CPU
#   make test    lint, unit tests, and the integration tests with MindFormers 1.7.0, 1.8.0 and 1.9.0

PYTHON ?= $(shell command -v python3.11 || command -v python3)
MINDFORMERS ?= 1.9.0
VENV := .venv
INSTALLED := $(VENV)/.installed-$(MINDFORMERS)

.PHONY: help demo test
help:
	@sed -n 's/^#   //p' Makefile

$(INSTALLED): pyproject.toml
	@echo "setting up $(VENV) with MindFormers $(MINDFORMERS): about 3 GB, a few minutes"
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[test]" "mindformers==$(MINDFORMERS)"
	@rm -f $(VENV)/.installed-*
	@touch $@

demo: $(INSTALLED)
	$(VENV)/bin/python scripts/run_infer.py --model_dir demo/qwen3-demo --use_training_conversion --test_mode both

test: $(INSTALLED)
	$(VENV)/bin/nox
