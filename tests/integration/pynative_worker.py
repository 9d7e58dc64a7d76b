"""Builds MindFormers' PyNative training network, fills it as its trainer does, and prints the error of its logits.

``python pynative_worker.py DIRECTORY``. On a CPU most operators of MindSpore's mint are missing: numpy computes here
what the network's cells call. Weights, layout and structure are upstream's.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindformers import build_context
from mindformers.models.qwen3.modeling_qwen3 import PyNativeQwen3ForCausalLM
from mindspore import Tensor, ops

import mf_qwen3_bridge
from mf_qwen3_bridge.inputs.hf_config import read_json
from mf_qwen3_bridge.mindformers.network import CLASSES
from mf_qwen3_bridge.mindformers.patching import hooks
from tests.support.golden import golden

FLOAT32 = ("params_dtype", "compute_dtype", "layernorm_compute_dtype", "softmax_compute_dtype", "rotary_dtype")
SEQUENCE = 64


def array(value: Any) -> Any:
    return value.asnumpy() if isinstance(value, Tensor) else value


def tensor(values: Any) -> Tensor:
    values = np.asarray(values)
    values = values.astype(np.float32) if values.dtype == np.float64 else values
    return Tensor.from_numpy(np.ascontiguousarray(values))


def split(x: Tensor, split_size_or_sections: Any, dim: int = 0) -> tuple[Tensor, ...]:
    sizes, length = split_size_or_sections, x.shape[dim]
    ends = range(sizes, length, sizes) if isinstance(sizes, int) else np.cumsum(sizes)[:-1]
    return tuple(map(tensor, np.split(array(x), list(ends), dim)))


def transpose(x: Tensor, *axes: Any) -> Tensor:
    if len(axes) == 2:
        return tensor(array(x).swapaxes(*axes))
    return tensor(array(x).transpose(axes[0] if len(axes) == 1 else axes))


def cast(x: Tensor, dtype: Any) -> Tensor:
    """Upstream computes attention in float16, and (2.0) the output layer in bfloat16, whatever the config wants."""
    return x if dtype in (ms.float16, ms.bfloat16) else ops.cast(x, dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor]:
    rows = array(x)
    return (tensor(rows / np.sqrt((rows * rows).mean(-1, keepdims=True) + np.float32(eps)) * array(weight)),)


def attention(scale: float) -> Any:
    """``FlashAttentionScore``: query (B, N, S, D), key and value (B, G, S, D); the mask is 1 where nothing is seen."""

    def compute(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, **_: Any) -> tuple[Any, ...]:
        repeats = query.shape[1] // key.shape[1]
        keys, values = (array(x).repeat(repeats, 1) for x in (key, value))
        scores = array(query) @ keys.swapaxes(-1, -2) * np.float32(scale)
        weights = np.exp(np.where(array(attn_mask), -np.inf, scores - scores.max(-1, keepdims=True)))
        return None, None, None, tensor(weights / weights.sum(-1, keepdims=True) @ values)

    return compute


TRANSPOSES = "transpose bs_transpose bnsd_transpose merge_head_transpose fa_out_transpose"
NUMPY: dict[str, Any] = {
    "index_select": lambda x, dim, index: tensor(array(x).take(array(index), dim)),
    "arange": lambda length, dtype: tensor(np.arange(length, dtype=np.float32)),
    "outer": lambda a, b: tensor(np.outer(array(a), array(b))),
    "cat": lambda parts, dim=0: tensor(np.concatenate(list(map(array, parts)), dim)),
    "reshape": lambda x, shape: tensor(array(x).reshape(tuple(shape))),
    "not_equal": lambda a, b: tensor(array(a) != array(b)),
    "cos": lambda x: tensor(np.cos(array(x))),
    "sin": lambda x: tensor(np.sin(array(x))),
    "neg": lambda x: tensor(-array(x)),
    "mul": lambda a, b: tensor(array(a) * array(b)),
    "add": lambda a, b: tensor(array(a) + array(b)),
    "matmul": lambda a, b: tensor(array(a) @ array(b)),
    "norm": rms_norm,
    "split": split,
    **dict.fromkeys(TRANSPOSES.split(), transpose),
}
NUMPY |= {"mul_mscale": NUMPY["mul"], "reshape_concat": NUMPY["reshape"], "split_qkv": split}


def compute_with_numpy(network: Any) -> None:
    for _, cell in network.cells_and_names():
        for name in NUMPY.keys() & vars(cell).keys():
            setattr(cell, name, NUMPY[name])
        if type(cell).__name__ == "FlashAttention":
            cell.flash_attention = attention(cell.scalar_value)
        if "cast" in vars(cell):
            cell.cast = cast


def build(directory: Path) -> Any:
    build_context({"run_mode": "train", "use_legacy": False, "context": {"device_target": "CPU", "mode": 1}})
    ms.runtime.launch_blocking()
    config_class, _ = CLASSES["qwen3"]
    config = read_json(directory / "config.json") | dict.fromkeys(FLOAT32, "float32")
    return PyNativeQwen3ForCausalLM(config_class(**config, pretrained_model_dir=str(directory), seq_length=SEQUENCE))


def main(directory: Path) -> None:
    mf_qwen3_bridge.patch()
    from mindformers.pynative.trainer import trainer  # as run_mindformer.py --mode 1 does, after auto_register

    network = build(directory)
    load = getattr(trainer, "load_hf_checkpoint", None) or hooks.base_trainer.load_hf_checkpoint  # 2.1; 1.9 and 2.0
    load(str(directory), network)
    compute_with_numpy(network)
    network.set_train(False)
    mask = np.triu(np.ones((1, 1, SEQUENCE, SEQUENCE), np.uint8), 1)
    for case in golden(directory.name):
        tokens = np.zeros((1, SEQUENCE), np.int32)
        tokens[0, : len(case.prompt)] = case.prompt
        ones = Tensor(np.ones((1, SEQUENCE), np.float32))
        logits = array(network(Tensor(tokens), labels=Tensor(tokens), attention_mask=Tensor(mask), loss_mask=ones))
        error = np.abs(logits[: len(case.prompt)] - case.logits).max() / np.abs(case.logits).max()
        print(f"error {error:.3e}")


if __name__ == "__main__":
    os.environ.pop("RUN_MODE", None)
    main(Path(sys.argv[1]))
