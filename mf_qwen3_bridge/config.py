"""Reads what describes a model: a Hugging Face config.json of any age, a MindFormers YAML."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mf_qwen3_bridge.errors import BridgeError, Problem
from mf_qwen3_bridge.layouts import TRAINING_DEFAULT, Layout

# What a normalised config holds: the key, and the value that transformers takes when a config.json leaves it out
# (None: it has to be there).
_KEYS: dict[str, Any] = {
    "vocab_size": None,
    "hidden_size": None,
    "intermediate_size": None,
    "num_hidden_layers": None,
    "num_attention_heads": None,
    "num_key_value_heads": None,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
}
_INTEGERS = [key for key, value in _KEYS.items() if value is None or type(value) is int]
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
LAYOUT_FLAGS = TRAINING_DEFAULT.training_flags.keys()
_ARCHITECTURE, _MODEL_TYPE = "Qwen3ForCausalLM", "qwen3"


def read_hf_config(model_dir: Path, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The normalised config.json of a Hugging Face directory.

    Args:
        model_dir: the directory.
        overrides: what to read in place of config.json's own values: YaRN, for example, is often asked for in a YAML.

    Raises:
        BridgeError: there is none, it is no JSON, or it describes what :func:`normalise` refuses.
    """
    if not model_dir.is_dir():
        raise BridgeError(f"{model_dir} is not a directory: give the directory that holds config.json")
    path = model_dir / "config.json"
    if not path.is_file():
        raise BridgeError(f"{path} is missing: copy it from where the checkpoint came from")
    return normalise(read_json(path) | dict(overrides or {}), str(path))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        BridgeError: it can't be read, or is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BridgeError(f"can't read {path}: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BridgeError(f"{path} is not valid JSON ({error}): copy it again") from error
    if not isinstance(content, dict):
        raise BridgeError(f"{path} holds no JSON object: copy it again")
    return content


def normalise(raw: Mapping[str, Any], origin: str = "config.json") -> dict[str, Any]:
    """A config.json of any age in the one form that MindFormers 1.7 to 1.9 understand.

    ``dtype`` becomes ``torch_dtype``; ``rope_parameters`` becomes ``rope_theta`` and ``rope_scaling``; YaRN gets the
    numbers that transformers supplies by default; keys that do not change what is computed are left out.

    Args:
        raw: the JSON object.
        origin: the name to use for it in messages.

    Raises:
        BridgeError: something that MindFormers' Qwen3 cannot compute, or that is missing or absurd; lists all of it.
    """
    problems = [Problem(*row) for row in (*_refusals(raw), *_bad_numbers(raw))]
    rope_theta, rope_scaling, rope_problems = _rope(raw)
    problems += rope_problems
    if problems:
        raise BridgeError(f"{origin} can't be used", problems)
    config = {key: raw[key] if raw.get(key) is not None else default for key, default in _KEYS.items()}
    config["num_key_value_heads"] = raw.get("num_key_value_heads") or raw["num_attention_heads"]
    config |= {key: raw[key] for key in _TOKENS if raw.get(key) is not None}
    config |= {
        "architectures": [_ARCHITECTURE],
        "model_type": _MODEL_TYPE,
        "hidden_act": "silu",
        "rope_theta": rope_theta,
        "rope_scaling": rope_scaling,
        "attention_bias": False,
        "torch_dtype": raw.get("torch_dtype") or raw.get("dtype") or "float32",
    }
    return config


def _refusals(raw: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """What MindFormers' Qwen3 does not compute: (subject, found, remedy)."""
    architectures, model_type = raw.get("architectures") or [], raw.get("model_type")
    if model_type != _MODEL_TYPE or architectures not in ([], [_ARCHITECTURE]):
        yield (
            "architecture",
            f"model_type {model_type!r}, architectures {architectures!r}",
            f"this version loads dense Qwen3 only (model_type {_MODEL_TYPE!r}, {_ARCHITECTURE})",
        )
    if quantization := raw.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        yield "quantization_config", f"quant_method {method!r}", "use the unquantised (bf16) checkpoint of this model"
    if raw.get("attention_bias"):
        yield (
            "attention_bias",
            "true",
            "MindFormers' Qwen3 has no bias in the attention output (o_proj); no released Qwen3 has attention_bias",
        )
    layer_types = raw.get("layer_types") or []
    if raw.get("use_sliding_window") or any(kind != "full_attention" for kind in layer_types):
        yield (
            "sliding window",
            f"use_sliding_window {raw.get('use_sliding_window')}, layer_types {sorted(set(layer_types))}",
            "MindFormers' Qwen3 attends to everything; a checkpoint that was trained with a window can't be run",
        )
    if raw.get("hidden_act", "silu") != "silu":
        yield "hidden_act", repr(raw["hidden_act"]), "Qwen3 uses silu"
    if raw.get("partial_rotary_factor") not in (None, 1, 1.0):
        yield "partial_rotary_factor", repr(raw["partial_rotary_factor"]), "Qwen3 rotates whole heads"


def _bad_numbers(raw: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    wrong = False
    for key in _INTEGERS:
        value = raw.get(key, _KEYS[key])
        if key == "num_key_value_heads" and key in raw and value is None:
            continue  # null: as many as heads
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            wrong = True
            yield key, "missing" if value is None else repr(value), "a positive whole number; see the model's card"
    if wrong:
        return
    heads, groups = raw["num_attention_heads"], raw.get("num_key_value_heads") or raw["num_attention_heads"]
    if heads % groups:
        yield (
            "num_key_value_heads",
            f"{groups}, with num_attention_heads {heads}",
            "num_attention_heads must be a multiple of it",
        )
    if raw.get("head_dim", 128) % 2:
        yield "head_dim", str(raw["head_dim"]), "must be even (rotary embedding)"


def _rope(raw: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None, list[Problem]]:
    """(rope_theta, rope_scaling, problems) of a config.json in either form.

    transformers 5 writes ``rope_parameters`` = {rope_type, rope_theta, ...}; before it was ``rope_theta`` and
    ``rope_scaling`` = {rope_type or type, ...}.
    """
    parameters = dict(raw.get("rope_parameters") or {})
    scaling = dict(raw.get("rope_scaling") or {}) or parameters
    theta = parameters.get("rope_theta", raw.get("rope_theta", 10000.0))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if isinstance(parameters.get("full_attention"), dict):
        return theta, None, [Problem("rope_parameters", "one set per layer type", "Qwen3 has one for all layers")]
    if parameters.get("rope_theta", theta) != raw.get("rope_theta", theta):
        return (
            theta,
            None,
            [
                Problem(
                    "rope_theta",
                    f"rope_theta {raw['rope_theta']}, rope_parameters.rope_theta {parameters['rope_theta']}",
                    "remove the wrong one",
                )
            ],
        )
    if kind == "default":
        return theta, None, []
    if kind == "yarn":
        return theta, *_yarn(scaling, raw.get("max_position_embeddings", _KEYS["max_position_embeddings"]))
    return theta, None, [Problem("RoPE type", repr(kind), "MindFormers' Qwen3 computes 'default' and 'yarn' only")]


def _yarn(scaling: Mapping[str, Any], max_position_embeddings: int) -> tuple[dict[str, Any] | None, list[Problem]]:
    """YaRN's numbers in full; the defaults mirror transformers' ``_compute_yarn_parameters`` (4.57).

    MindFormers knows no ``attention_factor``: it computes it from factor and mscale, as transformers does when a
    config leaves it out.
    """
    factor = scaling.get("factor")
    if not isinstance(factor, int | float) or factor < 1:
        return None, [Problem("YaRN's factor", repr(factor), "a number of at least 1")]
    mscale, mscale_all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if not (mscale and mscale_all_dim):
        mscale, mscale_all_dim = 1.0, 0.0
    computed = (0.1 * mscale * math.log(factor) + 1) / (0.1 * mscale_all_dim * math.log(factor) + 1)
    problems = []
    given = scaling.get("attention_factor")
    if given is not None and not math.isclose(given, computed, rel_tol=1e-6):
        problems.append(
            Problem("YaRN's attention_factor", repr(given), f"MindFormers computes {computed:.6f}; remove the key")
        )
    if not scaling.get("truncate", True):
        problems.append(Problem("YaRN's truncate", "false", "MindFormers always truncates the correction range"))
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": scaling.get("original_max_position_embeddings") or max_position_embeddings,
        "beta_fast": scaling.get("beta_fast") or 32,
        "beta_slow": scaling.get("beta_slow") or 1,
        "mscale": mscale,
        "mscale_all_dim": mscale_all_dim,
    }, problems


@dataclass(frozen=True)
class MindFormersConfig:
    """What a MindFormers YAML says.

    Attributes:
        origin: where it comes from, for messages.
        model_config: its ``model.model_config`` section.
        document: all of it.
    """

    origin: str = "YAML"
    model_config: dict[str, Any] = field(default_factory=dict)
    document: dict[str, Any] = field(default_factory=dict)

    @property
    def is_for_training(self) -> bool:
        """Whether it describes a training run: then only its numbers and its layout concern inference."""
        return self.document.get("run_mode") in ("train", "finetune", "train_with_eval")

    @property
    def training_layout(self) -> Layout | None:
        """The layout of what a training run with this YAML saves; None if it says nothing about training."""
        if self.is_for_training or LAYOUT_FLAGS & self.model_config.keys():
            return Layout.of_training(self.model_config)
        return None

    @property
    def pretrained_model_dir(self) -> Path | None:
        """The Hugging Face directory that it names."""
        named = self.document.get("pretrained_model_dir")
        return Path(named) if named else None


def read_mindformers_config(path: Path) -> MindFormersConfig:
    """A MindFormers YAML, for training or for inference.

    Raises:
        BridgeError: it is missing, no YAML, or has no ``model.model_config`` section.
    """
    import yaml  # only those who have a YAML need it

    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BridgeError(f"can't read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BridgeError(f"{path} is not valid YAML: {error}") from error
    model = document.get("model") if isinstance(document, dict) else None
    model_config = model.get("model_config") if isinstance(model, dict) else None
    if not isinstance(model_config, dict):
        raise BridgeError(f"{path} has no model.model_config section: is it a MindFormers YAML?")
    return MindFormersConfig(str(path), model_config, document)
