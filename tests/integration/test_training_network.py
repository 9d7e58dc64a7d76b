"""MindFormers' own training network on a CPU, filled online from a Hugging Face directory: it computes what
transformers computes, trains on from there, and what its trainer saves goes back to Hugging Face.

The network is upstream's, in graph mode; what a CPU lacks comes from ``cpu_training_ops``.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindformers.trainer import base_trainer

import yaml
from mf_qwen3_bridge.convert.jobs import to_hf
from mf_qwen3_bridge.convert.run import run
from mf_qwen3_bridge.inputs.preflight import check
from mf_qwen3_bridge.mindformers.cpu import training_ops as cpu_training_ops
from mf_qwen3_bridge.model.layouts import Layout
from mf_qwen3_bridge.model.rules import HF
from tests.support.checkpoints import LAYOUTS
from tests.support.commands import ROOT, run_command
from tests.support.golden import CHECKPOINTS, TOLERANCE, golden
from tests.support.training import batch_loss, job, run_trainer

DEFAULT, *OTHERS = LAYOUTS
CONTIGUOUS = LAYOUTS[-1]
DENSE, MOE = "untied_fp32", "moe_fp32"
CASES = [
    *(
        (name, DEFAULT, DEFAULT)
        for name in (DENSE, MOE, "tied_bf16", "one_kv_head", "moe_norm_topk_false", "moe_fused")
    ),
    *((DENSE, layout, layout) for layout in OTHERS),
    (MOE, CONTIGUOUS, CONTIGUOUS),
    *((DENSE, wrong, DEFAULT) for wrong in OTHERS[:2]),
    (MOE, CONTIGUOUS, DEFAULT),
]


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> Mapping[tuple[str, Layout, Layout], float]:
    """For each case the largest error of any logit of any prompt, relative to the scale of the logits."""
    scratch = tmp_path_factory.mktemp("training")
    jobs = {case: job(*case, scratch) for case in CASES}
    file = scratch / "jobs.json"
    file.write_text(json.dumps(list(jobs.values())))
    command = [sys.executable, "-m", "tests.integration.training_worker", file]
    result = run_command(command, scratch)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return {case: error(case[0], np.load(job["output"])) for case, job in jobs.items()}


def error(name: str, logits: np.ndarray) -> float:
    return max(
        float(np.abs(rows[: len(g.prompt)] - g.logits).max() / np.abs(g.logits).max())
        for rows, g in zip(logits, golden(name), strict=True)
    )


@pytest.mark.parametrize(
    ("name", "of_weights", "of_network"), CASES, ids=lambda value: str(value).replace("interleaved", "i")
)
def test_logits_are_those_of_transformers_if_the_layout_is_right(
    errors: Mapping[tuple[str, Layout, Layout], float], name: str, of_weights: Layout, of_network: Layout
) -> None:
    found = errors[name, of_weights, of_network]
    if of_weights == of_network:
        assert found < TOLERANCE
    else:
        assert found > 0.1


def test_install_and_uninstall() -> None:
    cpu_training_ops.STAND_INS.uninstall()  # another test of this process may have built a training network
    declarations = cpu_training_ops.STAND_INS.declarations
    replaced = {(declared.owner, declared.name): vars(declared.owner)[declared.name] for declared in declarations}
    cpu_training_ops.STAND_INS.install()
    try:
        assert all(vars(owner)[name] is not upstream for (owner, name), upstream in replaced.items())
        cpu_training_ops.STAND_INS.install()
    finally:
        cpu_training_ops.STAND_INS.uninstall()
    assert all(vars(owner)[name] is upstream for (owner, name), upstream in replaced.items())


def test_another_device_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_training_ops.STAND_INS.uninstall()
    monkeypatch.setattr(ms, "get_context", lambda key: "Ascend")
    cpu_training_ops.STAND_INS.install()
    assert not cpu_training_ops.STAND_INS.installed


def train(name: str, scratch: Path, learning_rate: float) -> tuple[list[float], Path]:
    """The loss of each step, and what it saved, exported."""
    code, printed = run_trainer(CHECKPOINTS / name, scratch, learning_rate)
    assert code == 0, printed[-4000:]
    (saved,) = (scratch / "output" / "checkpoint" / "rank_0").glob("*-1_20.safetensors")
    run(to_hf(check(CHECKPOINTS / name, scratch / "finetune.yaml", saved), scratch / "exported", "fp32"))
    return [float(loss) for loss in re.findall(r"loss:\[([\d.]+)/", printed)], scratch / "exported"


@pytest.mark.parametrize("name", [DENSE, "moe_fused"])
def test_the_trainer_goes_on_with_the_weights_and_its_own_are_exported(tmp_path: Path, name: str) -> None:
    losses, exported = train(name, tmp_path, 1e-3)
    assert len(losses) == 20
    data = ms.dataset.MindDataset(str(tmp_path / "output" / "training.mindrecord"), shuffle=False)
    rows = list(data.create_dict_iterator(num_epochs=1, output_numpy=True))
    assert losses[0] == pytest.approx(batch_loss(CHECKPOINTS / name, rows[:2]), rel=1e-5)
    assert batch_loss(exported, rows[-2:]) < losses[-1] < losses[0] / 2


def test_weights_that_did_not_learn_come_back_bit_for_bit(tmp_path: Path) -> None:
    _, exported = train("tied_bf16", tmp_path, 0)
    before, after = check(CHECKPOINTS / "tied_bf16").plan(HF, "F32"), check(exported).plan(HF)
    bits = {target.name: target.make().tobytes() for target in before.targets}
    assert bits == {target.name: target.make().tobytes() for target in after.targets}


# From 1.9 on it is checkpoint.load_path that the trainer reads, if the YAML has that section.
READS_LOAD_PATH = "load_hf_checkpoint" in vars(base_trainer)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        *([("an empty load_path", "nothing to fine-tune")] if READS_LOAD_PATH else []),
        ("no shards", "model-00002-of-0"),
        ("neither shards nor index", "nothing to fine-tune"),
        ("a truncated shard", "truncated: "),
    ],
)
def test_nothing_is_fine_tuned_from_weights_that_are_not_there(tmp_path: Path, damage: str, message: str) -> None:
    """MindFormers alone trains random weights, and says so in a line among thousands."""
    directory = tmp_path / "hf"
    shutil.copytree(CHECKPOINTS / "split_shards", directory)
    shards = sorted(directory.glob("*.safetensors"))
    entries = {}
    if damage == "an empty load_path":
        entries = {"checkpoint": {"load_path": ""}}
    elif damage == "a truncated shard":
        shards[0].write_bytes(shards[0].read_bytes()[:-100])
    else:
        for shard in shards:
            shard.unlink()
    if damage == "neither shards nor index":
        (directory / "model.safetensors.index.json").unlink()
    code, printed = run_trainer(directory, tmp_path, **entries)
    assert code != 0
    assert message in printed[-4000:], printed[-4000:]
    assert not list(tmp_path.rglob("*-1_20.safetensors"))


def test_training_from_random_weights_can_be_asked_for(tmp_path: Path) -> None:
    directory = tmp_path / "config alone"
    directory.mkdir()
    (directory / "config.json").write_bytes((CHECKPOINTS / DENSE / "config.json").read_bytes())
    on_npu = yaml.safe_load((ROOT / "yaml" / "finetune_qwen3_0_6b.yaml").read_text())
    code, printed = run_trainer(directory, tmp_path, run_mode="train", recompute_config=on_npu["recompute_config"])
    assert code == 0, printed[-4000:]
