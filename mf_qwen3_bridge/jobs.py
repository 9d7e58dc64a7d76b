"""From a checked model to the directory that is to be made of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from mf_qwen3_bridge.convert import Job, Part
from mf_qwen3_bridge.errors import BridgeError
from mf_qwen3_bridge.files import HF_SHARD_BYTES, hf_files, mindformers_files
from mf_qwen3_bridge.hf_config import read_json
from mf_qwen3_bridge.plan import Plan
from mf_qwen3_bridge.preflight import Model
from mf_qwen3_bridge.recognise import LAYOUT_STAMP
from mf_qwen3_bridge.rules import EMBEDDING, HF, OUTPUT, Dialect

# What belongs to a model beside its weights and config.json, as transformers and the Hub name it.
_COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
# The names of dtypes on the command line, in safetensors and in a config.json.
DTYPE_NAMES = {"bf16": ("BF16", "bfloat16"), "fp16": ("F16", "float16"), "fp32": ("F32", "float32")}


def to_mindformers(model: Model, target: Dialect, output: Path, dtype: str | None = None) -> Job:
    """A MindFormers checkpoint.

    Args:
        model: the checkpoint it is made of, of any dialect.
        target: the dialect to make.
        output: the directory.
        dtype: ``bf16``, ``fp16`` or ``fp32``; as in the checkpoint when left out.
    """
    plan = model.plan(target, DTYPE_NAMES[dtype][0] if dtype else None)
    files, index = mindformers_files(plan)
    return Job(output, (Part(plan, files),), index, model.notes)


def to_hf(
    model: Model,
    output: Path,
    dtype: str | None = None,
    max_shard_bytes: int = HF_SHARD_BYTES,
    write_tied_output: bool = False,
) -> Job:
    """A Hugging Face checkpoint, with its config.json and tokenizer as far as they are known.

    Args:
        model: the MindFormers checkpoint it is made of.
        output: the directory.
        dtype: ``bf16``, ``fp16`` or ``fp32``; as in the checkpoint when left out.
        max_shard_bytes: a file is larger only if a single tensor is.
        write_tied_output: store ``lm_head`` although it is tied to the embedding.

    Raises:
        BridgeError: the checkpoint is Hugging Face's already.
    """
    if model.dialect.is_hf:
        raise BridgeError(f"{model.checkpoint.path} holds Hugging Face weights already")
    plan = model.plan(HF, DTYPE_NAMES[dtype][0] if dtype else None)
    if write_tied_output and model.spec.tie_word_embeddings:
        plan = _with_output_layer(plan)
    files, index = hf_files(plan, max_shard_bytes)
    config = _config_json(model, dtype)
    others = {file.name: file.read_bytes() for file in _companions(model)}
    if config:
        others["config.json"] = json.dumps(config, indent=2).encode()
    return Job(output, (Part(plan, files),), others | index, (*model.notes, *_export_notes(model, others)))


def _with_output_layer(plan: Plan) -> Plan:
    embedding = next(target for target in plan.targets if target.name == EMBEDDING[0])
    copies = tuple(replace(copy, target=OUTPUT[0]) for copy in embedding.copies)
    return replace(plan, targets=(*plan.targets, replace(embedding, name=OUTPUT[0], copies=copies)))


def _companions(model: Model) -> Iterator[Path]:
    return (file for name in _COMPANIONS if (file := model.hf_dir / name).is_file())


def _config_json(model: Model, dtype: str | None) -> dict[str, Any]:
    """The model's own config.json, or one made of what the YAML says; with the dtype that is written."""
    own = model.hf_dir / "config.json"
    config = read_json(own) if own.is_file() else dict(model.hf_config)
    if config and dtype:
        config["dtype" if "dtype" in config else "torch_dtype"] = DTYPE_NAMES[dtype][1]
    return config


def _export_notes(model: Model, others: dict[str, bytes]) -> Iterator[str]:
    if model.training_layout is None and LAYOUT_STAMP not in model.checkpoint.metadata:
        yield (
            f"the layout of QKV and gate/up is taken to be MindFormers' default ({model.dialect.layout}), because "
            "nothing says it. If the training YAML sets use_contiguous_weight_layout_attention or "
            "use_interleaved_weight_layout_mlp, give it with --config: the wrong layout computes garbage"
        )
    if "config.json" not in others:
        yield (
            "no config.json is written: rope_theta and the like are not known. Name the Hugging Face directory of the "
            "model with --hf_config, or copy its config.json and tokenizer"
        )
    elif "tokenizer_config.json" not in others:
        yield f"no tokenizer is written: there is none in {model.hf_dir}"
