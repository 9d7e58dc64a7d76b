"""Every command of docs/npu_server.md, in its order, in one directory, on small checkpoints under its names."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import yaml
from mf_qwen3_bridge.inputs.mindformers_config import read_mindformers_config
from tests.support.commands import ROOT, TRAINER, environment, free_port, run_command
from tests.support.documents import commands
from tests.support.golden import CHECKPOINTS
from tests.support.ranks import save_as_ranks
from tests.support.tokenizers import with_generation_config, with_tokenizer

# On every release: run_infer.py (test_run_infer, test_msrun), Trainer.predict in one process and two
# (test_trainer_predict), training and export (test_training_network), doctor (test_troubleshooting), verify --logits
# (test_verify_logits). The other commands never import MindFormers; what they take from MindSpore: test_rank_files.
pytestmark = pytest.mark.newest_only
DOCS = ROOT / "docs"
TEXT = (DOCS / "npu_server.md").read_text(encoding="utf-8")
SMALL = {
    **dict.fromkeys(("Qwen3-0.6B", "Qwen3-14B", "Qwen3-32B"), ROOT / "demo" / "qwen3-demo"),
    "Qwen3-8B": CHECKPOINTS / "untied_fp32",
}
# What a CPU needs of a YAML for NPUs comes from one of yaml/cpu.
ON_CPU = {
    "predict_qwen3_14b.yaml": ("predict_qwen3.yaml", ("context",)),
    "predict_qwen3_32b_tp8.yaml": ("predict_qwen3_tp2.yaml", ("context", "parallel_config")),
    "finetune_qwen3_0_6b.yaml": (
        "finetune_qwen3.yaml",
        ("context", "runner_config", "lr_schedule", "train_dataset", "train_dataset_task", "callbacks"),
    ),
}


@dataclass
class Step:
    """Commands that stand together, and the lines of output that are shown below them; … stands for anything."""

    commands: list[str]
    shown: list[str] = field(default_factory=list)


def steps(text: str) -> list[Step]:
    found: list[Step] = []
    for language, body in re.findall(r"^```(\w+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if language == "bash":
            found.append(Step(body.splitlines()))
        elif language == "text":
            found[-1].shown += body.splitlines()
    return found


STEPS = steps(TEXT)


def for_a_cpu(name: str, other: str, sections: tuple[str, ...]) -> dict[str, Any]:
    """A YAML for NPUs, with those sections of another, and its numbers and dtypes."""
    document, cpu = (yaml.safe_load((ROOT / "yaml" / path).read_text()) for path in (name, Path("cpu") / other))
    document |= {section: cpu[section] for section in sections}
    document["model"]["model_config"] |= cpu["model"]["model_config"]
    return dict(document)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout, with models, upstream's script (or what stands for it), and data to train with."""
    scratch = tmp_path_factory.mktemp("guide")
    (scratch / "scripts").symlink_to(ROOT / "scripts")
    (scratch / "run_mindformer.py").symlink_to(TRAINER)
    for name, checkpoint in SMALL.items():
        (scratch / name).symlink_to(checkpoint)
    with_generation_config(with_tokenizer("moe_bf16", scratch)).rename(scratch / "Qwen3-30B-A3B")
    shutil.copytree(ROOT / "yaml", scratch / "yaml")
    for name, (other, sections) in ON_CPU.items():
        (scratch / "yaml" / name).write_text(yaml.safe_dump(for_a_cpu(name, other, sections)))
    data = ["--model_dir", scratch / "Qwen3-0.6B", "--output", scratch / "output" / "training.mindrecord"]
    subprocess.run([sys.executable, ROOT / "demo" / "make_training_data.py", *data], check=True, env=environment())
    return scratch


def on_two(line: str) -> str:
    """The same command for two processes."""
    if not line.startswith("msrun"):
        return line
    line = re.sub(r"--master_port=\d+", f"--master_port={free_port()}", line)
    return re.sub(r"(num=|--ep )8\b", r"\g<1>2", line)


def output_of(directory: Path, line: str) -> str:
    """Runs a command, which has to succeed: all that it prints, msrun's processes included."""
    shutil.rmtree(directory / "msrun_log", ignore_errors=True)
    result = run_command(["bash", "-c", on_two(line)], directory)
    logs = [log.read_text(errors="replace") for log in (directory / "msrun_log").glob("worker_*.log")]
    everything = "\n".join([result.stdout, result.stderr, *logs])
    assert result.returncode == 0, (line, everything[-4000:])
    return everything


@pytest.mark.parametrize("number", range(len(STEPS)))
def test_commands_and_what_they_print(directory: Path, number: int):
    step = STEPS[number]
    if "--src_strategy_dirs" in step.commands[0] and not (directory / "output" / "checkpoint" / "rank_7").exists():
        shutil.rmtree(directory / "output")  # here was the parallel run, which no CPU can do
        save_as_ranks(directory / "output", CHECKPOINTS / "moe_bf16")
    everything = "\n".join(output_of(directory, line) for line in step.commands)
    for line in step.shown:
        pattern = ".*".join(map(re.escape, line.split("…")))
        assert re.search(f"^{pattern}$", everything, re.MULTILINE), (line, everything[-4000:])


def test_exports_are_complete(directory: Path):
    """Of the directories that the commands above made."""
    for name in ("Qwen3-0.6B-tuned", "Qwen3-30B-A3B-tuned", "Qwen3-30B-A3B-tuned-2"):
        made = {path.name for path in (directory / name).iterdir()}
        assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"} <= made


def test_parallel_runs_have_as_many_processes_as_their_yamls_say(tmp_path: Path):
    (tmp_path / "yaml").symlink_to(ROOT / "yaml")
    (sed,) = (line for step in STEPS for line in step.commands if line.startswith("sed "))
    subprocess.run(["bash", "-c", sed], cwd=tmp_path, check=True)
    runs = [command for command in commands(TEXT, "sh") if command[0] == "msrun"]
    assert len(runs) == 3
    for command in runs:
        config = tmp_path / command[command.index("--config") + 1].removeprefix("$PWD/")
        sizes = read_mindformers_config(config).document["parallel_config"]
        processes = math.prod(sizes[key] for key in ("data_parallel", "model_parallel", "pipeline_stage"))
        assert f"--worker_num={processes}" in command
        assert sizes["micro_batch_num"] >= sizes["pipeline_stage"]
