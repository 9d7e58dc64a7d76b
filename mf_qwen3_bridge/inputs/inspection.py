"""What is in a checkpoint, by its headers alone: described, not judged."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from mf_qwen3_bridge.errors import BridgeError, Problem, fold_names
from mf_qwen3_bridge.inputs.hf_config import config_notes, normalise, read_json
from mf_qwen3_bridge.inputs.identify import dialect_of, numbers_of, spec_of
from mf_qwen3_bridge.inputs.opening import open_source, stale_files
from mf_qwen3_bridge.inputs.source import Source
from mf_qwen3_bridge.model.layouts import TRAINING_DEFAULT
from mf_qwen3_bridge.model.parameters import OUTPUT, is_training_state
from mf_qwen3_bridge.model.released import RELEASED
from mf_qwen3_bridge.model.rules import Dialect, model_rules
from mf_qwen3_bridge.model.spec import ModelSpec
from mf_qwen3_bridge.transfer.plan import match_tensors
from mf_qwen3_bridge.transfer.progress import size_text
from mf_qwen3_bridge.transfer.safetensors import TensorInfo


@dataclass(frozen=True)
class TensorRow:
    """A line of ``inspect --tensors``.

    Attributes:
        name: the tensor's.
        dtype: as safetensors spells it.
        shape: its shape.
        file: the file that stores it, below the directory.
        parameter: the MindFormers parameter that it is, or is part of; None if no rule claims it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    parameter: str | None


@dataclass(frozen=True)
class Inspection:
    """A checkpoint as its headers show it.

    Attributes:
        path: the directory or file.
        names: whose names the tensors have, ``Hugging Face`` or ``MindFormers``.
        layout: of QKV and gate/up, if the files declare it; None for Hugging Face's tensors.
        ranks: number of ``rank_N`` directories; 0 if the tensors are whole.
        model: ``Qwen3``, ``Qwen3-MoE``, or a released size.
        numbers: of the model, as far as the shapes show them.
        tied: whether the output layer is the embedding.
        parameters: number of elements of all weights; those of several ranks are counted for each.
        nbytes: bytes of all tensors.
        dtypes: number of tensors of each dtype.
        files: number of files.
        state: what is of a training run and no weight, folded.
        unusual: all that one should know.
        tensors: all of them.
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
    dtypes: dict[str, int]
    files: int
    state: tuple[str, ...]
    unusual: tuple[str, ...]
    tensors: tuple[TensorRow, ...]


def inspect(path: Path) -> Inspection:
    """Describes a directory or file of safetensors, or a directory of ``rank_N`` directories.

    Raises:
        BridgeError: files are missing or damaged, or hold no Qwen3's tensors.
    """
    ranks = _rank_directories(path)
    source = _of_ranks(path, ranks) if ranks else open_source(path)
    dialect = dialect_of(source, default=TRAINING_DEFAULT)
    layout = None if dialect.is_hf or not source.declared_layout else str(source.declared_layout)
    found = numbers_of(source.tensors, dialect)
    numbers: dict[str, Any] = {} if ranks else {field: number for field, (number, _) in found.items()}
    tied = None if ranks else dialect.name(OUTPUT) not in source.tensors
    model = "Qwen3-MoE" if source.has_experts else "Qwen3"
    claims: dict[str, str] = {}
    unusual: list[str] = []
    if not ranks:
        try:
            spec = spec_of(source.tensors, dialect)
        except KeyError as missing:
            unusual.append(f"the shapes do not show {missing.args[0]}: a tensor of the first layer is missing, or odd")
        else:
            numbers = spec.numbers
            model = next((name for name, size in RELEASED.items() if _same_but_tying(size, spec)), model)
            claims = {place.tensor: rule.parameter for rule in model_rules(spec) for place in rule.places(dialect)}
            unusual += _problems(source, spec, dialect)
        unusual += _config_notes(path, numbers)
    bare = {name: name.partition(" (")[0] for name in source.tensors}  # without the rank
    weights = claims or set(bare.values())
    state = {name for name in source.tensors if name not in claims and is_training_state(bare[name], weights)}
    base = path if path.is_dir() else path.parent
    files = {file: str(file.relative_to(base)) for file in {t.file for t in source.tensors.values()}}
    rows = (TensorRow(name, t.dtype, t.shape, files[t.file], claims.get(name)) for name, t in source.tensors.items())
    return Inspection(
        path=str(path),
        names="Hugging Face" if dialect.is_hf else "MindFormers",
        layout=layout,
        ranks=len(ranks),
        model=model,
        numbers=numbers,
        tied=tied,
        parameters=sum(prod(t.shape) for t in source.tensors.values() if t.name not in state),
        nbytes=source.nbytes,
        dtypes=dict(sorted(Counter(t.dtype for t in source.tensors.values()).items())),
        files=len(files),
        state=tuple(fold_names(state)),
        unusual=(
            *unusual,
            *(f"{file.name} is not part of it" for file in (() if ranks else stale_files(source))),
        ),
        tensors=tuple(rows),
    )


def _same_but_tying(size: ModelSpec, spec: ModelSpec) -> bool:
    return replace(size, tie_word_embeddings=spec.tie_word_embeddings) == spec


def _rank_directories(path: Path) -> list[Path]:
    if not path.is_dir():
        return []
    found = [entry for entry in path.iterdir() if re.fullmatch(r"rank_\d+", entry.name)]
    return sorted(found, key=lambda entry: int(entry.name[5:]))


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


def _problems(source: Source, spec: ModelSpec, dialect: Dialect) -> Iterator[str]:
    """What keeps it from being a whole model."""
    try:
        found = match_tensors(model_rules(spec), source.tensors, dialect).problems
        yield from (f"{problem.subject}: {_one_line(problem)}" for problem in found)
    except ValueError as error:
        yield str(error)


def _one_line(problem: Problem) -> str:
    return "; ".join(problem.found.splitlines())


def _config_notes(path: Path, numbers: dict[str, Any]) -> Iterator[str]:
    file = path / "config.json"
    if not file.is_file():
        return
    try:
        config = normalise(read_json(file), str(file))
    except BridgeError as error:
        for problem in error.problems or [Problem("config.json", str(error), "")]:
            yield f"{problem.subject}: {_one_line(problem)}"
        return
    spec = ModelSpec.from_model_config(config)
    for field, number in spec.numbers.items():
        if numbers.get(field, number) != number:
            yield f"{field}: config.json {number}, tensors {numbers[field]}"
    if config["rope_scaling"]:
        yield f"YaRN, factor {config['rope_scaling']['factor']}"
    yield from config_notes(path, config)


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
    yield f"parameters  {inspection.parameters:,}" + (" on all ranks, copies included" if inspection.ranks else "")
    if inspection.state:
        more = f" and {len(inspection.state) - 4} more" if len(inspection.state) > 4 else ""
        yield f"state       of a training run: {', '.join(inspection.state[:4])}{more}"
    yield from (f"unusual     {note}" for note in inspection.unusual)
