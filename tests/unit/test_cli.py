from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mf_qwen3_bridge.cli.main import cli
from tests.support.checkpoints import hf_config, random_tensors, write
from tests.support.commands import ROOT


def mf_qwen3(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mf_qwen3_bridge.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_check_says_what_it_found(tmp_path: Path):
    result = mf_qwen3("check", "--model_dir", write(tmp_path, random_tensors(), hf_config(), shards=2))
    assert result.returncode == 0
    assert "config and weights fit" in result.stdout
    assert result.stderr == ""


def test_check_refuses_with_a_table(tmp_path: Path):
    result = mf_qwen3("check", "--model_dir", write(tmp_path, random_tensors(), hf_config(hidden_size=8)))
    assert result.returncode == 2
    assert "set hidden_size to 12 in config.json" in " ".join(result.stderr.replace("|", " ").split())
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [("check",), ("check", "--model_dir", "/nowhere"), ("check", "--nonsense"), ("nonsense",)],
)
def test_bad_usage_is_the_inputs_fault(arguments):
    result = mf_qwen3(*arguments)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("argument", ["--help", "check"])
def test_neither_importing_nor_checking_imports_mindspore(tmp_path: Path, argument):
    write(tmp_path, random_tensors(), hf_config())
    arguments = ["--help"] if argument == "--help" else ["check", "--model_dir", str(tmp_path)]
    script = (
        "import sys, mf_qwen3_bridge; from mf_qwen3_bridge.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as exit: assert exit.code == 0, exit\n"
        "loaded = {'mindspore', 'mindformers', 'transformers', 'torch'} & sys.modules.keys(); assert not loaded, loaded"
    )
    command = [sys.executable, "-c", script, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("option", [("--temperature", "0"), ("--top_p", "7"), ("--top_k", "-3"), ("--top_k", "5")])
def test_sampling_options_are_checked_first(tmp_path: Path, option):
    """The last: it needs --do_sample."""
    result = mf_qwen3("infer", "--model_dir", tmp_path, *option)
    assert result.returncode == 2
    assert option[0] in result.stderr


def test_what_is_unexpected_is_exit_code_1():
    script = "import click; from mf_qwen3_bridge.cli.main import main\n@click.command()\ndef f(): 1 / 0\nmain([], f)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 1
    assert "ZeroDivisionError" in result.stderr


def test_without_mindformers_infer_says_how_to_get_it(tmp_path: Path):
    script = (
        "import sys; sys.modules['mindspore'] = sys.modules['mindformers'] = None\n"
        "from mf_qwen3_bridge.cli.main import infer, main; main(['--model_dir', sys.argv[1]], infer)"
    )
    write(tmp_path, random_tensors(), hf_config())
    command = [sys.executable, "-c", script, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 2, result.stderr
    assert "pip install" in result.stderr


def test_each_command_has_a_whole_line_of_help():
    result = mf_qwen3("--help")
    lines = result.stdout.partition("Commands:\n")[2].splitlines()
    assert {line.split()[0] for line in lines} == set(cli.commands)
    assert not [line for line in lines if line.endswith("...")]
