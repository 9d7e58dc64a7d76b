"""``from_pretrained`` leaves the process as it found it, as far as MindFormers lets it."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
from mindformers import AutoConfig, set_context
from mindformers.models.qwen3.modeling_qwen3_infer import InferenceQwen3ForCausalLM

import mf_qwen3_bridge
from mf_qwen3_bridge.errors import BridgeError
from mf_qwen3_bridge.inputs.preflight import check
from mf_qwen3_bridge.mindformers import network as network_module
from mf_qwen3_bridge.mindformers.network import build_inference_network, network_logits
from mf_qwen3_bridge.model.parallel import ParallelConfig
from tests.support.commands import environment
from tests.support.golden import CHECKPOINTS, TOLERANCE, golden
from tests.support.networks import greedy_tokens, playing

VARIABLES = ("RUN_MODE", "ENFORCE_EAGER", "CPU_AFFINITY")


@pytest.mark.parametrize("before", [{}, {"RUN_MODE": "finetune", "ENFORCE_EAGER": "false", "CPU_AFFINITY": "False"}])
def test_the_environment_stays_and_generate_does_not_need_it(monkeypatch: pytest.MonkeyPatch, before: dict[str, str]):
    def found() -> dict[str, str]:
        return {name: os.environ[name] for name in VARIABLES if name in os.environ}

    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    network, first = mf_qwen3_bridge.from_pretrained(CHECKPOINTS / "untied_fp32"), golden("untied_fp32")[0]
    assert found() == before
    for _ in range(2):
        assert greedy_tokens(network, [first.prompt], 4) == [first.tokens[:4]]
        assert found() == before
        logits = network_logits(network, first.prompt)
        assert np.abs(logits - first.logits).max() < TOLERANCE * np.abs(first.logits).max()
        assert found() == before


def test_a_training_config_that_is_built_later_is_one(monkeypatch: pytest.MonkeyPatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    mf_qwen3_bridge.from_pretrained(CHECKPOINTS / "untied_fp32")
    mf_qwen3_bridge.patch()
    AutoConfig.from_pretrained(str(CHECKPOINTS / "yarn"))  # nothing says that it is to be trained
    set_context(run_mode="finetune")
    try:
        with pytest.raises(BridgeError, match="training network can't compute it"):
            AutoConfig.from_pretrained(str(CHECKPOINTS / "yarn"))
        mf_qwen3_bridge.from_pretrained(CHECKPOINTS / "yarn")
        with pytest.raises(BridgeError, match="training network can't compute it"):
            AutoConfig.from_pretrained(str(CHECKPOINTS / "yarn"))
    finally:
        set_context(run_mode="predict")


def test_training_after_inference_and_inference_after_training(tmp_path: Path):
    """In one process; the logits of the training network are those of a process of its own."""
    job = {
        "hf_dir": str(CHECKPOINTS / "moe_fp32"),
        "config": dict.fromkeys(
            ("params_dtype", "compute_dtype", "layernorm_compute_dtype", "softmax_compute_dtype", "rotary_dtype"),
            "float32",
        ),
        "converted": None,
        "tokens": [golden("moe_fp32")[0].prompt],
        "output": str(tmp_path / "logits.npy"),
    }
    job["config"]["seq_length"] = len(golden("moe_fp32")[0].prompt)
    (tmp_path / "jobs.json").write_text(json.dumps([job]))
    command = [sys.executable, "-m", "tests.integration.training_worker", "jobs.json", "--after_inference"]
    found = {name: value for name, value in environment().items() if name not in VARIABLES}
    result = subprocess.run(command, cwd=tmp_path, env=found, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    first = golden("moe_fp32")[0]
    logits = np.load(tmp_path / "logits.npy")[0]
    assert np.abs(logits - first.logits).max() < TOLERANCE * np.abs(first.logits).max()


def test_a_network_that_nobody_holds_gives_its_memory_back():
    """Its parameters may be tens of GB: they don't wait for the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        network = mf_qwen3_bridge.from_pretrained(CHECKPOINTS / "untied_fp32")
        alive = weakref.ref(network)
        del network
        assert alive() is None
    finally:
        gc.enable()
    prompt = [1, 2, 3]
    assert len(mf_qwen3_bridge.from_pretrained(CHECKPOINTS / "untied_fp32").generate([prompt], max_new_tokens=2)[0]) > 3


def sample(network: InferenceQwen3ForCausalLM, prompt: list[int]) -> list[int]:
    (output,) = network.generate(
        input_ids=[prompt], max_new_tokens=8, do_sample=True, temperature=5.0, top_k=0, top_p=1.0, eos_token_id=[-1]
    )
    return output.tolist()


def test_processes_of_a_parallel_run_draw_the_same_tokens_whatever_else_they_draw(monkeypatch: pytest.MonkeyPatch):
    """And numpy's generator, which upstream's sampling uses, stays the process's own."""
    model, prompt = check(CHECKPOINTS / "untied_fp32"), golden("untied_fp32")[0].prompt
    drawn = []
    for seed in (1, 2):
        network = mf_qwen3_bridge.from_pretrained(model.hf_dir, device_target="CPU")
        network_module.share_random_draws(network)  # as in a parallel run
        np.random.seed(seed)
        expected = np.random.RandomState(seed).rand(3).tolist()
        tokens = [sample(network, prompt)]
        assert np.random.rand() == expected[0]
        tokens.append(sample(network, prompt))
        assert np.random.rand(2).tolist() == expected[1:]
        assert tokens[0] != tokens[1]
        drawn.append(tokens)
    assert drawn[0] == drawn[1]


def test_a_parallel_run_shares_its_draws(monkeypatch: pytest.MonkeyPatch):
    model = check(CHECKPOINTS / "untied_fp32")
    shared = []
    monkeypatch.setattr(network_module, "share_random_draws", shared.append)
    before = np.random.get_state()[1].tolist()
    monkeypatch.setattr(network_module, "get_rank", lambda: 0)  # nothing else talks to other processes
    with playing(monkeypatch, ParallelConfig(2), 0):
        network = build_inference_network(model.hf_config, parallel=ParallelConfig(2))
    assert shared == [network]
    assert np.random.get_state()[1].tolist() == before
