"""Is what a training run saved the model that it is said to be? Answered from headers, before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mf_qwen3_bridge.errors import BridgeError, Problem
from mf_qwen3_bridge.inputs.disagreements import computed_rows, number_rows, said_by, tensor_problems
from mf_qwen3_bridge.inputs.hf_config import normalise
from mf_qwen3_bridge.inputs.identify import dialect_of, holds_experts, numbers_of, saved_by_ranks, spec_of
from mf_qwen3_bridge.inputs.mindformers_yaml import MindFormersYaml, read_mindformers_yaml
from mf_qwen3_bridge.inputs.preflight import Model, check, notes_on
from mf_qwen3_bridge.model.layouts import TRAINING_DEFAULT
from mf_qwen3_bridge.model.parallel import SINGLE
from mf_qwen3_bridge.model.rules import model_rules
from mf_qwen3_bridge.transfer.safetensors import Checkpoint


def check_trained(
    checkpoint: Checkpoint,
    hf_config: Path | None = None,
    config: Path | None = None,
    numbers: Mapping[str, Any] | None = None,
    tensor_parallel: int | None = None,
    numbers_origin: str = "arguments",
) -> Model:
    """Checks what a MindFormers training run saved against all that is known of the model.

    Args:
        checkpoint: its whole tensors.
        hf_config: a Hugging Face directory with the model's config.json; else that of the YAML's
            ``pretrained_model_dir``, or one beside the weights, if there is one.
        config: the YAML of the training run.
        numbers: what the caller says of the model, under any of MindFormers' names.
        tensor_parallel: over how many tensor parallel ranks the run was spread, if that is known; else as in the YAML.

        numbers_origin: a name for ``numbers``, for messages.

    Returns:
        The model. Its ``hf_config`` is empty if nothing says all of what a config.json holds.

    Raises:
        BridgeError: with a table of everything that does not fit, and what to change.
    """
    yaml = read_mindformers_yaml(config) if config else MindFormersYaml()
    _check_kind(checkpoint, yaml, numbers or {})
    weights = checkpoint.path
    beside = weights if weights.is_dir() else weights.parent
    for hf_dir in [hf_config] if hf_config else filter(None, [yaml.pretrained_model_dir, beside]):
        if hf_config or (hf_dir / "config.json").is_file():
            return check(hf_dir, config, checkpoint, numbers, default_layout=TRAINING_DEFAULT, saved_by=tensor_parallel)
    layout = yaml.layout_of_weights(holds_experts(checkpoint), tensor_parallel or saved_by_ranks(checkpoint))
    dialect = dialect_of(checkpoint, layout, yaml.origin, TRAINING_DEFAULT)
    said = {yaml.origin: yaml.model_config, numbers_origin: dict(numbers or {})}
    in_tensors = numbers_of(checkpoint.tensors, dialect)
    tied = {value for _, _, value in said_by(said, ("tie_word_embeddings",))}
    try:
        spec = spec_of(checkpoint.tensors, dialect, tied == {True} if tied else None)
    except KeyError as error:
        raise BridgeError(
            f"{weights} is not a whole model: its tensors don't show {error.args[0]}. Is a tensor of the first layer "
            "missing, or of a wrong shape? --hf_config says what should be there"
        ) from error
    problems = [*number_rows(spec, [], said, in_tensors), *tensor_problems(spec, checkpoint, dialect, in_tensors)]
    normalised: dict[str, Any] = {}
    absent: list[str] = []
    if config:
        raw, absent = yaml.hf_config(spec)
        if not absent:
            normalised = normalise(raw, yaml.origin)
            problems += computed_rows(normalised, [], said, None)
    if problems:
        raise BridgeError(f"{weights} is not what the numbers say: change what the table says", problems)
    rules = tuple(model_rules(spec))
    notes = [*notes_on(checkpoint, beside, yaml)]
    if absent:
        notes.append(f"{yaml.origin} does not say {', '.join(absent)}")
    return Model(beside, spec, normalised, {}, checkpoint, dialect, rules, SINGLE, layout, tuple(notes))


def _check_kind(checkpoint: Checkpoint, yaml: MindFormersYaml, numbers: Mapping[str, Any]) -> None:
    """Are YAML and numbers of a model of this kind, dense or with experts?"""
    has_experts = holds_experts(checkpoint)
    kind, other = ("qwen3_moe", "ffn_hidden_size") if has_experts else ("qwen3", "moe_ffn_hidden_size")
    problems = []
    if yaml.model_config.get("model_type") not in (None, kind):
        found = f"{yaml.origin}: {yaml.model_config['model_type']}\nweights: {kind}"
        problems.append(Problem("model_type", found, "give the YAML that the weights were trained with"))
    if other in numbers:
        problems.append(Problem(other, str(numbers[other]), f"a {kind} model has none: leave it out"))
    if problems:
        raise BridgeError(f"{checkpoint.path} is of another kind of model", problems)
