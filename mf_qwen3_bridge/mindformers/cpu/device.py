"""What a process needs before it builds a network of MindFormers."""

from __future__ import annotations

import os

import mindspore as ms
from mindformers.core.context.build_context import Context
from mindformers.parallel_core import transformer_config_utils
from mindformers.parallel_core.inference.base_models.common.embeddings import rope_utils

from mf_qwen3_bridge.mindformers.cpu import inference_ops


def set_cpu_environment() -> None:
    """Makes MindFormers compute on a CPU as it can; what of it is set after MindFormers' context is built is late."""
    os.environ["ENFORCE_EAGER"] = "true"  # what upstream calls PyNative mode: no jit, no graph phases
    os.environ.setdefault("CPU_AFFINITY", "False")  # else upstream pins the process to CPUs 0 to n-1


def builds_training_networks() -> bool:
    """Whether MindFormers, in the run that this process is part of, takes the training classes.

    Mirrors ``__new__`` of ``Qwen3ForCausalLM`` (``mindformers/models/qwen3/modeling_qwen3.py``, 1.7 to 1.9).
    """
    return Context.is_exists() and os.environ.get("RUN_MODE") != "predict"


def prepare_device() -> None:
    """On a CPU: the stand-ins for what it lacks, and for inference upstream's PyNative mode. Elsewhere nothing."""
    if ms.get_context("device_target") != "CPU":
        return
    if builds_training_networks():
        from mf_qwen3_bridge.mindformers.cpu import training_ops  # imports modules that inference does without

        training_ops.install()
    else:
        set_cpu_environment()
        inference_ops.install()


def forget_earlier_networks() -> None:
    """Clears what upstream keeps per process although it belongs to one network.

    ``get_rope`` takes two networks whose YaRN factors differ for the same; networks hold on to their own tables.
    MindFormers 1.8.0 collects config errors, and reports those of an earlier network again.
    """
    rope_utils._ROPE_DICT.clear()
    getattr(transformer_config_utils, "ERROR_LOG", {}).clear()
