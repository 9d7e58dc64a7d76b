"""Opens directories of safetensors and reads tensors' bytes; knows nothing of models."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from threading import Lock

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from mf_qwen3_bridge.errors import BridgeError, Problem, fold_names
from mf_qwen3_bridge.model.layouts import Box
from mf_qwen3_bridge.transfer.directories import absent_shards, what_else_is_there

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
# Bits of an element of every dtype that a header may name.
_BITS = {name: 8 * dtype.itemsize for name, dtype in DTYPES.items()} | {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "C64": 64,
}
HF_INDEX = "model.safetensors.index.json"
MINDFORMERS_INDEX = "param_name_map.json"
# ms.unified_safetensors puts here what rank 0 held beside the merged weights: counters, and its slices of the
# optimizer state.
HYPER_PARAMETERS = "hyper_param.safetensors"
# A directory that is still being written, or whose writing was interrupted.
UNFINISHED_SUFFIX = ".incomplete"
# The limit that the safetensors library sets itself.
_MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in a safetensors file, not read yet.

    Attributes:
        name: its name.
        shape: its shape.
        dtype: its dtype as safetensors spells it, such as ``BF16``.
        file: the file that holds it.
        start: offset of its first byte in the file.
        nbytes: its size in bytes.
        shards: the blocks that cover it, if these are stored instead of the whole; ``file`` and ``start`` are then
            those of one of them.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    start: int
    nbytes: int
    shards: tuple[Shard, ...] = ()


@dataclass(frozen=True)
class Shard:
    """A block of a tensor that is stored as a tensor of its own.

    Attributes:
        tensor: the block as it is stored.
        box: where it is in the whole.
    """

    tensor: TensorInfo
    box: Box


class Reader:
    """Reads tensors' bytes. Each file is opened once; several threads may read at a time.

    ``with Reader() as reader: ...`` closes the files.
    """

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}
        self._lock = Lock()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exception: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def read(self, tensor: TensorInfo, start: int, out: memoryview) -> None:
        """Fills ``out`` with the tensor's bytes from ``start`` on.

        Raises:
            BridgeError: the file ended early or could not be read.
            ValueError: the tensor is stored in shards, each of which is read by itself.
        """
        if tensor.shards:
            raise ValueError(f"{tensor.name} is stored in {len(tensor.shards)} shards")
        done = 0
        try:
            descriptor = self._descriptor(tensor.file)
            while done < len(out):
                count = os.preadv(descriptor, [out[done:]], tensor.start + start + done)
                if count == 0:
                    raise BridgeError(
                        f"{tensor.file} ended while {tensor.name} was read ({start + done} of {tensor.nbytes} bytes): "
                        "it changed since its header was read; copy it again"
                    )
                done += count
        except OSError as error:
            raise BridgeError(f"can't read {tensor.name} from {tensor.file}: {error.strerror}") from error

    def _descriptor(self, file: Path) -> int:
        with self._lock:
            if file not in self._descriptors:
                self._descriptors[file] = os.open(file, os.O_RDONLY)
            return self._descriptors[file]


def read_bytes(tensor: TensorInfo) -> bytes:
    """All of a small tensor's bytes.

    Raises:
        BridgeError: the file ended early or could not be read.
    """
    content = bytearray(tensor.nbytes)
    with Reader() as reader:
        reader.read(tensor, 0, memoryview(content))
    return bytes(content)


@dataclass(frozen=True)
class Checkpoint:
    """All tensors of a directory, a file or several, and the files' metadata.

    Attributes:
        path: the directory or file.
        tensors: the tensors by name.
        metadata: what all files declare alike.
        contradictions: what they do not, and the values; empty text is for files that declare none.
    """

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    contradictions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def read_header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors and the metadata of one safetensors file; no tensor is read.

    The safetensors library reads and checks the header. It leaves no gaps between tensors, so their order and their
    sizes give the offsets, which it does not return.

    Raises:
        BridgeError: the file is truncated, or no safetensors file.
    """
    try:
        size = file.stat().st_size
        if not file.is_file():  # a pipe would keep the library waiting
            raise _damaged(file, "no regular file")
        with open(file, "rb") as stream:
            prefix = stream.read(8)
        with safe_open(file, framework="np") as opened:
            names = opened.offset_keys()
            slices = [opened.get_slice(name) for name in names]
            described = [(slice_.get_dtype(), tuple(slice_.get_shape())) for slice_ in slices]
            metadata = opened.metadata() or {}
    except OSError as error:
        found = f"can't be read: {error.strerror or error}"
        raise _damaged(file, found, "look at its permissions and its disk") from error
    except SafetensorError as error:
        raise _damaged(file, *_why_refused(file, size, str(error))) from error
    tensors = {}
    position = 8 + int.from_bytes(prefix, "little")
    for name, (dtype, shape) in zip(names, described):
        if dtype not in _BITS:
            raise _damaged(file, f"{name} has dtype {dtype}: its size is not known", "update mf-qwen3-bridge")
        nbytes = prod(shape) * _BITS[dtype] // 8
        # MindSpore names there what safetensors has no name for, such as int4, and reads the bytes as that.
        tensors[name] = TensorInfo(name, shape, metadata.get(name, dtype), file, position, nbytes)
        position += nbytes
    if position != size:
        raise _damaged(file, _extent(size, position))
    return tensors, metadata


def _damaged(file: Path, found: str, remedy: str = "copy the file again") -> BridgeError:
    return BridgeError(f"{file} is damaged", [Problem(file.name, found, remedy)])


def _extent(size: int, expected: int) -> str:
    state = "truncated" if size < expected else "longer than its header declares"
    return f"{state}: {size} bytes, {expected} expected"


def _why_refused(file: Path, size: int, reason: str) -> tuple[str, ...]:
    """What is wrong with a file that the library refuses: its reason, or more if that names no tensor and no size."""
    with suppress(OSError), open(file, "rb") as stream:
        start = stream.read(40)
        if start.startswith(b"version https://git-lfs"):
            return "a Git LFS pointer, not the weights", "fetch them with `git lfs pull`"
        length = int.from_bytes(start[:8], "little")
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            return (f"{size} bytes, not a whole safetensors file",)
        stream.seek(8)
        text = stream.read(length)
    if any(kind in reason for kind in ("invalid shape", "invalid offset", "not fully covered")):
        header = json.loads(text)  # whose entries are of the right types, then
        header.pop("__metadata__", None)
        position = 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = entry["data_offsets"]
            if prod(entry["shape"]) * _BITS.get(entry["dtype"], 0) != 8 * (end - begin):
                kind = f"{entry['dtype']} {tuple(entry['shape'])}"
                return (f"{name} is {kind} by its header, but has {end - begin} bytes",)
            if begin != position:
                return (f"{name} does not begin where the tensor before it ends",)
            position = end
        if 8 + length + position != size:
            return (_extent(size, 8 + length + position),)
    return (f"its header is not valid: {reason.removeprefix('Error while deserializing header: ')}",)


def open_checkpoint(path: Path) -> Checkpoint:
    """The tensors of a safetensors file or of a directory of them, by headers alone.

    In a directory the index lists the files that belong to the checkpoint (``model.safetensors.index.json``, or
    MindFormers' ``param_name_map.json``); without one all ``*.safetensors`` do.

    Raises:
        BridgeError: files that are missing, damaged, outside the directory; tensors that are not where the index
            has them, or are there twice. Lists everything.
    """
    if path.is_file():
        return Checkpoint(path, *read_header(path))
    if path.name.endswith(UNFINISHED_SUFFIX):
        raise BridgeError(f"{path} is not finished: give the command that makes it again, and it goes on")
    if not path.is_dir():
        raise BridgeError(f"{path} does not exist: give a safetensors file or a directory of them")
    for name in (HF_INDEX, MINDFORMERS_INDEX):
        if (path / name).is_file():
            checkpoint = _open_indexed(path, path / name)
            _refuse_second_checkpoint(checkpoint, path / name)
            return checkpoint
    files = sorted(file for file in path.glob("*.safetensors") if file.name != HYPER_PARAMETERS)
    if not files:
        raise BridgeError(f"no *.safetensors in {path}{what_else_is_there(path)}")
    if absent := absent_shards(files):
        raise BridgeError(
            f"{path} is not a whole checkpoint",
            [Problem(name, "missing, by the number in the other files' names", "copy the file") for name in absent],
        )
    return open_files(path, files)


def open_files(path: Path, files: Iterable[Path]) -> Checkpoint:
    """The tensors of several files as one checkpoint.

    Raises:
        BridgeError: a damaged file, or a tensor that is in two of them.
    """
    tensors: dict[str, TensorInfo] = {}
    all_metadata: list[dict[str, str]] = []
    problems = []
    twice: dict[str, list[str]] = defaultdict(list)
    for file in files:
        try:
            found, file_metadata = read_header(file)
        except BridgeError as error:
            problems += error.problems
            continue
        for name in tensors.keys() & found.keys():
            twice[f"both in {tensors[name].file.name} and {file.name}"].append(name)
        all_metadata.append(file_metadata)
        tensors |= found
    for where, names in twice.items():
        problems += [Problem(name, where, "remove the file that is stale") for name in fold_names(names)]
    if problems:
        raise BridgeError(f"{path} is not a whole checkpoint", problems)
    declared = {key: sorted({entry.get(key, "") for entry in all_metadata}) for entry in all_metadata for key in entry}
    shared = {key: values[0] for key, values in declared.items() if len(values) == 1}
    contradictions = {key: tuple(values) for key, values in declared.items() if len(values) > 1}
    return Checkpoint(path, tensors, shared, contradictions)


def _open_indexed(directory: Path, index: Path) -> Checkpoint:
    weight_map = _read_index(index)
    problems = []
    files = []
    for name in sorted(set(weight_map.values())):
        file = directory / name
        if Path(name).name != name:
            problems.append(Problem(name, f"{index.name} names a file outside {directory}", "fix the index"))
        elif not _is_file(file):
            count = sum(1 for value in weight_map.values() if value == name)
            problems.append(
                Problem(name, f"missing; {index.name} assigns {count} tensors to it", "download or copy the file")
            )
        elif name != HYPER_PARAMETERS:
            files.append(file)
    try:
        checkpoint = open_files(directory, files)
    except BridgeError as error:
        raise BridgeError(error.headline, problems + error.problems) from error
    problems += _misplaced(checkpoint, weight_map, index.name, {file.name for file in files})
    if problems:
        raise BridgeError(f"{directory} is not a whole checkpoint", problems)
    return checkpoint


def _misplaced(
    checkpoint: Checkpoint, weight_map: Mapping[str, str], index: str, opened: set[str]
) -> Iterator[Problem]:
    """Tensors that are not where an index says; those of one reason, of one pair of files, in as few rows as can be."""
    names: dict[str, list[str]] = defaultdict(list)
    for name, where in weight_map.items():
        tensor = checkpoint.tensors.get(name)
        if where in opened and (tensor is None or tensor.file.name != where):
            found = f"in {tensor.file.name}" if tensor else "in no file of the index"
            names[f"{index} has it in {where}; it is {found}"].append(name)
    for name in checkpoint.tensors.keys() - weight_map.keys():
        names[f"in {checkpoint.tensors[name].file.name}, but not in {index}"].append(name)
    for found in sorted(names):
        for folded in fold_names(names[found]):
            yield Problem(folded, found, "copy index and files again, from one source")


def _is_file(file: Path) -> bool:
    try:
        return file.is_file()
    except OSError:  # a name that is too long
        return False


def _refuse_second_checkpoint(checkpoint: Checkpoint, index: Path) -> None:
    """transformers takes ``model.safetensors`` where there is one, whatever the index lists."""
    single = index.parent / "model.safetensors"
    if index.name == HF_INDEX and single in stale_files(
        index.parent, {tensor.file for tensor in checkpoint.tensors.values()}
    ):
        raise BridgeError(
            f"{index.parent} holds two checkpoints: {single.name}, and the files that {index.name} names; remove one"
        )


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


def stale_files(directory: Path, used: Iterable[Path]) -> Iterator[Path]:
    """Safetensors files in a checkpoint's directory that are not among those that are part of it."""
    if directory.is_dir():
        yield from sorted(set(directory.glob("*.safetensors")) - set(used) - {directory / HYPER_PARAMETERS})
