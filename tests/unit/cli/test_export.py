"""``mf-qwen3 export``, as a user types it."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.support.checkpoints import SPEC, assert_same, contents, hf_config, random_tensors, write
from tests.support.cli import everything, export, names, num_rows
from tests.support.damage import unwrapped
from tests.support.trained import CONTIGUOUS, GROUPS, TIED, fused, in_bf16, training_yaml, write_config, write_merged


@pytest.mark.parametrize(
    "given",
    [
        (),
        ("--input_path", "merged", "--mindspore_ckpt_dir", "ranks", "--src_strategy_dirs", "strategy"),
        ("--input_path", "merged", "--mindspore_ckpt_dir", "ranks"),
        ("--input_path", "merged", "--src_strategy_dirs", "strategy"),
        ("--mindspore_ckpt_dir", "ranks"),
        ("--src_strategy_dirs", "strategy"),
    ],
    ids=" ".join,
)
def test_one_source_is_named(tmp_path, call, given):
    result = call("export", "--output_path", tmp_path / "out", *given)
    assert result.code == 2
    assert "give --input_path, or --mindspore_ckpt_dir and --src_strategy_dirs" in result.err
    assert names(tmp_path) == set()


def test_an_output_is_named(call, trained):
    result = call("export", "--input_path", trained)
    assert (result.code, "Missing option '--output_path'" in result.err) == (2, True)


def test_an_export_is_a_complete_directory(tmp_path, call, trained):
    companions = {
        "generation_config": '{"top_k": 7}',
        "tokenizer": '{"t": 1}',
        "tokenizer_config": '{"c": 2}',
        "vocab": "{}",
        "special_tokens_map": "[]",
        "unrelated": "{}",
    }
    hf = write_config(tmp_path / "hf", hf_config(rope_theta=77, custom="kept"), **companions)
    (hf / "merges.txt").write_text("a b")
    (hf / "chat_template.jinja").write_text("{{ x }}")
    (hf / "pytorch_model.bin").write_text("pickle")
    assert export(call, trained, "--hf_config", hf).code == 0
    assert names(tmp_path / "out") == {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
        "special_tokens_map.json",
        "merges.txt",
        "chat_template.jinja",
    }
    for name in names(tmp_path / "out") - {"model.safetensors", "config.json"}:
        assert (tmp_path / "out" / name).read_text() == (hf / name).read_text()
    expected = hf_config(rope_theta=77, custom="kept", torch_dtype="bfloat16")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == expected
    assert_same(contents(tmp_path / "out"), in_bf16(random_tensors()))


def test_without_any_config_there_is_none(tmp_path, call, trained):
    result = export(call, trained)
    assert result.code == 0
    assert "no config.json is written: rope_theta and the like are not known" in result.out
    assert "--hf_config" in result.out
    assert names(tmp_path / "out") == {"model.safetensors"}


def test_a_config_beside_the_weights_is_used(tmp_path, call, trained):
    write_config(trained, hf_config(rope_theta=77), tokenizer="{}")
    result = export(call, trained)
    assert result.code == 0
    assert names(tmp_path / "out") == {"model.safetensors", "config.json", "tokenizer.json"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rope_theta"] == 77


def test_no_tokenizer(tmp_path, call, trained):
    result = export(call, trained, "--hf_config", write_config(tmp_path / "hf", hf_config()))
    assert result.code == 0
    assert f"no tokenizer is written: there is none in {tmp_path / 'hf'}" in result.out


def test_a_config_of_another_model(tmp_path, call, trained):
    write_config(tmp_path / "hf", hf_config(num_hidden_layers=3, vocab_size=17))
    result = export(call, trained, "--hf_config", tmp_path / "hf")
    assert (result.code, num_rows(result.err)) == (2, 2)
    assert "config.json: 3 weights: 2 (layers.1)" in unwrapped(result.err)
    assert "config.json: 17 weights: 16 (" in unwrapped(result.err)
    assert names(tmp_path) == {"hf", "trained"}


def test_a_config_that_is_not_there(tmp_path, call, trained):
    result = export(call, trained, "--hf_config", tmp_path / "absent")
    assert (result.code, f"{tmp_path / 'absent'} is not a directory" in result.err) == (2, True)
    (tmp_path / "empty").mkdir()
    result = export(call, trained, "--hf_config", tmp_path / "empty")
    assert (result.code, f"{tmp_path / 'empty' / 'config.json'} is missing" in result.err) == (2, True)


@pytest.mark.parametrize(
    ("metadata", "document", "model_config", "is_assumed"),
    [
        ({}, None, {}, True),
        ({"mf_qwen3_bridge.layout": "qkv=interleaved,gate_up=interleaved"}, None, {}, False),
        ({}, {"run_mode": "train"}, {}, False),
        ({}, {"run_mode": "predict"}, {}, True),
        (
            {},
            {"run_mode": "predict"},
            {"use_contiguous_weight_layout_attention": False, "use_interleaved_weight_layout_mlp": True},
            False,
        ),
        ({}, {"run_mode": "predict"}, {"use_contiguous_weight_layout_attention": False}, True),
    ],
    ids=["nothing", "layout metadata", "training YAML", "predict YAML", "both flags", "one flag"],
)
def test_a_layout_that_is_assumed_is_reported(tmp_path, call, metadata, document, model_config, is_assumed):
    trained = write_merged(tmp_path / "trained", fused(random_tensors()), metadata=metadata)
    config = ()
    if document:
        config = ("--config", training_yaml(tmp_path / "some.yaml", model_config, **document))
    result = export(call, trained, *config)
    assert result.code == 0
    note = "the layout of QKV and gate/up is assumed to be MindFormers' default (qkv=interleaved,gate_up=interleaved)"
    assert (note in result.out) == is_assumed
    assert_same(contents(tmp_path / "out"), in_bf16(random_tensors()))


@pytest.mark.parametrize("blocks", [1, 2])
def test_flags_declare_the_layout_where_there_is_no_yaml(tmp_path, call, blocks):
    hf = random_tensors()
    trained = write_merged(tmp_path / "trained", fused(hf, SPEC, blocks, blocks))
    flags_of_layout = [part for flag, value in CONTIGUOUS.items() for part in (f"--{flag}", value)]
    result = export(call, trained, *flags_of_layout, "--model_parallel", blocks)
    assert (result.code, "warning" in result.out) == (0, False)
    assert_same(contents(tmp_path / "out"), in_bf16(hf))
    config = training_yaml(tmp_path / "some.yaml", {}, run_mode="finetune")
    result = export(call, trained, *flags_of_layout, "--config", config)
    assert result.code == 2
    assert "arguments and YAML contradict each other" in result.err


@pytest.mark.parametrize(
    "model_config",
    [{"use_contiguous_weight_layout_attention": True}, CONTIGUOUS],
    ids=["one flag", "both flags, ranks unknown"],
)
def test_a_flag_that_a_predict_yaml_contradicts(tmp_path, call, trained, model_config):
    """Such a YAML does not declare the whole layout; of the flag that it has, it may not be overruled silently."""
    config = training_yaml(tmp_path / "some.yaml", model_config, run_mode="predict")
    result = export(call, trained, "--use_contiguous_weight_layout_attention", "false", "--config", config)
    assert result.code == 2
    assert "arguments and YAML contradict each other" in result.err
    assert names(tmp_path) == {"some.yaml", "trained"}
    assert export(call, trained, "--use_contiguous_weight_layout_attention", "true", "--config", config).code == 0


def test_the_weights_that_a_run_began_with_show_the_layout(tmp_path, call):
    hf = random_tensors(GROUPS)
    write(tmp_path / "hf", hf, hf_config(GROUPS))
    right = write_merged(tmp_path / "right", fused(hf, GROUPS))
    wrong = write_merged(tmp_path / "wrong", fused(hf, GROUPS, 1, 1))
    result = export(call, wrong, "--hf_config", tmp_path / "hf")
    assert result.code == 2
    assert f"{wrong} is in another layout than" in result.err
    assert "use_contiguous_weight_layout_attention True" in unwrapped(result.err)
    assert names(tmp_path) == {"hf", "right", "wrong"}
    result = export(call, right, "--hf_config", tmp_path / "hf")
    assert result.code == 0
    assert "is assumed to be" not in result.out


def test_max_shard_size(tmp_path, call, trained):
    assert export(call, trained, "--max_shard_size", "1.5KB").code == 0
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert index["metadata"]["total_size"] == 2 * sum(array.size for array in random_tensors().values())
    loaded = {file.name: load_file(file) for file in files}
    sizes = {name: sum(array.nbytes for array in tensors.values()) for name, tensors in loaded.items()}
    assert len(files) > 2 and max(sizes.values()) <= 1500
    assert {name for name, file in index["weight_map"].items() if name in loaded[file]} == random_tensors().keys()


@pytest.mark.parametrize("size", ["5 apples", "0", "-1GB"])
def test_a_shard_size_that_is_none(tmp_path, call, trained, size):
    result = export(call, trained, f"--max_shard_size={size}")
    assert (result.code, f"{size!r} is no size" in result.err) == (2, True)
    assert names(tmp_path) == {"trained"}


@pytest.mark.parametrize("is_asked", [True, False])
def test_write_tied_lm_head(tmp_path, call, is_asked):
    hf = random_tensors(TIED)
    trained = write_merged(tmp_path / "trained", fused(hf, TIED))
    assert export(call, trained, *["--write_tied_lm_head"] * is_asked).code == 0
    expected = hf | ({"lm_head.weight": hf["model.embed_tokens.weight"]} if is_asked else {})
    assert_same(contents(tmp_path / "out"), in_bf16(expected))


def test_write_tied_lm_head_of_an_untied_model(tmp_path, call, trained):
    assert export(call, trained, "--write_tied_lm_head").code == 0
    assert_same(contents(tmp_path / "out"), in_bf16(random_tensors()))


@pytest.mark.parametrize("has_index", [True, False])
def test_what_a_run_keeps_beside_the_weights(tmp_path, call, has_index):
    """An optimizer's state is left out, and hyper_param.safetensors is not read."""
    tensors = fused(random_tensors())
    state = {f"{moment}.{name}": array + 1 for name, array in tensors.items() for moment in ("adam_m", "adam_v")}
    state |= {"global_step": np.array([7], np.int32), "loss_scale": np.ones(1, np.float32)}
    trained = write_merged(tmp_path / "trained", tensors | state, files=2)
    (trained / "hyper_param.safetensors").write_bytes(b"not even a header")
    if not has_index:
        (trained / "param_name_map.json").unlink()
    result = export(call, trained)
    assert result.code == 0
    assert "left out    40 tensors that are state of a training run: adam_m.decoder." in result.out
    assert_same(contents(tmp_path / "out"), in_bf16(random_tensors()))


def test_a_single_file(tmp_path, call, trained):
    assert call("export", "--input_path", trained / "part0.safetensors", "--output_path", tmp_path / "out").code == 0
    assert_same(contents(tmp_path / "out"), in_bf16(random_tensors()))


def test_hugging_face_weights_are_not_exported(tmp_path, call, hf_dir):
    result = export(call, hf_dir)
    assert (result.code, f"{hf_dir} holds Hugging Face weights already" in result.err) == (2, True)
    assert names(tmp_path) == {"hf"}


def test_a_dry_run_of_an_export(tmp_path, call, trained):
    before = everything(tmp_path)
    result = export(call, trained, "--dry_run", "--dtype", "fp32")
    assert result.code == 0
    before_all, after, files, largest, memory, *_ = result.out.splitlines()
    assert before_all == "from        MindFormers (qkv=interleaved,gate_up=interleaved), 19 tensors"
    assert re.fullmatch(r"to          Hugging Face, 25 tensors, \d+\.\d KiB in 1 file", after)
    assert files == f"            {tmp_path / 'out'}: model.safetensors"
    assert largest.startswith("largest     model.embed_tokens.weight (16, 12) F32, ")
    assert memory.startswith("memory      at most ")
    result_line, warning = result.out.splitlines()[-2:]
    assert result_line == "result      nothing was written (--dry_run)"
    assert warning.startswith("warning     the layout of QKV and gate/up is assumed")
    assert everything(tmp_path) == before
