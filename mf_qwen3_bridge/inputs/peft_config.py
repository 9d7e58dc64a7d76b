"""Reads a PEFT adapter's adapter_config.json: which weights it adapts, with which rank and scaling.

Mirrors ``LoraConfig`` and what reads it in ``peft/tuners/lora/model.py`` and ``peft/tuners/tuners_utils.py`` (0.21).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mf_qwen3_bridge.errors import BridgeError, Problem, refuse
from mf_qwen3_bridge.inputs.hf_config import read_json

CONFIG_FILE = "adapter_config.json"
# Fields that make no difference to what a trained adapter of a Qwen3 computes. Qwen3 has no biases.
_WITHOUT_EFFECT = """
    task_type auto_mapping peft_version base_model_name_or_path revision inference_mode lora_dropout bias runtime_config
    qalora_group_size corda_config eva_config loftq_config lora_ga_config megatron_core ensure_weight_tying
"""
# Fields that make it compute something else than W + scaling * B @ A, and why they are refused.
_REFUSED = {
    "layer_replication": "the model that it is for has more layers than its base",
    "trainable_token_indices": "single rows of the embedding are not replaced: merge it with PEFT",
    "alora_invocation_tokens": "an activated LoRA applies to the tokens after its invocation; no weights do that",
    "arrow_config": "a router chooses among adapters for each token; no weights do that",
    "use_bdlora": "block-diagonal matrices are not read: merge it with PEFT",
    "kasa_config": "KaSA takes something away from the base's weights: merge it with PEFT",
    "monteclora_config": "its matrices are samples: merge it with PEFT",
    "velora_config": "VeLoRA is not known here: merge it with PEFT",
    "use_qalora": "QALoRA is for quantised weights: merge it with PEFT",
    "megatron_config": "it is for Megatron's layers: convert it to a transformers model's first",
    "lora_bias": "Qwen3's layers have no bias that lora_B.bias could be added to",
}
_READ = """
    peft_type r lora_alpha rank_pattern alpha_pattern use_rslora use_dora fan_in_fan_out modules_to_save target_modules
    exclude_modules layers_to_transform layers_pattern target_parameters init_lora_weights
"""
# Others take a part of the base's weights away before training: pissa, olora, corda, lora_ga, loftq.
_INITIAL_WEIGHTS = (None, True, False, "gaussian", "eva", "orthogonal")
_LARGEST_RANK = 1 << 20


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value != 0


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value <= _LARGEST_RANK


def _are(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(type(entry) is kind for entry in value)


def _patterns_of(is_valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(is_valid, value.values()))


def _is_flag(value: Any) -> bool:
    return type(value) is bool


def _are_names(value: Any) -> bool:
    return isinstance(value, str) or _are(str, value)


# Field -> (what it may hold beside null, said in words).
_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_rank, "a positive whole number"),
    "lora_alpha": (_is_number, "a finite number other than 0"),
    "rank_pattern": (_patterns_of(_is_rank), "patterns of names, each with a positive whole number"),
    "alpha_pattern": (_patterns_of(_is_number), "patterns of names, each with a finite number other than 0"),
    **dict.fromkeys(("use_rslora", "use_dora", "fan_in_fan_out"), (_is_flag, "true or false")),
    **dict.fromkeys(("target_modules", "exclude_modules"), (_are_names, "names of modules, or a regular expression")),
    "layers_pattern": (_are_names, "a name, or a list of names"),
    **dict.fromkeys(("modules_to_save", "target_parameters"), (lambda value: _are(str, value), "a list of names")),
    "layers_to_transform": (lambda value: type(value) is int or _are(int, value), "a layer's number, or a list"),
    "bias": (lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"),
}


@dataclass(frozen=True)
class PeftConfig:
    """An adapter_config.json whose fields are valid; names of modules are transformers', without ``base_model``."""

    fields: Mapping[str, Any]

    @property
    def uses_dora(self) -> bool:
        """Whether each row of a merged weight is scaled to a trained length."""
        return bool(self._get("use_dora", False))

    @property
    def replaced_modules(self) -> tuple[str, ...]:
        """Ends of names of modules that were trained whole."""
        return tuple(self._get("modules_to_save", ()))

    def rank(self, module: str) -> int:
        """The rank that a module's matrices have to have."""
        return int(self._of_pattern("rank_pattern", module, self._get("r", 8)))

    def alpha(self, module: str) -> float:
        """Its alpha, which is divided by the rank, or by its root (rsLoRA)."""
        return float(self._of_pattern("alpha_pattern", module, self._get("lora_alpha", 8)))

    def scaling(self, module: str, scale: float) -> float:
        """The factor of a module's ``B @ A``, times ``scale``: in the order in which PEFT computes it."""
        rank = self.rank(module)
        return scale * self.alpha(module) / (math.sqrt(rank) if self._get("use_rslora", False) else rank)

    def adapts(self, module: str) -> bool:
        """Whether a module is one to adapt; mirrors ``check_target_module_exists``."""
        targets = self._get("target_modules", ())
        if self._is_excluded(module) or any(
            re.match(rf"(^|.*\.){name}($|\..*)", module) for name in self.replaced_modules
        ):
            return False
        if isinstance(targets, str):
            if targets.lower() == "all-linear":
                return module not in ("lm_head", "model.embed_tokens")
            return re.fullmatch(targets, module) is not None
        return _ends_with(module, targets) and (module in targets or self._is_of_layers(module))

    def adapts_parameter(self, parameter: str) -> bool:
        """Whether a parameter, such as a layer's stacked experts, is one to adapt."""
        return _ends_with(parameter, self._get("target_parameters", ()))

    def _get(self, name: str, default: Any) -> Any:
        value = self.fields.get(name)
        return default if value is None else value

    def _of_pattern(self, name: str, module: str, default: Any) -> Any:
        patterns = self._get(name, {})
        found = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), None)
        return default if found is None else patterns[found]

    def _is_excluded(self, module: str) -> bool:
        excluded = self._get("exclude_modules", ())
        if isinstance(excluded, str):
            return bool(excluded) and re.fullmatch(excluded, module) is not None
        return _ends_with(module, excluded)

    def _is_of_layers(self, module: str) -> bool:
        layers = self._get("layers_to_transform", [])
        layers = [layers] if isinstance(layers, int) else layers
        if not layers:
            return True
        patterns = self._get("layers_pattern", []) or [r"[^.]*"]
        patterns = [patterns] if isinstance(patterns, str) else patterns
        found = (re.match(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", module) for pattern in patterns)
        match = next(filter(None, found), None)
        return match is not None and int(match["idx"]) in layers


def _ends_with(name: str, ends: Iterable[str]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)


def read_peft_config(directory: Path) -> PeftConfig:
    """The adapter_config.json in a directory; BridgeError lists everything in it that is wrong or not supported."""
    fields = read_json(directory / CONFIG_FILE)
    refuse(f"the adapter {directory} can't be used", _problems(fields))
    config = PeftConfig(fields)
    ranks = [config.rank(""), *config._get("rank_pattern", {}).values()]
    alphas = [config.alpha(""), *config._get("alpha_pattern", {}).values()]
    for rank in ranks:
        for alpha in alphas:
            check_scaling(alpha / rank, f"alpha {alpha}, r {rank}", directory)
    return config


def check_scaling(scaling: float, found: str, directory: Path) -> None:
    """Raises BridgeError for a factor that is 0, or no number, in float32."""
    with np.errstate(over="ignore", under="ignore"):
        number = np.float32(scaling)
    if not np.isfinite(number) or number == 0:
        problem = Problem("scaling", found, "a factor that float32 can hold, other than 0")
        raise BridgeError(f"the adapter {directory} can't be used", [problem])


def _problems(fields: Mapping[str, Any]) -> Iterator[Problem]:
    kind = fields.get("peft_type")
    if kind != "LORA":
        yield Problem("peft_type", repr(kind), "only LORA is merged here (rsLoRA, DoRA included): merge it with PEFT")
        return
    for name, (is_valid, meaning) in _VALUES.items():
        value = fields.get(name)
        if value is not None and not _holds(is_valid, value):
            yield Problem(name, repr(value), meaning)
    for name, reason in _REFUSED.items():
        if fields.get(name):
            yield Problem(name, repr(fields[name]), reason)
    initial = fields.get("init_lora_weights")
    if not any(type(initial) is type(known) and initial == known for known in _INITIAL_WEIGHTS):
        remedy = "it is for a base of which a part was taken away: save it with PEFT's "
        remedy += "path_initial_model_for_weight_conversion, or merge it with PEFT"
        yield Problem("init_lora_weights", repr(initial), remedy)
    if fields.get("fan_in_fan_out") and fields.get("target_parameters"):
        yield Problem("fan_in_fan_out", "true", "PEFT knows no such target_parameters")
    if fields.get("use_dora") and fields.get("target_parameters"):
        yield Problem("use_dora", "true", "PEFT knows no DoRA of target_parameters")
    for name in sorted(fields.keys() - {*_WITHOUT_EFFECT.split(), *_READ.split(), *_REFUSED}):
        if fields[name]:
            yield Problem(name, repr(fields[name]), "not known here: it may change what is computed. Merge with PEFT")
    yield from _invalid_patterns(fields)


def _holds(is_valid: Callable[[Any], bool], value: Any) -> bool:
    with suppress(OverflowError, TypeError):
        return is_valid(value)
    return False


def _invalid_patterns(fields: Mapping[str, Any]) -> Iterator[Problem]:
    """Regular expressions that are none."""
    for name in ("target_modules", "exclude_modules"):
        if isinstance(fields.get(name), str):
            yield from _invalid_pattern(name, fields[name])
    for name in ("rank_pattern", "alpha_pattern", "layers_pattern", "modules_to_save"):
        value = fields.get(name) or ()
        for pattern in [value] if isinstance(value, str) else value if isinstance(value, list | dict) else ():
            if isinstance(pattern, str):
                yield from _invalid_pattern(name, pattern)


def _invalid_pattern(name: str, pattern: str) -> Iterator[Problem]:
    try:
        re.compile(rf"(.*\.)?({pattern})$")
        re.compile(rf"(^|.*\.){pattern}($|\..*)")
        re.compile(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.")
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        yield Problem(name, f"{pattern!r}: {error}", "a regular expression")
