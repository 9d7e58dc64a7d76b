"""Checkpoints made on the spot: tiny ones with random weights, and real sizes of which only the headers exist."""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from mf_qwen3_bridge.inputs.opening import open_source
from mf_qwen3_bridge.model.layouts import Layout
from mf_qwen3_bridge.model.rules import HF, Dialect, model_rules
from mf_qwen3_bridge.model.spec import HF_NAME, ModelSpec
from mf_qwen3_bridge.transfer.safetensors import DTYPES, TensorInfo, read_bytes

SPEC = ModelSpec(
    num_layers=2,
    hidden_size=12,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=4,
    ffn_hidden_size=10,
    vocab_size=16,
    tie_word_embeddings=False,
)
MOE_SPEC = replace(SPEC, ffn_hidden_size=0, num_experts=4, moe_ffn_hidden_size=6)
NUMPY = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
Tensors = dict[str, np.ndarray]
LAYOUTS = [Layout(*flags) for flags in itertools.product([True, False], repeat=2)]


def hf_config(spec: ModelSpec = SPEC, **changes: Any) -> dict[str, Any]:
    """A config.json as the Hub has it."""
    kind: dict[str, Any] = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    if spec.is_moe:
        kind = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
        kind |= {"num_experts_per_tok": 2, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
    return {
        **kind,
        "hidden_act": "silu",
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "rope_scaling": None,
        "torch_dtype": "float32",
        **{HF_NAME[field]: value for field, value in spec.numbers.items()},
        **changes,
    }


def random_tensors(spec: ModelSpec = SPEC, dialect: Dialect = HF, dtype: str = "F32", seed: int = 0) -> Tensors:
    """Random weights under the dialect's names; no two elements of a tensor are alike, in float32."""
    random = np.random.default_rng(seed)
    shapes = {place.tensor: place.shape for rule in model_rules(spec) for place in rule.places(dialect)}
    return {
        name: random.standard_normal(shape).astype(np.float32).astype(NUMPY[dtype]) for name, shape in shapes.items()
    }


def write(
    directory: Path,
    tensors: Mapping[str, np.ndarray],
    config: Mapping[str, Any] | None = None,
    shards: int = 1,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """A Hugging Face directory; with several shards the tensors are distributed in turn, and there is an index."""
    directory.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    metadata = {"format": "pt", **(metadata or {})}
    if shards == 1:
        save_file(dict(tensors), directory / "model.safetensors", metadata)
        return directory
    names: Sequence[str] = list(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        mine = names[shard::shards]
        save_file({name: tensors[name] for name in mine}, directory / file, metadata)
        weight_map |= dict.fromkeys(mine, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def read(tensor: TensorInfo) -> np.ndarray:
    """All of a tensor on disk."""
    return np.frombuffer(read_bytes(tensor), DTYPES[tensor.dtype]).reshape(tensor.shape)


def write_headers(
    directory: Path, spec: ModelSpec, config: Mapping[str, Any], shards: int, dtype: str = "BF16"
) -> Path:
    """A Hugging Face directory of any size: real headers, and sparse files of the right length behind them."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    shapes = {place.tensor: place.shape for rule in model_rules(spec) for place in rule.places(HF)}
    names = list(shapes)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        header: dict[str, Any] = {}
        end = 0
        for name in names[shard * len(names) // shards : (shard + 1) * len(names) // shards]:
            begin, end = end, end + int(np.prod(shapes[name])) * NUMPY[dtype].itemsize
            header[name] = {"dtype": dtype, "shape": shapes[name], "data_offsets": [begin, end]}
            weight_map[name] = file
        encoded = json.dumps(header).encode()
        with (directory / file).open("wb") as stream:
            stream.write(struct.pack("<Q", len(encoded)) + encoded)
            stream.truncate(8 + len(encoded) + end)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def contents(directory: Path) -> Tensors:
    """All tensors of a directory, by name."""
    return {name: read(tensor) for name, tensor in open_source(directory).tensors.items()}


def assert_same(left: Mapping[str, np.ndarray], right: Mapping[str, np.ndarray]) -> None:
    """The same names, dtypes and bits."""
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert left[name].tobytes() == right[name].tobytes(), name
