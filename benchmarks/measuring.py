"""Runs commands and functions in processes of their own, and measures what they take."""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import threading
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
MIB = 1 << 20
CACHES = ("warm", "cold")
# The titles of Measured.cells().
HEADERS = ("seconds", "user", "system", "read MB")


class Measured(NamedTuple):
    """What a process took, together with those that it started.

    Attributes:
        seconds, user, system: elapsed, and of all cores in the program and in the kernel.
        private_bytes: anonymous memory at its peak, looked at 50 times a second.
        read_bytes: what it had a disk read, readahead included.
    """

    seconds: float
    user: float
    system: float
    private_bytes: int
    read_bytes: int

    def cells(self) -> list[str]:
        """The cells of a table whose titles are HEADERS."""
        return [f"{self.seconds:.2f}", f"{self.user:.2f}", f"{self.system:.2f}", f"{self.read_bytes / 1e6:.0f}"]

    @classmethod
    def of(cls, found: Iterable[Measured]) -> Measured:
        """Of several rounds: the medians, and the peak of the memory."""
        columns = list(zip(*found))
        medians = cls(*map(statistics.median, columns))
        return medians._replace(private_bytes=max(columns[cls._fields.index("private_bytes")]))


class Meter(ExitStack):
    """Measures this process; or, if told their session, the processes of that, which this one has to wait for.

    A context manager; ``measured`` is there once it has been left.
    """

    measured: Measured

    def __init__(self, session: Callable[[], int] | None = None) -> None:
        super().__init__()
        self._session = session
        self._peak = 0

    def __enter__(self) -> Meter:
        stop = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(stop,))
        watcher.start()
        start, user, system, read = self._counters()

        def finish() -> None:
            end = [now - before for now, before in zip(self._counters(), (start, user, system, read))]
            stop.set()
            watcher.join()
            self.measured = Measured(end[0], end[1], end[2], self._peak, int(end[3]))

        self.callback(finish)
        return self

    def _counters(self) -> tuple[float, float, float, int]:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN if self._session else resource.RUSAGE_SELF)
        # The kernel adds to a process's counter that of each child it has waited for.
        read = number_in(Path("/proc/self/io"), "read_bytes:")
        return time.perf_counter(), usage.ru_utime, usage.ru_stime, read

    def _watch(self, stop: threading.Event) -> None:
        is_last = False
        while not is_last:
            is_last = stop.wait(0.02)
            processes: Iterable[Path] = [Path("/proc/self")]
            if self._session:
                session = self._session()
                processes = (path for path in Path("/proc").glob("[0-9]*") if _session_of(path) == session)
            self._peak = max(self._peak, sum(map(private_bytes, processes)))


def _session_of(process: Path) -> int:
    try:
        return os.getsid(int(process.name))
    except OSError:
        return -1  # it has ended


def private_bytes(process: Path = Path("/proc/self")) -> int:
    """Anonymous memory of a process; 0 if it has ended."""
    try:
        return 1024 * number_in(process / "status", "RssAnon:")
    except OSError:
        return 0


def number_in(file: Path, name: str) -> int:
    """A number in one of the kernel's tables; 0 if it is not there."""
    lines = (line.split() for line in file.read_text().splitlines())
    return next((int(words[1]) for words in lines if words[0] == name), 0)


def new_parser(description: str | None, known: Iterable[str], models: list[str], rounds: int = 0) -> ArgumentParser:
    """The options that all benchmarks have: where to work, the models of those ``known``; with ``rounds`` two more."""
    parser = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=work_dir, required=True, help="holds the checkpoints")
    parser.add_argument("--models", nargs="+", choices=known, default=models)
    if rounds:
        parser.add_argument("--caches", nargs="+", choices=CACHES, default=["warm"])
        parser.add_argument("--rounds", type=int, default=rounds)
    return parser


def work_dir(name: str) -> Path:
    """The type of an option: a directory, made unless it is there already."""
    path = Path(name).resolve()
    path.mkdir(parents=True, exist_ok=True)
    return path


def run(command: Sequence[object], log: Path, cwd: Path = ROOT) -> Measured:
    """Runs a command, which may import what is in ``cwd``, with nothing left to write back; it prints to ``log``."""
    os.sync()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(cwd), os.environ.get("PYTHONPATH", "")])}
    words, pid = list(map(str, command)), -1
    with log.open("a") as stream, Meter(lambda: pid) as meter:
        process = subprocess.Popen(
            words, stdout=stream, stderr=stream, cwd=cwd, start_new_session=True, env=environment
        )
        pid = process.pid
        code = process.wait()
    if code:
        raise SystemExit(f"{words} failed, see {log}")
    return meter.measured


def call(function: Callable, arguments: Iterable[tuple], log: Path) -> list[Any]:
    """Calls a module's function with each of several arguments, all at once, each in a new process."""
    with ExitStack() as stack:
        context, futures = get_context("spawn"), []
        for of_one in arguments:
            pool = ProcessPoolExecutor(1, context, _print_to, (log,))
            futures.append(stack.enter_context(pool).submit(function, *of_one))
        return [future.result() for future in futures]


def _print_to(log: Path) -> None:
    os.chdir(log.parent)  # where MindSpore leaves its files
    with log.open("a") as stream:
        for output in sys.stdout, sys.stderr:
            os.dup2(stream.fileno(), output.fileno())


def prepare_cache(cache: str, *directories: Path) -> None:
    """Has the page cache hold the files of directories (``warm``), or nothing of them (``cold``).

    What else is in the cache stays, such as the interpreter: what a cold program reads is the checkpoint.
    """
    os.sync()  # what is not written yet can't be dropped
    for file in (file for directory in directories for file in directory.glob("*.safetensors")):
        with file.open("rb", buffering=0) as stream:
            if cache == "cold":
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while cache == "warm" and stream.read(16 * MIB):
                pass


def markdown(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table as the documents have it."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def report(*words: object) -> None:
    """Says on stderr how far a benchmark is."""
    print(*words, file=sys.stderr, flush=True)
