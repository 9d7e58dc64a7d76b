"""Draws boxes, arrows and words as SVG: what the scripts in docs/ that draw pictures share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from xml.sax.saxutils import escape

GREY = "#7d8590"  # readable on white and on black
EDGE, INK = "#57606a", "#1f2328"  # of boxes, which are light
LINE = 18  # pixels from one line of words to the next
LETTER_WIDTH = 8

_ARROW_HEAD = (
    '<defs><marker id="head" markerWidth="9" markerHeight="8" refX="8" refY="4" orient="auto">'
    f'<path d="M0,0 L9,4 L0,8 z" fill="{GREY}"/></marker></defs>'
)


def document(width: int, height: int, title: str, elements: Iterable[str], has_arrows: bool = False) -> str:
    """A picture.

    Args:
        width: in pixels.
        height: in pixels.
        title: what it shows, for those who don't see it.
        elements: what `box`, `arrow` and `words` return.
        has_arrows: whether `arrow` is among them.
    """
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'role="img" font-family="monospace" font-size="13">',
        f"<title>{escape(title)}</title>",
        *([_ARROW_HEAD] if has_arrows else []),
        *elements,
        "</svg>",
    ]
    return "".join(f"{line}\n" for line in lines)


def box(x: int, y: int, width: int, height: int, lines: Sequence[str], colour: str) -> list[str]:
    """A box with centred lines of words, the first of them bold."""
    rectangle = (
        f'<rect x="{x}.5" y="{y}.5" width="{width - 1}" height="{height}" rx="4" fill="{colour}" stroke="{EDGE}"/>'
    )
    first = y + (height - LINE * (len(lines) - 1)) // 2 + 4
    return [
        rectangle,
        *(
            words(x + width // 2, first + number * LINE, line, INK, "middle", is_bold=number == 0)
            for number, line in enumerate(lines)
        ),
    ]


def arrow(*points: tuple[int, int]) -> str:
    """A line through points, with an arrow's head at the last."""
    path = " ".join(f"{x},{y}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{GREY}" stroke-width="1.5" marker-end="url(#head)"/>'


def words(x: int, y: int, text: str, colour: str = GREY, anchor: str = "start", is_bold: bool = False) -> str:
    """A line of words. *anchor* says what is at x: its start, middle or end."""
    weight = ' font-weight="bold"' if is_bold else ""
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{colour}"{weight}>{escape(text)}</text>'
