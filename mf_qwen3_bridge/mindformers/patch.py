"""What the bridge adds to MindFormers' classes, and takes away again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from mindformers.models.qwen3.modeling_qwen3_infer import InferenceQwen3ForCausalLM
from mindformers.models.qwen3_moe.modeling_qwen3_moe_infer import InferenceQwen3MoeForCausalLM

from mf_qwen3_bridge.mindformers import conversion


class ClassOrInstanceMethod:
    """A method whose first argument is the instance, or the class when it is called on the class.

    Upstream calls the same hook both ways, depending on where it comes from.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __get__(self, instance: object | None, owner: type) -> Callable[..., Any]:
        return partial(self.function, owner if instance is None else instance)


_ADDED = {
    "convert_weight_dict": ClassOrInstanceMethod(conversion.convert_weight_dict),
    "convert_map_dict": ClassOrInstanceMethod(conversion.convert_map_dict),
    "obtain_name_map": ClassOrInstanceMethod(conversion.obtain_name_map),
}
_PATCHED = (InferenceQwen3ForCausalLM, InferenceQwen3MoeForCausalLM)


def patch() -> None:
    """Gives MindFormers' inference classes the conversion methods that they lack. Calling it again changes nothing."""
    for cls in _PATCHED:
        for name, method in _ADDED.items():
            setattr(cls, name, method)


def unpatch() -> None:
    """Takes away what :func:`patch` added: the classes are upstream's again."""
    for cls in _PATCHED:
        for name, method in _ADDED.items():
            if vars(cls).get(name) is method:
                delattr(cls, name)
