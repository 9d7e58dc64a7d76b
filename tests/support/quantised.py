"""Quantised tensors and checkpoints, made with numpy; and the formula that says what they mean."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
BF16 = np.dtype(ml_dtypes.bfloat16)
Tensors = dict[str, np.ndarray]
_SPELLING = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    BF16: "BF16",
    E4M3: "F8_E4M3",
    np.dtype(np.int8): "I8",
    np.dtype(np.int32): "I32",
    np.dtype(np.uint8): "U8",
}


def weight_dequant(weight: np.ndarray, scale: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """What DeepSeek-V3's ``inference/kernel.py:weight_dequant`` computes, block by block, in float32; not rounded."""
    weight, scale = weight.astype(np.float32), scale.astype(np.float32)
    result = np.empty_like(weight)
    (rows, columns), (height, width) = weight.shape[-2:], block
    for matrix in np.ndindex(weight.shape[:-2]):
        for i in range(-(-rows // height)):
            for j in range(-(-columns // width)):
                part = (*matrix, slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width))
                result[part] = weight[part] * scale[(*matrix, i, j)]
    return result


def quantise(weight: np.ndarray, block: tuple[int, int] | None = None, largest: float = 448) -> tuple[np.ndarray, ...]:
    """(weight, scale) of a matrix, or a stack of them: E4M3, or I8 if ``largest`` is 127; without ``block`` one scale.

    Computed as ``Fp8Quantize`` of transformers 5.24 does.
    """
    height, width = block or weight.shape[-2:]
    *stack, rows, columns = weight.shape
    grid = (*stack, -(-rows // height), -(-columns // width))
    scale = np.empty(grid, np.float32)
    for place in np.ndindex(grid):
        *matrix, i, j = place
        part = weight[(*matrix, slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width))]
        scale[place] = np.abs(part).max() / np.float32(largest)
    exact = weight.astype(np.float32) / weight_dequant(np.ones_like(weight), scale, (height, width))
    if largest == 448:
        return exact.astype(E4M3), scale
    return np.rint(exact).astype(np.int8), scale


def save(file: Path, tensors: Mapping[str, np.ndarray], spelling: Mapping[str, str] | None = None) -> None:
    """A safetensors file; the library's own numpy writer knows no FP8. ``spelling`` overrides dtypes by name."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        dtype = (spelling or {}).get(name) or _SPELLING[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    encoded = json.dumps(header).encode()
    data = b"".join(np.ascontiguousarray(tensor).tobytes() for tensor in tensors.values())
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
