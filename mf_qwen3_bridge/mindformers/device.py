"""What a process needs before it builds a network of MindFormers."""

from __future__ import annotations

import os

import mindspore as ms

from mf_qwen3_bridge.mindformers import cpu_ops


def set_cpu_environment() -> None:
    """Makes MindFormers compute on a CPU as it can; what of it is set after MindFormers' context is built is late."""
    os.environ["ENFORCE_EAGER"] = "true"  # what upstream calls PyNative mode: no jit, no graph phases
    os.environ.setdefault("CPU_AFFINITY", "False")  # else upstream pins the process to CPUs 0 to n-1


def prepare_device() -> None:
    """On a CPU: the stand-ins for what it lacks, and upstream's PyNative mode. Elsewhere nothing."""
    if ms.get_context("device_target") == "CPU":
        set_cpu_environment()
        cpu_ops.install()
