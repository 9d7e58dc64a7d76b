"""What a machine has of what Qwen3 in MindFormers needs; to be pasted into a bug report."""

import os
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from mf_qwen3_bridge import __version__

# MindFormers' releases that the tests run, and the MindSpore and transformers that each of them pins; what the tests
# have comes first, where the package index lacks what it pins.
KNOWN = {
    "1.7.0": (("2.7.2",), ("4.51.3",)),
    "1.8.0": (("2.7.2",), ("4.57.1",)),
    "1.9.0": (("2.9.0",), ("4.57.1",)),
    "2.0.0": (("2.10.0", "2.10"), ("4.57.1",)),
    "2.1.0": (("2.10.0", "2.11"), ("5.24.0", "5")),
}
# Environment variables that change what MindFormers does: what for, and what to do if it is set by accident.
VARIABLES = {
    "RUN_MODE": "MindFormers takes its inference classes where it is predict; unset it, run_mindformer.py sets it",
    "ENFORCE_EAGER": "true is PyNative mode: slow on an NPU; needed on a CPU, where the bridge sets it",
    "REGISTER_PATH": "where auto_register looks for files; mf-qwen3 register-path prints the bridge's",
    "OM_MODULES_CACHE": "where auto_register copies files to, instead of ./modules",
    "LOG_MF_PATH": "where MindFormers logs to, instead of ./output/log",
    "MS_ROLE": "msrun sets it: outside of msrun, unset it",
    "MS_WORKER_NUM": "msrun sets it: outside of msrun, unset it",
    "ASCEND_RT_VISIBLE_DEVICES": "the NPUs that processes see",
    "MS_SIMULATION_LEVEL": "above 0 MindSpore only pretends to compute; unset it",
    "PYTHONPATH": "a MindFormers checkout on it goes before the installed package",
}


class Finding(NamedTuple):
    """A row of the report: what was looked at, what was found, and what to do (empty if all is well)."""

    subject: str
    found: str
    advice: str = ""


def examine() -> Iterator[Finding]:
    """Looks at this machine and this process, without importing MindSpore."""
    yield Finding("mf-qwen3-bridge", __version__)
    advice = "" if sys.version_info[:2] == (3, 11) else "the bridge is tested with Python 3.11"
    yield Finding("Python", f"{platform.python_version()}, {platform.machine()}", advice)
    yield from _packages()
    yield from _ascend()
    for name, meaning in VARIABLES.items():
        if value := os.environ.get(name):
            yield Finding(name, value, meaning)


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _packages() -> Iterator[Finding]:
    mindformers = _installed("mindformers")
    advice = "" if mindformers in KNOWN else f"the bridge is tested with {', '.join(KNOWN)}"
    if mindformers is None:
        advice = "pip install 'mindformers>=1.7,<2'; on an NPU server use the environment that has it"
    yield Finding("mindformers", mindformers or "not installed", advice)
    for package, pinned in zip(("mindspore", "transformers"), KNOWN.get(mindformers or "", ((), ()))):
        found = _installed(package)
        advice = ""
        if found is None:
            advice = f"MindFormers needs it{f': {pinned[-1]}' if pinned else ''}"
        elif pinned and not f"{found}.".startswith(tuple(f"{release}." for release in pinned)):
            advice = f"MindFormers {mindformers} pins {pinned[-1]}"
        yield Finding(package, found or "not installed", advice)
    for package in ("numpy", "ml_dtypes", "safetensors"):
        yield Finding(package, _installed(package) or "not installed")


def _ascend() -> Iterator[Finding]:
    toolkit = os.environ.get("ASCEND_TOOLKIT_HOME") or os.environ.get("ASCEND_HOME_PATH")
    devices = sorted(path.name for path in Path("/dev").glob("davinci[0-9]*"))
    if devices:
        yield Finding("NPU", f"{len(devices)} ({', '.join(devices)})")
    else:
        advice = "on an NPU server: give the container /dev/davinci0, ..., and source CANN's set_env.sh"
        if toolkit:
            advice = "CANN is there but no NPU: is the driver loaded, is the container given them?"
        yield Finding("NPU", "none: MindFormers' networks run on the CPU, with the bridge's stand-ins", advice)
    if toolkit:
        yield Finding("CANN", toolkit)
    elif devices:
        yield Finding("CANN", "ASCEND_TOOLKIT_HOME is not set", "source CANN's set_env.sh")
