"""What test modules share is in tests/support: none imports another, nor a conftest."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.support.commands import ROOT

FILES = sorted((ROOT / "tests").rglob("*.py"))
# Programs that tests start, or call a part of; they are no test modules.
PROGRAMS = {"tests.fault_injection", "tests.integration.training_worker"}


def imported(file: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file} imports by a relative name"
            is_package = (ROOT / str(node.module).replace(".", "/")).is_dir()
            names |= {f"{node.module}.{alias.name}" for alias in node.names} if is_package else {str(node.module)}
    return {name for name in names if name.split(".")[0] in ("tests", "conftest") or "test_" in name}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_only_support_is_imported(file: Path):
    assert {name for name in imported(file) - PROGRAMS if not name.startswith("tests.support.")} == set()


@pytest.mark.parametrize(
    "line",
    [
        "import tests.unit.test_plan",
        "from tests.unit import test_plan",
        "from tests.unit.test_plan import SPECS",
        "from tests.integration.conftest import network_of",
        "    import conftest",
    ],
)
def test_an_import_of_a_test_module_is_seen(tmp_path: Path, line: str):
    (tmp_path / "test_x.py").write_text(f"def test_x():\n    {line.strip()}\n")
    assert imported(tmp_path / "test_x.py") - PROGRAMS
