"""Builds the wheel and the sdist."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.support.commands import ROOT, environment


def without_the_checkout() -> Mapping[str, str]:
    """A command's environment in which nothing leads to this checkout."""
    return {key: value for key, value in environment().items() if key != "PYTHONPATH"}


@dataclass(frozen=True)
class Built:
    """What ``python -m build`` made, and what it printed."""

    wheel: Path
    sdist: Path
    output: str


def build(directory: Path) -> Built:
    """Builds an sdist, and the wheel from the sdist.

    From a copy: a build writes into the directory that it builds, and takes what a build before has left there. Without
    isolation, which would fetch setuptools from a package index for each build; the ``test`` extra has it.
    """
    copy = directory / "checkout"
    copy.mkdir()
    for name in ("mf_qwen3_bridge", "scripts", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "fixtures"))
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, copy)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", directory / "dist", copy]
    result = subprocess.run(
        command, cwd=directory, env=without_the_checkout(), capture_output=True, text=True, check=False
    )
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    (wheel,), (sdist,) = ((directory / "dist").glob(pattern) for pattern in ("*.whl", "*.tar.gz"))
    return Built(wheel, sdist, output)
