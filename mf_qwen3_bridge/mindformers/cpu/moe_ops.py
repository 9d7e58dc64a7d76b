"""Stand-ins for the operators of a mixture of experts; ``inference_ops`` explains the shapes."""

from collections.abc import Sequence
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor
from mindspore.ops.auto_generate import GroupedMatmulV4, MoeInitRoutingV2, MoeTokenUnpermute

from mf_qwen3_bridge.mindformers.cpu.stand_ins import STAND_INS, to_float32, to_tensor


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

    Takes ``x`` (T, hidden_size), and ``expert_idx``, int32 (T, K), of all ranks' ``expert_num`` experts. Upstream's
    other arguments ask for all copies to be kept, and for their numbers (flag 2) or cumulative numbers (1).

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
    return copies, *(to_tensor(array, ms.int32) for array in (np.argsort(order), counts_or_cumsum, counts))


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
    """Multiplies the rows of each expert, which are stored one expert after the other, by the expert's matrix.

    Takes one tensor ``x`` (T*K, input_size), one ``weight`` (experts of this rank, input_size, output_size), and in
    ``group_list``, int64 (experts of this rank,), the number of rows of each.

    Returns:
        One tensor (T*K, output_size) in ``x``'s dtype; sums are kept in float32 and rounded once. Ascend's leaves the
        rows after the last expert's, those of other ranks' experts, uninitialised; here they are NaN.
    """
    unknown = (bias, scale, offset, antiquant_scale, antiquant_offset, pre_token_scale)
    if any(arg is not None for arg in unknown) or (split_item, group_type, group_list_type) != (3, 0, 1):
        raise NotImplementedError("the CPU stand-in for GroupedMatmulV4 knows no bias, quantisation or other grouping")
    (rows,), (matrices,) = x, weight
    *groups, rest = np.split(to_float32(rows), np.cumsum(group_list.asnumpy()))
    products = [
        group @ matrix.astype(np.float32, copy=False)
        for group, matrix in zip(groups, matrices.asnumpy(), strict=True)
        if len(group)
    ]
    products.append(np.full((len(rest), matrices.shape[2]), np.nan, np.float32))
    return [to_tensor(np.concatenate(products), rows.dtype)]


@STAND_INS.replaces(MoeTokenUnpermute, "__call__")
def _moe_token_unpermute(
    self: Any, permuted_tokens: Tensor, sorted_indices: Tensor, probs: Tensor, padded_mode: bool, restore_shape: None
) -> Tensor:
    """Undoes the sorting by expert, and adds up the outputs of each token's K experts, weighted by their probabilities.

    Takes ``permuted_tokens`` (T*K, hidden_size), in ``sorted_indices``, int32 (T*K,), the rows of the first token's
    copies, then of the second token's..., and ``probs`` (T, K). Returns (T, hidden_size).
    """
    if padded_mode:
        raise NotImplementedError("the CPU stand-in for MoeTokenUnpermute knows no padding")
    rows = to_float32(permuted_tokens)[sorted_indices.asnumpy()].reshape(*probs.shape, -1)
    return to_tensor((rows * to_float32(probs)[..., None]).sum(axis=1), permuted_tokens.dtype)
