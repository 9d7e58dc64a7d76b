"""Compares what a network computes with the reference, stage by stage, and finds where the error begins."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mf_qwen3_bridge.errors import BridgeError, refuse
from mf_qwen3_bridge.inputs.disagreements import config_rows
from mf_qwen3_bridge.inputs.opening import open_source
from mf_qwen3_bridge.inputs.preflight import CheckedCheckpoint, check_trained
from mf_qwen3_bridge.model.parameters import layer_of
from mf_qwen3_bridge.model.rules import INFER
from mf_qwen3_bridge.transfer.progress import size_text
from mf_qwen3_bridge.verify.reference import EMBEDDED, LOGITS, STAGES, Stage, forward

# What a network may be off that computes in this dtype, relative to the largest value of a stage. A misplaced row makes
# 0.1 and more; in float32 1e-6 is left, in bfloat16 some roundings to 8 bits.
TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
NUM_TOKENS = 16
_SHARE_OF_MEMORY = 0.5
_CGROUP = Path("/sys/fs/cgroup")  # of a container


@dataclass(frozen=True)
class LayerErrors:
    """Of each stage, in order, the largest error relative to the reference's largest value; infinity for NaN.

    An error above ``tolerance`` is no rounding.
    """

    errors: Mapping[Stage, float]
    tolerance: float = TOLERANCES["float32"]

    @property
    def begin(self) -> Stage | None:
        """The first stage that is wrong, if one is."""
        return next((stage for stage, error in self.errors.items() if not error <= self.tolerance), None)

    @property
    def summary(self) -> str:
        """What was found, in a line."""
        if self.begin is None:
            return f"errors up to {max(self.errors.values()):.1e}"
        return f"it begins at {self.begin}, error {self.errors[self.begin]:.1g}"

    @property
    def stages(self) -> list[str]:
        """The names of the stages that a layer has here, in order."""
        return [name for name in STAGES if any(stage.name == name for stage in self.errors)]

    @property
    def num_layers(self) -> int:
        """How many layers were looked at."""
        return 1 + max(stage.layer for stage in self.errors if stage.layer is not None)

    def rows(self) -> Iterator[list[str]]:
        """A row for each layer, a column for each of ``stages``; an exclamation mark where it is wrong."""
        blank = [""] * (len(self.stages) - 1)
        yield ["embedding", *blank, self._cell(EMBEDDED)]
        for number in range(self.num_layers):
            yield [str(number), *(self._cell(Stage(number, name)) for name in self.stages)]
        yield ["logits", *blank, self._cell(LOGITS)]

    def _cell(self, stage: Stage) -> str:
        error = self.errors[stage]
        return f"{error:.1e}" + ("" if error <= self.tolerance else " !")


def check_comparable(
    paths: Sequence[Path], config: Path | None = None, hf_config: Path | None = None, adapters: Any = None
) -> list[CheckedCheckpoint]:
    """Checks one or two checkpoints whose computation is to be compared.

    ``config`` is the YAML of the training run, for MindFormers weights whose files don't declare their layout. Those
    without a config.json get that of ``hf_config``, else of the other. ``adapters`` are PEFT's, of the first. Raises
    BridgeError if they are not whole, or not of one model; if there is no config.json; if the layout of the only one is
    not known.
    """
    own = [path for path in paths if (path / "config.json").is_file()]
    models: list[CheckedCheckpoint] = []
    for path in paths:
        source = open_source(path)
        hf_dir = path if path in own else hf_config or next(iter(own), None)
        given = (hf_dir, None if source.declared_layout else config)
        models.append(check_trained(source, *given, adapters=None if models else adapters))
    first = models[0]
    if not first.hf_config:
        raise BridgeError(f"no config.json beside {paths[0]}: name the model's Hugging Face directory with --hf_config")
    if len(paths) == 1 and not first.dialect.is_hf and not first.source.declared_layout:
        raise BridgeError(
            f"nothing in {paths[0]} declares the layout of QKV and gate/up, and by themselves its weights can't show "
            "it: name what they should be as well, such as the Hugging Face directory (mf-qwen3 verify A B --logits)"
        )
    rows = config_rows({str(path): model.hf_config for path, model in zip(paths, models)})
    refuse("the two do not compute the same: they differ in config.json", rows)
    return models


def layer_errors(
    found: Mapping[Stage, np.ndarray], model: CheckedCheckpoint, token_ids: Sequence[int], dtype: str = "float32"
) -> LayerErrors:
    """Compares what a network computed, float32 (tokens, width) for each stage, with what ``model`` should compute.

    ``dtype`` is the coarsest in which the network computes, as MindFormers calls it.
    """
    errors = {}
    with np.errstate(all="ignore"):  # the value of a wrong stage goes into the next
        stages = forward(model, token_ids, found)
        for stage, right in tqdm(stages, "reference", len(found), disable=None, leave=False, unit="stage"):
            error = float(np.abs(found[stage] - right).max() / np.abs(right).max())
            errors[stage] = error if np.isfinite(error) else float("inf")
    return LayerErrors(errors, TOLERANCES[dtype])


def tokens_for(model: CheckedCheckpoint, most: int = NUM_TOKENS) -> list[int]:
    """A sequence to compute, as long as model and cache let it be: any tokens will do."""
    count = min(NUM_TOKENS, most, model.max_length)
    return np.random.default_rng(0).integers(model.spec.vocab_size, size=count).tolist()


def layers_that_fit(model: CheckedCheckpoint) -> int:
    """How many layers fit into half of the free memory, in float32, with embedding and output layer; at least one."""
    targets = model.plan(INFER, "F32").targets
    layer = sum(target.nbytes for target in targets if layer_of(target.name) == 0)  # others are as large
    fixed = sum(target.nbytes for target in targets if layer_of(target.name) is None)
    available = _available_memory()
    budget = _SHARE_OF_MEMORY * available - fixed - max(target.nbytes for target in targets)
    count = min(model.spec.num_layers, int(budget // layer))
    if count < 1:
        raise BridgeError(
            f"one layer of {model.source.path} takes {size_text(fixed + layer)} with the embedding, "
            f"in float32, and {size_text(available)} are free: --layers 1 tries it all the same"
        )
    return count


def _available_memory() -> int:
    """Bytes that processes can take without others being swapped out, or this container being ended."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    (available,) = (int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    limit = _CGROUP / "memory.max"
    if limit.is_file() and limit.read_text().strip().isdigit():
        used = int((_CGROUP / "memory.current").read_text())
        entries = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        cached = int(entries["file"])  # of files, which go when the memory is needed
        available = min(available, int(limit.read_text()) - used + cached)
    return available
