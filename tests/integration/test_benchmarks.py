"""The benchmarks run; what they measure is nobody's business here."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support.commands import ROOT, run_command
from tests.support.documents import commands

# What it measures is tested on every release: test_loaders, test_files, test_verify_logits.
pytestmark = pytest.mark.newest_only
DOCUMENT = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
LINES = {  # the options to run each with, and the lines of its table
    "benchmarks/loading.py": (["--loaders", "direct", "floor"], 2),
    "benchmarks/conversion.py": (["--programs", "cp", "floor", "bridge", "buffered"], 8),
    "benchmarks/verifying.py": ([], 3),
}


@pytest.mark.parametrize("script", sorted({command[1] for command in commands(DOCUMENT)}))
def test_it_runs(tmp_path: Path, script: str):
    options, lines = LINES[script]
    flags = ["--work_dir", tmp_path, "--models", "tiny", "--rounds", 1]
    result = run_command([sys.executable, ROOT / script, *flags, *options], tmp_path)
    assert result.returncode == 0, result.stderr
    assert len([line for line in result.stdout.splitlines() if line.startswith("| tiny")]) == lines
