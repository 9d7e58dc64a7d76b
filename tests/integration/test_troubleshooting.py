"""The messages that docs/troubleshooting.md answers are those that the installed sources print, word for word."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import yaml
from tests.support.commands import ROOT, environment, run_command
from tests.support.documents import commands
from tests.support.golden import CHECKPOINTS

TEXT = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
RELEASES = ("1.7.0", "1.8.0", "1.9.0", "2.0.0", "2.1.0")
INSTALLED = version("mindformers")
ENTRY = re.compile(r"^### (`+) ?(.+?) ?\1\n\nFrom (?:`(\S+)`|(.+?))(?: \((.+?)\))?\.$", re.MULTILINE)
NOT_PYTHON_SOURCES = ("Python", "MindSpore's C++")


@dataclass(frozen=True)
class Entry:
    """A heading: the message, the file that prints it (or who else does), and in which releases."""

    message: str
    file: str
    origin: str
    releases: tuple[str, ...]

    @property
    def parts(self) -> list[str]:
        """Without the exception's name, and {} for what varies; … is between them."""
        words = re.sub(r"\{.*?\}", "{}", re.sub(r"^(\w+Error: '?(?=[`\w{])|WARNING: |INFO: )", "", self.message))
        return [part.strip() for part in words.split("…")]


def entries() -> Iterator[Entry]:
    for _, message, file, origin, releases in ENTRY.findall(TEXT):
        yield Entry(message, file, origin, tuple(releases.split(", ")) if releases else RELEASES)


ENTRIES = list(entries())
OF_FILES = [entry for entry in ENTRIES if entry.file]


def installed(file: str) -> Path:
    package, rest = file.split("/", 1)
    spec = find_spec(package)
    assert spec and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / rest


@cache
def texts(file: str) -> list[str]:
    """Every text in a source file; {} where a value is put in."""
    path = installed(file)
    return list(map(with_holes, ast.walk(ast.parse(path.read_text(encoding="utf-8"))))) if path.is_file() else []


def with_holes(node: ast.AST) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(value.value if isinstance(value, ast.Constant) else "{}" for value in node.values)
    return re.sub("%[sd]", "{}", node.value) if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def is_printed(entry: Entry) -> bool:
    printed = [" ".join(text.split()) for text in texts(entry.file)]
    return all(any(part in text for text in printed) for part in entry.parts)


@pytest.mark.parametrize("entry", OF_FILES, ids=lambda entry: entry.message[:60])
def test_the_message_is_in_the_sources_of_these_releases_and_of_no_other(entry: Entry):
    assert set(entry.releases) <= set(RELEASES)
    assert is_printed(entry) == (INSTALLED in entry.releases)


def test_every_heading_with_a_message_says_where_it_comes_from():
    assert len(ENTRIES) == len(re.findall("^### `", TEXT, re.MULTILINE)) > 40
    assert {entry.origin for entry in ENTRIES if not entry.file} == set(NOT_PYTHON_SOURCES)


def provoke(scratch: Path, base: str, change: Callable[[dict[str, Any]], object]) -> str:
    """What upstream says of a YAML, without the bridge."""
    document = yaml.safe_load((ROOT / "yaml" / "cpu" / base).read_text())
    del document["model"]["model_config"]["auto_register"]
    change(document)
    config = scratch / "upstream.yaml"
    config.write_text(yaml.safe_dump(document))
    (scratch / "demo").symlink_to(ROOT / "demo")
    data = ["--model_dir", "demo/qwen3-demo", "--output", "output/training.mindrecord"]
    run = [sys.executable, ROOT / "tests/integration/trainer.py", "--config", config]
    made = [sys.executable, "demo/make_training_data.py", *data]
    if "predict" in base:
        run, made = [*run, "--predict_data", "hi"], [sys.executable, "-c", ""]
    subprocess.run(made, cwd=scratch, env=environment(), check=True, capture_output=True)
    result = run_command(run, scratch)
    assert result.returncode != 0
    return result.stderr


PROVOKED: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "beta_slow": (
        "predict_qwen3.yaml",
        lambda document: document.update(pretrained_model_dir=str(CHECKPOINTS / "yarn")),
    ),
    "qk_pos_emb_head_dim": (
        "finetune_qwen3.yaml",
        lambda document: document.update(pretrained_model_dir=str(CHECKPOINTS / "yarn")),
    ),
    "mpirun": ("predict_qwen3.yaml", lambda document: document.update(use_parallel=True)),
    "ApplyRotaryPosEmb": ("predict_qwen3.yaml", lambda document: None),
}


@pytest.mark.parametrize("word", PROVOKED)
def test_what_is_in_no_python_source_is_provoked(tmp_path: Path, word: str):
    (entry,) = (entry for entry in ENTRIES if not entry.file and word in entry.message)
    assert entry.releases == RELEASES
    answer = provoke(tmp_path, *PROVOKED[word])
    assert re.sub(r"[{}]", "", entry.message) in re.sub(r"[{}]", "", answer), answer[-3000:]


def test_nothing_else_has_to_be_provoked():
    others = [entry for entry in ENTRIES if not entry.file]
    assert len(others) == len(PROVOKED)


@pytest.mark.parametrize("command", commands(TEXT), ids=" ".join)
def test_commands(tmp_path: Path, command: list[str]):
    (tmp_path / "Qwen3-14B").symlink_to(ROOT / "demo" / "qwen3-demo")
    assert command[0] == "mf-qwen3"
    result = run_command([sys.executable, "-m", "mf_qwen3_bridge.cli", *command[1:]], tmp_path)
    assert result.returncode == 0, result.stderr
