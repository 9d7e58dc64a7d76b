"""Blocks of parameters: any plan, read from blocks or making one, moves the same elements."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mf_qwen3_bridge.inputs.identify import Weights
from mf_qwen3_bridge.inputs.opening import open_source
from mf_qwen3_bridge.inputs.source import Source
from mf_qwen3_bridge.model.layouts import Box, Layout, View
from mf_qwen3_bridge.model.parameters import EMBEDDING, OUTPUT
from mf_qwen3_bridge.model.rules import HF, INFER, TRAIN, Dialect, model_rules
from mf_qwen3_bridge.transfer.blocks import within
from mf_qwen3_bridge.transfer.copying import Transfer, have_equal_bytes
from mf_qwen3_bridge.transfer.plan import Target, make_plan, write_slices
from mf_qwen3_bridge.transfer.safetensors import Reader, Shard, TensorInfo
from mf_qwen3_bridge.verify.comparison import compare
from tests.support.checkpoints import MOE_SPEC, SPEC, Tensors, random_tensors, write

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


def sharded(directory: Path, whole: Tensors, boxes_of: dict[str, list[Box]]) -> dict[str, TensorInfo]:
    """The tensors, each in as many files' tensors as it has blocks."""
    blocks = {f"{name}#{n}": block(whole[name], box) for name in whole for n, box in enumerate(boxes_of[name])}
    on_disk = open_source(write(directory, blocks)).tensors
    tensors = {}
    for name, array in whole.items():
        shards = tuple(Shard(on_disk[f"{name}#{n}"], box) for n, box in enumerate(boxes_of[name]))
        first = shards[0].tensor
        tensors[name] = replace(first, name=name, shape=array.shape, nbytes=array.nbytes, shards=shards)
    return tensors


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), dialect=st.sampled_from(DIALECTS), is_moe=st.booleans(), direction=st.booleans())
def test_blocks_of_any_size(tmp_path_factory, data, dialect, is_moe, direction):
    spec = replace(MOE_SPEC if is_moe else SPEC, num_layers=1)
    directory = tmp_path_factory.mktemp("slices")
    if direction:
        whole = random_tensors(spec, dialect)
        plan = plan_of(write(directory / "whole", whole), spec, dialect, HF)
        expected = {target.name: target.make() for target in plan.targets}
        cut = {name: boxes(data.draw, array.shape) for name, array in whole.items()}
        made = make_plan(model_rules(spec), sharded(directory / "shards", whole, cut), dialect, HF)
    else:
        plan = plan_of(write(directory / "whole", random_tensors(spec)), spec, HF, dialect)
        chosen = {target.name: data.draw(st.sampled_from(boxes(data.draw, target.shape))) for target in plan.targets}
        expected = {target.name: block(target.make(), chosen[target.name]) for target in plan.targets}
        made = write_slices(plan, chosen)
    for target in made.targets:
        np.testing.assert_array_equal(target.make(), expected[target.name], target.name, strict=True)
        assert sum(copy.target_view.size for copy in target.copies) == expected[target.name].size


def plan_of(directory: Path, spec, source: Dialect, target: Dialect):
    return make_plan(model_rules(spec), open_source(directory).tensors, source, target)


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


@pytest.mark.parametrize("row", [None, 0, -1])
@pytest.mark.parametrize("dialect", [HF, TRAIN], ids=str)
def test_a_tied_output_layer_in_other_shards(tmp_path, dialect, row):
    """Whatever the embedding and the output layer are cut into, all of their rows are compared."""
    spec = replace(SPEC, tie_word_embeddings=True)
    whole = random_tensors(spec, dialect)
    kept, dropped = dialect.name(EMBEDDING), dialect.name(OUTPUT)
    whole[dropped] = whole[kept].copy()
    if row is not None:
        whole[dropped][row, -1] += 1
    cut = {name: [Box((0, len(array)))] for name, array in whole.items()}
    cut[kept] = [Box((0, 7)), Box((7, 16))]
    cut[dropped] = [Box((0, 9), (0, 5)), Box((0, 9), (5, 12)), Box((9, 16))]
    plan = make_plan(model_rules(spec), sharded(tmp_path, whole, cut), dialect, INFER)
    ((embedding, output),) = plan.duplicates
    assert len(plan.unequal_duplicates()) == (row is not None)
    for number in range(4):
        is_unequal = not have_equal_bytes(embedding, output, number, 4)
        assert is_unequal == (row is not None and number == row % 4)


def test_a_whole_tensor_in_shards_can_not_be_read_at_once(tmp_path):
    whole = {"a": np.arange(8, dtype=np.float32)}
    tensor = sharded(tmp_path, whole, {"a": [Box((0, 3)), Box((3, 8))]})["a"]
    with Reader() as reader, pytest.raises(ValueError, match="2 shards"):
        reader.read(tensor, 0, memoryview(bytearray(32)))
    np.testing.assert_array_equal(Target.of(tensor).make(), whole["a"])


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), shape=st.sampled_from([(9,), (7, 5), (1, 6), (4, 3, 2)]))
def test_any_range_of_a_tensor_in_shards(tmp_path_factory, data, shape):
    whole = {"a": np.arange(np.prod(shape), dtype=np.float32).reshape(shape)}
    tensors = sharded(tmp_path_factory.mktemp("range"), whole, {"a": boxes(data.draw, shape)})
    start = data.draw(st.integers(0, whole["a"].size - 1))
    out = np.full(data.draw(st.integers(1, whole["a"].size - start)), -1, np.float32)
    with Transfer() as transfer:
        transfer.read(tensors["a"], start, out)
    np.testing.assert_array_equal(out, whole["a"].reshape(-1)[start : start + out.size])


@pytest.mark.parametrize("is_wrong", [False, True])
def test_shards_on_either_side_of_a_comparison(tmp_path, is_wrong):
    train = random_tensors(SPEC, TRAIN)
    cut = {name: [Box((0, 3)), Box((3, len(array)))] for name, array in train.items()}
    cut["decoder.layers.0.mlp.linear_fc2.weight"] = [Box((0, 12), (0, 4)), Box((0, 12), (4, 10))]
    in_shards = Weights(Source(tmp_path, sharded(tmp_path / "a", train, cut)), TRAIN, SPEC)
    if is_wrong:
        train["decoder.layers.0.mlp.linear_fc2.weight"][7, 9] += 1
    whole = Weights(open_source(write(tmp_path / "b", train)), TRAIN, SPEC)
    for sides in (in_shards, whole), (whole, in_shards):
        counts = compare(*sides).different
        assert [different for different, _ in counts.values()] == [1] * is_wrong
