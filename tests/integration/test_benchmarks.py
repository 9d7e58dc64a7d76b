"""The benchmarks run; what they measure is nobody's business here."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support.commands import ROOT, run_command
from tests.support.documents import commands
from tests.support.documents import headings as headings_of

# What it measures is tested on every release: test_loaders, test_files, test_verify_logits.
pytestmark = pytest.mark.newest_only
DOCUMENT_PATH = ROOT / "docs" / "performance.md"
DOCUMENT = DOCUMENT_PATH.read_text(encoding="utf-8")
LINES = {  # the options to run each with, and the lines of its table
    "benchmarks/loading.py": (["--loaders", "direct", "floor"], 2),
    "benchmarks/conversion.py": (["--programs", "cp", "floor", "bridge", "buffered"], 8),
    "benchmarks/verifying.py": ([], 3),
    "benchmarks/ranks.py": ([], 4),
}


@pytest.mark.parametrize("script", sorted({command[1] for command in commands(DOCUMENT)} - {"-m"}))
def test_it_runs(tmp_path: Path, script: str):
    options, lines = LINES[script]
    flags = ["--work_dir", tmp_path, "--models", "tiny", *([] if "ranks" in script else ["--rounds", 1])]
    result = run_command([sys.executable, ROOT / script, *flags, *options], tmp_path)
    assert result.returncode == 0, result.stderr
    assert len([line for line in result.stdout.splitlines() if line.startswith("| tiny")]) == lines


def test_one_command_runs_all_and_draws_a_picture(tmp_path: Path):
    work_dir, picture = tmp_path / "work", tmp_path / "picture.svg"
    command = next(command for command in commands(DOCUMENT) if "-m" in command)
    assert command == ["python", "-m", "benchmarks", "--work_dir", "/tmp/benchmark"]
    options = ["--work_dir", work_dir, "--smoke", "--picture", picture]
    result = run_command([sys.executable, *command[1:3], *options], ROOT)
    assert result.returncode == 0, result.stderr
    tables = result.stdout.split("\n## ")
    headings = [table.splitlines()[0].removeprefix("## ") for table in tables]
    assert set(headings) < {heading for _, heading in headings_of(DOCUMENT_PATH)}
    # Two models each but the last, a warm and a cold cache; of the ranks perhaps two disks.
    lines = [sum(line.startswith("| tiny") for line in table.splitlines()) for table in tables]
    assert lines in ([12, ranks, 32, 6] for ranks in (8, 14))
    assert picture.read_text(encoding="utf-8").count("<rect") == 32
