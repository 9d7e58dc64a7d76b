"""Invalid values of tensors: NaN, infinity, nothing but zeros."""

from __future__ import annotations

import numpy as np
import pytest

from mf_qwen3_bridge.transfer.values import fault_of, largest_magnitude
from tests.support.checkpoints import NUMPY


@pytest.mark.parametrize("dtype", NUMPY.values(), ids=str)
@pytest.mark.parametrize("strided", [False, True])
def test_faults_of_values(dtype, strided):
    array = np.full((5, 7), -1.5, dtype)[:, :: 2 if strided else 1]

    def fault():
        return fault_of(largest_magnitude(array))

    assert fault() is None
    for value in (np.nan, np.inf, -np.inf, -np.nan):
        array[-1, -1] = value
        assert fault() == "NaN or infinity"
    for zero in (0.0, -0.0):
        array[:] = zero
        assert fault() == "all zero"
    for tiny in (1e-7, -1e-7):
        array[-1, -1] = np.array(tiny, dtype)
        assert fault() is None
    assert largest_magnitude(array[:0]) == 0
