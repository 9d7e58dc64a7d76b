"""Where MindFormers' versions differ."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

from mindformers.trainer import base_trainer


def loaders_of_new_format() -> Iterator[tuple[ModuleType, str]]:
    """The functions by which MindFormers' trainer loads what is in its newer checkpoint format, or Hugging Face's.

    ``load_checkpoint`` loads all kinds; from 1.9 on ``load_hf_checkpoint`` loads Hugging Face's; in 2.0 and 2.1 too, by
    their sources: the bridge was not run with them.
    """
    for name in ("load_checkpoint", "load_hf_checkpoint"):
        if name in vars(base_trainer):
            yield base_trainer, name
