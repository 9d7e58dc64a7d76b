"""Detects how the rows of fused parameters are laid out, by comparing them with rows that are known.

A fused parameter does not show its layout: q, k, v or gate, up make a tensor of the same shape in every one. Where the
rows that it should hold are known, from the base model or from another copy of the weights, some of them tell.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

import numpy as np

from mf_qwen3_bridge.errors import BridgeError, Problem, refuse
from mf_qwen3_bridge.inputs.identify import Weights, open_weights
from mf_qwen3_bridge.inputs.preflight import CheckedCheckpoint
from mf_qwen3_bridge.model.layouts import Box, Layout
from mf_qwen3_bridge.model.rules import RowsRule, fused_rows, model_rules
from mf_qwen3_bridge.transfer.plan import Target

# Rows of each part of a fused parameter that are compared.
_SAMPLED_ROWS = 6
# Cosine of the rows of trained weights and of those that training began with; of unrelated rows it is near 0. Another
# layout is as good as this one if its cosine is hardly larger: some rows are stored at the same place in both.
_ALIKE, _MARGIN = 0.5, 0.9


def layouts_of(rule: RowsRule) -> Iterator[Layout]:
    """The layouts that a fused parameter may have, the default first: interleaved, or contiguous in so many blocks."""
    yield Layout(True, True)
    for size in (1, 2, 4, 8, 16):
        if not any(rows % size for rows in (rule.groups, *rule.rows)):
            yield Layout(False, False).on(size)


def arrangement_of(layout: Layout, fuses: str | None) -> Layout:
    """The candidate of :func:`layouts_of` that lays out QKV, or gate/up, as ``layout`` does."""
    if layout.interleaved_qkv if fuses == "qkv" else layout.interleaved_gate_up:
        return Layout(True, True)
    return Layout(False, False).on(layout.tensor_parallel)


def describe(arrangement: Layout) -> str:
    """A candidate of :func:`layouts_of`, for a person: ``interleaved`` or ``contiguous``."""
    if arrangement.interleaved_qkv:
        return "interleaved"
    blocks = arrangement.tensor_parallel
    return "contiguous" if blocks == 1 else f"contiguous in the blocks of {blocks} tensor parallel ranks"


def sampled_rows(rule: RowsRule) -> dict[str, np.ndarray]:
    """Some rows of each part, spread over all of it: int64."""
    return {
        name: np.unique(np.linspace(0, rows - 1, _SAMPLED_ROWS).astype(np.int64))
        for name, rows in zip(rule.tensors, rule.rows)
    }


def cosine(left: np.ndarray, right: np.ndarray) -> float:
    """The cosine of two arrays."""
    norms = np.linalg.norm(left) * np.linalg.norm(right)
    return float((left * right).sum() / norms) if norms else 0.0


def likeness_of_layouts(
    rule: RowsRule,
    fused: Weights | np.ndarray,
    expected: Mapping[str, np.ndarray],
    similarity: Callable[[np.ndarray, np.ndarray], float],
    candidates: Iterable[Layout] | None = None,
) -> dict[Layout, float]:
    """How much a fused parameter looks like known rows, if it is laid out in each of several ways.

    Args:
        rule: the parameter's.
        fused: the parameter itself, or MindFormers weights that hold it.
        expected: by Hugging Face name, the rows of each part that :func:`sampled_rows` chooses.
        similarity: compares two arrays of rows; its result is given for each layout.
        candidates: the layouts; all by default.
    """
    chosen = sampled_rows(rule)
    wanted = np.concatenate([expected[name] for name in rule.tensors])
    found = {}
    for layout in candidates or layouts_of(rule):
        stored = fused_rows(rule, layout)
        rows = np.concatenate([stored[name][chosen[name]] for name in rule.tensors])
        there = fused[rows] if isinstance(fused, np.ndarray) else read_rows(fused, rule.parameter, rows)
        found[layout] = similarity(there, wanted)
    return found


def read_rows(weights: Weights, tensor: str, rows: Iterable[int]) -> np.ndarray:
    """Some rows of a tensor, as it is stored: float64 (rows, columns)."""
    target = Target.of(weights.source.tensors[tensor])
    return np.concatenate([target.block(Box((row, row + 1))).make() for row in map(int, rows)]).astype(np.float64)


def read_sampled_rows(weights: Weights, rule: RowsRule) -> dict[str, np.ndarray]:
    """The rows of each part of a fused parameter that :func:`sampled_rows` chooses, by Hugging Face name."""
    chosen = sampled_rows(rule)
    if weights.dialect.is_hf:
        return {name: read_rows(weights, name, chosen[name]) for name in rule.tensors}
    assert weights.dialect.layout
    stored = fused_rows(rule, weights.dialect.layout)
    return {name: read_rows(weights, rule.parameter, stored[name][chosen[name]]) for name in rule.tensors}


def check_layout(trained: CheckedCheckpoint) -> bool:
    """Whether the weights in ``hf_dir``, if it has any of the same shapes, show that the layout is the right one.

    They don't if the model was not trained from them. BridgeError if they show that it is another one.
    """
    layout, base = trained.dialect.layout, _base(trained)
    if layout is None or base is None:
        return False
    of_first_layer = model_rules(replace(trained.spec, num_layers=1))
    # QKV, and in dense models gate/up; experts have one layout.
    fused = [rule for rule in of_first_layer if isinstance(rule, RowsRule) and rule.fuses]
    problems, shown = [], []
    word = "declared" if trained.layout_is_declared else "assumed"
    for rule in fused:
        shapes = [tensor.shape if (tensor := base.source.tensors.get(part)) else None for part in rule.tensors]
        if shapes != [(rows, *rule.columns) for rows in rule.rows]:
            return False
        mine = arrangement_of(layout, rule.fuses)
        candidates = dict.fromkeys([mine, *layouts_of(rule)])
        alike = likeness_of_layouts(rule, trained, read_sampled_rows(base, rule), cosine, candidates)
        best = max(alike, key=lambda candidate: alike[candidate])
        shown.append(alike[mine] > _ALIKE)
        if alike[best] > _ALIKE and alike[mine] < _MARGIN * alike[best]:
            found = f"{word} {describe(mine)}\nits rows are like those of {trained.hf_dir} if it is {describe(best)}"
            problems.append(Problem(f"layout of {rule.fuses}", found, _remedy(rule.fuses, best)))
    refuse(f"{trained.source.path} is in another layout than {word}", problems)
    return all(shown)


def _base(trained: CheckedCheckpoint) -> Weights | None:
    """The weights in the Hugging Face directory, if it holds any that are whole."""
    if trained.hf_dir == trained.source.path or not any(trained.hf_dir.glob("*.safetensors")):
        return None
    try:
        return open_weights(trained.hf_dir)
    except BridgeError:
        return None


def _remedy(fuses: str | None, layout: Layout) -> str:
    flag = next(flag for flag in layout.training_flags if flag.endswith("attention") == (fuses == "qkv"))
    blocks = layout.tensor_parallel
    size = f", use_parallel True and parallel_config.model_parallel {blocks}" if blocks > 1 else ""
    return f"give the training YAML (--config); in it: {flag} {layout.training_flags[flag]}{size}"
