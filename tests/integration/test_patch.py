"""The hooks on MindFormers' classes: called as MindFormers calls them, and removed without a trace."""

from __future__ import annotations

import json
import multiprocessing
import re
from fnmatch import fnmatch
from pathlib import Path

import mindformers
import mindspore as ms
import numpy as np
import pytest
from mindformers.models.qwen3.modeling_qwen3_infer import InferenceQwen3ForCausalLM
from mindformers.models.qwen3.modeling_qwen3_train import TrainingQwen3ForCausalLM
from mindformers.parallel_core.inference.model_utils import InferModelMixin
from mindformers.parallel_core.utils.model_mixin import ModelMixin
from mindformers.trainer.base_trainer import BaseTrainer
from mindformers.utils import load_checkpoint_utils
from mindformers.utils.safetensors import convert_safetensors
from safetensors.numpy import load_file

import mf_qwen3_bridge
from mf_qwen3_bridge.errors import BridgeError
from mf_qwen3_bridge.inputs.preflight import check
from mf_qwen3_bridge.mindformers import conversion
from mf_qwen3_bridge.mindformers.cpu import inference_ops, training_ops
from mf_qwen3_bridge.mindformers.patching import patch
from mf_qwen3_bridge.mindformers.replacements import HOOKS, Replacements
from mf_qwen3_bridge.model.rules import INFER, TRAIN
from tests.support.checkpoints import hf_config, random_tensors, write
from tests.support.golden import CHECKPOINTS, NAMES
from tests.support.networks import bits, empty_network


def expected(directory: Path, dialect) -> dict[str, bytes]:
    return {target.name: target.make().tobytes() for target in check(directory).plan(dialect).targets}


def test_patching_is_idempotent_reversible_and_touches_nothing_else():
    mf_qwen3_bridge.unpatch()
    bases = [*InferenceQwen3ForCausalLM.__mro__, *TrainingQwen3ForCausalLM.__mro__]
    owners = list(dict.fromkeys([declared.owner for declared in HOOKS.declarations] + bases))
    before = [dict(vars(owner)) for owner in owners]
    mf_qwen3_bridge.patch()
    installed = dict(HOOKS.installed)
    mf_qwen3_bridge.patch()
    for owner, was in zip(owners, before):
        replaced = {name: value for (mine, name), value in installed.items() if mine is owner}
        assert dict(vars(owner)) == was | replaced
        assert all(was.get(name) is not value for name, value in replaced.items())
    is_optional = {(declared.owner, declared.name) for declared in HOOKS.declarations if declared.optional}
    declared = {(declared.owner, declared.name) for declared in HOOKS.declarations}
    assert declared - is_optional <= installed.keys() <= declared
    mf_qwen3_bridge.unpatch()
    mf_qwen3_bridge.unpatch()
    assert [dict(vars(owner)) for owner in owners] == before
    with pytest.raises(RuntimeError, match="does not implemented convert_weight_dict"):
        InferenceQwen3ForCausalLM.convert_weight_dict({})


@pytest.mark.parametrize("replacements", [HOOKS, inference_ops.STAND_INS, training_ops.STAND_INS])
def test_nothing_is_replaced_twice(replacements: Replacements):
    paths = [declared.path for declared in replacements.declarations]
    assert len(set(paths)) == len(paths)


def test_the_table_lists_what_is_replaced():
    rows = re.findall(r"^``(\S+?)``", str(patch.__doc__), re.MULTILINE)
    paths = [declared.path for declared in HOOKS.declarations]
    assert [path for path in paths if not any(fnmatch(path, f"*.{row}") for row in rows)] == []
    assert [row for row in rows if not any(fnmatch(path, f"*.{row}") for path in paths)] == []


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (BaseTrainer, "count_parameters"),
        (load_checkpoint_utils, "process_hf_checkpoint"),
        (InferModelMixin, "load_weights"),
        (ModelMixin, "convert_weight_dict"),
    ],
)
def test_an_attribute_that_upstream_moved_is_named_and_nothing_is_changed(
    monkeypatch: pytest.MonkeyPatch, owner, name: str
):
    """A hook that nobody calls would look as if the bridge were in place."""
    before = dict(vars(InferenceQwen3ForCausalLM))
    monkeypatch.delattr(owner, name)
    with pytest.raises(BridgeError) as error:
        mf_qwen3_bridge.patch()
    assert mindformers.__version__ in error.value.headline
    assert {problem.subject.split(".")[-1] for problem in error.value.problems} == {name}
    expected_owner = "InferenceQwen3" if "Mixin" in owner.__name__ else owner.__name__
    assert all(expected_owner in problem.subject for problem in error.value.problems)
    assert dict(vars(InferenceQwen3ForCausalLM)) == before
    assert not HOOKS.installed


def test_what_another_library_replaced_before_is_called_and_given_back(monkeypatch: pytest.MonkeyPatch):
    def theirs(model, output_dir=None, load_checkpoint=None):
        return f"theirs: {load_checkpoint}"

    monkeypatch.setattr(load_checkpoint_utils, "process_hf_checkpoint", theirs)
    mf_qwen3_bridge.patch()
    assert load_checkpoint_utils.process_hf_checkpoint is not theirs
    assert load_checkpoint_utils.process_hf_checkpoint(None, "output") == "theirs: None"
    mf_qwen3_bridge.unpatch()
    assert load_checkpoint_utils.process_hf_checkpoint is theirs


@pytest.mark.parametrize("name", NAMES)
def test_convert_weight_dict_on_the_class_and_on_an_instance(name):
    mf_qwen3_bridge.patch()
    directory = CHECKPOINTS / name
    source = mf_qwen3_bridge.load_checkpoint(directory, format="safetensors")
    network, model = empty_network(directory)
    on_class = InferenceQwen3ForCausalLM.convert_weight_dict(source, model_config=model.hf_config)
    with_config = InferenceQwen3ForCausalLM.convert_weight_dict(source, model_config=network.config)
    on_instance = network.convert_weight_dict(source)
    for converted in (on_class, with_config, on_instance):
        assert all(isinstance(value, ms.Parameter) and value.name == key for key, value in converted.items())
        assert {key: value.asnumpy().tobytes() for key, value in converted.items()} == expected(directory, INFER)
    assert ms.load_param_into_net(network, on_instance) == ([], [])


@pytest.mark.parametrize("kind", ["numpy", "Tensor", "Parameter"])
def test_convert_weight_dict_takes_what_there_is(tmp_path: Path, kind):
    wrap = {"numpy": np.asarray, "Tensor": ms.Tensor, "Parameter": lambda a: ms.Parameter(ms.Tensor(a))}[kind]
    directory = write(tmp_path, random_tensors(), hf_config())
    source = {name: wrap(value) for name, value in random_tensors().items()}
    converted = conversion.convert_weight_dict(InferenceQwen3ForCausalLM, source, model_config=hf_config())
    assert {key: value.asnumpy().tobytes() for key, value in converted.items()} == expected(directory, INFER)


def test_convert_weight_dict_lists_all_that_is_wrong():
    source = random_tensors()
    del source["model.layers.0.self_attn.k_proj.weight"]
    source["nodots"] = np.ones(1, np.float32)
    with pytest.raises(BridgeError) as error:
        conversion.convert_weight_dict(InferenceQwen3ForCausalLM, source, model_config=hf_config())
    subjects = [problem.subject for problem in error.value.problems]
    assert subjects == ["model.layers.0.self_attn.k_proj.weight", "nodots"]
    with pytest.raises(BridgeError, match="pass model_config="):
        conversion.convert_weight_dict(InferenceQwen3ForCausalLM, source)
    with pytest.raises(BridgeError, match="has no head_dim"):
        config = {key: value for key, value in hf_config().items() if key != "head_dim"}
        conversion.convert_weight_dict(InferenceQwen3ForCausalLM, source, model_config=config)


@pytest.mark.parametrize("name", ["split_shards", "tied_bf16", "moe_scattered"])
def test_the_chain_of_processes_that_feeds_load_weights(tmp_path: Path, name):
    """``qkv_concat: True``: upstream converts each file in a process of its own, and load_weights reads the result."""
    mf_qwen3_bridge.patch()
    directory = CHECKPOINTS / name
    network, _ = empty_network(directory, qkv_concat=True)
    convert_safetensors.convert_hf_safetensors_multiprocess(str(directory), str(tmp_path), network, network.config)
    written = {
        name: value.tobytes() for file in tmp_path.glob("*.safetensors") for name, value in load_file(file).items()
    }
    assert written == expected(directory, TRAIN)
    names = json.loads((tmp_path / "param_name_map.json").read_text())
    assert all(name in load_file(tmp_path / file) for name, file in names.items())
    assert names.keys() == written.keys()
    InferModelMixin.load_weights(network, str(tmp_path))
    assert bits(network) == bits(mf_qwen3_bridge.from_pretrained(directory))


def test_the_chain_of_processes_does_not_wait_for_ever(monkeypatch):
    """Ten minutes, whether MindFormers says so (2.0 and 2.1) or not."""
    condition, waited = multiprocessing.Condition(), []
    monkeypatch.setattr(condition, "wait_for", lambda predicate, timeout: waited.append(timeout))
    source = {name: tensor for name, tensor in random_tensors().items() if "k_proj" not in name}
    with pytest.raises(TimeoutError, match="mf-qwen3 check"):
        conversion.convert_weight_dict(
            InferenceQwen3ForCausalLM,
            source,
            model_config=hf_config(),
            qkv_dict={},
            condition=condition,
        )
    assert waited == [600]


def test_the_condition_waits_as_long_as_it_is_told(monkeypatch: pytest.MonkeyPatch):
    """MindFormers 2.0 and 2.1 say how long: ``condition.wait_for(predicate, timeout=600)``; 1.7 to 1.9 don't."""
    monkeypatch.setattr(conversion, "_PATIENCE_SECONDS", 0.1)
    condition = conversion._ConditionWithTimeout(multiprocessing.Condition())
    with condition:
        assert condition.wait_for(lambda: "delivered", timeout=600) == "delivered"
        assert condition.wait_for(lambda: "delivered") == "delivered"
        with pytest.raises(TimeoutError, match=r"within 0\.1 s"):
            condition.wait_for(lambda: False)
        with pytest.raises(TimeoutError, match=r"within 0\.2 s"):
            condition.wait_for(lambda: False, timeout=0.2)
        condition.notify_all()


def test_convert_map_dict():
    tensors = dict.fromkeys(random_tensors(), "a.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"] = "b.safetensors"
    converted = conversion.convert_map_dict(InferenceQwen3ForCausalLM, tensors, model_config=hf_config())
    assert converted.keys() == random_tensors(dialect=INFER).keys()
    assert [name for name, file in converted.items() if file == "b.safetensors"] == [
        "decoder.layers.1.self_attention.linear_qkv.weight"
    ]
    del tensors["model.layers.1.self_attn.v_proj.weight"]
    with pytest.raises(BridgeError, match="name map"):
        conversion.convert_map_dict(InferenceQwen3ForCausalLM, tensors, model_config=hf_config())


def test_obtain_name_map_refuses_what_names_cannot_say():
    mf_qwen3_bridge.patch()
    with pytest.raises(BridgeError, match="qkv_concat: True"):
        InferenceQwen3ForCausalLM.obtain_name_map(["model.safetensors"])


class TestLoadCheckpoint:
    @pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
    @pytest.mark.parametrize("form", ["directory", "list", "file"])
    def test_always_parameters_under_their_own_names(self, tmp_path: Path, dtype, form):
        tensors = random_tensors(dtype=dtype)
        write(tmp_path, tensors, shards=1 if form == "file" else 3)
        files = sorted(str(file) for file in tmp_path.glob("*.safetensors"))
        loaded = mf_qwen3_bridge.load_checkpoint(
            {"directory": tmp_path, "list": files, "file": files[0]}[form], format="safetensors"
        )
        assert loaded.keys() == tensors.keys()
        for name, value in loaded.items():
            assert isinstance(value, ms.Parameter)
            assert value.name == name
            assert value.dtype == {"F32": ms.float32, "F16": ms.float16, "BF16": ms.bfloat16}[dtype]
            assert value.asnumpy().tobytes() == tensors[name].tobytes()

    def test_upstreams_arguments(self, tmp_path: Path):
        write(tmp_path, random_tensors())
        kept = mf_qwen3_bridge.load_checkpoint(tmp_path, choice_func=lambda name: "norm" in name)
        assert kept
        assert all("norm" in name for name in kept)

    def test_into_a_network(self, tmp_path: Path):
        weights = write(tmp_path, {n: v.asnumpy() for n, v in _converted("untied_fp32").items()})
        network, _ = empty_network(CHECKPOINTS / "untied_fp32")
        mf_qwen3_bridge.load_checkpoint(weights, net=network)
        assert bits(network) == bits(mf_qwen3_bridge.from_pretrained(CHECKPOINTS / "untied_fp32"))

    def test_into_a_network_that_they_are_not_of(self):
        network, _ = empty_network(CHECKPOINTS / "untied_fp32")
        with pytest.raises(BridgeError, match="did not load everything"):
            mf_qwen3_bridge.load_checkpoint(CHECKPOINTS / "untied_fp32", net=network)

    def test_mindspores_own_format(self, tmp_path: Path):
        file = tmp_path / "x.ckpt"
        ms.save_checkpoint([{"name": "a", "data": ms.Tensor(np.ones(3, np.float32))}], str(file))
        loaded = mf_qwen3_bridge.load_checkpoint(str(file), format="ckpt")
        assert loaded["a"].asnumpy().tolist() == [1, 1, 1]

    def test_bad_files(self, tmp_path: Path):
        write(tmp_path, random_tensors(), shards=2)
        files = sorted(tmp_path.glob("*.safetensors"))
        with pytest.raises(BridgeError, match="empty"):
            mf_qwen3_bridge.load_checkpoint([])
        with pytest.raises(BridgeError, match="both in"):
            mf_qwen3_bridge.load_checkpoint([files[0], files[0]])
        files[0].write_bytes(b"")
        with pytest.raises(BridgeError, match="not a whole safetensors file"):
            mf_qwen3_bridge.load_checkpoint(tmp_path)


def _converted(name: str) -> dict[str, ms.Parameter]:
    directory = CHECKPOINTS / name
    source = mf_qwen3_bridge.load_checkpoint(directory)
    model_config = check(directory).hf_config
    return conversion.convert_weight_dict(InferenceQwen3ForCausalLM, source, model_config=model_config)
