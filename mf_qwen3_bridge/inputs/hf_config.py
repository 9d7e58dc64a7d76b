"""Normalises config.json of any age for MindFormers; refuses by name what it can't compute."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from operator import not_
from pathlib import Path
from typing import Any

from mf_qwen3_bridge.errors import BridgeError, Problem, refuse
from mf_qwen3_bridge.inputs.documents import directory_meant, read_document
from mf_qwen3_bridge.inputs.quantised import read_quantization

# What a normalised config holds: the key, and transformers' default when a config.json leaves it out
# (None: it has to be there).
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
_HEADS = ("num_attention_heads", "num_key_value_heads")
_KEYS: dict[str, Any] = dict.fromkeys((*_SIZES, *_HEADS)) | {
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
}
_EXPERTS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
_MOE_KEYS: dict[str, Any] = dict.fromkeys(_EXPERTS) | {"norm_topk_prob": False}
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}


def _is_number(value: Any, at_least: float = 0) -> bool:
    return type(value) in (int, float) and at_least <= value <= 1e15


def _is_flag(value: Any) -> bool:
    return value in (True, False)


def _are_tokens(value: Any) -> bool:
    return all(type(token) is int for token in (value if isinstance(value, list) else [value]))


# Which values of a key are accepted, beside null, and what to do about others.
_ACCEPTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "attention_bias": (not_, "MindFormers' Qwen3, as every released one, has no bias in the attention output (o_proj)"),
    "partial_rotary_factor": (lambda value: value == 1, "Qwen3 rotates whole heads"),
    "rms_norm_eps": (_is_number, "a number, such as 1e-06"),
    "initializer_range": (_is_number, "a number, such as 0.02"),
    "tie_word_embeddings": (_is_flag, "true or false"),
    **dict.fromkeys(("torch_dtype", "dtype"), (lambda value: isinstance(value, str), "a name, such as bfloat16")),
    **dict.fromkeys(_TOKENS, (_are_tokens, "a token's number, or a list of them")),
}
_ACCEPTED_OF_MOE: dict[str, tuple[Callable[[Any], bool], str]] = _ACCEPTED | {
    "shared_expert_intermediate_size": (not_, "Qwen3 has no shared experts; the checkpoint is of another architecture"),
    "num_experts_per_tok": (lambda value: value != 1, "MindFormers uses at least two experts a token; Qwen3 uses 8"),
    "norm_topk_prob": (_is_flag, "true or false"),
}


def read_hf_config(model_dir: Path, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The normalised config.json of a Hugging Face directory, after ``overrides``: YaRN is often asked for in a YAML.

    Raises:
        BridgeError: there is none, it is no JSON, or it describes what :func:`normalise` refuses.
    """
    if not model_dir.is_dir():
        raise BridgeError(f"{model_dir} is not a directory: give the one you downloaded, that holds config.json")
    path = model_dir / "config.json"
    if not path.is_file():
        if (model_dir / "adapter_config.json").is_file():
            raise BridgeError(
                f"{model_dir} holds a LoRA adapter, not a model: name its base model with --model_dir, and the adapter "
                "with --adapter"
            )
        meant = directory_meant(model_dir, path.name)
        remedy = f"give {meant}" if meant else "copy it from where the checkpoint came from"
        raise BridgeError(f"{path} is missing: {remedy}")
    return normalise(read_json(path) | dict(overrides or {}), str(path))


def config_notes(model_dir: Path, config: Mapping[str, Any], overrides: Mapping[str, Any]) -> Iterator[str]:
    """Settings of a directory's config.json, normalised ``config``, that MindFormers ignores and others may not."""
    raw = read_json(model_dir / "config.json") | dict(overrides)
    given = (raw.get("rope_scaling") or raw.get("rope_parameters") or {}).get("attn_factor")
    if config["rope_scaling"] and given not in (None, 1):
        yield (
            f"rope_scaling's attn_factor {given} is not used: MindFormers and transformers compute "
            f"{_attention_factor(config['rope_scaling']):.4f}; vLLM multiplies by it"
        )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; BridgeError if it can't be read, or is none."""
    content = read_document(path, json.loads, "JSON")
    if not isinstance(content, dict):
        raise BridgeError(f"{path} holds no JSON object: copy it again")
    return content


def normalise(raw: Mapping[str, Any], origin: str = "config.json") -> dict[str, Any]:
    """A config.json of any age in the one form that MindFormers 1.7 to 2.1 understand.

    ``dtype`` becomes ``torch_dtype``; ``rope_parameters`` becomes ``rope_theta`` and ``rope_scaling``;
    ``num_local_experts`` becomes ``num_experts``; YaRN gets the numbers that transformers supplies by default; keys
    that do not change what is computed are left out. ``origin`` is its name in messages.

    Raises:
        BridgeError: something that MindFormers' Qwen3 cannot compute, or that is missing or absurd; lists all of it.
    """
    if raw.get("num_experts") is None and "num_local_experts" in raw:
        raw = {**raw, "num_experts": raw["num_local_experts"]}
    problems = [Problem(*row) for row in (*_refusals(raw), *_bad_numbers(raw))]
    rope_theta, rope_scaling = _rope(raw, problems)
    refuse(f"{origin} can't be used", problems)
    config = {key: raw[key] if raw.get(key) is not None else default for key, default in _keys(raw).items()}
    config["num_key_value_heads"] = raw.get("num_key_value_heads") or raw["num_attention_heads"]
    config |= {key: raw[key] for key in _TOKENS if raw.get(key) is not None}
    return config | {
        "architectures": [_ARCHITECTURES[raw["model_type"]]],
        "model_type": raw["model_type"],
        "hidden_act": "silu",
        "rope_theta": rope_theta,
        "rope_scaling": rope_scaling,
        "attention_bias": False,
        "torch_dtype": raw.get("torch_dtype") or raw.get("dtype") or "float32",
    }


def _keys(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What a normalised config of this kind holds, and the values that transformers takes when they are left out."""
    if raw.get("model_type") != "qwen3_moe":
        return _KEYS
    keys = _KEYS | _MOE_KEYS
    heads, hidden = raw.get("num_attention_heads"), raw.get("hidden_size")
    if type(heads) is int and type(hidden) is int and heads > 0:
        keys["head_dim"] = hidden // heads  # transformers' Qwen3MoeAttention; dense Qwen3's default is 128
    del keys["intermediate_size"]  # of the layers without experts, which are refused
    return keys


def _refusals(raw: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """What MindFormers' Qwen3 does not compute: (subject, found, remedy)."""
    architectures, model_type = raw.get("architectures") or [], raw.get("model_type")
    known = _ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
    if known is None or architectures not in ([], [known]):
        remedy = ", ".join(f"{kind} ({name})" for kind, name in _ARCHITECTURES.items())
        found = f"model_type {model_type!r}, architectures {architectures!r}"
        yield "architecture", found, f"Qwen3 and Qwen3-MoE are loaded: {remedy}"
    step, dense_layers = raw.get("decoder_sparse_step"), raw.get("mlp_only_layers")
    is_moe = model_type == "qwen3_moe"
    if is_moe and (step not in (None, 1) or dense_layers):
        remedy = "MindFormers' Qwen3-MoE has experts in every layer, as all released Qwen3-MoE models have"
        found = f"decoder_sparse_step {step!r}, mlp_only_layers {dense_layers!r}"
        yield "dense layers among sparse ones", found, remedy
    if is_moe and raw.get("num_local_experts") not in (None, raw.get("num_experts")):
        found = f"{raw.get('num_experts')!r}, and num_local_experts {raw['num_local_experts']!r}"
        yield "num_experts", found, "two names of one thing: remove the wrong one"
    yield from read_quantization(raw)[1]
    if raw.get("hidden_act", "silu") != "silu":  # null is no activation, in transformers either
        yield "hidden_act", repr(raw["hidden_act"]), "Qwen3 uses silu"
    for key, (is_accepted, remedy) in (_ACCEPTED_OF_MOE if is_moe else _ACCEPTED).items():
        if raw.get(key) is not None and not is_accepted(raw[key]):
            yield key, repr(raw[key]), remedy
    layer_types = raw.get("layer_types")
    layer_types = layer_types if isinstance(layer_types, list) else [layer_types] if layer_types else []
    if raw.get("use_sliding_window") or layer_types != ["full_attention"] * len(layer_types):
        remedy = "MindFormers' Qwen3 attends to everything; a checkpoint that was trained with a window can't be run"
        found = f"use_sliding_window {raw.get('use_sliding_window')}, layer_types {layer_types}"
        yield "sliding window", found, remedy


def _bad_numbers(raw: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    wrong = False
    keys = _keys(raw)
    for key in (key for key, default in keys.items() if default is None or type(default) is int):
        value = raw.get(key, keys[key])
        if key == "num_key_value_heads" and key in raw and value is None:
            continue  # null: as many as heads
        if type(value) is not int or not _is_number(value, at_least=1):
            wrong = True
            yield key, "missing" if value is None else repr(value), "a positive whole number; see the model's card"
    if wrong:
        return
    heads, groups = raw["num_attention_heads"], raw.get("num_key_value_heads") or raw["num_attention_heads"]
    if heads % groups:
        found = f"{groups}, with num_attention_heads {heads}"
        yield "num_key_value_heads", found, "num_attention_heads must be a multiple of it"
    if (head_dim := raw.get("head_dim", keys["head_dim"])) % 2:
        yield "head_dim", str(head_dim), "must be even (rotary embedding)"
    if "num_experts" in keys and raw["num_experts_per_tok"] > raw["num_experts"]:
        found = f"{raw['num_experts_per_tok']}, with num_experts {raw['num_experts']}"
        yield "num_experts_per_tok", found, "see the model's card"


def _rope(raw: Mapping[str, Any], problems: list[Problem]) -> tuple[float, dict[str, Any] | None]:
    """(rope_theta, rope_scaling) of a config.json in either form; adds to ``problems`` what is wrong with them.

    transformers 5 writes ``rope_parameters`` = {rope_type, rope_theta, ...}; before it was ``rope_theta`` and
    ``rope_scaling`` = {rope_type or type, ...}.
    """
    parameters, scaling = (raw.get(key) or {} for key in ("rope_parameters", "rope_scaling"))
    for key, value in (("rope_parameters", parameters), ("rope_scaling", scaling)):
        if not isinstance(value, dict):
            problems.append(Problem(key, repr(value), "a JSON object, or null"))
            return 0.0, None
    if any(isinstance(value, dict) for value in parameters.values()):
        problems.append(Problem("rope_parameters", "one set per layer type", "Qwen3 has one for all layers"))
        return 0.0, None
    scaling = scaling or parameters
    thetas = [config["rope_theta"] for config in (parameters, scaling, raw) if "rope_theta" in config] or [10000.0]
    kinds = {scaling[key] for key in ("rope_type", "type") if isinstance(scaling.get(key), str)}
    if not kinds and scaling.keys() <= {"rope_theta"}:
        kinds = {"default"}
    if any(theta != thetas[0] for theta in thetas):
        problems.append(Problem("rope_theta", " and ".join(map(repr, thetas)), "remove the wrong one"))
    elif not _is_number(thetas[0], at_least=1 + 1e-9):
        problems.append(Problem("rope_theta", repr(thetas[0]), "a number, such as 1000000"))
    if not kinds <= {"default", "yarn"} or len(kinds) != 1:
        found = " and ".join(map(repr, sorted(kinds))) or f"none in {dict(scaling)}"
        problems.append(Problem("RoPE type", found, "MindFormers' Qwen3 computes 'default' and 'yarn'; name one"))
    positions = raw.get("max_position_embeddings", _KEYS["max_position_embeddings"])
    return thetas[0], _yarn(scaling, positions, problems) if kinds == {"yarn"} else None


def _yarn(scaling: Mapping[str, Any], max_position_embeddings: int, problems: list[Problem]) -> dict[str, Any]:
    """YaRN's numbers in full; the defaults mirror transformers' ``_compute_yarn_parameters`` (4.57).

    MindFormers knows no ``attention_factor``: it computes it from factor and mscale, as transformers does when a
    config leaves it out.
    """
    defaults: dict[str, float] = {"original_max_position_embeddings": max_position_embeddings}
    defaults |= {"beta_fast": 32, "beta_slow": 1, "mscale": 0.0, "mscale_all_dim": 0.0}
    numbers = {"factor": scaling.get("factor")} | {key: scaling.get(key) or n for key, n in defaults.items()}
    yarn: dict[str, Any] = {"rope_type": "yarn", **numbers}
    at_least = {"factor": 1, "original_max_position_embeddings": 1}
    wrong = [key for key, number in numbers.items() if not _is_number(number, at_least.get(key, 0))]
    for key in wrong:
        problems.append(Problem(f"YaRN's {key}", repr(yarn[key]), f"a number of at least {at_least.get(key, 0)}"))
    if wrong:
        return yarn
    if not (yarn["mscale"] and yarn["mscale_all_dim"]):
        yarn |= {"mscale": 1.0, "mscale_all_dim": 0.0}
    computed = _attention_factor(yarn)
    given = scaling.get("attention_factor")
    if given is not None and not (_is_number(given) and math.isclose(given, computed, rel_tol=1e-6)):
        remedy = f"MindFormers computes {computed:.6f}; remove the key"
        problems.append(Problem("YaRN's attention_factor", repr(given), remedy))
    if not scaling.get("truncate", True):
        problems.append(Problem("YaRN's truncate", "false", "MindFormers always truncates the correction range"))
    return yarn


def _attention_factor(yarn: Mapping[str, Any]) -> float:
    """What MindFormers and transformers multiply the rotary embedding by, from YaRN's numbers in full."""
    log_factor = math.log(yarn["factor"])
    return (0.1 * yarn["mscale"] * log_factor + 1) / (0.1 * yarn["mscale_all_dim"] * log_factor + 1)
