"""Defines where a MindFormers parameter stores the rows of each Hugging Face tensor.

MindFormers fuses q, k, v into one parameter and gate, up into another. There are two ways to do so:

    contiguous    all of q, then all of k, then all of v
    interleaved   per group: the group's q rows, its k rows, its v rows; then the next group
                  (a group is a KV head with its query heads for QKV, one row for gate/up)

A fused tensor does not tell which one it has, both have the same shape, and the wrong one computes garbage.
The inference network reads contiguous parameters; the training network's layout follows two config flags.

It also stacks the experts of a layer, each of them transposed.

This module is the only definition of all three. For each part it gives the *view* of the fused tensor that shows the
part's rows; the same view read from right to left splits the tensor again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from math import prod
from typing import Any

import numpy as np


@dataclass(frozen=True)
class View:
    """A strided look at a tensor's elements: nothing is copied, and views compose.

    ``View.whole((6, 4)).unflatten(0, 2)[:, 1:]`` shows, of a tensor of 6 rows seen as 2 groups of 3, the last two
    rows of each group: shape (2, 2, 4).

    Strides and offset count elements of the tensor.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    @classmethod
    def whole(cls, shape: Sequence[int]) -> View:
        """All of a C-contiguous tensor of ``shape``."""
        return cls(tuple(shape), tuple(prod(shape[axis + 1 :]) for axis in range(len(shape))))

    @property
    def size(self) -> int:
        """Number of elements seen."""
        return prod(self.shape)

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements seen are neighbours in memory, in order."""
        expected = View.whole(self.shape).strides
        return all(size == 1 or got == want for size, got, want in zip(self.shape, self.strides, expected))

    @property
    def span(self) -> int:
        """Number of elements from the first one seen to the last, with those between them that are not seen."""
        return 1 + sum(stride * (length - 1) for length, stride in zip(self.shape, self.strides))

    def unflatten(self, axis: int, groups: int) -> View:
        """Axis ``axis`` of n entries as two axes: ``groups``, and the n / groups entries of each (else ValueError)."""
        length, stride = self.shape[axis], self.strides[axis]
        if groups <= 0 or length % groups:
            raise ValueError(f"{length} rows can't be divided into {groups} groups")
        inner = length // groups
        return View(
            (*self.shape[:axis], groups, inner, *self.shape[axis + 1 :]),
            (*self.strides[:axis], stride * inner, stride, *self.strides[axis + 1 :]),
            self.offset,
        )

    def permute(self, *axes: int) -> View:
        """The axes in another order, as numpy's ``transpose``."""
        return View(tuple(self.shape[a] for a in axes), tuple(self.strides[a] for a in axes), self.offset)

    def __getitem__(self, index: int | slice | tuple[int | slice, ...]) -> View:
        """Entries (from 0) and slices (step 1) of the leading axes, with numpy's meaning; ValueError for others."""
        pieces = index if isinstance(index, tuple) else (index,)
        shape, strides, offset = [], [], self.offset
        for piece, length, stride in zip(pieces, self.shape, self.strides):
            if isinstance(piece, int):
                if not 0 <= piece < length:
                    raise ValueError(f"no entry {piece} on an axis of {length}")
                start = piece
            else:
                start, stop, step = piece.indices(length)
                if step != 1:
                    raise ValueError("a view takes slices of step 1")
                shape.append(max(stop - start, 0))
                strides.append(stride)
            offset += start * stride
        rest = len(pieces)
        return View((*shape, *self.shape[rest:]), (*strides, *self.strides[rest:]), offset)

    def of(self, tensor: np.ndarray) -> np.ndarray:
        """The numpy view of a C-contiguous ``tensor`` that this view describes; ValueError if it leaves the tensor."""
        if not tensor.flags.c_contiguous:
            raise ValueError("a view needs a C-contiguous tensor")
        itemsize = tensor.itemsize
        memory = tensor.reshape(-1).view(np.uint8)  # bfloat16 has no buffer of its own
        # ndarray() checks the bounds, which numpy's as_strided does not.
        return np.ndarray(
            self.shape, tensor.dtype, memory, self.offset * itemsize, tuple(s * itemsize for s in self.strides)
        )


@dataclass(frozen=True)
class Box:
    """A block of a tensor: (start, stop) along the first axis, and along the second (None: all, or a vector's)."""

    rows: tuple[int, int]
    columns: tuple[int, int] | None = None

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        """Shape of the block of a tensor of shape ``whole``."""
        columns = [self.columns[1] - self.columns[0]] if self.columns else whole[1:]
        return (self.rows[1] - self.rows[0], *columns)


def contiguous(rows: Sequence[int], columns: Sequence[int], groups: int) -> list[View]:
    """The parts one after the other.

    Args:
        rows: number of rows of each part.
        columns: shape of one row.
        groups: number of groups in which each part is shown; it does not change where the rows are stored.

    Returns:
        For each part a view of shape (groups, rows of the part / groups, *columns) of the fused tensor.
    """
    fused = View.whole((sum(rows), *columns))
    return [fused[part].unflatten(0, groups) for part in _consecutive(rows)]


def interleaved(rows: Sequence[int], columns: Sequence[int], groups: int) -> list[View]:
    """Group by group: the group's rows of each part, then the next group. Args, Returns: see ``contiguous``."""
    fused = View.whole((sum(rows), *columns)).unflatten(0, groups)
    return [fused[:, part] for part in _consecutive([n // groups for n in rows])]


def by_expert(num_experts: int, rows: Sequence[int], columns: int, transposed: bool = False) -> list[list[View]]:
    """The experts' matrices one after the other, and in each the expert's parts (its gate and its up, or its down).

    Hugging Face's stacked experts are the plain form, (num_experts, all rows, columns). MindFormers multiplies from the
    other side: it stores each expert ``transposed``, (num_experts, columns, all rows), in training with the first two
    axes folded into one.

    Returns:
        For each expert, for each part, a view of shape (rows of the part, columns) of the stack.
    """
    if transposed:
        stack = View.whole((num_experts, columns, sum(rows))).permute(0, 2, 1)
    else:
        stack = View.whole((num_experts, sum(rows), columns))
    return [[stack[expert, part] for part in _consecutive(rows)] for expert in range(num_experts)]


def _consecutive(lengths: Iterable[int]) -> list[slice]:
    """Slices of these lengths, one after the other."""
    return [slice(start, stop) for start, stop in pairwise(accumulate(lengths, initial=0))]


@dataclass(frozen=True)
class Layout:
    """How a MindFormers checkpoint or network lays out its fused parameters.

    Attributes:
        interleaved_qkv: whether q, k, v are stored group by group.
        interleaved_gate_up: whether gate and up are stored row by row.
        tensor_parallel: number of tensor parallel blocks, of a training run, within which contiguous parts are stored;
            1 if both parameters are interleaved.
    """

    interleaved_qkv: bool
    interleaved_gate_up: bool
    tensor_parallel: int = 1

    @classmethod
    def kinds(cls) -> list[Layout]:
        """All that flags can ask for, the default first."""
        return [cls(qkv, gate_up) for qkv in (True, False) for gate_up in (True, False)]

    @classmethod
    def of_training(cls, model_config: Mapping[str, Any], tensor_parallel: int = 1) -> Layout:
        """The layout of a training network, from the ``model.model_config`` section of its YAML.

        Mirrors the defaults of ``Qwen3Config`` and ``TransformerConfig`` (MindFormers 1.7 to 2.1): both interleaved;
        and how ``training_graph/transformer/{attention,mlp}.py`` split the block of each tensor parallel rank.
        """
        layout = cls(
            interleaved_qkv=not model_config.get("use_contiguous_weight_layout_attention", False),
            interleaved_gate_up=bool(model_config.get("use_interleaved_weight_layout_mlp", True)),
        )
        return layout.on(tensor_parallel)

    def on(self, tensor_parallel: int) -> Layout:
        """The same flags, in a training run of so many tensor parallel ranks."""
        depends = not (self.interleaved_qkv and self.interleaved_gate_up)
        return replace(self, tensor_parallel=tensor_parallel if depends else 1)

    @property
    def of_experts(self) -> Layout:
        """The layout that applies to a MoE, whose experts ignore the gate/up flag."""
        return replace(self, interleaved_gate_up=True).on(self.tensor_parallel)

    @property
    def training_flags(self) -> dict[str, bool]:
        """The flags of a training config that ask for this layout; the reverse of :meth:`of_training`."""
        return {
            "use_contiguous_weight_layout_attention": not self.interleaved_qkv,
            "use_interleaved_weight_layout_mlp": self.interleaved_gate_up,
        }

    def __str__(self) -> str:
        words = {True: "interleaved", False: "contiguous"}
        blocks = f",tensor_parallel={self.tensor_parallel}" if self.tensor_parallel > 1 else ""
        return f"qkv={words[self.interleaved_qkv]},gate_up={words[self.interleaved_gate_up]}{blocks}"

    @classmethod
    def parse(cls, text: str) -> Layout:
        """The layout whose ``str()`` is ``text``; ValueError if there is none."""
        flags, _, blocks = text.partition(",tensor_parallel=")
        for layout in cls.kinds():
            if str(layout) == flags and re.fullmatch("|[1-9][0-9]{0,8}", blocks):
                return layout.on(int(blocks or 1))
        raise ValueError(f"unknown layout {text!r}")


TRAINING_DEFAULT = Layout(interleaved_qkv=True, interleaved_gate_up=True)
INFERENCE = Layout(interleaved_qkv=False, interleaved_gate_up=False)
