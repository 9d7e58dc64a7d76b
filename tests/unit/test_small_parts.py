import numpy as np
import pytest

from mf_qwen3_bridge.errors import BridgeError, Problem, fold_names
from mf_qwen3_bridge.transfer.values import fault_of, largest_magnitude
from tests.support.checkpoints import NUMPY


def test_fold_names():
    names = ["a.layers.0.w", "a.layers.1.w", "a.layers.2.w", "a.layers.5.w", "norm", "a.layers.7.v"]
    assert fold_names(names[::-1]) == ["a.layers.{0..2,5}.w", "a.layers.7.v", "norm"]
    assert fold_names(["layers.3.w"]) == ["layers.3.w"]
    assert fold_names([]) == []
    experts = [f"layers.{layer}.experts.{expert}.up.weight" for layer in range(3) for expert in range(4)]
    assert fold_names(experts) == ["layers.{0..2}.experts.{0..3}.up.weight"]
    assert fold_names(experts[:4]) == ["layers.0.experts.{0..3}.up.weight"]
    assert fold_names(experts[:5]) == ["layers.{0..1}.experts.0.up.weight", "layers.0.experts.{1..3}.up.weight"]


def test_an_error_shows_every_problem():
    text = str(BridgeError("it does not fit", [Problem("a", "1\n2", "do x"), Problem("b", "3", "do y")]))
    for word in ("it does not fit", "a", "1", "2", "do x", "b", "3", "do y"):
        assert word in text
    assert str(BridgeError("alone")) == "alone"


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
