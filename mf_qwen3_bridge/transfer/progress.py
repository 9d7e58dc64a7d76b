"""Shows progress bars on a terminal, and formats sizes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def progress_bar(label: str, nbytes: int) -> Iterator[Callable[[int], object]]:
    """Shows a bar on stderr over ``nbytes`` bytes; yields the function to call with each number of bytes done."""
    bar = tqdm(total=nbytes, desc=label, unit="iB", unit_scale=True, unit_divisor=1024, disable=None, leave=False)
    with bar:
        yield bar.update


def size_text(nbytes: float) -> str:
    """Formats a number of bytes: ``1.11 GiB``, ``45.0 MiB``, ``0.6 MiB``, ``3.2 KiB``."""
    if nbytes >= 1 << 30:
        return f"{nbytes / 2**30:.2f} GiB"
    if nbytes >= 2**20 / 10:
        return f"{nbytes / 2**20:.1f} MiB"
    return f"{nbytes / 2**10:.1f} KiB"
