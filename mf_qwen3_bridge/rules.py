"""Which Hugging Face tensors make up which MindFormers parameter: a model as a table."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator
from dataclasses import dataclass

from mf_qwen3_bridge import layouts
from mf_qwen3_bridge.layouts import Layout, View
from mf_qwen3_bridge.spec import ModelSpec


@dataclass(frozen=True)
class Rule:
    """One MindFormers parameter and the Hugging Face tensors whose rows it holds, in their order.

    Attributes:
        parameter: the MindFormers name.
        tensors: the Hugging Face names.
        rows: number of rows of each tensor.
        columns: shape of one row.
        groups: number of groups that an interleaved layout deals the rows in.
        fuses: what the parameter fuses, if it fuses anything; decides which layout flag applies.
    """

    parameter: str
    tensors: tuple[str, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...] = ()
    groups: int = 1
    fuses: str | None = None


# The two parameters that a tied model shares: (Hugging Face's name, MindFormers').
EMBEDDING = ("model.embed_tokens.weight", "embedding.word_embeddings.weight")
OUTPUT = ("lm_head.weight", "output_layer.weight")


def dense_rules(spec: ModelSpec) -> Iterator[Rule]:
    """The table of dense Qwen3. Mirrors ``weight_mapping`` in ``mindformers/models/qwen3/utils.py`` (1.7 to 1.9)."""
    hidden, vocab, ffn = spec.hidden_size, spec.vocab_size, spec.ffn_hidden_size
    query, key_value, head = spec.query_rows, spec.key_value_rows, spec.head_dim

    yield Rule(EMBEDDING[1], (EMBEDDING[0],), (vocab,), (hidden,))
    for layer in range(spec.num_layers):
        hf, mf = f"model.layers.{layer}", f"decoder.layers.{layer}"
        attn, self_attention = f"{hf}.self_attn", f"{mf}.self_attention"
        yield Rule(f"{mf}.input_layernorm.weight", (f"{hf}.input_layernorm.weight",), (hidden,))
        yield Rule(
            f"{self_attention}.linear_qkv.weight",
            (f"{attn}.q_proj.weight", f"{attn}.k_proj.weight", f"{attn}.v_proj.weight"),
            (query, key_value, key_value),
            (hidden,),
            groups=spec.num_query_groups,
            fuses="qkv",
        )
        yield Rule(f"{self_attention}.q_layernorm.weight", (f"{attn}.q_norm.weight",), (head,))
        yield Rule(f"{self_attention}.k_layernorm.weight", (f"{attn}.k_norm.weight",), (head,))
        yield Rule(f"{self_attention}.linear_proj.weight", (f"{attn}.o_proj.weight",), (hidden,), (query,))
        yield Rule(f"{mf}.pre_mlp_layernorm.weight", (f"{hf}.post_attention_layernorm.weight",), (hidden,))
        yield Rule(
            f"{mf}.mlp.linear_fc1.weight",
            (f"{hf}.mlp.gate_proj.weight", f"{hf}.mlp.up_proj.weight"),
            (ffn, ffn),
            (hidden,),
            groups=ffn,
            fuses="gate_up",
        )
        yield Rule(f"{mf}.mlp.linear_fc2.weight", (f"{hf}.mlp.down_proj.weight",), (hidden,), (ffn,))
    yield Rule("decoder.final_layernorm.weight", ("model.norm.weight",), (hidden,))
    if not spec.tie_word_embeddings:
        yield Rule(OUTPUT[1], (OUTPUT[0],), (vocab,), (hidden,))


@dataclass(frozen=True)
class Dialect:
    """A way of naming and laying out a model's tensors: Hugging Face's, or MindFormers' in one of its layouts."""

    layout: Layout | None

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
INFER = Dialect(layouts.INFERENCE)
TRAIN = Dialect(layouts.TRAINING_DEFAULT)


@dataclass(frozen=True)
class Place:
    """Where one part of a rule lies: in which tensor, of which shape, seen how.

    A part's views have the same shape, (groups, rows of a group, *columns), in every dialect.
    """

    tensor: str
    shape: tuple[int, ...]
    view: View


def places(rule: Rule, dialect: Dialect) -> list[Place]:
    """Where each part of ``rule`` lies in ``dialect``, in the order of ``rule.tensors``."""
    layout = dialect.layout
    if layout is None:
        shapes = [(rows, *rule.columns) for rows in rule.rows]
        views = [View.whole(shape).unflatten(0, rule.groups) for shape in shapes]
        return [Place(*place) for place in zip(rule.tensors, shapes, views)]
    is_interleaved = {"qkv": layout.interleaved_qkv, "gate_up": layout.interleaved_gate_up, None: False}[rule.fuses]
    arrange = layouts.interleaved if is_interleaved else layouts.contiguous
    shape = (sum(rule.rows), *rule.columns)
    return [Place(rule.parameter, shape, view) for view in arrange(rule.rows, rule.columns, rule.groups)]


# What lies in a training checkpoint beside the weights: an optimizer's state, under a weight's name with a prefix...
_PREFIXED = re.compile(r"\w+?[._]((?:decoder|embedding|output_layer)\..+)")
# ...counters, dropout's random state.
_COUNTERS = re.compile(
    r"(.*\.)?embedding_dropout\.(seed|offset)"
    r"|global_step|current_iterator_step|last_overflow_iterator_step|epoch_num|step_num|loss_scale|scale_sense"
    r"|learning_rate(_group_\d+)?|beta[12]_power|afactor_step|list_index|scale_window_(up|down)_count"
)


def is_training_state(name: str, weights: Container[str]) -> bool:
    """Whether a tensor of a MindFormers training checkpoint is state of the run, not one of the model's ``weights``."""
    prefixed = _PREFIXED.fullmatch(name)
    return (prefixed is not None and prefixed[1] in weights) or _COUNTERS.fullmatch(name) is not None
