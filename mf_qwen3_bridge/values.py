"""Whether an array holds what weights never are: NaN, infinities, nothing but zeros.

Looks at the bits: numpy has no fast loops for bfloat16. The bits of a float without its sign grow with its magnitude,
and those of infinities and NaN are the largest.
"""

from __future__ import annotations

import numpy as np

# Bits of the exponent: all set means NaN or infinity.
_EXPONENT = {"float32": 0x7F80_0000, "bfloat16": 0x7F80, "float16": 0x7C00}


def largest_magnitude(array: np.ndarray) -> int:
    """The bits of the largest magnitude in a float32, float16 or bfloat16 array, 0 if it is empty."""
    if not array.size:
        return 0
    bits = array.view(f"u{array.itemsize}")
    sign = 1 << (8 * array.itemsize - 1)
    # As signed integers the positive numbers are the largest, as unsigned ones the negative numbers.
    return max(int(bits.view(f"i{array.itemsize}").max()), int(bits.max()) - sign, 0)


def fault_of(magnitude: int, dtype: np.dtype) -> str | None:
    """What is wrong with a tensor whose :func:`largest_magnitude` this is; None when nothing is."""
    if magnitude >= _EXPONENT[dtype.name]:
        return "NaN or infinity"
    return "all zero" if magnitude == 0 else None
