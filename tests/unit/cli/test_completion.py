"""What a shell completes after ``eval "$(_MF_QWEN3_COMPLETE=bash_source mf-qwen3)"``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mf_qwen3_bridge.cli.main import cli
from tests.support.commands import ROOT, environment, run_command

COMPLETE = """
set -e
eval "$(_MF_QWEN3_COMPLETE=bash_source mf-qwen3)"
[[ $(complete -p mf-qwen3) == *"-F _mf_qwen3_completion mf-qwen3" ]]
COMP_WORDS=("$@")
COMP_CWORD=$(($# - 1))
_mf_qwen3_completion mf-qwen3
printf '%s\\n' "${COMPREPLY[@]}"
"""


def completed(directory: Path, *words: str) -> set[str]:
    """What bash offers in the place of the last word."""
    result = run_command(["bash", "-c", COMPLETE, "bash", *words], directory)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


def options(command: str) -> set[str]:
    """The long ones; of -h and --help, click offers one."""
    return {name for parameter in cli.commands[command].params for name in parameter.opts if name[:2] == "--"}


def test_names_of_commands(tmp_path: Path):
    assert completed(tmp_path, "mf-qwen3", "") == set(cli.commands)
    assert completed(tmp_path, "mf-qwen3", "ex") == {"export"}


@pytest.mark.parametrize("command", ["check", "convert", "export"])
def test_names_of_options(tmp_path: Path, command: str):
    assert completed(tmp_path, "mf-qwen3", command, "--") == options(command) | {"--help"}
    assert completed(tmp_path, "mf-qwen3", command, "--conf") == {"--config"}


def test_values_of_an_option(tmp_path: Path):
    assert completed(tmp_path, "mf-qwen3", "convert", "--dtype", "") == {"bf16", "fp16", "fp32"}


def test_pressing_tab_imports_nothing_that_takes_long():
    script = (
        "import atexit, sys; from mf_qwen3_bridge.cli.main import main; sys.argv = ['mf-qwen3']\n"
        "slow = {'numpy', 'ml_dtypes', 'safetensors', 'yaml', 'mindspore', 'mindformers', 'transformers', 'torch'}\n"
        "atexit.register(lambda: print('imported:', *(slow & sys.modules.keys())))\n"
        "main()"
    )
    words = {"_MF_QWEN3_COMPLETE": "bash_complete", "COMP_WORDS": "mf-qwen3 verify --pic", "COMP_CWORD": "2"}
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment() | words,
        check=False,
    )
    assert result.stdout.splitlines() == ["plain,--picture", "imported:"], result.stderr
