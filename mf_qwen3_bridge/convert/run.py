"""Runs jobs: carries out plans into the files of a directory, in either direction."""

from __future__ import annotations

import hashlib
import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mf_qwen3_bridge import __version__
from mf_qwen3_bridge.convert.file_layout import OutputFile
from mf_qwen3_bridge.convert.output_directory import OutputDirectory
from mf_qwen3_bridge.convert.workers import ALONE, Worker, Workers
from mf_qwen3_bridge.errors import first_names, fold_names, folded_problems, refuse
from mf_qwen3_bridge.transfer.copying import BUFFER_BYTES, Made, Transfer
from mf_qwen3_bridge.transfer.plan import Plan, check_values
from mf_qwen3_bridge.transfer.progress import progress_bar, size_text
from mf_qwen3_bridge.transfer.safetensors import TensorInfo
from mf_qwen3_bridge.transfer.tiles import Tile, tiles
from mf_qwen3_bridge.transfer.values import Casts, casts_of, largest_magnitude


@dataclass(frozen=True)
class Part:
    """A plan, the files that its targets are written to, and how many bytes and which files it reads.

    ``recipes`` is a digest of how computed sources are computed.
    ``make_plan`` returns the plan, because of many parts not all are kept in memory.
    """

    make_plan: Callable[[], Plan]
    files: Sequence[OutputFile]
    source_nbytes: int
    sources: frozenset[Path]
    recipes: str

    @classmethod
    def of(cls, plan: Plan, files: Sequence[OutputFile], make_plan: Callable[[], Plan] | None = None) -> Part:
        """The part that writes ``plan`` to ``files``; the plan is not kept if ``make_plan`` makes it again."""
        sources = {copy.source for copy in plan.copies}
        files_read = frozenset(file for source in sources for file in source.files)
        computed = sorted(repr(source) for source in sources if source.computed)
        recipes = hashlib.sha256("\n".join(computed).encode()).hexdigest()
        return cls(make_plan or (lambda: plan), files, plan.source_nbytes, files_read, recipes)


@dataclass(frozen=True)
class Job:
    """A directory to write.

    Attributes:
        source, target: describe source and result to the user.
        num_source_tensors: number of tensors that are read.
        output: the directory.
        parts: one, or one for each rank.
        others: name -> contents of the other files, the index last.
        ignored: names of tensors that are left out because they are not weights.
        checks_values: whether the tensors are weights, which must not be all zero or contain NaN or infinity.
        may_be_zero: whether they may be all zero nevertheless.
        notes, warning: for the user.
    """

    source: str
    num_source_tensors: int
    target: str
    output: Path
    parts: tuple[Part, ...]
    others: Mapping[str, bytes]
    ignored: tuple[str, ...] = ()
    checks_values: bool = True
    may_be_zero: bool = False
    notes: tuple[str, ...] = ()
    warning: str = ""

    @property
    def source_nbytes(self) -> int:
        """Bytes that are read."""
        return sum(part.source_nbytes for part in self.parts)

    @cached_property
    def files(self) -> list[OutputFile]:
        """The safetensors files of all parts."""
        return [file for part in self.parts for file in part.files]

    @property
    def num_tensors(self) -> int:
        """Number of tensors that are written."""
        return sum(len(file.tensors) for file in self.files)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that determines the bytes that are written."""
        sources = frozenset.union(*(part.sources for part in self.parts))
        return {
            "bridge": __version__,
            "from": self.source,
            "to": self.target,
            "sources": {str(file.resolve()): [file.stat().st_size, file.stat().st_mtime_ns] for file in sources},
            "computed": [part.recipes for part in self.parts],
            "tensors": {file.name: hashlib.sha256(file.header).hexdigest() for file in self.files},
            "other files": {name: hashlib.sha256(content).hexdigest() for name, content in self.others.items()},
        }

    def directory(self, worker: Worker = ALONE) -> OutputDirectory:
        """The output directory, for one of the workers."""
        return OutputDirectory(self.output, self.files, self.identity, worker)


@dataclass
class Findings:
    """What was found about the values while they were copied."""

    # (target name, source tensor) -> largest magnitude
    magnitudes: dict[tuple[str, TensorInfo], float] = field(default_factory=lambda: defaultdict(float))
    # (source dtype, target dtype) -> what casting changed
    casts: dict[tuple[str, str], Casts] = field(default_factory=lambda: defaultdict(Casts))

    def add(self, other: Findings) -> None:
        """Adds what was found elsewhere."""
        for place, magnitude in other.magnitudes.items():
            self.magnitudes[place] = max(self.magnitudes[place], magnitude)
        for dtypes, casts in other.casts.items():
            self.casts[dtypes] += casts

    def to_json(self) -> dict[str, Any]:
        """The findings for :meth:`from_json`."""
        casts = [[*dtypes, asdict(c) | {"overflowed": sorted(c.overflowed)}] for dtypes, c in self.casts.items()]
        magnitudes = [
            [target, [source.name, source.shape, source.dtype, str(source.file), source.start, source.nbytes], value]
            for (target, source), value in self.magnitudes.items()
        ]
        return {"magnitudes": magnitudes, "casts": casts}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Findings:
        """The findings of another worker, from :meth:`to_json`."""
        found = cls()
        for target, (name, shape, dtype, file, *place), value in content["magnitudes"]:
            found.magnitudes[target, TensorInfo(name, tuple(shape), dtype, Path(file), *place)] = value
        for source, target, casts in content["casts"]:
            found.casts[source, target] = Casts(**casts | {"overflowed": set(casts["overflowed"])})
        return found


@dataclass(frozen=True)
class Summary:
    """The result of a job: tensors and bytes written, seconds, what casting changed, notes for the user."""

    num_tensors: int
    nbytes: int
    seconds: float
    casts: Mapping[tuple[str, str], Casts]
    notes: tuple[str, ...] = ()

    def lines(self) -> Iterator[str]:
        """The summary as lines of text."""
        for (source, target), cast in sorted(self.casts.items()):
            yield (
                f"cast        {source} to {target}: {cast.rounded} of {cast.values} values rounded, "
                f"{cast.vanished} of them to zero"
            )
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        yield (
            f"written     {self.num_tensors} tensors, {size_text(self.nbytes)} in {self.seconds:.1f} s, "
            f"{size_text(self.nbytes / self.seconds)}/s, peak memory {size_text(peak)}"
        )
        yield from (f"note        {note}" for note in self.notes)


def run(job: Job, worker: Worker = ALONE) -> Summary | None:
    """Writes a job's directory, or this worker's share of it; resumes a run that was interrupted.

    The job is the same for all workers. The first waits for the others, completes the directory and returns a summary;
    the others return None.

    Raises:
        BridgeError: no room, the place is taken, invalid weights, values too large for their dtype, a worker failed.
    """
    started = time.monotonic()
    directory = job.directory(worker)
    with directory.opened():
        workers = Workers(directory.state, worker)
        with workers.alive():
            if worker.number == 0:
                with directory.discarding():
                    job.parts[0].make_plan().check_duplicates()
            findings = _write(job, directory)
            if worker.number > 0:
                workers.report(findings.to_json())
                workers.wait_for_the_end()
                return None
            for content in workers.wait_for_reports():
                findings.add(Findings.from_json(content))
            if job.checks_values:
                with directory.discarding():
                    _check_values(findings, job.may_be_zero)
            directory.complete(job.others)
    seconds = time.monotonic() - started
    return Summary(job.num_tensors, directory.nbytes, seconds, dict(findings.casts), tuple(directory.notes))


def _write(job: Job, directory: OutputDirectory) -> Findings:
    """Reads, permutes and writes this worker's tiles. All workers get equally many bytes."""
    findings = Findings()
    worker = directory.worker
    done, total = 0, max(job.source_nbytes, 1)

    def share(plan: Plan) -> Iterator[Tile]:
        nonlocal done
        for tile in tiles(plan.copies, to_files=True):
            if done * worker.count // total == worker.number:
                yield tile
            done += sum(copy.nbytes for copy in tile)

    with progress_bar("writing", job.source_nbytes // worker.count) as advance, Transfer(advance) as transfer:
        for part in job.parts:
            places = {name: tensor for file in part.files for name, tensor in file.tensors.items()}
            dtypes = {name: tensor.dtype for name, tensor in places.items()}

            def look(made: Made, places: Mapping[str, TensorInfo] = places) -> Findings:
                target = places[made.target]
                for start, elements in made.runs:
                    directory.put(str(target.file), target.start + start * elements.itemsize, elements)
                return _look_at_values(made, target.dtype) if job.checks_values else Findings()

            for seen in transfer.make(share(part.make_plan()), look, dtypes):
                findings.add(seen)
        directory.sync(transfer.map)
    return findings


def _look_at_values(made: Made, dtype: str) -> Findings:
    findings = Findings()
    for copy, elements, place in made.parts:
        key = copy.target, copy.source
        findings.magnitudes[key] = max(findings.magnitudes[key], largest_magnitude(elements))
        if not np.can_cast(elements.dtype, place.dtype):
            findings.casts[copy.source.dtype, dtype] += casts_of(copy.target, elements, place)
    return findings


def _check_values(findings: Findings, may_be_zero: bool) -> None:
    """Refuses invalid weights, and values that do not fit the new dtype."""
    magnitudes: dict[str, dict[TensorInfo, float]] = defaultdict(dict)
    for (target, source), magnitude in findings.magnitudes.items():
        magnitudes[target][source] = magnitude
    check_values(magnitudes, may_be_zero=may_be_zero)
    overflowed = {}
    for (dtype, narrower), casts in findings.casts.items():
        remedy = "use fp32" if narrower == "BF16" else "use bf16, which has float32's range, or fp32"
        overflowed[f"{dtype} values too large for {narrower}", remedy] = casts.overflowed
    refuse("not all values fit the new dtype", folded_problems(overflowed))


def describe(job: Job) -> Iterator[str]:
    """Describes what a job will write and what it needs, as lines of text."""
    directory = job.directory()
    largest = max((tensor for file in job.files for tensor in file.tensors.values()), key=lambda tensor: tensor.nbytes)
    ranks = f" for {len(job.parts)} ranks" if len(job.parts) > 1 else ""
    files = "1 file" if len(job.files) == 1 else f"{len(job.files)} files"
    yield f"from        {job.source}, {job.num_source_tensors} tensors"
    yield f"to          {job.target}, {job.num_tensors} tensors{ranks}, {size_text(directory.nbytes)} in {files}"
    yield f"            {directory.path}: {first_names(fold_names([*directory.files, *job.others]), 8)}"
    yield f"largest     {largest.name} {largest.shape} {largest.dtype}, {size_text(largest.nbytes)}"
    yield f"memory      at most {size_text(BUFFER_BYTES)} of buffers"
    if job.ignored:
        some = ", ".join(fold_names(job.ignored)[:8])
        yield f"left out    {len(job.ignored)} tensors that are state of a training run: {some}"
    yield from (f"note        {note}" for note in job.notes)
