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
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import click
import numpy as np
from safetensors import safe_open

from mf_qwen3_bridge.cli.main import cli
from mf_qwen3_bridge.errors import BridgeError
from mf_qwen3_bridge.model.rules import HF, INFER, TRAIN

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.support.checkpoints import MOE_SPEC, NUMPY, SPEC, hf_config, random_tensors, write
from tests.support.faults import FAULTS, INDEX, LAYOUT, Raw, kind_of_a_file, shards

SPECS = {"dense": SPEC, "tied": replace(SPEC, tie_word_embeddings=True), "moe": MOE_SPEC}
DIALECTS = {"hf": HF, "train": TRAIN, "infer": INFER}
SECONDS = 30


class Hang(BaseException):
    """A command did not answer."""


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
