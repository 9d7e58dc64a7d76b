#!/usr/bin/env python3
"""Runs a Hugging Face Qwen3 checkpoint in MindFormers' inference model; the same as ``mf-qwen3 infer``."""

from mf_qwen3_bridge.cli.main import infer, main

if __name__ == "__main__":
    main(command=infer)
