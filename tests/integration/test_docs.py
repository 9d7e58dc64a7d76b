"""Every command of docs/mindformers.md, one after the other, in one directory."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import ROOT, TRAINER, free_port, run_command
from tests.support.documents import blocks, commands

TEXT = (ROOT / "docs" / "mindformers.md").read_text(encoding="utf-8")
INSIDE_MINDFORMERS = commands(TEXT)
SENTENCE = "Weights move from Hugging Face to MindFormers, every row finds its place, and the model says the same words"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout, with upstream's script (or what stands for it) in it."""
    scratch = tmp_path_factory.mktemp("docs")
    for name in ("demo", "scripts", "yaml"):
        (scratch / name).symlink_to(ROOT / name)
    (scratch / "run_mindformer.py").symlink_to(TRAINER)
    return scratch


def of_releases(number: int) -> Any:
    """``launch`` runs on every release. What the others do there: test_trainer_predict and test_training_network."""
    is_launch = any("launch" in word for word in INSIDE_MINDFORMERS[number])
    return number if is_launch else pytest.param(number, marks=pytest.mark.newest_only)


@pytest.mark.parametrize("number", [of_releases(number) for number in range(len(INSIDE_MINDFORMERS))])
def test_commands(directory: Path, number: int):
    lines = "".join(blocks(TEXT, "bash")).splitlines()
    line = re.sub(r"--master_port=\d+", f"--master_port={free_port()}", lines[number])
    result = run_command(["bash", "-c", line], directory)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    if "--predict_data" in line:
        answer = directory / "text_generation_result.txt"
        assert SENTENCE in answer.read_text()
        answer.unlink()
    elif "export" in line:
        assert (directory / "output" / "trained" / "model.safetensors").is_file()


@pytest.mark.newest_only  # test_auto does the same on every release
def test_python(directory: Path):
    code = "\n".join(blocks(TEXT, "python"))
    result = run_command([sys.executable, "-c", code], directory)
    assert result.returncode == 0, result.stderr[-3000:]
