"""Weights that are slightly wrong: the comparison with upstream and the golden logits must see every one."""

from __future__ import annotations

from collections.abc import Callable

import mindspore as ms
import numpy as np
import pytest

import mf_qwen3_bridge
from mf_qwen3_bridge.layouts import contiguous, interleaved
from mf_qwen3_bridge.spec import ModelSpec
from tests.integration.conftest import CHECKPOINTS, TOLERANCE, bits, golden, logits_error

LAYER = "decoder.layers.1"
QKV, FC1, FC2 = (f"{LAYER}.{name}.weight" for name in ("self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2"))
PROJ, Q_NORM = f"{LAYER}.self_attention.linear_proj.weight", f"{LAYER}.self_attention.q_layernorm.weight"
Change = Callable[[np.ndarray, ModelSpec], np.ndarray]


def rearranged(weight: np.ndarray, rows: list[int], groups: int) -> np.ndarray:
    """A contiguous fused weight as the training network would hold it."""
    result = np.empty_like(weight)
    columns = weight.shape[1:]
    for source, target in zip(contiguous(rows, columns, groups), interleaved(rows, columns, groups)):
        target.of(result)[...] = source.of(weight)
    return result


def qkv_rows(spec: ModelSpec) -> list[int]:
    return [spec.query_rows, spec.key_value_rows, spec.key_value_rows]


def swap_k_and_v(weight: np.ndarray, spec: ModelSpec) -> np.ndarray:
    q, k, v = np.split(weight, np.cumsum(qkv_rows(spec))[:-1])
    return np.concatenate([q, v, k])


def regroup_queries(weight: np.ndarray, spec: ModelSpec) -> np.ndarray:
    """The query heads dealt to twice as many groups as there are."""
    heads = weight[: spec.query_rows].reshape(2 * spec.num_query_groups, -1, spec.head_dim, weight.shape[1])
    return np.concatenate([heads.swapaxes(0, 1).reshape(spec.query_rows, -1), weight[spec.query_rows :]])


def shift_one_row(weight: np.ndarray, _: ModelSpec) -> np.ndarray:
    return np.roll(weight, 1, axis=0)


MUTATIONS: dict[str, tuple[str, Change]] = {
    "k and v swapped": (QKV, swap_k_and_v),
    "gate and up swapped": (FC1, lambda w, s: np.roll(w, s.ffn_hidden_size, axis=0)),
    "QKV interleaved": (QKV, lambda w, s: rearranged(w, qkv_rows(s), s.num_query_groups)),
    "gate/up interleaved": (FC1, lambda w, s: rearranged(w, [s.ffn_hidden_size] * 2, s.ffn_hidden_size)),
    "wrong group count": (QKV, regroup_queries),
    "one tensor zeroed": (PROJ, lambda w, _: np.zeros_like(w)),
    "one norm left at one": (Q_NORM, lambda w, _: np.ones_like(w)),
    "one row off": (FC2, shift_one_row),
    "one row off in QKV": (QKV, shift_one_row),
    "one row zeroed": (FC2, lambda w, _: np.concatenate([np.zeros_like(w[:1]), w[1:]])),
    "embedding one row off": ("embedding.word_embeddings.weight", shift_one_row),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("name", ["untied_fp32", "tied_bf16"])
def test_every_mutation_is_seen(name, mutation):
    network = mf_qwen3_bridge.from_pretrained(CHECKPOINTS / name)
    right, expected = bits(network), golden(name)[:1]
    assert logits_error(network, expected) < TOLERANCE

    parameter_name, change = MUTATIONS[mutation]
    parameter = network.parameters_dict()[parameter_name]
    from mf_qwen3_bridge.preflight import check

    changed = change(parameter.asnumpy().copy(), check(CHECKPOINTS / name).spec)
    assert changed.shape == tuple(parameter.shape)
    parameter.set_data(ms.Tensor.from_numpy(np.ascontiguousarray(changed)))

    assert bits(network) != right
    assert logits_error(network, expected) > 100 * TOLERANCE
