"""PEFT merges what the bridge merges: bit for bit where both round once, and within float32's rounding otherwise."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mf_qwen3_bridge.cli.main import main
from tests.support.adapters import ADAPTERS, NAMES, base_of, config_of
from tests.support.golden import CHECKPOINTS

V4 = [name for name in NAMES if not config_of(name)["target_parameters"]]


def merged_by_peft(base: Path, *adapters: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    peft_model = PeftModel.from_pretrained(model, adapters[0], "0")
    for number, adapter in enumerate(adapters[1:], 1):
        peft_model.load_adapter(adapter, str(number))
    names = [str(number) for number in range(len(adapters))]
    return dict(peft_model.merge_and_unload(adapter_names=names).state_dict())


def merged_by_bridge(out: Path, base: Path, *adapters: object, dtype: str) -> dict[str, torch.Tensor]:
    words = ["convert", "--model_dir", base, "--output_dir", out, "--layout", "hf", "--dtype", dtype]
    words += [word for adapter in adapters for word in ("--adapter", adapter)]
    with pytest.raises(SystemExit) as exit_code:
        main(list(map(str, words)))
    assert exit_code.value.code == 0
    return {name: t for file in out.glob("*.safetensors") for name, t in load_file(file).items()}


def test_there_are_some():
    assert len(V4) >= 5


@pytest.mark.parametrize("name", V4)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_merged_weights_are_pefts(tmp_path: Path, name: str, dtype: str):
    base, torch_dtype = base_of(name), {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    if dtype == "bf16" and json.loads((base / "config.json").read_text())["torch_dtype"] != "bfloat16":
        merged_by_bridge(tmp_path / "base", base, dtype=dtype)  # PEFT would round it first
        base = tmp_path / "base"
    found = merged_by_bridge(tmp_path / "out", base, ADAPTERS / name, dtype=dtype)
    expected = merged_by_peft(base, ADAPTERS / name, dtype=torch_dtype)
    assert found.keys() == expected.keys()
    for weight, value in expected.items():
        mine, other = found[weight].float(), value.float()
        unit = torch.finfo(torch_dtype).eps * other.abs().max()
        assert (mine - other).abs().max() <= 2 * unit, weight
        if dtype == "bf16":  # a sum that torch's BLAS rounds differently in float32 seldom crosses a rounding edge
            allowed = 1.0 if weight.endswith("embed_tokens.weight") else 0.01
            assert (mine != other).float().mean() <= allowed, weight


def test_several_adapters_and_scales(tmp_path: Path):
    name = "dense_lora"
    base, adapter = base_of(name), ADAPTERS / name
    other = tmp_path / "other"
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=3, lora_alpha=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False),
    )
    model.save_pretrained(other)
    found = merged_by_bridge(tmp_path / "out", base, adapter, other, dtype="fp32")
    expected = merged_by_peft(base, adapter, other, dtype=torch.float32)
    for weight, value in expected.items():
        torch.testing.assert_close(found[weight], value, rtol=0, atol=2e-6)
    peft_model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    for module in peft_model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 0.25)
    scaled = merged_by_bridge(tmp_path / "scaled", base, f"{adapter}:0.25", dtype="fp32")
    for weight, value in peft_model.merge_and_unload().state_dict().items():
        torch.testing.assert_close(scaled[weight], value, rtol=0, atol=2e-6)


def test_what_is_refused_of_tied_embeddings_is_what_peft_unties(tmp_path: Path):
    """PEFT adapts the embedding alone, but merging changes the output layer with it."""
    base = CHECKPOINTS / "tied_bf16"
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False),
    ).eval()
    ids = torch.tensor([[1, 2, 3]])
    with torch.inference_mode():
        beside = model(input_ids=ids).logits
        model.save_pretrained(tmp_path / "tied")
        merged = model.merge_and_unload()(input_ids=ids).logits
    assert np.abs((merged - beside).numpy()).max() > 0.1 * np.abs(beside.numpy()).max()
    with pytest.raises(SystemExit) as exit_code:
        main(["check", "--model_dir", str(base), "--adapter", str(tmp_path / "tied")])
    assert exit_code.value.code == 2
