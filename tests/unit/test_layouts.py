"""Layouts by literal examples that a person can check, and by properties over random shapes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mf_qwen3_bridge.model.layouts import INFERENCE, TRAINING_DEFAULT, Layout, View, contiguous, interleaved

ARRANGEMENTS = pytest.mark.parametrize("arrange", [contiguous, interleaved])


def fuse(arrange, parts, groups):
    """The fused tensor that ``arrange`` makes of ``parts``, [n, columns] each."""
    fused = np.zeros((sum(map(len, parts)), parts[0].shape[1]), parts[0].dtype)
    views = arrange([len(part) for part in parts], (parts[0].shape[1],), groups)
    for view, part in zip(views, parts):
        view.of(fused)[...] = part.reshape(view.shape)
    return fused


def test_qkv_of_two_kv_heads():
    # 4 query heads, 2 KV heads, head_dim 1, hidden_size 1: each row is one head.
    q, k, v = np.array([[10], [11], [12], [13]]), np.array([[20], [21]]), np.array([[30], [31]])

    assert fuse(contiguous, [q, k, v], groups=2).ravel().tolist() == [10, 11, 12, 13, 20, 21, 30, 31]
    assert fuse(interleaved, [q, k, v], groups=2).ravel().tolist() == [10, 11, 20, 30, 12, 13, 21, 31]


def test_qkv_keeps_the_rows_of_a_head_together():
    # 2 query heads and 2 KV heads of head_dim 2.
    q, k, v = (np.arange(4).reshape(4, 1) + start for start in (10, 20, 30))

    assert fuse(interleaved, [q, k, v], groups=2).ravel().tolist() == [10, 11, 20, 21, 30, 31, 12, 13, 22, 23, 32, 33]


def test_gate_and_up():
    gate, up = np.array([[1, 2], [3, 4]]), np.array([[5, 6], [7, 8]])

    assert fuse(contiguous, [gate, up], groups=2).tolist() == [[1, 2], [3, 4], [5, 6], [7, 8]]
    assert fuse(interleaved, [gate, up], groups=2).tolist() == [[1, 2], [5, 6], [3, 4], [7, 8]]


@ARRANGEMENTS
@settings(deadline=None)
@given(
    groups=st.integers(1, 6),
    rows=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    columns=st.lists(st.integers(1, 4), max_size=2),
)
def test_the_parts_cover_every_element_once(arrange, groups, rows, columns):
    rows = [n * groups for n in rows]
    seen = np.zeros((sum(rows), *columns), int)
    for view in arrange(rows, columns, groups):
        np.add(view.of(seen), 1, out=view.of(seen))
    assert (seen == 1).all()


@settings(deadline=None)
@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple),
    groups=st.integers(1, 3),
    data=st.data(),
)
def test_a_view_means_what_numpy_means(shape, groups, data):
    shape = (shape[0] * groups, *shape[1:])
    tensor = np.arange(np.prod(shape)).reshape(shape)
    start = data.draw(st.integers(0, shape[0] // groups))
    view = View.whole(shape).unflatten(0, groups)[:, start:]
    expected = tensor.reshape(groups, shape[0] // groups, *shape[1:])[:, start:]
    np.testing.assert_array_equal(view.of(tensor), expected)
    assert view.size == expected.size
    if expected.size:
        assert view.is_contiguous == expected.flags.c_contiguous
        assert np.shares_memory(view.of(tensor), tensor)


def test_a_view_that_leaves_its_tensor_is_refused():
    with pytest.raises((ValueError, TypeError)):
        View.whole((4, 2)).of(np.zeros((3, 2)))
    with pytest.raises(ValueError, match="C-contiguous"):
        View.whole((2, 3)).of(np.zeros((3, 2)).T)
    with pytest.raises(ValueError, match="groups"):
        View.whole((5,)).unflatten(0, 2)
    with pytest.raises(ValueError, match="step 1"):
        View.whole((4,))[::2]


@pytest.mark.parametrize("qkv", [True, False])
@pytest.mark.parametrize("gate_up", [True, False])
def test_the_training_flags_and_the_metadata_name_each_layout(qkv, gate_up):
    layout = Layout(interleaved_qkv=qkv, interleaved_gate_up=gate_up)
    assert Layout.of_training(layout.training_flags) == layout
    assert Layout.parse(str(layout)) == layout


def test_what_consumers_expect():
    assert Layout.of_training({}) == TRAINING_DEFAULT == Layout(interleaved_qkv=True, interleaved_gate_up=True)
    assert Layout(interleaved_qkv=False, interleaved_gate_up=False) == INFERENCE
    with pytest.raises(ValueError, match="unknown layout"):
        Layout.parse("qkv=sideways,gate_up=contiguous")
