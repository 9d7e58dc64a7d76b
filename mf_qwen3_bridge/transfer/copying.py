"""Carries out copies: reads tiles with several threads and puts their elements in place."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Condition
from typing import TypeVar

import numpy as np

from mf_qwen3_bridge.model.layouts import View
from mf_qwen3_bridge.transfer.blocks import from_range, from_shards
from mf_qwen3_bridge.transfer.safetensors import DTYPES, Reader, TensorInfo
from mf_qwen3_bridge.transfer.tiles import Copy, Tile, reads, tiles, writes
from mf_qwen3_bridge.transfer.values import is_exact, largest_magnitude

# Of all threads together; an expert of the largest model, read and transposed, takes 48 MiB.
BUFFER_BYTES = 96 << 20
_MAX_THREADS = 8
_ROWS_OF_A_TRANSPOSE = 256
_ALIGNMENT = 64
# Of each of two tensors, at a time.
_COMPARED_BYTES = 16 << 20

Item = TypeVar("Item")
Result = TypeVar("Result")


class Buffers:
    """Lends memory, at most BUFFER_BYTES in total, and reuses it: allocating memory costs more than filling it."""

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []
        self._total = 0
        self._changed = Condition()

    @contextmanager
    def lend(self, nbytes: int) -> Iterator[np.ndarray]:
        """Lends an array of ``nbytes`` bytes, uint8; waits for others to return theirs if none is left."""
        with self._changed:
            while (memory := self._take(nbytes)) is None:
                self._changed.wait()
        try:
            yield memory[:nbytes]
        finally:
            with self._changed:
                self._free.append(memory)
                self._changed.notify_all()

    def _take(self, nbytes: int) -> np.ndarray | None:
        fitting = [number for number, memory in enumerate(self._free) if memory.size >= nbytes]
        if fitting:
            return self._free.pop(min(fitting, key=lambda number: self._free[number].size))
        while self._free and self._total + nbytes > BUFFER_BYTES:
            self._total -= self._free.pop().size
        if self._total and self._total + nbytes > BUFFER_BYTES:
            return None
        self._total += nbytes
        return np.empty(nbytes, np.uint8)


@dataclass(frozen=True)
class Made:
    """A stretch of a target that a tile makes: runs of neighbouring elements.

    Attributes:
        target: the target's name.
        dtype: its dtype as safetensors spells it.
        starts: index of each run's first element in the target.
        elements: the runs one after the other, in the target's dtype.
        spare: uninitialised array of the same shape and dtype; None unless it was asked for.
        parts: for each copy that it is made of: the copy, its elements as they were read, and the view of ``elements``
            that holds them.
    """

    target: str
    dtype: str
    starts: Sequence[int]
    elements: np.ndarray
    spare: np.ndarray | None
    parts: Sequence[tuple[Copy, np.ndarray, np.ndarray]]

    def runs(self, elements: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """For each run its start, and its part of an array like ``elements``."""
        return zip(self.starts, elements.reshape(len(self.starts), -1))


@dataclass(frozen=True)
class LoadedTile:
    """A tile in memory.

    Attributes:
        tile: its copies.
        elements: for each copy the elements that it reads, in the source's dtype.
        made: the stretches of targets that it makes, if they were asked for.
    """

    tile: Tile
    elements: list[np.ndarray]
    made: list[Made]


class Transfer:
    """Carries out copies with several threads. ``with Transfer() as transfer: ...`` ends them and closes the files.

    Args:
        advance: is called with the number of bytes read after each tile.
    """

    def __init__(self, advance: Callable[[int], object] | None = None) -> None:
        self._advance = advance or (lambda nbytes: None)
        self._reader = Reader()
        self._num_threads = min(_MAX_THREADS, len(os.sched_getaffinity(0)))
        self._pool = ThreadPoolExecutor(self._num_threads)
        self.buffers = Buffers()

    def __enter__(self) -> Transfer:
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self._pool.shutdown(cancel_futures=True)
        finally:
            self._reader.__exit__()

    def fill(self, target: np.ndarray, copies: Iterable[Copy]) -> dict[TensorInfo, float]:
        """Fills an array with one target tensor, casting to its dtype (round to nearest even).

        Args:
            target: a C-contiguous array of the target's shape.
            copies: what it is made of.

        Returns:
            Source tensor -> largest magnitude (see :mod:`mf_qwen3_bridge.transfer.values`).

        Raises:
            BridgeError: a file ended early or could not be read.
        """
        largest: dict[TensorInfo, float] = {}
        for tile, magnitudes in self.map(lambda tile: (tile, self._fill(tile, target)), tiles(copies)):
            for copy, magnitude in zip(tile, magnitudes):
                largest[copy.source] = max(largest.get(copy.source, 0.0), magnitude)
            self._advance(sum(copy.nbytes for copy in tile))
        return largest

    def each(
        self,
        tiles_to_read: Iterable[Tile],
        look: Callable[[LoadedTile], Result],
        dtypes: Mapping[str, str] | None = None,
        with_spare: bool = False,
    ) -> Iterator[Result]:
        """Reads tiles with all threads, and calls a function with each while it is in memory.

        Args:
            tiles_to_read: the tiles.
            look: the function; it runs in the thread that read the tile. The arrays that it gets are reused afterwards.
            dtypes: target name -> dtype as safetensors spells it; without it no targets are made.
            with_spare: whether ``look`` needs a second array for each stretch, see :class:`Made`.

        Yields:
            What ``look`` returned, in the order of the tiles.

        Raises:
            BridgeError: a file ended early or could not be read.
        """

        def work(tile: Tile) -> tuple[Tile, Result]:
            with self._load(tile, dtypes, with_spare) as loaded:
                return tile, look(loaded)

        for tile, result in self.map(work, tiles_to_read):
            yield result
            self._advance(sum(copy.nbytes for copy in tile))

    @contextmanager
    def _load(self, tile: Tile, dtypes: Mapping[str, str] | None, with_spare: bool) -> Iterator[LoadedTile]:
        """Reads a tile and makes its stretches of targets, in one loan, as waiting for a second could deadlock."""
        stretches = [(*one, dtypes[one[0][0].target]) for one in writes(tile)] if dtypes else []
        is_plain = len(tile) == 1 and tile[0].is_plain_copy
        is_made_by_reading = is_plain and all(dtype == tile[0].source.dtype for *_, dtype in stretches)
        arrays = (not is_made_by_reading) + with_spare
        nbytes_read = read_nbytes(tile)
        nbytes_made = arrays * sum(room(stretch.size, DTYPES[dtype]) for _, stretch, dtype in stretches)
        with self.buffers.lend(nbytes_read + nbytes_made) as memory:
            elements = self.gather(tile, memory)
            of_copy, free = dict(zip(tile, elements)), memory[nbytes_read:]
            made = []
            for copies, stretch, dtype in stretches:
                spare = None
                if with_spare:
                    spare, free = carve(free, stretch.size, DTYPES[dtype])
                if is_made_by_reading:
                    array = elements[0].reshape(-1)
                else:
                    array, free = carve(free, stretch.size, DTYPES[dtype])
                parts = [(copy, of_copy[copy], view.of(array)) for copy, view in zip(copies, stretch.views)]
                for _, source, place in () if is_made_by_reading else parts:
                    copy_elements(source, place)
                made.append(Made(copies[0].target, dtype, stretch.starts.tolist(), array, spare, parts))
            yield LoadedTile(tile, elements, made)

    def magnitudes(self, copies: Iterable[Copy]) -> Iterator[float]:
        """The largest magnitudes in what the copies read, tile by tile."""
        return self.each(tiles(copies), lambda loaded: max(map(largest_magnitude, loaded.elements)))

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Applies ``function`` to each item with all threads, in order; takes only a few items in advance."""
        pending: deque[Future[Result]] = deque()
        for item in items:
            pending.append(self._pool.submit(function, item))
            if len(pending) > 4 * self._num_threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def _fill(self, tile: Tile, target: np.ndarray) -> list[float]:
        """Reads from the file into the target itself where the elements are stored as in the target."""
        places = [copy.target_view.of(target) for copy in tile]
        (copy, place), *others = zip(tile, places)
        dtype = DTYPES[copy.source.dtype]
        if not others and copy.is_plain_copy and dtype == target.dtype:
            self.read(copy.source, copy.source_view.offset, place)
            return [largest_magnitude(place)]
        with self.buffers.lend(read_nbytes(tile)) as memory:
            gathered = self.gather(tile, memory)
            for elements, place in zip(gathered, places):
                copy_elements(elements, place)
            return [
                largest_magnitude(elements if is_exact(elements.dtype, target.dtype) else place)
                for elements, place in zip(gathered, places)
            ]

    def gather(self, tile: Tile, memory: np.ndarray) -> list[np.ndarray]:
        """Reads the sources of a tile, each byte once.

        Args:
            tile: the copies.
            memory: room for :func:`read_nbytes` bytes.

        Returns:
            For each copy the elements that it reads, as they are stored: views of ``memory``.
        """
        found: dict[Copy, np.ndarray] = {}
        for copies, stretch in reads(tile):
            source = copies[0].source
            elements, memory = carve(memory, stretch.size, DTYPES[source.dtype])
            for number, start in enumerate(stretch.starts.tolist()):
                self.read(source, start, elements[number * stretch.length : (number + 1) * stretch.length])
            found |= {copy: view.of(elements) for copy, view in zip(copies, stretch.views)}
        return [found[copy] for copy in tile]

    def read(self, source: TensorInfo, start: int, out: np.ndarray) -> None:
        """Fills a C-contiguous array with the elements of a tensor, from element ``start`` on."""
        if source.shards:
            for copy in from_range(source, start, out.size):
                rows = range(copy.source_view.shape[0])
                for piece in [copy] if copy.is_plain_copy else [copy.cut(0, row, row + 1) for row in rows]:
                    self.read(piece.source, piece.source_view.offset, piece.target_view.of(out))
            return
        memory = memoryview(out.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
        self._reader.read(source, start * out.itemsize, memory)


def carve(memory: np.ndarray, size: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """The first bytes of ``memory`` as an array of ``size`` elements, and the rest."""
    nbytes = size * dtype.itemsize
    return memory[:nbytes].view(dtype), memory[nbytes + -nbytes % _ALIGNMENT :]


def room(size: int, dtype: np.dtype) -> int:
    """Bytes that :func:`carve` takes."""
    nbytes = size * dtype.itemsize
    return nbytes + -nbytes % _ALIGNMENT


def read_nbytes(tile: Tile) -> int:
    """Bytes of memory for what a tile reads."""
    return sum(room(stretch.size, DTYPES[copies[0].source.dtype]) for copies, stretch in reads(tile))


def copy_elements(source: np.ndarray, target: np.ndarray) -> None:
    """``target[...] = source``; elements of one dtype move as raw integers, which numpy does faster than bfloat16."""
    with np.errstate(over="ignore"):  # those who cast check for infinities
        if source.ndim == 2 and _innermost_axis(source) != _innermost_axis(target):
            _transpose(source, target)
        else:
            _copy(source, target)


def _copy(source: np.ndarray, target: np.ndarray) -> None:
    if source.dtype == target.dtype:
        raw = np.dtype(f"u{source.itemsize}")
        source, target = source.view(raw), target.view(raw)
    np.copyto(target, source, casting="unsafe")


def _innermost_axis(array: np.ndarray) -> int:
    return min(range(array.ndim), key=lambda axis: (array.shape[axis] == 1, array.strides[axis]))


def _transpose(source: np.ndarray, target: np.ndarray) -> None:
    """Copies between a row-major and a column-major matrix.

    A column's elements are a row apart, often a power of two: they share few cache sets and evict each other. Copying
    some rows at a time to a padded buffer first is four times as fast.
    """
    if _innermost_axis(source) == 0:
        source, target = source.T, target.T
    rows, columns = source.shape
    padded = np.empty((_ROWS_OF_A_TRANSPOSE, columns + 16), target.dtype)[:, :columns]  # cast before transposing
    for start in range(0, rows, _ROWS_OF_A_TRANSPOSE):
        block = source[start : start + _ROWS_OF_A_TRANSPOSE]
        _copy(block, padded[: len(block)])
        _copy(padded[: len(block)], target[start : start + _ROWS_OF_A_TRANSPOSE])


def have_equal_bytes(left: TensorInfo, right: TensorInfo, number: int = 0, count: int = 1) -> bool:
    """Whether two tensors on disk are of one shape and dtype and hold the same bytes.

    Args:
        left, right: the tensors.
        number, count: which of how many parts, cut along the first axis, is compared.

    Raises:
        BridgeError: a file ended early or could not be read.
    """
    if (left.shape, left.dtype) != (right.shape, right.dtype):
        return False
    shape = left.shape or (1,)
    start, stop = shape[0] * number // count, shape[0] * (number + 1) // count
    step = max(1, _COMPARED_BYTES * shape[0] // max(left.nbytes, 1))
    with Transfer() as transfer:
        for begin in range(start, stop, step):
            view = View.whole(shape)[begin : min(begin + step, stop)]
            here, there = (np.empty(view.shape, DTYPES[left.dtype]) for _ in range(2))
            for tensor, piece in (left, here), (right, there):
                transfer.fill(piece, from_shards(Copy(tensor, view, tensor.name, View.whole(view.shape))))
            if not np.array_equal(here.view(f"u{here.itemsize}"), there.view(f"u{there.itemsize}")):
                return False
    return True
