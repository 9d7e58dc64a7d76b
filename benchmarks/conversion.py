#!/usr/bin/env python3
"""Checkpoints into files: time and memory of each program, side by side.

    python benchmarks/conversion.py --work_dir /tmp/benchmark

makes synthetic checkpoints of real shapes (random bfloat16), converts them to MindFormers' training layout and back by

    cp+sync   cp -r of the directory it reads, and sync
    cp        the same without sync
    floor     each tensor read, transposed if it is an expert's, and written, by all cores; nothing is fused or split
    bridge    mf-qwen3 convert, mf-qwen3 export
    buffered  the same, written through the page cache
    upstream  MindFormers' reverse script (back only), from a checkout of its sources: --mindformers_source

each in a process of its own, start-up included, in turns, the checkpoint in the page cache (warm) or not (cold) and
nothing left to write back. The memory is what the processes have for themselves alone (anonymous pages) at their peak.
"""

from __future__ import annotations

import os
import shutil
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np

from mf_qwen3_bridge.convert.file_writing import DIRECT_VARIABLE
from mf_qwen3_bridge.inputs.opening import open_source
from mf_qwen3_bridge.transfer.safetensors import Reader, TensorInfo

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.checkpoints import MODELS, make_checkpoint, title
from benchmarks.measuring import HEADERS, MIB, ROOT, Measured, markdown, new_parser, prepare_cache, report, run

PIECE = 4 << 20
PROGRAMS = ("cp+sync", "cp", "floor", "bridge", "buffered", "upstream")
BRIDGE = [sys.executable, "-m", "mf_qwen3_bridge.cli"]


def floor(source: Path, output: Path) -> None:
    """Reads and writes every tensor, in pieces of 4 MiB; an expert's matrix as a whole, transposed."""
    tensors = list(open_source(source).tensors.values())
    moves: list[tuple[TensorInfo, int, int, int]] = []
    position = 0
    for tensor in tensors:
        step = tensor.nbytes if _is_expert(tensor) else PIECE
        if len(tensor.shape) == 2 and tensor.name.endswith(("weight1", "weight2")):  # all experts of a layer
            step = _expert_shape(tensor)[0] * tensor.shape[1] * 2
        moves += [
            (tensor, start, min(start + step, tensor.nbytes), position + start)
            for start in range(0, tensor.nbytes, step)
        ]
        position += tensor.nbytes
    output.mkdir()
    descriptor = os.open(output / "floor.bin", os.O_WRONLY | os.O_CREAT)

    def move(arguments: tuple[TensorInfo, int, int, int]) -> None:
        tensor, start, stop, target = arguments
        data = np.empty((stop - start) // 2, np.uint16)
        reader.read(tensor, start, memoryview(data.view(np.uint8)))
        if _is_expert(tensor):
            data = np.ascontiguousarray(data.reshape(_expert_shape(tensor)).T)
        os.pwrite(descriptor, memoryview(data.reshape(-1).view(np.uint8)), target)

    with Reader() as reader, ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(move, moves))
    os.fsync(descriptor)


def _is_expert(tensor: TensorInfo) -> bool:
    return ".experts." in tensor.name


def _expert_shape(tensor: TensorInfo) -> tuple[int, int]:
    """Of one expert: of a tensor of its own, or of 128 that are folded into the rows of one."""
    if tensor.name.endswith(("weight1", "weight2")):
        return tensor.shape[0] // 128, tensor.shape[1]
    return tensor.shape[0], tensor.shape[1]


def command_of(program: str, hf: Path, source: Path, output: Path) -> list[object]:
    """The command line of a program, from ``source`` (Hugging Face's or MindFormers') to ``output``."""
    is_export = source != hf
    if program in ("cp", "cp+sync"):
        return ["sh", "-c", f'cp -r "$0" "$1" {"&& sync" if program == "cp+sync" else ""}', source, output]
    if program == "floor":
        return [sys.executable, Path(__file__).resolve(), "--floor", source, output]
    if program in ("bridge", "buffered"):
        bridge = ["env", f"{DIRECT_VARIABLE}={int(program == 'bridge')}", *BRIDGE]
        if is_export:
            return [*bridge, "export", "--input_path", source, "--output_path", output, "--hf_config", hf]
        return [*bridge, "convert", "--model_dir", hf, "--output_dir", output]
    names = open_source(source).tensors
    layers = 1 + max(int(name.split(".")[2]) for name in names if name.startswith("decoder.layers."))
    model = "qwen3-moe" if any(".experts." in name for name in names) else "qwen3"
    command: list[object] = [sys.executable, "convert_weight.py", "--model", model, "--reversed", "--dtype", "bf16"]
    command += ["--input_path", source, "--output_path", output, "--num_layers", layers]
    return [*command, "--max_worker", len(os.sched_getaffinity(0))]


def trained_copy(hf: Path, log: Path) -> Path:
    """The same weights in MindFormers' training layout, beside it; converted unless they are there already."""
    trained = hf.with_name(f"{hf.name}-trained")
    if not trained.is_dir():
        run([*BRIDGE, "convert", "--model_dir", hf, "--output_dir", trained], log)
    return trained


def compare(arguments: Namespace) -> Iterator[list[str]]:
    """A row of the table for each model, direction, state of the page cache and program."""
    log, output = arguments.work_dir / "conversion.log", arguments.work_dir / "output-of-a-program"
    for model in arguments.models:
        hf = make_checkpoint(arguments.work_dir, model)
        trained = trained_copy(hf, log)
        for source, cache in product((hf, trained), arguments.caches):
            programs = [program for program in arguments.programs if program != "upstream" or source == trained]
            results: dict[str, list[Measured]] = {program: [] for program in programs}
            for _, program in product(range(arguments.rounds), programs):
                shutil.rmtree(output, ignore_errors=True)
                prepare_cache(cache, source)
                cwd = arguments.mindformers_source if program == "upstream" else ROOT
                results[program].append(run(command_of(program, hf, source, output), log, cwd))
                report(model, source.name, cache, program, results[program][-1])
            shutil.rmtree(output, ignore_errors=True)
            first = Measured.of(results[programs[0]]).seconds
            for program, found in results.items():
                measured = Measured.of(found)
                yield [
                    title(model, hf),
                    "convert" if source == hf else "export",
                    cache,
                    program,
                    *measured.cells(),
                    f"{measured.seconds / first:.2f}",
                    f"{measured.private_bytes / MIB:.0f}",
                ]


def headers(programs: Sequence[str]) -> list[str]:
    """The titles of the table."""
    return ["checkpoint", "direction", "cache", "program", *HEADERS, f"x {programs[0]}", "private MiB"]


def main() -> None:
    """Runs the floor when told so, else compares the programs."""
    if sys.argv[1:2] == ["--floor"]:
        floor(Path(sys.argv[2]), Path(sys.argv[3]))
        return
    parser = new_parser(__doc__, MODELS, ["Qwen3-0.6B", "Qwen3-30B-A3B, 4 layers"], 5)
    parser.add_argument(
        "--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS[:-1]), help="the first is the yardstick"
    )
    parser.add_argument("--mindformers_source", type=Path, help="for the program 'upstream'; needs torch")
    arguments = parser.parse_args()
    print(markdown(headers(arguments.programs), compare(arguments)))


if __name__ == "__main__":
    main()
