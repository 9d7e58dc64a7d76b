"""What users install: the wheel, the sdist, and the commands away from the checkout."""

from __future__ import annotations

import email
import re
import tarfile
import zipfile
from email.message import Message
from pathlib import Path

import pytest

import mf_qwen3_bridge
from mf_qwen3_bridge.inputs.opening import open_source
from tests.support.checkpoints import hf_config, random_tensors, read, write
from tests.support.commands import ROOT
from tests.support.installed import Built, Installed, build, install

NAME = f"mf_qwen3_bridge-{mf_qwen3_bridge.__version__}"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build(tmp_path_factory.mktemp("built"))


@pytest.fixture(scope="module")
def metadata(built: Built) -> Message:
    with zipfile.ZipFile(built.wheel) as wheel:
        return email.message_from_bytes(wheel.read(f"{NAME}.dist-info/METADATA"))


def test_the_wheel_has_the_package_and_nothing_else(built: Built):
    package = {file for suffix in ("*.py", "py.typed") for file in (ROOT / "mf_qwen3_bridge").rglob(suffix)}
    with zipfile.ZipFile(built.wheel) as wheel:
        names = set(wheel.namelist())
        assert wheel.read(f"{NAME}.dist-info/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    about = {name for name in names if name.startswith(f"{NAME}.dist-info/")}
    assert names - about == {str(file.relative_to(ROOT)) for file in package}
    assert names >= {"mf_qwen3_bridge/py.typed", "mf_qwen3_bridge/mindformers/register_path/mf_qwen3.py"}
    assert built.wheel.name == f"{NAME}-py3-none-any.whl"


def test_the_sdist_has_what_the_wheel_is_built_of_and_the_documents(built: Built):
    """The wheel of these tests was built from it."""
    with tarfile.open(built.sdist) as sdist:
        names = {member.name.removeprefix(f"{NAME}/") for member in sdist.getmembers()}
    assert names >= {"README.md", "README_CN.md", "LICENSE", "CHANGELOG.md", "pyproject.toml"}
    assert not [name for name in names if name.startswith("tests")]
    assert built.sdist.name == f"{NAME}.tar.gz"


def test_nothing_of_the_build_is_deprecated(built: Built):
    assert "deprecated" not in built.output


def test_what_a_package_index_shows(metadata: Message):
    assert (metadata["Name"], metadata["Version"]) == ("mf-qwen3-bridge", mf_qwen3_bridge.__version__)
    assert (metadata["License-Expression"], metadata["License-File"]) == ("Apache-2.0", "LICENSE")
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert {"qwen3", "mindformers", "mindspore", "safetensors"} <= set(metadata["Keywords"].split(","))
    classifiers = metadata.get_all("Classifier", [])
    assert {"Typing :: Typed", "Environment :: Console", "Operating System :: POSIX :: Linux"} <= set(classifiers)
    assert not [classifier for classifier in classifiers if classifier.startswith("License")]  # the expression says it


def test_the_python_of_the_classifiers_is_the_one_that_the_tests_run_on(metadata: Message):
    versions = re.findall(r"Python :: (3\.\d+)$", "\n".join(metadata.get_all("Classifier", [])), re.MULTILINE)
    tested = re.findall(r'python="(.*?)"', (ROOT / "noxfile.py").read_text(encoding="utf-8"))
    assert set(versions) == set(tested) == {"3.11"}


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return install(built.wheel, tmp_path_factory.mktemp("installed") / "environment")


def test_it_is_the_wheel_that_is_imported(tmp_path: Path, installed: Installed):
    """Not the checkout, and no editable installation of it."""
    assert installed.imported_from(tmp_path).is_relative_to(installed.directory)


def test_help(tmp_path: Path, installed: Installed):
    assert "Usage: mf-qwen3 [OPTIONS] COMMAND" in installed.output_of(tmp_path, "mf-qwen3", "--help")
    assert mf_qwen3_bridge.__version__ in installed.output_of(tmp_path, "mf-qwen3", "--version")


def test_register_path(tmp_path: Path, installed: Installed):
    directory = Path(installed.output_of(tmp_path, "mf-qwen3", "register-path").strip())
    assert directory.is_relative_to(installed.directory)
    assert [file.name for file in directory.glob("*.py")] == ["mf_qwen3.py"]


def test_doctor(tmp_path: Path, installed: Installed):
    assert mf_qwen3_bridge.__version__ in installed.output_of(tmp_path, "mf-qwen3", "doctor")


def test_check_convert_and_export(tmp_path: Path, installed: Installed):
    hf_dir = write(tmp_path / "hf", random_tensors(), hf_config(), shards=2)
    assert "config and weights fit" in installed.output_of(tmp_path, "mf-qwen3", "check", "--model_dir", "hf")
    installed.output_of(tmp_path, "mf-qwen3", "convert", "--model_dir", "hf", "--output_dir", "trained")
    back = ["--input_path", "trained", "--hf_config", "hf", "--output_path", "back", "--dtype", "fp32"]
    installed.output_of(tmp_path, "mf-qwen3", "export", *back)
    before, after = (open_source(directory).tensors for directory in (hf_dir, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(read(before[name]).tobytes() == read(after[name]).tobytes() for name in before)
