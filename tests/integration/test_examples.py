"""The examples in the public functions' docstrings: they run as they are, from the top of the repository."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from textwrap import dedent
from typing import Any

import pytest

import mf_qwen3_bridge
from tests.support.commands import ROOT

FUNCTIONS = [name for name in mf_qwen3_bridge.__all__ if inspect.isfunction(getattr(mf_qwen3_bridge, name))]
PRINTED = {
    "from_pretrained": "Weights move from Hugging Face to MindFormers",
    "load": "errors up to",
    "load_checkpoint": "model.norm.weight (96,) BFloat16",
    "patch": "([], [])",
    "unpatch": "True",
    "verify_network": "errors up to",
    "weights": "model.norm.weight (96,) float32",
}


def example_of(function: Callable[..., Any]) -> str:
    (example,) = re.findall(r"^Example::\n\n((?:    .*\n|\n)+)", inspect.getdoc(function) + "\n", re.MULTILINE)
    return dedent(example)


def test_every_public_function_has_one():
    assert set(FUNCTIONS) == PRINTED.keys()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_it_runs(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], name: str):
    monkeypatch.chdir(ROOT)
    exec(compile(example_of(getattr(mf_qwen3_bridge, name)), f"{name}'s example", "exec"), {})
    assert PRINTED[name] in capfd.readouterr().out
