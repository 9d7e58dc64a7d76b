"""Networks that hold the committed fixtures."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import mindspore as ms
import pytest

import mf_qwen3_bridge
from tests.support.golden import CHECKPOINTS

# An operator at a time: a process that generates otherwise waits, for each token, for threads that have hardly anything
# to do.
ms.set_context(pynative_synchronize=True)


@pytest.fixture(scope="module")
def network_of() -> Callable[[str], Any]:
    """Fixtures that are loaded once for all tests of a module: who changes one sets it back."""
    return cache(lambda name: mf_qwen3_bridge.from_pretrained(CHECKPOINTS / name))


@pytest.fixture(autouse=True)
def unpatched_afterwards():
    yield
    mf_qwen3_bridge.unpatch()
