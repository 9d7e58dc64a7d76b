"""Restricts copies to blocks of tensors: a rank's slices, and shards on disk."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from math import prod

import numpy as np

from mf_qwen3_bridge.model.layouts import Box, View
from mf_qwen3_bridge.transfer.safetensors import TensorInfo
from mf_qwen3_bridge.transfer.tiles import Copy


def within(view: View, other: View, whole: Sequence[int], box: Box) -> Iterator[tuple[View, View]]:
    """Restricts two views of one shape to a block of the first view's tensor, which has shape ``whole``.

    Yields views of the block as a tensor of its own, each with the corresponding part of ``other``.
    """
    width = prod(whole[1:])
    if view.offset >= box.rows[1] * width or view.offset + view.span <= box.rows[0] * width:
        return
    begin, end = box.columns or (0, width)
    for axis, (length, stride) in enumerate(zip(view.shape, view.strides)):
        if 0 < stride < width and stride * (length - 1) >= width:  # runs on from row to row
            rows = length * stride // width
            view, other = view.unflatten(axis, rows), other.unflatten(axis, rows)
            break
    offset = view.offset % width
    for axis, (length, stride) in enumerate(zip(view.shape, view.strides)):
        if stride < width and length > 1:
            first, last = -(-(begin - offset) // stride), -(-(end - offset) // stride)
            where = (*[slice(None)] * axis, slice(max(first, 0), max(min(last, length), 0)))
            view, other = view[where], other[where]
            break
    else:
        if not begin <= offset < end:
            return
    if not view.size:
        return
    for here, there in _clip(view, other, box.rows[0] * width, box.rows[1] * width, width):
        row, column = divmod(here.offset, width)
        strides = tuple(s if s < width else s // width * (end - begin) for s in here.strides)
        yield View(here.shape, strides, (row - box.rows[0]) * (end - begin) + column - begin), there


def _clip(view: View, other: View, start: int, stop: int, width: int) -> Iterator[tuple[View, View]]:
    """The parts of a pair of views whose rows, of ``width`` elements, are within elements ``start`` to ``stop``."""
    row = view.offset // width * width
    across = [axis for axis, stride in enumerate(view.strides) if stride >= width and view.shape[axis] > 1]
    last = row + sum(view.strides[axis] * (view.shape[axis] - 1) for axis in across)
    if last < start or row >= stop:
        return
    if start <= row and last < stop:
        yield view, other
        return
    axis = max(across, key=lambda axis: view.strides[axis])
    length, stride = view.shape[axis], view.strides[axis]
    inner = last - row - stride * (length - 1)  # from an entry's first row to its last
    # Entries that are inside as a whole, and one at a time the others: those of several rows may be inside in part.
    first = min(max(-(-(start - row) // stride), 0), length)
    after = max(min(-(-(stop - inner - row) // stride), length), first)
    others = [*range(first), *range(after, length)] if inner else []
    for begin, end in sorted([(first, after), *((i, i + 1) for i in others)]):
        where = (*[slice(None)] * axis, slice(begin, end))
        if begin < end:
            yield from _clip(view[where], other[where], start, stop, width)


def from_shards(copy: Copy) -> Iterator[Copy]:
    """Splits a copy from a tensor that is stored in shards into copies from the shards; yields others unchanged."""
    if not copy.source.shards:
        yield copy
        return
    for shard in copy.source.shards:
        for here, there in within(copy.source_view, copy.target_view, copy.source.shape, shard.box):
            yield Copy(shard.tensor, here, copy.target, there)


def from_range(tensor: TensorInfo, start: int, size: int) -> Iterator[Copy]:
    """Copies ``size`` elements of a tensor that is stored in shards, from element ``start`` on, to an array of them."""
    width = prod(tensor.shape[1:])
    whole, stop = View.whole((tensor.shape[0], width)), start + size
    whole_rows = -(-start // width) * width, stop // width * width
    bounds = sorted({start, min(whole_rows[0], stop), max(whole_rows[1], start), stop})
    for begin, end in pairwise(bounds):
        row, column = divmod(begin, width)
        is_part = end - begin < width
        view = whole[row, column : column + end - begin] if is_part else whole[row : end // width]
        yield from from_shards(Copy(tensor, view, tensor.name, replace(View.whole(view.shape), offset=begin - start)))


# Of a region that is computed at a time, by each thread.
_REGION_ELEMENTS = 512 << 10


def regions(
    starts: np.ndarray, out: np.ndarray, width: int
) -> Iterator[tuple[tuple[np.ndarray, tuple[int, int]], np.ndarray]]:
    """Cuts runs of a tensor's elements into regions of its rows, which have ``width`` elements.

    Args:
        starts: the index of each run's first element, ascending.
        out: (runs, elements of each).

    Yields:
        ((row numbers, (start, stop) of the columns), the part of ``out`` that holds them, in the same shape).
    """
    rows, columns = np.divmod(starts, width)
    length = out.shape[1]
    if (columns == columns[0]).all() and columns[0] + length <= width:
        step, first = max(1, _REGION_ELEMENTS // length), int(columns[0])
        for begin in range(0, len(rows), step):
            yield (rows[begin : begin + step], (first, first + length)), out[begin : begin + step]
        return
    for row, column, run in zip(rows, columns, out):
        head = min(-column % width, length)
        body = head + (length - head) // width * width
        for begin, end, count in ((0, head, 1), (head, body, (body - head) // width), (body, length, 1)):
            if end > begin:
                place = run[begin:end].reshape(count, -1)
                first = row * width + column + begin
                yield from regions(first + np.arange(count) * width, place, width)
