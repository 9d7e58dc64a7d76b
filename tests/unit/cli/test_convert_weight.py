"""``scripts/convert_weight.py``, as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mf_qwen3_bridge.cli.files import convert_weight
from mf_qwen3_bridge.inputs.preflight import check
from mf_qwen3_bridge.model.rules import HF_STACKED
from tests.support.checkpoints import MOE_SPEC, SPEC, assert_same, contents, hf_config, random_tensors, write
from tests.support.cli import everything, flags, layout_of, names, names_both, num_rows, reverse
from tests.support.damage import unwrapped
from tests.support.trained import (
    COMPUTED,
    COMPUTED_MOE,
    CONTIGUOUS,
    GROUPS,
    KINDS,
    NUMBERS,
    TIED,
    fused,
    in_bf16,
    on_ranks,
    training_yaml,
    write_config,
    write_merged,
)


def test_the_flags_are_the_documented_ones():
    arguments = ["--model", "qwen3", "--input_path", "from", "--output_path", "to"]
    assert convert_weight.make_context("convert_weight", arguments).params == {
        "kind": "qwen3",
        "input_path": Path("from"),
        "output_path": Path("to"),
        "is_reversed": False,
        "num_layers": None,  # the tensors show it
        "num_attention_heads": None,
        "num_query_groups": None,
        "kv_channels": None,
        "num_routed_experts": None,
        "hidden_size": None,
        "moe_ffn_hidden_size": None,
        "ffn_hidden_size": None,
        "dtype": "bf16",
        "config": None,
        "hf_config": None,
        "max_shard_size": "5GB",
        "write_tied_lm_head": False,
        "use_contiguous_weight_layout_attention": None,
        "use_interleaved_weight_layout_mlp": None,
        "model_parallel": None,
        "lora": None,
        "lora_alpha": None,
        "dry_run": False,
    }
    options = {option.opts[0]: option for option in convert_weight.params}
    assert {flag for flag, option in options.items() if option.required} == {"--model", "--input_path", "--output_path"}
    assert list(options["--model"].type.choices) == ["qwen3-moe", "qwen3"]
    assert list(options["--dtype"].type.choices) == ["bf16", "fp16", "fp32"]
    assert {flag for flag, option in options.items() if option.type.name == "integer range"} == {
        *(f"--{name}" for name in (*NUMBERS["qwen3-moe"], *NUMBERS["qwen3"], "model_parallel", "max_worker"))
    }
    assert all(len(option.opts) == 1 for option in options.values())


@pytest.mark.parametrize("missing", ["--model", "--input_path", "--output_path"])
def test_what_is_required(tmp_path, call_script, missing):
    given = {"--model": "qwen3", "--input_path": tmp_path, "--output_path": tmp_path / "out"}
    del given[missing]
    result = call_script(*(text for pair in given.items() for text in pair))
    assert (result.code, f"Missing option '{missing}'" in result.err) == (2, True)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--model", "qwen2"),
        ("--dtype", "int8"),
        ("--num_layers", "0"),
        ("--num_layers", "two"),
        ("--reversed", "maybe"),
    ],
)
def test_values_that_no_flag_takes(tmp_path, call_script, flag, value):
    given = {"--model": "qwen3", "--input_path": tmp_path, "--output_path": tmp_path / "out", flag: value}
    result = call_script(*(text for pair in given.items() for text in pair))
    assert result.code == 2
    assert f"Invalid value for '{flag}'" in result.err and value in result.err


@pytest.mark.parametrize("option", [("--max_shard_size", "1GB"), ("--write_tied_lm_head",)])
def test_flags_that_need_reversed(tmp_path, call_script, option):
    write(tmp_path / "in", random_tensors(), hf_config())
    paths = ("--input_path", tmp_path / "in", "--output_path", tmp_path / "out")
    result = call_script("--model", "qwen3", *paths, *option)
    assert (result.code, f"{option[0]} needs --reversed" in result.err) == (2, True)
    assert names(tmp_path) == {"in"}


@pytest.mark.parametrize("spelling", [("--reversed",), ("--reversed", "True"), ("--reversed=true",)])
@pytest.mark.parametrize("at_the_end", [True, False])
def test_reversed(tmp_path, call_script, spelling, at_the_end):
    hf = random_tensors()
    paths = ("--input_path", write_merged(tmp_path / "in", fused(hf)), "--output_path", tmp_path / "out")
    both = (*paths, *spelling) if at_the_end else (*spelling, *paths)
    assert call_script("--model", "qwen3", *flags(NUMBERS["qwen3"]), *both).code == 0
    assert_same(contents(tmp_path / "out"), in_bf16(hf))


@pytest.mark.parametrize("spelling", [(), ("--reversed", "False"), ("--reversed=false",)])
@pytest.mark.parametrize("kind", KINDS)
def test_not_reversed(tmp_path, call_script, kind, spelling):
    hf = random_tensors(KINDS[kind])
    write(tmp_path / "in", hf, hf_config(KINDS[kind]), shards=3)
    paths = ("--input_path", tmp_path / "in", "--output_path", tmp_path / "out")
    assert call_script("--model", kind, *spelling, *paths).code == 0
    assert names(tmp_path / "out") == {"part0.safetensors", "param_name_map.json"}
    assert layout_of(tmp_path / "out") == "qkv=interleaved,gate_up=interleaved"
    assert_same(contents(tmp_path / "out"), in_bf16(fused(hf, KINDS[kind])))


@pytest.mark.parametrize("kind", KINDS)
def test_all_numbers_right(tmp_path, call_script, kind):
    hf = random_tensors(KINDS[kind])
    write_merged(tmp_path / "in", fused(hf, KINDS[kind]), files=3)
    assert reverse(call_script, tmp_path, kind, *flags(NUMBERS[kind])).code == 0
    assert_same(contents(tmp_path / "out"), hf)


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_that_nobody_typed_contradict_nothing(tmp_path, call_script, kind):
    """MindFormers' documented command names few of them; the script's defaults are those of one size."""
    hf = random_tensors(KINDS[kind])
    write_merged(tmp_path / "in", fused(hf, KINDS[kind]))
    assert reverse(call_script, tmp_path, kind).code == 0
    assert_same(contents(tmp_path / "out"), hf)


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in NUMBERS for name in NUMBERS[kind]])
def test_a_number_that_was_typed_is_held_against_the_shapes(tmp_path, call_script, kind, name):
    write_merged(tmp_path / "in", fused(random_tensors(KINDS[kind]), KINDS[kind]))
    before = everything(tmp_path)
    wrong = NUMBERS[kind][name] + 1
    result = reverse(call_script, tmp_path, kind, *flags({name: wrong}))
    assert (result.code, num_rows(result.err), result.out) == (2, 1, "")
    assert names_both(result.err, name, wrong, NUMBERS[kind][name])
    assert everything(tmp_path) == before


def test_flags_of_mindformers_own_scripts_are_taken(tmp_path, call_script):
    hf = random_tensors()
    write_merged(tmp_path / "in", fused(hf))
    result = reverse(call_script, tmp_path, "qwen3", "--max_worker", 16, "--qkv_concat", True, "--is_lora", False)
    assert result.code == 0
    for flag in ("max_worker", "qkv_concat", "is_lora"):
        assert f"note        --{flag} makes no difference: " in result.out
    assert_same(contents(tmp_path / "out"), hf)
    assert "makes no difference" not in reverse(call_script, tmp_path / "..", "qwen3").out


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        ("qwen3", {"num_layers": 1}),
        ("qwen3", {"num_layers": 3}),
        ("qwen3", {"hidden_size": 6}),
        ("qwen3", {"ffn_hidden_size": 5}),
        ("qwen3", {"num_attention_heads": 8, "kv_channels": 2}),
        ("qwen3", {"num_attention_heads": 8, "num_query_groups": 4, "kv_channels": 2}),
        ("qwen3", {"num_attention_heads": 2, "num_query_groups": 1, "kv_channels": 8}),
        ("qwen3", {"num_attention_heads": 2, "num_query_groups": 3}),
        ("qwen3-moe", {"num_layers": 3}),
        ("qwen3-moe", {"num_routed_experts": 8, "hidden_size": 6}),
        ("qwen3-moe", {"num_routed_experts": 2, "moe_ffn_hidden_size": 12}),
    ],
    ids=str,
)
def test_numbers_that_contradict_the_shapes(tmp_path, call_script, kind, wrong):
    """Some give the same products as the right ones."""
    write_merged(tmp_path / "in", fused(random_tensors(KINDS[kind]), KINDS[kind]))
    before = everything(tmp_path)
    result = reverse(call_script, tmp_path, kind, *flags(NUMBERS[kind] | wrong))
    assert (result.code, num_rows(result.err)) == (2, len(wrong))
    for name, number in wrong.items():
        assert names_both(result.err, name, number, NUMBERS[kind][name])
    assert everything(tmp_path) == before


def test_a_number_that_contradicts_a_hugging_face_checkpoint(tmp_path, call_script):
    write(tmp_path / "in", random_tensors(), hf_config())
    paths = ("--input_path", tmp_path / "in", "--output_path", tmp_path / "out")
    result = call_script("--model", "qwen3", *paths, "--num_layers", 3, "--kv_channels", 4)
    assert (result.code, num_rows(result.err)) == (2, 1)
    assert "config.json: 2 arguments: 3 weights: 2 (layers.1)" in unwrapped(result.err)
    assert names(tmp_path) == {"in"}


@pytest.mark.parametrize("is_reversed", [True, False])
@pytest.mark.parametrize(
    ("declared", "found"),
    [("qwen3", "has experts (qwen3-moe)"), ("qwen3-moe", "has no experts (qwen3)")],
)
def test_a_model_of_the_other_kind(tmp_path, call_script, declared, found, is_reversed):
    spec = MOE_SPEC if declared == "qwen3" else SPEC
    hf = random_tensors(spec)
    write(tmp_path / "in", fused(hf, spec) if is_reversed else hf, hf_config(spec))
    paths = ("--input_path", tmp_path / "in", "--output_path", tmp_path / "out")
    result = call_script("--model", declared, "--reversed", is_reversed, *paths)
    assert result.code == 2
    assert f"--model {declared}: {tmp_path / 'in'} {found}" in result.err
    assert names(tmp_path) == {"in"}


def test_stacked_experts_are_experts(tmp_path, call_script):
    write(tmp_path / "in", random_tensors(MOE_SPEC, HF_STACKED), hf_config(MOE_SPEC))
    paths = ("--input_path", tmp_path / "in", "--output_path", tmp_path / "out")
    assert call_script("--model", "qwen3-moe", *paths).code == 0
    assert call_script("--model", "qwen3", *paths).code == 2


@pytest.mark.parametrize(
    ("kind", "computed", "expected"),
    [
        (
            "qwen3",
            COMPUTED,
            {
                "architectures": ["Qwen3ForCausalLM"],
                "model_type": "qwen3",
                "intermediate_size": 10,
                "initializer_range": 0.02,
            },
        ),
        (
            "qwen3-moe",
            COMPUTED_MOE | {"initializer_range": 0.01, "bos_token_id": 5, "eos_token_id": [6, 7]},
            {
                "architectures": ["Qwen3MoeForCausalLM"],
                "model_type": "qwen3_moe",
                "num_experts": 4,
                "moe_intermediate_size": 6,
                "num_experts_per_tok": 3,
                "norm_topk_prob": True,
                "initializer_range": 0.01,
                "bos_token_id": 5,
                "eos_token_id": [6, 7],
            },
        ),
    ],
    ids=["dense", "moe"],
)
def test_config_json_is_made_of_the_yaml(tmp_path, call_script, kind, computed, expected):
    spec, hf = KINDS[kind], random_tensors(KINDS[kind])
    write_merged(tmp_path / "in", fused(hf, spec))
    config = training_yaml(tmp_path / "train.yaml", NUMBERS[kind] | {"vocab_size": 16} | computed)
    result = reverse(call_script, tmp_path, kind, "--config", config)
    assert result.code == 0
    assert "is assumed to be" not in result.out
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {
        "vocab_size": 16,
        "hidden_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5000000,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "attention_bias": False,
        "torch_dtype": "float32",
        **expected,
    }
    assert check(tmp_path / "out").spec == spec
    assert_same(contents(tmp_path / "out"), hf)


def test_other_names_of_the_same_things(tmp_path, call_script):
    write_merged(tmp_path / "in", fused(random_tensors(MOE_SPEC), MOE_SPEC))
    model_config = {
        "num_hidden_layers": 2,
        "num_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "n_routed_experts": 4,
        "moe_intermediate_size": 6,
        "max_position_embeddings": 256,
        "layernorm_epsilon": 1e-5,
        "rotary_base": 5000000,
        "moe_router_topk": 3,
        "norm_topk_prob": True,
    }
    config = training_yaml(tmp_path / "train.yaml", model_config)
    assert reverse(call_script, tmp_path, "qwen3-moe", "--config", config).code == 0
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {name: written[name] for name in ("rms_norm_eps", "rope_theta", "num_experts_per_tok")} == {
        "rms_norm_eps": 1e-5,
        "rope_theta": 5000000,
        "num_experts_per_tok": 3,
    }
    assert check(tmp_path / "out").spec == MOE_SPEC


def test_a_tied_model_has_a_tied_config(tmp_path, call_script):
    write_merged(tmp_path / "in", fused(random_tensors(TIED), TIED))
    config = training_yaml(tmp_path / "train.yaml", COMPUTED)
    assert reverse(call_script, tmp_path, "qwen3", "--config", config).code == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True
    assert check(tmp_path / "out").spec == TIED


def test_yarn_of_the_yaml_is_in_config_json(tmp_path, call_script):
    write_merged(tmp_path / "in", fused(random_tensors()))
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    config = training_yaml(tmp_path / "t.yaml", COMPUTED | {"position_embedding_type": "yarn", "rope_scaling": yarn})
    assert reverse(call_script, tmp_path, "qwen3", "--config", config).code == 0
    written = json.loads((tmp_path / "out" / "config.json").read_text())["rope_scaling"]
    assert {name: written[name] for name in yarn} == yarn
    assert check(tmp_path / "out").hf_config["rope_scaling"]["factor"] == 4.0


@pytest.mark.parametrize("missing", ["max_position_embeddings", "rms_norm_eps", "rope_theta", "norm_topk_prob"])
def test_no_config_json_is_made_of_half_a_yaml(tmp_path, call_script, missing):
    write_merged(tmp_path / "in", fused(random_tensors(MOE_SPEC), MOE_SPEC))
    config = training_yaml(tmp_path / "train.yaml", {k: v for k, v in COMPUTED_MOE.items() if k != missing})
    result = reverse(call_script, tmp_path, "qwen3-moe", "--config", config)
    assert result.code == 0
    assert f"{config} does not declare {missing}\n" in result.out
    assert "no config.json is written" in result.out
    assert names(tmp_path / "out") == {"model.safetensors"}


def test_the_yamls_pretrained_model_dir(tmp_path, call_script):
    write_merged(tmp_path / "in", fused(random_tensors()))
    hf = write_config(tmp_path / "hf", hf_config(rope_theta=77), tokenizer='{"t": 1}', tokenizer_config='{"c": 2}')
    config = training_yaml(tmp_path / "train.yaml", {}, pretrained_model_dir=str(hf))
    assert reverse(call_script, tmp_path, "qwen3", "--config", config).code == 0
    assert names(tmp_path / "out") == {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"}
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == hf_config(rope_theta=77)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"t": 1}'


def test_the_yaml_names_the_config_of_weights_without_one(tmp_path, call_script):
    write(tmp_path / "in", random_tensors())
    hf = write_config(tmp_path / "hf", hf_config())
    config = training_yaml(tmp_path / "train.yaml", {}, pretrained_model_dir=str(hf))
    paths = ("--input_path", tmp_path / "in", "--output_path", tmp_path / "out")
    assert call_script("--model", "qwen3", *paths, "--config", config).code == 0
    assert_same(contents(tmp_path / "out"), in_bf16(fused(random_tensors())))


@pytest.mark.parametrize(
    ("layout_flags", "qkv", "gate_up"),
    [
        ({}, 4, 10),
        (CONTIGUOUS, 1, 1),
        ({"use_contiguous_weight_layout_attention": True}, 1, 10),
        ({"use_interleaved_weight_layout_mlp": False}, 4, 1),
    ],
    ids=["neither", "both", "attention", "mlp"],
)
def test_the_yamls_layout_flags(tmp_path, call_script, layout_flags, qkv, gate_up):
    hf = random_tensors(GROUPS)
    trained = write_merged(tmp_path / "in", fused(hf, GROUPS, qkv, gate_up))
    config = training_yaml(tmp_path / "train.yaml", layout_flags)
    result = reverse(call_script, tmp_path, "qwen3", "--config", config)
    assert result.code == 0
    assert "is assumed to be" not in result.out
    assert_same(contents(tmp_path / "out"), hf)
    write_config(tmp_path / "out", hf_config(GROUPS))
    paths = ("--input_path", tmp_path / "out", "--output_path", tmp_path / "again")
    assert call_script("--model", "qwen3", *paths, "--dtype", "fp32", "--config", config).code == 0
    assert_same(contents(tmp_path / "again"), contents(trained))


def test_contiguous_on_two_ranks(tmp_path, call_script):
    """Each rank laid out its own block: the merged rows are q0 k0 v0 q1 k1 v1."""
    hf = random_tensors(GROUPS)
    tensors = fused(hf, GROUPS)
    for layer in range(2):
        q, k, v = (hf[f"model.layers.{layer}.self_attn.{part}_proj.weight"] for part in "qkv")
        gate, up = (hf[f"model.layers.{layer}.mlp.{part}_proj.weight"] for part in ("gate", "up"))
        rows = [q[:8], k[:4], v[:4], q[8:], k[4:], v[4:]]
        tensors[f"decoder.layers.{layer}.self_attention.linear_qkv.weight"] = np.concatenate(rows)
        tensors[f"decoder.layers.{layer}.mlp.linear_fc1.weight"] = np.concatenate([gate[:5], up[:5], gate[5:], up[5:]])
    write_merged(tmp_path / "in", tensors)
    config = training_yaml(tmp_path / "train.yaml", CONTIGUOUS, **on_ranks(2))
    assert reverse(call_script, tmp_path, "qwen3", "--config", config).code == 0
    assert_same(contents(tmp_path / "out"), hf)
    write_config(tmp_path / "out", hf_config(GROUPS))
    paths = ("--input_path", tmp_path / "out", "--output_path", tmp_path / "again")
    assert call_script("--model", "qwen3", *paths, "--dtype", "fp32", "--config", config).code == 0
    assert layout_of(tmp_path / "again") == "qkv=contiguous,gate_up=contiguous,tensor_parallel=2"
    assert_same(contents(tmp_path / "again"), tensors)


def test_ranks_that_are_not_used_lay_out_nothing(tmp_path, call_script):
    hf = random_tensors(GROUPS)
    write_merged(tmp_path / "in", fused(hf, GROUPS, 1, 1))
    config = training_yaml(tmp_path / "train.yaml", CONTIGUOUS, **{**on_ranks(2), "use_parallel": False})
    assert reverse(call_script, tmp_path, "qwen3", "--config", config).code == 0
    assert_same(contents(tmp_path / "out"), hf)


@pytest.mark.parametrize(
    ("declared", "layout_flags", "ranks"),
    [
        ("qkv=interleaved,gate_up=interleaved", CONTIGUOUS, 1),
        ("qkv=contiguous,gate_up=contiguous", {}, 1),
        ("qkv=contiguous,gate_up=contiguous", CONTIGUOUS, 2),
        ("qkv=contiguous,gate_up=contiguous,tensor_parallel=2", CONTIGUOUS, 1),
    ],
)
def test_a_yaml_that_contradicts_the_layout_metadata(tmp_path, call_script, declared, layout_flags, ranks):
    write_merged(tmp_path / "in", fused(random_tensors()), metadata={"mf_qwen3_bridge.layout": declared})
    config = training_yaml(tmp_path / "train.yaml", COMPUTED | layout_flags, **on_ranks(ranks))
    before = everything(tmp_path)
    result = reverse(call_script, tmp_path, "qwen3", "--config", config)
    assert result.code == 2
    assert "the layouts of QKV and gate/up contradict each other" in result.err
    assert f"files: {declared}" in unwrapped(result.err).replace("parall el", "parallel")
    assert everything(tmp_path) == before


def test_layout_metadata_is_enough(tmp_path, call_script):
    hf = random_tensors(GROUPS)
    declared = {"mf_qwen3_bridge.layout": "qkv=contiguous,gate_up=contiguous,tensor_parallel=2"}
    write_merged(tmp_path / "in", fused(hf, GROUPS, 2, 2), metadata=declared)
    numbers = NUMBERS["qwen3"] | {"num_attention_heads": 8, "num_query_groups": 4, "kv_channels": 2}
    assert reverse(call_script, tmp_path, "qwen3", *flags(numbers)).code == 0
    assert_same(contents(tmp_path / "out"), hf)


def test_flag_and_yaml_and_tensors_in_one_table(tmp_path, call_script):
    write_merged(tmp_path / "in", fused(random_tensors()))
    config = training_yaml(tmp_path / "t.yaml", COMPUTED | {"num_layers": 5, "ffn_hidden_size": 10})
    result = reverse(call_script, tmp_path, "qwen3", "--config", config, "--num_layers", 7, "--ffn_hidden_size", 5)
    assert (result.code, num_rows(result.err)) == (2, 2)
    text = unwrapped(result.err)
    assert "set num_layers to 2 in " in text and "num_layers to 2 in arguments" in text
    assert "arguments: 7 weights: 2 (layers.1)" in text
    assert "arguments: 5 weights: 10 (" in text


def test_a_yaml_of_something_else(tmp_path, call_script):
    write_merged(tmp_path / "in", fused(random_tensors()))
    for content, found in [("a: 1", "no model.model_config section"), ("{", "is not valid YAML")]:
        (tmp_path / "x.yaml").write_text(content)
        result = reverse(call_script, tmp_path, "qwen3", "--config", tmp_path / "x.yaml")
        assert (result.code, found in result.err, str(tmp_path / "x.yaml") in result.err) == (2, True, True)
    result = reverse(call_script, tmp_path, "qwen3", "--config", tmp_path / "absent.yaml")
    assert (result.code, f"can't read {tmp_path / 'absent.yaml'}" in result.err) == (2, True)


def test_a_yaml_whose_ranks_do_not_divide_the_model(tmp_path, call_script):
    write_merged(tmp_path / "in", fused(random_tensors()))
    config = training_yaml(tmp_path / "train.yaml", CONTIGUOUS, **on_ranks(3))
    result = reverse(call_script, tmp_path, "qwen3", "--config", config)
    assert (result.code, num_rows(result.err)) == (2, 1)
    assert "3, num_query_groups 2, ffn_hidden_size 10" in unwrapped(result.err)
    assert "is the YAML theirs?" in unwrapped(result.err)
