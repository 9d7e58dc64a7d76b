"""What ranks saved: MindSpore's own strategy files understood, and merged as mindspore.unified_safetensors merges."""

from __future__ import annotations

import shutil
from pathlib import Path

import mindspore as ms
import numpy as np
import psutil
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

from mf_qwen3_bridge.cli.main import cli
from mf_qwen3_bridge.convert.jobs import to_hf, to_mindformers, to_ranks, unify
from mf_qwen3_bridge.convert.run import run
from mf_qwen3_bridge.errors import BridgeError
from mf_qwen3_bridge.inputs.opening import open_source
from mf_qwen3_bridge.inputs.preflight import check, check_trained
from mf_qwen3_bridge.inputs.rank_files import open_rank_files
from mf_qwen3_bridge.inputs.strategies import read_strategies
from mf_qwen3_bridge.model.layouts import Layout
from mf_qwen3_bridge.model.parallel import ParallelConfig
from mf_qwen3_bridge.model.rules import TRAIN, Dialect
from mf_qwen3_bridge.model.training_ranks import boxes
from tests.support.checkpoints import assert_same, contents, hf_config, random_tensors, write
from tests.support.ranks import COMPILED, COMPILED_MOE, RUNS, SUFFIX, cut, make_ranks

# MindFormers has no part in it, but for the cuts that its networks declare; those are of the fixtures.
pytestmark = pytest.mark.mindspore_only
STRATEGIES = Path(__file__).parents[1] / "fixtures" / "strategies"
STATE = {"epoch_num": np.array(1000), "global_step": np.array([1000], np.int32), "loss_scale": np.array(1.0)}


def trained_run(directory: Path, name: str) -> tuple[Path, Path, dict[str, np.ndarray]]:
    """The folders of strategies and ranks, and the whole tensors."""
    spec, devices, how, removed = RUNS[name]
    weights = random_tensors(spec, TRAIN, "BF16")
    state = {f"adam_{kind}.{n}": t.astype(np.float32) + i for i, kind in enumerate("mv") for n, t in weights.items()}
    tensors = weights | state
    folders = make_ranks(directory, tensors, cut(tensors, **how), devices, unlisted=STATE, remove_redundancy=removed)
    return *folders, tensors


@pytest.fixture
def never_sleeps(monkeypatch):
    """MindSpore sleeps for as long as more than half of the memory is used."""
    real = psutil.virtual_memory
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"percent": min(real().percent, 50)})())


@pytest.mark.parametrize("prefix", [None, "adam_"])
@pytest.mark.parametrize("name", RUNS)
def test_merged_as_mindspore_merges(tmp_path: Path, never_sleeps, name, prefix):
    strategies, ranks, tensors = trained_run(tmp_path, name)
    found = open_rank_files(ranks, read_strategies(strategies), SUFFIX, without_prefix=prefix)
    run(unify(found, tmp_path / "ours"))
    ms.merge_pipeline_strategys(str(strategies), str(tmp_path / "merged.ckpt"))
    ms.unified_safetensors(
        str(ranks),
        str(tmp_path / "merged.ckpt"),
        str(tmp_path / "theirs"),
        merge_with_redundancy=not RUNS[name][3],
        file_suffix=SUFFIX,
        choice_func=(lambda parameter: not parameter.startswith(prefix)) if prefix else None,
    )
    ours, theirs = contents(tmp_path / "ours"), contents(tmp_path / "theirs")
    assert_same(ours, theirs)
    assert_same(ours, {n: t for n, t in tensors.items() if not (prefix and n.startswith(prefix))})
    state = load_file(tmp_path / "ours" / "hyper_param.safetensors")
    assert_same({n: np.asarray(t) for n, t in state.items()}, STATE)


@pytest.mark.parametrize("name", RUNS)
def test_exported_without_a_merge(tmp_path: Path, name):
    strategies, rank_dirs, tensors = trained_run(tmp_path, name)
    hf = write(tmp_path / "hf", {}, hf_config(RUNS[name][0]))
    ranks = open_rank_files(rank_dirs, read_strategies(strategies), SUFFIX)
    run(to_hf(check_trained(ranks, hf), tmp_path / "direct"))
    merged = write(tmp_path / "merged", tensors)
    run(to_hf(check_trained(open_source(merged), hf), tmp_path / "expected"))
    assert_same(contents(tmp_path / "direct"), contents(tmp_path / "expected"))


def invoke(arguments: list[str]) -> None:
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output


def test_the_commands(tmp_path: Path):
    """The two documented steps, and the one that needs no merge: the same files."""
    strategies, ranks, _ = trained_run(tmp_path, "tp2 ep4 removed")
    hf = write(tmp_path / "hf", {}, hf_config(COMPILED_MOE))
    source = ["--src_strategy_dirs", str(strategies), "--mindspore_ckpt_dir", str(ranks), "--file_suffix", SUFFIX]
    invoke(["unify", *source, "--output_dir", str(tmp_path / "u"), "--filter_out_param_prefix", "adam_"])
    unified = tmp_path / "u" / f"{SUFFIX}_ckpt_convert" / "unified_safe"
    target = ["--hf_config", str(hf)]
    invoke(["export", "--input_path", str(unified), "--output_path", str(tmp_path / "two"), *target])
    invoke(["export", *source, "--output_path", str(tmp_path / "one"), *target])
    assert_same(contents(tmp_path / "one"), contents(tmp_path / "two"))


@pytest.mark.parametrize(
    ("files", "spec", "parallel"),
    [
        (["ms2.7.2_dense_tp2_dp1024"], COMPILED, ParallelConfig(2)),
        (["ms2.9.0_moe_tp2_ep4_dp1024"], COMPILED_MOE, ParallelConfig(2, 4)),
        (["ms2.7.2_dense_tp2_dp512_pp2_stage0", "ms2.7.2_dense_tp2_dp512_pp2_stage1"], COMPILED, ParallelConfig(2)),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_each_rank_gets_what_the_compiler_gave_it(tmp_path: Path, files, spec, parallel):
    """Strategy files that MindSpore's compiler wrote for upstream's training network."""
    for file in files:
        shutil.copy(STRATEGIES / f"{file}.ckpt", tmp_path)
    stages = read_strategies(tmp_path)
    assert len(stages) == len(files)
    model = check(write(tmp_path / "hf", random_tensors(spec), hf_config(spec)))
    plan = model.plan(TRAIN)
    shapes = {target.name: target.shape for target in plan.targets}
    for number in range(8):
        held = dict(boxes(model.rules, plan.target, parallel, number))
        for stage in stages:
            for name in stage.keys() & shapes.keys():
                bounds = [
                    (shape // parts * part, shape // parts * (part + 1))
                    for shape, (part, parts) in zip(shapes[name], stage[name].place(number))
                ]
                box = held.get(name)
                rows, columns = (box.rows, box.columns) if box else ((0, shapes[name][0]), None)
                whole = [rows, columns or (0, shapes[name][-1])][: len(shapes[name])]
                assert bounds == whole, name
    listed = {name for stage in stages for name in stage}
    assert shapes.keys() <= listed


def test_optimizer_shards_of_the_compiler(tmp_path: Path):
    shutil.copy(STRATEGIES / "ms2.9.0_moe_tp2_ep2_dp1024_opt2.ckpt", tmp_path)
    ((stage),) = read_strategies(tmp_path)
    qkv = stage["decoder.layers.0.self_attention.linear_qkv.weight"]
    # tp 2 innermost; each half is cut again among two of its copies.
    assert [qkv.place(device)[0] for device in range(5)] == [(0, 4), (2, 4), (1, 4), (3, 4), (0, 4)]


@pytest.mark.parametrize("layout", [Layout(True, True), Layout(False, False)], ids=str)
@pytest.mark.parametrize(("spec", "parallel"), [(COMPILED, ParallelConfig(2)), (COMPILED_MOE, ParallelConfig(2, 4))])
def test_rank_directories_merge_to_the_whole(tmp_path: Path, never_sleeps, spec, parallel, layout):
    """A directory per rank, merged by MindSpore, is the whole checkpoint; and MindSpore slices the whole so."""
    model = check(write(tmp_path / "hf", random_tensors(spec), hf_config(spec)))
    target = Dialect(layout.on(parallel.tensor_parallel))
    run(to_mindformers(model, target, tmp_path / "whole"))
    run(to_ranks(model, target, tmp_path / "ranks", parallel))
    whole = contents(tmp_path / "whole")
    sizes = {"tensor_parallel": parallel.tensor_parallel, "expert_parallel": parallel.expert_parallel}
    devices = max(sizes.values())
    strategies, theirs = make_ranks(tmp_path, whole, cut(whole, **sizes), devices)
    for rank in range(devices):
        (ours,), (expected,) = (list((base / f"rank_{rank}").iterdir()) for base in (tmp_path / "ranks", theirs))
        assert_same(load_file(ours), load_file(expected))
    ms.merge_pipeline_strategys(str(strategies), str(tmp_path / "merged.ckpt"))
    merged = tmp_path / "unified"
    ms.unified_safetensors(str(tmp_path / "ranks"), str(tmp_path / "merged.ckpt"), str(merged), file_suffix="0_0")
    assert_same(contents(merged), whole)
    # and MindSpore slices the whole directory for its ranks, by the map of names beside it
    ms.load_distributed_checkpoint(
        network=None,
        predict_strategy=str(tmp_path / "merged.ckpt"),
        unified_safetensors_dir=str(tmp_path / "whole"),
        dst_safetensors_dir=str(tmp_path / "sliced"),
        format="safetensors",
        max_process_num=1,
    )
    for rank in range(devices):
        (sliced,) = (tmp_path / "sliced" / f"rank_{rank}").iterdir()
        (ours,) = (tmp_path / "ranks" / f"rank_{rank}").iterdir()
        assert_same(load_file(sliced), load_file(ours))


def test_a_contiguous_layout_is_one_of_the_ranks_blocks(tmp_path: Path):
    """Upstream's training network splits each rank's own block of rows into q, k, v; found in its compiled graph."""
    hf = random_tensors(COMPILED)
    model = check(write(tmp_path / "hf", hf, hf_config(COMPILED)))
    run(to_ranks(model, Dialect(Layout(False, False).on(2)), tmp_path / "ranks", ParallelConfig(2)))
    q, k, v = (hf[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv")
    gate, up = (hf[f"model.layers.1.mlp.{name}_proj.weight"] for name in ("gate", "up"))
    for rank in range(2):
        (file,) = (tmp_path / "ranks" / f"rank_{rank}").iterdir()
        held = load_file(file)
        half = [np.split(part, 2)[rank] for part in (q, k, v, gate, up)]
        np.testing.assert_array_equal(
            held["decoder.layers.1.self_attention.linear_qkv.weight"], np.concatenate(half[:3])
        )
        np.testing.assert_array_equal(held["decoder.layers.1.mlp.linear_fc1.weight"], np.concatenate(half[3:]))


def refusal(directory: Path) -> str:
    with pytest.raises(BridgeError) as error:
        read_strategies(directory)
    return str(error.value)


def test_strategy_files_that_are_not_of_one_run(tmp_path: Path):
    assert "no ckpt_strategy_rank_N.ckpt" in refusal(tmp_path)
    stage0, stage1 = (STRATEGIES / f"ms2.7.2_dense_tp2_dp512_pp2_stage{n}.ckpt" for n in (0, 1))
    shutil.copy(stage1, tmp_path / "ckpt_strategy_rank_1.ckpt")
    assert "stage 0" in refusal(tmp_path)
    shutil.copy(stage0, tmp_path / "ckpt_strategy_rank_0.ckpt")
    assert len(read_strategies(tmp_path)) == 2
    shutil.copy(STRATEGIES / "ms2.7.2_dense_tp2_dp1024.ckpt", tmp_path / "ckpt_strategy_rank_7.ckpt")
    (tmp_path / "ckpt_strategy_rank_9.ckpt").write_bytes(b"no protobuf")
    text = refusal(tmp_path)
    assert "ckpt_strategy_rank_7.ckpt" in text and "differs from" in text
    assert "ckpt_strategy_rank_9.ckpt" in text and "no strategy file" in text


def test_a_stage_that_is_missing_is_not_merged_without(tmp_path: Path):
    """Where mindspore.unified_safetensors returns without that stage's parameters."""
    strategies, ranks, _ = trained_run(tmp_path, "pp2 tp2 dp2 removed")
    for rank in range(4, 8):
        (strategies / f"ckpt_strategy_rank_{rank}.ckpt").unlink()
    with pytest.raises(BridgeError, match="not in the strategy files' run"):
        open_rank_files(ranks, read_strategies(strategies), SUFFIX)
    for rank in range(4, 8):
        shutil.rmtree(ranks / f"rank_{rank}")
    hf = write(tmp_path / "hf", {}, hf_config(COMPILED))
    found = open_rank_files(ranks, read_strategies(strategies), SUFFIX)
    with pytest.raises(BridgeError, match="missing"):
        check_trained(found, hf)


def test_a_merged_contiguous_checkpoint_declares_how_many_ranks_saved_it(tmp_path: Path):
    hf = random_tensors(COMPILED)
    source = write(tmp_path / "hf", hf, hf_config(COMPILED))
    run(to_mindformers(check(source), Dialect(Layout(False, False).on(2)), tmp_path / "whole"))
    whole = contents(tmp_path / "whole")
    strategies, ranks = make_ranks(tmp_path, whole, cut(whole, tensor_parallel=2), 2)
    run(unify(open_rank_files(ranks, read_strategies(strategies)), tmp_path / "merged"))
    flags = "".join(f"    {flag}: {value}\n" for flag, value in Layout(False, False).training_flags.items())
    yaml = tmp_path / "train.yaml"
    yaml.write_text(f"run_mode: finetune\nmodel:\n  model_config:\n{flags}")
    run(to_hf(check_trained(open_source(tmp_path / "merged"), source, yaml), tmp_path / "back"))
    assert_same(contents(tmp_path / "back"), hf)
    yaml.write_text(yaml.read_text() + "use_parallel: True\nparallel_config:\n  model_parallel: 4\n")
    with pytest.raises(BridgeError, match="is not of this run"):
        check_trained(open_source(tmp_path / "merged"), source, yaml)
