"""Whether an array holds what weights never are: NaN, infinities, nothing but zeros."""

from __future__ import annotations

import numpy as np

# Bits of the exponent: all set means NaN or infinity.
_EXPONENT = {"float32": 0x7F80_0000, "bfloat16": 0x7F80, "float16": 0x7C00}
_CHUNK = 1 << 20


def find_fault(array: np.ndarray) -> str | None:
    """What is wrong with the values of a float32, float16 or bfloat16 array; None when nothing is.

    Looks at the bits: numpy has no fast loops for bfloat16.
    """
    exponent = _EXPONENT[array.dtype.name]
    bits = array.reshape(-1).view(f"u{array.itemsize}")
    sign = 1 << (8 * array.itemsize - 1)
    largest = 0
    for start in range(0, bits.size, _CHUNK):
        largest = max(largest, int((bits[start : start + _CHUNK] & (sign - 1)).max()))
    if largest >= exponent:
        return "NaN or infinity"
    return "all zero" if largest == 0 else None
