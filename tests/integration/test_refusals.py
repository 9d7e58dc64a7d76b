"""What only the bytes, or the network, can tell."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import mf_qwen3_bridge
from mf_qwen3_bridge.errors import BridgeError
from mf_qwen3_bridge.inputs.opening import open_source
from mf_qwen3_bridge.inputs.preflight import check
from mf_qwen3_bridge.inputs.source import LAYOUT_KEY
from mf_qwen3_bridge.mindformers.load import load_network
from mf_qwen3_bridge.model.rules import INFER
from tests.support.checkpoints import MOE_SPEC, SPEC, hf_config, random_tensors, write
from tests.support.commands import ROOT
from tests.support.golden import CHECKPOINTS
from tests.support.networks import empty_network

BOTH_ROADS = pytest.mark.parametrize("use_training_conversion", [False, True])


@BOTH_ROADS
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_nan_and_infinity(tmp_path: Path, use_training_conversion, value, dtype):
    tensors = random_tensors(dtype=dtype)
    tensors["model.layers.1.mlp.down_proj.weight"][2, 3] = value
    write(tmp_path, tensors, hf_config())
    with pytest.raises(BridgeError, match=r"NaN or infinity") as error:
        mf_qwen3_bridge.from_pretrained(tmp_path, use_training_conversion=use_training_conversion)
    (problem,) = error.value.problems
    assert problem.subject == "decoder.layers.1.mlp.linear_fc2.weight"
    assert "model.layers.1.mlp.down_proj.weight (model.safetensors)" in problem.found


@BOTH_ROADS
@pytest.mark.parametrize("expert", [0, 3])
def test_one_expert(tmp_path: Path, use_training_conversion, expert):
    """Of the experts that make a parameter, the faulty one is named; none may be all zero."""
    tensors = random_tensors(MOE_SPEC)
    zero, infinite = (f"model.layers.1.mlp.experts.{expert}.{part}_proj.weight" for part in ("up", "down"))
    tensors[zero][:] = 0
    tensors[infinite][1, 1] = -np.inf
    write(tmp_path, tensors, hf_config(MOE_SPEC))
    with pytest.raises(BridgeError) as error:
        mf_qwen3_bridge.from_pretrained(tmp_path, use_training_conversion=use_training_conversion)
    assert [problem.found for problem in error.value.problems] == [
        f"all zero: {zero} (model.safetensors)",
        f"NaN or infinity: {infinite} (model.safetensors)",
    ]


@BOTH_ROADS
def test_all_zero(tmp_path: Path, use_training_conversion):
    tensors = random_tensors()
    for layer in range(2):
        tensors[f"model.layers.{layer}.self_attn.o_proj.weight"][:] = 0
    write(tmp_path, tensors, hf_config())
    with pytest.raises(BridgeError, match="all zero") as error:
        mf_qwen3_bridge.from_pretrained(tmp_path, use_training_conversion=use_training_conversion)
    subjects = [problem.subject for problem in error.value.problems]
    assert subjects == [f"decoder.layers.{layer}.self_attention.linear_proj.weight" for layer in range(2)]


@BOTH_ROADS
def test_tied_by_the_config_but_not_by_the_weights(tmp_path: Path, use_training_conversion):
    write(tmp_path, random_tensors(), hf_config(tie_word_embeddings=True))
    with pytest.raises(BridgeError, match="tied"):
        mf_qwen3_bridge.from_pretrained(tmp_path, use_training_conversion=use_training_conversion)


def test_a_user_sees_one_message_and_exit_code_2(tmp_path: Path):
    """NaN is seen last of all that is refused."""
    shutil.copytree(ROOT / "demo" / "qwen3-demo", tmp_path / "demo")
    norm = open_source(tmp_path / "demo").tensors["model.norm.weight"]
    with norm.file.open("r+b") as stream:
        stream.seek(norm.start)
        stream.write(b"\xc0\x7f")  # a bfloat16 NaN
    command = [sys.executable, str(ROOT / "scripts" / "run_infer.py"), "--model_dir", str(tmp_path / "demo")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False, timeout=600)
    assert result.returncode == 2, result.stderr
    assert "NaN or infinity" in result.stderr
    assert norm.file.name in result.stderr
    assert "Traceback" not in result.stderr


def test_an_unknown_device():
    with pytest.raises(BridgeError, match="auto, Ascend or CPU"):
        mf_qwen3_bridge.from_pretrained(CHECKPOINTS / "untied_fp32", device_target="GPU")


def test_mindformers_weights_are_not_converted_again(tmp_path: Path):
    weights = write(tmp_path / "w", random_tensors(dialect=INFER), metadata={LAYOUT_KEY: str(INFER.layout)})
    (weights / "config.json").write_text("{}")
    model_dir = write(tmp_path / "hf", random_tensors(), hf_config())
    with pytest.raises(BridgeError, match="leave the flag out"):
        mf_qwen3_bridge.from_pretrained(model_dir, load_checkpoint=weights, use_training_conversion=True)


def test_a_network_of_another_config(tmp_path: Path):
    network, _ = empty_network(CHECKPOINTS / "untied_fp32")
    model = check(write(tmp_path, random_tensors(), hf_config()))
    with pytest.raises(BridgeError, match="does not fit the network") as error:
        load_network(network, model)
    assert {problem.subject for problem in error.value.problems} >= {"embedding.word_embeddings.weight"}


def test_the_argument_that_contradicts_the_weights():
    with pytest.raises(BridgeError, match="hidden_size"):
        mf_qwen3_bridge.from_pretrained(CHECKPOINTS / "untied_fp32", hidden_size=SPEC.hidden_size)


def test_attention_bias_is_refused_by_name():
    with pytest.raises(BridgeError, match="attention_bias"):
        mf_qwen3_bridge.from_pretrained(CHECKPOINTS / "attention_bias")
