"""An empty stand-in, with which MindFormers 2.0.0 can be imported; what it names computes nothing.

MindFormers' PyNative training classes import names of HyperParallel, in 2.0.0 also where nobody asks for these classes.
Here each module and each name exists, and is empty.
"""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _Nothing:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Takes whatever MindFormers passes."""


def _make(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (_Nothing,), {})


class _Finder:
    """Finds every module below this package, and makes each of nothing but names."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        is_below = name.startswith("hyper_parallel.")
        return ModuleSpec(name, self, is_package=True) if is_below else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        module.__getattr__ = _make  # type: ignore[method-assign]


__getattr__ = _make
sys.meta_path.append(_Finder())  # type: ignore[arg-type]
