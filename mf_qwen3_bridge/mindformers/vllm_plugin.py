"""Installs the bridge's hooks in the processes of vLLM-MindSpore: an entry point of vLLM's ``vllm.general_plugins``.

vLLM calls :func:`register` in each process that it starts. This module imports nothing but the standard library until
it is certain that MindFormers will be asked for a network.
"""

import logging
import os
from importlib.util import find_spec

# Set to 0, MindFormers stays as it is; vLLM's own VLLM_PLUGINS can leave the plugin out, too.
PLUGIN_VARIABLE = "MF_QWEN3_VLLM_PLUGIN"
# Where vLLM-MindSpore reads which implementation of a model it should take; unset, it takes MindFormers' if there is
# one. Mirrors vllm_mindspore/utils.py (0.5 and 0.6).
_BACKEND_VARIABLES = ("VLLM_MS_MODEL_BACKEND", "vLLM_MODEL_BACKEND")
_PACKAGES = ("vllm_mindspore", "mindspore", "mindformers")

# vLLM shows what its own loggers and their children report.
_logger = logging.getLogger("vllm.mf_qwen3_bridge")


def register() -> None:
    """Calls :func:`mf_qwen3_bridge.patch` where vLLM-MindSpore runs MindFormers' networks; does nothing elsewhere.

    Never raises: vLLM would end with the exception. What went wrong is in vLLM's log, and MindFormers loads its weights
    as it does without the bridge.
    """
    if reason := _reason_to_stay_out():
        _logger.debug("mf-qwen3-bridge changes nothing: %s", reason)
        return
    try:
        from mf_qwen3_bridge.mindformers.patching.patch import patch

        patch()
    except Exception as error:
        _logger.warning("mf-qwen3-bridge can't be used, MindFormers loads weights without it: %s", error)
        return
    _logger.info("mf-qwen3-bridge loads the weights of Qwen3 in MindFormers; %s=0 turns it off", PLUGIN_VARIABLE)


def _reason_to_stay_out() -> str | None:
    """Why this process needs no hooks; None if it does."""
    if os.environ.get(PLUGIN_VARIABLE) == "0":
        return f"{PLUGIN_VARIABLE} is 0"
    backend = next((os.environ[name] for name in _BACKEND_VARIABLES if name in os.environ), "mindformers")
    if backend.lower() != "mindformers":
        return f"the model backend is {backend}"
    missing = [package for package in _PACKAGES if find_spec(package) is None]
    return f"not installed: {', '.join(missing)}" if missing else None
