"""Collects stand-ins for Ascend's operators, and converts between tensors and arrays for them."""

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from mf_qwen3_bridge.mindformers.replacements import Replacements

# For inference. Declared in ``inference_ops`` and the modules that it imports.
STAND_INS = Replacements("CPU")


def rms_norm(self: Any, x: Tensor) -> Tensor:
    """``RmsNorm`` over the last axis of ``x`` (..., hidden_size), for both kinds; returns ``x``'s shape and dtype.

    Like Ascend's operator: the input is rounded to ``layernorm_compute_dtype``, the sum of squares is float32's.
    """
    rows = ops.cast(ops.cast(x, self.compute_type), ms.float32)
    variance = ops.ReduceMean(keep_dims=True)(ops.square(rows), -1)
    normed = rows * ops.rsqrt(variance + self.eps) * ops.cast(self.weight, ms.float32)
    return ops.cast(ops.cast(normed, self.compute_type), x.dtype)


def to_float32(x: Tensor) -> np.ndarray:
    """A tensor's values; without a copy if they are float32."""
    return x.asnumpy().astype(np.float32, copy=False)


def to_tensor(array: np.ndarray, dtype: Any) -> Tensor:
    """An array as a tensor of that dtype."""
    return Tensor.from_numpy(array).astype(dtype)
