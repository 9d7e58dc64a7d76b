"""Replaces attributes of upstream's classes and modules, and gives them back; upstream's files stay as they are."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from inspect import getattr_static
from types import ModuleType
from typing import Any, TypeVar

import mindformers
import mindspore as ms

from mf_qwen3_bridge.errors import BridgeError, Problem

Owner = type | ModuleType
Owners = Owner | tuple[Owner, ...]  # one, or several of which each has the attribute
Declared = TypeVar("Declared")
# Stands for upstream's value where it has no such attribute.
ABSENT = object()


@dataclass(frozen=True)
class Declaration:
    """One attribute of upstream's that is to be replaced.

    Attributes:
        make: makes the replacement from what is there when it is installed.
        inherited: the owner is a class that has it from one of its bases, and gets one of its own.
        optional: some of upstream's versions lack it; there it is left out.
    """

    owner: Owner
    name: str
    make: Callable[[Any], Any]
    inherited: bool = False
    optional: bool = False

    @property
    def path(self) -> str:
        """Where upstream has it: module, class and name."""
        owner = self.owner
        prefix = owner.__name__ if isinstance(owner, ModuleType) else f"{owner.__module__}.{owner.__qualname__}"
        return f"{prefix}.{self.name}"

    def upstream(self) -> Any:
        """What is there now; ``ABSENT`` if nothing is."""
        if self.inherited:
            return getattr_static(self.owner, self.name, ABSENT)
        return vars(self.owner).get(self.name, ABSENT)


class Replacements:
    """Attributes that are replaced together, if need be only where MindSpore computes on one kind of device.

    The decorators declare them, once, where the replacement is defined.
    """

    def __init__(self, device_target: str | None = None) -> None:
        self.device_target = device_target
        self.declarations: list[Declaration] = []
        self.installed: dict[tuple[Owner, str], Any] = {}  # the replacements, while they are in place
        self._upstream: dict[tuple[Owner, str], Any] = {}

    def derives(self, owner: Owners, name: str, **options: bool) -> Callable[[Declared], Declared]:
        """Declares a function that makes the replacement from upstream's value; ``options`` are a Declaration's."""

        def declare(make: Any) -> Any:
            owners = owner if isinstance(owner, tuple) else (owner,)
            self.declarations += [Declaration(one, name, make, **options) for one in owners]
            return make

        return declare

    def replaces(self, owner: Owners, name: str, **options: bool) -> Callable[[Declared], Declared]:
        """Declares a function or class that takes the attribute's place."""

        def declare(replacement: Any) -> Any:
            self.derives(owner, name, **options)(lambda upstream: replacement)
            return replacement

        return declare

    def wraps_upstream(self, owner: Owners, name: str, **options: bool) -> Callable[[Declared], Declared]:
        """Declares a function that is called with upstream's (of a classmethod, the function within), then as that."""

        def declare(function: Any) -> Any:
            def wrap(upstream: Any) -> Any:
                called = upstream.__func__ if isinstance(upstream, classmethod) else upstream

                @wraps(called)
                def wrapper(*args: Any, **kwargs: Any) -> Any:
                    return function(called, *args, **kwargs)

                return classmethod(wrapper) if isinstance(upstream, classmethod) else wrapper

            self.derives(owner, name, **options)(wrap)
            return function

        return declare

    def install(self) -> None:
        """Replaces them all; does nothing where that has been done, or on another device.

        Raises:
            BridgeError: upstream lacks some of them (all are listed). Nothing is changed then.
        """
        if self.installed or self.device_target not in (None, ms.get_context("device_target")):
            return
        found = [(declared, declared.upstream()) for declared in self.declarations]
        moved = [declared for declared, upstream in found if upstream is ABSENT and not declared.optional]
        if moved:
            remedy = "use MindFormers 1.7 to 2.1; in later ones it may have another name or place"
            raise BridgeError(
                f"MindFormers {mindformers.__version__} with MindSpore {ms.__version__} lacks what the bridge replaces",
                [Problem(declared.path, "does not exist", remedy) for declared in moved],
            )
        replacements = [(declared, declared.make(value)) for declared, value in found if value is not ABSENT]
        for declared, replacement in replacements:
            key = declared.owner, declared.name
            self._upstream[key] = vars(declared.owner).get(declared.name, ABSENT)
            self.installed[key] = replacement
            setattr(declared.owner, declared.name, replacement)

    def uninstall(self) -> None:
        """Gives every attribute its upstream value again, unless somebody else has replaced it since."""
        for (owner, name), replacement in self.installed.items():
            if vars(owner).get(name) is not replacement:
                continue
            if self._upstream[owner, name] is ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, self._upstream[owner, name])
        self.installed.clear()
        self._upstream.clear()


# What mf_qwen3_bridge.patch() installs.
HOOKS = Replacements()
