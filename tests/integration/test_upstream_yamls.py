"""The YAMLs that MindFormers ships for Qwen3 are understood as they are."""

from __future__ import annotations

from pathlib import Path

import mindformers
import pytest

from mf_qwen3_bridge.errors import BridgeError
from mf_qwen3_bridge.inputs.preflight import check
from mf_qwen3_bridge.model.released import RELEASED
from mf_qwen3_bridge.model.rules import HF
from tests.support.checkpoints import hf_config, write_headers

EXPERTS_PER_TOKEN = {"num_experts_per_tok": 8}

CONFIGS = Path(mindformers.__file__).parents[1] / "configs"
DENSE, MOE = (sorted((CONFIGS / name).glob("*.yaml")) for name in ("qwen3", "qwen3_moe"))


def test_there_are_some():
    assert {"predict_qwen3.yaml", "finetune_qwen3.yaml"} <= {path.name for path in DENSE}
    assert "predict_qwen3_moe.yaml" in {path.name for path in MOE}


@pytest.mark.parametrize(
    ("name", "path"),
    [
        *(("Qwen3-32B", path) for path in DENSE),
        *(("Qwen3-30B-A3B", path) for path in MOE if not path.name.startswith("pretrain")),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_released_sizes(tmp_path: Path, name, path):
    spec = RELEASED[name]
    directory = write_headers(tmp_path / name, spec, hf_config(spec, **EXPERTS_PER_TOKEN), shards=4)
    model = check(directory, path)
    assert (model.spec, model.dialect) == (spec, HF)


def test_the_pretraining_yaml_computes_another_function_than_the_released_model(tmp_path: Path):
    """It leaves the experts' probabilities as they are, and multiplies by 1.5: what it trains is no Qwen3-30B-A3B."""
    spec = RELEASED["Qwen3-30B-A3B"]
    directory = write_headers(tmp_path / "hf", spec, hf_config(spec, **EXPERTS_PER_TOKEN), shards=4)
    (pretrain,) = (path for path in MOE if path.name.startswith("pretrain"))
    with pytest.raises(BridgeError) as error:
        check(directory, pretrain)
    subjects = [problem.subject for problem in error.value.problems]
    assert sorted(subjects) == ["moe_router_topk_scaling_factor", "norm_topk_prob"]
