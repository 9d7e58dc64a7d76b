"""The YAMLs that MindFormers ships for Qwen3 are understood as they are."""

from __future__ import annotations

from pathlib import Path

import mindformers
import pytest

from mf_qwen3_bridge.preflight import check
from mf_qwen3_bridge.rules import HF
from tests.tiny import hf_config, write_headers
from tests.unit.test_real_sizes import RELEASED

CONFIGS = Path(mindformers.__file__).parents[1] / "configs" / "qwen3"
YAMLS = sorted(CONFIGS.glob("*.yaml"))


def test_there_are_some():
    assert {"predict_qwen3.yaml", "finetune_qwen3.yaml"} <= {path.name for path in YAMLS}


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.name)
def test_qwen3_32b(tmp_path: Path, path):
    spec = RELEASED["Qwen3-32B"]
    directory = write_headers(tmp_path / "Qwen3-32B", spec, hf_config(spec), shards=4)
    model = check(directory, path)
    assert (model.spec, model.dialect) == (spec, HF)
