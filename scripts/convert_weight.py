#!/usr/bin/env python3
"""Converts Qwen3 weights between Hugging Face and MindFormers, with MindFormers' own flags."""

from mf_qwen3_bridge.cli import main
from mf_qwen3_bridge.cli_files import convert_weight

if __name__ == "__main__":
    main(command=convert_weight)
