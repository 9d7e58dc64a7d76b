#!/usr/bin/env python3
"""What the ranks of an inference run read from the disk, where the checkpoint is not in the page cache.

    python benchmarks/ranks.py --work_dir /tmp/benchmark --disk_mb_per_second 300

carries out each rank's plan, as the direct loader does but into memory that is thrown away, in a process for each rank,
all at once; and one rank by itself, as on a machine of its own. Counted are

    wanted MB  the elements of all its ranks, those twice that two ranks hold
    ranks' MB  what these processes had the disk read (/proc/PID/io)
    disk MB    what all of the machine had its disks read meanwhile (pgpgin of /proc/vmstat)

``--disk_mb_per_second`` does TP 1, 2 and 4 once more on a disk that is limited to that; for root only, as it takes a
control group of the processes (blkio of version 1, io of version 2).
"""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from mf_qwen3_bridge.inputs.identify import open_weights
from mf_qwen3_bridge.model.parallel import ParallelConfig, Rank
from mf_qwen3_bridge.model.rules import INFER
from mf_qwen3_bridge.transfer.copying import Transfer
from mf_qwen3_bridge.transfer.safetensors import DTYPES

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.checkpoints import MODELS, make_checkpoint, title
from benchmarks.measuring import Measured, Meter, call, markdown, new_parser, number_in, prepare_cache, report

HEADERS = ("checkpoint", "disk", "ranks", "seconds", "MB/s", "wanted MB", "ranks' MB", "disk MB", "x checkpoint")
_GROUPS = Path("/sys/fs/cgroup")
_MB = 10**6


def load(directory: Path, rank: Rank, group: Path | None) -> tuple[Measured, int]:
    """Loads what a rank holds, in this process: what it took, and the number of bytes that the rank needs."""
    if group:
        (group / "cgroup.procs").write_text(str(os.getpid()))
    with Meter() as meter, Transfer() as transfer:
        plan = open_weights(directory).plan(INFER, rank=rank)
        for target in plan.targets:
            transfer.fill(np.empty(target.shape, DTYPES[target.dtype]), target.copies)
    return meter.measured, plan.source_nbytes


def rank_sets(is_moe: bool) -> Iterator[tuple[str, list[Rank]]]:
    """Ranks that share a machine, and what the table calls them."""
    for tensor_parallel, expert_parallel in [(1, 1), (2, 1), (4, 1), *([(2, 2), (4, 4)] if is_moe else [])]:
        config = ParallelConfig(tensor_parallel, expert_parallel)
        ranks = [config.rank(number) for number in range(config.world_size)]
        name = f"TP {tensor_parallel}" + f", EP {expert_parallel}" * (expert_parallel > 1)
        yield name, ranks
        if len(ranks) == 2:
            yield f"{name}, one of them", ranks[:1]


@contextmanager
def limited_disk(directory: Path, mb_per_second: int) -> Iterator[Path | None]:
    """A control group whose processes read from the directory's disk at most so fast; None if that can't be had."""
    device = directory.stat().st_dev
    entry = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    limit = _MB * mb_per_second
    try:
        disk = ((entry.parent if (entry / "partition").exists() else entry) / "dev").read_text().strip()
        if (_GROUPS / "blkio").is_dir():
            group, file, content = _GROUPS / "blkio/benchmark", "blkio.throttle.read_bps_device", f"{disk} {limit}"
        else:
            (_GROUPS / "cgroup.subtree_control").write_text("+io")
            group, file, content = _GROUPS / "benchmark", "io.max", f"{disk} rbps={limit}"
        group.mkdir(exist_ok=True)
        (group / file).write_text(content)
    except OSError as error:
        report(f"can't limit the disk: {error}")
        yield None
        return
    try:
        yield group
    finally:
        group.rmdir()


def compare(arguments: Namespace) -> Iterator[list[str]]:
    """A row of the table for each model, disk and set of ranks."""
    for model in arguments.models:
        directory = make_checkpoint(arguments.work_dir, model)
        yield from _rows(arguments, model, directory, None)
        if arguments.disk_mb_per_second:
            with limited_disk(directory, arguments.disk_mb_per_second) as group:
                if group:
                    yield from _rows(arguments, model, directory, group)


def _rows(arguments: Namespace, model: str, directory: Path, group: Path | None) -> Iterator[list[str]]:
    disk = f"{arguments.disk_mb_per_second} MB/s" if group else "as it is"
    size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    vmstat = Path("/proc/vmstat")
    sets = rank_sets(MODELS[model].is_moe)
    for name, ranks in [(name, ranks) for name, ranks in sets if not group or "," not in name]:
        prepare_cache("cold", directory)
        before = number_in(vmstat, "pgpgin")
        tasks = [(directory, rank, group) for rank in ranks]
        measured, wanted = zip(*call(load, tasks, arguments.work_dir / "log.txt"))
        paged_in = 1024 * (number_in(vmstat, "pgpgin") - before)
        seconds, read = max(one.seconds for one in measured), sum(one.read_bytes for one in measured)
        report(model, disk, name, f"{seconds:.2f} s, {[one.read_bytes for one in measured]} bytes")
        megabytes = [f"{number / _MB:.0f}" for number in (read / seconds, sum(wanted), read, paged_in)]
        yield [title(model, directory), disk, name, f"{seconds:.2f}", *megabytes, f"{read / size:.3f}"]


def main() -> None:
    """Measures the ranks of each model."""
    parser = new_parser(__doc__, MODELS, ["Qwen3-8B, 6 layers", "Qwen3-30B-A3B, 4 layers"])
    parser.add_argument("--disk_mb_per_second", type=int, default=0, help="also measure with a slower disk")
    print(markdown(HEADERS, compare(parser.parse_args())))


if __name__ == "__main__":
    main()
