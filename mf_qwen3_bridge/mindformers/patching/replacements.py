"""Attributes of upstream's classes and modules that are replaced for a while; upstream's files stay as they are."""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType
from typing import Any

Owner = type | ModuleType
# Stands for upstream's value where it has no such attribute.
ABSENT = object()


class Replacements:
    """A set of attributes that are replaced together.

    Args:
        entries: (whose attribute, its name, what stands in its place).

    Attributes:
        entries: these.
        upstream: the replaced values, while they are replaced.
    """

    def __init__(self, entries: Iterable[tuple[Owner, str, Any]]) -> None:
        self.entries = tuple(entries)
        self.upstream: dict[tuple[Owner, str], Any] = {}

    def install(self) -> None:
        """Replaces them all; does nothing where that has been done."""
        if self.upstream:
            return
        # Look everything up before changing anything: what upstream moved must not leave half of it replaced.
        self.upstream.update({(owner, name): vars(owner).get(name, ABSENT) for owner, name, _ in self.entries})
        for owner, name, replacement in self.entries:
            setattr(owner, name, replacement)

    def uninstall(self) -> None:
        """Gives every attribute its upstream value again, unless somebody else has replaced it since."""
        for owner, name, replacement in self.entries if self.upstream else ():
            if vars(owner).get(name) is not replacement:
                continue
            if self.upstream[owner, name] is ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, self.upstream[owner, name])
        self.upstream.clear()
