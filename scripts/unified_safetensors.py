#!/usr/bin/env python3
"""Merges what the ranks of a MindFormers training run saved; the same as ``mf-qwen3 unify``."""

from mf_qwen3_bridge.cli.files import unify
from mf_qwen3_bridge.cli.main import main

if __name__ == "__main__":
    main(command=unify)
