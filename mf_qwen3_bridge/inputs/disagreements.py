"""Finds contradictions between config.json, YAML, arguments and tensors."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mf_qwen3_bridge.errors import Problem
from mf_qwen3_bridge.inputs.mindformers_config import COMPUTED_NAMES, computed_values
from mf_qwen3_bridge.model.parallel import ParallelConfig
from mf_qwen3_bridge.model.rules import Dialect, model_rules
from mf_qwen3_bridge.model.spec import HF_NAME, MINDFORMERS_NAMES, ModelSpec
from mf_qwen3_bridge.transfer.plan import TensorMatch, match_tensors
from mf_qwen3_bridge.transfer.safetensors import TensorInfo

# Who declares something: what, under which names.
Sides = Mapping[str, Mapping[str, Any]]
# A model's number, by its field in ModelSpec: the number, and the tensor that shows it.
Shown = Mapping[str, tuple[int, str]]


def config_rows(configs: Mapping[str, Mapping[str, Any]]) -> Iterator[Problem]:
    """Where normalised config.json don't agree on what is computed; a tied output layer is a matter of the tensors."""
    computed = ("rms_norm_eps", "rope_theta", "rope_scaling", "num_experts_per_tok", "norm_topk_prob")
    for key in (*HF_NAME.values(), *computed):
        values = [config.get(key) for config in configs.values()]
        if key != HF_NAME["tie_word_embeddings"] and any(value != values[0] for value in values):
            lines = (f"{origin}: {value}" for origin, value in zip(configs, values))
            yield Problem(key, "\n".join(lines), "take the config.json that the weights were trained with")


def number_rows(spec: ModelSpec, origins: Sequence[str], sides: Sides, in_tensors: Shown) -> Iterator[Problem]:
    """Where what ``spec`` (from ``origins``), the sides and the tensors say of the model's numbers differs."""
    for field in (field for field in HF_NAME if field in spec.numbers or field == "num_experts"):
        config_value = getattr(spec, field)
        number, tensor = in_tensors.get(field, (config_value, ""))
        declared = [(origin, HF_NAME[field], config_value) for origin in origins]
        declared += declared_by(sides, MINDFORMERS_NAMES[field])
        yield from _row(declared, (number,), f"weights: {number} ({tensor})" if tensor else "")


def computed_rows(
    hf_config: Mapping[str, Any], origins: Sequence[str], sides: Sides, trained_with: str | None
) -> Iterator[Problem]:
    """Where the sides declare that something else is computed than ``hf_config`` (from ``origins``) does."""
    for name, accepted in computed_values(hf_config).items():
        declared = [(origin, name, accepted[0]) for origin in origins]
        declared += declared_by(sides, (name, *COMPUTED_NAMES[name]))
        for problem in _row(declared, accepted):
            if trained_with is not None and trained_with in problem.found:
                remedy = f"if the weights were trained as {trained_with} says, config.json is not theirs"
                problem = problem._replace(remedy=remedy)
            yield problem


def declared_by(sides: Sides, keys: Iterable[str]) -> Iterator[tuple[str, str, Any]]:
    """(side, key, value) wherever a side uses one of a thing's names."""
    for side, model_config in sides.items():
        yield from ((side, key, model_config[key]) for key in keys if model_config.get(key) is not None)


def _row(declared: list[tuple[str, str, Any]], accepted: tuple[Any, ...], weights: str = "") -> Iterator[Problem]:
    wrong = [(side, key) for side, key, value in declared if not any(is_same(value, right) for right in accepted)]
    if wrong:
        lines = [f"{side}: {value}" for side, _, value in declared] + ([weights] if weights else [])
        remedy = " and ".join(f"set {key} to {accepted[0]} in {side}" for side, key in wrong)
        if declared[0][1] == HF_NAME["num_layers"] and accepted[0] < declared[0][2]:
            remedy = f"is a file of the checkpoint missing? If not, {remedy}"
        yield Problem(declared[0][1], "\n".join(lines), remedy)


def is_same(left: Any, right: Any) -> bool:
    """Whether two values from a config.json, a YAML or a command line are one; YAML takes 1e-6 for a string."""
    try:
        return float(left) == float(right)
    except (TypeError, ValueError, OverflowError):
        return bool(left == right)


def match_model(spec: ModelSpec, tensors: Mapping[str, TensorInfo], dialect: Dialect, in_tensors: Shown) -> TensorMatch:
    """Matches tensors with the model that their shapes show: a number that a config has wrong is in another row."""
    if problems := block_problems(spec, dialect):
        return TensorMatch(tuple(problems))
    numbers: dict[str, Any] = {field: number for field, (number, _) in in_tensors.items()}
    try:
        return match_tensors(model_rules(replace(spec, **numbers)), tensors, dialect)
    except ValueError:  # heads and groups that don't divide: their rows are in another table
        return TensorMatch()


def block_problems(spec: ModelSpec, dialect: Dialect) -> list[Problem]:
    """Whether the blocks of a contiguous layout divide the model."""
    blocks = dialect.layout.tensor_parallel if dialect.layout else 1
    if not any(ParallelConfig(blocks).problems(spec, training=True)):
        return []
    found = f"{blocks}, num_query_groups {spec.num_query_groups}, ffn_hidden_size {spec.ffn_hidden_size}"
    return [Problem("tensor parallel of the training run", found, "it has to divide both: is the YAML theirs?")]
