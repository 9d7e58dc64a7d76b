"""Prepares a process, its environment and its device for MindFormers' networks."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import mindspore as ms
from mindformers import get_context
from mindformers.core.context.build_context import Context
from mindformers.parallel_core import transformer_config_utils
from mindformers.parallel_core.inference.base_models.common.embeddings import rope_utils

from mf_qwen3_bridge.errors import BridgeError
from mf_qwen3_bridge.mindformers.cpu import inference_ops


def set_cpu_environment() -> None:
    """Sets MindFormers' variables for a CPU. ``CPU_AFFINITY`` has no effect after MindFormers' context is built."""
    os.environ["ENFORCE_EAGER"] = "true"  # what upstream calls PyNative mode: no jit, no graph phases
    os.environ.setdefault("CPU_AFFINITY", "False")  # else upstream pins the process to CPUs 0 to n-1


@contextmanager
def predict_environment(device_target: str) -> Iterator[None]:
    """Sets the variables that upstream reads while it builds an inference network, and while that computes.

    Mirrors ``jit`` of ``mindformers/models/utils.py`` and ``is_pynative`` of ``mindformers/tools/utils.py`` (1.7 to
    1.9). Left behind, ``RUN_MODE`` would make MindFormers build inference networks where it should train.
    """
    names = ("RUN_MODE", "ENFORCE_EAGER", "CPU_AFFINITY")
    before = {name: os.environ[name] for name in names if name in os.environ}
    os.environ["RUN_MODE"] = "predict"
    if device_target == "CPU":
        set_cpu_environment()
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
        os.environ.update(before)


@contextmanager
def inference_device() -> Iterator[None]:
    """Lets an inference network compute in a process of any kind: the environment and, on a CPU, the stand-ins."""
    is_installed = bool(inference_ops.STAND_INS.installed)
    with predict_environment(ms.get_context("device_target")):
        inference_ops.STAND_INS.install()
        try:
            yield
        finally:
            if not is_installed:
                inference_ops.STAND_INS.uninstall()


def builds_training_networks() -> bool:
    """Whether MindFormers takes the training classes in this process.

    Mirrors ``__new__`` of ``Qwen3ForCausalLM`` (``mindformers/models/qwen3/modeling_qwen3.py``, 1.7 to 2.1), which
    reads ``RUN_MODE``. Where that is not set, MindFormers' context distinguishes a training run from a process in which
    :func:`mf_qwen3_bridge.from_pretrained` built a network.
    """
    return Context.is_exists() and (os.environ.get("RUN_MODE") or get_context("run_mode")) != "predict"


def prepare_device() -> None:
    """Prepares for the next network: a CPU gets stand-ins for what it lacks and, for inference, PyNative mode.

    Also clears what upstream keeps per process although it belongs to one network. ``get_rope`` takes two networks
    whose YaRN factors differ for the same; networks keep their own tables. MindFormers 1.8.0 collects config errors,
    and reports those of an earlier network again.
    """
    rope_utils._ROPE_DICT.clear()
    getattr(transformer_config_utils, "ERROR_LOG", {}).clear()
    if ms.get_context("device_target") != "CPU":
        return
    # A CPU has nothing to overlap with: passing each operator on to MindSpore's threads doubles a small model's time.
    ms.runtime.launch_blocking()
    if builds_training_networks():
        from mf_qwen3_bridge.mindformers.cpu import training_ops  # imports modules that inference does without

        inference_ops.STAND_INS.uninstall()  # of an earlier network; it gets them back when it generates
        training_ops.STAND_INS.install()
    else:
        if os.environ.get("RUN_MODE") == "predict" and ms.get_context("mode") == ms.GRAPH_MODE:
            raise BridgeError("a CPU can't compute MindFormers' inference network in graph mode: set context.mode: 1")
        set_cpu_environment()
        inference_ops.STAND_INS.install()
