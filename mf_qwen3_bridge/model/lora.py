"""Names and lays out the matrices of low-rank adapters (LoRA): MindFormers' of a fused parameter, PEFT's of its parts.

MindFormers adapts a whole fused parameter: one A (rank, in), and a B (out, rank) whose rows are laid out as those of
the weight. So each part (q, k, v; gate, up) has the same A, and its own rows of B, which the weight's rule shows. A
layer's experts are stacked and transposed, as their weights are: A (experts, in, rank), B (experts, rank, out).
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from mf_qwen3_bridge.model.rules import ExpertsRule, RowsRule, Rule

# Mirrors mindformers/parallel_core/training_graph/tensor_parallel/lora_layers.py (graph mode, 1.7 to 1.9); in PyNative
# mode (2.x) the names are in lower case, and experts have a pair for each of their weights.
_MATRIX = re.compile(
    r"(?P<cell>(?:decoder|embedding|output_layer)\b.*)"
    r"(?:\.lora_(?:(?P<graph>[AB])\.weight|(?P<pynative>[ab]))|(?P<experts>\.weight[12])_lora_(?P<expert>[ab]))"
)
_PEFT = "base_model.model."

Side = Literal["a", "b"]


def adapted_parameter(name: str) -> tuple[str, Side] | None:
    """The MindFormers parameter that a tensor of a training checkpoint adapts, and which matrix it is; else None.

    >>> adapted_parameter("decoder.layers.0.self_attention.linear_qkv.lora_B.weight")
    ('decoder.layers.0.self_attention.linear_qkv.weight', 'b')
    """
    match = _MATRIX.fullmatch(name)
    if match is None:
        return None
    side: Side = "a" if (match["graph"] or match["pynative"] or match["expert"]).lower() == "a" else "b"
    return match["cell"] + (match["experts"] or ".weight"), side


def peft_name(tensor: str, side: Side) -> str:
    """PEFT's name of a matrix of the adapter of a Hugging Face tensor, as in ``adapter_model.safetensors``.

    >>> peft_name("model.layers.0.self_attn.q_proj.weight", "a")
    'base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight'
    """
    return f"{_PEFT}{tensor.removesuffix('.weight')}.lora_{side.upper()}.weight"


def peft_module(name: str) -> str:
    """The module that a tensor of PEFT's adapts, by the name that transformers has for it.

    >>> peft_module("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight")
    'model.layers.0.self_attn.q_proj'
    """
    return name.removeprefix(_PEFT).rpartition(".lora_")[0]


def lora_rules(rule: Rule, a: str, b: str, rank: int) -> Iterator[Rule]:
    """The rules of the adapter of a rule's parameter: from the MindFormers tensors ``a`` and ``b`` to PEFT's.

    Those of experts are stacked: their dialect has an axis for them.
    """
    if isinstance(rule, ExpertsRule):
        for part in rule.parts:  # each has all of A
            yield replace(rule, parameter=a, parts=(peft_name(part, "a"),), stacked="", rows=rank)
        yield replace(rule, parameter=b, parts=tuple(peft_name(p, "b") for p in rule.parts), stacked="", columns=rank)
        return
    for part in rule.tensors:
        yield RowsRule(a, (peft_name(part, "a"),), (rank,), rule.columns)
    yield replace(rule, parameter=b, tensors=tuple(peft_name(p, "b") for p in rule.tensors), columns=(rank,))


def rank_of(a_shape: tuple[int, ...]) -> int:
    """The rank of an adapter, by the shape of its A: of a layer's experts it is the last axis."""
    return (a_shape or (0,))[-1 if len(a_shape) == 3 else 0]
