"""Writes bytes anywhere in a file, past the page cache where the file system takes it."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

import numpy as np

# What a file's offset, a length and an address in memory have to be multiples of, to be written past the page cache.
BLOCK_BYTES = 4096
# Set to 0, files are written through the page cache.
DIRECT_VARIABLE = "MF_QWEN3_DIRECT_WRITES"
_COMPARED_BYTES = 1 << 20


class WritableFile:
    """A file that several threads, and processes, write different parts of.

    Half of the time of a conversion is the kernel's, which allocates page cache and writes it back, for bytes that
    nobody reads soon. With O_DIRECT the disk takes them from the process's memory. Only whole blocks can be written so:
    the rest of each write goes through the page cache. A page is never written both ways.

    Args:
        path: the file; is made if it is not there.
        nbytes: the size that it will have: a file that grows is written by one thread at a time.
    """

    def __init__(self, path: Path, nbytes: int) -> None:
        self._buffered = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self.present = os.fstat(self._buffered).st_size  # bytes that it had
        self._direct = _open_direct(path)
        if self._direct is not None and self.present < nbytes:
            os.ftruncate(self._buffered, nbytes)

    def write(self, start: int, data: np.ndarray) -> None:
        """Writes bytes (uint8) from byte ``start`` of the file on.

        Raises:
            OSError: the disk is full, or fails.
        """
        head = -start % BLOCK_BYTES
        stop = head + max(data.size - head, 0) // BLOCK_BYTES * BLOCK_BYTES
        if self._direct is None or stop <= head or (data.ctypes.data + head) % BLOCK_BYTES:
            _write_all(self._buffered, start, data)
            return
        _write_all(self._buffered, start, data[:head])
        try:
            _write_all(self._direct, start + head, data[head:stop])
        except OSError as error:
            if error.errno != errno.EINVAL:  # which is what a file system says whose blocks are larger
                raise
            _write_all(self._buffered, start + head, data[head:stop])
        _write_all(self._buffered, start + stop, data[stop:])

    def holds(self, start: int, data: np.ndarray) -> bool:
        """Whether these bytes are at ``start`` already; looks no further than the file went when it was opened."""
        if start + data.size > self.present:
            return False
        begin, length = 0, BLOCK_BYTES  # a block shows it, as a rule
        while begin < data.size:
            expected = data[begin : begin + length]
            found = np.frombuffer(os.pread(self._buffered, expected.size, start + begin), np.uint8)
            if not np.array_equal(found, expected):
                return False
            begin, length = begin + length, _COMPARED_BYTES
        return True

    def finish(self, header: bytes, nbytes: int) -> None:
        """Writes the first bytes, cuts the file to its size, and waits until all of it is on disk."""
        _write_all(self._buffered, 0, np.frombuffer(header, np.uint8))
        os.ftruncate(self._buffered, nbytes)
        self.sync()

    def sync(self) -> None:
        """Waits until what was written is on disk."""
        os.fsync(self._buffered)

    def close(self) -> None:
        """Closes it; what is on disk is another matter."""
        os.close(self._buffered)
        if self._direct is not None:
            os.close(self._direct)


def _open_direct(path: Path) -> int | None:
    """The file opened for writing past the page cache; None where the file system refuses, or the user does."""
    if os.environ.get(DIRECT_VARIABLE) != "0" and hasattr(os, "O_DIRECT"):
        with suppress(OSError):
            return os.open(path, os.O_WRONLY | os.O_DIRECT)
    return None


def _write_all(descriptor: int, start: int, data: np.ndarray) -> None:
    """Writes everything: a full disk may take only a part of it, without an error."""
    memory, done = memoryview(data), 0  # type: ignore[arg-type]
    while done < len(memory):
        done += os.pwrite(descriptor, memory[done:], start + done)
