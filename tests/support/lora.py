"""Makes what a MindFormers run with LoRA leaves, by hand: numpy, and no rule of the bridge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mf_qwen3_bridge.inputs.rank_files import Sharding
from mf_qwen3_bridge.model.layouts import Layout
from mf_qwen3_bridge.model.spec import ModelSpec
from tests.support.checkpoints import SPEC, Tensors, random_tensors
from tests.support.trained import COUNTER, Ranks, fused, save_rank

RANK, ALPHA = 3, 12.0
# What upstream's YAMLs say for Qwen3, whose README documents them.
PET_CONFIG = {
    "pet_type": "lora",
    "lora_rank": RANK,
    "lora_alpha": int(ALPHA),
    "lora_dropout": 0.0,
    "lora_a_init": "normal",
    "lora_b_init": "zeros",
    "target_modules": ".*word_embeddings|.*linear_qkv|.*linear_proj|.*linear_fc1|.*linear_fc2",
    "freeze_include": ["*"],
    "freeze_exclude": ["*lora*"],
}
# Of each layer: the fused parameter, and the Hugging Face modules that it is made of.
ATTENTION = {
    "self_attention.linear_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention.linear_proj": ("self_attn.o_proj",),
}
CELLS = ATTENTION | {"mlp.linear_fc1": ("mlp.gate_proj", "mlp.up_proj"), "mlp.linear_fc2": ("mlp.down_proj",)}
# Those whose B ranks cut by rows; of the others they cut A by columns.
COLUMN_PARALLEL = ("linear_qkv", "linear_fc1")


class Lora(NamedTuple):
    """An adapter, as MindFormers names and lays it out, and A and B of each Hugging Face weight."""

    saved: Tensors
    parts: dict[str, tuple[np.ndarray, np.ndarray]]

    @classmethod
    def of_peft(cls, adapter: Tensors) -> Lora:
        """Of what ``adapter_model.safetensors`` holds."""
        names = [name for name in adapter if ".lora_A." in name]
        parts = {
            name.removeprefix("base_model.model.").replace(".lora_A", ""): (
                adapter[name],
                adapter[name.replace("_A.", "_B.")],
            )
            for name in names
        }
        return cls({}, parts)

    def merged(self, hf: Tensors, scaling: float = ALPHA / RANK) -> Tensors:
        """The Hugging Face weights with the adapter merged into them, in float32."""
        result = dict(hf)
        for name, (a, b) in self.parts.items():
            delta = b.astype(np.float32) @ a.astype(np.float32) * np.float32(scaling)
            result[name] = hf[name].astype(np.float32) + delta
        return result

    def in_peft(self) -> Tensors:
        """As ``adapter_model.safetensors`` holds it."""
        named = {}
        for name, matrices in self.parts.items():
            for side, matrix in zip("AB", matrices):
                named[f"base_model.model.{name.removesuffix('.weight')}.lora_{side}.weight"] = matrix
        return named


def lora(
    spec: ModelSpec = SPEC,
    qkv: int | None = None,
    gate_up: int | None = None,
    *,
    scale: float = 1.0,
    pynative: bool = False,
) -> Lora:
    """A trained adapter of every linear layer; blocks as for :func:`fused`. MindFormers adapts no experts."""
    random = np.random.default_rng(5)
    hf = random_tensors(spec)
    cells = ATTENTION if spec.is_moe else CELLS
    names = [
        f"model.layers.{n}.{part}.weight" for n in range(spec.num_layers) for parts in cells.values() for part in parts
    ]
    b = {name: (random.standard_normal((len(hf[name]), RANK)) * scale).astype(np.float32) for name in names}
    of_b = fused(hf | b, spec, qkv, gate_up)
    saved, parts = {}, {}
    for layer in range(spec.num_layers):
        for cell, modules in cells.items():
            weights = [f"model.layers.{layer}.{module}.weight" for module in modules]
            a = random.standard_normal((RANK, hf[weights[0]].shape[1])).astype(np.float32)
            name = f"decoder.layers.{layer}.{cell}"
            suffixes = (".lora_a", ".lora_b") if pynative else (".lora_A.weight", ".lora_B.weight")
            saved |= {name + suffixes[0]: a, name + suffixes[1]: of_b[f"{name}.weight"]}
            parts |= {weight: (a, b[weight]) for weight in weights}
    return Lora(saved, parts)


def experts_lora(spec: ModelSpec, scale: float = 1.0) -> Lora:
    """An adapter of PyNative experts, as 2.1 names it."""
    random = np.random.default_rng(0)
    saved, parts = {}, {}
    experts, hidden, width = spec.num_experts, spec.hidden_size, spec.moe_ffn_hidden_size
    shapes = {
        "weight1_lora_a": (experts, hidden, RANK),
        "weight1_lora_b": (experts, RANK, 2 * width),
        "weight2_lora_a": (experts, width, RANK),
        "weight2_lora_b": (experts, RANK, hidden),
    }
    for layer in range(spec.num_layers):
        made = {name: (random.standard_normal(shape) * scale).astype(np.float32) for name, shape in shapes.items()}
        saved |= {f"decoder.layers.{layer}.mlp.experts.{name}": array for name, array in made.items()}
        for expert in range(experts):
            a1, b1, a2, b2 = (np.ascontiguousarray(array[expert].T) for array in made.values())
            name = f"model.layers.{layer}.mlp.experts.{expert}"
            parts |= {f"{name}.gate_proj.weight": (a1, b1[:width]), f"{name}.up_proj.weight": (a1, b1[width:])}
            parts[f"{name}.down_proj.weight"] = (a2, b2)
    return Lora(saved, parts)


def blocks(layout: Layout, tp: int = 1) -> tuple[int | None, int | None]:
    """In how many blocks a layout stores q, k, v, and gate, up; None: interleaved."""
    return (None if layout.interleaved_qkv else tp), (None if layout.interleaved_gate_up else tp)


def adapter_config(directory: Path, name: str = "adapter_config.json", **changes: Any) -> Path:
    """What MindFormers writes at the root of a run's output."""
    config = {
        "base_model_name_or_path": "none",
        "bias": "none",
        "lora_alpha": int(ALPHA),
        "lora_bias": False,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": RANK,
        "target_modules": str(PET_CONFIG["target_modules"]).split("|"),
        "task_type": "CAUSAL_LM",
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text(json.dumps(config | changes))
    return directory / name


def cut_axis(name: str) -> int | None:
    """The axis along which tensor parallel ranks cut a weight, or a matrix of its adapter."""
    is_column_parallel = any(cell in name for cell in COLUMN_PARALLEL)
    if ".lora_" in name:
        is_a = ".lora_A." in name or name.endswith(".lora_a")
        return (None if is_a else 0) if is_column_parallel else (1 if is_a else None)
    if is_column_parallel or "word_embeddings" in name or "output_layer" in name:
        return 0
    return 1 if name.endswith(("linear_proj.weight", "linear_fc2.weight")) else None


def save_lora_ranks(directory: Path, whole: Tensors, tp: int) -> Ranks:
    """What the ranks of a tensor parallel run with LoRA save, below a run's output directory."""
    for rank in range(tp):
        mine = {}
        for name, array in whole.items():
            axis = cut_axis(name)
            mine[name] = array if axis is None else np.split(array, tp, axis)[rank]
        save_rank(directory / "checkpoint", rank, mine | COUNTER)

    def sharding(name: str, array: np.ndarray) -> Sharding:
        return Sharding((tp,), tuple(0 if axis == cut_axis(name) else -1 for axis in range(array.ndim)))

    return Ranks(directory / "checkpoint", [{name: sharding(name, array) for name, array in whole.items()}])
