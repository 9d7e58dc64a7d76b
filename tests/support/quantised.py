"""Quantised tensors and checkpoints, made with numpy; and the formula that says what they mean."""

from __future__ import annotations

import json
import re
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


_LINEAR = re.compile(r"model\.layers\.\d+\..*_proj(\.weight)?")
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
# What compressed-tensors writes for llm-compressor's schemes FP8_DYNAMIC and W8A8, as far as it is read.
COMPRESSED = {"quant_method": "compressed-tensors", "quantization_status": "compressed", "ignore": ["lm_head"]}


def fp8_config(block: tuple[int, int] | None = (5, 8), **changes: Any) -> dict[str, Any]:
    """A ``quantization_config`` as the official Qwen3-*-FP8 have it."""
    return FP8 | {"weight_block_size": block and list(block), "modules_to_not_convert": ["lm_head"], **changes}


def compressed_config(kind: str = "float", strategy: str = "channel", **changes: Any) -> dict[str, Any]:
    """A ``quantization_config`` of compressed-tensors."""
    weights = {"num_bits": 8, "type": kind, "strategy": strategy, "symmetric": True, "dynamic": False}
    weights |= {"group_size": None, "block_structure": [5, 8] if strategy == "block" else None, "actorder": None}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return COMPRESSED | {"format": f"{kind}-quantized", "config_groups": {"group_0": group}, **changes}


def quantise_model(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], scale_dtype: Any = np.float32):
    """Quantises the linear layers of a model: (tensors as they are stored, what they stand for in float32)."""
    is_fp8 = config["quant_method"] == "fp8"
    excepted = config["modules_to_not_convert" if is_fp8 else "ignore"]
    stored: Tensors = {}
    exact: Tensors = {}
    for name, tensor in tensors.items():
        if not _LINEAR.fullmatch(name) or name.removesuffix(".weight") in excepted:
            stored[name], exact[name] = tensor.astype(BF16), tensor.astype(BF16).astype(np.float32)
            continue
        rows, columns = tensor.shape[-2:]
        ending, largest = "_scale_inv", 448.0
        if is_fp8:
            block = config["weight_block_size"] or (rows, columns)
        else:
            weights = config["config_groups"]["group_0"]["weights"]
            ending, largest = "_scale", 448.0 if weights["type"] == "float" else 127.0
            block = {"channel": (1, columns), "tensor": (rows, columns)}.get(weights["strategy"]) or (5, 8)
        weight, scale = quantise(tensor.astype(np.float32), tuple(block), largest)
        if scale_dtype == np.uint8:
            scale = np.ceil(np.log2(scale)).astype(np.int64) + 127
            values = np.exp2(scale - 127.0).astype(np.float32)
        else:
            values = scale.astype(scale_dtype).astype(np.float32)
        if block == (rows, columns) and tensor.ndim == 2 and scale_dtype != np.uint8:
            scale = scale.reshape((1,) if ending == "_scale" else ())
        stored[name], stored[name + ending] = weight, scale.astype(scale_dtype)
        exact[name] = weight_dequant(weight, values, tuple(block))
    return stored, exact


def write_model(
    directory: Path,
    tensors: Mapping[str, np.ndarray],
    config: Mapping[str, Any] | None,
    spelling: Mapping[str, str] | None = None,
) -> Path:
    """A Hugging Face directory of quantised tensors."""
    save(directory / "model.safetensors", tensors, spelling)
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    return directory
