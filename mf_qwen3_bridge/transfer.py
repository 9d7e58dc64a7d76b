"""The bytes of a conversion: read from files in pieces of bounded size, by several threads, each put in place once."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from mf_qwen3_bridge.checkpoint import DTYPES, Reader, TensorInfo
from mf_qwen3_bridge.layouts import View
from mf_qwen3_bridge.values import largest_magnitude

# Stretch of a file that is worked on at a time: long for a disk, yet still in the cache when it is put in place.
PIECE_BYTES = 4 << 20
# A disk reads whole pages: what lies between two runs of wanted bytes is skipped if it is one at least.
_PAGE_BYTES = 4096
_MAX_THREADS = 8
_ROWS_OF_A_TRANSPOSE = 256


@dataclass(frozen=True)
class Copy:
    """Part of a source tensor, and where it goes in the target: two views of one shape."""

    source: TensorInfo
    source_view: View
    target_view: View

    @property
    def nbytes(self) -> int:
        """Bytes of the source that it uses."""
        return self.source_view.size * DTYPES[self.source.dtype].itemsize

    def pieces(self) -> Iterator[Copy]:
        """The same copy in pieces that each span few bytes of the file, their axes in the order of the file."""
        strides = self.source_view.strides
        order = sorted(range(len(strides)), key=lambda axis: -strides[axis])
        limit = PIECE_BYTES // DTYPES[self.source.dtype].itemsize
        for source, target in _split(self.source_view.permute(*order), self.target_view.permute(*order), limit):
            yield Copy(self.source, source, target)


def _split(source: View, target: View, limit: int) -> Iterator[tuple[View, View]]:
    """Cuts a pair of views along its axes, the outermost first, until nothing spans more than ``limit`` elements."""
    if source.span <= limit:
        yield source, target
        return
    length, count = source.shape[0], limit // source.strides[0]
    if length == 1 or count == 0:
        for index in range(length):
            yield from _split(source[index], target[index], limit)
        return
    for start in range(0, length, count):
        yield from _split(source[start : start + count], target[start : start + count], limit)


class Transfer:
    """Fills arrays with what copies say. ``with Transfer() as transfer: ...`` ends its threads and closes the files.

    Args:
        advance: is told the number of bytes after each piece.
    """

    def __init__(self, advance: Callable[[int], object] | None = None) -> None:
        self._advance = advance or (lambda nbytes: None)
        self._reader = Reader()
        self._pool = ThreadPoolExecutor(min(_MAX_THREADS, len(os.sched_getaffinity(0))))
        self._buffers = threading.local()

    def __enter__(self) -> Transfer:
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self._pool.shutdown(cancel_futures=True)
        finally:
            self._reader.__exit__()

    def fill(self, target: np.ndarray, copies: Iterable[Copy]) -> list[int]:
        """Carries out the copies of one target tensor. Dtypes are cast on the way, rounding to nearest even.

        Args:
            target: a C-contiguous array, all of the tensor.
            copies: what it is made of.

        Returns:
            For each copy the bits of the largest magnitude written (see :mod:`mf_qwen3_bridge.values`).

        Raises:
            BridgeError: a file ended early or could not be read.
        """
        pieces = [(number, piece) for number, copy in enumerate(copies) for piece in copy.pieces()]
        largest = [0] * (pieces[-1][0] + 1)
        for (number, piece), magnitude in zip(pieces, self._pool.map(lambda p: self._run(p[1], target), pieces)):
            largest[number] = max(largest[number], magnitude)
            self._advance(piece.nbytes)
        return largest

    def _run(self, piece: Copy, target: np.ndarray) -> int:
        """Reads a piece's bytes and puts them in place; straight from the file when they lie there as they did here."""
        dtype = DTYPES[piece.source.dtype]
        place = piece.target_view.of(target)
        runs = _Runs(piece.source_view, dtype.itemsize)
        if dtype == target.dtype and runs.lie_alike(piece.target_view):
            self._read(piece, runs, target, runs.starts(piece.target_view.strides, piece.target_view.offset))
            return largest_magnitude(place)
        buffer, view = self._buffer(runs.size, dtype), runs.gathered()
        self._read(piece, runs, buffer, runs.starts(view.strides, 0))
        gathered = view.of(buffer)
        copy_elements(gathered, place)
        return largest_magnitude(gathered if dtype == target.dtype else place)

    def _read(self, piece: Copy, runs: _Runs, out: np.ndarray, starts: np.ndarray) -> None:
        memory = memoryview(out.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
        itemsize, nbytes = out.itemsize, runs.length * out.itemsize
        begins = runs.starts(piece.source_view.strides, piece.source_view.offset) * itemsize
        for begin, start in zip(begins.tolist(), (starts * itemsize).tolist()):
            self._reader.read(piece.source, begin, memory[start : start + nbytes])

    def _buffer(self, size: int, dtype: np.dtype) -> np.ndarray:
        """This thread's own memory, taken once."""
        nbytes = size * dtype.itemsize
        memory: np.ndarray | None = getattr(self._buffers, "memory", None)
        if memory is None or memory.size < nbytes:
            memory = self._buffers.memory = np.empty(max(nbytes, PIECE_BYTES), np.uint8)
        return memory[:nbytes].view(dtype)


class _Runs:
    """A piece's elements as runs of neighbouring bytes; runs with less than a page between them count as one.

    Args:
        view: the piece in its source, outermost axis first.
        itemsize: bytes of an element.
    """

    def __init__(self, view: View, itemsize: int) -> None:
        self._view = view
        self._outer = len(view.shape)  # the axes that tell the runs apart; those after them lie within a run
        self.length = 1
        while self._outer:
            count, stride = view.shape[self._outer - 1], view.strides[self._outer - 1]
            if count > 1 and (stride - self.length) * itemsize >= _PAGE_BYTES:
                break
            self.length += stride * (count - 1)
            self._outer -= 1

    @property
    def size(self) -> int:
        """Elements of all runs, with the gaps inside them."""
        return self.length * int(np.prod(self._view.shape[: self._outer], dtype=np.int64))

    def starts(self, strides: tuple[int, ...], offset: int) -> np.ndarray:
        """Where each run begins in a tensor in which the piece has these strides and this offset: int64 (runs,)."""
        starts = np.array([offset], np.int64)
        for count, stride in zip(self._view.shape[: self._outer], strides):
            starts = (starts[:, None] + np.arange(count, dtype=np.int64) * stride).reshape(-1)
        return starts

    def lie_alike(self, target: View) -> bool:
        """Whether every run lies in ``target`` as in the source, without gaps."""
        inner = View(target.shape[self._outer :], target.strides[self._outer :])
        return inner.is_contiguous and inner.size == self.length

    def gathered(self) -> View:
        """The piece in an array that holds the runs one after the other."""
        shape = self._view.shape[: self._outer]
        outer = tuple(stride * self.length for stride in View.whole(shape).strides)
        return View(self._view.shape, outer + self._view.strides[self._outer :])


def copy_elements(source: np.ndarray, target: np.ndarray) -> None:
    """``target[...] = source``; elements of one dtype move as raw integers, which numpy does faster than bfloat16."""
    if source.dtype == target.dtype:
        raw = np.dtype(f"u{source.itemsize}")
        source, target = source.view(raw), target.view(raw)
    if source.ndim == 2 and _innermost_axis(source) != _innermost_axis(target):
        _transpose(source, target)
    else:
        np.copyto(target, source, casting="unsafe")


def _innermost_axis(array: np.ndarray) -> int:
    return min(range(array.ndim), key=lambda axis: (array.shape[axis] == 1, array.strides[axis]))


def _transpose(source: np.ndarray, target: np.ndarray) -> None:
    """Copies between a matrix that lies row by row and one that lies column by column.

    A column's elements lie a row apart, as a rule a power of two, and then in so few of a cache's sets that they drive
    each other out. So some rows at a time are first laid out at a distance that is none: four times as fast.
    """
    if _innermost_axis(source) == 0:
        source, target = source.T, target.T
    rows, columns = source.shape
    laid_out = np.empty((_ROWS_OF_A_TRANSPOSE, columns + 16), source.dtype)[:, :columns]
    for start in range(0, rows, _ROWS_OF_A_TRANSPOSE):
        block = source[start : start + _ROWS_OF_A_TRANSPOSE]
        np.copyto(laid_out[: len(block)], block)
        np.copyto(target[start : start + _ROWS_OF_A_TRANSPOSE], laid_out[: len(block)], casting="unsafe")


def have_equal_bytes(left: TensorInfo, right: TensorInfo, start: int, stop: int) -> bool:
    """Whether two tensors on disk are of one size and hold the same bytes from ``start`` to ``stop``.

    Raises:
        BridgeError: a file ended early or could not be read.
    """
    if left.nbytes != right.nbytes:
        return False
    with Reader() as reader:
        for begin in range(start, stop, PIECE_BYTES):
            pieces = [bytearray(min(PIECE_BYTES, stop - begin)) for _ in range(2)]
            for tensor, piece in zip((left, right), pieces):
                reader.read(tensor, begin, memoryview(piece))
            if pieces[0] != pieces[1]:
                return False
    return True
