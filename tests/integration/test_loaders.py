"""Three independent loaders fill the network with the same bits; its logits and tokens are those of transformers."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import pytest
from mindformers.parallel_core.inference.model_utils import InferModelMixin

import mf_qwen3_bridge
import yaml
from mf_qwen3_bridge.inputs.opening import open_source
from mf_qwen3_bridge.inputs.preflight import check
from mf_qwen3_bridge.inputs.source import LAYOUT_KEY
from mf_qwen3_bridge.mindformers.load import load_network
from mf_qwen3_bridge.model.layouts import Layout
from mf_qwen3_bridge.model.rules import HF, INFER, TRAIN, Dialect
from mf_qwen3_bridge.transfer.safetensors import Reader
from tests.support.checkpoints import hf_config, random_tensors, write
from tests.support.golden import CHECKPOINTS, NAMES, TOLERANCE, golden
from tests.support.networks import SMALL_CACHE, bits, empty_network, greedy_tokens, logits_error

EVERY_FIXTURE = pytest.mark.parametrize("name", NAMES)


def unstacked(directory: Path, scratch: Path) -> Path:
    """The fixture as upstream's ``load_weights`` can read it: of stacked experts it loads nothing, without a word."""
    return directory if directory.name != "moe_fused" else write(scratch, converted(directory, HF))


def converted(directory: Path, dialect: Dialect) -> dict:
    return {target.name: target.make() for target in check(directory).plan(dialect).targets}


@EVERY_FIXTURE
@pytest.mark.parametrize("params_dtype", ["float32", "bfloat16"])
def test_three_loaders_agree(tmp_path: Path, name, params_dtype):
    directory = CHECKPOINTS / name
    direct = mf_qwen3_bridge.from_pretrained(directory, params_dtype=params_dtype)
    delegated = mf_qwen3_bridge.from_pretrained(directory, use_training_conversion=True, params_dtype=params_dtype)
    upstream, _ = empty_network(directory, params_dtype=params_dtype)
    untouched = bits(upstream)
    InferModelMixin.load_weights(upstream, str(unstacked(directory, tmp_path)))
    assert bits(direct) == bits(delegated) == bits(upstream) != untouched


@EVERY_FIXTURE
def test_logits_and_greedy_tokens_are_transformers(name):
    """Four prompts of different lengths in one batch."""
    network = mf_qwen3_bridge.from_pretrained(CHECKPOINTS / name, device_target="CPU", **SMALL_CACHE)
    expected = golden(name)
    assert logits_error(network, expected) < TOLERANCE
    assert greedy_tokens(network, [g.prompt for g in expected]) == [g.tokens for g in expected]


@pytest.mark.parametrize("name", ["untied_fp32", "tied_bf16", "one_kv_head", "moe_bf16"])
@pytest.mark.parametrize("qkv", [True, False])
@pytest.mark.parametrize("gate_up", [True, False])
def test_a_training_checkpoint_is_loaded_in_the_layout_of_its_yaml(tmp_path: Path, name, qkv, gate_up):
    directory, layout = CHECKPOINTS / name, Layout(qkv, gate_up)
    weights = write(tmp_path / "unified_safe", converted(directory, Dialect(layout)), shards=2)
    (weights / "model.safetensors.index.json").rename(weights / "param_name_map.json")
    config = tmp_path / "train.yaml"
    document = {"run_mode": "finetune", "model": {"model_config": {"qkv_concat": True, **layout.training_flags}}}
    config.write_text(yaml.safe_dump(document))
    network = mf_qwen3_bridge.from_pretrained(directory, config=config, load_checkpoint=weights)
    assert bits(network) == bits(mf_qwen3_bridge.from_pretrained(directory))


def test_a_checkpoint_with_layout_metadata_needs_no_yaml(tmp_path: Path):
    directory = CHECKPOINTS / "untied_fp32"
    weights = write(tmp_path / "w", converted(directory, TRAIN), metadata={LAYOUT_KEY: str(TRAIN.layout)})
    network = mf_qwen3_bridge.from_pretrained(directory, load_checkpoint=weights)
    assert bits(network) == bits(mf_qwen3_bridge.from_pretrained(directory))


class TestTheTrap:
    """The naive recipe: the training layout loads without a word, and computes something else."""

    @EVERY_FIXTURE
    def test_the_training_layout_loads_and_is_wrong(self, tmp_path: Path, name):
        directory = CHECKPOINTS / name
        spec = check(directory).spec
        if spec.num_query_groups == 1 and not spec.is_moe:
            naive = Dialect(Layout(interleaved_qkv=False, interleaved_gate_up=True))  # one group: QKV has one layout
        else:
            naive = Dialect(Layout(interleaved_qkv=True, interleaved_gate_up=False))
        weights = write(tmp_path, converted(directory, naive), metadata={LAYOUT_KEY: str(INFER.layout)})
        network = mf_qwen3_bridge.from_pretrained(directory, load_checkpoint=weights)  # the metadata is wrong
        assert logits_error(network, golden(name)) > 0.1

    def test_what_upstreams_load_weights_reads_is_the_training_layout(self, tmp_path: Path):
        """Which is why the same files can't serve both consumers."""
        directory = CHECKPOINTS / "untied_fp32"
        network, _ = empty_network(directory)
        InferModelMixin.load_weights(network, str(write(tmp_path / "train", converted(directory, TRAIN))))
        assert bits(network) == bits(mf_qwen3_bridge.from_pretrained(directory))
        InferModelMixin.load_weights(network, str(write(tmp_path / "infer", converted(directory, INFER))))
        assert bits(network) != bits(mf_qwen3_bridge.from_pretrained(directory))


def test_three_loaders_agree_where_dtypes_differ(tmp_path: Path):
    tensors = random_tensors(dtype="BF16")
    for name in list(tensors)[::3]:
        tensors[name] = random_tensors(dtype="F16")[name]
    write(tmp_path, tensors, hf_config())
    upstream, _ = empty_network(tmp_path)
    InferModelMixin.load_weights(upstream, str(tmp_path))
    direct, delegated = (
        mf_qwen3_bridge.from_pretrained(tmp_path, use_training_conversion=use) for use in (False, True)
    )
    assert bits(direct) == bits(delegated) == bits(upstream)


@pytest.mark.parametrize("name", ["split_shards", "moe_scattered", "moe_fused"])
def test_each_byte_is_read_once(monkeypatch, name):
    reads: dict[str, list[int]] = defaultdict(list)
    original = Reader.read

    def counting(self, tensor, start, out):
        reads[tensor.name] += range(start, start + len(out))
        return original(self, tensor, start, out)

    monkeypatch.setattr(Reader, "read", counting)
    directory = CHECKPOINTS / name
    network, model = empty_network(directory)
    load_network(network, model)
    tensors = open_source(directory).tensors
    assert {name: sorted(seen) for name, seen in reads.items()} == {n: [*range(t.nbytes)] for n, t in tensors.items()}


def test_the_yaml_decides_on_dtypes_and_cache(tmp_path: Path):
    config = tmp_path / "predict.yaml"
    model_config = {"params_dtype": "bfloat16", "compute_dtype": "bfloat16", "block_size": 16, "num_blocks": 64}
    config.write_text(yaml.safe_dump({"run_mode": "predict", "model": {"model_config": model_config}}))
    network = mf_qwen3_bridge.from_pretrained(CHECKPOINTS / "tied_bf16", config=config)
    assert {str(p.dtype) for name, p in network.parameters_dict().items() if "layernorm" not in name} == {"BFloat16"}
    assert network.config.block_size == 16
    expected = golden("tied_bf16")
    assert logits_error(network, expected) < 0.1
    assert len(greedy_tokens(network, [expected[0].prompt], 8)[0]) == 8


def test_configs_of_both_ages_give_the_same_network(tmp_path: Path):
    directory = CHECKPOINTS / "untied_fp32"
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((directory / "config.json").read_text())
    theta = config.pop("rope_theta")
    config.pop("rope_scaling", None)
    config["dtype"] = config.pop("torch_dtype")
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert logits_error(mf_qwen3_bridge.from_pretrained(tmp_path), golden("untied_fp32")) < TOLERANCE
