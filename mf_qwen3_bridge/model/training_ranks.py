"""How MindFormers' training network is spread over ranks: which block of every parameter each holds."""

from collections.abc import Iterable, Iterator
from math import lcm

from mf_qwen3_bridge.model.layouts import Box
from mf_qwen3_bridge.model.parallel import ParallelConfig
from mf_qwen3_bridge.model.rules import Dialect, ExpertsRule, Rule


def world_size(parallel: ParallelConfig) -> int:
    """Ranks that hold different things: those after them hold the same again."""
    return lcm(parallel.tensor_parallel, parallel.expert_parallel)


def boxes(rules: Iterable[Rule], held: Dialect, parallel: ParallelConfig, number: int) -> Iterator[tuple[str, Box]]:
    """What rank ``number`` of a training run holds of each parameter of dialect ``held`` that is cut.

    Mirrors the ``shard`` methods of ``mindformers/parallel_core/training_graph`` (1.7 to 2.1): tensor parallel cuts
    rows or columns in even blocks, whatever they mean; experts are cut by expert parallel alone.
    """
    for rule in rules:
        is_experts = isinstance(rule, ExpertsRule)
        size = parallel.expert_parallel if is_experts else parallel.tensor_parallel
        axis = 0 if is_experts or rule.divided == "rows" else 1
        if rule.divided is None or size == 1:
            continue
        shape = rule.places(held)[0].shape
        part, step = number % size, shape[axis] // size
        mine = (part * step, (part + 1) * step)
        yield rule.parameter, Box(mine) if axis == 0 else Box((0, shape[0]), mine)
