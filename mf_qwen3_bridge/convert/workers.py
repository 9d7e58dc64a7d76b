"""Coordinates several processes that share a job: their numbers, heartbeats and reports."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any

from mf_qwen3_bridge.errors import BridgeError

_BEAT_SECONDS = 1.0
# A worker without a heartbeat for so long is assumed to be dead.
PATIENCE_SECONDS = 60.0


@dataclass(frozen=True)
class Worker:
    """One of several processes that share a job."""

    number: int
    count: int


ALONE = Worker(0, 1)


def this_worker() -> Worker | None:
    """Which of msrun's workers this process is; None for its scheduler, which writes nothing.

    Raises:
        BridgeError: msrun was started without --node_rank, so that workers get their numbers only from MindSpore.
    """
    role = os.environ.get("MS_ROLE")
    if role == "MS_SCHED":
        return None
    if role != "MS_WORKER":
        return ALONE
    if "MS_NODE_ID" not in os.environ:  # RANK_ID may be the scheduler's
        raise BridgeError("msrun has given this worker no number: start msrun with --node_rank on each machine")
    return Worker(int(os.environ["MS_NODE_ID"]), int(os.environ["MS_WORKER_NUM"]))


def write_whole(path: Path, content: bytes, temporary: str = "tmp") -> None:
    """Writes a small file atomically, and syncs it to disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{temporary}")
    with partial.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    partial.rename(path)


class Workers:
    """Heartbeats and reports of a job's workers, in one file each in the folder ``state`` of the unfinished directory.

    A worker touches its file every second: the heartbeat. The file is empty until the worker is done or has failed.
    Files that an earlier run left are ignored until they change.
    """

    def __init__(self, state: Path, worker: Worker) -> None:
        self._state = state
        self._worker = worker
        self._others = [number for number in range(worker.count) if number != worker.number]
        self._stopped = Event()
        self._old = {number: self._read(number)[0] for number in self._others}

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Sends heartbeats; if this worker fails, tells the others."""
        if not self._others:
            yield
            return
        self._write("")
        heart = Thread(target=self._beat, daemon=True)
        heart.start()
        try:
            yield
        except BaseException as error:
            with suppress(OSError):
                self._write(json.dumps({"failed": str(error) or type(error).__name__}))
            raise
        finally:
            self._stopped.set()
            heart.join()

    def report(self, found: Any) -> None:
        """Tells the first worker that this one is done, and what it has found."""
        self._write(json.dumps({"found": found}))

    def _file(self, number: int) -> Path:
        return self._state / f"worker.{number}"

    def _write(self, text: str) -> None:
        """Not synced to disk: behind gigabytes that are, it would come too late."""
        partial = self._state / f"worker.{self._worker.number}.tmp"
        partial.write_text(text)
        partial.rename(self._file(self._worker.number))

    def _beat(self) -> None:
        while not self._stopped.wait(_BEAT_SECONDS):
            with suppress(OSError):  # when all is done, the directory gets its name
                os.utime(self._file(self._worker.number))

    def _read(self, number: int) -> tuple[int, str]:
        """When a worker's file was changed, in ns, and what is in it. NFS asks its server when a file is opened."""
        try:
            with self._file(number).open() as stream:
                return os.fstat(stream.fileno()).st_mtime_ns, stream.read()
        except OSError:
            return 0, ""

    def wait_for_reports(self) -> list[Any]:
        """What each of the others has found, when all are done; BridgeError if one failed or sends no heartbeat."""
        reports = next(reports for reports in self._watch() if len(reports) == len(self._others))
        return [report["found"] for report in reports.values()]

    def wait_for_the_end(self) -> None:
        """Returns when the first worker has given the directory its name; raises as :meth:`wait_for_reports`."""
        next(None for _ in self._watch() if not self._state.is_dir())

    def _watch(self) -> Iterator[dict[int, Any]]:
        """Looks at the others again and again; yields the reports so far."""
        reports: dict[int, Any] = {}
        last = {number: (self._old[number], time.monotonic()) for number in self._others}
        while True:
            for number in self._others:
                (changed, text), now = self._read(number), time.monotonic()
                if changed != last[number][0]:
                    last[number] = changed, now
                    if text and number not in reports:
                        reports[number] = json.loads(text)
                name = f"worker {number} of {self._worker.count}"
                if "failed" in reports.get(number, ()):
                    raise BridgeError(f"{name} failed: {reports[number]['failed']}")
                if now - last[number][1] > PATIENCE_SECONDS and self._state.is_dir():
                    raise BridgeError(
                        f"{name} has sent no heartbeat for {PATIENCE_SECONDS:.0f} s: look at its log, and start all "
                        "again with the same command: they go on"
                    )
            yield reports
            time.sleep(_BEAT_SECONDS / 4)
