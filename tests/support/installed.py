"""Builds the wheel and the sdist, and installs the wheel away from the checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
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


@dataclass(frozen=True)
class Installed:
    """An environment with the wheel. What the wheel depends on is found in this interpreter's environment."""

    directory: Path

    def run(self, cwd: Path, program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Runs a program of the environment, in a directory."""
        words = [str(self.directory / "bin" / program), *map(str, arguments)]
        return subprocess.run(
            words, cwd=cwd, env=without_the_checkout(), capture_output=True, text=True, check=False, timeout=600
        )

    def output_of(self, cwd: Path, program: str, *arguments: object) -> str:
        """Runs it; it has to succeed. What it prints on stdout."""
        result = self.run(cwd, program, *arguments)
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
        return result.stdout

    def imported_from(self, cwd: Path) -> Path:
        """Where the environment's Python finds the package."""
        code = "import mf_qwen3_bridge, numpy; print(mf_qwen3_bridge.__file__)"
        return Path(self.output_of(cwd, "python", "-c", code).strip())


def install(wheel: Path, directory: Path) -> Installed:
    """Makes an environment that has the wheel and nothing else, then lets it see what else is installed here.

    A path in a .pth file is searched after the environment's own packages, and no .pth file in it is read: an editable
    installation of this checkout stays out of sight.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", directory], check=True)
    pip = [sys.executable, "-m", "pip", "--python", directory / "bin" / "python"]
    command = [*pip, "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(command, check=True, env=without_the_checkout())  # whose egg-info would count as installed
    (packages,) = directory.glob("lib/python*/site-packages")
    here = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
    (packages / "dependencies.pth").write_text("\n".join(sorted(here)) + "\n")
    return Installed(directory)
