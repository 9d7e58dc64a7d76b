#!/usr/bin/env python3
"""Checkpoints into files: time and memory of each program, side by side.

    python benchmarks/conversion.py --work_dir /tmp/benchmark

makes synthetic checkpoints of real shapes (random bfloat16), converts them to MindFormers' training layout and back by

    cp        cp -r of the directory it reads, and sync
    floor     each tensor read, transposed if it is an expert's, and written, by all cores; nothing is fused or split
    bridge    mf-qwen3 convert, mf-qwen3 export
    buffered  the same, written through the page cache
    upstream  MindFormers' reverse script (back only), from a checkout of its sources: --mindformers_source

each in a process of its own, start-up included, in turns, the page cache warm and nothing left to write back. The
memory is what the processes have for themselves alone (anonymous pages) at their peak.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from mf_qwen3_bridge.convert.file_writing import DIRECT_VARIABLE
from mf_qwen3_bridge.errors import table
from mf_qwen3_bridge.inputs.opening import open_source
from mf_qwen3_bridge.transfer.safetensors import Reader, TensorInfo

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.checkpoints import MODELS, make_checkpoint

MIB = 1 << 20
PIECE = 4 << 20
PROGRAMS = ("cp", "floor", "bridge", "buffered", "upstream")
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


def private_bytes(session: int) -> int:
    """Anonymous memory of all processes of a session."""
    total = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(process.name)) == session:
                lines = (process / "status").read_text().splitlines()
                total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))
        except OSError:
            continue  # it has ended
    return total


def measure(command: Sequence[object], log: Path, cwd: Path) -> tuple[float, int]:
    """Runs a command: seconds, and peak private bytes."""
    os.sync()
    peak = 0
    stopped = threading.Event()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(cwd), os.environ.get("PYTHONPATH", "")])}
    with log.open("a") as stream:
        start = time.perf_counter()
        process = subprocess.Popen(
            list(map(str, command)), stdout=stream, stderr=stream, cwd=cwd, start_new_session=True, env=environment
        )

        def watch() -> None:
            nonlocal peak
            while not stopped.wait(0.02):
                peak = max(peak, private_bytes(process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        code = process.wait()
        seconds = time.perf_counter() - start
    stopped.set()
    watcher.join()
    if code:
        raise SystemExit(f"{command} failed, see {log}")
    return seconds, peak


def command_of(program: str, hf: Path, source: Path, output: Path) -> list[object]:
    """The command line of a program, from ``source`` (Hugging Face's or MindFormers') to ``output``."""
    is_export = source != hf
    if program == "cp":
        return ["sh", "-c", 'cp -r "$0" "$1" && sync', source, output]
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


def compare(arguments: argparse.Namespace) -> Iterator[list[str]]:
    """A row of the table for each model, direction and program."""
    log = arguments.work_dir / "conversion.log"
    here = Path(__file__).resolve().parents[1]
    for model in arguments.models:
        hf = arguments.work_dir / model.replace(", ", "-").replace(" ", "-")
        make_checkpoint(hf, MODELS[model])
        trained, output = hf.with_name(f"{hf.name}-trained"), arguments.work_dir / "output-of-a-program"
        if not trained.is_dir():
            measure([*BRIDGE, "convert", "--model_dir", hf, "--output_dir", trained], log, here)
        for source in (hf, trained):
            programs = [program for program in arguments.programs if program != "upstream" or source == trained]
            results: dict[str, list[tuple[float, int]]] = {program: [] for program in programs}
            for file in source.glob("*.safetensors"):  # warms the page cache
                subprocess.run(["cat", str(file)], stdout=subprocess.DEVNULL, check=True)
            for _ in range(arguments.rounds):
                for program in programs:
                    shutil.rmtree(output, ignore_errors=True)
                    cwd = arguments.mindformers_source if program == "upstream" else here
                    command = command_of(program, hf, source, output)
                    results[program].append(measure(command, log, cwd))
                    print(model, source.name, program, f"{results[program][-1][0]:.2f} s", file=sys.stderr, flush=True)
            shutil.rmtree(output, ignore_errors=True)
            medians = {
                program: statistics.median(seconds for seconds, _ in found) for program, found in results.items()
            }
            for program, found in results.items():
                yield [
                    f"{model} ({open_source(hf).nbytes / 1e9:.1f} GB)",
                    "convert" if source == hf else "export",
                    program,
                    f"{medians[program]:.2f}",
                    f"{medians[program] / medians[programs[0]]:.2f}",
                    f"{max(peak for _, peak in found) / MIB:.0f}",
                ]


def main() -> None:
    """Runs the floor when told so, else compares the programs."""
    if sys.argv[1:2] == ["--floor"]:
        floor(Path(sys.argv[2]), Path(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True, help="holds the checkpoints")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["Qwen3-0.6B", "Qwen3-30B-A3B, 4 layers"])
    parser.add_argument(
        "--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS[:4]), help="the first is the yardstick"
    )
    parser.add_argument("--mindformers_source", type=Path, help="for the program 'upstream'; needs torch")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    arguments.work_dir = arguments.work_dir.resolve()
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    headers = ("checkpoint", "direction", "program", "seconds", f"x {arguments.programs[0]}", "private MiB")
    print(table(headers, compare(arguments)))


if __name__ == "__main__":
    main()
