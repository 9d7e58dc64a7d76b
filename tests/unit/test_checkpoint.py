"""Directories that are whole, and all the ways in which they are not."""

from __future__ import annotations

import json
import os
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from mf_qwen3_bridge.errors import BridgeError
from mf_qwen3_bridge.inputs.opening import open_source, stale_files
from mf_qwen3_bridge.inputs.source import HYPER_PARAMETERS
from mf_qwen3_bridge.transfer import safetensors
from mf_qwen3_bridge.transfer.safetensors import read_header
from tests.support.checkpoints import MOE_SPEC, NUMPY, random_tensors, read, write


@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("shards", [1, 3])
def test_reads_what_the_safetensors_library_wrote(tmp_path: Path, dtype, shards):
    tensors = random_tensors(dtype=dtype)
    checkpoint = open_source(write(tmp_path, tensors, shards=shards))
    assert checkpoint.tensors.keys() == tensors.keys()
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    assert checkpoint.metadata == {"format": "pt"}
    for name, info in checkpoint.tensors.items():
        assert info.shape == tensors[name].shape
        assert read(info).tobytes() == tensors[name].tobytes()


@settings(max_examples=30, deadline=None)
@given(
    shapes=st.dictionaries(st.text(min_size=1, max_size=8), st.lists(st.integers(0, 4), max_size=3), max_size=5),
    dtype=st.sampled_from([np.float32, np.float16, np.int64, np.uint8, np.bool_]),
)
def test_headers_agree_with_the_safetensors_library(tmp_path_factory, shapes, dtype):
    shapes.pop("__metadata__", None)
    file = tmp_path_factory.mktemp("header") / "x.safetensors"
    save_file({name: np.ones(shape, dtype) for name, shape in shapes.items()}, file)
    tensors, _ = read_header(file)
    expected = load_file(file)
    assert {name: info.shape for name, info in tensors.items()} == {n: t.shape for n, t in expected.items()}
    assert all(read(info).tobytes() == expected[name].tobytes() for name, info in tensors.items())


def message(path: Path) -> str:
    with pytest.raises(BridgeError) as error:
        open_source(path)
    rows = (f"{problem.subject} {problem.found} {problem.remedy}" for problem in error.value.problems)
    return "\n".join([error.value.headline, *rows])


def test_a_missing_shard(tmp_path: Path):
    write(tmp_path, random_tensors(), shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors" in message(tmp_path)
    assert "missing" in message(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 7, 8, 100, -1])
def test_a_truncated_shard(tmp_path: Path, keep):
    write(tmp_path, random_tensors(), shards=3)
    shard = tmp_path / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    assert "model-00002-of-00003.safetensors" in message(tmp_path)
    assert "copy" in message(tmp_path)


def test_a_file_that_grew(tmp_path: Path):
    write(tmp_path, random_tensors())
    with (tmp_path / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    assert "longer" in message(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[]",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [1]}}',
        b'{"a": {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0.0, 8.0]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "__metadata__": [1]}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "__metadata__": {"x": [1]}}',
    ],
)
def test_a_damaged_header(tmp_path: Path, header):
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)
    assert "model.safetensors" in message(file)


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def write_header(file: Path, header: dict | bytes, data: bytes = b"\0" * 8) -> Path:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    return file


def test_metadata_that_is_null_is_none_at_all(tmp_path: Path):
    """As the safetensors library reads it."""
    tensors, metadata = read_header(write_header(tmp_path / "x.safetensors", {"a": F32, "__metadata__": None}))
    assert (list(tensors), metadata) == (["a"], {})


@pytest.mark.parametrize(
    ("dtype", "shape", "nbytes"),
    [("F4", [3, 2], 3), ("F6_E2M3", [4], 3), ("F6_E3M2", [8], 6), ("F8_E8M0", [5], 5), ("C64", [2], 16)],
)
def test_dtypes_that_numpy_has_no_name_for(tmp_path: Path, dtype, shape, nbytes):
    """They are read by inspect and refused, by name, as weights; what is stored behind them is found all the same."""
    header = {
        "a": {"dtype": dtype, "shape": shape, "data_offsets": [0, nbytes]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [nbytes, nbytes + 8]},
    }
    data = b"\0" * nbytes + np.array([1, 2], np.float32).tobytes()
    tensors, _ = read_header(write_header(tmp_path / "x.safetensors", header, data))
    assert (tensors["a"].dtype, tensors["a"].shape, tensors["a"].nbytes) == (dtype, tuple(shape), nbytes)
    assert read(tensors["b"]).tolist() == [1, 2]


def test_a_dtype_that_only_a_later_library_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(safetensors._BITS, "F32")
    assert "a has dtype F32: its size is not known" in message(write_header(tmp_path / "x.safetensors", {"a": F32}))


@pytest.mark.parametrize(
    ("header", "found"),
    [
        ({"a": F32 | {"dtype": "I4"}}, "unknown variant `I4`"),
        ({"a": F32 | {"dtype": None}}, "invalid type: null"),
        ({"a": F32 | {"dtype": 4}}, "invalid type: integer `4`"),
        ({"a": F32 | {"shape": [3]}}, "a is F32 (3,) by its header, but has 8 bytes"),
        ({"a": F32, "b": F32}, "b does not begin where the tensor before it ends"),
        ({"a": F32 | {"shape": [4], "data_offsets": [0, 16]}}, "truncated: 78 bytes, 86 expected"),
        ({"a": F32 | {"shape": [1], "data_offsets": [0, 4]}}, "longer than its header declares: 77 bytes, 73 expected"),
        ({"a": F32 | {"shape": [2**62, 2**62]}}, "overflow"),
        (b'{"a": ' * 9999, "recursion limit"),
        (b"not json", "invalid JSON"),
    ],
)
def test_what_is_wrong_with_a_header_is_told(tmp_path: Path, header, found):
    text = message(write_header(tmp_path / "x.safetensors", header))
    assert "x.safetensors" in text and "copy the file again" in text
    assert found in text


def test_what_is_no_regular_file_keeps_nobody_waiting(tmp_path: Path):
    os.mkfifo(tmp_path / "model.safetensors")
    assert "no regular file" in message(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").mkdir()
    assert "no regular file" in message(tmp_path)
    (tmp_path / "model.safetensors").rmdir()
    (tmp_path / "model.safetensors").symlink_to("nowhere")
    assert "can't be read: No such file" in message(tmp_path)


def test_a_git_lfs_pointer(tmp_path: Path):
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "git lfs pull" in message(tmp_path)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors"])
def test_an_index_that_leaves_the_directory(tmp_path: Path, name):
    write(tmp_path, random_tensors(), shards=2)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(content))
    assert "outside" in message(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"weight_map": {"a": 1}}', '{"weight_map": []}'])
def test_an_index_that_is_none(tmp_path: Path, content):
    write(tmp_path, random_tensors(), shards=2)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    assert "not an index" in message(tmp_path)


def test_an_index_of_other_files(tmp_path: Path):
    tensors = random_tensors()
    write(tmp_path, tensors, shards=2)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["model.norm.weight"]
    content["weight_map"]["absent.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    assert "model.norm.weight" in message(tmp_path)
    assert "absent.weight" in message(tmp_path)


def test_an_index_of_another_sharding(tmp_path: Path):
    """Of a large MoE it was a row for each of thousands of tensors; a run of layers or experts is one."""
    spec = replace(MOE_SPEC, num_layers=12, num_experts=32)
    tensors = random_tensors(spec)
    write(tmp_path / "other", tensors, shards=3)
    write(tmp_path, dict(reversed(tensors.items())), shards=3)
    (tmp_path / "other" / "model.safetensors.index.json").rename(tmp_path / "model.safetensors.index.json")
    with pytest.raises(BridgeError) as error:
        open_source(tmp_path)
    problems = error.value.problems
    assert len(problems) < len(tensors) / 6
    (row,) = (p for p in problems if p.subject == "lm_head.weight")
    index = "model.safetensors.index.json has it in "
    assert row.found == f"{index}model-00003-of-00003.safetensors; it is in model-00001-of-00003.safetensors"


def test_a_tensor_in_two_files(tmp_path: Path):
    tensors = random_tensors()
    write(tmp_path, tensors)
    save_file({"model.norm.weight": tensors["model.norm.weight"]}, tmp_path / "stale.safetensors")
    assert "stale.safetensors" in message(tmp_path)
    with pytest.raises(BridgeError, match="stale"):
        open_source([tmp_path / "model.safetensors", tmp_path / "stale.safetensors"])


def test_all_tensors_in_two_files(tmp_path: Path):
    tensors = random_tensors(MOE_SPEC)
    write(tmp_path, tensors)
    save_file(tensors, tmp_path / "stale.safetensors")
    with pytest.raises(BridgeError) as error:
        open_source(tmp_path)
    names = [problem.subject for problem in error.value.problems]
    assert len(names) == 15 and "model.layers.{0..1}.mlp.experts.{0..3}.up_proj.weight" in names


def test_a_missing_shard_without_an_index(tmp_path: Path):
    write(tmp_path, random_tensors(), shards=3)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert len(open_source(tmp_path).tensors) == 25
    (tmp_path / "model-00003-of-00003.safetensors").unlink()
    assert "model-00003-of-00003.safetensors missing" in message(tmp_path)


def test_a_name_that_promises_billions_of_shards_keeps_nobody_waiting(tmp_path: Path):
    tensors = random_tensors()
    save_file(tensors, tmp_path / "model-0000000001-of-9999999999.safetensors")
    assert open_source(tmp_path).tensors.keys() == tensors.keys()


def test_a_stale_file_beside_an_index_is_not_read(tmp_path: Path):
    tensors = random_tensors()
    write(tmp_path, tensors, shards=2)
    save_file({"model.norm.weight": np.zeros(12, np.float32)}, tmp_path / "consolidated.safetensors")
    checkpoint = open_source(tmp_path)
    assert read(checkpoint.tensors["model.norm.weight"]).tobytes() == tensors["model.norm.weight"].tobytes()
    assert [file.name for file in stale_files(checkpoint)] == ["consolidated.safetensors"]


def test_two_checkpoints_in_one_directory(tmp_path: Path):
    """transformers would take model.safetensors, others the index."""
    write(tmp_path, random_tensors(), shards=2)
    save_file(random_tensors(seed=1), tmp_path / "model.safetensors")
    assert "two checkpoints" in message(tmp_path)


def test_hyper_parameters_are_no_weights(tmp_path: Path):
    write(tmp_path, random_tensors())
    save_file({"global_step": np.zeros(1, np.int32)}, tmp_path / HYPER_PARAMETERS)
    assert "global_step" not in open_source(tmp_path).tensors


@pytest.mark.parametrize("weight_map", [lambda m: m, lambda m: {"metadata": {}, "weight_map": m}])
def test_mindformers_index(tmp_path: Path, weight_map):
    tensors = random_tensors()
    save_file(tensors, tmp_path / "part0.safetensors")
    save_file({"model.norm.weight": np.zeros(1, np.float32)}, tmp_path / "left-behind.safetensors")
    index = weight_map(dict.fromkeys(tensors, "part0.safetensors"))
    (tmp_path / "param_name_map.json").write_text(json.dumps(index))
    assert open_source(tmp_path).tensors.keys() == tensors.keys()


def test_pickles_are_not_read(tmp_path: Path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert "only safetensors are read" in message(tmp_path)
    assert "does not exist" in message(tmp_path / "absent")


def test_the_directory_that_is_meant(tmp_path: Path):
    snapshots = tmp_path / "models--Qwen--Qwen3-8B" / "snapshots"
    write(snapshots / "one", random_tensors())
    assert f"give {snapshots / 'one'}" in message(snapshots.parent)
    assert f"give {snapshots / 'one'}" in message(snapshots)
    write(snapshots / "two", random_tensors())
    assert "no *.safetensors" in message(snapshots.parent) and "give" not in message(snapshots.parent)
    (snapshots.parent / "refs").mkdir()
    for revision, meant in (("two", True), ("three", False), ("../snapshots/two", False), ("\0", False), ("", False)):
        (snapshots.parent / "refs" / "main").write_text(revision)
        assert (f"give {snapshots / 'two'}" in message(snapshots.parent)) == meant


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path):
    info = open_source(write(tmp_path, random_tensors())).tensors["model.norm.weight"]
    info.file.write_bytes(info.file.read_bytes()[: info.start + 4])
    with pytest.raises(BridgeError, match=r"ended while model\.norm\.weight was read"):
        read(info)
    info.file.unlink()
    with pytest.raises(BridgeError, match=r"can't read model\.norm\.weight"):
        read(info)
