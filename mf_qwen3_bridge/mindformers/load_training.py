"""Loads weights into MindFormers' training network, or into the part of it that one rank of a parallel run holds."""

import re
from collections.abc import Container, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mindspore as ms
from mindspore.communication import GlobalComm, get_group_size, get_rank

from mf_qwen3_bridge.errors import BridgeError, folded_problems, refuse
from mf_qwen3_bridge.inputs.preflight import CheckedCheckpoint
from mf_qwen3_bridge.inputs.rank_files import Sharding
from mf_qwen3_bridge.inputs.strategies import read_strategy
from mf_qwen3_bridge.mindformers.load import fill_parameters
from mf_qwen3_bridge.model.layouts import TRAINING_DEFAULT, Layout
from mf_qwen3_bridge.model.parameters import is_training_state
from mf_qwen3_bridge.model.rules import Dialect
from mf_qwen3_bridge.transfer.plan import Plan, write_slices

# What a LoRA adds to a network; it begins as it was initialised.
_ADAPTER = re.compile(r"\blora_[abAB]\b|_lora_")


def load_training_network(network: Any, model: CheckedCheckpoint, strategy: Path | None = None) -> Plan:
    """Fills a training network, or this rank's part of it, in the layout of the network's own flags.

    Args:
        network: a ``TrainingQwen3ForCausalLM`` or ``TrainingQwen3MoeForCausalLM``; compiled, if the run is parallel:
            compiling cuts its parameters.
        model: the checkpoint, of which each rank reads what it holds.
        strategy: the file in which MindSpore wrote how it cut the parameters of this rank's stage; None if the run is
            not parallel.

    Returns:
        The plan that was carried out.

    Raises:
        BridgeError: the network's parameters are not the model's, or are divided otherwise than in the file.
    """
    config = network.get_gpt_transformer_config()
    layout = Layout.of_training(vars(config), config.tensor_model_parallel_size)
    plan = model.plan(Dialect(layout.of_experts if model.spec.is_moe else layout))
    weights = {target.name for target in plan.targets}
    parameters = {
        name: parameter for name, parameter in network.parameters_dict().items() if not is_left_out(name, weights)
    }
    if strategy is not None:
        stage, shardings = read_strategy(strategy)
        # A tied embedding is in two stages: MindSpore sends it from the first to the last, which does not list it.
        divided = {n for n, p in parameters.items() if p.sliced and not p.param_info.is_pipeline_shared_param}
        needed = weights if ms.get_auto_parallel_context("pipeline_stages") == 1 else weights & divided
        missing = needed - shardings.keys()  # from a file that an earlier run left
        remedy = "empty the strategy folder, and set strategy_ckpt_config.only_trainable_params to False"
        problems = folded_problems({("in the network, not in the file", remedy): missing})
        refuse(f"{strategy} is not of this run", problems)
        plan = cut_plan(plan, shardings, stage, get_rank())
        mine = {target.name for target in plan.targets}
        parameters = {name: parameter for name, parameter in parameters.items() if name in mine or name not in weights}
    fill_parameters(parameters, plan)
    return plan


def load_pynative_network(network: Any, model: CheckedCheckpoint) -> Plan:
    """Fills a network of MindFormers' PyNative trainer, in a process that trains alone.

    It has the names and shapes of the training network, and always the default layout: it does not read the flags.

    Args:
        network: a ``PyNativeQwen3ForCausalLM`` (1.9 and later).
        model: the checkpoint.

    Returns:
        The plan that was carried out.

    Raises:
        BridgeError: the network is divided among processes; its parameters are not the model's.
    """
    if GlobalComm.INITED and get_group_size() > 1:
        raise BridgeError(
            "a PyNative network that is divided among processes can't be filled from these weights by the bridge: "
            "train on one card, or in graph mode (context.mode: 0)"
        )
    plan = model.plan(Dialect(TRAINING_DEFAULT))
    weights = {target.name for target in plan.targets}
    parameters = network.parameters_dict()
    fill_parameters({name: p for name, p in parameters.items() if not is_left_out(name, weights)}, plan)
    return plan


def is_left_out(name: str, weights: Container[str]) -> bool:
    """Whether a training network has this parameter beside the model's ``weights``, and begins with what it holds."""
    return name not in weights and (is_training_state(name, weights) or bool(_ADAPTER.search(name)))


def cut_plan(plan: Plan, shardings: Mapping[str, Sharding], stage: int, rank: int) -> Plan:
    """Cuts what one device of a pipeline stage holds out of a plan that makes whole parameters.

    ``shardings`` are those of the stage's parameters, an optimizer's state included; ``rank`` counts in the whole run.
    Raises BridgeError if rank and stage contradict each other, or the plan's parameters can't be cut so.
    """
    devices = next(iter(shardings.values())).num_devices
    if rank // devices != stage:
        raise BridgeError(
            f"the strategy file is of pipeline stage {stage} with {devices} devices, but this is rank {rank}: "
            "remove the strategy files of earlier runs"
        )
    targets = [target for target in plan.targets if target.name in shardings]
    try:
        boxes = {
            target.name: shardings[target.name].box(target.shape, rank % devices)
            for target in targets
            if any(parts > 1 for _, parts in shardings[target.name].place(rank % devices))
        }
    except ValueError as error:
        raise BridgeError(
            f"the strategy file is of another network ({error}): remove the strategy files of earlier runs"
        ) from error
    return write_slices(replace(plan, targets=tuple(targets)), boxes)
