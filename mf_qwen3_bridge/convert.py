"""Plans carried out into files: the same for every direction."""

from __future__ import annotations

import hashlib
import resource
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mf_qwen3_bridge import __version__
from mf_qwen3_bridge.checkpoint import DTYPES, TensorInfo
from mf_qwen3_bridge.errors import BridgeError, Problem, fold_names
from mf_qwen3_bridge.files import OutputFile
from mf_qwen3_bridge.output import OutputDirectory
from mf_qwen3_bridge.plan import Plan
from mf_qwen3_bridge.progress import progress_bar
from mf_qwen3_bridge.tiles import Tile, tiles, writes
from mf_qwen3_bridge.transfer import BUFFER_BYTES, Transfer, carve, copy_elements, read_nbytes, room
from mf_qwen3_bridge.values import Casts, casts_of, is_exact, largest_magnitude
from mf_qwen3_bridge.workers import ALONE, Worker, Workers

GIB = 1 << 30
MIB = 1 << 20


@dataclass(frozen=True)
class Part:
    """A plan, and the files that hold what it makes."""

    plan: Plan
    files: Sequence[OutputFile]


@dataclass(frozen=True)
class Job:
    """A directory to be made.

    Attributes:
        source: what it is made of, for a person.
        target: what it is, for a person.
        output: where.
        parts: what its safetensors files are made of; one, or one for each rank.
        others: its other files, the index last.
        checks_values: whether what is moved are weights, which are never NaN or all zero.
        notes: what the user should know.
    """

    source: str
    target: str
    output: Path
    parts: tuple[Part, ...]
    others: Mapping[str, bytes]
    checks_values: bool = True
    notes: tuple[str, ...] = ()

    @property
    def source_nbytes(self) -> int:
        """Bytes that are read."""
        return sum(part.plan.source_nbytes for part in self.parts)

    @property
    def num_tensors(self) -> int:
        """Number of tensors that are written."""
        return sum(len(part.plan.targets) for part in self.parts)

    def directory(self, worker: Worker = ALONE) -> OutputDirectory:
        """The directory that this job makes."""
        sources = {copy.source.file for part in self.parts for target in part.plan.targets for copy in target.copies}
        files = [file for part in self.parts for file in part.files]
        identity = {
            "bridge": __version__,
            "sources": {str(file.resolve()): [file.stat().st_size, file.stat().st_mtime_ns] for file in sources},
            "tensors": {file.name: hashlib.sha256(file.header).hexdigest() for file in files},
            "other files": {name: hashlib.sha256(content).hexdigest() for name, content in self.others.items()},
        }
        return OutputDirectory(self.output, files, identity, worker)


@dataclass
class Findings:
    """What was seen of the values on their way.

    Attributes:
        magnitudes: for each part, target and source tensor the largest magnitude.
        casts: for each pair of dtypes what casting did.
    """

    magnitudes: dict[tuple[int, str, str], float] = field(default_factory=lambda: defaultdict(float))
    casts: dict[tuple[str, str], Casts] = field(default_factory=lambda: defaultdict(Casts))

    def add(self, other: Findings) -> None:
        """Takes in what another has seen."""
        for place, magnitude in other.magnitudes.items():
            self.magnitudes[place] = max(self.magnitudes[place], magnitude)
        for dtypes, casts in other.casts.items():
            self.casts[dtypes] += casts

    def to_json(self) -> dict[str, Any]:
        """What :meth:`from_json` reads."""
        casts = [[*dtypes, asdict(c) | {"overflowed": sorted(c.overflowed)}] for dtypes, c in self.casts.items()]
        return {"magnitudes": [[*place, value] for place, value in self.magnitudes.items()], "casts": casts}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Findings:
        """What another worker has seen."""
        found = cls()
        found.magnitudes.update({(part, target, source): m for part, target, source, m in content["magnitudes"]})
        for source, target, casts in content["casts"]:
            found.casts[source, target] = Casts(**casts | {"overflowed": set(casts["overflowed"])})
        return found


@dataclass(frozen=True)
class Summary:
    """What a job did: tensors and bytes written, seconds, what casting did."""

    num_tensors: int
    nbytes: int
    seconds: float
    casts: Mapping[tuple[str, str], Casts]

    def lines(self) -> Iterator[str]:
        """For a person."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        yield from cast_lines(self.casts)
        yield (
            f"written     {self.num_tensors} tensors, {self.nbytes / GIB:.2f} GiB in {self.seconds:.1f} s, "
            f"{self.nbytes / self.seconds / 1e9:.2f} GB/s, peak memory {peak / MIB:.0f} MiB"
        )


def cast_lines(casts: Mapping[tuple[str, str], Casts]) -> Iterator[str]:
    """What casting to narrower dtypes did, for a person."""
    for (source, target), cast in sorted(casts.items()):
        yield (
            f"cast        {source} to {target}: {cast.rounded} of {cast.values} values rounded, "
            f"{cast.vanished} of them to zero"
        )


def run(job: Job, worker: Worker = ALONE) -> Summary | None:
    """Makes a job's directory, or this worker's share of it; continues one that was interrupted.

    Args:
        job: what to make. All workers have to be given the same.
        worker: which of the workers this is. The first waits for the others and finishes the directory.

    Returns:
        What was done, from the first worker; None from the others.

    Raises:
        BridgeError: no room, the place is taken, weights that no trained model has, values that don't fit their new
            dtype, another worker failed.
    """
    started = time.monotonic()
    for part in job.parts:
        part.plan.check_duplicates()
    directory = job.directory(worker)
    with directory.opened():
        workers = Workers(directory.state, worker)
        with workers.alive():
            findings = _write(job, directory)
            if worker.number > 0:
                workers.report(findings.to_json())
                workers.wait_for_the_end()
                return None
            for content in workers.wait_for_reports():
                findings.add(Findings.from_json(content))
            try:
                if job.checks_values:
                    _check(job, findings)
            except BridgeError:
                if worker.count == 1:  # others are still looking at it
                    directory.discard()
                raise
            directory.complete(job.others)
    return Summary(job.num_tensors, directory.nbytes, time.monotonic() - started, dict(findings.casts))


def _share(job: Job, worker: Worker) -> Iterator[tuple[int, Tile, Mapping[str, TensorInfo]]]:
    """This worker's tiles: (number of the part, tile, where each target goes). Each gets as many bytes."""
    done, total = 0, job.source_nbytes
    for number, part in enumerate(job.parts):
        places = {name: tensor for file in part.files for name, tensor in file.tensors.items()}
        for tile in tiles((copy for target in part.plan.targets for copy in target.copies), to_files=True):
            if done * worker.count // total == worker.number:
                yield number, tile, places
            done += sum(copy.nbytes for copy in tile)


def _write(job: Job, directory: OutputDirectory) -> Findings:
    findings = Findings()
    nbytes = job.source_nbytes // directory.worker.count
    with progress_bar("writing", nbytes) as advance, Transfer(advance) as transfer:

        def carry_out(share: tuple[int, Tile, Mapping[str, TensorInfo]]) -> tuple[Tile, Findings]:
            number, tile, places = share
            seen = _carry_out(number, tile, places, transfer, directory)
            return tile, seen if job.checks_values else Findings()

        for tile, seen in transfer.map(carry_out, _share(job, directory.worker)):
            findings.add(seen)
            transfer.advance(tile)
        directory.sync(transfer.map)
    return findings


def _carry_out(
    number: int, tile: Tile, places: Mapping[str, TensorInfo], transfer: Transfer, directory: OutputDirectory
) -> Findings:
    """Reads a tile, permutes it, and writes it."""
    findings = Findings()

    def put(target: TensorInfo, start: int, elements: np.ndarray) -> None:
        directory.put(str(target.file), target.start + start * elements.itemsize, elements)

    stretches = [(copies, stretch, places[copies[0].target]) for copies, stretch in writes(tile)]
    is_copied = len(tile) == 1 and tile[0].lies_alike and tile[0].source.dtype == places[tile[0].target].dtype
    nbytes_read = read_nbytes(tile)
    nbytes_made = 0 if is_copied else sum(room(stretch.size, DTYPES[target.dtype]) for _, stretch, target in stretches)
    with transfer.buffers.lend(nbytes_read + nbytes_made) as memory:
        gathered = dict(zip(tile, transfer.gather(tile, memory)))
        free = memory[nbytes_read:]
        for copies, stretch, target in stretches:
            if is_copied:
                made = gathered[copies[0]]
            else:
                made, free = carve(free, stretch.size, DTYPES[target.dtype])
            for copy, view in zip(copies, stretch.views):
                elements = gathered[copy]
                place = number, copy.target, copy.source.name
                findings.magnitudes[place] = max(findings.magnitudes[place], largest_magnitude(elements))
                if not is_copied:
                    copy_elements(elements, view.of(made))
                if not is_exact(elements.dtype, made.dtype):
                    cast = casts_of(copy.target, elements, view.of(made))
                    findings.casts[copy.source.dtype, target.dtype] += cast
            for start, run_elements in zip(stretch.starts.tolist(), made.reshape(len(stretch.starts), -1)):
                put(target, start, run_elements)
    return findings


def _check(job: Job, findings: Findings) -> None:
    """Looks at the values, now that all have been seen."""
    problems: list[Problem] = []
    for number, part in enumerate(job.parts):
        magnitudes: dict[str, dict[str, float]] = defaultdict(dict)
        for (of_part, target, source), magnitude in findings.magnitudes.items():
            if of_part == number:
                magnitudes[target][source] = magnitude
        try:
            part.plan.check_values(magnitudes)
        except BridgeError as error:
            problems += [problem for problem in error.problems if problem not in problems]
    if problems:
        raise BridgeError("weights that no trained model has", problems)
    for (source, target), casts in findings.casts.items():
        remedy = "use bf16, which has float32's range, or fp32"
        problems += [
            Problem(name, f"{source} values too large for {target}", remedy) for name in fold_names(casts.overflowed)
        ]
    if problems:
        raise BridgeError("not all values fit the new dtype", problems)


def describe(job: Job) -> Iterator[str]:
    """The plan of a job, for a person: what will be made, what it takes."""
    targets = [target for part in job.parts for target in part.plan.targets]
    plan = job.parts[0].plan
    largest = max(targets, key=lambda target: target.nbytes)
    directory = job.directory()
    ranks = f" for {len(job.parts)} ranks" if len(job.parts) > 1 else ""
    sources = {copy.source.name for target in targets for copy in target.copies}
    sources |= {dropped.name for _, dropped in plan.duplicates}
    yield f"from        {job.source}, {len(sources)} tensors"
    yield (
        f"to          {job.target}, {len(targets)} tensors{ranks}, {directory.nbytes / GIB:.2f} GiB in "
        f"{len(directory.files)} {'file' if len(directory.files) == 1 else 'files'}"
    )
    yield f"            {directory.path}: {', '.join(fold_names([*directory.files, *job.others]))}"
    yield f"largest     {largest.name} {largest.shape} {largest.dtype}, {largest.nbytes / MIB:.1f} MiB"
    yield f"memory      at most {BUFFER_BYTES / MIB:.0f} MiB of buffers"
    if plan.ignored:
        yield f"left out    {len(plan.ignored)} tensors that are state of a training run: " + ", ".join(
            fold_names(plan.ignored)[:8]
        )
    yield from (f"note        {note}" for note in job.notes)
