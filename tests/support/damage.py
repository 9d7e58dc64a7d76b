"""Damages a checkpoint's files, and reads what is printed about them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"


def cut_off(file: Path, count: int = 5) -> None:
    """The last bytes of a file."""
    file.write_bytes(file.read_bytes()[:-count])


def change_config(directory: Path, **entries: Any) -> None:
    """Entries of a directory's config.json."""
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def assign_in_index(index: Path, tensor: str, file: str) -> None:
    """A tensor, to another file."""
    content = json.loads(index.read_text())
    content["weight_map"][tensor] = file
    index.write_text(json.dumps(content))


def leave_only(directory: Path, name: str, content: bytes = b"") -> None:
    """A file that is no safetensors, in place of all safetensors and their index."""
    for file in (
        *directory.glob("*.safetensors"),
        *directory.glob("*.index.json"),
        *directory.glob("param_name_map.json"),
    ):
        file.unlink()
    (directory / name).write_bytes(content)


def unwrapped(text: str) -> str:
    """The text of a table without its lines, column by column, so that wrapped cells read on."""
    columns: dict[int, str] = {}
    for line in text.splitlines():
        for number, cell in enumerate(line.split("|") if line.startswith("|") else [line]):
            columns[number] = f"{columns.get(number, '')} {cell.strip()}"
    return " ".join(columns.values())
