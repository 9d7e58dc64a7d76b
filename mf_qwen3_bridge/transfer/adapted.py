"""Computes weights with low-rank adapters (LoRA) added."""

from dataclasses import dataclass, replace

import numpy as np

from mf_qwen3_bridge.transfer.safetensors import ReadRegion, TensorInfo


@dataclass(frozen=True)
class LowRank:
    """A low-rank update of a weight (out, in): ``scaling * B @ A``, with A (r, in) and B (out, r)."""

    a: TensorInfo
    b: TensorInfo
    scaling: float


@dataclass(frozen=True)
class Adapted:
    """A weight (out, in) plus low-rank updates.

    Mirrors ``merge`` of ``peft/tuners/lora/layer.py``: float32, rounded once, when all updates are added.
    """

    base: TensorInfo
    updates: tuple[LowRank, ...]

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """See :class:`Computed`."""
        return (self.base, *(tensor for update in self.updates for tensor in (update.a, update.b)))

    def region(self, rows: np.ndarray, columns: tuple[int, int], read: ReadRegion) -> np.ndarray:
        """See :class:`Computed`; of B only these rows are read, of A only these columns."""
        result = read(self.base, rows, columns).astype(np.float32)
        for update in self.updates:
            rank = update.a.shape[0]
            a, b = read(update.a, np.arange(rank), columns), read(update.b, rows, (0, rank))
            result += (b.astype(np.float32) @ a.astype(np.float32)) * np.float32(update.scaling)
        return result


def adapted(base: TensorInfo, *updates: LowRank) -> TensorInfo:
    """The tensor that is ``base`` with these updates added."""
    return replace(base, computed=Adapted(base, updates), shards=())
