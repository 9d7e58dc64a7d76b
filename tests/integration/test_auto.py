"""MindFormers' Auto classes and config classes, given a Hugging Face directory."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
from mindformers import AutoConfig, AutoModel, AutoModelForCausalLM
from mindformers.models.build_config import get_model_config
from mindformers.tools.register import MindFormerConfig

import mf_qwen3_bridge
from mf_qwen3_bridge.errors import BridgeError
from mf_qwen3_bridge.mindformers.patching import auto, configs
from tests.integration.conftest import CHECKPOINTS, NAMES, SMALL_CACHE, TOLERANCE, empty_network, golden, logits_error


def changed(directory: Path, scratch: Path, **entries: object) -> Path:
    """A copy whose config.json says something else."""
    copy = shutil.copytree(directory, scratch / directory.name)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | entries))
    return copy


def by_yaml(directory: Path, **model_config: object) -> object:
    """The config that MindFormers makes of a YAML with ``pretrained_model_dir``."""
    empty_network(CHECKPOINTS / "untied_fp32")  # a context that is not use_legacy
    section = {"pretrained_model_dir": str(directory), "model_config": MindFormerConfig(**model_config)}
    return get_model_config(MindFormerConfig(**section))


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForCausalLM])
@pytest.mark.parametrize("name", ["tied_bf16", "moe_fused"])
def test_from_a_directory_to_a_loaded_model(name: str, auto_class: type):
    mf_qwen3_bridge.patch()
    network = auto_class.from_pretrained(str(CHECKPOINTS / name), auto_convert=True, **SMALL_CACHE)
    assert logits_error(network, golden(name)) < TOLERANCE


@pytest.mark.parametrize("arguments", [{}, {"auto_convert": False}])
def test_without_auto_convert_it_is_upstreams(arguments: dict[str, bool]):
    mf_qwen3_bridge.patch()
    with pytest.raises(RuntimeError, match="experimental mode"):
        AutoModel.from_pretrained(str(CHECKPOINTS / "tied_bf16"), **arguments)
    mf_qwen3_bridge.unpatch()
    with pytest.raises(RuntimeError, match="experimental mode"):
        AutoModel.from_pretrained(str(CHECKPOINTS / "tied_bf16"))


@pytest.mark.parametrize("name", NAMES)
def test_a_config_of_any_age(name: str):
    mf_qwen3_bridge.patch()
    _, model = empty_network(CHECKPOINTS / name)
    for config in (AutoConfig.from_pretrained(str(CHECKPOINTS / name)), by_yaml(CHECKPOINTS / name)):
        said = vars(config)
        differ = {k for k, v in model.hf_config.items() if k in said and said[k] != v}
        assert differ == set()
        assert said["rope_theta"] == model.hf_config["rope_theta"]
        assert "dtype" not in said and "rope_parameters" not in said


def test_arguments_and_yaml_go_before_config_json():
    mf_qwen3_bridge.patch()
    directory = CHECKPOINTS / "tied_bf16"
    assert AutoConfig.from_pretrained(str(directory), num_blocks=7).num_blocks == 7
    config = by_yaml(directory, num_hidden_layers=1, params_dtype="bfloat16", num_blocks=9)
    assert (config.num_hidden_layers, str(config.params_dtype), config.num_blocks) == (1, "bfloat16", 9)


def test_a_yaml_may_speak_mindformers_dialect():
    """As the YAMLs that MindFormers ships do."""
    mf_qwen3_bridge.patch()
    said = {"hidden_act": "swiglu", "rms_norm_eps": "1.e-6", "architectures": "Qwen3ForCausalLM"}
    config = by_yaml(CHECKPOINTS / "tied_bf16", **said)
    assert {key: getattr(config, key) for key in said} == said
    by_yaml(CHECKPOINTS / "untied_fp32", architectures=["InferenceQwen3ForCausalLM"])  # a class of one's own


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"attention_bias": True}, "attention_bias"),
        ({"use_sliding_window": True}, "sliding window"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "linear"),
        ({"model_type": "qwen3_moe", "decoder_sparse_step": 2}, "decoder_sparse_step"),
    ],
)
def test_what_mindformers_does_not_compute(tmp_path: Path, entries, message: str):
    mf_qwen3_bridge.patch()
    directory = changed(CHECKPOINTS / "untied_fp32", tmp_path, **entries)
    with pytest.raises(BridgeError, match=message):
        AutoConfig.from_pretrained(str(directory))
    with pytest.raises(BridgeError, match=message):
        by_yaml(directory)


def test_yarn_is_not_trained(monkeypatch: pytest.MonkeyPatch):
    empty_network(CHECKPOINTS / "untied_fp32")
    mf_qwen3_bridge.patch()
    monkeypatch.setattr(configs, "builds_training_networks", lambda: True)
    with pytest.raises(BridgeError, match="training network can't compute it"):
        AutoConfig.from_pretrained(str(CHECKPOINTS / "yarn"))


def test_others_configs_are_upstreams(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    reading = partial(auto.wrap_config_from_pretrained, lambda cls, path, **kwargs: (cls, path, kwargs))
    assert reading(AutoConfig, str(tmp_path), num_layers=2) == (AutoConfig, str(tmp_path), {"num_layers": 2})
    assert reading(AutoConfig, "qwen3.yaml") == (AutoConfig, "qwen3.yaml", {})
