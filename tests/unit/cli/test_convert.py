"""``mf-qwen3 convert``, as a user types it."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from mf_qwen3_bridge.model.spec import ModelSpec
from mf_qwen3_bridge.transfer.copying import BUFFER_BYTES
from tests.support.checkpoints import (
    MOE_SPEC,
    NUMPY,
    SPEC,
    assert_same,
    contents,
    hf_config,
    random_tensors,
    write,
    write_headers,
)
from tests.support.cli import convert, everything, layout_of, names, num_rows
from tests.support.damage import unwrapped
from tests.support.trained import CONTIGUOUS, GROUPS, fused, of_rank, on_ranks, training_yaml, write_config


@pytest.mark.parametrize("layout", [(), ("--layout", "train")])
def test_convert_for_training(tmp_path, call, hf_dir, layout):
    assert convert(call, hf_dir, *layout).code == 0
    assert layout_of(tmp_path / "out") == "qkv=interleaved,gate_up=interleaved"
    assert_same(contents(tmp_path / "out"), fused(random_tensors(GROUPS), GROUPS))


def test_convert_for_inference(tmp_path, call, hf_dir):
    assert convert(call, hf_dir, "--layout", "infer").code == 0
    assert layout_of(tmp_path / "out") == "qkv=contiguous,gate_up=contiguous"
    assert_same(contents(tmp_path / "out"), fused(random_tensors(GROUPS), GROUPS, 1, 1))


def test_convert_experts_for_inference(tmp_path, call):
    hf = random_tensors(MOE_SPEC)
    assert convert(call, write(tmp_path / "hf", hf, hf_config(MOE_SPEC)), "--layout", "infer").code == 0
    expected = fused(hf, MOE_SPEC, 1)
    for layer in range(2):
        for name, shape in (("weight1", (4, 12, 12)), ("weight2", (4, 6, 12))):
            experts = f"decoder.layers.{layer}.mlp.experts.{name}"
            expected[experts] = expected[experts].reshape(shape)
    made = contents(tmp_path / "out")
    assert {name: array.shape for name, array in made.items()} == {n: array.shape for n, array in expected.items()}
    assert_same(made, expected)


@pytest.mark.parametrize(("layout", "blocks"), [("train", 2), ("infer", 1)])
def test_convert_by_the_yamls_flags(tmp_path, call, hf_dir, layout, blocks):
    """They are of the training network; the inference network's layout does not depend on them."""
    config = training_yaml(tmp_path / "train.yaml", CONTIGUOUS, **on_ranks(2))
    assert convert(call, hf_dir, "--config", config, "--layout", layout).code == 0
    assert_same(contents(tmp_path / "out"), fused(random_tensors(GROUPS), GROUPS, blocks, blocks))


def test_weights_in_another_directory_than_the_config(tmp_path, call):
    hf = write_config(tmp_path / "hf", hf_config())
    weights = write(tmp_path / "weights", random_tensors(seed=3))
    assert convert(call, hf, "--load_checkpoint", weights).code == 0
    assert_same(contents(tmp_path / "out"), fused(random_tensors(seed=3)))


@pytest.mark.parametrize(
    ("dtype", "numpy_dtype"), [("bf16", ml_dtypes.bfloat16), ("fp16", np.float16), ("fp32", np.float32)]
)
def test_dtypes(tmp_path, call, hf_dir, dtype, numpy_dtype):
    assert convert(call, hf_dir, "--dtype", dtype).code == 0
    expected = {name: t.astype(numpy_dtype) for name, t in fused(random_tensors(GROUPS), GROUPS).items()}
    assert_same(contents(tmp_path / "out"), expected)


def test_training_ranks_of_a_dense_model(tmp_path, call, hf_dir):
    assert convert(call, hf_dir, "--tp", 2).code == 0
    whole = fused(random_tensors(GROUPS), GROUPS)
    assert names(tmp_path / "out") == {"rank_0", "rank_1"}
    for rank in range(2):
        assert names(tmp_path / "out" / f"rank_{rank}") == {f"qwen3_rank_{rank}-0_0.safetensors"}
        mine = contents(tmp_path / "out" / f"rank_{rank}")
        assert_same(mine, of_rank(whole, rank, tp=2))
        prefix = "decoder.layers.1"
        assert mine["embedding.word_embeddings.weight"].shape == mine["output_layer.weight"].shape == (8, 12)
        assert mine[f"{prefix}.self_attention.linear_qkv.weight"].shape == (16, 12)
        assert mine[f"{prefix}.self_attention.linear_proj.weight"].shape == (12, 8)
        assert mine[f"{prefix}.mlp.linear_fc1.weight"].shape == (10, 12)
        assert mine[f"{prefix}.mlp.linear_fc2.weight"].shape == (12, 5)
        assert mine[f"{prefix}.self_attention.q_layernorm.weight"].shape == (2,)


def test_training_ranks_of_a_contiguous_run(tmp_path, call, hf_dir):
    config = training_yaml(tmp_path / "train.yaml", CONTIGUOUS, **on_ranks(2))
    assert convert(call, hf_dir, "--tp", 2, "--config", config).code == 0
    hf = random_tensors(GROUPS)
    for rank in range(2):
        mine = contents(tmp_path / "out" / f"rank_{rank}")
        q, k, v = (np.split(hf[f"model.layers.1.self_attn.{part}_proj.weight"], 2)[rank] for part in "qkv")
        gate, up = (np.split(hf[f"model.layers.1.mlp.{part}_proj.weight"], 2)[rank] for part in ("gate", "up"))
        qkv = mine["decoder.layers.1.self_attention.linear_qkv.weight"]
        np.testing.assert_array_equal(qkv, np.concatenate([q, k, v]))
        np.testing.assert_array_equal(mine["decoder.layers.1.mlp.linear_fc1.weight"], np.concatenate([gate, up]))
        layout = layout_of(tmp_path / "out" / f"rank_{rank}")
        assert layout == "qkv=contiguous,gate_up=contiguous,tensor_parallel=2"


@pytest.mark.parametrize(("tp", "ep", "ranks"), [(1, 2, 2), (2, 2, 2), (2, 4, 4), (2, 1, 2)])
def test_training_ranks_of_a_model_with_experts(tmp_path, call, tp, ep, ranks):
    hf = random_tensors(MOE_SPEC)
    assert convert(call, write(tmp_path / "hf", hf, hf_config(MOE_SPEC)), "--tp", tp, "--ep", ep).code == 0
    assert names(tmp_path / "out") == {f"rank_{rank}" for rank in range(ranks)}
    for rank in range(ranks):
        (file,) = (tmp_path / "out" / f"rank_{rank}").iterdir()
        assert file.name == f"qwen3_moe_rank_{rank}-0_0.safetensors"
        assert_same(load_file(file), of_rank(fused(hf, MOE_SPEC), rank, tp, ep))


def test_inference_ranks(tmp_path, call, hf_dir):
    assert convert(call, hf_dir, "--layout", "infer", "--tp", 2).code == 0
    hf = random_tensors(GROUPS)
    for rank in range(2):
        mine = contents(tmp_path / "out" / f"rank_{rank}")
        q, k, v = (hf[f"model.layers.0.self_attn.{part}_proj.weight"] for part in "qkv")
        heads, groups = slice(8 * rank, 8 * rank + 8), slice(4 * rank, 4 * rank + 4)
        expected = np.concatenate([q[heads], k[groups], v[groups]])
        np.testing.assert_array_equal(mine["decoder.layers.0.self_attention.linear_qkv.weight"], expected)
        gate, up = (hf[f"model.layers.0.mlp.{part}_proj.weight"] for part in ("gate", "up"))
        half = slice(5 * rank, 5 * rank + 5)
        expected = np.concatenate([gate[half], up[half]])
        np.testing.assert_array_equal(mine["decoder.layers.0.mlp.linear_fc1.weight"], expected)


@pytest.mark.parametrize("layout", ["train", "infer"])
@pytest.mark.parametrize("row", [0, -1], ids=["first", "last"])
def test_every_row_of_a_tied_output_layer_is_compared(tmp_path, call, layout, row):
    """Also the rows that another rank than the first holds."""
    tied = replace(GROUPS, tie_word_embeddings=True)
    hf = random_tensors(tied)
    hf["lm_head.weight"] = hf["model.embed_tokens.weight"].copy()
    hf["lm_head.weight"][row] += 1
    directory = write(tmp_path / "hf", hf, hf_config(tied))
    result = convert(call, directory, "--layout", layout, "--tp", 2)
    assert (result.code, num_rows(result.err)) == (2, 1)
    assert "tied tensors differ" in result.err
    assert names(tmp_path) == {"hf"}


def test_more_inference_ranks_than_kv_heads(tmp_path, call):
    """Two ranks share a KV head: both hold it."""
    spec = replace(SPEC, ffn_hidden_size=12)
    hf = random_tensors(spec)
    directory = write(tmp_path / "hf", hf, hf_config(spec))
    assert convert(call, directory, "--layout", "infer", "--tp", 4).code == 0
    q, k, v = (hf[f"model.layers.0.self_attn.{part}_proj.weight"] for part in "qkv")
    for rank, group in enumerate((0, 0, 1, 1)):
        (file,) = (tmp_path / "out" / f"rank_{rank}").iterdir()
        expected = [q[4 * rank : 4 * rank + 4], k[4 * group : 4 * group + 4], v[4 * group : 4 * group + 4]]
        qkv = load_file(file)["decoder.layers.0.self_attention.linear_qkv.weight"]
        np.testing.assert_array_equal(qkv, np.concatenate(expected))


@pytest.mark.parametrize(
    ("spec", "arguments", "expected"),
    [
        (
            SPEC,
            ("--tp", 3, "--ep", 2),
            [
                "expert parallel vocab_size num_query_groups num_attention_heads ffn_hidden_size",
                "2 16, tensor parallel 3 2, tensor parallel 3 4, tensor parallel 3 10, tensor parallel 3",
                "the model has no experts: leave it out",
                "use a size that divides the whole model: 1, 2",
            ],
        ),
        (
            SPEC,
            ("--tp", 3, "--layout", "infer"),
            [
                "vocab_size num_query_groups num_attention_heads ffn_hidden_size",
                "16, tensor parallel 3 2, tensor parallel 3 4, tensor parallel 3 10, tensor parallel 3",
                "use a size that divides the whole model: 1, 2",  # 4 heads, but ffn_hidden_size is 10
            ],
        ),
        (
            MOE_SPEC,
            ("--tp", 4, "--ep", 3),
            [
                "num_query_groups num_experts",
                "2, tensor parallel 4 4, expert parallel 3",
                "divides the whole model: 1, 2",
                "divides the whole model: 1, 2, 4",
            ],
        ),
        (
            MOE_SPEC,
            ("--tp", 2, "--ep", 4, "--layout", "infer"),
            ["expert parallel", "4, number of processes 2", "it has to divide them"],
        ),
    ],
    ids=["dense-train", "dense-infer", "moe-train", "moe-infer"],
)
def test_sizes_that_do_not_divide_the_model(tmp_path, call, spec, arguments, expected):
    write(tmp_path / "hf", random_tensors(spec), hf_config(spec))
    before = everything(tmp_path)
    result = convert(call, tmp_path / "hf", *arguments)
    assert (result.code, result.out) == (2, "")
    assert "the model can't be divided like this" in result.err
    for text in expected:
        assert text in unwrapped(result.err)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("flags_of_layout", [CONTIGUOUS, {}], ids=["contiguous", "default layout"])
def test_tensor_parallel_that_is_not_the_yamls(tmp_path, call, hf_dir, flags_of_layout):
    config = training_yaml(tmp_path / "train.yaml", flags_of_layout, **on_ranks(4))
    result = convert(call, hf_dir, "--tp", 2, "--config", config)
    assert result.code == 2
    assert f"--tp and --ep do not cut what a run with {config} reads" in result.err
    assert "model_parallel 4" in unwrapped(result.err) and "| --tp " in result.err
    assert names(tmp_path) == {"hf", "train.yaml"}
    assert convert(call, hf_dir, "--tp", 2, "--config", config, "--layout", "infer").code == 0


def test_sizes_that_are_not_the_yamls(tmp_path, call):
    """Expert parallel too, and those of a predict YAML for the inference layout."""
    directory = write(tmp_path / "hf", random_tensors(MOE_SPEC), hf_config(MOE_SPEC))
    sizes = {"use_parallel": True, "parallel_config": {"model_parallel": 2, "expert_parallel": 2}}
    train = training_yaml(tmp_path / "train.yaml", {}, **sizes)
    predict = training_yaml(tmp_path / "predict.yaml", {}, run_mode="predict", **sizes)
    for config, layout in ((train, "train"), (predict, "infer")):
        result = convert(call, directory, "--tp", 1, "--ep", 1, "--config", config, "--layout", layout)
        assert result.code == 2
        assert "| --tp " in result.err and "| --ep " in result.err
        assert "model_parallel 2" in unwrapped(result.err) and "expert_parallel 2" in unwrapped(result.err)
    assert names(tmp_path) == {"hf", "train.yaml", "predict.yaml"}
    assert convert(call, directory, "--tp", 2, "--config", train).code == 0  # the YAML says the other
    assert names(tmp_path / "out") == {"rank_0", "rank_1"}
    (file,) = (tmp_path / "out" / "rank_1").iterdir()
    rows = MOE_SPEC.num_experts // 2 * MOE_SPEC.hidden_size
    assert len(load_file(file)["decoder.layers.0.mlp.experts.weight1"]) == rows


@pytest.mark.parametrize(
    ("document", "named"),
    [
        ({"parallel_config": {"pipeline_stage": 2}}, "parallel_config.pipeline_stage"),
        ({"parallel_config": {"context_parallel": 4}}, "parallel_config.context_parallel"),
        ({"parallel": {"enable_parallel_optimizer": True}}, "parallel.enable_parallel_optimizer"),
    ],
)
def test_a_yaml_whose_ranks_hold_other_slices(tmp_path, call, hf_dir, document, named):
    config = training_yaml(tmp_path / "train.yaml", {}, **document)
    result = convert(call, hf_dir, "--tp", 2, "--config", config)
    assert (result.code, num_rows(result.err)) == (2, 1)
    assert named in unwrapped(result.err)
    assert "convert without --tp and --ep" in unwrapped(result.err)
    assert names(tmp_path) == {"hf", "train.yaml"}
    assert convert(call, hf_dir, "--config", config).code == 0


QWEN3_8B = ModelSpec(
    num_layers=36,
    hidden_size=4096,
    num_attention_heads=32,
    num_query_groups=8,
    head_dim=128,
    ffn_hidden_size=12288,
    vocab_size=151936,
    tie_word_embeddings=False,
)


@pytest.fixture
def large_disk(monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 50))


def test_a_dry_run_of_8b(tmp_path, call, large_disk):
    directory = write_headers(tmp_path / "hf", QWEN3_8B, hf_config(QWEN3_8B), shards=5)
    result = convert(call, directory, "--dry_run")
    assert result.code == 0
    before, after, files, largest, memory, *_, last = result.out.splitlines()
    assert before == "from        Hugging Face, 399 tensors"
    assert after == "to          MindFormers (qkv=interleaved,gate_up=interleaved), 291 tensors, 15.26 GiB in 6 files"
    parts = ", ".join(f"part{number}.safetensors" for number in range(6))
    assert files == f"            {tmp_path / 'out'}: param_name_map.json, {parts}"
    assert largest == "largest     embedding.word_embeddings.weight (151936, 4096) BF16, 1.16 GiB"
    assert memory == f"memory      at most {BUFFER_BYTES / 2**20:.1f} MiB of buffers"
    assert last == "result      nothing was written (--dry_run)"
    assert names(tmp_path) == {"hf"}


def test_a_dry_run_for_ranks(tmp_path, call, large_disk):
    directory = write_headers(tmp_path / "hf", QWEN3_8B, hf_config(QWEN3_8B), shards=5)
    result = convert(call, directory, "--dry_run", "--tp", 4, "--dtype", "fp32")
    assert result.code == 0
    assert "1164 tensors for 4 ranks, 30.52 GiB in 4 files" in result.out
    assert "largest     embedding.word_embeddings.weight (37984, 4096) F32, 593.5 MiB" in result.out
    assert names(tmp_path) == {"hf"}


def test_a_dry_run_reports_that_the_place_is_taken(tmp_path, call, hf_dir):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    before = everything(tmp_path)
    result = convert(call, hf_dir, "--dry_run")
    assert result.code == 2
    assert "is not empty" in result.err
    assert "nothing was written" not in result.out
    assert everything(tmp_path) == before


def test_what_is_printed_when_all_is_done(tmp_path, call, hf_dir):
    tensors = random_tensors(GROUPS)
    result = convert(call, hf_dir, "--dtype", "bf16")
    values = sum(array.size for array in tensors.values())
    rounded = sum(int((a.astype(NUMPY["BF16"]).astype(np.float32) != a).sum()) for a in tensors.values())
    cast, written = result.out.splitlines()[-2:]
    assert cast == f"cast        F32 to BF16: {rounded} of {values} values rounded, 0 of them to zero"
    (file,) = (tmp_path / "out").glob("*.safetensors")
    size = f"{file.stat().st_size / 1024:.1f}"
    assert re.fullmatch(
        rf"written     19 tensors, {size} KiB in \d+\.\d s, [\d.]+ [KMG]iB/s, peak memory [\d.]+ [MG]iB", written
    )
    assert "result" not in result.out
    assert result.err == ""


def test_what_is_printed_before_anything_is_read(tmp_path, call, hf_dir):
    result = convert(call, hf_dir, "--layout", "infer")
    size = f"{(tmp_path / 'out' / 'part0.safetensors').stat().st_size / 1024:.1f}"
    assert result.out.splitlines()[:3] == [
        "from        Hugging Face, 25 tensors",
        f"to          MindFormers (qkv=contiguous,gate_up=contiguous), 19 tensors, {size} KiB in 1 file",
        f"            {tmp_path / 'out'}: param_name_map.json, part0.safetensors",
    ]
    assert "cast" not in result.out
