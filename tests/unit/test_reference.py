"""The reference in numpy computes what transformers computes; the stages that go wrong are found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mf_qwen3_bridge.convert.jobs import to_mindformers
from mf_qwen3_bridge.convert.run import run
from mf_qwen3_bridge.errors import BridgeError
from mf_qwen3_bridge.inputs.preflight import check
from mf_qwen3_bridge.model.released import RELEASED
from mf_qwen3_bridge.model.rules import INFER, TRAIN
from mf_qwen3_bridge.verify import layer_errors as module
from mf_qwen3_bridge.verify.layer_errors import TOLERANCES, LayerErrors, layer_errors, layers_that_fit, tokens_for
from mf_qwen3_bridge.verify.picture import draw
from mf_qwen3_bridge.verify.reference import EMBEDDED, LAYER, LOGITS, MLP, PROJ, QKV, STAGES, Stage, forward
from tests.support.checkpoints import SPEC, hf_config, random_tensors, write, write_headers
from tests.support.golden import CHECKPOINTS, NAMES, golden


@pytest.mark.parametrize("name", NAMES)
def test_the_logits_are_those_of_transformers(name: str):
    model = check(CHECKPOINTS / name)
    for expected in golden(name):
        *_, (stage, logits) = forward(model, expected.prompt)
        assert stage == LOGITS and logits.dtype == np.float32
        assert np.abs(logits - expected.logits).max() < TOLERANCE * np.abs(expected.logits).max()


def test_weights_of_any_dialect(tmp_path: Path):
    hf = CHECKPOINTS / "moe_bf16"
    expected = list(forward(check(hf), [1, 2, 3]))
    for dialect in (TRAIN, INFER):
        directory = tmp_path / str(dialect.stacked_experts)
        run(to_mindformers(check(hf), dialect, directory))
        for (stage, right), (other, found) in zip(expected, forward(check(hf, None, directory), [1, 2, 3])):
            assert stage == other
            np.testing.assert_array_equal(found, right)


def test_the_output_layer_is_multiplied_in_parts(monkeypatch: pytest.MonkeyPatch):
    model = check(CHECKPOINTS / "untied_fp32")
    *_, (_, whole) = forward(model, [1, 2])
    monkeypatch.setattr("mf_qwen3_bridge.verify.reference._ROWS_OF_OUTPUT", 7)
    *_, (_, parts) = forward(model, [1, 2])
    np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-5)


TOKENS = [1, 2, 3, 4]
TOLERANCE = TOLERANCES["float32"]


@pytest.fixture
def model(tmp_path: Path):
    return check(write(tmp_path / "model", random_tensors(), hf_config()))


def test_equal_stages_have_no_error(model):
    found = layer_errors(dict(forward(model, TOKENS)), model, TOKENS)
    assert found.begin is None and set(found.errors.values()) == {0.0}
    assert [*found.errors][:: len(found.errors) - 1] == [EMBEDDED, LOGITS]
    assert found.num_layers == SPEC.num_layers
    assert found.stages == [name for name in STAGES if name != "mlp.router"]
    rows = list(found.rows())
    assert [row[0] for row in rows] == ["embedding", "0", "1", "logits"]
    assert {len(row) for row in rows} == {1 + len(found.stages)}


@pytest.mark.parametrize("stage", [EMBEDDED, Stage(0, QKV), Stage(1, PROJ), Stage(1, MLP), LOGITS], ids=str)
@pytest.mark.parametrize("value", [2 * TOLERANCE, np.nan, np.inf], ids=str)
def test_the_first_wrong_stage_is_found(model, stage: Stage, value: float):
    stages = dict(forward(model, TOKENS))
    stages[stage] = stages[stage].copy()
    stages[stage][0, 0] += value * np.abs(stages[stage]).max()
    found = layer_errors(stages, model, TOKENS)
    assert found.begin == stage
    assert str(stage) in found.summary
    assert any("!" in cell for row in found.rows() for cell in row)


def test_a_wrong_layer_does_not_make_the_next_ones_wrong(model, tmp_path: Path):
    """The reference goes on from what the network made."""
    tensors = random_tensors()
    wrong = tensors | {"model.layers.0.mlp.down_proj.weight": -tensors["model.layers.0.mlp.down_proj.weight"]}
    network = dict(forward(check(write(tmp_path / "wrong", wrong, hf_config())), TOKENS))
    found = layer_errors(network, model, TOKENS)
    assert {stage for stage, error in found.errors.items() if error > TOLERANCE} == {Stage(0, MLP), Stage(0, LAYER)}


def test_half_of_the_tolerance_is_right(model):
    stages = dict(forward(model, TOKENS))
    stages[Stage(1, MLP)] = stages[Stage(1, MLP)] * (1 + TOLERANCE / 2)
    assert layer_errors(stages, model, TOKENS).begin is None
    stages[Stage(1, MLP)] = stages[Stage(1, MLP)] * (1 + 0.01)
    assert layer_errors(stages, model, TOKENS).begin == Stage(1, MLP)
    assert layer_errors(stages, model, TOKENS, "bfloat16").begin is None


def test_no_more_tokens_than_positions(tmp_path: Path):
    config = hf_config() | {"max_position_embeddings": 5}
    model = check(write(tmp_path, random_tensors(), config))
    assert len(tokens_for(model)) == 5
    assert len(tokens_for(model, 3)) == 3


def test_the_first_layers(model):
    first = model.first_layers(1)
    expected, found = list(forward(model, [1, 2])), list(forward(first, [1, 2]))
    assert [stage for stage, _ in found] == [stage for stage, _ in expected if stage.layer in (0, None)]
    np.testing.assert_array_equal(dict(found)[Stage(0, LAYER)], dict(expected)[Stage(0, LAYER)])
    with pytest.raises(BridgeError, match="has 2 layers"):
        model.first_layers(3)


def test_as_many_layers_as_fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    spec = RELEASED["Qwen3-8B"]
    model = check(write_headers(tmp_path / "8B", spec, hf_config(spec), shards=4))
    layer, table = 0.7188, 151936 * 4096 * 4 / 2**30  # GiB, in float32
    for layers in (1, 5, 36):
        for little, expected in ((-0.1, layers - 1), (0.1, layers)):
            needed = 3 * table + layers * layer + little  # embedding, output layer, and one more to load the largest
            monkeypatch.setattr(module, "_available_memory", lambda needed=needed: int(2 * needed * 2**30))
            if expected:
                assert layers_that_fit(model) == expected
            else:
                with pytest.raises(BridgeError, match="--layers 1 tries it"):
                    layers_that_fit(model)


def test_this_machine_has_memory():
    assert module._available_memory() > 1 << 20


@pytest.mark.parametrize(("limit", "expected"), [("4000", 4000 - 3000 + 2500), ("max", None), (None, None)])
def test_a_container_may_have_less(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: str | None, expected: int | None
):
    monkeypatch.setattr(module, "_CGROUP", tmp_path)
    if limit:
        (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text("3000\n")
    (tmp_path / "memory.stat").write_text("anon 500\nfile 2500\n")
    available = module._available_memory()
    assert available == expected if expected else available > 1 << 20


@pytest.mark.parametrize("begin", [None, Stage(1, PROJ), LOGITS], ids=str)
def test_a_picture(tmp_path: Path, begin: Stage | None):
    errors = {Stage(number, name): 10.0 ** -(3 + number) for number in range(2) for name in (QKV, PROJ, LAYER)}
    errors |= {LOGITS: 0.0} if begin is None else {begin: float("inf")}
    draw(LayerErrors({LOGITS: 1e-6} | errors), "a model", tmp_path / "errors.png")
    assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(BridgeError, match="can't be written"):
        draw(LayerErrors({LOGITS: 1e-6} | errors), "a model", tmp_path / "nowhere" / "errors.png")
    with pytest.raises(BridgeError, match="xyz"):
        draw(LayerErrors({LOGITS: 1e-6} | errors), "a model", tmp_path / "errors.xyz")


def test_one_pool_of_threads_for_all_weights(model, monkeypatch: pytest.MonkeyPatch):
    from mf_qwen3_bridge.transfer.copying import Transfer

    made = []
    original = Transfer.__init__
    monkeypatch.setattr(Transfer, "__init__", lambda self, *rest: (made.append(self), original(self, *rest))[1])
    assert len(list(forward(model, TOKENS))) > 10
    assert len(made) == 1
