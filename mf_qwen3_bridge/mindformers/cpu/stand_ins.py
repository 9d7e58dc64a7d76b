"""Collects stand-ins for Ascend's operators, and converts between tensors and arrays for them."""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor

from mf_qwen3_bridge.mindformers.patching.replacements import Replacements


class StandIns(Replacements):
    """Replacements for what a CPU lacks."""

    def install(self) -> None:
        """Puts them in place, if MindSpore's device target is CPU."""
        if ms.get_context("device_target") == "CPU":
            super().install()


# For inference. Declared in ``inference_ops`` and the modules that it imports.
STAND_INS = StandIns()


def to_float32(x: Tensor) -> np.ndarray:
    """A tensor's values; without a copy if they are float32."""
    return x.asnumpy().astype(np.float32, copy=False)


def to_tensor(array: np.ndarray, dtype: Any) -> Tensor:
    """An array as a tensor of that dtype."""
    return Tensor.from_numpy(array).astype(dtype)
