"""Carries out copies: reads tiles with several threads and puts their elements in place."""

import os
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from math import prod
from threading import Condition, Lock
from typing import NamedTuple, TypeVar

import numpy as np

from mf_qwen3_bridge.transfer.blocks import from_range, regions
from mf_qwen3_bridge.transfer.safetensors import DTYPES, Reader, TensorInfo
from mf_qwen3_bridge.transfer.tiles import PAGE_BYTES, Copy, Tile, reads, tiles, writes
from mf_qwen3_bridge.transfer.values import largest_magnitude

# Of all threads together; an expert of the largest model, read and transposed, takes 48 MiB.
BUFFER_BYTES = 96 << 20
_MAX_THREADS = 8
_ROWS_OF_A_TRANSPOSE = 256
# Of what is lent: a page, so that it can be written past the page cache.
_ALIGNMENT = 4096
# Of regions that computed tensors need again and again; one is kept, whatever its size.
_KEPT_BYTES = 32 << 20
# Of each of two tensors, by each thread at a time.
_COMPARED_BYTES = 2 << 20

Item = TypeVar("Item")
Result = TypeVar("Result")
# Of arrays: number of elements, dtype.
Sizes = Sequence[tuple[int, np.dtype]]


class Buffers:
    """Lends memory, at most BUFFER_BYTES in total, and reuses it: allocating memory costs more than filling it."""

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []
        self._total = 0
        self._changed = Condition()

    @contextmanager
    def lend(self, sizes: Sizes) -> Iterator[list[np.ndarray]]:
        """Lends uninitialised arrays of ``sizes``; waits for others' return if no memory is left.

        What a thread needs is one loan, as waiting for a second could deadlock.
        """
        nbytes = [size * dtype.itemsize for size, dtype in sizes]
        *starts, total = accumulate((n + -n % _ALIGNMENT for n in nbytes), initial=0)
        with self._changed:
            while (memory := self._take(total)) is None:
                self._changed.wait()
        try:
            yield [memory[start : start + n].view(dtype) for start, n, (_, dtype) in zip(starts, nbytes, sizes)]
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
        memory = np.empty(nbytes + _ALIGNMENT, np.uint8)
        start = -memory.ctypes.data % _ALIGNMENT
        return memory[start : start + nbytes]


class KeptRegions:
    """The regions of tensors that were read last, up to _KEPT_BYTES."""

    def __init__(self) -> None:
        self._arrays: OrderedDict[Hashable, np.ndarray] = OrderedDict()
        self._lock = Lock()

    def get(self, key: Hashable, read: Callable[[], np.ndarray]) -> np.ndarray:
        """The region of this key: ``read`` gives it if it is not kept."""
        with self._lock:
            if key in self._arrays:
                self._arrays.move_to_end(key)
                return self._arrays[key]
        array = read()
        array.flags.writeable = False
        with self._lock:
            self._arrays[key] = array
            while len(self._arrays) > 1 and sum(other.nbytes for other in self._arrays.values()) > _KEPT_BYTES:
                self._arrays.popitem(last=False)
        return array


class Made(NamedTuple):
    """What a tile makes of one target.

    Attributes:
        runs: runs of neighbouring elements, in the target's dtype: the index of the first in the target, and the run.
        parts: for each copy: the copy, its elements as they were read, and the view of the runs that holds them.
    """

    target: str
    runs: list[tuple[int, np.ndarray]]
    parts: list[tuple[Copy, np.ndarray, np.ndarray]]


class Transfer(ExitStack):
    """Carries out copies with several threads; a context manager. ``advance`` gets each tile's number of bytes read."""

    def __init__(self, advance: Callable[[int], object] | None = None) -> None:
        super().__init__()
        self._advance = advance or (lambda nbytes: None)
        self._buffers = Buffers()
        self._kept = KeptRegions()
        self._reader = self.enter_context(Reader())
        self._num_threads = min(_MAX_THREADS, len(os.sched_getaffinity(0)))
        self._pool = ThreadPoolExecutor(self._num_threads)
        self.callback(self._pool.shutdown, cancel_futures=True)

    def fill(self, target: np.ndarray, copies: Iterable[Copy]) -> dict[TensorInfo, float]:
        """Fills a C-contiguous array with the target tensor of these copies, casting to its dtype (to nearest even).

        Returns source tensor -> largest magnitude (see :mod:`mf_qwen3_bridge.transfer.values`); raises as ``Reader``.
        """
        largest: dict[TensorInfo, float] = defaultdict(float)
        for magnitudes in self._run(lambda tile: self._fill(tile, target), tiles(copies)):
            for source, magnitude in magnitudes:
                largest[source] = max(largest[source], magnitude)
        return largest

    def _fill(self, tile: Tile, target: np.ndarray) -> list[tuple[TensorInfo, float]]:
        if _is_read_as(target.dtype, tile):  # then from the file into the target itself
            place = tile[0].target_view.of(target)
            self.read(tile[0].source, tile[0].source_view.offset, place)
            return [(tile[0].source, largest_magnitude(place))]
        magnitudes = []
        with self._loaded(tile, target.dtype) as (elements_of, _):
            for copy, elements in elements_of.items():
                place = copy.target_view.of(target)
                copy_elements(elements, place)
                shown = elements if np.can_cast(elements.dtype, target.dtype) else place
                magnitudes.append((copy.source, largest_magnitude(shown)))
        return magnitudes

    def each(self, wanted: Iterable[Tile], look: Callable[[Mapping[Copy, np.ndarray]], Result]) -> Iterator[Result]:
        """Reads tiles with all threads, and calls ``look`` with each while it is in memory; yields results in order.

        ``look`` takes the elements that each copy reads, in the source's dtype. It runs in the thread that read the
        tile, and the arrays are reused afterwards.
        """

        def work(tile: Tile) -> Result:
            with self._loaded(tile) as (elements_of, _):
                return look(elements_of)

        return self._run(work, wanted)

    def make(
        self, wanted: Iterable[Tile], look: Callable[[Made], Result], dtypes: Mapping[str, str]
    ) -> Iterator[Result]:
        """As :meth:`each`, but ``look`` gets what a tile makes of each target, in its ``dtypes``, and may change it."""

        def work(tile: Tile) -> list[Result]:
            stretches = writes(tile)
            sizes = [(stretch.size, DTYPES[dtypes[copies[0].target]]) for copies, stretch in stretches]
            is_made_by_reading = _is_read_as(sizes[0][1], tile)
            more = () if is_made_by_reading else sizes
            with self._loaded(tile, sizes[0][1], more) as (elements_of, arrays):
                if is_made_by_reading:
                    arrays = [elements_of[tile[0]].reshape(-1)]
                results = []
                for (copies, stretch), array in zip(stretches, arrays):
                    parts = [(copy, elements_of[copy], view.of(array)) for copy, view in zip(copies, stretch.views)]
                    if not is_made_by_reading:
                        for _, elements, place in parts:
                            copy_elements(elements, place)
                    results.append(look(Made(copies[0].target, list(stretch.runs(array)), parts)))
                return results

        for results in self._run(work, wanted):
            yield from results

    def _run(self, function: Callable[[Tile], Result], wanted: Iterable[Tile]) -> Iterator[Result]:
        for tile, result in self.map(lambda tile: (tile, function(tile)), wanted):
            yield result
            self._advance(sum(copy.nbytes for copy in tile))

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Applies ``function`` to each item with all threads, in order; takes only a few items in advance."""
        pending: deque[Future[Result]] = deque()
        for item in items:
            pending.append(self._pool.submit(function, item))
            if len(pending) > 4 * self._num_threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    @contextmanager
    def _loaded(
        self, tile: Tile, computed: np.dtype | None = None, more: Sizes = ()
    ) -> Iterator[tuple[dict[Copy, np.ndarray], list[np.ndarray]]]:
        """Reads the sources of a tile, each byte once: for each copy its elements, in the dtype of the source.

        Args:
            tile: the copies.
            computed: the dtype of elements that are computed, if not the source's; they are rounded once.
            more: arrays to lend as well.
        """
        stretches = reads(tile)
        sources = [copies[0].source for copies, _ in stretches]
        dtypes = [computed if computed and source.computed else DTYPES[source.dtype] for source in sources]
        sizes = [(stretch.size, dtype) for (_, stretch), dtype in zip(stretches, dtypes)]
        with self._buffers.lend([*sizes, *more]) as arrays:
            elements_of: dict[Copy, np.ndarray] = {}
            for (copies, stretch), array in zip(stretches, arrays):
                self._read_runs(copies[0].source, stretch.starts, array.reshape(len(stretch.starts), -1))
                elements_of |= {copy: view.of(array) for copy, view in zip(copies, stretch.views)}
            yield elements_of, arrays[len(stretches) :]

    def read(self, source: TensorInfo, start: int, out: np.ndarray) -> None:
        """Fills a C-contiguous array with the elements of a tensor, from element ``start`` on.

        The array has the tensor's dtype; if the tensor is computed, any, to which the elements are rounded.
        """
        if source.computed:
            self._read_runs(source, np.array([start]), out.reshape(1, -1))
            return
        if source.shards:
            for copy in from_range(source, start, out.size):
                rows = range(copy.source_view.shape[0])
                for piece in [copy] if copy.is_plain_copy else [copy.cut(0, row, row + 1) for row in rows]:
                    self.read(piece.source, piece.source_view.offset, piece.target_view.of(out))
            return
        memory = memoryview(out.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
        self._reader.read(source, start * out.itemsize, memory)

    def _read_runs(self, source: TensorInfo, starts: np.ndarray, out: np.ndarray) -> None:
        """Fills (runs, elements of each) with runs of a tensor's elements that begin at ``starts``."""
        if source.computed is None:
            for start, run in zip(starts.tolist(), out):
                self.read(source, start, run)
            return
        for region, place in regions(starts, out, source.width):
            copy_elements(self._read_region(source, *region, out.dtype), place)

    def _read_region(
        self, tensor: TensorInfo, rows: np.ndarray, columns: tuple[int, int], dtype: np.dtype
    ) -> np.ndarray:
        """A region of a tensor's rows; computed elements are float32, and those they depend on are of ``dtype``."""
        if tensor.computed:

            def read(
                tensor: TensorInfo, rows: np.ndarray, columns: tuple[int, int], *, keep: bool = False
            ) -> np.ndarray:
                if keep:
                    key = (tensor, rows.tobytes(), columns, dtype)
                    return self._kept.get(key, lambda: read(tensor, rows, columns))
                elements = self._read_region(tensor, rows, columns, dtype)
                return elements.astype(dtype) if tensor.computed else elements

            return tensor.computed.region(rows, columns, read)
        start, stop = columns
        gaps = (rows[1:] - rows[:-1]) * tensor.width - (stop - start)
        if (gaps * DTYPES[tensor.dtype].itemsize < PAGE_BYTES).all():  # one read is faster, and disks read whole pages
            block = np.empty((rows[-1] - rows[0] + 1, tensor.width), DTYPES[tensor.dtype])
            self.read(tensor, int(rows[0]) * tensor.width, block)
            return block[rows - rows[0], start:stop] if len(rows) < len(block) else block[:, start:stop]
        result = np.empty((len(rows), stop - start), DTYPES[tensor.dtype])
        self._read_runs(tensor, rows * tensor.width + start, result)
        return result


def _is_read_as(dtype: np.dtype, tile: Tile) -> bool:
    """Whether a tile is one run of elements that are read in this dtype, in the order of the target."""
    source = tile[0].source
    return len(tile) == 1 and tile[0].is_plain_copy and (source.computed is not None or DTYPES[source.dtype] == dtype)


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
    """Whether two tensors on disk have one shape and dtype and the same bytes, in part ``number`` of ``count``."""
    if (left.shape, left.dtype) != (right.shape, right.dtype):
        return False
    size, raw = prod(left.shape), np.dtype(f"u{DTYPES[left.dtype].itemsize}")
    start, stop = size * number // count, size * (number + 1) // count
    step = _COMPARED_BYTES // raw.itemsize

    def are_equal(begin: int) -> bool:
        here, there = np.empty((2, min(step, stop - begin)), raw)
        for tensor, piece in (left, here), (right, there):
            transfer.read(tensor, begin, piece)
        return np.array_equal(here, there)

    with Transfer() as transfer:
        return all(transfer.map(are_equal, range(start, stop, step)))
