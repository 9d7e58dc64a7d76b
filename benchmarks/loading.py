#!/usr/bin/env python3
"""Loading a checkpoint into MindFormers' inference network: time and memory of each loader, side by side.

    python benchmarks/loading.py --work_dir /tmp/benchmark

makes synthetic checkpoints of real shapes (random bfloat16; some 12 GB, kept for the next run), and loads each by

    floor      its bytes read once and copied once into memory that is taken for them, cast to the parameters' dtype
    direct     the bridge's loader
    delegated  load_checkpoint, convert_weight_dict, load_param_into_net
    upstream   MindFormers' own network.load_weights

each in a process of its own, by all cores, the checkpoint in the page cache (warm) or not (cold). Building the network
is not part of the time. The memory is what the process has for itself alone (anonymous pages) at its peak, beyond what
it had before the network was built and beyond the parameters.
"""

from __future__ import annotations

import os
import sys
import threading
from argparse import Namespace
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product, repeat
from pathlib import Path

import ml_dtypes
import numpy as np

from mf_qwen3_bridge.inputs.opening import open_source
from mf_qwen3_bridge.transfer.safetensors import DTYPES, Reader, TensorInfo
from mf_qwen3_bridge.transfer.tiles import TILE_BYTES

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.checkpoints import MODELS, make_checkpoint, title
from benchmarks.measuring import (
    HEADERS,
    MIB,
    Measured,
    Meter,
    call,
    markdown,
    new_parser,
    prepare_cache,
    private_bytes,
    report,
)

LOADERS = ("floor", "direct", "delegated", "upstream")


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


def measure(loader: str, directory: Path, params_dtype: str) -> Measured:
    """Loads once, in this process; the private bytes are those beyond what it had before the network was built.

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
    with Meter() as meter:
        if loader == "floor":
            floor(directory, DTYPES[{"bfloat16": "BF16", "float32": "F32"}[params_dtype]])
        elif loader == "upstream":
            InferModelMixin.load_weights(network, str(directory))
        else:
            load_network(network, model, use_training_conversion=loader == "delegated")
    return meter.measured._replace(private_bytes=meter.measured.private_bytes - before)


def compare(arguments: Namespace) -> Iterator[list[str]]:
    """A row of the table for each model, dtype, state of the page cache and loader."""
    for model in arguments.models:
        directory = make_checkpoint(arguments.work_dir, model)
        for params_dtype, cache in product(arguments.params_dtypes, arguments.caches):
            results: dict[str, list[Measured]] = {loader: [] for loader in arguments.loaders}
            for _, loader in product(range(arguments.rounds), arguments.loaders):
                prepare_cache(cache, directory)
                results[loader] += call(measure, [(loader, directory, params_dtype)], arguments.work_dir / "log.txt")
                report(model, params_dtype, cache, loader, results[loader][-1])
            parameters = open_source(directory).nbytes * (2 if params_dtype == "float32" else 1)
            first = Measured.of(results[arguments.loaders[0]]).seconds
            for loader, found in results.items():
                measured = Measured.of(found)
                yield [
                    title(model, directory),
                    params_dtype,
                    cache,
                    loader,
                    *measured.cells(),
                    f"{measured.seconds / first:.2f}",
                    f"{(measured.private_bytes - parameters) / MIB:+.0f}",
                ]


def headers(loaders: Sequence[str]) -> list[str]:
    """The titles of the table."""
    return ["checkpoint", "parameters", "cache", "loader", *HEADERS, f"x {loaders[0]}", "MiB beyond the parameters"]


def main() -> None:
    """Compares the loaders."""
    parser = new_parser(__doc__, MODELS, list(MODELS)[1:], 3)
    parser.add_argument("--params_dtypes", nargs="+", choices=["bfloat16", "float32"], default=["bfloat16"])
    parser.add_argument(
        "--loaders", nargs="+", choices=LOADERS, default=list(LOADERS), help="the first is the yardstick"
    )
    arguments = parser.parse_args()
    print(markdown(headers(arguments.loaders), compare(arguments)))


if __name__ == "__main__":
    main()
