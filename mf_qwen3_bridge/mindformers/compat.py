"""Where MindFormers' versions differ."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

from mindformers import __version__
from mindformers.trainer import base_trainer

VERSION = tuple(int(part) for part in __version__.split(".")[:2])


def loaders_of_new_format() -> Iterator[tuple[ModuleType, str]]:
    """The functions that load a Hugging Face directory when the YAML asks for MindFormers' newer checkpoint format.

    1.7: there is no such format. 1.8: ``load_checkpoint`` loads all kinds. 1.9: ``load_hf_checkpoint``; in 2.0 and 2.1
    too, by their sources: the bridge was not run with them.
    """
    if VERSION >= (1, 8):
        yield base_trainer, "load_checkpoint" if VERSION == (1, 8) else "load_hf_checkpoint"
