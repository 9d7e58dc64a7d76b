"""The network of MindFormers' PyNative trainer, filled from a Hugging Face directory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from mindformers.checkpoint import checkpoint

import mf_qwen3_bridge
from mf_qwen3_bridge.errors import BridgeError
from mf_qwen3_bridge.inputs.preflight import check
from mf_qwen3_bridge.mindformers import load_training
from mf_qwen3_bridge.mindformers.patching import hooks
from tests.support.commands import ROOT, environment
from tests.support.golden import CHECKPOINTS, TOLERANCE, golden

HYPER_PARALLEL = ROOT / "tests" / "hyper_parallel"
# MindFormers 2.x; earlier ones have the class, but not in the form that the empty HyperParallel will do for.
pytestmark = pytest.mark.skipif(
    not (Path(checkpoint.__file__).parents[1] / "pynative" / "base_models" / "gpt" / "parallelize.py").is_file(),
    reason="MindFormers 1.x: its PyNative trainer is another one",
)


@pytest.mark.parametrize("name", ["untied_fp32", "tied_bf16", "rope_parameters"])
def test_the_logits_of_transformers(tmp_path: Path, name: str):
    """HyperParallel is an empty package here, which a process that trains alone does not miss."""
    variables = environment() | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(HYPER_PARALLEL)])}
    command = [sys.executable, ROOT / "tests" / "integration" / "pynative_worker.py", CHECKPOINTS / name]
    result = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    errors = [float(line.split()[1]) for line in result.stdout.splitlines() if line.startswith("error ")]
    assert len(errors) == len(golden(name))
    assert max(errors) < TOLERANCE


def test_a_network_that_is_divided_is_refused(monkeypatch: pytest.MonkeyPatch):
    """Its parameters are HyperParallel's DTensors."""
    monkeypatch.setattr(load_training.GlobalComm, "INITED", True)
    monkeypatch.setattr(load_training, "get_group_size", lambda: 2)
    with pytest.raises(BridgeError, match="divided among processes"):
        load_training.load_pynative_network(None, check(CHECKPOINTS / "untied_fp32"))


def test_the_trainer_finds_the_hook_when_it_is_imported_later():
    if not hasattr(checkpoint, "load_hf_checkpoint"):
        pytest.skip("MindFormers before 1.9")
    upstream = checkpoint.load_hf_checkpoint
    mf_qwen3_bridge.patch()
    assert checkpoint.load_hf_checkpoint is hooks.HOOKS.installed[checkpoint, "load_hf_checkpoint"] is not upstream
