"""Builds MindFormers' inference network from a config, without a YAML or run_mindformer.py, on Ascend or a CPU."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any, TypeAlias

import mindspore as ms
import numpy as np
from mindformers import build_context, get_context, set_context
from mindformers.core.context.build_context import Context
from mindformers.models.qwen3.configuration_qwen3 import Qwen3Config
from mindformers.models.qwen3.modeling_qwen3_infer import InferenceQwen3ForCausalLM
from mindformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from mindformers.models.qwen3_moe.modeling_qwen3_moe_infer import InferenceQwen3MoeForCausalLM
from mindformers.parallel_core.inference import parallel_state
from mindformers.parallel_core.inference.utils import get_num_layers_and_offset
from mindspore.communication import get_rank

from mf_qwen3_bridge.errors import BridgeError
from mf_qwen3_bridge.mindformers.cpu import device
from mf_qwen3_bridge.model.parallel import SINGLE, ParallelConfig, Rank
from mf_qwen3_bridge.model.parameters import EMBEDDING, OUTPUT, layer_of


class _GenerateMixin:
    """Sets what upstream reads of the environment while ``generate`` runs, and only then."""

    config: Any
    draws: Callable[[], AbstractContextManager[None]] = nullcontext  # the random numbers to sample with: numpy's global

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        check_token_ids(args[0] if args else kwargs.get("input_ids"), self.config.vocab_size)
        with device.inference_device(), self.draws():
            return super().generate(*args, **kwargs)  # type: ignore[misc]


@cache
def _with_generate(network_class: type) -> type:
    """Upstream's class, by its own name, with that ``generate``."""
    return type(network_class.__name__, (_GenerateMixin, network_class), {"__doc__": network_class.__doc__})


InferenceNetwork: TypeAlias = InferenceQwen3ForCausalLM | InferenceQwen3MoeForCausalLM

# By model_type, as config.json calls it: upstream's config and inference network.
CLASSES: dict[str, tuple[type, type]] = {
    "qwen3": (Qwen3Config, InferenceQwen3ForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, InferenceQwen3MoeForCausalLM),
}
INFERENCE_NETWORKS: tuple[Any, ...] = tuple(network_class for _, network_class in CLASSES.values())
# Ascend: as in upstream's predict_qwen3.yaml and predict_qwen3_moe.yaml.
# A CPU is faster in float32, and has no bfloat16 arithmetic of its own.
_DTYPE = {"Ascend": "bfloat16", "CPU": "float32"}
_FLOAT32_DTYPES = {"layernorm_compute_dtype": "float32", "softmax_compute_dtype": "float32"}
_CONTEXT = {
    "Ascend": {"mode": ms.GRAPH_MODE, "ascend_config": {"precision_mode": "must_keep_origin_dtype"}},
    "CPU": {"mode": ms.PYNATIVE_MODE},
}


def build_inference_network(
    model_config: Mapping[str, Any], *, device_target: str = "auto", parallel: ParallelConfig = SINGLE
) -> InferenceNetwork:
    """Builds the network that MindFormers runs for ``run_mode: predict``; its parameters are zeros (norms: ones).

    Upstream's ``network.generate`` wants prompts of one length, padded on the right with ``pad_token_id``, which no
    prompt may end with (-1 will do), and ``eos_token_id`` as a list.

    Args:
        model_config: a normalised config.json, and anything else that may stand in a YAML's ``model.model_config``:
            ``params_dtype``, ``compute_dtype``, ``seq_length`` (prompt and answer, 4096 by default), ``block_size`` and
            ``num_blocks`` (of the KV cache: together they must hold all tokens of a batch)...
        device_target: ``Ascend``, ``CPU``, or ``auto``: Ascend when there is one.
        parallel: the sizes of a run of several processes that msrun started; each calls this.

    Raises:
        BridgeError: there is no such device, or this process already computes on another one, or in another place of
            another run.
    """
    target = _device_target(device_target)
    if target == "CPU" and 1 < parallel.expert_parallel < parallel.world_size:
        raise BridgeError(
            f"expert parallel {parallel.expert_parallel} of {parallel.world_size} processes needs several groups of "
            "processes, and CPUs know one: use 1 or all"
        )
    dtypes = dict.fromkeys(("params_dtype", "compute_dtype", "rotary_dtype"), _DTYPE[target])
    merged = _FLOAT32_DTYPES | dtypes | dict(model_config)
    config_class, network_class = CLASSES[merged["model_type"]]
    with device.predict_environment(target), _predict_context(target, parallel):
        device.prepare_device()
        config = config_class(**copy.deepcopy(merged))  # upstream writes into rope_scaling
        network = _with_generate(network_class)(config)
    if parallel.world_size > 1:
        if rank_of(network) != parallel.rank(get_rank()):
            raise BridgeError(f"this process runs as {rank_of(network)} already, not in {parallel}: start a new one")
        share_random_draws(network)
    return network


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


def is_in_stage(network: Any, name: str) -> bool:
    """Whether a parameter of the model is one of this process's stage of a pipeline; True where there is none.

    Mirrors ``GPTModel`` and ``TransformerBlock`` of ``mindformers/parallel_core/inference`` (1.7 to 2.1): a layer has
    its number in the whole model, the first stage has the embedding, the last one the output layer, and each of them a
    final norm, although only the last one computes with it.
    """
    last = parallel_state.get_pipeline_model_parallel_world_size() - 1
    if last == 0:
        return True
    stage = parallel_state.get_pipeline_model_parallel_rank()
    if (layer := layer_of(name)) is None:
        return {EMBEDDING[1]: stage == 0, OUTPUT[1]: stage == last}.get(name, True)
    num_layers, first = get_num_layers_and_offset(network.model.config)
    return first <= layer < first + num_layers


@device.inference_device()
def network_logits(network: InferenceNetwork, token_ids: Sequence[int]) -> np.ndarray:
    """Computes the logits of all positions of one sequence, float32 (len(token_ids), vocab_size), in one prefill.

    Upstream's own forward gathers the last position's before the output layer. PyNative mode only: a compiled graph
    would not notice ``return_hidden_states``.
    """
    model = network.model
    num_tokens, block_size = len(token_ids), network.config.block_size
    network._set_kv_cache()
    network._set_lower_triangle_mask()
    inputs, _ = network.prepare_inputs_for_generation_mcore(
        input_ids=np.asarray(token_ids),
        valid_length_each_example=np.array([num_tokens]),
        block_tables=np.arange(-(-num_tokens // block_size), dtype=np.int32)[None],
        slot_mapping=np.arange(num_tokens, dtype=np.int32),
        prefill=True,
    )
    model.return_hidden_states = True
    try:
        hidden_states = network(**inputs)
    finally:
        model.return_hidden_states = False
    return model.output_layer(hidden_states).astype(ms.float32).asnumpy()


def _device_target(requested: str) -> str:
    """Resolves ``auto``: what MindSpore chose when it was imported, or what the user set since."""
    if requested not in ("auto", "Ascend", "CPU"):
        raise BridgeError(f"device_target {requested!r}: auto, Ascend or CPU")
    chosen = "Ascend" if ms.get_context("device_target") == "Ascend" else "CPU"
    if requested == "Ascend" != chosen:
        raise BridgeError(
            "MindSpore found no Ascend NPU (see mf-qwen3 doctor), or this process computes on the CPU already"
        )
    return chosen if requested == "auto" else requested


def check_token_ids(input_ids: Any, vocab_size: int) -> None:
    """Refuses token ids that a model has no embedding for; upstream fails in an operator, which names no token.

    ``input_ids`` is one list or array of token ids, or several. What is none of these is left to upstream.
    """
    try:
        array = np.asarray(input_ids)
    except ValueError:  # lists of several lengths, which upstream refuses
        return
    if array.size and array.dtype.kind in "iu" and (largest := int(array.max())) >= vocab_size:
        raise BridgeError(
            f"the tokenizer gives token {largest}, but the model knows {vocab_size}: it is another model's tokenizer; "
            "see --tokenizer_path"
        )


def share_random_draws(network: InferenceNetwork) -> None:
    """Makes ``network.generate`` draw the same random numbers in every process of a run.

    Upstream samples with numpy's global generator; processes that draw different tokens share one model no more. The
    network gets a sequence of its own, and the global generator is given back after each call.
    """
    states = [np.random.RandomState(0).get_state()]

    @contextmanager
    def own_draws() -> Iterator[None]:
        of_process = np.random.get_state()
        np.random.set_state(states[0])
        try:
            yield
        finally:
            states[0] = np.random.get_state()
            np.random.set_state(of_process)

    network.draws = own_draws


@contextmanager
def _predict_context(target: str, parallel: ParallelConfig) -> Iterator[None]:
    """Sets MindFormers' context, MindSpore's mode and device for inference while a network is built.

    An older context has its ``run_mode`` afterwards. One that is built here stays: MindFormers knows one for each
    process, and its networks go on reading it.
    """
    run_mode = "predict"
    if Context.is_exists():
        run_mode = get_context("run_mode")
        set_context(run_mode="predict", use_legacy=False)
    else:
        context = {"device_target": target, **copy.deepcopy(_CONTEXT[target])}
        settings: dict[str, Any] = {"run_mode": run_mode, "use_legacy": False, "context": context, "parallel": {}}
        if parallel.world_size > 1:  # each process computes with its slices, no graph is divided
            settings |= {
                "use_parallel": True,
                "parallel": {"parallel_mode": "MANUAL_PARALLEL", "enable_alltoall": False, "full_batch": False},
                "parallel_config": {
                    "data_parallel": parallel.data_parallel,
                    "model_parallel": parallel.tensor_parallel,
                    "expert_parallel": parallel.expert_parallel,
                    "pipeline_stage": 1,
                },
            }
        build_context(settings)
    if target == "CPU":
        ms.set_context(mode=ms.PYNATIVE_MODE)
    if ms.get_context("device_target") != target:
        raise BridgeError(
            f"this process computes on {ms.get_context('device_target')}, not on {target}: start another one"
        )
    try:
        yield
    finally:
        if run_mode is not None:
            set_context(run_mode=run_mode)
