"""Moves weights between networks in memory, piece by piece, under Hugging Face's names."""

import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore.communication import get_rank

from mf_qwen3_bridge.errors import BridgeError, folded_problems, refuse
from mf_qwen3_bridge.mindformers.conversion import TrainingConversion, describe_arrays, read_spec
from mf_qwen3_bridge.mindformers.load import FILLED, NUMPY_DTYPES
from mf_qwen3_bridge.mindformers.network import INFERENCE_NETWORKS, rank_of
from mf_qwen3_bridge.model.layouts import INFERENCE, Layout
from mf_qwen3_bridge.model.parallel import WHOLE, Rank
from mf_qwen3_bridge.model.parameters import EMBEDDING, OUTPUT
from mf_qwen3_bridge.model.rules import HF, HF_STACKED, INFER, Dialect, Place, Rule, hf_dialect, model_rules, shares
from mf_qwen3_bridge.model.spec import ModelSpec
from mf_qwen3_bridge.transfer.copying import copy_elements
from mf_qwen3_bridge.transfer.plan import Plan, check_values, match_tensors
from mf_qwen3_bridge.transfer.safetensors import DTYPES, TensorInfo
from mf_qwen3_bridge.transfer.values import largest_magnitude

_DIVIDED = "each process has to hold whole heads, and rows or columns of a matrix: no optimizer shards"


def weights(network: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Iterates over a network's weights under Hugging Face's names, without files in between.

    One parameter is in memory twice at a time. Of a network that is spread over several processes each gets its own
    slices: of a matrix the rows, or the columns, that it holds, and of the experts its own.

    Args:
        network: MindFormers' training or inference network of a Qwen3 or Qwen3-MoE; a training network of several
            processes is compiled, and divided by tensor and expert parallel alone.

    Yields:
        (name, array) of each tensor, in the dtype of the parameter that holds it, experts one by one.

    Raises:
        BridgeError: the network holds other parameters than such a model's, or divides them in another way.

    Example::

        import mf_qwen3_bridge

        network = mf_qwen3_bridge.from_pretrained("demo/qwen3-demo")
        for name, array in mf_qwen3_bridge.weights(network):
            print(name, array.shape, array.dtype)
    """
    spec, dialect, rank = _description(network)
    rules = tuple(model_rules(spec))
    parameters = _parameters(network, rules, dialect, rank)
    for rule in rules:
        held = to_numpy(parameters[rule.parameter])
        parts: dict[str, list[tuple[Place, Place]]] = defaultdict(list)
        for here, there in shares(rule, rank, HF, dialect):
            parts[here.tensor].append((here, there))
        for name, pairs in parts.items():
            array = np.empty(_slice_shape(pairs), held.dtype)
            for here, there in pairs:
                is_whole = array.shape == here.shape
                place = here.view.of(array) if is_whole else array.reshape(there.view.shape)
                copy_elements(there.view.of(held), place)
            yield name, array


def load(network: Any, weights: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> None:
    """Fills a network with weights that are in memory, one after the other; everything is loaded, or an error says why.

    When it raises, the network holds some of them at best.

    Args:
        network: MindFormers' training or inference network of a Qwen3 or Qwen3-MoE, as for :func:`weights`.
        weights: (name, array) of each tensor, in any order, under Hugging Face's names or what upstream's
            ``convert_name`` makes of them; whole, of which each process takes its part, or the slices that this process
            holds. Arrays of numpy, MindSpore or torch, or slices of an open safetensors file; experts one by one or
            stacked.

    Raises:
        BridgeError: tensors are missing, left over, of a wrong shape, all zero, or hold NaN or infinity. Lists all.

    Example::

        import mf_qwen3_bridge

        trained = mf_qwen3_bridge.from_pretrained("demo/qwen3-demo")
        network = mf_qwen3_bridge.from_pretrained("demo/qwen3-demo")
        mf_qwen3_bridge.load(network, mf_qwen3_bridge.weights(trained))
        print(mf_qwen3_bridge.verify_network(network, "demo/qwen3-demo").summary)
    """
    filling = _Filling(network)
    for name, value in weights.items() if isinstance(weights, Mapping) else weights:
        filling.add(name, to_numpy(value))
    filling.finish()
    if isinstance(network, INFERENCE_NETWORKS):
        network.process_weights_after_loading(network.model)  # as upstream's load_weights ends
        FILLED.add(network)


class _Filling:
    """A network that is being filled: a parameter is made anew when its first part comes, and set when it is whole."""

    def __init__(self, network: Any) -> None:
        spec, dialect, rank = _description(network)
        self._rules = tuple(model_rules(spec))
        self._parameters = _parameters(network, self._rules, dialect, rank)
        self._missing = {name: parameter.size for name, parameter in self._parameters.items()}
        self._arrays: dict[str, np.ndarray] = {}
        pairs = (pair for rule in self._rules for hf in (HF, HF_STACKED) for pair in shares(rule, rank, hf, dialect))
        self._pairs: dict[str, list[tuple[Place, Place]]] = defaultdict(list)
        for here, there in dict.fromkeys(pairs):  # but for experts, both spellings are the same
            self._pairs[here.tensor].append((here, there))
        conversion = TrainingConversion(spec, INFERENCE)
        self._hf_name = {conversion.convert_name(name): name for name in self._pairs}
        self._seen: dict[str, TensorInfo] = {}
        self._magnitudes: dict[str, dict[TensorInfo, float]] = {}
        self._output: np.ndarray | None = None

    def add(self, name: str, array: np.ndarray) -> None:
        """Puts a tensor, or this process's slice of it, in place."""
        name = self._hf_name.get(name, name)
        if name in self._seen:
            raise BridgeError(f"{name} is given twice")
        pairs = self._pairs.get(name, [])
        is_slice = bool(pairs) and array.shape != pairs[0][0].shape and array.shape == _slice_shape(pairs)
        (self._seen[name],) = describe_arrays({name: array}).values()
        if is_slice:
            self._seen[name] = replace(self._seen[name], shape=pairs[0][0].shape)
        magnitude = largest_magnitude(array)
        if magnitude or not is_slice:  # rows of tokens that are not used may be a slice
            self._magnitudes[name] = {self._seen[name]: magnitude}
        if name == OUTPUT[0] and not pairs:
            self._output = array
        if is_slice or (pairs and array.shape == pairs[0][0].shape):
            for here, there in pairs:
                self._put(array if is_slice else here.view.of(np.ascontiguousarray(array)), there)

    def _put(self, elements: np.ndarray, there: Place) -> None:
        parameter = self._parameters[there.tensor]
        if there.tensor not in self._arrays:
            self._arrays[there.tensor] = np.empty(parameter.shape, NUMPY_DTYPES[parameter.dtype])
        copy_elements(
            elements.reshape(there.view.shape), there.view.of(self._arrays[there.tensor].reshape(there.shape))
        )
        self._missing[there.tensor] -= there.view.size
        if self._missing[there.tensor] <= 0:
            parameter.set_data(ms.Tensor.from_numpy(self._arrays.pop(there.tensor)), parameter.sliced)

    def finish(self) -> None:
        """Refuses what is missing or wrong."""
        dialect = hf_dialect(self._seen)
        others = (place for rule in self._rules for place in rule.places(dialect) if place.tensor not in self._pairs)
        elsewhere = {place.tensor: TensorInfo(place.tensor, place.shape, "F32", Path(), 0, 0) for place in others}
        match = match_tensors(self._rules, elsewhere | self._seen, dialect)  # other processes hold other experts
        refuse("the weights do not fit the network", match.problems)
        embedding, output = self._parameters[EMBEDDING[1]], self._output
        if output is not None:
            held = to_numpy(embedding)
            Plan(HF, (), match.duplicates).check_duplicates(
                are_equal=lambda kept, dropped: np.array_equal(output.astype(held.dtype).reshape(held.shape), held)
            )
        check_values(self._magnitudes)


def _description(network: Any) -> tuple[ModelSpec, Dialect, Rank]:
    """A network's numbers, its layout, and this process's part of it."""
    spec = read_spec(network, None)
    if isinstance(network, INFERENCE_NETWORKS):
        return spec, INFER, rank_of(network)
    config = network.get_gpt_transformer_config()
    layout = Layout.of_training(vars(config))
    dialect = Dialect(layout.of_experts if spec.is_moe else layout)
    if ms.get_auto_parallel_context("parallel_mode") not in ("semi_auto_parallel", "auto_parallel"):
        return spec, dialect, WHOLE
    if ms.get_auto_parallel_context("pipeline_stages") > 1:
        raise BridgeError("this process holds one of several pipeline stages: export the run's files instead")
    tensor, expert = config.tensor_model_parallel_size, config.expert_model_parallel_size
    number = get_rank()
    rank = Rank(tensor, number % tensor, expert, number % expert, uses_all_to_all=True)  # the router is in order
    return spec, dialect, rank


def _parameters(network: Any, rules: Iterable[Rule], dialect: Dialect, rank: Rank) -> dict[str, ms.Parameter]:
    """The parameters that hold a network's weights; BridgeError if they are not what the rules say of this process."""
    found = network.parameters_dict()
    parameters = {}
    wrong: dict[tuple[str, str], list[str]] = defaultdict(list)
    for rule in rules:
        name, shape = rule.parameter, rule.shard(rank)[0].places(dialect)[0].shape
        held = tuple(found[name].shape) if name in found else None
        if held != shape:
            wrong[f"{'none' if held is None else f'shape {held}'}, {shape} expected", _DIVIDED].append(name)
        else:
            parameters[name] = found[name]
    refuse("the network is divided otherwise than by tensor and expert parallel", folded_problems(wrong))
    return parameters


def _slice_shape(pairs: Sequence[tuple[Place, Place]]) -> tuple[int, ...]:
    """Shape of what a process holds of a tensor, of which these are the parts."""
    whole, size = pairs[0][0].shape, sum(here.view.size for here, _ in pairs)
    if size == prod(whole):
        return whole
    columns = pairs[0][0].view.shape[-1:] if len(whole) > 1 else ()
    return (size // prod(columns), *columns)


def to_numpy(value: Any) -> np.ndarray:
    """The array in a Tensor of MindSpore or torch, a slice of a safetensors file, or what numpy makes an array of."""
    value = value[:] if hasattr(value, "get_shape") else value
    if isinstance(value, ms.Tensor):
        array = value.asnumpy()
        return array.view(DTYPES["BF16"]) if value.dtype == ms.bfloat16 else array  # MindSpore's own NumPy dtype
    if type(value).__module__.partition(".")[0] == "torch":
        torch = sys.modules["torch"]
        value = value.detach().cpu().contiguous()
        return value.view(torch.int16).numpy().view(DTYPES["BF16"]) if value.dtype == torch.bfloat16 else value.numpy()
    return np.asarray(value)
