"""``mf-qwen3 inspect``, ``truncate`` and ``doctor``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from mf_qwen3_bridge.cli import doctor
from mf_qwen3_bridge.cli.main import cli
from mf_qwen3_bridge.convert.jobs import to_mindformers, to_ranks, truncate
from mf_qwen3_bridge.convert.run import run
from mf_qwen3_bridge.errors import BridgeError
from mf_qwen3_bridge.inputs.inspection import inspect, lines
from mf_qwen3_bridge.inputs.opening import open_source
from mf_qwen3_bridge.inputs.preflight import check
from mf_qwen3_bridge.model.layouts import Layout
from mf_qwen3_bridge.model.parallel import ParallelConfig
from mf_qwen3_bridge.model.released import RELEASED
from mf_qwen3_bridge.model.rules import INFER, TRAIN, Dialect
from tests.support.checkpoints import MOE_SPEC, SPEC, hf_config, random_tensors, read, write, write_headers


def output_of(*arguments: object) -> str:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("name", RELEASED)
def test_released_sizes_are_known_by_their_shapes(tmp_path: Path, name: str):
    found = inspect(write_headers(tmp_path / "hf", RELEASED[name], hf_config(RELEASED[name]), shards=4))
    assert (found.names, found.model, found.layout) == ("Hugging Face", name, None)
    assert found.tied == RELEASED[name].tie_word_embeddings
    assert found.unusual == ()


def test_parameters_of_qwen3_14b(tmp_path: Path):
    spec = RELEASED["Qwen3-14B"]
    found = inspect(write_headers(tmp_path / "hf", spec, hf_config(spec), shards=8))
    assert found.parameters == 14_768_307_200
    assert found.nbytes == 2 * found.parameters
    assert "14,768,307,200" in "\n".join(lines(found))


@pytest.mark.parametrize("target", [TRAIN, INFER, Dialect(Layout(True, False))], ids=str)
def test_mindformers_files_declare_their_layout(tmp_path: Path, target: Dialect):
    model = check(write(tmp_path / "hf", random_tensors(), hf_config()))
    run(to_mindformers(model, target, tmp_path / "mindformers"))
    found = inspect(tmp_path / "mindformers")
    assert (found.names, found.layout) == ("MindFormers", str(target.layout))
    assert found.numbers == SPEC.numbers
    assert all(row.parameter == row.name for row in found.tensors)


def test_files_without_layout_metadata(tmp_path: Path):
    state = {"adam_m.decoder.final_layernorm.weight": np.ones(SPEC.hidden_size, np.float32), "epoch_num": np.ones(1)}
    found = inspect(write(tmp_path, random_tensors(dialect=TRAIN) | state))
    assert found.layout is None
    assert set(found.state) == set(state)
    text = "\n".join(lines(found))
    assert "not declared in the files" in text
    assert "of a training run: adam_m" in text


def test_a_directory_for_each_rank(tmp_path: Path):
    model = check(write(tmp_path / "hf", random_tensors(MOE_SPEC), hf_config(MOE_SPEC)))
    run(to_ranks(model, TRAIN, tmp_path / "ranks", ParallelConfig(2, 2)))
    found = inspect(tmp_path / "ranks")
    assert (found.ranks, found.model, found.layout) == (2, "Qwen3-MoE", str(TRAIN.layout))
    assert found.files == 2
    assert "2 files of 2 ranks" in "\n".join(lines(found))
    for rank in (tmp_path / "ranks").iterdir():
        (file,) = rank.glob("*.safetensors")
        (norm,) = (row for row in found.tensors if row.name == "decoder.final_layernorm.weight")
        write(rank, {f"adam_m.{norm.name}": np.ones(norm.shape, np.float32), "global_step": np.ones(1, np.float32)})
        assert (rank / "model.safetensors").exists() and file.exists()
    with_state = inspect(tmp_path / "ranks")
    assert with_state.parameters == found.parameters
    assert [name.partition(" (")[0] for name in with_state.state] == sorted([f"adam_m.{norm.name}", "global_step"] * 2)


def test_what_is_unusual_is_told(tmp_path: Path):
    tensors = random_tensors()
    del tensors["model.layers.1.mlp.up_proj.weight"]
    directory = write(tmp_path, tensors, hf_config() | {"num_hidden_layers": 5, "attention_bias": True})
    text = "\n".join(inspect(directory).unusual)
    assert "model.layers.1.mlp.up_proj.weight" in text
    assert "attention_bias" in text
    (directory / "config.json").write_text(json.dumps(hf_config() | {"num_hidden_layers": 5}))
    assert f"num_layers: config.json 5, tensors {SPEC.num_layers}" in inspect(directory).unusual
    with pytest.raises(BridgeError):
        inspect(tmp_path / "nowhere")


def test_the_command(tmp_path: Path):
    directory = write(tmp_path, random_tensors(MOE_SPEC), hf_config(MOE_SPEC))
    found = inspect(directory)
    assert output_of("inspect", directory) == "\n".join(lines(found)) + "\n"
    document = json.loads(output_of("inspect", directory, "--json"))
    assert document["numbers"] == found.numbers
    assert len(document["tensors"]) == len(found.tensors)
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    assert name in output_of("inspect", directory, "--tensors")
    (row,) = (line for line in output_of("inspect", directory, "--rules").splitlines() if line.startswith(name))
    assert row.endswith("\tdecoder.layers.0.mlp.experts.weight1")


def test_an_attn_factor_that_only_vllm_uses_is_told(tmp_path: Path):
    """As in DeepSeek-R1-0528-Qwen3-8B: 1.1386 * 0.8782 is 1."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    told = "attn_factor 0.8782488562869419 is not used: MindFormers and transformers compute 1.1386; vLLM multiplies"
    for attn_factor, is_told in ((0.8782488562869419, True), (1, False), (None, False)):
        config = hf_config() | {"rope_scaling": yarn | {"attn_factor": attn_factor}}
        directory = write(tmp_path / "hf", random_tensors(), config)
        assert (told in output_of("inspect", directory)) == is_told
        assert (told in output_of("check", "--model_dir", directory)) == is_told
        parameters = hf_config() | {"rope_parameters": config["rope_scaling"] | {"rope_theta": 1e6}}
        del parameters["rope_scaling"]
        assert (told in "\n".join(check(write(directory, random_tensors(), parameters)).notes)) == is_told
    override = {"rope_scaling": yarn | {"attn_factor": 0.5}}
    assert "attn_factor 0.5 " in check(directory, overrides=override).notes[0]


# ------------------------------------------------------------------------------------------------------------ truncate


TIED = replace(SPEC, tie_word_embeddings=True)


@pytest.mark.parametrize("spec", [SPEC, MOE_SPEC, TIED], ids=["dense", "moe", "tied"])
def test_the_first_layers_byte_for_byte(tmp_path: Path, spec):
    config = hf_config(spec) | {"layer_types": ["full_attention"] * spec.num_layers, "unknown": 1}
    source = write(tmp_path / "hf", random_tensors(spec), config)
    output_of("truncate", source, "--layers", 1, "--output_dir", tmp_path / "small")
    before, after = (open_source(path).tensors for path in (source, tmp_path / "small"))
    assert set(after) == {name for name in before if "layers." not in name or "layers.0." in name}
    assert all(read(after[name]).tobytes() == read(before[name]).tobytes() for name in after)
    model = check(tmp_path / "small")
    assert model.spec == replace(spec, num_layers=1)
    written = json.loads((tmp_path / "small" / "config.json").read_text())
    assert written == config | {"num_hidden_layers": 1, "layer_types": ["full_attention"]}


def test_a_tied_output_layer_that_is_stored_stays(tmp_path: Path):
    tensors = random_tensors(TIED)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    run(truncate(check(write(tmp_path / "hf", tensors, hf_config(TIED))), 1, tmp_path / "small"))
    assert "lm_head.weight" in open_source(tmp_path / "small").tensors


def test_more_layers_than_there_are(tmp_path: Path):
    model = check(write(tmp_path / "hf", random_tensors(), hf_config()))
    with pytest.raises(BridgeError, match=f"has {SPEC.num_layers} layers"):
        truncate(model, SPEC.num_layers + 1, tmp_path / "small")


# -------------------------------------------------------------------------------------------------------------- doctor


def test_doctor(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RUN_MODE", "predict")
    monkeypatch.delenv("MS_SIMULATION_LEVEL", raising=False)
    found = {finding.subject: finding for finding in doctor.examine()}
    assert found["mf-qwen3-bridge"].advice == "" and found["RUN_MODE"].found == "predict"
    assert "MS_SIMULATION_LEVEL" not in found
    assert "RUN_MODE" in output_of("doctor")


@pytest.mark.parametrize(
    ("versions", "subject", "advice"),
    [
        ({}, "mindformers", "pip install"),
        ({"mindformers": "1.6.0", "mindspore": "2.6.0"}, "mindformers", "tested with 1.7.0"),
        ({"mindformers": "1.9.0", "mindspore": "2.7.2"}, "mindspore", "pins 2.9.0"),
        ({"mindformers": "1.9.0"}, "mindspore", "needs it: 2.9.0"),
        ({"mindformers": "1.9.0", "mindspore": "2.9.0", "transformers": "4.57.1"}, "mindspore", ""),
        ({"mindformers": "2.1.0", "mindspore": "2.10.0", "transformers": "5.24.0"}, "mindspore", ""),
        ({"mindformers": "2.1.0", "mindspore": "2.11.1", "transformers": "5.3.0"}, "mindspore", ""),
        ({"mindformers": "2.1.0", "mindspore": "2.1.0", "transformers": "5.3.0"}, "mindspore", "pins 2.11"),
        ({"mindformers": "2.1.0", "mindspore": "2.11.0", "transformers": "4.57.1"}, "transformers", "pins 5"),
    ],
)
def test_versions(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], subject: str, advice: str):
    monkeypatch.setattr(doctor, "_installed", versions.get)
    found = {finding.subject: finding for finding in doctor.examine()}
    assert advice in found[subject].advice
    assert bool(advice) == bool(found[subject].advice)


def test_an_npu_without_cann(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor.Path, "glob", lambda self, pattern: iter([Path("/dev/davinci0"), Path("/dev/davinci1")]))
    monkeypatch.delenv("ASCEND_TOOLKIT_HOME", raising=False)
    monkeypatch.delenv("ASCEND_HOME_PATH", raising=False)
    found = {finding.subject: finding for finding in doctor.examine()}
    assert found["NPU"].found == "2 (davinci0, davinci1)"
    assert "set_env.sh" in found["CANN"].advice


@pytest.mark.parametrize(("toolkit", "advice"), [("", "on an NPU server"), ("/usr/local/Ascend", "CANN is there")])
def test_a_machine_without_npus(monkeypatch: pytest.MonkeyPatch, toolkit: str, advice: str):
    """As in a container that was not given them, where everything would run on the CPU."""
    monkeypatch.setattr(doctor.Path, "glob", lambda self, pattern: iter([]))
    monkeypatch.setenv("ASCEND_TOOLKIT_HOME", toolkit)
    monkeypatch.delenv("ASCEND_HOME_PATH", raising=False)
    found = {finding.subject: finding for finding in doctor.examine()}
    assert found["NPU"].advice.startswith(advice)
