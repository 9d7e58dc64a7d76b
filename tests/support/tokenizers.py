"""Gives the fixtures a tokenizer that spells token 17 as the word ``t17``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.support.golden import CHECKPOINTS

NEW_TOKENS = 16


def with_tokenizer(name: str, scratch: Path, checkpoints: Path = CHECKPOINTS) -> Path:
    """A copy of the fixture with a tokenizer, and without a token that ends a text."""
    directory = scratch / name
    shutil.copytree(checkpoints / name, directory)
    vocab_size = json.loads((directory / "config.json").read_text())["vocab_size"]
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": {f"t{i}": i for i in range(vocab_size)}, "unk_token": "t0"},
    }
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": -1}))
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return directory


def spell(tokens: list[int]) -> str:
    return " ".join(f"t{token}" for token in tokens)


def with_generation_config(directory: Path) -> Path:
    """The directory, with a generation_config.json that asks for so many tokens and knows none that ends a text.

    Upstream's pipeline wants a token to pad with; a single prompt is not padded.
    """
    path = directory / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    tokenizer["added_tokens"] = [{"id": len(tokenizer["model"]["vocab"]), "content": "<pad>", **flags}]
    path.write_text(json.dumps(tokenizer))
    entries = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(entries))
    config = {"max_new_tokens": NEW_TOKENS, "eos_token_id": [-1], "pad_token_id": -1, "do_sample": False}
    (directory / "generation_config.json").write_text(json.dumps(config))
    return directory
