"""A few of the faults of tests/fault_injection.py, which injects thousands."""

from __future__ import annotations

from pathlib import Path

from tests.fault_injection import inject, report


def test_damaged_checkpoints_are_refused_or_come_back_bit_for_bit(tmp_path: Path):
    results = inject(50, seed=5, work=tmp_path)
    assert not results.violations, "\n".join(report(results, 50))
    assert results.round_trips > 5 and sum(results.reasons.values()) > 50
