#!/usr/bin/env python3
"""Converts Qwen3 weights between Hugging Face and MindFormers, with MindFormers' own flags."""

from mf_qwen3_bridge.cli.files import convert_weight
from mf_qwen3_bridge.cli.main import main

if __name__ == "__main__":
    main(command=convert_weight)
