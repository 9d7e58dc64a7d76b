"""Synthetic checkpoints of real shapes, which the benchmarks move."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np

from mf_qwen3_bridge.inputs.opening import open_source
from mf_qwen3_bridge.model.spec import ModelSpec
from mf_qwen3_bridge.transfer.safetensors import read_header
from tests.support.checkpoints import hf_config, write_headers

_NOISE_BYTES = 16 << 20
_B06 = ModelSpec(28, 1024, 16, 8, 128, 3072, 151936, True)
_B8 = ModelSpec(36, 4096, 32, 8, 128, 12288, 151936, False)
_B30 = ModelSpec(48, 2048, 32, 4, 128, 0, 151936, False, 128, 768)
_B235 = ModelSpec(94, 4096, 64, 4, 128, 0, 151936, False, 128, 1536)
MODELS = {
    "tiny": replace(_B06, num_layers=1, hidden_size=64, head_dim=16, ffn_hidden_size=128, vocab_size=512),
    "Qwen3-0.6B": _B06,
    "Qwen3-8B, 6 layers": replace(_B8, num_layers=6),
    "Qwen3-30B-A3B, 4 layers": replace(_B30, num_layers=4),
    "Qwen3-235B-A22B, 1 layer": replace(_B235, num_layers=1),
}


def make_checkpoint(work_dir: Path, model: str) -> Path:
    """A Hugging Face directory with random weights, none of them zero; it is made unless it is there already."""
    directory, spec = work_dir / directory_name(model), MODELS[model]
    if directory.is_dir():
        return directory
    partial = directory.with_name(f"{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    write_headers(partial, spec, hf_config(spec, max_position_embeddings=40960), shards=2)
    noise = np.random.default_rng(0).standard_normal(_NOISE_BYTES // 2).astype(ml_dtypes.bfloat16).view(np.uint8)
    for file in partial.glob("*.safetensors"):
        tensors, _ = read_header(file)
        first, end = min(tensor.start for tensor in tensors.values()), file.stat().st_size
        with file.open("r+b") as stream:
            stream.seek(first)
            for start in range(first, end, noise.size):
                stream.write(memoryview(noise)[: end - start])  # type: ignore[arg-type]
    return partial.rename(directory)


def directory_name(model: str) -> str:
    """The name of the directory of a model's checkpoint."""
    return model.replace(", ", "-").replace(" ", "-")


def title(model: str, directory: Path) -> str:
    """What a table calls a checkpoint: its model and its size."""
    return f"{model} ({open_source(directory).nbytes / 1e9:.1f} GB)"
