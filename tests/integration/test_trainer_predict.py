"""``Trainer.predict`` with the YAMLs of this repository: the tokens are transformers'."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import yaml
from mf_qwen3_bridge.convert.jobs import to_mindformers
from mf_qwen3_bridge.convert.run import run
from mf_qwen3_bridge.inputs.preflight import check
from mf_qwen3_bridge.model.rules import TRAIN
from tests.support.commands import REGISTER_PATH, ROOT, TRAINER, msrun, run_command
from tests.support.golden import GOLDENS, QUANTISED, golden
from tests.support.tokenizers import NEW_TOKENS, spell, with_generation_config, with_tokenizer


def changed_yaml(name: str, scratch: Path, directory: Path, model_config: dict[str, Any], **entries: Any) -> Path:
    document = yaml.safe_load((ROOT / "yaml" / name).read_text()) | {"pretrained_model_dir": str(directory)} | entries
    document["model"]["model_config"] |= model_config
    document["generation_config"]["max_new_tokens"] = NEW_TOKENS
    path = scratch / "predict.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def predict(scratch: Path, config: Path, name: str, goldens: Path = GOLDENS) -> subprocess.CompletedProcess[str]:
    prompts = [spell(case.prompt) for case in golden(name, goldens)]
    arguments = ["--config", config, "--register_path", REGISTER_PATH, "--predict_data", *prompts]
    return run_command([sys.executable, TRAINER, *arguments], scratch)


def check_texts(scratch: Path, name: str, goldens: Path = GOLDENS) -> None:
    printed = ast.literal_eval((scratch / "text_generation_result.txt").read_text())
    expected = [spell(case.prompt + case.tokens[:NEW_TOKENS]) for case in golden(name, goldens)]
    assert [text for entry in printed for text in entry["text_generation_text"]] == expected


@pytest.mark.parametrize(
    ("name", "model_config"),
    [
        ("tied_bf16", {}),
        ("rope_parameters", {}),
        ("yarn", {}),
        ("moe_fused", {}),
        ("split_shards", {"qkv_concat": True}),
    ],
)
def test_the_tokens_of_transformers(tmp_path: Path, name: str, model_config: dict[str, Any]):
    directory = with_generation_config(with_tokenizer(name, tmp_path))
    config = changed_yaml("cpu/predict_qwen3.yaml", tmp_path, directory, model_config | {"seq_length": 64})
    result = predict(tmp_path, config, name)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    check_texts(tmp_path, name)
    assert not list(tmp_path.rglob("*converted*"))


@pytest.mark.parametrize("name", ["fp8_dense", "int_rows_moe"])
def test_quantised_weights(tmp_path: Path, name: str):
    """MindFormers finds ``quantization_config`` in config.json, and would build no network."""
    directory = with_generation_config(with_tokenizer(name, tmp_path, QUANTISED))
    settings = {"seq_length": 64, "params_dtype": "bfloat16"}  # the goldens' weights are rounded to it
    config = changed_yaml("cpu/predict_qwen3.yaml", tmp_path, directory, settings)
    result = predict(tmp_path, config, name, QUANTISED)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    check_texts(tmp_path, name, QUANTISED)


def test_weights_in_another_directory(tmp_path: Path):
    """``load_checkpoint`` may name what convert wrote; what nothing says the layout of is refused."""
    name = "moe_fp32"
    directory = with_generation_config(with_tokenizer(name, tmp_path))
    run(to_mindformers(check(directory), TRAIN, tmp_path / "train"))
    for file in directory.glob("*.safetensors*"):
        file.unlink()
    entries = {"load_checkpoint": str(tmp_path / "train")}
    config = changed_yaml("cpu/predict_qwen3.yaml", tmp_path, directory, {"seq_length": 64}, **entries)
    result = predict(tmp_path, config, name)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    check_texts(tmp_path, name)


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_damaged_weights_are_named(tmp_path: Path, damage: str):
    name = "split_shards"
    directory = with_generation_config(with_tokenizer(name, tmp_path))
    shard = sorted(directory.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.unlink()
    if damage == "truncated":
        shard.write_bytes(whole[:-100])
    config = changed_yaml("cpu/predict_qwen3.yaml", tmp_path, directory, {"seq_length": 64})
    result = predict(tmp_path, config, name)
    assert result.returncode != 0
    assert "model-00002" in result.stderr and damage in result.stderr
    assert not (tmp_path / "text_generation_result.txt").exists()


def test_graph_mode_on_a_cpu_is_refused_before_anything_is_built(tmp_path: Path):
    name = "untied_fp32"
    directory = with_generation_config(with_tokenizer(name, tmp_path))
    context = {"mode": 0, "device_target": "CPU"}
    config = changed_yaml("cpu/predict_qwen3.yaml", tmp_path, directory, {"seq_length": 64}, context=context)
    result = predict(tmp_path, config, name)
    assert result.returncode != 0
    assert "BridgeError" in result.stderr and "context.mode: 1" in result.stderr, result.stderr[-3000:]
    assert "in wrap_config_init" in result.stderr  # its config is made first
    assert not (tmp_path / "text_generation_result.txt").exists()


@pytest.mark.parametrize("name", ["one_kv_head", "moe_scattered"])
def test_two_processes(tmp_path: Path, name: str):
    directory = with_generation_config(with_tokenizer(name, tmp_path))
    config = changed_yaml("cpu/predict_qwen3_tp2.yaml", tmp_path, directory, {"seq_length": 64})
    prompts = [spell(case.prompt) for case in golden(name)]
    flags = ["--worker_num=2", "--local_worker_num=2", "--master_port=0", "--log_dir=msrun_log", "--join=True"]
    arguments = [TRAINER, "--config", config, "--register_path", REGISTER_PATH, "--predict_data", *prompts]
    code, logs = msrun(tmp_path, ["msrun", *flags, *arguments])
    assert code == 0, [log[-3000:] for log in logs]
    expected = [{"text_generation_text": [spell(case.prompt + case.tokens[:NEW_TOKENS])]} for case in golden(name)]
    for log in logs:
        assert f"output result is: {expected}" in log
