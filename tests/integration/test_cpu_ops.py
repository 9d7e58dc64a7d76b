"""The stand-ins for Ascend's operators, in MindFormers' own network.

That every fixture gets transformers' logits and tokens is tested in test_roads.py.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

import mf_qwen3_bridge
from mf_qwen3_bridge.errors import BridgeError
from mf_qwen3_bridge.hf_config import normalise
from mf_qwen3_bridge.mindformers import cpu_ops
from mf_qwen3_bridge.mindformers.network import build_inference_network, network_logits
from tests.integration.conftest import CHECKPOINTS, SMALL_CACHE, golden, greedy_tokens, logits_error


def config_of(name: str) -> dict[str, Any]:
    return normalise(json.loads((CHECKPOINTS / name / "config.json").read_text()))


def build(name: str, **overrides: Any) -> Any:
    """The fixture's network with the fixture's weights, which upstream's own loader reads."""
    network = build_inference_network(config_of(name), **{**SMALL_CACHE, **overrides})
    network.load_weights(str(CHECKPOINTS / name))
    return network


def test_second_generate() -> None:
    """A network that has decoded prefills again, one sequence after the other and in a batch."""
    network, expected = build("untied_fp32"), golden("untied_fp32")
    for g in expected:
        assert greedy_tokens(network, [g.prompt], 12) == [g.tokens[:12]]
    assert greedy_tokens(network, [g.prompt for g in expected[::-1]], 3) == [g.tokens[:3] for g in expected[::-1]]


def test_sequences_that_end_early() -> None:
    network, all_golden = build("untied_fp32"), golden("untied_fp32")
    end = all_golden[0].tokens[2]
    expected = [g.tokens[: g.tokens.index(end) + 1] if end in g.tokens[:12] else g.tokens[:12] for g in all_golden]
    assert len({*map(len, expected)}) > 1, "all sequences end together: choose another end token"
    assert greedy_tokens(network, [g.prompt for g in all_golden], 12, eos_token_id=[end]) == expected


def test_generate_knows_where_a_text_ends_and_takes_no_token_away() -> None:
    """Without arguments: the checkpoint's own end token; and a prompt may end with any token."""
    network, first = mf_qwen3_bridge.from_pretrained(CHECKPOINTS / "untied_fp32"), golden("untied_fp32")[0]
    end = json.loads((CHECKPOINTS / "untied_fp32" / "generation_config.json").read_text())["eos_token_id"]
    assert network.generation_config.eos_token_id == (end if isinstance(end, list) else [end])
    (output,) = network.generate(input_ids=[first.prompt], max_new_tokens=4, do_sample=False)
    assert output.tolist() == first.prompt + first.tokens[:4]
    network.generation_config.eos_token_id = [first.tokens[2]]
    (output,) = network.generate(input_ids=[first.prompt], max_new_tokens=9, do_sample=False)
    assert output.tolist() == first.prompt + first.tokens[: first.tokens.index(first.tokens[2]) + 1]


def test_sampling() -> None:
    network, first = build("untied_fp32"), golden("untied_fp32")[0]
    options = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "eos_token_id": [-1], "pad_token_id": -1}
    (narrow,) = network.generate(input_ids=[first.prompt], max_new_tokens=8, top_k=1, **options)
    assert narrow.tolist() == first.prompt + first.tokens[:8]
    (wide,) = network.generate(input_ids=[first.prompt], max_new_tokens=8, top_k=0, **options)
    assert len(wide) == len(narrow)


def test_as_many_tokens_as_positions() -> None:
    """The rotary table of a prefill is then as long as a table that was gathered for each token."""
    expected = golden("untied_fp32")
    network = build("untied_fp32", max_position_embeddings=sum(len(g.prompt) for g in expected))
    assert greedy_tokens(network, [g.prompt for g in expected], 1) == [g.tokens[:1] for g in expected]


def test_upstreams_default_block_size() -> None:
    expected = golden("one_kv_head")
    network = build("one_kv_head", block_size=32, num_blocks=1024)
    assert greedy_tokens(network, [g.prompt for g in expected], 16) == [g.tokens[:16] for g in expected]


def test_networks_of_one_process_keep_their_own_rope() -> None:
    config, expected = config_of("yarn"), golden("yarn")[-1:]
    other_scaling = config["rope_scaling"] | {"factor": 2 * config["rope_scaling"]["factor"]}
    other = build("yarn", rope_scaling=other_scaling)
    network = build("yarn")
    assert logits_error(network, expected) < 1e-5
    assert logits_error(other, expected) > 1e-3


@pytest.mark.parametrize(
    "dtypes",
    [
        {"params_dtype": "bfloat16"},
        {"params_dtype": "bfloat16", "compute_dtype": "bfloat16", "rotary_dtype": "bfloat16"},
    ],
    ids=["parameters", "everything"],
)
@pytest.mark.parametrize("name", ["untied_fp32", "tied_bf16"])
def test_bfloat16(name: str, dtypes: dict[str, str]) -> None:
    network, expected = build(name, **dtypes), golden(name)
    assert logits_error(network, expected) < 0.05
    first = [int(network_logits(network, g.prompt)[-1].argmax()) for g in expected]
    assert [tokens[0] for tokens in greedy_tokens(network, [g.prompt for g in expected], 3)] == first


def test_uninstall_gives_everything_back() -> None:
    def attributes() -> list[Any]:
        return [vars(owner)[name] for owner, name, _ in cpu_ops._STAND_INS]

    cpu_ops.uninstall()
    upstream = attributes()
    assert not [function for function in upstream if function.__module__ == cpu_ops.__name__]
    cpu_ops.install()
    cpu_ops.install()
    assert attributes() == [stand_in for _, _, stand_in in cpu_ops._STAND_INS]
    cpu_ops.uninstall()
    cpu_ops.uninstall()
    assert all(ours is theirs for ours, theirs in zip(attributes(), upstream))


def test_install_leaves_other_devices_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_ops.uninstall()
    monkeypatch.setattr(cpu_ops.ms, "get_context", {"device_target": "Ascend"}.__getitem__)
    cpu_ops.install()
    assert not cpu_ops._UPSTREAM


def test_another_device_is_refused() -> None:
    build_inference_network(config_of("untied_fp32"))
    with pytest.raises(BridgeError, match="no Ascend NPU"):
        build_inference_network(config_of("untied_fp32"), device_target="Ascend")
