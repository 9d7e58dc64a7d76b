"""Quantised checkpoints: every command reads what they stand for, or names everything that is wrong with them."""

from __future__ import annotations

import json
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from mf_qwen3_bridge.cli.main import cli
from mf_qwen3_bridge.convert import jobs
from mf_qwen3_bridge.convert.run import run
from mf_qwen3_bridge.errors import BridgeError
from mf_qwen3_bridge.inputs.identify import open_weights
from mf_qwen3_bridge.inputs.inspection import inspect, lines
from mf_qwen3_bridge.inputs.opening import open_source
from mf_qwen3_bridge.inputs.preflight import check, check_against_config
from mf_qwen3_bridge.inputs.summary import summary
from mf_qwen3_bridge.model.parallel import ParallelConfig
from mf_qwen3_bridge.model.rules import HF, HF_STACKED, INFER, TRAIN
from mf_qwen3_bridge.transfer.copying import Transfer
from mf_qwen3_bridge.verify.comparison import compare
from mf_qwen3_bridge.verify.statistics import measure
from tests.support.checkpoints import MOE_SPEC, SPEC, contents, hf_config, random_tensors, read, write
from tests.support.commands import ROOT
from tests.support.documents import commands
from tests.support.golden import QUANTISED, QUANTISED_NAMES, digests
from tests.support.quantised import BF16, E4M3, compressed_config, fp8_config, quantise_model, write_model

Q = "model.layers.0.self_attn.q_proj"
UP = "model.layers.1.mlp.up_proj"
TIED = replace(SPEC, tie_word_embeddings=True)
# kv heads and experts for tensor parallel 8, whose slices end within blocks
WIDE = replace(SPEC, hidden_size=24, num_attention_heads=8, num_query_groups=8, head_dim=6, ffn_hidden_size=40)
WIDE_MOE = replace(WIDE, ffn_hidden_size=0, num_experts=4, moe_ffn_hidden_size=24)

FORMATS = {
    "FP8 in blocks": (fp8_config(), np.float32),
    "FP8 in blocks, scales in BF16": (fp8_config(), BF16),
    "FP8 in blocks, scales in F16": (fp8_config((128, 128)), np.float16),
    "FP8 in blocks, UE8M0": (fp8_config(scale_fmt="ue8m0"), np.uint8),
    "FP8 for each tensor": (fp8_config(None), np.float32),
    "FP8, but for some modules": (fp8_config(modules_to_not_convert=["lm_head", Q]), np.float32),
    "compressed FP8 for each row": (compressed_config(), BF16),
    "compressed FP8 for each tensor": (compressed_config(strategy="tensor"), np.float32),
    "compressed FP8 in blocks": (compressed_config(strategy="block"), np.float32),
    "compressed INT8 for each row": (compressed_config("int"), BF16),
    "compressed INT8 for each tensor": (compressed_config("int", "tensor"), np.float32),
}


def make(directory: Path, spec=SPEC, dialect=HF, kind="FP8 in blocks", **changes):
    """A quantised checkpoint, and the bfloat16 values that it stands for."""
    quantization, scale_dtype = FORMATS[kind]
    stored, exact = quantise_model(random_tensors(spec, dialect), quantization, scale_dtype)
    config = hf_config(spec, torch_dtype="bfloat16", quantization_config=quantization, **changes)
    write_model(directory, stored, config)
    return directory, {name: value.astype(BF16) for name, value in exact.items()}


def everything(weights, dialect=HF, dtype=None):
    return {target.name: target.make() for target in weights.plan(dialect, dtype).targets}


def same(made, expected):
    assert made.keys() == expected.keys()
    for name in expected:
        assert made[name].dtype == expected[name].dtype, name
        assert made[name].tobytes() == expected[name].tobytes(), name


@pytest.mark.parametrize("spec", [SPEC, TIED, MOE_SPEC], ids=["dense", "tied", "moe"])
@pytest.mark.parametrize("kind", FORMATS)
def test_every_format(tmp_path, kind, spec):
    directory, expected = make(tmp_path, spec, kind=kind)
    model = check(directory)
    same(everything(model), expected)
    assert open_weights(directory).source.tensors.keys() == expected.keys()
    assert "quantization_config" not in model.hf_config
    text = "\n".join(summary(model))
    assert "quantised   FP8 (E4M3)" in text or "quantised   INT8" in text


@pytest.mark.parametrize("name", QUANTISED_NAMES)
def test_the_libraries_dequantise_to_the_same_bits(name):
    """transformers 5.24 and compressed-tensors 0.20, which quantised these weights as well."""
    made = everything(check(QUANTISED / name))
    assert all(value.dtype == BF16 for value in made.values())
    assert {key: sha256(value.tobytes()).hexdigest() for key, value in made.items()} == digests(name)


@pytest.mark.parametrize("kind", ["FP8 in blocks", "FP8 in blocks, UE8M0", "FP8 for each tensor"])
def test_stacked_experts(tmp_path, kind):
    directory, expected = make(tmp_path, MOE_SPEC, HF_STACKED, kind=kind)
    model = check(directory)
    assert model.dialect == HF_STACKED
    same(everything(model, HF_STACKED), expected)
    assert "model.layers.0.mlp.experts.3.up_proj.weight" in everything(model)


@pytest.mark.parametrize("ending", [".scale", ".qscale_weight"])
def test_other_names_of_scales(tmp_path, ending):
    directory, expected = make(tmp_path)
    stored = {n.replace(".weight_scale_inv", ending): v for n, v in contents_as_stored(directory).items()}
    write_model(directory, stored, None)
    same(everything(check(directory)), expected)


def contents_as_stored(directory):
    return {name: read(tensor).copy() for name, tensor in open_source(directory, as_stored=True).tensors.items()}


def test_a_scale_that_is_spelled_f8_e8m0(tmp_path):
    directory, expected = make(tmp_path, kind="FP8 in blocks, UE8M0")
    stored = contents_as_stored(directory)
    write_model(directory, stored, None, {name: "F8_E8M0" for name in stored if name.endswith("_inv")})
    config = json.loads((directory / "config.json").read_text())
    del config["quantization_config"]["scale_fmt"]  # the dtype says it
    (directory / "config.json").write_text(json.dumps(config))
    same(everything(check(directory)), expected)


def test_scales_of_activations_are_left_out(tmp_path):
    directory, expected = make(tmp_path, kind="compressed FP8 for each tensor")
    stored = contents_as_stored(directory)
    stored |= {f"{Q}.input_scale": np.ones(1, BF16), "model.layers.0.self_attn.k_scale": np.ones(1, np.float32)}
    write_model(directory, stored, None)
    same(everything(check(directory)), expected)


@pytest.mark.parametrize(("torch_dtype", "dtype"), [("float16", np.float16), ("float32", np.float32), (None, BF16)])
def test_the_dtype_that_config_json_names(tmp_path, torch_dtype, dtype):
    quantization, _ = FORMATS["FP8 in blocks"]
    stored, exact = quantise_model(random_tensors(), quantization)
    config = hf_config(quantization_config=quantization, torch_dtype=torch_dtype)
    made = everything(check(write_model(tmp_path, stored, config)))
    assert made[f"{Q}.weight"].tobytes() == exact[f"{Q}.weight"].astype(dtype).tobytes()


@pytest.mark.parametrize("spec", [WIDE, WIDE_MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("sizes", [(2, 1), (4, 1), (8, 1), (4, 2), (4, 4), (8, 4)], ids=str)
@pytest.mark.parametrize("kind", ["FP8 in blocks", "compressed INT8 for each row"])
def test_slices_of_ranks_are_those_of_the_whole(tmp_path, kind, spec, sizes):
    """The edges of slices are not those of blocks of 5 x 8."""
    if spec is WIDE and sizes[1] > 1:
        pytest.skip("no experts")
    directory, expected = make(tmp_path / "q", spec, kind=kind)
    plain = check(write(tmp_path / "plain", expected, hf_config(spec)))
    model, parallel = check(directory), ParallelConfig(*sizes)
    with Transfer() as transfer:
        for number in range(parallel.world_size):
            plans = [side.plan(INFER, rank=parallel.rank(number)) for side in (model, plain)]
            for mine, wanted in zip(*(plan.targets for plan in plans), strict=True):
                assert mine.make(transfer).tobytes() == wanted.make(transfer).tobytes(), mine.name


@pytest.mark.parametrize("kind", ["FP8 in blocks", "compressed INT8 for each row"])
@pytest.mark.parametrize("target", [TRAIN, INFER], ids=["train", "infer"])
@pytest.mark.parametrize("dtype", [None, "fp16", "fp32"])
def test_convert(tmp_path, kind, target, dtype):
    directory, _ = make(tmp_path / "q", MOE_SPEC, kind=kind)
    run(jobs.to_mindformers(check(directory), target, tmp_path / "out", dtype))
    stored = {None: "BF16", "fp16": "F16", "fp32": "F32"}[dtype]
    written = {target.name: target.make() for target in check(directory).plan(target, stored).targets}
    same(contents(tmp_path / "out"), written)
    report = compare(open_weights(directory), open_weights(tmp_path / "out"))
    assert dtype or (report.is_equal and report.num_tensors)


@pytest.mark.parametrize("dialect", [HF, HF_STACKED], ids=["expert by expert", "stacked"])
def test_a_plain_hugging_face_directory(tmp_path, dialect):
    directory, _ = make(tmp_path / "q", MOE_SPEC, dialect)
    (directory / "tokenizer_config.json").write_text("{}")
    run(jobs.to_plain_hf(check(directory), tmp_path / "out"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config and config["torch_dtype"] == "bfloat16"
    assert (tmp_path / "out" / "tokenizer_config.json").is_file()
    same(contents(tmp_path / "out"), everything(check(directory)))
    assert compare(open_weights(directory), open_weights(tmp_path / "out")).is_equal
    with pytest.raises(BridgeError, match="nothing would change"):
        jobs.to_plain_hf(check(tmp_path / "out"), tmp_path / "again")
    run(jobs.to_plain_hf(check(tmp_path / "out"), tmp_path / "wide", "fp32"))  # another dtype is a change
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["torch_dtype"] == "float32"


def test_export_against_the_config_of_the_quantised_base(tmp_path):
    """What was trained from a quantised model is not quantised, and its config.json does not say so."""
    directory, expected = make(tmp_path / "q")
    run(jobs.to_mindformers(check(directory), TRAIN, tmp_path / "trained"))
    command = ["export", "--input_path", tmp_path / "trained", "--hf_config", directory]
    run_cli(*command, "--output_path", tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    same(contents(tmp_path / "out"), expected)


def run_cli(*arguments):
    result = CliRunner().invoke(cli, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command_line(tmp_path):
    directory, _ = make(tmp_path / "q")
    assert "quantised   FP8 (E4M3), blocks of 5 x 8" in run_cli("check", "--model_dir", directory)
    assert "quantised   FP8 (E4M3), blocks of 5 x 8" in run_cli("inspect", directory)
    assert "no NaN" in run_cli("verify", directory)
    run_cli("convert", "--model_dir", directory, "--layout", "hf", "--output_dir", tmp_path / "out")
    assert "bit for bit" in run_cli("verify", directory, tmp_path / "out")
    run_cli("truncate", directory, "--layers", 1, "--output_dir", tmp_path / "short")
    assert "quantised" in run_cli("check", "--model_dir", tmp_path / "short")


@pytest.mark.parametrize("kind", FORMATS)
def test_truncate_keeps_the_bytes(tmp_path, kind):
    directory, expected = make(tmp_path / "q", MOE_SPEC, kind=kind)
    run(jobs.truncate(check(directory), 1, tmp_path / "short"))
    before, after = contents_as_stored(directory), contents_as_stored(tmp_path / "short")
    same(after, {name: tensor for name, tensor in before.items() if ".layers.1." not in name})
    kept = everything(check(tmp_path / "short"))
    same(kept, {name: value for name, value in expected.items() if name in kept})


def test_inspect_describes_what_is_stored(tmp_path):
    directory, expected = make(tmp_path / "q")
    found = inspect(directory)
    assert found.quantization == "FP8 (E4M3), blocks of 5 x 8"
    assert found.nbytes_dequantised == sum(value.nbytes for value in expected.values()) > found.nbytes
    assert found.dtypes["F8_E4M3"] == found.dtypes["F32"] == 14
    assert found.unusual == () and len(found.tensors) == len(expected) + 14
    assert found.parameters == sum(value.size for value in expected.values())
    assert any(line.startswith("quantised ") for line in lines(found))


def test_statistics_are_of_the_values(tmp_path):
    directory, expected = make(tmp_path / "q")
    found = measure(check(directory))
    assert found[f"{Q}.weight"].rms == pytest.approx(
        float(np.sqrt(np.mean(expected[f"{Q}.weight"].astype(float) ** 2)))
    )


# ------------------------------------------------------------------------------------------------- which config counts


def test_weights_elsewhere(tmp_path):
    """The config.json beside the weights describes them; if there is none, that of the model's directory."""
    directory, expected = make(tmp_path / "q")
    elsewhere = tmp_path / "elsewhere"
    write_model(elsewhere, contents_as_stored(directory), None)
    same(everything(check(directory, weights=elsewhere)), expected)
    plain = write(tmp_path / "plain", expected, hf_config())
    same(everything(check(directory, weights=plain)), expected)
    same(everything(check(plain, weights=directory)), expected)
    (plain / "config.json").unlink()
    with pytest.raises(BridgeError, match="no weight is stored so"):
        check(directory, weights=plain)
    with pytest.raises(BridgeError, match="no quantization_config"):
        open_weights(elsewhere)
    run(jobs.to_mindformers(check(directory), TRAIN, tmp_path / "trained"))  # MindFormers' weights are not quantised
    assert not check(directory, weights=tmp_path / "trained").source.quantization


def test_weights_of_a_network(tmp_path):
    directory, expected = make(tmp_path / "q")
    numbers = hf_config()
    same(everything(check_against_config(directory, numbers, "network")), expected)
    write_model(tmp_path / "elsewhere", contents_as_stored(directory), None)
    declared = numbers | {"pretrained_model_dir": str(directory)}
    same(everything(check_against_config(tmp_path / "elsewhere", declared, "network")), expected)
    with pytest.raises(BridgeError, match="no quantization_config"):
        check_against_config(tmp_path / "elsewhere", numbers, "network")


# ------------------------------------------------------------------------------------------------------ what is refused


def with_stored(change):
    def apply(directory):
        stored = contents_as_stored(directory)
        change(stored)
        write_model(directory, stored, None)

    return apply


def with_config(**changes):
    def apply(directory):
        config = json.loads((directory / "config.json").read_text())
        config["quantization_config"] |= changes
        (directory / "config.json").write_text(json.dumps(config))

    return apply


def scale(value):
    def change(stored):
        scales = stored[f"{Q}.weight_scale_inv"]
        scales[-1, -1] = value

    return with_stored(change)


SCALE = f"{Q}.weight_scale_inv"
DAMAGE = {
    "a scale is missing": (with_stored(lambda s: s.pop(SCALE)), f"{Q}.weight", "F8_E4M3, and no"),
    "a scale is left over": (
        with_stored(lambda s: s.update({f"{Q}x.weight_scale_inv": np.ones((1, 1), np.float32)})),
        f"{Q}x.weight_scale_inv",
        "its weight is missing",
    ),
    "two scales": (with_stored(lambda s: s.update({f"{Q}.scale": s[SCALE]})), f"{Q}.scale", "a second scale"),
    "a scale of a wrong shape": (with_stored(lambda s: s.update({SCALE: s[SCALE].T.copy()})), SCALE, "shape (2, 4)"),
    "a scale of a wrong dtype": (
        with_stored(lambda s: s.update({SCALE: s[SCALE].astype(np.int32)})),
        SCALE,
        "dtype I32",
    ),
    "bytes, and no ue8m0": (with_stored(lambda s: s.update({SCALE: s[SCALE].astype(np.uint8)})), SCALE, "dtype U8"),
    "zero": (scale(0), SCALE, "zero"),
    "negative": (scale(-1), SCALE, "negative"),
    "NaN": (scale(np.nan), SCALE, "NaN or infinite"),
    "infinite": (scale(np.inf), SCALE, "NaN or infinite"),
    "another block size": (
        with_config(weight_block_size=[3, 8]),
        "model.layers.{0..1}.self_attn.q_proj.weight_scale_inv",
        "shape (4, 2), (6, 2) expected",
    ),
    "a weight that should be quantised": (
        with_stored(lambda s: (s.pop(SCALE), s.update({f"{Q}.weight": s[f"{Q}.weight"].astype(BF16)}))),
        f"{Q}.weight",
        "BF16; FP8",
    ),
    "a weight that should not be quantised": (
        with_config(modules_to_not_convert=["lm_head", Q]),
        f"{Q}.weight",
        "in modules_to_not_convert",
    ),
    "INT8 for FP8": (
        with_stored(lambda s: s.update({f"{Q}.weight": s[f"{Q}.weight"].view(np.int8)})),
        f"{Q}.weight",
        "I8 (16, 12)",
    ),
    "nothing is quantised": (
        lambda d: write(d, {n: v.astype(np.float32) for n, v in random_tensors().items()}),
        "quantization_config",
        "no weight is stored so",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_what_does_not_fit_is_named(tmp_path, case):
    directory, _ = make(tmp_path)
    damage, name, found = DAMAGE[case]
    damage(directory)
    for way in (check, open_source, open_weights):
        with pytest.raises(BridgeError) as refused:
            way(directory)
        rows = {problem.subject: problem.found for problem in refused.value.problems}
        assert found in rows[name], rows
        assert len(rows) == 1 or case == "another block size"
    assert any(name in line for line in inspect(directory).unusual)


def test_everything_that_does_not_fit_is_named_at_once(tmp_path):
    directory, _ = make(tmp_path)
    for case in ("negative", "two scales", "a scale is left over"):
        DAMAGE[case][0](directory)
    with pytest.raises(BridgeError) as refused:
        check(directory)
    assert len(refused.value.problems) == 3


def test_a_weight_byte_that_is_nan(tmp_path):
    directory, _ = make(tmp_path / "q")

    def damage(stored):
        stored[f"{UP}.weight"].view(np.uint8)[3, 4] = 0xFF

    with_stored(damage)(directory)
    for attempt in (lambda m: measure(m), lambda m: run(jobs.to_mindformers(m, TRAIN, tmp_path / "out"))):
        with pytest.raises(BridgeError, match="NaN") as refused:
            attempt(check(directory))
        assert f"{UP}.weight" in refused.value.problems[0].found
    assert not (tmp_path / "out").exists()


def awq(stored):
    for name in [name for name in stored if name.startswith(f"{Q}.")]:
        del stored[name]
    stored |= {f"{Q}.{part}": np.ones((2, 2), np.int32) for part in ("qweight", "qzeros", "scales")}


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "bitsandbytes"},
        {"quant_method": "mxfp4"},
        compressed_config("int") | {"format": "pack-quantized"},
        compressed_config("int", symmetric=False)
        | {"config_groups": {"g": {"weights": {"num_bits": 4}, "targets": []}}},
        compressed_config(transform_config={"config_groups": {"R1": {}}}),
        compressed_config(strategy="group"),
        fp8_config(fmt="e5m2"),
        fp8_config(expert_dtype="fp4"),
        fp8_config("ab"),
        fp8_config((0, 128)),
        fp8_config(modules_to_not_convert="lm_head"),
        ["fp8"],
        "fp8",
    ],
    ids=str,
)
def test_formats_that_are_not_read(tmp_path, config):
    """By the config alone, whatever the tensors are; what to use instead is said."""
    write(tmp_path, random_tensors(), hf_config(quantization_config=config))
    with pytest.raises(BridgeError, match="quantization_config"):
        check(tmp_path)
    assert any("quantization_config" in line for line in inspect(tmp_path).unusual)


MARKS = {
    "AWQ": {"qweight": np.int32, "qzeros": np.int32, "scales": np.float16},
    "GPTQ": {"qweight": np.int32, "g_idx": np.int32},
    "compressed-tensors": {"weight_packed": np.int32, "weight_shape": np.int32},
    "bitsandbytes": {"absmax": np.float32},
}


@pytest.mark.parametrize("kind", MARKS)
def test_formats_that_are_not_read_by_the_tensors_alone(tmp_path, kind):
    tensors = random_tensors()
    del tensors[f"{Q}.weight"]
    tensors |= {f"{Q}.{part}": np.ones((2, 2), dtype) for part, dtype in MARKS[kind].items()}
    write_model(tmp_path, tensors, hf_config())
    for way in (check, open_weights):
        with pytest.raises(BridgeError, match="quantised") as refused:
            way(tmp_path)
        assert any(kind in problem.found for problem in refused.value.problems)
        assert any("bf16" in problem.remedy for problem in refused.value.problems)


def test_lists_of_modules_are_those_of_transformers(tmp_path):
    """Names, ends of names, and patterns; a part of a name may be meant as well."""
    for listed in ([Q], ["q_proj"], ["layers.0.self_attn.q_proj"], ["model.layers.0.self_attn"], ["0.self_attn.q"]):
        directory, expected = make(tmp_path / "q", kind="FP8, but for some modules")
        with_config(modules_to_not_convert=listed)(directory)
        if listed in ([Q], ["layers.0.self_attn.q_proj"], ["0.self_attn.q"]):
            same(everything(check(directory)), expected)
        else:
            with pytest.raises(BridgeError, match="with scales, but in modules_to_not_convert"):
                check(directory)
    directory, _ = make(tmp_path / "c", kind="compressed FP8 for each row")
    for pattern in ("re:.*lm_head", "re:(", "Linear", ""):
        with_config(ignore=[pattern])(directory)
        check(directory)
    with_config(ignore=["re:.*layers[.]1[.]mlp.*"])(directory)
    with pytest.raises(BridgeError, match="in ignore"):
        check(directory)


def test_groups_that_name_modules(tmp_path):
    """Of compressed-tensors: one kind for some modules, another for the rest."""
    int8, fp8 = compressed_config("int"), compressed_config("float")
    pattern = "re:.*q_proj"
    tensors = random_tensors()
    stored, exact = quantise_model(tensors, fp8)
    of_q, exact_q = quantise_model({n: t for n, t in tensors.items() if "q_proj" in n}, int8)
    groups = {
        "group_0": fp8["config_groups"]["group_0"] | {"format": "float-quantized"},
        "group_1": int8["config_groups"]["group_0"] | {"format": "int-quantized", "targets": [pattern]},
    }
    config = fp8 | {"format": "mixed-precision", "config_groups": groups}
    write_model(tmp_path, stored | of_q, hf_config(quantization_config=config, torch_dtype="bfloat16"))
    model = check(tmp_path)
    assert model.source.quantization == "FP8 (E4M3), a scale for each row; INT8, a scale for each row"
    same(everything(model), {name: value.astype(BF16) for name, value in (exact | exact_q).items()})


# ------------------------------------------------------------------------------------------------- what tests can catch


def test_mutations_are_caught(tmp_path):
    """What a wrong reading would give differs from what is read."""
    directory, expected = make(tmp_path / "q")
    stored = contents_as_stored(directory)
    weight, scales = stored[f"{Q}.weight"].astype(np.float32), stored[SCALE]
    rows, columns = weight.shape

    def spread(values):
        return np.repeat(np.repeat(values, 5, 0), 8, 1)[:rows, :columns]

    wrong = {
        "the next block's": spread(np.roll(scales, 1, 0)),
        "the next block's in the row": spread(np.roll(scales, 1, 1)),
        "block transposed": np.repeat(np.repeat(scales, 8, 0), 5, 1)[:rows, :columns].repeat(2, 1)[:, :columns],
        "inverted": 1 / spread(scales),
        "skipped": np.ones_like(weight),
    }
    name = f"{Q}.weight"
    assert everything(check(directory))[name].tobytes() == (weight * spread(scales)).astype(BF16).tobytes()
    for values in wrong.values():
        write(tmp_path / "wrong", expected | {name: (weight * values).astype(BF16)}, hf_config())
        report = compare(open_weights(directory), open_weights(tmp_path / "wrong"))
        assert list(report.different) == [name]
    assert expected[name].dtype == BF16 and stored[name].dtype == E4M3


# ----------------------------------------------------------------------------------------------------------- documents

PAGE = (ROOT / "docs" / "quantised.md").read_text(encoding="utf-8")


def test_commands_of_the_page(tmp_path, monkeypatch):
    """All but ``infer``, which needs MindFormers: tests/integration/test_quantised.py."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen3-8B-FP8").symlink_to(QUANTISED / "fp8_dense")
    found = [words for words in commands(PAGE) if words[1] != "infer"]
    assert len(found) == len(commands(PAGE)) - 1
    for words in found:
        assert words[0] == "mf-qwen3"
        run_cli(*words[1:])
    assert (tmp_path / "Qwen3-8B-bf16" / "model.safetensors").is_file()
