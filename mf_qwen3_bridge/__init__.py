"""Moves Qwen3 weights between Hugging Face and MindFormers: right, or with a clear refusal.

Importing this package imports neither MindSpore nor MindFormers; the functions below do, when they are called.
"""

from typing import TYPE_CHECKING, Any

from mf_qwen3_bridge.errors import BridgeError, Problem

if TYPE_CHECKING:
    from mf_qwen3_bridge.mindformers.in_memory import load, weights
    from mf_qwen3_bridge.mindformers.infer import from_pretrained
    from mf_qwen3_bridge.mindformers.load import load_checkpoint
    from mf_qwen3_bridge.mindformers.patching.patch import patch, unpatch
    from mf_qwen3_bridge.mindformers.verify_network import verify_network

__version__ = "0.1.0"
__all__ = [
    "BridgeError",
    "Problem",
    "from_pretrained",
    "load",
    "load_checkpoint",
    "patch",
    "unpatch",
    "verify_network",
    "weights",
]

_LAZY = {
    "from_pretrained": "infer",
    "load": "in_memory",
    "load_checkpoint": "load",
    "patch": "patching.patch",
    "unpatch": "patching.patch",
    "verify_network": "verify_network",
    "weights": "in_memory",
}


def __getattr__(name: str) -> Any:
    """Imports what needs MindFormers on first use (PEP 562)."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"mf_qwen3_bridge.mindformers.{_LAZY[name]}"), name)
