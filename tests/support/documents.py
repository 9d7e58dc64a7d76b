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


# Which tests run the README's commands, by their first two words.
RUNNERS = {
    ("make", "demo"): "make",
    ("make", "test"): "make",
    ("pip", "install"): "nobody: it made this environment",
    ("python", "scripts/run_infer.py"): "infer",
    ("mf-qwen3", "infer"): "infer",
    ("msrun", "--worker_num=8"): "msrun",
    ("msrun", "--worker_num=2"): "msrun",
    ("python", "run_mindformer.py"): "docs/mindformers.md",
    ("mf-qwen3", "check"): "check",
    ("mf-qwen3", "inspect"): "look",
    ("mf-qwen3", "truncate"): "look",
    ("mf-qwen3", "doctor"): "look",
    ("mf-qwen3", "convert"): "offline",
    ("mf-qwen3", "export"): "offline",
    ("mf-qwen3", "verify"): "offline",
    ("python", "scripts/convert_weight.py"): "offline",
    ("python", "scripts/unified_safetensors.py"): "offline",
}


def readme_commands(runner: str) -> list[list[str]]:
    """The README's commands that one group of tests runs, in order. KeyError: there is one that no test runs."""
    return [command for command in commands(ENGLISH) if RUNNERS[command[0], command[1]] == runner]
