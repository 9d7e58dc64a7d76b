"""Adds PEFT adapters to the weights of a Hugging Face checkpoint when these are read.

What is merged is what ``PeftModel.merge_and_unload`` merges: a weight's update is ``scaling * B @ A``.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from mf_qwen3_bridge.errors import BridgeError, first_names, fold_names, folded_problems, refuse
from mf_qwen3_bridge.inputs.adapter_files import Adapter, AdapterPath, open_adapter
from mf_qwen3_bridge.inputs.adapter_matching import BaseWeight, Match, base_weights, match_adapter
from mf_qwen3_bridge.inputs.source import MergedAdapter, Source
from mf_qwen3_bridge.transfer.adapted import Adapted, Stacked, Update
from mf_qwen3_bridge.transfer.safetensors import DTYPES, Reader, TensorInfo

# Read at a time, to find out whether a matrix is zero.
_CHECKED_BYTES = 1 << 20


def with_adapters(source: Source, paths: Sequence[AdapterPath], tied: bool = False) -> Source:
    """A Hugging Face checkpoint whose weights have adapters added when they are read.

    Args:
        source: the base.
        paths: the adapters; several add up.
        tied: whether the output layer is the embedding.

    Raises:
        BridgeError: an adapter is not whole, not supported, or not of this base; lists everything that does not fit.
    """
    if not paths:
        return source
    if not source.is_hf:
        raise BridgeError(
            f"{source.path} holds MindFormers weights, and a PEFT adapter is for Hugging Face's: make a Hugging Face "
            "directory of them first (mf-qwen3 export), and give that with the adapter"
        )
    weights = base_weights(source.tensors)
    updates: dict[str, list[Update]] = defaultdict(list)
    magnitudes: dict[str, TensorInfo] = {}
    replaced: dict[str, TensorInfo] = {}
    owners: dict[str, list[str]] = defaultdict(list)
    alone: set[str] = set()
    merged = []
    for adapter in map(open_adapter, paths):
        match = match_adapter(adapter, source, weights, tied)
        refuse(f"the adapter {adapter.path.directory} does not fit {source.path}", folded_problems(match.problems))
        for module, update in match.updates.items():
            updates[module].append(update)
            owners[weights[module].tensor].append(adapter.name)
        for name in match.replaced.keys() - {weights[module].tensor for module in match.updates}:
            owners[name].append(adapter.name)
        alone |= {weights[module].tensor for module in match.magnitudes} | match.replaced.keys()
        magnitudes |= match.magnitudes
        replaced |= match.replaced
        merged.append(_describe(adapter, match, weights))
    several = [name for name in alone if len(set(owners[name])) > 1 or len(owners[name]) > 1]
    remedy = "DoRA and whole weights (modules_to_save) don't add up: give one of these adapters"
    both = {(f"adapted by {first_names(list(dict.fromkeys(owners[several[0]])))}", remedy): several} if several else {}
    refuse("these adapters can't be merged together", folded_problems(both))
    tensors = dict(source.tensors)
    for name, tensor in _computed(source.tensors, weights, updates, magnitudes, replaced):
        tensors[name] = tensor
    return replace(source, tensors=tensors, adapters=(*source.adapters, *merged))


def _computed(
    tensors: Mapping[str, TensorInfo],
    weights: Mapping[str, BaseWeight],
    updates: Mapping[str, Sequence[Update]],
    magnitudes: Mapping[str, TensorInfo],
    replaced: Mapping[str, TensorInfo],
) -> Iterator[tuple[str, TensorInfo]]:
    stacks: dict[str, dict[int, Sequence[Update]]] = defaultdict(dict)
    rows: dict[str, int] = {}
    whole: dict[str, Adapted] = {name: Adapted(tensor) for name, tensor in replaced.items()}
    for module, added in updates.items():
        weight = weights[module]
        if weight.number is None:
            base = replaced.get(weight.tensor, tensors[weight.tensor])
            whole[weight.tensor] = Adapted(base, tuple(added), magnitudes.get(module))
        else:
            stacks[weight.tensor][weight.number] = added
            rows[weight.tensor] = weight.rows
    for name, parts in stacks.items():
        count = tensors[name].shape[0] * tensors[name].shape[1] // rows[name]
        layers = max(map(len, parts.values()))
        stacked = [
            Stacked(tuple(dict(enumerate(parts.get(n, ()))).get(layer) for n in range(count)), rows[name])
            for layer in range(layers)
        ]
        whole[name] = Adapted(replaced.get(name, tensors[name]), tuple(stacked))
    for name, adapted in whole.items():
        yield name, replace(tensors[name], computed=adapted, shards=())


def _describe(adapter: Adapter, match: Match, weights: Mapping[str, BaseWeight]) -> MergedAdapter:
    """What is merged, for a person."""
    kind = "DoRA" if match.magnitudes else "LoRA"
    ranks = sorted({rank for rank, _ in match.ranks})
    scalings = sorted({scaling for _, scaling in match.ranks})
    parts = []
    if match.updates:
        numbers = f"rank {_range(ranks)}, scaling {_range(scalings)}"
        parts.append(f"{kind} of {numbers}, merged into {len(match.updates)} of {len(weights)} matrices")
    if match.replaced:
        parts.append(f"{len(match.replaced)} weights replaced: {first_names(fold_names(match.replaced))}")
    notes = []
    if adapter.config.fields.get("fan_in_fan_out"):
        notes.append(f"fan_in_fan_out of {adapter.path.directory} is ignored, as PEFT ignores it for such layers")
    added = [tensor for name, tensor in adapter.tensors.items() if re.search(r"\.lora_(embedding_A|B)\b", name)]
    if added and not match.magnitudes and all(map(is_zero, added)):
        notes.append(f"{adapter.path.directory} changes nothing: every B is zero, as before training")
    return MergedAdapter(f"{adapter.name}: {'; '.join(parts) or 'nothing'}", tuple(notes))


def _range(numbers: Sequence[float]) -> str:
    first, last = numbers[0], numbers[-1]
    return f"{first:g}" if first == last else f"{first:g} to {last:g}"


def is_zero(tensor: TensorInfo) -> bool:
    """Whether all elements of a stored tensor are 0; reads as far as the first that is not."""
    with Reader() as reader:
        for start in range(0, tensor.nbytes, _CHECKED_BYTES):
            piece = np.empty(min(_CHECKED_BYTES, tensor.nbytes - start), np.uint8)
            reader.read(tensor, start, memoryview(piece))  # type: ignore[arg-type]
            if piece.view(DTYPES[tensor.dtype]).any():
                return False
    return True


def adapter_notes(adapters: Iterable[MergedAdapter]) -> Iterator[str]:
    """What is unusual about adapters, but right."""
    return (note for adapter in adapters for note in adapter.notes)
