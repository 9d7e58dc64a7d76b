#!/usr/bin/env python3
"""Two checkpoints held against each other: ``mf-qwen3 verify A B`` beside ``cmp``, on as many bytes.

    python benchmarks/verifying.py --work_dir /tmp/benchmark

makes synthetic checkpoints of real shapes (random bfloat16) and compares, each in turn, the checkpoints in the page
cache (warm) or not (cold),

    cmp           the files of a Hugging Face checkpoint with a copy of them
    same dialect  mf-qwen3 verify, the same two directories
    training      mf-qwen3 verify, Hugging Face's and MindFormers' training layout of the same weights

each in a process of its own, start-up included.
"""

from __future__ import annotations

import shutil
import sys
from argparse import Namespace
from collections.abc import Iterator
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.checkpoints import MODELS, make_checkpoint, title
from benchmarks.conversion import BRIDGE, trained_copy
from benchmarks.measuring import HEADERS, MIB, Measured, markdown, new_parser, prepare_cache, report, run

TITLES = ("checkpoint", "cache", "program", *HEADERS, "x cmp", "private MiB")


def compare(arguments: Namespace) -> Iterator[list[str]]:
    """A row of the table for each model, state of the page cache and program."""
    log = arguments.work_dir / "verifying.log"
    for model in arguments.models:
        hf = make_checkpoint(arguments.work_dir, model)
        trained, copy = trained_copy(hf, log), hf.with_name(f"{hf.name}-copy")
        shutil.copytree(hf, copy, dirs_exist_ok=True)
        each_file = 'for file in "$0"/*.safetensors; do cmp "$file" "$1/$(basename "$file")" || exit 1; done'
        programs: dict[str, tuple[list[object], Path]] = {
            "cmp": (["sh", "-c", each_file, hf, copy], copy),
            "same dialect": ([*BRIDGE, "verify", hf, copy], copy),
            "training": ([*BRIDGE, "verify", hf, trained], trained),
        }
        for cache in arguments.caches:
            results: dict[str, list[Measured]] = {program: [] for program in programs}
            for _, (program, (command, other)) in product(range(arguments.rounds), programs.items()):
                prepare_cache(cache, hf, other)
                results[program].append(run(command, log))
                report(model, cache, program, results[program][-1])
            first = Measured.of(results["cmp"]).seconds
            for program, found in results.items():
                measured = Measured.of(found)
                ratio, private = f"{measured.seconds / first:.2f}", f"{measured.private_bytes / MIB:.0f}"
                yield [title(model, hf), cache, program, *measured.cells(), ratio, private]
        shutil.rmtree(copy)


def main() -> None:
    """Compares the programs for each model."""
    parser = new_parser(__doc__, MODELS, ["Qwen3-30B-A3B, 4 layers"], 5)
    arguments = parser.parse_args()
    print(markdown(TITLES, compare(arguments)))


if __name__ == "__main__":
    main()
