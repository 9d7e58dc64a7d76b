"""MindFormers' inference network with PEFT adapters merged computes what transformers and PEFT compute."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mindformers import AutoConfig

import mf_qwen3_bridge
import yaml
from mf_qwen3_bridge.errors import BridgeError
from mf_qwen3_bridge.inputs.preflight import check
from mf_qwen3_bridge.mindformers.load import load_network
from mf_qwen3_bridge.mindformers.patching.configs import named_adapters
from mf_qwen3_bridge.model.rules import HF
from tests.support.adapters import ADAPTERS, NAMES, adapter_golden, base_of
from tests.support.checkpoints import write
from tests.support.commands import REGISTER_PATH, ROOT, TRAINER, free_port, run_command
from tests.support.documents import blocks
from tests.support.golden import CHECKPOINTS, TOLERANCE
from tests.support.networks import SMALL_CACHE, bits, empty_network, greedy_tokens, logits_error
from tests.support.tokenizers import NEW_TOKENS, spell, with_generation_config, with_tokenizer

EVERY_ADAPTER = pytest.mark.parametrize("name", NAMES)


@EVERY_ADAPTER
def test_logits_and_greedy_tokens_are_pefts(name: str):
    network = mf_qwen3_bridge.from_pretrained(
        base_of(name), adapter=ADAPTERS / name, device_target="CPU", **SMALL_CACHE
    )
    expected = adapter_golden(name)
    assert logits_error(network, expected) < TOLERANCE
    assert greedy_tokens(network, [g.prompt for g in expected]) == [g.tokens for g in expected]


@EVERY_ADAPTER
@pytest.mark.parametrize("params_dtype", ["float32", "bfloat16"])
def test_loaders_agree_with_each_other_and_with_a_merged_checkpoint(tmp_path: Path, name: str, params_dtype: str):
    adapter = str(ADAPTERS / name)
    direct = mf_qwen3_bridge.from_pretrained(base_of(name), adapter=adapter, params_dtype=params_dtype)
    delegated = mf_qwen3_bridge.from_pretrained(
        base_of(name), adapter=[adapter], use_training_conversion=True, params_dtype=params_dtype
    )
    merged = write(
        tmp_path,
        {target.name: target.make() for target in check(base_of(name), adapters=adapter).plan(HF, "F32").targets},
    )
    shutil.copy(base_of(name) / "config.json", tmp_path)
    assert bits(direct) == bits(delegated) == bits(mf_qwen3_bridge.from_pretrained(merged, params_dtype=params_dtype))
    assert bits(direct) != bits(mf_qwen3_bridge.from_pretrained(base_of(name), params_dtype=params_dtype))


def test_a_scaled_adapter_and_its_opposite_are_the_base():
    """Up to float32's rounding."""
    name = "dense_lora"
    adapter = ADAPTERS / name
    network = mf_qwen3_bridge.from_pretrained(base_of(name), adapter=[(adapter, 0.5), f"{adapter}:-0.5"])
    base = mf_qwen3_bridge.from_pretrained(base_of(name))
    for parameter, other in zip(network.parameters_dict().values(), base.parameters_dict().values()):
        np.testing.assert_allclose(parameter.asnumpy(), other.asnumpy(), rtol=0, atol=1e-6)


class TestPatched:
    @pytest.fixture(autouse=True)
    def patched(self):
        mf_qwen3_bridge.patch()
        yield
        mf_qwen3_bridge.unpatch()

    def config(self, name: str, value: Any) -> Any:
        return AutoConfig.from_pretrained(base_of(name), pretrained_adapter_dir=value)

    @pytest.mark.parametrize("name", ["dense_dora", "moe_stacked"])
    def test_load_weights_merges_what_the_config_names(self, name: str):
        network, model = empty_network(base_of(name))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("mf_qwen3_bridge.mindformers.patching.hooks.named_adapters", lambda _: str(ADAPTERS / name))
            network.load_weights(str(base_of(name)))
        assert logits_error(network, adapter_golden(name)) < TOLERANCE
        plain, _ = empty_network(base_of(name))
        load_network(plain, model)
        assert bits(plain) != bits(network)

    def test_the_key_does_not_reach_upstreams_config(self):
        for value in (None, "lora", ["lora", "other:0.5"]):
            config = self.config("dense_lora", value)
            assert named_adapters(config) == value
            assert not hasattr(config, "pretrained_adapter_dir")
            assert "pretrained_adapter_dir" not in config.to_dict()

    def test_what_can_not_be_merged_into_is_refused(self, monkeypatch: pytest.MonkeyPatch):
        network, _ = empty_network(base_of("dense_lora"))
        monkeypatch.setattr("mf_qwen3_bridge.mindformers.patching.hooks.named_adapters", lambda _: "lora")
        with pytest.raises(BridgeError, match="can't be merged into weights in memory"):
            network.load_weights(weights={})
        with pytest.raises(BridgeError, match="adapter lora is no directory"):
            network.load_weights(str(base_of("dense_lora")))


@pytest.mark.parametrize("name", ["dense_rslora_ends", "moe_experts"])
@pytest.mark.parametrize("command", ["run_mindformer", "infer"])
def test_a_yaml_names_the_adapter(tmp_path: Path, name: str, command: str):
    """In ``run_mindformer.py`` and in ``mf-qwen3 infer --config``."""
    directory = with_generation_config(with_tokenizer(base_of(name).name, tmp_path))
    document = yaml.safe_load((ROOT / "yaml" / "cpu" / "predict_qwen3.yaml").read_text())
    document |= {"pretrained_model_dir": str(directory)}
    document["model"]["model_config"] |= {"pretrained_adapter_dir": str(ADAPTERS / name), "seq_length": 64}
    document["generation_config"]["max_new_tokens"] = NEW_TOKENS
    config = tmp_path / "predict.yaml"
    config.write_text(yaml.safe_dump(document))
    cases = adapter_golden(name)
    prompts = [spell(case.prompt) for case in cases]
    if command == "infer":
        words = [argument for prompt in prompts for argument in ("--prompt", prompt)]
        flags = ["--model_dir", directory, "--config", config, "--max_new_tokens", NEW_TOKENS]
        result = run_command(["mf-qwen3", "infer", *flags, *words], tmp_path)
        printed, expected = result.stdout, [spell(case.tokens[:NEW_TOKENS]) for case in cases]
        assert f"adapter     {ADAPTERS / name}: LoRA of rank" in printed
    else:
        flags = ["--config", config, "--register_path", REGISTER_PATH, "--predict_data", *prompts]
        result = run_command(["python", TRAINER, *flags], tmp_path)
        file = tmp_path / "text_generation_result.txt"
        printed = file.read_text() if file.exists() else ""
        expected = [spell(case.prompt + case.tokens[:NEW_TOKENS]) for case in cases]
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert all(text in printed for text in expected), printed


PAGE = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")


@pytest.mark.newest_only  # the tests above show the same on every release
def test_the_commands_of_the_page(tmp_path: Path):
    """In a directory that holds what they name; those for 8 cards with two processes."""
    name = "dense_lora"
    with_tokenizer(base_of(name).name, tmp_path).rename(tmp_path / "Qwen3-8B")
    for adapter in ("my-adapter", "other-adapter"):
        shutil.copytree(ADAPTERS / name, tmp_path / adapter)
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    lines = "".join(blocks(PAGE, "bash")).splitlines()
    assert len(lines) == 6
    printed = ""
    for line in lines:
        for eight in ("--worker_num=8", "--local_worker_num=8"):
            line = line.replace(eight, eight.replace("8", "2"))
        line = line.replace("--master_port=8118", f"--master_port={free_port()}")
        result = run_command(["bash", "-c", line], tmp_path)
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
        printed += result.stdout
    assert all(line in printed for text in blocks(PAGE, "text") for line in text.splitlines())
    result = run_command(["python", "-c", "".join(blocks(PAGE, "python"))], tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    (document,) = map(yaml.safe_load, blocks(PAGE, "yaml"))
    assert document["model"]["model_config"].keys() == {"auto_register", "pretrained_adapter_dir"}


def test_committed_adapters_are_of_committed_bases():
    assert all((CHECKPOINTS / base_of(name).name).is_dir() for name in NAMES)
