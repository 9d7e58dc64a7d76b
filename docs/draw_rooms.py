"""Draws docs/pictures/rooms.svg, the picture of docs/architecture.md: the rooms, and what flows between them.

    python docs/draw_rooms.py

Each name on an arrow is imported by the room that the arrow leads to, from the room that it comes from; else nothing
is drawn.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from svg import LETTER_WIDTH, LINE, arrow, box, document, words

DOCS = Path(__file__).resolve().parent
PACKAGE = "mf_qwen3_bridge"
PICTURE = "rooms.svg"

_HEIGHT, _GAP = 64, 48
_LEFT, _WIDTH = 150, 740


@dataclass(frozen=True)
class Room:
    """A box.

    Attributes:
        name: the room's, a module or folder of the package.
        lines: what it does.
        row: its number, from the top.
        left: its place within the row, in pixels.
        width: its width in pixels.
        colour: its colour.
    """

    name: str
    lines: Sequence[str]
    row: int
    left: int = 0
    width: int = _WIDTH
    colour: str = "#d0d4da"

    @property
    def top(self) -> int:
        """Its upper edge."""
        return _GAP // 4 + self.row * (_HEIGHT + _GAP)

    @property
    def middle(self) -> int:
        """Half of its width, from the left edge of the picture."""
        return _LEFT + self.left + self.width // 2


@dataclass(frozen=True)
class Flow:
    """An arrow.

    Attributes:
        source: the room that it comes from.
        target: the room that it leads to.
        names: what the target imports from the source.
    """

    source: str
    target: str
    names: Sequence[str]


ROOMS = (
    Room("cli", ["parses a command, calls the rooms below in turn, prints what they found"], 0),
    Room("convert", ["jobs, files, workers:", "writes a directory"], 1, 0, 200, "#a5d99b"),
    Room("verify", ["compares, measures,", "computes a reference"], 1, 220, 200, "#e6d36f"),
    Room("mindformers", ["patching, cpu, networks:", "fills and runs them"], 1, 540, 200, "#f2a7b5"),
    Room("inputs", ["opens, recognises and checks what the user points at"], 2, colour="#d9b8f0"),
    Room("transfer", ["from headers to bytes: plan, tiles, copying, value checks"], 3, colour="#f7b977"),
    Room("model", ["what a Qwen3 is: numbers, names, layouts, rules; no file, no framework"], 4, colour="#9ec9f5"),
    Room("errors", ["problems, and the table that reports them"], 5),
)
FLOWS = (
    Flow("errors", "model", ["Problem", "BridgeError"]),
    Flow("model", "transfer", ["Dialect", "Rule", "View", "Box"]),
    Flow("transfer", "inputs", ["TensorInfo", "Plan", "make_plan"]),
    Flow("inputs", "convert", ["CheckedCheckpoint"]),
    Flow("inputs", "verify", ["Weights"]),
    Flow("inputs", "mindformers", ["CheckedCheckpoint"]),
    Flow("verify", "mindformers", ["Stage", "layer_errors"]),
    Flow("convert", "cli", ["Job", "run"]),
    Flow("verify", "cli", ["compare"]),
    Flow("mindformers", "cli", ["load_network", "patch"]),
)
# What comes from outside, and the room that reads it.
OUTSIDE = ((("config.json,", "YAML,", "strategy files"), "inputs"), (("safetensors",), "transfer"))


def imports(room: str) -> set[tuple[str, str]]:
    """All (room, name) that the modules of a room import from other rooms, in functions too."""
    package = DOCS.parent / PACKAGE
    files = [package / f"{room}.py"] if (package / f"{room}.py").is_file() else sorted((package / room).rglob("*.py"))
    found = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(f"{PACKAGE}."):
                found |= {(node.module.split(".")[1], alias.name) for alias in node.names}
    return found - {(room, name) for _, name in found}


def svg() -> str:
    """The picture.

    Raises:
        ValueError: a room does not import what an arrow brings it.
    """
    for flow in FLOWS:
        if missing := {(flow.source, name) for name in flow.names} - imports(flow.target):
            raise ValueError(f"{flow.target} does not import {missing}")
    rooms = {room.name: room for room in ROOMS}
    elements = [element for room in ROOMS for element in _box(room)]
    elements += [element for flow in FLOWS for element in _arrow(rooms[flow.source], rooms[flow.target], flow.names)]
    elements += [element for lines, room in OUTSIDE for element in _from_outside(lines, rooms[room])]
    width, height = _LEFT + _WIDTH + 1, max(room.top for room in ROOMS) + _HEIGHT + _GAP // 4
    title = "The rooms of the package, each above those that it imports from; on the arrows what flows between them"
    return document(width, height, title, elements, has_arrows=True)


def _box(room: Room) -> list[str]:
    return box(_LEFT + room.left, room.top, room.width, _HEIGHT, [room.name, *room.lines], room.colour)


def _arrow(source: Room, target: Room, names: Sequence[str]) -> Iterator[str]:
    """Upwards, or to the right within a row."""
    if source.row == target.row:
        start, end, y = _LEFT + source.left + source.width, _LEFT + target.left, source.top + _HEIGHT // 2
        yield arrow((start + 2, y), (end - 2, y))
        for name, place in zip(names, (y - 8, y + LINE)):
            yield words((start + end) // 2, place, name, anchor="middle")
        return
    x = source.middle if source.width < target.width else target.middle
    beside = ", ".join(names)
    is_inside = x + len(beside) * LETTER_WIDTH < _LEFT + _WIDTH
    yield arrow((x, source.top - 2), (x, target.top + _HEIGHT + 3))
    side, anchor = (10, "start") if is_inside else (-10, "end")
    yield words(x + side, source.top - _GAP // 2 + 4, beside, anchor=anchor)


def _from_outside(lines: Sequence[str], room: Room) -> Iterator[str]:
    y = room.top + _HEIGHT // 2
    for number, line in enumerate(lines):
        yield words(0, y + 4 + number * LINE - (len(lines) - 1) * LINE // 2, line)
    yield arrow((max(map(len, lines)) * LETTER_WIDTH + 4, y), (_LEFT - 2, y))


def main() -> None:
    """Writes the picture."""
    (DOCS / "pictures" / PICTURE).write_text(svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
