"""Compares two checkpoints, in any two dialects, bit for bit; every byte of both is read once."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from mf_qwen3_bridge.errors import BridgeError, Problem, folded_problems, refuse
from mf_qwen3_bridge.inputs.identify import Weights
from mf_qwen3_bridge.transfer.copying import Made, Transfer
from mf_qwen3_bridge.transfer.plan import Plan
from mf_qwen3_bridge.transfer.progress import progress_bar
from mf_qwen3_bridge.transfer.safetensors import TensorInfo
from mf_qwen3_bridge.transfer.tiles import tiles
from mf_qwen3_bridge.verify import diagnosis

# Of the second checkpoint, by each thread at a time.
_COMPARED_ELEMENTS = 256 << 10


@dataclass(frozen=True)
class Report:
    """What a comparison found.

    Attributes:
        num_tensors, nbytes: tensors that were compared, and bytes of the first side.
        dtypes: pairs of dtypes that differ, and the tensors.
        different: of each tensor that differs, how many of its elements do, and how many it has.
        suggestions: what may have happened to some of these.
        ignored: tensors of either side that are no weights, but state of a training run.
    """

    num_tensors: int
    nbytes: int
    dtypes: Mapping[tuple[str, str], list[str]]
    different: Mapping[str, tuple[int, int]]
    suggestions: Mapping[str, str]
    ignored: tuple[str, ...] = ()

    @property
    def is_equal(self) -> bool:
        """Whether every bit is the same."""
        return not self.different and not self.dtypes

    def problems(self) -> Iterator[Problem]:
        """What differs, folded."""
        different: dict[tuple[str, str], list[str]] = defaultdict(list)
        for (left, right), names in self.dtypes.items():
            different[f"{left}, and {right}", "dtypes differ; values are compared as the second's"] += names
        for name, (count, elements) in self.different.items():
            share = f"{100 * count / elements:.0f} %" if 100 * count >= elements else "less than 1 %"
            found = f"values differ in {share} of elements"
            different[found, self.suggestions.get(name, "")].append(name)
        return folded_problems(different)


def compare(left: Weights, right: Weights) -> Report:
    """Compares all weights, bit for bit; a tensor of another dtype is cast to the second's.

    Raises BridgeError, with a table of what differs, if they are not of one model.
    """
    tied = left.spec.tie_word_embeddings or right.spec.tie_word_embeddings
    left, right = (replace(side, spec=replace(side.spec, tie_word_embeddings=tied)) for side in (left, right))
    differ = [
        Problem(name, f"{left.source.path}: {mine}\n{right.source.path}: {other}", "name two of one model")
        for name in left.spec.numbers | right.spec.numbers
        if (mine := getattr(left.spec, name)) != (other := getattr(right.spec, name))
    ]
    refuse("these are not of one model", differ)
    plan = left.plan(right.dialect)
    theirs = right.source.tensors
    ignored: set[str] = set()
    for side in (left, right):
        own = side.plan(side.dialect)  # planning it shows that it is whole
        if own.unequal_duplicates():
            found = f"{side.source.path}: its own, which is not its embedding\nthe other: none"
            remedy = "set tie_word_embeddings to false in its config.json if it was trained untied"
            raise BridgeError("these do not hold the same weights", [Problem("output layer", found, remedy)])
        ignored |= set(own.ignored)
    counts = _compare(plan, theirs, by_source=left.dialect.is_hf)
    dtypes: dict[tuple[str, str], list[str]] = defaultdict(list)
    for target in plan.targets:
        if target.dtype != theirs[target.name].dtype:
            dtypes[target.dtype, theirs[target.name].dtype].append(target.name)
    different = {name: (count, elements) for name, (count, elements) in counts.items() if count}
    suggestions = dict(diagnosis.suggestions(left, right, different))
    return Report(len(counts), plan.source_nbytes, dict(dtypes), different, suggestions, tuple(sorted(ignored)))


def _compare(plan: Plan, theirs: Mapping[str, TensorInfo], by_source: bool) -> dict[str, tuple[int, int]]:
    """Carries the plan out in memory: how many elements of each tensor differ from theirs, and of how many."""
    counts: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    dtypes = {name: tensor.dtype for name, tensor in theirs.items()}
    with progress_bar("comparing", plan.source_nbytes) as advance, Transfer(advance) as transfer:

        def look(made: Made) -> list[tuple[str, int, int]]:
            """For each copy of what a tile makes: the tensor's name, how many elements differ, and of how many."""
            raw = np.dtype(f"u{made.runs[0][1].itemsize}")
            are_equal = True
            for start, run in made.runs:
                for begin in range(0, run.size, _COMPARED_ELEMENTS):
                    piece = run[begin : begin + _COMPARED_ELEMENTS].view(raw)
                    there = np.empty_like(piece)
                    transfer.read(theirs[made.target], start + begin, there)
                    piece ^= there
                    are_equal = are_equal and not np.count_nonzero(piece)
            found = []
            for copy, elements, place in made.parts:
                different = 0 if are_equal else int(np.count_nonzero(place.view(raw)))
                found.append((copy.source.name if by_source else copy.target, different, elements.size))
            return found

        for seen in transfer.make(tiles(plan.copies, to_files=True), look, dtypes):
            for name, different, elements in seen:
                counts[name] = counts[name][0] + different, counts[name][1] + elements
    return counts
