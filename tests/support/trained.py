"""Makes what MindFormers' training leaves, merged or of ranks, by hand: numpy, and no rule of the bridge."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from safetensors.numpy import save_file

import yaml
from mf_qwen3_bridge.errors import BridgeError
from mf_qwen3_bridge.inputs.rank_files import Sharding, open_rank_files
from mf_qwen3_bridge.inputs.source import Source as OpenedSource
from mf_qwen3_bridge.model.spec import ModelSpec
from tests.support.checkpoints import MOE_SPEC, NUMPY, SPEC, Tensors

# As many rows as SPEC, in other heads: four groups tell interleaved rows from those of two ranks.
GROUPS = replace(SPEC, num_attention_heads=8, num_query_groups=4, head_dim=2)
TIED = replace(SPEC, tie_word_embeddings=True)
KINDS = {"qwen3": SPEC, "qwen3-moe": MOE_SPEC}
NUMBERS = {
    "qwen3": {
        "num_layers": 2,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 4,
        "hidden_size": 12,
        "ffn_hidden_size": 10,
    },
    "qwen3-moe": {
        "num_layers": 2,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 4,
        "num_routed_experts": 4,
        "hidden_size": 12,
        "moe_ffn_hidden_size": 6,
    },
}
# Of a training YAML, beside the numbers: all that a config.json holds.
COMPUTED: dict[str, Any] = {"max_position_embeddings": 256, "rms_norm_eps": "1e-5", "rope_theta": 5000000}
COMPUTED_MOE = {**COMPUTED, "num_experts_per_tok": 3, "norm_topk_prob": True}
CONTIGUOUS = {"use_contiguous_weight_layout_attention": True, "use_interleaved_weight_layout_mlp": False}


def training_yaml(path: Path, model_config: Mapping[str, Any], **document: Any) -> Path:
    document = {"run_mode": "finetune", **document, "model": {"model_config": dict(model_config)}}
    path.write_text(yaml.safe_dump(document))
    return path


def on_ranks(tensor_parallel: int) -> dict[str, Any]:
    return {"use_parallel": True, "parallel_config": {"data_parallel": 4, "model_parallel": tensor_parallel}}


def write_config(directory: Path, config: Mapping[str, Any], **companions: str) -> Path:
    """A Hugging Face directory without weights."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    for name, text in companions.items():
        (directory / f"{name}.json").write_text(text)
    return directory


def write_merged(
    directory: Path, tensors: Mapping[str, np.ndarray], files: int = 1, metadata: Mapping[str, str] | None = None
) -> Path:
    """A merged training checkpoint, as ``mindspore.unified_safetensors`` writes it."""
    directory.mkdir(parents=True, exist_ok=True)
    names, weight_map = list(tensors), {}
    for number in range(files):
        mine = names[number::files]
        file = f"part{number}.safetensors"
        save_file({name: tensors[name] for name in mine}, directory / file, {"format": "ms", **(metadata or {})})
        weight_map |= dict.fromkeys(mine, file)
    (directory / "param_name_map.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def in_blocks(parts: list[np.ndarray], count: int) -> np.ndarray:
    """Each part in ``count`` blocks: the first of each, then the second of each."""
    return np.concatenate([block for blocks in zip(*(np.split(part, count) for part in parts)) for block in blocks])


def fused(hf: Tensors, spec: ModelSpec = SPEC, qkv: int | None = None, gate_up: int | None = None) -> Tensors:
    """The training parameters of Hugging Face tensors, by hand: numpy, and no rule of the bridge.

    ``qkv``, ``gate_up``: in how many blocks their parts are stored; interleaved when left out.
    """
    made = {"embedding.word_embeddings.weight": hf["model.embed_tokens.weight"]}
    for layer in range(spec.num_layers):
        old, new = f"model.layers.{layer}", f"decoder.layers.{layer}"
        made |= {
            f"{new}.input_layernorm.weight": hf[f"{old}.input_layernorm.weight"],
            f"{new}.self_attention.linear_qkv.weight": in_blocks(
                [hf[f"{old}.self_attn.{part}_proj.weight"] for part in "qkv"], qkv or spec.num_query_groups
            ),
            f"{new}.self_attention.q_layernorm.weight": hf[f"{old}.self_attn.q_norm.weight"],
            f"{new}.self_attention.k_layernorm.weight": hf[f"{old}.self_attn.k_norm.weight"],
            f"{new}.self_attention.linear_proj.weight": hf[f"{old}.self_attn.o_proj.weight"],
            f"{new}.pre_mlp_layernorm.weight": hf[f"{old}.post_attention_layernorm.weight"],
        }
        if spec.is_moe:
            experts = [f"{old}.mlp.experts.{expert}" for expert in range(spec.num_experts)]
            pairs = [[hf[f"{expert}.{part}_proj.weight"] for part in ("gate", "up")] for expert in experts]
            made |= {
                f"{new}.mlp.router.weight": hf[f"{old}.mlp.gate.weight"],
                f"{new}.mlp.experts.weight1": np.concatenate([np.concatenate(pair).T for pair in pairs]),
                f"{new}.mlp.experts.weight2": np.concatenate([hf[f"{e}.down_proj.weight"].T for e in experts]),
            }
        else:
            halves = [hf[f"{old}.mlp.{part}_proj.weight"] for part in ("gate", "up")]
            made |= {
                f"{new}.mlp.linear_fc1.weight": in_blocks(halves, gate_up or spec.ffn_hidden_size),
                f"{new}.mlp.linear_fc2.weight": hf[f"{old}.mlp.down_proj.weight"],
            }
    made["decoder.final_layernorm.weight"] = hf["model.norm.weight"]
    if not spec.tie_word_embeddings:
        made["output_layer.weight"] = hf["lm_head.weight"]
    return {name: np.ascontiguousarray(array) for name, array in made.items()}


def in_bf16(tensors: Tensors) -> Tensors:
    return {name: array.astype(NUMPY["BF16"]) for name, array in tensors.items()}


def axis_that_is_cut(name: str) -> int | None:
    """By tensor parallel, in training."""
    if name.endswith(("linear_qkv.weight", "linear_fc1.weight", "word_embeddings.weight", "output_layer.weight")):
        return 0
    return 1 if name.endswith(("linear_proj.weight", "linear_fc2.weight")) else None


def of_rank(whole: Tensors, rank: int, tp: int, ep: int = 1) -> Tensors:
    mine = {}
    for name, array in whole.items():
        if ".experts." in name:
            array = np.split(array, ep)[rank % ep]
        elif (axis := axis_that_is_cut(name)) is not None:
            array = np.split(array, tp, axis)[rank % tp]
        mine[name] = array
    return mine


DOWN_PROJ, FC2 = "model.layers.1.mlp.down_proj.weight", "decoder.layers.1.mlp.linear_fc2.weight"


class Touch:
    """What a pickle can do to who loads it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("loaded").resolve(),)


COUNTER = {"global_step": np.array([1000], np.int32)}
TP2 = ((2,), 2)


def sharding_of(name: str, array: np.ndarray, device_matrix: tuple[int, ...]) -> Sharding:
    axis = axis_that_is_cut(name)
    return Sharding(device_matrix, tuple(0 if number == axis else -1 for number in range(array.ndim)))


def save_rank(directory: Path, rank: int, tensors: Tensors, suffix: str = "1000_1", **metadata: str) -> Path:
    file = directory / f"rank_{rank}" / f"qwen3_rank_{rank}-{suffix}.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = {name: np.array(array, order="C") for name, array in tensors.items()}
    save_file(whole, file, {"format": "ms", **metadata})
    return file


class Ranks(NamedTuple):
    """The folders of a run, and what its strategy files would say."""

    directory: Path
    strategies: list[dict[str, Sharding]]

    def open(self, file_suffix: str | None = None, **which: Any) -> OpenedSource:
        return open_rank_files(self.directory, self.strategies, file_suffix, **which)

    def refusal(self, file_suffix: str | None = None) -> str:
        with pytest.raises(BridgeError) as error:
            self.open(file_suffix)
        return str(error.value)


def save_ranks(
    directory: Path, whole: Tensors, run_of: tuple[tuple[int, ...], int] = TP2, has_redundancy: bool = True
) -> Ranks:
    """Tensor parallel 2; with redundancy removed each block is in one file only, in those of all ranks by turns."""
    device_matrix, devices = run_of
    for rank in range(devices):
        mine = {}
        for number, (name, array) in enumerate(of_rank(whole, rank, tp=2).items()):
            is_cut = axis_that_is_cut(name) is not None
            keeper = rank % 2 + 2 * (number % (devices // 2)) if is_cut else number % devices
            if has_redundancy or rank == keeper:
                mine[name] = array
        save_rank(directory, rank, mine | COUNTER, remove_redundancy=str(not has_redundancy))
    return Ranks(directory, [{name: sharding_of(name, array, device_matrix) for name, array in whole.items()}])


ADAM = ("adam_m", "adam_v")
