"""The two READMEs say the same, and what they show is what the commands print."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import hf_config, write_headers
from tests.unit.test_real_sizes import RELEASED

ROOT = Path(__file__).parents[2]
ENGLISH, CHINESE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README_CN.md"))


def blocks(readme: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)


def commands(readme: str) -> list[list[str]]:
    return [
        words for block in blocks(readme, "bash") for line in block.splitlines() if (words := shlex.split(line, True))
    ]


def test_both_have_the_same_code_and_the_same_sections():
    assert commands(ENGLISH) == commands(CHINESE)
    assert blocks(ENGLISH, "python") == blocks(CHINESE, "python")
    for pattern in (r"^#+ ", r"^\| ", r"^\d+\. "):
        assert len(re.findall(pattern, ENGLISH, re.MULTILINE)) == len(re.findall(pattern, CHINESE, re.MULTILINE))


def test_what_check_prints_for_another_models_config(tmp_path: Path):
    write_headers(tmp_path / "Qwen3-14B", RELEASED["Qwen3-14B"], hf_config(RELEASED["Qwen3-8B"]), shards=8)
    command = [sys.executable, "-m", "mf_qwen3_bridge.cli", "check", "--model_dir", "Qwen3-14B"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert result.returncode == 2
    assert result.stderr in blocks(ENGLISH, "text")
    assert result.stderr in blocks(CHINESE, "text")


@pytest.mark.parametrize("command", [c for c in commands(ENGLISH) if c[0] == "make"], ids=" ".join)
def test_make_knows_its_targets(command):
    result = subprocess.run([*command, "--dry-run"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("command", [c for c in commands(ENGLISH) if c[:2] == ["mf-qwen3", "check"]], ids=" ".join)
def test_mf_qwen3_check(command, tmp_path: Path):
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    (tmp_path / "Qwen3-14B").symlink_to(ROOT / "demo" / "qwen3-demo")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-m", "mf_qwen3_bridge.cli", *command[1:]]
    result = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert result.returncode == 0, result.stderr
