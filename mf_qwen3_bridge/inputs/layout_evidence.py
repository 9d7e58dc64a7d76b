"""In which layout do trained weights lie? Those of the model they were trained from can tell: they are much alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from mf_qwen3_bridge.errors import BridgeError, Problem
from mf_qwen3_bridge.inputs.preflight import Model
from mf_qwen3_bridge.model.layouts import Box, Layout
from mf_qwen3_bridge.model.rules import HF, Dialect, RowsRule
from mf_qwen3_bridge.transfer.plan import make_plan, write_slices
from mf_qwen3_bridge.transfer.safetensors import Checkpoint, TensorInfo, open_checkpoint

# Cosine of rows before and after training; of others it is 0, but some rows lie at one place in two layouts.
_ALIKE, _MARGIN = 0.5, 0.9
_SAMPLED_ENTRIES = 4
_TENSOR_PARALLEL_SIZES = (1, 2, 4, 8, 16)


def check_layout(model: Model) -> bool:
    """Holds trained weights against those in the Hugging Face directory, if there are any of the same shapes.

    Args:
        model: what a training run saved; its ``hf_dir`` may hold the weights that the run began with.

    Returns:
        Whether they show that the layout is the right one. They don't if the model was not trained from them.

    Raises:
        BridgeError: they show that it is another one.
    """
    layout, base = model.dialect.layout, _base(model)
    if layout is None or base is None:
        return False
    problems, shown = [], []
    for part, projection in (("qkv", "k_proj"), ("gate_up", "up_proj")):
        rules = [rule for rule in model.rules if isinstance(rule, RowsRule) and rule.fuses == part]
        if not rules:
            continue  # experts lie in one way only
        alike = _likeness(model, base, rules[0], projection)
        mine = _arrangement(layout, part)
        best = max(alike, key=lambda arrangement: alike[arrangement], default=mine)
        shown.append(alike.get(mine, 0.0) > _ALIKE)
        if alike.get(best, 0.0) > _ALIKE and alike.get(mine, 0.0) < _MARGIN * alike[best]:
            found = f"taken to be {_words(mine)}\n{projection} is like that of {model.hf_dir} if it is {_words(best)}"
            problems.append(Problem(f"layout of {part}", found, _remedy(part, best)))
    if problems:
        raise BridgeError(f"{model.checkpoint.path} lies in another layout", problems)
    return all(shown)


# How one part lies: interleaved (0), or contiguous in so many blocks.
_Arrangement = int


def _arrangement(layout: Layout, part: str) -> _Arrangement:
    is_interleaved = layout.interleaved_qkv if part == "qkv" else layout.interleaved_gate_up
    return 0 if is_interleaved else layout.tensor_parallel


def _words(arrangement: _Arrangement) -> str:
    if arrangement == 0:
        return "interleaved"
    return "contiguous" if arrangement == 1 else f"contiguous in the blocks of {arrangement} tensor parallel ranks"


def _remedy(part: str, arrangement: _Arrangement) -> str:
    flags = Layout(arrangement == 0, arrangement == 0).training_flags
    flag = next(flag for flag in flags if flag.endswith("attention") == (part == "qkv"))
    size = f", use_parallel True and parallel_config.model_parallel {arrangement}" if arrangement > 1 else ""
    return f"give the training YAML (--config); in it: {flag} {flags[flag]}{size}"


def _base(model: Model) -> Checkpoint | None:
    if model.hf_dir == model.checkpoint.path or not any(model.hf_dir.glob("*.safetensors")):
        return None
    try:
        return open_checkpoint(model.hf_dir)
    except BridgeError:
        return None


def _likeness(model: Model, base: Checkpoint, rule: RowsRule, projection: str) -> dict[_Arrangement, float]:
    """For each arrangement how like some rows of ``projection`` are to those of ``base``."""
    (name,) = (name for name in rule.tensors if f".{projection}." in name)
    own = model.dialect.layout
    sizes = {*_TENSOR_PARALLEL_SIZES, own.tensor_parallel if own else 1}
    arrangements = [0, *(size for size in sizes if not any(rows % size for rows in (rule.groups, *rule.rows)))]
    entries = min(_SAMPLED_ENTRIES, rule.groups // max(arrangements))  # as many as the smallest block has
    try:
        expected = _sample(rule, base.tensors, HF, name, entries)
    except (BridgeError, KeyError):  # weights of another model
        return {}
    alike = {}
    for arrangement in arrangements:
        layout = Layout(arrangement == 0, arrangement == 0).on(max(arrangement, 1))
        dialect = replace(model.dialect, layout=layout)
        found = _sample(rule, model.checkpoint.tensors, dialect, name, entries)
        norms = np.linalg.norm(found) * np.linalg.norm(expected)
        alike[arrangement] = float((found * expected).sum() / norms) if norms else 0.0
    return alike


def _sample(rule: RowsRule, tensors: Mapping[str, TensorInfo], dialect: Dialect, name: str, entries: int) -> np.ndarray:
    """The rows of the first groups, ``entries`` of them, of a Hugging Face tensor: float64 (rows, columns)."""
    names = {place.tensor for place in rule.places(dialect)}
    plan = make_plan([rule], {tensor: tensors[tensor] for tensor in names}, dialect, HF)
    rows = rule.rows[rule.tensors.index(name)] // rule.groups * entries
    (target,) = (target for target in write_slices(plan, {name: Box((0, rows))}).targets if target.name == name)
    return target.make().astype(np.float64)
