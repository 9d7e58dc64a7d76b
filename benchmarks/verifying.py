#!/usr/bin/env python3
"""Two checkpoints held against each other: ``mf-qwen3 verify A B`` beside ``cmp``, on as many bytes.

    python benchmarks/verifying.py --work_dir /tmp/benchmark

makes synthetic checkpoints of real shapes (random bfloat16) and compares, the page cache warm, each in turn

    cmp           the files of a Hugging Face checkpoint with a copy of them
    same dialect  mf-qwen3 verify, the same two directories
    training      mf-qwen3 verify, Hugging Face's and MindFormers' training layout of the same weights

each in a process of its own, start-up included.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from mf_qwen3_bridge.errors import table
from mf_qwen3_bridge.inputs.opening import open_source

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.checkpoints import MODELS, make_checkpoint
from benchmarks.conversion import BRIDGE, MIB, measure


def compare(model: str, work_dir: Path, rounds: int) -> Iterator[list[str]]:
    """A row of the table for each program."""
    log, here = work_dir / "verifying.log", Path(__file__).resolve().parents[1]
    hf = work_dir / model.replace(", ", "-").replace(" ", "-")
    make_checkpoint(hf, MODELS[model])
    copy, trained = hf.with_name(f"{hf.name}-copy"), hf.with_name(f"{hf.name}-trained")
    if not copy.is_dir():
        shutil.copytree(hf, copy)
    if not trained.is_dir():
        measure([*BRIDGE, "convert", "--model_dir", hf, "--output_dir", trained], log, here)
    each_file = 'for file in "$0"/*.safetensors; do cmp "$file" "$1/$(basename "$file")" || exit 1; done'
    programs: dict[str, tuple[list[object], Path]] = {
        "cmp": (["sh", "-c", each_file, hf, copy], copy),
        "same dialect": ([*BRIDGE, "verify", hf, copy], copy),
        "training": ([*BRIDGE, "verify", hf, trained], trained),
    }
    results: dict[str, list[tuple[float, int]]] = {program: [] for program in programs}
    for _ in range(rounds):
        for program, (command, other) in programs.items():
            for file in (*hf.glob("*.safetensors"), *other.glob("*.safetensors")):  # warms the page cache
                subprocess.run(["cat", str(file)], stdout=subprocess.DEVNULL, check=True)
            results[program].append(measure(command, log, here))
            print(model, program, f"{results[program][-1][0]:.2f} s", file=sys.stderr, flush=True)
    shutil.rmtree(copy)
    medians = {program: statistics.median(seconds for seconds, _ in found) for program, found in results.items()}
    size = f"{model} ({open_source(hf).nbytes / 1e9:.1f} GB)"
    for program, found in results.items():
        ratio, peak = medians[program] / medians["cmp"], max(peak for _, peak in found) / MIB
        yield [size, program, f"{medians[program]:.2f}", f"{ratio:.2f}", f"{peak:.0f}"]


def main() -> None:
    """Compares the programs for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True, help="holds the checkpoints")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["Qwen3-30B-A3B, 4 layers"])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    work_dir = arguments.work_dir.resolve()
    work_dir.mkdir(parents=True, exist_ok=True)
    rows = [row for model in arguments.models for row in compare(model, work_dir, arguments.rounds)]
    print(table(("checkpoint", "program", "seconds", "x cmp", "private MiB"), rows))


if __name__ == "__main__":
    main()
