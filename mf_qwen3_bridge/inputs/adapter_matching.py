"""Finds a place for each tensor of a PEFT adapter in its base model, or says why there is none."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from mf_qwen3_bridge.inputs.adapter_files import WEIGHTS_FILE, Adapter
from mf_qwen3_bridge.inputs.peft_config import CONFIG_FILE
from mf_qwen3_bridge.inputs.source import Source
from mf_qwen3_bridge.model.parameters import EMBEDDING, OUTPUT
from mf_qwen3_bridge.transfer.adapted import LowRank, LowRankEmbedding, LowRankOfExpert, Update
from mf_qwen3_bridge.transfer.safetensors import TensorInfo

_FLOATS = ("F64", "F32", "F16", "BF16")
_PREFIX = "base_model.model."
# PEFT leaves the adapter's name out when it saves one; others do not.
_MATRIX = re.compile(
    r"(?P<module>.+?)\.lora_(?:(?P<linear>[AB])(?:\.[^.]+)?\.weight"
    r"|embedding_(?P<embedding>[AB])(?:\.[^.]+)?|(?P<magnitude>magnitude_vector)(?:\.[^.]+){0,2})"
)
_STORED = re.compile(r"(?P<module>.+?)(?:\.modules_to_save(?:\.[^.]+)?|\.base_layer)?\.weight")
_EXPERT = re.compile(r"(?P<container>.+\.experts)\.(?P<expert>\d{1,9})\.(?P<part>gate_proj|up_proj|down_proj)")
_STACKS = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"}
_OTHER_BASE = "the adapter was made for another model: give its own base"


class BaseWeight(NamedTuple):
    """A weight of the base as one expert's part, or a layer, has it: the tensor that holds it, and its shape.

    ``number`` counts the parts of a stacked tensor, None if it has a tensor of its own.
    """

    tensor: str
    number: int | None
    rows: int
    columns: int


def base_weights(tensors: Mapping[str, TensorInfo]) -> dict[str, BaseWeight]:
    """Every matrix of a Hugging Face checkpoint by its module; stacked experts are taken apart."""
    found: dict[str, BaseWeight] = {}
    for name, tensor in tensors.items():
        if len(tensor.shape) == 2 and name.endswith(".weight"):
            found[name.removesuffix(".weight")] = BaseWeight(name, None, *tensor.shape)
            continue
        container, _, stack = name.rpartition(".")
        parts = [part for part, other in _STACKS.items() if other == stack]
        if len(tensor.shape) != 3 or not parts or tensor.shape[1] % len(parts):
            continue
        experts, rows, columns = tensor.shape
        for number in range(experts * len(parts)):
            expert, part = divmod(number, len(parts))
            module = f"{container}.{expert}.{parts[part]}"
            found[module] = BaseWeight(name, number, rows // len(parts), columns)
    return found


@dataclass
class Match:
    """How an adapter fits a base.

    Attributes:
        updates: module -> what is added to its weight.
        magnitudes: module -> DoRA's.
        replaced: name of a tensor of the base -> the adapter's tensor that takes its place.
        problems: (what was found, what to do) -> tensors.
    """

    updates: dict[str, Update] = field(default_factory=dict)
    magnitudes: dict[str, TensorInfo] = field(default_factory=dict)
    replaced: dict[str, TensorInfo] = field(default_factory=dict)
    problems: dict[tuple[str, str], list[str]] = field(default_factory=lambda: defaultdict(list))
    ranks: set[tuple[int, float]] = field(default_factory=set)


def match_adapter(adapter: Adapter, source: Source, weights: Mapping[str, BaseWeight], tied: bool) -> Match:
    """Finds a place for each tensor of an adapter; what has none, or does not fit there, is a problem."""
    match = Match()
    matrices: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
    for name, tensor in adapter.tensors.items():
        bare = name.removeprefix(_PREFIX)
        if tensor.dtype not in _FLOATS:
            match.problems[f"dtype {tensor.dtype}", f"an adapter is {', '.join(_FLOATS)}"].append(name)
        elif found := _MATRIX.fullmatch(bare):
            kind = next(group for key, group in found.groupdict().items() if key != "module" and group)
            kind = f"embedding_{kind}" if found["embedding"] else kind
            if matrices[found["module"]].setdefault(kind, tensor) is not tensor:
                match.problems["a second one of its kind: it holds two adapters", "save one"].append(name)
        else:
            _match_stored(adapter, source, tensor, bare, match)
    for module, found_there in matrices.items():
        _match_module(adapter, module, found_there, source, weights, match)
    _find_missing(adapter, source, weights, match)
    if tied:
        remedy = "merging would untie them (tie_word_embeddings): merge it with PEFT, and give the result"
        ends = {name for name in (EMBEDDING[0], OUTPUT[0]) if name in match.replaced}
        ends |= {weights[m].tensor for m in match.updates if weights[m].tensor in (EMBEDDING[0], OUTPUT[0])}
        for name in ends:
            match.problems["adapts the embedding, which is the output layer as well", remedy].append(name)
    return match


def _match_stored(adapter: Adapter, source: Source, tensor: TensorInfo, bare: str, match: Match) -> None:
    """A tensor that takes the place of one of the base's."""
    stored = _STORED.fullmatch(bare)
    name = f"{stored['module']}.weight" if stored else bare
    base = source.tensors.get(name)
    if base is None and name == OUTPUT[0]:
        base = source.tensors.get(EMBEDDING[0])  # tied: refused, by the name of what it is
        if base is not None and base.shape == tensor.shape:
            match.replaced[name] = tensor
            return
    if base is None:
        match.problems["fits no weight of the base", _remedy_for_leftover(bare)].append(tensor.name)
    elif base.shape != tensor.shape:
        remedy = _OTHER_BASE
        if name in (EMBEDDING[0], OUTPUT[0]):
            remedy = "the vocabulary was resized: merge it with PEFT, into a base that was resized as well"
        match.problems[f"shape {tensor.shape}; the base's is {base.shape}", remedy].append(tensor.name)
    elif adapter.path.scale != 1:
        remedy = "leave the factor out: a weight that takes another's place has none"
        match.problems[f"can't be scaled by {adapter.path.scale:g}", remedy].append(tensor.name)
    else:
        match.replaced[name] = tensor


def _remedy_for_leftover(name: str) -> str:
    if name.endswith(".bias"):
        return "MindFormers' Qwen3 has no bias: train without lora_bias, or merge it with PEFT and see"
    if "token_adapter" in name or "trainable_tokens" in name:
        return "trainable_token_indices are not merged here: merge it with PEFT"
    return _OTHER_BASE


def _match_module(
    adapter: Adapter,
    module: str,
    matrices: Mapping[str, TensorInfo],
    source: Source,
    weights: Mapping[str, BaseWeight],
    match: Match,
) -> None:
    """The matrices of one module: an update of its weight, or of a layer's experts."""
    names = [tensor.name for tensor in matrices.values()]

    def problem(found: str, remedy: str) -> None:
        match.problems[found, remedy].extend(names)

    is_embedding = f"{module}.weight" == EMBEDDING[0]
    sides = ("embedding_A", "embedding_B") if is_embedding else ("A", "B")
    container = re.sub(r"(\.base_layer)+$", "", module)
    is_of_experts = container.endswith(".experts")
    if module not in weights and not (is_of_experts and _experts(weights, container)):
        problem("fits no weight of the base", _OTHER_BASE)
        return
    missing = [f"lora_{side}" for side in sides if side not in matrices]
    if missing:
        problem(f"{' and '.join(missing)} missing", f"copy {WEIGHTS_FILE} again; is the download complete?")
        return
    magnitude = matrices.get("magnitude_vector")
    if magnitude is None and adapter.config.uses_dora:
        problem("lora_magnitude_vector missing, and use_dora is true", f"copy {WEIGHTS_FILE} again")
        return
    if matrices.keys() - {*sides, "magnitude_vector"} or (magnitude is not None and not adapter.config.uses_dora):
        problem("matrices of several kinds, or of DoRA without use_dora", f"copy {CONFIG_FILE} of this adapter")
        return
    a, b = (matrices[side] for side in sides)
    if len(a.shape) != 2 or len(b.shape) != 2:
        problem(f"shapes {a.shape} and {b.shape}: not matrices", _OTHER_BASE)
        return
    if is_of_experts and module not in weights:
        _match_experts(adapter, container, (a, b), weights, match, problem)
        return
    weight = weights[module]
    expected = (weight.columns, weight.rows)  # in, out
    if is_embedding:
        expected = expected[::-1]
    if (a.shape[1], b.shape[0]) != expected:
        of = "tokens and width" if is_embedding else "in and out"
        problem(f"A {a.shape}, B {b.shape}; the base's {of} are {expected[0]} and {expected[1]}", _OTHER_BASE)
        return
    if not _is_rank(adapter, module, a.shape[0], b.shape[1], problem):
        return
    scaling = adapter.config.scaling(module, adapter.path.scale)
    if magnitude is not None:
        if is_embedding:
            problem("DoRA of the embedding", "merge it with PEFT: its lengths are those of columns of all tokens")
            return
        if weight.number is not None:
            problem("DoRA of experts that the base holds stacked", "give a base with a tensor for each expert")
            return
        if magnitude.shape != (weight.rows,):
            problem(f"lora_magnitude_vector {magnitude.shape}, {(weight.rows,)} expected", _OTHER_BASE)
            return
        match.magnitudes[module] = magnitude
    if not (adapter.config.adapts(module) or adapter.config.adapts_parameter(f"{module}.weight")):
        problem(f"{CONFIG_FILE} does not adapt this module: PEFT would ignore it", f"copy {CONFIG_FILE} of this file")
        return
    match.updates[module] = LowRankEmbedding(a, b, scaling) if is_embedding else LowRank(a, b, scaling)
    match.ranks.add((a.shape[0], scaling))


def _is_rank(adapter: Adapter, module: str, of_a: int, of_b: int, problem: Any) -> bool:
    declared = adapter.config.rank(module)
    if of_a == of_b == declared:
        return True
    problem(f"rank {of_a} in A, {of_b} in B; {CONFIG_FILE}: {declared}", "take both files from one adapter")
    return False


def _experts(weights: Mapping[str, BaseWeight], container: str) -> list[BaseWeight]:
    """The gate and the down of each expert of a layer."""
    found = [weights.get(f"{container}.0.{part}") for part in ("gate_proj", "down_proj")]
    return [weight for weight in found if weight] if all(found) else []


def _match_experts(
    adapter: Adapter,
    container: str,
    matrices: tuple[TensorInfo, TensorInfo],
    weights: Mapping[str, BaseWeight],
    match: Match,
    problem: Any,
) -> None:
    """An adapter of a layer's stacked experts (``target_parameters``): which of the two tensors, its shapes show."""
    a, b = matrices
    gate, down = _experts(weights, container)
    num_experts = 0
    while f"{container}.{num_experts}.gate_proj" in weights:
        num_experts += 1
    stacks = {"gate_up_proj": (gate.columns, 2 * gate.rows), "down_proj": (down.columns, down.rows)}
    stack = next((name for name, shape in stacks.items() if shape == (a.shape[1], b.shape[0])), None)
    if stack is None:
        shapes = " and ".join(f"{name} {shape}" for name, shape in stacks.items())
        problem(f"A {a.shape}, B {b.shape}; the base's in and out are {shapes}", _OTHER_BASE)
        return
    parameter = f"{container}.{stack}"
    ranks = [length // num_experts if length % num_experts == 0 else -1 for length in (a.shape[0], b.shape[1])]
    if not _is_rank(adapter, parameter, ranks[0], ranks[1], problem):
        return
    if not adapter.config.adapts_parameter(parameter):
        problem(f"{CONFIG_FILE} does not adapt {stack} (target_parameters)", f"copy {CONFIG_FILE} of this file")
        return
    scaling = adapter.config.scaling(parameter, adapter.path.scale)
    update = partial(LowRankOfExpert, a, b, scaling, num_experts)
    for part in (part for part, other in _STACKS.items() if other == stack):
        start = gate.rows if part == "up_proj" else 0
        stop = start + (down.rows if part == "down_proj" else gate.rows)
        for expert in range(num_experts):
            module = f"{container}.{expert}.{part}"
            if module in match.updates:
                problem(f"adapts {module}, which has matrices of its own", "save one of both")
                return
            match.updates[module] = update(expert, start, stop)
    match.ranks.add((ranks[0], scaling))


def _find_missing(adapter: Adapter, source: Source, weights: Mapping[str, BaseWeight], match: Match) -> None:
    """What adapter_config.json adapts or replaces, and the file has no tensors for."""
    config = adapter.config
    remedy = f"copy {WEIGHTS_FILE} again, or {CONFIG_FILE}: they are not of one adapter"
    named = {name for names in match.problems.values() for name in names}
    has_problem = {name.removeprefix(_PREFIX).partition(".lora_")[0] for name in named}
    for module in weights.keys() - match.updates.keys() - has_problem:
        expert = _EXPERT.fullmatch(module)
        parameter = f"{expert['container']}.{_STACKS[expert['part']]}" if expert else f"{module}.weight"
        if expert and {expert["container"], f"{expert['container']}.base_layer"} & has_problem:
            continue
        is_router = module.endswith(".mlp.gate") and str(config.fields.get("target_modules")).lower() == "all-linear"
        if (config.adapts(module) and not is_router) or config.adapts_parameter(parameter):
            match.problems[f"{CONFIG_FILE} adapts it, {WEIGHTS_FILE} does not", remedy].append(f"{module}.weight")
    for end in config.replaced_modules:
        of_end = [n for n in {*source.tensors, *match.replaced} if _is_within(n.rpartition(".")[0], end)]
        absent = sorted(set(of_end) - match.replaced.keys()) if of_end else [end]
        for name in (name for name in absent if f"{_PREFIX}{name}" not in named and name not in named):
            match.problems[f"modules_to_save names it, {WEIGHTS_FILE} does not hold it", remedy].append(name)


def _is_within(module: str, end: str) -> bool:
    """Whether a module's name, or that of a module around it, ends so."""
    while module:
        if module.endswith(end):
            return True
        module = module.rpartition(".")[0]
    return False
