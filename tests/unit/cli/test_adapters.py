"""``--adapter``: as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from mf_qwen3_bridge.convert.run import run
from mf_qwen3_bridge.inputs.preflight import check
from tests.support.adapters import ADAPTERS, base_of, matrices, write_adapter
from tests.support.checkpoints import MOE_SPEC, assert_same, contents, hf_config, random_tensors, write
from tests.support.cli import Call, convert
from tests.support.damage import unwrapped

ENDS = ("q_proj", "down_proj")


@pytest.fixture(params=["dense", "moe"])
def base(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    spec = {"moe": MOE_SPEC}.get(request.param)
    tensors = random_tensors(*[spec] if spec else [], dtype="BF16")
    return write(tmp_path / "base", tensors, hf_config(*[spec] if spec else [], torch_dtype="bfloat16"))


@pytest.fixture
def lora(base: Path) -> Path:
    return write_adapter(base.parent / "lora", matrices(contents(base), *ENDS), target_modules=list(ENDS))


def test_convert_writes_a_merged_hugging_face_directory(call: Call, base: Path, lora: Path):
    result = convert(call, base, "--adapter", lora, "--layout", "hf")
    assert result.code == 0, result.err
    assert "note        adapter " in result.out and "LoRA of rank 2, scaling 3" in unwrapped(result.out)
    merged = base.parent / "out"
    expected = {target.name: target.make() for target in check(base, adapters=lora).plan(check(base).dialect).targets}
    assert_same(contents(merged), expected)
    assert json.loads((merged / "config.json").read_text()) == json.loads((base / "config.json").read_text())
    equal = call("verify", base, merged, "--adapter", lora)
    assert equal.code == 0 and "bit for bit" in equal.out and "adapter     " in equal.out
    assert call("verify", base, merged).code == 2
    assert call("verify", merged, base, "--adapter", lora).code == 2
    twice = convert(call, base, "--adapter", f"{lora}:2", "--layout", "hf", "--dtype", "fp32")
    assert twice.code == 2  # the directory is there


def test_converting_a_merged_directory_gives_what_converting_with_the_adapter_gives(call: Call, base: Path, lora: Path):
    assert convert(call, base, "--adapter", lora, "--layout", "hf").code == 0
    merged = (base.parent / "out").rename(base.parent / "merged")
    for layout in ("train", "infer"):
        for source, more in ((base, ("--adapter", lora)), (merged, ())):
            out = base.parent / f"{source.name}-{layout}"
            result = call("convert", "--model_dir", source, "--output_dir", out, "--layout", layout, *more)
            assert result.code == 0, result.err
        assert_same(contents(base.parent / f"base-{layout}"), contents(base.parent / f"merged-{layout}"))


def test_ranks(call: Call, base: Path, lora: Path):
    assert convert(call, base, "--adapter", lora, "--layout", "hf").code == 0
    merged = (base.parent / "out").rename(base.parent / "merged")
    for source, more in ((base, ("--adapter", lora)), (merged, ())):
        out = base.parent / f"{source.name}-ranks"
        result = call("convert", "--model_dir", source, "--output_dir", out, "--layout", "infer", "--tp", 2, *more)
        assert result.code == 0, result.err
    for rank in ("rank_0", "rank_1"):
        assert_same(*(contents(base.parent / f"{source}-ranks" / rank) for source in ("base", "merged")))


def test_layout_hf_changes_something_and_is_whole(call: Call, base: Path, lora: Path):
    nothing = convert(call, base, "--layout", "hf")
    assert nothing.code == 2 and "nothing would change" in nothing.err
    assert convert(call, base, "--layout", "hf", "--tp", 2, "--adapter", lora).code == 2
    other_dtype = convert(call, base, "--layout", "hf", "--dtype", "fp32")
    assert other_dtype.code == 0
    assert all(value.dtype == np.float32 for value in contents(base.parent / "out").values())


def test_another_adapter_does_not_resume_an_interrupted_job(call: Call, base: Path, lora: Path, monkeypatch):
    from mf_qwen3_bridge.convert import jobs

    first, again, scaled = (
        jobs.to_plain_hf(check(base, adapters=adapter), base.parent / "out") for adapter in (lora, lora, f"{lora}:0.5")
    )
    assert first.identity == again.identity != scaled.identity
    run(first)


def test_check_says_what_is_merged(call: Call, base: Path, lora: Path):
    result = call("check", "--model_dir", base, "--adapter", lora, "--adapter", f"{lora}:-1")
    assert result.code == 0
    lines = [line for line in result.out.splitlines() if line.startswith("adapter     ")]
    assert len(lines) == 2 and "scaling 3" in lines[0] and "scaled by -1: LoRA of rank 2, scaling -3" in lines[1]
    assert "result      config and weights fit" in result.out


def test_inspect_and_verify(call: Call, base: Path, lora: Path):
    result = call("inspect", base, "--adapter", lora)
    assert result.code == 0 and "adapter     " in result.out
    found = json.loads(call("inspect", base, "--adapter", lora, "--json").out)
    assert len(found["adapters"]) == 1
    result = call("verify", base, "--adapter", lora)
    assert result.code == 0 and "adapter     " in result.out, result.err
    (base / "config.json").unlink()
    assert "adapter     " in call("verify", base, "--adapter", lora).out


@pytest.mark.parametrize("command", ["check", "convert", "inspect", "verify"])
def test_an_adapter_of_another_model_is_refused(call: Call, command: str):
    adapter, base = ADAPTERS / "dense_lora", base_of("moe_experts")
    arguments = {"check": ["--model_dir"], "convert": ["--output_dir", "nowhere", "--model_dir"]}.get(command, [])
    result = call(command, *arguments, base, "--adapter", adapter)
    assert (
        result.code == 2
        and "does not fit" in result.err
        and "the adapter was made for another model" in unwrapped(result.err)
    )


def test_an_adapter_alone(call: Call, lora: Path):
    for arguments in (("check", "--model_dir", lora), ("inspect", lora), ("verify", lora)):
        result = call(*arguments)
        assert result.code == 2 and "--adapter" in result.err
    assert load_file(lora / "adapter_model.safetensors")
