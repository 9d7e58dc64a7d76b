"""Loads checkpoints into the models of transformers, and computes with them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tests.support.commands import ROOT

sys.path.insert(0, str(ROOT / "demo"))

from hf_checkpoint import greedy, prompt_logits, read_config

__all__ = ["greedy", "load_all", "prompt_logits"]


def load_all(directory: Path) -> Any:
    """The model, loaded with nothing missing and nothing left over."""
    model, info = AutoModelForCausalLM.from_pretrained(
        directory,
        config=read_config(directory),
        attn_implementation="eager",
        dtype=torch.float32,
        output_loading_info=True,
    )
    assert {key: list(value) for key, value in info.items() if len(value)} == {}
    return model.eval()
