"""A few of the faults of tests/fault_injection.py, which injects thousands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.fault_injection import inject, report
from tests.support.commands import ROOT
from tests.support.installed import without_the_checkout


def test_damaged_checkpoints_are_refused_or_come_back_bit_for_bit(tmp_path: Path):
    results = inject(50, seed=5, work=tmp_path)
    assert not results.violations, "\n".join(report(results, 50))
    assert results.round_trips > 5 and sum(results.reasons.values()) > 50


def test_it_runs_as_a_script():
    """As CONTRIBUTING.md says, from the top of a checkout that is on no path."""
    command = [sys.executable, "tests/fault_injection.py", "--count", "1"]
    result = subprocess.run(command, cwd=ROOT, env=without_the_checkout(), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
