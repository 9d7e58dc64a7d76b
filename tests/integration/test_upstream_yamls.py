"""The YAMLs that MindFormers ships for Qwen3 are understood as they are."""

from __future__ import annotations

from pathlib import Path

import mindformers
import pytest

from mf_qwen3_bridge.preflight import check
from mf_qwen3_bridge.rules import HF
from tests.tiny import hf_config, write_headers
from tests.unit.test_real_sizes import RELEASED

EXPERTS_PER_TOKEN = {"num_experts_per_tok": 8}

CONFIGS = Path(mindformers.__file__).parents[1] / "configs"
DENSE, MOE = (sorted((CONFIGS / name).glob("*.yaml")) for name in ("qwen3", "qwen3_moe"))


def test_there_are_some():
    assert {"predict_qwen3.yaml", "finetune_qwen3.yaml"} <= {path.name for path in DENSE}
    assert "predict_qwen3_moe.yaml" in {path.name for path in MOE}


@pytest.mark.parametrize(
    ("name", "path"),
    [*(("Qwen3-32B", path) for path in DENSE), *(("Qwen3-30B-A3B", path) for path in MOE)],
    ids=lambda value: getattr(value, "name", value),
)
def test_released_sizes(tmp_path: Path, name, path):
    spec = RELEASED[name]
    directory = write_headers(tmp_path / name, spec, hf_config(spec, **EXPERTS_PER_TOKEN), shards=4)
    model = check(directory, path)
    assert (model.spec, model.dialect) == (spec, HF)
