"""Maps each MindFormers parameter to the Hugging Face tensors that it is made of, element by element.

A rule is a line of the table in ``parameters.py`` with a model's numbers filled in. It shows each of its parts as a
view of the tensor that stores it, in any dialect; a part's views have one shape in all dialects, so that converting is
copying from one view to the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from math import prod
from typing import Literal

import numpy as np

from mf_qwen3_bridge.errors import BridgeError
from mf_qwen3_bridge.model import layouts
from mf_qwen3_bridge.model.layouts import Layout, View
from mf_qwen3_bridge.model.parallel import WHOLE, Rank
from mf_qwen3_bridge.model.parameters import PARAMETERS, QKV, ROUTER, Parameter, Shape, parameters_of
from mf_qwen3_bridge.model.spec import ModelSpec


@dataclass(frozen=True)
class Dialect:
    """A way of naming and laying out a model's tensors: Hugging Face's, or MindFormers' in one of its layouts.

    Attributes:
        layout: MindFormers' layout of fused parameters; None for Hugging Face.
        stacked_experts: whether a layer's experts have an axis of their own. Hugging Face: ``experts.gate_up_proj`` (as
            transformers 5 holds them) instead of a tensor for each expert; MindFormers: 3-D (as the inference network
            holds them) instead of 2-D (as the training network does).
    """

    layout: Layout | None
    stacked_experts: bool = False

    @property
    def is_hf(self) -> bool:
        """Whether this is Hugging Face's dialect."""
        return self.layout is None

    def name(self, names: tuple[str, str]) -> str:
        """Of a pair (Hugging Face's name, MindFormers'), this dialect's."""
        return names[0] if self.is_hf else names[1]

    def __str__(self) -> str:
        return "Hugging Face" if self.layout is None else f"MindFormers ({self.layout})"


HF = Dialect(None)
HF_STACKED = Dialect(None, stacked_experts=True)
INFER = Dialect(layouts.INFERENCE, stacked_experts=True)
TRAIN = Dialect(layouts.TRAINING_DEFAULT)


@dataclass(frozen=True)
class Place:
    """Where one part of a rule is stored: in which tensor, of which shape, and the view of it that shows the part."""

    tensor: str
    shape: tuple[int, ...]
    view: View


# Which part of the whole model's rule a part of a rank's rule is, and which slice of that part's views.
PartSlice = tuple[int, tuple[slice, ...]]


@dataclass(frozen=True)
class RowsRule:
    """A parameter made of the rows of one or several tensors. Views have the shape (groups, rows / groups, *columns).

    Attributes:
        parameter, tensors: the MindFormers name, and the Hugging Face names.
        rows, columns: number of rows of each tensor, and shape of one row.
        groups: number of groups of rows: an interleaved layout stores group by group, and ranks hold whole groups.
        fuses: what the parameter fuses, if it fuses anything; decides which layout flag applies.
        divided: what tensor parallel ranks divide: the groups of ``rows``, the ``columns``, or nothing.
    """

    parameter: str
    tensors: tuple[str, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...] = ()
    groups: int = 1
    fuses: Literal["qkv", "gate_up"] | None = None
    divided: Literal["rows", "columns"] | None = None

    def places(self, dialect: Dialect) -> list[Place]:
        """Where each part is stored in ``dialect``, in the order of ``tensors``."""
        layout = dialect.layout
        if layout is None:
            shapes = [(rows, *self.columns) for rows in self.rows]
            views = [View.whole(shape).unflatten(0, self.groups) for shape in shapes]
            return [Place(*place) for place in zip(self.tensors, shapes, views)]
        is_interleaved = {"qkv": layout.interleaved_qkv, "gate_up": layout.interleaved_gate_up, None: False}[self.fuses]
        arrange = layouts.interleaved if is_interleaved else layouts.contiguous
        shape = (sum(self.rows), *self.columns)
        return [Place(self.parameter, shape, view) for view in arrange(self.rows, self.columns, self.groups)]

    def in_blocks(self, dialect: Dialect, count: int) -> Iterator[Place]:
        """Where the whole tensors store what each of ``count`` tensor parallel ranks holds of each part.

        In the layout of a training run with so many ranks, their blocks follow each other, each laid out by itself.
        """
        whole = self.places(dialect)
        for number in range(count):
            local, cuts = self.shard(Rank(tensor_parallel=count, tensor_rank=number))
            for (part, where), place in zip(cuts, local.places(dialect)):
                if dialect.layout and dialect.layout.tensor_parallel == count:
                    start = number * prod(place.shape)
                    yield replace(whole[part], view=replace(place.view, offset=place.view.offset + start))
                else:
                    yield replace(whole[part], view=whole[part].view[where])

    def shard(self, rank: Rank) -> tuple[RowsRule, list[PartSlice]]:
        """The rule of what a rank holds, and which slice of this rule's parts each of its parts is.

        Mirrors the ``weight_loader`` methods of ``mindformers/parallel_core/inference``.
        """
        size, number = rank.tensor_parallel, rank.tensor_rank
        local = self
        where: tuple[slice, ...] = ()
        if self.divided == "rows":
            local = replace(self, rows=tuple(n // size for n in self.rows), groups=self.groups // size)
            where = (_share(self.groups, size, number),)
        elif self.divided == "columns":
            local = replace(self, columns=(self.columns[0] // size,))
            where = (slice(None), slice(None), _share(self.columns[0], size, number))
        return local, [(part, where) for part in range(len(self.tensors))]


class QkvRule(RowsRule):
    """Queries, keys and values; a group is a KV head with its query heads."""

    def shard(self, rank: Rank) -> tuple[RowsRule, list[PartSlice]]:
        """Whole groups; with more ranks than groups, the ranks of a group divide its queries and repeat its KV head.

        Mirrors ``QKVParallelLinear.weight_loader`` of ``.../inference/tensor_parallel/layers.py``.
        """
        if rank.tensor_parallel <= self.groups:
            return super().shard(rank)
        ranks_of_group = _share(rank.tensor_parallel, self.groups, 0).stop
        group, member = divmod(rank.tensor_rank, ranks_of_group)
        query, *key_value = (n // self.groups for n in self.rows)
        local = replace(self, rows=(query // ranks_of_group, *key_value), groups=1)
        mine = slice(group, group + 1)
        return local, [(0, (mine, _share(query, ranks_of_group, member))), (1, (mine,)), (2, (mine,))]


class RouterRule(RowsRule):
    """The router, a row for each expert: every rank holds all of them."""

    def shard(self, rank: Rank) -> tuple[RowsRule, list[PartSlice]]:
        """All rows, but each rank of several that share the experts begins with those of its own.

        Mirrors ``Router.weight_loader`` of ``.../inference/transformer/moe/router.py``.
        """
        total = self.rows[0]
        start = _share(total, rank.expert_parallel, rank.expert_rank).start if rank.rotates_router else 0
        if start == 0:
            return super().shard(rank)
        local = replace(self, tensors=self.tensors * 2, rows=(total - start, start))
        return local, [(0, (slice(None), slice(start, total))), (0, (slice(None), slice(0, start)))]


@dataclass(frozen=True)
class ExpertsRule:
    """A parameter that stacks one layer's experts. Views have the shape (rows, columns) of one expert's part.

    Attributes:
        parameter: the MindFormers name.
        parts, stacked: the Hugging Face names of an expert's parts, with ``{expert}`` for its number, and of the tensor
            that holds all experts.
        num_experts, rows, columns: number of experts, and shape of each part.
        divided: what the ranks that share an expert divide: its ``rows`` or its ``columns``.
    """

    parameter: str
    parts: tuple[str, ...]
    stacked: str
    num_experts: int
    rows: int
    columns: int
    divided: Literal["rows", "columns"] | None

    @property
    def tensors(self) -> tuple[str, ...]:
        """The Hugging Face names of the parts where each is a tensor of its own: expert by expert."""
        return tuple(part.format(expert=number) for number in range(self.num_experts) for part in self.parts)

    def places(self, dialect: Dialect) -> list[Place]:
        """See :class:`RowsRule`."""
        if dialect == HF:
            alone = View.whole((self.rows, self.columns))
            return [Place(name, alone.shape, alone) for name in self.tensors]
        count, columns, all_rows = self.num_experts, self.columns, [self.rows] * len(self.parts)
        total = sum(all_rows)
        views = layouts.by_expert(count, all_rows, columns, transposed=not dialect.is_hf)
        shape: tuple[int, ...]
        if dialect.is_hf:
            name, shape = self.stacked, (count, total, columns)
        else:
            name = self.parameter
            shape = (count, columns, total) if dialect.stacked_experts else (count * columns, total)
        return [Place(name, shape, view) for expert in views for view in expert]

    def shard(self, rank: Rank) -> tuple[ExpertsRule, list[PartSlice]]:
        """See :class:`RowsRule`. Mirrors ``weight_loader`` of ``.../inference/tensor_parallel/grouped_layers.py``."""
        size, number = rank.expert_tensor_parallel, rank.expert_tensor_rank
        mine = _share(self.num_experts, rank.expert_parallel, rank.expert_rank)
        parts = len(self.parts)
        local = replace(self, num_experts=mine.stop - mine.start)
        if self.divided == "rows":
            local = replace(local, rows=self.rows // size)
            where: tuple[slice, ...] = (_share(self.rows, size, number),)
        else:
            local = replace(local, columns=self.columns // size)
            where = (slice(None), _share(self.columns, size, number))
        return local, [(part, where) for part in range(mine.start * parts, mine.stop * parts)]


Rule = RowsRule | ExpertsRule


def _share(length: int, size: int, number: int) -> slice:
    """The ``number``-th of ``size`` equal parts."""
    if length % size:
        raise ValueError(f"{length} can't be divided by {size}")
    return slice(length // size * number, length // size * (number + 1))


def shares(rule: Rule, rank: Rank, source: Dialect, target: Dialect) -> Iterator[tuple[Place, Place]]:
    """For each part of what a rank holds: where the whole tensors of ``source`` store it, and where its own do.

    Raises:
        BridgeError: a training run's blocks would have to be divided again.
    """
    blocks = {layout.tensor_parallel for layout in (source.layout, target.layout) if layout} - {1}
    if blocks and isinstance(rule, RowsRule) and rule.fuses:
        if len(blocks) > 1 or rank != WHOLE:
            raise BridgeError(
                "a contiguous layout stores the blocks of a training run's tensor parallel ranks one after the other; "
                "they can't be divided otherwise: export them to Hugging Face first (mf-qwen3 export)"
            )
        yield from zip(rule.in_blocks(source, *blocks), rule.in_blocks(target, *blocks))
        return
    whole = rule.places(source)
    local, cuts = rule.shard(rank)
    for (part, where), there in zip(cuts, local.places(target)):
        yield replace(whole[part], view=whole[part].view[where]), there


def fused_rows(rule: RowsRule, layout: Layout) -> dict[str, np.ndarray]:
    """For each part of a fused parameter the numbers of the rows that store it in the parameter: int64 (rows,)."""
    flat = replace(rule, columns=(), divided=None if rule.divided == "columns" else rule.divided)
    parts = {name: np.empty(rows, np.int64) for name, rows in zip(rule.tensors, rule.rows)}
    numbers = np.arange(sum(rule.rows))
    for here, there in shares(flat, WHOLE, Dialect(layout), HF):
        there.view.of(parts[there.tensor])[...] = here.view.of(numbers)
    return parts


def hf_dialect(names: Iterable[str]) -> Dialect:
    """Hugging Face's dialect, with experts as tensors of these names spell them."""
    return HF_STACKED if any(name.endswith(_STACKED) for name in names) else HF


def model_rules(spec: ModelSpec) -> Iterator[Rule]:
    """The rules of a model: one for each line of its table, and layer."""
    for per_layer, group in groupby(parameters_of(spec), lambda parameter: parameter.is_per_layer):
        parameters = list(group)
        for layer in range(spec.num_layers if per_layer else 1):
            yield from (_rule(spec, parameter, layer) for parameter in parameters)


_STACKED = tuple(parameter.stacked.rpartition("{layer}")[2] for parameter in PARAMETERS if parameter.stacked)
_CLASSES: dict[Shape, type[RowsRule]] = {QKV: QkvRule, ROUTER: RouterRule}


def _rule(spec: ModelSpec, parameter: Parameter, layer: int) -> Rule:
    shape = parameter.shape
    name = parameter.mindformers.format(layer=layer)
    rows = tuple(getattr(spec, number) for number in shape.rows)
    columns: tuple[int, ...] = (getattr(spec, shape.columns),) if shape.columns else ()
    divided = shape.axis if shape.divided else None
    if shape.per_expert:
        parts = tuple(part.format(layer=layer, expert="{expert}") for part in parameter.parts)
        stacked = parameter.stacked.format(layer=layer)
        return ExpertsRule(name, parts, stacked, spec.num_experts, rows[0], columns[0], divided)
    parts = tuple(part.format(layer=layer) for part in parameter.parts)
    groups = getattr(spec, shape.divided) if shape.divided and shape.axis == "rows" else 1
    return _CLASSES.get(shape, RowsRule)(name, parts, rows, columns, groups, shape.fuses, divided)
