"""Silences MindFormers' output while a network is built."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from mf_qwen3_bridge.errors import BridgeError


@contextmanager
def silence_upstream() -> Iterator[None]:
    """Discards what MindFormers prints (all of its config, for each network); its files under ./output/log have it too.

    What it logs later stays out of the report too, because its log handlers keep the stdout of this time. MindSpore's
    C++ side writes to file descriptor 1.

    Raises:
        BridgeError: MindFormers can't write these files, which ends its import with an error that names no remedy.
    """
    _check_log_directory()
    os.environ.setdefault("GLOG_v", "4")  # MindSpore's own log; what matters comes as an exception
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is no PyTorch
    sys.stdout.flush()
    stdout = os.dup(1)
    with open(os.devnull, "wb") as devnull:
        os.dup2(devnull.fileno(), 1)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


def _check_log_directory() -> None:
    directory = Path(os.environ.get("LOG_MF_PATH") or "output/log").absolute()
    existing = next(place for place in (directory, *directory.parents) if place.exists())
    if not os.access(existing, os.W_OK):
        raise BridgeError(
            f"MindFormers can't write its log to {directory}: set LOG_MF_PATH to a directory where it can"
        )
