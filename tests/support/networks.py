"""Builds MindFormers' networks, changes them, and reads what they hold and compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindformers.parallel_core.inference import parallel_state

from mf_qwen3_bridge.inputs.preflight import CheckedCheckpoint, check
from mf_qwen3_bridge.mindformers.infer import NO_TOKEN, build_network
from mf_qwen3_bridge.mindformers.network import network_logits
from mf_qwen3_bridge.model.parallel import ParallelConfig
from mf_qwen3_bridge.model.spec import ModelSpec
from tests.support.golden import Golden

# Every sequence crosses many blocks of the KV cache.
SMALL_CACHE = {"block_size": 4, "num_blocks": 128, "seq_length": 128}


def logits_error(network: Any, expected: list[Golden]) -> float:
    """The largest error of any logit of any prompt, relative to the scale of the logits."""
    errors = [np.abs(network_logits(network, g.prompt) - g.logits).max() / np.abs(g.logits).max() for g in expected]
    return float(max(errors))


def greedy_tokens(
    network: Any, prompts: Sequence[list[int]], count: int = 64, eos_token_id: Sequence[int] = (NO_TOKEN,)
) -> list[list[int]]:
    """What upstream's ``generate`` adds to each prompt of one batch; it wants them padded on the right."""
    longest = max(map(len, prompts))
    outputs = network.generate(
        input_ids=[prompt + [NO_TOKEN] * (longest - len(prompt)) for prompt in prompts],
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=list(eos_token_id),
        pad_token_id=NO_TOKEN,
    )
    return [output[len(prompt) :].tolist() for output, prompt in zip(outputs, prompts)]


def bits(network: Any) -> dict[str, tuple[str, bytes]]:
    return {name: (str(p.dtype), p.asnumpy().tobytes()) for name, p in network.parameters_dict().items()}


def empty_network(directory: Path, **options: Any) -> tuple[Any, CheckedCheckpoint]:
    model = check(directory, overrides=options)
    return build_network(model, "CPU"), model


@contextmanager
def changed(network: Any, name: str, change: Callable[[np.ndarray], np.ndarray]) -> Iterator[None]:
    """One parameter's values changed, and set back afterwards."""
    parameter = network.parameters_dict()[name]
    values = parameter.asnumpy().copy()
    new = np.ascontiguousarray(change(values.copy()))
    assert new.shape == values.shape
    parameter.set_data(ms.Tensor.from_numpy(new))
    try:
        yield
    finally:
        parameter.set_data(ms.Tensor.from_numpy(values))


DENSE = ModelSpec(
    num_layers=2,
    hidden_size=16,
    num_attention_heads=8,
    num_query_groups=2,
    head_dim=4,
    ffn_hidden_size=24,
    vocab_size=32,
    tie_word_embeddings=False,
)
MOE = replace(DENSE, ffn_hidden_size=0, num_experts=8, moe_ffn_hidden_size=24)


@contextmanager
def playing(monkeypatch: pytest.MonkeyPatch, parallel: ParallelConfig, number: int, stages: int = 1) -> Iterator[None]:
    """This process as rank ``number`` of many, each of which is in one of a pipeline's stages."""
    with monkeypatch.context() as patch:
        for name in vars(parallel_state):
            if name.endswith(("_GROUP", "_RANKS")):
                patch.setattr(parallel_state, name, getattr(parallel_state, name))
        patch.setattr(parallel_state, "_is_initialized", lambda: True)
        patch.setattr(parallel_state, "get_rank", lambda: number)
        patch.setattr(parallel_state, "get_group_size", lambda: parallel.world_size * stages)
        patch.setattr(parallel_state, "create_group", lambda group, ranks: None)
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor_parallel,
            data_parallel_size=parallel.data_parallel,
            pipeline_model_parallel_size=stages,
            expert_model_parallel_size=parallel.expert_parallel,
        )
        yield
