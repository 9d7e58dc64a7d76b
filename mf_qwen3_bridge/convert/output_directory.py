"""Writes a directory that gets its name only when everything in it is on disk.

Until then it is ``NAME.incomplete`` beside it. Its safetensors files have other names and no header, so that nothing
loads them as weights. Several workers, on one machine or on several that share the disk, may write to it.

If a run is killed or the disk is full, the directory stays, and the same command resumes it. There is no record of what
was written: the resumed run compares, and writes what differs.
"""

import errno
import fcntl
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from mf_qwen3_bridge.convert.file_layout import OutputFile
from mf_qwen3_bridge.convert.file_writing import WritableFile
from mf_qwen3_bridge.convert.workers import ALONE, Worker, write_whole
from mf_qwen3_bridge.errors import BridgeError
from mf_qwen3_bridge.inputs.source import UNFINISHED_SUFFIX
from mf_qwen3_bridge.transfer.progress import size_text

# Holds what the bridge itself needs until the directory is complete.
_STATE = ".mf-qwen3"


class OutputDirectory:
    """An output directory, which does not exist yet or is empty, and its safetensors files.

    ``job`` is everything that determines the bytes; only the same job resumes an interrupted run.
    """

    def __init__(self, path: Path, files: Iterable[OutputFile], job: Mapping[str, Any], worker: Worker = ALONE) -> None:
        self.path = path.parent.resolve() / path.name
        self.incomplete = self.path.parent / f"{self.path.name}{UNFINISHED_SUFFIX}"
        self.files = {file.name: file for file in files}
        self.nbytes = sum(file.nbytes for file in self.files.values())
        self.state = self.incomplete / _STATE
        self.worker = worker
        self._job = json.dumps(job, indent=2, sort_keys=True)
        self._opened: dict[str, WritableFile] = {}
        self._lock = Lock()
        self._is_discarded = False
        self.notes: list[str] = []  # for the user, when the directory is complete

    def check(self) -> None:
        """Raises BridgeError if the path is taken or can't be written to, or the disk is too small; makes nothing."""
        if self.path.is_symlink() or (self.path.exists() and not self.path.is_dir()):
            raise BridgeError(f"{self.path} already exists and is not a directory: choose another output")
        if self.path.is_dir() and any(self.path.iterdir()):
            raise BridgeError(f"{self.path} is not empty, and nothing is overwritten: choose another output")
        if not self.path.name or self.path.name.endswith(UNFINISHED_SUFFIX):
            raise BridgeError(f"{self.path} can't be the output's name: choose another")
        if self.path == Path.cwd() or self.path in Path.cwd().parents:
            raise BridgeError(f"{self.path} is where you are, and would be replaced: name a directory inside it")
        if os.path.ismount(self.path):
            raise BridgeError(f"{self.path} is where a disk is mounted: name a directory inside it")
        self._check_interrupted()
        existing = next(parent for parent in self.path.parents if parent.exists())
        if not existing.is_dir():
            raise BridgeError(f"{existing} is no directory, so {self.path} can't be made in it: choose another output")
        if not os.access(existing, os.W_OK):
            raise BridgeError(f"{existing} can't be written to: choose another output, or look at its permissions")
        partials = (self._partial(name) for name in self.files)
        there = sum(file.stat().st_blocks * 512 for file in partials if file.is_file())
        free, needed = shutil.disk_usage(existing).free, self.nbytes - there
        if free < needed:
            raise BridgeError(
                f"{size_text(needed)} are needed for {self.path}, {size_text(free)} are free: "
                "make room, or choose another disk"
            )

    def _check_interrupted(self) -> None:
        """Refuses an unfinished directory that another job left."""
        if self.incomplete.is_symlink():
            raise BridgeError(f"{self.incomplete} is in the way, and a link: remove it, or choose another output")
        if not self.incomplete.exists():
            return
        job = self.state / "job.json"
        remedy = "remove it, or choose another output"
        if not job.is_file():
            if any(path.name != _STATE for path in self.incomplete.iterdir()):
                raise BridgeError(f"{self.incomplete} is in the way, and the bridge did not make it: {remedy}")
        elif job.read_text() != self._job:
            ours, theirs = json.loads(self._job), {}
            with suppress(json.JSONDecodeError):
                theirs = json.loads(job.read_text())
            differs = ", ".join(key for key in sorted(theirs | ours) if theirs.get(key) != ours.get(key))
            raise BridgeError(
                f"{self.incomplete} was left by a command with other input or options "
                f"(not the same: {differs}): {remedy}"
            )

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Makes the unfinished directory, or resumes the one that is there.

        Raises BridgeError as :meth:`check`, and if another process is writing to it or the disk is full.
        """
        self.check()
        _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))
        try:
            self.state.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.state / f"lock.{self.worker.number}", os.O_RDWR | os.O_CREAT, 0o666)
            try:
                self._claim(lock)
                self._is_discarded = self.worker.count == 1 and not (self.state / "job.json").is_file()
                self.check()  # another process may have started, or finished, before the lock was taken
                self._is_discarded = False
                write_whole(self.state / "job.json", self._job.encode(), f"job.{self.worker.number}")
                yield
            finally:
                for opened in self._opened.values():
                    opened.close()
                self._opened.clear()
                os.close(lock)
                self._clean_up()
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            remedy = "make room" if full else "look at the disk and its permissions"
            raise BridgeError(
                f"{self.path} can't be written: {error.strerror}; {remedy}, and give the same command again: it goes on"
            ) from error

    def _clean_up(self) -> None:
        """Removes what is no longer needed. Its files must be closed: NFS keeps open ones, and so their directory."""
        if self._is_discarded:
            shutil.rmtree(self.incomplete, ignore_errors=True)  # why it is discarded matters more
        state = self.path / _STATE
        if self.incomplete.exists() or not state.exists():
            return
        try:
            shutil.rmtree(state)
        except OSError as error:
            if state.exists():  # other workers remove it too
                self.notes.append(f"{state} can't be removed ({error.strerror}): it is not needed, remove it")

    def _claim(self, lock: int) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BridgeError(f"another process is writing to {self.incomplete}: wait for it, or end it") from None
        except OSError:  # a file system without locks
            pass

    def put(self, file: str, start: int, elements: np.ndarray) -> None:
        """Writes a C-contiguous array to a file, from byte ``start`` on, unless it is there already; thread-safe."""
        data = elements.reshape(-1).view(np.uint8)
        opened = self._open(file)
        if not opened.holds(start, data):
            opened.write(start, data)

    def _open(self, name: str) -> WritableFile:
        with self._lock:
            if name not in self._opened:
                partial = self._partial(name)
                partial.parent.mkdir(parents=True, exist_ok=True)
                finished = self.incomplete / name
                with suppress(FileNotFoundError):
                    finished.rename(partial)  # the last run was killed while it completed the directory
                self._opened[name] = WritableFile(partial, self.files[name].nbytes)
            return self._opened[name]

    def _partial(self, name: str) -> Path:
        return self.incomplete / f"{name}.partial"

    def sync(self, run: Callable[[Callable[[WritableFile], None], Iterable[WritableFile]], Iterable[None]]) -> None:
        """Waits until everything that this worker wrote is on disk; ``run`` applies a function, as ``map`` does."""
        list(run(WritableFile.sync, list(self._opened.values())))

    def complete(self, others: Mapping[str, bytes]) -> None:
        """Writes headers and the other files (name -> contents; the index last), and gives the directory its name."""
        for name, file in self.files.items():
            self._open(name).finish(file.header, file.nbytes)
            self._partial(name).rename(self.incomplete / name)
        for name, content in others.items():
            write_whole(self.incomplete / name, content)
        for directory in {(self.incomplete / name).parent for name in (*self.files, *others)} | {self.incomplete}:
            _sync_directory(directory)
        self.incomplete.rename(self.path)
        _sync_directory(self.path.parent)

    @contextmanager
    def discarding(self) -> Iterator[None]:
        """Removes the unfinished directory, as soon as its files are closed, if weights are refused while it is open.

        Not while other workers use it.
        """
        try:
            yield
        except BridgeError:
            self._is_discarded = self.worker.count == 1
            raise


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
