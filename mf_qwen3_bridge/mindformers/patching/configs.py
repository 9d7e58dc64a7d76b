"""Wraps MindFormers' Auto and config classes, to take a Hugging Face directory of any transformers version."""

import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mindformers import AutoConfig, AutoModel, AutoModelForCausalLM
from mindformers.parallel_core.inference.quantization import QUANTIZATION_METHODS

from mf_qwen3_bridge.errors import BridgeError, Problem, refuse
from mf_qwen3_bridge.inputs.disagreements import is_same
from mf_qwen3_bridge.inputs.hf_config import normalise, read_json
from mf_qwen3_bridge.inputs.mindformers_config import ADAPTER_KEY, ADDITIONS, COMPUTED_NAMES, LAYOUT_FLAGS
from mf_qwen3_bridge.mindformers.cpu.device import builds_training_networks, prepare_device
from mf_qwen3_bridge.mindformers.infer import from_pretrained
from mf_qwen3_bridge.mindformers.network import CLASSES
from mf_qwen3_bridge.mindformers.replacements import HOOKS
from mf_qwen3_bridge.model.spec import NAMES

# What a config.json declares, by MindFormers' other names for it.
_HF_NAMES = {alias: name for _, name, aliases in NAMES for alias in aliases}
_HF_NAMES |= {alias: name for name, aliases in COMPUTED_NAMES.items() for alias in aliases}

# Of a config.json, what upstream's config classes take although the weights don't depend on it.
_TAKEN = frozenset({"architectures", "attention_dropout", "output_router_logits", "router_aux_loss_coef"})

# Without these upstream's training network can't be built, or fails in its first step, if there are experts; they are
# what Qwen3-MoE computes, and the only form of experts that upstream trains.
_NEEDED_TO_TRAIN_EXPERTS = {"moe_grouped_gemm": True, "routed_scaling_factor": 1.0}

# The layout flags that were given to a config, by its id: upstream fills in those that were not. An attribute of the
# config would be written by upstream's to_dict() and save_pretrained(), and refused by 1.7 and 1.8 when it is read.
_DECLARED_FLAGS: dict[int, dict[str, Any]] = {}
# So are the adapters that a YAML names for the network; no release of MindFormers knows the key.
_ADAPTERS: dict[int, Any] = {}


@HOOKS.wraps_upstream((AutoModel, AutoModelForCausalLM), "from_pretrained")
def wrap_model_from_pretrained(
    upstream: Callable[..., Any],
    cls: type,
    pretrained_model_name_or_dir: str | Path,
    *args: Any,
    auto_convert: bool = False,
    **kwargs: Any,
) -> Any:
    """``AutoModel.from_pretrained`` with ``auto_convert=True``: the bridge's ``from_pretrained``, with its arguments.

    Without it upstream's (``mindformers/models/auto/auto_factory.py``, 1.7 to 2.1), which refuses such directories.
    """
    if auto_convert:
        return from_pretrained(pretrained_model_name_or_dir, *args, **kwargs)
    return upstream(cls, pretrained_model_name_or_dir, *args, **kwargs)


@HOOKS.wraps_upstream(AutoConfig, "from_pretrained")
def wrap_config_from_pretrained(
    upstream: Callable[..., Any], cls: type, yaml_name_or_path: str | Path, **kwargs: Any
) -> Any:
    """``AutoConfig.from_pretrained``, which reads a Qwen3's config.json; ``kwargs`` go before it.

    Everything else is upstream's (``mindformers/models/auto/configuration_auto.py``, 1.7 to 2.1), which refuses
    directories.
    """
    file = Path(yaml_name_or_path) / "config.json"
    config = read_json(file) if file.is_file() else {}
    if config.get("model_type") in CLASSES and not list(file.parent.glob("*.yaml")):
        config_class, _ = CLASSES[config["model_type"]]
        return config_class(**config | {"pretrained_model_dir": str(yaml_name_or_path)} | kwargs)
    return upstream(cls, yaml_name_or_path, **kwargs)


@HOOKS.wraps_upstream(tuple(config_class for config_class, _ in CLASSES.values()), "__init__")
def wrap_config_init(upstream: Callable[..., None], config: Any, *args: Any, **model_config: Any) -> None:
    """``__init__`` of ``Qwen3Config`` or ``Qwen3MoeConfig`` that takes what today's transformers writes."""
    _DECLARED_FLAGS[id(config)] = {flag: model_config[flag] for flag in LAYOUT_FLAGS if flag in model_config}
    _ADAPTERS[id(config)] = model_config.pop(ADAPTER_KEY, None)
    for kept in (_DECLARED_FLAGS, _ADAPTERS):
        weakref.finalize(config, kept.pop, id(config), None)
    prepare_device()  # the network is built next
    if named_adapters(config) is not None and builds_training_networks():
        raise BridgeError(f"{ADAPTER_KEY} is for run_mode: predict: leave it out to train")
    upstream(config, *args, **normalise_model_config(model_config))


def normalise_model_config(model_config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that MindFormers merges of a config.json and a YAML, in the form that its config classes take.

    Mirrors ``merge_model_config`` of ``mindformers/models/build_config.py`` (1.7 to 2.1), which passes on everything
    that a config.json holds: keys that it does not know, and forms of RoPE that it ignores.

    Args:
        model_config: a config.json updated with a YAML's ``model.model_config``, whose entries stay as they are but for
            YaRN and other names of what config.json declares. All stay without a ``pretrained_model_dir``.

    Raises:
        BridgeError: MindFormers' Qwen3 does not compute what it describes, or the YAML contradicts it.
    """
    directory = model_config.get("pretrained_model_dir")
    if not directory or not (path := Path(directory) / "config.json").is_file():
        return dict(model_config)
    if model_config.get("quantization") in QUANTIZATION_METHODS:  # MindFormers' own: it reads such weights itself
        return dict(model_config)
    in_file = read_json(path)
    of_yaml = {key: value for key, value in model_config.items() if key not in in_file or value != in_file[key]}
    if of_yaml.get("quantization") in _quant_methods(in_file):  # MindFormers puts it there; the weights are dequantised
        del of_yaml["quantization"]
    additions = {key: of_yaml.pop(key) for key in ADDITIONS & of_yaml.keys()}
    normalised = normalise(in_file | additions, str(path))
    of_yaml = _drop_aliases(of_yaml, normalised, path)
    taken = {key: value for key, value in in_file.items() if key in _TAKEN}
    if not builds_training_networks():
        return taken | normalised | of_yaml
    if normalised["rope_scaling"]:
        remedy = "MindFormers' training network can't compute it (1.7 to 2.1): train without it"
        raise BridgeError(f"{path} can't be trained", [Problem("RoPE type", "'yarn'", remedy)])
    needed = dict(_NEEDED_TO_TRAIN_EXPERTS) if "num_experts" in normalised else {}
    if "moe_router_topk_scaling_factor" in of_yaml:  # its other name
        needed.pop("routed_scaling_factor", None)
    return taken | needed | normalised | of_yaml


def _quant_methods(in_file: Mapping[str, Any]) -> list[Any]:
    """The quantisation that a config.json names."""
    declared = in_file.get("quantization_config")
    return [declared["quant_method"]] if isinstance(declared, dict) and declared.get("quant_method") else []


def _drop_aliases(of_yaml: Mapping[str, Any], in_file: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """A YAML's entries without those that repeat config.json's under another name, such as ``num_layers``.

    MindFormers refuses two names of one thing, even if they agree (1.7 to 2.1), or ignores the one it does not know.
    """
    kept: dict[str, Any] = {}
    problems = []
    for key, value in of_yaml.items():
        name = _HF_NAMES.get(key)
        if name is None or name not in in_file:
            kept[key] = value
            continue
        source, declared = ("model.model_config", of_yaml[name]) if name in of_yaml else (path, in_file[name])
        if value is not None and not is_same(value, declared):
            found = f"{source}: {name} {declared}\nmodel.model_config: {value}"
            problems.append(Problem(key, found, f"leave {key} out, or set it to {declared}"))
    refuse(f"the YAML's model.model_config contradicts {path}", problems)
    return kept


def named_adapters(config: Any) -> Any:
    """The adapters that ``pretrained_adapter_dir`` named when a config was made; None if it named none."""
    return _ADAPTERS.get(id(config)) or None


def declared_layout_flags(config: Any) -> dict[str, Any]:
    """The layout flags that a config was made with; not those that upstream filled in."""
    return _DECLARED_FLAGS.get(id(config), {})
