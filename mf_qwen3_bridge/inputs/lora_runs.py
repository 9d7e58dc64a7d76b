"""Opens what a MindFormers run with LoRA saved: its adapter, with the scaling that the run declares, and its base."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from mf_qwen3_bridge.errors import BridgeError, Problem, folded_problems, refuse
from mf_qwen3_bridge.inputs.hf_config import read_json
from mf_qwen3_bridge.inputs.mindformers_config import read_mindformers_config
from mf_qwen3_bridge.inputs.preflight import CheckedCheckpoint
from mf_qwen3_bridge.inputs.source import Source
from mf_qwen3_bridge.model.lora import lora_rules, rank_of
from mf_qwen3_bridge.model.parameters import is_counter, is_training_state
from mf_qwen3_bridge.model.rules import HF, Dialect, RowsRule, Rule
from mf_qwen3_bridge.transfer.adapted import LowRank, LowRankExperts, PartOfLowRank, Update, adapted
from mf_qwen3_bridge.transfer.copying import Transfer
from mf_qwen3_bridge.transfer.plan import Plan, make_plan
from mf_qwen3_bridge.transfer.safetensors import TensorInfo
from mf_qwen3_bridge.transfer.tiles import tiles
from mf_qwen3_bridge.transfer.values import largest_magnitude

# MindFormers writes the first in graph mode, the second in PyNative mode (2.x): beside what it saves, or above it.
CONFIG_FILES = ("mindformers_adapter_config.json", "adapter_config.json")
# A rank's file is two directories below a run's output; mirrors how far MindFormers' own tools look.
_DIRECTORIES = 4


class Matrices(NamedTuple):
    """The two matrices of the LoRA of one parameter."""

    a: TensorInfo
    b: TensorInfo


@dataclass(frozen=True)
class LoraRun:
    """What a run with LoRA saved.

    Attributes:
        path: where.
        base: what it saved beside the adapter: the base model's weights, as a rule.
        matrices: MindFormers' name of each adapted parameter -> its matrices.
        rank, alpha: of the adapter, which adds ``alpha / rank * B @ A`` to a weight.
        dropout: of the training, for whoever goes on with it.
    """

    path: Path
    base: Source
    matrices: Mapping[str, Matrices]
    rank: int
    alpha: float
    dropout: float = 0.0

    @property
    def has_base(self) -> bool:
        """Whether the base model's weights were saved as well; a run may save what it trains alone."""
        return not all(map(is_counter, self.base.tensors))

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """All matrices by name."""
        return {tensor.name: tensor for matrices in self.matrices.values() for tensor in matrices}

    def plan(self, model: CheckedCheckpoint, dtype: str | None = None) -> Plan:
        """The plan of PEFT's adapter of the same model: each part of a parameter has its own rows of B.

        BridgeError if the adapter does not fit the model: lists all tensors that don't.
        """
        assert model.dialect.layout
        # MindFormers stacks the matrices of experts along an axis of their own, whether or not it stacks their weights.
        dialect = Dialect(model.dialect.layout, stacked_experts=True)
        rules = [
            adapter_rule
            for rule in model.rules
            if rule.parameter in self.matrices
            for adapter_rule in self._rules_of(rule)
        ]
        return make_plan(rules, self.tensors, dialect, HF, dtype)

    def _rules_of(self, rule: Rule) -> Iterator[Rule]:
        a, b = self.matrices[rule.parameter]
        return lora_rules(rule, a.name, b.name, self.rank)

    def merged(self) -> Source:
        """The base's weights with the adapter merged into them, in the same dialect."""
        tensors = dict(self.base.tensors)
        for parameter, (a, b) in self.matrices.items():
            kind = LowRankExperts if len(a.shape) == 3 else LowRank
            tensors[parameter] = adapted(tensors[parameter], kind(a, b, self._scaling))
        return replace(self.base, tensors=tensors)

    def merged_into(self, base: CheckedCheckpoint, dialect: Dialect) -> CheckedCheckpoint:
        """The weights of a Hugging Face directory with the adapter merged into them.

        Args:
            base: the model that the run began with.
            dialect: MindFormers', by which the rows of B are laid out.
        """
        assert dialect.layout
        tensors = dict(base.source.tensors)
        for rule in base.rules:
            if rule.parameter in self.matrices:
                if not isinstance(rule, RowsRule):
                    raise BridgeError(
                        f"{self.path} adapts experts and holds no base weights: write a PEFT adapter (--lora adapter), "
                        "and merge that"
                    )
                a, b = self.matrices[rule.parameter]
                for part in rule.tensors:
                    update: Update = PartOfLowRank(a, b, self._scaling, rule, dialect.layout, part)
                    tensors[part] = adapted(tensors[part], update)
        return replace(base, source=replace(base.source, tensors=tensors))

    @property
    def _scaling(self) -> float:
        return self.alpha / self.rank

    def check_trained(self, plan: Plan) -> None:
        """Refuses an adapter that changes nothing, as B is as it was initialised; ``plan`` is :meth:`plan`."""
        of_b = {tensors.b.name for tensors in self.matrices.values()}
        with Transfer() as transfer:
            look = transfer.each(
                tiles(copy for copy in plan.copies if copy.source.name in of_b),
                lambda elements: max(map(largest_magnitude, elements.values())),
            )
            if not any(list(look)):
                raise BridgeError(
                    f"{self.path}: every lora_B is zero, so the adapter changes nothing: it was not trained. Does "
                    "freeze_exclude of the YAML's pet_config leave *lora* to training?"
                )


def read_lora_run(source: Source, config: Path | None = None, alpha: float | None = None) -> LoraRun:
    """Separates a LoRA run's adapter from its base, and finds the adapter's scaling.

    Args:
        source: what the run saved.
        config: the run's YAML.
        alpha: the adapter's, as the caller declares it.

    Raises:
        BridgeError: matrices are missing, or of several ranks; nothing declares alpha; what the run's
            ``adapter_config.json``, the YAML and the caller declare contradicts each other, or the tensors.
    """
    incomplete = [
        Problem(next(iter(found.values())).name, f"no lora_{'B' if 'a' in found else 'A'} beside it", "copy the file")
        for found in source.lora.values()
        if len(found) < 2
    ]
    refuse(f"{source.path} is not a whole adapter", incomplete)
    matrices = {parameter: Matrices(found["a"], found["b"]) for parameter, found in source.lora.items()}
    names = {tensor.name for pair in matrices.values() for tensor in pair}
    state = {n for n in source.tensors if n not in names and is_training_state(n, names) and not is_counter(n)}
    rest = {name: tensor for name, tensor in source.tensors.items() if name not in names | state}
    base = replace(source, tensors=rest, left_out=(*source.left_out, *sorted(state)))
    rank = _common_rank(source.path, matrices.values())
    declared = list(_declarations(source.path, config))
    refuse(f"{source.path} is not the adapter that was declared", _contradictions(declared, matrices, rank, alpha))
    values = [value for value in (alpha, *(one.alpha for one in declared)) if value is not None]
    if not values:
        raise BridgeError(
            f"{source.path} holds a LoRA of rank {rank}, but nothing declares its alpha, and so its scaling (alpha / "
            f"rank): there is no {' or '.join(CONFIG_FILES)} of the run beside or above it. Give the run's YAML "
            "(--config; pet_config.lora_alpha in it), or --lora_alpha"
        )
    dropout = next((one.dropout for one in declared if one.dropout is not None), 0.0)
    return LoraRun(source.path, base, matrices, rank, values[0], dropout)


def _common_rank(path: Path, matrices: Iterable[Matrices]) -> int:
    names: dict[int, list[str]] = defaultdict(list)
    for a, _ in matrices:
        names[rank_of(a.shape)].append(a.name)
    remedy = "MindFormers trains one rank: take all files from one run"
    if len(names) > 1 or 0 in names:
        refuse(f"{path} is not one adapter", folded_problems({(f"rank {r}", remedy): names[r] for r in names}))
    return next(iter(names))


@dataclass(frozen=True)
class _Declaration:
    """What a file declares of an adapter; None: nothing. ``is_truncated``: whether alpha may have lost its fraction."""

    origin: str
    rank: float | None
    alpha: float | None
    dropout: float | None
    modules: str | None
    is_truncated: bool = field(default=False)


def _declarations(path: Path, config: Path | None) -> Iterator[_Declaration]:
    """What the YAML declares, and the run's file; the YAML first, as MindFormers writes no fraction into the file."""
    yaml = read_mindformers_config(config)
    pet_config = yaml.model_config.get("pet_config")
    if isinstance(pet_config, dict):
        yield _declaration(yaml.origin, pet_config)
    if file := lora_config_file(path):
        content = read_json(file)
        if isinstance(of_pynative := content.get("lora_config"), dict):
            content = of_pynative
        yield _declaration(str(file), content)


def lora_config_file(path: Path) -> Path | None:
    """The file in which MindFormers wrote a run's rank and alpha, if it is beside the weights or above them."""
    resolved = path.resolve()
    directory = resolved if resolved.is_dir() else resolved.parent
    places = [directory, *directory.parents][:_DIRECTORIES]
    candidates = (place / name for name in CONFIG_FILES for place in places)
    return next((file for file in candidates if file.is_file()), None)


def _declaration(origin: str, content: Mapping[str, Any]) -> _Declaration:
    """What one of them declares, under PEFT's names or MindFormers'; BridgeError if that can't be."""
    numbers: dict[str, float | None] = {}
    problems = []
    for key in ("r", "lora_rank", "lora_alpha", "lora_dropout"):
        value = content.get(key)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if value is not None and not (is_number and (value > 0 or key == "lora_dropout")):
            problems.append(Problem(key, repr(value), "a positive number"))
        numbers[key] = value if is_number else None
    refuse(f"{origin} can't be used", problems)
    modules = content.get("target_modules")
    if isinstance(modules, list):
        modules = "|".join(map(str, modules))
    rank = numbers["r"] if numbers["r"] is not None else numbers["lora_rank"]
    return _Declaration(
        origin,
        rank,
        numbers["lora_alpha"],
        numbers["lora_dropout"],
        modules if isinstance(modules, str) else None,
        is_truncated="peft_type" in content,
    )


def _contradictions(
    declared: list[_Declaration], matrices: Mapping[str, Matrices], rank: int, alpha: float | None
) -> Iterator[Problem]:
    """Where declarations contradict the tensors, or each other."""
    remedy = "is it of this run? If not, move it away"
    for one in declared:
        if one.rank not in (None, rank):
            yield Problem("rank", f"{one.origin}: {one.rank}\nweights: {rank}", remedy)
        others = [name for name in matrices if not _is_targeted(name, one.modules)]
        yield from folded_problems({(f"not in target_modules of {one.origin}", remedy): others})
    alphas = [("--lora_alpha", alpha, False)] if alpha is not None else []
    alphas += [(one.origin, one.alpha, one.is_truncated) for one in declared if one.alpha is not None]
    values = [value for _, value, _ in alphas]
    if any(value != (int(values[0]) if is_truncated else values[0]) for _, value, is_truncated in alphas[1:]):
        found = "\n".join(f"{origin}: {value:g}" for origin, value, _ in alphas)
        yield Problem("lora_alpha", found, "leave out what is not of this run")


def _is_targeted(parameter: str, modules: str | None) -> bool:
    """Whether MindFormers would adapt a parameter: it matches the names of cells, without their path."""
    if modules is None:
        return True
    cell = re.sub(r"\.weight[12]?$", "", parameter)
    try:
        return any(re.match(modules, name) for name in (cell, cell.rpartition(".")[2]))
    except re.error:
        return True
