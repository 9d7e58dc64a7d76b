"""Draws docs/pictures/performance.svg: what converting and exporting take, beside copying.

python docs/draw_performance.py
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from svg import EDGE, INK, LINE, document, words

PICTURE = "performance.svg"
# The column of ratios, and the columns that say of what; in this order.
RATIO = "x cp+sync"
_GROUP = ("checkpoint", "direction", "cache")
_COLOURS = {"bridge": "#f7b977", "buffered": "#e6d36f"}
_OTHERS = "#9ec9f5"
_HERE = Path(__file__).resolve().parent
_BARS, _UNIT, _PAGE, _HEIGHT = 130, 190, 870, 14


def measured(page: str) -> list[dict[str, str]]:
    """The rows of the table in docs/performance.md that has a column of ratios to copying."""
    tables = (block for block in page.split("\n\n") if block.startswith("|"))
    lines = next(block.splitlines() for block in tables if RATIO in block.splitlines()[0])
    titles, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return [dict(zip(titles, row)) for row in rows]


def svg(rows: Iterable[Mapping[str, str]]) -> str:
    """The picture of a table's rows."""
    elements: list[str] = []
    y, group = 0, tuple[str, ...]()
    rows = list(rows)
    longest = max(float(row[RATIO]) for row in rows)
    unit = min(_UNIT, int((_PAGE - _BARS - 60) / longest))  # pixels of what copying takes
    for row in rows:
        if (of_row := tuple(row[title] for title in _GROUP)) != group:
            group, y = of_row, y + LINE + 12
            elements.append(words(0, y, ", ".join(group), is_bold=True))
            y += 8
        ratio = float(row[RATIO])
        colour, width = _COLOURS.get(row["program"], _OTHERS), max(1, round(unit * ratio))
        bar = f'<rect x="{_BARS}" y="{y}" width="{width}" height="{_HEIGHT}" fill="{colour}" stroke="{EDGE}"/>'
        elements += [words(_BARS - 8, y + 11, row["program"], anchor="end"), bar]
        elements.append(words(_BARS + width + 6, y + 11, row[RATIO]))
        y += LINE
    at = _BARS + unit
    elements.append(f'<path d="M{at},24 V{y}" stroke="{INK}" stroke-dasharray="3 3" fill="none"/>')
    title = "Seconds of converting and exporting, as a ratio to cp and sync of the same files"
    return document(_PAGE, y + 8, title, elements)


def main() -> None:
    """Writes the picture of what the page says."""
    page = (_HERE / "performance.md").read_text(encoding="utf-8")
    (_HERE / "pictures" / PICTURE).write_text(svg(measured(page)), encoding="utf-8")


if __name__ == "__main__":
    main()
