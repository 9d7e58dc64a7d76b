"""MindFormers' Auto classes and config classes, given a Hugging Face directory."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
from mindformers import AutoConfig, AutoModel, AutoModelForCausalLM, set_context
from mindformers.models.build_config import get_model_config
from mindformers.models.qwen3.modeling_qwen3_infer import InferenceQwen3ForCausalLM
from mindformers.models.qwen3.modeling_qwen3_train import TrainingQwen3ForCausalLM
from mindformers.models.qwen3_moe.modeling_qwen3_moe_infer import InferenceQwen3MoeForCausalLM
from mindformers.models.qwen3_moe.modeling_qwen3_moe_train import TrainingQwen3MoeForCausalLM
from mindformers.tools.register import MindFormerConfig

import mf_qwen3_bridge
from mf_qwen3_bridge.errors import BridgeError
from mf_qwen3_bridge.inputs.preflight import check
from mf_qwen3_bridge.mindformers.cpu.device import predict_environment
from mf_qwen3_bridge.mindformers.patching import configs
from tests.support.golden import CHECKPOINTS, NAMES, TOLERANCE, golden
from tests.support.networks import SMALL_CACHE, empty_network, logits_error


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
        declared = vars(config)
        differ = {k for k, v in model.hf_config.items() if k in declared and declared[k] != v}
        assert differ == set()
        assert declared["rope_theta"] == model.hf_config["rope_theta"]
        assert "dtype" not in declared and "rope_parameters" not in declared


def test_arguments_and_yaml_go_before_config_json():
    mf_qwen3_bridge.patch()
    directory = CHECKPOINTS / "tied_bf16"
    assert AutoConfig.from_pretrained(str(directory), num_blocks=7).num_blocks == 7
    config = by_yaml(directory, num_hidden_layers=1, params_dtype="bfloat16", num_blocks=9)
    assert (config.num_hidden_layers, str(config.params_dtype), config.num_blocks) == (1, "bfloat16", 9)


def test_a_yaml_may_speak_mindformers_dialect():
    """As the YAMLs that MindFormers ships do."""
    mf_qwen3_bridge.patch()
    declared = {"hidden_act": "swiglu", "rms_norm_eps": "1.e-6", "architectures": "Qwen3ForCausalLM"}
    config = by_yaml(CHECKPOINTS / "tied_bf16", **declared)
    assert {key: getattr(config, key) for key in declared} == declared
    by_yaml(CHECKPOINTS / "untied_fp32", architectures=["InferenceQwen3ForCausalLM"])  # a class of one's own


NETWORKS = {
    "untied_fp32": (InferenceQwen3ForCausalLM, TrainingQwen3ForCausalLM),
    "moe_fp32": (InferenceQwen3MoeForCausalLM, TrainingQwen3MoeForCausalLM),
}


def by_mindformers_names(directory: Path) -> dict[str, object]:
    """What config.json declares, under other names that MindFormers has for it, as a YAML may repeat it."""
    config = check(directory).hf_config
    names = {
        "num_hidden_layers": ("num_layers", "n_layer"),
        "num_attention_heads": ("num_heads",),
        "num_key_value_heads": ("num_query_groups", "n_kv_heads"),
        "head_dim": ("kv_channels",),
        "intermediate_size": ("ffn_hidden_size",),
        "rms_norm_eps": ("layernorm_epsilon",),
        "rope_theta": ("rotary_base", "theta"),
        "attention_bias": ("add_qkv_bias",),
        "num_experts": ("num_moe_experts", "expert_num"),
        "moe_intermediate_size": ("moe_ffn_hidden_size",),
        "num_experts_per_tok": ("moe_router_topk",),
    }
    declared = {alias: config[name] for name, aliases in names.items() if name in config for alias in aliases}
    return declared | {"layernorm_epsilon": "1.e-6"}  # YAML takes it for a string


@pytest.mark.parametrize("name", NETWORKS)
def test_a_predict_yaml_may_repeat_config_json_under_mindformers_names(name: str):
    """Upstream takes two names of one thing for a conflict, even if they agree."""
    mf_qwen3_bridge.patch()
    float32 = dict.fromkeys(("params_dtype", "compute_dtype", "layernorm_compute_dtype", "rotary_dtype"), "float32")
    config = by_yaml(CHECKPOINTS / name, **SMALL_CACHE, **float32, **by_mindformers_names(CHECKPOINTS / name))
    with predict_environment("CPU"):
        network = NETWORKS[name][0](config)
    network.load_weights(CHECKPOINTS / name)
    assert logits_error(network, golden(name)) < TOLERANCE


@pytest.mark.parametrize("name", NETWORKS)
def test_a_finetune_yaml_may_repeat_config_json_under_mindformers_names(name: str):
    mf_qwen3_bridge.patch()
    declared = by_mindformers_names(CHECKPOINTS / name)
    empty_network(CHECKPOINTS / "untied_fp32")
    set_context(run_mode="finetune")
    try:
        section = {"pretrained_model_dir": str(CHECKPOINTS / name), "model_config": MindFormerConfig(**declared)}
        network = NETWORKS[name][1](get_model_config(MindFormerConfig(**section)))
    finally:
        set_context(run_mode="predict")
    converted = network.get_gpt_transformer_config()
    built = {key: getattr(converted, key) for key in ("num_layers", "num_query_groups", "kv_channels", "rotary_base")}
    assert built == {key: declared[key] for key in built}


def test_a_yaml_that_contradicts_config_json_under_mindformers_names():
    mf_qwen3_bridge.patch()
    directory = CHECKPOINTS / "untied_fp32"
    entries = {"num_layers": 3, "n_layer": 2, "rotary_base": 10000, "add_qkv_bias": True}
    with pytest.raises(BridgeError, match="contradicts") as error:
        configs.normalise_model_config({"pretrained_model_dir": str(directory)} | entries)
    assert [problem.subject for problem in error.value.problems] == ["num_layers", "rotary_base", "add_qkv_bias"]
    declared, found = error.value.problems[0].found.splitlines()
    assert declared == f"{directory}/config.json: num_hidden_layers 2"
    assert found == "model.model_config: 3"
    with pytest.raises(BridgeError, match="leave rotary_base out"):
        by_yaml(directory, **entries)


def test_a_yaml_may_change_a_number_under_both_names():
    mf_qwen3_bridge.patch()
    config = by_yaml(CHECKPOINTS / "tied_bf16", num_hidden_layers=1, num_layers=1)
    assert config.num_hidden_layers == 1
    assert not hasattr(config, "num_layers")
    with pytest.raises(BridgeError, match=r"model\.model_config: num_hidden_layers 1"):
        by_yaml(CHECKPOINTS / "tied_bf16", num_hidden_layers=1, num_layers=2)


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
    reading = partial(configs.wrap_config_from_pretrained, lambda cls, path, **kwargs: (cls, path, kwargs))
    assert reading(AutoConfig, str(tmp_path), num_layers=2) == (AutoConfig, str(tmp_path), {"num_layers": 2})
    assert reading(AutoConfig, "qwen3.yaml") == (AutoConfig, "qwen3.yaml", {})
