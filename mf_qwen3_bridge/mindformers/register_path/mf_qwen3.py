"""Installs the hooks when it is imported: for ``auto_register: mf_qwen3.Bridge`` in a YAML's ``model.model_config``.

MindFormers copies this file to a cache of its own and imports it from there; so there is no more in it than this.
"""

from mf_qwen3_bridge import patch


class Bridge:
    """MindFormers wants a class of this name, and does nothing with it."""


patch()
