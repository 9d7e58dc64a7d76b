"""vLLM-MindSpore with the MindFormers backend: its plugin installs the hooks, and its call loads the weights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from mindformers.models.qwen3.modeling_qwen3_infer import InferenceQwen3ForCausalLM

import mf_qwen3_bridge
from mf_qwen3_bridge.mindformers.patching import configs, hooks
from tests.support.commands import ROOT, environment
from tests.support.golden import CHECKPOINTS, TOLERANCE, golden


def process(scratch: Path, name: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A process of vLLM-MindSpore, of which there is only the name: it counts as installed."""
    (scratch / "vllm_mindspore").mkdir()
    (scratch / "vllm_mindspore" / "__init__.py").touch()
    variables = environment() | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(scratch)])} | variables
    command = [sys.executable, ROOT / "tests" / "integration" / "vllm_worker.py", CHECKPOINTS / name]
    return subprocess.run(command, cwd=scratch, env=variables, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ["tied_bf16", "rope_parameters", "yarn", "moe_fused"])
def test_the_logits_of_transformers(tmp_path: Path, name: str):
    result = process(tmp_path, name)
    assert result.returncode == 0, result.stderr[-3000:]
    errors = [float(line.split()[1]) for line in result.stdout.splitlines() if line.startswith("error ")]
    assert len(errors) == len(golden(name))
    assert max(errors) < TOLERANCE


def test_without_the_plugin_it_is_upstream_that_loads(tmp_path: Path):
    result = process(tmp_path, "yarn", MF_QWEN3_VLLM_PLUGIN="0")
    assert result.returncode != 0
    assert "beta_slow" in result.stderr


def test_a_quantised_network_is_loaded_by_upstream():
    """MindFormers has the attribute where a config asks for one of its own methods; the rest needs an NPU."""

    class Quantised:
        quant_config = "golden-stick"

    calls, network = [], Quantised()
    hooks.wrap_load_weights(lambda *args: calls.append(args), network, "directory")
    assert calls == [(network, "directory", None)]


@pytest.mark.parametrize("method", ["ascend", "golden-stick"])
def test_the_config_of_a_quantised_network_is_upstreams(tmp_path: Path, method: str):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3", "quantization_config": {"bits": 8}}')
    config = {"pretrained_model_dir": str(tmp_path), "quantization": method, "num_hidden_layers": 2}
    assert configs.normalise_model_config(config) == config


def test_calling_the_plugin_again_changes_nothing():
    mf_qwen3_bridge.patch()
    before = InferenceQwen3ForCausalLM.load_weights
    mf_qwen3_bridge.patch()
    assert InferenceQwen3ForCausalLM.load_weights is before
