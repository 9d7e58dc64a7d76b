import json
from pathlib import Path

import pytest

from mf_qwen3_bridge.errors import BridgeError
from mf_qwen3_bridge.inputs.hf_config import normalise, read_hf_config
from mf_qwen3_bridge.inputs.mindformers_config import read_mindformers_config

# The numbers of Qwen3-14B's config.json, as the Hub has it.
QWEN3_14B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "initializer_range": 0.02,
    "intermediate_size": 17408,
    "max_position_embeddings": 40960,
    "max_window_layers": 40,
    "model_type": "qwen3",
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


# Qwen3-30B-A3B's, likewise.
QWEN3_30B_A3B = QWEN3_14B | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}


def with_transformers_5_keys(config, **rope):
    """The same config as transformers 5 writes it."""
    config = {key: value for key, value in config.items() if key not in ("rope_theta", "rope_scaling", "torch_dtype")}
    parameters = {"rope_type": "default", "rope_theta": 1000000} | rope
    layer_types = ["full_attention"] * config["num_hidden_layers"]
    return config | {"dtype": "bfloat16", "rope_parameters": parameters, "layer_types": layer_types}


def test_configs_of_every_age_are_one():
    assert normalise(with_transformers_5_keys(QWEN3_14B)) == normalise(QWEN3_14B)
    assert normalise(QWEN3_14B)["torch_dtype"] == "bfloat16"
    assert normalise(QWEN3_14B)["rope_theta"] == 1000000


@pytest.mark.parametrize("kind", ["type", "rope_type"])
def test_yarn_with_plain_keys_gets_every_number_that_mindformers_needs(kind):
    scaling = {kind: "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    expected = {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 0.0,
    }
    assert normalise(QWEN3_14B | {"rope_scaling": scaling})["rope_scaling"] == expected
    of_transformers_5 = with_transformers_5_keys(
        QWEN3_14B, rope_type="yarn", factor=4.0, original_max_position_embeddings=32768
    )
    assert normalise(of_transformers_5)["rope_scaling"] == expected


def test_the_theta_of_rope_scaling_counts():
    without = {key: value for key, value in QWEN3_14B.items() if key != "rope_theta"}
    config = normalise(without | {"rope_scaling": {"rope_type": "default", "rope_theta": 5e6}})
    assert (config["rope_theta"], config["rope_scaling"]) == (5e6, None)


def test_an_attention_factor_that_says_what_is_computed_anyway_is_fine():
    scaling = {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.1386294361119891}
    assert normalise(QWEN3_14B | {"rope_scaling": scaling})["rope_scaling"]["mscale"] == 1.0


def test_other_entries_do_not_reach_mindformers():
    assert normalise(QWEN3_14B | {"_name_or_path": "x", "some_new_key": 1}) == normalise(QWEN3_14B)


def test_fields_that_transformers_supplies():
    config = normalise({key: value for key, value in QWEN3_14B.items() if key not in ("head_dim", "torch_dtype")})
    assert config["head_dim"] == 128
    assert normalise(QWEN3_14B | {"num_key_value_heads": None})["num_key_value_heads"] == 40


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"attention_bias": True}, "attention_bias"),
        ({"use_sliding_window": True, "sliding_window": 4096}, "sliding window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding window"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq"),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
        ({"model_type": "qwen3_next", "architectures": ["Qwen3NextForCausalLM"]}, "Qwen3NextForCausalLM"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "Qwen3ForSequenceClassification"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "linear"),
        ({"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0}}, "linear"),
        ({"rope_scaling": {"type": "yarn", "rope_type": "default", "factor": 2.0}}, "'default' and 'yarn'"),
        ({"rope_scaling": {"factor": 4.0}}, "RoPE type"),
        ({"rope_scaling": "yarn"}, "rope_scaling"),
        ({"rope_scaling": [1]}, "rope_scaling"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, "per layer type"),
        ({"rope_theta": "1e6"}, "rope_theta"),
        ({"rope_scaling": {"rope_type": "default", "rope_theta": 5e6}}, "rope_theta"),
        ({"rope_theta": 1}, "rope_theta"),
        ({"hidden_size": 10**400}, "hidden_size"),
        ({"rope_theta": None}, "rope_theta"),
        ({"rope_theta": -5}, "rope_theta"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"rms_norm_eps": -1}, "rms_norm_eps"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings"),
        ({"layer_types": 3}, "sliding window"),
        ({"layer_types": [None, "a"]}, "sliding window"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": True}}, "factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": float("nan")}}, "factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": "32"}}, "beta_fast"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attention_factor": "x"}}, "attention_factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": "32"}}, "original"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 2.0}}, "attention_factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "truncate": False}}, "truncate"),
        ({"rope_parameters": {"rope_theta": 5.0}}, "rope_theta"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"hidden_act": None}, "hidden_act"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"num_key_value_heads": 7}, "num_key_value_heads"),
        ({"head_dim": 127}, "head_dim"),
        ({"hidden_size": None}, "hidden_size"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"num_hidden_layers": "40"}, "num_hidden_layers"),
    ],
)
def test_what_mindformers_cannot_compute_is_refused_by_name(change, named):
    with pytest.raises(BridgeError, match=named):
        normalise(QWEN3_14B | change)


def test_an_moe_config_of_either_age():
    config = normalise(QWEN3_30B_A3B)
    assert (config["model_type"], config["architectures"]) == ("qwen3_moe", ["Qwen3MoeForCausalLM"])
    assert (config["num_experts"], config["num_experts_per_tok"], config["moe_intermediate_size"]) == (128, 8, 768)
    assert config["norm_topk_prob"] is True
    of_transformers_5 = with_transformers_5_keys(QWEN3_30B_A3B)
    of_transformers_5["num_local_experts"] = of_transformers_5.pop("num_experts")
    assert normalise(of_transformers_5) == config
    minimal = {key: value for key, value in QWEN3_30B_A3B.items() if key not in ("head_dim", "norm_topk_prob")}
    config = normalise(minimal)
    assert (config["head_dim"], config["norm_topk_prob"]) == (64, False)  # as transformers' Qwen3Moe has it


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"decoder_sparse_step": 2}, "dense layers among sparse ones"),
        ({"mlp_only_layers": [0]}, "dense layers among sparse ones"),
        ({"shared_expert_intermediate_size": 512}, "shared experts"),
        ({"num_experts_per_tok": 1}, "at least two experts"),
        ({"num_experts_per_tok": 129}, "num_experts_per_tok"),
        ({"num_local_experts": 64}, "num_local_experts"),
        ({"norm_topk_prob": "yes"}, "norm_topk_prob"),
        ({"num_experts": None}, "num_experts"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size"),
        ({"architectures": ["Qwen3ForCausalLM"]}, "architecture"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
    ],
)
def test_what_mindformers_cannot_compute_of_an_moe_is_refused_by_name(change, named):
    with pytest.raises(BridgeError, match=named) as error:
        normalise(QWEN3_30B_A3B | change)
    assert len(error.value.problems) == 1


def test_everything_is_refused_at_once():
    with pytest.raises(BridgeError) as error:
        normalise(QWEN3_14B | {"attention_bias": True, "use_sliding_window": True, "head_dim": 0})
    assert [problem.subject for problem in error.value.problems] == ["attention_bias", "sliding window", "head_dim"]


@pytest.mark.parametrize("content", ["", "{", "[1]", "\x00", "3"])
def test_a_config_that_is_no_config(tmp_path: Path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(BridgeError, match=r"config\.json"):
        read_hf_config(tmp_path)


def test_no_config(tmp_path: Path):
    with pytest.raises(BridgeError, match=r"config\.json is missing"):
        read_hf_config(tmp_path)
    with pytest.raises(BridgeError, match="not a directory"):
        read_hf_config(tmp_path / "absent")


def test_overrides_go_before_the_file(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_14B))
    scaling = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32768}
    assert read_hf_config(tmp_path)["rope_scaling"] is None
    assert read_hf_config(tmp_path, {"rope_scaling": scaling})["rope_scaling"]["factor"] == 2.0


@pytest.mark.parametrize("content", ["model: [", "model: 3", "a: 1", "- 1", "a: 2025-02-30"])
def test_a_yaml_that_is_none(tmp_path: Path, content):
    path = tmp_path / "predict.yaml"
    path.write_text(content)
    with pytest.raises(BridgeError, match=r"predict\.yaml"):
        read_mindformers_config(path)
    with pytest.raises(BridgeError, match="can't read"):
        read_mindformers_config(tmp_path / "absent.yaml")
