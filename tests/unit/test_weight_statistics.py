"""``mf-qwen3 verify DIR``: what no model has is refused, what stands out is listed, and what is sound is not."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mf_qwen3_bridge.cli.main import cli
from mf_qwen3_bridge.convert.jobs import to_mindformers
from mf_qwen3_bridge.convert.run import run
from mf_qwen3_bridge.errors import BridgeError
from mf_qwen3_bridge.inputs.identify import open_weights
from mf_qwen3_bridge.inputs.preflight import check
from mf_qwen3_bridge.model.rules import INFER, TRAIN
from mf_qwen3_bridge.transfer.safetensors import DTYPES, Reader
from mf_qwen3_bridge.verify.statistics import Statistics, measure, outliers, rows, statistics_of
from tests.support.checkpoints import MOE_SPEC, SPEC, Tensors, hf_config, random_tensors, write

DEEP = replace(SPEC, num_layers=6)


def sound(spec=DEEP, dtype: str = "F32") -> Tensors:
    """Matrices around 0, norms around 1."""
    tensors = random_tensors(spec)
    sane = {name: 1 + t / 10 if "norm" in name else t / 50 for name, t in tensors.items()}
    return {name: t.astype(DTYPES[dtype]) for name, t in sane.items()}


@given(
    hnp.arrays(np.float32, st.integers(1, 300), elements=st.floats(-(2.0**100), 2.0**100, width=32)),
    st.sampled_from(["F32", "F16", "BF16"]),
)
def test_statistics_are_numpys(values: np.ndarray, dtype: str):
    with np.errstate(over="ignore"):
        array = values.astype(DTYPES[dtype])
    exact = array.astype(np.float64)
    found = statistics_of(array)
    if not np.isfinite(exact).all():
        assert math.isinf(found.magnitude)
        return
    assert found.mean == pytest.approx(exact.mean(), rel=1e-4, abs=1e-5 * np.abs(exact).max())
    assert found.rms == pytest.approx(np.sqrt((exact**2).mean()), rel=1e-4)
    assert (found.smallest, found.largest) == (exact.min(), exact.max())
    assert found.zeros == np.count_nonzero(exact == 0)
    assert found.magnitude == np.abs(exact).max()


def test_statistics_add_up():
    array = np.random.default_rng(0).standard_normal(200_000).astype(np.float32)  # several blocks
    whole, sum_of_parts = statistics_of(array), statistics_of(array[:777]) + statistics_of(array[777:])
    assert whole.rms == pytest.approx(sum_of_parts.rms) and whole.rms == pytest.approx(array.std(), rel=1e-3)
    assert replace(whole, total=0, squares=0) == replace(sum_of_parts, total=0, squares=0)


def test_a_sound_model_has_no_outliers_in_any_dialect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hf = write(tmp_path / "hf", sound(MOE_SPEC), hf_config(MOE_SPEC))
    expected = measure(open_weights(hf))
    assert list(outliers(expected)) == []
    read: list[int] = []
    original = Reader.read
    monkeypatch.setattr(Reader, "read", lambda self, t, at, out: (read.append(len(out)), original(self, t, at, out)))
    for dialect in (TRAIN, INFER):
        path = tmp_path / str(dialect.stacked_experts)
        run(to_mindformers(check(hf), dialect, path))
        read.clear()
        side = open_weights(path)
        found = measure(side)
        assert sum(read) == side.source.nbytes
        assert found.keys() == expected.keys()
        for name, one in found.items():
            assert (one.rms, one.mean) == pytest.approx((expected[name].rms, expected[name].mean))
    assert [row[:2] for row in rows(expected) if "experts" in row[0]] == [
        (f"model.layers.*.mlp.experts.*.{part}_proj.weight", str(2 * MOE_SPEC.num_experts))
        for part in ("gate", "up", "down")
    ]


DOWN, Q_NORM = "model.layers.3.mlp.down_proj.weight", "model.layers.3.self_attn.q_norm.weight"


def with_a_hole(tensor: np.ndarray) -> np.ndarray:
    tensor = tensor.copy()
    tensor.reshape(-1)[20:40] = 0
    return tensor


ODDITIES: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray], str]] = {
    "scaled up": (DOWN, lambda t: t * 8, "is the median of its kind"),
    "scaled down": (DOWN, lambda t: t / 8, "is the median of its kind"),
    "a hole": (DOWN, with_a_hole, "% of the elements are zero"),
    "not centred": (DOWN, lambda t: t + 0.05, "of the RMS; matrices are centred"),
    "absurdly large": (DOWN, lambda t: t * 1e4, "is usual"),
    "a norm left at one": (Q_NORM, np.ones_like, "all elements are 1: never trained"),
    "a negative norm": (Q_NORM, np.negative, "norms are positive"),
}


@pytest.mark.parametrize("oddity", ODDITIES)
def test_oddities(tmp_path: Path, oddity: str):
    name, change, expected = ODDITIES[oddity]
    tensors = sound()
    tensors[name] = change(tensors[name])
    found = list(outliers(measure(open_weights(write(tmp_path, tensors)))))
    assert all(line.startswith(name) for line in found)
    if oddity == "a hole":
        expected = f"{20 / tensors[name].size:.3g} of the elements are zero"
    assert any(expected in line for line in found), found


@pytest.mark.parametrize(("value", "fault"), [(np.nan, "NaN or infinity"), (-np.inf, "NaN or infinity"), (0, "zero")])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_faults_are_refused(tmp_path: Path, value: float, fault: str, dtype: str):
    tensors = sound(dtype=dtype)
    if value == 0:
        tensors[DOWN] = np.zeros_like(tensors[DOWN])
    else:
        tensors[DOWN].reshape(-1)[-1] = value
    with pytest.raises(BridgeError) as error:
        measure(open_weights(write(tmp_path, tensors)))
    assert [problem.subject for problem in error.value.problems] == [DOWN]
    assert fault in error.value.problems[0].found and "model.safetensors" in error.value.problems[0].found


def test_the_command(tmp_path: Path):
    tensors = sound()
    result = CliRunner().invoke(cli, ["verify", str(write(tmp_path / "sound", tensors))])
    assert result.exit_code == 0
    assert "result      no NaN" in result.output and "unusual" not in result.output
    tensors[Q_NORM] = np.ones_like(tensors[Q_NORM])
    result = CliRunner().invoke(cli, ["verify", str(write(tmp_path / "odd", tensors))])
    assert result.exit_code == 0
    assert f"unusual     {Q_NORM}: all elements are 1" in result.output


def test_nothing_has_no_statistics():
    assert Statistics() + Statistics() == Statistics()


def test_the_config_is_looked_at(tmp_path: Path):
    directory = write(tmp_path, sound(), hf_config(DEEP) | {"num_hidden_layers": 7})
    result = CliRunner().invoke(cli, ["verify", str(directory)])
    assert isinstance(result.exception, BridgeError) and "num_hidden_layers" in str(result.exception)


def test_an_embedding_of_zeros(tmp_path: Path):
    tensors = sound()
    tensors["model.embed_tokens.weight"][3:] = 0
    (line,) = outliers(measure(open_weights(write(tmp_path, tensors))))
    assert "0.812 of the elements are zero" in line


@pytest.mark.parametrize("option", [["--layers", "1"], ["--hf_config", "."], ["--picture", "p.png"]])
def test_options_of_another_mode(tmp_path: Path, option: list[str]):
    result = CliRunner().invoke(cli, ["verify", str(write(tmp_path, sound())), *option])
    assert result.exit_code == 2 and "needs --logits" in result.output


def test_an_output_layer_that_is_not_the_embedding_it_is_tied_to(tmp_path: Path):
    """By config.json; the tensors alone would be those of an untied model."""
    config = hf_config(DEEP) | {"tie_word_embeddings": True}
    directory = write(tmp_path, sound(), config)
    result = CliRunner().invoke(cli, ["verify", str(directory)])
    assert isinstance(result.exception, BridgeError) and "tied tensors differ" in str(result.exception)
