import numpy as np
import pytest

from mf_qwen3_bridge.errors import BridgeError, Problem, fold_names
from mf_qwen3_bridge.values import find_fault
from tests.tiny import NUMPY


def test_fold_names():
    names = ["a.layers.0.w", "a.layers.1.w", "a.layers.2.w", "a.layers.5.w", "norm", "a.layers.7.v"]
    assert fold_names(names[::-1]) == ["a.layers.{0..2,5}.w", "a.layers.7.v", "norm"]
    assert fold_names(["layers.3.w"]) == ["layers.3.w"]
    assert fold_names([]) == []


def test_an_error_shows_every_problem():
    text = str(BridgeError("it does not fit", [Problem("a", "1\n2", "do x"), Problem("b", "3", "do y")]))
    for word in ("it does not fit", "a", "1", "2", "do x", "b", "3", "do y"):
        assert word in text
    assert str(BridgeError("alone")) == "alone"


@pytest.mark.parametrize("dtype", NUMPY.values(), ids=str)
@pytest.mark.parametrize("size", [5, (1 << 20) + 3])
def test_find_fault(dtype, size):
    array = np.full(size, -1.5, dtype)
    assert find_fault(array) is None
    for value in (np.nan, np.inf, -np.inf, -np.nan):
        array[-1] = value
        assert find_fault(array) == "NaN or infinity"
    assert find_fault(np.zeros(size, dtype)) == "all zero"
    assert find_fault(np.full(size, -0.0, dtype)) == "all zero"
    array[:] = 0
    array[-1] = np.array(1e-7, dtype)
    assert find_fault(array) is None
