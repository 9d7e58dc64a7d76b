"""``network.load_weights``, which MindFormers' predict calls: all dialects, everything loaded, or an error."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindformers.models.build_config import get_model_config
from mindformers.models.qwen3.modeling_qwen3_infer import InferenceQwen3ForCausalLM
from mindformers.models.qwen3_moe.modeling_qwen3_moe_infer import InferenceQwen3MoeForCausalLM
from mindformers.tools.register import MindFormerConfig
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import mf_qwen3_bridge
from mf_qwen3_bridge.convert.jobs import to_mindformers
from mf_qwen3_bridge.convert.run import run
from mf_qwen3_bridge.errors import BridgeError
from mf_qwen3_bridge.inputs.preflight import check
from mf_qwen3_bridge.mindformers.network import build_inference_network
from mf_qwen3_bridge.model.layouts import INFERENCE, TRAINING_DEFAULT
from mf_qwen3_bridge.model.parallel import ParallelConfig
from mf_qwen3_bridge.model.rules import INFER, TRAIN, Dialect
from tests.support.checkpoints import hf_config, random_tensors, write
from tests.support.damage import change_config
from tests.support.golden import CHECKPOINTS, NAMES, TOLERANCE, golden
from tests.support.networks import MOE, bits, empty_network, greedy_tokens, logits_error, playing


@pytest.fixture(autouse=True)
def patched():
    mf_qwen3_bridge.patch()


def network_by_yaml(directory: Path, **model_config: Any) -> Any:
    """The network that MindFormers builds of a YAML with ``pretrained_model_dir``."""
    empty_network(CHECKPOINTS / "untied_fp32")  # a context that is not use_legacy
    dtypes = {"params_dtype": "float32", "compute_dtype": "float32", "rotary_dtype": "float32"}
    config = get_model_config(
        MindFormerConfig(
            pretrained_model_dir=str(directory), model_config=MindFormerConfig(**dtypes, num_blocks=64, **model_config)
        )
    )
    is_moe = config.model_type == "qwen3_moe"
    return (InferenceQwen3MoeForCausalLM if is_moe else InferenceQwen3ForCausalLM)(config)


@pytest.mark.parametrize("name", NAMES)
def test_a_hugging_face_directory(name: str):
    network = network_by_yaml(CHECKPOINTS / name)
    network.load_weights(str(CHECKPOINTS / name))
    assert logits_error(network, golden(name)) < TOLERANCE


@pytest.mark.parametrize("target", [TRAIN, Dialect(INFERENCE), INFER], ids=str)
@pytest.mark.parametrize("name", ["tied_bf16", "moe_bf16"])
def test_files_with_layout_metadata(tmp_path: Path, name: str, target: Dialect):
    run(to_mindformers(check(CHECKPOINTS / name), target, tmp_path / "mindformers"))
    network = network_by_yaml(CHECKPOINTS / name)
    network.load_weights(str(tmp_path / "mindformers"))
    assert bits(network) == bits(mf_qwen3_bridge.from_pretrained(CHECKPOINTS / name))


def test_without_layout_metadata_the_yaml_has_to_declare_the_layout(tmp_path: Path):
    directory = CHECKPOINTS / "untied_fp32"
    write(tmp_path / "theirs", {t.name: t.make() for t in check(directory).plan(TRAIN).targets})
    flags = TRAINING_DEFAULT.training_flags
    for declared in ({}, {"use_interleaved_weight_layout_mlp": True}):
        with pytest.raises(BridgeError, match="nothing declares the layout of QKV and gate/up"):
            network_by_yaml(directory, **declared).load_weights(str(tmp_path / "theirs"))
    network = network_by_yaml(directory, **flags)
    network.load_weights(str(tmp_path / "theirs"))
    assert logits_error(network, golden("untied_fp32")) < TOLERANCE


def test_contiguous_flags_do_not_declare_enough(tmp_path: Path):
    """The number of blocks depends on the training run's ``model_parallel``, which no inference YAML declares."""
    directory = CHECKPOINTS / "untied_fp32"
    blocks = Dialect(INFERENCE.on(2))
    write(tmp_path / "theirs", {t.name: t.make() for t in check(directory).plan(blocks).targets})
    network = network_by_yaml(directory, **INFERENCE.training_flags)
    with pytest.raises(BridgeError, match="nothing declares the layout of QKV and gate/up"):
        network.load_weights(str(tmp_path / "theirs"))


def test_nothing_is_generated_from_weights_that_were_not_loaded():
    network = network_by_yaml(CHECKPOINTS / "untied_fp32")
    with pytest.raises(BridgeError, match="no weights were loaded"):
        network.generate(input_ids=[[1, 2, 3]], max_new_tokens=2)
    tensors = mf_qwen3_bridge.load_checkpoint(CHECKPOINTS / "untied_fp32")
    assert ms.load_param_into_net(network, network.convert_weight_dict(tensors)) == ([], [])
    first = golden("untied_fp32")[0]
    assert greedy_tokens(network, [first.prompt], 4) == [first.tokens[:4]]


@pytest.mark.parametrize("form", [list, np.array])
def test_a_token_that_the_model_does_not_know_is_named(form: Callable[[Any], Any]):
    """Such as a larger model's tokenizer gives. Upstream fails in an operator, or computes with another row."""
    network = network_by_yaml(CHECKPOINTS / "untied_fp32")
    network.load_weights(CHECKPOINTS / "untied_fp32")
    size = network.config.vocab_size
    for tokens in (form([1, 2, size + 3]), form([[1, 2], [size + 3, -1]])):
        with pytest.raises(BridgeError, match=f"gives token {size + 3}, but the model knows {size}"):
            network.generate(tokens, max_new_tokens=2)
        with pytest.raises(BridgeError, match=f"gives token {size + 3}, but the model knows {size}"):
            network.generate(input_ids=tokens, max_new_tokens=2)
    mf_qwen3_bridge.unpatch()
    unpatched = mf_qwen3_bridge.from_pretrained(CHECKPOINTS / "untied_fp32")
    with pytest.raises(BridgeError, match=f"gives token {size + 3}, but the model knows {size}"):
        unpatched.generate([[size + 3]], max_new_tokens=2)


def test_a_single_file():
    network = network_by_yaml(CHECKPOINTS / "untied_fp32")
    (file,) = (CHECKPOINTS / "untied_fp32").glob("*.safetensors")
    network.load_weights(file)
    assert logits_error(network, golden("untied_fp32")) < TOLERANCE


# ----------------------------------------------------------------------------------------------------- weights=


def tensors_of(directory: Path) -> dict[str, np.ndarray]:
    return {name: value for file in sorted(directory.glob("*.safetensors")) for name, value in load_file(file).items()}


FORMS: dict[str, Callable[[Any, dict[str, np.ndarray]], Any]] = {
    "mapping": lambda network, tensors: tensors,
    "list": lambda network, tensors: list(tensors.items()),
    "generator": lambda network, tensors: ((name, value) for name, value in tensors.items()),
    "upstream's names": lambda network, tensors: [(network.convert_name(n), value) for n, value in tensors.items()],
    "Tensors": lambda network, tensors: ((name, ms.Tensor(value)) for name, value in tensors.items()),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["untied_fp16", "moe_fp32"])
def test_weights_in_memory(name: str, form: str):
    network = network_by_yaml(CHECKPOINTS / name)
    network.load_weights(weights=FORMS[form](network, tensors_of(CHECKPOINTS / name)))
    assert bits(network) == bits(mf_qwen3_bridge.from_pretrained(CHECKPOINTS / name))


def test_slices_of_open_files():
    network = network_by_yaml(CHECKPOINTS / "moe_fp32")
    files = [safe_open(file, "np") for file in sorted((CHECKPOINTS / "moe_fp32").glob("*.safetensors"))]
    network.load_weights("", ((name, file.get_slice(name)) for file in files for name in file.keys()))  # noqa: SIM118
    assert bits(network) == bits(mf_qwen3_bridge.from_pretrained(CHECKPOINTS / "moe_fp32"))


def test_weights_in_memory_are_checked():
    network = network_by_yaml(CHECKPOINTS / "untied_fp32")
    tensors = tensors_of(CHECKPOINTS / "untied_fp32")
    up = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(BridgeError, match="up_proj"):
        network.load_weights(weights={name: value for name, value in tensors.items() if name != up})
    with pytest.raises(BridgeError, match=r"model\.extra"):
        network.load_weights(weights=tensors | {"model.extra": np.ones(1)})
    with pytest.raises(BridgeError, match="all zero"):
        network.load_weights(weights=tensors | {up: np.zeros_like(tensors[up])})
    with pytest.raises(BridgeError, match="no weights are given"):
        network.load_weights("nowhere")


# ------------------------------------------------------------------------------------- what upstream loads silently


def copy_of(name: str, scratch: Path) -> Path:
    return shutil.copytree(CHECKPOINTS / name, scratch / name)


def missing_shard(directory: Path) -> None:
    sorted(directory.glob("*.safetensors"))[0].unlink()


def config(**entries: Any) -> Callable[[Path], None]:
    return lambda directory: change_config(directory, **entries)


def stripped_awq(directory: Path) -> None:
    """Linear layers quantised, and no ``quantization_config``."""
    for file in directory.glob("*.safetensors"):
        tensors = load_file(file)
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            base = name.removesuffix("weight")
            rows, columns = tensors.pop(name).shape
            tensors[base + "qweight"] = np.ones((columns, rows // 8), np.int32)
            tensors[base + "scales"] = np.ones((1, rows), np.float16)
        save_file(tensors, file)


def eight_bits(directory: Path) -> None:
    (file,) = directory.glob("*.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(file)
    rows, columns = tensors[name].shape
    scale = {f"{name}_scale_inv": np.ones((1, 1), np.float32)}
    save_file(tensors | {name: np.ones((rows, columns), np.int8)} | scale, file)


def output_bias(directory: Path) -> None:
    (file,) = directory.glob("*.safetensors")
    save_file(load_file(file) | {"model.layers.0.self_attn.o_proj.bias": np.ones(8, np.float32)}, file)


def stale_file_without_index(directory: Path) -> None:
    (file,) = directory.glob("*.safetensors")
    save_file({name: value * 2 for name, value in load_file(file).items()}, directory / "consolidated.safetensors")


DAMAGES = {
    "missing shard": ("split_shards", missing_shard, r"model-00001"),
    "smaller vocab_size": ("untied_fp32", config(vocab_size=64), "vocab_size"),
    "smaller intermediate_size": ("untied_fp32", config(intermediate_size=32), "intermediate_size"),
    "fewer heads": ("untied_fp32", config(num_attention_heads=2), "num_attention_heads"),
    "fewer layers": ("untied_fp32", config(num_hidden_layers=1), "num_hidden_layers"),
    "more layers": ("untied_fp32", config(num_hidden_layers=9), "num_hidden_layers"),
    "untied in config only": ("tied_bf16", config(tie_word_embeddings=False), "lm_head|output_layer"),
    "AWQ": ("untied_fp32", stripped_awq, "qweight"),
    "8 bits": ("untied_fp32", eight_bits, "quantised|scale_inv"),
    "o_proj.bias": ("untied_fp32", output_bias, "o_proj.bias"),
    "stale file": ("untied_fp32", stale_file_without_index, "consolidated"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_refusals(tmp_path: Path, damage: str):
    name, change, message = DAMAGES[damage]
    directory = copy_of(name, tmp_path)
    change(directory)
    network = network_by_yaml(directory)
    with pytest.raises(BridgeError, match=message):
        network.load_weights(str(directory))


def test_a_file_that_the_index_does_not_name_is_not_read(tmp_path: Path):
    directory = copy_of("split_shards", tmp_path)
    save_file({n: v * 2 for n, v in tensors_of(directory).items()}, directory / "zz.safetensors")
    network = network_by_yaml(directory)
    network.load_weights(str(directory))
    assert logits_error(network, golden("split_shards")) < TOLERANCE


def test_a_network_of_another_config(tmp_path: Path):
    """What the weights' config.json says is held against what the network was built from: shapes and arithmetic."""
    directory = copy_of("untied_fp32", tmp_path)
    config(rope_theta=5000.0)(directory)
    network = network_by_yaml(CHECKPOINTS / "untied_fp32")
    with pytest.raises(BridgeError, match="rope_theta"):
        network.load_weights(str(directory))
    with pytest.raises(BridgeError, match="hidden_size"):
        network_by_yaml(CHECKPOINTS / "mha").load_weights(str(directory))
    with pytest.raises(BridgeError, match="num_experts"):
        network_by_yaml(CHECKPOINTS / "moe_fp32").load_weights(str(directory))


def test_each_network_has_its_own_rope():
    """Upstream keeps tables by dimension and base, not by YaRN's numbers."""
    scaling = check(CHECKPOINTS / "yarn").hf_config["rope_scaling"]
    network_by_yaml(CHECKPOINTS / "yarn", rope_scaling={**scaling, "factor": 2 * scaling["factor"]})
    network = network_by_yaml(CHECKPOINTS / "yarn")
    network.load_weights(str(CHECKPOINTS / "yarn"))
    assert logits_error(network, golden("yarn")) < TOLERANCE


def test_a_network_that_was_built_before_the_patch(tmp_path: Path):
    mf_qwen3_bridge.unpatch()
    network, model = empty_network(CHECKPOINTS / "tied_bf16")
    run(to_mindformers(model, TRAIN, tmp_path / "train"))
    mf_qwen3_bridge.patch()
    network.load_weights(str(tmp_path / "train"))
    assert logits_error(network, golden("tied_bf16")) < TOLERANCE


# ------------------------------------------------------------------------------------------------------------ parallel


@pytest.mark.parametrize("parallel", [ParallelConfig(2), ParallelConfig(2, 2), ParallelConfig(1, 2, 2)], ids=str)
def test_experts_of_a_training_checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, parallel: ParallelConfig):
    """Upstream gives every expert parallel rank the first experts, or fails."""
    spec = replace(MOE, num_layers=1)
    hf = write(tmp_path / "hf", random_tensors(spec), hf_config(spec))
    model = check(hf)
    run(to_mindformers(model, TRAIN, tmp_path / "train"))
    for number in range(parallel.world_size):
        with playing(monkeypatch, parallel, number):
            from_hf, from_training = (build_inference_network(model.hf_config) for _ in range(2))
            from_hf.load_weights(str(hf))
            from_training.load_weights(str(tmp_path / "train"))
            assert bits(from_training) == bits(from_hf)
