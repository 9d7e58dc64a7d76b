"""How an inference run is spread over processes, and which part of every parameter a process holds."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import gcd

from mf_qwen3_bridge.errors import Problem
from mf_qwen3_bridge.model.parameters import parameters_of
from mf_qwen3_bridge.model.spec import ModelSpec


@dataclass(frozen=True)
class Rank:
    """One process's place; the default is a process that holds everything.

    Attributes:
        tensor_parallel, tensor_rank: how many processes share attention, MLP, embedding and output layer, and which of
            them this is.
        expert_parallel, expert_rank: the same of those that share the experts.
        expert_tensor_parallel, expert_tensor_rank: the same of those that share each expert.
        uses_all_to_all: whether tokens are sent to the processes of their experts, instead of to all.
    """

    tensor_parallel: int = 1
    tensor_rank: int = 0
    expert_parallel: int = 1
    expert_rank: int = 0
    expert_tensor_parallel: int = 1
    expert_tensor_rank: int = 0
    uses_all_to_all: bool = False

    @property
    def rotates_router(self) -> bool:
        """Whether the router's rows begin with this process's experts: unless tokens are sent to experts by number."""
        return self.expert_parallel > 1 and not self.uses_all_to_all


WHOLE = Rank()

# The sizes that divide a model's numbers, as messages call them.
_TENSOR, _EXPERT, _PER_EXPERT = "tensor parallel", "expert parallel", "processes per expert"


@dataclass(frozen=True)
class ParallelConfig:
    """The sizes of an inference run, in MindFormers' terms (``parallel_config`` of a YAML).

    Attributes:
        tensor_parallel: ``model_parallel``: heads, MLP, vocabulary are divided by it.
        expert_parallel: the experts are divided by it; each remaining expert by data * tensor / expert.
        data_parallel: copies of the model that answer different requests; they share the experts.
    """

    tensor_parallel: int = 1
    expert_parallel: int = 1
    data_parallel: int = 1

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.tensor_parallel * self.data_parallel

    def rank(self, number: int) -> Rank:
        """The place of process ``number``.

        Mirrors ``initialize_model_parallel`` of ``mindformers/parallel_core/inference/parallel_state.py`` (order
        tp-ep-pp-dp, no pipeline) and ``update_comm_config`` of its ``utils.py`` (1.7 to 2.1).
        """
        expert_tensor_parallel = self.world_size // self.expert_parallel
        return Rank(
            tensor_parallel=self.tensor_parallel,
            tensor_rank=number % self.tensor_parallel,
            expert_parallel=self.expert_parallel,
            expert_rank=number // expert_tensor_parallel,
            expert_tensor_parallel=expert_tensor_parallel,
            expert_tensor_rank=number % expert_tensor_parallel,
            uses_all_to_all=self.data_parallel > 1 and expert_tensor_parallel == 1,
        )

    def problems(self, spec: ModelSpec, *, training: bool = False) -> Iterator[Problem]:
        """Everything of a model that these sizes don't divide, with the sizes that would.

        Args:
            spec: the model's numbers.
            training: for MindFormers' training network; the inference network repeats KV heads, and divides experts.
        """
        if not spec.is_moe and self.expert_parallel > 1:
            yield Problem("expert parallel", str(self.expert_parallel), "the model has no experts: leave it out")
        if spec.is_moe and not training and self.world_size % self.expert_parallel:
            found = f"{self.expert_parallel}, number of processes {self.world_size}"
            fitting = ", ".join(str(n) for n in range(1, self.world_size + 1) if self.world_size % n == 0)
            remedy = f"it has to divide them: use {fitting}, or another number of processes (--tp, msrun)"
            yield Problem("expert parallel", found, remedy)
            return
        for name, size_name, size in self._undivided(spec, training):
            remedy = "raise expert parallel, or use fewer processes"
            if size_name != _PER_EXPERT:
                fitting = ", ".join(map(str, self._sizes_that_fit(spec, training, size_name)))
                remedy = f"use a size that divides the whole model: {fitting or 'none; change the other size'}"
            yield Problem(name, f"{getattr(spec, name)}, {size_name} {size}", remedy)

    def _undivided(self, spec: ModelSpec, training: bool) -> Iterator[tuple[str, str, int]]:
        """(number of the model, the size that has to divide it, its value) wherever it doesn't; read off the table."""
        share = 1 if training else self.world_size // self.expert_parallel
        sizes = {"num_experts": (_EXPERT, self.expert_parallel), "moe_ffn_hidden_size": (_PER_EXPERT, share)}
        numbers = [parameter.shape.divided for parameter in parameters_of(spec) if parameter.shape.divided]
        for name in dict.fromkeys([*numbers, "num_experts"] if spec.is_moe else numbers):
            number, (size_name, size) = getattr(spec, name), sizes.get(name, (_TENSOR, self.tensor_parallel))
            repeats_heads = name == "num_query_groups" and not training and size % number == 0
            if number % size and not repeats_heads:
                yield name, size_name, size

    def _sizes_that_fit(self, spec: ModelSpec, training: bool, size_name: str) -> Iterator[int]:
        """The usual sizes with which everything that this size divides would be divided."""
        for size in (1, 2, 4, 8, 16, 32, 64):
            if size_name == _TENSOR:
                other = replace(self, tensor_parallel=size, expert_parallel=gcd(size, self.expert_parallel))
            else:
                other = replace(self, expert_parallel=size)
            is_possible = training or other.world_size % other.expert_parallel == 0
            if is_possible and not {size_name, _PER_EXPERT} & {name for _, name, _ in other._undivided(spec, training)}:
                yield size


SINGLE = ParallelConfig()


def num_processes() -> int:
    """How many processes compute in the run that msrun started; 1 without it.

    msrun runs the script once more, as the scheduler that the others meet at: it too has to join the run.
    """
    return int(os.environ["MS_WORKER_NUM"]) if os.environ.get("MS_ROLE") in ("MS_WORKER", "MS_SCHED") else 1
