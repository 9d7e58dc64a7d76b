"""This process's place among those that MindFormers runs."""

from __future__ import annotations

from mindformers.parallel_core.inference import parallel_state

from mf_qwen3_bridge.parallel import Rank


def current_rank() -> Rank:
    """What MindFormers' networks are built for in this process; everything in a process that runs alone.

    Mirrors the choice of a dispatcher in ``update_comm_config`` of ``mindformers/parallel_core/inference/utils.py`` and
    the use of it in ``Router.weight_loader`` (1.7 to 1.9).
    """
    expert_parallel = parallel_state.get_moe_expert_parallel_world_size()
    expert_tensor_parallel = parallel_state.get_moe_tensor_parallel_world_size()
    uses_all_to_all = parallel_state.get_data_parallel_world_size() > 1 and expert_tensor_parallel == 1
    return Rank(
        tensor_parallel=parallel_state.get_tensor_model_parallel_world_size(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        expert_parallel=expert_parallel,
        expert_rank=parallel_state.get_moe_expert_parallel_rank(),
        expert_tensor_parallel=expert_tensor_parallel,
        expert_tensor_rank=parallel_state.get_moe_tensor_parallel_rank(),
        rotates_router=expert_parallel > 1 and not uses_all_to_all,
    )
