"""Workers that msrun starts convert their shares into one directory."""

from __future__ import annotations

from pathlib import Path

from mf_qwen3_bridge.convert.jobs import to_mindformers
from mf_qwen3_bridge.convert.run import run
from mf_qwen3_bridge.inputs.preflight import check
from mf_qwen3_bridge.model.rules import TRAIN
from tests.support.checkpoints import MOE_SPEC, assert_same, contents, hf_config, random_tensors, write
from tests.support.commands import ROOT, free_port, msrun

# Stands in for a machine that goes down while its worker writes.
DIES = """
import os, signal, sys
from mf_qwen3_bridge.cli.main import main
from mf_qwen3_bridge.cli.files import convert_weight

writes, original = [], os.pwrite
def pwrite(*arguments):
    writes.append(arguments)
    if os.environ["MS_NODE_ID"] == "1" and len(writes) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)

os.pwrite = pwrite
main(command=convert_weight)
"""


def two_workers(directory: Path, script: Path, *arguments: object) -> tuple[int, list[str]]:
    command = ["msrun", "--worker_num=2", "--local_worker_num=2", f"--master_port={free_port()}"]
    return msrun(directory, [*command, "--log_dir=msrun_log", "--join=True", script, *arguments])


def test_two_workers_make_one_checkpoint(tmp_path: Path):
    source = write(tmp_path / "hf", random_tensors(MOE_SPEC, dtype="BF16"), hf_config(MOE_SPEC))
    run(to_mindformers(check(source), TRAIN, tmp_path / "expected"))
    out = tmp_path / "out"
    arguments = ["--model", "qwen3-moe", "--input_path", source, "--output_path", out]
    (tmp_path / "dies.py").write_text(DIES)
    code, _ = two_workers(tmp_path / "first", tmp_path / "dies.py", *arguments)
    assert code != 0
    assert not out.exists()
    assert (tmp_path / "out.incomplete").is_dir()
    code, logs = two_workers(tmp_path / "second", ROOT / "scripts" / "convert_weight.py", *arguments)
    assert code == 0, logs
    assert_same(contents(out), contents(tmp_path / "expected"))
    assert not (tmp_path / "out.incomplete").exists()
    assert ["written " in log for log in logs] == [True, False]
