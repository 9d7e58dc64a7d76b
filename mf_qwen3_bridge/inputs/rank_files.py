"""Presents per-rank checkpoint files as one checkpoint of whole tensors."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path

import numpy as np

from mf_qwen3_bridge.errors import BridgeError, Problem, first_names, fold_names, refuse
from mf_qwen3_bridge.inputs.source import Source
from mf_qwen3_bridge.model.layouts import Box
from mf_qwen3_bridge.model.lora import adapted_parameter
from mf_qwen3_bridge.model.parameters import is_counter, is_fused_qkv, is_training_state
from mf_qwen3_bridge.transfer.safetensors import Shard, TensorInfo, read_header


@dataclass(frozen=True)
class Sharding:
    """How one parameter is distributed over the devices of its pipeline stage, as in a MindSpore strategy file.

    Attributes:
        device_matrix: shape of the array of devices; the last axis is innermost.
        tensor_map: for each axis of the tensor the axis of ``device_matrix`` that it is divided over, counted from the
            right; -1: not divided.
        optimizer_shards: number of devices holding the same part over which it is divided again, along the first axis;
            -1: all of them; 0: not divided.
    """

    device_matrix: tuple[int, ...]
    tensor_map: tuple[int, ...]
    optimizer_shards: int = 0

    @property
    def num_devices(self) -> int:
        """Number of devices of the stage."""
        return prod(self.device_matrix)

    def parts(self) -> tuple[int, ...]:
        """Number of parts of each axis, without the optimizer's shards."""
        return tuple(self.device_matrix[-1 - axis] if axis >= 0 else 1 for axis in self.tensor_map)

    def place(self, device: int) -> tuple[tuple[int, int], ...]:
        """For each axis (number of the part, number of parts) that a device of the stage holds.

        Mirrors ``mindspore/parallel/_tensor.py`` (2.7 to 2.9).
        """
        sizes = self.device_matrix[::-1]  # counted from the right, as tensor_map does
        position = [int(number) for number in np.unravel_index(device, self.device_matrix)[::-1]]
        places = [(position[axis], sizes[axis]) if axis >= 0 else (0, 1) for axis in self.tensor_map]
        if self.optimizer_shards and places:
            copy, copies = 0, 1
            for axis in reversed([axis for axis in range(len(sizes)) if axis not in self.tensor_map]):
                copy, copies = copy * sizes[axis] + position[axis], copies * sizes[axis]
            shards = copies if self.optimizer_shards == -1 else self.optimizer_shards
            part, parts = places[0]
            places[0] = (part * shards + copy % shards, parts * shards)
        return tuple(places)

    def box(self, shape: Sequence[int], device: int) -> Box:
        """The block of a tensor of ``shape`` that a device of the stage holds; ValueError if it can't be cut so."""
        place = self.place(device)
        if len(place) != len(shape) or any(length % parts for length, (_, parts) in zip(shape, place)):
            raise ValueError(f"shape {tuple(shape)} can't be cut into {[parts for _, parts in place]}")
        return _box([length // parts for length, (_, parts) in zip(shape, place)], place)


def _box(shape: Sequence[int], place: tuple[tuple[int, int], ...]) -> Box:
    """The block of this shape that is at ``place``; ValueError if another axis is divided than a Box has."""
    if any(parts > 1 for _, parts in (place if len(place) > 2 else ())[1:]):
        raise ValueError(f"{len(place)} axes, cut along another than the first: no parameter of Qwen3 is")
    bounds = [(part * length, (part + 1) * length) for length, (part, _) in zip(shape, place)]
    return Box(bounds[0] if bounds else (0, 1), bounds[1] if len(bounds) == 2 else None)


# For each pipeline stage: parameter name -> sharding.
Strategies = Sequence[Mapping[str, Sharding]]


def open_rank_files(
    directory: Path,
    strategies: Strategies,
    file_suffix: str | None = None,
    *,
    weights_only: bool = False,
    without_prefix: str | None = None,
) -> Source:
    """Opens what the ranks of a training run saved: finds the shards of every parameter that the strategies list.

    Other arguments are those of ``open_source``.

    Raises:
        BridgeError: ranks, files or blocks are missing, or blocks do not fit together. Lists all of them.
    """
    sizes = {sharding.num_devices for stage in strategies for sharding in stage.values()}
    if len(sizes) != 1:
        raise BridgeError(f"the strategy files are not of one run: stages of {sorted(sizes)} devices; remove old ones")
    (num_devices,) = sizes
    num_ranks = num_devices * len(strategies)
    files = _files_of(directory, num_ranks, file_suffix)
    found: dict[str, dict[int, TensorInfo]] = {}
    problems: list[Problem] = []
    metadata: list[dict[str, str]] = []
    for rank, file in files.items():
        try:
            tensors, file_metadata = read_header(file)
        except BridgeError as error:
            problems += error.problems
            continue
        metadata.append(file_metadata)
        for name, tensor in tensors.items():
            found.setdefault(name, {})[rank] = tensor
    refuse(f"{directory} can't be read", problems)
    listed = {name for stage in strategies for name in stage}

    def is_left_out(name: str) -> bool:
        has_prefix = without_prefix is not None and name.startswith(without_prefix)
        return has_prefix or (weights_only and is_training_state(name, listed))

    left_out = sorted(filter(is_left_out, found))
    for name in left_out:
        del found[name]
    remedy = "give the strategy files of this run, of all its stages"
    if all(map(adapted_parameter, listed)):  # what a LoRA run trains
        remedy = (
            "the run's strategy files list what it trains alone: let MindFormers write them again, with "
            "strategy_ckpt_config.only_trainable_params False and only_save_strategy True"
        )
    for name in fold_names(name for name in found if name not in listed and not is_counter(name)):
        problems.append(Problem(name, "in the ranks' files, in no strategy file", remedy))
    whole: dict[str, TensorInfo] = {}
    for number, stage in enumerate(strategies):
        for name, sharding in stage.items():
            if name in whole or is_left_out(name) or (name not in found and is_training_state(name, listed)):
                continue  # a tied embedding is in two stages; an optimizer's state may have been left out
            ranks = found.get(name, {})
            mine = {rank % num_devices: ranks[rank] for rank in ranks if rank // num_devices == number}
            try:
                whole[name] = _assemble(sharding, mine)
            except ValueError as error:
                problems.append(Problem(name, str(error), "is a rank's file of another step or run, or missing?"))
    if problems:  # else what these ranks held is in others' files too
        remedy = "copy it from the machine that saved it"
        absent = (Problem(f"rank_{r}", "not there", remedy) for r in range(num_ranks) if r not in files)
        problems = [*absent, *problems]
    refuse(f"{directory} does not hold what the strategy files declare", _fold(problems))
    shared = set.intersection(*(set(entry.items()) for entry in metadata)) - {("remove_redundancy", "True")}
    unlisted = {name: ranks[0] for name, ranks in found.items() if name not in listed and 0 in ranks}
    of_qkv = (sharding.parts()[0] for stage in strategies for name, sharding in stage.items() if _is_cut_as_qkv(name))
    return Source(directory, whole, dict(shared), {}, next(of_qkv, 1), unlisted, tuple(left_out))


def _is_cut_as_qkv(name: str) -> bool:
    """Whether a tensor is the fused weights of queries, keys and values, or the B of their LoRA."""
    parameter, side = adapted_parameter(name) or (name, "b")
    return side == "b" and is_fused_qkv(parameter)


def _fold(problems: Iterable[Problem]) -> list[Problem]:
    """Combines the rows of tensors, or ranks, that have the same fault."""
    rows: dict[tuple[str, str], list[str]] = {}
    for problem in problems:
        rows.setdefault((problem.found, problem.remedy), []).append(problem.subject)
    return [Problem(first_names(fold_names(names)), *row) for row, names in rows.items()]


def rank_directories(path: Path) -> dict[int, Path]:
    """The ``rank_N`` directories in a directory, by their numbers, in order."""
    found = {int(entry.name[5:]): entry for entry in path.glob("rank_*") if re.fullmatch(r"rank_\d+", entry.name)}
    return dict(sorted(found.items()))


def _files_of(directory: Path, num_ranks: int, file_suffix: str | None) -> dict[int, Path]:
    """Rank -> its file."""
    ranks = rank_directories(directory)
    if not ranks:
        what = "holds no" if directory.is_dir() else "does not exist and holds no"
        raise BridgeError(f"{directory} {what} rank_0, rank_1, ...: give the folder that does")
    problems = [
        Problem(f"rank_{rank}", "not in the strategy files' run", "remove it, or give the strategy files of this run")
        for rank in ranks
        if rank >= num_ranks
    ]
    files = {}
    wanted = re.compile(rf"(.*[-_])?{re.escape(file_suffix)}\.safetensors" if file_suffix else ".*")
    for rank, path in ranks.items():
        candidates = sorted(file for file in path.glob("*.safetensors") if wanted.fullmatch(file.name))
        if len(candidates) == 1:
            files[rank] = candidates[0]
        elif candidates:
            names = ", ".join(file.name for file in candidates[-3:])
            problems.append(Problem(path.name, f"{len(candidates)} files: {names}", "choose with --file_suffix"))
        else:
            what = f"no file *{file_suffix}.safetensors" if file_suffix else "no *.safetensors"
            problems.append(Problem(path.name, what, "copy it, or choose another --file_suffix"))
    refuse(f"{directory} is not one run's checkpoint", _fold(problems))
    return files


@cache
def _places(sharding: Sharding) -> list[tuple[tuple[int, int], ...]]:
    return [sharding.place(device) for device in range(sharding.num_devices)]


def _assemble(sharding: Sharding, tensors: Mapping[int, TensorInfo]) -> TensorInfo:
    """The whole tensor with its shards, from the blocks that a stage's devices hold; ValueError if they don't fit."""
    if not tensors:
        raise ValueError("in no rank's file")
    some = next(iter(tensors.values()))
    if any(tensor.shape != some.shape or tensor.dtype != some.dtype for tensor in tensors.values()):
        raise ValueError("not of one shape and dtype in all ranks' files")
    if len(sharding.tensor_map) != len(some.shape):
        raise ValueError(f"shape {some.shape}, {len(sharding.tensor_map)} axes in the strategy files")
    places = _places(sharding)
    blocks: dict[tuple[tuple[int, int], ...], TensorInfo] = {}
    for device, tensor in tensors.items():
        blocks.setdefault(places[device], tensor)
    if missing := len(set(places)) - len(blocks):
        raise ValueError(f"{missing} of its {len(set(places))} blocks in no rank's file")
    shape = tuple(length * parts for length, (_, parts) in zip(some.shape, places[0]))
    shards = tuple(Shard(tensor, _box(some.shape, place)) for place, tensor in sorted(blocks.items()))
    return TensorInfo(some.name, shape, some.dtype, some.file, some.start, some.nbytes * len(blocks), shards)
