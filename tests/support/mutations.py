"""Makes one parameter of an inference network slightly wrong."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mf_qwen3_bridge.model.layouts import contiguous, interleaved
from mf_qwen3_bridge.model.spec import ModelSpec

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
    """The query heads assigned to twice as many groups as there are."""
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


MOE_LAYER = "decoder.layers.1.mlp"
WEIGHT1, WEIGHT2, ROUTER = (f"{MOE_LAYER}.{name}" for name in ("experts.weight1", "experts.weight2", "router.weight"))


def change_expert(change: Callable[[np.ndarray], np.ndarray], expert: int = 2) -> Change:
    """A change of one expert's matrix."""

    def changed(weight: np.ndarray, _: ModelSpec) -> np.ndarray:
        weight[expert] = change(weight[expert].copy())
        return weight

    return changed


# In the fixture moe_square, an expert's gate, up and down are square: no shape tells that they are transposed.
MOE_MUTATIONS: dict[str, tuple[str, Change]] = {
    "transposed down of an expert": (WEIGHT2, change_expert(np.transpose)),
    "transposed gate and up of an expert": (
        WEIGHT1,
        change_expert(lambda w: np.hstack([m.T for m in np.hsplit(w, 2)])),
    ),
    "gate and up of an expert swapped": (WEIGHT1, change_expert(lambda w: np.roll(w, w.shape[1] // 2, axis=1))),
    "gate and up of an expert interleaved": (
        WEIGHT1,
        change_expert(lambda w: w.reshape(w.shape[0], 2, -1).swapaxes(1, 2).reshape(w.shape)),
    ),
    "two experts swapped": (WEIGHT1, lambda w, _: w[[1, 0, *range(2, len(w))]]),
    "experts one off": (WEIGHT2, lambda w, _: np.roll(w, 1, axis=0)),
    "one expert zeroed": (WEIGHT2, change_expert(np.zeros_like)),
    "one row of an expert off": (WEIGHT2, change_expert(lambda w: np.roll(w, 1, axis=0))),
    "router one row off": (ROUTER, shift_one_row),
}
