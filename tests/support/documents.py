"""Reads the commands, code and headings of the documents."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

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


# What a user reads, in English and in Chinese. The commands of one page go on with what those of the page before made.
MANUAL = ("README", "docs/running", "docs/converting", "docs/exporting", "docs/verifying")
ENGLISH, CHINESE = (
    {name: (ROOT / f"{name}{language}.md").read_text(encoding="utf-8") for name in MANUAL} for language in ("", "_CN")
)


def blocks(readme: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)


def commands(readme: str, language: str = "bash") -> list[list[str]]:
    """Of the blocks marked ``bash``, which stand for themselves; those marked ``sh`` belong together."""
    lines = "".join(blocks(readme, language)).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, True))]


def without_code_blocks(document: Path) -> str:
    text = document.read_text(encoding="utf-8")
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)


def prose(document: Path) -> str:
    """A document without its code."""
    return re.sub(r"`[^`\n]*`", "", without_code_blocks(document))


def headings(document: Path) -> list[tuple[str, str]]:
    """(number signs, text) of each."""
    return re.findall(r"^(#+) (.*)$", without_code_blocks(document), re.MULTILINE)


def anchor(heading: str) -> str:
    """The link target that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(document: Path) -> Iterator[str]:
    """The link targets of all headings; the second of one name gets a number."""
    seen: dict[str, int] = {}
    for _, heading in headings(document):
        name = anchor(heading)
        number = seen[name] = seen.get(name, -1) + 1
        yield f"{name}-{number}" if number else name


def links(document: Path) -> list[str]:
    """Links to files of the repository and to headings."""
    found = re.findall(r"\]\((.*?)\)", prose(document))
    return [link for link in found if not link.startswith(("http://", "https://"))]


# Which tests run the manual's commands, by their first two words.
RUNNERS = {
    ("make", "demo"): "make",
    ("make", "test"): "make",
    ("make", "test-all"): "make",
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


def manual_commands(runner: str | None = None, language: str = "bash") -> list[list[str]]:
    """The manual's commands that one group of tests runs (or all), in order, each once.

    Raises:
        KeyError: there is one that no test runs.
    """
    of_all_pages = [command for page in ENGLISH.values() for command in commands(page, language)]
    each_once = [command for number, command in enumerate(of_all_pages) if command not in of_all_pages[:number]]
    return [command for command in each_once if runner is None or RUNNERS[command[0], command[1]] == runner]
