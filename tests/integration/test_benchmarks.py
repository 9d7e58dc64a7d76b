"""The benchmark runs; what it measures is nobody's business here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.unit.test_readme import ROOT, commands


def test_loading(tmp_path: Path):
    document = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert {tuple(command[:2]) for command in commands(document)} == {("python", "benchmarks/loading.py")}
    arguments = ["--work_dir", str(tmp_path), "--models", "tiny", "--roads", "direct", "floor", "--rounds", "1"]
    result = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "loading.py"), *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    assert len([line for line in result.stdout.splitlines() if line.startswith("| tiny")]) == 2
