"""Handles differences between MindFormers' versions."""

from __future__ import annotations

from typing import Any

from mindformers.trainer import base_trainer


def find_weights_to_load(config: Any) -> str | None:
    """What the trainer will load, of a run's config: from 1.9 on ``checkpoint.load_path``, else ``load_checkpoint``."""
    if "load_hf_checkpoint" in vars(base_trainer):
        return (config.get("checkpoint") or {}).get("load_path")
    return config.load_checkpoint
