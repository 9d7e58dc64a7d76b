"""Reads the commands, code and headings of the documents."""

from __future__ import annotations

import re
import shlex

from tests.support.commands import ROOT

NUMBER_FLAGS = {
    "--num_layers": "num_layers",
    "--num_attention_heads": "num_attention_heads",
    "--num_query_groups": "num_query_groups",
    "--kv_channels": "head_dim",
    "--num_routed_experts": "num_experts",
    "--hidden_size": "hidden_size",
    "--moe_ffn_hidden_size": "moe_ffn_hidden_size",
}


ENGLISH, CHINESE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README_CN.md"))


def blocks(readme: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)


def commands(readme: str, language: str = "bash") -> list[list[str]]:
    """Of the blocks marked ``bash``, which stand for themselves; those marked ``sh`` belong together."""
    lines = "".join(blocks(readme, language)).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, True))]


def anchor(heading: str) -> str:
    """The link target that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
