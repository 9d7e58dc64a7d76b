"""The released sizes, by their headers: the numbers of the README, and the table of its first problem."""

from __future__ import annotations

from pathlib import Path

import pytest

from mf_qwen3_bridge.errors import BridgeError
from mf_qwen3_bridge.inputs.preflight import check
from mf_qwen3_bridge.inputs.summary import summary
from mf_qwen3_bridge.model.released import RELEASED
from tests.support.checkpoints import hf_config, write_headers


@pytest.mark.parametrize("name", RELEASED)
def test_every_released_size_is_planned(tmp_path: Path, name):
    spec = RELEASED[name]
    model = check(write_headers(tmp_path / name, spec, hf_config(spec), shards=4))
    assert model.spec == spec
    others = 2 if spec.tie_word_embeddings else 3
    hf_layer, mindformers_layer = (9 + 3 * spec.num_experts, 9) if spec.is_moe else (11, 8)
    text = "\n".join(summary(model))
    assert f"{hf_layer * spec.num_layers + others} tensors become" in text
    assert f"become {mindformers_layer * spec.num_layers + others} MindFormers parameters" in text


def test_the_counts_of_qwen3_14b(tmp_path: Path):
    spec = RELEASED["Qwen3-14B"]
    model = check(write_headers(tmp_path / "Qwen3-14B", spec, hf_config(spec), shards=8))
    assert "443 tensors become 323 MindFormers parameters" in "\n".join(summary(model))


def test_the_config_of_8b_beside_the_weights_of_14b(tmp_path: Path):
    """``... shape mismatch, got (151936, 4096) in net and (151936, 5120) in parameter_dict``, at once and in full."""
    config = hf_config(RELEASED["Qwen3-8B"])
    directory = write_headers(tmp_path / "Qwen3-14B", RELEASED["Qwen3-14B"], config, shards=8)
    with pytest.raises(BridgeError) as error:
        check(directory)
    rows = {problem.subject: problem for problem in error.value.problems}
    assert list(rows) == ["num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size"]
    assert rows["hidden_size"].found.splitlines() == [
        "config.json: 4096",
        "weights: 5120 (model.embed_tokens.weight (151936, 5120))",
    ]
    assert "set hidden_size to 5120 in config.json" in rows["hidden_size"].remedy
