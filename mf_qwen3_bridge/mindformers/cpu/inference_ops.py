"""Stand-ins for operators that only Ascend has, so that MindFormers' own inference network runs on a CPU.

The classes, their parameters, the bookkeeping of the paged KV cache and ``generate()`` stay upstream's.
:func:`install` replaces these attributes and nothing else, and only while MindSpore's device target is CPU:

============================== ======================================== =========================================
replaced                       because a CPU lacks                      stand-in
============================== ======================================== =========================================
``GPTModel.construct``         (nothing: upstream's phase flag goes bad) phase from the inputs, then upstream's
``RMSNorm.construct``          ``RmsNorm``                              NumPy, float32
``RotaryEmbedding.construct``  ``ApplyRotaryPosEmb``                    NumPy, float32
``FlashAttention.construct``   ``ReshapeAndCache``,                     NumPy, float32; always reads the KV cache
                               ``FlashAttentionScore``,
                               ``PagedAttention``
``MoeInitRoutingV2.__call__``  the operator                             NumPy, keeps all tokens
``GroupedMatmulV4.__call__``   the operator                             NumPy, float32
``MoeTokenUnpermute.__call__`` the operator                             NumPy, float32
``Gather.__call__``            ``Gather`` of bfloat16                   NumPy; other dtypes upstream's
``MatMul.__call__``            ``MatMul`` of bfloat16                   upstream's in float32, then rounded
``MLP.construct``              ``Sigmoid``, ``Mul`` of bfloat16         likewise
``GroupedMLP.construct``       ``Sigmoid``, ``Mul`` of bfloat16         likewise
``ops.masked_fill``            ``MaskedFill`` of bfloat16               likewise
``mint.nan_to_num``            ``NanToNum`` of bfloat16                 likewise
``layers.all_reduce``          ``InnerCommAllReduce``                   ``ops.AllReduce``
``ProcessGroup.group``         groups of some of the processes          the world, where the group is all of it
``mint.cumsum``                ``CumsumExt``                            ``ops.cumsum``
``mint.argmax``                ``ArgMaxExt``                            ``ops.argmax``
``mint.index_select``          ``IndexSelect``                          ``ops.gather``
``mint.topk``                  ``TopkExt``: routing, sampling           ``ops.topk``
``mint.sort``                  ``SortExt``: sampling                    ``ops.sort``
``mint.zeros``                 ``Zeros`` of bfloat16 (MindSpore 2.7)    NumPy, memory taken on first write
``mint.empty``                 a default device (MindSpore 2.7: Ascend) upstream's, with ``device="CPU"``
============================== ======================================== =========================================

The classes are those of ``mindformers.parallel_core.inference``, alike in MindFormers 1.7.0, 1.8.0 and 1.9.0, in
PyNative mode (``ENFORCE_EAGER``). In shapes, T is the number of tokens of all sequences of a batch, laid one after
the other without padding; B the number of sequences, N of heads, G of query groups (KV heads), D the head_dim; K the
number of experts that each token goes to, E of experts.

A network must be built after :func:`install`: building takes ``mint.zeros``, and its generator keeps the
``mint.argmax`` that it finds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mindspore as ms
import ml_dtypes
import numpy as np
from mindformers.parallel_core.inference.base_models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from mindformers.parallel_core.inference.base_models.gpt.gpt_model import GPTModel
from mindformers.parallel_core.inference.parallel_state import ProcessGroup
from mindformers.parallel_core.inference.tensor_parallel import layers
from mindformers.parallel_core.inference.transformer.flash_attention import FlashAttention
from mindformers.parallel_core.inference.transformer.mlp import MLP
from mindformers.parallel_core.inference.transformer.moe.experts import GroupedMLP
from mindformers.parallel_core.inference.transformer.norm import RMSNorm
from mindspore import Tensor, mint, ops
from mindspore.communication import GlobalComm, get_group_size
from mindspore.ops.auto_generate import GroupedMatmulV4, MoeInitRoutingV2, MoeTokenUnpermute

from mf_qwen3_bridge.mindformers.patching.replacements import Replacements

__all__ = ["install", "uninstall"]

STAND_INS = Replacements()


def install() -> None:
    """Puts the stand-ins in place; does nothing where they already are, or when the device target isn't CPU."""
    if ms.get_context("device_target") == "CPU":
        STAND_INS.install()


def uninstall() -> None:
    """Gives every replaced attribute its upstream value again; does nothing when nothing is installed."""
    STAND_INS.uninstall()


# ---------------------------------------------------------------------------------------------------------- the phase


@STAND_INS.wraps_upstream(GPTModel, "construct")
def _gpt_model_construct(
    upstream: Callable[..., Tensor], self: GPTModel, *args: Any, context_lens_tensor: Tensor, **kwargs: Any
) -> Tensor:
    """Chooses between prefill and decode by what the inputs say, then runs upstream's ``GPTModel.construct``.

    A batch is a prefill when no sequence has tokens in the cache yet: ``context_lens_tensor``, int32 (B,), is all
    zero. Upstream's flag for it is set during a network's first ``generate()`` only, because graph mode compiles a
    graph per phase then; in PyNative mode the prefill of the second ``generate()`` would run as a decode.
    """
    self.is_prefill = not context_lens_tensor.asnumpy().any()
    return upstream(self, *args, context_lens_tensor=context_lens_tensor, **kwargs)


# ------------------------------------------------------------------------------------------- norm, rotary, attention


@STAND_INS.replaces(RMSNorm, "construct")
def _rms_norm_construct(self: RMSNorm, x: Tensor) -> Tensor:
    """``RmsNorm`` over the last axis of ``x`` (..., hidden_size); returns ``x``'s shape and dtype.

    Like Ascend's operator: the input is rounded to ``layernorm_compute_dtype``, the sum of squares is float32's.
    """
    rows = _float32(x.astype(self.compute_type))
    variance = np.mean(np.square(rows), axis=-1, keepdims=True)
    normed = rows / np.sqrt(variance + np.float32(self.eps)) * _float32(self.weight)
    return _tensor(normed, self.compute_type).astype(x.dtype)


@STAND_INS.replaces(RotaryEmbedding, "construct")
def _rotary_embedding_construct(
    self: RotaryEmbedding,
    query: Tensor,
    key: Tensor,
    rotary_pos_cos: Tensor,
    rotary_pos_sin: Tensor,
    seq_lens_tensor: Tensor,
) -> tuple[Tensor, Tensor]:
    """``ApplyRotaryPosEmb`` in its mode "rotate_half".

    Args:
        query: (T, N*D).
        key: (T, G*D).
        rotary_pos_cos: the whole table (positions, D) in prefill, a row per token (T, D) in decode.
        rotary_pos_sin: likewise.
        seq_lens_tensor: int32 (B,), the length of each sequence with what is cached.

    Returns:
        ``query`` and ``key``, rotated, in their own shapes and dtypes.
    """
    if self.rotary_percent < 1.0:
        raise NotImplementedError("the CPU stand-in for RotaryEmbedding rotates whole heads only")
    seq_lens, cos, sin = (tensor.asnumpy() for tensor in (seq_lens_tensor, rotary_pos_cos, rotary_pos_sin))
    if seq_lens.sum() == query.shape[0]:  # nothing is cached: prefill
        positions = np.concatenate([np.arange(length) for length in seq_lens])
        cos, sin = cos[positions], sin[positions]
    cos, sin = cos.astype(np.float32), sin.astype(np.float32)
    return _rotate(query, cos, sin), _rotate(key, cos, sin)


def _rotate(x: Tensor, cos: np.ndarray, sin: np.ndarray) -> Tensor:
    """Rotates every head of ``x`` (T, heads*D) by its token's angles, ``cos`` and ``sin`` float32 (T, D)."""
    num_tokens, head_dim = cos.shape
    heads = _float32(x).reshape(num_tokens, -1, head_dim)
    first, second = np.split(heads, 2, axis=-1)
    half_rotated = np.concatenate([-second, first], axis=-1)
    rotated = heads * cos[:, None] + half_rotated * sin[:, None]
    return _tensor(rotated.reshape(x.shape), x.dtype)


@STAND_INS.replaces(FlashAttention, "construct")
def _flash_attention_construct(
    self: FlashAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slot_mapping: Tensor,
    block_tables: Tensor,
    batch_valid_length: Tensor,
    context_lens_tensor: Tensor,
    q_seq_lens: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    **_: Any,
) -> Tensor:
    """``ReshapeAndCache``, then causal attention over the cache: prefill, decode and what is between in one way.

    Args:
        query: (T, N*D).
        key: (T, G*D), like ``value``.
        slot_mapping: int32 (T,), each token's place in the cache.
        block_tables: int32 (B, max blocks), each sequence's blocks, padded with -1.
        batch_valid_length: int32 (B,), all tokens of each sequence, cached and new.
        context_lens_tensor: int32 (B,), the cached ones.
        q_seq_lens: int32 (B,), the new ones.
        key_cache: (blocks, block_size, G, D), like ``value_cache``; written in place.
        _: what else upstream passes (masks, actual_seq_qlen...); it says the same in another way.

    Returns:
        (T, N*D) in ``query``'s dtype.
    """
    slots, blocks = slot_mapping.asnumpy(), block_tables.asnumpy()
    q_lens, kv_lens = q_seq_lens.asnumpy(), batch_valid_length.asnumpy()
    block_size, head_dim = key_cache.shape[1], key_cache.shape[3]
    _write_cache(key_cache, slots, key)
    _write_cache(value_cache, slots, value)

    queries = _float32(query).reshape(len(slots), -1, head_dim)
    context = np.empty_like(queries)
    stops = np.cumsum(q_lens)
    for start, stop, kv_len, table in zip(stops - q_lens, stops, kv_lens, blocks, strict=True):
        cached = table[: -(-kv_len // block_size)]
        keys, values = (_read_cache(cache, cached)[:kv_len] for cache in (key_cache, value_cache))
        context[start:stop] = _causal_attention(queries[start:stop], keys, values, self.flash_attention.scale_value)
    return _tensor(context.reshape(query.shape), query.dtype)


def _write_cache(cache: Tensor, slots: np.ndarray, rows: Tensor) -> None:
    """Writes ``rows`` (T, G*D) to ``slots`` (T,) of ``cache`` (blocks, block_size, G, D), in place.

    On a CPU ``asnumpy()`` is a view of the tensor's own memory.
    """
    flat = cache.asnumpy().reshape(-1, cache.shape[-2] * cache.shape[-1])
    flat[slots] = rows.asnumpy()


def _read_cache(cache: Tensor, blocks: np.ndarray) -> np.ndarray:
    """The tokens held by ``blocks``, in order: float32 (len(blocks) * block_size, G, D)."""
    return cache.asnumpy()[blocks].astype(np.float32).reshape(-1, *cache.shape[-2:])


def _causal_attention(query: np.ndarray, key: np.ndarray, value: np.ndarray, scale: float) -> np.ndarray:
    """Attention of the last tokens of a sequence to all tokens up to themselves, float32.

    ``query`` (Q, N, D), ``key`` and ``value`` (K, G, D) with Q <= K; returns (Q, N, D).
    """
    (q_len, num_heads, head_dim), (kv_len, num_groups, _) = query.shape, key.shape
    grouped = query.reshape(q_len, num_groups, num_heads // num_groups, head_dim).transpose(1, 2, 0, 3)
    scores = grouped @ key.transpose(1, 2, 0)[:, None] * np.float32(scale)  # (G, N/G, Q, K)
    future = np.triu(np.ones((q_len, kv_len), dtype=bool), k=kv_len - q_len + 1)
    scores[..., future] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    context = weights @ value.transpose(1, 0, 2)[:, None]  # (G, N/G, Q, D)
    return context.transpose(2, 0, 1, 3).reshape(query.shape)


# ------------------------------------------------------------------------------------------------ mixture of experts


@STAND_INS.replaces(MoeInitRoutingV2, "__call__")
def _moe_init_routing(
    self: MoeInitRoutingV2,
    x: Tensor,
    expert_idx: Tensor,
    active_num: int,
    expert_capacity: int,
    expert_num: int,
    drop_pad_mode: int,
    expert_tokens_count_or_cumsum_flag: int,
    expert_tokens_before_capacity_flag: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Copies each token once for each of its K experts, and sorts the copies by expert, then by token.

    Args:
        x: (T, hidden_size).
        expert_idx: int32 (T, K), each token's experts.
        active_num: 0, all copies are kept.
        expert_capacity: of no meaning when all copies are kept.
        expert_num: E, of all ranks together.
        drop_pad_mode: 0, likewise.
        expert_tokens_count_or_cumsum_flag: 2 for the number of copies of each expert, 1 for its cumulative sum.
        expert_tokens_before_capacity_flag: of no meaning when all copies are kept.

    Returns:
        The copies, (T*K, hidden_size) in ``x``'s dtype; and int32 each: the row that each copy went to, in the order
        of ``expert_idx``, (T*K,); the numbers or their cumulative sum, (E,); the numbers, (E,).
    """
    if active_num or drop_pad_mode:
        raise NotImplementedError("the CPU stand-in for MoeInitRoutingV2 keeps all tokens")
    experts = expert_idx.asnumpy()
    order = np.argsort(experts, axis=None, kind="stable")
    counts = np.bincount(experts.ravel(), minlength=expert_num)
    counts_or_cumsum = counts if expert_tokens_count_or_cumsum_flag == 2 else np.cumsum(counts)
    copies = Tensor.from_numpy(x.asnumpy()[order // experts.shape[1]])
    return copies, *(_tensor(array, ms.int32) for array in (np.argsort(order), counts_or_cumsum, counts))


@STAND_INS.replaces(GroupedMatmulV4, "__call__")
def _grouped_matmul(
    self: GroupedMatmulV4,
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: None = None,
    scale: None = None,
    offset: None = None,
    antiquant_scale: None = None,
    antiquant_offset: None = None,
    pre_token_scale: None = None,
    group_list: Tensor = None,
    *,
    split_item: int = 0,
    group_type: int = -1,
    group_list_type: int = 0,
) -> list[Tensor]:
    """Multiplies the rows of each expert, which lie one expert after the other, by the expert's matrix.

    Ascend's leaves the rows after the last expert's, those of other ranks' experts, as they lay in memory; here they
    are NaN.

    Args:
        x: one tensor (T*K, input_size).
        weight: one tensor (experts of this rank, input_size, output_size).
        bias: None; so are all that quantisation needs.
        group_list: int64 (experts of this rank,), the number of rows of each.
        split_item: 3, one tensor for all experts.
        group_type: 0, the rows are grouped.
        group_list_type: 1, ``group_list`` holds numbers, not their cumulative sum.

    Returns:
        One tensor (T*K, output_size) in ``x``'s dtype; sums are kept in float32 and rounded once.
    """
    unknown = (bias, scale, offset, antiquant_scale, antiquant_offset, pre_token_scale)
    if any(arg is not None for arg in unknown) or (split_item, group_type, group_list_type) != (3, 0, 1):
        raise NotImplementedError("the CPU stand-in for GroupedMatmulV4 knows no bias, quantisation or other grouping")
    (rows,), (matrices,) = x, weight
    *groups, rest = np.split(_float32(rows), np.cumsum(group_list.asnumpy()))
    products = [
        group @ matrix.astype(np.float32, copy=False)
        for group, matrix in zip(groups, matrices.asnumpy(), strict=True)
        if len(group)
    ]
    products.append(np.full((len(rest), matrices.shape[2]), np.nan, np.float32))
    return [_tensor(np.concatenate(products), rows.dtype)]


@STAND_INS.replaces(MoeTokenUnpermute, "__call__")
def _moe_token_unpermute(
    self: MoeTokenUnpermute,
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    probs: Tensor,
    padded_mode: bool = False,
    restore_shape: None = None,
) -> Tensor:
    """Undoes the sorting by expert, and adds up what the K experts of each token say, each times its probability.

    Args:
        permuted_tokens: (T*K, hidden_size).
        sorted_indices: int32 (T*K,), the rows of the first token's K copies, then of the second token's...
        probs: (T, K).
        padded_mode: False.
        restore_shape: only for ``padded_mode``.

    Returns:
        (T, hidden_size) in ``permuted_tokens``' dtype.
    """
    if padded_mode:
        raise NotImplementedError("the CPU stand-in for MoeTokenUnpermute knows no padding")
    rows = _float32(permuted_tokens)[sorted_indices.asnumpy()].reshape(*probs.shape, -1)
    return _tensor((rows * _float32(probs)[..., None]).sum(axis=1), permuted_tokens.dtype)


# --------------------------------------------------------------------------------------- bfloat16 arithmetic in float32


@STAND_INS.wraps_upstream(ops.Gather, "__call__")
def _gather(
    upstream: Callable[..., Tensor], self: ops.Gather, input_params: Tensor, input_indices: Tensor, axis: int
) -> Tensor:
    """Slices ``input_indices`` (any shape, int) of ``input_params`` along ``axis``, without batch dimensions."""
    if input_params.dtype != ms.bfloat16:
        return upstream(self, input_params, input_indices, axis)
    return Tensor.from_numpy(input_params.asnumpy().take(input_indices.asnumpy(), axis))


@STAND_INS.wraps_upstream(ops.MatMul, "__call__")
@STAND_INS.wraps_upstream(MLP, "construct")
@STAND_INS.wraps_upstream(GroupedMLP, "construct")
@STAND_INS.wraps_upstream(ops, "masked_fill")
@STAND_INS.wraps_upstream(mint, "nan_to_num")
def _compute_in_float32(upstream: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """Upstream's, on float32 if it is given bfloat16; as on Ascend, sums are then kept in float32 and rounded once."""
    if not any(map(_is_bfloat16, args)):
        return upstream(*args, **kwargs)
    widened = (arg.astype(ms.float32) if _is_bfloat16(arg) else arg for arg in args)
    return upstream(*widened, **kwargs).astype(ms.bfloat16)


def _is_bfloat16(arg: Any) -> bool:
    return isinstance(arg, Tensor) and arg.dtype == ms.bfloat16


# ------------------------------------------------------------------------------------------------- several processes


@STAND_INS.replaces(layers, "all_reduce")
def _all_reduce(tensor: Tensor, op: str = ops.ReduceOp.SUM, group: str | None = None) -> tuple[Tensor, None]:
    """The sum of all processes' tensors."""
    return ops.AllReduce(op, group)(tensor), None


@STAND_INS.derives(ProcessGroup, "group")
def _group(upstream: property) -> property:
    """The name of a group. A CPU knows one group only, that of all processes."""

    def group(self: ProcessGroup) -> str:
        if self.size != get_group_size():
            raise NotImplementedError(f"on CPUs all processes form one group, not {self.global_ranks}")
        return str(GlobalComm.WORLD_COMM_GROUP)

    return property(group)


# --------------------------------------------------------------------------------------------------- mindspore.mint


@STAND_INS.replaces(mint, "cumsum")
def _cumsum(input: Tensor, dim: int, dtype: Any = None) -> Tensor:
    return ops.cumsum(input, dim, dtype)


@STAND_INS.replaces(mint, "argmax")
def _argmax(input: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    return ops.argmax(input, dim, keepdim)


@STAND_INS.replaces(mint, "topk")
def _topk(input: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> tuple[Tensor, Tensor]:
    return ops.topk(input, k, dim, largest, sorted)


@STAND_INS.replaces(mint, "index_select")
def _index_select(input: Tensor, dim: int, index: Tensor) -> Tensor:
    return ops.gather(input, index, dim)


@STAND_INS.replaces(mint, "sort")
def _sort(input: Tensor, *, dim: int = -1, descending: bool = False, stable: bool = False) -> tuple[Tensor, Tensor]:
    return ops.sort(input, dim, descending)


@STAND_INS.wraps_upstream(mint, "zeros")
def _zeros(upstream: Callable[..., Tensor], size: Any, *, dtype: Any = None) -> Tensor:
    """NumPy's zeros take memory when they are first written to: upstream's default KV cache is several GB."""
    floats = {None: np.float32, ms.float32: np.float32, ms.float16: np.float16, ms.bfloat16: ml_dtypes.bfloat16}
    numpy_dtype = floats.get(dtype)
    if numpy_dtype is None:
        return upstream(size, dtype=dtype)
    return Tensor.from_numpy(np.zeros(size, numpy_dtype))


@STAND_INS.wraps_upstream(mint, "empty")
def _empty(upstream: Callable[..., Tensor], *size: Any, device: str | None = None, **kwargs: Any) -> Tensor:
    return upstream(*size, device=device or "CPU", **kwargs)


# --------------------------------------------------------------------------------------------------------- conversions


def _float32(x: Tensor) -> np.ndarray:
    return x.asnumpy().astype(np.float32, copy=False)


def _tensor(array: np.ndarray, dtype: Any) -> Tensor:
    return Tensor.from_numpy(array).astype(dtype)
