"""Installs the hooks when it is imported: for ``auto_register`` in a YAML."""

from __future__ import annotations

from mf_qwen3_bridge.mindformers.patching.patch import patch


class Bridge:
    """MindFormers wants a class of this name, and does nothing with it."""


patch()
