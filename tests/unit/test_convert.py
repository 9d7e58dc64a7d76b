"""Whole directories, there and back: the same bits, and what a user finds beside them."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from mf_qwen3_bridge.convert import file_layout as files_module
from mf_qwen3_bridge.convert.file_layout import hf_files, mindformers_files, output_file, parse_size
from mf_qwen3_bridge.convert.jobs import to_hf, to_mindformers
from mf_qwen3_bridge.convert.run import Job, Part, describe, run
from mf_qwen3_bridge.errors import BridgeError
from mf_qwen3_bridge.inputs.opening import open_source
from mf_qwen3_bridge.inputs.preflight import check, check_trained
from mf_qwen3_bridge.model.rules import HF, HF_STACKED, INFER, TRAIN, Dialect, hf_dialect, model_rules
from mf_qwen3_bridge.transfer import tiles
from mf_qwen3_bridge.transfer.plan import Target, make_plan
from tests.support.checkpoints import (
    LAYOUTS,
    MOE_SPEC,
    NUMPY,
    SPEC,
    assert_same,
    contents,
    hf_config,
    random_tensors,
    write,
)

SPECS = {
    "dense": SPEC,
    "moe": MOE_SPEC,
    "tied": replace(SPEC, tie_word_embeddings=True),
    "tied_moe": replace(MOE_SPEC, tie_word_embeddings=True),
}


@pytest.mark.parametrize("target", [INFER, *(Dialect(layout) for layout in LAYOUTS)], ids=str)
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("name", SPECS)
def test_there_and_back(tmp_path: Path, name, dtype, target):
    spec = SPECS[name]
    hf = random_tensors(spec, dtype=dtype)
    directory = write(tmp_path / "hf", hf, hf_config(spec), shards=3)
    run(to_mindformers(check(directory), target, tmp_path / "mf"))
    made = open_source(tmp_path / "mf")
    assert made.metadata["mf_qwen3_bridge.layout"] == str(target.layout)
    assert {tensor.dtype for tensor in made.tensors.values()} == {dtype}
    run(to_hf(check_trained(open_source(tmp_path / "mf"), directory), tmp_path / "back"))
    assert_same(contents(tmp_path / "back"), hf)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    source=st.sampled_from([HF, HF_STACKED, INFER, *map(Dialect, LAYOUTS)]),
    target=st.sampled_from([HF, HF_STACKED, INFER, *map(Dialect, LAYOUTS)]),
    name=st.sampled_from(list(SPECS)),
    dtypes=st.tuples(st.sampled_from(["BF16", "F32"]), st.sampled_from(["BF16", "F32", None])),
    file_bytes=st.sampled_from([1, 500, 3000, 10**9]),
    tile_bytes=st.sampled_from([8, 100, 1 << 20]),
)
def test_files_hold_what_the_plan_makes(tmp_path_factory, source, target, name, dtypes, file_bytes, tile_bytes):
    """Between any two dialects, in files and tiles of any size."""
    directory = tmp_path_factory.mktemp("job")
    spec, (dtype, wanted) = SPECS[name], dtypes
    write(directory / "source", random_tensors(spec, source, dtype))
    plan = make_plan(model_rules(spec), open_source(directory / "source").tensors, source, target, wanted)
    make = hf_files if target.is_hf else mindformers_files
    files, index = make(plan, max_bytes=file_bytes)
    expected = {made.name: made.make() for made in plan.targets}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "TILE_BYTES", tile_bytes)
        summary = run(Job("a", 0, "b", directory / "out", (Part.of(plan, files),), index))
    assert summary and summary.num_tensors == len(expected)
    assert_same(contents(directory / "out"), expected)
    assert len(files) == len(list((directory / "out").glob("*.safetensors")))


def test_shards_as_hugging_face_makes_them(tmp_path: Path):
    def target(name, size, dtype="F16"):
        return Target(name, (size,), dtype, ())

    plan = make_plan((), {}, TRAIN, HF)
    plan = replace(plan, targets=tuple(target(name, size) for name, size in zip("abcde", (20, 30, 60, 10, 5))))
    files, index = hf_files(plan, max_bytes=100)
    assert [(file.name, list(file.tensors)) for file in files] == [
        ("model-00001-of-00003.safetensors", ["a", "b"]),
        ("model-00002-of-00003.safetensors", ["c"]),  # larger than a shard by itself
        ("model-00003-of-00003.safetensors", ["d", "e"]),
    ]
    content = json.loads(index["model.safetensors.index.json"])
    assert content["metadata"] == {"total_size": 250}
    assert content["weight_map"]["c"] == "model-00002-of-00003.safetensors"
    (single,), no_index = hf_files(plan)
    assert (single.name, no_index) == ("model.safetensors", {})


def test_each_tensor_of_a_file_is_aligned(tmp_path: Path):
    """torch refuses a float32 tensor that begins in the middle of one."""
    file = output_file("x.safetensors", [Target("odd", (3,), "BF16", ()), Target("wide", (2,), "F32", ())], {})
    assert [(name, tensor.start % 8) for name, tensor in file.tensors.items()] == [("wide", 0), ("odd", 0)]
    assert len(file.header) % 8 == 0
    (tmp_path / "x.safetensors").write_bytes(file.header.ljust(file.nbytes, b"\0"))
    with safe_open(tmp_path / "x.safetensors", "np") as opened:
        assert set(opened.keys()) == {"odd", "wide"}


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("300MiB", 300 << 20), ("1.5 kb", 1500), ("7", 7), ("2TiB", 2 << 40), ("5gb", 5 * 10**9)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "5 apples", "GB", "-1GB", "0", "1e9"])
def test_no_sizes(text):
    with pytest.raises(BridgeError, match="is no size"):
        parse_size(text)


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    return write(tmp_path / "trained", random_tensors(SPEC, TRAIN), metadata={"format": "ms"})


@pytest.fixture
def hf_dir(tmp_path: Path) -> Path:
    directory = write(tmp_path / "hf", {}, hf_config(SPEC, dtype="float32", rope_theta=5000000))
    (directory / "model.safetensors").unlink()
    (directory / "tokenizer_config.json").write_text('{"a": 1}')
    (directory / "generation_config.json").write_text('{"b": 2}')
    return directory


def test_an_export_is_complete(tmp_path, trained, hf_dir):
    job = to_hf(check_trained(open_source(trained), hf_dir), tmp_path / "out", "bf16", max_shard_bytes=2000)
    run(job)
    names = {path.name for path in (tmp_path / "out").iterdir() if path.suffix != ".safetensors"}
    assert names == {"config.json", "tokenizer_config.json", "generation_config.json", "model.safetensors.index.json"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["torch_dtype"], config["dtype"], config["rope_theta"]) == ("bfloat16", "bfloat16", 5000000)
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == '{"a": 1}'
    assert check(tmp_path / "out").spec == SPEC
    assert "MindFormers' default" in job.warning


def test_what_the_yaml_declares_of_rope_is_exported(tmp_path, trained, hf_dir):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    (tmp_path / "train.yaml").write_text(
        json.dumps({"run_mode": "finetune", "model": {"model_config": {"rope_scaling": yarn}}})
    )
    job = to_hf(check_trained(open_source(trained), hf_dir, tmp_path / "train.yaml"), tmp_path / "out")
    config = json.loads(job.others["config.json"])
    assert config["rope_scaling"].items() >= yarn.items()


def test_what_a_run_keeps_beside_the_weights_is_left_out(tmp_path, hf_dir):
    tensors = random_tensors(SPEC, TRAIN)
    state = {f"adam_m.{name}": tensor for name, tensor in tensors.items()}
    state |= {"global_step": np.array([7], np.int32), "loss_scale": np.ones(1, np.float32)}
    job = to_hf(check_trained(open_source(write(tmp_path / "trained", tensors | state)), hf_dir), tmp_path / "out")
    text = "\n".join(describe(job))
    assert f"{len(state)} tensors that are state of a training run" in text
    run(job)
    assert_same(contents(tmp_path / "out"), make_all(tensors, SPEC))


def make_all(tensors, spec):
    """The Hugging Face tensors of a training checkpoint, by hand: numpy, and no rule of the bridge."""
    groups, per_group, head, hidden = 2, 2, 4, 12
    result = {"model.embed_tokens.weight": tensors["embedding.word_embeddings.weight"]}
    result |= {"model.norm.weight": tensors["decoder.final_layernorm.weight"]}
    result |= {"lm_head.weight": tensors["output_layer.weight"]}
    for layer in range(spec.num_layers):
        old, new = f"decoder.layers.{layer}", f"model.layers.{layer}"
        qkv = tensors[f"{old}.self_attention.linear_qkv.weight"].reshape(groups, per_group + 2, head, hidden)
        fc1 = tensors[f"{old}.mlp.linear_fc1.weight"]
        result |= {
            f"{new}.self_attn.q_proj.weight": qkv[:, :per_group].reshape(-1, hidden),
            f"{new}.self_attn.k_proj.weight": qkv[:, per_group].reshape(-1, hidden),
            f"{new}.self_attn.v_proj.weight": qkv[:, per_group + 1].reshape(-1, hidden),
            f"{new}.self_attn.o_proj.weight": tensors[f"{old}.self_attention.linear_proj.weight"],
            f"{new}.self_attn.q_norm.weight": tensors[f"{old}.self_attention.q_layernorm.weight"],
            f"{new}.self_attn.k_norm.weight": tensors[f"{old}.self_attention.k_layernorm.weight"],
            f"{new}.mlp.gate_proj.weight": fc1[::2],
            f"{new}.mlp.up_proj.weight": fc1[1::2],
            f"{new}.mlp.down_proj.weight": tensors[f"{old}.mlp.linear_fc2.weight"],
            f"{new}.input_layernorm.weight": tensors[f"{old}.input_layernorm.weight"],
            f"{new}.post_attention_layernorm.weight": tensors[f"{old}.pre_mlp_layernorm.weight"],
        }
    return result


def test_a_tied_output_layer_is_written_when_asked(tmp_path):
    spec = SPECS["tied"]
    directory = write(tmp_path / "hf", random_tensors(spec), hf_config(spec))
    trained = write(tmp_path / "trained", random_tensors(spec, TRAIN))
    run(to_hf(check_trained(open_source(trained), directory), tmp_path / "plain"))
    run(to_hf(check_trained(open_source(trained), directory), tmp_path / "both", write_tied_output=True))
    plain, both = contents(tmp_path / "plain"), contents(tmp_path / "both")
    assert both.keys() - plain.keys() == {"lm_head.weight"}
    np.testing.assert_array_equal(both["lm_head.weight"], plain["model.embed_tokens.weight"])


def test_casts_are_counted(tmp_path, hf_dir):
    tensors = random_tensors(SPEC, TRAIN)
    tensors["decoder.final_layernorm.weight"][:] = np.float32(1.5)  # exact in bfloat16
    tensors["decoder.final_layernorm.weight"][0] = 1e-42
    summary = run(to_hf(check_trained(open_source(write(tmp_path / "t", tensors)), hf_dir), tmp_path / "out", "bf16"))
    (casts,) = summary.casts.values()
    total = sum(tensor.size for tensor in tensors.values())
    rounded = sum(int((t.astype(NUMPY["BF16"]).astype(np.float32) != t).sum()) for t in tensors.values())
    vanished = sum(int(((t.astype(NUMPY["BF16"]) == 0) & (t != 0)).sum()) for t in tensors.values())
    assert (casts.values, casts.rounded, casts.vanished) == (total, rounded, vanished)
    assert total - rounded >= 11
    assert f"{rounded} of {total} values rounded" in "\n".join(summary.lines())


def test_values_too_large_for_float16(tmp_path, hf_dir):
    tensors = random_tensors(SPEC, TRAIN)
    for layer in range(2):
        tensors[f"decoder.layers.{layer}.mlp.linear_fc2.weight"][3, 5] = 1e5
    with pytest.raises(BridgeError, match="not all values fit") as error:
        run(to_hf(check_trained(open_source(write(tmp_path / "t", tensors)), hf_dir), tmp_path / "out", "fp16"))
    assert [problem.subject for problem in error.value.problems] == ["model.layers.{0..1}.mlp.down_proj.weight"]
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("*.incomplete"))


@pytest.mark.parametrize(
    ("value", "fault"), [(np.nan, "NaN or infinity"), (np.inf, "NaN or infinity"), (0, "all zero")]
)
def test_values_that_no_model_has(tmp_path, hf_dir, value, fault):
    tensors = random_tensors(SPEC, TRAIN)
    tensors["decoder.layers.1.self_attention.linear_proj.weight"][...] = value
    with pytest.raises(BridgeError, match=f"(?s)invalid weights: .*{fault}"):
        run(to_hf(check_trained(open_source(write(tmp_path / "t", tensors)), hf_dir), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_one_empty_part_of_a_fused_tensor_is_seen(tmp_path, hf_dir):
    tensors = random_tensors(SPEC, TRAIN)
    tensors["decoder.layers.0.mlp.linear_fc1.weight"][1::2] = 0  # up
    with pytest.raises(BridgeError) as error:
        run(to_hf(check_trained(open_source(write(tmp_path / "t", tensors)), hf_dir), tmp_path / "out"))
    assert [problem.subject for problem in error.value.problems] == ["model.layers.0.mlp.up_proj.weight"]


def test_a_tied_output_layer_that_differs(tmp_path):
    spec = SPECS["tied"]
    tensors = random_tensors(spec)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    model = check(write(tmp_path / "hf", tensors, hf_config(spec)))
    with pytest.raises(BridgeError, match="tied tensors differ"):
        run(to_mindformers(model, TRAIN, tmp_path / "out"))
    assert not list(tmp_path.glob("out*"))


def test_each_dtype_is_kept(tmp_path, hf_dir):
    """A router in float32 among bfloat16 weights stays float32."""
    tensors = random_tensors(MOE_SPEC, TRAIN, "BF16")
    routers = {name: array.astype(np.float32) for name, array in tensors.items() if "router" in name}
    hf = write(tmp_path / "moe", {}, hf_config(MOE_SPEC))
    run(to_hf(check_trained(open_source(write(tmp_path / "t", tensors | routers)), hf), tmp_path / "out"))
    dtypes = {name: tensor.dtype for name, tensor in open_source(tmp_path / "out").tensors.items()}
    assert {name for name, dtype in dtypes.items() if dtype == "F32"} == {
        f"model.layers.{layer}.mlp.gate.weight" for layer in range(2)
    }


def test_memory_does_not_grow_with_a_tensor(tmp_path, monkeypatch):
    """What is lent is bounded, and every loan fits."""
    spec = replace(SPEC, num_layers=1, hidden_size=512, ffn_hidden_size=30000)
    directory = write(tmp_path / "hf", random_tensors(spec, dtype="BF16"), hf_config(spec))
    lent = []
    from mf_qwen3_bridge.transfer.copying import Buffers

    original = Buffers._take
    monkeypatch.setattr(Buffers, "_take", lambda self, nbytes: (lent.append(nbytes), original(self, nbytes))[1])
    run(to_mindformers(check(directory), TRAIN, tmp_path / "mf"))
    assert max(lent) <= 2 * tiles.TILE_BYTES + 64
    assert max(tensor.nbytes for tensor in open_source(tmp_path / "mf").tensors.values()) > 5 * max(lent)


def test_dialects_of_hugging_face(tmp_path):
    """Stacked experts become single ones and back."""
    stacked = random_tensors(MOE_SPEC, HF_STACKED)
    directory = write(tmp_path / "hf", stacked, hf_config(MOE_SPEC))
    assert hf_dialect(stacked) == HF_STACKED
    run(to_mindformers(check(directory), TRAIN, tmp_path / "mf"))
    run(to_hf(check_trained(open_source(tmp_path / "mf"), directory), tmp_path / "back"))
    back = contents(tmp_path / "back")
    for layer, expert in itertools.product(range(2), range(4)):
        experts = f"model.layers.{layer}.mlp.experts"
        gate, up = np.split(stacked[f"{experts}.gate_up_proj"][expert], 2)
        np.testing.assert_array_equal(back[f"{experts}.{expert}.gate_proj.weight"], gate)
        np.testing.assert_array_equal(back[f"{experts}.{expert}.up_proj.weight"], up)


def test_default_sizes_of_files():
    assert (files_module.HF_SHARD_BYTES, files_module.MINDFORMERS_FILE_BYTES) == (5_000_000_000, 3 << 30)


def test_a_dtype_of_another_spelling_is_not_taken_for_none(tmp_path: Path):
    """The weights would keep theirs, while config.json declared the other."""
    model = check(write(tmp_path / "hf", random_tensors(), hf_config()))
    with pytest.raises(KeyError, match="bfloat16"):
        to_mindformers(model, TRAIN, tmp_path / "out", "bfloat16")
