"""``mf-qwen3 verify --logits`` and ``verify_network``: MindFormers' network and the reference, layer by layer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from click.testing import CliRunner

import mf_qwen3_bridge
from mf_qwen3_bridge.cli.main import cli
from mf_qwen3_bridge.convert.jobs import to_mindformers
from mf_qwen3_bridge.convert.run import run
from mf_qwen3_bridge.errors import BridgeError
from mf_qwen3_bridge.inputs.preflight import CheckedCheckpoint, check
from mf_qwen3_bridge.mindformers.load import load_network
from mf_qwen3_bridge.mindformers.network import build_inference_network
from mf_qwen3_bridge.mindformers.verify_network import measure_checkpoint, wrong_parameters
from mf_qwen3_bridge.model.layouts import TRAINING_DEFAULT, Layout
from mf_qwen3_bridge.model.rules import HF, INFER, TRAIN, Dialect
from mf_qwen3_bridge.transfer.plan import Plan
from mf_qwen3_bridge.verify.layer_errors import tokens_for
from mf_qwen3_bridge.verify.reference import ATTENTION, FC1, LOGITS, MLP, PROJ, QKV, ROUTER, Stage
from tests.support.checkpoints import write
from tests.support.golden import CHECKPOINTS, NAMES, TOLERANCE
from tests.support.mutations import MOE_MUTATIONS, MUTATIONS
from tests.support.networks import SMALL_CACHE, changed


@pytest.mark.parametrize("name", NAMES)
def test_every_stage_of_every_model_agrees(name: str):
    model = check(CHECKPOINTS / name)
    found = measure_checkpoint(model, model)
    assert max(found.errors.values()) < TOLERANCE
    assert found.num_layers == model.spec.num_layers
    assert (ROUTER in found.stages, FC1 in found.stages) == (model.spec.is_moe, not model.spec.is_moe)


@pytest.mark.parametrize("dialect", [TRAIN, INFER, Dialect(Layout(False, False))], ids=str)
def test_mindformers_weights(tmp_path: Path, dialect: Dialect):
    hf = CHECKPOINTS / "moe_bf16"
    run(to_mindformers(check(hf), dialect, tmp_path / "mf"))
    model, right = check(hf, None, tmp_path / "mf"), check(hf)
    found = measure_checkpoint(model.first_layers(2), right.first_layers(2))
    assert max(found.errors.values()) < TOLERANCE and found.num_layers == 2


# Where each mutation of layer 1 is first seen, and what its parameter looks like.
BEGIN = {
    "k and v swapped": QKV,
    "QKV interleaved": QKV,
    "wrong group count": QKV,
    "one row off in QKV": QKV,
    "one norm left at one": ATTENTION,
    "one tensor zeroed": PROJ,
    "gate and up swapped": FC1,
    "gate/up interleaved": FC1,
    "one row off": MLP,
    "one row zeroed": MLP,
}
APPEARANCE = {
    "QKV interleaved": "in the training layout: interleaved",
    "gate/up interleaved": "in the training layout: interleaved",
    "one tensor zeroed": "all zero: never loaded",
}


@pytest.mark.parametrize("mutation", BEGIN)
def test_where_a_mutation_begins(network_of: Callable[[str], Any], mutation: str):
    directory = CHECKPOINTS / "untied_fp32"
    network, spec = network_of("untied_fp32"), check(directory).spec
    assert mf_qwen3_bridge.verify_network(network, directory).errors[LOGITS] < TOLERANCE
    name, change = MUTATIONS[mutation]
    with changed(network, name, lambda weight: change(weight, spec)), pytest.raises(BridgeError) as error:
        mf_qwen3_bridge.verify_network(network, directory)
    assert f"begins at {Stage(1, BEGIN[mutation])}," in str(error.value)
    assert [problem.subject for problem in error.value.problems] == [name]
    assert error.value.problems[0].found == APPEARANCE.get(mutation, "other values")


@pytest.mark.parametrize("mutation", MOE_MUTATIONS)
def test_where_a_mutation_of_experts_begins(network_of: Callable[[str], Any], mutation: str):
    directory = CHECKPOINTS / "moe_square"
    network, spec = network_of("moe_square"), check(directory).spec
    assert mf_qwen3_bridge.verify_network(network, directory).errors[LOGITS] < TOLERANCE
    name, change = MOE_MUTATIONS[mutation]
    with changed(network, name, lambda weight: change(weight, spec)), pytest.raises(BridgeError) as error:
        mf_qwen3_bridge.verify_network(network, directory)
    stage = ROUTER if "router" in mutation else MLP
    assert f"begins at {Stage(1, stage)}," in str(error.value)
    assert [problem.subject for problem in error.value.problems] == [name]


@pytest.mark.parametrize("name", ["untied_fp32", "tied_bf16", "moe_fp32"])
def test_the_obvious_fix_is_named(name: str):
    """Converted as the training network wants it, then loaded: every shape fits, and the text is garbage."""
    network, model = mf_qwen3_bridge.from_pretrained(CHECKPOINTS / name), check(CHECKPOINTS / name)
    parameters = network.parameters_dict()
    for target in model.plan(Dialect(TRAINING_DEFAULT, stacked_experts=True)).targets:
        parameters[target.name].set_data(ms.Tensor(target.make().astype(np.float32)))
    with pytest.raises(BridgeError, match=r"begins at layers\.0\.self_attention\.linear_qkv") as error:
        mf_qwen3_bridge.verify_network(network, CHECKPOINTS / name)
    fused = ["self_attention.linear_qkv"] if model.spec.is_moe else ["self_attention.linear_qkv", "mlp.linear_fc1"]
    layers = f"{{0..{model.spec.num_layers - 1}}}"
    assert {(problem.subject, problem.found) for problem in error.value.problems} == {
        (f"decoder.layers.{layers}.{part}.weight", "in the training layout: interleaved") for part in fused
    }


def test_blocks_of_ranks_are_named():
    network, model = mf_qwen3_bridge.from_pretrained(CHECKPOINTS / "mha"), check(CHECKPOINTS / "mha")
    layout = Layout(interleaved_qkv=False, interleaved_gate_up=False, tensor_parallel=2)
    parameters = network.parameters_dict()
    for target in model.plan(Dialect(layout)).targets:
        parameters[target.name].set_data(ms.Tensor(target.make().astype(np.float32)))
    with pytest.raises(BridgeError) as error:
        mf_qwen3_bridge.verify_network(network, CHECKPOINTS / "mha")
    assert {problem.found for problem in error.value.problems} == {
        "in the training layout: contiguous in the blocks of 2 tensor parallel ranks"
    }


@pytest.mark.parametrize("other", ["moe_fp32", "mha", "tied_bf16"])
def test_a_network_of_another_model(network_of: Callable[[str], Any], other: str):
    with pytest.raises(BridgeError, match=r"don't fit|are of two models"):
        mf_qwen3_bridge.verify_network(network_of("untied_fp32"), CHECKPOINTS / other)


def test_a_network_that_turns_otherwise():
    """By so little that few tokens don't show it."""
    model = check(CHECKPOINTS / "untied_fp32")
    config = model.hf_config | SMALL_CACHE | {"rope_theta": model.hf_config["rope_theta"] * 1.0001}
    network = build_inference_network(config, device_target="CPU")
    load_network(network, model)
    with pytest.raises(BridgeError, match="rope_theta"):
        mf_qwen3_bridge.verify_network(network, CHECKPOINTS / "untied_fp32")


def test_what_few_tokens_do_not_reach():
    """Rows of the embedding, in the order of other tokens."""
    network = mf_qwen3_bridge.from_pretrained(CHECKPOINTS / "untied_fp32")
    parameter = network.parameters_dict()["embedding.word_embeddings.weight"]
    rows = parameter.asnumpy().copy()
    used = set(tokens_for(check(CHECKPOINTS / "untied_fp32")))
    unused = [row for row in range(len(rows)) if row not in used]
    rows[unused] = rows[unused[::-1]]
    parameter.set_data(ms.Tensor(rows))
    with pytest.raises(BridgeError, match="errors up to") as error:
        mf_qwen3_bridge.verify_network(network, CHECKPOINTS / "untied_fp32")
    assert [problem.subject for problem in error.value.problems] == ["embedding.word_embeddings.weight"]


def test_other_layouts_are_not_planned_to_find_what_a_wrong_parameter_looks_like(monkeypatch: pytest.MonkeyPatch):
    """A plan for each takes seconds for a large model; some rows of the parameter tell."""
    planned: list[Dialect] = []
    plan = CheckedCheckpoint.plan

    def counting(self: CheckedCheckpoint, dialect: Dialect, *args: object, **kwargs: object) -> Plan:
        planned.append(dialect)
        return plan(self, dialect, *args, **kwargs)

    monkeypatch.setattr(CheckedCheckpoint, "plan", counting)
    network = mf_qwen3_bridge.from_pretrained(CHECKPOINTS / "mha")
    planned.clear()
    assert list(wrong_parameters(network, check(CHECKPOINTS / "mha"))) == []
    assert planned == [INFER]
    parameter = network.parameters_dict()["decoder.layers.1.self_attention.linear_proj.weight"]
    parameter.set_data(ms.Tensor(parameter.asnumpy()[::-1].copy()))
    assert [problem.found for problem in wrong_parameters(network, check(CHECKPOINTS / "mha"))] == ["other values"]
    assert set(planned) == {INFER}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_network_that_rounds_is_right(dtype: str):
    options = {"params_dtype": dtype, "compute_dtype": dtype, "rotary_dtype": dtype}
    network = mf_qwen3_bridge.from_pretrained(CHECKPOINTS / "tied_bf16", **options)
    found = mf_qwen3_bridge.verify_network(network, CHECKPOINTS / "tied_bf16")
    assert 1e-4 < max(found.errors.values()) < found.tolerance < 0.1


def test_the_command(tmp_path: Path):
    picture = tmp_path / "picture.png"
    command = ["verify", str(CHECKPOINTS / "untied_fp32"), "--logits", "--layers", "1", "--picture", str(picture)]
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == 0, result.output
    assert "layers      1 of 2, in MindFormers' InferenceQwen3ForCausalLM on the CPU" in result.output
    assert "errors up to" in result.output
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_command_names_a_wrong_layout(tmp_path: Path):
    """Contiguous weights without layout metadata are assumed to have MindFormers' default layout."""
    hf = CHECKPOINTS / "untied_fp32"
    tensors = {target.name: target.make() for target in check(hf).plan(Dialect(Layout(False, False))).targets}
    contiguous = write(tmp_path / "contiguous", tensors)
    picture = str(tmp_path / "p.png")
    result = CliRunner().invoke(cli, ["verify", str(contiguous), str(hf), "--logits", "--picture", picture])
    assert isinstance(result.exception, BridgeError)
    assert "begins at layers.0.self_attention.linear_qkv" in str(result.exception)
    assert "the first is laid out contiguous, not interleaved" in str(result.exception)
    assert " !" in result.output


def error_of(*arguments: object) -> str:
    """The error of a command."""
    result = CliRunner().invoke(cli, ["verify", *map(str, arguments), "--logits"])
    assert isinstance(result.exception, BridgeError), result.output
    return str(result.exception)


@pytest.mark.parametrize("layout", [Layout(True, True), Layout(False, False)], ids=str)
def test_weights_of_unknown_layout_need_something_to_be_held_against(tmp_path: Path, layout: Layout):
    """Taken for what they are not, and held against themselves, they would look right."""
    hf = CHECKPOINTS / "untied_fp32"
    tensors = {target.name: target.make() for target in check(hf).plan(Dialect(layout)).targets}
    assert "verify A B --logits" in error_of(write(tmp_path / "mf", tensors), "--hf_config", hf)


def test_each_has_its_own_config(tmp_path: Path):
    hf = CHECKPOINTS / "untied_fp32"
    other = tmp_path / "other"
    shutil.copytree(hf, other)
    config = json.loads((hf / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rope_theta": 2 * config["rope_theta"]}))
    for pair in ((hf, other), (other, hf)):
        assert "rope_theta" in error_of(*pair)


def test_other_weights_that_few_tokens_do_not_reach(tmp_path: Path):
    hf = CHECKPOINTS / "untied_fp32"
    used = set(tokens_for(check(hf)))
    tensors = {target.name: target.make() for target in check(hf).plan(HF).targets}
    unused = [row for row in range(check(hf).spec.vocab_size) if row not in used]
    embedding = tensors["model.embed_tokens.weight"].copy()
    embedding[unused] = embedding[unused[::-1]]
    tensors["model.embed_tokens.weight"] = embedding
    other = write(tmp_path / "other", tensors, json.loads((hf / "config.json").read_text()))
    assert "from other weights" in error_of(other, hf, "--picture", tmp_path / "p.png")


def test_what_the_command_needs(tmp_path: Path):
    run(to_mindformers(check(CHECKPOINTS / "untied_fp32"), TRAIN, tmp_path / "mf"))
    assert "--hf_config" in error_of(tmp_path / "mf")
    assert "num_key_value_heads" in error_of(CHECKPOINTS / "untied_fp32", CHECKPOINTS / "mha")
    assert "--picture" in error_of(CHECKPOINTS / "untied_fp32", "--picture", tmp_path / "nowhere" / "p.png")
