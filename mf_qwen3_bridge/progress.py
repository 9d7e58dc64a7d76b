"""A progress bar for bytes: amount, rate and time left; nothing when no one is watching."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def progress_bar(label: str, nbytes: int) -> Iterator[Callable[[int], object]]:
    """A bar on stderr over ``nbytes`` bytes; yields the function to call with each number of bytes done."""
    with tqdm(total=nbytes, desc=label, unit="B", unit_scale=True, unit_divisor=1024, disable=None, leave=False) as bar:
        yield bar.update
