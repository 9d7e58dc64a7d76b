"""transformers loads what the bridge exports: every key in its place, and the logits of the model it was made of."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

from mf_qwen3_bridge.cli.main import cli
from tests.support.commands import ROOT
from tests.support.torch_models import greedy, load_all, prompt_logits

FIXTURES = ROOT / "tests" / "fixtures"
GOLDEN = sorted(path.stem for path in (FIXTURES / "golden").glob("*.npz"))
QUANTISED = sorted(path.stem for path in (FIXTURES / "quantised").glob("*.npz"))
FLAGS = "use_contiguous_weight_layout_attention", "use_interleaved_weight_layout_mlp"


def run(*arguments: object) -> str:
    result = CliRunner().invoke(cli, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("layout", ["default", "contiguous", "mixed", "infer"])
@pytest.mark.parametrize("name", GOLDEN)
def test_logits_of_what_went_there_and_back(tmp_path: Path, name: str, layout: str):
    source = FIXTURES / "checkpoints" / name
    there = ["--model_dir", source, "--output_dir", tmp_path / "mf", "--layout", "train"]
    if layout == "infer":
        there[-1] = "infer"
    elif layout != "default":
        values = (True, False) if layout == "contiguous" else (True, True)
        yaml = tmp_path / "train.yaml"
        yaml.write_text(json.dumps({"run_mode": "train", "model": {"model_config": dict(zip(FLAGS, values))}}))
        there += ["--config", yaml]
    run("convert", *there)
    options = ["--hf_config", source, "--dtype", "fp32", "--max_shard_size", "30KB"]
    run("export", "--input_path", tmp_path / "mf", "--output_path", tmp_path / "hf", *options)
    model = load_all(tmp_path / "hf")
    with np.load(FIXTURES / "golden" / f"{name}.npz") as golden:
        for number in range(4):
            logits = prompt_logits(model, golden[f"prompt_{number}"].tolist()).numpy()
            np.testing.assert_allclose(logits, golden[f"logits_{number}"], rtol=0, atol=1e-5 * np.abs(logits).max())


@pytest.mark.parametrize("name", QUANTISED)
def test_a_dequantised_directory(tmp_path: Path, name: str):
    """What ``convert --layout hf`` makes of quantised weights, which this transformers loads as any other model."""
    run("convert", "--model_dir", FIXTURES / "quantised" / name, "--layout", "hf", "--output_dir", tmp_path / "hf")
    model = load_all(tmp_path / "hf")
    with np.load(FIXTURES / "quantised" / f"{name}.npz") as golden:
        for number in range(4):
            prompt = golden[f"prompt_{number}"].tolist()
            logits = prompt_logits(model, prompt).numpy()
            np.testing.assert_allclose(logits, golden[f"logits_{number}"], rtol=0, atol=1e-5 * np.abs(logits).max())
            assert greedy(model, prompt, 64) == golden[f"tokens_{number}"].tolist()


def test_the_demo_comes_back_whole(tmp_path: Path):
    """Plain from_pretrained of model and tokenizer, and the demo's answers."""
    source = ROOT / "demo" / "qwen3-demo"
    run("convert", "--model_dir", source, "--output_dir", tmp_path / "mf")
    run("export", "--input_path", tmp_path / "mf", "--output_path", tmp_path / "hf", "--hf_config", source)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    before, after = (AutoModelForCausalLM.from_pretrained(path, dtype="auto") for path in (source, tmp_path / "hf"))
    assert after.dtype == torch.bfloat16
    assert after.generation_config.to_dict() == before.generation_config.to_dict()
    ids = tokenizer("Weights move from Hugging Face", return_tensors="pt").input_ids
    answers = [model.to(torch.bfloat16).generate(ids, max_new_tokens=16, do_sample=False) for model in (before, after)]
    assert torch.equal(*answers)


def test_a_plan_made_with_the_wrong_layout_is_not_the_model(tmp_path: Path):
    """The comparison sees it: a checkpoint in one layout, exported as if it had the other."""
    source = FIXTURES / "checkpoints" / "untied_fp32"
    run("convert", "--model_dir", source, "--output_dir", tmp_path / "mf", "--layout", "infer")
    (part,) = (tmp_path / "mf").glob("*.safetensors")
    part.write_bytes(part.read_bytes().replace(b"mf_qwen3_bridge.layout", b"mf_qwen3_bridge.hidden"))
    (tmp_path / "config").mkdir()  # beside its weights the export would be refused
    (tmp_path / "config" / "config.json").write_text((source / "config.json").read_text())
    options = ["--hf_config", tmp_path / "config", "--dtype", "fp32"]
    run("export", "--input_path", tmp_path / "mf", "--output_path", tmp_path / "hf", *options)
    with np.load(FIXTURES / "golden" / "untied_fp32.npz") as golden:
        logits = prompt_logits(load_all(tmp_path / "hf"), golden["prompt_0"].tolist()).numpy()
        assert np.abs(logits - golden["logits_0"]).max() > 0.1 * np.abs(logits).max()
