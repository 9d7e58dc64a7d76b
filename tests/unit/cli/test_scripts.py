"""The scripts of scripts/, in processes of their own."""

from __future__ import annotations

import subprocess
import sys

from tests.support.checkpoints import MOE_SPEC, assert_same, contents, hf_config, random_tensors, write
from tests.support.cli import flags, names, names_both
from tests.support.commands import ROOT
from tests.support.trained import NUMBERS, fused, write_merged


def script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_the_script_there_and_back(tmp_path):
    hf = random_tensors(MOE_SPEC, dtype="BF16")
    write(tmp_path / "hf", hf, hf_config(MOE_SPEC), shards=2)
    there = ("--model", "qwen3-moe", "--input_path", tmp_path / "hf", "--output_path", tmp_path / "mf")
    assert script("convert_weight.py", *there).returncode == 0
    back = ("--model", "qwen3-moe", "--reversed", "--input_path", tmp_path / "mf", "--output_path", tmp_path / "back")
    result = script("convert_weight.py", *back, *flags(NUMBERS["qwen3-moe"]), "--dtype", "bf16")
    assert (result.returncode, result.stderr) == (0, "")
    assert_same(contents(tmp_path / "back"), hf)


def test_the_script_refuses_without_a_traceback(tmp_path):
    write_merged(tmp_path / "in", fused(random_tensors()))
    paths = ("--input_path", tmp_path / "in", "--output_path", tmp_path / "out")
    result = script("convert_weight.py", "--model", "qwen3", "--reversed", *paths, "--num_layers", 28)
    assert (result.returncode, result.stdout) == (2, "")
    assert names_both(result.stderr, "num_layers", 28, 2)
    assert "Traceback" not in result.stderr
    assert names(tmp_path) == {"in"}


def test_the_merging_script_needs_its_flags(tmp_path):
    result = script("unified_safetensors.py", "--output_dir", tmp_path / "out")
    assert result.returncode == 2
    assert "Missing option '--src_strategy_dirs'" in result.stderr
