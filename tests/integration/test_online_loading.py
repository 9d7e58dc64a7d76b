"""A training network is filled from Hugging Face's files, as MindFormers calls for it: its parameters are the training
layout's, bit for bit, and nothing is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindformers.tools.register import MindFormerConfig
from mindformers.trainer import base_trainer
from mindformers.utils import load_checkpoint_utils
from mindspore import nn
from safetensors.numpy import load_file, save_file

import mf_qwen3_bridge
from mf_qwen3_bridge.convert.jobs import to_mindformers
from mf_qwen3_bridge.convert.run import run
from mf_qwen3_bridge.errors import BridgeError
from mf_qwen3_bridge.inputs.preflight import CheckedCheckpoint, check
from mf_qwen3_bridge.mindformers import load_training as training
from mf_qwen3_bridge.mindformers.patching import hooks
from mf_qwen3_bridge.model.layouts import TRAINING_DEFAULT, Layout
from mf_qwen3_bridge.model.rules import Dialect
from mf_qwen3_bridge.transfer.safetensors import DTYPES
from tests.support.checkpoints import LAYOUTS, hf_config, random_tensors, write
from tests.support.golden import CHECKPOINTS, NAMES, QUANTISED
from tests.support.ranks import RUNS, cut, make_ranks
from tests.support.training import training_network

TRAINABLE = [name for name in NAMES if name != "yarn"]


def expected(directory: Path, layout: Layout, dtype: Any = np.float32) -> dict[str, bytes]:
    model = check(directory)
    layout = layout.of_experts if model.spec.is_moe else layout
    return {t.name: t.make().astype(dtype).tobytes() for t in model.plan(Dialect(layout)).targets}


def of_model(network: Any, names: Any) -> dict[str, bytes]:
    parameters = network.parameters_dict()
    return {name: parameters[name].asnumpy().tobytes() for name in names}


def load(network: Any, directory: Path, **config: Any) -> None:
    """As ``transform_and_load_checkpoint`` does for ``load_ckpt_format: safetensors``."""
    load_checkpoint_utils.load_checkpoint_with_safetensors(
        MindFormerConfig(
            load_checkpoint=str(directory),
            checkpoint={"load_path": str(directory)},
            load_ckpt_format="safetensors",
            model={"model_config": {"qkv_concat": config.pop("qkv_concat", False)}},
            parallel={"parallel_mode": "DATA_PARALLEL"},
            **config,
        ),
        SimpleNamespace(_train_network=network),
        network,
        None,
    )


def listing(directory: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in directory.rglob("*")}


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *((name, TRAINING_DEFAULT) for name in TRAINABLE),
        *((name, layout) for name in ("tied_bf16", "one_kv_head", "moe_bf16") for layout in LAYOUTS[1:]),
    ],
    ids=str,
)
def test_a_single_device(name: str, layout: Layout):
    mf_qwen3_bridge.patch()
    before = listing(CHECKPOINTS / name)
    network = training_network(CHECKPOINTS / name, layout)
    load(network, CHECKPOINTS / name)
    wanted = expected(CHECKPOINTS / name, layout)
    assert of_model(network, wanted) == wanted
    assert listing(CHECKPOINTS / name) == before


@pytest.mark.parametrize("params_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["fp8_dense", "fp8_moe_stacked", "int_rows_moe"])
def test_quantised_weights(name: str, params_dtype: str):
    mf_qwen3_bridge.patch()
    directory = QUANTISED / name
    network = training_network(directory, TRAINING_DEFAULT, params_dtype=params_dtype)
    load(network, directory)
    model = check(directory)
    layout = TRAINING_DEFAULT.of_experts if model.spec.is_moe else TRAINING_DEFAULT
    plan = model.plan(Dialect(layout), {"float32": "F32", "bfloat16": "BF16"}[params_dtype])
    wanted = {target.name: target.make().astype(np.float32).tobytes() for target in plan.targets}
    parameters = network.parameters_dict()
    assert {name: parameters[name].asnumpy().astype(np.float32).tobytes() for name in wanted} == wanted


@pytest.mark.parametrize("name", ["untied_fp32", "moe_fp32"])
def test_upstream_alone_fails(name: str):
    """What the bridge is there for; if this fails, upstream has got better."""
    with pytest.raises(TypeError, match="ndarray"):
        load(training_network(CHECKPOINTS / name, TRAINING_DEFAULT), CHECKPOINTS / name)


def test_qkv_concat_starts_no_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    mf_qwen3_bridge.patch()
    monkeypatch.setattr(load_checkpoint_utils, "Process", None)
    directory = CHECKPOINTS / "split_shards"
    network = training_network(directory, TRAINING_DEFAULT)
    config = MindFormerConfig(
        load_checkpoint=str(directory),
        checkpoint={"load_path": str(directory)},
        load_ckpt_format="safetensors",
        output_dir=str(tmp_path / "output"),
        model={"model_config": {"qkv_concat": True}},
    )
    assert load_checkpoint_utils.get_load_path_after_hf_convert(config, network) == str(directory)
    load(network, directory, qkv_concat=True)
    wanted = expected(directory, TRAINING_DEFAULT)
    assert of_model(network, wanted) == wanted
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(("params_dtype", "dtype"), [("float16", "F16"), ("bfloat16", "BF16")])
def test_parameters_of_another_dtype(params_dtype: str, dtype: str):
    mf_qwen3_bridge.patch()
    directory = CHECKPOINTS / "tied_bf16"
    network = training_network(directory, TRAINING_DEFAULT, params_dtype=params_dtype)
    load(network, directory)
    norms = "layernorm.weight"  # upstream keeps them in float32
    wanted = expected(directory, TRAINING_DEFAULT, DTYPES[dtype])
    wanted = {name: value for name, value in wanted.items() if not name.endswith(norms)}
    assert of_model(network, wanted) == wanted


def test_layout_metadata_of_another_layout(tmp_path: Path):
    """Upstream would load it as it is stored, and compute garbage."""
    mf_qwen3_bridge.patch()
    model = check(CHECKPOINTS / "untied_fp32")
    run(to_mindformers(model, Dialect(TRAINING_DEFAULT), tmp_path / "mindformers"))
    contiguous = Layout(interleaved_qkv=False, interleaved_gate_up=False)
    network = training_network(CHECKPOINTS / "untied_fp32", contiguous)
    load(network, tmp_path / "mindformers")
    wanted = expected(CHECKPOINTS / "untied_fp32", contiguous)
    assert of_model(network, wanted) == wanted


def test_what_has_no_layout_metadata_is_upstreams(tmp_path: Path):
    """Only its trainer knows its layout: the run's own flags."""
    mf_qwen3_bridge.patch()
    wanted = {t.name: t.make() for t in check(CHECKPOINTS / "untied_fp32").plan(Dialect(TRAINING_DEFAULT)).targets}
    network = training_network(CHECKPOINTS / "untied_fp32", TRAINING_DEFAULT)
    load(network, write(tmp_path / "theirs", wanted))
    assert of_model(network, wanted) == {name: value.tobytes() for name, value in wanted.items()}


def without_a_tensor(directory: Path) -> None:
    (file,) = directory.glob("*.safetensors")
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file)


def cut_short(directory: Path) -> None:
    (file,) = directory.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])


def of_another_size(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [(without_a_tensor, "up_proj"), (cut_short, "truncated"), (of_another_size, "num_hidden_layers")],
)
def test_damaged_directories(tmp_path: Path, damage, message: str):
    mf_qwen3_bridge.patch()
    network = training_network(CHECKPOINTS / "untied_fp32", TRAINING_DEFAULT)
    directory = shutil.copytree(CHECKPOINTS / "untied_fp32", tmp_path / "hf")
    damage(directory)
    with pytest.raises(BridgeError, match=message):
        load(network, directory)


def test_there_is_nothing_to_resume():
    mf_qwen3_bridge.patch()
    network = training_network(CHECKPOINTS / "untied_fp32", TRAINING_DEFAULT)
    with pytest.raises(BridgeError, match="resume_training"):
        load(network, CHECKPOINTS / "untied_fp32", resume_training=True)


@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[-1]], ids=str)
@pytest.mark.parametrize("name", ["tied_bf16", "moe_fused"])
def test_the_newer_checkpoint_format(name: str, layout: Layout):
    mf_qwen3_bridge.patch()
    network = training_network(CHECKPOINTS / name, layout)
    for function in ("load_checkpoint", "load_hf_checkpoint"):
        if function == "load_hf_checkpoint" and not hasattr(base_trainer, function):
            continue  # before 1.9 load_checkpoint loads all kinds
        getattr(base_trainer, function)(str(CHECKPOINTS / name), network=network)
    wanted = expected(CHECKPOINTS / name, layout)
    assert of_model(network, wanted) == wanted


# ------------------------------------------------------------------------------------------------------------ parallel


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *((name, TRAINING_DEFAULT) for name in RUNS),
        *((name, Layout(False, False)) for name in ("tp2 dp2 opt2", "pp2 tp2 dp2 removed", "tp2 ep2")),
    ],
    ids=str,
)
def test_each_rank_of_a_parallel_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, layout: Layout):
    """After compiling, a rank's parameters are slices, and its strategy file says which."""
    mf_qwen3_bridge.patch()
    spec, devices, how, _ = RUNS[name]
    directory = write(tmp_path / "hf", random_tensors(spec, dtype="BF16"), hf_config(spec))
    model = check(directory)
    laid_out = (layout.of_experts if spec.is_moe else layout).on(how.get("tensor_parallel", 1))
    whole = {t.name: t.make() for t in model.plan(Dialect(laid_out)).targets}
    whole = {target: value.astype(np.float32) for target, value in whole.items()}
    strategies, ranks = make_ranks(tmp_path, whole, cut(whole, **how), devices)
    for rank in range(devices * how.get("stages", 1)):
        network = training_network(directory, layout)
        monkeypatch.setattr(
            network.get_gpt_transformer_config(), "tensor_model_parallel_size", laid_out.tensor_parallel
        )
        (file,) = (ranks / f"rank_{rank}").iterdir()
        wanted = load_file(file)
        parameters = network.parameters_dict()
        for parameter, value in wanted.items():  # what compiling does
            parameters[parameter].set_data(ms.Tensor(np.zeros_like(value)), slice_shape=True)
        monkeypatch.setattr(training, "get_rank", lambda rank=rank: rank)
        strategy = strategies / f"ckpt_strategy_rank_{rank}.ckpt"
        ms.set_auto_parallel_context(
            parallel_mode="semi_auto_parallel",
            pipeline_stages=how.get("stages", 1),
            strategy_ckpt_config={"save_file": str(strategy)},
        )
        try:
            load_checkpoint_utils.load_safetensors_checkpoint(
                MindFormerConfig(use_parallel=True, auto_trans_ckpt=True), [], network, "", str(directory), None
            )
        finally:
            ms.reset_auto_parallel_context()
        assert of_model(network, wanted) == {n: value.tobytes() for n, value in wanted.items()}


def test_layout_metadata_in_the_newer_format(tmp_path: Path):
    """Upstream takes it for its own, and loads it as it is stored."""
    mf_qwen3_bridge.patch()
    directory = CHECKPOINTS / "untied_fp32"
    run(to_mindformers(check(directory), Dialect(TRAINING_DEFAULT), tmp_path / "mindformers"))
    network = training_network(directory, LAYOUTS[-1])
    base_trainer.load_checkpoint(checkpoint=str(tmp_path / "mindformers"), network=network)
    wanted = expected(directory, LAYOUTS[-1])
    assert of_model(network, wanted) == wanted
    with pytest.raises(BridgeError, match="nothing to resume"):
        base_trainer.load_checkpoint(str(directory), network, nn.Adam(network.trainable_params()))


def whole_network_and_strategy(directory: Path, name: str) -> tuple[Any, CheckedCheckpoint, Path]:
    """A network that nobody divided, its checkpoint, and the strategy file that the first rank of a run left."""
    spec, devices, how, _ = RUNS[name]
    model = check(write(directory / "hf", random_tensors(spec), hf_config(spec)))
    network = training_network(model.source.path, TRAINING_DEFAULT)
    whole = {t.name: t.make() for t in model.plan(Dialect(TRAINING_DEFAULT)).targets}
    strategies, _ = make_ranks(directory, whole, cut(whole, **how), devices)
    return network, model, strategies / "ckpt_strategy_rank_0.ckpt"


def test_a_strategy_file_that_lacks_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Such as one that an earlier run with pipeline stages left."""
    network, model, strategy = whole_network_and_strategy(tmp_path, "pp2")
    monkeypatch.setattr(training, "get_rank", lambda: 0)
    with pytest.raises(BridgeError, match=r"final_layernorm.*not in the file"):
        training.load_training_network(network, model, strategy)


def test_what_is_left_to_upstream(tmp_path: Path):
    """Checkpoints of MindFormers' own, in either format, that the bridge would take for damaged."""
    weights = {t.name: t.make() for t in check(CHECKPOINTS / "untied_fp32").plan(Dialect(TRAINING_DEFAULT)).targets}
    newer = tmp_path / "checkpoint" / "iteration_00000020"
    newer.mkdir(parents=True)
    for rank in range(2):
        save_file(weights, newer / f"qwen3-model-000000{rank}-0000002.safetensors", {"format": "ms"})
    save_file({"global_step": np.array([20])}, newer / "hyper_param.safetensors")
    for directory in (tmp_path / "checkpoint", newer, tmp_path / "nowhere", tmp_path):
        assert not hooks.has_known_dialect(directory)
    assert hooks.has_known_dialect(CHECKPOINTS / "split_shards") and hooks.has_known_dialect(CHECKPOINTS / "moe_fused")
    (file,) = (CHECKPOINTS / "untied_fp32").glob("*.safetensors")
    assert hooks.has_known_dialect(file)


class Adapter(nn.Cell):
    """What a LoRA puts beside a linear layer."""

    def __init__(self) -> None:
        super().__init__(auto_prefix=False)
        self.lora_a = ms.Parameter(np.ones((2, 2), np.float32), name="decoder.layers.0.mlp.linear_fc1.lora_a")


def test_an_adapter_stays_as_it_was_initialised():
    mf_qwen3_bridge.patch()
    network = training_network(CHECKPOINTS / "untied_fp32", TRAINING_DEFAULT)
    network.adapter = Adapter()
    load(network, CHECKPOINTS / "untied_fp32")
    wanted = expected(CHECKPOINTS / "untied_fp32", TRAINING_DEFAULT)
    assert of_model(network, wanted) == wanted


def test_a_strategy_file_of_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    network, model, strategy = whole_network_and_strategy(tmp_path, "tp2")
    monkeypatch.setattr(training, "get_rank", lambda: 0)
    with pytest.raises(BridgeError, match="does not fit the network"):  # its parameters are whole
        training.load_training_network(network, model, strategy)
    monkeypatch.setattr(training, "get_rank", lambda: 5)
    with pytest.raises(BridgeError, match="is of pipeline stage 0 with 2 devices, but this is rank 5"):
        training.load_training_network(network, model, strategy)
    with pytest.raises(BridgeError, match="no strategy file"):
        training.load_training_network(network, model, tmp_path / "hf" / "config.json")
