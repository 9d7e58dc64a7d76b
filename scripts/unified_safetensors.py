#!/usr/bin/env python3
"""Merges what the ranks of a MindFormers training run saved; the same as ``mf-qwen3 unify``."""

from mf_qwen3_bridge.cli import main
from mf_qwen3_bridge.cli_files import unify

if __name__ == "__main__":
    main(command=unify)
