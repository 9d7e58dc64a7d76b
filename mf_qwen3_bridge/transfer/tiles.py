"""Divides copies into tiles: what is read, permuted and put in place at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import gcd

import numpy as np

from mf_qwen3_bridge.model.layouts import View
from mf_qwen3_bridge.transfer.safetensors import DTYPES, TensorInfo

# What a tile reads: long enough for a disk, and still in the cache when it is put in place.
TILE_BYTES = 4 << 20
# An expert is transposed as a whole, up to this size, rather than cut into pieces whose bytes are scattered.
_LARGEST_TILE_BYTES = 32 << 20
# A tile is divided unless that multiplies its cost by more.
_COST_LIMIT = 1.25
# A call of the operating system takes as long as reading so many bytes.
_BYTES_PER_RUN = 8 << 10
# A disk reads whole pages: a gap between two runs of wanted bytes is skipped if it is a page at least.
PAGE_BYTES = 4096


@dataclass(frozen=True)
class Copy:
    """Elements of a source tensor, and where they go in the tensor that is named ``target``: two views of one shape."""

    source: TensorInfo
    source_view: View
    target: str
    target_view: View

    @property
    def itemsize(self) -> int:
        """Bytes of an element of the source."""
        return DTYPES[self.source.dtype].itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the source that it uses."""
        return self.source_view.size * self.itemsize

    @property
    def is_plain_copy(self) -> bool:
        """Whether it copies one run of neighbouring elements to another, in the same order."""
        return self.source_view.is_contiguous and self.target_view.is_contiguous

    def cut(self, axis: int, start: int, stop: int) -> Copy:
        """The copy of entries ``start`` to ``stop`` along an axis of the views."""
        where = (*[slice(None)] * axis, slice(start, stop))
        return replace(self, source_view=self.source_view[where], target_view=self.target_view[where])


# Copies that are carried out together, because what they read or make is interleaved.
Tile = tuple[Copy, ...]


def tiles(copies: Iterable[Copy], to_files: bool = False) -> Iterator[Tile]:
    """Divides copies into tiles, so that each reads few bytes, in long runs.

    Args:
        copies: the copies; their order is kept, except that interleaved copies come together.
        to_files: whether what a tile makes is written to files, so that it should be in long runs as well.

    Yields:
        Tiles of about TILE_BYTES; larger ones where cutting would make runs short.
    """
    for tile in _interleaved(list(copies)):
        nbytes = _nbytes(tile)
        if nbytes <= TILE_BYTES:
            yield tile
            continue
        best = min(_divisions(tile, nbytes), key=lambda pieces: _cost(pieces, to_files), default=[])
        if not best:
            for copy in tile:
                yield from tiles((copy,), to_files)
            continue
        is_costly = to_files and _cost(best, to_files) > _COST_LIMIT * _cost([tile], to_files)
        if is_costly and nbytes <= _LARGEST_TILE_BYTES:
            yield tile
            continue
        for piece in best:
            yield from tiles(piece, to_files)


def _nbytes(tile: Tile) -> int:
    """Bytes that a tile reads, gaps included."""
    return sum(stretch.size * copies[0].itemsize for copies, stretch in reads(tile))


def _cost(pieces: list[Tile], to_files: bool) -> int:
    """The cost in bytes of several tiles like the first: those they read, plus a fixed number for each run."""
    first = pieces[0]
    runs = sum(len(stretch.starts) for _, stretch in reads(first) + (writes(first) if to_files else []))
    return len(pieces) * (_nbytes(first) + runs * _BYTES_PER_RUN)


def _divisions(tile: Tile, nbytes: int) -> Iterator[list[Tile]]:
    """For each axis along which all copies can be cut: the pieces, which read TILE_BYTES or one entry of it each."""
    shapes = [copy.source_view.shape for copy in tile]
    if len(set(map(len, shapes))) > 1:
        return
    for axis, (length, *others) in enumerate(zip(*shapes)):
        if length > 1 and all(other == length for other in others):
            step = max(1, length // -(-nbytes // TILE_BYTES))
            pages = max(PAGE_BYTES // gcd(PAGE_BYTES, c.target_view.strides[axis] * c.itemsize) for c in tile)
            step -= step % pages if step > pages else 0  # pieces end where a page does, if they can
            yield [tuple(copy.cut(axis, start, start + step) for copy in tile) for start in range(0, length, step)]


def _interleaved(copies: Sequence[Copy]) -> list[Tile]:
    """Groups the copies whose ranges, from first element to last, overlap in a source or a target."""
    spans: dict[TensorInfo | str, list[tuple[int, int, int]]] = defaultdict(list)
    for number, copy in enumerate(copies):
        for tensor, view in (copy.target, copy.target_view), (copy.source, copy.source_view):
            spans[tensor].append((view.offset, view.offset + view.span, number))
    leader = list(range(len(copies)))

    def lead(number: int) -> int:
        while leader[number] != number:
            leader[number] = number = leader[leader[number]]
        return number

    for of_tensor in spans.values():
        end, last = 0, -1
        for start, stop, number in sorted(of_tensor):
            if last >= 0 and start < end:
                first, second = sorted((lead(last), lead(number)))
                leader[second] = first
            end, last = max(end, stop), number
    groups: dict[int, list[Copy]] = defaultdict(list)
    for number, copy in enumerate(copies):
        groups[lead(number)].append(copy)
    return [tuple(group) for group in groups.values()]


@dataclass(frozen=True)
class Stretch:
    """The elements of a tensor that some views cover, as runs of neighbouring elements."""

    starts: np.ndarray  # int64 (runs,): index of each run's first element in the tensor
    length: int  # elements of each run
    views: tuple[View, ...]  # the same views, of an array that holds the runs one after the other

    @property
    def size(self) -> int:
        """Elements of all runs."""
        return len(self.starts) * self.length

    def runs(self, array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """For each run its start, and its part of the array that holds them one after the other."""
        return zip(self.starts.tolist(), array.reshape(len(self.starts), -1))


def reads(tile: Tile) -> list[tuple[Tile, Stretch]]:
    """The stretches of sources that a tile reads, each with the copies that it is for; short gaps are read too."""
    gap = 0 if any(copy.source.computed for copy in tile) else (PAGE_BYTES - 1) // tile[0].itemsize
    return _stretches([(copy.source, copy, copy.source_view) for copy in tile], gap)


def writes(tile: Tile) -> list[tuple[Tile, Stretch]]:
    """The stretches of targets that a tile makes, each with the copies that it is made of, which cover it."""
    return _stretches([(copy.target, copy, copy.target_view) for copy in tile], 0)


def _stretches(sides: Iterable[tuple[Hashable, Copy, View]], gap: int) -> list[tuple[Tile, Stretch]]:
    of_tensor: dict[Hashable, list[tuple[Copy, View]]] = defaultdict(list)
    for tensor, copy, view in sides:
        of_tensor[tensor].append((copy, view))
    return [stretch for members in of_tensor.values() for stretch in _of_one_tensor(members, gap)]


def _of_one_tensor(members: list[tuple[Copy, View]], gap: int) -> list[tuple[Tile, Stretch]]:
    """All views in one run if they fill it (but for gaps), else each by itself."""
    copies, views = zip(*members)
    each = [_stretch(view, gap) for view in views]
    if len(each) > 1:
        starts = np.concatenate([stretch.starts for stretch in each])
        stops = np.concatenate([stretch.starts + stretch.length for stretch in each])
        order = np.argsort(starts)
        starts, stops = starts[order], np.maximum.accumulate(stops[order])
        if (starts[1:] <= stops[:-1] + gap).all():
            begin = int(starts[0])
            shifted = tuple(replace(view, offset=view.offset - begin) for view in views)
            return [(copies, Stretch(starts[:1], int(stops[-1]) - begin, shifted))]
    return [((copy,), stretch) for copy, stretch in zip(copies, each)]


def _stretch(view: View, gap: int) -> Stretch:
    """One view's elements; runs with at most ``gap`` elements between them count as one."""
    outer = sorted(range(len(view.shape)), key=lambda axis: (-view.strides[axis], -view.shape[axis]))
    length, inner = 1, []
    while outer:
        count, stride = view.shape[outer[-1]], view.strides[outer[-1]]
        if count > 1 and stride - length > gap:
            break
        length += stride * (count - 1)
        inner.append(outer.pop())
    starts = np.array([view.offset], np.int64)
    for axis in outer:
        starts = (starts[:, None] + np.arange(view.shape[axis], dtype=np.int64) * view.strides[axis]).reshape(-1)
    strides, distance = list(view.strides), length
    for axis in reversed(outer):
        strides[axis] = distance
        distance *= view.shape[axis]
    return Stretch(starts, length, (View(view.shape, tuple(strides)),))
