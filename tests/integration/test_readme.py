"""Every command of the README that needs MindFormers. ``Qwen3-14B`` is the demo checkpoint under that name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.test_readme import CHINESE, ENGLISH, ROOT, blocks, commands

MODULES = {"python": ["scripts/run_infer.py"], "mf-qwen3": ["-m", "mf_qwen3_bridge.cli", "infer"]}
INFER = [c for c in commands(ENGLISH) if c[:2] in (["python", "scripts/run_infer.py"], ["mf-qwen3", "infer"])]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for name in ("demo", "scripts", "yaml"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "Qwen3-14B").symlink_to(ROOT / "demo" / "qwen3-demo")
    return tmp_path


@pytest.mark.parametrize("command", INFER, ids=" ".join)
def test_infer(directory: Path, command):
    arguments = [sys.executable, *MODULES[command[0]], *command[2:]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        arguments, capture_output=True, text=True, cwd=directory, env=environment, check=False, timeout=600
    )
    assert result.returncode == 0, result.stderr
    assert "every row finds its place" in result.stdout


def test_make_demo_prints_what_the_readme_shows(directory: Path):
    """Both modes, the default prompts, and nothing of upstream's on stdout."""
    makefile = (ROOT / "Makefile").read_text()
    (arguments,) = re.findall(r"^\t\$\(VENV\)/bin/python (scripts/run_infer\.py .*)$", makefile, re.MULTILINE)
    result = subprocess.run(
        [sys.executable, *arguments.split()], capture_output=True, text=True, cwd=directory, check=False, timeout=600
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == blocks(ENGLISH, "text")[0] == blocks(CHINESE, "text")[0]


def test_python(directory: Path):
    code = "\n".join(blocks(ENGLISH, "python"))
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=directory, check=False, timeout=600
    )
    assert result.returncode == 0, result.stderr


def test_every_command_is_run_by_some_test():
    """make, mf-qwen3 check: tests/unit/test_readme.py; msrun: tests/distributed; pip made this environment."""
    others = [c for c in commands(ENGLISH) if c not in INFER]
    assert {(c[0], c[1]) for c in others} == {
        ("make", "demo"),
        ("make", "test"),
        ("pip", "install"),
        ("mf-qwen3", "check"),
        ("msrun", "--worker_num=8"),
        ("msrun", "--worker_num=2"),
    }
    assert INFER
