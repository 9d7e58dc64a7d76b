"""Assigns tensors to files and builds safetensors headers and indexes."""

import json
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from mf_qwen3_bridge.convert.file_writing import BLOCK_BYTES
from mf_qwen3_bridge.errors import BridgeError
from mf_qwen3_bridge.inputs.source import HF_INDEX, LAYOUT_KEY, MINDFORMERS_INDEX, TENSOR_PARALLEL_KEY
from mf_qwen3_bridge.model.layouts import Layout
from mf_qwen3_bridge.transfer.plan import Plan, Target
from mf_qwen3_bridge.transfer.safetensors import DTYPES, TensorInfo

# As Hugging Face's and MindSpore's own writers do.
HF_SHARD_BYTES = 5 * 10**9
MINDFORMERS_FILE_BYTES = 3 * 1024**3


@dataclass(frozen=True)
class OutputFile:
    """A safetensors file to write: path in the output directory, first bytes, where each tensor goes, size."""

    name: str
    header: bytes
    tensors: Mapping[str, TensorInfo]
    nbytes: int


def output_file(name: str, targets: Iterable[Target], metadata: Mapping[str, str]) -> OutputFile:
    """Lays out a safetensors file that holds ``targets``.

    The header is padded to a whole block, and what fills whole blocks comes first, so that it begins on one, too, and
    can be written past the page cache. The rest is ordered by dtype, the widest first: so each tensor is aligned.
    """
    ordered = sorted(targets, key=lambda one: (one.nbytes % BLOCK_BYTES > 0, -DTYPES[one.dtype].itemsize))
    starts = [0, *accumulate(target.nbytes for target in ordered)]
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    for target, *offsets in zip(ordered, starts, starts[1:]):
        header[target.name] = {"dtype": target.dtype, "shape": target.shape, "data_offsets": offsets}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-(8 + len(encoded)) % BLOCK_BYTES)
    data = 8 + len(encoded)
    tensors = {
        target.name: TensorInfo(target.name, target.shape, target.dtype, Path(name), data + start, target.nbytes)
        for target, start in zip(ordered, starts)
    }
    return OutputFile(name, struct.pack("<Q", len(encoded)) + encoded, tensors, data + starts[-1])


def hf_files(plan: Plan, max_bytes: int = HF_SHARD_BYTES) -> tuple[list[OutputFile], dict[str, bytes]]:
    """Lays out the files of a Hugging Face checkpoint, and its index if there are several.

    Mirrors ``save_pretrained`` of transformers: a tensor goes to a new file when the last has no room for it.
    """
    shards = list(_split(plan.targets, max_bytes))
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    files = [output_file(name, targets, {"format": "pt"}) for name, targets in zip(names, shards)]
    return files, {HF_INDEX: _index(files)} if len(files) > 1 else {}


def mindformers_metadata(layout: Layout | None, saved_by: int | None = None) -> dict[str, str]:
    """Metadata of every file of a MindFormers checkpoint: its layout, or how many tensor parallel ranks saved it."""
    metadata = {"format": "ms", "remove_redundancy": "False"}
    if layout:
        metadata[LAYOUT_KEY] = str(layout)
    if saved_by:
        metadata[TENSOR_PARALLEL_KEY] = str(saved_by)
    return metadata


def mindformers_files(
    plan: Plan, max_bytes: int = MINDFORMERS_FILE_BYTES, saved_by: int | None = None
) -> tuple[list[OutputFile], dict[str, bytes]]:
    """Lays out the files of a MindFormers checkpoint, each with layout metadata, and ``param_name_map.json``.

    Mirrors what ``mindspore.unified_safetensors`` (2.7 to 2.9) writes.
    """
    metadata = mindformers_metadata(plan.target.layout, saved_by)
    shards = enumerate(_split(plan.targets, max_bytes))
    files = [output_file(f"part{number}.safetensors", targets, metadata) for number, targets in shards]
    return files, {MINDFORMERS_INDEX: _index(files)}


def rank_file(plan: Plan, rank: int, model: str) -> OutputFile:
    """Lays out the file of one rank: a single one, as MindFormers reads only the newest of a rank's directory.

    Mirrors the names that ``CheckpointMonitor`` of ``mindformers/core/callback`` (1.7 to 2.1) gives.
    """
    name = f"rank_{rank}/{model}_rank_{rank}-0_0.safetensors"
    return output_file(name, plan.targets, mindformers_metadata(plan.target.layout))


def _split(targets: Sequence[Target], max_bytes: int) -> Iterator[list[Target]]:
    """Splits the targets, in their order, into lists of at most ``max_bytes`` bytes, or of a single target."""
    shard: list[Target] = []
    nbytes = 0
    for target in targets:
        if shard and nbytes + target.nbytes > max_bytes:
            yield shard
            shard, nbytes = [], 0
        shard.append(target)
        nbytes += target.nbytes
    yield shard


def _index(files: Iterable[OutputFile]) -> bytes:
    weight_map = {name: Path(file.name).name for file in files for name in file.tensors}
    total = sum(tensor.nbytes for file in files for tensor in file.tensors.values())
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2).encode()


_UNITS = {"": 1, **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", 1)}}
_UNITS |= {f"{prefix}IB": 1024**power for power, prefix in enumerate("KMGT", 1)}


def parse_size(text: str) -> int:
    """Parses a size as Hugging Face writes it: ``5GB`` (10^9), ``300MiB`` (2^20), ``5000000``; returns bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    size = int(float(match[1]) * _UNITS.get(match[2].upper(), 0)) if match else 0
    if not size:
        raise BridgeError(f"{text!r} is no size: give a number and a unit, such as 5GB or 300MiB")
    return size
