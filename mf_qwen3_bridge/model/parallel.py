"""How an inference run is spread over processes, and which part of every parameter a process holds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from mf_qwen3_bridge.errors import Problem
from mf_qwen3_bridge.model.spec import ModelSpec


@dataclass(frozen=True)
class Rank:
    """One process's place; the default is a process that holds everything.

    Attributes:
        tensor_parallel: how many processes share attention, MLP, embedding and output layer.
        tensor_rank: which of them this is.
        expert_parallel: how many processes share the experts.
        expert_rank: which of them this is.
        expert_tensor_parallel: how many processes share each expert.
        expert_tensor_rank: which of them this is.
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
        """Whether the router's rows begin with this process's experts: unless tokens are sent to experts by number.

        Mirrors ``Router.weight_loader`` of ``mindformers/parallel_core/inference/transformer/moe/router.py``.
        """
        return self.expert_parallel > 1 and not self.uses_all_to_all


WHOLE = Rank()


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
        tp-ep-pp-dp, no pipeline) and ``update_comm_config`` of its ``utils.py`` (1.7 to 1.9).
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

    def problems(self, spec: ModelSpec) -> Iterator[Problem]:
        """Everything of a model that does not divide by these sizes."""
        tensor = self.tensor_parallel
        divided = {"num_attention_heads": spec.num_attention_heads, "vocab_size": spec.vocab_size}
        if not spec.is_moe:
            divided["ffn_hidden_size"] = spec.ffn_hidden_size
        for name, number in divided.items():
            if number % tensor:
                yield Problem(name, f"{number}, tensor parallel {tensor}", _remedy(name, number))
        groups = spec.num_query_groups
        if groups % tensor and tensor % groups:
            yield Problem(
                "num_query_groups", f"{groups}, tensor parallel {tensor}", "one has to be a multiple of the other"
            )
        if not spec.is_moe:
            if self.expert_parallel > 1:
                yield Problem("expert parallel", f"{self.expert_parallel}", "the model has no experts: leave it out")
            return
        if self.world_size % self.expert_parallel:
            yield Problem(
                "expert parallel",
                f"{self.expert_parallel}, number of processes {self.world_size}",
                "it has to divide them: start more with msrun, or name their number with --tp",
            )
            return
        if spec.num_experts % self.expert_parallel:
            yield Problem(
                "num_experts",
                f"{spec.num_experts}, expert parallel {self.expert_parallel}",
                _remedy("num_experts", spec.num_experts),
            )
        share = self.world_size // self.expert_parallel
        if spec.moe_ffn_hidden_size % share:
            yield Problem(
                "moe_ffn_hidden_size",
                f"{spec.moe_ffn_hidden_size}, each expert on {share} processes",
                "raise expert parallel, or use fewer processes",
            )


SINGLE = ParallelConfig()


def num_processes() -> int:
    """How many processes compute in the run that msrun started; 1 without it.

    msrun runs the script once more, as the scheduler that the others meet at: it too has to join the run.
    """
    return int(os.environ["MS_WORKER_NUM"]) if os.environ.get("MS_ROLE") in ("MS_WORKER", "MS_SCHED") else 1


def _remedy(name: str, number: int) -> str:
    sizes = [str(size) for size in (1, 2, 4, 8, 16, 32, 64) if number % size == 0]
    return f"use a size that divides {name}: {', '.join(sizes)}"
