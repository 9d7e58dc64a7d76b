"""The files of a training run's ranks, read without MindSpore."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from mf_qwen3_bridge.convert import jobs
from mf_qwen3_bridge.convert.run import run
from mf_qwen3_bridge.inputs.opening import open_source
from mf_qwen3_bridge.inputs.preflight import check_trained
from mf_qwen3_bridge.inputs.rank_files import Sharding, open_rank_files
from tests.support.checkpoints import MOE_SPEC, assert_same, contents, hf_config, random_tensors
from tests.support.cli import names, num_rows
from tests.support.damage import unwrapped
from tests.support.trained import (
    CONTIGUOUS,
    FC2,
    GROUPS,
    TIED,
    TP2,
    Ranks,
    fused,
    of_rank,
    on_ranks,
    save_rank,
    save_ranks,
    sharding_of,
    training_yaml,
    write_config,
    write_merged,
)


@pytest.mark.parametrize(
    ("sharding", "expected"),
    [
        # tensor parallel 2: rows, columns, nothing
        (Sharding((2,), (0, -1)), [((0, 2), (0, 1)), ((1, 2), (0, 1))]),
        (Sharding((2,), (-1, 0)), [((0, 1), (0, 2)), ((0, 1), (1, 2))]),
        (Sharding((2,), (-1,)), [((0, 1),), ((0, 1),)]),
        # data parallel 2 x tensor parallel 2: neighbours hold different parts
        (Sharding((2, 2), (0,)), [((0, 2),), ((1, 2),), ((0, 2),), ((1, 2),)]),
        (Sharding((2, 2), (1,)), [((0, 2),), ((0, 2),), ((1, 2),), ((1, 2),)]),
        (Sharding((2, 2), (1, 0)), [((0, 2), (0, 2)), ((0, 2), (1, 2)), ((1, 2), (0, 2)), ((1, 2), (1, 2))]),
        # data, context, tensor parallel; only the last cuts
        (Sharding((2, 1, 2), (0,)), [((0, 2),), ((1, 2),), ((0, 2),), ((1, 2),)]),
        # an optimizer's shards: of what tensor parallel leaves, along the first axis
        (Sharding((2, 2), (0,), -1), [((0, 4),), ((2, 4),), ((1, 4),), ((3, 4),)]),
        (Sharding((2, 2), (-1, 0), 2), [((0, 2), (0, 2)), ((0, 2), (1, 2)), ((1, 2), (0, 2)), ((1, 2), (1, 2))]),
        (Sharding((2, 2), (-1,), -1), [((0, 4),), ((1, 4),), ((2, 4),), ((3, 4),)]),
        # among 2 of the 4 that hold the same
        (Sharding((4,), (-1,), 2), [((0, 2),), ((1, 2),), ((0, 2),), ((1, 2),)]),
        # experts on 4 devices: each its own, or two copies of each half
        (Sharding((1, 4), (0, -1)), [((0, 4), (0, 1)), ((1, 4), (0, 1)), ((2, 4), (0, 1)), ((3, 4), (0, 1))]),
        (Sharding((2, 2), (0, -1)), [((0, 2), (0, 1)), ((1, 2), (0, 1)), ((0, 2), (0, 1)), ((1, 2), (0, 1))]),
        (Sharding((2, 2), (0, -1), 2), [((0, 4), (0, 1)), ((2, 4), (0, 1)), ((1, 4), (0, 1)), ((3, 4), (0, 1))]),
        # a number
        (Sharding((2,), ()), [(), ()]),
        (Sharding((2,), (), -1), [(), ()]),
    ],
    ids=str,
)
def test_the_part_that_a_device_holds(sharding, expected):
    assert [sharding.place(device) for device in range(sharding.num_devices)] == expected


def test_the_number_of_parts():
    assert Sharding((4, 2), (-1, 0)).parts() == (1, 2)
    assert Sharding((4, 2), (1, -1), 2).parts() == (4, 1)
    assert Sharding((4, 2), ()).num_devices == 8


DP2_TP2 = ((2, 2), 4)


RUNS = pytest.mark.parametrize(
    ("run_of", "has_redundancy"),
    [(TP2, True), (TP2, False), (DP2_TP2, True), (DP2_TP2, False)],
    ids=["tp2", "tp2, no redundancy", "dp2 x tp2", "dp2 x tp2, no redundancy"],
)


@RUNS
def test_ranks_make_up_the_whole_tensors(tmp_path, run_of, has_redundancy):
    whole = fused(random_tensors())
    ranks = save_ranks(tmp_path / "ranks", whole, run_of, has_redundancy).open()
    assert {name: tensor.shape for name, tensor in ranks.tensors.items()} == {
        name: array.shape for name, array in whole.items()
    }
    assert ranks.nbytes == sum(array.nbytes for array in whole.values())
    assert ranks.tensor_parallel == 2
    assert ranks.unlisted.keys() == {"global_step"}
    assert ranks.metadata["format"] == "ms"


def test_what_is_declared_without_redundancy_is_whole_again(tmp_path):
    ranks = save_ranks(tmp_path / "ranks", fused(random_tensors()), DP2_TP2, has_redundancy=False).open()
    assert ranks.metadata == {"format": "ms"}


@RUNS
@pytest.mark.parametrize("blocks", [None, 2], ids=["interleaved", "contiguous"])
def test_an_export_from_ranks_is_that_of_the_merged(tmp_path, run_of, has_redundancy, blocks):
    hf = random_tensors(GROUPS)
    whole = fused(hf, GROUPS, blocks, blocks)
    config = training_yaml(tmp_path / "train.yaml", CONTIGUOUS if blocks else {})  # does not say on how many ranks
    ranks = save_ranks(tmp_path / "ranks", whole, run_of, has_redundancy).open()
    directory = write_config(tmp_path / "hf", hf_config(GROUPS))
    model = check_trained(ranks, directory, config)
    run(jobs.to_hf(model, tmp_path / "out"))
    on_two = training_yaml(tmp_path / "two.yaml", CONTIGUOUS if blocks else {}, **on_ranks(2))
    merged = open_source(write_merged(tmp_path / "merged", whole))
    run(jobs.to_hf(check_trained(merged, directory, on_two), tmp_path / "from_merged"))
    assert_same(contents(tmp_path / "out"), contents(tmp_path / "from_merged"))
    assert_same(contents(tmp_path / "out"), hf)
    assert names(tmp_path / "out") == names(tmp_path / "from_merged")


def test_experts_of_four_ranks(tmp_path):
    hf = random_tensors(MOE_SPEC)
    whole = fused(hf, MOE_SPEC)
    for rank in range(4):
        save_rank(tmp_path / "ranks", rank, of_rank(whole, rank, tp=2, ep=4))
    strategy = {name: sharding_of(name, array, (2, 2)) for name, array in whole.items()}
    strategy |= {name: Sharding((1, 4), (0, -1)) for name in whole if ".experts." in name}
    ranks = open_rank_files(tmp_path / "ranks", [strategy])
    model = check_trained(ranks)
    assert model.spec == MOE_SPEC
    run(jobs.to_hf(model, tmp_path / "out"))
    assert_same(contents(tmp_path / "out"), hf)


def test_an_optimizers_shards(tmp_path):
    """Rows 0-3 and 8-11 of tensor parallel rank 0 and 1 on the first data parallel rank, the others on the second."""
    embedding = np.arange(32, dtype=np.float32).reshape(16, 2)
    name = "embedding.word_embeddings.weight"
    for rank, first in enumerate((0, 8, 4, 12)):
        save_rank(tmp_path / "ranks", rank, {name: embedding[first : first + 4]})
    ranks = open_rank_files(tmp_path / "ranks", [{name: Sharding((2, 2), (0, -1), -1)}])
    run(jobs.unify(ranks, tmp_path / "out"))
    assert_same(contents(tmp_path / "out"), {name: embedding})


def test_the_places_of_many_devices_are_worked_out_once(tmp_path, monkeypatch):
    """Not for each parameter again: on 1,024 devices that took 10 ms each."""
    whole = {f"decoder.layers.{layer}.x.weight": np.ones((2, 3), np.float32) for layer in range(5)}
    for rank in range(64):
        save_rank(tmp_path / "ranks", rank, {name: array[rank % 2 :][:1] for name, array in whole.items()})
    original, asked = Sharding.place, []
    monkeypatch.setattr(Sharding, "place", lambda self, device: (asked.append(device), original(self, device))[1])
    ranks = open_rank_files(tmp_path / "ranks", [{name: Sharding((32, 2), (0, -1)) for name in whole}])
    assert {tensor.shape for tensor in ranks.tensors.values()} == {(2, 3)}
    assert len(asked) <= 64


def test_pipeline_stages(tmp_path):
    """The second stage has its own devices; a tied embedding is in both."""
    whole = fused(random_tensors(TIED), TIED)
    stages = [
        {name: array for name, array in whole.items() if ".1." not in name and "final" not in name},
        {name: array for name, array in whole.items() if ".0." not in name},
    ]
    for rank in range(4):
        save_rank(tmp_path / "ranks", rank, of_rank(stages[rank // 2], rank, tp=2))
    strategy = [{name: sharding_of(name, array, (2,)) for name, array in stage.items()} for stage in stages]
    ranks = Ranks(tmp_path / "ranks", strategy)
    run(jobs.unify(ranks.open(), tmp_path / "out"))
    assert_same(contents(tmp_path / "out"), whole)
    shutil.rmtree(tmp_path / "ranks" / "rank_3")
    assert "decoder.layers.1.mlp.linear_fc1.weight" in unwrapped(ranks.refusal())
    assert "decoder.layers.0" not in ranks.refusal()


def test_a_missing_rank(tp2):
    shutil.rmtree(tp2.directory / "rank_1")
    text = tp2.refusal()
    assert f"{tp2.directory} does not hold what the strategy files declare" in text
    assert "1 of its 2 blocks in no rank's file" in unwrapped(text)
    assert "is a rank's file of another step or run, or missing?" in unwrapped(text)
    assert "decoder.layers.{0..1}.mlp.linear_fc1.weight" in unwrapped(text)
    assert "layernorm" not in text  # rank 0 has all of it
    assert "| rank_1 " in text and "copy it from the machine that saved it" in unwrapped(text)


def test_a_rank_that_others_can_stand_in_for(tmp_path):
    whole = fused(random_tensors())
    ranks = save_ranks(tmp_path / "ranks", whole, DP2_TP2)
    shutil.rmtree(tmp_path / "ranks" / "rank_1")
    run(jobs.unify(ranks.open(), tmp_path / "out"))
    assert_same(contents(tmp_path / "out"), whole)


def test_a_rank_that_no_other_can_stand_in_for(tmp_path):
    ranks = save_ranks(tmp_path / "ranks", fused(random_tensors()), DP2_TP2, has_redundancy=False)
    shutil.rmtree(tmp_path / "ranks" / "rank_1")
    assert "of its 2 blocks in no rank's file" in unwrapped(ranks.refusal())
    assert "in no rank's file" in unwrapped(ranks.refusal())


def test_two_steps(tp2):
    tensors = fused(random_tensors(seed=1))
    for rank in range(2):
        save_rank(tp2.directory, rank, of_rank(tensors, rank, 2), "500_1")
    text = tp2.refusal()
    assert f"{tp2.directory} is not one run's checkpoint" in text
    assert "2 files: qwen3_rank_0-1000_1.safetensors, qwen3_rank_0-500_1.safetensors" in unwrapped(text)
    assert "2 files: qwen3_rank_1-1000_1.safetensors" in unwrapped(text)
    assert "choose with --file_suffix" in unwrapped(text)
    for suffix in ("500_1", "1000_1"):
        tensor = tp2.open(suffix).tensors["decoder.final_layernorm.weight"]
        assert tensor.file.name == f"qwen3_rank_0-{suffix}.safetensors"


@pytest.mark.parametrize("suffix", ["0_1", "00_1", "000_1", "1000", "1000_11", "1000_1.safetensors", ".*", "1000.1"])
def test_a_suffix_is_a_whole_one(tp2, suffix):
    text = tp2.refusal(suffix)
    assert "rank_0" in unwrapped(text) and "rank_1" in unwrapped(text)
    assert f"no file *{suffix}.safetensors" in unwrapped(text)
    assert "copy it, or choose another --file_suffix" in unwrapped(text)


def test_a_suffix_is_not_the_end_of_another(tp2):
    """``0_1`` is not ``1000_1``, which is beside it."""
    tensors = fused(random_tensors(seed=1))
    for rank in range(2):
        save_rank(tp2.directory, rank, of_rank(tensors, rank, 2), "0_1")
    files = {tensor.file.name for tensor in tp2.open("0_1").tensors.values()}
    assert files == {"qwen3_rank_0-0_1.safetensors"}


def test_a_rank_without_the_step(tp2):
    (tp2.directory / "rank_1" / "qwen3_rank_1-1000_1.safetensors").unlink()
    text = tp2.refusal()
    assert num_rows(text) == 1
    assert "rank_1" in unwrapped(text) and "no *.safetensors" in unwrapped(text)


def test_a_block_that_is_missing(tp2):
    whole = fused(random_tensors())
    mine = of_rank(whole, 1, tp=2)
    del mine["decoder.layers.1.mlp.linear_fc1.weight"], mine["decoder.final_layernorm.weight"]
    save_rank(tp2.directory, 1, mine)
    text = tp2.refusal()
    assert num_rows(text) == 1
    assert "decoder.layers.1.mlp.linear_fc1.weight" in unwrapped(text)
    assert "1 of its 2 blocks in no rank's file" in unwrapped(text)


def test_a_parameter_that_no_rank_has(tp2):
    tp2.strategies[0]["decoder.layers.2.mlp.linear_fc1.weight"] = Sharding((2,), (0, -1))
    text = tp2.refusal()
    assert num_rows(text) == 1
    assert "decoder.layers.2.mlp.linear_fc1.weight" in unwrapped(text)
    assert "in no rank's file" in unwrapped(text)


@pytest.mark.parametrize("change", [lambda array: array[:1], lambda array: array.astype(np.float16)])
def test_blocks_of_two_kinds(tp2, change):
    mine = of_rank(fused(random_tensors()), 1, tp=2)
    mine[FC2] = change(mine[FC2])
    save_rank(tp2.directory, 1, mine)
    text = tp2.refusal()
    assert num_rows(text) == 1
    assert FC2 in unwrapped(text)
    assert "not of one shape and dtype in all ranks' files" in unwrapped(text)


def test_a_block_of_other_axes(tp2):
    tp2.strategies[0]["decoder.final_layernorm.weight"] = Sharding((2,), (-1, -1))
    assert "shape (12,), 2 axes in the strategy files" in unwrapped(tp2.refusal())


def test_a_parameter_that_no_strategy_lists(tp2):
    for layer in range(2):
        del tp2.strategies[0][f"decoder.layers.{layer}.mlp.linear_fc1.weight"]
    text = tp2.refusal()
    assert num_rows(text) == 1
    assert "decoder.layers.{0..1}.mlp.linear_fc1.weight" in unwrapped(text)
    assert "in the ranks' files, in no strategy file" in unwrapped(text)
    assert "give the strategy files of this run, of all its stages" in unwrapped(text)


def test_a_rank_beyond_the_run(tp2):
    save_rank(tp2.directory, 2, of_rank(fused(random_tensors()), 0, tp=2))
    text = tp2.refusal()
    assert num_rows(text) == 1
    assert "rank_2" in unwrapped(text)
    assert "not in the strategy files' run" in unwrapped(text)
    assert "remove it, or give the strategy files of this run" in unwrapped(text)


def test_a_rank_whose_file_is_damaged(tp2):
    for rank in range(2):
        file = tp2.directory / f"rank_{rank}" / f"qwen3_rank_{rank}-1000_1.safetensors"
        file.write_bytes(file.read_bytes()[:-5])
    text = tp2.refusal()
    assert num_rows(text) == 2
    assert "truncated" in unwrapped(text) and "copy the file again" in unwrapped(text)


def test_no_ranks(tmp_path, tp2):
    nothing = tp2._replace(directory=tmp_path / "absent")
    assert f"{tmp_path / 'absent'} does not exist" in nothing.refusal()
    (tmp_path / "empty").mkdir()
    empty = tp2._replace(directory=tmp_path / "empty")
    assert f"{tmp_path / 'empty'} holds no rank_0, rank_1, ...: give the folder that does" in empty.refusal()
    inside = tp2._replace(directory=tp2.directory / "rank_0")
    assert "holds no rank_0, rank_1, ..." in inside.refusal()


def test_strategies_of_two_runs(tp2):
    tp2.strategies[0][FC2] = Sharding((4,), (-1, 0))
    assert "the strategy files are not of one run: stages of [2, 4] devices" in tp2.refusal()
