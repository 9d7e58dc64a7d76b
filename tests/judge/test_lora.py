"""transformers and PEFT load what is exported of a MindFormers LoRA run: both exports compute the same."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel

from mf_qwen3_bridge.cli.main import cli
from mf_qwen3_bridge.inputs.preflight import check
from mf_qwen3_bridge.model.layouts import Layout
from mf_qwen3_bridge.model.rules import HF, TRAIN
from tests.support.checkpoints import LAYOUTS
from tests.support.commands import ROOT
from tests.support.documents import blocks as page_blocks
from tests.support.golden import CHECKPOINTS, TOLERANCE, golden
from tests.support.lora import ALPHA, Lora, blocks, experts_lora, lora
from tests.support.torch_models import load_all, prompt_logits
from tests.support.trained import fused, on_ranks, training_yaml, write_merged

# As in tests/integration/test_lora.py, where MindFormers' own cells compute what the merged export computes.
DENSE, MOE, SCALE = "untied_fp16", "moe_fp32", 0.05


def export(directory: Path, name: str, adapter: Lora, layout: Layout, tp: int, kind: str) -> Path:
    spec = check(CHECKPOINTS / name).spec
    hf = {target.name: target.make() for target in check(CHECKPOINTS / name).plan(HF, "F32").targets}
    if not (directory / "run").exists():
        write_merged(directory / "run", fused(hf, spec, *blocks(layout, tp)) | adapter.saved)
    config = training_yaml(directory / "train.yaml", layout.training_flags, **(on_ranks(tp) if tp > 1 else {}))
    command = ["export", "--input_path", directory / "run", "--output_path", directory / kind, "--config", config]
    command += ["--hf_config", CHECKPOINTS / name, "--lora", kind, "--lora_alpha", ALPHA, "--dtype", "fp32"]
    result = CliRunner().invoke(cli, list(map(str, command)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return directory / kind


def adapted(name: str, directory: Path) -> PeftModel:
    """The base with the adapter, loaded with nothing missing and nothing left over, which PEFT warns of."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return PeftModel.from_pretrained(load_all(CHECKPOINTS / name), directory).eval()


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize(
    ("name", "layout"), [*((DENSE, layout) for layout in LAYOUTS), (MOE, LAYOUTS[0]), (MOE, LAYOUTS[-1])], ids=str
)
def test_an_adapter_computes_what_the_merged_model_computes(tmp_path: Path, name: str, layout: Layout, tp: int):
    spec = check(CHECKPOINTS / name).spec
    if spec.num_query_groups % tp:
        pytest.skip("its heads can't be divided so")
    adapter = lora(spec, *blocks(layout, tp), scale=SCALE)
    peft_model = adapted(name, export(tmp_path, name, adapter, layout, tp, "adapter"))
    merged = load_all(export(tmp_path, name, adapter, layout, tp, "merge"))
    for expected in golden(name):
        logits = prompt_logits(merged, expected.prompt).numpy()
        found = prompt_logits(peft_model, expected.prompt).numpy()
        scale = np.abs(logits).max()
        assert np.abs(found - logits).max() < TOLERANCE * scale
        assert np.abs(expected.logits - logits).max() > 0.1 * scale
    weights = peft_model.merge_and_unload().state_dict()
    for weight, value in merged.state_dict().items():  # products of torch and of numpy are summed in other orders
        torch.testing.assert_close(weights[weight], value, rtol=0, atol=1e-6)


def test_experts(tmp_path: Path):
    """As PyNative training of MindFormers 2.1 adapts them."""
    adapter = experts_lora(check(CHECKPOINTS / MOE).spec, scale=SCALE)
    peft_model = adapted(MOE, export(tmp_path, MOE, adapter, LAYOUTS[0], 1, "adapter"))
    merged = load_all(export(tmp_path, MOE, adapter, LAYOUTS[0], 1, "merge"))
    for expected in golden(MOE):
        logits = prompt_logits(merged, expected.prompt).numpy()
        scale = np.abs(logits).max()
        assert np.abs(prompt_logits(peft_model, expected.prompt).numpy() - logits).max() < TOLERANCE * scale
        assert np.abs(expected.logits - logits).max() > 0.01 * scale


def test_the_code_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    demo = check(ROOT / "demo" / "qwen3-demo")
    whole = {target.name: target.make() for target in demo.plan(TRAIN).targets}
    run = write_merged(tmp_path / "run", whole | lora(demo.spec, scale=SCALE).saved)
    command = ["export", "--input_path", run, "--output_path", tmp_path / "adapter", "--lora", "adapter"]
    assert CliRunner().invoke(cli, list(map(str, [*command, "--lora_alpha", ALPHA]))).exit_code == 0
    monkeypatch.chdir(tmp_path)
    (code,) = page_blocks((ROOT / "docs" / "lora_runs.md").read_text(encoding="utf-8"), "python")
    names: dict[str, Any] = {}
    exec(code, names)
    matrices = {name for name, _ in names["model"].named_parameters() if ".lora_" in name}
    assert len(matrices) == 2 * 7 * demo.spec.num_layers


def test_some_layers(tmp_path: Path):
    """PEFT adapts those modules alone."""
    adapter = lora(check(CHECKPOINTS / DENSE).spec, scale=SCALE)
    for name in [name for name in adapter.saved if "layers.0." in name]:
        del adapter.saved[name]
    peft_model = adapted(DENSE, export(tmp_path, DENSE, adapter, LAYOUTS[0], 1, "adapter"))
    merged = load_all(export(tmp_path, DENSE, adapter, LAYOUTS[0], 1, "merge"))
    assert {name for name, _ in peft_model.named_parameters() if "lora" in name and "layers.0." in name} == set()
    expected = golden(DENSE)[0]
    logits = prompt_logits(merged, expected.prompt).numpy()
    found = prompt_logits(peft_model, expected.prompt).numpy()
    assert np.abs(found - logits).max() < TOLERANCE * np.abs(logits).max()
