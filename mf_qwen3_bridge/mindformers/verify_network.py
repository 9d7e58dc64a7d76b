"""What MindFormers' inference network computes, stage by stage, held against the reference."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np

from mf_qwen3_bridge.errors import BridgeError, Problem, fold_names
from mf_qwen3_bridge.inputs.preflight import Model
from mf_qwen3_bridge.mindformers.infer import build_network
from mf_qwen3_bridge.mindformers.load import load_network
from mf_qwen3_bridge.mindformers.network import InferenceNetwork, network_logits
from mf_qwen3_bridge.mindformers.patching.hooks import model_of
from mf_qwen3_bridge.mindformers.quiet import upstream_kept_quiet
from mf_qwen3_bridge.mindformers.ranks import rank_of
from mf_qwen3_bridge.model import training_ranks
from mf_qwen3_bridge.model.layouts import TRAINING_DEFAULT, Layout
from mf_qwen3_bridge.model.parallel import SINGLE, WHOLE
from mf_qwen3_bridge.model.rules import INFER, Dialect
from mf_qwen3_bridge.transfer.safetensors import DTYPES
from mf_qwen3_bridge.verify import reference
from mf_qwen3_bridge.verify.layer_errors import NUM_TOKENS, LayerErrors, layer_errors, tokens_for
from mf_qwen3_bridge.verify.reference import EMBEDDED, LOGITS, Stage

_LOAD = "load it with mf_qwen3_bridge.from_pretrained, or convert with network.convert_weight_dict of a patched class"


def verify_network(network: InferenceNetwork, model_dir: str | Path) -> LayerErrors:
    """Holds a network, however it was filled, against a reference of its own checkpoint, layer by layer.

    For whoever loads weights by other means than this package: it says where the network begins to compute something
    else, and what the parameters there look like.

    Args:
        network: an ``InferenceQwen3ForCausalLM`` or ``InferenceQwen3MoeForCausalLM`` of one process, in PyNative mode.
        model_dir: the Hugging Face directory that it should compute.

    Returns:
        The error of each stage of each layer, and of the logits.

    Raises:
        BridgeError: they differ, and where; network and directory are not of one model, by what the network was built
            from.
    """
    model = model_of(network, Path(model_dir))  # RoPE too, of which few tokens show little
    problems = list(misplaced(network, model))
    found = errors_of(network, model)
    if found.begin or problems:
        raise BridgeError(f"the network does not compute {model_dir}: {found.summary}", problems)
    return found


def errors_of_checkpoint(model: Model, right: Model) -> LayerErrors:
    """Loads a checkpoint into MindFormers' inference network, on the CPU, in float32, and holds it against a reference.

    Args:
        model: the checkpoint, with a config.json.
        right: what the reference computes: the same model, or another checkpoint of it.

    Raises:
        BridgeError: the checkpoint can't be loaded; what was loaded is not what it holds.
    """
    cache = {"block_size": NUM_TOKENS, "num_blocks": 2, "seq_length": 4 * NUM_TOKENS}
    with upstream_kept_quiet():
        network = build_network(replace(model, options=cache, parallel=SINGLE), "CPU")
    load_network(network, model)
    return errors_of(network, right)


def errors_of(network: InferenceNetwork, model: Model) -> LayerErrors:
    """How far a network is from the reference of a model of as many layers.

    Raises:
        BridgeError: the network is one of several ranks', or is compiled.
    """
    if rank_of(network) != WHOLE or ms.get_context("mode") != ms.PYNATIVE_MODE:
        raise BridgeError(
            "only the network of a single process, in PyNative mode, can be looked into: build it with "
            "device_target CPU, or in a process with ENFORCE_EAGER=true"
        )
    config = network.config
    token_ids = tokens_for(model, config.num_blocks * config.block_size)
    dtypes = {str(parameter.dtype).lower() for parameter in network.get_parameters()}
    dtypes |= {str(config.compute_dtype).lower()}
    coarsest = next((dtype for dtype in ("bfloat16", "float16") if dtype in dtypes), "float32")
    return layer_errors(_record(network, token_ids), model, token_ids, coarsest)


def _record(network: InferenceNetwork, token_ids: Sequence[int]) -> dict[Stage, np.ndarray]:
    """What each stage makes of one sequence, float32 (len(token_ids), width)."""
    found: dict[Stage, np.ndarray] = {}
    hooks = []

    def listen(cell: Any, read: Callable[[Any, Any, Any], np.ndarray], *stage: Any) -> None:
        def hook(cell: Any, inputs: Any, output: Any) -> None:
            found[Stage(*stage)] = read(cell, inputs, output)

        hooks.append(cell.register_forward_hook(hook))

    def made(_: Any, inputs: Any, output: ms.Tensor) -> np.ndarray:
        return _array(output)

    def began(_: Any, inputs: Any, output: ms.Tensor) -> np.ndarray:
        return _array(inputs[0])

    listen(network.model.decoder.layers[0].input_layernorm, began, *vars(EMBEDDED).values())
    for number, layer in enumerate(network.model.decoder.layers):
        attention, mlp = layer.self_attention, layer.mlp
        listen(attention.linear_qkv, made, number, reference.QKV)
        listen(attention.linear_proj, began, number, reference.ATTENTION)
        # Two hooks of one cell are called one after the other.
        listen(attention.linear_proj, made, number, reference.PROJ)
        if hasattr(mlp, "router"):
            listen(mlp.router, _shares, number, reference.ROUTER)
        else:
            listen(mlp.linear_fc1, made, number, reference.FC1)
        listen(mlp, made, number, reference.MLP)
        listen(layer, made, number, reference.LAYER)
    try:
        found[LOGITS] = network_logits(network, token_ids)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _array(tensor: ms.Tensor) -> np.ndarray:
    array: np.ndarray = tensor.astype(ms.float32).asnumpy()
    return array.reshape(-1, array.shape[-1])


def _shares(router: Any, _: Any, output: tuple[ms.Tensor, ms.Tensor]) -> np.ndarray:
    """What each expert counts for each token, of what a router makes: shares of the chosen experts, their numbers."""
    chosen, experts = _array(output[0]), output[1].asnumpy()
    shares = np.zeros((len(chosen), router.num_experts), np.float32)
    np.put_along_axis(shares, experts, chosen, axis=-1)
    return shares


def misplaced(network: InferenceNetwork, model: Model) -> Iterator[Problem]:
    """The parameters of a network that do not hold what they should, and what they look like, folded."""
    parameters = network.parameters_dict()
    others = {name: {t.name: t for t in model.plan(dialect, "F32").targets} for name, dialect in _other_layouts(model)}
    alike: dict[tuple[str, str], list[str]] = defaultdict(list)
    for target in model.plan(INFER, "F32").targets:
        there = parameters[target.name].float().asnumpy()
        if not _holds(parameters[target.name], target.make()):
            look = (name for name in others if _holds(parameters[target.name], others[name][target.name].make()))
            appearance = "all zero: never loaded" if not there.any() else next(look, "other values")
            alike[appearance, _LOAD].append(target.name)
    for (appearance, remedy), names in alike.items():
        for name in fold_names(names):
            yield Problem(name, appearance, remedy)


def _other_layouts(model: Model) -> Iterator[tuple[str, Dialect]]:
    """How parameters may lie that somebody has converted for another reader."""
    for layout in training_ranks.layouts(model.spec):
        if layout == TRAINING_DEFAULT:
            yield "in the training layout: interleaved", _inference(layout)
        elif layout.tensor_parallel > 1 and not (layout.interleaved_qkv or layout.interleaved_gate_up):
            yield f"in the blocks of {layout.tensor_parallel} tensor parallel ranks", _inference(layout)


def _inference(layout: Layout) -> Dialect:
    return Dialect(layout, stacked_experts=True)


def _holds(parameter: ms.Parameter, values: np.ndarray) -> bool:
    """Whether a parameter is what casting ``values`` to its dtype makes."""
    dtype = {ms.float32: DTYPES["F32"], ms.float16: DTYPES["F16"], ms.bfloat16: DTYPES["BF16"]}[parameter.dtype]
    with np.errstate(over="ignore"):
        expected = values.astype(dtype).astype(np.float32)
    return np.array_equal(parameter.float().asnumpy(), expected)
