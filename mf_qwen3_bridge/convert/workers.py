"""Several processes that share out a job: which of them this is, and how they know of each other."""

from __future__ import annotations

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
# A worker that gives no sign for so long is taken for dead.
PATIENCE_SECONDS = 60.0


@dataclass(frozen=True)
class Worker:
    """One of several processes that share out a job."""

    number: int
    count: int


ALONE = Worker(0, 1)


def this_worker() -> Worker | None:
    """Which of msrun's workers this process is; None for its scheduler, which has nothing to do.

    Raises:
        BridgeError: msrun was started so that workers get their numbers when MindSpore does.
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
    """A small file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{temporary}")
    with partial.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    partial.rename(path)


class Workers:
    """Signs of life of the workers of one job, in files of the unfinished directory.

    What an earlier run left does not count: a sign is one that was seen to change.

    Args:
        state: the folder for them, in the unfinished directory.
        worker: which of them this is.
    """

    def __init__(self, state: Path, worker: Worker) -> None:
        self._state = state
        self._worker = worker
        self._news: dict[str, Any] = {}
        self._stopped = Event()
        self._old = {number: self._read(number) for number in self._others}

    @property
    def _others(self) -> list[int]:
        return [number for number in range(self._worker.count) if number != self._worker.number]

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Gives signs of life, the last of them that this worker failed if it does."""
        if not self._others:
            yield
            return
        beating = Thread(target=self._beat, daemon=True)
        beating.start()
        try:
            yield
        except BaseException as error:
            self._news = {"failed": str(error) or type(error).__name__}
            raise
        finally:
            self._stopped.set()
            beating.join()

    def report(self, content: Any) -> None:
        """Says to the first worker that this one is done, and what it has seen."""
        write_whole(self._state / f"report.{self._worker.number}", json.dumps(content).encode())
        self._news = {"done": True}

    def _beat(self) -> None:
        while True:
            stopped = self._stopped.wait(_BEAT_SECONDS)
            if not self._state.is_dir():
                return  # all is done, and the directory has its name
            sign = json.dumps({"at": time.time_ns(), **self._news})
            partial = self._state / f"worker.{self._worker.number}.tmp"
            # Not synced: behind gigabytes that are, it would come too late.
            with suppress(OSError):
                partial.write_text(sign)
                partial.rename(partial.with_suffix(""))
            if stopped:
                return

    def _read(self, number: int) -> dict[str, Any]:
        try:
            sign: dict[str, Any] = json.loads((self._state / f"worker.{number}").read_text())
        except (OSError, json.JSONDecodeError):
            return {}
        return sign

    def wait_for_reports(self) -> list[Any]:
        """What each of the others has seen, when all are done.

        Raises:
            BridgeError: one of them failed, or gives no sign of life.
        """
        for _ in self._watch():
            if sum("done" in sign for sign in self._signs().values()) == len(self._others):
                break
        return [json.loads((self._state / f"report.{number}").read_text()) for number in self._others]

    def wait_for_the_end(self) -> None:
        """Returns when the first worker has given the directory its name.

        Raises:
            BridgeError: it failed, or gives no sign of life.
        """
        for _ in self._watch():
            if not self._state.is_dir():
                break

    def _signs(self) -> dict[int, dict[str, Any]]:
        return {n: sign for n in self._others if (sign := self._read(n)) and sign != self._old[n]}

    def _watch(self) -> Iterator[None]:
        """Looks at the others again and again."""
        last: dict[int, tuple[Any, float]] = {}
        started = time.monotonic()
        while True:
            yield
            signs, now = self._signs(), time.monotonic()
            for number in self._others:
                sign = signs.get(number, {})
                if "failed" in sign:
                    raise BridgeError(f"worker {number} of {self._worker.count} failed: {sign['failed']}")
                if last.get(number, (None, 0))[0] != sign.get("at"):
                    last[number] = (sign.get("at"), now)
                if now - last.get(number, (None, started))[1] > PATIENCE_SECONDS and self._state.is_dir():
                    raise BridgeError(
                        f"worker {number} of {self._worker.count} gives no sign of life for {PATIENCE_SECONDS:.0f} s: "
                        "look at its log, and start all again with the same command: they go on"
                    )
            time.sleep(_BEAT_SECONDS / 4)
