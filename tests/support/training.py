"""Builds MindFormers' training networks, and runs its trainer, on a CPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from mindformers.models.qwen3.configuration_qwen3 import Qwen3Config
from mindformers.models.qwen3.modeling_qwen3_train import TrainingQwen3ForCausalLM
from mindformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from mindformers.models.qwen3_moe.modeling_qwen3_moe_train import TrainingQwen3MoeForCausalLM

import mf_qwen3_bridge
import yaml
from mf_qwen3_bridge.convert.jobs import to_mindformers
from mf_qwen3_bridge.convert.run import run
from mf_qwen3_bridge.inputs.preflight import check
from mf_qwen3_bridge.mindformers.cpu.device import predict_environment
from mf_qwen3_bridge.mindformers.network import _predict_context, network_logits
from mf_qwen3_bridge.model.layouts import Layout
from mf_qwen3_bridge.model.parallel import SINGLE
from mf_qwen3_bridge.model.rules import Dialect
from tests.support.commands import REGISTER_PATH, ROOT, TRAINER, run_command
from tests.support.golden import CHECKPOINTS, golden
from tests.support.networks import SMALL_CACHE

CLASSES = {"qwen3": (Qwen3Config, TrainingQwen3ForCausalLM), "qwen3_moe": (Qwen3MoeConfig, TrainingQwen3MoeForCausalLM)}
FLOAT32 = dict.fromkeys(
    ("params_dtype", "compute_dtype", "layernorm_compute_dtype", "softmax_compute_dtype", "rotary_dtype"), "float32"
)


def training_network(directory: Path, layout: Layout, **options: Any) -> Any:
    """Upstream's training network, as its config class and a YAML's ``model_config`` make it."""
    with predict_environment("CPU"), _predict_context("CPU", SINGLE):
        pass  # the context stays, is not use_legacy, and is shared with the other tests
    hf_config = check(directory).hf_config
    config_class, network_class = CLASSES[hf_config["model_type"]]
    declared = {"params_dtype": "float32", "compute_dtype": "float32", "moe_grouped_gemm": True}
    declared |= {"seq_length": 64} | layout.training_flags  # the mask of 4096 tokens, 64 MiB, stays in the process
    return network_class(config_class(**hf_config | declared | options))


def job(name: str, of_weights: Layout, of_network: Layout, scratch: Path) -> dict[str, Any]:
    """What training_worker.py needs: a fixture, and a network that takes its weights to be laid out so.

    Where both layouts are one, the network is filled online from the Hugging Face directory. Else the weights are
    converted, and loaded without looking.
    """
    expected = golden(name)
    length = max(len(g.prompt) for g in expected)
    directory = scratch / f"{name}-{of_weights}-{of_network}"
    if of_weights != of_network:
        run(to_mindformers(check(CHECKPOINTS / name), Dialect(of_weights), directory))
    return {
        "hf_dir": str(CHECKPOINTS / name),
        "config": FLOAT32 | of_network.training_flags | {"seq_length": length},
        "converted": str(directory) if of_weights != of_network else None,
        "tokens": [g.prompt + [0] * (length - len(g.prompt)) for g in expected],
        "output": f"{directory}.npy",
    }


def run_trainer(directory: Path, scratch: Path, learning_rate: float = 1e-3, **entries: Any) -> tuple[int, str]:
    """Upstream's trainer, straight from a Hugging Face directory: its exit code, and what it prints."""
    document = yaml.safe_load((ROOT / "yaml" / "cpu" / "finetune_qwen3.yaml").read_text()) | entries
    document["pretrained_model_dir"] = str(directory)
    document["lr_schedule"]["learning_rate"] = learning_rate
    config = scratch / "finetune.yaml"
    config.write_text(yaml.safe_dump(document))
    data = [ROOT / "demo" / "make_training_data.py", "--model_dir", directory, "--output", "output/training.mindrecord"]
    run_command([sys.executable, *data], scratch).check_returncode()
    command = [sys.executable, TRAINER, "--config", config, "--register_path", REGISTER_PATH]
    result = run_command(command, scratch)
    return result.returncode, result.stdout + result.stderr


def batch_loss(directory: Path, rows: list[dict[str, np.ndarray]]) -> float:
    """What the inference network says of a batch: the mean of all tokens' cross entropies."""
    network = mf_qwen3_bridge.from_pretrained(directory, device_target="CPU", **SMALL_CACHE)
    entropies = []
    for row in rows:
        logits = network_logits(network, row["input_ids"].tolist()).astype(np.float64)
        likelihoods = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        entropies.append(-likelihoods[np.arange(len(logits)), row["labels"]])
    return float(np.mean(entropies))
