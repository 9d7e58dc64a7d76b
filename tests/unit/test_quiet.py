"""What is checked before MindFormers is imported."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mf_qwen3_bridge.errors import BridgeError
from mf_qwen3_bridge.mindformers.quiet import silence_upstream


@pytest.mark.parametrize("variable", [None, "logs"])
def test_a_directory_where_mindformers_cannot_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable):
    """As a read-only working directory is; the tests' user may be one whom nothing stops."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LOG_MF_PATH", raising=False)
    if variable:
        (tmp_path / variable).mkdir()
        monkeypatch.setenv("LOG_MF_PATH", variable)
    asked = []
    monkeypatch.setattr(os, "access", lambda path, mode: bool(asked.append(path)))
    with pytest.raises(BridgeError, match="set LOG_MF_PATH"), silence_upstream():
        pass
    assert asked == [tmp_path / (variable or "")]
