"""The weights that a run began with show the layout of those that it saved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mf_qwen3_bridge.convert.jobs import to_mindformers
from mf_qwen3_bridge.convert.run import run
from mf_qwen3_bridge.errors import BridgeError
from mf_qwen3_bridge.inputs.layout_detection import check_layout
from mf_qwen3_bridge.inputs.opening import open_source
from mf_qwen3_bridge.inputs.preflight import check, check_trained
from mf_qwen3_bridge.model.layouts import Layout
from mf_qwen3_bridge.model.rules import TRAIN, Dialect
from tests.support.checkpoints import LAYOUTS, MOE_SPEC, SPEC, contents, hf_config, random_tensors, write

LARGER = replace(SPEC, hidden_size=64, num_attention_heads=8, num_query_groups=4, ffn_hidden_size=48)
LARGER_MOE = replace(MOE_SPEC, hidden_size=64, num_attention_heads=8, num_query_groups=4)
OF_RANKS = [layout.on(size) for layout in LAYOUTS for size in (1, 2)]


def trained(tmp_path: Path, base: Path, layout: Layout) -> Path:
    """Weights a little way from those in ``base``, without layout metadata."""
    run(to_mindformers(check(base), Dialect(layout), tmp_path / "declared"))
    random = np.random.default_rng(1)
    moved = {
        name: (tensor + 0.3 * random.standard_normal(tensor.shape)).astype(np.float32)
        for name, tensor in contents(tmp_path / "declared").items()
    }
    return write(tmp_path / "trained", moved)


@pytest.mark.parametrize("layout", dict.fromkeys(OF_RANKS), ids=str)
@pytest.mark.parametrize("spec", [LARGER, LARGER_MOE], ids=["dense", "moe"])
def test_a_wrong_guess_is_refused(tmp_path: Path, spec, layout: Layout):
    base = write(tmp_path / "base", random_tensors(spec), hf_config(spec))
    model = check_trained(open_source(trained(tmp_path, base, layout)), base)
    assert model.dialect == TRAIN
    is_right = layout.interleaved_qkv and (layout.interleaved_gate_up or spec.is_moe)
    if is_right:
        assert check_layout(model)
    else:
        with pytest.raises(BridgeError, match="is in another layout than") as error:
            check_layout(model)
        rows = {problem.subject: problem.remedy for problem in error.value.problems}
        size = f", use_parallel True and parallel_config.model_parallel {layout.tensor_parallel}"
        size = size if layout.tensor_parallel > 1 else ""
        wanted = {}
        if not layout.interleaved_qkv:
            wanted["layout of qkv"] = f"in it: use_contiguous_weight_layout_attention True{size}"
        if not (layout.interleaved_gate_up or spec.is_moe):
            wanted["layout of gate_up"] = f"in it: use_interleaved_weight_layout_mlp False{size}"
        assert {subject: remedy.partition("; ")[2] for subject, remedy in rows.items()} == wanted


@pytest.mark.parametrize("groups", [1, 8])
def test_heads_that_were_trained_unlike_each_other(tmp_path: Path, groups: int):
    """The first one stayed as it was, the others moved: each arrangement is judged by the same rows."""
    spec = replace(LARGER, num_query_groups=groups)
    base = write(tmp_path / "base", random_tensors(spec), hf_config(spec))
    run(to_mindformers(check(base), TRAIN, tmp_path / "declared"))
    random = np.random.default_rng(1)
    moved = contents(tmp_path / "declared")
    for name in (name for name in moved if name.endswith("linear_qkv.weight")):
        rows = len(moved[name]) // groups
        moved[name] = moved[name].copy()
        moved[name][rows:] += 0.9 * random.standard_normal(moved[name][rows:].shape).astype(np.float32)
    assert check_layout(check_trained(open_source(write(tmp_path / "trained", moved)), base))


def test_weights_of_another_size_show_nothing(tmp_path: Path):
    base = write(tmp_path / "base", random_tensors(LARGER), hf_config(LARGER))
    model = check_trained(open_source(trained(tmp_path, base, TRAIN.layout)), base)
    write(base, random_tensors(replace(LARGER, head_dim=8)))
    assert not check_layout(model)


def test_weights_of_another_run_show_nothing(tmp_path: Path):
    base = write(tmp_path / "base", random_tensors(LARGER), hf_config(LARGER))
    other = write(tmp_path / "other", random_tensors(LARGER, TRAIN, seed=5))
    assert not check_layout(check_trained(open_source(other), base))


def test_without_weights_nothing_is_shown(tmp_path: Path):
    base = write(tmp_path / "base", random_tensors(LARGER), hf_config(LARGER))
    model = check_trained(open_source(trained(tmp_path, base, TRAIN.layout)), base)
    (base / "model.safetensors").unlink()
    assert not check_layout(model)
    (base / "model.safetensors").write_bytes(b"broken")
    assert not check_layout(model)
