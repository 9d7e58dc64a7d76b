"""The entry point that vLLM calls in each of its processes: nothing heavy is imported where nobody needs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import tomllib

from mf_qwen3_bridge.mindformers import vllm_plugin
from tests.support.commands import ROOT

GROUP = "vllm.general_plugins"
PACKAGES = ("vllm_mindspore", "mindspore", "mindformers")
# What a process of vLLM does with a plugin, and what it has imported and logged then.
PROCESS = """
import json, logging, sys
messages = []
handler = logging.Handler()
handler.emit = lambda record: messages.append((record.levelname, record.getMessage()))
logging.getLogger("vllm").addHandler(handler)
logging.getLogger("vllm").setLevel(logging.DEBUG)
before = set(sys.modules)
from mf_qwen3_bridge.mindformers.vllm_plugin import register
register()
register()
print(json.dumps([sorted({name.split(".")[0] for name in set(sys.modules) - before}), messages]))
"""
OF_THE_PLUGIN = {"mf_qwen3_bridge"}


def imported_and_logged(scratch: Path, packages: tuple[str, ...] = PACKAGES, **variables: str) -> tuple[set, list]:
    """Calls the plugin where these packages seem to be installed; who imports one ends with an error."""
    for package in packages:
        (scratch / package).mkdir()
        (scratch / package / "__init__.py").write_text(f"raise ImportError('{package} is broken')")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MF_", "VLLM_", "vLLM_"))}
    environment |= {"PYTHONPATH": f"{scratch}:{ROOT}", **variables}
    command = [sys.executable, "-c", PROCESS]
    result = subprocess.run(command, env=environment, cwd=scratch, capture_output=True, text=True, check=True)
    imported, messages = json.loads(result.stdout)
    return set(imported) - sys.stdlib_module_names, messages


def test_the_entry_point():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ((name, value),) = project["entry-points"][GROUP].items()
    assert name == "mf_qwen3_bridge"  # what VLLM_PLUGINS knows it by
    assert EntryPoint(name, value, GROUP).load() is vllm_plugin.register


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"MF_QWEN3_VLLM_PLUGIN": "0"}, "MF_QWEN3_VLLM_PLUGIN is 0"),
        ({"VLLM_MS_MODEL_BACKEND": "Native"}, "the model backend is Native"),
        ({"vLLM_MODEL_BACKEND": "MindONE"}, "the model backend is MindONE"),
        ({"VLLM_MS_MODEL_BACKEND": "native", "vLLM_MODEL_BACKEND": "MindFormers"}, "the model backend is native"),
    ],
)
def test_nothing_is_imported_where_the_hooks_are_not_wanted(tmp_path: Path, variables: dict[str, str], reason: str):
    imported, messages = imported_and_logged(tmp_path, **variables)
    assert imported == OF_THE_PLUGIN
    assert messages == [["DEBUG", f"mf-qwen3-bridge changes nothing: {reason}"]] * 2


@pytest.mark.parametrize("missing", PACKAGES)
def test_nothing_is_imported_where_a_package_is_missing(tmp_path: Path, missing: str):
    """Such as vLLM on a GPU, or vllm-ascend, whose models are PyTorch's."""
    there = tuple(package for package in PACKAGES if package != missing)
    imported, messages = imported_and_logged(tmp_path, there)
    assert imported == OF_THE_PLUGIN
    assert messages[0][0] == "DEBUG"
    assert missing in messages[0][1].partition("not installed: ")[2]


@pytest.mark.parametrize("variables", [{}, {"VLLM_MS_MODEL_BACKEND": "MindFormers"}, {"MF_QWEN3_VLLM_PLUGIN": "1"}])
def test_what_goes_wrong_is_logged_and_not_raised(tmp_path: Path, variables: dict[str, str]):
    """vLLM would end with it."""
    _, messages = imported_and_logged(tmp_path, **variables)
    assert [level for level, _ in messages] == ["WARNING"] * 2
    assert "MindFormers loads weights without it: " in messages[0][1]
    assert "is broken" in messages[0][1]
