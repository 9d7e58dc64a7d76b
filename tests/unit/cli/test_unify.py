"""``mf-qwen3 unify``, and export from ranks' files, as a user types them."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from mf_qwen3_bridge.cli.files import unify as unify_command
from mf_qwen3_bridge.convert import jobs
from mf_qwen3_bridge.convert.run import run
from mf_qwen3_bridge.errors import BridgeError
from mf_qwen3_bridge.inputs import strategies
from mf_qwen3_bridge.inputs.opening import open_source
from mf_qwen3_bridge.inputs.rank_files import Sharding, open_rank_files
from tests.support.checkpoints import assert_same, contents, hf_config, random_tensors
from tests.support.cli import everything, flags, layout_of, names, num_rows, reverse
from tests.support.damage import unwrapped
from tests.support.trained import (
    CONTIGUOUS,
    COUNTER,
    GROUPS,
    NUMBERS,
    Ranks,
    Touch,
    fused,
    of_rank,
    on_ranks,
    save_rank,
    save_ranks,
    sharding_of,
    training_yaml,
    write_config,
)


def test_unify_merges_everything(tmp_path, with_adam):
    ranks, whole = with_adam
    run(jobs.unify(ranks.open(), tmp_path / "out"))
    assert names(tmp_path / "out") == {"part0.safetensors", "param_name_map.json", "hyper_param.safetensors"}
    assert_same(contents(tmp_path / "out"), whole)
    assert_same(load_file(tmp_path / "out" / "hyper_param.safetensors"), COUNTER)
    index = json.loads((tmp_path / "out" / "param_name_map.json").read_text())
    assert index["weight_map"] == dict.fromkeys(whole, "part0.safetensors")
    metadata = open_source(tmp_path / "out").metadata
    assert metadata.items() >= {"format": "ms", "remove_redundancy": "False"}.items()


def test_unify_leaves_out_what_begins_so(tmp_path, with_adam):
    ranks, whole = with_adam
    run(jobs.unify(ranks.open(without_prefix="adam_"), tmp_path / "out"))
    weights = {name: array for name, array in whole.items() if not name.startswith("adam_")}
    assert len(weights) == 19
    assert_same(contents(tmp_path / "out"), weights)
    assert_same(load_file(tmp_path / "out" / "hyper_param.safetensors"), COUNTER)


def test_unify_that_leaves_out_everything(tmp_path):
    save_rank(tmp_path / "ranks", 0, {"adam_m.a": np.ones(2, np.float32)})
    ranks = open_rank_files(tmp_path / "ranks", [{"adam_m.a": Sharding((1,), (-1,))}], without_prefix="adam_")
    with pytest.raises(BridgeError, match="nothing is left to merge"):
        jobs.unify(ranks, tmp_path / "out")


def test_unify_leaves_it_out_of_what_no_strategy_lists(tmp_path, with_adam):
    ranks, whole = with_adam
    for name in whole:
        if name.startswith("adam_"):
            del ranks.strategies[0][name]
    run(jobs.unify(ranks.open(without_prefix="adam_"), tmp_path / "out"))
    assert_same(load_file(tmp_path / "out" / "hyper_param.safetensors"), COUNTER)


def test_a_number_is_merged(tmp_path):
    values = {"decoder.a": np.ones((4, 2), np.float32), "scale": np.array(3, np.float32)}
    for rank in range(2):
        save_rank(tmp_path / "ranks", rank, {"decoder.a": values["decoder.a"][:2], "scale": values["scale"]})
    strategy = {"decoder.a": Sharding((2,), (0, -1)), "scale": Sharding((2,), ())}
    run(jobs.unify(open_rank_files(tmp_path / "ranks", [strategy]), tmp_path / "out"))
    assert_same(contents(tmp_path / "out"), values)


@pytest.mark.parametrize("tensor_map", [(-1, -1, 0), (-1, 0, -1)])
def test_a_cut_that_no_parameter_of_qwen3_has(tmp_path, tensor_map):
    for rank in range(2):
        save_rank(tmp_path / "ranks", rank, {"decoder.a": np.ones((2, 2, 2), np.float32)})
    ranks = Ranks(tmp_path / "ranks", [{"decoder.a": Sharding((2,), tensor_map)}])
    assert "3 axes, cut along another than the first" in unwrapped(ranks.refusal())


def test_unify_keeps_zeros_and_nan(tmp_path):
    """What is moved may be an optimizer's state; the weights are looked at when they are exported."""
    values = {"decoder.a": np.zeros((4, 2), np.float32), "decoder.b": np.full((4, 2), np.nan, np.float32)}
    for rank in range(2):
        save_rank(tmp_path / "ranks", rank, {name: np.split(array, 2)[rank] for name, array in values.items()})
    ranks = open_rank_files(tmp_path / "ranks", [dict.fromkeys(values, Sharding((2,), (0, -1)))])
    run(jobs.unify(ranks, tmp_path / "out"))
    assert_same(contents(tmp_path / "out"), values)
    assert names(tmp_path / "out") == {"part0.safetensors", "param_name_map.json"}


def test_unify_keeps_the_layout_metadata(tmp_path):
    hf = random_tensors(GROUPS)
    whole = fused(hf, GROUPS, 2, 2)
    layout = "qkv=contiguous,gate_up=contiguous,tensor_parallel=2"
    for rank in range(2):
        metadata = {"mf_qwen3_bridge.layout": layout}
        save_rank(tmp_path / "ranks", rank, of_rank(whole, rank, 2), **metadata)
    strategy = {name: sharding_of(name, array, (2,)) for name, array in whole.items()}
    run(jobs.unify(open_rank_files(tmp_path / "ranks", [strategy]), tmp_path / "out"))
    assert layout_of(tmp_path / "out") == layout
    assert_same(contents(tmp_path / "out"), whole)


def rank_options(ranks: Ranks) -> tuple[object, ...]:
    return "--src_strategy_dirs", "strategy", "--mindspore_ckpt_dir", ranks.directory


def test_both_steps_as_the_documentation_has_them(tmp_path, call, call_script, strategies_of, with_adam):
    ranks, _ = with_adam
    strategies_of(ranks)
    filters = ("--filter_out_param_prefix", "adam_", "--has_redundancy", "False")
    step_1 = (*rank_options(ranks), "--output_dir", tmp_path / "merged", "--file_suffix", "1000_1", *filters)
    result = call(*step_1, command=unify_command)
    assert result.code == 0
    assert "to          MindFormers, merged, 19 tensors" in result.out
    merged = tmp_path / "merged" / "1000_1_ckpt_convert" / "unified_safe"
    assert names(merged) == {"part0.safetensors", "param_name_map.json", "hyper_param.safetensors"}
    paths = ("--input_path", merged, "--output_path", tmp_path / "hf")
    assert call_script("--model", "qwen3", "--reversed", *paths, *flags(NUMBERS["qwen3"]), "--dtype", "fp32").code == 0
    assert_same(contents(tmp_path / "hf"), random_tensors())


@pytest.mark.parametrize("ranks_in_yaml", [{}, on_ranks(2)], ids=["not declared", "declared"])
def test_merged_contiguous_ranks(tmp_path, call, call_script, strategies_of, ranks_in_yaml):
    """How many ranks there were is known, whether the YAML says it or not."""
    hf = random_tensors(GROUPS)
    ranks = save_ranks(tmp_path / "ranks", fused(hf, GROUPS, 2, 2))
    strategies_of(ranks)
    assert call("unify", *rank_options(ranks), "--output_dir", tmp_path).code == 0
    (tmp_path / "ckpt_convert" / "unified_safe").rename(tmp_path / "in")
    config = training_yaml(tmp_path / "train.yaml", CONTIGUOUS, **ranks_in_yaml)
    assert reverse(call_script, tmp_path, "qwen3", "--config", config).code == 0
    assert_same(contents(tmp_path / "out"), hf)
    shutil.rmtree(tmp_path / "out")
    write_config(tmp_path / "hf", hf_config(GROUPS))
    assert reverse(call_script, tmp_path, "qwen3", "--config", config, "--hf_config", tmp_path / "hf").code == 0
    assert_same(contents(tmp_path / "out"), hf)
    result = call(
        "export", *rank_options(ranks), "--output_path", tmp_path / "o", "--dtype", "fp32", "--config", config
    )
    assert result.code == 0
    assert_same(contents(tmp_path / "o"), hf)


def test_a_yaml_of_another_number_of_ranks(tmp_path, call, strategies_of):
    ranks = save_ranks(tmp_path / "ranks", fused(random_tensors(GROUPS), GROUPS, 2, 2))
    strategies_of(ranks)
    config = training_yaml(tmp_path / "train.yaml", CONTIGUOUS, **on_ranks(4))
    result = call("export", *rank_options(ranks), "--output_path", tmp_path / "out", "--config", config)
    assert (result.code, num_rows(result.err)) == (2, 1)
    assert f"{config} is not of this run" in result.err
    assert "model_parallel" in unwrapped(result.err) and "what the ranks saved: 2" in unwrapped(result.err)
    assert names(tmp_path) == {"ranks", "train.yaml"}


def test_both_steps_in_one(tmp_path, call, strategies_of, with_adam):
    ranks, _ = with_adam
    strategies_of(ranks)
    result = call("export", *rank_options(ranks), "--output_path", tmp_path / "hf", "--dtype", "fp32")
    assert result.code == 0
    assert "left out    39 tensors that are state of a training run" in result.out
    assert_same(contents(tmp_path / "hf"), random_tensors())


def test_unify_without_a_suffix(tmp_path, call, strategies_of, tp2):
    strategies_of(tp2)
    assert call("unify", *rank_options(tp2), "--output_dir", tmp_path / "merged").code == 0
    assert_same(contents(tmp_path / "merged" / "ckpt_convert" / "unified_safe"), fused(random_tensors()))


@pytest.mark.parametrize("name", ["export", "unify"])
def test_ranks_that_do_not_fit_are_refused(tmp_path, call, strategies_of, tp2, name):
    strategies_of(tp2)
    shutil.rmtree(tp2.directory / "rank_1")
    before = everything(tmp_path)
    output = ("--output_path" if name == "export" else "--output_dir", tmp_path / "out")
    result = call(name, *rank_options(tp2), *output)
    assert result.code == 2
    assert "1 of its 2 blocks in no rank's file" in unwrapped(result.err)
    assert everything(tmp_path) == before


def test_a_dry_run_of_unify(tmp_path, call, strategies_of, with_adam):
    ranks, _ = with_adam
    strategies_of(ranks)
    before = everything(tmp_path)
    result = call("unify", *rank_options(ranks), "--output_dir", tmp_path / "merged", "--dry_run")
    assert result.code == 0
    assert "from        ranks' files, 58 tensors\nto          MindFormers, merged, 57 tensors, " in result.out
    assert "largest     decoder.layers.0.self_attention.linear_qkv.weight (32, 12) F32, 1.5 KiB" in result.out
    assert everything(tmp_path) == before


@pytest.mark.parametrize("name", ["export", "unify"])
def test_no_strategy_files(tmp_path, call, tp2, name):
    output = ("--output_path" if name == "export" else "--output_dir", tmp_path / "out")
    folders = ("--mindspore_ckpt_dir", tp2.directory, "--src_strategy_dirs", tmp_path / "strategy")
    result = call(name, *folders, *output)
    assert (result.code, f"{tmp_path / 'strategy'} does not exist" in result.err) == (2, True)
    (tmp_path / "strategy").mkdir()
    result = call(name, *folders, *output)
    assert result.code == 2
    assert f"{tmp_path / 'strategy'} holds no ckpt_strategy_rank_N.ckpt: give the run's strategy folder" in result.err
    assert "a run on one card has none" in result.err
    assert names(tmp_path) == {"ranks", "strategy"}


def test_strategy_files_without_mindspore(tmp_path, monkeypatch, call, tp2):
    (tmp_path / "strategy").mkdir()
    (tmp_path / "strategy" / "ckpt_strategy_rank_0.ckpt").write_bytes(pickle.dumps(Touch()))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(strategies, "find_spec", lambda name: None)
    strategies._messages.cache_clear()
    folders = ("--mindspore_ckpt_dir", tp2.directory, "--src_strategy_dirs", tmp_path / "strategy")
    result = call("unify", *folders, "--output_dir", tmp_path / "out")
    assert (result.code, "mindspore is not installed: pip install" in result.err) == (2, True)
    assert names(tmp_path) == {"ranks", "strategy"}


def test_the_flags_of_unify():
    arguments = ["--src_strategy_dirs", "s", "--mindspore_ckpt_dir", "c", "--output_dir", "o"]
    assert unify_command.make_context("unify", arguments).params == {
        "src_strategy_dirs": Path("s"),
        "mindspore_ckpt_dir": Path("c"),
        "output_dir": Path("o"),
        "file_suffix": None,
        "filter_out_param_prefix": None,
        "file_format": "safetensors",
        "dry_run": False,
    }
    required = {option.opts[0] for option in unify_command.params if option.required}
    assert required == {"--src_strategy_dirs", "--mindspore_ckpt_dir", "--output_dir"}
