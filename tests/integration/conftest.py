"""Networks that hold the committed fixtures."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import mindspore as ms
import pytest

import mf_qwen3_bridge
from tests.support.golden import CHECKPOINTS

# As the bridge does where it builds a network; not all tests begin with that.
ms.runtime.launch_blocking()


@pytest.fixture(scope="module")
def network_of() -> Callable[[str], Any]:
    """Fixtures that are loaded once for all tests of a module: who changes one sets it back."""
    return cache(lambda name: mf_qwen3_bridge.from_pretrained(CHECKPOINTS / name))


@pytest.fixture(autouse=True)
def unpatched_afterwards():
    yield
    mf_qwen3_bridge.unpatch()
