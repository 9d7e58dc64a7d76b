"""Replaces operators that only Ascend has, so that MindFormers' own inference network runs on a CPU.

The classes, their parameters, the bookkeeping of the paged KV cache and ``generate()`` stay upstream's. What is
replaced stands above each stand-in, here, in ``attention_ops`` and in ``moe_ops``; nothing else is.

The classes are those of ``mindformers.parallel_core.inference``, alike in MindFormers 1.7 to 2.1, in PyNative mode
 (``ENFORCE_EAGER``). In shapes, T is the number of tokens of all sequences of a batch, stored one after
the other without padding; B the number of sequences, N of heads, G of query groups (KV heads), D the head_dim; K the
number of experts that each token goes to, E of experts.

A network must be built after the stand-ins are installed: building takes ``mint.zeros``, and its generator keeps the
``mint.argmax`` that it finds.
"""

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
from mf_qwen3_bridge.mindformers.cpu.stand_ins import STAND_INS, rms_norm

__all__ = ["STAND_INS"]


@STAND_INS.wraps_upstream(GPTModel, "construct")
def _gpt_model_construct(
    upstream: Callable[..., Tensor], self: GPTModel, *args: Any, context_lens_tensor: Tensor, **kwargs: Any
) -> Tensor:
    """Upstream's, in the right phase: a prefill if nothing is cached, so if ``context_lens_tensor``, int32 (B,), is 0.

    Upstream sets its flag for it during a network's first ``generate()`` only, because graph mode compiles a graph per
    phase then; in PyNative mode the prefill of the second ``generate()`` would run as a decode.
    """
    self.is_prefill = not context_lens_tensor.asnumpy().any()
    return upstream(self, *args, context_lens_tensor=context_lens_tensor, **kwargs)


STAND_INS.replaces(RMSNorm, "construct")(rms_norm)


# ------------------------------------------------------------- operators that a CPU has, but not in bfloat16: float32's


@STAND_INS.wraps_upstream(ops.Gather, "__call__")
def _gather(
    upstream: Callable[..., Tensor], self: ops.Gather, input_params: Tensor, input_indices: Tensor, axis: int
) -> Tensor:
    """Slices ``input_indices`` (any shape, int) of ``input_params`` along ``axis``, without batch dimensions."""
    if input_params.dtype != ms.bfloat16:
        return upstream(self, input_params, input_indices, axis)
    return Tensor.from_numpy(input_params.asnumpy().take(input_indices.asnumpy(), axis))


@STAND_INS.wraps_upstream(ops.MatMul, "__call__")
@STAND_INS.wraps_upstream((MLP, GroupedMLP), "construct")
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


@STAND_INS.replaces(layers, "all_reduce")
def _all_reduce(tensor: Tensor, op: str = ops.ReduceOp.SUM, group: str | None = None) -> tuple[Tensor, None]:
    """The sum of all processes' tensors, without ``InnerCommAllReduce``: returned (1.7 to 2.0), and in place (2.1)."""
    tensor.assign_value(ops.AllReduce(op, group)(tensor))
    return tensor, None


def _group(self: ProcessGroup) -> str:
    """The name of a group. A CPU knows one group only, that of all processes."""
    if self.size != get_group_size():
        raise NotImplementedError(f"on CPUs all processes form one group, not {self.global_ranks}")
    return str(GlobalComm.WORLD_COMM_GROUP)


STAND_INS.replaces(ProcessGroup, "group")(property(_group))


# -------------------------------------------------- mindspore.mint: CumsumExt, ArgMaxExt, TopkExt, IndexSelect, SortExt


STAND_INS.replaces(mint, "argmax")(ops.argmax)
STAND_INS.replaces(mint, "topk")(ops.topk)


@STAND_INS.replaces(mint, "cumsum")
def _cumsum(input: Tensor, dim: int, dtype: Any = None) -> Tensor:
    return ops.cumsum(input, dim, dtype)


@STAND_INS.replaces(mint, "index_select")
def _index_select(input: Tensor, dim: int, index: Tensor) -> Tensor:
    return ops.gather(input, index, dim)


@STAND_INS.replaces(mint, "sort")
def _sort(input: Tensor, *, dim: int = -1, descending: bool = False, stable: bool = False) -> tuple[Tensor, Tensor]:
    return ops.sort(input, dim, descending)


@STAND_INS.wraps_upstream(mint, "zeros")
def _zeros(upstream: Callable[..., Tensor], size: Any, *, dtype: Any = None) -> Tensor:
    """NumPy's take memory when they are first written to (upstream's KV cache is several GB), and know bfloat16."""
    floats = {None: np.float32, ms.float32: np.float32, ms.float16: np.float16, ms.bfloat16: ml_dtypes.bfloat16}
    return Tensor.from_numpy(np.zeros(size, floats[dtype])) if dtype in floats else upstream(size, dtype=dtype)


@STAND_INS.wraps_upstream(mint, "empty")
def _empty(upstream: Callable[..., Tensor], *size: Any, device: str | None = None, **kwargs: Any) -> Tensor:
    """On the CPU; MindSpore 2.7's default is Ascend."""
    return upstream(*size, device=device or "CPU", **kwargs)
