"""The stand-ins for Ascend's operators, in MindFormers' own network.

That every fixture gets transformers' logits and tokens is tested in test_loaders.py.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindformers.parallel_core.inference.parallel_state import ProcessGroup
from mindformers.parallel_core.process_group_config import ModelCommProcessGroups
from mindspore.ops.auto_generate import GroupedMatmulV4, MoeInitRoutingV2, MoeTokenUnpermute

import mf_qwen3_bridge
from mf_qwen3_bridge.errors import BridgeError
from mf_qwen3_bridge.inputs.hf_config import normalise
from mf_qwen3_bridge.mindformers.cpu import inference_ops as cpu_ops
from mf_qwen3_bridge.mindformers.network import build_inference_network, network_logits
from tests.support.golden import CHECKPOINTS, golden
from tests.support.networks import SMALL_CACHE, greedy_tokens, logits_error

MOE = {
    "model_type": "qwen3_moe",
    "vocab_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "moe_intermediate_size": 12,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
}


def config_of(name: str) -> dict[str, Any]:
    return normalise(json.loads((CHECKPOINTS / name / "config.json").read_text()))


def build(name: str, **overrides: Any) -> Any:
    """The fixture's network with the fixture's weights, which upstream's own loader reads."""
    network = build_inference_network(config_of(name) | SMALL_CACHE | overrides)
    network.load_weights(str(CHECKPOINTS / name))
    return network


@pytest.mark.parametrize("name", ["untied_fp32", "moe_fp32"])
def test_second_generate(name: str) -> None:
    """A network that has decoded prefills again, one sequence after the other and in a batch."""
    network, expected = build(name), golden(name)
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
@pytest.mark.parametrize("name", ["untied_fp32", "tied_bf16", "moe_scattered"])
def test_bfloat16(name: str, dtypes: dict[str, str]) -> None:
    network, expected = build(name, **dtypes), golden(name)
    assert logits_error(network, expected) < 0.05
    first = [int(network_logits(network, g.prompt)[-1].argmax()) for g in expected]
    assert [tokens[0] for tokens in greedy_tokens(network, [g.prompt for g in expected], 3)] == first


@pytest.mark.parametrize("dtype", [ms.float32, ms.bfloat16])
def test_tokens_are_sorted_by_expert_and_back(dtype: Any) -> None:
    """Three tokens, two of four experts each; expert 3 gets none."""
    cpu_ops.STAND_INS.install()
    tokens = ms.Tensor([[1, 10], [2, 20], [3, 30]], dtype)
    experts = ms.Tensor([[2, 0], [1, 2], [0, 2]], ms.int32)
    copies, rows, counts, _ = MoeInitRoutingV2()(tokens, experts, 0, 0, 4, 0, 2, True)
    assert copies.dtype == dtype
    assert copies.astype(ms.float32).asnumpy().tolist() == [[1, 10], [3, 30], [2, 20], [1, 10], [2, 20], [3, 30]]
    assert (rows.dtype, rows.asnumpy().tolist()) == (ms.int32, [3, 0, 2, 4, 1, 5])
    assert (counts.dtype, counts.asnumpy().tolist()) == (ms.int32, [2, 1, 3, 0])
    assert MoeInitRoutingV2()(tokens, experts, 0, 0, 4, 0, 1, True)[2].asnumpy().tolist() == [2, 3, 6, 6]

    of_experts = ms.Tensor([[1], [2], [4], [8], [16], [32]], dtype)
    probabilities = ms.Tensor([[0.5, 0.5], [0.25, 0.75], [0, 1]], dtype)
    output = MoeTokenUnpermute()(of_experts, rows, probabilities, False, None)
    assert (output.dtype, output.astype(ms.float32).asnumpy().tolist()) == (dtype, [[4.5], [13], [32]])


@pytest.mark.parametrize("dtype", [ms.float32, ms.bfloat16])
def test_grouped_matmul(dtype: Any) -> None:
    """MindSpore's own example, with an expert that gets no row, and a row that is another rank's."""
    cpu_ops.STAND_INS.install()
    rows = ms.Tensor([[n] * 4 for n in (0, 1, 2, 2, 1, 1, 9)], dtype)
    matrices = np.arange(32).reshape(4, 4, 2)
    weight = ms.Tensor(np.insert(matrices, 2, 99, axis=0), dtype)
    counts = ms.Tensor([1, 2, 0, 1, 2], ms.int64)
    (output,) = GroupedMatmulV4()([rows], [weight], group_list=counts, split_item=3, group_type=0, group_list_type=1)
    *computed, rest = output.astype(ms.float32).asnumpy().tolist()
    assert output.dtype == dtype
    assert computed == [[0, 0], [44, 48], [88, 96], [152, 160], [108, 112], [108, 112]]
    assert np.isnan(rest).all()


def test_other_uses_of_the_operators_are_refused() -> None:
    cpu_ops.STAND_INS.install()
    rows, experts = ms.Tensor([[1.0, 2.0]]), ms.Tensor([[0]], ms.int32)
    with pytest.raises(NotImplementedError, match="MoeInitRoutingV2"):
        MoeInitRoutingV2()(rows, experts, 0, 1, 1, 1, 0, False)
    with pytest.raises(NotImplementedError, match="GroupedMatmulV4"):
        GroupedMatmulV4()([rows], [ms.Tensor([[[1.0], [1.0]]])], group_list=ms.Tensor([1], ms.int64))
    with pytest.raises(NotImplementedError, match="MoeTokenUnpermute"):
        MoeTokenUnpermute()(rows, experts[0], ms.Tensor([[1.0]]), True, (1, 2))


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("expert_ranks", "tensor_ranks"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)])
def test_what_the_ranks_of_a_moe_layer_compute_adds_up(
    expert_ranks: int, tensor_ranks: int, compute_dtype: str
) -> None:
    """Upstream's layer on each rank, one after the other, with this rank's slices of the experts."""
    network = build_inference_network(MOE | SMALL_CACHE | {"compute_dtype": compute_dtype})
    whole, config = network.model.decoder.layers[0].mlp, network.model.config
    rng = np.random.default_rng(0)
    shapes = (whole.router.weight.shape, whole.experts.weight1.shape, whole.experts.weight2.shape)
    router, fc1, fc2 = (rng.standard_normal(shape, np.float32) for shape in shapes)
    tokens = rng.integers(-16, 17, (9, MOE["hidden_size"])).astype(np.float32) / 8  # nothing to round in bfloat16

    output = np.zeros_like(tokens)
    for expert_rank, tensor_rank in itertools.product(range(expert_ranks), range(tensor_ranks)):
        moe_ep, moe_tp = ProcessGroup(size=expert_ranks, rank=expert_rank), ProcessGroup(size=tensor_ranks)
        groups = ModelCommProcessGroups(moe_ep=moe_ep, moe_tp=moe_tp, tp_dp=ProcessGroup())  # of size 1: no all_reduce
        layer = type(whole)(config, whole.submodules, model_comm_pgs=groups)
        gate, up = np.split(np.split(fc1, expert_ranks)[expert_rank], 2, axis=2)
        slices = [np.split(matrices, tensor_ranks, axis=2)[tensor_rank] for matrices in (gate, up)]
        down = np.split(np.split(fc2, expert_ranks)[expert_rank], tensor_ranks, axis=1)[tensor_rank]
        layer.router.weight_loader(layer.router.weight, router)
        layer.experts.weight1.set_data(ms.Tensor(np.concatenate(slices, axis=2)))
        layer.experts.weight2.set_data(ms.Tensor(down))
        output += layer(ms.Tensor(tokens, config.compute_dtype)).astype(ms.float32).asnumpy()

    expected = moe(tokens, router, fc1, fc2, MOE["num_experts_per_tok"])
    tolerance = {"float32": 1e-6, "bfloat16": 0.02}[compute_dtype]
    assert np.abs(output - expected).max() < tolerance * np.abs(expected).max()


def moe(tokens: np.ndarray, router: np.ndarray, fc1: np.ndarray, fc2: np.ndarray, top: int) -> np.ndarray:
    """A mixture of experts by the book: what each token's ``top`` experts say, by their normalised probabilities."""
    output = np.zeros_like(tokens)
    for token, logits, row in zip(tokens, tokens @ router.T, output, strict=True):
        experts = np.argsort(-logits)[:top]
        probabilities = np.exp(logits[experts]) / np.exp(logits[experts]).sum()
        for expert, probability in zip(experts, probabilities, strict=True):
            gate, up = np.split(token @ fc1[expert], 2)
            row += probability * (gate / (1 + np.exp(-gate)) * up) @ fc2[expert]
    return output


def test_uninstall_gives_everything_back() -> None:
    declarations = cpu_ops.STAND_INS.declarations

    def attributes() -> list[Any]:
        return [vars(declared.owner)[declared.name] for declared in declarations]

    cpu_ops.STAND_INS.uninstall()
    upstream = attributes()
    cpu_ops.STAND_INS.install()
    stand_ins = dict(cpu_ops.STAND_INS.installed)
    cpu_ops.STAND_INS.install()
    assert attributes() == [stand_ins[declared.owner, declared.name] for declared in declarations]
    assert not {id(value) for value in upstream} & {id(stand_in) for stand_in in stand_ins.values()}
    cpu_ops.STAND_INS.uninstall()
    cpu_ops.STAND_INS.uninstall()
    assert all(ours is theirs for ours, theirs in zip(attributes(), upstream))


def test_install_leaves_other_devices_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_ops.STAND_INS.uninstall()
    monkeypatch.setattr(cpu_ops.ms, "get_context", {"device_target": "Ascend"}.__getitem__)
    cpu_ops.STAND_INS.install()
    assert not cpu_ops.STAND_INS.installed


def test_another_device_is_refused() -> None:
    build_inference_network(config_of("untied_fp32"))
    with pytest.raises(BridgeError, match="no Ascend NPU"):
        build_inference_network(config_of("untied_fp32"), device_target="Ascend")
