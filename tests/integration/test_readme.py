"""Every command of the manual that needs MindFormers, or files of its ranks, on small checkpoints under its names."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

import yaml
from mf_qwen3_bridge.convert.jobs import to_mindformers
from mf_qwen3_bridge.convert.run import run
from mf_qwen3_bridge.inputs.opening import open_source
from mf_qwen3_bridge.inputs.preflight import check
from mf_qwen3_bridge.inputs.source import LAYOUT_KEY
from mf_qwen3_bridge.model.layouts import Layout
from mf_qwen3_bridge.model.rules import TRAIN
from tests.support.checkpoints import read
from tests.support.commands import ROOT, environment, free_port, run_command
from tests.support.documents import ENGLISH, NUMBER_FLAGS, blocks, manual_commands
from tests.support.golden import CHECKPOINTS
from tests.support.ranks import save_as_ranks

# On every release: run_infer.py (test_run_infer, test_msrun), verify --logits (test_verify_logits), the Python of its
# examples (test_examples). The other commands never import MindFormers; what they take from MindSpore: test_rank_files,
# test_conversion.
pytestmark = pytest.mark.newest_only
MODULES = {
    "python": ["scripts/run_infer.py"],
    "mf-qwen3": ["-m", "mf_qwen3_bridge.cli", "infer"],
}
SMALL = {
    "Qwen3-14B": ROOT / "demo" / "qwen3-demo",
    "Qwen3-8B": CHECKPOINTS / "untied_fp32",
    "Qwen3-30B-A3B": CHECKPOINTS / "moe_bf16",
}
CONTIGUOUS = Layout(interleaved_qkv=False, interleaved_gate_up=False)


def furnish(directory: Path) -> Path:
    """What the commands find in their working directory."""
    for name in ("demo", "scripts", "yaml"):
        (directory / name).symlink_to(ROOT / name)
    for name, checkpoint in SMALL.items():
        (directory / name).symlink_to(checkpoint)
    return directory


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return furnish(tmp_path)


@pytest.mark.parametrize("command", manual_commands("infer"), ids=" ".join)
def test_infer(directory: Path, command):
    result = run_command([sys.executable, *MODULES[command[0]], *command[2:]], directory)
    assert result.returncode == 0, result.stderr
    assert "every row finds its place" in result.stdout


def on_the_small_model(command: list[str]) -> list[str]:
    """The same command; the numbers it names are those of the small checkpoint."""
    spec = check(SMALL["Qwen3-30B-A3B"]).spec
    before = [None, *command]
    return [
        str(getattr(spec, NUMBER_FLAGS[flag])) if flag in NUMBER_FLAGS else word for flag, word in zip(before, command)
    ]


@pytest.fixture(scope="module")
def offline(tmp_path_factory) -> Path:
    """Where all offline commands were run, in their order: some read what others wrote."""
    directory = furnish(tmp_path_factory.mktemp("offline"))
    document = {
        "run_mode": "finetune",
        "use_parallel": True,
        "parallel_config": {"model_parallel": 2},
        "model": {"model_config": CONTIGUOUS.training_flags},
    }
    (directory / "finetune_tp2.yaml").write_text(yaml.safe_dump(document))
    save_as_ranks(directory / "output", SMALL["Qwen3-30B-A3B"])
    run(to_mindformers(check(SMALL["Qwen3-8B"]), TRAIN, directory / "one_card"))
    saved = directory / "output_one_card" / "checkpoint" / "rank_0"
    saved.mkdir(parents=True)
    (directory / "one_card" / "part0.safetensors").rename(saved / "qwen3_rank_0-1_20.safetensors")
    for command in manual_commands("offline"):
        words = command[1:] if command[0] == "python" else ["-m", "mf_qwen3_bridge.cli", *command[1:]]
        result = run_command([sys.executable, *on_the_small_model(words)], directory)
        assert result.returncode == 0, (command, result.stderr)
    return directory


def values(directory: Path) -> Mapping[str, bytes]:
    return {name: read(tensor).tobytes() for name, tensor in open_source(directory).tensors.items()}


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


@pytest.mark.parametrize(
    "output, layout",
    [
        ("Qwen3-8B-train", TRAIN.layout),
        ("Qwen3-8B-bf16", TRAIN.layout),
        ("Qwen3-8B-infer", CONTIGUOUS),
        ("Qwen3-8B-ranks/rank_1", CONTIGUOUS.on(2)),
        ("Qwen3-30B-A3B-ranks/rank_7", TRAIN.layout),
    ],
)
def test_what_convert_writes(offline: Path, output, layout):
    assert open_source(offline / output).metadata[LAYOUT_KEY] == str(layout)
    is_of_a_rank = "/" in output
    assert is_of_a_rank or names(offline / output) == {"part0.safetensors", "param_name_map.json"}


def test_as_many_ranks_as_the_readme_says(offline: Path):
    assert names(offline / "Qwen3-8B-ranks") == {"rank_0", "rank_1"}
    assert names(offline / "Qwen3-30B-A3B-ranks") == {f"rank_{number}" for number in range(8)}


def test_all_ways_back_hold_the_same_weights(offline: Path):
    source = SMALL["Qwen3-30B-A3B"]
    companions = {"config.json", "generation_config.json"}
    for output in ("hf_weights", "hf_complete", "hf_from_merged", "hf_from_ranks"):
        assert values(offline / output) == values(source)
        assert names(offline / output) == {"model.safetensors"} | (set() if output == "hf_weights" else companions)
    assert values(offline / "hf_from_one_card").keys() == values(SMALL["Qwen3-8B"]).keys()


def test_two_machines(offline: Path):
    """Both of them this one."""
    changes = {
        "--master_addr=10.0.0.1": "--master_addr=127.0.0.1",
        "--master_port=8118": f"--master_port={free_port()}",
    }
    machines = [
        subprocess.Popen([changes.get(word, word) for word in command], cwd=offline, env=environment())
        for command in manual_commands(language="sh")
    ]
    assert len(machines) == 2
    assert [machine.wait(timeout=600) for machine in machines] == [0, 0]
    assert values(offline / "hf_from_two") == values(offline / "hf_complete")
    logs = sorted(path.name for path in offline.glob("msrun_log_*/worker_*.log"))
    assert logs == [f"worker_{number}.log" for number in range(4)]


def test_make_demo_prints_what_the_readme_shows(directory: Path):
    """Both modes, the default prompts, and nothing of upstream's on stdout."""
    makefile = (ROOT / "Makefile").read_text()
    (arguments,) = re.findall(r"^\t\$\(VENV\)/bin/python (scripts/run_infer\.py .*)$", makefile, re.MULTILINE)
    result = run_command([sys.executable, *arguments.split()], directory)
    assert result.returncode == 0, result.stderr
    assert result.stdout == blocks(ENGLISH["README"], "text")[0]


@pytest.mark.parametrize("page", ["README", "docs/running"])
def test_python(directory: Path, page: str):
    code = "\n".join(blocks(ENGLISH[page], "python"))
    result = run_command([sys.executable, "-c", code], directory)
    assert result.returncode == 0, result.stderr
