"""Replaces operators that only Ascend has, so that MindFormers' own *training* network runs on a CPU.

The classes, their parameters, upstream's trainer, optimiser and callbacks stay upstream's. What is replaced stands
above each stand-in; nothing else is.

The classes are those of ``mindformers.parallel_core.training_graph`` in MindFormers 1.7.0, 1.8.0 and 1.9.0, in graph
mode: upstream's training network has no other, its ``Morph`` operators refuse PyNative mode. So stand-ins are Cells
and functions that MindSpore can compile, made of operators whose CPU kernels have gradients.

Networks have to be built, computed and trained while the stand-ins are installed, in float32: upstream's Cells make
their operators when they are built, and look some of the others up when they are compiled. The stand-ins stand in for
one process's arithmetic; they carry no sharding strategies.

In shapes, B is the batch size, S the sequence length, N the number of heads, G of query groups (KV heads), D the
head_dim; R the number of rows that experts get (tokens times experts per token), E the number of experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import mindspore as ms
from mindformers.parallel_core.training_graph import activation
from mindformers.parallel_core.training_graph.base_models.common.embeddings import rotary_pos_embedding
from mindformers.parallel_core.training_graph.transformer import attention, flash_attention, mlp, norm
from mindformers.parallel_core.training_graph.transformer.moe import ffn, router, token_dispatcher
from mindspore import Tensor, mint, nn, ops

from mf_qwen3_bridge.mindformers.cpu.stand_ins import rms_norm
from mf_qwen3_bridge.mindformers.replacements import Replacements

STAND_INS = Replacements("CPU")


class _Operator(nn.Cell):
    """A Cell in the place of an operator, whose arguments it takes; sharding and recompute settings are ignored."""

    def shard(self, *args: Any, **kwargs: Any) -> _Operator:
        return self

    add_prim_attr = recompute = shard


def _calling(function: Callable[..., Any]) -> type[_Operator]:
    """An operator that is one of MindSpore's functions, which takes the same arguments in the same order."""

    class Operator(_Operator):
        def construct(self, *args: Any) -> Any:
            return function(*args)

    return Operator


_SplitWithSize = _calling(ops.split)  # MindSpore 2.7 has none for CPUs

STAND_INS.replaces(rotary_pos_embedding, "Outer")(_calling(ops.outer))
STAND_INS.replaces(mlp, "SplitWithSize")(_SplitWithSize)
STAND_INS.replaces(router, "TopkExt")(_calling(ops.topk))
STAND_INS.replaces(token_dispatcher, "IndexSelect")(_calling(ops.index_select))
STAND_INS.replaces(token_dispatcher, "CumsumExt")(_calling(ops.cumsum))
STAND_INS.replaces(token_dispatcher, "FmodScalar")(_calling(ops.floor_mod))  # of integers that aren't negative
STAND_INS.replaces(norm.FusedRMSNorm, "construct")(rms_norm)


class _CastButToFloat16(_Operator):
    """``Cast``, but for casts to float16: Ascend's attention has no float32, and upstream casts to float16 for it."""

    def construct(self, input: Tensor, dtype: Any) -> Tensor:
        return input if dtype == ms.float16 else ops.cast(input, dtype)


@STAND_INS.replaces(activation, "Swiglu_op")
@STAND_INS.replaces(ffn, "Swiglu")
class _Swiglu(_Operator):
    def construct(self, input: Tensor, dim: int = -1) -> Tensor:
        gate, up = ops.split(input, input.shape[dim] // 2, dim)
        return gate * ops.sigmoid(gate) * up


@STAND_INS.replaces(flash_attention, "FlashAttentionScore")
class _FlashAttentionScore(_Operator):
    """``FlashAttentionScore`` with an explicit mask, without dropout."""

    def __init__(
        self, keep_prob: float, scale_value: float, input_layout: str, sparse_mode: int, **unused: Any
    ) -> None:
        super().__init__()
        if (keep_prob, input_layout, sparse_mode) != (1.0, "BNSD", 0):
            raise NotImplementedError(
                "the CPU stand-in for FlashAttentionScore knows attention_dropout 0, input_layout BNSD and sparse_mode "
                f"0 (a whole mask), not {1 - keep_prob}, {input_layout} and {sparse_mode}"
            )
        self.scale_value = scale_value

    def construct(
        self, query: Tensor, key: Tensor, value: Tensor, shift: None, drop: None, pad: None, mask: Tensor, prefix: None
    ) -> tuple[None, None, None, Tensor]:
        """Attention of ``query`` (B, N, S, D) to ``key`` and ``value`` (B, G, S, D).

        ``mask`` (B, 1, S, S), uint8, has 1 where a query doesn't see a key. Returns the operator's four outputs,
        of which upstream takes the last: (B, N, S, D).
        """
        batch, groups, kv_len, head_dim = key.shape
        heads, q_len = query.shape[1:3]
        grouped = ops.cast(query, ms.float32).reshape((batch, groups, -1, head_dim))  # (B, G, N/G * S, D)
        transposed = ops.transpose(ops.cast(key, ms.float32), (0, 1, 3, 2))
        scores = (ops.matmul(grouped, transposed) * self.scale_value).reshape((batch, heads, q_len, kv_len))
        scores = scores + ops.cast(mask, ms.float32) * -1e30  # exp() of it is 0
        weights = ops.softmax(scores, -1).reshape((batch, groups, -1, kv_len))
        context = ops.matmul(weights, ops.cast(value, ms.float32)).reshape(query.shape)
        return None, None, None, ops.cast(context, query.dtype)


@STAND_INS.replaces(mint.nn.functional, "embedding")
def _embedding(input: Tensor, weight: Tensor) -> Tensor:
    """Rows ``input`` of ``weight``, with a gradient; without the options, which upstream leaves alone."""
    return ops.gather(weight, input, 0)


@STAND_INS.replaces(token_dispatcher, "SortExt")
class _SortExt(_Operator):
    def construct(self, input: Tensor, dim: int = -1) -> tuple[Tensor, Tensor]:
        return ops.sort(input, dim)


@STAND_INS.replaces(ffn, "GroupedMatmul")
class _GroupedMatmul(_Operator):
    """Multiplies the rows of each expert, which are stored one expert after the other, by the expert's matrix."""

    def __init__(self, split_item: int = 0, group_type: int = -1) -> None:
        super().__init__()
        if (split_item, group_type) != (3, 0):
            raise NotImplementedError("the CPU stand-in for GroupedMatmul knows split_item 3 and group_type 0")

    def construct(self, x: Sequence[Tensor], weight: Sequence[Tensor], *options: Any) -> tuple[Tensor]:
        """One tensor (R, output_size).

        ``x`` has one tensor (R, input_size), ``weight`` one (E, input_size, output_size); the last option,
        ``group_list``, int64 (E,), holds the row at which each expert's rows end. The others are None.
        """
        rows, group_list = x[0], options[-1]
        numbers = ops.arange(rows.shape[0]).reshape((1, -1, 1))
        stops = group_list.reshape((-1, 1, 1))
        starts = ops.concat((ops.zeros_like(stops[:1]), stops[:-1]))
        is_own = ops.logical_and(numbers >= starts, numbers < stops)  # (E, R, 1)
        return (ops.matmul(ops.cast(is_own, rows.dtype) * rows, weight[0]).sum(0),)


@STAND_INS.replaces(nn.TrainOneStepWithLossScaleCell, "get_overflow_status")
def _get_overflow_status(
    self: nn.TrainOneStepWithLossScaleCell, status: Tensor, compute_output: tuple[Tensor, ...]
) -> Tensor:
    """Whether any gradient, of ``compute_output``, is infinite or not a number; without ``NPUGetFloatStatusV2``."""
    count = ops.zeros((), ms.float32)
    for gradient in compute_output:
        count = count + ops.ReduceSum()(ops.cast(ops.logical_not(ops.isfinite(gradient)), ms.float32))
    return count > 0


@STAND_INS.derives((activation, attention), "aclnn_ops")
def _with_split_and_cast(module: ModuleType) -> ModuleType:
    """A module like ``module``, but for two operators: upstream writes ``aclnn_ops.Cast()``."""
    other = ModuleType(module.__name__)
    vars(other).update(vars(module), SplitWithSize=_SplitWithSize, Cast=_CastButToFloat16)
    return other
