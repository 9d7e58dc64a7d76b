"""Converts weights with the methods of MindFormers' own training class, in the layout that the consumer reads.

``TrainingQwen3ForCausalLM`` and ``TrainingQwen3MoeForCausalLM`` know how to rename and fuse Hugging Face weights, but
only as methods of a built training network, in that network's layout. Here these methods run on an object that is no
network, with the numbers and the layout flags that the *consumer* needs.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mindspore as ms
import numpy as np
from mindformers.models.qwen3.modeling_qwen3_train import TrainingQwen3ForCausalLM
from mindformers.models.qwen3_moe.modeling_qwen3_moe_train import TrainingQwen3MoeForCausalLM
from mindformers.parallel_core.utils.model_mixin import TrainModelMixin

from mf_qwen3_bridge.errors import BridgeError, folded_problems, refuse
from mf_qwen3_bridge.mindformers.network import is_in_stage, rank_of
from mf_qwen3_bridge.model.layouts import INFERENCE, TRAINING_DEFAULT, Layout, View
from mf_qwen3_bridge.model.parallel import WHOLE, Rank
from mf_qwen3_bridge.model.rules import HF_STACKED, INFER, hf_dialect, model_rules, shares
from mf_qwen3_bridge.model.spec import ModelSpec
from mf_qwen3_bridge.transfer.copying import copy_elements
from mf_qwen3_bridge.transfer.plan import make_plan
from mf_qwen3_bridge.transfer.safetensors import DTYPES, TensorInfo

# For a tensor that another process should deliver; as in MindFormers 2.0.
_PATIENCE_SECONDS = 600


class TrainingConversion(TrainModelMixin):
    """The conversion methods of a training class for a model's numbers and a layout, without a network around them."""

    def __init__(self, spec: ModelSpec, layout: Layout) -> None:
        self.training_class = TrainingQwen3MoeForCausalLM if spec.is_moe else TrainingQwen3ForCausalLM
        numbers = vars(spec) | {"kv_channels": spec.head_dim, "num_moe_experts": spec.num_experts}
        self.transformer_config = SimpleNamespace(**numbers, **layout.training_flags)

    def convert_weight_dict(self, source_dict: Mapping[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Upstream's."""
        return self.training_class.convert_weight_dict(self, source_dict, **kwargs)

    def get_gpt_transformer_config(self) -> SimpleNamespace:
        """Returns what upstream's methods ask for their numbers and flags."""
        return self.transformer_config

    def convert_name(self, weight_name: str) -> str:
        """Upstream's ``ModelMixin.convert_name``, which refuses to work before a MindFormers context is set."""
        for hf_name, mindformers_name in self.training_class.weight_mapping:
            weight_name = weight_name.replace(hf_name, mindformers_name)
        return weight_name


def convert_weight_dict(
    owner: Any, source_dict: Mapping[str, Any], *, model_config: Any = None, qkv_dict: Any = None, condition: Any = None
) -> dict[str, Any]:
    """Converts Hugging Face weights to MindFormers' names, fused for whoever reads them.

    Mirrors and delegates to ``convert_weight_dict`` of ``mindformers/models/qwen3/modeling_qwen3_train.py`` and
    ``.../qwen3_moe/modeling_qwen3_moe_train.py`` (1.7 to 2.1). MindFormers calls it in two ways:

    - with all weights, and gives the result to ``load_param_into_net``: the result is in the inference layout, as
      ``Parameter``; on a network that is spread over several processes, it is this process's part;
    - in one process per file, with ``qkv_dict`` and ``condition`` to pass tensors between them, writes the result to
      files and gives those to ``load_weights``, which reads the training network's default layout: the result is in
      that layout, as numpy arrays.

    Args:
        owner: the inference network, or its class.
        source_dict: Hugging Face name -> Parameter, Tensor or numpy array.
        model_config: the model's numbers, needed when called on the class: a MindFormers config or a mapping.
        qkv_dict: upstream's dictionary that the processes share.
        condition: upstream's lock for it.

    Raises:
        BridgeError: tensors are missing, left over or of a wrong shape (all are listed), or there is no config.
        TimeoutError: another process never delivered a tensor.
    """
    spec = read_spec(owner, model_config)
    arrays = {name: _to_numpy(value) for name, value in source_dict.items()}
    if condition is not None:
        logic, arrays = TrainingConversion(spec, TRAINING_DEFAULT), _unstack_experts(spec, arrays)
        return logic.convert_weight_dict(arrays, qkv_dict=qkv_dict, condition=_ConditionWithTimeout(condition))
    converted = TrainingConversion(spec, INFERENCE).convert_weight_dict(_check_arrays(spec, arrays))
    is_network = not isinstance(owner, type)
    values = _slice_for_rank(spec, converted, rank_of(owner) if is_network else WHOLE)
    names = (name for name in values if not is_network or is_in_stage(owner, name))
    return {name: to_parameter(name, values[name]) for name in names}


def convert_map_dict(
    owner: Any, source_dict: Mapping[str, str], *, model_config: Any = None, qkv_concat: bool = True
) -> dict[str, str]:
    """Converts {Hugging Face name: file} to {MindFormers name: file}; a fused parameter has its first part's file.

    Mirrors and delegates to ``convert_map_dict`` of ``mindformers/models/qwen3/modeling_qwen3_train.py`` (1.7 to 2.1).

    Raises:
        BridgeError: the map lacks parts of a fused parameter.
    """
    spec = read_spec(owner, model_config)
    files = _unstack_experts(spec, source_dict, lambda file, view: file)
    missing = [name for rule in model_rules(spec) for name in rule.tensors if name not in files]
    problems = folded_problems({("not in the map", "use the index that came with the checkpoint"): missing})
    refuse("the name map is not of this model", problems)
    logic = TrainingConversion(spec, INFERENCE)
    return logic.training_class.convert_map_dict(logic, files)


def obtain_name_map(owner: Any, load_checkpoint_files: Iterable[str | Path]) -> dict[str, str]:
    """Refuses: a map of names can't express that three tensors make one parameter.

    MindFormers would pass the result to ``ms.load_distributed_checkpoint``, which skips without a word what the map
    does not name: QKV and gate/up would stay zero.

    Raises:
        BridgeError: always.
    """
    files = ", ".join(str(file) for file in load_checkpoint_files)
    raise BridgeError(
        f"QKV and gate/up of {files} have to be fused, which renaming can't do: set qkv_concat: True in "
        "model.model_config, or load with mf_qwen3_bridge.from_pretrained"
    )


def describe_arrays(arrays: Mapping[str, np.ndarray]) -> dict[str, TensorInfo]:
    """Describes arrays in memory as a file's header would."""
    spelling = {dtype.name: name for name, dtype in DTYPES.items()}
    return {
        name: TensorInfo(name, a.shape, spelling.get(a.dtype.name, str(a.dtype)), Path("memory"), 0, a.nbytes)
        for name, a in arrays.items()
    }


def to_parameter(name: str, value: np.ndarray | ms.Tensor) -> ms.Parameter:
    """A Parameter of that name: ``value`` itself if it is one."""
    if isinstance(value, ms.Parameter):
        value.name = name
        return value
    tensor = value if isinstance(value, ms.Tensor) else ms.Tensor.from_numpy(np.ascontiguousarray(value))
    return ms.Parameter(tensor, name=name, requires_grad=False)


def _to_numpy(value: Any) -> np.ndarray:
    return value.asnumpy() if isinstance(value, ms.Tensor) else np.asarray(value)


def read_spec(owner: Any, model_config: Any) -> ModelSpec:
    """The model's numbers: of a network, or of the config that was passed with a call on its class."""
    config = model_config if isinstance(owner, type) else owner.config
    if config is None:
        raise BridgeError(f"on the class {owner.__name__}, pass model_config=: the model's config, or a dictionary")
    try:
        return ModelSpec.from_model_config(config if isinstance(config, Mapping) else vars(config))
    except KeyError as missing:
        raise BridgeError(f"model_config has no {missing.args[0]}") from None


def _unstack_experts(
    spec: ModelSpec, values: Mapping[str, Any], part_of: Callable[[Any, View], Any] = lambda array, view: view.of(array)
) -> dict[str, Any]:
    """Gives stacked experts (transformers 5) the names of single ones, which are all that upstream knows."""
    result = dict(values)
    for rule in model_rules(spec):
        for name, place in zip(rule.tensors, rule.places(HF_STACKED)):
            if place.tensor != name and place.tensor in values:
                result.pop(place.tensor, None)
                result[name] = part_of(values[place.tensor], place.view)
    return result


def _slice_for_rank(spec: ModelSpec, converted: Mapping[str, Any], rank: Rank) -> dict[str, Any]:
    """Cuts a rank's part out of the parameters, in the shapes of the inference network."""
    result: dict[str, Any] = {}
    for rule in model_rules(spec):
        whole = np.ascontiguousarray(_to_numpy(converted[rule.parameter]))
        for here, there in shares(rule, rank, INFER, INFER):
            if rank == WHOLE:
                result[rule.parameter] = whole.reshape(there.shape)
                break
            share = result.setdefault(rule.parameter, np.empty(there.shape, whole.dtype))
            copy_elements(here.view.of(whole), there.view.of(share))
    return result


def _check_arrays(spec: ModelSpec, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Checks arrays in memory as files are checked, and returns those that make up the model.

    Parts of different dtypes are widened to the one that holds them all: numpy can't concatenate float16 and bfloat16.
    """
    if any(rule.parameter in arrays for rule in model_rules(spec)):
        raise BridgeError("these weights have MindFormers' names already: convert_weight_dict takes Hugging Face's")
    plan = make_plan(model_rules(spec), describe_arrays(arrays), hf_dialect(arrays), INFER)
    plan.check_duplicates(are_equal=lambda kept, dropped: arrays[kept.name].tobytes() == arrays[dropped.name].tobytes())
    used = {}
    for target in plan.targets:
        for copy in target.copies:
            array = arrays[copy.source.name]
            used[copy.source.name] = array if copy.source.dtype == target.dtype else array.astype(np.float32)
    return _unstack_experts(spec, used)


class _ConditionWithTimeout:
    """A ``multiprocessing.Condition`` whose ``wait_for`` always ends, if need be with a TimeoutError.

    It waits as long as the caller says; MindFormers 1.7 to 1.9 never do, and get ``_PATIENCE_SECONDS``.
    """

    def __init__(self, condition: Any) -> None:
        self._condition = condition
        self.notify_all = condition.notify_all

    def __enter__(self) -> Any:
        return self._condition.__enter__()

    def __exit__(self, *exception: Any) -> Any:
        return self._condition.__exit__(*exception)

    def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> Any:
        seconds = _PATIENCE_SECONDS if timeout is None else timeout
        result = self._condition.wait_for(predicate, timeout=seconds)
        if not result:
            raise TimeoutError(
                f"another process did not deliver a part of QKV or gate/up within {seconds} s: a file of the "
                "checkpoint is missing or damaged; run `mf-qwen3 check` on it"
            )
        return result
