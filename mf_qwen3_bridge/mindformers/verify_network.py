"""Compares what MindFormers' inference network computes, stage by stage, with the reference."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np

from mf_qwen3_bridge.errors import BridgeError, Problem, folded_problems
from mf_qwen3_bridge.inputs.layout_detection import describe, likeness_of_layouts, read_sampled_rows
from mf_qwen3_bridge.inputs.preflight import CheckedCheckpoint
from mf_qwen3_bridge.mindformers.infer import build_network
from mf_qwen3_bridge.mindformers.load import load_network
from mf_qwen3_bridge.mindformers.network import InferenceNetwork, network_logits, rank_of
from mf_qwen3_bridge.mindformers.patching.hooks import check_against_network
from mf_qwen3_bridge.mindformers.quiet import silence_upstream
from mf_qwen3_bridge.model.layouts import INFERENCE
from mf_qwen3_bridge.model.parallel import SINGLE, WHOLE
from mf_qwen3_bridge.model.rules import INFER, RowsRule, Rule
from mf_qwen3_bridge.transfer.copying import Transfer
from mf_qwen3_bridge.transfer.safetensors import DTYPES
from mf_qwen3_bridge.verify import reference
from mf_qwen3_bridge.verify.layer_errors import NUM_TOKENS, LayerErrors, layer_errors, tokens_for
from mf_qwen3_bridge.verify.reference import EMBEDDED, LOGITS, Stage

_LOAD = "load it with mf_qwen3_bridge.from_pretrained, or convert with network.convert_weight_dict of a patched class"


def verify_network(network: InferenceNetwork, model_dir: str | Path) -> LayerErrors:
    """Compares a network, however it was filled, with a reference of its checkpoint, layer by layer.

    For weights that were loaded by other means than this package: the error names the first stage that differs, and
    the layout that its parameters are in.

    Args:
        network: an ``InferenceQwen3ForCausalLM`` or ``InferenceQwen3MoeForCausalLM`` of one process, in PyNative mode.
        model_dir: the Hugging Face directory that it should compute.

    Returns:
        The error of each stage of each layer, and of the logits.

    Raises:
        BridgeError: they differ, and where; network and directory are not of one model, by what the network was built
            from.

    Example::

        import mf_qwen3_bridge

        network = mf_qwen3_bridge.from_pretrained("demo/qwen3-demo", device_target="CPU")
        errors = mf_qwen3_bridge.verify_network(network, "demo/qwen3-demo")
        print(errors.summary)
    """
    model = check_against_network(network, Path(model_dir))  # RoPE too, of which few tokens show little
    problems = list(wrong_parameters(network, model))
    found = measure_network(network, model)
    if found.begin or problems:
        raise BridgeError(f"the network does not compute {model_dir}: {found.summary}", problems)
    return found


def measure_checkpoint(model: CheckedCheckpoint, right: CheckedCheckpoint) -> LayerErrors:
    """Loads a checkpoint into MindFormers' inference network, on the CPU, in float32, and compares it with a reference.

    ``right`` is what the reference computes: the same model, or another checkpoint of it.
    """
    cache = {"block_size": NUM_TOKENS, "num_blocks": 2, "seq_length": 4 * NUM_TOKENS}
    with silence_upstream():
        network = build_network(replace(model, options=cache, parallel=SINGLE), "CPU")
    load_network(network, model)
    return measure_network(network, right)


def measure_network(network: InferenceNetwork, model: CheckedCheckpoint) -> LayerErrors:
    """Measures a network's errors; BridgeError if it is one of several ranks', or compiled."""
    if rank_of(network) != WHOLE or ms.get_context("mode") != ms.PYNATIVE_MODE:
        raise BridgeError(
            "only the network of a single process, in PyNative mode, can be verified: build it with "
            "device_target CPU, or in a process with ENFORCE_EAGER=true"
        )
    config = network.config
    token_ids = tokens_for(model, config.num_blocks * config.block_size)
    dtypes = {str(parameter.dtype).lower() for parameter in network.get_parameters()}
    dtypes |= {str(config.compute_dtype).lower()}
    coarsest = next((dtype for dtype in ("bfloat16", "float16") if dtype in dtypes), "float32")
    return layer_errors(_record_stages(network, token_ids), model, token_ids, coarsest)


def _record_stages(network: InferenceNetwork, token_ids: Sequence[int]) -> dict[Stage, np.ndarray]:
    """The output of each stage for one sequence, float32 (len(token_ids), width)."""
    found: dict[Stage, np.ndarray] = {}
    with ExitStack() as hooks:

        def listen(cell: Any, stage: Stage, to_input: bool = False) -> None:
            def hook(cell: Any, inputs: Any, output: Any) -> None:
                if stage.name == reference.ROUTER:
                    found[stage] = _routing_weights(cell, *output)
                else:
                    found[stage] = _array(inputs[0] if to_input else output)

            hooks.callback(cell.register_forward_hook(hook).remove)

        listen(network.model.decoder.layers[0].input_layernorm, EMBEDDED, to_input=True)
        for number, layer in enumerate(network.model.decoder.layers):
            attention, mlp = layer.self_attention, layer.mlp
            listen(attention.linear_qkv, Stage(number, reference.QKV))
            listen(attention.linear_proj, Stage(number, reference.ATTENTION), to_input=True)
            listen(attention.linear_proj, Stage(number, reference.PROJ))  # two hooks of one cell are called in turn
            if hasattr(mlp, "router"):
                listen(mlp.router, Stage(number, reference.ROUTER))
            else:
                listen(mlp.linear_fc1, Stage(number, reference.FC1))
            listen(mlp, Stage(number, reference.MLP))
            listen(layer, Stage(number, reference.LAYER))
        found[LOGITS] = network_logits(network, token_ids)
    return found


def _array(tensor: ms.Tensor) -> np.ndarray:
    array: np.ndarray = tensor.astype(ms.float32).asnumpy()
    return array.reshape(-1, array.shape[-1])


def _routing_weights(router: Any, chosen: ms.Tensor, experts: ms.Tensor) -> np.ndarray:
    """Routing weights, (tokens, experts); 0 for experts not selected."""
    weights = _array(chosen)
    shares = np.zeros((len(weights), router.num_experts), np.float32)
    np.put_along_axis(shares, experts.asnumpy(), weights, axis=-1)
    return shares


def wrong_parameters(network: InferenceNetwork, model: CheckedCheckpoint) -> Iterator[Problem]:
    """Yields the parameters of a network that do not hold what loading gives them, and what they look like, folded."""
    parameters = network.parameters_dict()
    rules = {rule.parameter: rule for rule in model.rules}
    alike: dict[tuple[str, str], list[str]] = defaultdict(list)
    with Transfer() as transfer:
        for target in model.plan(INFER).targets:
            parameter = parameters[target.name]
            found = parameter.asnumpy()  # on a CPU a view
            if parameter.dtype == ms.bfloat16:
                found = found.view(DTYPES["BF16"])  # MindSpore has a NumPy dtype of its own for it
            expected = np.empty(target.shape, found.dtype)
            transfer.fill(expected, target.copies)
            if not np.array_equal(found, expected):
                alike[_appearance(found, rules[target.name], model), _LOAD].append(target.name)
    yield from folded_problems(alike)


def _appearance(found: np.ndarray, rule: Rule, model: CheckedCheckpoint) -> str:
    """Describes a parameter with wrong values."""
    if not found.any():
        return "all zero: never loaded"
    if isinstance(rule, RowsRule) and rule.fuses:
        expected = {name: rows.astype(found.dtype) for name, rows in read_sampled_rows(model, rule).items()}
        for layout, is_alike in likeness_of_layouts(rule, found, expected, np.array_equal).items():
            if is_alike and layout != INFERENCE:
                return f"in the training layout: {describe(layout)}"
    return "other values"
