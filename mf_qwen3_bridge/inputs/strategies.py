"""Reads MindSpore's strategy files: how a training run distributed its parameters."""

import os
import runpy
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mf_qwen3_bridge.errors import BridgeError, Problem, refuse
from mf_qwen3_bridge.inputs.rank_files import Sharding, Strategies


def read_strategy(file: Path) -> tuple[int, dict[str, Sharding]]:
    """Reads the strategy file of a rank, or refuses it: its pipeline stage, and parameter name -> sharding there."""
    strategy = _messages()["ParallelStrategyMap"]()
    try:
        strategy.ParseFromString(file.read_bytes())
        shardings = {item.param_name: _sharding(item.parallel_layouts) for item in strategy.parallel_layout_item}
        if not shardings:
            raise ValueError("it lists no parameter")
        # current_stage is a counter, not the stage.
        return int(strategy.parallel_strategy_item[0].parallel_strategys.stage), shardings
    except Exception as error:
        problem = Problem(file.name, f"no strategy file ({error})", "remove it, or copy it again")
        raise BridgeError(f"{file} is no strategy file", [problem]) from error


def _sharding(layout: Any) -> Sharding:
    if len(layout.tensor_map) != 1:
        raise ValueError("an axis that is cut by several axes of the devices; MindFormers' Qwen3 has none")
    return Sharding(tuple(layout.dev_matrix[0].dim), tuple(layout.tensor_map[0].dim), layout.opt_weight_shard_size)


def read_strategies(directory: Path) -> Strategies:
    """Reads the strategies of each pipeline stage, from ``ckpt_strategy_rank_N.ckpt`` of all ranks or some.

    Mirrors ``_load_protobuf_strategy`` of ``mindspore/parallel/_parallel_serialization.py`` (2.7 to 2.9).

    Raises:
        BridgeError: files are missing, damaged or contradict each other, or a stage has none.
    """
    files = sorted(directory.glob("*.ckpt"))
    if not files:
        what = "holds no ckpt_strategy_rank_N.ckpt" if directory.is_dir() else "does not exist"
        remedy = "give the run's strategy folder; a run on one card has none: give its file as --input_path"
        raise BridgeError(f"{directory} {what}: {remedy}")
    stages: dict[int, tuple[Path, dict[str, Sharding]]] = {}
    problems = []
    for file in files:
        try:
            stage, shardings = read_strategy(file)
        except BridgeError as error:
            problems += error.problems
            continue
        first, theirs = stages.setdefault(stage, (file, shardings))
        if theirs != shardings:
            found = f"differs from {first.name}, though both are of stage {stage}"
            problems.append(Problem(file.name, found, "remove those that an earlier run left"))
    missing = range(max(stages, default=0) + 1) - stages.keys()
    problems += [Problem(f"stage {stage}", "no file of it", "copy those of its ranks") for stage in sorted(missing)]
    refuse(f"the strategy files in {directory} are not of one run", problems)
    return [stages[stage][1] for stage in sorted(stages)]


@cache
def _messages() -> dict[str, Any]:
    """MindSpore's own definition of the files, loaded without importing MindSpore, which takes seconds and 400 MB."""
    mindspore = find_spec("mindspore")
    if mindspore is None or not mindspore.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'mindspore'", name="mindspore")
    os.environ.setdefault("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION", "python")  # as MindSpore does for its own
    return runpy.run_path(f"{mindspore.submodule_search_locations[0]}/train/node_strategy_pb2.py")
