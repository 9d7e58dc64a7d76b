"""FP8 and INT8 checkpoints in MindFormers' networks: the bits, logits and tokens of the dequantised weights."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindformers.models.qwen3.configuration_qwen3 import Qwen3Config
from mindformers.parallel_core.inference.model_utils import InferModelMixin

import mf_qwen3_bridge
from mf_qwen3_bridge.convert.jobs import to_plain_hf
from mf_qwen3_bridge.convert.run import run
from mf_qwen3_bridge.errors import BridgeError
from mf_qwen3_bridge.inputs.preflight import check
from mf_qwen3_bridge.mindformers.network import build_inference_network
from mf_qwen3_bridge.mindformers.patching.configs import normalise_model_config
from mf_qwen3_bridge.mindformers.patching.hooks import fill_network, qwen3_network
from mf_qwen3_bridge.model.rules import INFER
from tests.support.commands import ROOT, run_command
from tests.support.documents import commands
from tests.support.golden import CHECKPOINTS, QUANTISED, QUANTISED_NAMES, TOLERANCE, golden
from tests.support.networks import SMALL_CACHE, bits, empty_network, greedy_tokens, logits_error
from tests.support.tokenizers import with_tokenizer

EVERY = pytest.mark.parametrize("name", QUANTISED_NAMES)


@EVERY
@pytest.mark.parametrize("params_dtype", ["float32", "bfloat16"])
def test_three_loaders_agree(tmp_path: Path, name, params_dtype):
    """In float32 what is computed is not rounded to bfloat16 first: upstream's is given a float32 directory then."""
    directory = QUANTISED / name
    direct = mf_qwen3_bridge.from_pretrained(directory, params_dtype=params_dtype)
    delegated = mf_qwen3_bridge.from_pretrained(directory, use_training_conversion=True, params_dtype=params_dtype)
    run(to_plain_hf(check(directory), tmp_path / "plain", "fp32" if params_dtype == "float32" else None))
    upstream, _ = empty_network(tmp_path / "plain", params_dtype=params_dtype)
    untouched = bits(upstream)
    InferModelMixin.load_weights(upstream, str(tmp_path / "plain"))
    assert bits(direct) == bits(delegated) == bits(upstream) != untouched


@EVERY
def test_logits_and_greedy_tokens_are_transformers(name, tmp_path: Path):
    """Of the weights that the library dequantised, in bfloat16; computed with in float32."""
    run(to_plain_hf(check(QUANTISED / name), tmp_path))
    network = mf_qwen3_bridge.from_pretrained(tmp_path, device_target="CPU", **SMALL_CACHE)
    expected = golden(name, QUANTISED)
    assert logits_error(network, expected) < TOLERANCE
    assert greedy_tokens(network, [g.prompt for g in expected]) == [g.tokens for g in expected]


@pytest.mark.parametrize("name", ["fp8_dense", "fp8_moe", "int_rows_moe"])
def test_a_network_in_bfloat16_has_the_weights_of_the_goldens(name):
    """Straight from the quantised files; unit tests hold these weights to the digests."""
    network = mf_qwen3_bridge.from_pretrained(QUANTISED / name, device_target="CPU", params_dtype="bfloat16")
    plain = {target.name: target.make() for target in check(QUANTISED / name).plan(INFER).targets}
    for key, parameter in network.parameters_dict().items():  # upstream keeps norms and routers in float32
        held = parameter.asnumpy().astype(np.float32)
        assert held.tobytes() == plain[key].astype(np.float32).tobytes(), key


@pytest.mark.parametrize("name", ["fp8_dense", "fp8_moe_stacked"])
def test_hooks_load_it(tmp_path: Path, name):
    """``load_weights`` of a patched class, and online loading for training and prediction, which share a function."""
    directory = QUANTISED / name
    expected = mf_qwen3_bridge.from_pretrained(directory, device_target="CPU")
    mf_qwen3_bridge.patch()
    for load in (
        lambda network: network.load_weights(str(directory)),
        lambda network: fill_network(network, directory),
    ):
        network, _ = empty_network(directory)
        load(network)
        assert bits(network) == bits(expected)


def test_load_checkpoint_dequantises():
    directory = QUANTISED / "fp8_moe"
    parameters, model = mf_qwen3_bridge.load_checkpoint(directory), check(directory)
    weights = {target.name: target.make().tobytes() for target in model.plan(model.dialect).targets}
    assert {name: parameter.asnumpy().tobytes() for name, parameter in parameters.items()} == weights
    network, _ = empty_network(directory, params_dtype="bfloat16")
    mf_qwen3_bridge.patch()
    ms.load_param_into_net(network, network.convert_weight_dict(parameters))
    assert bits(network) == bits(mf_qwen3_bridge.from_pretrained(directory, params_dtype="bfloat16"))
    with pytest.raises(BridgeError, match="is loaded whole"):
        mf_qwen3_bridge.load_checkpoint(directory, filter_prefix="model")


def test_the_method_that_mindformers_takes_from_config_json_is_dropped(tmp_path: Path):
    """``build_model_config`` of upstream sets ``quantization: fp8`` where config.json has a quantization_config."""
    directory = QUANTISED / "fp8_dense"
    config = json.loads((directory / "config.json").read_text())
    merged = config | {"pretrained_model_dir": str(directory), "quantization": "fp8"}
    normalised = normalise_model_config(merged)
    assert not normalised.keys() & {"quantization", "quantization_config"}
    assert normalise_model_config(merged | {"quantization": "golden-stick"})["quantization"] == "golden-stick"
    mf_qwen3_bridge.patch()
    built = Qwen3Config(**merged)
    assert built.quantization is None and built.quantization_config is None


def test_a_network_that_is_itself_quantised_is_left_to_upstream(tmp_path: Path, monkeypatch):
    """Built by upstream with ``quantization: golden-stick``, which says of each layer how it is stored."""
    directory = tmp_path / "modelslim"
    shutil.copytree(CHECKPOINTS / "untied_fp32", directory)
    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    parts += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    names = [f"model.layers.{layer}.{part}.weight" for layer in range(2) for part in parts]
    description = dict.fromkeys([*names, "lm_head.weight"], "FLOAT") | {"model_quant_type": "W8A8_DYNAMIC"}
    (directory / "quant_model_description.json").write_text(json.dumps(description))
    mf_qwen3_bridge.patch()
    options = {"quantization": "golden-stick", "pretrained_model_dir": str(directory)}
    network = build_inference_network(check(directory).hf_config | options, device_target="CPU")
    assert network.quant_config is not None
    assert qwen3_network(network) is None  # so that no other hook takes it
    network.load_weights(str(directory))
    mf_qwen3_bridge.unpatch()
    assert bits(network) == bits(mf_qwen3_bridge.from_pretrained(directory))
    calls = []
    monkeypatch.setattr(InferModelMixin, "load_weights", lambda *arguments: calls.append(arguments))
    mf_qwen3_bridge.patch()
    network.load_weights(str(directory))
    assert calls == [(network, str(directory), None)]


def test_a_damaged_scale_stops_everything(tmp_path: Path):
    directory = tmp_path / "damaged"
    shutil.copytree(QUANTISED / "fp8_dense", directory)
    file = directory / "model.safetensors"
    content = bytearray(file.read_bytes())
    tensor = check(directory).source.stored["model.layers.0.self_attn.q_proj.weight_scale_inv"]
    content[tensor.start : tensor.start + 4] = np.float32(-1).tobytes()
    file.write_bytes(content)
    for attempt in (mf_qwen3_bridge.from_pretrained, mf_qwen3_bridge.load_checkpoint):
        with pytest.raises(BridgeError, match="negative"):
            attempt(directory)


def test_a_weight_byte_that_is_nan_stops_loading(tmp_path: Path):
    directory = tmp_path / "damaged"
    shutil.copytree(QUANTISED / "fp8_dense", directory)
    file = directory / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[check(directory).source.stored["model.layers.0.self_attn.q_proj.weight"].start] = 0x7F
    file.write_bytes(content)
    for use in (False, True):
        with pytest.raises(BridgeError, match=r"NaN or infinity: model\.layers\.0\.self_attn\.q_proj\.weight"):
            mf_qwen3_bridge.from_pretrained(directory, use_training_conversion=use)


def test_the_command_of_the_page_that_needs_mindformers(tmp_path: Path):
    """docs/quantised.md; the others are run by the unit tests."""
    page = (ROOT / "docs" / "quantised.md").read_text(encoding="utf-8")
    (command,) = (words for words in commands(page) if words[1] == "infer")
    with_tokenizer("fp8_dense", tmp_path, QUANTISED).rename(tmp_path / "Qwen3-8B-FP8")
    for more in ([], ["--use_training_conversion"]):
        result = run_command([sys.executable, "-m", "mf_qwen3_bridge.cli", *command[1:], *more], tmp_path)
        assert result.returncode == 0, result.stderr[-3000:]
        assert "quantised   FP8 (E4M3), blocks of 16 x 16" in result.stdout
        assert "-> t" in result.stdout
