"""A conversion as a list of copies, made from headers alone: first the plan, then the bytes.

Everything that can be wrong between a checkpoint and a model comes out while the plan is made, all at once, before
anything is built or read. What happens to the bytes afterwards (into a network, into files) is up to who runs it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod

import numpy as np

from mf_qwen3_bridge.errors import BridgeError, Problem, fold_names
from mf_qwen3_bridge.model.layouts import Box, View
from mf_qwen3_bridge.model.parallel import WHOLE, Rank
from mf_qwen3_bridge.model.parameters import EMBEDDING, OUTPUT, is_training_state
from mf_qwen3_bridge.model.rules import Dialect, Place, Rule, shares
from mf_qwen3_bridge.transfer.blocks import from_shards, within
from mf_qwen3_bridge.transfer.copying import Transfer, have_equal_bytes
from mf_qwen3_bridge.transfer.safetensors import DTYPES, TensorInfo
from mf_qwen3_bridge.transfer.tiles import Copy
from mf_qwen3_bridge.transfer.values import fault_of

FLOATS = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class Target:
    """A tensor to be made.

    Attributes:
        name: its name in the target dialect.
        shape: its shape.
        dtype: its dtype as safetensors spells it.
        copies: what it is made of; together they cover each element once.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    copies: tuple[Copy, ...]

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize

    def make(self, transfer: Transfer | None = None) -> np.ndarray:
        """The tensor, its sources read from disk.

        Args:
            transfer: of whoever makes several: its threads and open files serve them all.

        Raises:
            BridgeError: a file ended early or could not be read.
        """
        if transfer is None:
            with Transfer() as transfer:
                return self.make(transfer)
        result = np.empty(self.shape, DTYPES[self.dtype])
        transfer.fill(result, self.copies)
        return result


@dataclass(frozen=True)
class Plan:
    """What to make of a checkpoint.

    Attributes:
        source: the dialect that it is in.
        target: the dialect that is made.
        targets: the tensors to make, in the model's order.
        duplicates: pairs (kept, dropped) of source tensors that must hold the same bytes: an ``lm_head`` that is
            stored although it is tied to the embedding.
        ignored: source tensors that are no weights.
        rank: the process it is for.
        whole: gives the plan that makes whole tensors, if this one makes slices of them.
    """

    source: Dialect
    target: Dialect
    targets: tuple[Target, ...]
    duplicates: tuple[tuple[TensorInfo, TensorInfo], ...] = ()
    ignored: tuple[str, ...] = field(default=(), repr=False)
    rank: Rank = WHOLE
    whole: Callable[[], Plan] | None = field(default=None, repr=False, compare=False)

    @property
    def num_source_tensors(self) -> int:
        """Number of tensors that are read."""
        used = {copy.source.name for target in self.targets for copy in target.copies}
        return len(used) + len(self.duplicates)

    @property
    def source_nbytes(self) -> int:
        """Bytes that are read, the duplicates apart."""
        return sum(copy.nbytes for target in self.targets for copy in target.copies)

    def check_duplicates(
        self, rank: Rank = WHOLE, are_equal: Callable[[TensorInfo, TensorInfo], bool] | None = None
    ) -> None:
        """Compares the bytes of each pair of duplicates.

        Args:
            rank: one of several processes that all call this; each compares its share of the bytes.
            are_equal: compares two tensors, when they are not on disk.

        Raises:
            BridgeError: they differ: the checkpoint's config and weights disagree on what is tied.
        """
        problems = [
            Problem(
                dropped.name,
                f"differs from {kept.name}, but the config says that they are one (tie_word_embeddings: true)",
                "set tie_word_embeddings to false in config.json if the model was trained untied; otherwise "
                f"remove {dropped.name}",
            )
            for kept, dropped in self.unequal_duplicates(rank, are_equal)
        ]
        if problems:
            raise BridgeError("tied tensors differ", problems)

    def unequal_duplicates(
        self, rank: Rank = WHOLE, are_equal: Callable[[TensorInfo, TensorInfo], bool] | None = None
    ) -> list[tuple[TensorInfo, TensorInfo]]:
        """The duplicates whose bytes differ; see :meth:`check_duplicates`."""
        compare = are_equal or partial(have_equal_bytes, number=rank.tensor_rank, count=rank.tensor_parallel)
        return [pair for pair in self.duplicates if not compare(*pair)]

    def is_all_zero(self, target: str, source: TensorInfo) -> bool:
        """Whether all of a source tensor that goes into the whole of a target is zero, not only a slice of it."""
        if self.whole is None:
            return True
        whole = next(one for one in self.whole().targets if one.name == target)
        with Transfer() as transfer:
            return not any(transfer.magnitudes(copy for copy in whole.copies if copy.source.name == source.name))


def as_it_is(tensor: TensorInfo) -> Target:
    """A tensor of the checkpoint, under its own name and in its own dtype."""
    whole = View.whole(tensor.shape)
    return Target(tensor.name, tensor.shape, tensor.dtype, tuple(from_shards(Copy(tensor, whole, tensor.name, whole))))


def check_values(magnitudes: Mapping[str, Mapping[TensorInfo, float]], plan: Plan | None = None) -> None:
    """Looks for what no trained model holds: a tensor that is all zero, NaN, infinities.

    Rows of tokens that nobody uses may be zero, and fill a rank's slice of the embedding. So a tensor of which a rank
    holds a slice is refused only if all of it is zero: the rank reads the rest when its slice is. Where the ranks of a
    run saved a file each, the same holds for the embedding and the output layer; another tensor that is all zero in one
    of the files is damaged.

    Args:
        magnitudes: for each target, for each source tensor in it the largest magnitude.
        plan: what was carried out, if it may have been a rank's share.

    Raises:
        BridgeError: names what was found, and the files it comes from.
    """
    remedy = "the file is damaged (or, in float16, its numbers are too large): compare checksums with the source"
    problems = []
    for target, sources in magnitudes.items():
        faults: dict[tuple[str, str], set[str]] = defaultdict(set)
        largest: dict[str, float] = defaultdict(float)
        for source, magnitude in sources.items():
            largest[source.name] = max(largest[source.name], magnitude)
        for source, magnitude in sources.items():
            if source.name in (*EMBEDDING, *OUTPUT):
                magnitude = largest[source.name]
            fault = fault_of(magnitude)
            if fault and (magnitude or plan is None or plan.is_all_zero(target, source)):
                faults[fault, source.file.name].add(source.name)
        lines = [f"{fault}: {name} ({file})" for (fault, file), names in faults.items() for name in fold_names(names)]
        if lines:
            problems.append(Problem(target, "\n".join(lines), remedy))
    if problems:
        raise BridgeError("weights that no trained model has", problems)


@dataclass(frozen=True)
class Stock:
    """What a checkpoint has of what a model needs.

    Attributes:
        problems: tensors that are missing, left over, of a wrong shape or dtype.
        duplicates: see :class:`Plan`.
        ignored: see :class:`Plan`.
    """

    problems: tuple[Problem, ...]
    duplicates: tuple[tuple[TensorInfo, TensorInfo], ...]
    ignored: tuple[str, ...]


def take_stock(rules: Iterable[Rule], tensors: Mapping[str, TensorInfo], source: Dialect) -> Stock:
    """Holds the names, shapes and dtypes of ``tensors`` against the model's table."""
    expected = {place.tensor: place.shape for rule in rules for place in rule.places(source)}
    leftover = tensors.keys() - expected.keys()
    ignored = {name for name in leftover if not source.is_hf and is_training_state(name, expected)}
    duplicates = _duplicates(tensors, leftover, source)
    leftover -= ignored | {dropped.name for _, dropped in duplicates}
    problems = (
        *(Problem(name, "missing", _remedy_for_missing(name)) for name in fold_names(expected.keys() - tensors.keys())),
        *(Problem(name, "not a tensor of this model", _remedy_for_leftover(name)) for name in fold_names(leftover)),
        *_shape_problems(tensors, expected),
        *_dtype_problems(tensors[name] for name in expected if name in tensors),
    )
    return Stock(problems, tuple(duplicates), tuple(sorted(ignored)))


def make_plan(
    rules: Iterable[Rule],
    tensors: Mapping[str, TensorInfo],
    source: Dialect,
    target: Dialect,
    dtype: str | None = None,
    rank: Rank = WHOLE,
) -> Plan:
    """The plan that turns ``tensors`` from one dialect into the other.

    Args:
        rules: the model's table.
        tensors: what the checkpoint holds.
        source: the dialect it is in.
        target: the dialect wanted.
        dtype: dtype of the result as safetensors spells it; as in the checkpoint when left out.
        rank: the process that the result is for; it holds its part of every parameter.

    Raises:
        BridgeError: tensors that are missing, left over, of a wrong shape or dtype. Lists everything.
    """
    rules = list(rules)
    stock = take_stock(rules, tensors, source)
    if stock.problems:
        raise BridgeError("the checkpoint does not fit the model", stock.problems)
    copies: dict[tuple[str, tuple[int, ...]], list[Copy]] = {}
    for rule in rules:
        for here, there in _merged(list(shares(rule, rank, source, target))):
            copy = Copy(tensors[here.tensor], here.view, there.tensor, there.view)
            copies.setdefault((there.tensor, there.shape), []).extend(from_shards(copy))
    targets = (
        Target(name, shape, dtype or _common_dtype(parts), tuple(parts)) for (name, shape), parts in copies.items()
    )
    whole = None if rank == WHOLE else partial(make_plan, rules, tensors, source, target, dtype)
    return Plan(source, target, tuple(targets), stock.duplicates, stock.ignored, rank, whole)


def write_slices(plan: Plan, boxes: Mapping[str, Box]) -> Plan:
    """A plan that makes a block of each target, where there is one for it, instead of all.

    Args:
        plan: makes whole tensors.
        boxes: for each of those that are cut the block to make.
    """
    targets = []
    for target in plan.targets:
        box = boxes.get(target.name)
        if box is not None:
            copies = tuple(
                Copy(copy.source, there, copy.target, here)
                for copy in target.copies
                for here, there in within(copy.target_view, copy.source_view, target.shape, box)
            )
            target = replace(target, shape=box.shape(target.shape), copies=copies)
        targets.append(target)
    return replace(plan, targets=tuple(targets), whole=plan.whole or (lambda: plan))


def _merged(pairs: list[tuple[Place, Place]]) -> list[tuple[Place, Place]]:
    """One pair instead of several, where all parts of one tensor lie in one other as they lie in it."""
    (here, there), *others = pairs
    size = prod(there.shape)
    tensors_differ = any((a.tensor, b.tensor) != (here.tensor, there.tensor) for a, b in others)
    if not others or tensors_differ or prod(here.shape) != size or any(a.view != b.view for a, b in pairs):
        return pairs
    everything = View.whole((size,))
    return [(replace(here, view=everything), replace(there, view=everything))]


def _common_dtype(copies: Iterable[Copy]) -> str:
    """The dtype that holds all parts exactly: theirs, or float32 when they differ."""
    dtypes = {copy.source.dtype for copy in copies}
    return dtypes.pop() if len(dtypes) == 1 else "F32"


def _duplicates(
    tensors: Mapping[str, TensorInfo], leftover: set[str], source: Dialect
) -> list[tuple[TensorInfo, TensorInfo]]:
    """A tied model's output layer that is stored all the same, as several released checkpoints do."""
    kept, dropped = source.name(EMBEDDING), source.name(OUTPUT)
    if dropped in leftover and kept in tensors and tensors[kept].shape == tensors[dropped].shape:
        return [(tensors[kept], tensors[dropped])]
    return []


def _remedy_for_missing(name: str) -> str:
    if name in OUTPUT:
        return "if the model's embeddings are tied, set tie_word_embeddings to true in config.json; else copy the file"
    return "copy the file that holds it; is the download complete?"


def _remedy_for_leftover(name: str) -> str:
    if name.endswith(".bias"):
        return "MindFormers' Qwen3 has no such bias; the checkpoint is of another architecture"
    if any(mark in name for mark in ("weight_scale", "qweight", "qzeros", "scales", "g_idx", "scale_inv")):
        return "the checkpoint is quantised; use the unquantised (bf16) one"
    return "was it renamed, or is it of another model?"


def _shape_problems(tensors: Mapping[str, TensorInfo], expected: Mapping[str, tuple[int, ...]]) -> Iterator[Problem]:
    wrong: dict[tuple[tuple[int, ...], tuple[int, ...]], list[str]] = {}
    for name, shape in expected.items():
        if name in tensors and tensors[name].shape != shape:
            wrong.setdefault((tensors[name].shape, shape), []).append(name)
    for (got, want), names in wrong.items():
        for name in fold_names(names):
            yield Problem(name, f"shape {got}, {want} expected", "config and weights are of two models")


def _dtype_problems(tensors: Iterable[TensorInfo]) -> Iterator[Problem]:
    wrong: dict[str, list[str]] = {}
    for tensor in tensors:
        if tensor.dtype not in FLOATS:
            wrong.setdefault(tensor.dtype, []).append(tensor.name)
    for dtype, names in wrong.items():
        for name in fold_names(names):
            yield Problem(
                name, f"dtype {dtype}", f"only {', '.join(FLOATS)} are weights; use the unquantised checkpoint"
            )
