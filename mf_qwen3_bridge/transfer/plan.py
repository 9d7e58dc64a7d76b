"""Plans a conversion: a list of copies, made from headers alone.

Everything in which a checkpoint does not fit a model is found while the plan is made, all at once, before anything is
built or read. What is done with the bytes (loaded into a network, written to files, compared) is up to the caller.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import NamedTuple

import numpy as np

from mf_qwen3_bridge.errors import Problem, fold_names, folded_problems, refuse
from mf_qwen3_bridge.model.layouts import Box, View
from mf_qwen3_bridge.model.lora import adapted_parameter
from mf_qwen3_bridge.model.parallel import WHOLE, Rank
from mf_qwen3_bridge.model.parameters import EMBEDDING, OUTPUT, is_training_state
from mf_qwen3_bridge.model.rules import Dialect, Place, Rule, shares
from mf_qwen3_bridge.transfer.blocks import from_shards, within
from mf_qwen3_bridge.transfer.copying import Transfer, have_equal_bytes
from mf_qwen3_bridge.transfer.safetensors import DTYPES, TensorInfo
from mf_qwen3_bridge.transfer.tiles import Copy, tiles
from mf_qwen3_bridge.transfer.values import fault_of, largest_magnitude

FLOATS = ("BF16", "F16", "F32")
Duplicate = tuple[TensorInfo, TensorInfo]
Equality = Callable[[TensorInfo, TensorInfo], bool]


@dataclass(frozen=True)
class Target:
    """A tensor to make, of a dtype as safetensors spells it. ``copies`` together cover each of its elements once."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    copies: tuple[Copy, ...]

    @classmethod
    def of(cls, tensor: TensorInfo) -> Target:
        """The target that is a checkpoint's tensor unchanged."""
        whole = View.whole(tensor.shape)
        return cls(tensor.name, tensor.shape, tensor.dtype, tuple(from_shards(Copy(tensor, whole, tensor.name, whole))))

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize

    def block(self, box: Box) -> Target:
        """The target that is a block of this one."""
        copies = tuple(
            Copy(copy.source, there, copy.target, here)
            for copy in self.copies
            for here, there in within(copy.target_view, copy.source_view, self.shape, box)
        )
        return replace(self, shape=box.shape(self.shape), copies=copies)

    def make(self, transfer: Transfer | None = None) -> np.ndarray:
        """The tensor, its sources read from disk; several share a ``transfer``, which keeps threads and open files."""
        if transfer is None:
            with Transfer() as transfer:
                return self.make(transfer)
        result = np.empty(self.shape, DTYPES[self.dtype])
        transfer.fill(result, self.copies)
        return result


@dataclass(frozen=True)
class Plan:
    """What is made of a checkpoint, and from which tensors.

    Attributes:
        target, targets: the dialect of what is made; the tensors to make, in the model's order.
        duplicates: pairs (kept, dropped) of source tensors that must hold the same bytes: an ``lm_head`` that is
            stored although it is tied to the embedding.
        ignored: names of source tensors that are not weights.
        rank: the process that it is for.
        whole: gives the plan that makes whole tensors, if this one makes slices of them.
    """

    target: Dialect
    targets: tuple[Target, ...]
    duplicates: tuple[Duplicate, ...] = ()
    ignored: tuple[str, ...] = field(default=(), repr=False)
    rank: Rank = WHOLE
    whole: Callable[[], Plan] | None = field(default=None, repr=False, compare=False)

    @property
    def copies(self) -> Iterator[Copy]:
        """All copies, target by target."""
        return (copy for target in self.targets for copy in target.copies)

    @property
    def num_source_tensors(self) -> int:
        """Number of tensors that are read."""
        return len({copy.source.name for copy in self.copies}) + len(self.duplicates)

    @property
    def source_nbytes(self) -> int:
        """Bytes that are read, without the duplicates."""
        return sum(copy.nbytes for copy in self.copies)

    def check_duplicates(self, rank: Rank = WHOLE, are_equal: Equality | None = None) -> None:
        """Compares the bytes of each pair of duplicates, by ``are_equal`` if they are not on disk.

        Of several processes that all call this, ``rank`` compares its share of the rows.

        Raises:
            BridgeError: they differ, so config.json and weights disagree on whether the embeddings are tied.
        """
        problems = []
        for kept, dropped in self.unequal_duplicates(rank, are_equal):
            found = f"differs from {kept.name}, but the config ties them (tie_word_embeddings: true)"
            remedy = "set tie_word_embeddings to false in config.json if the model was trained untied; otherwise remove"
            problems.append(Problem(dropped.name, found, f"{remedy} {dropped.name}"))
        refuse("tied tensors differ", problems)

    def unequal_duplicates(self, rank: Rank = WHOLE, are_equal: Equality | None = None) -> list[Duplicate]:
        """The duplicates whose bytes differ; see :meth:`check_duplicates`."""
        compare = are_equal or partial(have_equal_bytes, number=rank.tensor_rank, count=rank.tensor_parallel)
        return [pair for pair in self.duplicates if not compare(*pair)]

    def is_all_zero(self, target: str, source: TensorInfo) -> bool:
        """Whether all of a source tensor that goes into the whole of a target is zero, not only a slice of it."""
        if self.whole is None:
            return True
        whole = next(one for one in self.whole().targets if one.name == target)
        copies = (copy for copy in whole.copies if copy.source.name == source.name)
        with Transfer() as transfer:
            largest = transfer.each(tiles(copies), lambda elements: max(map(largest_magnitude, elements.values())))
            return not any(largest)


def check_values(
    magnitudes: Mapping[str, Mapping[TensorInfo, float]], plan: Plan | None = None, may_be_zero: bool = False
) -> None:
    """Refuses invalid weights: tensors that are all zero, or contain NaN or infinity.

    Rows of unused tokens may be zero and fill a rank's slice of the embedding. So a tensor that a rank holds a slice of
    is refused only if the whole tensor is zero; a rank whose slice is zero reads the rest to find out. The same applies
    to the shards of the embedding and of the output layer. A shard of another tensor that is all zero is refused.

    Args:
        magnitudes: target name -> source tensor -> largest magnitude.
        plan: the plan that was carried out, if it may have made slices of tensors.
        may_be_zero: whether a tensor may be all zero: a LoRA's B is, of an expert that no token reached.

    Raises:
        BridgeError: names the tensors and their files.
    """
    remedy = "the file is damaged (or, in float16, its numbers are too large): compare checksums with the source"
    problems = []
    for target, sources in magnitudes.items():
        faults: dict[tuple[str, str], set[str]] = defaultdict(set)
        for source, magnitude in sources.items():
            if source.name in (*EMBEDDING, *OUTPUT):
                magnitude = max(other for shard, other in sources.items() if shard.name == source.name)
            fault = fault_of(magnitude)
            if (
                fault
                and (magnitude or not may_be_zero)
                and (magnitude or plan is None or plan.is_all_zero(target, source))
            ):
                faults[fault, ", ".join(sorted(file.name for file in source.files))].add(source.name)
        lines = [f"{fault}: {name} ({file})" for (fault, file), names in faults.items() for name in fold_names(names)]
        if lines:
            problems.append(Problem(target, "\n".join(lines), remedy))
    refuse("invalid weights: tensors that are all zero or contain NaN or infinity", problems)


class TensorMatch(NamedTuple):
    """How a checkpoint's tensors match those that a model needs; ``duplicates`` and ``ignored`` as in :class:`Plan`."""

    problems: tuple[Problem, ...] = ()
    duplicates: tuple[Duplicate, ...] = ()
    ignored: tuple[str, ...] = ()


def match_tensors(rules: Iterable[Rule], tensors: Mapping[str, TensorInfo], source: Dialect) -> TensorMatch:
    """Finds the tensors that are missing, left over, or of a wrong shape or dtype; arguments as for ``make_plan``."""
    expected = {place.tensor: place.shape for rule in rules for place in rule.places(source)}
    leftover = tensors.keys() - expected.keys()
    ignored = {name for name in leftover if not source.is_hf and is_training_state(name, expected)}
    leftover -= ignored
    duplicates: tuple[Duplicate, ...] = ()
    kept, dropped = source.name(EMBEDDING), source.name(OUTPUT)
    if dropped in leftover and kept in tensors and tensors[kept].shape == tensors[dropped].shape:
        duplicates = ((tensors[kept], tensors[dropped]),)  # as in several released checkpoints of tied models
        leftover -= {dropped}
    wrong: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, tensor in ((name, tensors[name]) for name in expected if name in tensors):
        if tensor.shape != expected[name]:
            found = f"shape {tensor.shape}, {expected[name]} expected"
            wrong[found, "config and weights are of two models"].append(name)
        if tensor.dtype not in FLOATS:
            remedy = f"only {', '.join(FLOATS)} are weights; use the unquantised checkpoint"
            wrong[f"dtype {tensor.dtype}", remedy].append(name)
    problems = (
        *(Problem(name, "missing", _remedy_for_missing(name)) for name in fold_names(expected.keys() - tensors.keys())),
        *(Problem(name, "not a tensor of this model", _remedy_for_leftover(name)) for name in fold_names(leftover)),
        *folded_problems(wrong),
    )
    return TensorMatch(problems, duplicates, tuple(sorted(ignored)))


def make_plan(
    rules: Iterable[Rule],
    tensors: Mapping[str, TensorInfo],
    source: Dialect,
    target: Dialect,
    dtype: str | None = None,
    rank: Rank = WHOLE,
) -> Plan:
    """Plans the conversion of a checkpoint from one dialect to another.

    Args:
        rules: the model's table.
        tensors, source: the checkpoint's tensors by name, and its dialect.
        target, dtype: the dialect to make, and the dtype as safetensors spells it; as in the checkpoint by default.
        rank: the process that the result is for; it holds its share of every parameter.

    Raises:
        BridgeError: tensors are missing, left over, or of a wrong shape or dtype. Lists all of them.
    """
    rules = list(rules)
    match = match_tensors(rules, tensors, source)
    refuse("the checkpoint does not fit the model", match.problems)
    copies: dict[tuple[str, tuple[int, ...]], list[Copy]] = {}
    for rule in rules:
        for here, there in _merged(list(shares(rule, rank, source, target))):
            copy = Copy(tensors[here.tensor], here.view, there.tensor, there.view)
            copies.setdefault((there.tensor, there.shape), []).extend(from_shards(copy))
    targets = []
    for (name, shape), parts in copies.items():
        dtypes = {copy.source.dtype for copy in parts}
        common = dtypes.pop() if len(dtypes) == 1 else "F32"  # which holds all of them exactly
        targets.append(Target(name, shape, dtype or common, tuple(parts)))
    whole = None if rank == WHOLE else partial(make_plan, rules, tensors, source, target, dtype)
    return Plan(target, tuple(targets), match.duplicates, match.ignored, rank, whole)


def write_slices(plan: Plan, boxes: Mapping[str, Box]) -> Plan:
    """Restricts a plan of whole tensors to ``boxes``: target name -> the block to make, if not all of it."""
    targets = (target.block(boxes[target.name]) if target.name in boxes else target for target in plan.targets)
    return replace(plan, targets=tuple(targets), whole=plan.whole or (lambda: plan))


def _merged(pairs: list[tuple[Place, Place]]) -> list[tuple[Place, Place]]:
    """One pair instead of several, where all parts of one tensor are laid out in one other as in itself."""
    (here, there), *others = pairs
    size = prod(there.shape)
    tensors_differ = any((a.tensor, b.tensor) != (here.tensor, there.tensor) for a, b in others)
    if not others or tensors_differ or prod(here.shape) != size or any(a.view != b.view for a, b in pairs):
        return pairs
    everything = View.whole((size,))
    return [(replace(here, view=everything), replace(there, view=everything))]


def _remedy_for_missing(name: str) -> str:
    if name in OUTPUT:
        return "if the model's embeddings are tied, set tie_word_embeddings to true in config.json; else copy the file"
    return "copy the file that holds it; is the download complete?"


def _remedy_for_leftover(name: str) -> str:
    if name.endswith(".bias"):
        return "MindFormers' Qwen3 has no such bias; the checkpoint is of another architecture"
    if any(mark in name for mark in ("weight_scale", "qweight", "qzeros", "scales", "g_idx", "scale_inv")):
        return "the checkpoint is quantised; use the unquantised (bf16) one"
    if adapted_parameter(name):
        return "this model has no such parameter that a LoRA could adapt"
    if "lora" in name.lower():
        return "it is of a LoRA adapter: merge the adapter into the model first"
    return "was it renamed, or is it of another model?"
