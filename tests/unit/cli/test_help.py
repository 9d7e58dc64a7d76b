"""The examples at the end of each command's help."""

from __future__ import annotations

import re
import shlex
from contextlib import suppress
from pathlib import Path

import pytest

from mf_qwen3_bridge.cli.files import convert_weight
from mf_qwen3_bridge.cli.main import cli
from mf_qwen3_bridge.errors import BridgeError
from tests.support.cli import Call
from tests.support.commands import ROOT

CALLED = {f"mf-qwen3 {name}": command for name, command in cli.commands.items()}
CALLED["python scripts/convert_weight.py"] = convert_weight


def examples(text: str) -> list[list[str]]:
    """The words of each example that a help text ends with; of ``$(...)``, what is in it."""
    lines = text.partition("\n  Examples:\n")[2]
    assert all(len(line) <= 80 and line.startswith("    ") for line in lines.splitlines())
    return [shlex.split(re.sub(r".*\$\((.*)\)", r"\1", line)) for line in lines.replace("\\\n", " ").splitlines()]


@pytest.mark.parametrize("called", CALLED)
def test_the_help_ends_with_examples_of_the_command(tmp_path: Path, monkeypatch, call: Call, called: str):
    """Its own parser takes them, and so does what it checks before it looks for files."""
    (tmp_path / "run_mindformer.py").touch()
    monkeypatch.chdir(tmp_path)
    command = CALLED[called]
    found = examples(call("--help", command=command).out)
    assert 1 <= len(found) <= 3
    for words in found:
        assert shlex.join(words[:2]) == called
        with command.make_context(called, words[2:]) as context:
            if command.name != "launch":  # it would run the script
                with suppress(BridgeError):  # of files that are not there
                    command.invoke(context)


def test_scripts_of_the_examples_are_there():
    assert all((ROOT / called.split()[1]).is_file() for called in CALLED if called.startswith("python"))
