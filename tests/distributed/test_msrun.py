"""``scripts/run_infer.py`` under msrun, two processes on the CPU: every rank says what transformers says."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import yaml
from tests.support.adapters import ADAPTERS, adapter_golden, base_of
from tests.support.commands import ROOT, msrun
from tests.support.documents import manual_commands
from tests.support.golden import FIXTURES
from tests.support.tokenizers import spell, with_tokenizer

# Two processes that wait for each other on two cores take a third of a second for a token.
PROMPTS, NEW_TOKENS = (0, 2), 16
MSRUN = manual_commands("msrun")


def two_processes(*arguments: object) -> list[object]:
    """The command of docs/running.md for this machine."""
    (command,) = (command for command in MSRUN if "--worker_num=2" in command)
    script = command.index("scripts/run_infer.py")
    return [*command[:script], ROOT / "scripts" / "run_infer.py", *arguments]


def parallel_yaml(path: Path, expert_parallel: int) -> Path:
    document = {
        "run_mode": "predict",
        "use_parallel": True,
        "parallel_config": {"data_parallel": 1, "model_parallel": 2, "expert_parallel": expert_parallel},
        "model": {"model_config": {"block_size": 8, "num_blocks": 64}},
    }
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.mark.parametrize(
    ("name", "expert_parallel", "flags"),
    [
        ("one_kv_head", 1, ["--use_training_conversion"]),
        ("moe_fused", 1, []),
        ("moe_scattered", 2, ["--use_training_conversion", "--config", "YAML"]),
    ],
)
def test_every_rank_gives_the_tokens_of_transformers(tmp_path: Path, name, expert_parallel, flags):
    directory = with_tokenizer(name, tmp_path)
    config = parallel_yaml(tmp_path / "predict.yaml", expert_parallel)
    flags = [config if flag == "YAML" else flag for flag in flags]
    with np.load(FIXTURES / "golden" / f"{name}.npz") as golden:
        cases = [(golden[f"prompt_{i}"].tolist(), golden[f"tokens_{i}"].tolist()[:NEW_TOKENS]) for i in PROMPTS]
    prompts = [argument for prompt, _ in cases for argument in ("--prompt", spell(prompt))]
    arguments = ["--model_dir", directory, "--max_new_tokens", NEW_TOKENS, *flags, *prompts]
    code, logs = msrun(tmp_path / "run", two_processes(*arguments))
    assert code == 0, logs
    assert len(logs) == 2
    for log in logs:
        assert f"2 processes (tensor parallel 2, expert parallel {expert_parallel})" in log
        for prompt, tokens in cases:
            assert f"generate    {spell(prompt)}\n         -> {spell(tokens)}\n" in log


@pytest.mark.parametrize(
    ("name", "expert_parallel"), [("dense_lora", 1), ("dense_dora", 1), ("moe_experts", 2), ("moe_stacked", 2)]
)
def test_adapters(tmp_path: Path, name, expert_parallel):
    """Every rank merges its slices: the tokens are those of transformers with PEFT."""
    directory = with_tokenizer(base_of(name).name, tmp_path)
    config = parallel_yaml(tmp_path / "predict.yaml", expert_parallel)
    cases = [(case.prompt, case.tokens[:NEW_TOKENS]) for case in adapter_golden(name)]
    prompts = [argument for prompt, _ in cases for argument in ("--prompt", spell(prompt))]
    arguments = ["--model_dir", directory, "--config", config, "--adapter", ADAPTERS / name]
    code, logs = msrun(tmp_path / "run", two_processes(*arguments, "--max_new_tokens", NEW_TOKENS, *prompts))
    assert code == 0, logs
    assert len(logs) == 2
    for log in logs:
        for prompt, tokens in cases:
            assert f"generate    {spell(prompt)}\n         -> {spell(tokens)}\n" in log


def test_what_does_not_divide_is_told_before_anything_starts(tmp_path: Path):
    command = two_processes("--model_dir", FIXTURES / "checkpoints" / "one_kv_head", "--tp", 8)
    code, logs = msrun(tmp_path / "run", command)
    assert code != 0
    for log in logs:
        assert "num_attention_heads | 4, tensor parallel 8" in log
        assert "8, number of processes 2" in log
        assert "mindspore" not in log.lower()


def test_the_commands_of_the_documents(tmp_path: Path):
    """Those for 8 NPUs run here with 2 processes: the one for a dense model is the one for this machine then.

    Sampling must not part the processes: they would go on with different tokens in one model.
    """
    run = tmp_path / "run"
    run.mkdir()
    (run / "scripts").symlink_to(ROOT / "scripts")
    (run / "demo").symlink_to(ROOT / "demo")
    (run / "Qwen3-30B-A3B").symlink_to(with_tokenizer("moe_bf16", tmp_path))
    on_two = [[re.sub(r"(?<=num=)8$|^8$", "2", word) for word in command] for command in MSRUN]
    moe, dense, here = on_two
    assert [word.replace("Qwen3-32B", "demo/qwen3-demo") for word in dense] == here
    code, logs = msrun(run, here)
    assert code == 0, logs
    assert all("every row finds its place" in log for log in logs)
    code, logs = msrun(run, [*moe, "--do_sample", "--temperature", "2", "--max_new_tokens", "24"])
    assert code == 0, logs
    first, second = (re.findall(r"^ +-> .*$", log, re.MULTILINE) for log in logs)
    assert len(first) == 2
    assert first == second
