"""Loads weights into MindFormers' inference network: the direct loader and the delegated conversion."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakSet

import mindspore as ms
import numpy as np

from mf_qwen3_bridge.errors import BridgeError, folded_problems, refuse
from mf_qwen3_bridge.inputs.opening import open_source
from mf_qwen3_bridge.inputs.preflight import CheckedCheckpoint
from mf_qwen3_bridge.inputs.source import Source
from mf_qwen3_bridge.mindformers import conversion
from mf_qwen3_bridge.mindformers.network import is_in_stage, rank_of
from mf_qwen3_bridge.model.rules import INFER
from mf_qwen3_bridge.transfer.copying import Transfer
from mf_qwen3_bridge.transfer.plan import Plan, Target, check_values
from mf_qwen3_bridge.transfer.progress import progress_bar
from mf_qwen3_bridge.transfer.safetensors import DTYPES, TensorInfo
from mf_qwen3_bridge.transfer.values import largest_magnitude

# Networks that the functions below have filled.
FILLED: WeakSet[Any] = WeakSet()

NUMPY_DTYPES = {ms.float32: DTYPES["F32"], ms.float16: DTYPES["F16"], ms.bfloat16: DTYPES["BF16"]}


def load_network(network: Any, model: CheckedCheckpoint, *, use_training_conversion: bool = False) -> Plan:
    """Fills an inference network, or this process's part of it, with all of a checkpoint's weights.

    In a pipeline, as vLLM-MindSpore can ask for, that is the part of this process's stage. When it raises, the network
    holds some of them at best: build another.

    Args:
        network: an ``InferenceQwen3ForCausalLM`` or ``InferenceQwen3MoeForCausalLM`` built from ``model``'s config.
        model: the checkpoint.
        use_training_conversion: convert with MindFormers' training class (``convert_weight_dict``) and load with
            ``load_param_into_net``, instead of the bridge's own loader. Both give the same bits.

    Returns:
        The plan that was carried out, or that the delegated conversion was checked against.

    Raises:
        BridgeError: the network's parameters are not the model's; anything was left unloaded.
    """
    plan = model.plan(INFER, rank=rank_of(network))
    plan = replace(plan, targets=tuple(target for target in plan.targets if is_in_stage(network, target.name)))
    parameters = network.parameters_dict()
    if use_training_conversion:
        check_parameters(parameters, plan)
        plan.check_duplicates(plan.rank)
        if not model.dialect.is_hf:
            raise BridgeError(
                f"--use_training_conversion converts Hugging Face weights; {model.source.path} holds MindFormers' "
                "already: leave the flag out"
            )
        converted = conversion.convert_weight_dict(network, _hf_weights(model, plan, parameters))
        _check_loaded(*ms.load_param_into_net(network, converted))
        check_values({target.name: _magnitudes(parameters[target.name], target) for target in plan.targets}, plan)
    else:
        fill_parameters(parameters, plan)
    network.process_weights_after_loading(network.model)  # as upstream's load_weights ends
    FILLED.add(network)
    return plan


def _hf_weights(
    model: CheckedCheckpoint, plan: Plan, parameters: Mapping[str, ms.Parameter]
) -> dict[str, ms.Parameter]:
    """A checkpoint's weights under Hugging Face's names; what is computed in the dtype of the parameter it goes to."""
    if not any(tensor.computed for tensor in model.source.tensors.values()):
        return load_checkpoint(model.source.files)
    spelling = {dtype: name for name, dtype in DTYPES.items()}
    dtypes = {copy.source.name: NUMPY_DTYPES[parameters[t.name].dtype] for t in plan.targets for copy in t.copies}
    weights = {}
    with Transfer() as transfer:
        for target in model.plan(model.dialect).targets:
            if model.source.tensors[target.name].computed and target.name in dtypes:
                target = replace(target, dtype=spelling[dtypes[target.name]])
            weights[target.name] = conversion.to_parameter(target.name, target.make(transfer))
    return weights


def _magnitudes(parameter: ms.Parameter, target: Target) -> dict[TensorInfo, float]:
    """The largest magnitude of each source tensor of a parameter."""
    array = parameter.asnumpy()
    largest: dict[TensorInfo, float] = defaultdict(float)
    for copy in target.copies:
        largest[copy.source] = max(largest[copy.source], largest_magnitude(copy.target_view.of(array)))
    return largest


def fill_parameters(parameters: Mapping[str, ms.Parameter], plan: Plan) -> None:
    """Carries out a plan: each tensor's bytes are read once, in the network's layout and dtype, into the Parameters.

    ``parameters`` are all of a network's; those of a parallel training network are this rank's slices. Raises
    BridgeError if they and the plan are not of one model and one rank, or for values that no trained model has.
    """
    check_parameters(parameters, plan)
    plan.check_duplicates(plan.rank)
    magnitudes = {}
    with progress_bar("loading", plan.source_nbytes) as advance, Transfer(advance) as transfer:
        for target in plan.targets:
            parameter = parameters[target.name]
            array = np.empty(target.shape, NUMPY_DTYPES[parameter.dtype])
            magnitudes[target.name] = transfer.fill(array, target.copies)
            parameter.set_data(ms.Tensor.from_numpy(array), parameter.sliced)
    check_values(magnitudes, plan)


def check_parameters(parameters: Mapping[str, ms.Parameter], plan: Plan) -> None:
    """Checks that a network's parameters are those that the plan makes; BridgeError lists all that differ."""
    shapes = {target.name: target.shape for target in plan.targets}
    remedy = "the network was built from another config"
    wrong: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in {**parameters, **shapes}:
        if name not in shapes:
            wrong["in the network, not in the checkpoint", remedy].append(name)
        elif name not in parameters:
            wrong["in the checkpoint, not in the network", remedy].append(name)
        elif (shape := tuple(parameters[name].shape)) != shapes[name]:
            wrong[f"shape {shapes[name]} in the checkpoint, {shape} in the network", remedy].append(name)
        if name in parameters and (dtype := parameters[name].dtype) not in NUMPY_DTYPES:
            wrong[f"the network holds it as {dtype}", "use float32, float16 or bfloat16"].append(name)
    refuse("the checkpoint does not fit the network", folded_problems(wrong))


def _check_loaded(unloaded: Sequence[str], unused: Sequence[str]) -> None:
    """Raises for what the two lists name that ``load_param_into_net`` returns."""
    remedy = "the weights are not of this network; Hugging Face weights have to be converted first"
    names_of = {
        ("parameter of the network, not in the weights", remedy): unloaded,
        ("weight, not in the network", remedy): unused,
    }
    refuse("load_param_into_net did not load everything", folded_problems(names_of))


def _dequantised_parameters(source: Source) -> dict[str, ms.Parameter]:
    with Transfer() as transfer:
        arrays = {name: Target.of(tensor).make(transfer) for name, tensor in source.tensors.items()}
    return {name: conversion.to_parameter(name, array) for name, array in arrays.items()}


def load_checkpoint(
    ckpt_file_name: str | Path | Sequence[str | Path],
    net: Any = None,
    strict_load: bool = False,
    filter_prefix: Any = None,
    dec_key: bytes | None = None,
    dec_mode: str = "AES-GCM",
    specify_prefix: Any = None,
    choice_func: Any = None,
    crc_check: bool = False,
    remove_redundancy: bool = False,
    format: str = "safetensors",
) -> dict[str, ms.Parameter]:
    """``mindspore.load_checkpoint`` for a file, a list of files or a directory: always ``dict[str, Parameter]``.

    Mirrors ``mindspore.load_checkpoint`` (2.7 to 2.9), which reads each file. A Parameter's name is its key; bfloat16
    stays bfloat16. Quantised weights of Hugging Face are dequantised, where config.json says how.

    Args:
        ckpt_file_name: a file, several, or a directory, whose index is obeyed.
        format: ``safetensors``, or ``ckpt`` for MindSpore's own format (one file).
        net, strict_load: a network to load into, as upstream, but everything has to find its place.
        filter_prefix, dec_key, dec_mode, specify_prefix, choice_func, crc_check, remove_redundancy: as upstream.

    Raises:
        BridgeError: a file is missing or damaged, or a tensor is in two files.

    Example::

        import mf_qwen3_bridge

        parameters = mf_qwen3_bridge.load_checkpoint("demo/qwen3-demo")
        for name, parameter in parameters.items():
            print(name, parameter.shape, parameter.dtype)
    """
    source = None
    if format != "safetensors":
        files = [Path(str(ckpt_file_name))]
    elif isinstance(ckpt_file_name, str | Path):
        source = open_source(Path(ckpt_file_name))
    elif paths := [Path(file) for file in ckpt_file_name]:
        source = open_source(paths)
    else:
        raise BridgeError("load_checkpoint: the list of files is empty")
    options = (filter_prefix, dec_key, dec_mode, specify_prefix, choice_func, crc_check)
    parameters: dict[str, ms.Parameter] = {}
    if source and source.quantization:
        if filter_prefix or specify_prefix or choice_func or dec_key:
            raise BridgeError(f"{source.path} is quantised: it is loaded whole, without prefixes, choices and keys")
        parameters, files = _dequantised_parameters(source), []
    elif source:
        files = source.files
    for file in files:
        loaded = ms.load_checkpoint(str(file), None, strict_load, *options, remove_redundancy, format)
        parameters |= {name: conversion.to_parameter(name, value) for name, value in loaded.items()}
    if net is not None:
        _check_loaded(*ms.load_param_into_net(net, parameters, strict_load, remove_redundancy))
    return parameters
