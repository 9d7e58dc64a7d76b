"""Computes weights with low-rank adapters (LoRA, DoRA) added.

The products are computed in blocks of one shape that begin at fixed rows and columns of the weight: a BLAS library may
sum in another order for matrices of another shape, and an element must not depend on the region that it is read with.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Protocol

import numpy as np

from mf_qwen3_bridge.model.layouts import Layout
from mf_qwen3_bridge.model.rules import RowsRule, fused_rows
from mf_qwen3_bridge.transfer.safetensors import ReadRegion, TensorInfo

# Of a block of a product.
_ROWS, _COLUMNS = 16, 1024
# Of the rows whose norms are computed at a time.
_NORM_ELEMENTS = 256 << 10

Columns = tuple[int, int]


class Update(Protocol):
    """What is added to a weight, of which any region is computed."""

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """What it is computed from."""

    def delta(self, rows: np.ndarray, columns: Columns, read: ReadRegion) -> np.ndarray:
        """The region of these rows and columns of the weight, float32."""


@dataclass(frozen=True)
class LowRank:
    """A low-rank update of a weight (out, in): ``scaling * B @ A``, with A (r, in) and B (out, r)."""

    a: TensorInfo
    b: TensorInfo
    scaling: float

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """See :class:`Update`."""
        return self.a, self.b

    def delta(self, rows: np.ndarray, columns: Columns, read: ReadRegion) -> np.ndarray:
        """See :class:`Update`; of B only the blocks of these rows are read, of A only those of these columns."""
        rank, width = self.a.shape
        return _product(
            lambda rows: read(self.b, rows, (0, rank)),
            lambda columns: read(self.a, np.arange(rank), columns, keep=True),
            (rows, columns),
            (self.b.shape[0], width),
            self.scaling,
        )


@dataclass(frozen=True)
class LowRankEmbedding:
    """A low-rank update of an embedding (tokens, width): ``scaling * (B @ A).T``, with A (r, tokens), B (width, r)."""

    a: TensorInfo
    b: TensorInfo
    scaling: float

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """See :class:`Update`."""
        return self.a, self.b

    def delta(self, rows: np.ndarray, columns: Columns, read: ReadRegion) -> np.ndarray:
        """See :class:`Update`."""
        (rank, num_tokens), (width, _) = self.a.shape, self.b.shape

        def left(rows: np.ndarray) -> np.ndarray:
            first, last = int(rows[0]), int(rows[-1]) + 1
            return read(self.a, np.arange(rank), (first, last))[:, rows - first].T

        return _product(
            left,
            lambda columns: read(self.b, np.arange(*columns), (0, rank), keep=True).T,
            (rows, columns),
            (num_tokens, width),
            self.scaling,
        )


@dataclass(frozen=True)
class LowRankOfExpert:
    """An expert's share of a low-rank update of a layer's stacked experts, as PEFT's ``target_parameters`` saves it.

    Mirrors ``ParamWrapper.get_delta_weight`` of ``peft/tuners/lora/layer.py`` (0.19 to 0.21): A (experts * r, in) has
    the ranks of an expert together, B (out, r * experts) the experts of a rank.

    Attributes:
        num_experts, expert: how many, and which.
        start, stop: the rows of B that are meant: gate and up are one matrix.
    """

    a: TensorInfo
    b: TensorInfo
    scaling: float
    num_experts: int
    expert: int
    start: int
    stop: int

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """See :class:`Update`."""
        return self.a, self.b

    def delta(self, rows: np.ndarray, columns: Columns, read: ReadRegion) -> np.ndarray:
        """See :class:`Update`."""
        out, total = self.b.shape
        rank = total // self.num_experts

        def left(rows: np.ndarray) -> np.ndarray:
            whole = read(self.b, np.arange(out), (0, total), keep=True)  # for the other experts as well
            return whole[rows + self.start].reshape(len(rows), rank, -1)[:, :, self.expert]

        return _product(
            left,
            lambda columns: read(self.a, np.arange(rank) + rank * self.expert, columns, keep=True),
            (rows, columns),
            (self.stop - self.start, self.a.shape[1]),
            self.scaling,
        )


@dataclass(frozen=True)
class Stacked:
    """Updates of the parts of a stacked tensor: of each expert's gate, up or down, ``rows`` rows each."""

    parts: tuple[Update | None, ...]
    rows: int

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """See :class:`Update`."""
        return tuple(dict.fromkeys(tensor for part in self.parts if part for tensor in part.tensors))

    def delta(self, rows: np.ndarray, columns: Columns, read: ReadRegion) -> np.ndarray:
        """See :class:`Update`; rows are those of all parts, one after the other."""
        result = np.zeros((len(rows), columns[1] - columns[0]), np.float32)
        number = rows // self.rows
        for part in np.unique(number):
            if update := self.parts[part]:
                mine = number == part
                result[mine] = update.delta(rows[mine] - part * self.rows, columns, read)
        return result


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

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """See :class:`Update`."""
        return self.a, self.b

    def delta(self, rows: np.ndarray, columns: Columns, read: ReadRegion) -> np.ndarray:
        """See :class:`Update`."""
        rank, width = self.a.shape
        place = _rows_of_parts(self.rule, self.layout)[self.part]

        def left(rows: np.ndarray) -> np.ndarray:
            order = np.argsort(place[rows])
            stored = read(self.b, place[rows][order], (0, rank))
            b = np.empty_like(stored)
            b[order] = stored
            return b

        return _product(
            left,
            lambda columns: read(self.a, np.arange(rank), columns, keep=True),
            (rows, columns),
            (len(place), width),
            self.scaling,
        )


@dataclass(frozen=True)
class LowRankExperts:
    """An update of a layer's experts, stacked and transposed: (experts, in, out), or with the first two axes as one.

    ``a`` is (experts, in, r), ``b`` (experts, r, out).
    """

    a: TensorInfo
    b: TensorInfo
    scaling: float

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """See :class:`Update`."""
        return self.a, self.b

    def delta(self, rows: np.ndarray, columns: Columns, read: ReadRegion) -> np.ndarray:
        """See :class:`Update`; rows are those of all experts, one after the other."""
        _, length, rank = self.a.shape
        result = np.empty((len(rows), columns[1] - columns[0]), np.float32)
        for expert in np.unique(rows // length):
            mine, first = rows // length == expert, int(expert)
            result[mine] = _product(
                lambda rows, first=first: read(self.a, rows + first * length, (0, rank)),  # type: ignore[misc]
                lambda columns, first=first: read(self.b, np.arange(rank) + first * rank, columns, keep=True),  # type: ignore[misc]
                (rows[mine] - first * length, columns),
                (length, self.b.shape[2]),
                self.scaling,
            )
        return result


@lru_cache(maxsize=8)
def _rows_of_parts(rule: RowsRule, layout: Layout) -> dict[str, np.ndarray]:
    return fused_rows(rule, layout)


def _product(
    left: Callable[[np.ndarray], np.ndarray],
    right: Callable[[Columns], np.ndarray],
    region: tuple[np.ndarray, Columns],
    shape: tuple[int, int],
    scaling: float,
) -> np.ndarray:
    """A region of ``scaling * left @ right``, float32, computed in blocks that are those of any other region.

    Args:
        left, right: give (rows, r) of the left matrix, and (r, columns) of the right one.
        region: rows in ascending order, and (start, stop) of the columns.
        shape: of the whole product.
        scaling: multiplied last, as PEFT does.
    """
    rows, (start, stop) = region
    num_rows, num_columns = shape
    blocks, block = np.unique(rows // _ROWS, return_inverse=True)
    covered = (blocks[:, None] * _ROWS + np.arange(_ROWS)).ravel()
    exist = covered < num_rows
    first, last = start - start % _COLUMNS, min(stop + -stop % _COLUMNS, num_columns)
    some, other = left(covered[exist]), right((first, last))
    a = np.zeros((some.shape[1], last - first + -(last - first) % _COLUMNS), np.float32)
    a[:, : last - first] = other
    b = np.zeros((len(blocks), _ROWS, some.shape[1]), np.float32)
    b.reshape(len(covered), -1)[exist] = some
    product = np.empty((len(blocks), _ROWS, a.shape[1]), np.float32)
    for begin in range(0, a.shape[1], _COLUMNS):
        np.matmul(b, a[:, begin : begin + _COLUMNS], out=product[:, :, begin : begin + _COLUMNS])
    place = block * _ROWS + rows % _ROWS
    is_run = place[-1] - place[0] + 1 == len(rows)
    wanted = slice(place[0], place[-1] + 1) if is_run else place
    result: np.ndarray = product.reshape(len(covered), -1)[wanted, start - first : stop - first]
    result *= np.float32(scaling)
    return result


@dataclass(frozen=True)
class Adapted:
    """A weight (out, in) plus low-rank updates; with magnitudes (out,), DoRA: each row scaled to the length it names.

    Mirrors ``merge`` of ``peft/tuners/lora/layer.py`` and of ``variants.py`` (0.21), where adapters are float32 unless
    ``autocast_adapter_dtype`` is off: the sum is computed in float32 and rounded once. PEFT rounds after each of
    several adapters, and rounds the update of an embedding or of stacked experts before it adds it.

    Attributes:
        base: the weight, or what replaces it.
        magnitude: DoRA's; there is one update then.
    """

    base: TensorInfo
    updates: Sequence[Update] = ()
    magnitude: TensorInfo | None = None
    _norms: dict[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """See :class:`Computed`."""
        magnitude = (self.magnitude,) if self.magnitude else ()
        return (self.base, *magnitude, *(tensor for update in self.updates for tensor in update.tensors))

    def region(self, rows: np.ndarray, columns: Columns, read: ReadRegion) -> np.ndarray:
        """See :class:`Computed`; DoRA reads whole rows, once, whatever the columns."""
        result = read(self.base, rows, columns).astype(np.float32)
        for update in self.updates:
            result += update.delta(rows, columns, read)
        if self.magnitude:
            length = self.base.shape[0]
            magnitude = read(self.magnitude, np.array([0]), (0, length), keep=True)[0].astype(np.float32)
            result *= (magnitude[rows] / self._norms_of(rows, read))[:, None]
        return result

    def _norms_of(self, rows: np.ndarray, read: ReadRegion) -> np.ndarray:
        """The lengths of whole rows of the sum, float32; each is computed once."""
        norms = self._norms.setdefault("rows", np.full(self.base.shape[0], np.nan, np.float32))
        missing = rows[np.isnan(norms[rows])]
        step = max(1, _NORM_ELEMENTS // self.base.width)
        for begin in range(0, len(missing), step):
            some = missing[begin : begin + step]
            whole = replace(self, magnitude=None).region(some, (0, self.base.width), read)
            norms[some] = np.sqrt(np.square(whole, dtype=np.float64).sum(axis=1))
        return norms[rows]


def adapted(base: TensorInfo, *updates: Update) -> TensorInfo:
    """The tensor that is ``base`` with these updates added."""
    return replace(base, computed=Adapted(base, updates), shards=())
