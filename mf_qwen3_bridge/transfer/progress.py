"""Shows progress bars on a terminal, and formats sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def progress_bar(label: str, nbytes: int) -> Iterator[Callable[[int], object]]:
    """Shows a bar on stderr over ``nbytes`` bytes; yields the function to call with each number of bytes done."""
    with tqdm(total=nbytes, desc=label, unit="B", unit_scale=True, unit_divisor=1024, disable=None, leave=False) as bar:
        yield bar.update


def size_text(nbytes: float) -> str:
    """Formats a number of bytes: ``1.11 GiB``, ``45.0 MiB``, ``3.2 KiB``."""
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if nbytes >= factor:
            return f"{nbytes / factor:.{2 if unit == 'GiB' else 1}f} {unit}"
    return f"{nbytes / 1024:.1f} KiB"
