"""Opens a checkpoint: the one way in for every command, whoever wrote it.

Hugging Face's directories, MindFormers' merged ones and the files of a training run's ranks all become one type: the
tensors, each whole or in shards, and what the files declare of themselves.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mf_qwen3_bridge.errors import BridgeError, Problem, folded_problems, refuse
from mf_qwen3_bridge.inputs.documents import directory_meant
from mf_qwen3_bridge.inputs.hf_config import read_json
from mf_qwen3_bridge.inputs.quantised import dequantised, read_quantization
from mf_qwen3_bridge.inputs.rank_files import open_rank_files, rank_directories
from mf_qwen3_bridge.inputs.source import HF_INDEX, HYPER_PARAMETERS, MINDFORMERS_INDEX, UNFINISHED_SUFFIX, Source
from mf_qwen3_bridge.inputs.strategies import read_strategies
from mf_qwen3_bridge.transfer.safetensors import TensorInfo, read_header


def open_source(
    path: Path | Sequence[Path],
    strategies: Path | None = None,
    file_suffix: str | None = None,
    *,
    weights_only: bool = False,
    without_prefix: str | None = None,
    as_stored: bool = False,
) -> Source:
    """Opens a checkpoint by its headers alone, and the scales of quantised weights.

    Args:
        path: a safetensors file, several, or a directory of them; with ``strategies`` the one that holds ``rank_0/``.
        strategies: the strategy folder of the training run whose ranks saved the files.
        file_suffix: of ranks' files, ``EPOCH_STEP`` of those to take; not needed where each rank has one file.
        weights_only: of ranks' files, leave an optimizer's state out.
        without_prefix: of ranks' files, leave out tensors whose names begin so.
        as_stored: leave quantised weights as they are; else they are computed, if a config.json beside them says how.

    Raises:
        BridgeError: files are missing, damaged, or contradict each other; a table lists everything.

    Example:
        >>> from pathlib import Path
        >>> source = open_source(Path("demo/qwen3-demo"))
        >>> source.is_hf, source.tensors["model.norm.weight"].dtype
        (True, 'BF16')
    """
    if strategies is None:
        source = _open_directory(path) if isinstance(path, Path) else _open_files(path[0].parent, path)
        config = config_beside(source)
        # A format that is not read is refused with all else that is wrong of config.json, by those who read it.
        return dequantised(source, config) if not as_stored and read_quantization(config)[0] else source
    assert isinstance(path, Path)
    listed = read_strategies(strategies)
    return open_rank_files(path, listed, file_suffix, weights_only=weights_only, without_prefix=without_prefix)


def config_beside(source: Source) -> dict[str, Any]:
    """The config.json beside a source's files; empty if there is none that can be read."""
    file = source.directory / "config.json"
    with suppress(BridgeError):
        return read_json(file) if file.is_file() else {}
    return {}


def _open_directory(path: Path) -> Source:
    """A file, or what the index of a directory lists, or without an index all of its ``*.safetensors``."""
    if path.is_file():
        return Source(path, *read_header(path))
    is_unfinished = path.name.endswith(UNFINISHED_SUFFIX)
    unfinished = path if is_unfinished else path.parent / f"{path.name}{UNFINISHED_SUFFIX}"
    if is_unfinished or (unfinished.is_dir() and not path.exists()):
        raise BridgeError(f"{unfinished} is not finished: give the command that was writing it again; it continues")
    if not path.is_dir():
        raise BridgeError(f"{path} does not exist: give a safetensors file or a directory of them")
    for name in (HF_INDEX, MINDFORMERS_INDEX):
        if (path / name).is_file():
            source = _open_indexed(path, path / name)
            # transformers takes model.safetensors where there is one, whatever the index lists.
            if name == HF_INDEX and path / "model.safetensors" in stale_files(source):
                kinds = f"model.safetensors, and the files that {name} names"
                raise BridgeError(f"{path} holds two checkpoints: {kinds}; remove one")
            return source
    files = sorted(file for file in path.glob("*.safetensors") if file.name != HYPER_PARAMETERS)
    if not files:
        raise BridgeError(f"no *.safetensors in {path}{_what_else_is_there(path)}")
    steps = {(int(step[1]), int(step[2])): file for file in files if (step := _STEP.fullmatch(file.name))}
    if len(steps) > 1:
        found = ", ".join(f"{epoch}_{step}" for epoch, step in sorted(steps))
        problem = Problem("steps", found, f"give one of them, such as {steps[max(steps)]}")
        raise BridgeError(f"{path} holds several checkpoints", [problem])
    missing = "missing, by the number in the other files' names"
    absent = (Problem(name, missing, "copy the file") for name in _absent_shards(files))
    refuse(f"{path} is not a whole checkpoint", absent)
    return _open_files(path, files)


def _open_files(path: Path, files: Iterable[Path]) -> Source:
    """Several files as one source; no tensor may be in two of them."""
    tensors: dict[str, TensorInfo] = {}
    all_metadata: list[dict[str, str]] = []
    problems = []
    twice: dict[tuple[str, str], list[str]] = defaultdict(list)
    for file in files:
        try:
            found, file_metadata = read_header(file)
        except BridgeError as error:
            problems += error.problems
            continue
        for name in tensors.keys() & found.keys():
            found_in = f"both in {tensors[name].file.name} and {file.name}"
            twice[found_in, "find out which file is of this checkpoint, and move the other away"].append(name)
        all_metadata.append(file_metadata)
        tensors |= found
    refuse(f"{path} is not a whole checkpoint", [*problems, *folded_problems(twice)])
    declared = {key: sorted({entry.get(key, "") for entry in all_metadata}) for entry in all_metadata for key in entry}
    shared = {key: values[0] for key, values in declared.items() if len(values) == 1}
    contradictions = {key: tuple(values) for key, values in declared.items() if len(values) > 1}
    return Source(path, tensors, shared, contradictions)


def _open_indexed(directory: Path, index: Path) -> Source:
    weight_map = _read_index(index)
    present = {file.name for file in directory.iterdir() if file.is_file()}
    problems = []
    files = []
    for name, count in sorted(Counter(weight_map.values()).items()):
        if Path(name).name != name:
            problems.append(Problem(name, f"{index.name} names a file outside {directory}", "fix the index"))
        elif name not in present:
            found = f"missing; {index.name} assigns {count} tensors to it"
            problems.append(Problem(name, found, "download or copy the file"))
        elif name != HYPER_PARAMETERS:
            files.append(directory / name)
    try:
        source = _open_files(directory, files)
    except BridgeError as error:
        raise BridgeError(error.headline, problems + error.problems) from error
    problems += _misplaced(source, weight_map, index.name, {file.name for file in files})
    refuse(f"{directory} is not a whole checkpoint", problems)
    return source


def _misplaced(source: Source, weight_map: Mapping[str, str], index: str, opened: set[str]) -> Iterator[Problem]:
    """Tensors that are not where an index has them; a row for each pair of files."""
    remedy = "copy index and files again, from one source"
    names: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, where in weight_map.items():
        tensor = source.tensors.get(name)
        if where in opened and (tensor is None or tensor.file.name != where):
            found = f"in {tensor.file.name}" if tensor else "in no file of the index"
            names[f"{index} has it in {where}; it is {found}", remedy].append(name)
    for name in source.tensors.keys() - weight_map.keys():
        names[f"in {source.tensors[name].file.name}, but not in {index}", remedy].append(name)
    return folded_problems(dict(sorted(names.items())))


def _read_index(index: Path) -> dict[str, str]:
    """{tensor: file} of either kind of index; per-rank MindFormers maps have no ``weight_map`` around it."""
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        weight_map = content.get("weight_map", content)
        if all(isinstance(name, str) and isinstance(file, str) for name, file in weight_map.items()):
            return dict(weight_map)
    except (OSError, ValueError, RecursionError, AttributeError):
        pass
    raise BridgeError(f"{index} can't be read, or is not an index of safetensors: copy it again")


def stale_files(source: Source) -> list[Path]:
    """Safetensors files in a source's directory that are not part of it."""
    found = set(source.path.glob("*.safetensors")) if source.path.is_dir() else set()
    return sorted(found - set(source.files) - {source.path / HYPER_PARAMETERS})


# What a training run saves of an epoch and a step.
_STEP = re.compile(r".*-(\d+)_(\d+)\.safetensors")
_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})\.safetensors")


def _absent_shards(files: Iterable[Path]) -> list[str]:
    """The files that a directory without an index should hold by Hugging Face's ``NAME-00001-of-00003`` and lacks."""
    present = {file.name for file in files}
    wanted = set()
    for match in filter(None, map(_SHARD.fullmatch, present)):
        stem, total = match.groups()
        wanted |= {f"{stem}-{number:05d}-of-{total}.safetensors" for number in range(1, int(total) + 1)}
    return sorted(wanted - present)


def _what_else_is_there(path: Path) -> str:
    """The end of a message about a directory without safetensors: what it holds instead, and what to do."""
    pickled = sorted(file.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in path.glob(kind))
    hint = f"; it holds {', '.join(pickled[:3])}: only safetensors are read" if pickled else ""
    below = sorted({file.parent.name for file in path.glob("*/*.safetensors")})
    if ranks := [rank for rank, directory in rank_directories(path).items() if directory.name in below]:
        if len(ranks) == 1:
            return f"{hint}; its rank_{ranks[0]} does: a run on one card saves the whole model in one file, give that"
        hint += f"; its rank_{ranks[0]} to rank_{ranks[-1]} do: what the ranks of a run saved. mf-qwen3 export and "
        return hint + "unify take it as --mindspore_ckpt_dir, with the run's --src_strategy_dirs"
    if meant := directory_meant(path, "*.safetensors"):
        return f"{hint}; give {meant}"
    return f"{hint}; its {', '.join(below[:3])} do" if below else hint
