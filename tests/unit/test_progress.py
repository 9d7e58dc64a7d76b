"""Sizes are printed in units that fit them, everywhere in the same way."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from mf_qwen3_bridge.inputs.inspection import inspect, lines
from mf_qwen3_bridge.inputs.preflight import check
from mf_qwen3_bridge.inputs.summary import summary
from mf_qwen3_bridge.transfer.progress import progress_bar, size_text
from tests.support.commands import ROOT


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0.0 KiB"),
        (1536, "1.5 KiB"),
        (100 << 10, "100.0 KiB"),
        (103 << 10, "0.1 MiB"),
        (656544, "0.6 MiB"),  # the demo checkpoint
        (45 << 20, "45.0 MiB"),
        (512 << 20, "512.0 MiB"),
        (1 << 30, "1.00 GiB"),
        (1.192e9, "1.11 GiB"),
        (438 << 30, "438.00 GiB"),
    ],
)
def test_a_size_has_a_unit_that_fits(nbytes: float, text: str):
    assert size_text(nbytes) == text


def test_both_commands_that_look_print_the_same_size():
    demo = ROOT / "demo" / "qwen3-demo"
    assert "24 tensors, 0.6 MiB (BF16) in 3 files" in "\n".join(summary(check(demo)))
    assert "24 (24 BF16), 0.6 MiB in 3 files" in "\n".join(lines(inspect(demo)))


def units_in(file: Path) -> list[str]:
    """The constant parts of f-strings that begin with a unit of bytes."""
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    parts = [part for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values]
    texts = [str(part.value) for part in parts if isinstance(part, ast.Constant)]
    return [text for text in texts if re.match(r" ?[kKMGT]i?B\b", text)]


def test_one_function_formats_sizes():
    found = {file.name for file in (ROOT / "mf_qwen3_bridge").rglob("*.py") if units_in(file)}
    assert found == {"progress.py"}


def test_a_bar_counts_in_the_same_units(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with progress_bar("convert", 3 << 30) as done:
        done(1 << 30)
    assert "iB/s" in capsys.readouterr().err
