"""Damages tiny checkpoints at random, and gives each to every command that reads one.

    python tests/fault_injection.py --count 2000 --seed 0
    python tests/fault_injection.py --seed 0 --only 17 --keep /tmp/case

What must hold, whatever the damage: a command is done or refuses with a BridgeError (exit code 0 or 2); none hangs;
none leaves an output behind that it refused to make; nothing is accepted that the safetensors library refuses; and
what ``convert`` or ``export`` accepts comes back bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from safetensors import safe_open

from tests.support.checkpoints import MOE_SPEC, NUMPY, SPEC, hf_config, random_tensors, write

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from mf_qwen3_bridge.cli.main import cli
from mf_qwen3_bridge.errors import BridgeError
from mf_qwen3_bridge.model.rules import HF, INFER, TRAIN

SPECS = {"dense": SPEC, "tied": replace(SPEC, tie_word_embeddings=True), "moe": MOE_SPEC}
DIALECTS = {"hf": HF, "train": TRAIN, "infer": INFER}
LAYOUT = "mf_qwen3_bridge.layout"
INDEX = "model.safetensors.index.json"
SECONDS = 30
ODD: list[Any] = [
    *(None, True, 0, 1, -1, 3, 2**40, 10**30, 0.5, float("nan"), float("inf"), "", "x", "\0", "../x", "/etc/passwd"),
    *("é" * 300, [], [1], {}, {"a": 1}, "F16", "BF16", "F8_E4M3", "I4", "yarn"),
]


class Hang(BaseException):
    """A command did not answer."""


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


# ------------------------------------------------------------------------------------------------------------ checking


@dataclass
class Results:
    """What came of the faults: how many, what was refused for which reason, and what must not be."""

    faults: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    round_trips: int = 0
    undetectable: int = 0


class Case:
    """One damaged checkpoint, and what the commands make of it."""

    def __init__(self, results: Results, title: str, work: Path) -> None:
        self.results, self.title, self.work = results, title, work

    def violation(self, text: str) -> None:
        self.results.violations.append(f"{self.title}: {text}")

    def run(self, *arguments: object) -> bool:
        """Whether the command is done; a refusal is counted by its reason."""
        words = [str(argument) for argument in arguments]

        def too_long(*_: object) -> None:
            raise Hang

        previous = signal.signal(signal.SIGALRM, too_long)
        signal.alarm(SECONDS)
        printed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
        try:
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                cli.main(words, standalone_mode=False)
            return True
        except BridgeError as error:
            self.refused(words[0], error)
        except click.ClickException as error:
            self.violation(f"{' '.join(words)}: {error.format_message()}")
        except Hang:
            self.violation(f"{' '.join(words)} hangs\n{traceback.format_exc()}")
        except BaseException:
            self.violation(f"{' '.join(words)}\n{traceback.format_exc()}")
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, previous)
        return False

    def refused(self, command: str, error: BridgeError) -> None:
        try:
            str(error).encode()
        except Exception:
            self.violation(f"{command}: a message that can't be printed\n{traceback.format_exc()}")
        has_remedies = command == "verify" or all(problem.remedy for problem in error.problems)
        if not (error.headline.strip() and has_remedies):
            self.violation(f"{command}: a message that does not say what to do: {error}")
        reason = error.problems[0].found if error.problems else error.headline.replace(str(self.work), "")
        reason = re.sub(r"/\S+|'[^']*'|\d+|\b[\w.{}]*\.(weight|bias|json|safetensors)\S*", "_", reason)
        self.results.reasons[" ".join(reason.split())[:90]] += 1

    def make(self, output: Path, *arguments: object) -> bool:
        done = self.run(*arguments)
        if done != output.exists():
            self.violation(f"{arguments[0]} {'left nothing' if done else 'refused, and left its output'}")
        return done

    def tensors(self, directory: Path) -> dict[str, bytes]:
        """What a checkpoint holds, in float32, by the safetensors library."""
        found = {}
        for file in self.files(directory):
            try:
                with safe_open(file, framework="np"):
                    pass
            except Exception as error:
                self.violation(f"accepted, but the safetensors library refuses {file.name}: {error}")
                continue
            for name, (dtype, _, data) in Raw.read(file).tensors.items():
                if dtype in NUMPY:
                    found[name] = np.frombuffer(data, NUMPY[dtype]).astype(np.float32).tobytes()
        return found

    def declares_another_layout(self, directory: Path, whole: Path) -> bool:
        """Whether all files together declare a layout that they do not have: only other weights could show that."""
        (own,) = {Raw.read(file).metadata.get(LAYOUT) for file in shards(whole)}
        found = {Raw.read(file).metadata.get(LAYOUT) for file in self.files(directory)}
        if len(found) > 1:
            self.violation(f"accepted, but its files declare several layouts: {found}")
        return found != {own}

    def files(self, directory: Path) -> list[Path]:
        """The files of a checkpoint."""
        index_file = next((f for f in (directory / INDEX, directory / "param_name_map.json") if f.is_file()), None)
        if index_file is None:
            return [file for file in shards(directory) if file.name != "hyper_param.safetensors"]
        document = json.loads(index_file.read_text())
        names = set(document.get("weight_map", document).values()) - {"hyper_param.safetensors"}
        return [directory / name for name in sorted(names)]

    def compare(self, before: dict[str, bytes], after: dict[str, bytes]) -> None:
        self.results.round_trips += 1
        extra = before.keys() - after.keys()
        if "lm_head.weight" in extra and before["lm_head.weight"] == before.get("model.embed_tokens.weight"):
            extra -= {"lm_head.weight"}
        state = {name for name in extra if name.startswith(("adam_", "accu_grads"))}
        if wrong := sorted((extra - state) | {name for name in after if after[name] != before.get(name)}):
            self.violation(f"does not come back: {', '.join(wrong[:5])}")


def inject(count: int, seed: int, work: Path, only: int | None = None) -> Results:
    """Makes ``count`` damaged checkpoints below ``work`` and gives them to all commands."""
    results = Results()
    wholes = {}
    for (model, spec), (names, dialect), parts in (
        (m, d, p) for m in SPECS.items() for d in DIALECTS.items() for p in (1, 3)
    ):
        layout = {LAYOUT: str(dialect.layout)} if dialect.layout else {}
        directory = work / "whole" / f"{model}-{names}-{parts}"
        wholes[directory.name] = write(directory, random_tensors(spec, dialect), hf_config(spec), parts, layout)
    for number in range(count) if only is None else [only]:
        rng = random.Random(f"{seed}:{number}")
        name = rng.choice(sorted(wholes))
        place = work / "case"
        remove(place)
        directory = place / "model"
        shutil.copytree(wholes[name], directory)
        chosen = rng.sample(FAULTS, rng.choice([1, 1, 1, 2]))
        chosen.sort(key=lambda change: change is kind_of_a_file)  # last: who reads a pipe waits
        chosen[0](directory, rng)
        for change in chosen[1:]:
            with contextlib.suppress(Exception):  # it may meet what the first left
                change(directory, rng)
        title = f"{number} {name} {' and '.join(change.__name__ for change in chosen)}"
        results.faults.update(change.__name__ for change in chosen)
        case = Case(results, title, place)
        if examine(case, directory, wholes[name], name):
            results.accepted.update(change.__name__ for change in chosen)
    if only is None:
        remove(work / "case")
    return results


def examine(case: Case, directory: Path, whole: Path, name: str) -> bool:
    """Gives one damaged checkpoint to every command; whether it was converted."""
    _, names, _ = name.split("-")
    case.run("inspect", directory)
    fits = case.run("check", "--model_dir", directory)
    sound = case.run("verify", directory)
    case.run("verify", directory, whole)
    out, back = directory.parent / "out", directory.parent / "back"
    layout = "infer" if names == "infer" else "train"
    if names == "hf":
        there = case.make(out, "convert", "--model_dir", directory, "--output_dir", out)
        steps = ["export", "--input_path", out, "--hf_config", directory, "--output_path", back, "--dtype", "fp32"]
    else:
        there = case.make(out, "export", "--input_path", directory, "--output_path", out, "--dtype", "fp32")
        steps = ["convert", "--model_dir", out, "--layout", layout, "--output_dir", back]
    if there and not (fits and sound) and names == "hf":
        case.violation(
            f"converted, although check {'accepts' if fits else 'refuses'} and verify "
            f"{'accepts' if sound else 'refuses'} it"
        )
    if fits or sound or there:
        before = case.tensors(directory)
        if there and not (out / "config.json").is_file() and names != "hf":
            return there  # nothing to convert back with
        if there and names != "hf" and case.declares_another_layout(directory, whole):
            case.results.undetectable += 1
        elif there and case.make(back, *steps):
            case.compare(before, case.tensors(back))
        elif there:
            case.violation("was made, but can't be converted back")
    return there


def remove(directory: Path) -> None:
    for path in [directory, *directory.rglob("*")] if directory.exists() else ():
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o700)
    shutil.rmtree(directory, ignore_errors=True)


def report(results: Results, count: int) -> Iterator[str]:
    """The summary, line by line."""
    yield f"{'fault':24} {'injected':>8} {'converted':>9}"
    for name, injected in sorted(results.faults.items()):
        yield f"{name:24} {injected:8} {results.accepted[name]:9}"
    yield f"\n{count} checkpoints, {results.round_trips} round trips compared;"
    yield f"{results.undetectable} of another layout than declared; refusals by reason:"
    for reason, times in results.reasons.most_common(60):
        yield f"{times:6}  {reason}"
    yield f"\n{len(results.violations)} violations"
    yield from (f"\n{violation}" for violation in results.violations)


def main() -> None:
    """Injects faults, prints what came of them; exit code 1 if something must not be so."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the fault of this number alone")
    parser.add_argument("--keep", type=Path, help="work in this directory, and leave it")
    arguments = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))  # whoever reads /dev/zero to its end fails
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        results = inject(arguments.count, arguments.seed, arguments.keep or Path(temporary), arguments.only)
    for line in report(results, arguments.count if arguments.only is None else 1):
        print(line)
    print(f"{time.monotonic() - began:.0f} s")
    sys.exit(1 if results.violations else 0)


if __name__ == "__main__":
    main()
