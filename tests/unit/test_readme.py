"""What the pages of the manual show is what the commands print. (The Chinese pages: test_translations.)"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mf_qwen3_bridge.errors import BridgeError
from mf_qwen3_bridge.inputs.identify import open_weights
from mf_qwen3_bridge.inputs.preflight import check
from mf_qwen3_bridge.model.released import RELEASED
from mf_qwen3_bridge.verify.comparison import compare
from mf_qwen3_bridge.verify.layer_errors import layer_errors
from mf_qwen3_bridge.verify.reference import forward
from tests.support.checkpoints import SPEC, hf_config, random_tensors, write, write_headers
from tests.support.commands import ROOT, run_command
from tests.support.documents import ENGLISH, NUMBER_FLAGS, RUNNERS, blocks, commands, manual_commands


@pytest.mark.parametrize("name", ["README.md", "README_CN.md"])
def test_a_readme_is_short(name: str):
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= 200


def test_the_numbers_of_the_command_are_those_of_the_model_it_names():
    (command,) = (command for command in manual_commands() if "--num_layers" in command)
    numbers = {flag: int(number) for flag, number in itertools.pairwise(command) if number.isdigit()}
    spec = RELEASED["Qwen3-30B-A3B"]
    assert numbers == {flag: getattr(spec, field) for flag, field in NUMBER_FLAGS.items()}


def test_what_check_prints_for_another_models_config(tmp_path: Path):
    write_headers(tmp_path / "Qwen3-14B", RELEASED["Qwen3-14B"], hf_config(RELEASED["Qwen3-8B"]), shards=8)
    result = run_command([sys.executable, "-m", "mf_qwen3_bridge.cli", "check", "--model_dir", "Qwen3-14B"], tmp_path)
    assert result.returncode == 2
    assert result.stderr in blocks(ENGLISH["docs/running"], "text")


def test_what_verify_prints_of_a_mutant(tmp_path: Path):
    spec = replace(SPEC, num_layers=28)
    tensors = random_tensors(spec)
    right = write(tmp_path / "right", tensors, hf_config(spec))
    k, v = (f"model.layers.12.self_attn.{name}_proj.weight" for name in "kv")
    mutant = write(tmp_path / "mutant", tensors | {k: tensors[v], v: tensors[k]}, hf_config(spec))
    found = layer_errors(dict(forward(check(mutant), [1, 2, 3])), check(right), [1, 2, 3])
    problems = compare(open_weights(mutant), open_weights(right)).problems()
    headline = f"Qwen3-0.6B-mutant does not compute the same: {found.summary}"
    printed = f"Error: {BridgeError(headline, problems)}\n"
    (shown,) = blocks(ENGLISH["docs/verifying"], "text")
    assert re.sub(r"error \d", "error N", shown) == re.sub(r"error \d", "error N", printed)


@pytest.mark.parametrize("command", manual_commands("look"), ids=" ".join)
def test_commands_that_look(tmp_path: Path, command):
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    result = run_command([sys.executable, "-m", "mf_qwen3_bridge.cli", *command[1:]], tmp_path)
    assert result.returncode == 0, result.stderr


MAKE = {  # the last of what each target does
    "demo": ".venv/bin/python scripts/run_infer.py --model_dir demo/qwen3-demo "
    "--use_training_conversion --test_mode both",
    "test": ".venv/bin/nox --session lint unit newest judge",
    "test-all": ".venv/bin/nox --session others",
}


@pytest.mark.parametrize("command", manual_commands("make"), ids=" ".join)
def test_what_make_runs(command):
    """The demo's command itself is run by the integration tests, the sessions by ``make test``."""
    result = subprocess.run(
        [*command, "--dry-run", "--no-print-directory"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == MAKE[command[1]]


def test_every_command_is_run():
    """Each group that the table assigns a command to is what some test is parametrized with, or goes through."""
    tests = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py"))
    for command in manual_commands():
        runner = RUNNERS[command[0], command[1]]
        if runner == "docs/mindformers.md":
            assert command in commands((ROOT / runner).read_text(encoding="utf-8"))
        elif not runner.startswith("nobody"):
            assert f'manual_commands("{runner}")' in tests, command


@pytest.mark.parametrize("command", manual_commands("check"), ids=" ".join)
def test_mf_qwen3_check(command, tmp_path: Path):
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    (tmp_path / "Qwen3-14B").symlink_to(ROOT / "demo" / "qwen3-demo")
    result = run_command([sys.executable, "-m", "mf_qwen3_bridge.cli", *command[1:]], tmp_path)
    assert result.returncode == 0, result.stderr
