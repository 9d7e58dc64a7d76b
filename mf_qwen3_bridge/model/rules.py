"""Which Hugging Face tensors make up which MindFormers parameter: a model as a table."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Literal, Protocol

from mf_qwen3_bridge.errors import BridgeError
from mf_qwen3_bridge.model import layouts
from mf_qwen3_bridge.model.layouts import Layout, View
from mf_qwen3_bridge.model.parallel import WHOLE, Rank
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
    """Where one part of a rule lies: in which tensor, of which shape, seen how.

    A part's views have the same shape in every dialect.
    """

    tensor: str
    shape: tuple[int, ...]
    view: View


@dataclass(frozen=True)
class Cut:
    """What one part of a rank's rule is of the whole model's: which part, and which slice of its views."""

    part: int
    where: tuple[slice, ...] = ()


class Rule(Protocol):
    """One MindFormers parameter, and the parts of Hugging Face tensors that it is made of."""

    @property
    def parameter(self) -> str:
        """The MindFormers name."""

    @property
    def tensors(self) -> tuple[str, ...]:
        """The Hugging Face names of the parts, in their order, where each is a tensor of its own."""

    @property
    def divided(self) -> str | None:
        """What the ranks that share the parameter divide, if they divide anything."""

    def places(self, dialect: Dialect) -> list[Place]:
        """Where each part lies in ``dialect``, in the order of ``tensors``."""

    def shard(self, rank: Rank) -> tuple[Rule, list[Cut]]:
        """The rule of what a rank holds, and what each of that rule's parts is of this one's."""


@dataclass(frozen=True)
class RowsRule:
    """A parameter made of the rows of one or several tensors. Views have the shape (groups, rows / groups, *columns).

    Attributes:
        parameter: the MindFormers name.
        tensors: the Hugging Face names.
        rows: number of rows of each tensor.
        columns: shape of one row.
        groups: number of groups that an interleaved layout deals the rows in, and that ranks share.
        fuses: what the parameter fuses, if it fuses anything; decides which layout flag applies.
        divided: what tensor parallel ranks divide: whole ``groups`` of rows, the ``columns``, or nothing.
    """

    parameter: str
    tensors: tuple[str, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...] = ()
    groups: int = 1
    fuses: Literal["qkv", "gate_up"] | None = None
    divided: Literal["groups", "columns"] | None = None

    def places(self, dialect: Dialect) -> list[Place]:
        """See :class:`Rule`."""
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
        """Where what each of ``count`` tensor parallel ranks holds of each part lies in the whole tensors.

        If these are a training run's, its ranks' blocks lie one after the other, each laid out by itself.
        """
        whole = self.places(dialect)
        for number in range(count):
            local, cuts = self.shard(Rank(tensor_parallel=count, tensor_rank=number))
            for cut, place in zip(cuts, local.places(dialect)):
                if dialect.layout and dialect.layout.tensor_parallel == count:
                    start = number * prod(place.shape)
                    yield replace(whole[cut.part], view=replace(place.view, offset=place.view.offset + start))
                else:
                    yield replace(whole[cut.part], view=whole[cut.part].view[cut.where])

    def shard(self, rank: Rank) -> tuple[RowsRule, list[Cut]]:
        """See :class:`Rule`. Mirrors the ``weight_loader`` methods of ``mindformers/parallel_core/inference``."""
        size, number = rank.tensor_parallel, rank.tensor_rank
        local = self
        where: tuple[slice, ...] = ()
        if self.divided == "groups":
            local = replace(self, rows=tuple(n // size for n in self.rows), groups=self.groups // size)
            where = (_share(self.groups, size, number),)
        elif self.divided == "columns":
            local = replace(self, columns=(self.columns[0] // size,))
            where = (slice(None), slice(None), _share(self.columns[0], size, number))
        return local, [Cut(part, where) for part in range(len(self.tensors))]


class QkvRule(RowsRule):
    """Queries, keys and values; a group is a KV head with its query heads."""

    def shard(self, rank: Rank) -> tuple[RowsRule, list[Cut]]:
        """As other rows; of more ranks than groups, those of one group divide its queries, and each holds its KV head.

        Mirrors ``QKVParallelLinear.weight_loader`` of ``.../inference/tensor_parallel/layers.py``.
        """
        if rank.tensor_parallel <= self.groups:
            return super().shard(rank)
        ranks_of_group = _share(rank.tensor_parallel, self.groups, 0).stop
        group, member = divmod(rank.tensor_rank, ranks_of_group)
        query, *key_value = (n // self.groups for n in self.rows)
        local = replace(self, rows=(query // ranks_of_group, *key_value), groups=1)
        mine = slice(group, group + 1)
        return local, [Cut(0, (mine, _share(query, ranks_of_group, member))), Cut(1, (mine,)), Cut(2, (mine,))]


class RouterRule(RowsRule):
    """The router, a row for each expert: every rank holds all of them."""

    def shard(self, rank: Rank) -> tuple[RowsRule, list[Cut]]:
        """All rows, but each rank of several that share the experts begins with those of its own.

        Mirrors ``Router.weight_loader`` of ``.../inference/transformer/moe/router.py``.
        """
        total = self.rows[0]
        start = _share(total, rank.expert_parallel, rank.expert_rank).start if rank.rotates_router else 0
        if start == 0:
            return super().shard(rank)
        everything = slice(None)
        local = replace(self, tensors=self.tensors * 2, rows=(total - start, start))
        return local, [Cut(0, (everything, slice(start, total))), Cut(0, (everything, slice(0, start)))]


@dataclass(frozen=True)
class ExpertsRule:
    """A parameter that stacks one layer's experts. Views have the shape (rows, columns) of one expert's part.

    Attributes:
        parameter: the MindFormers name.
        experts: the Hugging Face name that the experts' names begin with.
        projections: the parts of each expert, in their order.
        stacked: the Hugging Face name of the part where all experts are one tensor.
        num_experts: number of experts.
        rows: number of rows of each part.
        columns: number of columns of each part.
        divided: what the ranks that share an expert divide: its ``rows`` or its ``columns``.
    """

    parameter: str
    experts: str
    projections: tuple[str, ...]
    stacked: str
    num_experts: int
    rows: int
    columns: int
    divided: Literal["rows", "columns"]

    @property
    def tensors(self) -> tuple[str, ...]:
        """See :class:`Rule`: expert by expert."""
        return tuple(f"{self.experts}.{e}.{part}.weight" for e in range(self.num_experts) for part in self.projections)

    def places(self, dialect: Dialect) -> list[Place]:
        """See :class:`Rule`."""
        if dialect == HF:
            alone = View.whole((self.rows, self.columns))
            return [Place(name, alone.shape, alone) for name in self.tensors]
        count, columns, all_rows = self.num_experts, self.columns, [self.rows] * len(self.projections)
        total = sum(all_rows)
        views = layouts.by_expert(count, all_rows, columns, transposed=not dialect.is_hf)
        shape: tuple[int, ...]
        if dialect.is_hf:
            name, shape = f"{self.experts}.{self.stacked}", (count, total, columns)
        else:
            name = self.parameter
            shape = (count, columns, total) if dialect.stacked_experts else (count * columns, total)
        return [Place(name, shape, view) for expert in views for view in expert]

    def shard(self, rank: Rank) -> tuple[ExpertsRule, list[Cut]]:
        """See :class:`Rule`. Mirrors ``weight_loader`` of ``.../inference/tensor_parallel/grouped_layers.py``."""
        size, number = rank.expert_tensor_parallel, rank.expert_tensor_rank
        mine = _share(self.num_experts, rank.expert_parallel, rank.expert_rank)
        parts = len(self.projections)
        local = replace(self, num_experts=mine.stop - mine.start)
        if self.divided == "rows":
            local = replace(local, rows=self.rows // size)
            where: tuple[slice, ...] = (_share(self.rows, size, number),)
        else:
            local = replace(local, columns=self.columns // size)
            where = (slice(None), _share(self.columns, size, number))
        return local, [Cut(part, where) for part in range(mine.start * parts, mine.stop * parts)]


def _share(length: int, size: int, number: int) -> slice:
    """The ``number``-th of ``size`` equal parts."""
    if length % size:
        raise ValueError(f"{length} can't be divided by {size}")
    return slice(length // size * number, length // size * (number + 1))


def shares(rule: Rule, rank: Rank, source: Dialect, target: Dialect) -> Iterator[tuple[Place, Place]]:
    """For each part of what a rank holds: where it lies in the whole tensors of ``source``, and in its own.

    Raises:
        BridgeError: a training run's blocks would have to be cut again.
    """
    blocks = {layout.tensor_parallel for layout in (source.layout, target.layout) if layout} - {1}
    if blocks and isinstance(rule, RowsRule) and rule.fuses:
        if len(blocks) > 1 or rank != WHOLE:
            raise BridgeError(
                "weights in a contiguous layout lie in the blocks of a training run's tensor parallel ranks, which "
                "can't be cut into others: export them to Hugging Face first (mf-qwen3 export)"
            )
        for here, there in zip(rule.in_blocks(source, *blocks), rule.in_blocks(target, *blocks)):
            yield here, there
        return
    whole = rule.places(source)
    local, cuts = rule.shard(rank)
    for cut, there in zip(cuts, local.places(target)):
        here = whole[cut.part]
        yield replace(here, view=here.view[cut.where]), there


def hf_dialect(names: Iterable[str]) -> Dialect:
    """How Hugging Face tensors of these names spell experts."""
    return HF_STACKED if any(name.endswith(".experts.gate_up_proj") for name in names) else HF


# The two parameters that a tied model shares: (Hugging Face's name, MindFormers').
EMBEDDING = ("model.embed_tokens.weight", "embedding.word_embeddings.weight")
OUTPUT = ("lm_head.weight", "output_layer.weight")


def model_rules(spec: ModelSpec) -> Iterator[Rule]:
    """The table of a model.

    Mirrors ``weight_mapping`` in ``mindformers/models/qwen3/utils.py`` and ``.../qwen3_moe/utils.py`` (1.7 to 1.9).
    """
    hidden, vocab = spec.hidden_size, spec.vocab_size
    query, key_value, head = spec.query_rows, spec.key_value_rows, spec.head_dim

    yield RowsRule(EMBEDDING[1], (EMBEDDING[0],), (vocab,), (hidden,), groups=vocab, divided="groups")
    for layer in range(spec.num_layers):
        hf, mf = f"model.layers.{layer}", f"decoder.layers.{layer}"
        attn, self_attention = f"{hf}.self_attn", f"{mf}.self_attention"
        yield RowsRule(f"{mf}.input_layernorm.weight", (f"{hf}.input_layernorm.weight",), (hidden,))
        yield QkvRule(
            f"{self_attention}.linear_qkv.weight",
            (f"{attn}.q_proj.weight", f"{attn}.k_proj.weight", f"{attn}.v_proj.weight"),
            (query, key_value, key_value),
            (hidden,),
            groups=spec.num_query_groups,
            fuses="qkv",
            divided="groups",
        )
        yield RowsRule(f"{self_attention}.q_layernorm.weight", (f"{attn}.q_norm.weight",), (head,))
        yield RowsRule(f"{self_attention}.k_layernorm.weight", (f"{attn}.k_norm.weight",), (head,))
        yield RowsRule(
            f"{self_attention}.linear_proj.weight", (f"{attn}.o_proj.weight",), (hidden,), (query,), divided="columns"
        )
        yield RowsRule(f"{mf}.pre_mlp_layernorm.weight", (f"{hf}.post_attention_layernorm.weight",), (hidden,))
        yield from (_experts if spec.is_moe else _mlp)(spec, f"{hf}.mlp", f"{mf}.mlp")
    yield RowsRule("decoder.final_layernorm.weight", ("model.norm.weight",), (hidden,))
    if not spec.tie_word_embeddings:
        yield RowsRule(OUTPUT[1], (OUTPUT[0],), (vocab,), (hidden,), groups=vocab, divided="groups")


def _mlp(spec: ModelSpec, hf: str, mf: str) -> Iterator[Rule]:
    hidden, ffn = spec.hidden_size, spec.ffn_hidden_size
    yield RowsRule(
        f"{mf}.linear_fc1.weight",
        (f"{hf}.gate_proj.weight", f"{hf}.up_proj.weight"),
        (ffn, ffn),
        (hidden,),
        groups=ffn,
        fuses="gate_up",
        divided="groups",
    )
    yield RowsRule(f"{mf}.linear_fc2.weight", (f"{hf}.down_proj.weight",), (hidden,), (ffn,), divided="columns")


def _experts(spec: ModelSpec, hf: str, mf: str) -> Iterator[Rule]:
    hidden, ffn, count = spec.hidden_size, spec.moe_ffn_hidden_size, spec.num_experts
    yield RouterRule(f"{mf}.router.weight", (f"{hf}.gate.weight",), (count,), (hidden,))
    experts = f"{hf}.experts"
    gate_up = ("gate_proj", "up_proj")
    yield ExpertsRule(f"{mf}.experts.weight1", experts, gate_up, "gate_up_proj", count, ffn, hidden, divided="rows")
    down = ("down_proj",)
    yield ExpertsRule(f"{mf}.experts.weight2", experts, down, "down_proj", count, hidden, ffn, divided="columns")


# What lies in a training checkpoint beside the weights: an optimizer's state, under a weight's name with a prefix...
_PREFIXED = re.compile(r"\w+?[._]((?:decoder|embedding|output_layer)\..+)")
# ...counters, dropout's random state, the load of each expert, losses that are summed up.
_COUNTERS = re.compile(
    r"(.*\.)?\w*dropout\.(seed|offset)|(.*\.)?router\.fi_accu"
    r"|(.*\.)?(max_logits_val|expert_load\w*|num_tokens_per_expert|expert_mapping)"
    r"|(aux|lm|mtp|indexer)_loss|global_batch_size"
    r"|global_step|current_iterator_step|last_overflow_iterator_step|epoch_num|step_num|loss_scale|scale_sense"
    r"|learning_rate(_group_\d+)?|beta[12]_power|afactor_step|list_index|scale_window_(up|down)_count"
)


def is_counter(name: str) -> bool:
    """Whether a tensor of a MindFormers training checkpoint is a counter or the like, which every rank holds whole."""
    return _COUNTERS.fullmatch(name) is not None


def is_training_state(name: str, weights: Container[str]) -> bool:
    """Whether a tensor of a MindFormers training checkpoint is state of the run, not one of the model's ``weights``."""
    prefixed = _PREFIXED.fullmatch(name)
    return (prefixed is not None and prefixed[1] in weights) or is_counter(name)
