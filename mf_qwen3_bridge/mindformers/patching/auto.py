"""Wraps MindFormers' Auto classes, so that they take a Hugging Face directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mindformers import AutoConfig, AutoModel, AutoModelForCausalLM
from mindformers.models.qwen3.configuration_qwen3 import Qwen3Config
from mindformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig

from mf_qwen3_bridge.inputs.hf_config import read_json
from mf_qwen3_bridge.mindformers.infer import from_pretrained
from mf_qwen3_bridge.mindformers.patching.replacements import HOOKS

CONFIGS = {"qwen3": Qwen3Config, "qwen3_moe": Qwen3MoeConfig}


@HOOKS.wraps_upstream(AutoModel, "from_pretrained")
@HOOKS.wraps_upstream(AutoModelForCausalLM, "from_pretrained")
def wrap_model_from_pretrained(
    upstream: Callable[..., Any],
    cls: type,
    pretrained_model_name_or_dir: str | Path,
    *args: Any,
    auto_convert: bool = False,
    **kwargs: Any,
) -> Any:
    """``AutoModel.from_pretrained`` with ``auto_convert=True``: the bridge's ``from_pretrained``, with its arguments.

    Without it upstream's (``mindformers/models/auto/auto_factory.py``, 1.7 to 1.9), which refuses such directories.
    """
    if auto_convert:
        return from_pretrained(pretrained_model_name_or_dir, *args, **kwargs)
    return upstream(cls, pretrained_model_name_or_dir, *args, **kwargs)


@HOOKS.wraps_upstream(AutoConfig, "from_pretrained")
def wrap_config_from_pretrained(
    upstream: Callable[..., Any], cls: type, yaml_name_or_path: str | Path, **kwargs: Any
) -> Any:
    """``AutoConfig.from_pretrained``, which reads a Qwen3's config.json; ``kwargs`` go before it.

    Everything else is upstream's (``mindformers/models/auto/configuration_auto.py``, 1.7 to 1.9), which refuses
    directories.
    """
    file = Path(yaml_name_or_path) / "config.json"
    config = read_json(file) if file.is_file() else {}
    if config.get("model_type") in CONFIGS and not list(file.parent.glob("*.yaml")):
        merged = config | {"pretrained_model_dir": str(yaml_name_or_path)} | kwargs
        return CONFIGS[config["model_type"]](**merged)
    return upstream(cls, yaml_name_or_path, **kwargs)
