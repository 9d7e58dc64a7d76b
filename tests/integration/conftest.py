"""Networks that hold the committed fixtures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest

import mf_qwen3_bridge
from mf_qwen3_bridge.inputs.preflight import CheckedCheckpoint, check
from mf_qwen3_bridge.mindformers.infer import NO_TOKEN, build_network
from mf_qwen3_bridge.mindformers.network import network_logits
from tests.golden import CHECKPOINTS, FIXTURES, NAMES, TOLERANCE, Golden, golden

__all__ = ["CHECKPOINTS", "FIXTURES", "NAMES", "TOLERANCE", "Golden", "golden"]
# An operator at a time: a process that generates otherwise waits, for each token, for threads that have hardly anything
# to do.
ms.set_context(pynative_synchronize=True)
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


@pytest.fixture(scope="module")
def network_of() -> Callable[[str], Any]:
    """Fixtures that are loaded once for all tests of a module: who changes one sets it back."""
    return cache(lambda name: mf_qwen3_bridge.from_pretrained(CHECKPOINTS / name))


@pytest.fixture(autouse=True)
def unpatched_afterwards():
    yield
    mf_qwen3_bridge.unpatch()
