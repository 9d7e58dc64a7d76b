"""Random damage to a tiny checkpoint: to headers, indexes, config.json, files, values, names and shapes."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.checkpoints import NUMPY

LAYOUT = "mf_qwen3_bridge.layout"
INDEX = "model.safetensors.index.json"
ODD: list[Any] = [
    *(None, True, 0, 1, -1, 3, 2**40, 10**30, 0.5, float("nan"), float("inf"), "", "x", "\0", "../x", "/etc/passwd"),
    *("é" * 300, [], [1], {}, {"a": 1}, "F16", "BF16", "F8_E4M3", "I4", "yarn"),
]


# --------------------------------------------------------------------------------------------------------------- files


@dataclass
class Raw:
    """A safetensors file taken apart without the package: {name: (dtype, shape, bytes)}, and its metadata."""

    tensors: dict[str, tuple[str, list[int], bytes]]
    metadata: dict[str, str]

    @classmethod
    def read(cls, file: Path) -> Raw:
        header, data = parts_of(file)
        metadata = header.pop("__metadata__", None) or {}
        return cls({n: (e["dtype"], e["shape"], data[slice(*e["data_offsets"])]) for n, e in header.items()}, metadata)

    def write(self, file: Path) -> None:
        header: dict[str, Any] = {"__metadata__": self.metadata}
        end = 0
        for name, (dtype, shape, data) in self.tensors.items():
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end := end + len(data)]}
        put_together(file, header, b"".join(data for _, _, data in self.tensors.values()))


def parts_of(file: Path) -> tuple[dict[str, Any], bytes]:
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def put_together(file: Path, header: Any, data: bytes) -> None:
    encoded = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


def shards(directory: Path) -> list[Path]:
    return sorted(file for file in directory.glob("*.safetensors") if file.is_file())


# -------------------------------------------------------------------------------------------------------------- faults

Fault = Callable[[Path, random.Random], None]
FAULTS: list[Fault] = []


def fault(function: Fault) -> Fault:
    FAULTS.append(function)
    return function


def a_shard(directory: Path, rng: random.Random) -> Path:
    return rng.choice(shards(directory) or [directory / "model.safetensors"])


def a_tensor(directory: Path, rng: random.Random, change: Callable[[Raw, str], None]) -> None:
    file = a_shard(directory, rng)
    raw = Raw.read(file)
    change(raw, rng.choice(list(raw.tensors)))
    raw.write(file)


@fault
def nothing(directory: Path, rng: random.Random) -> None: ...


@fault
def bits_of_a_header(directory: Path, rng: random.Random) -> None:
    file = a_shard(directory, rng)
    content = bytearray(file.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    for _ in range(rng.choice([1, 1, 2, 8])):
        content[rng.randrange(8 + length)] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


@fault
def length_of_a_header(directory: Path, rng: random.Random) -> None:
    file = a_shard(directory, rng)
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    length = max(0, rng.choice([0, 1, 2**63, 2**64 - 1, length - 1, length + 1, length + 8, len(content)]))
    file.write_bytes(struct.pack("<Q", length) + content[8:])


@fault
def entry_of_a_header(directory: Path, rng: random.Random) -> None:
    file = a_shard(directory, rng)
    header, data = parts_of(file)
    name = rng.choice(list(header))
    if name == "__metadata__":
        header[name] = rng.choice(ODD)
    else:
        key = rng.choice(["dtype", "shape", "data_offsets"])
        entry = header[name]
        entry[key] = rng.choice([rng.choice(ODD), entry[key][::-1], [rng.choice(ODD), 8], [0, 4], [4, 3]])
    put_together(file, header, data)


@fault
def metadata_of_a_file(directory: Path, rng: random.Random) -> None:
    file = a_shard(directory, rng)
    raw = Raw.read(file)
    keys = [LAYOUT, "mf_qwen3_bridge.tensor_parallel", rng.choice(list(raw.tensors))]
    layouts = ["qkv=contiguous,gate_up=contiguous", "qkv=interleaved,gate_up=interleaved", "qkv=contiguous,gate_up=x"]
    layouts += [f"{layouts[0]},tensor_parallel={number}" for number in ("0", "1", "2", "9" * 30)]
    raw.metadata[rng.choice(keys)] = rng.choice([*layouts, "", "0", "2", "Int4", "x"])
    raw.write(file)


@fault
def length_of_a_file(directory: Path, rng: random.Random) -> None:
    file = a_shard(directory, rng)
    content = file.read_bytes()
    cut = rng.choice([0, 1, 7, 8, 9, len(content) - 1, len(content) - 4, rng.randrange(len(content))])
    file.write_bytes(rng.choice([content[:cut], content + bytes(rng.choice([1, 8, 4096])), content + content]))


@fault
def content_of_a_file(directory: Path, rng: random.Random) -> None:
    lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    file = rng.choice([*shards(directory), directory / INDEX, directory / "config.json"])
    file.write_bytes(rng.choice([b"", b"\0", b"{}", b"[]", b"null", b"<html>", lfs, rng.randbytes(200), b"[" * 9999]))


@fault
def kind_of_a_file(directory: Path, rng: random.Random) -> None:
    file = rng.choice([*shards(directory) * 2, directory / INDEX, directory / "config.json"])
    elsewhere = directory.parent / "elsewhere"
    if file.exists():
        file.rename(elsewhere)

    def as_socket() -> None:
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as opened:
            opened.bind(str(file))

    rng.choice(
        [
            lambda: None,
            lambda: file.symlink_to("nowhere"),
            lambda: file.symlink_to(file.name),
            lambda: file.symlink_to(elsewhere),
            lambda: file.symlink_to("/dev/zero"),
            lambda: file.symlink_to("/dev/null"),
            lambda: file.symlink_to("."),
            lambda: os.mkfifo(file),
            file.mkdir,
            as_socket,
        ]
    )()


@fault
def without_permission(directory: Path, rng: random.Random) -> None:
    """Root reads it all the same."""
    rng.choice([*shards(directory), directory / "config.json", directory]).chmod(0)


@fault
def a_file_more(directory: Path, rng: random.Random) -> None:
    file = a_shard(directory, rng)
    names = ["model.safetensors", "stale.safetensors", "hyper_param.safetensors", "model-00001-of-00007.safetensors"]
    shutil.copy(file, directory / rng.choice([name for name in names if name != file.name]))


@fault
def a_file_less(directory: Path, rng: random.Random) -> None:
    rng.choice([*shards(directory), directory / INDEX, directory / "config.json"]).unlink(missing_ok=True)


@fault
def index(directory: Path, rng: random.Random) -> None:
    path = directory / INDEX
    document = json.loads(path.read_text()) if path.exists() else {"weight_map": {}}
    weight_map = document["weight_map"]
    name = rng.choice(list(weight_map) or ["x"])
    files = [*map(str, ODD), *(file.name for file in shards(directory))]

    def rename() -> None:
        weight_map[f"{name}.x"] = weight_map.pop(name, "x")

    rng.choice(
        [
            lambda: weight_map.pop(name, None),
            rename,
            lambda: weight_map.update({name: rng.choice(files)}),
            lambda: weight_map.update({name: rng.choice(ODD)}),
            lambda: weight_map.update({str(rng.choice(ODD)): rng.choice(files)}),
            lambda: document.update(weight_map=rng.choice(ODD)),
            lambda: document.update(weight_map=dict(zip(weight_map, reversed(weight_map.values())))),
            lambda: document.update(metadata=rng.choice(ODD)),
            lambda: document.pop("weight_map"),
        ]
    )()
    path.write_text(json.dumps(document))


@fault
def config(directory: Path, rng: random.Random) -> None:
    path = directory / "config.json"
    document = json.loads(path.read_text())
    key = rng.choice([*document, "rope_parameters", "quantization_config", "layer_types", "dtype", "num_local_experts"])
    neighbours = [document[key] + 1, document[key] * 2] if type(document.get(key)) is int else []
    document[key] = rng.choice([*ODD, *neighbours * 3, {"rope_type": "yarn", "factor": rng.choice(ODD)}])
    if rng.random() < 0.2:
        del document[key]
    path.write_text(json.dumps(document))


@fault
def bytes_of_a_config(directory: Path, rng: random.Random) -> None:
    path = rng.choice([directory / "config.json", directory / INDEX])
    content = bytearray(path.read_bytes() if path.exists() else b"{}")
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content[: rng.choice([None, None, rng.randrange(len(content))])])


@fault
def values(directory: Path, rng: random.Random) -> None:
    def change(raw: Raw, name: str) -> None:
        dtype, shape, data = raw.tensors[name]
        array = np.frombuffer(bytearray(data), NUMPY[dtype])
        value = rng.choice([np.nan, np.inf, -np.inf, 0, -0.0, 1e30, 1e-42])
        array[: rng.choice([1, len(array)])] = np.float32(value).astype(array.dtype)
        raw.tensors[name] = dtype, shape, array.tobytes()

    a_tensor(directory, rng, change)


@fault
def name_of_a_tensor(directory: Path, rng: random.Random) -> None:
    def change(raw: Raw, name: str) -> None:
        names = [f"{name}.x", name.replace("0", "7"), name.replace("q_", "k_"), f"adam_m.{name}", "lm_head.weight"]
        names += [f"{name.rpartition('.')[0]}.bias", f"{name}_scale_inv", "", "é", name.upper(), "model.layers.²."]
        renamed = {rng.choice(names) if n == name else n: tensor for n, tensor in raw.tensors.items()}
        raw.tensors = renamed if rng.random() < 0.5 else raw.tensors | renamed

    a_tensor(directory, rng, change)


@fault
def a_tensor_less(directory: Path, rng: random.Random) -> None:
    a_tensor(directory, rng, lambda raw, name: raw.tensors.pop(name) and None)


@fault
def a_tensor_twice(directory: Path, rng: random.Random) -> None:
    source = Raw.read(a_shard(directory, rng))
    name = rng.choice(list(source.tensors))
    a_tensor(directory, rng, lambda raw, _: raw.tensors.update({name: source.tensors[name]}))


@fault
def shape_of_a_tensor(directory: Path, rng: random.Random) -> None:
    def change(raw: Raw, name: str) -> None:
        dtype, shape, data = raw.tensors[name]
        half = len(data) // 2 // 4 * 4
        raw.tensors[name] = rng.choice(
            [
                (dtype, shape[::-1], data),
                (dtype, [len(data) // NUMPY[dtype].itemsize], data),
                (dtype, [1, *shape], data),
                (dtype, [shape[0] * 2, *shape[1:]], data + data),
                (dtype, [half // NUMPY[dtype].itemsize], data[:half]),
                (dtype, [0, *shape[1:]], b""),
                (dtype, [], data[: NUMPY[dtype].itemsize]),
            ]
        )

    a_tensor(directory, rng, change)


@fault
def dtype_of_tensors(directory: Path, rng: random.Random) -> None:
    file = a_shard(directory, rng)
    raw = Raw.read(file)
    for name in rng.sample(list(raw.tensors), rng.choice([1, len(raw.tensors)])):
        dtype, shape, data = raw.tensors[name]
        array = np.frombuffer(data, NUMPY[dtype])
        to = rng.choice(["F16", "BF16", "F32", "I32", "F64", "I8", "U8", "F8_E4M3", "F4"])
        if to in NUMPY:
            raw.tensors[name] = to, shape, array.astype(NUMPY[to]).tobytes()
        else:
            bits = {"I32": 32, "F64": 64, "F4": 4}.get(to, 8)
            raw.tensors[name] = to, shape, bytes(array.size * bits // 8)
    raw.write(file)
