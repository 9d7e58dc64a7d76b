"""Collects the stand-ins for inference, and converts between tensors and arrays for them."""

from __future__ import annotations

from typing import Any

import numpy as np
from mindspore import Tensor

from mf_qwen3_bridge.mindformers.patching.replacements import Replacements

# Declared in this folder's modules, installed by ``inference_ops``.
STAND_INS = Replacements()


def to_float32(x: Tensor) -> np.ndarray:
    """A tensor's values; without a copy if they are float32."""
    return x.asnumpy().astype(np.float32, copy=False)


def to_tensor(array: np.ndarray, dtype: Any) -> Tensor:
    """An array as a tensor of that dtype."""
    return Tensor.from_numpy(array).astype(dtype)
