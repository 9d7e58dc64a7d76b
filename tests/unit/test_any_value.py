"""Any value in any field of what is read: the commands go on or refuse with a BridgeError; nothing else escapes.

For many more examples: ``ANY_VALUE_EXAMPLES=5000 python -m pytest tests/unit/test_any_value.py``.
"""

from __future__ import annotations

import json
import math
import os
import signal
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import yaml
from mf_qwen3_bridge.cli.main import cli
from mf_qwen3_bridge.errors import BridgeError
from mf_qwen3_bridge.model.rules import TRAIN
from tests.support.adapters import matrices, write_adapter
from tests.support.checkpoints import MOE_SPEC, SPEC, hf_config, random_tensors, write
from tests.support.quantised import compressed_config, fp8_config, quantise_model, write_model

EXAMPLES = int(os.environ.get("ANY_VALUE_EXAMPLES", "60"))
any_value_is_tried = settings(
    max_examples=EXAMPLES,
    derandomize="ANY_VALUE_EXAMPLES" not in os.environ,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)

ODD = [
    *(None, True, False, 0, 1, -1, 2, 3, 2**31, 2**63, 2**64, -(2**70), 10**400, 0.0, -0.0, 0.5, 1.0, 1e308, 1e-320),
    *(
        math.inf,
        -math.inf,
        math.nan,
        "",
        " ",
        "x",
        "0",
        "1",
        "1e6",
        "²",
        "٣",
        "true",
        "\0",
        "a\nb",
        "\ud800",
        "..",
        "/",
    ),
    *("9" * 5000, "x" * 100_000, "/" * 5000, "~", "a\tb|c", "\x1b[31m", "Qwen3ForCausalLM", "qwen3_moe", "yarn"),
    *([], {}, [1], [None], [[]], {"": None}, {"a": 1}, [{"a": [1, 2]}], {"rope_type": "yarn"}, ["full_attention"]),
]
text = st.text(max_size=8) | st.text(st.characters(), max_size=3)
scalars = st.sampled_from([value for value in ODD if not isinstance(value, list | dict)]) | st.integers() | st.floats()
any_json = st.sampled_from(ODD) | st.recursive(
    scalars | text, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3), max_leaves=6
)


@contextmanager
def watched(seconds: int = 60) -> Iterator[None]:
    """Whoever hangs fails."""

    def too_long(*_: object) -> None:
        raise AssertionError(f"hangs: no answer within {seconds} s")

    previous = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def run(*arguments: object) -> None:
    """A command, as its user gives it: it is done, or refuses with a message that can be printed."""
    with watched():
        try:
            result = CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)
        except BridgeError as error:
            str(error).encode("utf-8", "backslashreplace")
        else:
            assert result.exit_code == 0, (arguments, result.output)


ADAPTER = {"r": 2, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf, moe and sharded from Hugging Face; trained from MindFormers; each is changed, and put back."""
    root = tmp_path_factory.mktemp("any_value")
    write(root / "hf", random_tensors(), hf_config())
    write(root / "moe", random_tensors(MOE_SPEC), hf_config(MOE_SPEC))
    for kind, quantization in QUANTIZATIONS.items():
        stored, _ = quantise_model(random_tensors(), quantization)
        write_model(root / kind, stored, hf_config(quantization_config=quantization))
    write(root / "sharded", random_tensors(), hf_config(), shards=2)
    write(root / "trained", random_tensors(dialect=TRAIN))
    write(root / "trained_moe", random_tensors(MOE_SPEC, TRAIN))
    write_adapter(root / "lora", matrices(random_tensors(), "q_proj", "v_proj"), **ADAPTER)
    return root


@contextmanager
def changed(file: Path, content: bytes | str) -> Iterator[None]:
    before = file.read_bytes() if file.exists() else None
    file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    try:
        yield
    finally:
        if before is None:
            file.unlink()
        else:
            file.write_bytes(before)


def put(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of a document with a value in a place of it; what is on the way there is made."""
    if not path:
        return value
    document = deepcopy(document) if isinstance(document, dict) else {}
    document[path[0]] = put(document.get(path[0]), path[1:], value)
    return document


# ---------------------------------------------------------------------------------------------------------- config.json

CONFIG_KEYS = sorted(
    {
        *hf_config(MOE_SPEC),
        *hf_config(SPEC),
        *("num_local_experts", "dtype", "rope_parameters", "quantization_config", "layer_types", "use_sliding_window"),
        *("partial_rotary_factor", "shared_expert_intermediate_size", "bos_token_id", "eos_token_id", "pad_token_id"),
        *("initializer_range", "attention_bias", "unknown", "tie_word_embeddings", "sliding_window"),
    }
)
ROPE_KEYS = (
    *("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow"),
    *("mscale", "mscale_all_dim", "attention_factor", "attn_factor", "truncate", "unknown"),
)
IN_CONFIG = [
    (),
    *((key,) for key in CONFIG_KEYS),
    *((section, key) for section in ("rope_scaling", "rope_parameters") for key in ROPE_KEYS),
    *(("quantization_config", key) for key in ("quant_method", "bits", "weight_block_size", "fmt", "unknown")),
]
QUANTIZATIONS = {"fp8": fp8_config(), "compressed": compressed_config()}
GROUP = ("config_groups", "group_0")
IN_QUANTIZATION = [
    (),
    *((key,) for key in (*fp8_config(), "scale_fmt", "expert_dtype", "ignored_layers", "unknown")),
    *((key,) for key in (*compressed_config(), "transform_config", "sparsity_config")),
    *((*GROUP, key) for key in ("targets", "weights", "format")),
    *((*GROUP, "weights", key) for key in compressed_config()["config_groups"]["group_0"]["weights"]),
]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


@any_value_is_tried
@given(
    kind=st.sampled_from(["hf", "moe"]),
    changes=st.lists(st.tuples(st.sampled_from(IN_CONFIG), any_json), min_size=1, max_size=3),
    yarn=st.booleans(),
)
def test_config_json(there: Path, kind, changes, yarn):
    directory = there / kind
    config = hf_config(MOE_SPEC if kind == "moe" else SPEC) | ({"rope_scaling": YARN} if yarn else {})
    for path, value in changes:
        config = put(config, path, value)
    with changed(directory / "config.json", json.dumps(config)):
        for command in ("inspect", "verify"):
            run(command, directory)
        run("check", "--model_dir", directory)
        run("convert", "--model_dir", directory, "--output_dir", there / "out", "--dry_run")
        trained = there / ("trained_moe" if kind == "moe" else "trained")
        run("export", "--input_path", trained, "--hf_config", directory, "--output_path", there / "out", "--dry_run")


@any_value_is_tried
@given(
    kind=st.sampled_from(sorted(QUANTIZATIONS)),
    changes=st.lists(st.tuples(st.sampled_from(IN_QUANTIZATION), any_json), min_size=1, max_size=3),
)
def test_quantization_config(there: Path, kind, changes):
    directory, config = there / kind, QUANTIZATIONS[kind]
    for path, value in changes:
        config = put(config, path, value)
    with changed(directory / "config.json", json.dumps(hf_config(quantization_config=config))):
        for command in ("inspect", "verify"):
            run(command, directory)
        run("check", "--model_dir", directory)
        run("convert", "--model_dir", directory, "--layout", "hf", "--output_dir", there / "out", "--dry_run")


# ---------------------------------------------------------------------------------------------------------------- YAML

MODEL_CONFIG = {"qkv_concat": True, "use_contiguous_weight_layout_attention": False, "num_layers": SPEC.num_layers}
DOCUMENT = {"run_mode": "finetune", "use_parallel": True, "model": {"model_config": MODEL_CONFIG}}


def model_config_keys() -> list[str]:
    from mf_qwen3_bridge.inputs.mindformers_config import COMPUTED_NAMES, OPTIONS
    from mf_qwen3_bridge.model.spec import MINDFORMERS_NAMES

    keys = {key for names in MINDFORMERS_NAMES.values() for key in names} | OPTIONS | {"rope_scaling", "model_type"}
    keys |= {key for name, names in COMPUTED_NAMES.items() for key in (name, *names)}
    keys |= {"max_position_embeddings", "bos_token_id", "eos_token_id", "initializer_range", "auto_register", "unknown"}
    return sorted(keys | {"use_contiguous_weight_layout_attention", "use_interleaved_weight_layout_mlp"})


IN_YAML = [
    *((), ("model",), ("model", "model_config"), ("parallel_config",), ("parallel",), ("context",), ("checkpoint",)),
    *((key,) for key in ("run_mode", "use_parallel", "pretrained_model_dir", "load_checkpoint", "unknown", 1, None)),
    *(("parallel_config", key) for key in ("model_parallel", "expert_parallel", "data_parallel", "pipeline_stage")),
    *(("parallel_config", key) for key in ("context_parallel", "unknown")),
    *(("parallel", key) for key in ("enable_parallel_optimizer", "parallel_mode")),
    *(("model", "model_config", key) for key in model_config_keys()),
    *(("model", "model_config", "rope_scaling", key) for key in ROPE_KEYS),
]


def run_with_yaml(there: Path, content: str, kind: str = "hf") -> None:
    trained, out = there / ("trained_moe" if kind == "moe" else "trained"), there / "out"
    with changed(there / "any.yaml", content):
        run("check", "--model_dir", there / kind, "--config", there / "any.yaml")
        run("check", "--model_dir", trained, "--config", there / "any.yaml")
        common = ["--config", there / "any.yaml", "--dry_run"]
        run("convert", "--model_dir", there / kind, "--output_dir", out, "--tp", 2, *common)
        run("export", "--input_path", trained, "--output_path", out, *common)
        run("export", "--input_path", trained, "--hf_config", there / kind, "--output_path", out, *common)
        run("verify", trained, there / kind, "--config", there / "any.yaml")


FULL = {"max_position_embeddings": 128, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "num_layers": SPEC.num_layers}


@any_value_is_tried
@given(
    kind=st.sampled_from(["hf", "moe"]),
    changes=st.lists(st.tuples(st.sampled_from(IN_YAML), any_json), min_size=1, max_size=3),
    mode=st.sampled_from(["predict", "finetune"]),
    full=st.booleans(),
)
def test_yaml(there: Path, kind, changes, mode, full):
    document: Any = DOCUMENT | {"run_mode": mode}
    if full:
        document["model"] = {"model_config": MODEL_CONFIG | FULL}
    for path, value in changes:
        document = put(document, path, value)
    run_with_yaml(there, yaml.safe_dump(document), kind)


SNIPPETS = (
    *("2020-01-01", "2020-01-01 00:00:00Z", "!!binary aGk=", "!!set {a, b}", "!!omap [a: 1]", "&x [*x]", "&x {a: *x}"),
    *(
        "!!python/object:os.system x",
        '!!int ""',
        "!!int x",
        "!!float x",
        "!!timestamp x",
        "!!bool x",
        "!!null x",
        "0x_",
    ),
    *(
        "{[1, 2]: 3}",
        "{{a: 1}: 2}",
        "{1: 2, null: 3, 2020-01-01: 4}",
        "0x" + "f" * 20_000,
        "1:2:3",
        "0b",
        ".nan",
        "-.inf",
    ),
    *(
        '"\\ud800"',
        '"\\U0000dfff"',
        '"\\0"',
        "<<",
        "{<<: 1}",
        "*nowhere",
        "[" * 100 + "]" * 100,
        "[" * 20_000,
        "'",
        "{",
        "%",
    ),
    "[" + ", ".join(f"&a{i} [" + ", ".join([f"*a{i - 1}" if i else "x"] * 10) + "]" for i in range(12)) + "]",
)


PLACES = (
    "$",
    "model: $",
    "model: {model_config: $}",
    *(f"{key}: $\nmodel: {{model_config: {{}}}}" for key in ("parallel_config", "pretrained_model_dir", "run_mode")),
    *(f"model: {{model_config: {{num_layers: 2, {key}: $}}}}" for key in ("rope_theta", "rope_scaling", "unknown")),
)


@any_value_is_tried
@given(place=st.sampled_from(PLACES), snippet=st.sampled_from(SNIPPETS))
def test_yaml_that_is_no_json(there: Path, place, snippet):
    run_with_yaml(there, place.replace("$", snippet))


# ------------------------------------------------------------------------------------------------- adapter_config.json

ADAPTER_KEYS = [
    *("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "fan_in_fan_out"),
    *("modules_to_save", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "bias"),
    *("target_parameters", "init_lora_weights", "lora_bias", "layer_replication", "trainable_token_indices"),
    *("lora_dropout", "task_type", "peft_version", "unknown"),
]
IN_ADAPTER = [
    *((), *((key,) for key in ADAPTER_KEYS)),
    *((section, key) for section in ("rank_pattern", "alpha_pattern") for key in ("q_proj", "(", ".*", "")),
]


@any_value_is_tried
@given(
    changes=st.lists(
        st.tuples(st.sampled_from(IN_ADAPTER), any_json | st.sampled_from(["(", "q_proj", ["q_proj"], r".*_proj"])),
        min_size=1,
        max_size=3,
    )
)
def test_adapter_config(there: Path, changes):
    config = json.loads((there / "lora" / "adapter_config.json").read_text())
    for path, value in changes:
        config = put(config, path, value)
    with changed(there / "lora" / "adapter_config.json", json.dumps(config)):
        run("check", "--model_dir", there / "hf", "--adapter", there / "lora")
        run("inspect", there / "hf", "--adapter", f"{there / 'lora'}:2")
        run("verify", there / "hf", "--adapter", there / "lora")


@any_value_is_tried
@given(value=any_json)
def test_adapter_of_a_yaml(there: Path, value):
    document = put(DOCUMENT | {"run_mode": "predict"}, ("model", "model_config", "pretrained_adapter_dir"), value)
    with changed(there / "any.yaml", yaml.safe_dump(document)):
        run("check", "--model_dir", there / "hf", "--config", there / "any.yaml")


# --------------------------------------------------------------------------------------------------------------- index

IN_INDEX = [(), ("weight_map",), ("metadata",), ("weight_map", "model.norm.weight"), ("weight_map", "unknown.weight")]


@any_value_is_tried
@given(path=st.sampled_from(IN_INDEX), value=any_json, name=text, mindformers=st.booleans())
def test_index(there: Path, path, value, name, mindformers):
    directory = there / "sharded"
    index = directory / "model.safetensors.index.json"
    document = put(json.loads(index.read_text()), path, value)
    if isinstance(document, dict) and isinstance(document.get("weight_map"), dict):
        document["weight_map"][name] = "model-00001-of-00002.safetensors"
        document = document["weight_map"] if mindformers else document
    with changed(index, json.dumps(document)):
        run("inspect", directory)
        run("check", "--model_dir", directory)
        run("verify", directory, there / "hf")
        run("convert", "--model_dir", directory, "--output_dir", there / "out", "--dry_run")


# -------------------------------------------------------------------------------------------------------------- header

NORM = "model.norm.weight"
IN_HEADER = [
    *((), ("__metadata__",), (NORM,), (NORM, "dtype"), (NORM, "shape"), (NORM, "data_offsets"), (NORM, "unknown")),
    *(("__metadata__", key) for key in ("format", NORM, "mf_qwen3_bridge.layout", "mf_qwen3_bridge.tensor_parallel")),
]
LAYOUTS = [
    f"qkv=contiguous,gate_up=contiguous,tensor_parallel={n}" for n in ("0", "1", "2", "3", "²", "-1", "9" * 5000)
]


def header_of(file: Path) -> tuple[dict, bytes]:
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def run_on_weights(there: Path, directory: Path) -> None:
    kind = there / ("moe" if "moe" in directory.name else "hf")
    run("inspect", directory)
    run("check", "--model_dir", kind if "trained" in directory.name else directory, "--load_checkpoint", directory)
    run("verify", directory)
    run("verify", directory, kind)
    run("export", "--input_path", directory, "--output_path", there / "out", "--dry_run")


@any_value_is_tried
@given(
    kind=st.sampled_from(["hf", "moe", "trained", "trained_moe"]),
    path=st.sampled_from(IN_HEADER),
    value=any_json | st.sampled_from(LAYOUTS),
    renamed=st.none()
    | text
    | st.sampled_from(["model.layers.{}.x", "decoder.layers.{}.x", "{}"]).map(lambda name: name.format("9" * 5000)),
)
def test_header(there: Path, kind, path, value, renamed):
    file = there / kind / "model.safetensors"
    header, data = header_of(file)
    if "trained" in kind:
        path = tuple("decoder.final_layernorm.weight" if key == NORM else key for key in path)
    header = put(header, path, value)
    if renamed is not None and isinstance(header, dict) and header:
        header[renamed] = header.pop(next(reversed(header)))
    encoded = json.dumps(header).encode()
    with changed(file, struct.pack("<Q", len(encoded)) + encoded + data):
        run_on_weights(there, there / kind)


@any_value_is_tried
@given(
    kind=st.sampled_from(["hf", "trained_moe"]),
    flips=st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 255)), max_size=3),
    cut=st.none() | st.integers(0, 20_000) | st.integers(-200, -1),
)
def test_bytes(there: Path, kind, flips, cut):
    file = there / kind / "model.safetensors"
    content = bytearray(file.read_bytes())
    for position, bits in flips:
        content[position] ^= bits
    with changed(file, bytes(content[:cut])):
        run_on_weights(there, there / kind)
