"""Stand-ins for rotary embedding and attention over a paged KV cache; ``inference_ops`` explains the shapes."""

from typing import Any

import numpy as np
from mindformers.parallel_core.inference.base_models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from mindformers.parallel_core.inference.transformer.flash_attention import FlashAttention
from mindspore import Tensor

from mf_qwen3_bridge.mindformers.cpu.stand_ins import STAND_INS, to_float32, to_tensor


@STAND_INS.replaces(RotaryEmbedding, "construct")
def _rotary_embedding_construct(
    self: Any, query: Tensor, key: Tensor, rotary_pos_cos: Tensor, rotary_pos_sin: Tensor, seq_lens_tensor: Tensor
) -> tuple[Tensor, Tensor]:
    """``ApplyRotaryPosEmb`` in its mode "rotate_half": rotates ``query`` (T, N*D) and ``key`` (T, G*D).

    ``rotary_pos_cos`` and ``rotary_pos_sin`` are the whole table (positions, D) in prefill, and have a row per token
    (T, D) in decode; ``seq_lens_tensor``, int32 (B,), is the length of each sequence with what is cached.
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
    heads = to_float32(x).reshape(num_tokens, -1, head_dim)
    first, second = np.split(heads, 2, axis=-1)
    half_rotated = np.concatenate([-second, first], axis=-1)
    rotated = heads * cos[:, None] + half_rotated * sin[:, None]
    return to_tensor(rotated.reshape(x.shape), x.dtype)


@STAND_INS.replaces(FlashAttention, "construct")
def _flash_attention_construct(
    self: FlashAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slot_mapping: Tensor,
    block_tables: Tensor,
    batch_valid_length: Tensor,
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
        batch_valid_length: int32 (B,), all tokens of each sequence; ``q_seq_lens`` has the new ones.
        key_cache: (blocks, block_size, G, D), like ``value_cache``; written in place.
        _: masks, the cached tokens, ...: the same information in another form.

    Returns:
        (T, N*D) in ``query``'s dtype.
    """
    slots, blocks = slot_mapping.asnumpy(), block_tables.asnumpy()
    q_lens, kv_lens = q_seq_lens.asnumpy(), batch_valid_length.asnumpy()
    block_size, head_dim = key_cache.shape[1], key_cache.shape[3]
    for cache, rows in ((key_cache, key), (value_cache, value)):
        flat = cache.asnumpy().reshape(-1, rows.shape[1])  # on a CPU a view of the tensor's own memory
        flat[slots] = rows.asnumpy()

    queries = to_float32(query).reshape(len(slots), -1, head_dim)
    context = np.empty_like(queries)
    stops = np.cumsum(q_lens)
    for start, stop, kv_len, table in zip(stops - q_lens, stops, kv_lens, blocks, strict=True):
        cached = table[: -(-kv_len // block_size)]
        keys, values = (
            cache.asnumpy()[cached].astype(np.float32).reshape(-1, *cache.shape[-2:])[:kv_len]  # (kv_len, G, D)
            for cache in (key_cache, value_cache)
        )
        context[start:stop] = _causal_attention(queries[start:stop], keys, values, self.flash_attention.scale_value)
    return to_tensor(context.reshape(query.shape), query.dtype)


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
