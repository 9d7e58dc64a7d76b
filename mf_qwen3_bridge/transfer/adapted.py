"""Computes weights with low-rank adapters (LoRA) added."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import numpy as np

from mf_qwen3_bridge.model.layouts import Layout
from mf_qwen3_bridge.model.rules import RowsRule, fused_rows
from mf_qwen3_bridge.transfer.safetensors import ReadRegion, TensorInfo


class Update(Protocol):
    """What is added to a weight: ``scaling * B @ A``, of which any region is computed."""

    @property
    def a(self) -> TensorInfo:
        """One of the two matrices."""

    @property
    def b(self) -> TensorInfo:
        """The other."""

    def delta(self, rows: np.ndarray, columns: tuple[int, int], read: ReadRegion) -> np.ndarray:
        """The region of these rows and columns of the weight, float32."""


@dataclass(frozen=True)
class LowRank:
    """A low-rank update of a weight (out, in): ``scaling * B @ A``, with A (r, in) and B (out, r)."""

    a: TensorInfo
    b: TensorInfo
    scaling: float

    def delta(self, rows: np.ndarray, columns: tuple[int, int], read: ReadRegion) -> np.ndarray:
        """See :class:`Update`; of B only these rows are read, of A only these columns."""
        rank = self.a.shape[0]
        a, b = read(self.a, np.arange(rank), columns), read(self.b, rows, (0, rank))
        return _product(b, a, self.scaling)


@dataclass(frozen=True)
class PartOfLowRank:
    """A low-rank update of a fused parameter, as an update of the Hugging Face tensor that is one of its parts.

    Attributes:
        a, b, scaling: as in :class:`LowRank`, of the whole parameter.
        rule, layout: the parameter's, by which the rows of B are laid out.
        part: the Hugging Face name.
    """

    a: TensorInfo
    b: TensorInfo
    scaling: float
    rule: RowsRule
    layout: Layout
    part: str

    def delta(self, rows: np.ndarray, columns: tuple[int, int], read: ReadRegion) -> np.ndarray:
        """See :class:`Update`."""
        wanted = _rows_of_parts(self.rule, self.layout)[self.part][rows]
        order = np.argsort(wanted)
        rank = self.a.shape[0]
        stored = read(self.b, wanted[order], (0, rank))
        b = np.empty_like(stored)
        b[order] = stored
        return _product(b, read(self.a, np.arange(rank), columns), self.scaling)


@dataclass(frozen=True)
class LowRankExperts:
    """An update of a layer's experts, stacked and transposed: (experts, in, out), or with the first two axes as one.

    ``a`` is (experts, in, r), ``b`` (experts, r, out).
    """

    a: TensorInfo
    b: TensorInfo
    scaling: float

    def delta(self, rows: np.ndarray, columns: tuple[int, int], read: ReadRegion) -> np.ndarray:
        """See :class:`Update`; rows are those of all experts, one after the other."""
        _, length, rank = self.a.shape
        a = read(self.a, rows, (0, rank))
        result = np.empty((len(rows), columns[1] - columns[0]), np.float32)
        for expert in np.unique(rows // length):
            mine = rows // length == expert
            b = read(self.b, np.arange(expert * rank, (expert + 1) * rank), columns)
            result[mine] = _product(a[mine], b, self.scaling)
        return result


@lru_cache(maxsize=8)
def _rows_of_parts(rule: RowsRule, layout: Layout) -> dict[str, np.ndarray]:
    return fused_rows(rule, layout)


def _product(left: np.ndarray, right: np.ndarray, scaling: float) -> np.ndarray:
    product: np.ndarray = (left.astype(np.float32) @ right.astype(np.float32)) * np.float32(scaling)
    return product


@dataclass(frozen=True)
class Adapted:
    """A weight (out, in) plus low-rank updates.

    Mirrors ``merge`` of ``peft/tuners/lora/layer.py``: float32, rounded once, when all updates are added.
    """

    base: TensorInfo
    updates: Sequence[Update]

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """See :class:`Computed`."""
        return (self.base, *(tensor for update in self.updates for tensor in (update.a, update.b)))

    def region(self, rows: np.ndarray, columns: tuple[int, int], read: ReadRegion) -> np.ndarray:
        """See :class:`Computed`."""
        result = read(self.base, rows, columns).astype(np.float32)
        for update in self.updates:
            result += update.delta(rows, columns, read)
        return result


def adapted(base: TensorInfo, *updates: Update) -> TensorInfo:
    """The tensor that is ``base`` with these updates added."""
    return replace(base, computed=Adapted(base, updates), shards=())
