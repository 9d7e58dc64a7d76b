"""LoRA as MindFormers trains it, on a CPU: its own cells compute what the exports compute, and what its trainer, which
begins with a Hugging Face directory, saves is exported."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindformers.pet import get_pet_model
from safetensors.numpy import load_file, save_file

import mf_qwen3_bridge
import yaml
from mf_qwen3_bridge.inputs.preflight import check
from mf_qwen3_bridge.mindformers import load_training as training
from mf_qwen3_bridge.model.layouts import Layout
from mf_qwen3_bridge.model.lora import adapted_parameter
from mf_qwen3_bridge.model.rules import HF, TRAIN
from mf_qwen3_bridge.verify.reference import forward
from tests.support.checkpoints import LAYOUTS, Tensors, assert_same, contents, write
from tests.support.commands import ROOT, TRAINER, run_command
from tests.support.documents import blocks as page_blocks
from tests.support.golden import CHECKPOINTS, TOLERANCE, golden
from tests.support.lora import ALPHA, PET_CONFIG, RANK, Lora, adapter_config, blocks, cut_axis, lora
from tests.support.ranks import Cut, make_ranks
from tests.support.trained import fused, in_bf16, on_ranks, training_yaml
from tests.support.training import batch_loss, job, run_trainer, training_network

# With four groups of heads, which TP 4 needs; with experts, which MindFormers does not adapt.
DENSE, MOE = "untied_fp16", "moe_fp32"
CASES = [*((DENSE, layout) for layout in LAYOUTS), (MOE, LAYOUTS[0]), (MOE, LAYOUTS[-1])]
# Of B: the adapter changes the logits as much as the weights do.
SCALE = 0.05


def adapter_of(name: str, layout: Layout, tp: int = 1) -> Lora:
    spec = check(CHECKPOINTS / name).spec
    return lora(spec, *blocks(layout, tp), scale=SCALE)


def base_of(name: str) -> Tensors:
    return {target.name: target.make() for target in check(CHECKPOINTS / name).plan(HF, "F32").targets}


def export(scratch: Path, kind: str, name: str, *arguments: object) -> Path:
    output = scratch / kind
    command = [sys.executable, "-m", "mf_qwen3_bridge.cli", "export", *arguments]
    command += ["--output_path", output, "--hf_config", CHECKPOINTS / name, "--lora", kind]
    result = run_command([*command, *(["--dtype", "fp32"] if kind == "merge" else [])], scratch)
    assert result.returncode == 0, result.stderr
    return output


def logits_of(directory: Path, tokens: list[int]) -> np.ndarray:
    *_, (_, logits) = forward(check(directory), tokens)
    return logits


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> Mapping[tuple[str, Layout], np.ndarray]:
    """What MindFormers' training network computes with a trained adapter, for each prompt."""
    scratch = tmp_path_factory.mktemp("lora")
    jobs = {}
    for number, (name, layout) in enumerate(CASES):
        jobs[name, layout] = made = job(name, layout, layout, scratch)
        made["config"] |= {"pet_config": PET_CONFIG}
        made |= {"lora": str(scratch / f"{number}.safetensors"), "output": str(scratch / f"{number}.npy")}
        save_file(adapter_of(name, layout).saved, made["lora"])
    (scratch / "jobs.json").write_text(json.dumps(list(jobs.values())))
    result = run_command([sys.executable, "-m", "tests.integration.training_worker", scratch / "jobs.json"], scratch)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return {case: np.load(made["output"]) for case, made in jobs.items()}


def error(logits: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(logits - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize(("name", "layout"), CASES, ids=str)
def test_exports_compute_what_the_training_network_computes(
    tmp_path: Path, computed: Mapping[tuple[str, Layout], np.ndarray], name: str, layout: Layout, tp: int
) -> None:
    """Also of what the ranks of a tensor parallel run save, whose contiguous rows are stored in blocks."""
    model = check(CHECKPOINTS / name)
    if model.spec.num_query_groups % tp:
        pytest.skip("its heads can't be divided so")
    whole = fused(base_of(name), model.spec, *blocks(layout, tp)) | adapter_of(name, layout, tp).saved
    strategies, checkpoint = make_ranks(tmp_path, whole, cuts_of(whole, tp), tp)
    adapter_config(tmp_path)
    config = training_yaml(tmp_path / "train.yaml", layout.training_flags, **(on_ranks(tp) if tp > 1 else {}))
    given = ("--mindspore_ckpt_dir", checkpoint, "--src_strategy_dirs", strategies, "--config", config)
    merged = export(tmp_path, "merge", name, *given)
    adapter = load_file(export(tmp_path, "adapter", name, *given) / "adapter_model.safetensors")
    assert_same(contents(merged), Lora.of_peft(adapter).merged(base_of(name)))
    for rows, expected in zip(computed[name, layout], golden(name), strict=True):
        found = rows[: len(expected.prompt)]
        assert error(logits_of(merged, expected.prompt), found) < TOLERANCE
        assert error(expected.logits, found) > 0.1


def test_a_wrong_adapter_is_seen(tmp_path: Path, computed: Mapping[tuple[str, Layout], np.ndarray]) -> None:
    layout = LAYOUTS[0]
    expected = golden(DENSE)[-1]
    rows = computed[DENSE, layout][-1][: len(expected.prompt)]
    right = adapter_of(DENSE, layout)
    config = json.loads((CHECKPOINTS / DENSE / "config.json").read_text())

    def error_of(parts: dict[str, tuple[np.ndarray, np.ndarray]], scaling: float = ALPHA / RANK) -> float:
        directory = tmp_path / str(len(list(tmp_path.iterdir())))
        tensors = Lora({}, parts).merged(base_of(DENSE), scaling)
        return error(logits_of(write(directory, tensors, config), expected.prompt), rows)

    assert error_of(right.parts) < TOLERANCE
    assert error_of(right.parts, RANK / ALPHA) > 100 * TOLERANCE
    assert error_of(right.parts, 1) > 100 * TOLERANCE
    as_values = {n.replace("k_proj", "v_proj"): m for n, m in right.parts.items() if "k_proj" in n}
    as_keys = {n.replace("v_proj", "k_proj"): m for n, m in right.parts.items() if "v_proj" in n}
    assert error_of(right.parts | as_values | as_keys) > 100 * TOLERANCE
    for fuses in ("q_proj", "gate_proj"):
        (name, (a, b)), *_ = ((n, m) for n, m in right.parts.items() if fuses in n)
        assert error_of(right.parts | {name: (a, np.roll(b, 1, axis=0))}) > 100 * TOLERANCE


FINETUNE = {
    name: yaml.safe_load((ROOT / "yaml" / "cpu" / f"{name}.yaml").read_text())
    for name in ("finetune_qwen3", "finetune_qwen3_lora")
}
PAGE = (ROOT / "docs" / "lora_runs.md").read_text(encoding="utf-8")


def test_the_yaml_of_the_page():
    """That for a CPU has this section, and is that for fine-tuning otherwise."""
    (section,) = page_blocks(PAGE, "yaml")
    document = FINETUNE["finetune_qwen3_lora"]
    assert document["model"]["model_config"].pop("pet_config") == yaml.safe_load(section)["pet_config"]
    assert document == FINETUNE["finetune_qwen3"]


@pytest.mark.newest_only  # test_the_trainer trains and exports on every release; the rest needs no MindFormers
def test_the_commands_of_the_page(tmp_path: Path) -> None:
    for name in ("demo", "scripts", "yaml"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "run_mindformer.py").symlink_to(TRAINER)
    demo = check(ROOT / "demo" / "qwen3-demo")
    adapter = lora(demo.spec, scale=SCALE)
    whole = {target.name: target.make() for target in demo.plan(TRAIN).targets} | adapter.saved
    make_ranks(tmp_path / "output_ranks", whole, cuts_of(whole, 2), 2)
    adapter_config(tmp_path / "output_ranks")
    for line in "".join(page_blocks(PAGE, "bash")).splitlines():
        result = run_command(["bash", "-c", line], tmp_path)
        assert result.returncode == 0, line + result.stdout[-3000:] + result.stderr[-3000:]
        if "inspect" in line:
            assert "LoRA        rank 8; alpha in " in result.stdout
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    of_ranks = load_file(tmp_path / "adapter_from_ranks" / "adapter_model.safetensors")
    assert_same(of_ranks, adapter.in_peft())
    hf = {target.name: target.make() for target in demo.plan(HF, "F32").targets}
    assert_same(contents(tmp_path / "merged_from_ranks"), in_bf16(adapter.merged(hf)))


def cuts_of(whole: Tensors, tp: int) -> dict[str, Cut]:
    """How the ranks of a tensor parallel run cut weights and matrices."""
    return {
        name: Cut(tuple(tp if number == cut_axis(name) else 1 for number in range(array.ndim)))
        for name, array in whole.items()
    }


def train(name: str, scratch: Path, layout: Layout) -> tuple[list[float], Path]:
    """Twenty steps of upstream's trainer from a Hugging Face directory: each step's loss, and what it saved."""
    document = yaml.safe_load((ROOT / "yaml" / "cpu" / "finetune_qwen3.yaml").read_text())
    document["model"]["model_config"] |= layout.training_flags | {"pet_config": PET_CONFIG}
    code, printed = run_trainer(CHECKPOINTS / name, scratch, 1e-2, model=document["model"])
    assert code == 0, printed[-4000:]
    (saved,) = (scratch / "output" / "checkpoint" / "rank_0").glob("*-1_20.safetensors")
    return [float(loss) for loss in re.findall(r"loss:\[([\d.]+)/", printed)], saved


@pytest.mark.parametrize(
    ("name", "layout"), [("untied_fp32", LAYOUTS[0]), ("tied_bf16", LAYOUTS[-1]), (MOE, LAYOUTS[0])]
)
def test_the_trainer(tmp_path: Path, name: str, layout: Layout) -> None:
    """It begins with the base, trains its adapter alone, and what it saves is exported both ways."""
    losses, saved = train(name, tmp_path, layout)
    assert len(losses) == 20
    data = ms.dataset.MindDataset(str(tmp_path / "output" / "training.mindrecord"), shuffle=False)
    rows = list(data.create_dict_iterator(num_epochs=1, output_numpy=True))
    assert losses[0] == pytest.approx(batch_loss(CHECKPOINTS / name, rows[:2]), rel=1e-5)
    assert losses[-1] < losses[0]

    tensors = load_file(saved)
    spec = check(CHECKPOINTS / name).spec
    base = fused(base_of(name), spec, *blocks(layout))
    assert_same({tensor: tensors[tensor] for tensor in base}, base)
    shapes = {tensor: array.shape for tensor, array in tensors.items() if adapted_parameter(tensor)}
    assert shapes == {tensor: array.shape for tensor, array in lora(spec).saved.items()}
    assert all(tensors[tensor].any() for tensor in shapes)

    given = ("--input_path", saved, "--config", tmp_path / "finetune.yaml")
    merged = export(tmp_path, "merge", name, *given)
    assert batch_loss(merged, rows[-2:]) < losses[-1] + 0.05
    adapter = load_file(export(tmp_path, "adapter", name, *given) / "adapter_model.safetensors")
    assert_same(contents(merged), Lora.of_peft(adapter).merged(base_of(name)))
    written = json.loads((tmp_path / "output" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"]) == (RANK, ALPHA)


def test_the_adapter_of_a_parallel_run_stays_as_it_was_initialised(tmp_path: Path, monkeypatch) -> None:
    """A rank's part of the base is read, by a strategy file that lists the matrices as well."""
    mf_qwen3_bridge.patch()
    model = check(CHECKPOINTS / DENSE)
    network = get_pet_model(training_network(CHECKPOINTS / DENSE, LAYOUTS[0]), dict(PET_CONFIG))
    whole = {target.name: target.make() for target in model.plan(TRAIN, "F32").targets} | lora(model.spec).saved
    strategies, checkpoint = make_ranks(tmp_path, whole, cuts_of(whole, 2), 2)
    parameters = network.parameters_dict()
    wanted = load_file(next((checkpoint / "rank_1").iterdir()))
    for tensor, value in wanted.items():  # what compiling does
        parameters[tensor].set_data(ms.Tensor(np.full_like(value, 7)), slice_shape=True)
    monkeypatch.setattr(training, "get_rank", lambda: 1)
    training.load_training_network(network, model, strategies / "ckpt_strategy_rank_1.ckpt")
    for tensor, value in wanted.items():
        expected = np.full_like(value, 7) if adapted_parameter(tensor) else value
        assert parameters[tensor].asnumpy().tobytes() == expected.tobytes(), tensor
