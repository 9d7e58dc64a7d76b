"""PEFT adapters: the committed ones with what PEFT computes with them, and others made on the spot."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.support.golden import CHECKPOINTS, FIXTURES, Golden

ADAPTERS = FIXTURES / "adapters"
NAMES = sorted(path.parent.name for path in ADAPTERS.glob("*/golden.npz"))
PREFIX = "base_model.model."


def config_of(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((ADAPTERS / name / "adapter_config.json").read_text())
    return document


def base_of(name: str) -> Path:
    return CHECKPOINTS / config_of(name)["base_model_name_or_path"]


def adapter_golden(name: str) -> list[Golden]:
    """What transformers computes with the base and the adapter that PEFT loaded, see tests/support/golden.py."""
    with np.load(ADAPTERS / name / "golden.npz") as archive:
        return [
            Golden(archive[f"prompt_{i}"].tolist(), archive[f"logits_{i}"], archive[f"tokens_{i}"].tolist())
            for i in range(sum(key.startswith("prompt") for key in archive))
        ]


def write_adapter(directory: Path, tensors: Mapping[str, np.ndarray], **config: Any) -> Path:
    """An adapter as PEFT saves it."""
    directory.mkdir(parents=True, exist_ok=True)
    document = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 6, "bias": "none", **config}
    (directory / "adapter_config.json").write_text(json.dumps(document))
    save_file({PREFIX + name: value for name, value in tensors.items()}, directory / "adapter_model.safetensors")
    return directory


def read_adapter(directory: Path) -> dict[str, np.ndarray]:
    """An adapter's tensors, by their modules' names in transformers."""
    tensors = load_file(directory / "adapter_model.safetensors")
    return {name.removeprefix(PREFIX): value for name, value in tensors.items()}


def matrices(hf: Mapping[str, np.ndarray], *ends: str, rank: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
    """Random A and B for each weight whose module's name ends so."""
    random = np.random.default_rng(seed)
    made = {}
    for name in (name for name in hf if name.removesuffix(".weight").endswith(ends)):
        rows, columns = hf[name].shape
        module = name.removesuffix(".weight")
        made[f"{module}.lora_A.weight"] = random.standard_normal((rank, columns)).astype(np.float32)
        made[f"{module}.lora_B.weight"] = random.standard_normal((rows, rank)).astype(np.float32)
    return made


def delta(tensors: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """B @ A of a weight, float64."""
    a, b = (tensors[f"{name.removesuffix('.weight')}.lora_{side}.weight"].astype(np.float64) for side in "AB")
    product: np.ndarray = b @ a
    return product
