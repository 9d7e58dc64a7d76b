"""What needs MindFormers, where only the wheel is installed; the rest is in tests/unit/test_packaging.py."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import yaml
from tests.support.commands import ROOT, TRAINER
from tests.support.installed import Installed, build, install

PROMPT, ANSWER = "Weights move from Hugging Face", "every row finds its place"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    directory = tmp_path_factory.mktemp("installed")
    return install(build(directory).wheel, directory / "environment")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Away from the checkout, with the demo checkpoint."""
    shutil.copytree(ROOT / "demo" / "qwen3-demo", tmp_path / "qwen3-demo")
    return tmp_path


def test_it_is_the_wheel_that_is_imported(directory: Path, installed: Installed):
    assert installed.imported_from(directory).is_relative_to(installed.directory)


def test_doctor(directory: Path, installed: Installed):
    printed = installed.output_of(directory, "mf-qwen3", "doctor")
    assert "not installed" not in printed
    assert "the bridge is tested with" not in printed


def test_vllm_finds_its_plugin(directory: Path, installed: Installed):
    code = "from importlib.metadata import entry_points as e; (p,) = e(group='vllm.general_plugins'); print(p.load())"
    assert "<function register" in installed.output_of(directory, "python", "-c", code)


def test_the_demo(directory: Path, installed: Installed):
    demo = ["--model_dir", "qwen3-demo", "--use_training_conversion", "--prompt", PROMPT]
    printed = installed.output_of(directory, "mf-qwen3", "infer", *demo)
    assert "converted   24 tensors to 18 parameters, by MindFormers' training conversion" in printed
    assert ANSWER in printed


def test_run_mindformer_with_the_register_path(directory: Path, installed: Installed):
    document = yaml.safe_load((ROOT / "yaml" / "cpu" / "predict_qwen3.yaml").read_text())
    document["pretrained_model_dir"] = str(directory / "qwen3-demo")
    (directory / "predict.yaml").write_text(yaml.safe_dump(document))
    shutil.copy(TRAINER, directory / "run_mindformer.py")
    registered = installed.output_of(directory, "mf-qwen3", "register-path").strip()
    arguments = ["--config", "predict.yaml", "--register_path", registered, "--predict_data", PROMPT]
    installed.output_of(directory, "python", "run_mindformer.py", *arguments)
    assert ANSWER in (directory / "text_generation_result.txt").read_text()
