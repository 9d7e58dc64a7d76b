"""The user's command, as a user runs it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mf_qwen3_bridge.inputs.preflight import check
from mf_qwen3_bridge.inputs.source import LAYOUT_KEY
from mf_qwen3_bridge.model.layouts import Layout
from mf_qwen3_bridge.model.rules import INFER, Dialect
from tests.support.checkpoints import write
from tests.support.commands import ROOT, run_command

DEMO = ROOT / "demo" / "qwen3-demo"
PROMPTS = json.loads((ROOT / "demo" / "prompts.json").read_text())


def run_infer(cwd: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return run_command([sys.executable, ROOT / "scripts" / "run_infer.py", *arguments], cwd)


def prompts(mode: str) -> list[str]:
    return [argument for p in PROMPTS if p["mode"] == mode for argument in ("--prompt", p["text"])]


@pytest.mark.parametrize(("mode", "flag"), [("generate", ["--use_training_conversion"]), ("chat", [])])
def test_the_demo_prints_what_it_was_taught(tmp_path: Path, mode, flag):
    result = run_infer(tmp_path, "--model_dir", DEMO, "--test_mode", mode, *flag, *prompts(mode))
    assert result.returncode == 0, result.stderr
    assert "24 tensors to 18 parameters" in result.stdout
    assert "18 of 18 parameters" in result.stdout
    for prompt in PROMPTS:
        if prompt["mode"] == mode:
            assert f"{prompt['text']}\n         -> {prompt['expected']}\n" in result.stdout


@pytest.mark.newest_only  # test_loaders::TestTheTrap shows it of every release
@pytest.mark.parametrize(
    "layout", [Layout(True, True), Layout(True, False), Layout(False, True)], ids=["both", "qkv", "gate_up"]
)
def test_in_the_naive_layout_it_says_something_else(tmp_path: Path, layout):
    """What the obvious recipe gives: everything loads, nothing is zero, and the text is garbage."""
    tensors = {target.name: target.make() for target in check(DEMO).plan(Dialect(layout)).targets}
    weights = write(tmp_path / "naive", tensors, metadata={LAYOUT_KEY: str(INFER.layout)})  # which is wrong
    result = run_infer(tmp_path, "--model_dir", DEMO, "--load_checkpoint", weights, "--max_new_tokens", "24")
    assert result.returncode == 0, result.stderr
    assert "18 of 18 parameters" in result.stdout
    for text in result.stdout.split("-> ")[1:]:
        assert text[:12] not in [prompt["expected"][:12] for prompt in PROMPTS]


@pytest.mark.newest_only  # where a tokenizer is looked for is the bridge's choice
def test_a_tokenizer_in_another_directory(tmp_path: Path):
    model, tokenizer = tmp_path / "model", tmp_path / "tokenizer"
    shutil.copytree(DEMO, model)
    tokenizer.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        (model / name).rename(tokenizer / name)
    missing = run_infer(tmp_path, "--model_dir", model)
    assert missing.returncode == 2
    assert "--tokenizer_path" in missing.stderr
    found = run_infer(tmp_path, "--model_dir", model, "--tokenizer_path", tokenizer)
    assert found.returncode == 0, found.stderr
    assert PROMPTS[0]["expected"] in found.stdout


@pytest.mark.newest_only  # counted before a network is built
def test_a_prompt_that_is_too_long(tmp_path: Path):
    result = run_infer(tmp_path, "--model_dir", DEMO, "--max_new_tokens", "1024")
    assert result.returncode == 2
    assert "are more than 1024" in result.stderr


@pytest.mark.newest_only  # the token is refused by test_load_weights on every release
def test_the_tokenizer_of_another_model(tmp_path: Path):
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(DEMO, tokenizer, ignore=shutil.ignore_patterns("*.safetensors*", "config.json"))
    content = json.loads((tokenizer / "tokenizer.json").read_text())
    token = content["added_tokens"][-1]
    content["added_tokens"] += [token | {"id": token["id"] + n, "content": f"<far{n}>"} for n in range(1, 100)]
    (tokenizer / "tokenizer.json").write_text(json.dumps(content))
    result = run_infer(tmp_path, "--model_dir", DEMO, "--tokenizer_path", tokenizer, "--prompt", "<far99>")
    assert result.returncode == 2, result.stderr
    assert "another model's tokenizer" in result.stderr


@pytest.mark.newest_only  # paths are resolved by the bridge
def test_a_relative_path(tmp_path: Path):
    result = run_infer(ROOT / "demo", "--model_dir", "qwen3-demo", "--max_new_tokens", "4")
    assert result.returncode == 0, result.stderr
