"""The commands that write checkpoints, as a user types them; and what ranks saved, read without MindSpore."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import yaml
from mf_qwen3_bridge.cli.files import convert_weight
from mf_qwen3_bridge.cli.files import unify as unify_command
from mf_qwen3_bridge.cli.main import cli, main
from mf_qwen3_bridge.convert import jobs
from mf_qwen3_bridge.convert.run import run
from mf_qwen3_bridge.errors import BridgeError
from mf_qwen3_bridge.inputs import opening, strategies
from mf_qwen3_bridge.inputs.opening import open_source
from mf_qwen3_bridge.inputs.preflight import check, check_trained
from mf_qwen3_bridge.inputs.rank_files import Sharding, open_rank_files
from mf_qwen3_bridge.inputs.source import Source as OpenedSource
from mf_qwen3_bridge.model.rules import HF_STACKED
from mf_qwen3_bridge.model.spec import ModelSpec
from mf_qwen3_bridge.transfer.copying import BUFFER_BYTES
from tests.support.checkpoints import (
    MOE_SPEC,
    NUMPY,
    SPEC,
    Tensors,
    assert_same,
    contents,
    hf_config,
    random_tensors,
    write,
    write_headers,
)
from tests.support.commands import ROOT
from tests.support.damage import assign_in_index, change_config, cut_off, leave_only, unwrapped

# As many rows as SPEC, in other heads: four groups tell interleaved rows from those of two ranks.
GROUPS = replace(SPEC, num_attention_heads=8, num_query_groups=4, head_dim=2)
TIED = replace(SPEC, tie_word_embeddings=True)
KINDS = {"qwen3": SPEC, "qwen3-moe": MOE_SPEC}
NUMBERS = {
    "qwen3": {
        "num_layers": 2,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 4,
        "hidden_size": 12,
        "ffn_hidden_size": 10,
    },
    "qwen3-moe": {
        "num_layers": 2,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 4,
        "num_routed_experts": 4,
        "hidden_size": 12,
        "moe_ffn_hidden_size": 6,
    },
}
# Of a training YAML, beside the numbers: all that a config.json holds.
COMPUTED: dict[str, Any] = {"max_position_embeddings": 256, "rms_norm_eps": "1e-5", "rope_theta": 5000000}
COMPUTED_MOE = {**COMPUTED, "num_experts_per_tok": 3, "norm_topk_prob": True}
CONTIGUOUS = {"use_contiguous_weight_layout_attention": True, "use_interleaved_weight_layout_mlp": False}


class Result(NamedTuple):
    code: int | None
    out: str
    err: str


Call = Callable[..., Result]


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch) -> None:
    """What a crash leaves is judged in test_output.py."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def call(capsys) -> Call:
    def called(*arguments: object, command=cli) -> Result:
        with pytest.raises(SystemExit) as exited:
            main([str(argument) for argument in arguments], command)
        return Result(exited.value.code, *capsys.readouterr())

    return called


@pytest.fixture
def call_script(call) -> Call:
    return lambda *arguments: call(*arguments, command=convert_weight)


def flags(numbers: Mapping[str, object]) -> list[object]:
    return [text for name, number in numbers.items() for text in (f"--{name}", number)]


def training_yaml(path: Path, model_config: Mapping[str, Any], **document: Any) -> Path:
    document = {"run_mode": "finetune", **document, "model": {"model_config": dict(model_config)}}
    path.write_text(yaml.safe_dump(document))
    return path


def on_ranks(tensor_parallel: int) -> dict[str, Any]:
    return {"use_parallel": True, "parallel_config": {"data_parallel": 4, "model_parallel": tensor_parallel}}


def write_config(directory: Path, config: Mapping[str, Any], **companions: str) -> Path:
    """A Hugging Face directory without weights."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    for name, text in companions.items():
        (directory / f"{name}.json").write_text(text)
    return directory


def write_merged(
    directory: Path, tensors: Mapping[str, np.ndarray], files: int = 1, metadata: Mapping[str, str] | None = None
) -> Path:
    """A merged training checkpoint, as ``mindspore.unified_safetensors`` writes it."""
    directory.mkdir(parents=True, exist_ok=True)
    names, weight_map = list(tensors), {}
    for number in range(files):
        mine = names[number::files]
        file = f"part{number}.safetensors"
        save_file({name: tensors[name] for name in mine}, directory / file, {"format": "ms", **(metadata or {})})
        weight_map |= dict.fromkeys(mine, file)
    (directory / "param_name_map.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def dealt(parts: list[np.ndarray], count: int) -> np.ndarray:
    """Each part in ``count`` blocks: the first of each, then the second of each."""
    return np.concatenate([block for blocks in zip(*(np.split(part, count) for part in parts)) for block in blocks])


def fused(hf: Tensors, spec: ModelSpec = SPEC, qkv: int | None = None, gate_up: int | None = None) -> Tensors:
    """The training parameters of Hugging Face tensors, by hand: numpy, and no rule of the bridge.

    ``qkv``, ``gate_up``: in how many blocks their parts are dealt; interleaved when left out.
    """
    made = {"embedding.word_embeddings.weight": hf["model.embed_tokens.weight"]}
    for layer in range(spec.num_layers):
        old, new = f"model.layers.{layer}", f"decoder.layers.{layer}"
        made |= {
            f"{new}.input_layernorm.weight": hf[f"{old}.input_layernorm.weight"],
            f"{new}.self_attention.linear_qkv.weight": dealt(
                [hf[f"{old}.self_attn.{part}_proj.weight"] for part in "qkv"], qkv or spec.num_query_groups
            ),
            f"{new}.self_attention.q_layernorm.weight": hf[f"{old}.self_attn.q_norm.weight"],
            f"{new}.self_attention.k_layernorm.weight": hf[f"{old}.self_attn.k_norm.weight"],
            f"{new}.self_attention.linear_proj.weight": hf[f"{old}.self_attn.o_proj.weight"],
            f"{new}.pre_mlp_layernorm.weight": hf[f"{old}.post_attention_layernorm.weight"],
        }
        if spec.is_moe:
            experts = [f"{old}.mlp.experts.{expert}" for expert in range(spec.num_experts)]
            pairs = [[hf[f"{expert}.{part}_proj.weight"] for part in ("gate", "up")] for expert in experts]
            made |= {
                f"{new}.mlp.router.weight": hf[f"{old}.mlp.gate.weight"],
                f"{new}.mlp.experts.weight1": np.concatenate([np.concatenate(pair).T for pair in pairs]),
                f"{new}.mlp.experts.weight2": np.concatenate([hf[f"{e}.down_proj.weight"].T for e in experts]),
            }
        else:
            halves = [hf[f"{old}.mlp.{part}_proj.weight"] for part in ("gate", "up")]
            made |= {
                f"{new}.mlp.linear_fc1.weight": dealt(halves, gate_up or spec.ffn_hidden_size),
                f"{new}.mlp.linear_fc2.weight": hf[f"{old}.mlp.down_proj.weight"],
            }
    made["decoder.final_layernorm.weight"] = hf["model.norm.weight"]
    if not spec.tie_word_embeddings:
        made["output_layer.weight"] = hf["lm_head.weight"]
    return {name: np.ascontiguousarray(array) for name, array in made.items()}


def in_bf16(tensors: Tensors) -> Tensors:
    return {name: array.astype(NUMPY["BF16"]) for name, array in tensors.items()}


def everything(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() if path.is_file() else b"" for path in directory.rglob("*")}


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def num_rows(text: str) -> int:
    """Of the table in a message, its headers apart."""
    return len(re.findall(r"^\+-[-+]+$", text, re.MULTILINE)) - 1


def says_of_both(text: str, name: str, said: int, right: int) -> bool:
    """Whether a table names what the flags or their defaults and what the tensors say of a number, and what to do."""
    both = rf"arguments(?: and defaults)?: {said} weights: {right} \(\S"
    return bool(re.search(both, unwrapped(text))) and f"set {name} to {right} in arguments" in unwrapped(text)


def layout_of(directory: Path) -> str | None:
    return open_source(directory).metadata.get("mf_qwen3_bridge.layout")


# scripts/convert_weight.py


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


def reverse(call_script: Call, tmp_path: Path, kind: str, *arguments: object) -> Result:
    """With what lies in ``in``, in float32."""
    paths = ("--input_path", tmp_path / "in", "--output_path", tmp_path / "out")
    return call_script("--model", kind, "--reversed", *paths, "--dtype", "fp32", *arguments)


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
    assert says_of_both(result.err, name, wrong, NUMBERS[kind][name])
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
        assert says_of_both(result.err, name, number, NUMBERS[kind][name])
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
    ("said", "found"),
    [("qwen3", "has experts (qwen3-moe)"), ("qwen3-moe", "has no experts (qwen3)")],
)
def test_a_model_of_the_other_kind(tmp_path, call_script, said, found, is_reversed):
    spec = MOE_SPEC if said == "qwen3" else SPEC
    hf = random_tensors(spec)
    write(tmp_path / "in", fused(hf, spec) if is_reversed else hf, hf_config(spec))
    paths = ("--input_path", tmp_path / "in", "--output_path", tmp_path / "out")
    result = call_script("--model", said, "--reversed", is_reversed, *paths)
    assert result.code == 2
    assert f"--model {said}: {tmp_path / 'in'} {found}" in result.err
    assert names(tmp_path) == {"in"}


def test_stacked_experts_are_experts(tmp_path, call_script):
    write(tmp_path / "in", random_tensors(MOE_SPEC, HF_STACKED), hf_config(MOE_SPEC))
    paths = ("--input_path", tmp_path / "in", "--output_path", tmp_path / "out")
    assert call_script("--model", "qwen3-moe", *paths).code == 0
    assert call_script("--model", "qwen3", *paths).code == 2


# --config: the YAML of the training run


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


def test_the_yaml_names_the_config_of_weights_that_lie_alone(tmp_path, call_script):
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
    ("stamp", "layout_flags", "ranks"),
    [
        ("qkv=interleaved,gate_up=interleaved", CONTIGUOUS, 1),
        ("qkv=contiguous,gate_up=contiguous", {}, 1),
        ("qkv=contiguous,gate_up=contiguous", CONTIGUOUS, 2),
        ("qkv=contiguous,gate_up=contiguous,tensor_parallel=2", CONTIGUOUS, 1),
    ],
)
def test_a_yaml_that_contradicts_the_files_stamp(tmp_path, call_script, stamp, layout_flags, ranks):
    write_merged(tmp_path / "in", fused(random_tensors()), metadata={"mf_qwen3_bridge.layout": stamp})
    config = training_yaml(tmp_path / "train.yaml", COMPUTED | layout_flags, **on_ranks(ranks))
    before = everything(tmp_path)
    result = reverse(call_script, tmp_path, "qwen3", "--config", config)
    assert result.code == 2
    assert "the layouts of QKV and gate/up contradict each other" in result.err
    assert f"files: {stamp}" in unwrapped(result.err).replace("parall el", "parallel")
    assert everything(tmp_path) == before


def test_a_stamp_is_enough(tmp_path, call_script):
    hf = random_tensors(GROUPS)
    stamp = {"mf_qwen3_bridge.layout": "qkv=contiguous,gate_up=contiguous,tensor_parallel=2"}
    write_merged(tmp_path / "in", fused(hf, GROUPS, 2, 2), metadata=stamp)
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


# mf-qwen3 convert


@pytest.fixture
def hf_dir(tmp_path: Path) -> Path:
    return write(tmp_path / "hf", random_tensors(GROUPS), hf_config(GROUPS), shards=3)


def convert(call: Call, hf_dir: Path, *arguments: object) -> Result:
    return call("convert", "--model_dir", hf_dir, "--output_dir", hf_dir.parent / "out", *arguments)


@pytest.mark.parametrize("layout", [(), ("--layout", "train")])
def test_convert_for_training(tmp_path, call, hf_dir, layout):
    assert convert(call, hf_dir, *layout).code == 0
    assert layout_of(tmp_path / "out") == "qkv=interleaved,gate_up=interleaved"
    assert_same(contents(tmp_path / "out"), fused(random_tensors(GROUPS), GROUPS))


def test_convert_for_inference(tmp_path, call, hf_dir):
    assert convert(call, hf_dir, "--layout", "infer").code == 0
    assert layout_of(tmp_path / "out") == "qkv=contiguous,gate_up=contiguous"
    assert_same(contents(tmp_path / "out"), fused(random_tensors(GROUPS), GROUPS, 1, 1))


def test_convert_experts_for_inference(tmp_path, call):
    hf = random_tensors(MOE_SPEC)
    assert convert(call, write(tmp_path / "hf", hf, hf_config(MOE_SPEC)), "--layout", "infer").code == 0
    expected = fused(hf, MOE_SPEC, 1)
    for layer in range(2):
        for name, shape in (("weight1", (4, 12, 12)), ("weight2", (4, 6, 12))):
            experts = f"decoder.layers.{layer}.mlp.experts.{name}"
            expected[experts] = expected[experts].reshape(shape)
    made = contents(tmp_path / "out")
    assert {name: array.shape for name, array in made.items()} == {n: array.shape for n, array in expected.items()}
    assert_same(made, expected)


@pytest.mark.parametrize(("layout", "blocks"), [("train", 2), ("infer", 1)])
def test_convert_by_the_yamls_flags(tmp_path, call, hf_dir, layout, blocks):
    """They are of the training network; the inference network's layout does not depend on them."""
    config = training_yaml(tmp_path / "train.yaml", CONTIGUOUS, **on_ranks(2))
    assert convert(call, hf_dir, "--config", config, "--layout", layout).code == 0
    assert_same(contents(tmp_path / "out"), fused(random_tensors(GROUPS), GROUPS, blocks, blocks))


def test_weights_that_lie_apart(tmp_path, call):
    hf = write_config(tmp_path / "hf", hf_config())
    weights = write(tmp_path / "weights", random_tensors(seed=3))
    assert convert(call, hf, "--load_checkpoint", weights).code == 0
    assert_same(contents(tmp_path / "out"), fused(random_tensors(seed=3)))


@pytest.mark.parametrize(
    ("dtype", "numpy_dtype"), [("bf16", ml_dtypes.bfloat16), ("fp16", np.float16), ("fp32", np.float32)]
)
def test_dtypes(tmp_path, call, hf_dir, dtype, numpy_dtype):
    assert convert(call, hf_dir, "--dtype", dtype).code == 0
    expected = {name: t.astype(numpy_dtype) for name, t in fused(random_tensors(GROUPS), GROUPS).items()}
    assert_same(contents(tmp_path / "out"), expected)


def axis_that_is_cut(name: str) -> int | None:
    """By tensor parallel, in training."""
    if name.endswith(("linear_qkv.weight", "linear_fc1.weight", "word_embeddings.weight", "output_layer.weight")):
        return 0
    return 1 if name.endswith(("linear_proj.weight", "linear_fc2.weight")) else None


def of_rank(whole: Tensors, rank: int, tp: int, ep: int = 1) -> Tensors:
    mine = {}
    for name, array in whole.items():
        if ".experts." in name:
            array = np.split(array, ep)[rank % ep]
        elif (axis := axis_that_is_cut(name)) is not None:
            array = np.split(array, tp, axis)[rank % tp]
        mine[name] = array
    return mine


def test_training_ranks_of_a_dense_model(tmp_path, call, hf_dir):
    assert convert(call, hf_dir, "--tp", 2).code == 0
    whole = fused(random_tensors(GROUPS), GROUPS)
    assert names(tmp_path / "out") == {"rank_0", "rank_1"}
    for rank in range(2):
        assert names(tmp_path / "out" / f"rank_{rank}") == {f"qwen3_rank_{rank}-0_0.safetensors"}
        mine = contents(tmp_path / "out" / f"rank_{rank}")
        assert_same(mine, of_rank(whole, rank, tp=2))
        prefix = "decoder.layers.1"
        assert mine["embedding.word_embeddings.weight"].shape == mine["output_layer.weight"].shape == (8, 12)
        assert mine[f"{prefix}.self_attention.linear_qkv.weight"].shape == (16, 12)
        assert mine[f"{prefix}.self_attention.linear_proj.weight"].shape == (12, 8)
        assert mine[f"{prefix}.mlp.linear_fc1.weight"].shape == (10, 12)
        assert mine[f"{prefix}.mlp.linear_fc2.weight"].shape == (12, 5)
        assert mine[f"{prefix}.self_attention.q_layernorm.weight"].shape == (2,)


def test_training_ranks_of_a_contiguous_run(tmp_path, call, hf_dir):
    config = training_yaml(tmp_path / "train.yaml", CONTIGUOUS, **on_ranks(2))
    assert convert(call, hf_dir, "--tp", 2, "--config", config).code == 0
    hf = random_tensors(GROUPS)
    for rank in range(2):
        mine = contents(tmp_path / "out" / f"rank_{rank}")
        q, k, v = (np.split(hf[f"model.layers.1.self_attn.{part}_proj.weight"], 2)[rank] for part in "qkv")
        gate, up = (np.split(hf[f"model.layers.1.mlp.{part}_proj.weight"], 2)[rank] for part in ("gate", "up"))
        qkv = mine["decoder.layers.1.self_attention.linear_qkv.weight"]
        np.testing.assert_array_equal(qkv, np.concatenate([q, k, v]))
        np.testing.assert_array_equal(mine["decoder.layers.1.mlp.linear_fc1.weight"], np.concatenate([gate, up]))
        stamp = layout_of(tmp_path / "out" / f"rank_{rank}")
        assert stamp == "qkv=contiguous,gate_up=contiguous,tensor_parallel=2"


@pytest.mark.parametrize(("tp", "ep", "ranks"), [(1, 2, 2), (2, 2, 2), (2, 4, 4), (2, 1, 2)])
def test_training_ranks_of_a_model_with_experts(tmp_path, call, tp, ep, ranks):
    hf = random_tensors(MOE_SPEC)
    assert convert(call, write(tmp_path / "hf", hf, hf_config(MOE_SPEC)), "--tp", tp, "--ep", ep).code == 0
    assert names(tmp_path / "out") == {f"rank_{rank}" for rank in range(ranks)}
    for rank in range(ranks):
        (file,) = (tmp_path / "out" / f"rank_{rank}").iterdir()
        assert file.name == f"qwen3_moe_rank_{rank}-0_0.safetensors"
        assert_same(load_file(file), of_rank(fused(hf, MOE_SPEC), rank, tp, ep))


def test_inference_ranks(tmp_path, call, hf_dir):
    assert convert(call, hf_dir, "--layout", "infer", "--tp", 2).code == 0
    hf = random_tensors(GROUPS)
    for rank in range(2):
        mine = contents(tmp_path / "out" / f"rank_{rank}")
        q, k, v = (hf[f"model.layers.0.self_attn.{part}_proj.weight"] for part in "qkv")
        heads, groups = slice(8 * rank, 8 * rank + 8), slice(4 * rank, 4 * rank + 4)
        expected = np.concatenate([q[heads], k[groups], v[groups]])
        np.testing.assert_array_equal(mine["decoder.layers.0.self_attention.linear_qkv.weight"], expected)
        gate, up = (hf[f"model.layers.0.mlp.{part}_proj.weight"] for part in ("gate", "up"))
        half = slice(5 * rank, 5 * rank + 5)
        expected = np.concatenate([gate[half], up[half]])
        np.testing.assert_array_equal(mine["decoder.layers.0.mlp.linear_fc1.weight"], expected)


@pytest.mark.parametrize("layout", ["train", "infer"])
@pytest.mark.parametrize("row", [0, -1], ids=["first", "last"])
def test_every_row_of_a_tied_output_layer_is_compared(tmp_path, call, layout, row):
    """Also the rows that another rank than the first holds."""
    tied = replace(GROUPS, tie_word_embeddings=True)
    hf = random_tensors(tied)
    hf["lm_head.weight"] = hf["model.embed_tokens.weight"].copy()
    hf["lm_head.weight"][row] += 1
    directory = write(tmp_path / "hf", hf, hf_config(tied))
    result = convert(call, directory, "--layout", layout, "--tp", 2)
    assert (result.code, num_rows(result.err)) == (2, 1)
    assert "tied tensors differ" in result.err
    assert names(tmp_path) == {"hf"}


def test_more_inference_ranks_than_kv_heads(tmp_path, call):
    """Two ranks share a KV head: both hold it."""
    spec = replace(SPEC, ffn_hidden_size=12)
    hf = random_tensors(spec)
    directory = write(tmp_path / "hf", hf, hf_config(spec))
    assert convert(call, directory, "--layout", "infer", "--tp", 4).code == 0
    q, k, v = (hf[f"model.layers.0.self_attn.{part}_proj.weight"] for part in "qkv")
    for rank, group in enumerate((0, 0, 1, 1)):
        (file,) = (tmp_path / "out" / f"rank_{rank}").iterdir()
        expected = [q[4 * rank : 4 * rank + 4], k[4 * group : 4 * group + 4], v[4 * group : 4 * group + 4]]
        qkv = load_file(file)["decoder.layers.0.self_attention.linear_qkv.weight"]
        np.testing.assert_array_equal(qkv, np.concatenate(expected))


@pytest.mark.parametrize(
    ("spec", "arguments", "expected"),
    [
        (
            SPEC,
            ("--tp", 3, "--ep", 2),
            [
                "expert parallel vocab_size num_query_groups num_attention_heads ffn_hidden_size",
                "2 16, tensor parallel 3 2, tensor parallel 3 4, tensor parallel 3 10, tensor parallel 3",
                "the model has no experts: leave it out",
                "use a size that divides the whole model: 1, 2",
            ],
        ),
        (
            SPEC,
            ("--tp", 3, "--layout", "infer"),
            [
                "vocab_size num_query_groups num_attention_heads ffn_hidden_size",
                "16, tensor parallel 3 2, tensor parallel 3 4, tensor parallel 3 10, tensor parallel 3",
                "use a size that divides the whole model: 1, 2",  # 4 heads, but ffn_hidden_size is 10
            ],
        ),
        (
            MOE_SPEC,
            ("--tp", 4, "--ep", 3),
            [
                "num_query_groups num_experts",
                "2, tensor parallel 4 4, expert parallel 3",
                "divides the whole model: 1, 2",
                "divides the whole model: 1, 2, 4",
            ],
        ),
        (
            MOE_SPEC,
            ("--tp", 2, "--ep", 4, "--layout", "infer"),
            ["expert parallel", "4, number of processes 2", "it has to divide them"],
        ),
    ],
    ids=["dense-train", "dense-infer", "moe-train", "moe-infer"],
)
def test_sizes_that_do_not_divide_the_model(tmp_path, call, spec, arguments, expected):
    write(tmp_path / "hf", random_tensors(spec), hf_config(spec))
    before = everything(tmp_path)
    result = convert(call, tmp_path / "hf", *arguments)
    assert (result.code, result.out) == (2, "")
    assert "the model can't be divided so" in result.err
    for text in expected:
        assert text in unwrapped(result.err)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("flags_of_layout", [CONTIGUOUS, {}], ids=["contiguous", "default layout"])
def test_tensor_parallel_that_is_not_the_yamls(tmp_path, call, hf_dir, flags_of_layout):
    config = training_yaml(tmp_path / "train.yaml", flags_of_layout, **on_ranks(4))
    result = convert(call, hf_dir, "--tp", 2, "--config", config)
    assert result.code == 2
    assert f"a run with {config} needs other slices" in result.err
    assert "model_parallel 4" in unwrapped(result.err) and "| --tp " in result.err
    assert names(tmp_path) == {"hf", "train.yaml"}
    assert convert(call, hf_dir, "--tp", 2, "--config", config, "--layout", "infer").code == 0


def test_sizes_that_are_not_the_yamls(tmp_path, call):
    """Expert parallel too, and those of a predict YAML for the inference layout."""
    directory = write(tmp_path / "hf", random_tensors(MOE_SPEC), hf_config(MOE_SPEC))
    sizes = {"use_parallel": True, "parallel_config": {"model_parallel": 2, "expert_parallel": 2}}
    train = training_yaml(tmp_path / "train.yaml", {}, **sizes)
    predict = training_yaml(tmp_path / "predict.yaml", {}, run_mode="predict", **sizes)
    for config, layout in ((train, "train"), (predict, "infer")):
        result = convert(call, directory, "--tp", 1, "--ep", 1, "--config", config, "--layout", layout)
        assert result.code == 2
        assert "| --tp " in result.err and "| --ep " in result.err
        assert "model_parallel 2" in unwrapped(result.err) and "expert_parallel 2" in unwrapped(result.err)
    assert names(tmp_path) == {"hf", "train.yaml", "predict.yaml"}
    assert convert(call, directory, "--tp", 2, "--config", train).code == 0  # the YAML says the other
    assert names(tmp_path / "out") == {"rank_0", "rank_1"}
    (file,) = (tmp_path / "out" / "rank_1").iterdir()
    rows = MOE_SPEC.num_experts // 2 * MOE_SPEC.hidden_size
    assert len(load_file(file)["decoder.layers.0.mlp.experts.weight1"]) == rows


@pytest.mark.parametrize(
    ("document", "named"),
    [
        ({"parallel_config": {"pipeline_stage": 2}}, "parallel_config.pipeline_stage"),
        ({"parallel_config": {"context_parallel": 4}}, "parallel_config.context_parallel"),
        ({"parallel": {"enable_parallel_optimizer": True}}, "parallel.enable_parallel_optimizer"),
    ],
)
def test_a_yaml_whose_ranks_hold_other_slices(tmp_path, call, hf_dir, document, named):
    config = training_yaml(tmp_path / "train.yaml", {}, **document)
    result = convert(call, hf_dir, "--tp", 2, "--config", config)
    assert (result.code, num_rows(result.err)) == (2, 1)
    assert named in unwrapped(result.err)
    assert "convert without --tp and --ep" in unwrapped(result.err)
    assert names(tmp_path) == {"hf", "train.yaml"}
    assert convert(call, hf_dir, "--config", config).code == 0


QWEN3_8B = ModelSpec(
    num_layers=36,
    hidden_size=4096,
    num_attention_heads=32,
    num_query_groups=8,
    head_dim=128,
    ffn_hidden_size=12288,
    vocab_size=151936,
    tie_word_embeddings=False,
)


@pytest.fixture
def large_disk(monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 50))


def test_a_dry_run_of_8b(tmp_path, call, large_disk):
    directory = write_headers(tmp_path / "hf", QWEN3_8B, hf_config(QWEN3_8B), shards=5)
    result = convert(call, directory, "--dry_run")
    assert result.code == 0
    before, after, files, largest, memory, *_, last = result.out.splitlines()
    assert before == "from        Hugging Face, 399 tensors"
    assert after == "to          MindFormers (qkv=interleaved,gate_up=interleaved), 291 tensors, 15.26 GiB in 6 files"
    parts = ", ".join(f"part{number}.safetensors" for number in range(6))
    assert files == f"            {tmp_path / 'out'}: param_name_map.json, {parts}"
    assert largest == "largest     embedding.word_embeddings.weight (151936, 4096) BF16, 1.16 GiB"
    assert memory == f"memory      at most {BUFFER_BYTES / 2**20:.1f} MiB of buffers"
    assert last == "result      nothing was written (--dry_run)"
    assert names(tmp_path) == {"hf"}


def test_a_dry_run_for_ranks(tmp_path, call, large_disk):
    directory = write_headers(tmp_path / "hf", QWEN3_8B, hf_config(QWEN3_8B), shards=5)
    result = convert(call, directory, "--dry_run", "--tp", 4, "--dtype", "fp32")
    assert result.code == 0
    assert "1164 tensors for 4 ranks, 30.52 GiB in 4 files" in result.out
    assert "largest     embedding.word_embeddings.weight (37984, 4096) F32, 593.5 MiB" in result.out
    assert names(tmp_path) == {"hf"}


def test_a_dry_run_says_that_the_place_is_taken(tmp_path, call, hf_dir):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    before = everything(tmp_path)
    result = convert(call, hf_dir, "--dry_run")
    assert result.code == 2
    assert "is not empty" in result.err
    assert "nothing was written" not in result.out
    assert everything(tmp_path) == before


def test_what_is_said_when_all_is_done(tmp_path, call, hf_dir):
    tensors = random_tensors(GROUPS)
    result = convert(call, hf_dir, "--dtype", "bf16")
    values = sum(array.size for array in tensors.values())
    rounded = sum(int((a.astype(NUMPY["BF16"]).astype(np.float32) != a).sum()) for a in tensors.values())
    cast, written = result.out.splitlines()[-2:]
    assert cast == f"cast        F32 to BF16: {rounded} of {values} values rounded, 0 of them to zero"
    (file,) = (tmp_path / "out").glob("*.safetensors")
    size = f"{file.stat().st_size / 1024:.1f}"
    assert re.fullmatch(
        rf"written     19 tensors, {size} KiB in \d+\.\d s, \d+\.\d\d GB/s, peak memory [\d.]+ [MG]iB", written
    )
    assert "result" not in result.out
    assert result.err == ""


def test_what_is_said_before_anything_is_read(tmp_path, call, hf_dir):
    result = convert(call, hf_dir, "--layout", "infer")
    size = f"{(tmp_path / 'out' / 'part0.safetensors').stat().st_size / 1024:.1f}"
    assert result.out.splitlines()[:3] == [
        "from        Hugging Face, 25 tensors",
        f"to          MindFormers (qkv=contiguous,gate_up=contiguous), 19 tensors, {size} KiB in 1 file",
        f"            {tmp_path / 'out'}: param_name_map.json, part0.safetensors",
    ]
    assert "cast" not in result.out


# mf-qwen3 export


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    return write_merged(tmp_path / "trained", fused(random_tensors()))


def export(call: Call, trained: Path, *arguments: object) -> Result:
    return call("export", "--input_path", trained, "--output_path", trained.parent / "out", *arguments)


@pytest.mark.parametrize(
    "given",
    [
        (),
        ("--input_path", "merged", "--mindspore_ckpt_dir", "ranks", "--src_strategy_dirs", "strategy"),
        ("--input_path", "merged", "--mindspore_ckpt_dir", "ranks"),
        ("--input_path", "merged", "--src_strategy_dirs", "strategy"),
        ("--mindspore_ckpt_dir", "ranks"),
        ("--src_strategy_dirs", "strategy"),
    ],
    ids=" ".join,
)
def test_one_source_is_named(tmp_path, call, given):
    result = call("export", "--output_path", tmp_path / "out", *given)
    assert result.code == 2
    assert "give --input_path, or --mindspore_ckpt_dir and --src_strategy_dirs" in result.err
    assert names(tmp_path) == set()


def test_an_output_is_named(call, trained):
    result = call("export", "--input_path", trained)
    assert (result.code, "Missing option '--output_path'" in result.err) == (2, True)


def test_an_export_is_a_complete_directory(tmp_path, call, trained):
    companions = {
        "generation_config": '{"top_k": 7}',
        "tokenizer": '{"t": 1}',
        "tokenizer_config": '{"c": 2}',
        "vocab": "{}",
        "special_tokens_map": "[]",
        "unrelated": "{}",
    }
    hf = write_config(tmp_path / "hf", hf_config(rope_theta=77, custom="kept"), **companions)
    (hf / "merges.txt").write_text("a b")
    (hf / "chat_template.jinja").write_text("{{ x }}")
    (hf / "pytorch_model.bin").write_text("pickle")
    assert export(call, trained, "--hf_config", hf).code == 0
    assert names(tmp_path / "out") == {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
        "special_tokens_map.json",
        "merges.txt",
        "chat_template.jinja",
    }
    for name in names(tmp_path / "out") - {"model.safetensors", "config.json"}:
        assert (tmp_path / "out" / name).read_text() == (hf / name).read_text()
    expected = hf_config(rope_theta=77, custom="kept", torch_dtype="bfloat16")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == expected
    assert_same(contents(tmp_path / "out"), in_bf16(random_tensors()))


def test_without_any_config_there_is_none(tmp_path, call, trained):
    result = export(call, trained)
    assert result.code == 0
    assert "no config.json is written: rope_theta and the like are not known" in result.out
    assert "--hf_config" in result.out
    assert names(tmp_path / "out") == {"model.safetensors"}


def test_a_config_beside_the_weights_is_used(tmp_path, call, trained):
    write_config(trained, hf_config(rope_theta=77), tokenizer="{}")
    result = export(call, trained)
    assert result.code == 0
    assert names(tmp_path / "out") == {"model.safetensors", "config.json", "tokenizer.json"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rope_theta"] == 77


def test_no_tokenizer(tmp_path, call, trained):
    result = export(call, trained, "--hf_config", write_config(tmp_path / "hf", hf_config()))
    assert result.code == 0
    assert f"no tokenizer is written: there is none in {tmp_path / 'hf'}" in result.out


def test_a_config_of_another_model(tmp_path, call, trained):
    write_config(tmp_path / "hf", hf_config(num_hidden_layers=3, vocab_size=17))
    result = export(call, trained, "--hf_config", tmp_path / "hf")
    assert (result.code, num_rows(result.err)) == (2, 2)
    assert "config.json: 3 weights: 2 (layers.1)" in unwrapped(result.err)
    assert "config.json: 17 weights: 16 (" in unwrapped(result.err)
    assert names(tmp_path) == {"hf", "trained"}


def test_a_config_that_is_not_there(tmp_path, call, trained):
    result = export(call, trained, "--hf_config", tmp_path / "absent")
    assert (result.code, f"{tmp_path / 'absent'} is not a directory" in result.err) == (2, True)
    (tmp_path / "empty").mkdir()
    result = export(call, trained, "--hf_config", tmp_path / "empty")
    assert (result.code, f"{tmp_path / 'empty' / 'config.json'} is missing" in result.err) == (2, True)


@pytest.mark.parametrize(
    ("metadata", "document", "model_config", "is_assumed"),
    [
        ({}, None, {}, True),
        ({"mf_qwen3_bridge.layout": "qkv=interleaved,gate_up=interleaved"}, None, {}, False),
        ({}, {"run_mode": "train"}, {}, False),
        ({}, {"run_mode": "predict"}, {}, True),
        (
            {},
            {"run_mode": "predict"},
            {"use_contiguous_weight_layout_attention": False, "use_interleaved_weight_layout_mlp": True},
            False,
        ),
        ({}, {"run_mode": "predict"}, {"use_contiguous_weight_layout_attention": False}, True),
    ],
    ids=["nothing", "stamp", "training YAML", "predict YAML", "both flags", "one flag"],
)
def test_a_layout_that_is_assumed_is_said(tmp_path, call, metadata, document, model_config, is_assumed):
    trained = write_merged(tmp_path / "trained", fused(random_tensors()), metadata=metadata)
    config = ()
    if document:
        config = ("--config", training_yaml(tmp_path / "some.yaml", model_config, **document))
    result = export(call, trained, *config)
    assert result.code == 0
    note = "the layout of QKV and gate/up is assumed to be MindFormers' default (qkv=interleaved,gate_up=interleaved)"
    assert (note in result.out) == is_assumed
    assert_same(contents(tmp_path / "out"), in_bf16(random_tensors()))


@pytest.mark.parametrize("blocks", [1, 2])
def test_flags_declare_the_layout_where_there_is_no_yaml(tmp_path, call, blocks):
    hf = random_tensors()
    trained = write_merged(tmp_path / "trained", fused(hf, SPEC, blocks, blocks))
    flags_of_layout = [part for flag, value in CONTIGUOUS.items() for part in (f"--{flag}", value)]
    result = export(call, trained, *flags_of_layout, "--model_parallel", blocks)
    assert (result.code, "warning" in result.out) == (0, False)
    assert_same(contents(tmp_path / "out"), in_bf16(hf))
    config = training_yaml(tmp_path / "some.yaml", {}, run_mode="finetune")
    result = export(call, trained, *flags_of_layout, "--config", config)
    assert result.code == 2
    assert "arguments and YAML contradict each other" in result.err


def test_the_weights_that_a_run_began_with_show_the_layout(tmp_path, call):
    hf = random_tensors(GROUPS)
    write(tmp_path / "hf", hf, hf_config(GROUPS))
    right = write_merged(tmp_path / "right", fused(hf, GROUPS))
    wrong = write_merged(tmp_path / "wrong", fused(hf, GROUPS, 1, 1))
    result = export(call, wrong, "--hf_config", tmp_path / "hf")
    assert result.code == 2
    assert f"{wrong} has another layout" in result.err
    assert "use_contiguous_weight_layout_attention True" in unwrapped(result.err)
    assert names(tmp_path) == {"hf", "right", "wrong"}
    result = export(call, right, "--hf_config", tmp_path / "hf")
    assert result.code == 0
    assert "is assumed to be" not in result.out


def test_max_shard_size(tmp_path, call, trained):
    assert export(call, trained, "--max_shard_size", "1.5KB").code == 0
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert index["metadata"]["total_size"] == 2 * sum(array.size for array in random_tensors().values())
    loaded = {file.name: load_file(file) for file in files}
    sizes = {name: sum(array.nbytes for array in tensors.values()) for name, tensors in loaded.items()}
    assert len(files) > 2 and max(sizes.values()) <= 1500
    assert {name for name, file in index["weight_map"].items() if name in loaded[file]} == random_tensors().keys()


@pytest.mark.parametrize("size", ["5 apples", "0", "-1GB"])
def test_a_shard_size_that_is_none(tmp_path, call, trained, size):
    result = export(call, trained, f"--max_shard_size={size}")
    assert (result.code, f"{size!r} is no size" in result.err) == (2, True)
    assert names(tmp_path) == {"trained"}


@pytest.mark.parametrize("is_asked", [True, False])
def test_write_tied_lm_head(tmp_path, call, is_asked):
    hf = random_tensors(TIED)
    trained = write_merged(tmp_path / "trained", fused(hf, TIED))
    assert export(call, trained, *["--write_tied_lm_head"] * is_asked).code == 0
    expected = hf | ({"lm_head.weight": hf["model.embed_tokens.weight"]} if is_asked else {})
    assert_same(contents(tmp_path / "out"), in_bf16(expected))


def test_write_tied_lm_head_of_an_untied_model(tmp_path, call, trained):
    assert export(call, trained, "--write_tied_lm_head").code == 0
    assert_same(contents(tmp_path / "out"), in_bf16(random_tensors()))


@pytest.mark.parametrize("has_index", [True, False])
def test_what_a_run_keeps_beside_the_weights(tmp_path, call, has_index):
    """An optimizer's state is left out, and hyper_param.safetensors is not read."""
    tensors = fused(random_tensors())
    state = {f"{moment}.{name}": array + 1 for name, array in tensors.items() for moment in ("adam_m", "adam_v")}
    state |= {"global_step": np.array([7], np.int32), "loss_scale": np.ones(1, np.float32)}
    trained = write_merged(tmp_path / "trained", tensors | state, files=2)
    (trained / "hyper_param.safetensors").write_bytes(b"not even a header")
    if not has_index:
        (trained / "param_name_map.json").unlink()
    result = export(call, trained)
    assert result.code == 0
    assert "left out    40 tensors that are state of a training run: adam_m.decoder." in result.out
    assert_same(contents(tmp_path / "out"), in_bf16(random_tensors()))


def test_a_single_file(tmp_path, call, trained):
    assert call("export", "--input_path", trained / "part0.safetensors", "--output_path", tmp_path / "out").code == 0
    assert_same(contents(tmp_path / "out"), in_bf16(random_tensors()))


def test_hugging_face_weights_are_not_exported(tmp_path, call, hf_dir):
    result = export(call, hf_dir)
    assert (result.code, f"{hf_dir} holds Hugging Face weights already" in result.err) == (2, True)
    assert names(tmp_path) == {"hf"}


def test_a_dry_run_of_an_export(tmp_path, call, trained):
    before = everything(tmp_path)
    result = export(call, trained, "--dry_run", "--dtype", "fp32")
    assert result.code == 0
    before_all, after, files, largest, memory, *_ = result.out.splitlines()
    assert before_all == "from        MindFormers (qkv=interleaved,gate_up=interleaved), 19 tensors"
    assert re.fullmatch(r"to          Hugging Face, 25 tensors, \d+\.\d KiB in 1 file", after)
    assert files == f"            {tmp_path / 'out'}: model.safetensors"
    assert largest.startswith("largest     model.embed_tokens.weight (16, 12) F32, ")
    assert memory.startswith("memory      at most ")
    result_line, warning = result.out.splitlines()[-2:]
    assert result_line == "result      nothing was written (--dry_run)"
    assert warning.startswith("warning     the layout of QKV and gate/up is assumed")
    assert everything(tmp_path) == before


# Bad input (SPEC E), for every command that writes a checkpoint


class Given(NamedTuple):
    """What a command reads, in three files, and the names of some of it."""

    weights: Path
    config: Path  # its directory
    index: str
    shard: str
    tensor: str
    target: str  # what the tensor becomes
    tensors: Tensors

    def rewrite(self, **changes: np.ndarray | None) -> None:
        """Under other names: ``tensor``, ``extra``; None: left out."""
        full = {"tensor": self.tensor, "extra": self.tensor.replace(".weight", ".extra.weight")}
        changed = self.tensors | {full[name]: array for name, array in changes.items()}
        whole = {name: array for name, array in changed.items() if array is not None}
        write_merged(self.weights, whole, 3) if "param" in self.index else write(self.weights, whole, shards=3)

    def in_index(self, file: str) -> None:
        assign_in_index(self.weights / self.index, self.tensor, file)

    def in_config(self, **changes: Any) -> None:
        change_config(self.config, **changes)


DOWN_PROJ, FC2 = "model.layers.1.mlp.down_proj.weight", "decoder.layers.1.mlp.linear_fc2.weight"
COMMANDS = {
    "convert": (cli, ("convert", "--model_dir", "hf", "--output_dir", "out")),
    "export": (cli, ("export", "--input_path", "trained", "--hf_config", "hf", "--output_path", "out")),
    "convert_weight": (
        convert_weight,
        ("--model", "qwen3", "--input_path", "hf", "--output_path", "out"),
    ),
    "convert_weight --reversed": (
        convert_weight,
        (
            *("--model", "qwen3", "--reversed", "--input_path", "trained"),
            *("--hf_config", "hf", "--output_path", "out"),
        ),
    ),
}


@pytest.fixture(params=COMMANDS)
def command(request) -> str:
    return request.param


@pytest.fixture
def source(tmp_path, monkeypatch, command) -> Given:
    monkeypatch.chdir(tmp_path)
    hf = random_tensors()
    if "trained" in COMMANDS[command][1]:
        write_merged(tmp_path / "trained", fused(hf), files=3)
        write_config(tmp_path / "hf", hf_config())
        files = ("param_name_map.json", "part1.safetensors")
        return Given(Path("trained"), Path("hf"), *files, FC2, DOWN_PROJ, fused(hf))
    write(tmp_path / "hf", hf, hf_config(), shards=3)
    files = ("model.safetensors.index.json", "model-00002-of-00003.safetensors")
    return Given(Path("hf"), Path("hf"), *files, DOWN_PROJ, FC2, hf)


def name_a_file_outside(source: Given) -> None:
    save_file({source.tensor: source.tensors[source.tensor]}, "outside.safetensors")
    source.in_index("../outside.safetensors")


def with_value(value: float) -> Callable[[Given], None]:
    def apply(source: Given) -> None:
        array = source.tensors[source.tensor].copy()
        array[3, 5] = value
        source.rewrite(tensor=array)

    return apply


class Touch:
    """What a pickle can do to who loads it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("loaded").resolve(),)


def only_pickles(name: str) -> Callable[[Given], None]:
    return lambda source: leave_only(source.weights, name, pickle.dumps(Touch()))


def fp8(source: Given) -> None:
    source.rewrite(tensor=source.tensors[source.tensor].astype(ml_dtypes.float8_e4m3fn))


def without_index(source: Given) -> None:
    (source.weights / source.index).unlink()
    (source.weights / source.shard).unlink()


# What is done to the source, and what has to be said of it: what, found where, what to do.
BAD: dict[str, tuple[Callable[[Given], object], tuple[str, ...]]] = {
    "missing shard": (
        lambda source: (source.weights / source.shard).unlink(),
        ("{weights} is not a whole checkpoint", "{shard}", "missing; {index} assigns", "download or copy the"),
    ),
    "truncated shard": (
        lambda source: cut_off(source.weights / source.shard),
        ("{weights} is not a whole checkpoint", "{shard}", "truncated:", "copy the file again"),
    ),
    "index names a file that is not there": (
        lambda source: source.in_index("absent.safetensors"),
        ("absent.safetensors", "missing; {index} assigns 1 tensors to it", "download or copy the file"),
    ),
    "index names a file outside": (
        name_a_file_outside,
        ("../outside.safetensors", "{index} names a file outside {weights}", "fix the index"),
    ),
    "index names another file": (
        lambda source: source.in_index(source.shard.replace("2", "1") if "2" in source.shard else "part0.safetensors"),
        ("{tensor}", "{index} has it in", "copy index and files again, from one source"),
    ),
    "index is no index": (
        lambda source: (source.weights / source.index).write_text("{"),
        ("{weights}/{index} can't be read, or is not an index of safetensors", "copy it again"),
    ),
    "wrong shape": (
        lambda source: source.rewrite(tensor=np.ones((10, 12), np.float32)),
        ("{tensor}", "shape (10, 12), (12, 10) expected", "config and weights are of two models"),
    ),
    "missing tensor": (
        lambda source: source.rewrite(tensor=None),
        ("{tensor}", "missing", "copy the file that holds it; is the download complete?"),
    ),
    "extra tensor": (
        lambda source: source.rewrite(extra=np.ones(3, np.float32)),
        ("{extra}", "not a tensor of this model", "was it renamed, or is it of another model?"),
    ),
    "NaN": (
        with_value(np.nan),
        (
            "invalid weights: tensors that are all zero or contain NaN or infinity",
            "{target}",
            "NaN or infinity: {tensor}",
            "compare checksums with the",
        ),
    ),
    "infinity": (
        with_value(-np.inf),
        (
            "invalid weights: tensors that are all zero or contain NaN or infinity",
            "{target}",
            "NaN or infinity: {tensor}",
            "compare checksums with the",
        ),
    ),
    "quantization_config": (
        lambda source: source.in_config(quantization_config={"quant_method": "awq", "bits": 4}),
        (
            "{config}/config.json can't be used",
            "quantization_config",
            "quant_method 'awq'",
            "use the unquantised (bf16)",
        ),
    ),
    "FP8": (
        fp8,
        ("{tensor}", "dtype F8_E4M3", "only BF16, F16, F32 are weights; use the unquantised checkpoint"),
    ),
    "unknown architecture": (
        lambda source: source.in_config(model_type="llama", architectures=["LlamaForCausalLM"]),
        ("{config}/config.json can't be used", "architecture", "model_type 'llama'", "Qwen3 and Qwen3-MoE are loaded"),
    ),
    "*.bin": (
        only_pickles("pytorch_model.bin"),
        ("no *.safetensors in {weights}; it holds pytorch_model.bin: only safetensors are read",),
    ),
    "*.ckpt": (
        only_pickles("qwen3.ckpt"),
        ("no *.safetensors in {weights}; it holds qwen3.ckpt: only safetensors are read",),
    ),
    "not there": (
        lambda source: source.weights.rename("elsewhere"),
        ("{weights} {absent}",),
    ),
}


def said_of(source: Given, template: str) -> str:
    fields = source._asdict() | {"extra": source.tensor.replace(".weight", ".extra.weight")}
    is_hf = source.weights == source.config
    return template.format(**fields, absent="is not a directory" if is_hf else "does not exist")


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(tmp_path, call, command, source, case):
    break_it, said = BAD[case]
    break_it(source)
    before = everything(tmp_path)
    click_command, arguments = COMMANDS[command]
    result = call(*arguments, command=click_command)
    assert result.code == 2, result.out
    text = unwrapped(result.err)
    for template in said:
        if command == "convert_weight" and case == "not there":
            template = template.replace("{absent}", "does not exist")
        assert said_of(source, template) in text, text
    assert everything(tmp_path) == before


def test_the_file_of_a_bad_value_is_named(call, command, source):
    with_value(np.nan)(source)
    (file,) = (f.name for f in source.weights.glob("*.safetensors") if source.tensor in load_file(f))
    click_command, arguments = COMMANDS[command]
    assert f"({file})" in unwrapped(call(*arguments, command=click_command).err)


def test_good_input_is_converted(call, command, source):
    """What the others break."""
    click_command, arguments = COMMANDS[command]
    assert call(*arguments, command=click_command).code == 0
    assert source.target in contents(Path("out"))


def test_an_output_that_is_not_empty(tmp_path, call, command, source):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    before = everything(tmp_path)
    click_command, arguments = COMMANDS[command]
    result = call(*arguments, command=click_command)
    assert (result.code, result.out) == (2, "")
    assert f"{tmp_path / 'out'} is not empty, and nothing is overwritten: choose another output" in result.err
    assert everything(tmp_path) == before


def test_the_source_as_output(tmp_path, call, command, source):
    before = everything(tmp_path)
    click_command, arguments = COMMANDS[command]
    result = call(*arguments[:-1], source.weights, command=click_command)
    assert (result.code, f"{tmp_path / source.weights} is not empty" in result.err) == (2, True)
    assert everything(tmp_path) == before


def test_an_output_that_is_a_file(tmp_path, call, command, source):
    (tmp_path / "out").write_text("mine")
    before = everything(tmp_path)
    click_command, arguments = COMMANDS[command]
    result = call(*arguments, command=click_command)
    assert (result.code, f"{tmp_path / 'out'} is there already, and is no directory" in result.err) == (2, True)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("options", [(), ("--dry_run",)])
def test_no_disk_space(tmp_path, monkeypatch, call, command, source, options):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    before = everything(tmp_path)
    click_command, arguments = COMMANDS[command]
    result = call(*arguments, *options, command=click_command)
    assert result.code == 2
    assert f"are needed for {tmp_path / 'out'}, 1.0 KiB are free: make room, or choose another disk" in result.err
    assert "nothing was written" not in result.out
    assert everything(tmp_path) == before


def test_an_unfinished_checkpoint_is_no_source(tmp_path, call, command, source):
    source.weights.rename("begun.incomplete")
    before = everything(tmp_path)
    click_command, arguments = COMMANDS[command]
    renamed = ["begun.incomplete" if word == str(source.weights) else word for word in arguments]
    result = call(*renamed, command=click_command)
    assert result.code == 2
    assert "begun.incomplete is not finished: give the command that makes it again" in result.err
    assert everything(tmp_path) == before


def test_a_missing_shard_without_an_index(tmp_path, call, hf_dir):
    (hf_dir / "model.safetensors.index.json").unlink()
    (hf_dir / "model-00002-of-00003.safetensors").unlink()
    result = convert(call, hf_dir)
    assert (result.code, num_rows(result.err)) == (2, 1)
    assert "model-00002-of-00003.safetensors" in unwrapped(result.err)
    assert "missing, by the number in the other files' names" in unwrapped(result.err)
    assert names(tmp_path) == {"hf"}


def test_everything_that_is_wrong_is_said_at_once(tmp_path, call, trained):
    tensors = fused(random_tensors())
    del tensors[FC2]
    tensors["decoder.layers.1.self_attention.linear_proj.weight"] = np.ones((16, 12), np.float32)
    tensors["stranger"] = np.ones(1, np.float32)
    write_merged(trained, tensors)
    result = export(call, trained)
    assert (result.code, num_rows(result.err)) == (2, 3)
    assert FC2 in unwrapped(result.err)
    assert "stranger" in unwrapped(result.err)
    assert "shape (16, 12), (12, 16) expected" in unwrapped(result.err)


# What the ranks of a training run saved


@pytest.mark.parametrize(
    ("sharding", "expected"),
    [
        # tensor parallel 2: rows, columns, nothing
        (Sharding((2,), (0, -1)), [((0, 2), (0, 1)), ((1, 2), (0, 1))]),
        (Sharding((2,), (-1, 0)), [((0, 1), (0, 2)), ((0, 1), (1, 2))]),
        (Sharding((2,), (-1,)), [((0, 1),), ((0, 1),)]),
        # data parallel 2 x tensor parallel 2: neighbours hold different parts
        (Sharding((2, 2), (0,)), [((0, 2),), ((1, 2),), ((0, 2),), ((1, 2),)]),
        (Sharding((2, 2), (1,)), [((0, 2),), ((0, 2),), ((1, 2),), ((1, 2),)]),
        (Sharding((2, 2), (1, 0)), [((0, 2), (0, 2)), ((0, 2), (1, 2)), ((1, 2), (0, 2)), ((1, 2), (1, 2))]),
        # data, context, tensor parallel; only the last cuts
        (Sharding((2, 1, 2), (0,)), [((0, 2),), ((1, 2),), ((0, 2),), ((1, 2),)]),
        # an optimizer's shards: of what tensor parallel leaves, along the first axis
        (Sharding((2, 2), (0,), -1), [((0, 4),), ((2, 4),), ((1, 4),), ((3, 4),)]),
        (Sharding((2, 2), (-1, 0), 2), [((0, 2), (0, 2)), ((0, 2), (1, 2)), ((1, 2), (0, 2)), ((1, 2), (1, 2))]),
        (Sharding((2, 2), (-1,), -1), [((0, 4),), ((1, 4),), ((2, 4),), ((3, 4),)]),
        # among 2 of the 4 that hold the same
        (Sharding((4,), (-1,), 2), [((0, 2),), ((1, 2),), ((0, 2),), ((1, 2),)]),
        # experts on 4 devices: each its own, or two copies of each half
        (Sharding((1, 4), (0, -1)), [((0, 4), (0, 1)), ((1, 4), (0, 1)), ((2, 4), (0, 1)), ((3, 4), (0, 1))]),
        (Sharding((2, 2), (0, -1)), [((0, 2), (0, 1)), ((1, 2), (0, 1)), ((0, 2), (0, 1)), ((1, 2), (0, 1))]),
        (Sharding((2, 2), (0, -1), 2), [((0, 4), (0, 1)), ((2, 4), (0, 1)), ((1, 4), (0, 1)), ((3, 4), (0, 1))]),
        # a number
        (Sharding((2,), ()), [(), ()]),
        (Sharding((2,), (), -1), [(), ()]),
    ],
    ids=str,
)
def test_the_part_that_a_device_holds(sharding, expected):
    assert [sharding.place(device) for device in range(sharding.num_devices)] == expected


def test_the_number_of_parts():
    assert Sharding((4, 2), (-1, 0)).parts() == (1, 2)
    assert Sharding((4, 2), (1, -1), 2).parts() == (4, 1)
    assert Sharding((4, 2), ()).num_devices == 8


COUNTER = {"global_step": np.array([1000], np.int32)}
TP2 = ((2,), 2)
DP2_TP2 = ((2, 2), 4)


def sharding_of(name: str, array: np.ndarray, device_matrix: tuple[int, ...]) -> Sharding:
    axis = axis_that_is_cut(name)
    return Sharding(device_matrix, tuple(0 if number == axis else -1 for number in range(array.ndim)))


def save_rank(directory: Path, rank: int, tensors: Tensors, suffix: str = "1000_1", **metadata: str) -> Path:
    file = directory / f"rank_{rank}" / f"qwen3_rank_{rank}-{suffix}.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = {name: np.array(array, order="C") for name, array in tensors.items()}
    save_file(whole, file, {"format": "ms", **metadata})
    return file


class Ranks(NamedTuple):
    """The folders of a run, and what its strategy files would say."""

    directory: Path
    strategies: list[dict[str, Sharding]]

    def open(self, file_suffix: str | None = None, **which: Any) -> OpenedSource:
        return open_rank_files(self.directory, self.strategies, file_suffix, **which)

    def refusal(self, file_suffix: str | None = None) -> str:
        with pytest.raises(BridgeError) as error:
            self.open(file_suffix)
        return str(error.value)


def save_ranks(
    directory: Path, whole: Tensors, run_of: tuple[tuple[int, ...], int] = TP2, has_redundancy: bool = True
) -> Ranks:
    """Tensor parallel 2; with redundancy removed each block is in one file only, in those of all ranks by turns."""
    device_matrix, devices = run_of
    for rank in range(devices):
        mine = {}
        for number, (name, array) in enumerate(of_rank(whole, rank, tp=2).items()):
            is_cut = axis_that_is_cut(name) is not None
            keeper = rank % 2 + 2 * (number % (devices // 2)) if is_cut else number % devices
            if has_redundancy or rank == keeper:
                mine[name] = array
        save_rank(directory, rank, mine | COUNTER, remove_redundancy=str(not has_redundancy))
    return Ranks(directory, [{name: sharding_of(name, array, device_matrix) for name, array in whole.items()}])


RUNS = pytest.mark.parametrize(
    ("run_of", "has_redundancy"),
    [(TP2, True), (TP2, False), (DP2_TP2, True), (DP2_TP2, False)],
    ids=["tp2", "tp2, no redundancy", "dp2 x tp2", "dp2 x tp2, no redundancy"],
)


@RUNS
def test_ranks_make_up_the_whole_tensors(tmp_path, run_of, has_redundancy):
    whole = fused(random_tensors())
    ranks = save_ranks(tmp_path / "ranks", whole, run_of, has_redundancy).open()
    assert {name: tensor.shape for name, tensor in ranks.tensors.items()} == {
        name: array.shape for name, array in whole.items()
    }
    assert ranks.nbytes == sum(array.nbytes for array in whole.values())
    assert ranks.tensor_parallel == 2
    assert ranks.unlisted.keys() == {"global_step"}
    assert ranks.metadata["format"] == "ms"


def test_what_is_said_to_be_without_redundancy_is_whole_again(tmp_path):
    ranks = save_ranks(tmp_path / "ranks", fused(random_tensors()), DP2_TP2, has_redundancy=False).open()
    assert ranks.metadata == {"format": "ms"}


@RUNS
@pytest.mark.parametrize("blocks", [None, 2], ids=["interleaved", "contiguous"])
def test_an_export_from_ranks_is_that_of_the_merged(tmp_path, run_of, has_redundancy, blocks):
    hf = random_tensors(GROUPS)
    whole = fused(hf, GROUPS, blocks, blocks)
    config = training_yaml(tmp_path / "train.yaml", CONTIGUOUS if blocks else {})  # does not say on how many ranks
    ranks = save_ranks(tmp_path / "ranks", whole, run_of, has_redundancy).open()
    directory = write_config(tmp_path / "hf", hf_config(GROUPS))
    model = check_trained(ranks, directory, config)
    run(jobs.to_hf(model, tmp_path / "out"))
    on_two = training_yaml(tmp_path / "two.yaml", CONTIGUOUS if blocks else {}, **on_ranks(2))
    merged = open_source(write_merged(tmp_path / "merged", whole))
    run(jobs.to_hf(check_trained(merged, directory, on_two), tmp_path / "from_merged"))
    assert_same(contents(tmp_path / "out"), contents(tmp_path / "from_merged"))
    assert_same(contents(tmp_path / "out"), hf)
    assert names(tmp_path / "out") == names(tmp_path / "from_merged")


def test_experts_of_four_ranks(tmp_path):
    hf = random_tensors(MOE_SPEC)
    whole = fused(hf, MOE_SPEC)
    for rank in range(4):
        save_rank(tmp_path / "ranks", rank, of_rank(whole, rank, tp=2, ep=4))
    strategy = {name: sharding_of(name, array, (2, 2)) for name, array in whole.items()}
    strategy |= {name: Sharding((1, 4), (0, -1)) for name in whole if ".experts." in name}
    ranks = open_rank_files(tmp_path / "ranks", [strategy])
    model = check_trained(ranks)
    assert model.spec == MOE_SPEC
    run(jobs.to_hf(model, tmp_path / "out"))
    assert_same(contents(tmp_path / "out"), hf)


def test_an_optimizers_shards(tmp_path):
    """Rows 0-3 and 8-11 of tensor parallel rank 0 and 1 on the first data parallel rank, the others on the second."""
    embedding = np.arange(32, dtype=np.float32).reshape(16, 2)
    name = "embedding.word_embeddings.weight"
    for rank, first in enumerate((0, 8, 4, 12)):
        save_rank(tmp_path / "ranks", rank, {name: embedding[first : first + 4]})
    ranks = open_rank_files(tmp_path / "ranks", [{name: Sharding((2, 2), (0, -1), -1)}])
    run(jobs.unify(ranks, tmp_path / "out"))
    assert_same(contents(tmp_path / "out"), {name: embedding})


def test_the_places_of_many_devices_are_worked_out_once(tmp_path, monkeypatch):
    """Not for each parameter again: on 1,024 devices that took 10 ms each."""
    whole = {f"decoder.layers.{layer}.x.weight": np.ones((2, 3), np.float32) for layer in range(5)}
    for rank in range(64):
        save_rank(tmp_path / "ranks", rank, {name: array[rank % 2 :][:1] for name, array in whole.items()})
    original, asked = Sharding.place, []
    monkeypatch.setattr(Sharding, "place", lambda self, device: (asked.append(device), original(self, device))[1])
    ranks = open_rank_files(tmp_path / "ranks", [{name: Sharding((32, 2), (0, -1)) for name in whole}])
    assert {tensor.shape for tensor in ranks.tensors.values()} == {(2, 3)}
    assert len(asked) <= 64


def test_pipeline_stages(tmp_path):
    """The second stage has its own devices; a tied embedding is in both."""
    whole = fused(random_tensors(TIED), TIED)
    stages = [
        {name: array for name, array in whole.items() if ".1." not in name and "final" not in name},
        {name: array for name, array in whole.items() if ".0." not in name},
    ]
    for rank in range(4):
        save_rank(tmp_path / "ranks", rank, of_rank(stages[rank // 2], rank, tp=2))
    strategy = [{name: sharding_of(name, array, (2,)) for name, array in stage.items()} for stage in stages]
    ranks = Ranks(tmp_path / "ranks", strategy)
    run(jobs.unify(ranks.open(), tmp_path / "out"))
    assert_same(contents(tmp_path / "out"), whole)
    shutil.rmtree(tmp_path / "ranks" / "rank_3")
    assert "decoder.layers.1.mlp.linear_fc1.weight" in unwrapped(ranks.refusal())
    assert "decoder.layers.0" not in ranks.refusal()


@pytest.fixture
def tp2(tmp_path) -> Ranks:
    return save_ranks(tmp_path / "ranks", fused(random_tensors()))


def test_a_missing_rank(tp2):
    shutil.rmtree(tp2.directory / "rank_1")
    text = tp2.refusal()
    assert f"{tp2.directory} does not hold what the strategy files declare" in text
    assert "1 of its 2 blocks are in no rank's file" in unwrapped(text)
    assert "is a rank's file of another step or run, or missing?" in unwrapped(text)
    assert "decoder.layers.{0..1}.mlp.linear_fc1.weight" in unwrapped(text)
    assert "layernorm" not in text  # rank 0 has all of it


def test_a_rank_that_others_can_stand_in_for(tmp_path):
    whole = fused(random_tensors())
    ranks = save_ranks(tmp_path / "ranks", whole, DP2_TP2)
    shutil.rmtree(tmp_path / "ranks" / "rank_1")
    run(jobs.unify(ranks.open(), tmp_path / "out"))
    assert_same(contents(tmp_path / "out"), whole)


def test_a_rank_that_no_other_can_stand_in_for(tmp_path):
    ranks = save_ranks(tmp_path / "ranks", fused(random_tensors()), DP2_TP2, has_redundancy=False)
    shutil.rmtree(tmp_path / "ranks" / "rank_1")
    assert "of its 2 blocks are in no rank's file" in unwrapped(ranks.refusal())
    assert "in no rank's file" in unwrapped(ranks.refusal())


def test_two_steps(tp2):
    tensors = fused(random_tensors(seed=1))
    for rank in range(2):
        save_rank(tp2.directory, rank, of_rank(tensors, rank, 2), "500_1")
    text = tp2.refusal()
    assert f"{tp2.directory} is not one run's checkpoint" in text
    assert "2 files: qwen3_rank_0-1000_1.safetensors, qwen3_rank_0-500_1.safetensors" in unwrapped(text)
    assert "2 files: qwen3_rank_1-1000_1.safetensors" in unwrapped(text)
    assert "choose with --file_suffix" in unwrapped(text)
    for suffix in ("500_1", "1000_1"):
        tensor = tp2.open(suffix).tensors["decoder.final_layernorm.weight"]
        assert tensor.file.name == f"qwen3_rank_0-{suffix}.safetensors"


@pytest.mark.parametrize("suffix", ["0_1", "00_1", "000_1", "1000", "1000_11", "1000_1.safetensors", ".*", "1000.1"])
def test_a_suffix_is_a_whole_one(tp2, suffix):
    text = tp2.refusal(suffix)
    assert "rank_0" in unwrapped(text) and "rank_1" in unwrapped(text)
    assert f"no file *{suffix}.safetensors" in unwrapped(text)
    assert "copy it, or choose another --file_suffix" in unwrapped(text)


def test_a_suffix_is_not_the_end_of_another(tp2):
    """``0_1`` is not ``1000_1``, which lies beside it."""
    tensors = fused(random_tensors(seed=1))
    for rank in range(2):
        save_rank(tp2.directory, rank, of_rank(tensors, rank, 2), "0_1")
    files = {tensor.file.name for tensor in tp2.open("0_1").tensors.values()}
    assert files == {"qwen3_rank_0-0_1.safetensors"}


def test_a_rank_without_the_step(tp2):
    (tp2.directory / "rank_1" / "qwen3_rank_1-1000_1.safetensors").unlink()
    text = tp2.refusal()
    assert num_rows(text) == 1
    assert "rank_1" in unwrapped(text) and "no *.safetensors" in unwrapped(text)


def test_a_block_that_is_missing(tp2):
    whole = fused(random_tensors())
    mine = of_rank(whole, 1, tp=2)
    del mine["decoder.layers.1.mlp.linear_fc1.weight"], mine["decoder.final_layernorm.weight"]
    save_rank(tp2.directory, 1, mine)
    text = tp2.refusal()
    assert num_rows(text) == 1
    assert "decoder.layers.1.mlp.linear_fc1.weight" in unwrapped(text)
    assert "1 of its 2 blocks are in no rank's file" in unwrapped(text)


def test_a_parameter_that_no_rank_has(tp2):
    tp2.strategies[0]["decoder.layers.2.mlp.linear_fc1.weight"] = Sharding((2,), (0, -1))
    text = tp2.refusal()
    assert num_rows(text) == 1
    assert "decoder.layers.2.mlp.linear_fc1.weight" in unwrapped(text)
    assert "in no rank's file" in unwrapped(text)


@pytest.mark.parametrize("change", [lambda array: array[:1], lambda array: array.astype(np.float16)])
def test_blocks_of_two_kinds(tp2, change):
    mine = of_rank(fused(random_tensors()), 1, tp=2)
    mine[FC2] = change(mine[FC2])
    save_rank(tp2.directory, 1, mine)
    text = tp2.refusal()
    assert num_rows(text) == 1
    assert FC2 in unwrapped(text)
    assert "not of one shape and dtype in all ranks' files" in unwrapped(text)


def test_a_block_of_other_axes(tp2):
    tp2.strategies[0]["decoder.final_layernorm.weight"] = Sharding((2,), (-1, -1))
    assert "shape (12,), 2 axes in the strategy files" in unwrapped(tp2.refusal())


def test_a_parameter_that_no_strategy_lists(tp2):
    for layer in range(2):
        del tp2.strategies[0][f"decoder.layers.{layer}.mlp.linear_fc1.weight"]
    text = tp2.refusal()
    assert num_rows(text) == 1
    assert "decoder.layers.{0..1}.mlp.linear_fc1.weight" in unwrapped(text)
    assert "in the ranks' files, in no strategy file" in unwrapped(text)
    assert "give the strategy files of this run, of all its stages" in unwrapped(text)


def test_a_rank_beyond_the_run(tp2):
    save_rank(tp2.directory, 2, of_rank(fused(random_tensors()), 0, tp=2))
    text = tp2.refusal()
    assert num_rows(text) == 1
    assert "rank_2" in unwrapped(text)
    assert "not in the strategy files' run" in unwrapped(text)
    assert "remove it, or give the strategy files of this run" in unwrapped(text)


def test_a_rank_whose_file_is_damaged(tp2):
    for rank in range(2):
        file = tp2.directory / f"rank_{rank}" / f"qwen3_rank_{rank}-1000_1.safetensors"
        file.write_bytes(file.read_bytes()[:-5])
    text = tp2.refusal()
    assert num_rows(text) == 2
    assert "truncated" in unwrapped(text) and "copy the file again" in unwrapped(text)


def test_no_ranks(tmp_path, tp2):
    nothing = tp2._replace(directory=tmp_path / "absent")
    assert f"{tmp_path / 'absent'} does not exist" in nothing.refusal()
    (tmp_path / "empty").mkdir()
    empty = tp2._replace(directory=tmp_path / "empty")
    assert f"{tmp_path / 'empty'} holds no rank_0, rank_1, ...: give the folder that does" in empty.refusal()
    inside = tp2._replace(directory=tp2.directory / "rank_0")
    assert "holds no rank_0, rank_1, ..." in inside.refusal()


def test_strategies_of_two_runs(tp2):
    tp2.strategies[0][FC2] = Sharding((4,), (-1, 0))
    assert "the strategy files are not of one run: stages of [2, 4] devices" in tp2.refusal()


ADAM = ("adam_m", "adam_v")


@pytest.fixture
def with_adam(tmp_path) -> tuple[Ranks, Tensors]:
    """A run of two ranks with its optimizer's state, and its whole tensors."""
    whole = fused(random_tensors())
    whole |= {f"{moment}.{name}": array + 1 for name, array in whole.items() for moment in ADAM}
    return save_ranks(tmp_path / "ranks", whole), whole


def test_unify_merges_everything(tmp_path, with_adam):
    ranks, whole = with_adam
    run(jobs.unify(ranks.open(), tmp_path / "out"))
    assert names(tmp_path / "out") == {"part0.safetensors", "param_name_map.json", "hyper_param.safetensors"}
    assert_same(contents(tmp_path / "out"), whole)
    assert_same(load_file(tmp_path / "out" / "hyper_param.safetensors"), COUNTER)
    index = json.loads((tmp_path / "out" / "param_name_map.json").read_text())
    assert index["weight_map"] == dict.fromkeys(whole, "part0.safetensors")
    metadata = open_source(tmp_path / "out").metadata
    assert metadata.items() >= {"format": "ms", "remove_redundancy": "False"}.items()


def test_unify_leaves_out_what_begins_so(tmp_path, with_adam):
    ranks, whole = with_adam
    run(jobs.unify(ranks.open(without_prefix="adam_"), tmp_path / "out"))
    weights = {name: array for name, array in whole.items() if not name.startswith("adam_")}
    assert len(weights) == 19
    assert_same(contents(tmp_path / "out"), weights)
    assert_same(load_file(tmp_path / "out" / "hyper_param.safetensors"), COUNTER)


def test_unify_that_leaves_out_everything(tmp_path):
    save_rank(tmp_path / "ranks", 0, {"adam_m.a": np.ones(2, np.float32)})
    ranks = open_rank_files(tmp_path / "ranks", [{"adam_m.a": Sharding((1,), (-1,))}], without_prefix="adam_")
    with pytest.raises(BridgeError, match="nothing is left to merge"):
        jobs.unify(ranks, tmp_path / "out")


def test_unify_leaves_it_out_of_what_no_strategy_lists(tmp_path, with_adam):
    ranks, whole = with_adam
    for name in whole:
        if name.startswith("adam_"):
            del ranks.strategies[0][name]
    run(jobs.unify(ranks.open(without_prefix="adam_"), tmp_path / "out"))
    assert_same(load_file(tmp_path / "out" / "hyper_param.safetensors"), COUNTER)


def test_a_number_is_merged(tmp_path):
    values = {"decoder.a": np.ones((4, 2), np.float32), "scale": np.array(3, np.float32)}
    for rank in range(2):
        save_rank(tmp_path / "ranks", rank, {"decoder.a": values["decoder.a"][:2], "scale": values["scale"]})
    strategy = {"decoder.a": Sharding((2,), (0, -1)), "scale": Sharding((2,), ())}
    run(jobs.unify(open_rank_files(tmp_path / "ranks", [strategy]), tmp_path / "out"))
    assert_same(contents(tmp_path / "out"), values)


@pytest.mark.parametrize("tensor_map", [(-1, -1, 0), (-1, 0, -1)])
def test_a_cut_that_no_parameter_of_qwen3_has(tmp_path, tensor_map):
    for rank in range(2):
        save_rank(tmp_path / "ranks", rank, {"decoder.a": np.ones((2, 2, 2), np.float32)})
    ranks = Ranks(tmp_path / "ranks", [{"decoder.a": Sharding((2,), tensor_map)}])
    assert "3 axes, cut along another than the first" in unwrapped(ranks.refusal())


def test_unify_keeps_zeros_and_nan(tmp_path):
    """What is moved may be an optimizer's state; the weights are looked at when they are exported."""
    values = {"decoder.a": np.zeros((4, 2), np.float32), "decoder.b": np.full((4, 2), np.nan, np.float32)}
    for rank in range(2):
        save_rank(tmp_path / "ranks", rank, {name: np.split(array, 2)[rank] for name, array in values.items()})
    ranks = open_rank_files(tmp_path / "ranks", [dict.fromkeys(values, Sharding((2,), (0, -1)))])
    run(jobs.unify(ranks, tmp_path / "out"))
    assert_same(contents(tmp_path / "out"), values)
    assert names(tmp_path / "out") == {"part0.safetensors", "param_name_map.json"}


def test_unify_keeps_the_stamp(tmp_path):
    hf = random_tensors(GROUPS)
    whole = fused(hf, GROUPS, 2, 2)
    stamp = "qkv=contiguous,gate_up=contiguous,tensor_parallel=2"
    for rank in range(2):
        metadata = {"mf_qwen3_bridge.layout": stamp}
        save_rank(tmp_path / "ranks", rank, of_rank(whole, rank, 2), **metadata)
    strategy = {name: sharding_of(name, array, (2,)) for name, array in whole.items()}
    run(jobs.unify(open_rank_files(tmp_path / "ranks", [strategy]), tmp_path / "out"))
    assert layout_of(tmp_path / "out") == stamp
    assert_same(contents(tmp_path / "out"), whole)


@pytest.fixture
def strategies_of(monkeypatch) -> Callable[[Ranks], None]:
    """Strategy files, without the MindSpore that reads them."""

    def read_so(ranks: Ranks) -> None:
        monkeypatch.setattr(opening, "read_strategies", lambda directory: ranks.strategies)

    return read_so


def rank_options(ranks: Ranks) -> tuple[object, ...]:
    return "--src_strategy_dirs", "strategy", "--mindspore_ckpt_dir", ranks.directory


def test_both_steps_as_the_documentation_has_them(tmp_path, call, call_script, strategies_of, with_adam):
    ranks, _ = with_adam
    strategies_of(ranks)
    filters = ("--filter_out_param_prefix", "adam_", "--has_redundancy", "False")
    step_1 = (*rank_options(ranks), "--output_dir", tmp_path / "merged", "--file_suffix", "1000_1", *filters)
    result = call(*step_1, command=unify_command)
    assert result.code == 0
    assert "to          MindFormers, merged, 19 tensors" in result.out
    merged = tmp_path / "merged" / "1000_1_ckpt_convert" / "unified_safe"
    assert names(merged) == {"part0.safetensors", "param_name_map.json", "hyper_param.safetensors"}
    paths = ("--input_path", merged, "--output_path", tmp_path / "hf")
    assert call_script("--model", "qwen3", "--reversed", *paths, *flags(NUMBERS["qwen3"]), "--dtype", "fp32").code == 0
    assert_same(contents(tmp_path / "hf"), random_tensors())


@pytest.mark.parametrize("ranks_in_yaml", [{}, on_ranks(2)], ids=["not said", "said"])
def test_merged_contiguous_ranks(tmp_path, call, call_script, strategies_of, ranks_in_yaml):
    """How many ranks there were is known, whether the YAML says it or not."""
    hf = random_tensors(GROUPS)
    ranks = save_ranks(tmp_path / "ranks", fused(hf, GROUPS, 2, 2))
    strategies_of(ranks)
    assert call("unify", *rank_options(ranks), "--output_dir", tmp_path).code == 0
    (tmp_path / "ckpt_convert" / "unified_safe").rename(tmp_path / "in")
    config = training_yaml(tmp_path / "train.yaml", CONTIGUOUS, **ranks_in_yaml)
    assert reverse(call_script, tmp_path, "qwen3", "--config", config).code == 0
    assert_same(contents(tmp_path / "out"), hf)
    shutil.rmtree(tmp_path / "out")
    write_config(tmp_path / "hf", hf_config(GROUPS))
    assert reverse(call_script, tmp_path, "qwen3", "--config", config, "--hf_config", tmp_path / "hf").code == 0
    assert_same(contents(tmp_path / "out"), hf)
    result = call(
        "export", *rank_options(ranks), "--output_path", tmp_path / "o", "--dtype", "fp32", "--config", config
    )
    assert result.code == 0
    assert_same(contents(tmp_path / "o"), hf)


def test_a_yaml_of_another_number_of_ranks(tmp_path, call, strategies_of):
    ranks = save_ranks(tmp_path / "ranks", fused(random_tensors(GROUPS), GROUPS, 2, 2))
    strategies_of(ranks)
    config = training_yaml(tmp_path / "train.yaml", CONTIGUOUS, **on_ranks(4))
    result = call("export", *rank_options(ranks), "--output_path", tmp_path / "out", "--config", config)
    assert (result.code, num_rows(result.err)) == (2, 1)
    assert f"{config} is not of this run" in result.err
    assert "model_parallel" in unwrapped(result.err) and "what the ranks saved: 2" in unwrapped(result.err)
    assert names(tmp_path) == {"ranks", "train.yaml"}


def test_both_steps_in_one(tmp_path, call, strategies_of, with_adam):
    ranks, _ = with_adam
    strategies_of(ranks)
    result = call("export", *rank_options(ranks), "--output_path", tmp_path / "hf", "--dtype", "fp32")
    assert result.code == 0
    assert "left out    39 tensors that are state of a training run" in result.out
    assert_same(contents(tmp_path / "hf"), random_tensors())


def test_unify_without_a_suffix(tmp_path, call, strategies_of, tp2):
    strategies_of(tp2)
    assert call("unify", *rank_options(tp2), "--output_dir", tmp_path / "merged").code == 0
    assert_same(contents(tmp_path / "merged" / "ckpt_convert" / "unified_safe"), fused(random_tensors()))


@pytest.mark.parametrize("name", ["export", "unify"])
def test_ranks_that_do_not_fit_are_refused(tmp_path, call, strategies_of, tp2, name):
    strategies_of(tp2)
    shutil.rmtree(tp2.directory / "rank_1")
    before = everything(tmp_path)
    output = ("--output_path" if name == "export" else "--output_dir", tmp_path / "out")
    result = call(name, *rank_options(tp2), *output)
    assert result.code == 2
    assert "1 of its 2 blocks are in no rank's file" in unwrapped(result.err)
    assert everything(tmp_path) == before


def test_a_dry_run_of_unify(tmp_path, call, strategies_of, with_adam):
    ranks, _ = with_adam
    strategies_of(ranks)
    before = everything(tmp_path)
    result = call("unify", *rank_options(ranks), "--output_dir", tmp_path / "merged", "--dry_run")
    assert result.code == 0
    assert "from        ranks' files, 58 tensors\nto          MindFormers, merged, 57 tensors, " in result.out
    assert "largest     decoder.layers.0.self_attention.linear_qkv.weight (32, 12) F32, 1.5 KiB" in result.out
    assert everything(tmp_path) == before


@pytest.mark.parametrize("name", ["export", "unify"])
def test_no_strategy_files(tmp_path, call, tp2, name):
    output = ("--output_path" if name == "export" else "--output_dir", tmp_path / "out")
    folders = ("--mindspore_ckpt_dir", tp2.directory, "--src_strategy_dirs", tmp_path / "strategy")
    result = call(name, *folders, *output)
    assert (result.code, f"{tmp_path / 'strategy'} does not exist" in result.err) == (2, True)
    (tmp_path / "strategy").mkdir()
    result = call(name, *folders, *output)
    assert result.code == 2
    assert f"{tmp_path / 'strategy'} holds no ckpt_strategy_rank_N.ckpt: give the run's strategy folder" in result.err
    assert names(tmp_path) == {"ranks", "strategy"}


def test_strategy_files_without_mindspore(tmp_path, monkeypatch, call, tp2):
    (tmp_path / "strategy").mkdir()
    (tmp_path / "strategy" / "ckpt_strategy_rank_0.ckpt").write_bytes(pickle.dumps(Touch()))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(strategies, "find_spec", lambda name: None)
    strategies._messages.cache_clear()
    folders = ("--mindspore_ckpt_dir", tp2.directory, "--src_strategy_dirs", tmp_path / "strategy")
    result = call("unify", *folders, "--output_dir", tmp_path / "out")
    assert (result.code, "mindspore is not installed: pip install" in result.err) == (2, True)
    assert names(tmp_path) == {"ranks", "strategy"}


def test_the_flags_of_unify():
    arguments = ["--src_strategy_dirs", "s", "--mindspore_ckpt_dir", "c", "--output_dir", "o"]
    assert unify_command.make_context("unify", arguments).params == {
        "src_strategy_dirs": Path("s"),
        "mindspore_ckpt_dir": Path("c"),
        "output_dir": Path("o"),
        "file_suffix": None,
        "filter_out_param_prefix": None,
        "file_format": "safetensors",
        "dry_run": False,
    }
    required = {option.opts[0] for option in unify_command.params if option.required}
    assert required == {"--src_strategy_dirs", "--mindspore_ckpt_dir", "--output_dir"}


# As processes of their own


def script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_the_script_there_and_back(tmp_path):
    hf = random_tensors(MOE_SPEC, dtype="BF16")
    write(tmp_path / "hf", hf, hf_config(MOE_SPEC), shards=2)
    there = ("--model", "qwen3-moe", "--input_path", tmp_path / "hf", "--output_path", tmp_path / "mf")
    assert script("convert_weight.py", *there).returncode == 0
    back = ("--model", "qwen3-moe", "--reversed", "--input_path", tmp_path / "mf", "--output_path", tmp_path / "back")
    result = script("convert_weight.py", *back, *flags(NUMBERS["qwen3-moe"]), "--dtype", "bf16")
    assert (result.returncode, result.stderr) == (0, "")
    assert_same(contents(tmp_path / "back"), hf)


def test_the_script_refuses_without_a_traceback(tmp_path):
    write_merged(tmp_path / "in", fused(random_tensors()))
    paths = ("--input_path", tmp_path / "in", "--output_path", tmp_path / "out")
    result = script("convert_weight.py", "--model", "qwen3", "--reversed", *paths, "--num_layers", 28)
    assert (result.returncode, result.stdout) == (2, "")
    assert says_of_both(result.stderr, "num_layers", 28, 2)
    assert "Traceback" not in result.stderr
    assert names(tmp_path) == {"in"}


def test_the_merging_script_needs_its_flags(tmp_path):
    result = script("unified_safetensors.py", "--output_dir", tmp_path / "out")
    assert result.returncode == 2
    assert "Missing option '--src_strategy_dirs'" in result.stderr
