"""Rules and plans: exact in both directions for every shape, and every fault is found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mf_qwen3_bridge.errors import BridgeError
from mf_qwen3_bridge.inputs.opening import open_source
from mf_qwen3_bridge.model import layouts
from mf_qwen3_bridge.model.layouts import Layout
from mf_qwen3_bridge.model.parameters import is_training_state
from mf_qwen3_bridge.model.rules import HF, HF_STACKED, INFER, TRAIN, Dialect, model_rules
from mf_qwen3_bridge.model.spec import ModelSpec
from mf_qwen3_bridge.transfer.plan import make_plan
from tests.support.checkpoints import MOE_SPEC, NUMPY, SPEC, random_tensors, write

MINDFORMERS = [
    Dialect(Layout(qkv, gate_up), stacked)
    for qkv in (True, False)
    for gate_up in (True, False)
    for stacked in (True, False)
]

DIALECTS = [HF, HF_STACKED, *MINDFORMERS]


def convert(directory: Path, spec: ModelSpec, source: Dialect, target: Dialect, dtype: str | None = None):
    plan = make_plan(model_rules(spec), open_source(directory).tensors, source, target, dtype)
    return {tensor.name: tensor.make() for tensor in plan.targets}


def assert_same_bits(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype
        assert left[name].shape == right[name].shape
        assert left[name].tobytes() == right[name].tobytes(), name


@st.composite
def specs(draw) -> ModelSpec:
    groups = draw(st.integers(1, 4))
    is_moe = draw(st.booleans())
    return ModelSpec(
        num_layers=draw(st.integers(1, 3)),
        hidden_size=draw(st.integers(1, 9)),
        num_attention_heads=groups * draw(st.integers(1, 4)),
        num_query_groups=groups,
        head_dim=2 * draw(st.integers(1, 4)),
        ffn_hidden_size=0 if is_moe else draw(st.integers(1, 9)),
        vocab_size=draw(st.integers(1, 9)),
        tie_word_embeddings=draw(st.booleans()),
        num_experts=draw(st.integers(1, 4)) if is_moe else 0,
        moe_ffn_hidden_size=draw(st.integers(1, 9)) if is_moe else 0,
    )


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(spec=specs(), dialect=st.sampled_from(MINDFORMERS), dtype=st.sampled_from(sorted(NUMPY)), data=st.data())
def test_there_and_back_is_bit_exact(tmp_path_factory, spec, dialect, dtype, data):
    directory = tmp_path_factory.mktemp("round_trip")
    hf = random_tensors(spec, dtype=dtype)
    there = convert(write(directory / "hf", hf, shards=data.draw(st.integers(1, 3))), spec, HF, dialect)
    middle = data.draw(st.sampled_from([HF_STACKED, *MINDFORMERS]))
    other = convert(write(directory / "there", there), spec, dialect, middle)
    back = convert(write(directory / "other", other), spec, middle, HF)
    assert_same_bits(back, hf)


@settings(max_examples=40, deadline=None)
@given(spec=specs(), source=st.sampled_from(DIALECTS), target=st.sampled_from(DIALECTS))
def test_every_element_is_claimed_exactly_once(spec, source, target):
    read: dict[str, np.ndarray] = {}
    written: dict[str, np.ndarray] = {}
    for rule in model_rules(spec):
        for here, there in zip(rule.places(source), rule.places(target)):
            assert here.view.shape == there.view.shape
            for seen, place in ((read, here), (written, there)):
                counts = place.view.of(seen.setdefault(place.tensor, np.zeros(place.shape, np.int8)))
                counts += 1
    for counts in (*read.values(), *written.values()):
        assert (counts == 1).all()


def test_the_inference_layout_is_what_concatenation_gives(tmp_path):
    hf = random_tensors()
    infer = convert(write(tmp_path, hf), SPEC, HF, INFER)
    attn, mlp = "model.layers.1.self_attn", "model.layers.1.mlp"
    np.testing.assert_array_equal(
        infer["decoder.layers.1.self_attention.linear_qkv.weight"],
        np.concatenate([hf[f"{attn}.{x}_proj.weight"] for x in "qkv"]),
    )
    np.testing.assert_array_equal(
        infer["decoder.layers.1.mlp.linear_fc1.weight"],
        np.concatenate([hf[f"{mlp}.{x}_proj.weight"] for x in ("gate", "up")]),
    )


def test_the_training_layout_is_what_reshaping_gives(tmp_path):
    hf = random_tensors()
    train = convert(write(tmp_path, hf), SPEC, HF, TRAIN)
    qkv = train["decoder.layers.0.self_attention.linear_qkv.weight"].reshape(2, 4, 4, 12)  # 2 groups of 2 q, k, v
    attn, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
    np.testing.assert_array_equal(qkv[:, :2].reshape(16, 12), hf[f"{attn}.q_proj.weight"])
    np.testing.assert_array_equal(qkv[:, 2].reshape(8, 12), hf[f"{attn}.k_proj.weight"])
    np.testing.assert_array_equal(qkv[:, 3].reshape(8, 12), hf[f"{attn}.v_proj.weight"])
    fc1 = train["decoder.layers.0.mlp.linear_fc1.weight"]
    np.testing.assert_array_equal(fc1[::2], hf[f"{mlp}.gate_proj.weight"])
    np.testing.assert_array_equal(fc1[1::2], hf[f"{mlp}.up_proj.weight"])


def test_experts_in_every_dialect(tmp_path):
    hf = random_tensors(MOE_SPEC)
    write(tmp_path, hf)
    infer, train, stacked = (convert(tmp_path, MOE_SPEC, HF, dialect) for dialect in (INFER, TRAIN, HF_STACKED))
    hf_mlp, mlp = "model.layers.1.mlp", "decoder.layers.1.mlp"
    gate, up, down = (
        [hf[f"{hf_mlp}.experts.{expert}.{part}_proj.weight"] for expert in range(4)] for part in ("gate", "up", "down")
    )
    weight1 = np.stack([np.concatenate([g.T, u.T], axis=1) for g, u in zip(gate, up)])  # (experts, hidden, 2 * ffn)
    weight2 = np.stack([d.T for d in down])  # (experts, ffn, hidden)
    np.testing.assert_array_equal(infer[f"{mlp}.experts.weight1"], weight1)
    np.testing.assert_array_equal(infer[f"{mlp}.experts.weight2"], weight2)
    np.testing.assert_array_equal(train[f"{mlp}.experts.weight1"], weight1.reshape(4 * 12, 2 * 6))
    np.testing.assert_array_equal(train[f"{mlp}.experts.weight2"], weight2.reshape(4 * 6, 12))
    np.testing.assert_array_equal(infer[f"{mlp}.router.weight"], hf[f"{hf_mlp}.gate.weight"])
    gate_up = np.stack([np.concatenate([g, u]) for g, u in zip(gate, up)])
    np.testing.assert_array_equal(stacked[f"{hf_mlp}.experts.gate_up_proj"], gate_up)
    np.testing.assert_array_equal(stacked[f"{hf_mlp}.experts.down_proj"], np.stack(down))


@pytest.mark.parametrize("tied", [False, True])
def test_counts_of_qwen3_14b(tied):
    spec = ModelSpec(40, 5120, 40, 8, 128, 17408, 151936, tied)
    rules = list(model_rules(spec))
    assert sum(len(rule.tensors) for rule in rules) == 443 - tied
    assert len(rules) == 323 - tied


@pytest.mark.parametrize("source", NUMPY)
@pytest.mark.parametrize("target", NUMPY)
def test_casts_round_to_nearest_even(tmp_path, source, target):
    hf = random_tensors(dtype=source)
    cast = convert(write(tmp_path, hf), SPEC, HF, HF, dtype=target)
    assert_same_bits(cast, {name: tensor.astype(NUMPY[target]) for name, tensor in hf.items()})


def test_parts_of_several_dtypes_become_the_one_that_holds_them(tmp_path):
    hf = random_tensors(dtype="BF16")
    name = "model.layers.0.self_attn.k_proj.weight"
    hf[name] = random_tensors(dtype="F16")[name]
    infer = convert(write(tmp_path, hf), SPEC, HF, INFER)
    qkv = infer["decoder.layers.0.self_attention.linear_qkv.weight"]
    assert qkv.dtype == np.float32
    np.testing.assert_array_equal(qkv[16:24], hf[name].astype(np.float32))
    assert infer["decoder.layers.1.self_attention.linear_qkv.weight"].dtype == NUMPY["BF16"]


def problems_of(tensors, tmp_path, spec=SPEC, dialect=HF):
    with pytest.raises(BridgeError) as error:
        convert(write(tmp_path, tensors), spec, dialect, INFER)
    return {problem.subject: problem.found for problem in error.value.problems}


def test_everything_wrong_is_reported_at_once(tmp_path):
    hf = random_tensors()
    del hf["model.layers.0.self_attn.k_proj.weight"], hf["model.layers.1.self_attn.k_proj.weight"]
    hf["model.layers.0.self_attn.o_proj.bias"] = np.zeros(12, np.float32)
    hf["model.norm.weight"] = np.zeros(13, np.float32)
    hf["model.layers.1.mlp.up_proj.weight"] = hf["model.layers.1.mlp.up_proj.weight"].astype(np.int8)
    found = problems_of(hf, tmp_path)
    assert found["model.layers.{0..1}.self_attn.k_proj.weight"] == "missing"
    assert found["model.layers.0.self_attn.o_proj.bias"] == "not a tensor of this model"
    assert found["model.norm.weight"] == "shape (13,), (12,) expected"
    assert found["model.layers.1.mlp.up_proj.weight"] == "dtype I8"
    assert len(found) == 4


@pytest.mark.parametrize("name", ["q_proj.weight_scale_inv", "q_proj.qweight", "q_proj.g_idx"])
def test_quantised_tensors_are_called_so(tmp_path, name):
    hf = random_tensors() | {f"model.layers.0.self_attn.{name}": np.zeros(3, np.float32)}
    with pytest.raises(BridgeError, match="quantised"):
        convert(write(tmp_path, hf), SPEC, HF, INFER)


def test_a_tied_model_may_store_its_output_layer_but_not_another_one(tmp_path):
    spec = replace(SPEC, tie_word_embeddings=True)
    hf = random_tensors(spec)
    hf["lm_head.weight"] = hf["model.embed_tokens.weight"].copy()
    plan = make_plan(model_rules(spec), open_source(write(tmp_path / "same", hf)).tensors, HF, INFER)
    plan.check_duplicates()
    assert plan.num_source_tensors == len(hf)
    hf["lm_head.weight"][3, 2] += 1
    plan = make_plan(model_rules(spec), open_source(write(tmp_path / "other", hf)).tensors, HF, INFER)
    with pytest.raises(BridgeError, match="tie_word_embeddings"):
        plan.check_duplicates()


def test_an_untied_model_without_output_layer_is_told_about_tying(tmp_path):
    hf = random_tensors()
    del hf["lm_head.weight"]
    with pytest.raises(BridgeError, match="tie_word_embeddings"):
        convert(write(tmp_path, hf), SPEC, HF, INFER)


def test_the_state_of_a_training_run_is_left_out(tmp_path):
    train = random_tensors(dialect=TRAIN)
    state = {
        "adam_m.decoder.final_layernorm.weight": np.zeros(12, np.float32),
        "adam_v.output_layer.weight": np.zeros((16, 12), np.float32),
        "global_step": np.zeros(1, np.int32),
        "epoch_num": np.zeros((), np.int64),
        "lm_loss": np.zeros(1, np.float32),
        "aux_loss": np.zeros(1, np.float32),
        "global_batch_size": np.array(8),
        "embedding_dropout.seed": np.zeros(1, np.int64),
        "decoder.layers.0.hidden_states_dropout.offset": np.zeros((), np.int64),  # 1.7 and 1.8, hidden_dropout above 0
        "muon_m.decoder.layers.0.mlp.linear_fc1.weight": np.zeros((20, 12), np.float32),
        "max_exp_avg_sq.decoder.final_layernorm.weight": np.zeros(12, np.float32),
        "exp_avg_sq_row_decoder.layers.1.mlp.linear_fc2.weight": np.zeros(12, np.float32),
        "scale_window_up_count": np.zeros(1, np.int32),
        "learning_rate_group_1": np.zeros(1, np.float32),
        "decoder.layers.0.mlp.router.fi_accu": np.zeros(4, np.float32),
        "decoder.layers.0.self_attention.core_attention.max_logits_val": np.zeros(4, np.float32),
    }
    plan = make_plan(model_rules(SPEC), open_source(write(tmp_path, train | state)).tensors, TRAIN, INFER)
    assert set(plan.ignored) == set(state)
    assert {target.name for target in plan.targets} == set(train)


def test_no_weight_looks_like_the_state_of_a_run():
    weights = {rule.parameter for rule in model_rules(SPEC)}
    assert not any(is_training_state(name, weights) for name in weights)
    assert not is_training_state("decoder.layers.9.mlp.linear_fc1.weight", weights)
    assert not is_training_state("adam_m.decoder.layers.9.mlp.linear_fc1.weight", weights)


def test_a_wrong_layout_does_not_survive_the_round_trip(tmp_path):
    """The trap: another layout of the same shape converts without an error, so only the values can tell."""
    hf = random_tensors()
    train = convert(write(tmp_path / "hf", hf), SPEC, HF, TRAIN)
    wrong = convert(write(tmp_path / "train", train), SPEC, INFER, HF)
    assert any(wrong[name].tobytes() != hf[name].tobytes() for name in hf)


@pytest.mark.parametrize("arrange", ["contiguous", "interleaved"])
def test_a_mutated_layout_is_seen_by_the_literal_tests(arrange, monkeypatch, tmp_path):
    """Swapping two parts of a layout must break the tests above: they can fail."""
    original = getattr(layouts, arrange)

    def swapped(rows, columns, groups):
        views = original(rows, columns, groups)
        return [*views[:-2], views[-1], views[-2]] if rows[-1] == rows[-2:][0] and len(rows) > 1 else views

    monkeypatch.setattr(layouts, arrange, swapped)
    check = {
        "contiguous": test_the_inference_layout_is_what_concatenation_gives,
        "interleaved": test_the_training_layout_is_what_reshaping_gives,
    }[arrange]
    with pytest.raises(AssertionError):
        check(tmp_path)
