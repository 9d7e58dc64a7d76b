"""Checks values: NaN, infinity, all zero; rounding and overflow of casts.

Uses the bits of floats, as numpy has no fast loops for bfloat16: without the sign they grow with the magnitude, and
those of infinity and NaN are the largest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

_BUFFERED_ELEMENTS = 64 << 10


def largest_magnitude(array: np.ndarray) -> float:
    """The largest magnitude in a float32, float16 or bfloat16 array: infinity if it holds NaN, 0 if it is empty."""
    if not array.size:
        return 0.0
    bits = array.view(f"u{array.itemsize}")
    sign = 1 << (8 * array.itemsize - 1)
    # As signed integers the positive numbers are the largest, as unsigned ones the negative numbers.
    largest = max(int(bits.view(f"i{array.itemsize}").max()), int(bits.max()) - sign, 0)
    value = float(np.array(largest, bits.dtype).view(array.dtype))
    return math.inf if math.isnan(value) else value


def fault_of(magnitude: float) -> str | None:
    """The fault of a tensor with this :func:`largest_magnitude`; None if it has none."""
    if math.isinf(magnitude):
        return "NaN or infinity"
    return "all zero" if magnitude == 0 else None


@dataclass
class Casts:
    """Of the values that were cast to a narrower dtype, how many changed, and in which tensors some became infinite."""

    values: int = 0
    rounded: int = 0
    vanished: int = 0  # became zero
    overflowed: set[str] = field(default_factory=set)

    def __add__(self, other: Casts) -> Casts:
        return Casts(
            self.values + other.values,
            self.rounded + other.rounded,
            self.vanished + other.vanished,
            self.overflowed | other.overflowed,
        )


def casts_of(name: str, source: np.ndarray, target: np.ndarray) -> Casts:
    """Compares the values of a tensor before and after a cast to another dtype."""
    casts = Casts(values=source.size)
    pairs = np.nditer([source, target], ["external_loop", "buffered"], buffersize=_BUFFERED_ELEMENTS)
    for before, after in pairs:
        back = after.astype(source.dtype)
        changed = back != before
        casts.rounded += int(np.count_nonzero(changed))
        casts.vanished += int(np.count_nonzero(changed & (back == 0)))
        if np.isinf(back[changed]).any():
            casts.overflowed.add(name)
    return casts
