"""This process's place among those that MindFormers runs."""

from __future__ import annotations

from typing import Any

from mindformers.parallel_core.inference import parallel_state

from mf_qwen3_bridge.model.parallel import Rank


def rank_of(network: Any) -> Rank:
    """Which part of every parameter an inference network holds; everything in a process that runs alone."""
    return Rank(
        tensor_parallel=parallel_state.get_tensor_model_parallel_world_size(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        expert_parallel=parallel_state.get_moe_expert_parallel_world_size(),
        expert_rank=parallel_state.get_moe_expert_parallel_rank(),
        expert_tensor_parallel=parallel_state.get_moe_tensor_parallel_world_size(),
        expert_tensor_rank=parallel_state.get_moe_tensor_parallel_rank(),
        uses_all_to_all=bool(network.model.config.use_alltoall),
    )
