"""Tiles: whatever they are cut into, each element goes where it belongs, once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mf_qwen3_bridge.model.layouts import Layout, View, contiguous, interleaved
from mf_qwen3_bridge.model.rules import HF, HF_STACKED, INFER, TRAIN, Dialect, model_rules
from mf_qwen3_bridge.transfer import tiles as tiles_module
from mf_qwen3_bridge.transfer.plan import make_plan
from mf_qwen3_bridge.transfer.safetensors import TensorInfo
from mf_qwen3_bridge.transfer.tiles import Copy, reads, tiles, writes
from tests.support.checkpoints import MOE_SPEC, SPEC

DIALECTS = [HF, HF_STACKED, INFER, TRAIN, *(Dialect(Layout(a, b)) for a, b in [(True, False), (False, True)])]


def headers(spec, dialect, dtype="BF16"):
    """The tensors of a checkpoint that is nowhere."""
    places = {place.tensor: place for rule in model_rules(spec) for place in rule.places(dialect)}
    size = {"BF16": 2, "F32": 4}[dtype]
    return {
        name: TensorInfo(name, place.shape, dtype, Path("x"), 0, size * int(np.prod(place.shape)))
        for name, place in places.items()
    }


def copies_of(spec, source, target):
    plan = make_plan(model_rules(spec), headers(spec, source), source, target)
    return plan, [copy for target in plan.targets for copy in target.copies]


def indices(view: View, size: int) -> np.ndarray:
    """Which elements a view shows, in its order."""
    return view.of(np.arange(size)).reshape(-1)


@settings(deadline=None, max_examples=60)
@given(
    source=st.sampled_from(DIALECTS),
    target=st.sampled_from(DIALECTS),
    is_moe=st.booleans(),
    tile_bytes=st.sampled_from([2, 64, 300, 1 << 20]),
    page_bytes=st.sampled_from([1, 64, 4096]),
    to_files=st.booleans(),
)
def test_every_element_moves_once(source, target, is_moe, tile_bytes, page_bytes, to_files):
    plan, copies = copies_of(MOE_SPEC if is_moe else SPEC, source, target)
    sizes = {t.name: int(np.prod(t.shape)) for t in plan.targets}
    moved = {name: np.full(size, -1) for name, size in sizes.items()}
    expected = {name: np.full(size, -1) for name, size in sizes.items()}
    for copy in copies:
        elements = copy.source.nbytes // copy.itemsize
        expected[copy.target][indices(copy.target_view, sizes[copy.target])] = indices(copy.source_view, elements)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles_module, "TILE_BYTES", tile_bytes)
        patch.setattr(tiles_module, "_LARGEST_TILE_BYTES", 4 * tile_bytes)
        patch.setattr(tiles_module, "PAGE_BYTES", page_bytes)
        for tile in tiles(copies, to_files):
            check_tile(tile, sizes, moved)
    for name in sizes:
        np.testing.assert_array_equal(moved[name], expected[name])


def check_tile(tile, sizes, moved):
    """Moves a tile's elements as its stretches say: from the file to memory, to memory, to the file."""
    read = {}
    for copies, stretch in reads(tile):
        memory = np.concatenate([np.arange(start, start + stretch.length) for start in stretch.starts])
        read |= {copy: view.of(memory) for copy, view in zip(copies, stretch.views)}
    assert read.keys() == set(tile)
    for copies, stretch in writes(tile):
        made = np.full(stretch.size, -1)
        for copy, view in zip(copies, stretch.views):
            view.of(made)[...] = read[copy]
        assert (made >= 0).all()  # what is written was made, all of it
        for start, run in zip(stretch.starts, made.reshape(len(stretch.starts), -1)):
            there = moved[copies[0].target][start : start + stretch.length]
            assert (there == -1).all()
            there[...] = run


def tensor(name, shape):
    return TensorInfo(name, shape, "BF16", Path("x"), 0, 2 * int(np.prod(shape)))


def test_what_is_stored_interleaved_is_read_in_one_go():
    """gate and up, row by row: a tile reads rows of both, and makes a run of each."""
    fused = tensor("fc1", (2 * 4096, 1024))
    parts = interleaved((4096, 4096), (1024,), 4096)
    copies = [
        Copy(fused, part, name, View.whole((4096, 1, 1024))) for part, name in zip(parts, ("gate", "up"), strict=True)
    ]
    found = list(tiles(copies, to_files=True))
    assert len(found) == 4  # 16 MiB, 4 MiB each
    for number, tile in enumerate(found):
        ((_, stretch),) = reads(tile)
        assert (list(stretch.starts), stretch.length) == ([number * 2048 * 1024], 2048 * 1024)
        assert [(copies[0].target, len(made.starts), made.length) for copies, made in writes(tile)] == [
            ("gate", 1, 1024 * 1024),
            ("up", 1, 1024 * 1024),
        ]


def test_what_is_stored_apart_is_not_read_in_one_go():
    fused = tensor("fc1", (2 * 4096, 1024))
    parts = contiguous((4096, 4096), (1024,), 1)
    copies = [Copy(fused, part, name, View.whole((1, 4096, 1024))) for part, name in zip(parts, "gu", strict=True)]
    assert [len(tile) for tile in tiles(copies)] == [1, 1, 1, 1]


def test_an_expert_is_transposed_as_a_whole():
    """Cut, its rows would be stored in pieces of a few KB."""
    spec = replace(MOE_SPEC, num_layers=1, num_experts=2, hidden_size=2048, moe_ffn_hidden_size=768)
    for source, target in ((HF, TRAIN), (TRAIN, HF)):
        _, copies = copies_of(spec, source, target)
        experts = [tile for tile in tiles(copies, to_files=True) if ".experts." in tile[0].target + tile[0].source.name]
        assert [len(tile) for tile in experts] == [2, 2, 1, 1]  # gate and up of each, down of each
        assert all(len(stretch.starts) == 1 for tile in experts for _, stretch in [*reads(tile), *writes(tile)])


def test_a_tile_is_small():
    spec = replace(SPEC, num_layers=1, hidden_size=4096, num_attention_heads=64, head_dim=128, ffn_hidden_size=5000)
    for source, target in ((HF, TRAIN), (TRAIN, HF), (HF, INFER)):
        _, copies = copies_of(spec, source, target)
        for tile in tiles(copies, to_files=True):
            assert sum(stretch.size * 2 for _, stretch in reads(tile)) <= tiles_module.TILE_BYTES
            assert sum(len(stretch.starts) for _, stretch in writes(tile)) <= 2
