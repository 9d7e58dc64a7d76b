"""What is in a checkpoint, by its headers alone: described, not judged."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from mf_qwen3_bridge.errors import BridgeError, Problem, first_names, fold_names
from mf_qwen3_bridge.inputs.adapter_files import adapter_paths
from mf_qwen3_bridge.inputs.adapters import adapter_notes, with_adapters
from mf_qwen3_bridge.inputs.hf_config import config_notes, normalise, read_json
from mf_qwen3_bridge.inputs.identify import dialect_of, numbers_of, spec_of
from mf_qwen3_bridge.inputs.lora_runs import lora_config_file
from mf_qwen3_bridge.inputs.opening import config_beside, open_source, stale_files
from mf_qwen3_bridge.inputs.quantised import dequantised
from mf_qwen3_bridge.inputs.rank_files import rank_directories
from mf_qwen3_bridge.inputs.source import Source
from mf_qwen3_bridge.model.layouts import TRAINING_DEFAULT
from mf_qwen3_bridge.model.lora import adapted_parameter, rank_of
from mf_qwen3_bridge.model.parameters import OUTPUT, is_counter, is_training_state
from mf_qwen3_bridge.model.released import RELEASED
from mf_qwen3_bridge.model.rules import model_rules
from mf_qwen3_bridge.model.spec import ModelSpec
from mf_qwen3_bridge.transfer.plan import match_tensors
from mf_qwen3_bridge.transfer.progress import size_text
from mf_qwen3_bridge.transfer.safetensors import TensorInfo


@dataclass(frozen=True)
class TensorRow:
    """A line of ``inspect --tensors``; ``parameter`` is the one that it is part of, None if no rule claims it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    parameter: str | None


@dataclass(frozen=True)
class InspectedLora:
    """A LoRA in a training checkpoint.

    Attributes:
        ranks: of its matrices; more than one is a fault.
        parameters: names of the adapted parameters, folded.
        declared_in: the file in which MindFormers wrote its alpha, if it is found.
    """

    ranks: tuple[int, ...]
    parameters: tuple[str, ...]
    declared_in: str | None


@dataclass(frozen=True)
class Inspection:
    """A checkpoint as its headers show it.

    Attributes:
        names: whose names the tensors have, ``Hugging Face`` or ``MindFormers``.
        layout: of QKV and gate/up, if the files declare it; None for Hugging Face's tensors.
        ranks: number of ``rank_N`` directories; 0 if the tensors are whole.
        model: ``Qwen3``, ``Qwen3-MoE``, or a released size.
        tied: whether the output layer is the embedding; None if ranks saved it.
        parameters: number of elements of all weights; those of several ranks are counted for each.
        nbytes: as they are stored.
        quantization, nbytes_dequantised: how they are quantised, and how large they become; empty and None if they are
            not.
        state: what is of a training run and no weight, folded.
        lora: what a LoRA run adapts, if it is one's.
        adapters: the PEFT adapters that it is looked at with.
    """

    path: str
    names: str
    layout: str | None
    ranks: int
    model: str
    numbers: dict[str, Any]
    tied: bool | None
    parameters: int
    nbytes: int
    quantization: str
    nbytes_dequantised: int | None
    dtypes: dict[str, int]
    files: int
    state: tuple[str, ...]
    lora: InspectedLora | None
    adapters: tuple[str, ...]
    unusual: tuple[str, ...]
    tensors: tuple[TensorRow, ...]


def inspect(path: Path, adapters: Any = None) -> Inspection:
    """Describes a directory or file of safetensors, or a directory of ``rank_N`` directories.

    ``adapters`` are PEFT adapters of it, as :func:`adapter_paths` takes them. BridgeError if files are missing or
    damaged, or hold no Qwen3's tensors, or an adapter is not of these.
    """
    ranks = rank_directories(path)
    paths = adapter_paths(adapters)
    source = _of_ranks(path, list(ranks.values())) if ranks else open_source(path, as_stored=True)
    stored = source
    unusual: list[str] = []
    try:
        source = dequantised(source, config_beside(source))
    except BridgeError as error:
        unusual += map(_line, error.problems)
    lora = _lora_of(source, {name.partition(" (")[0]: tensor for name, tensor in source.tensors.items()})
    matrices = {name for name in source.tensors if adapted_parameter(name.partition(" (")[0])}
    dialect = dialect_of(source, default=TRAINING_DEFAULT)
    model = "Qwen3-MoE" if source.has_experts else "Qwen3"
    numbers: dict[str, Any] = {}
    claims: dict[str, str] = {}
    if not ranks:
        try:
            spec = spec_of(source.tensors, dialect)
        except KeyError as missing:
            numbers = {field: number for field, (number, _) in numbers_of(source.tensors, dialect).items()}
            if lora and all(_is_of_adapter(name, matrices) or is_counter(name) for name in source.tensors):
                unusual.append("an adapter alone: the base model's weights were not saved with it")
            else:
                what = "a tensor of the first layer is missing or wrong"
                unusual.append(f"the shapes do not show {missing.args[0]}: {what}")
        else:
            numbers = spec.numbers
            untied = replace(spec, tie_word_embeddings=False)
            sizes = {replace(size, tie_word_embeddings=False): name for name, size in RELEASED.items()}
            model = sizes.get(untied, model)
            claims = {place.tensor: rule.parameter for rule in model_rules(spec) for place in rule.places(dialect)}
            claims |= {name: found[0] for name in matrices if (found := adapted_parameter(name))}
            others = {name: tensor for name, tensor in source.tensors.items() if not _is_of_adapter(name, matrices)}
            unusual += map(_line, match_tensors(model_rules(spec), others, dialect).problems)
        unusual += _config_notes(path, numbers)
    unusual += (f"{file.name} is not part of it" for file in stale_files(source))
    tied = not ranks and dialect.name(OUTPUT) not in source.tensors
    merged = with_adapters(source, paths, tied).adapters
    unusual += adapter_notes(merged)
    bare = {name: name.partition(" (")[0] for name in source.tensors}  # without the rank
    weights = {*claims, *matrices} if claims else set(bare.values())
    state = {name for name in source.tensors if name not in claims and is_training_state(bare[name], weights)}
    files = {file: str(file.relative_to(source.directory)) for file in source.files}
    rows = (TensorRow(name, t.dtype, t.shape, files[t.file], claims.get(name)) for name, t in stored.tensors.items())
    return Inspection(
        path=str(path),
        names="Hugging Face" if dialect.is_hf else "MindFormers",
        layout=None if dialect.is_hf or not source.declared_layout else str(source.declared_layout),
        ranks=len(ranks),
        model=model,
        numbers=numbers,
        tied=None if ranks else dialect.name(OUTPUT) not in source.tensors,
        parameters=sum(prod(t.shape) for n, t in source.tensors.items() if n not in state | matrices),
        nbytes=stored.nbytes,
        quantization=source.quantization,
        nbytes_dequantised=source.nbytes if source.quantization else None,
        dtypes=dict(sorted(Counter(t.dtype for t in stored.tensors.values()).items())),
        files=len(files),
        state=tuple(fold_names(state)),
        lora=lora,
        adapters=tuple(adapter.description for adapter in merged),
        unusual=tuple(unusual),
        tensors=tuple(rows),
    )


def _is_of_adapter(name: str, matrices: set[str]) -> bool:
    """Whether a tensor is a LoRA's matrix, or an optimizer's state of one."""
    return name in matrices or (is_training_state(name, matrices) and not is_counter(name))


def _lora_of(source: Source, tensors: Mapping[str, TensorInfo]) -> InspectedLora | None:
    found = replace(source, tensors=tensors).lora
    if not found:
        return None
    ranks = {rank_of(pair["a"].shape) for pair in found.values() if "a" in pair}
    file = lora_config_file(source.path)
    return InspectedLora(tuple(sorted(ranks)), tuple(fold_names(found)), str(file) if file else None)


def _of_ranks(path: Path, ranks: list[Path]) -> Source:
    """All ranks' tensors, each under its name and its rank's."""
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for rank in ranks:
        part = open_source(rank)
        metadata |= part.metadata
        suffix = f" ({rank.name})" if rank != ranks[0] else ""
        tensors |= {name + suffix: tensor for name, tensor in part.tensors.items()}
    return Source(path, tensors, metadata)


def _line(problem: Problem) -> str:
    return f"{problem.subject}: {'; '.join(problem.found.splitlines())}"


def _config_notes(path: Path, numbers: dict[str, Any]) -> Iterator[str]:
    file = path / "config.json"
    if not file.is_file():
        return
    try:
        config = normalise(read_json(file), str(file))
    except BridgeError as error:
        yield from map(_line, error.problems or [Problem("config.json", str(error), "")])
        return
    for field, number in ModelSpec.from_model_config(config).numbers.items():
        if numbers.get(field, number) != number:
            yield f"{field}: config.json {number}, tensors {numbers[field]}"
    if config["rope_scaling"]:
        yield f"YaRN, factor {config['rope_scaling']['factor']}"
    yield from config_notes(path, config, {})


def lines(inspection: Inspection) -> Iterator[str]:
    """The description, for a person."""
    if inspection.names == "MindFormers":
        layout = inspection.layout or "not declared in the files; MindFormers trains interleaved by default"
        yield f"names       MindFormers; layout {layout}"
    else:
        yield f"names       {inspection.names}"
    numbers = ", ".join(f"{field} {n}" for field, n in inspection.numbers.items() if field != "tie_word_embeddings")
    yield f"model       {inspection.model}" + (f": {numbers}" if numbers else "")
    if inspection.tied is not None:
        yield "embeddings  " + ("tied: no output layer of its own" if inspection.tied else "an output layer of its own")
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in inspection.dtypes.items())
    where = f"{inspection.files} {'file' if inspection.files == 1 else 'files'}"
    where += f" of {inspection.ranks} ranks" if inspection.ranks else ""
    yield f"tensors     {len(inspection.tensors)} ({dtypes}), {size_text(inspection.nbytes)} in {where}"
    if inspection.nbytes_dequantised is not None:
        yield f"quantised   {inspection.quantization}; {size_text(inspection.nbytes_dequantised)} when dequantised"
    yield f"parameters  {inspection.parameters:,}" + (" on all ranks, copies included" if inspection.ranks else "")
    yield from (f"adapter     {adapter}" for adapter in inspection.adapters)
    if lora := inspection.lora:
        declared = (
            f"alpha in {lora.declared_in}" if lora.declared_in else "no file beside or above it declares its alpha"
        )
        yield f"LoRA        rank {', '.join(map(str, lora.ranks))}; {declared}; of {first_names(lora.parameters)}"
    if inspection.state:
        yield f"state       of a training run: {first_names(inspection.state)}"
    yield from (f"unusual     {note}" for note in inspection.unusual)
