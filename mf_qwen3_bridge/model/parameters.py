"""Names every tensor of Qwen3 and Qwen3-MoE: one line for each parameter, both names side by side.

Rules, shape hints, look-alikes and what ranks divide are read from this table.
"""

import re
from collections.abc import Container, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from mf_qwen3_bridge.model.spec import ModelSpec


@dataclass(frozen=True)
class Shape:
    """The shape of a parameter's Hugging Face tensors, in numbers of :class:`ModelSpec`.

    Attributes:
        rows: number of rows of each tensor; a fused parameter has several tensors.
        columns: number of columns of each; None for a vector.
        divided: the number that ranks divide among themselves; None if every rank holds everything.
        axis: the axis of the tensors along which they divide it.
        fuses: what the parameter fuses; decides which layout flag applies.
        per_expert: whether each expert has such tensors.
    """

    rows: tuple[str, ...]
    columns: str | None = None
    divided: str | None = None
    axis: Literal["rows", "columns"] = "rows"
    fuses: Literal["qkv", "gate_up"] | None = None
    per_expert: bool = False


VOCABULARY = Shape(("vocab_size",), "hidden_size", divided="vocab_size")
NORM = Shape(("hidden_size",))
HEAD_NORM = Shape(("head_dim",))
QKV = Shape(("query_rows", "key_value_rows", "key_value_rows"), "hidden_size", divided="num_query_groups", fuses="qkv")
PROJ = Shape(("hidden_size",), "query_rows", divided="num_attention_heads", axis="columns")
GATE_UP = Shape(("ffn_hidden_size", "ffn_hidden_size"), "hidden_size", divided="ffn_hidden_size", fuses="gate_up")
DOWN = Shape(("hidden_size",), "ffn_hidden_size", divided="ffn_hidden_size", axis="columns")
ROUTER = Shape(("num_experts",), "hidden_size")
_WIDTH = "moe_ffn_hidden_size"
EXPERT_GATE_UP = Shape((_WIDTH, _WIDTH), "hidden_size", divided=_WIDTH, per_expert=True)
EXPERT_DOWN = Shape(("hidden_size",), _WIDTH, divided=_WIDTH, axis="columns", per_expert=True)


@dataclass(frozen=True)
class Parameter:
    """A parameter of MindFormers' networks, and the Hugging Face tensors that it is made of.

    Attributes:
        hf: their name. ``{layer}`` and ``{expert}`` stand for numbers, ``{q,k,v}`` lists the parts of a fused parameter.
        only: the models that have it; None for all.
        stacked: name of the tensor that holds all experts of a layer, as transformers 5 spells them.
    """

    hf: str
    mindformers: str
    shape: Shape
    only: Literal["dense", "moe", "untied"] | None = None
    stacked: str = ""

    @cached_property
    def parts(self) -> tuple[str, ...]:
        """The Hugging Face names, one for each of ``shape.rows``."""
        listed = re.search(r"\{(\w+(?:,\w+)+)\}", self.hf)
        return tuple(self.hf.replace(listed[0], part) for part in listed[1].split(",")) if listed else (self.hf,)

    @property
    def is_per_layer(self) -> bool:
        """Whether each layer has one."""
        return "{layer}" in self.hf


# The two parameters that a tied model shares: (Hugging Face's name, MindFormers').
EMBEDDING = ("model.embed_tokens.weight", "embedding.word_embeddings.weight")
OUTPUT = ("lm_head.weight", "output_layer.weight")

# In the order of the model. Mirrors weight_mapping in mindformers/models/qwen3/utils.py and .../qwen3_moe/utils.py
# (1.7 to 2.1).
# fmt: off
PARAMETERS = (
    #          Hugging Face                                                       MindFormers
    Parameter("model.embed_tokens.weight",                                       "embedding.word_embeddings.weight",                       VOCABULARY),
    Parameter("model.layers.{layer}.input_layernorm.weight",                     "decoder.layers.{layer}.input_layernorm.weight",           NORM),
    Parameter("model.layers.{layer}.self_attn.{q_proj,k_proj,v_proj}.weight",    "decoder.layers.{layer}.self_attention.linear_qkv.weight", QKV),
    Parameter("model.layers.{layer}.self_attn.q_norm.weight",                    "decoder.layers.{layer}.self_attention.q_layernorm.weight", HEAD_NORM),
    Parameter("model.layers.{layer}.self_attn.k_norm.weight",                    "decoder.layers.{layer}.self_attention.k_layernorm.weight", HEAD_NORM),
    Parameter("model.layers.{layer}.self_attn.o_proj.weight",                    "decoder.layers.{layer}.self_attention.linear_proj.weight", PROJ),
    Parameter("model.layers.{layer}.post_attention_layernorm.weight",            "decoder.layers.{layer}.pre_mlp_layernorm.weight",         NORM),
    Parameter("model.layers.{layer}.mlp.{gate_proj,up_proj}.weight",             "decoder.layers.{layer}.mlp.linear_fc1.weight",            GATE_UP, "dense"),
    Parameter("model.layers.{layer}.mlp.down_proj.weight",                       "decoder.layers.{layer}.mlp.linear_fc2.weight",            DOWN, "dense"),
    Parameter("model.layers.{layer}.mlp.gate.weight",                            "decoder.layers.{layer}.mlp.router.weight",                ROUTER, "moe"),
    Parameter("model.layers.{layer}.mlp.experts.{expert}.{gate_proj,up_proj}.weight", "decoder.layers.{layer}.mlp.experts.weight1",         EXPERT_GATE_UP, "moe", "model.layers.{layer}.mlp.experts.gate_up_proj"),
    Parameter("model.layers.{layer}.mlp.experts.{expert}.down_proj.weight",      "decoder.layers.{layer}.mlp.experts.weight2",              EXPERT_DOWN, "moe", "model.layers.{layer}.mlp.experts.down_proj"),
    Parameter("model.norm.weight",                                               "decoder.final_layernorm.weight",                          NORM),
    Parameter("lm_head.weight",                                                  "output_layer.weight",                                     VOCABULARY, "untied"),
)
# fmt: on


def parameters_of(spec: ModelSpec) -> Iterator[Parameter]:
    """The lines of the table that a model has, in the model's order."""
    has = {"dense": not spec.is_moe, "moe": spec.is_moe, "untied": not spec.tie_word_embeddings, None: True}
    return (parameter for parameter in PARAMETERS if has[parameter.only])


def is_hf_name(name: str) -> bool:
    """Whether a tensor has a name that only Hugging Face uses."""
    return name.startswith(("model.layers.", "model.embed_tokens."))


def is_fused_qkv(name: str) -> bool:
    """Whether a MindFormers parameter holds the fused weights of queries, keys and values."""
    return any(line.mindformers.format(layer=layer_of(name)) == name for line in PARAMETERS if line.shape == QKV)


_LAYER_NUMBER = re.compile(r"\blayers\.([0-9]{1,9})\.")
_EXPERT_NUMBER = re.compile(r"\bexperts\.([0-9]{1,9})\.")


def layer_of(name: str) -> int | None:
    """The number of the layer that a tensor of either dialect belongs to."""
    match = _LAYER_NUMBER.search(name)
    return int(match[1]) if match else None


def expert_of(name: str) -> int | None:
    """The number of the expert that a Hugging Face tensor belongs to."""
    match = _EXPERT_NUMBER.search(name)
    return int(match[1]) if match else None


def with_expert(name: str, expert: int) -> str:
    """The name of the same tensor of another expert."""
    return _EXPERT_NUMBER.sub(f"experts.{expert}.", name)


def look_alikes(name: str) -> list[str]:
    """Hugging Face tensors of the same layer, and expert, that have the same shape and are easily confused with it.

    >>> look_alikes("model.layers.3.self_attn.k_proj.weight")
    ['model.layers.3.self_attn.v_proj.weight']
    """
    pattern = _EXPERT_NUMBER.sub("experts.{expert}.", _LAYER_NUMBER.sub("layers.{layer}.", name))
    lines = [line for line in PARAMETERS if line.is_per_layer]
    shapes = {
        part: (rows, line.shape.columns, line.shape.per_expert)
        for line in lines
        for part, rows in zip(line.parts, line.shape.rows)
    }
    alike = [part for part, shape in shapes.items() if shape == shapes.get(pattern) and part != pattern]
    return [part.format(layer=layer_of(name), expert=expert_of(name)) for part in alike]


# A training checkpoint holds more than the weights: an optimizer's state, under a weight's name with a prefix...
_PREFIXED = re.compile(r"\w+?[._]((?:decoder|embedding|output_layer)\..+)")
# ...and counters, dropout's random state, the load of each expert, accumulated losses.
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
