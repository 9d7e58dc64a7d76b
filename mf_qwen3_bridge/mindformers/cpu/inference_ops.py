"""Replaces operators that only Ascend has, so that MindFormers' own inference network runs on a CPU.

The classes, their parameters, the bookkeeping of the paged KV cache and ``generate()`` stay upstream's.
:func:`install` replaces these attributes and nothing else, and only while MindSpore's device target is CPU:

============================== ======================================== =========================================
replaced                       because a CPU lacks                      stand-in
============================== ======================================== =========================================
``GPTModel.construct``         (nothing: upstream's phase flag is wrong) phase from the inputs, then upstream's
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

Those for attention are in ``attention_ops``, those for experts in ``moe_ops``, the others here.

The classes are those of ``mindformers.parallel_core.inference``, alike in MindFormers 1.7.0, 1.8.0 and 1.9.0, in
PyNative mode (``ENFORCE_EAGER``). In shapes, T is the number of tokens of all sequences of a batch, stored one after
the other without padding; B the number of sequences, N of heads, G of query groups (KV heads), D the head_dim; K the
number of experts that each token goes to, E of experts.

A network must be built after :func:`install`: building takes ``mint.zeros``, and its generator keeps the
``mint.argmax`` that it finds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mindspore as ms
import ml_dtypes
import numpy as np
from mindformers.parallel_core.inference.base_models.gpt.gpt_model import GPTModel
from mindformers.parallel_core.inference.parallel_state import ProcessGroup
from mindformers.parallel_core.inference.tensor_parallel import layers
from mindformers.parallel_core.inference.transformer.mlp import MLP
from mindformers.parallel_core.inference.transformer.moe.experts import GroupedMLP
from mindformers.parallel_core.inference.transformer.norm import RMSNorm
from mindspore import Tensor, mint, ops
from mindspore.communication import GlobalComm, get_group_size

from mf_qwen3_bridge.mindformers.cpu import attention_ops, moe_ops  # noqa: F401  declare their stand-ins
from mf_qwen3_bridge.mindformers.cpu.stand_ins import STAND_INS, to_float32, to_tensor

__all__ = ["STAND_INS", "install", "uninstall"]


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
    """Chooses between prefill and decode by the inputs, then runs upstream's ``GPTModel.construct``.

    A batch is a prefill when no sequence has tokens in the cache yet: ``context_lens_tensor``, int32 (B,), is all
    zero. Upstream's flag for it is set during a network's first ``generate()`` only, because graph mode compiles a
    graph per phase then; in PyNative mode the prefill of the second ``generate()`` would run as a decode.
    """
    self.is_prefill = not context_lens_tensor.asnumpy().any()
    return upstream(self, *args, context_lens_tensor=context_lens_tensor, **kwargs)


# ----------------------------------------------------------------------------------------------------------- norm


@STAND_INS.replaces(RMSNorm, "construct")
def _rms_norm_construct(self: RMSNorm, x: Tensor) -> Tensor:
    """``RmsNorm`` over the last axis of ``x`` (..., hidden_size); returns ``x``'s shape and dtype.

    Like Ascend's operator: the input is rounded to ``layernorm_compute_dtype``, the sum of squares is float32's.
    """
    rows = to_float32(x.astype(self.compute_type))
    variance = np.mean(np.square(rows), axis=-1, keepdims=True)
    normed = rows / np.sqrt(variance + np.float32(self.eps)) * to_float32(self.weight)
    return to_tensor(normed, self.compute_type).astype(x.dtype)


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
