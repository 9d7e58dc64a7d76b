"""Every command of the README that needs MindFormers. ``Qwen3-14B`` is the demo checkpoint under that name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.test_readme import ENGLISH, ROOT, blocks, commands

SCRIPTS = [command for command in commands(ENGLISH) if command[:2] == ["python", "scripts/run_infer.py"]]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for name in ("demo", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "Qwen3-14B").symlink_to(ROOT / "demo" / "qwen3-demo")
    return tmp_path


@pytest.mark.parametrize("command", SCRIPTS, ids=" ".join)
def test_run_infer(directory: Path, command):
    result = subprocess.run(
        [sys.executable, *command[1:]], capture_output=True, text=True, cwd=directory, check=False, timeout=600
    )
    assert result.returncode == 0, result.stderr


def test_python(directory: Path):
    code = "\n".join(blocks(ENGLISH, "python"))
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=directory, check=False, timeout=600
    )
    assert result.returncode == 0, result.stderr


def test_every_command_is_run_by_some_test():
    elsewhere = ("make", "mf-qwen3", "pip")  # tests/unit/test_readme.py; pip is how this environment came about
    assert SCRIPTS
    assert [c for c in commands(ENGLISH) if c not in SCRIPTS and c[0] not in elsewhere] == []
