"""Where MindFormers' versions differ."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

from mindformers.trainer import base_trainer


def loaders_of_new_format() -> Iterator[tuple[ModuleType, str]]:
    """The functions by which MindFormers' trainer loads what is in its newer checkpoint format, or Hugging Face's.

    ``load_checkpoint`` loads all kinds; from 1.9 on ``load_hf_checkpoint`` loads Hugging Face's; in 2.0 and 2.1 too, by
    their sources: the bridge was not run with them.
    """
    for name in ("load_checkpoint", "load_hf_checkpoint"):
        if name in vars(base_trainer):
            yield base_trainer, name


def weights_to_load(config: Any) -> str | None:
    """What the trainer will load, of a run's config: from 1.9 on ``checkpoint.load_path``, else ``load_checkpoint``."""
    if "load_hf_checkpoint" in vars(base_trainer):
        return (config.get("checkpoint") or {}).get("load_path")
    return config.load_checkpoint
