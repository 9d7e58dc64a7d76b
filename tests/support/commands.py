"""Runs commands as a user does, in processes of their own."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Set it to the run_mindformer.py of MindFormers' sources, of the installed release, and that is what runs.
TRAINER = Path(os.environ.get("RUN_MINDFORMER", ROOT / "tests" / "integration" / "trainer.py"))
REGISTER_PATH = ROOT / "mf_qwen3_bridge" / "mindformers" / "register_path"


def environment() -> dict[str, str]:
    """A command's: this interpreter's programs, this checkout, and nothing that other tests set for MindFormers."""
    inherited = {key: value for key, value in os.environ.items() if key not in ("RUN_MODE", "ENFORCE_EAGER")}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return inherited | {"PATH": path, "PYTHONPATH": str(ROOT), "CPU_AFFINITY": "False"}


def run_command(command: Sequence[object], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs it in a directory; ``python`` and ``mf-qwen3`` are this interpreter's."""
    words = list(map(str, command))
    return subprocess.run(words, cwd=cwd, env=environment(), capture_output=True, text=True, check=False, timeout=600)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def msrun(directory: Path, command: Sequence[object]) -> tuple[int, list[str]]:
    """Runs it in a directory, on a free port: its exit code, and what each of the ranks printed."""
    directory.mkdir(exist_ok=True)
    words = [re.sub(r"^--master_port=.*", f"--master_port={free_port()}", str(word)) for word in command]
    result = run_command(words, directory)
    logs = sorted((directory / "msrun_log").glob("worker_*.log"))
    return result.returncode, [log.read_text(errors="replace") for log in logs]
