"""Recognises what a checkpoint's tensors are: their dialect, and the model that their shapes show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from mf_qwen3_bridge.errors import BridgeError, Problem, refuse
from mf_qwen3_bridge.inputs.adapter_files import adapter_paths
from mf_qwen3_bridge.inputs.adapters import with_adapters
from mf_qwen3_bridge.inputs.disagreements import Shown, block_problems
from mf_qwen3_bridge.inputs.mindformers_config import read_mindformers_config
from mf_qwen3_bridge.inputs.opening import config_beside, open_source
from mf_qwen3_bridge.inputs.quantised import dequantised
from mf_qwen3_bridge.inputs.source import Source
from mf_qwen3_bridge.model.layouts import TRAINING_DEFAULT, Layout
from mf_qwen3_bridge.model.parallel import WHOLE, Rank
from mf_qwen3_bridge.model.parameters import OUTPUT, PARAMETERS, Parameter, layer_of
from mf_qwen3_bridge.model.rules import Dialect, Rule, hf_dialect, model_rules
from mf_qwen3_bridge.model.spec import ModelSpec
from mf_qwen3_bridge.transfer.plan import Plan, make_plan
from mf_qwen3_bridge.transfer.safetensors import TensorInfo


@dataclass(frozen=True)
class Weights:
    """The weights of a model: where they are stored, how they are named and laid out, and the model's numbers."""

    source: Source
    dialect: Dialect
    spec: ModelSpec

    @cached_property
    def rules(self) -> tuple[Rule, ...]:
        """The model's table."""
        return tuple(model_rules(self.spec))

    def plan(self, target: Dialect, dtype: str | None = None, rank: Rank = WHOLE) -> Plan:
        """The plan that makes ``target`` of the weights, or a rank's part of it; raises as :func:`make_plan`."""
        return make_plan(self.rules, self.source.tensors, self.dialect, target, dtype, rank)

    def plan_of(self, rule: Rule) -> Plan:
        """The plan that reads what one rule needs, as it is."""
        names = {place.tensor for place in rule.places(self.dialect)}
        tensors = {name: self.source.tensors[name] for name in names}
        return make_plan([rule], tensors, self.dialect, self.dialect)

    def first_layers(self, num_layers: int) -> Weights:
        """The same weights with the first layers only; BridgeError if there are not so many."""
        if num_layers > self.spec.num_layers:
            raise BridgeError(f"{self.source.path} has {self.spec.num_layers} layers: choose as many or fewer")
        smaller = replace(self, spec=replace(self.spec, num_layers=num_layers))
        kept = {place.tensor for rule in smaller.rules for place in rule.places(self.dialect)}
        kept.add(self.dialect.name(OUTPUT))  # stays if it is stored although it is tied
        tensors = {name: tensor for name, tensor in self.source.tensors.items() if name in kept}
        return replace(smaller, source=replace(self.source, tensors=tensors))


def open_weights(path: Path, config: Path | None = None, adapters: Any = None) -> Weights:
    """The weights in a directory or file, recognised by their tensors alone: no config.json is needed.

    ``config``, the YAML of the training run, declares the layout of MindFormers weights whose files don't. It is
    MindFormers' default where neither does. ``adapters`` are PEFT's, as :func:`adapter_paths` takes them.

    Raises:
        BridgeError: files are missing or damaged, or their tensors make no whole Qwen3, or not one of this layout.
    """
    source = open_source(path)
    source = dequantised(source, config_beside(source))
    refuse_lora(source)
    yaml = read_mindformers_config(None if source.declared_layout else config)
    configured = yaml.layout_of_weights(source.has_experts, source.tensor_parallel)
    dialect = dialect_of(source, configured, yaml.origin, TRAINING_DEFAULT)
    try:
        weights = Weights(source, dialect, spec_of(source.tensors, dialect))
    except KeyError as missing:
        raise incomplete(source, missing) from None
    refuse(f"{source.path} can't have this layout", block_problems(weights.spec, dialect))
    adapted = with_adapters(source, adapter_paths(adapters), weights.spec.tie_word_embeddings)
    return replace(weights, source=adapted)


def refuse_lora(source: Source) -> None:
    """Refuses weights that a MindFormers run adapts with a LoRA: they are the base model's, which is not what it is."""
    if source.lora:
        raise BridgeError(
            f"{source.path} is of a LoRA run: without its lora tensors the weights are the base model's. Write them as "
            "one model or as a PEFT adapter first: mf-qwen3 export --lora merge, or --lora adapter"
        )


def incomplete(source: Source, missing: KeyError) -> BridgeError:
    """The error of a source whose tensors don't show all numbers of a model."""
    return BridgeError(
        f"{source.path} is not a whole model: its tensors don't show {missing.args[0]}. Is a tensor of the first layer "
        "missing, or of a wrong shape? A config.json says what should be there (--hf_config)"
    )


def dialect_of(
    source: Source, configured: Layout | None = None, origin: str = "YAML", default: Layout | None = None
) -> Dialect:
    """How a source's tensors are named and, if MindFormers wrote them, laid out.

    Args:
        source: the tensors. Their files may declare the layout.
        configured: the layout that a YAML or the caller, named ``origin`` in messages, declares.
        default: the layout to assume when nobody declares one.

    Raises:
        BridgeError: the names are of neither dialect; the layout is not known; files and YAML contradict each other.
    """
    if source.is_hf:
        return hf_dialect(source.tensors)
    declared = source.declared_layout
    if declared and configured and declared != configured:
        remedy = f"in the YAML: {declared.training_flags}"
        if declared.training_flags == configured.training_flags:
            remedy = f"in the YAML: use_parallel True, parallel_config.model_parallel {declared.tensor_parallel}"
        problem = Problem("layout", f"files: {declared}\n{origin}: {configured}", remedy)
        raise BridgeError("the layouts of QKV and gate/up contradict each other", [problem])
    layout = declared or configured or default
    if layout is None:
        raise BridgeError(
            f"{source.path} holds MindFormers weights, but nothing declares the layout of QKV and gate/up, and the "
            "wrong one would load without an error and compute garbage. The YAML they were trained with declares it "
            "(use_contiguous_weight_layout_attention, use_interleaved_weight_layout_mlp): mf-qwen3's commands take it "
            "with --config; for run_mindformer.py, export them to Hugging Face with it (mf-qwen3 export --config)"
        )
    stacked = any(".experts." in name and len(tensor.shape) == 3 for name, tensor in source.tensors.items())
    return Dialect(layout, stacked_experts=stacked)


def spec_of(tensors: Mapping[str, TensorInfo], dialect: Dialect, tied: bool | None = None) -> ModelSpec:
    """The model that the tensors' shapes show.

    ``tied`` says whether the output layer is the embedding; if nothing does, it is if there is no output layer.

    Raises:
        KeyError: the shapes don't show all numbers; names those that are missing.
    """
    tied = dialect.name(OUTPUT) not in tensors if tied is None else tied
    numbers = {field: number for field, (number, _) in numbers_of(tensors, dialect).items()}
    if numbers.get("num_attention_heads", 0) % numbers.get("num_query_groups", 1):
        del numbers["num_query_groups"]
    return ModelSpec.from_model_config(numbers | {"tie_word_embeddings": tied})


def numbers_of(tensors: Mapping[str, TensorInfo], dialect: Dialect) -> Shown:
    """What the shapes of the first layer and the embedding show of a model: {field: (number, what shows it)}."""
    layers = {number for name in tensors if (number := layer_of(name)) is not None}
    if not layers:
        return {}
    # (length of an axis, the numbers that add up to it, the tensor); where one is unknown, the others give it.
    sums = [entry for parameter in PARAMETERS for entry in _sums(parameter, tensors, dialect, min(layers))]
    found: dict[str, tuple[int, str]] = {}
    if max(layers) < len(tensors):
        found["num_layers"] = (max(layers) + 1, f"layers.{max(layers)}")
    while solved := next(filter(None, (_solved(found, *entry) for entry in sums)), None):
        found |= solved
    head_dim, _ = found.get("head_dim", (0, ""))
    for field, rows in ("num_attention_heads", "query_rows"), ("num_query_groups", "key_value_rows"):
        number, tensor = found.pop(rows, (0, ""))
        if number and head_dim and number % head_dim == 0:
            found[field] = (number // head_dim, tensor)
    return found


def _sums(
    parameter: Parameter, tensors: Mapping[str, TensorInfo], dialect: Dialect, layer: int
) -> Iterator[tuple[int, tuple[str, ...], str]]:
    """The axes of what ``tensors`` has of a parameter: (length, the numbers that add up to it, name and shape)."""
    shape = parameter.shape
    columns = (shape.columns,) if shape.columns else ()
    axes: dict[str, dict[int, tuple[str, ...]]] = {}
    if not dialect.is_hf:
        # Experts are transposed; without an axis of their own, their first one is a product.
        axes[parameter.mindformers] = {-1: shape.rows} if shape.per_expert else {0: shape.rows, 1: columns}
    elif shape.per_expert and dialect.stacked_experts:
        axes[parameter.stacked] = {1: shape.rows, 2: columns}
    else:
        axes |= {part: {0: (rows,), 1: columns} for part, rows in zip(parameter.parts, shape.rows)}
    for pattern, terms in axes.items():
        tensor = tensors.get(pattern.format(layer=layer, expert=0))
        if tensor is None:
            continue
        for axis, numbers in terms.items():
            if numbers and -len(tensor.shape) <= axis < len(tensor.shape):
                yield tensor.shape[axis], numbers, f"{tensor.name} {tensor.shape}"


def _solved(found: Shown, length: int, numbers: tuple[str, ...], tensor: str) -> Shown | None:
    """The only number of a sum that is not known yet."""
    unknown = {number for number in numbers if number not in found}
    if len(unknown) != 1:
        return None
    (name,) = unknown
    rest, count = length - sum(found[number][0] for number in numbers if number in found), numbers.count(name)
    return {name: (rest // count, tensor)} if rest > 0 and rest % count == 0 else None
