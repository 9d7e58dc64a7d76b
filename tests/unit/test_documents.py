"""The documents: links lead somewhere, pictures and text are what the rules say, commands and code run."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import subprocess
import sys
from collections import defaultdict
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from mf_qwen3_bridge.model import layouts
from tests.support.commands import ROOT, environment, run_command
from tests.support.documents import anchors, blocks, commands, links

DOCS = ROOT / "docs"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md"), *(ROOT / "demo").glob("*.md")])
OURS = [DOCS / "layouts.md", DOCS / "architecture.md", DOCS / "verified.md", ROOT / "CONTRIBUTING.md"]
LAYOUTS = (DOCS / "layouts.md").read_text(encoding="utf-8")


def script(name: str):
    """A script in docs/, which is in no package."""
    spec = spec_from_file_location(name, DOCS / f"{name}.py")
    module = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sys.path.append(str(DOCS))  # where a script in docs/ finds what it shares with others
DRAW, ROOMS_DRAWN, OVERVIEW, CHART = (
    script(f"draw_{name}") for name in ("layouts", "rooms", "overview", "performance")
)
FIGURES = DRAW.figures()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_links_lead_somewhere(document: Path):
    for link in links(document):
        path, _, name = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        assert not name or name in anchors(target), link


def test_no_document_is_hard_to_find():
    """From the README, by links."""
    found, new = set(), {ROOT / "README.md"}
    while new:
        found |= new
        linked = {(document.parent / link.partition("#")[0]).resolve() for document in new for link in links(document)}
        new = {page for page in linked if page.suffix == ".md"} - found
    assert found >= set(DOCUMENTS)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_tests_that_are_named_are_there(document: Path):
    text = document.read_text(encoding="utf-8")
    files: dict[str, str] = defaultdict(str)  # some names are in unit and in integration
    for file in (ROOT / "tests").rglob("test_*.py"):
        files[file.stem] += file.read_text(encoding="utf-8")
    for file, function in re.findall(r"\b(test_\w+)::(test_\w+)", text):
        assert f"def {function}(" in files[file]
    for file in re.findall(r"(?<!::)\b(test_\w+)", text):
        assert file in files or file in ("test_mode",)


def test_the_rows_of_the_hooks_name_tests_of_the_integration_session():
    text = (DOCS / "mindformers.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| .* \| .* \| .* \| (test_\w+)::(test_\w+) \|$", text, re.MULTILINE)
    assert len(rows) > 25
    for file, function in rows:
        assert f"def {function}(" in (ROOT / "tests" / "integration" / f"{file}.py").read_text()


def test_the_npu_guide_has_no_blocks_that_nobody_looks_at():
    """``bash`` is run by test_guide, ``sh`` by nobody, ``text`` is compared."""
    text = (DOCS / "npu_server.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^```(\w+)$", text, re.MULTILINE)) == {"bash", "sh", "text"}
    assert len(blocks(text, "bash")) > 15


def test_sessions_that_are_named_are_there():
    named = re.findall(r"nox -s \"?(\w+)", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    sessions = re.findall(r"^def (\w+)", (ROOT / "noxfile.py").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(named) < set(sessions)


def test_the_pictures_are_what_the_rules_say():
    committed = {file.name: file.read_text(encoding="utf-8") for file in (DOCS / "pictures").glob("*.svg")}
    drawn = {f"{name}.svg": DRAW.svg(figure) for name, figure in FIGURES.items()}
    chart = CHART.svg(CHART.measured((DOCS / "performance.md").read_text(encoding="utf-8")))
    assert committed == drawn | {script.PICTURE: script.svg() for script in (ROOMS_DRAWN, OVERVIEW)} | {
        CHART.PICTURE: chart
    }


def test_the_picture_of_the_rooms_has_all_of_them_in_the_order_of_their_imports():
    rows: dict[int, set[str]] = {}
    for room in ROOMS_DRAWN.ROOMS:
        rows.setdefault(-room.row, set()).add(room.name)
    *below, upper, cli = (set(rooms) for rooms in ROOMS)
    assert [rows[row] for row in sorted(rows)] == [*below[:-1], below[-1] | upper, cli]


def test_what_no_room_imports_is_not_drawn(monkeypatch: pytest.MonkeyPatch):
    wrong = ROOMS_DRAWN.Flow("model", "transfer", ["Plan"])
    monkeypatch.setattr(ROOMS_DRAWN, "FLOWS", (*ROOMS_DRAWN.FLOWS, wrong))
    with pytest.raises(ValueError, match="transfer does not import"):
        ROOMS_DRAWN.svg()


def test_beside_each_picture_stands_what_it_shows():
    beside = re.findall(
        r"^!\[[^\]]+\]\(pictures/(\w+)\.svg\)\n\n```text\n(.*?)^```$", LAYOUTS, re.MULTILINE | re.DOTALL
    )
    assert sorted(name for name, _ in beside) == sorted(FIGURES)
    for name, text in beside:
        assert text == DRAW.text(FIGURES[name])


def test_a_mistake_in_a_layout_would_be_drawn(monkeypatch: pytest.MonkeyPatch):
    def swapped(*arguments):
        first, *others = layouts_interleaved(*arguments)
        return [first, *others[::-1]]

    layouts_interleaved = layouts.interleaved
    monkeypatch.setattr(layouts, "interleaved", swapped)
    changed = {name for name, figure in DRAW.figures().items() if DRAW.svg(figure) != DRAW.svg(FIGURES[name])}
    assert changed == {"qkv_interleaved", "ranks_train"}


def checkout(directory: Path) -> Path:
    """What commands and code find in their working directory."""
    for name in ("demo", "mf_qwen3_bridge", "scripts", "tests", "noxfile.py", "pyproject.toml"):
        (directory / name).symlink_to(ROOT / name)
    (directory / "docs").mkdir()
    for file in DOCS.glob("*.py"):
        (directory / "docs" / file.name).write_bytes(file.read_bytes())
    return directory


@pytest.mark.parametrize("document", OURS, ids=lambda document: document.name)
def test_commands(tmp_path: Path, document: Path):
    """One after the other, in one directory."""
    text = re.sub(r"^ +", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE)  # blocks within lists
    for command in commands(text):
        words = [{"python": sys.executable, "mf-qwen3": "mf_qwen3_bridge.cli"}.get(word, word) for word in command]
        words = [sys.executable, "-m", *words] if command[0] == "mf-qwen3" else words
        directory = tmp_path if (tmp_path / "docs").exists() else checkout(tmp_path)
        result = run_command(words, directory)
        assert result.returncode == 0, shlex.join(command) + result.stdout[-3000:] + result.stderr[-3000:]


@pytest.mark.parametrize("mistake", [None, "contiguous", "interleaved"])
def test_the_example_of_the_layouts(monkeypatch: pytest.MonkeyPatch, mistake: str | None):
    """As it stands it is right, and of a layout with a mistake it would not be."""
    (code,) = blocks(LAYOUTS, "python")
    if mistake is None:
        exec(code, {})
        return
    right = getattr(layouts, mistake)
    monkeypatch.setattr(layouts, mistake, lambda *arguments: [right(*arguments)[number] for number in (0, 2, 1)])
    with pytest.raises(AssertionError):
        exec(code, {})


ARCHITECTURE = (DOCS / "architecture.md").read_text(encoding="utf-8")


PACKAGE = ROOT / "mf_qwen3_bridge"
# A room imports from the rooms before it. The two in one tuple know nothing of each other.
ROOMS = (("errors",), ("model",), ("transfer",), ("inputs",), ("convert", "verify"), ("mindformers",), ("cli",))
MODULES = sorted(
    ".".join(file.relative_to(PACKAGE).with_suffix("").parts)
    for file in PACKAGE.rglob("*.py")
    if file.name != "__init__.py" and file.parent.name != "register_path"
)


def imports(module: str) -> set[str]:
    """The dotted names of all that a module imports, in functions too."""
    file = PACKAGE / f"{module.replace('.', '/')}.py"
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imported_modules(module: str) -> set[str]:
    """The package's own modules among them."""
    return {name.partition(".")[2] for name in imports(module)} & set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_rooms_import_from_the_rooms_before_them(module: str):
    floor = {room: number for number, rooms in enumerate(ROOMS) for room in rooms}
    room = module.partition(".")[0]
    for other in {imported.partition(".")[0] for imported in imported_modules(module)} - {room}:
        assert floor[other] < floor[room], f"{module} imports {other}"
    if room != "mindformers":
        assert not {name.partition(".")[0] for name in imports(module)} & {"mindspore", "mindformers"}


def test_no_modules_import_each_other():
    """Inside a room as well: what is left after taking away, again and again, the modules that import no other."""
    left = {module: imported_modules(module) - {module} for module in MODULES}
    while free := {module for module, imported in left.items() if not imported}:
        left = {module: imported - free for module, imported in left.items() if module not in free}
    assert not left


def test_functions_that_are_named_are_there():
    """``room/module.py:function``, or without the room in the section of the room."""
    prefix = ""
    names = []
    for line in ARCHITECTURE.splitlines():
        if line.startswith("#"):
            room = line.removeprefix("### ")
            prefix = f"{room}/" if line.startswith("### ") and (PACKAGE / room).is_dir() else ""
        names += [(prefix, *name) for name in re.findall(r"`((?:\w+/)*\w+\.py):([\w.]+)`", line)]
    assert len(names) > 50
    for prefix, file, function in names:
        path = PACKAGE / file if (PACKAGE / file).is_file() else PACKAGE / prefix / file
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for part in function.split("."):
            (tree,) = (node for node in tree.body if getattr(node, "name", None) == part)


def patched(directory: Path, diff: str) -> None:
    """A copy of the package, with a diff that says no line numbers."""
    shutil.copytree(ROOT / "mf_qwen3_bridge", directory / "mf_qwen3_bridge")
    for part in diff.split("--- ")[1:]:
        name, *hunks = part.split("@@\n")
        file = directory / name.strip()
        for hunk in hunks:
            lines = hunk.splitlines(keepends=True)
            before, after = ("".join(line[1:] or "\n" for line in lines if line[0] != sign) for sign in "+-")
            text = file.read_text(encoding="utf-8")
            assert text.count(before) == 1, f"{name}{hunk}"
            file.write_text(text.replace(before, after), encoding="utf-8")


@pytest.mark.parametrize("number", [0, 1], ids=["a layout", "a model"])
def test_what_the_walk_throughs_add_works(tmp_path: Path, number: int):
    patched(tmp_path / "changed", blocks(ARCHITECTURE, "diff")[number])
    code = blocks(ARCHITECTURE, "python")[number]
    for root, works in ((tmp_path / "changed", True), (ROOT, False)):
        directory = tmp_path / f"works {works}"
        directory.mkdir()
        (directory / "demo").symlink_to(ROOT / "demo")
        changed = environment() | {"PYTHONPATH": str(root)}
        command = [sys.executable, "-c", code]
        result = subprocess.run(command, capture_output=True, text=True, cwd=directory, env=changed, check=False)
        assert (result.returncode == 0) == works, result.stderr[-3000:]


def test_modules_are_short():
    """A module has one job; what is longer than 400 lines has two."""
    lengths = {file: len(file.read_text("utf-8").splitlines()) for file in (ROOT / "mf_qwen3_bridge").rglob("*.py")}
    assert {file: length for file, length in lengths.items() if length > 400} == {}
