"""Presents the quantised weights of a Hugging Face checkpoint as what they stand for: elements times scales."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mf_qwen3_bridge.errors import Problem, folded_problems, refuse
from mf_qwen3_bridge.inputs.source import Source
from mf_qwen3_bridge.model.parameters import is_hf_name
from mf_qwen3_bridge.transfer.plan import FLOATS
from mf_qwen3_bridge.transfer.safetensors import Reader, TensorInfo
from mf_qwen3_bridge.transfer.scaled import scaled, to_scales

# Where a config.json declares it; the second is compressed-tensors' old name.
QUANTIZATION_KEYS = ("quantization_config", "compression_config")
# What is done about formats that are not read.
_USE_ANOTHER = "use the unquantised (bf16) checkpoint of this model, or its FP8 one"
# Names of tensors by which formats show that are not read.
_MARKS = {
    "GPTQ": ("g_idx",),
    "AWQ or GPTQ": ("qweight", "qzeros", "scales"),
    "packed 4-bit (compressed-tensors)": ("weight_packed", "weight_shape", "weight_g_idx"),
    "bitsandbytes": ("absmax", "quant_map", "quant_state", "SCB"),
}
# Of formats that are read: the names of a weight's scales, and how the weight's name ends instead.
_FP8_SCALES = {
    ".weight_scale_inv": ".weight",
    ".scale": ".weight",
    ".qscale_weight": ".weight",
    "_proj_scale_inv": "_proj",  # of transformers 5's stacked experts
}
_COMPRESSED_SCALES = {".weight_scale": ".weight"}
# Scales of activations and of the KV cache: weights are computed without them.
_OF_ACTIVATIONS = re.compile(r".*[._](input_scale|input_zero_point|activation_scale|output_scale|[qkv]_scale)")
_LINEAR = re.compile(r"model\.layers\.\d+\..*_proj(\.weight)?")
_ELEMENTS = {"F8_E4M3": "FP8 (E4M3)", "I8": "INT8"}
_IS_BYTE = ("U8", "F8_E8M0")  # a power of two each
_NATURAL = {"float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class _Group:
    """Weights that are quantised alike.

    Attributes:
        targets: names or patterns of modules; ``Linear`` stands for all linear layers.
        dtype: of the elements, as safetensors spells it.
        block: rows and columns that share a scale; 0 stands for all.
    """

    targets: tuple[str, ...]
    dtype: str
    block: tuple[int, int]

    def __str__(self) -> str:
        height, width = self.block
        kinds = {(0, 0): "a scale for each tensor", (1, 0): "a scale for each row"}
        return f"{_ELEMENTS[self.dtype]}, {kinds.get(self.block, f'blocks of {height} x {width}')}"


@dataclass(frozen=True)
class Quantization:
    """What a config.json declares about quantised weights.

    Attributes:
        groups: how which weights are quantised.
        key, excepted: the config's name of its list of modules that are not quantised, and the list.
        scales: names of scales, see _FP8_SCALES.
        has_ue8m0: whether a scale's byte is a power of two.
        dtype: what the weights become unless another dtype is asked for.
    """

    groups: tuple[_Group, ...]
    key: str
    excepted: tuple[str, ...]
    scales: Mapping[str, str]
    has_ue8m0: bool
    dtype: str

    def __str__(self) -> str:
        return "; ".join(dict.fromkeys(map(str, self.groups)))

    def group_of(self, module: str) -> _Group | None:
        """The group of a module's weight: one that names it goes before one for all linear layers."""
        named = (group for group in self.groups if any(_is_listed(module, entry) for entry in group.targets))
        general = (group for group in self.groups if "Linear" in group.targets)
        return next(named, None) or next(general, None)


def read_quantization(config: Mapping[str, Any]) -> tuple[Quantization | None, list[Problem]]:
    """What a config.json declares about quantised weights, and what of that is not read; None if it declares none."""
    declared = next(filter(None, map(config.get, QUANTIZATION_KEYS)), None)
    if not declared:
        return None, []
    if not isinstance(declared, dict):
        return None, [Problem("quantization_config", repr(declared), "a JSON object, or null")]
    method = declared.get("quant_method")
    if method not in ("fp8", "compressed-tensors"):
        return None, [Problem("quantization_config", f"quant_method {method!r}", _USE_ANOTHER)]
    problems: list[Problem] = []
    if method == "fp8":
        groups, key, scales = _fp8_groups(declared, problems), "modules_to_not_convert", _FP8_SCALES
        if declared.get(key) is None and "ignored_layers" in declared:
            key = "ignored_layers"
    else:
        groups, key, scales = _compressed_groups(declared, problems), "ignore", _COMPRESSED_SCALES
    excepted = declared.get(key) or []
    if not isinstance(excepted, list) or not all(isinstance(name, str) for name in excepted):
        problems.append(Problem(f"quantization_config's {key}", repr(excepted), "a list of modules' names"))
    if problems:
        return None, problems
    torch_dtype = config.get("torch_dtype") or config.get("dtype")
    dtype = _NATURAL.get(torch_dtype, "BF16") if isinstance(torch_dtype, str) else "BF16"
    is_ue8m0 = declared.get("scale_fmt") == "ue8m0"
    return Quantization(groups, key, tuple(excepted), scales, is_ue8m0, dtype), []


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 31


def _block(value: Any) -> tuple[int, int] | None:
    is_block = isinstance(value, list) and len(value) == 2 and all(map(_is_size, value))
    return (value[0], value[1]) if is_block else None


def _fp8_groups(declared: Mapping[str, Any], problems: list[Problem]) -> tuple[_Group, ...]:
    """Mirrors ``FineGrainedFP8Config`` of ``transformers/utils/quantization_config.py`` (4.57 to 5.24)."""
    accepted = {"fmt": "e4m3", "scale_fmt": "float", "expert_dtype": "fp8"}
    for key, value in accepted.items():
        given = declared.get(key, value)
        if given not in (None, value) and not (key == "scale_fmt" and given == "ue8m0"):
            problems.append(Problem(f"quantization_config's {key}", repr(given), _USE_ANOTHER))
    given = declared.get("weight_block_size", "missing")
    block = (0, 0) if given is None else _block(given)
    if block is None:
        remedy = "two sizes, of rows and columns, such as [128, 128], or null for one scale for each tensor"
        problems.append(Problem("quantization_config's weight_block_size", f"{given}, with quant_method 'fp8'", remedy))
        return ()
    return (_Group(("Linear",), "F8_E4M3", block),)


def _compressed_groups(declared: Mapping[str, Any], problems: list[Problem]) -> tuple[_Group, ...]:
    """Mirrors ``QuantizationConfig`` of ``compressed_tensors/quantization/quant_config.py`` (0.9 to 0.20)."""
    for key in ("transform_config", "sparsity_config"):
        given = declared.get(key)
        is_dense = isinstance(given, dict) and given.get("format") == "dense"
        if given and not is_dense:
            problems.append(Problem(f"quantization_config's {key}", repr(given), _USE_ANOTHER))
    given = declared.get("config_groups")
    if not isinstance(given, dict) or not given:
        problems.append(Problem("quantization_config's config_groups", repr(given), "copy config.json again"))
        return ()
    groups = []
    for name, entry in given.items():
        entry = entry if isinstance(entry, dict) else {}
        weights = entry.get("weights")
        storage, targets = entry.get("format") or declared.get("format"), entry.get("targets")
        group = _compressed_group(weights, targets, storage) if isinstance(weights, dict) else None
        if group is None:
            found = f"format {storage!r}, weights {weights!r}, targets {targets!r}"
            problems.append(Problem(f"quantization_config's {name}", found, _USE_ANOTHER))
        else:
            groups.append(group)
    return tuple(groups)


def _compressed_group(weights: Mapping[str, Any], targets: Any, storage: Any) -> _Group | None:
    """None if it is another way to quantise than the two that are read: float-quantized and int-quantized."""
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        return None
    dtype = {"float": "F8_E4M3", "int": "I8"}.get(str(weights.get("type")))
    formats = {"F8_E4M3": "float-quantized", "I8": "int-quantized"}
    is_plain = weights.get("num_bits") == 8 and weights.get("symmetric", True) is True and not weights.get("actorder")
    if dtype is None or storage not in (formats[dtype], "naive-quantized") or not is_plain:
        return None
    blocks = {"channel": (1, 0), "tensor": (0, 0), "block": _block(weights.get("block_structure"))}
    block = blocks.get(str(weights.get("strategy")))
    return _Group(tuple(targets), dtype, block) if block else None


def dequantised(source: Source, config: Mapping[str, Any]) -> Source:
    """The same checkpoint with its quantised weights computed, and without their scales; itself if it has none.

    Args:
        source: the tensors as they are stored.
        config: the config.json that describes them; empty if there is none.

    Raises:
        BridgeError: the format is not read; weights, scales and config don't fit together; scales are invalid. Lists
            all of them.
    """
    if source.quantization or not any(map(is_hf_name, source.tensors)):
        return source
    quantization, problems = read_quantization(config)
    refuse(f"{source.path} is quantised in a way that is not read", problems)
    if quantization is None:
        refuse(f"{source.path} is quantised, and its config.json does not say how", _undeclared(source.tensors))
        return source
    match = _Match(source.tensors, quantization)
    refuse(f"{source.path}: quantised weights, their scales and config.json don't fit", match.problems())
    return replace(source, tensors=match.tensors, stored=source.tensors, quantization=str(quantization))


def _undeclared(tensors: Mapping[str, TensorInfo]) -> Iterator[Problem]:
    """Tensors of quantised weights that no config.json declares."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    remedy = "copy the config.json that came with the weights: its quantization_config declares the blocks"
    for name in tensors:
        part = name.rpartition(".")[2]
        kinds = [kind for kind, marks in _MARKS.items() if part in marks]
        if kinds:
            found[kinds[0], _USE_ANOTHER].append(name)
        elif part in ("weight_scale", "weight_scale_inv", "qscale_weight") or part.endswith("_proj_scale_inv"):
            found["scales of a quantised weight, and no quantization_config", remedy].append(name)
    return folded_problems(found)


class _Match:
    """Weights, scales and config of a quantised checkpoint, matched; ``tensors`` are the weights, computed."""

    def __init__(self, stored: Mapping[str, TensorInfo], quantization: Quantization) -> None:
        self.stored, self.quantization = stored, quantization
        self._wrong: dict[tuple[str, str], list[str]] = defaultdict(list)
        self.tensors: dict[str, TensorInfo] = {}
        scale_of: dict[str, str] = {}
        for name in stored:
            if weight := self._weight_of(name):
                if weight in scale_of:
                    self._add(name, f"a second scale, beside {scale_of[weight]}", "remove the wrong one")
                elif weight not in stored:
                    self._add(name, "a scale, but its weight is missing", "copy the file that holds it")
                scale_of.setdefault(weight, name)
        if not scale_of and all(tensor.dtype in FLOATS for tensor in stored.values()):
            remedy = "remove it from config.json if the weights are not quantised; else copy the checkpoint again"
            self._add("quantization_config", f"{quantization}; no weight is stored so", remedy)
            return
        with Reader() as reader:
            for name, tensor in stored.items():
                if name in scale_of:
                    self.tensors[name] = self._computed(tensor, stored[scale_of[name]], reader)
                elif not self._weight_of(name) and not _OF_ACTIVATIONS.fullmatch(name):
                    self.tensors[name] = tensor
                    self._check_unscaled(tensor)

    def problems(self) -> Iterator[Problem]:
        """Everything that does not fit."""
        return folded_problems(self._wrong)

    def _add(self, name: str, found: str, remedy: str) -> None:
        self._wrong[found, remedy].append(name)

    def _weight_of(self, name: str) -> str | None:
        """The name of the weight whose scale this is; None if it is none."""
        if name in self.stored and not name.endswith(".weight"):
            for ending, own in self.quantization.scales.items():
                if name.endswith(ending):
                    return name[: -len(ending)] + own
        return None

    def _check_unscaled(self, tensor: TensorInfo) -> None:
        """A tensor without scales: is it one that is not quantised?"""
        module = tensor.name.removesuffix(".weight")
        group = self.quantization.group_of(module) if _LINEAR.fullmatch(tensor.name) else None
        if tensor.dtype not in FLOATS:
            scales = " or ".join(_scale_names(tensor.name, self.quantization.scales))
            self._add(tensor.name, f"{tensor.dtype}, and no {scales}", "copy the file that holds its scales")
        elif group and not self._may_be_excepted(module):
            remedy = f"copy the checkpoint again; if it is right, name the module in {self.quantization.key}"
            self._add(tensor.name, f"{tensor.dtype}; {group} by quantization_config", remedy)

    def _may_be_excepted(self, module: str) -> bool:
        """transformers 4 compares names as parts of each other, which is less strict than anything else."""
        return any(entry in module or _is_listed(module, entry) for entry in self.quantization.excepted)

    def _computed(self, weight: TensorInfo, scale: TensorInfo, reader: Reader) -> TensorInfo:
        """The computed weight; one of which something is wrong, which is noted, only in the dtype that it would get."""
        module, quantization = weight.name.removesuffix(".weight"), self.quantization
        group = quantization.group_of(module)
        known = replace(weight, dtype=quantization.dtype)  # is never read
        if group is None or any(_is_listed(module, entry) for entry in quantization.excepted):
            remedy = "is config.json of this checkpoint? The module should not be quantised"
            reason = f"in {quantization.key}" if group else "no config_group names it"
            self._add(weight.name, f"{weight.dtype} with scales, but {reason}", remedy)
            return known
        if weight.dtype != group.dtype or len(weight.shape) not in (2, 3) or 0 in weight.shape:
            remedy = "copy weights and config.json again, from one source"
            self._add(weight.name, f"{weight.dtype} {weight.shape}, a matrix of {group.dtype} expected", remedy)
            return known
        *stack, rows, columns = weight.shape
        height, width = (size or length for size, length in zip(group.block, (rows, columns)))
        grid = (*stack, -(-rows // height), -(-columns // width))
        if scale.shape != grid and not (math.prod(grid) == math.prod(scale.shape) == 1):
            remedy = "is weight_block_size in config.json right? Else copy the file that holds it"
            self._add(scale.name, f"shape {scale.shape}, {grid} expected ({group})", remedy)
            return known
        if scale.dtype not in (*FLOATS, "F8_E8M0", *(["U8"] if quantization.has_ue8m0 else [])):
            self._add(scale.name, f"dtype {scale.dtype}", f"scales are {', '.join(FLOATS)}, or UE8M0")
            return known
        scale = replace(scale, shape=grid)
        for fault in _faults(to_scales(scale, reader)):
            self._add(scale.name, fault, "the file is damaged: compare checksums with the source")
        return scaled(weight, scale, (height, width), quantization.dtype)


def _faults(scales: np.ndarray) -> Iterator[str]:
    if not np.isfinite(scales).all():
        yield "scales that are NaN or infinite"
    if (scales == 0).any():
        yield "scales that are zero"
    if (scales < 0).any():
        yield "scales that are negative"


def _scale_names(weight: str, scales: Mapping[str, str]) -> Sequence[str]:
    names = [weight.removesuffix(own) + ending for ending, own in scales.items() if weight.endswith(own)]
    return names[:1] or [f"{weight}_scale_inv"]


def _is_listed(module: str, entry: str) -> bool:
    """Whether an entry of a list of modules names a module, or one that it is part of.

    Mirrors ``should_convert_module`` of ``transformers/quantizers/quantizers_utils.py`` (5.24) and ``match_name`` of
    ``compressed_tensors/utils/match.py`` (0.20): names, their ends, and patterns that begin with ``re:``.
    """
    if entry.startswith("re:"):
        try:
            return re.match(entry[3:], module) is not None
        except (re.error, RecursionError, OverflowError):
            return False
    return bool(entry) and (f".{module}".endswith(f".{entry}") or f"{module}.".startswith(f"{entry}."))
