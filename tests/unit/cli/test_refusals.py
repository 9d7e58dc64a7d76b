"""Bad input, for every command that writes a checkpoint."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mf_qwen3_bridge.cli.files import convert_weight
from mf_qwen3_bridge.cli.main import cli
from tests.support.checkpoints import Tensors, contents, hf_config, random_tensors, write
from tests.support.cli import convert, everything, export, names, num_rows
from tests.support.damage import assign_in_index, change_config, cut_off, leave_only, unwrapped
from tests.support.trained import DOWN_PROJ, FC2, Touch, fused, write_config, write_merged


class Given(NamedTuple):
    """What a command reads, in three files, and the names of some of it."""

    weights: Path
    config: Path  # its directory
    index: str
    shard: str
    tensor: str
    target: str  # what the tensor becomes
    tensors: Tensors

    def rewrite(self, **changes: np.ndarray | None) -> None:
        """Under other names: ``tensor``, ``extra``; None: left out."""
        full = {"tensor": self.tensor, "extra": self.tensor.replace(".weight", ".extra.weight")}
        changed = self.tensors | {full[name]: array for name, array in changes.items()}
        whole = {name: array for name, array in changed.items() if array is not None}
        write_merged(self.weights, whole, 3) if "param" in self.index else write(self.weights, whole, shards=3)

    def in_index(self, file: str) -> None:
        assign_in_index(self.weights / self.index, self.tensor, file)

    def in_config(self, **changes: Any) -> None:
        change_config(self.config, **changes)


COMMANDS = {
    "convert": (cli, ("convert", "--model_dir", "hf", "--output_dir", "out")),
    "export": (cli, ("export", "--input_path", "trained", "--hf_config", "hf", "--output_path", "out")),
    "convert_weight": (
        convert_weight,
        ("--model", "qwen3", "--input_path", "hf", "--output_path", "out"),
    ),
    "convert_weight --reversed": (
        convert_weight,
        (
            *("--model", "qwen3", "--reversed", "--input_path", "trained"),
            *("--hf_config", "hf", "--output_path", "out"),
        ),
    ),
}


@pytest.fixture(params=COMMANDS)
def command(request) -> str:
    return request.param


@pytest.fixture
def source(tmp_path, monkeypatch, command) -> Given:
    monkeypatch.chdir(tmp_path)
    hf = random_tensors()
    if "trained" in COMMANDS[command][1]:
        write_merged(tmp_path / "trained", fused(hf), files=3)
        write_config(tmp_path / "hf", hf_config())
        files = ("param_name_map.json", "part1.safetensors")
        return Given(Path("trained"), Path("hf"), *files, FC2, DOWN_PROJ, fused(hf))
    write(tmp_path / "hf", hf, hf_config(), shards=3)
    files = ("model.safetensors.index.json", "model-00002-of-00003.safetensors")
    return Given(Path("hf"), Path("hf"), *files, DOWN_PROJ, FC2, hf)


def name_a_file_outside(source: Given) -> None:
    save_file({source.tensor: source.tensors[source.tensor]}, "outside.safetensors")
    source.in_index("../outside.safetensors")


def with_value(value: float) -> Callable[[Given], None]:
    def apply(source: Given) -> None:
        array = source.tensors[source.tensor].copy()
        array[3, 5] = value
        source.rewrite(tensor=array)

    return apply


def only_pickles(name: str) -> Callable[[Given], None]:
    return lambda source: leave_only(source.weights, name, pickle.dumps(Touch()))


def fp8(source: Given) -> None:
    source.rewrite(tensor=source.tensors[source.tensor].astype(ml_dtypes.float8_e4m3fn))


def without_index(source: Given) -> None:
    (source.weights / source.index).unlink()
    (source.weights / source.shard).unlink()


# What is done to the source, and what has to be reported of it: what, found where, what to do.
BAD: dict[str, tuple[Callable[[Given], object], tuple[str, ...]]] = {
    "missing shard": (
        lambda source: (source.weights / source.shard).unlink(),
        ("{weights} is not a whole checkpoint", "{shard}", "missing; {index} assigns", "download or copy the"),
    ),
    "truncated shard": (
        lambda source: cut_off(source.weights / source.shard),
        ("{weights} is not a whole checkpoint", "{shard}", "truncated:", "copy the file again"),
    ),
    "index names a file that is not there": (
        lambda source: source.in_index("absent.safetensors"),
        ("absent.safetensors", "missing; {index} assigns 1 tensors to it", "download or copy the file"),
    ),
    "index names a file outside": (
        name_a_file_outside,
        ("../outside.safetensors", "{index} names a file outside {weights}", "fix the index"),
    ),
    "index names another file": (
        lambda source: source.in_index(source.shard.replace("2", "1") if "2" in source.shard else "part0.safetensors"),
        ("{tensor}", "{index} has it in", "copy index and files again, from one source"),
    ),
    "index is no index": (
        lambda source: (source.weights / source.index).write_text("{"),
        ("{weights}/{index} can't be read, or is not an index of safetensors", "copy it again"),
    ),
    "wrong shape": (
        lambda source: source.rewrite(tensor=np.ones((10, 12), np.float32)),
        ("{tensor}", "shape (10, 12), (12, 10) expected", "config and weights are of two models"),
    ),
    "missing tensor": (
        lambda source: source.rewrite(tensor=None),
        ("{tensor}", "missing", "copy the file that holds it; is the download complete?"),
    ),
    "extra tensor": (
        lambda source: source.rewrite(extra=np.ones(3, np.float32)),
        ("{extra}", "not a tensor of this model", "was it renamed, or is it of another model?"),
    ),
    "NaN": (
        with_value(np.nan),
        (
            "invalid weights: tensors that are all zero or contain NaN or infinity",
            "{target}",
            "NaN or infinity: {tensor}",
            "compare checksums with the",
        ),
    ),
    "infinity": (
        with_value(-np.inf),
        (
            "invalid weights: tensors that are all zero or contain NaN or infinity",
            "{target}",
            "NaN or infinity: {tensor}",
            "compare checksums with the",
        ),
    ),
    "quantization_config": (
        lambda source: source.in_config(quantization_config={"quant_method": "awq", "bits": 4}),
        (
            "{config}/config.json can't be used",
            "quantization_config",
            "quant_method 'awq'",
            "use the unquantised (bf16)",
        ),
    ),
    "FP8": (
        fp8,
        ("{tensor}", "dtype F8_E4M3", "only BF16, F16, F32 are weights; use the unquantised checkpoint"),
    ),
    "unknown architecture": (
        lambda source: source.in_config(model_type="llama", architectures=["LlamaForCausalLM"]),
        ("{config}/config.json can't be used", "architecture", "model_type 'llama'", "Qwen3 and Qwen3-MoE are loaded"),
    ),
    "*.bin": (
        only_pickles("pytorch_model.bin"),
        ("no *.safetensors in {weights}; it holds pytorch_model.bin: only safetensors are read",),
    ),
    "*.ckpt": (
        only_pickles("qwen3.ckpt"),
        ("no *.safetensors in {weights}; it holds qwen3.ckpt: only safetensors are read",),
    ),
    "not there": (
        lambda source: source.weights.rename("elsewhere"),
        ("{weights} {absent}",),
    ),
}


def expected_of(source: Given, template: str) -> str:
    fields = source._asdict() | {"extra": source.tensor.replace(".weight", ".extra.weight")}
    is_hf = source.weights == source.config
    return template.format(**fields, absent="is not a directory" if is_hf else "does not exist")


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(tmp_path, call, command, source, case):
    break_it, expected = BAD[case]
    break_it(source)
    before = everything(tmp_path)
    click_command, arguments = COMMANDS[command]
    result = call(*arguments, command=click_command)
    assert result.code == 2, result.out
    text = unwrapped(result.err)
    for template in expected:
        if command == "convert_weight" and case == "not there":
            template = template.replace("{absent}", "does not exist")
        assert expected_of(source, template) in text, text
    assert everything(tmp_path) == before


def test_the_file_of_a_bad_value_is_named(call, command, source):
    with_value(np.nan)(source)
    (file,) = (f.name for f in source.weights.glob("*.safetensors") if source.tensor in load_file(f))
    click_command, arguments = COMMANDS[command]
    assert f"({file})" in unwrapped(call(*arguments, command=click_command).err)


def test_good_input_is_converted(call, command, source):
    """What the others break."""
    click_command, arguments = COMMANDS[command]
    assert call(*arguments, command=click_command).code == 0
    assert source.target in contents(Path("out"))


def test_an_output_that_is_not_empty(tmp_path, call, command, source):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    before = everything(tmp_path)
    click_command, arguments = COMMANDS[command]
    result = call(*arguments, command=click_command)
    assert (result.code, result.out) == (2, "")
    assert f"{tmp_path / 'out'} is not empty, and nothing is overwritten: choose another output" in result.err
    assert everything(tmp_path) == before


def test_the_source_as_output(tmp_path, call, command, source):
    before = everything(tmp_path)
    click_command, arguments = COMMANDS[command]
    result = call(*arguments[:-1], source.weights, command=click_command)
    assert (result.code, f"{tmp_path / source.weights} is not empty" in result.err) == (2, True)
    assert everything(tmp_path) == before


def test_an_output_that_is_a_file(tmp_path, call, command, source):
    (tmp_path / "out").write_text("mine")
    before = everything(tmp_path)
    click_command, arguments = COMMANDS[command]
    result = call(*arguments, command=click_command)
    assert (result.code, f"{tmp_path / 'out'} already exists and is not a directory" in result.err) == (2, True)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("options", [(), ("--dry_run",)])
def test_no_disk_space(tmp_path, monkeypatch, call, command, source, options):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    before = everything(tmp_path)
    click_command, arguments = COMMANDS[command]
    result = call(*arguments, *options, command=click_command)
    assert result.code == 2
    assert f"are needed for {tmp_path / 'out'}, 1.0 KiB are free: make room, or choose another disk" in result.err
    assert "nothing was written" not in result.out
    assert everything(tmp_path) == before


def test_an_unfinished_checkpoint_is_no_source(tmp_path, call, command, source):
    source.weights.rename("begun.incomplete")
    before = everything(tmp_path)
    click_command, arguments = COMMANDS[command]
    renamed = ["begun.incomplete" if word == str(source.weights) else word for word in arguments]
    result = call(*renamed, command=click_command)
    assert result.code == 2
    assert "begun.incomplete is not finished: give the command that was writing it again" in result.err
    assert everything(tmp_path) == before


def test_a_missing_shard_without_an_index(tmp_path, call, hf_dir):
    (hf_dir / "model.safetensors.index.json").unlink()
    (hf_dir / "model-00002-of-00003.safetensors").unlink()
    result = convert(call, hf_dir)
    assert (result.code, num_rows(result.err)) == (2, 1)
    assert "model-00002-of-00003.safetensors" in unwrapped(result.err)
    assert "missing, by the number in the other files' names" in unwrapped(result.err)
    assert names(tmp_path) == {"hf"}


def test_everything_that_is_wrong_is_reported_at_once(tmp_path, call, trained):
    tensors = fused(random_tensors())
    del tensors[FC2]
    tensors["decoder.layers.1.self_attention.linear_proj.weight"] = np.ones((16, 12), np.float32)
    tensors["stranger"] = np.ones(1, np.float32)
    write_merged(trained, tensors)
    result = export(call, trained)
    assert (result.code, num_rows(result.err)) == (2, 3)
    assert FC2 in unwrapped(result.err)
    assert "stranger" in unwrapped(result.err)
    assert "shape (16, 12), (12, 16) expected" in unwrapped(result.err)
