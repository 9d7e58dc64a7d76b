"""Describes an opened checkpoint: its tensors, and what its files declare, whoever wrote them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from mf_qwen3_bridge.errors import BridgeError, Problem, refuse
from mf_qwen3_bridge.model.layouts import Layout
from mf_qwen3_bridge.model.lora import Side, adapted_parameter
from mf_qwen3_bridge.model.parameters import is_hf_name
from mf_qwen3_bridge.transfer.safetensors import TensorInfo

# The index of a directory: Hugging Face's, and MindFormers'.
HF_INDEX = "model.safetensors.index.json"
MINDFORMERS_INDEX = "param_name_map.json"
# ms.unified_safetensors puts here what rank 0 held beside the merged weights: counters, and its slices of the
# optimizer state.
HYPER_PARAMETERS = "hyper_param.safetensors"
# A directory that is still being written, or whose writing was interrupted.
UNFINISHED_SUFFIX = ".incomplete"
# Keys of the metadata that the bridge writes into every MindFormers file: the layout; or, of merged files whose layout
# only the training YAML declares, how many tensor parallel ranks saved them.
LAYOUT_KEY = "mf_qwen3_bridge.layout"
TENSOR_PARALLEL_KEY = "mf_qwen3_bridge.tensor_parallel"


class MergedAdapter(NamedTuple):
    """An adapter that is added to the weights, as the user is told: what it is, and what is unusual about it."""

    description: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """The tensors of a checkpoint, not read yet, and what its files declare.

    Attributes:
        tensors: by name; each is stored whole, or in shards.
        metadata: what the headers of all files have in common.
        contradictions: for each key of the metadata that files contradict each other on, what they declare.
        strategies_tensor_parallel: how many tensor parallel ranks saved it, by its strategy files.
        unlisted: of ranks' files, tensors of the first rank that no strategy file lists, such as ``global_step``.
        left_out: of ranks' files, names of tensors that were not wanted.
        adapters: what is added to the weights when they are read.
        quantization: how Hugging Face's weights are quantised, for a person; empty if they are not.
        stored: the tensors as they are stored, if some of ``tensors`` are computed from them.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] = field(default_factory=dict)
    contradictions: Mapping[str, Sequence[str | None]] = field(default_factory=dict)
    strategies_tensor_parallel: int | None = None
    unlisted: Mapping[str, TensorInfo] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    adapters: tuple[MergedAdapter, ...] = ()
    quantization: str = ""
    stored: Mapping[str, TensorInfo] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def directory(self) -> Path:
        """The directory it is in."""
        return self.path if self.path.is_dir() else self.path.parent

    @cached_property
    def files(self) -> list[Path]:
        """The files that hold its tensors."""
        return sorted({file for tensor in self.tensors.values() for file in tensor.files})

    @cached_property
    def is_hf(self) -> bool:
        """Whether the tensors have Hugging Face's names; BridgeError if they have neither its nor MindFormers'."""
        if any(map(is_hf_name, self.tensors)):
            return True
        if not any(name.startswith(("decoder.", "embedding.")) for name in self.tensors):
            some = ", ".join(sorted(self.tensors)[:3])
            if any(".lora_" in name for name in self.tensors):
                remedy = "name its base model, and the adapter with --adapter"
                raise BridgeError(f"{self.path} holds a PEFT adapter, no model's weights: {remedy}")
            raise BridgeError(f"{self.path}: the tensors' names are neither Hugging Face's nor MindFormers' ({some})")
        return False

    @cached_property
    def has_experts(self) -> bool:
        """Whether the tensors are those of a Qwen3-MoE."""
        return any(".experts." in name for name in self.tensors)

    @cached_property
    def lora(self) -> dict[str, dict[Side, TensorInfo]]:
        """The matrices of the LoRA that a MindFormers run trained: adapted parameter -> which -> tensor."""
        found: dict[str, dict[Side, TensorInfo]] = {}
        for name, tensor in self.tensors.items():
            if matrix := adapted_parameter(name):
                parameter, side = matrix
                found.setdefault(parameter, {})[side] = tensor
        return found

    @cached_property
    def declared_layout(self) -> Layout | None:
        """The layout that the files' metadata declares; BridgeError if there is no such one, or several."""
        problems = (
            Problem(key, "\n".join(value or "none" for value in self.contradictions[key]), "take all from one source")
            for key in (LAYOUT_KEY, TENSOR_PARALLEL_KEY)
            if key in self.contradictions
        )
        refuse(f"the files of {self.path} declare different layouts", problems)
        declared = self.metadata.get(LAYOUT_KEY)
        try:
            layout = Layout.parse(declared) if declared else None
        except ValueError as error:
            raise BridgeError(f"{self.path}: {error} in the files' metadata; which program wrote it?") from error
        return layout.of_experts if layout and self.has_experts else layout

    @property
    def tensor_parallel(self) -> int | None:
        """How many tensor parallel ranks of a training run saved it, if strategy files or metadata tell."""
        declared = self.metadata.get(TENSOR_PARALLEL_KEY, "")
        number = int(declared) if re.fullmatch("[1-9][0-9]{0,8}", declared) else None
        return self.strategies_tensor_parallel or number
