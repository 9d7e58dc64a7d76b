"""Calls commands in this process, and reads what they print and write."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from mf_qwen3_bridge.inputs.opening import open_source
from tests.support.damage import unwrapped


class Result(NamedTuple):
    code: int | None
    out: str
    err: str


Call = Callable[..., Result]


def flags(numbers: Mapping[str, object]) -> list[object]:
    return [text for name, number in numbers.items() for text in (f"--{name}", number)]


def everything(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() if path.is_file() else b"" for path in directory.rglob("*")}


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def num_rows(text: str) -> int:
    """Of the table in a message, its headers apart."""
    return len(re.findall(r"^\+-[-+]+$", text, re.MULTILINE)) - 1


def names_both(text: str, name: str, given: int, right: int) -> bool:
    """Whether a table names a number of the flags and that of the tensors, and what to do."""
    both = rf"arguments: {given} weights: {right} \(\S"
    return bool(re.search(both, unwrapped(text))) and f"set {name} to {right} in arguments" in unwrapped(text)


def layout_of(directory: Path) -> str | None:
    return open_source(directory).metadata.get("mf_qwen3_bridge.layout")


def reverse(call_script: Call, tmp_path: Path, kind: str, *arguments: object) -> Result:
    """With what is in ``in``, in float32."""
    paths = ("--input_path", tmp_path / "in", "--output_path", tmp_path / "out")
    return call_script("--model", kind, "--reversed", *paths, "--dtype", "fp32", *arguments)


def convert(call: Call, hf_dir: Path, *arguments: object) -> Result:
    return call("convert", "--model_dir", hf_dir, "--output_dir", hf_dir.parent / "out", *arguments)


def export(call: Call, trained: Path, *arguments: object) -> Result:
    return call("export", "--input_path", trained, "--output_path", trained.parent / "out", *arguments)
