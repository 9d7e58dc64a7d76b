"""Computes quantised weights: FP8 or INT8 elements times the scales of their blocks."""

from dataclasses import dataclass, replace
from math import prod
from threading import local

import numpy as np

from mf_qwen3_bridge.transfer.safetensors import DTYPES, Reader, ReadRegion, TensorInfo

# A table of the 65,536 pairs of E4M3 bytes is twice as fast as one of the 256 bytes, for which numpy makes an 8 byte
# index of each, and ten times as fast as ml_dtypes' cast. It takes 512 KiB.
_E4M3_PAIRS = np.arange(1 << 16, dtype=np.uint16).view(DTYPES["F8_E4M3"]).astype(np.float32).view(np.uint64)
_PAIRS_AT_A_TIME = 32 << 10
# UE8M0: a power of two in a byte; 255 is NaN.
_UE8M0 = np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.float32(np.nan))


@dataclass(frozen=True)
class Scaled:
    """A quantised weight (..., rows, columns), of which blocks have a scale each.

    An element is ``float32(weight) * float32(scale)``, as in ``Fp8Dequantize`` of
    ``transformers/integrations/finegrained_fp8.py`` (5.24) and ``weight_dequant`` of DeepSeek-V3's
    ``inference/kernel.py``. Blocks at the end of a row or column may be smaller.

    Attributes:
        weight: F8_E4M3 or I8; of three axes, each matrix is divided into blocks by itself.
        scale: (..., blocks of rows, blocks of columns): F32, BF16, F16, or bytes: UE8M0.
        block: rows and columns of a block.
    """

    weight: TensorInfo
    scale: TensorInfo
    block: tuple[int, int]

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """See :class:`Computed`."""
        return self.weight, self.scale

    def region(self, rows: np.ndarray, columns: tuple[int, int], read: ReadRegion) -> np.ndarray:
        """See :class:`Computed`; of the scales only those of the blocks that the region touches are read."""
        result = _to_float32(read(self.weight, rows, columns))
        (height, width), (start, stop) = self.block, columns
        matrices, in_matrix = np.divmod(rows, self.weight.shape[-2])
        scale_rows = matrices * self.scale.shape[-2] + in_matrix // height
        firsts = np.flatnonzero(np.diff(scale_rows, prepend=-1))  # of the rows that share their scales
        first, last = start // width, -(-stop // width)
        scales = _scales(read(self.scale, scale_rows[firsts], (first, last)))
        with np.errstate(over="ignore", invalid="ignore"):  # values are checked where they go
            if last - first == 1:
                result *= np.repeat(scales, np.diff(firsts, append=len(rows)), axis=0)
                return result
            edges = np.arange(first, last + 1) * width
            scales = np.repeat(scales, np.diff(edges.clip(start, stop)), axis=1)
            for line, begin, end in zip(scales, firsts, [*firsts[1:], len(rows)]):
                result[begin:end] *= line
        return result


def scaled(weight: TensorInfo, scale: TensorInfo, block: tuple[int, int], dtype: str) -> TensorInfo:
    """The tensor that a weight becomes, of ``dtype`` unless another is asked for."""
    nbytes = prod(weight.shape) * DTYPES[dtype].itemsize
    return replace(weight, dtype=dtype, nbytes=nbytes, computed=Scaled(weight, scale, block))


class _Scratch(local):
    """Memory of a thread: where the C library gives memory back to the system, getting it costs more than the work."""

    def __init__(self) -> None:
        self.indices = np.empty(_PAIRS_AT_A_TIME, np.intp)
        self.values = np.empty(0, np.float32)

    def floats(self, size: int) -> np.ndarray:
        """The same memory at each call."""
        if self.values.size < size:
            self.values = np.empty(size, np.float32)
        return self.values[:size]


_SCRATCH = _Scratch()


def _to_float32(weight: np.ndarray) -> np.ndarray:
    """The same values in float32, until the thread's next call."""
    even = weight.size + weight.size % 2
    result = _SCRATCH.floats(even)
    if weight.dtype != DTYPES["F8_E4M3"]:
        np.copyto(result[: weight.size].reshape(weight.shape), weight)
        return result[: weight.size].reshape(weight.shape)
    flat = np.ascontiguousarray(weight).reshape(-1).view(np.uint8)
    pairs = (flat if flat.size == even else np.append(flat, flat[:1])).view(np.uint16)
    for start in range(0, pairs.size, _PAIRS_AT_A_TIME):
        some = pairs[start : start + _PAIRS_AT_A_TIME]
        indices = _SCRATCH.indices[: some.size]
        indices[...] = some
        np.take(_E4M3_PAIRS, indices, out=result.view(np.uint64)[start : start + some.size], mode="clip")
    return result[: weight.size].reshape(weight.shape)


def to_scales(scale: TensorInfo, reader: Reader) -> np.ndarray:
    """All scales of a weight, float32."""
    content = np.empty(scale.shape, DTYPES[scale.dtype])
    reader.read(scale, 0, memoryview(content.reshape(-1).view(np.uint8)))  # type: ignore[arg-type]
    return _scales(content)


def _scales(scales: np.ndarray) -> np.ndarray:
    return _UE8M0[scales] if scales.dtype == np.uint8 else scales.astype(np.float32)
