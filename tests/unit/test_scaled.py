"""Quantised weights: whatever region is read, it is what DeepSeek's formula says of it, rounded once."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mf_qwen3_bridge.transfer.copying import Transfer
from mf_qwen3_bridge.transfer.safetensors import DTYPES, TensorInfo, read_header
from mf_qwen3_bridge.transfer.scaled import _to_float32, scaled
from tests.support.quantised import BF16, E4M3, save, weight_dequant

SCALES = {"F32": np.float32, "BF16": BF16, "F16": np.float16}


def any_weight(random, shape, dtype):
    """Every byte may occur but NaN."""
    weight = random.integers(0, 256, shape, dtype=np.uint8)
    if dtype == E4M3:
        weight[(weight & 0x7F) == 0x7F] = 0x33
    return weight.view(dtype)


def grid(shape, block):
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))


def on_disk(directory, weight, scale, block, dtype="BF16") -> TensorInfo:
    save(directory / "x.safetensors", {"w": weight, "s": scale})
    tensors, _ = read_header(directory / "x.safetensors")
    return scaled(tensors["w"], tensors["s"], block, dtype)


@settings(deadline=None, max_examples=150)
@given(
    stack=st.sampled_from([(), (3,)]),
    rows=st.integers(1, 11),
    columns=st.integers(1, 11),
    block=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    weights=st.sampled_from([E4M3, np.dtype(np.int8)]),
    scales=st.sampled_from(sorted(SCALES)),
    dtype=st.sampled_from(["BF16", "F16", "F32"]),
    data=st.data(),
)
def test_any_region(tmp_path_factory, stack, rows, columns, block, weights, scales, dtype, data):
    random = np.random.default_rng(0)
    shape = (*stack, rows, columns)
    weight = any_weight(random, shape, weights)
    scale = random.uniform(0.01, 2, grid(shape, block)).astype(SCALES[scales])
    tensor = on_disk(tmp_path_factory.mktemp("scaled"), weight, scale, block, dtype)
    expected = weight_dequant(weight, scale, block).reshape(-1, columns)
    all_rows = len(expected)
    wanted = np.array(sorted(data.draw(st.sets(st.integers(0, all_rows - 1), min_size=1))))
    start = data.draw(st.integers(0, columns - 1))
    stop = data.draw(st.integers(start + 1, columns))
    first = data.draw(st.integers(0, expected.size - 1))
    size = data.draw(st.integers(1, expected.size - first))
    run = np.empty(size, DTYPES[dtype])
    with Transfer() as transfer:
        region = transfer._read_region(tensor, wanted, (start, stop), DTYPES[dtype]).copy()
        transfer.read(tensor, first, run)
    assert np.array_equal(region, expected[wanted, start:stop])
    assert run.tobytes() == expected.reshape(-1)[first : first + size].astype(DTYPES[dtype]).tobytes()


def test_every_byte_of_e4m3_and_of_ue8m0(tmp_path):
    weight = np.arange(256, dtype=np.uint8).view(E4M3)
    tensor = on_disk(tmp_path, np.tile(weight, (256, 1)), np.arange(256, dtype=np.uint8)[:, None], (1, 256), "F32")
    made = np.empty((256, 256), np.float32)
    with Transfer() as transfer:
        transfer.read(tensor, 0, made)
    with np.errstate(all="ignore"):
        values = weight.astype(np.float64) * np.append(2.0 ** (np.arange(255) - 127), np.nan)[:, None]
        expected = values.astype(np.float32)
    assert np.array_equal(made, expected, equal_nan=True)
    assert np.isnan(made[:, [0x7F, 0xFF]]).all()  # weight bytes that are NaN are not 480


def test_one_literal_weight(tmp_path):
    """A block edge inside, and a smaller block at each end."""
    weight = np.float32([[1, 2, 4], [-1, 0, 8], [0.5, 1, -2]]).astype(E4M3)
    scale = np.float32([[0.5, 3], [2, 10]])
    out = np.empty((3, 3), BF16)
    with Transfer() as transfer:
        transfer.read(on_disk(tmp_path, weight, scale, (2, 2)), 0, out)
    assert out.tolist() == [[0.5, 1, 12], [-0.5, 0, 24], [1, 2, -20]]


def test_elements_are_rounded_once(tmp_path):
    """In float16 the product is rounded from float32, not from bfloat16, which would be another number."""
    weight, scale = np.float32([[3]]).astype(E4M3), np.float32([[0.3337]])
    for dtype in ("BF16", "F16"):
        out = np.empty((1, 1), DTYPES[dtype])
        with Transfer() as transfer:
            transfer.read(on_disk(tmp_path, weight, scale, (1, 1)), 0, out)
        assert out[0, 0] == (np.float32(3) * scale).astype(DTYPES[dtype])[0, 0]


@pytest.mark.parametrize("size", [1, 2, 65_535, 65_536, 65_537, 200_001])
def test_the_table_of_pairs(size):
    """Chunks of pairs, an odd byte at the end, and views that begin in the middle of a pair."""
    weight = any_weight(np.random.default_rng(size), size + 1, E4M3)
    for view in (weight[:size], weight[1:], weight[1::2], weight[::-1]):
        assert _to_float32(view).tobytes() == view.astype(np.float32).tobytes()


def test_bytes_that_a_tile_reads_are_those_of_what_is_made(tmp_path):
    tensor = on_disk(tmp_path, np.ones((4, 6), E4M3), np.ones((1, 1), np.float32), (128, 128))
    assert tensor.nbytes == 48 and tensor.files == {tmp_path / "x.safetensors"}
    assert DTYPES[tensor.dtype] == ml_dtypes.bfloat16
