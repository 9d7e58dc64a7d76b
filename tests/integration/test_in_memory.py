"""Weights that go from network to network without files: the same bits as by way of files, or an error."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from safetensors.numpy import load_file

import mf_qwen3_bridge
from mf_qwen3_bridge.errors import BridgeError
from mf_qwen3_bridge.mindformers.load import load_network
from mf_qwen3_bridge.model.parallel import ParallelConfig
from tests.support.checkpoints import LAYOUTS, hf_config, random_tensors, write
from tests.support.commands import ROOT, run_command
from tests.support.golden import CHECKPOINTS
from tests.support.networks import DENSE as DENSE_SPEC
from tests.support.networks import MOE as MOE_SPEC
from tests.support.networks import bits, empty_network, playing
from tests.support.training import job


def tensors_of(directory: Path) -> dict[str, np.ndarray]:
    return {name: value for file in sorted(directory.glob("*.safetensors")) for name, value in load_file(file).items()}


@pytest.mark.parametrize("name", ["untied_fp32", "moe_fp32", "tied_bf16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_networks_weights_have_their_names_and_bits(name: str, dtype: str):
    network = mf_qwen3_bridge.from_pretrained(CHECKPOINTS / name, params_dtype=dtype)
    expected = tensors_of(CHECKPOINTS / name)
    found = mf_qwen3_bridge.weights(network)
    assert isinstance(found, Iterator)
    names = set()
    for tensor, array in found:
        names.add(tensor)
        assert array.tobytes() == expected[tensor].astype(array.dtype).tobytes(), tensor
    assert names == expected.keys() - ({"lm_head.weight"} if name.startswith("tied") else set())


@pytest.mark.parametrize("name", ["untied_fp32", "moe_fp32", "tied_bf16"])
def test_from_network_to_network(name: str):
    first = mf_qwen3_bridge.from_pretrained(CHECKPOINTS / name)
    second, _ = empty_network(CHECKPOINTS / name)
    mf_qwen3_bridge.load(second, mf_qwen3_bridge.weights(first))
    assert bits(second) == bits(first)


CASES = [
    *((DENSE_SPEC, ParallelConfig(size)) for size in (2, 4, 8)),
    *((MOE_SPEC, ParallelConfig(*sizes)) for sizes in ((2, 1), (2, 2), (4, 2), (1, 2, 2), (1, 4, 4))),
]


@pytest.mark.parametrize(("spec", "parallel"), CASES, ids=lambda value: str(value)[:40])
def test_the_slices_of_a_rank_load_into_its_like(monkeypatch, tmp_path: Path, spec, parallel):
    tensors = random_tensors(spec)
    directory = write(tmp_path, tensors, hf_config(spec))
    for number in range(parallel.world_size):
        with playing(monkeypatch, parallel, number):
            expected, model = empty_network(directory)
            load_network(expected, model)
            from_whole, from_slices = (empty_network(directory)[0] for _ in range(2))
            mf_qwen3_bridge.load(from_whole, tensors)
            slices = dict(mf_qwen3_bridge.weights(expected))
            mf_qwen3_bridge.load(from_slices, reversed(slices.items()))
            assert bits(from_whole) == bits(from_slices) == bits(expected)
            assert slices["lm_head.weight"].shape[0] == spec.vocab_size // parallel.tensor_parallel
            name = "model.layers.1.self_attn.o_proj.weight"
            step = tensors[name].shape[1] // parallel.tensor_parallel
            first = number % parallel.tensor_parallel * step
            assert np.array_equal(slices[name], tensors[name][:, first : first + step])


def test_from_training_to_inference_and_back(tmp_path: Path):
    default, *_, contiguous = LAYOUTS
    cases = [*(("untied_fp32", layout) for layout in LAYOUTS), ("moe_fp32", default), ("moe_fp32", contiguous)]
    cases += [(name, default) for name in ("tied_bf16", "one_kv_head", "moe_fused")]
    file = tmp_path / "jobs.json"
    file.write_text(json.dumps([job(name, layout, layout, tmp_path) for name, layout in cases]))
    command = [sys.executable, "-m", "tests.integration.in_memory_worker", file]
    result = run_command(command, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert "moved" in result.stdout


@pytest.fixture(scope="module")
def network():
    return empty_network(CHECKPOINTS / "untied_fp32")[0]


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {k: v for k, v in w.items() if k != UP}, r"layers\.1\.mlp\.up_proj.*missing"),
        (lambda w: w | {"model.extra": w[UP]}, r"model\.extra.*not a tensor of this model"),
        (lambda w: w | {UP: w[UP].T.copy()}, "up_proj.*expected"),
        (lambda w: w | {UP: np.zeros_like(w[UP])}, "all zero"),
        (lambda w: w | {UP: np.full_like(w[UP], np.nan)}, "NaN"),
        (lambda w: w | {UP: w[UP].astype(np.int32)}, "dtype I32"),
        (lambda w: [*w.items(), (UP, w[UP])], "twice"),
    ],
)
def test_what_does_not_fit_is_refused(network, change, message):
    with pytest.raises(BridgeError) as refused:
        mf_qwen3_bridge.load(network, change(tensors_of(CHECKPOINTS / "untied_fp32")))
    assert re.search(message, str(refused.value), re.DOTALL)


def test_a_tied_output_layer_has_to_be_the_embedding():
    network, _ = empty_network(CHECKPOINTS / "tied_bf16")
    tensors = tensors_of(CHECKPOINTS / "tied_bf16")
    output = tensors["model.embed_tokens.weight"]
    mf_qwen3_bridge.load(network, {"lm_head.weight": output} | tensors)
    with pytest.raises(BridgeError, match="tied tensors differ"):
        mf_qwen3_bridge.load(network, {"lm_head.weight": output[::-1].copy()} | tensors)


def test_parameters_that_are_no_such_models(network, monkeypatch):
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    found = network.parameters_dict()
    halves = dict(found) | {name: ms.Parameter(found[name].asnumpy()[::2].copy(), name=name)}
    monkeypatch.setattr(network, "parameters_dict", lambda: halves)
    with pytest.raises(BridgeError, match="divided otherwise"):
        next(mf_qwen3_bridge.weights(network))
