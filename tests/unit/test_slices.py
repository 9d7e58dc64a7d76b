"""Blocks of parameters: any plan, read from blocks or making one, moves the same elements."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mf_qwen3_bridge.model.layouts import Box, Layout, View
from mf_qwen3_bridge.model.rules import HF, TRAIN, Dialect, model_rules
from mf_qwen3_bridge.transfer.blocks import Slice, read_from_slices, within, write_slices
from mf_qwen3_bridge.transfer.plan import make_plan
from mf_qwen3_bridge.transfer.safetensors import open_checkpoint
from tests.tiny import MOE_SPEC, SPEC, random_tensors, write

DIALECTS = [Dialect(Layout(qkv, gate_up)) for qkv in (True, False) for gate_up in (True, False)]


def cuts(draw, length: int) -> list[tuple[int, int]]:
    """An axis cut at random places."""
    places = sorted(draw(st.sets(st.integers(1, length - 1), max_size=3))) if length > 1 else []
    return list(zip([0, *places], [*places, length], strict=True))


def boxes(draw, shape) -> list[Box]:
    columns = cuts(draw, shape[1]) if len(shape) == 2 and draw(st.booleans()) else [None]
    return [Box(rows, part) for rows in cuts(draw, shape[0]) for part in columns]


def block(array: np.ndarray, box: Box) -> np.ndarray:
    rows = array[slice(*box.rows)]
    return np.ascontiguousarray(rows[:, slice(*box.columns)] if box.columns else rows)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), dialect=st.sampled_from(DIALECTS), is_moe=st.booleans(), direction=st.booleans())
def test_blocks_of_any_size(tmp_path_factory, data, dialect, is_moe, direction):
    spec = replace(MOE_SPEC if is_moe else SPEC, num_layers=1)
    directory = tmp_path_factory.mktemp("slices")
    if direction:
        whole = random_tensors(spec, dialect)
        plan = plan_of(write(directory / "whole", whole), spec, dialect, HF)
        parts = {
            name: [(box, block(array, box)) for box in boxes(data.draw, array.shape)] for name, array in whole.items()
        }
        blocks = {f"{name}#{n}": part for name, found in parts.items() for n, (_, part) in enumerate(found)}
        on_disk = open_checkpoint(write(directory / "blocks", blocks)).tensors
        slices = {
            name: [Slice(on_disk[f"{name}#{n}"], box) for n, (box, _) in enumerate(found)]
            for name, found in parts.items()
        }
        expected = {target.name: target.make() for target in plan.targets}
        made = read_from_slices(plan, slices)
    else:
        plan = plan_of(write(directory / "whole", random_tensors(spec)), spec, HF, dialect)
        chosen = {target.name: data.draw(st.sampled_from(boxes(data.draw, target.shape))) for target in plan.targets}
        expected = {target.name: block(target.make(), chosen[target.name]) for target in plan.targets}
        made = write_slices(plan, chosen)
    for target in made.targets:
        np.testing.assert_array_equal(target.make(), expected[target.name], target.name, strict=True)
        assert sum(copy.target_view.size for copy in target.copies) == expected[target.name].size


def plan_of(directory: Path, spec, source: Dialect, target: Dialect):
    return make_plan(model_rules(spec), open_checkpoint(directory).tensors, source, target)


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        (Box((0, 2)), [[0, 1, 2], [3, 4, 5]]),
        (Box((1, 3), (1, 3)), [[4, 5], [7, 8]]),
        (Box((3, 4), (0, 1)), [[9]]),
    ],
)
def test_a_block_by_hand(box, expected):
    whole = np.arange(12).reshape(4, 3)
    view = View.whole((12,))  # all of it, in one run
    made = np.full(box.shape(whole.shape), -1)
    for here, there in within(view, view, whole.shape, box):
        here.of(made)[...] = there.of(whole)
    assert made.tolist() == expected


def test_what_is_not_cut_stays_one_copy(tmp_path):
    plan = plan_of(write(tmp_path, random_tensors(SPEC)), SPEC, HF, TRAIN)
    boxes = {target.name: Box((0, target.shape[0] // 2)) for target in plan.targets if len(target.shape) == 2}
    cut = write_slices(plan, boxes)
    for before, after in zip(plan.targets, cut.targets, strict=True):
        assert len(after.copies) == len(before.copies)
