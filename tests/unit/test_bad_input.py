"""Bad input, as a user of ``run_infer.py`` meets it: one message, exit code 2, before MindSpore is even imported.

What only the bytes can tell is in tests/integration/test_refusals.py.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from mf_qwen3_bridge.model.rules import TRAIN
from tests.support.checkpoints import hf_config, random_tensors, write
from tests.support.commands import ROOT
from tests.support.damage import INDEX, assign_in_index, change_config, cut_off, leave_only, unwrapped

SHARD = "model-00002-of-00003.safetensors"
Q_PROJ = "model.layers.0.self_attn.q_proj"


def config(**changes) -> Callable[[Path], None]:
    return lambda directory: change_config(directory, **changes)


def tensors(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        changed = random_tensors()
        change(changed)
        for file in (*directory.glob("*.safetensors"), directory / INDEX):
            file.unlink()
        write(directory, changed)

    return apply


def in_index(name: str, file: str) -> Callable[[Path], None]:
    return lambda directory: assign_in_index(directory / INDEX, name, file)


def mindformers_weights(directory: Path) -> None:
    for file in directory.glob("*.safetensors*"):
        file.unlink()
    write(directory, random_tensors(dialect=TRAIN))


def fp8(changed: dict) -> None:
    changed[f"{Q_PROJ}.weight"] = changed[f"{Q_PROJ}.weight"].astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    changed[f"{Q_PROJ}.weight_scale_inv"] = np.ones((1, 1), np.float32)


def awq(changed: dict) -> None:
    del changed[f"{Q_PROJ}.weight"]
    changed |= {f"{Q_PROJ}.{x}": np.zeros((2, 2), np.int32) for x in ("qweight", "qzeros", "scales")}


def hub_cache(directory: Path) -> None:
    """As huggingface_hub keeps it: two snapshots, of which refs/main names one."""
    snapshot = directory / "snapshots" / "b968826"
    snapshot.mkdir(parents=True)
    for file in directory.glob("*.*"):
        file.rename(snapshot / file.name)
    write(directory / "snapshots" / "older", random_tensors(), hf_config())
    (directory / "refs").mkdir()
    (directory / "refs" / "main").write_text("b968826")


def one_below(directory: Path) -> None:
    (directory / "Qwen3-8B").mkdir()
    for file in directory.glob("*.*"):
        file.rename(directory / "Qwen3-8B" / file.name)
    (directory / "original").mkdir()


BAD = {
    "missing shard": (lambda d: (d / SHARD).unlink(), SHARD),
    "truncated shard": (lambda d: cut_off(d / SHARD), "truncated"),
    "index names a file that is not there": (in_index("model.norm.weight", "absent.safetensors"), "absent.safetensors"),
    "index names a file outside": (in_index("model.norm.weight", "../x.safetensors"), "outside"),
    "index is no index": (lambda d: (d / INDEX).write_text("{"), "not an index"),
    "wrong shape": (tensors(lambda t: t.update({f"{Q_PROJ}.weight": np.ones((12, 16), np.float32)})), "(12, 16)"),
    "missing tensor": (tensors(lambda t: t.pop(f"{Q_PROJ}.weight")), f"{Q_PROJ}.weight"),
    "extra tensor": (tensors(lambda t: t.update(extra=np.ones(1, np.float32))), "extra"),
    "more layers in the config": (config(num_hidden_layers=3), "num_hidden_layers"),
    "fewer layers in the config": (config(num_hidden_layers=1), "num_hidden_layers"),
    "smaller vocabulary in the config": (config(vocab_size=15), "vocab_size"),
    "quantization_config": (config(quantization_config={"quant_method": "fp8"}), "fp8"),
    "FP8 without a word in the config": (tensors(fp8), "quantised"),
    "AWQ without a word in the config": (tensors(awq), "quantised"),
    "MindSpore's mark for int4": (
        lambda d: [
            write(d, random_tensors(), metadata={f"{Q_PROJ}.weight": "Int4"}),
            *map(Path.unlink, d.glob("model-*")),
            (d / INDEX).unlink(),
        ],
        "dtype Int4",
    ),
    "unknown architecture": (config(model_type="llama", architectures=["LlamaForCausalLM"]), "LlamaForCausalLM"),
    "attention_bias": (config(attention_bias=True), "attention_bias"),
    "sliding window": (config(use_sliding_window=True), "sliding"),
    "unknown RoPE": (config(rope_scaling={"rope_type": "llama3", "factor": 8.0}), "llama3"),
    "numbers of nobody": (tensors(lambda t: [t.update({n: v[:0]}) for n, v in t.items() if "q_norm" in n]), "q_norm"),
    "a billion layers": (config(num_hidden_layers=10**9), "num_hidden_layers"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json"),
    "the root of the Hub's cache": (hub_cache, "give $/snapshots/b968826"),
    "the directory above": (one_below, "give $/Qwen3-8B"),
    "no directory": (lambda d: d.rename(d.with_name("elsewhere")), "not a directory"),
    "pickles": (lambda d: leave_only(d, "pytorch_model.bin"), "only safetensors"),
    "a tensor in two files": (
        lambda d: (
            (d / INDEX).unlink(),
            save_file({"model.norm.weight": np.ones(12, np.float32)}, d / "stale.safetensors"),
        ),
        "stale.safetensors",
    ),
    "MindFormers weights of unknown layout": (mindformers_weights, "nothing declares the layout of QKV"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused_before_mindspore_is_imported(tmp_path: Path, case):
    directory = write(tmp_path / "model", random_tensors(), hf_config(), shards=3)
    break_it, named = BAD[case]
    break_it(directory)
    script = (
        "import sys; from mf_qwen3_bridge.cli.main import infer, main\n"
        "try: main(['--model_dir', sys.argv[1]], infer)\n"
        "finally: assert 'mindspore' not in sys.modules"
    )
    command = [sys.executable, "-c", script, str(directory)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=60)
    assert result.returncode == 2, result.stderr
    assert named.replace("$", str(directory)) in unwrapped(result.stderr), result.stderr
    assert "Traceback" not in result.stderr
