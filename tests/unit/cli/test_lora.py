"""What a MindFormers run with LoRA saved, merged or as a PEFT adapter: as a user types it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mf_qwen3_bridge.convert import jobs
from mf_qwen3_bridge.convert.run import run
from mf_qwen3_bridge.inputs import lora_runs
from mf_qwen3_bridge.inputs.lora_runs import LoraRun, read_lora_run
from mf_qwen3_bridge.inputs.opening import open_source
from mf_qwen3_bridge.inputs.preflight import check_trained
from mf_qwen3_bridge.model import lora as names_of_lora
from mf_qwen3_bridge.model.layouts import Layout
from mf_qwen3_bridge.transfer.adapted import LowRank
from tests.support.checkpoints import (
    LAYOUTS,
    MOE_SPEC,
    SPEC,
    Tensors,
    assert_same,
    contents,
    hf_config,
    random_tensors,
    write,
)
from tests.support.cli import Call, export, names
from tests.support.damage import unwrapped
from tests.support.lora import ALPHA, RANK, Lora, adapter_config, blocks, experts_lora, lora, save_lora_ranks
from tests.support.trained import ADAM, COUNTER, GROUPS, TIED, fused, in_bf16, on_ranks, training_yaml, write_merged

FLAG = "--lora"
WIDE = replace(GROUPS, ffn_hidden_size=20)


def lora_run(directory: Path, adapter: Lora, hf: Tensors, spec=SPEC, of=(None, None), **config) -> Path:
    """A run's output: its adapter_config.json, and below it what one card saved."""
    adapter_config(directory, **config)
    whole = fused(hf, spec, *of) | adapter.saved
    whole |= {f"{moment}.{name}": array + 1 for name, array in adapter.saved.items() for moment in ADAM}
    path = directory / "checkpoint" / "rank_0"
    path.mkdir(parents=True)
    save_file(whole | COUNTER, path / "qwen3_rank_0-1_20.safetensors", {"format": "ms"})
    return path


def peft_of(directory: Path) -> tuple[Tensors, dict]:
    assert names(directory) == {"adapter_model.safetensors", "adapter_config.json"}
    config = json.loads((directory / "adapter_config.json").read_text())
    return load_file(directory / "adapter_model.safetensors"), config


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The model that the run began with."""
    return write(tmp_path / "base", random_tensors(GROUPS), hf_config(GROUPS))


@pytest.fixture
def trained_lora(tmp_path: Path) -> Path:
    return lora_run(tmp_path / "output", lora(GROUPS), random_tensors(GROUPS), GROUPS)


def exported(call: Call, path: Path, base: Path, kind: str, *arguments: object, out: str = "out") -> Path:
    output = base.parent / out
    given = ("--input_path", path, "--output_path", output, "--hf_config", base, FLAG, kind, *arguments)
    result = call("export", *given, *(["--dtype", "fp32"] if kind == "merge" else []))
    assert result.code == 0, result.err
    return output


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("spec", [GROUPS, TIED, MOE_SPEC], ids=["groups", "tied", "moe"])
def test_both_ways_out(tmp_path, call, layout, spec):
    hf, adapter = random_tensors(spec), lora(spec, *blocks(layout))
    base = write(tmp_path / "base", hf, hf_config(spec))
    path = lora_run(tmp_path / "output", adapter, hf, spec, blocks(layout))
    yaml = ("--config", training_yaml(tmp_path / "train.yaml", layout.training_flags))
    assert_same(contents(exported(call, path, base, "merge", *yaml, out="merged")), adapter.merged(hf))
    tensors, config = peft_of(exported(call, path, base, "adapter", *yaml, out="adapter"))
    assert_same(tensors, adapter.in_peft())
    assert config["target_modules"] == sorted({name.split(".")[-2] for name in adapter.parts})
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (RANK, ALPHA, str(base))
    assert (config["peft_type"], config["task_type"], config["bias"]) == ("LORA", "CAUSAL_LM", "none")


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_ranks_files(tmp_path, call, base, strategies_of, layout, tp):
    """Of tensor parallel runs, whose contiguous blocks follow each other; B is cut as the weight is, or A."""
    spec = GROUPS if tp == 2 else WIDE
    hf, adapter = random_tensors(spec), lora(spec, *blocks(layout, tp))
    base = write(tmp_path / "wide", hf, hf_config(spec))
    ranks = save_lora_ranks(tmp_path / "output", fused(hf, spec, *blocks(layout, tp)) | adapter.saved, tp)
    adapter_config(tmp_path / "output")
    strategies_of(ranks)
    yaml = training_yaml(tmp_path / "train.yaml", layout.training_flags, **on_ranks(tp))
    given = ["--mindspore_ckpt_dir", ranks.directory, "--src_strategy_dirs", tmp_path, "--config", yaml]
    given += ["--hf_config", base]
    assert call("export", *given, "--output_path", tmp_path / "merged", "--dtype", "fp32", FLAG, "merge").code == 0
    assert_same(contents(tmp_path / "merged"), adapter.merged(hf))
    assert call("export", *given, "--output_path", tmp_path / "adapter", FLAG, "adapter").code == 0
    assert_same(peft_of(tmp_path / "adapter")[0], adapter.in_peft())

    given = ["--mindspore_ckpt_dir", ranks.directory, "--src_strategy_dirs", tmp_path, "--output_dir", tmp_path]
    assert call("unify", *given).code == 0
    unified = tmp_path / "ckpt_convert" / "unified_safe"
    assert "adapter_config.json" in names(unified)
    again = exported(call, unified, base, "merge", "--config", yaml, out="again")
    assert_same(contents(again), adapter.merged(hf))


def test_the_layout_is_shown_by_the_frozen_base(tmp_path, call):
    """Its rows are those of the Hugging Face weights, whatever the adapter does."""
    layout = LAYOUTS[-1]
    adapter = lora(GROUPS, *blocks(layout))
    hf = random_tensors(GROUPS)
    base = write(tmp_path / "base", hf, hf_config(GROUPS))
    path = lora_run(tmp_path / "output", adapter, hf, GROUPS, blocks(layout))
    for kind in ("merge", "adapter"):
        result = export(call, path, "--hf_config", base, FLAG, kind)
        assert result.code == 2
        assert "in another layout than assumed" in result.err
        flags = [text for flag, value in layout.training_flags.items() for text in (f"--{flag}", value)]
        result = call("export", "--input_path", path, "--output_path", tmp_path / kind, FLAG, kind, *flags)
        assert (result.code, "warning" in result.out) == (0, False)


def test_an_assumed_layout_is_a_warning(tmp_path, call, trained_lora):
    for kind in ("merge", "adapter"):
        result = call("export", "--input_path", trained_lora, "--output_path", tmp_path / kind, FLAG, kind)
        assert result.code == 0
        assert "warning     the layout of QKV and gate/up is assumed" in result.out
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] is None


def test_there_is_a_choice(call, trained_lora):
    result = export(call, trained_lora)
    assert result.code == 2
    assert "--lora merge, the whole model" in result.err
    assert "--lora adapter, a PEFT adapter" in result.err


@pytest.mark.parametrize("option", [("--lora", "merge"), ("--lora", "adapter"), ("--lora_alpha", 16)], ids=str)
def test_there_is_no_lora(call, trained, option):
    result = export(call, trained, *option)
    assert result.code == 2
    assert "is not of a LoRA run" in result.err


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("spec", [GROUPS, MOE_SPEC], ids=["dense", "moe"])
def test_an_adapter_alone(tmp_path, call, layout, spec):
    """A run may save what it trains alone; the base is Hugging Face's then."""
    hf, adapter = random_tensors(spec), lora(spec, *blocks(layout), pynative=True)
    base = write(tmp_path / "base", hf, hf_config(spec))
    path = tmp_path / "output" / "checkpoint"
    write_merged(path, adapter.saved | COUNTER)
    (path / "param_name_map.json").unlink()
    lora_config = {"lora_rank": RANK, "lora_alpha": ALPHA, "target_modules": ".*linear_.*"}
    manifest = {"format": "mindformers_pynative_lora_adapter_v1", "lora_config": lora_config}
    (tmp_path / "output" / "mindformers_adapter_config.json").write_text(json.dumps(manifest))
    yaml = ("--config", training_yaml(tmp_path / "train.yaml", layout.training_flags))
    assert_same(contents(exported(call, path, base, "merge", *yaml, out="merged")), adapter.merged(hf))
    assert_same(peft_of(exported(call, path, base, "adapter", *yaml, out="adapter"))[0], adapter.in_peft())
    result = export(call, path, FLAG, "merge")
    assert (result.code, "name its base model with --hf_config" in result.err) == (2, True)
    result = export(call, path, FLAG, "merge", "--hf_config", base, "--num_layers", 3)
    assert (result.code, "num_hidden_layers" in result.err) == (2, True)
    for file in base.glob("*.safetensors"):
        file.unlink()
    exported(call, path, base, "adapter", *yaml, out="again")  # needs no weights
    assert export(call, path, FLAG, "merge", "--hf_config", base).code == 2
    assert "an adapter alone" in call("inspect", path).out
    given = ("--input_path", path, "--hf_config", base)
    assert "warning     the layout" in call("export", *given, "--output_path", tmp_path / "x", FLAG, "adapter").out


@pytest.mark.parametrize("has_axis", [False, True])
def test_experts(tmp_path, call, has_axis):
    hf, adapter = random_tensors(MOE_SPEC), experts_lora(MOE_SPEC)
    base = write(tmp_path / "base", hf, hf_config(MOE_SPEC))
    weights = fused(hf, MOE_SPEC)
    if has_axis:
        stacked = {n: a.reshape(MOE_SPEC.num_experts, -1, a.shape[1]) for n, a in weights.items() if ".experts." in n}
        weights |= stacked
    path = write_merged(tmp_path / "merged_run", weights | adapter.saved)
    merged = contents(exported(call, path, base, "merge", "--lora_alpha", ALPHA, out="merged"))
    expected = adapter.merged(hf)
    assert merged.keys() == expected.keys()
    for name, array in expected.items():  # the product is of the transposed matrices, summed in another order
        np.testing.assert_allclose(merged[name], array, rtol=0, atol=1e-5, err_msg=name)
    tensors, config = peft_of(exported(call, path, base, "adapter", "--lora_alpha", ALPHA, out="adapter"))
    assert_same(tensors, adapter.in_peft())
    assert config["target_modules"] == ["down_proj", "gate_proj", "up_proj"]

    alone = write_merged(tmp_path / "alone", adapter.saved)
    exported(call, alone, base, "adapter", "--lora_alpha", ALPHA, out="alone_adapter")
    result = export(call, alone, "--hf_config", base, FLAG, "merge", "--lora_alpha", ALPHA)
    assert (result.code, "adapts experts and holds no base weights" in result.err) == (2, True)


def test_an_expert_that_no_token_reached(tmp_path, call):
    adapter = experts_lora(MOE_SPEC)
    for name, array in adapter.saved.items():
        if name.endswith("_lora_b"):
            array[1] = 0
    weights = fused(random_tensors(MOE_SPEC), MOE_SPEC)
    path = write_merged(tmp_path / "run", weights | adapter.saved)
    assert export(call, path, FLAG, "adapter", "--lora_alpha", ALPHA).code == 0


def test_an_adapter_that_was_not_trained(tmp_path, call):
    adapter = lora()
    for name, array in adapter.saved.items():
        if ".lora_B." in name:
            array[...] = 0
    path = lora_run(tmp_path / "output", adapter, random_tensors())
    for kind in ("merge", "adapter"):
        result = export(call, path, FLAG, kind)
        assert result.code == 2
        assert "every lora_B is zero" in result.err
    assert not (path.parent / "out").exists()


def test_invalid_values(tmp_path, call):
    adapter = lora()
    adapter.saved["decoder.layers.1.mlp.linear_fc2.lora_A.weight"][0, 0] = np.nan
    path = lora_run(tmp_path / "output", adapter, random_tensors())
    for kind in ("merge", "adapter"):
        result = export(call, path, FLAG, kind)
        assert (result.code, "NaN or infinity" in result.err) == (2, True)


def test_dtypes(tmp_path, call):
    """An adapter is written as it was trained unless another dtype is asked for; a model in bf16, rounded once."""
    hf, adapter = in_bf16(random_tensors()), lora()
    path = lora_run(tmp_path / "output", adapter, hf)
    assert export(call, path, FLAG, "merge").code == 0
    assert_same(contents(path.parent / "out"), in_bf16(adapter.merged(hf)))
    given = ("export", "--input_path", path, FLAG, "adapter", "--output_path")
    assert call(*given, tmp_path / "as_it_is").code == 0
    assert_same(peft_of(tmp_path / "as_it_is")[0], adapter.in_peft())
    assert call(*given, tmp_path / "bf16", "--dtype", "bf16").code == 0
    assert_same(contents(tmp_path / "bf16"), in_bf16(adapter.in_peft()))


def test_modules_of_some_layers(tmp_path, call):
    """PEFT would adapt the modules of the other layers as well, with weights that are not there."""
    adapter = lora()
    for name in [name for name in adapter.saved if ".layers.1.mlp.linear_fc2" in name]:
        del adapter.saved[name]
    del adapter.parts["model.layers.1.mlp.down_proj.weight"]
    path = lora_run(tmp_path / "output", adapter, random_tensors())
    tensors, config = (export(call, path, FLAG, "adapter"), peft_of(path.parent / "out"))[1]
    assert_same(tensors, adapter.in_peft())
    assert config["target_modules"] == [name.removesuffix(".weight") for name in adapter.parts]


# What declares alpha: the run's file beside or above the weights, the YAML, the caller.


def pet_yaml(path: Path, **pet_config: object) -> Path:
    return training_yaml(path, {"pet_config": {"pet_type": "lora", **pet_config}})


def alpha_of(call: Call, path: Path, *arguments: object) -> float:
    result = export(call, path, FLAG, "adapter", *arguments)
    assert result.code == 0, result.err
    return peft_of(path.parent / "out")[1]["lora_alpha"]


@pytest.fixture
def undeclared(trained_lora: Path) -> Path:
    (trained_lora.parents[1] / "adapter_config.json").unlink()
    return trained_lora


def test_nothing_declares_alpha(call, undeclared):
    for kind in ("merge", "adapter"):
        result = export(call, undeclared, FLAG, kind)
        assert result.code == 2
        assert "a LoRA of rank 3, but nothing declares its alpha" in result.err
        assert "--lora_alpha" in result.err


def test_the_caller_declares_alpha(call, undeclared):
    assert alpha_of(call, undeclared, "--lora_alpha", 7.5) == 7.5


def test_the_yaml_declares_alpha(tmp_path, call, undeclared):
    yaml = pet_yaml(tmp_path / "train.yaml", lora_rank=RANK, lora_alpha=24, target_modules=".*linear_.*")
    assert alpha_of(call, undeclared, "--config", yaml) == 24


def test_a_yaml_without_alpha_declares_none(tmp_path, call, undeclared):
    yaml = pet_yaml(tmp_path / "train.yaml", lora_rank=RANK)
    assert export(call, undeclared, FLAG, "merge", "--config", yaml).code == 2


def test_a_file_beside_the_weights(call, undeclared):
    adapter_config(undeclared, lora_alpha=5)
    assert alpha_of(call, undeclared) == 5


def test_a_fraction_that_upstream_left_out(tmp_path, call, trained_lora):
    """It writes int(lora_alpha) into adapter_config.json."""
    yaml = pet_yaml(tmp_path / "train.yaml", lora_alpha=ALPHA + 0.5)
    assert alpha_of(call, trained_lora, "--config", yaml) == ALPHA + 0.5


@pytest.mark.parametrize(
    ("in_file", "in_yaml", "option", "shown"),
    [
        ({}, {"lora_alpha": 24}, None, "adapter_config.json: 12"),
        ({}, {}, 13, "--lora_alpha: 13"),
        ({"r": 8}, {}, None, "adapter_config.json: 8 weights: 3"),
        ({}, {"lora_rank": 8}, None, "train.yaml: 8 weights: 3"),
        ({"target_modules": [".*linear_qkv"]}, {}, None, "not in target_modules of"),
        ({}, {"target_modules": ".*q_proj|.*k_proj"}, None, "not in target_modules of"),
    ],
)
def test_contradictions(tmp_path, call, trained_lora, in_file, in_yaml, option, shown):
    adapter_config(trained_lora.parents[1], **in_file)
    options = ["--config", pet_yaml(tmp_path / "train.yaml", **in_yaml)]
    options += ["--lora_alpha", option] if option else []
    result = export(call, trained_lora, FLAG, "merge", *options)
    assert result.code == 2
    assert "is not the adapter that was declared" in result.err
    assert shown in unwrapped(result.err)


@pytest.mark.parametrize("changes", [{"lora_alpha": 0}, {"lora_alpha": "16"}, {"r": -1}, {"lora_alpha": True}], ids=str)
def test_absurd_declarations(call, trained_lora, changes):
    adapter_config(trained_lora.parents[1], **changes)
    result = export(call, trained_lora, FLAG, "merge")
    assert (result.code, "a positive number" in result.err) == (2, True)


@pytest.mark.parametrize("modules", ["(", 5, None], ids=str)
def test_declared_modules_that_are_none(call, trained_lora, modules):
    adapter_config(trained_lora.parents[1], target_modules=modules)
    assert alpha_of(call, trained_lora) == ALPHA


# What is not a whole adapter of this model.


def resaved(path: Path, change) -> Path:
    (file,) = path.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, file)
    return path


FC2 = "decoder.layers.1.mlp.linear_fc2"


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        (lambda t: t.pop(f"{FC2}.lora_B.weight"), "no lora_B beside it"),
        (lambda t: t.pop(f"{FC2}.lora_A.weight"), "no lora_A beside it"),
        (lambda t: t.update({f"{FC2}.lora_A.weight": np.ones((4, 10), np.float32)}), "rank 4"),
        (lambda t: t.update({f"{FC2}.lora_A.weight": np.ones((3, 9), np.float32)}), "(3, 9), (3, 10) expected"),
        (lambda t: t.update({f"{FC2}.lora_B.weight": np.ones((13, 3), np.float32)}), "(13, 3), (12, 3) expected"),
        (lambda t: t.update({f"{FC2}.lora_B.weight": np.ones((12, 3), np.int8)}), "dtype I8"),
        (lambda t: t.pop(f"{FC2}.weight"), f"{FC2}.weight"),
        (
            lambda t: t.update({f"decoder.layers.1.mlp.linear_fc9.lora_{s}.weight": np.ones((3, 3)) for s in "AB"}),
            "no such parameter",
        ),
    ],
)
def test_what_is_not_a_whole_adapter(call, trained_lora, change, shown):
    adapter_config(trained_lora.parents[1], target_modules=None)
    resaved(trained_lora, change)
    for kind in ("merge", "adapter"):
        result = export(call, trained_lora, FLAG, kind)
        assert result.code == 2
        assert shown in unwrapped(result.err)


def test_other_commands(tmp_path, call, call_script, trained_lora, base):
    """They name what to do; none takes it for the base model."""
    (file,) = trained_lora.glob("*.safetensors")
    for arguments in (
        ("check", "--model_dir", base, "--load_checkpoint", file),
        ("infer", "--model_dir", base, "--load_checkpoint", file, "--prompt", "x"),
        ("convert", "--model_dir", base, "--load_checkpoint", file, "--output_dir", tmp_path / "x"),
        ("verify", file),
        ("verify", file, base),
        ("verify", base, file),
    ):
        result = call(*arguments)
        assert result.code == 2, arguments
        assert "is of a LoRA run" in result.err and "mf-qwen3 export --lora merge" in result.err
    out = call("inspect", file).out
    assert f"LoRA        rank 3; alpha in {tmp_path / 'output' / 'adapter_config.json'}; of decoder.layers." in out
    assert "unusual" not in out
    assert f"parameters  {sum(array.size for array in random_tensors(GROUPS).values()):,}\n" in out
    found = json.loads(call("inspect", file, "--json").out)
    assert found["lora"]["ranks"] == [3]
    parameters = {row["name"]: row["parameter"] for row in found["tensors"]}
    assert parameters[f"{FC2}.lora_B.weight"] == f"{FC2}.weight"
    given = ("--model", "qwen3", "--reversed", "--input_path", file, "--output_path", tmp_path / "hf")
    assert "--lora merge" in call_script(*given).err
    result = call_script(*given, "--is_lora", True, FLAG, "merge", "--hf_config", base, "--dtype", "fp32")
    assert (result.code, "--is_lora makes no difference" in result.out) == (0, True)
    assert_same(contents(tmp_path / "hf"), lora(GROUPS).merged(random_tensors(GROUPS)))
    given = ("--model", "qwen3", "--input_path", base, "--output_path", tmp_path / "mf")
    assert "--lora needs --reversed" in call_script(*given, FLAG, "merge").err


def test_inspect_of_ranks(tmp_path, call):
    adapter = lora(GROUPS)
    save_lora_ranks(tmp_path / "output", fused(random_tensors(GROUPS), GROUPS) | adapter.saved, 2)
    out = call("inspect", tmp_path / "output" / "checkpoint").out
    assert "LoRA        rank 3; no file beside or above it declares its alpha; of decoder" in out


def test_strategy_files_of_what_is_trained_alone(tmp_path, call, strategies_of):
    """MindSpore's default; so they don't tell how the base was cut."""
    adapter = lora(GROUPS)
    ranks = save_lora_ranks(tmp_path / "output", fused(random_tensors(GROUPS), GROUPS) | adapter.saved, 2)
    for stage in ranks.strategies:
        for name in stage.keys() - adapter.saved.keys():
            del stage[name]
    strategies_of(ranks)
    given = ["--mindspore_ckpt_dir", ranks.directory, "--src_strategy_dirs", tmp_path]
    result = call("export", *given, "--output_path", tmp_path / "out", FLAG, "merge")
    assert result.code == 2
    assert "only_trainable_params False and only_save_strategy True" in unwrapped(result.err)


def test_another_alpha_is_another_job(tmp_path, undeclared, base):
    """What was interrupted is not gone on with."""
    identities = []
    for alpha in (1.0, 2.0):
        lora_run_of = read_lora_run(open_source(undeclared), None, alpha)
        model = replace(check_trained(lora_run_of.base, base), source=lora_run_of.merged())
        identities.append(jobs.to_hf(model, tmp_path / "out").identity)
    assert identities[0] != identities[1]


# An adapter that is slightly wrong, in every way that was thought of.


def is_right(call: Call, path: Path, base: Path) -> dict[str, bool]:
    """Whether each way out gives what the adapter is by hand; False too where it is refused."""
    adapter, hf = lora(GROUPS), random_tensors(GROUPS)
    found = {}
    for kind in ("merge", "adapter"):
        output = base.parent / f"out_{kind}"
        given = ("--input_path", path, "--output_path", output, "--hf_config", base, FLAG, kind, "--dtype", "fp32")
        try:
            code = call("export", *given).code
        except ValueError:  # of numpy: matrices that can't be multiplied
            code = 1
        if code:
            found[kind] = False
            continue
        expected = adapter.merged(hf) if kind == "merge" else adapter.in_peft()
        given = contents(output)
        found[kind] = given.keys() == expected.keys() and all(np.array_equal(given[n], expected[n]) for n in expected)
        if kind == "adapter":
            config = peft_of(output)[1]
            found[kind] &= (config["r"], config["lora_alpha"]) == (RANK, ALPHA)
    return found


def test_nothing_is_wrong(call, trained_lora, base):
    assert is_right(call, trained_lora, base) == {"merge": True, "adapter": True}


def mutate_parts(fuses, order):
    def mutation(monkeypatch):
        upstream = lora_runs.lora_rules

        def rules(rule, *arguments):
            for made in upstream(rule, *arguments):
                if getattr(made, "fuses", None) == fuses:
                    made = replace(made, tensors=tuple(made.tensors[number] for number in order))
                yield made

        monkeypatch.setattr(lora_runs, "lora_rules", rules)

    return mutation


def mutate_scaling(value):
    return lambda monkeypatch: monkeypatch.setattr(LoraRun, "_scaling", property(value))


def swap_names(monkeypatch):
    upstream = names_of_lora.peft_name
    monkeypatch.setattr(names_of_lora, "peft_name", lambda name, side: upstream(name, "b" if side == "a" else "a"))


def swap_matrices(monkeypatch):
    monkeypatch.setattr(lora_runs, "LowRank", lambda a, b, scaling: LowRank(b, a, scaling))


def swap_alpha_and_rank(monkeypatch):
    upstream = lora_runs.read_lora_run

    def read(*arguments):
        found = upstream(*arguments)
        return replace(found, rank=int(found.alpha), alpha=float(found.rank))

    monkeypatch.setattr(lora_runs, "read_lora_run", read)


def leave_interleaving(monkeypatch):
    upstream = lora_runs.Dialect
    monkeypatch.setattr(lora_runs, "Dialect", lambda layout, **kinds: upstream(Layout(False, False), **kinds))


@pytest.mark.parametrize(
    ("mutate", "kinds"),
    [
        (swap_names, {"adapter"}),
        (swap_matrices, {"merge"}),
        (swap_alpha_and_rank, {"merge", "adapter"}),
        (mutate_scaling(lambda self: 1.0), {"merge"}),
        (mutate_scaling(lambda self: self.rank / self.alpha), {"merge"}),
        (mutate_parts("qkv", (0, 2, 1)), {"adapter"}),
        (mutate_parts("gate_up", (1, 0)), {"adapter"}),
        (leave_interleaving, {"adapter"}),
    ],
)
def test_mutations(monkeypatch, call, trained_lora, base, mutate, kinds):
    mutate(monkeypatch)
    right = is_right(call, trained_lora, base)
    assert {kind for kind, is_right_ in right.items() if not is_right_} == kinds


def test_a_merge_of_the_adapter_alone_with_other_rows(monkeypatch, tmp_path, call, base):
    """Where B is cut for a Hugging Face base, another layout is another model."""
    adapter = lora(GROUPS)
    alone = write_merged(tmp_path / "alone", adapter.saved)
    expected = adapter.merged(random_tensors(GROUPS))
    given = ("--lora_alpha", ALPHA)
    assert_same(contents(exported(call, alone, base, "merge", *given, out="right")), expected)
    flags = [text for flag, value in LAYOUTS[-1].training_flags.items() for text in (f"--{flag}", value)]
    wrong = contents(exported(call, alone, base, "merge", *given, *flags, out="wrong"))
    different = {name for name in expected if not np.array_equal(wrong[name], expected[name])}
    assert different == {name for name in adapter.parts if not name.endswith(("o_proj.weight", "down_proj.weight"))}


def test_the_round_trip(tmp_path, call, trained_lora, base):
    """LoRA run -> PEFT -> merged by hand = LoRA run -> merged, bit for bit."""
    tensors, config = peft_of(exported(call, trained_lora, base, "adapter", out="adapter"))
    by_hand = Lora.of_peft(tensors).merged(contents(base), config["lora_alpha"] / config["r"])
    assert_same(contents(exported(call, trained_lora, base, "merge", out="merged")), by_hand)


def test_unify_keeps_the_adapter(tmp_path, call, strategies_of):
    whole = fused(random_tensors(GROUPS), GROUPS) | lora(GROUPS).saved
    ranks = save_lora_ranks(tmp_path / "output", whole, 2)
    run(jobs.unify(ranks.open(), tmp_path / "out"))
    assert_same(contents(tmp_path / "out"), whole)
