#!/usr/bin/env python3
"""Loading a checkpoint into MindFormers' inference network: time and memory of each loader, side by side.

    python benchmarks/loading.py --work_dir /tmp/benchmark

makes synthetic checkpoints of real shapes (random bfloat16; some 12 GB, kept for the next run), and loads each by

    floor      its bytes read once and copied once into memory that is taken for them, cast to the parameters' dtype
    direct     the bridge's loader
    delegated  load_checkpoint, convert_weight_dict, load_param_into_net
    upstream   MindFormers' own network.load_weights

each in a process of its own, the page cache warm, by all cores. Building the network is not part of the time. The
memory is what the process has for itself alone (anonymous pages) at its peak, beyond what it had before the network
was built: the parameters are part of it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import ml_dtypes
import numpy as np

from mf_qwen3_bridge.errors import table
from mf_qwen3_bridge.inputs.opening import open_source
from mf_qwen3_bridge.transfer.safetensors import DTYPES, Reader, TensorInfo
from mf_qwen3_bridge.transfer.tiles import TILE_BYTES

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.checkpoints import MODELS, make_checkpoint

MIB = 1 << 20
LOADERS = ("floor", "direct", "delegated", "upstream")


def private_bytes() -> int:
    """Anonymous memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no RssAnon in /proc/self/status")


@contextmanager
def peak_private_bytes() -> Iterator[list[int]]:
    """A list whose last entry is the peak, looked at a hundred times a second."""
    seen, stop = [private_bytes()], threading.Event()

    def watch() -> None:
        while not stop.wait(0.01):
            seen[0] = max(seen[0], private_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        seen[0] = max(seen[0], private_bytes())
        stop.set()
        watcher.join()


def floor(directory: Path, dtype: np.dtype) -> list[np.ndarray]:
    """Reads every file's tensors piece by piece and copies each piece once; nothing is fused, nothing looked at."""
    elements = TILE_BYTES // 2
    buffers = threading.local()

    def copy(target: np.ndarray, source: TensorInfo, start: int) -> None:
        if not hasattr(buffers, "memory"):
            buffers.memory = np.empty(elements, np.uint16)
        piece = target[start : start + elements]
        buffer = buffers.memory[: piece.size]
        reader.read(source, 2 * start, memoryview(buffer.view(np.uint8)))
        if piece.dtype == ml_dtypes.bfloat16:
            piece.view(np.uint16)[:] = buffer
        else:
            np.copyto(piece, buffer.view(ml_dtypes.bfloat16), casting="unsafe")

    kept = []
    tensors = open_source(directory).tensors.values()
    with Reader() as reader, ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for file in sorted({tensor.file for tensor in tensors}):
            of_file = [tensor for tensor in tensors if tensor.file == file]
            first, nbytes = min(tensor.start for tensor in of_file), sum(tensor.nbytes for tensor in of_file)
            everything = TensorInfo(file.name, (nbytes // 2,), "BF16", file, first, nbytes)
            target = np.empty(everything.shape, dtype)
            kept.append(target)
            list(pool.map(copy, repeat(target), repeat(everything), range(0, target.size, elements)))
    return kept


def measure(loader: str, directory: Path, params_dtype: str) -> dict[str, float]:
    """Loads once, in this process: seconds, and peak private bytes.

    The floor builds the network too: fresh memory costs more in a process that has been running for a while, where the
    machine is virtual and gives free memory back to its host.
    """
    from mindformers.parallel_core.inference.model_utils import InferModelMixin

    from mf_qwen3_bridge.inputs.preflight import check
    from mf_qwen3_bridge.mindformers.infer import build_network
    from mf_qwen3_bridge.mindformers.load import load_network

    model = check(directory, overrides={"params_dtype": params_dtype, "num_blocks": 16})
    before = private_bytes()
    network = build_network(model, "CPU")
    with peak_private_bytes() as peak:
        start = time.perf_counter()
        if loader == "floor":
            floor(directory, DTYPES[{"bfloat16": "BF16", "float32": "F32"}[params_dtype]])
        elif loader == "upstream":
            InferModelMixin.load_weights(network, str(directory))
        else:
            load_network(network, model, use_training_conversion=loader == "delegated")
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "bytes": peak[0] - before}


@dataclass(frozen=True)
class Arguments:
    """What the command line says."""

    work_dir: Path
    models: list[str]
    params_dtypes: list[str]
    loaders: list[str]
    rounds: int


def compare(arguments: Arguments) -> Iterator[list[str]]:
    """A row of the table for each model, dtype and loader."""
    for model in arguments.models:
        directory = arguments.work_dir / model.replace(", ", "-").replace(" ", "-")
        make_checkpoint(directory, MODELS[model])
        nbytes = open_source(directory).nbytes
        for params_dtype in arguments.params_dtypes:
            results: dict[str, list[dict[str, float]]] = {loader: [] for loader in arguments.loaders}
            for number in range(arguments.rounds + 1):  # the first warms the page cache
                for loader in arguments.loaders if number else arguments.loaders[:1]:
                    result = in_new_process(loader, directory, params_dtype)
                    if number:
                        results[loader].append(result)
                        print(
                            f"{model}, {params_dtype}, {loader}: {result['seconds']:.2f} s", file=sys.stderr, flush=True
                        )
            parameters = nbytes * (2 if params_dtype == "float32" else 1)
            best = statistics.median(result["seconds"] for result in results[arguments.loaders[0]])
            for loader, measured in results.items():
                seconds = statistics.median(result["seconds"] for result in measured)
                beyond = max(result["bytes"] for result in measured) - parameters
                yield [
                    f"{model} ({nbytes / 1e9:.1f} GB)",
                    params_dtype,
                    loader,
                    f"{seconds:.2f}",
                    f"{seconds / best:.2f}",
                    f"{beyond / MIB:+.0f}",
                ]


def in_new_process(loader: str, directory: Path, params_dtype: str) -> dict[str, float]:
    """Measures in a fresh process; MindFormers' printing goes to a log beside the checkpoints."""
    output = directory.parent / "result.json"
    command = [
        sys.executable,
        str(Path(__file__).resolve()),
        "--measure",
        loader,
        str(directory),
        params_dtype,
        str(output),
    ]
    with (directory.parent / "log.txt").open("w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log, cwd=directory.parent)
    result: dict[str, float] = json.loads(output.read_text())
    return result


def main() -> None:
    """Measures one loader when told so, else compares them."""
    if sys.argv[1:2] == ["--measure"]:
        loader, directory, params_dtype, output = sys.argv[2:]
        Path(output).write_text(json.dumps(measure(loader, Path(directory), params_dtype)))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True, help="holds the checkpoints")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS)[1:])
    parser.add_argument("--params_dtypes", nargs="+", choices=["bfloat16", "float32"], default=["bfloat16"])
    parser.add_argument(
        "--loaders", nargs="+", choices=LOADERS, default=list(LOADERS), help="the first is the yardstick"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parsed = parser.parse_args()
    parsed.work_dir = parsed.work_dir.resolve()
    arguments = Arguments(**vars(parsed))
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    headers = ("checkpoint", "parameters", "loader", "seconds", "x floor", "MiB beyond the parameters")
    print(table(headers, compare(arguments)))


if __name__ == "__main__":
    main()
