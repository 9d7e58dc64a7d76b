"""Do two checkpoints, in any two dialects, hold the same weights? Every byte of both is read once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np

from mf_qwen3_bridge.errors import BridgeError, Problem, fold_names
from mf_qwen3_bridge.inputs.identify import LAYOUT_STAMP, dialect_of, holds_experts, saved_by_ranks, spec_of
from mf_qwen3_bridge.inputs.mindformers_yaml import read_mindformers_yaml
from mf_qwen3_bridge.inputs.preflight import Model
from mf_qwen3_bridge.model import training_ranks
from mf_qwen3_bridge.model.layouts import TRAINING_DEFAULT, Box
from mf_qwen3_bridge.model.parameters import expert_of, look_alikes, with_expert
from mf_qwen3_bridge.model.rules import HF, Dialect, QkvRule, RowsRule, Rule, model_rules
from mf_qwen3_bridge.model.spec import ModelSpec
from mf_qwen3_bridge.transfer.copying import LoadedTile, Made, Transfer
from mf_qwen3_bridge.transfer.plan import Plan, make_plan, write_slices
from mf_qwen3_bridge.transfer.progress import progress_bar
from mf_qwen3_bridge.transfer.safetensors import Checkpoint, TensorInfo, open_checkpoint
from mf_qwen3_bridge.transfer.tiles import tiles

# Rows of a tensor by which it is recognised: enough to tell tensors apart, few enough to look at many.
_SAMPLE_ROWS = 4
# Of so many tensors that differ; samples are kept in memory, and an expert is looked for among all others.
_MAX_GUESSES = 500


@dataclass(frozen=True)
class Side:
    """One of the two checkpoints.

    Attributes:
        checkpoint: its tensors.
        dialect: how they are named and laid out.
        spec: the model, by their shapes or by a config.json.
    """

    checkpoint: Checkpoint
    dialect: Dialect
    spec: ModelSpec

    @classmethod
    def of(cls, model: Model) -> Side:
        """A checkpoint that was held against its config.json."""
        return cls(model.checkpoint, model.dialect, model.spec)

    def plan(self, target: Dialect, rules: Iterable[Rule]) -> Plan:
        """The plan that makes it ``target``."""
        return make_plan(rules, self.checkpoint.tensors, self.dialect, target)


def open_side(path: Path, config: Path | None = None) -> Side:
    """A directory or file of weights, whole; no config.json is needed.

    Args:
        path: where.
        config: the YAML of the training run, which says how MindFormers weights without a stamp lie (what bears one is
            not asked); else they are taken to lie as MindFormers trains by default.

    Raises:
        BridgeError: files are missing or damaged, or their tensors make no whole Qwen3.
    """
    checkpoint = open_checkpoint(path)
    layout, origin = None, "YAML"
    if config is not None and LAYOUT_STAMP not in checkpoint.metadata:
        yaml = read_mindformers_yaml(config)
        origin = yaml.origin
        layout = yaml.layout_of_weights(holds_experts(checkpoint), saved_by_ranks(checkpoint))
    dialect = dialect_of(checkpoint, layout, origin, default=TRAINING_DEFAULT)
    try:
        spec = spec_of(checkpoint.tensors, dialect)
    except KeyError as missing:
        raise BridgeError(f"{path} is not a whole model: its tensors don't show {missing.args[0]}") from None
    return Side(checkpoint, dialect, spec)


@dataclass
class Count:
    """What was seen of one tensor: elements compared, and how many of them differ."""

    elements: int = 0
    different: int = 0


@dataclass(frozen=True)
class Report:
    """What a comparison found.

    Attributes:
        num_tensors: tensors that were compared.
        nbytes: bytes of the first side.
        dtypes: pairs of dtypes that differ, and the tensors.
        counts: for each tensor that differs what was seen.
        guesses: for some of them what may have happened.
        ignored: tensors of either side that are no weights, but state of a training run.
    """

    num_tensors: int
    nbytes: int
    dtypes: Mapping[tuple[str, str], list[str]]
    counts: Mapping[str, Count]
    guesses: Mapping[str, str]
    ignored: tuple[str, ...] = ()

    @property
    def is_equal(self) -> bool:
        """Whether every bit is the same."""
        return not self.counts and not self.dtypes

    def problems(self) -> Iterator[Problem]:
        """What differs, folded."""
        for (left, right), names in self.dtypes.items():
            for name in fold_names(names):
                yield Problem(name, f"{left}, and {right}", "dtypes differ; values are compared as the second's")
        alike: dict[tuple[str, str], list[str]] = defaultdict(list)
        for name, count in self.counts.items():
            alike[_share(count), self.guesses.get(name, "")].append(name)
        for (share, guess), names in alike.items():
            for name in fold_names(names):
                yield Problem(name, f"values differ in {share} of elements", guess)


def _share(count: Count) -> str:
    percent = 100 * count.different / count.elements
    return f"{percent:.0f} %" if percent >= 1 else "less than 1 %"


def compare(left: Side, right: Side) -> Report:
    """Compares all weights, bit for bit; a tensor of another dtype is cast to the second's.

    Raises:
        BridgeError: they are not of one model: a table says what differs.
    """
    tied = left.spec.tie_word_embeddings or right.spec.tie_word_embeddings
    specs = [replace(side.spec, tie_word_embeddings=tied) for side in (left, right)]
    if specs[0] != specs[1]:
        paths = [side.checkpoint.path for side in (left, right)]
        problems = [
            Problem(
                name,
                "\n".join(f"{path}: {getattr(spec, name)}" for path, spec in zip(paths, specs)),
                "name two of one model",
            )
            for name in specs[0].numbers | specs[1].numbers
            if getattr(specs[0], name) != getattr(specs[1], name)
        ]
        raise BridgeError("these are not of one model", problems)
    rules = tuple(model_rules(specs[0]))
    plan = left.plan(right.dialect, rules)
    theirs = right.checkpoint.tensors
    ignored: set[str] = set()
    for side in (left, right):
        own = side.plan(side.dialect, rules)  # planning it shows that it is whole
        if own.unequal_duplicates():
            found = f"{side.checkpoint.path}: its own, which is not its embedding\nthe other: none"
            raise BridgeError("these do not hold the same weights", [Problem("output layer", found, "")])
        ignored |= set(own.ignored)
    counts = _compare(plan, theirs, by_source=left.dialect.is_hf)
    dtypes: dict[tuple[str, str], list[str]] = defaultdict(list)
    for target in plan.targets:
        if target.dtype != theirs[target.name].dtype:
            dtypes[target.dtype, theirs[target.name].dtype].append(target.name)
    different = {name: count for name, count in counts.items() if count.different}
    guesses = dict(_guesses(left, right, rules, different)) if different else {}
    return Report(len(counts), plan.source_nbytes, dict(dtypes), different, guesses, tuple(sorted(ignored)))


def _compare(plan: Plan, theirs: Mapping[str, TensorInfo], by_source: bool) -> dict[str, Count]:
    """Carries the plan out in memory, tile by tile, and holds what it makes against what is there."""
    counts: dict[str, Count] = defaultdict(Count)
    copies = (copy for target in plan.targets for copy in target.copies)
    dtypes = {name: tensor.dtype for name, tensor in theirs.items()}
    with progress_bar("comparing", plan.source_nbytes) as advance, Transfer(advance) as transfer:

        def look(loaded: LoadedTile) -> list[tuple[str, int, int]]:
            return [found for made in loaded.made for found in _differences(made, theirs, by_source, transfer)]

        for seen in transfer.each(tiles(copies, to_files=True), look, dtypes, with_spare=True):
            for name, elements, different in seen:
                counts[name].elements += elements
                counts[name].different += different
    return counts


def _differences(
    made: Made, theirs: Mapping[str, TensorInfo], by_source: bool, transfer: Transfer
) -> Iterator[tuple[str, int, int]]:
    """For each copy of what a tile makes: the tensor's name, elements, and how many differ."""
    there = made.spare
    assert there is not None
    for start, run in made.runs(there):
        transfer.read(theirs[made.target], start, run)
    raw = np.dtype(f"u{there.itemsize}")
    are_equal = np.array_equal(made.elements.view(raw), there.view(raw))
    if not are_equal:
        np.not_equal(made.elements.view(raw), there.view(raw), out=made.elements.view(raw), casting="unsafe")
    for copy, elements, place in made.parts:
        name = copy.source.name if by_source else copy.target
        yield name, elements.size, 0 if are_equal else int(np.count_nonzero(place.view(raw)))


# --------------------------------------------------------------------------------------------------- what has happened


@dataclass
class _Samples:
    """The first rows of a side's tensors, under Hugging Face's names, read when they are asked for."""

    side: Side
    rules: tuple[Rule, ...]
    transfer: Transfer
    rows: dict[str, np.ndarray] = field(default_factory=dict)

    @cached_property
    def plans(self) -> dict[str, Plan]:
        """For each tensor the plan that makes it alone."""
        plan = self.side.plan(HF, self.rules)
        return {target.name: replace(plan, targets=(target,)) for target in plan.targets}

    def of(self, name: str, columns: bool = False) -> np.ndarray:
        """The first rows of a tensor, or its first columns, as rows; float32. Empty if there is no such tensor."""
        key = f"{name} columns" if columns else name
        if key not in self.rows:
            if name not in self.plans:
                return np.empty((0,), np.float32)
            (shape,) = (target.shape for target in self.plans[name].targets)
            few = min(_SAMPLE_ROWS if len(shape) > 1 else shape[0], shape[-1] if columns else shape[0])
            box = Box((0, shape[0]), (0, few)) if columns else Box((0, few))
            (target,) = write_slices(self.plans[name], {name: box}).targets
            array = target.make(self.transfer)
            self.rows[key] = (array.T if columns else array).astype(np.float32)
        return self.rows[key]

    def heads(self, name: str) -> np.ndarray:
        """Of queries, keys or values the first row of each head."""
        (target,) = self.plans[name].targets
        return target.make(self.transfer)[:: self.side.spec.head_dim].astype(np.float32)


def _are_dealt_otherwise(here: np.ndarray, there: np.ndarray) -> bool:
    return not np.array_equal(here, there) and {row.tobytes() for row in here} == {row.tobytes() for row in there}


def _guesses(
    left: Side, right: Side, rules: tuple[Rule, ...], different: Mapping[str, Count]
) -> Iterator[tuple[str, str]]:
    """For tensors that differ, what may have happened, judged by their first rows."""
    with Transfer() as transfer:
        yield from _guesses_with(transfer, left, right, rules, different)


def _guesses_with(
    transfer: Transfer, left: Side, right: Side, rules: tuple[Rule, ...], different: Mapping[str, Count]
) -> Iterator[tuple[str, str]]:
    mine, theirs = _Samples(left, rules, transfer), _Samples(right, rules, transfer)
    my_layouts, their_layouts = _other_layouts(mine, theirs), _other_layouts(theirs, mine)
    parts_of = {rule.parameter: rule.tensors for rule in rules}
    fused = {part: rule.tensors for rule in rules if isinstance(rule, RowsRule) and rule.fuses for part in rule.tensors}
    for name in islice(different, _MAX_GUESSES):
        for part in parts_of.get(name, (name,)):
            guess = None
            if part in fused and not _are_alike(mine, theirs, fused[part]):
                guess = _laid_out("first", my_layouts, theirs, fused[part])
                guess = guess or _laid_out("second", their_layouts, mine, fused[part])
            guess = guess or next(_guess(part, mine, theirs), None)
            if guess:
                yield name, guess
                break


def _laid_out(word: str, candidates: Iterable[_Samples], other: _Samples, parts: tuple[str, ...]) -> str | None:
    """The layout in which one side's parts of a fused parameter would be the other's."""
    for candidate in candidates:
        if _are_alike(candidate, other, parts):
            return f"the {word} is laid out {candidate.side.dialect.layout}"
    return None


def _are_alike(left: _Samples, right: _Samples, parts: Iterable[str]) -> bool:
    return all(np.array_equal(left.of(part), right.of(part)) for part in parts)


def _kind(name: str) -> str:
    """``k_proj`` of ``model.layers.0.self_attn.k_proj.weight``."""
    return name.split(".")[-2]


def _guess(name: str, mine: _Samples, theirs: _Samples) -> Iterator[str]:
    here, there = mine.of(name), theirs.of(name)
    if not (here.size and there.size):
        return
    for word, array in (("first", here), ("second", there)):
        if not array.any():
            yield f"zero in the {word}"
        if not np.isfinite(array).all():
            yield f"NaN or infinity in the {word}"
    has_heads = any(isinstance(rule, QkvRule) and name in rule.tensors for rule in mine.rules)
    if has_heads and _are_dealt_otherwise(mine.heads(name), theirs.heads(name)):
        yield "its heads are in another order: another number of KV groups?"
    if np.array_equal(here, there):
        return  # the first rows are alike: something is wrong further on
    for twin in look_alikes(name):
        for word, samples, other in (("first", mine, there), ("second", theirs, here)):
            if np.array_equal(samples.of(twin), other):
                yield f"the {word}'s {_kind(twin)} is the other's {_kind(name)}: swapped?"
    expert = expert_of(name)
    for number in range(mine.side.spec.num_experts) if expert is not None else ():
        if number != expert and np.array_equal(mine.of(with_expert(name, number)), there):
            yield f"expert {expert} of the second is expert {number} of the first"
    if here.ndim == 2 and np.array_equal(mine.of(name, columns=True), there):
        yield "transposed"
    if here.shape[-1:] == there.shape[-1:] and here.ndim == 2:
        for shift in range(1, len(here)):
            if np.array_equal(here[shift:], there[:-shift]) or np.array_equal(there[shift:], here[:-shift]):
                yield f"rows are off by {shift}"


def _other_layouts(samples: _Samples, others: _Samples) -> list[_Samples]:
    """The side read as if its QKV and gate/up lay otherwise; not if it bears a stamp, and the other side does not."""
    side, layout = samples.side, samples.side.dialect.layout
    stamps = [LAYOUT_STAMP in one.side.checkpoint.metadata for one in (samples, others)]
    if layout is None or (stamps == [True, False] and not others.side.dialect.is_hf):
        return []
    layouts = (one for one in training_ranks.layouts(side.spec) if one != layout)
    return [replace(samples, side=replace(side, dialect=replace(side.dialect, layout=one)), rows={}) for one in layouts]
