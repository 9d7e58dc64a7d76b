"""Runs all benchmarks: prints the tables of docs/performance.md, and draws its picture.

    python -m benchmarks --work_dir /tmp/benchmark

takes some ten minutes and 20 GB. What needs MindFormers is left out where that is not installed.
"""

from __future__ import annotations

import shutil
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

from benchmarks import conversion, loading, ranks, verifying
from benchmarks.checkpoints import directory_name
from benchmarks.measuring import CACHES, ROOT, markdown, report, work_dir

sys.path.insert(0, str(ROOT / "docs"))

import draw_performance

SMALL, DENSE, MOE = "Qwen3-0.6B", "Qwen3-8B, 6 layers", "Qwen3-30B-A3B, 4 layers"
PROGRAMS = {"warm": conversion.PROGRAMS[:-1], "cold": ("cp+sync", "cp", "bridge")}


def main() -> None:
    """Runs one benchmark after the other."""
    parser = ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("--work_dir", type=work_dir, required=True, help="holds the checkpoints while it runs")
    parser.add_argument("--rounds", type=int, default=3, help="of converting and exporting, warm; others run once")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "pictures" / draw_performance.PICTURE)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, to see whether everything runs")
    options = parser.parse_args()
    small, dense, moe = ["tiny"] * 3 if options.smoke else (SMALL, DENSE, MOE)

    def arguments(model: str, caches: Sequence[str] = CACHES, rounds: int = 1, **more: object) -> Namespace:
        return Namespace(work_dir=options.work_dir, models=[model], caches=caches, rounds=rounds, **more)

    def show(heading: str, titles: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        print(f"## {heading}\n\n{markdown(titles, rows)}\n", flush=True)

    def remove(model: str) -> None:
        for directory in options.work_dir.glob(f"{directory_name(model)}*"):
            shutil.rmtree(directory)

    heading = "Loading a checkpoint into the inference network"
    if find_spec("mindformers"):
        titles = loading.headers(loading.LOADERS)
        loaded = list(loading.compare(arguments(small, params_dtypes=["bfloat16"], loaders=loading.LOADERS)))
        loaded += loading.compare(arguments(moe, params_dtypes=["bfloat16"], loaders=loading.LOADERS[:2]))
        show(heading, titles, loaded)
    else:
        report(f"{heading}: left out, as MindFormers is not installed")
    read = [row for model in (dense, moe) for row in ranks.compare(arguments(model, disk_mb_per_second=300))]
    show("What ranks read from the disk", ranks.HEADERS, read)
    remove(dense)  # there is not room for all at once everywhere

    written: list[list[str]] = []
    titles = conversion.headers(PROGRAMS["warm"])
    for model in small, moe:
        for cache, rounds in ("warm", options.rounds), ("cold", 1):
            more = {"programs": PROGRAMS[cache], "mindformers_source": None}
            written += conversion.compare(arguments(model, [cache], 1 if options.smoke else rounds, **more))
        if model != moe:
            remove(model)
    show("Writing a checkpoint", titles, written)
    options.picture.write_text(draw_performance.svg(dict(zip(titles, row)) for row in written), encoding="utf-8")

    show("Comparing two checkpoints", verifying.TITLES, verifying.compare(arguments(moe)))
    remove(moe)


if __name__ == "__main__":
    main()
