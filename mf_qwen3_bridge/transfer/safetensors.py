"""Reads safetensors files: headers, and tensors' bytes; knows nothing of directories or models."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from threading import Lock
from typing import NamedTuple, Protocol

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from mf_qwen3_bridge.errors import BridgeError, Problem
from mf_qwen3_bridge.model.layouts import Box

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(np.uint8),  # which ml_dtypes 0.4 does not know
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
# Bits of an element of every dtype that a header may name.
_BITS = {name: 8 * dtype.itemsize for name, dtype in DTYPES.items()}
_BITS |= {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "C64": 64}
# The limit that the safetensors library sets itself.
_MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in a safetensors file, not read yet.

    Attributes:
        dtype: its dtype as safetensors spells it, such as ``BF16``; of a computed tensor, the one to round to unless
            another is asked for.
        start, nbytes: offset of its first byte in the file, and its size in bytes.
        shards: the blocks that cover it, if these are stored instead of the whole; ``file`` and ``start`` are then
            those of one of them.
        computed: how its elements are computed, if they are not stored as they are; ``file`` and ``start`` are then
            those of the first tensor that they are computed from.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    start: int
    nbytes: int
    shards: tuple[Shard, ...] = ()
    computed: Computed | None = field(default=None, compare=False)

    @property
    def width(self) -> int:
        """Elements of a row: tensors of more than two axes are seen as their rows one after the other."""
        return self.shape[-1] if self.shape else 1

    @property
    def files(self) -> frozenset[Path]:
        """The files that hold what it is made of."""
        parts = [shard.tensor for shard in self.shards] or (self.computed.tensors if self.computed else ())
        return frozenset({self.file}).union(*(part.files for part in parts))


class ReadRegion(Protocol):
    """Reads a region of a tensor that is seen as rows."""

    def __call__(
        self, tensor: TensorInfo, rows: np.ndarray, columns: tuple[int, int], *, keep: bool = False
    ) -> np.ndarray:
        """(rows, columns) in the tensor's dtype; a computed tensor's elements in the dtype that it is asked for.

        Args:
            tensor: what is read.
            rows, columns: the rows' numbers, in ascending order, and (start, stop) of the columns.
            keep: whether the same will be read again soon; the result must not be changed then.
        """


class Computed(Protocol):
    """How the elements of a tensor are computed from others that are stored: from a quantised weight and its scales."""

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """What it is computed from."""

    def region(self, rows: np.ndarray, columns: tuple[int, int], read: ReadRegion) -> np.ndarray:
        """The elements of a region, float32 (rows, columns), computed from what ``read`` gives of :attr:`tensors`."""


class Shard(NamedTuple):
    """A block of a tensor that is stored as a tensor of its own: ``box`` is where it is in the whole."""

    tensor: TensorInfo
    box: Box


class Reader(ExitStack):
    """Reads tensors' bytes, for several threads; a context manager that opens each file once, and closes all."""

    def __init__(self) -> None:
        super().__init__()
        self._descriptors: dict[Path, int] = {}
        self._lock = Lock()

    def read(self, tensor: TensorInfo, start: int, out: memoryview) -> None:
        """Fills ``out`` with the tensor's bytes from ``start`` on.

        Raises:
            BridgeError: the file ended early or could not be read.
            ValueError: the tensor is stored in shards, each of which is read by itself.
        """
        if tensor.shards:
            raise ValueError(f"{tensor.name} is stored in {len(tensor.shards)} shards")
        done = 0
        try:
            descriptor = self._descriptor(tensor.file)
            while done < len(out):
                count = os.preadv(descriptor, [out[done:]], tensor.start + start + done)
                if count == 0:
                    raise BridgeError(
                        f"{tensor.file} ended while {tensor.name} was read ({start + done} of {tensor.nbytes} bytes): "
                        "it changed since its header was read; copy it again"
                    )
                done += count
        except OSError as error:
            raise BridgeError(f"can't read {tensor.name} from {tensor.file}: {error.strerror}") from error

    def _descriptor(self, file: Path) -> int:
        with self._lock:
            if file not in self._descriptors:
                self._descriptors[file] = os.open(file, os.O_RDONLY)
                self.callback(os.close, self._descriptors[file])
            return self._descriptors[file]


def read_bytes(tensor: TensorInfo) -> bytes:
    """All of a small tensor's bytes; raises as :meth:`Reader.read`."""
    content = bytearray(tensor.nbytes)
    with Reader() as reader:
        reader.read(tensor, 0, memoryview(content))
    return bytes(content)


def read_header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors and the metadata of one safetensors file; no tensor is read.

    The safetensors library reads and checks the header. It leaves no gaps between tensors, so their order and their
    sizes give the offsets, which it does not return.

    Raises:
        BridgeError: the file is truncated, or no safetensors file.
    """
    try:
        size = file.stat().st_size
        if not file.is_file():  # a pipe would keep the library waiting
            raise _damaged(file, "no regular file")
        with open(file, "rb") as stream:
            prefix = stream.read(8)
        with safe_open(file, framework="np") as opened:
            names = opened.offset_keys()
            slices = [opened.get_slice(name) for name in names]
            described = [(slice_.get_dtype(), tuple(slice_.get_shape())) for slice_ in slices]
            metadata = opened.metadata() or {}
    except OSError as error:
        found = f"can't be read: {error.strerror or error}"
        raise _damaged(file, found, "look at its permissions and its disk") from error
    except SafetensorError as error:
        raise _damaged(file, *_why_refused(file, size, str(error))) from error
    tensors = {}
    position = 8 + int.from_bytes(prefix, "little")
    for name, (dtype, shape) in zip(names, described):
        if dtype not in _BITS:
            raise _damaged(file, f"{name} has dtype {dtype}: its size is not known", "update mf-qwen3-bridge")
        nbytes = prod(shape) * _BITS[dtype] // 8
        # MindSpore names there what safetensors has no name for, such as int4, and reads the bytes as that.
        tensors[name] = TensorInfo(name, shape, metadata.get(name, dtype), file, position, nbytes)
        position += nbytes
    if position != size:
        raise _damaged(file, _extent(size, position))
    return tensors, metadata


def _damaged(file: Path, found: str, remedy: str = "copy the file again") -> BridgeError:
    return BridgeError(f"{file} is damaged", [Problem(file.name, found, remedy)])


def _extent(size: int, expected: int) -> str:
    state = "truncated" if size < expected else "longer than its header declares"
    return f"{state}: {size} bytes, {expected} expected"


def _why_refused(file: Path, size: int, reason: str) -> tuple[str, ...]:
    """What is wrong with a file that the library refuses: its reason, or more if that names no tensor and no size."""
    with suppress(OSError), open(file, "rb") as stream:
        start = stream.read(40)
        if start.startswith(b"version https://git-lfs"):
            return "a Git LFS pointer, not the weights", "fetch them with `git lfs pull`"
        length = int.from_bytes(start[:8], "little")
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            return (f"{size} bytes, not a whole safetensors file",)
        stream.seek(8)
        text = stream.read(length)
    if any(kind in reason for kind in ("invalid shape", "invalid offset", "not fully covered")):
        header = json.loads(text)  # whose entries are of the right types, then
        header.pop("__metadata__", None)
        position = 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = entry["data_offsets"]
            if prod(entry["shape"]) * _BITS.get(entry["dtype"], 0) != 8 * (end - begin):
                kind = f"{entry['dtype']} {tuple(entry['shape'])}"
                return (f"{name} is {kind} by its header, but has {end - begin} bytes",)
            if begin != position:
                return (f"{name} does not begin where the tensor before it ends",)
            position = end
        if 8 + length + position != size:
            return (_extent(size, 8 + length + position),)
    return (f"its header is not valid: {reason.removeprefix('Error while deserializing header: ')}",)
