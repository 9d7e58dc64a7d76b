"""Writing past the page cache, where that is possible, and through it where not: the same bytes."""

from __future__ import annotations

import errno
import fcntl
import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mf_qwen3_bridge.convert.file_layout import output_file
from mf_qwen3_bridge.convert.file_writing import BLOCK_BYTES, DIRECT_VARIABLE, WritableFile
from mf_qwen3_bridge.convert.jobs import to_mindformers
from mf_qwen3_bridge.convert.run import run
from mf_qwen3_bridge.inputs.preflight import check
from mf_qwen3_bridge.model.rules import TRAIN
from mf_qwen3_bridge.transfer.plan import Target
from tests.support.checkpoints import SPEC, hf_config, random_tensors, write

SIZE = 9 * BLOCK_BYTES + 123


def pages(address: int) -> np.ndarray:
    """The same random bytes each time, in memory that begins ``address`` bytes after a page does."""
    memory = np.empty(12 * BLOCK_BYTES, np.uint8)
    start = -memory.ctypes.data % BLOCK_BYTES + address
    memory[start : start + SIZE] = np.random.default_rng(0).integers(0, 256, SIZE, np.uint8)
    return memory[start : start + SIZE]


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch, refuse: int = 0) -> Iterator[dict[bool, list[tuple[int, int]]]]:
    """Notes the (start, stop) of writes: True past the page cache. ``refuse``: an error for those."""
    found: dict[bool, list[tuple[int, int]]] = defaultdict(list)
    original = os.pwrite

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        is_direct = bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)
        if is_direct and refuse:
            raise OSError(refuse, os.strerror(refuse))
        found[is_direct].append((offset, offset + len(data)))
        return original(descriptor, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        yield found


@pytest.fixture
def takes_direct_writes(tmp_path: Path) -> None:
    try:
        os.close(os.open(tmp_path / "tried", os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError:
        pytest.skip("the file system of temporary files takes no direct writes")


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cuts=st.lists(st.one_of(st.integers(1, SIZE - 1), st.integers(1, 9).map(lambda n: n * BLOCK_BYTES)), max_size=6),
    address=st.sampled_from([0, 8, 64, BLOCK_BYTES // 2]),
    is_direct=st.booleans(),
)
def test_any_pieces_make_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuts, address, is_direct):
    """In any order; and no page is written both ways, which the kernel would have to keep consistent."""
    expected = pages(address)
    bounds = sorted({0, SIZE, *cuts})
    with monkeypatch.context() as patch:
        patch.setenv(DIRECT_VARIABLE, "1" if is_direct else "0")
        file = WritableFile(tmp_path / "file", SIZE)
    with counted(monkeypatch) as writes:
        for start, stop in reversed(list(pairwise(bounds))):
            file.write(start, expected[start:stop])
    file.finish(expected[:8].tobytes(), SIZE)
    file.close()
    assert (tmp_path / "file").read_bytes() == expected.tobytes()
    touched = {way: {page for a, b in writes[way] for page in range(a // 4096, -(-b // 4096))} for way in (True, False)}
    assert not touched[True] & touched[False]
    assert is_direct or not writes[True]
    (tmp_path / "file").unlink()


def test_whole_blocks_are_written_past_the_page_cache(tmp_path: Path, monkeypatch, takes_direct_writes):
    """Of bytes 100 to 100 + SIZE, whose memory begins 100 bytes after a page as well."""
    file = WritableFile(tmp_path / "file", SIZE + 100)
    with counted(monkeypatch) as writes:
        file.write(100, pages(100))
    file.close()
    assert writes[True] == [(4096, 9 * 4096)]
    assert writes[False] == [(100, 4096), (9 * 4096, SIZE + 100)]


def test_what_is_not_a_page_in_memory_goes_through_the_page_cache(tmp_path: Path, monkeypatch):
    file = WritableFile(tmp_path / "file", SIZE)
    with counted(monkeypatch) as writes:
        file.write(0, pages(8))
    file.close()
    assert writes == {False: [(0, SIZE)]}


@pytest.mark.parametrize("when", ["opened", "written"])
def test_a_file_system_that_refuses(tmp_path: Path, monkeypatch, when: str):
    """As some network disks do at once, and those with larger blocks when they get one."""
    original = os.open

    def refusing(path, flags, *mode):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return original(path, flags, *mode)

    with monkeypatch.context() as patch:
        if when == "opened":
            patch.setattr(os, "open", refusing)
        file = WritableFile(tmp_path / "file", SIZE)
    with counted(monkeypatch, refuse=errno.EINVAL) as writes:
        file.write(0, pages(0))
    file.finish(b"", SIZE)
    file.close()
    assert not writes[True]
    assert (tmp_path / "file").read_bytes() == pages(0).tobytes()


def test_another_error_is_one(tmp_path: Path, monkeypatch, takes_direct_writes):
    file = WritableFile(tmp_path / "file", SIZE)
    with counted(monkeypatch, refuse=errno.ENOSPC), pytest.raises(OSError, match="No space left"):
        file.write(0, pages(0))
    file.close()


def test_what_fills_blocks_begins_on_one():
    """And comes first, whatever the order of the model; all others are aligned to their elements."""
    sizes = {
        "odd": ("U8", 3),
        "norm": ("BF16", 128),
        "scale": ("F32", 5),
        "matrix": ("BF16", 4096),
        "wide": ("F32", 2048),
    }
    file = output_file("a", [Target(name, (n,), dtype, ()) for name, (dtype, n) in sizes.items()], {"format": "pt"})
    starts = {name: tensor.start for name, tensor in file.tensors.items()}
    assert len(file.header) % BLOCK_BYTES == 0
    assert sorted(starts, key=starts.__getitem__) == ["wide", "matrix", "scale", "norm", "odd"]
    assert starts["wide"] == len(file.header)
    assert starts["matrix"] % BLOCK_BYTES == starts["scale"] % 4 == starts["norm"] % 2 == 0


def test_a_conversion_writes_most_of_its_bytes_past_the_page_cache(tmp_path: Path, monkeypatch, takes_direct_writes):
    large = replace(SPEC, hidden_size=512, ffn_hidden_size=2048, vocab_size=8192)
    model = check(write(tmp_path / "hf", random_tensors(large), hf_config(large)))
    with counted(monkeypatch) as writes:
        run(to_mindformers(model, TRAIN, tmp_path / "out"))
    nbytes = {way: sum(stop - start for start, stop in writes[way]) for way in (True, False)}
    assert nbytes[True] > 50 * nbytes[False]
