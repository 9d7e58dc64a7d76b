"""Silences MindFormers' output while a network is built."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout


@contextmanager
def silence_upstream() -> Iterator[None]:
    """Discards what MindFormers prints (all of its config, for each network); its files under ./output/log have it too.

    What it logs later stays out of the report too, because its log handlers keep the stdout of this time. MindSpore's
    C++ side writes to file descriptor 1.
    """
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
