"""In which layout do trained weights lie? Those of the model they were trained from can tell: they are much alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from mf_qwen3_bridge.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from mf_qwen3_bridge.errors import BridgeError, Problem
from mf_qwen3_bridge.layouts import Layout, View
from mf_qwen3_bridge.plan import Target, make_plan
from mf_qwen3_bridge.preflight import Model
from mf_qwen3_bridge.rules import HF, Dialect, RowsRule
from mf_qwen3_bridge.slices import Slice, read_from_slices

# Cosine of rows before and after training; of others it is 0, but some rows lie at one place in two layouts.
_ALIKE, _MARGIN = 0.5, 0.9
_SAMPLED_ENTRIES = 4
_TENSOR_PARALLEL_SIZES = (1, 2, 4, 8, 16)


def check_layout(model: Model, slices: Mapping[str, Sequence[Slice]] | None = None) -> bool:
    """Holds trained weights against those in the Hugging Face directory, if there are any of the same shapes.

    Args:
        model: what a training run saved; its ``hf_dir`` may hold the weights that the run began with.
        slices: where its blocks are, if they are the ranks' files.

    Returns:
        Whether they show that the layout is the right one. They don't if the model was not trained from them.

    Raises:
        BridgeError: they show that it is another one.
    """
    layout, base = model.dialect.layout, _base(model)
    if layout is None or base is None:
        return False
    problems, shown = [], []
    for part, tensor in (("qkv", "k_proj"), ("gate_up", "up_proj")):
        alike = dict(_likeness(model, base, part, tensor, slices))
        best = max(alike, key=lambda candidate: alike[candidate], default=layout)
        mine = alike.get(layout, 0.0)
        is_fused = any(isinstance(rule, RowsRule) and rule.fuses == part for rule in model.rules)
        shown.append(mine > _ALIKE or not is_fused)
        if alike.get(best, 0.0) > _ALIKE and mine < _MARGIN * alike[best]:
            found = f"taken to be {layout}\n{tensor} is like that of {model.hf_dir} if it is {best}"
            flags = ", ".join(f"{flag} {value}" for flag, value in best.training_flags.items())
            problems.append(Problem(f"layout of {part}", found, f"give the training YAML (--config): {flags}"))
    if problems:
        raise BridgeError(f"{model.checkpoint.path} lies in another layout", problems)
    return all(shown)


def _base(model: Model) -> Checkpoint | None:
    if model.hf_dir == model.checkpoint.path or not any(model.hf_dir.glob("*.safetensors")):
        return None
    try:
        return open_checkpoint(model.hf_dir)
    except BridgeError:
        return None


def _likeness(
    model: Model, base: Checkpoint, part: str, projection: str, slices: Mapping[str, Sequence[Slice]] | None
) -> Iterator[tuple[Layout, float]]:
    """For each layout how like some rows of the first layer's ``projection`` are to those of ``base``."""
    rules = [rule for rule in model.rules if isinstance(rule, RowsRule) and rule.fuses == part]
    names = [name for name in (rules[0].tensors if rules else ()) if f".{projection}." in name]
    if not names or any(name not in base.tensors for name in rules[0].tensors):
        return
    expected = _sample(rules[0], base.tensors, HF, names[0], None)
    flags = [Layout(qkv, gate_up) for qkv in (True, False) for gate_up in (True, False)]
    candidates = [model.dialect.layout, *(layout.on(size) for layout in flags for size in _TENSOR_PARALLEL_SIZES)]
    for layout in filter(None, dict.fromkeys(candidates)):
        if any(rows % layout.tensor_parallel for rows in (rules[0].groups, *rules[0].rows)):
            continue
        found = _sample(rules[0], model.checkpoint.tensors, replace(model.dialect, layout=layout), names[0], slices)
        like = expected[: len(found)]
        norms = np.linalg.norm(found) * np.linalg.norm(like)
        yield layout, float((found * like).sum() / norms) if found.shape == like.shape and norms else 0.0


def _sample(
    rule: RowsRule,
    tensors: Mapping[str, TensorInfo],
    dialect: Dialect,
    name: str,
    slices: Mapping[str, Sequence[Slice]] | None,
) -> np.ndarray:
    """The first entries of a Hugging Face tensor: float64 (entries, rows, columns)."""
    names = {place.tensor for place in rule.places(dialect)}
    plan = make_plan([rule], {tensor: tensors[tensor] for tensor in names}, dialect, HF)
    copy = next(copy for target in plan.targets if target.name == name for copy in target.copies)
    copy = copy.cut(0, 0, min(_SAMPLED_ENTRIES, copy.source_view.shape[0]))
    copy = replace(copy, target_view=View.whole(copy.source_view.shape))
    plan = replace(plan, targets=(Target(name, copy.source_view.shape, copy.source.dtype, (copy,)),))
    return (read_from_slices(plan, slices) if slices else plan).targets[0].make().astype(np.float64)
