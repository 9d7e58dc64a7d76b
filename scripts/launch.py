#!/usr/bin/env python3
"""Runs one of MindFormers' scripts with the bridge in place; the same as ``mf-qwen3 launch``, as a file for msrun."""

from mf_qwen3_bridge.cli.main import launch, main

if __name__ == "__main__":
    main(command=launch)
