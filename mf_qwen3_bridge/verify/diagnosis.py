"""Suggests why tensors of two checkpoints differ, by comparing some of their rows."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice, permutations

import numpy as np

from mf_qwen3_bridge.inputs import layout_detection as detection
from mf_qwen3_bridge.inputs.identify import Weights
from mf_qwen3_bridge.inputs.layout_detection import describe
from mf_qwen3_bridge.model.layouts import Box, Layout
from mf_qwen3_bridge.model.parameters import expert_of, look_alikes, with_expert
from mf_qwen3_bridge.model.rules import HF, QkvRule, RowsRule, fused_rows
from mf_qwen3_bridge.transfer.copying import Transfer
from mf_qwen3_bridge.transfer.plan import Target

# Rows of a tensor by which it is recognised: enough to distinguish tensors, few enough to compare with many others.
_SAMPLE_ROWS = 4
# Of so many tensors that differ; samples are kept in memory, and an expert is compared with all others.
_MAX_SUGGESTIONS = 500


def suggestions(left: Weights, right: Weights, different: Iterable[str]) -> Iterator[tuple[str, str]]:
    """What may have happened to tensors that differ between two checkpoints of one model.

    Yields (name, suggestion) for those of the first few hundred that look like something. The names are Hugging Face's
    or MindFormers'.
    """
    parts_of = {rule.parameter: rule.tensors for rule in left.rules}
    fused = {part: rule for rule in left.rules if isinstance(rule, RowsRule) and rule.fuses for part in rule.tensors}
    of_layout: dict[str, str | None] = {}
    with Transfer() as transfer:
        samples = _Samples(left, transfer), _Samples(right, transfer)
        for name in islice(different, _MAX_SUGGESTIONS):
            for part in parts_of.get(name, (name,)):
                rule = fused.get(part)
                if rule and rule.parameter not in of_layout:
                    of_layout[rule.parameter] = next(_layout_suggestions(rule, left, right), None)
                suggestion = (of_layout[rule.parameter] if rule else None) or next(_suggestions(part, *samples), None)
                if suggestion:
                    yield name, suggestion
                    break


def _layout_suggestions(rule: RowsRule, left: Weights, right: Weights) -> Iterator[str]:
    """How a fused parameter, or the tensors exported from it, would be the other checkpoint's in another layout."""
    mine, theirs = detection.read_sampled_rows(left, rule), detection.read_sampled_rows(right, rule)
    if all(np.array_equal(mine[part], theirs[part]) for part in rule.tensors):
        return
    for word, weights, expected in (("first", left, theirs), ("second", right, mine)):
        other = right if weights is left else left
        is_trusted = weights.source.declared_layout and not (other.dialect.is_hf or other.source.declared_layout)
        if weights.dialect.layout is None or is_trusted:
            continue
        own = detection.arrangement_of(weights.dialect.layout, rule.fuses)
        candidates = [layout for layout in detection.layouts_of(rule) if layout != own]
        likeness = detection.likeness_of_layouts(rule, weights, expected, np.array_equal, candidates)
        if found := next((layout for layout, alike in likeness.items() if alike), None):
            yield f"the {word} is laid out {describe(found)}, not {describe(own)}: give its training YAML with --config"
    if left.dialect.is_hf and right.dialect.is_hf:
        for assumed, stored in permutations(detection.layouts_of(rule), 2):
            if _is_wrong_export(rule, mine, right, assumed, stored):
                yield (
                    f"the second looks exported in the wrong layout: read as {describe(assumed)}, stored "
                    f"{describe(stored)} (or the first, the other way round): export it again with the training "
                    "YAML (--config)"
                )


def _is_wrong_export(
    rule: RowsRule, mine: dict[str, np.ndarray], right: Weights, assumed: Layout, stored: Layout
) -> bool:
    """Whether the second's tensors are those of the first, fused in one layout and split in another."""
    chosen = detection.sampled_rows(rule)
    true_rows, split = fused_rows(rule, stored), fused_rows(rule, assumed)
    if all(np.array_equal(true_rows[part], split[part]) for part in rule.tensors):
        return False
    # Of each row of the fused parameter the number in [q; k; v], as the wrong layout splits it.
    number_of = np.argsort(np.concatenate([split[part] for part in rule.tensors]))
    starts = np.cumsum([0, *rule.rows])
    for part in rule.tensors:
        for row, expected in zip(chosen[part], mine[part]):
            number = number_of[true_rows[part][row]]
            index = int(np.searchsorted(starts, number, "right")) - 1
            found = detection.read_rows(right, rule.tensors[index], [number - starts[index]])
            if not np.array_equal(found[0], expected):
                return False
    return True


@dataclass
class _Samples:
    """The first rows of a checkpoint's tensors, under Hugging Face's names, read when they are asked for."""

    weights: Weights
    transfer: Transfer
    rows: dict[str, np.ndarray] = field(default_factory=dict)

    @cached_property
    def targets(self) -> dict[str, Target]:
        return {target.name: target for target in self.weights.plan(HF).targets}

    def of(self, name: str, columns: bool = False) -> np.ndarray:
        """The first rows of a tensor, or its first columns, as rows; float32. Empty if there is no such tensor."""
        if name not in self.targets:
            return np.empty((0,), np.float32)
        key = f"{name} columns" if columns else name
        if key not in self.rows:
            shape = self.targets[name].shape
            few = min(_SAMPLE_ROWS if len(shape) > 1 else shape[0], shape[-1] if columns else shape[0])
            box = Box((0, shape[0]), (0, few)) if columns else Box((0, few))
            array = self.targets[name].block(box).make(self.transfer)
            self.rows[key] = (array.T if columns else array).astype(np.float32)
        return self.rows[key]

    def heads(self, name: str) -> np.ndarray:
        """Of queries, keys or values the first row of each head."""
        return self.targets[name].make(self.transfer)[:: self.weights.spec.head_dim].astype(np.float32)


def _suggestions(name: str, mine: _Samples, theirs: _Samples) -> Iterator[str]:
    here, there = mine.of(name), theirs.of(name)
    if not (here.size and there.size):
        return
    for word, array in (("first", here), ("second", there)):
        if not array.any():
            yield f"zero in the {word}"
        if not np.isfinite(array).all():
            yield f"NaN or infinity in the {word}"
    if any(isinstance(rule, QkvRule) and name in rule.tensors for rule in mine.weights.rules):
        heads, others = ([row.tobytes() for row in samples.heads(name)] for samples in (mine, theirs))
        if heads != others and set(heads) == set(others):
            yield "its heads are in another order: another number of KV groups?"
    if np.array_equal(here, there):
        return  # the first rows are alike: something is wrong further on
    for twin in look_alikes(name):
        for word, samples, other in (("first", mine, there), ("second", theirs, here)):
            if np.array_equal(samples.of(twin), other):
                alike, this = (tensor.split(".")[-2] for tensor in (twin, name))
                yield f"the {word}'s {alike} is the other's {this}: swapped?"
    expert = expert_of(name)
    for number in range(mine.weights.spec.num_experts) if expert is not None else ():
        if number != expert and np.array_equal(mine.of(with_expert(name, number)), there):
            yield f"expert {expert} of the second is expert {number} of the first"
    if here.ndim == 2 and np.array_equal(mine.of(name, columns=True), there):
        yield "transposed"
    if here.shape[-1:] == there.shape[-1:] and here.ndim == 2:
        for shift in range(1, len(here)):
            if np.array_equal(here[shift:], there[:-shift]) or np.array_equal(there[shift:], here[:-shift]):
                yield f"rows are off by {shift}"
