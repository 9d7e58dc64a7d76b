"""Directories that the bridge writes, held against MindFormers' own converter, and loaded by MindFormers' own means."""

from __future__ import annotations

from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindformers.parallel_core.inference.model_utils import InferModelMixin

from mf_qwen3_bridge.convert.jobs import to_hf, to_mindformers, to_ranks
from mf_qwen3_bridge.convert.run import run
from mf_qwen3_bridge.inputs.opening import open_source
from mf_qwen3_bridge.inputs.preflight import check, check_trained
from mf_qwen3_bridge.mindformers.conversion import TrainingConversion, to_parameter
from mf_qwen3_bridge.mindformers.load import load_checkpoint, load_network
from mf_qwen3_bridge.model.layouts import Layout
from mf_qwen3_bridge.model.parallel import ParallelConfig
from mf_qwen3_bridge.model.rules import HF, INFER, TRAIN, Dialect
from tests.support.checkpoints import LAYOUTS, assert_same, contents, hf_config, random_tensors, write
from tests.support.golden import CHECKPOINTS, NAMES, TOLERANCE, golden
from tests.support.networks import DENSE, MOE, bits, empty_network, logits_error, playing


def by_upstream(directory: Path, layout: Layout) -> dict[str, np.ndarray]:
    """What MindFormers' training class makes of a Hugging Face checkpoint."""
    model = check(directory)
    separate = {target.name: target.make() for target in model.plan(HF).targets}
    return TrainingConversion(model.spec, layout).convert_weight_dict(separate)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_training_layout_is_upstreams(tmp_path: Path, name: str, layout: Layout):
    run(to_mindformers(check(CHECKPOINTS / name), Dialect(layout), tmp_path / "out"))
    assert_same(
        contents(tmp_path / "out"), {n: np.asarray(t) for n, t in by_upstream(CHECKPOINTS / name, layout).items()}
    )


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_what_upstream_converted_comes_back(tmp_path: Path, name: str, layout: Layout):
    """A checkpoint that the bridge did not make: the YAML says its layout."""
    trained = write(tmp_path / "trained", by_upstream(CHECKPOINTS / name, layout))
    flags = "\n".join(f"    {flag}: {value}" for flag, value in layout.training_flags.items())
    (tmp_path / "train.yaml").write_text(f"run_mode: finetune\nmodel:\n  model_config:\n{flags}\n")
    model = check_trained(open_source(trained), CHECKPOINTS / name, tmp_path / "train.yaml")
    run(to_hf(model, tmp_path / "hf"))
    expected = {target.name: target.make() for target in check(CHECKPOINTS / name).plan(HF).targets}
    assert_same(contents(tmp_path / "hf"), expected)


@pytest.mark.parametrize("name", NAMES)
def test_the_inference_layout_loads_into_the_network(tmp_path: Path, name: str):
    model = check(CHECKPOINTS / name)
    run(to_mindformers(model, INFER, tmp_path / "out"))
    run(to_hf(check_trained(open_source(tmp_path / "out"), CHECKPOINTS / name), tmp_path / "back"))
    assert_same(contents(tmp_path / "back"), {target.name: target.make() for target in model.plan(HF).targets})
    network, _ = empty_network(CHECKPOINTS / name)
    assert ms.load_param_into_net(network, load_checkpoint(tmp_path / "out")) == ([], [])
    network.process_weights_after_loading(network.model)
    assert logits_error(network, golden(name)) <= TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_the_training_layout_loads_by_upstreams_loader(tmp_path: Path, name: str):
    """``load_weights`` reads MindFormers' names too, in the default layout of training."""
    run(to_mindformers(check(CHECKPOINTS / name), TRAIN, tmp_path / "out"))
    network, _ = empty_network(CHECKPOINTS / name)
    InferModelMixin.load_weights(network, str(tmp_path / "out"))
    assert logits_error(network, golden(name)) <= TOLERANCE


@pytest.mark.parametrize(
    ("spec", "parallel"),
    [(DENSE, ParallelConfig(2)), (DENSE, ParallelConfig(4)), (MOE, ParallelConfig(2, 2)), (MOE, ParallelConfig(4, 2))],
    ids=str,
)
def test_each_rank_loads_its_directory(monkeypatch, tmp_path: Path, spec, parallel):
    directory = write(tmp_path / "hf", random_tensors(spec), hf_config(spec))
    run(to_ranks(check(directory), INFER, tmp_path / "ranks", parallel))
    for number in range(parallel.world_size):
        with playing(monkeypatch, parallel, number):
            expected, model = empty_network(directory)
            load_network(expected, model)
            network, _ = empty_network(directory)
            (file,) = (tmp_path / "ranks" / f"rank_{number}").iterdir()
            held = {name: to_parameter(name, value) for name, value in load_checkpoint(file).items()}
            assert ms.load_param_into_net(network, held) == ([], [])
            network.process_weights_after_loading(network.model)
            assert bits(network) == bits(expected)
