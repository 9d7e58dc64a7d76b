"""Makes what MindFormers' ranks leave behind (strategy files and rank_N/*.safetensors) from whole tensors, on a CPU.

The strategy files are written with MindSpore's own protobuf classes, and look like the ones that its compiler writes
(see train/compile_train.py); which rank keeps a parameter when redundancy is removed is decided by MindSpore itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from mindspore.train import node_strategy_pb2
from mindspore.train._utils import get_parameter_redundancy, remove_param_redundancy
from safetensors.numpy import save_file

from mf_qwen3_bridge.inputs.preflight import check
from mf_qwen3_bridge.model.rules import TRAIN
from mf_qwen3_bridge.model.spec import ModelSpec

SUFFIX = "1000_1"  # epoch 1000, step 1


@dataclass(frozen=True)
class Cut:
    """How one parameter is divided among the devices of its pipeline stage.

    ``shards``: into how many parts each axis is cut; at most one axis is cut. The devices next to each other hold the
    parts one after the other, and the whole is repeated until the devices are used up.
    ``optimizer_shards``: optimizer parallelism cuts each part again, along axis 0, among this many of its repetitions.
    ``stages``: the pipeline stages that hold the parameter.
    """

    shards: tuple[int, ...] = ()
    optimizer_shards: int = 0
    stages: tuple[int, ...] = (0,)

    @property
    def parts(self) -> int:
        return int(np.prod(self.shards, dtype=int))

    def of(self, whole: np.ndarray, device: int) -> np.ndarray:
        """What a device, counted within its stage, holds of the whole."""
        for axis, parts in enumerate(self.shards):
            if parts > 1:
                whole = np.split(whole, parts, axis)[device % parts]
        if self.optimizer_shards:
            whole = np.split(whole, self.optimizer_shards)[device // self.parts % self.optimizer_shards]
        return np.ascontiguousarray(whole)


def write_strategy(path: Path, cuts: Mapping[str, Cut], stage: int, devices: int) -> None:
    """One rank's strategy file; all ranks of a stage have the same."""
    strategy = node_strategy_pb2.ParallelStrategyMap(current_stage=2)  # a counter, not the stage
    for name, cut in cuts.items():
        item = strategy.parallel_strategy_item.add(node_name=f"Morph_{name}")
        item.parallel_strategys.stage = stage
        layout = strategy.parallel_layout_item.add(param_name=name).parallel_layouts
        layout.field = 0
        layout.dev_matrix.add(dim=[devices // cut.parts, 1, cut.parts])  # dp, cp, tp
        layout.tensor_map.add(dim=[0 if parts > 1 else -1 for parts in cut.shards])  # counted from the right
        layout.param_split_shape.add()
        layout.indices_offset.add()
        layout.opt_weight_shard_size = cut.optimizer_shards
        layout.opt_weight_shard_step = cut.parts if cut.optimizer_shards else 0
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(strategy.SerializeToString())


def make_ranks(
    directory: Path,
    tensors: Mapping[str, np.ndarray],
    cuts: Mapping[str, Cut],
    devices: int,
    *,
    unlisted: Mapping[str, np.ndarray] | None = None,
    remove_redundancy: bool = False,
    prefix: str = "qwen3",
    suffix: str = SUFFIX,
) -> tuple[Path, Path]:
    """The folders ``strategy`` and ``checkpoint`` of a training run.

    Args:
        directory: where both go.
        tensors: whole tensors.
        cuts: how each is cut; a tensor that is missing here is whole on every device of stage 0.
        devices: devices of one pipeline stage.
        unlisted: what is in every rank's file and in no strategy file (global_step and the like).
        remove_redundancy: write each part once, as MindFormers does when told so.
        prefix: of the files' names.
        suffix: of the files' names.
    """
    cuts = {name: cuts.get(name, Cut((1,) * value.ndim)) for name, value in tensors.items()}
    for stage in range(1 + max(stage for cut in cuts.values() for stage in cut.stages)):
        local = {name: cut for name, cut in cuts.items() if stage in cut.stages}
        ranks = range(stage * devices, (stage + 1) * devices)
        for rank in ranks:
            strategy = directory / "strategy" / f"ckpt_strategy_rank_{rank}.ckpt"
            write_strategy(strategy, local, stage, devices)
        kept: Mapping[int, Sequence[str]] = dict.fromkeys(ranks, tuple(local))
        if remove_redundancy:
            kept = remove_param_redundancy(get_parameter_redundancy(str(strategy), initial_rank=ranks[0]))
        for rank in ranks:
            mine = {name: local[name].of(tensors[name], rank - ranks[0]) for name in kept.get(rank, ())}
            path = directory / "checkpoint" / f"rank_{rank}" / f"{prefix}_rank_{rank}-{suffix}.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            metadata = {"format": "ms", "remove_redundancy": str(remove_redundancy)}
            save_file({**mine, **(unlisted or {})}, path, metadata)
    return directory / "strategy", directory / "checkpoint"


# The model of fixtures/strategies, which MindSpore's compiler wrote.
COMPILED = ModelSpec(2, 16, 4, 2, 8, 24, 64, False)
COMPILED_MOE = replace(COMPILED, ffn_hidden_size=0, num_experts=4, moe_ffn_hidden_size=24)


def cut(tensors, tensor_parallel=1, expert_parallel=1, stages=1, optimizer_shards=0) -> dict[str, Cut]:
    """How upstream's ``shard`` methods cut each parameter, and its optimizer state with it."""
    rows = ("word_embeddings.weight", "output_layer.weight", "linear_qkv.weight", "linear_fc1.weight")
    columns = ("linear_proj.weight", "linear_fc2.weight")
    cuts = {}
    for name, tensor in tensors.items():
        shards = (1,) * tensor.ndim
        if name.endswith(rows):
            shards = (tensor_parallel, 1)
        elif name.endswith(columns):
            shards = (1, tensor_parallel)
        elif ".experts." in name:
            shards = (expert_parallel, 1)
        is_first = stages == 1 or "embedding" in name or ".layers.0." in name
        cuts[name] = Cut(shards, optimizer_shards, (0,) if is_first else (1,))
    return cuts


RUNS = {  # spec, devices of a stage, how they cut, redundancy removed
    "tp2": (COMPILED, 2, {"tensor_parallel": 2}, False),
    "tp2 dp2": (COMPILED, 4, {"tensor_parallel": 2}, False),
    "tp2 dp2 removed": (COMPILED, 4, {"tensor_parallel": 2}, True),
    "tp2 dp2 opt2": (COMPILED, 4, {"tensor_parallel": 2, "optimizer_shards": 2}, False),
    "tp2 dp4 opt2 removed": (COMPILED, 8, {"tensor_parallel": 2, "optimizer_shards": 2}, True),
    "dp4 opt4": (COMPILED, 4, {"optimizer_shards": 4}, False),
    "pp2": (COMPILED, 1, {"stages": 2}, False),
    "pp2 tp2 dp2 removed": (COMPILED, 4, {"tensor_parallel": 2, "stages": 2}, True),
    "ep2": (COMPILED_MOE, 2, {"expert_parallel": 2}, False),
    "tp2 ep2": (COMPILED_MOE, 2, {"tensor_parallel": 2, "expert_parallel": 2}, False),
    "tp2 ep4 removed": (COMPILED_MOE, 4, {"tensor_parallel": 2, "expert_parallel": 4}, True),
}


def save_as_ranks(directory: Path, checkpoint: Path) -> None:
    """What eight ranks of a run with tensor parallel 2 and expert parallel 4 leave, redundancy removed."""
    tensors = {target.name: target.make() for target in check(checkpoint).plan(TRAIN).targets}
    cuts = {}
    for name in list(tensors):
        if ".experts." in name:
            cuts[name] = Cut((4, 1))
        elif re.search(r"embedding|output_layer|linear_qkv", name):
            cuts[name] = Cut((2, 1))
        elif "linear_proj" in name:
            cuts[name] = Cut((1, 2))
        for state in ("adam_m", "adam_v"):
            tensors[f"{state}.{name}"] = np.ones(tensors[name].shape, np.float32)
            if name in cuts:
                cuts[f"{state}.{name}"] = cuts[name]
    counters = {"global_step": np.array([1000], np.int32)}
    make_ranks(directory, tensors, cuts, 8, unlisted=counters, remove_redundancy=True, prefix="qwen3_moe")
