"""PEFT adapters are merged as PEFT merges them, or refused by name."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mf_qwen3_bridge.errors import BridgeError
from mf_qwen3_bridge.inputs import adapters as module
from mf_qwen3_bridge.inputs import peft_config
from mf_qwen3_bridge.inputs.adapter_files import AdapterPath, adapter_paths
from mf_qwen3_bridge.inputs.opening import open_source
from mf_qwen3_bridge.inputs.preflight import check
from mf_qwen3_bridge.inputs.summary import summary
from mf_qwen3_bridge.model.parallel import ParallelConfig
from mf_qwen3_bridge.model.rules import HF, HF_STACKED, INFER, TRAIN
from mf_qwen3_bridge.transfer.adapted import LowRank
from mf_qwen3_bridge.verify.reference import forward
from tests.support.adapters import (
    ADAPTERS,
    NAMES,
    PREFIX,
    adapter_golden,
    base_of,
    delta,
    matrices,
    read_adapter,
    write_adapter,
)
from tests.support.checkpoints import MOE_SPEC, SPEC, contents, hf_config, random_tensors, write
from tests.support.damage import unwrapped
from tests.support.golden import TOLERANCE
from tests.support.quantised import fp8_config, quantise_model, write_model

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def error_of(name: str, adapter: Path) -> float:
    """Of the logits, relative to their scale, at most."""
    model = check(base_of(name), adapters=adapter)
    errors = []
    for expected in adapter_golden(name):
        *_, (_, logits) = forward(model, expected.prompt)
        errors.append(np.abs(logits - expected.logits).max() / np.abs(expected.logits).max())
    return max(errors)


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_peft(name: str):
    assert error_of(name, ADAPTERS / name) < TOLERANCE


def tensors_of(model, dialect=HF, dtype=None):
    return {target.name: target.make() for target in model.plan(dialect, dtype).targets}


# ------------------------------------------------------------------------------------------------------------ mutations


def swapped(tensors, config):
    """A's elements in B and B's in A, in the shapes that these have."""
    for name in [name for name in tensors if ".lora_A." in name]:
        other = name.replace(".lora_A.", ".lora_B.")
        a, b = tensors[name], tensors[other]
        tensors[name], tensors[other] = np.resize(b, a.shape), np.resize(a, b.shape)


def exchanged(left, right):
    def exchange(tensors, config):
        for name in [name for name in tensors if left in name]:
            other = name.replace(left, right)
            tensors[name], tensors[other] = tensors[other], tensors[name]

    return exchange


def without_scaling(tensors, config):
    config |= {"lora_alpha": config["r"], "alpha_pattern": {}}


def transposed_ranks(tensors, config):
    """B of stacked experts as (out, experts * r) instead of (out, r * experts)."""
    for name in [name for name in tensors if "experts" in name and "lora_B" in name]:
        b = tensors[name]
        tensors[name] = np.ascontiguousarray(b.reshape(len(b), -1, 4).swapaxes(1, 2).reshape(b.shape))


def swapped_halves(tensors, config):
    """The rows of gate for those of up, and of up for those of gate."""
    for name in [name for name in tensors if "base_layer.lora_B" in name]:
        tensors[name] = np.roll(tensors[name], len(tensors[name]) // 2, axis=0)


MUTATIONS = {
    "A and B swapped": ("dense_lora", swapped),
    "scaling missing": ("dense_lora", without_scaling),
    "alpha and r swapped": ("moe_experts", lambda _, config: config.update(lora_alpha=4 / 3)),  # 2/3 instead of 3/2
    "k's rows given to v": ("dense_saved", exchanged("k_proj.lora_B", "v_proj.lora_B")),
    "gate's rows given to up": ("moe_experts", exchanged("gate_proj.lora_B", "up_proj.lora_B")),
    "gate's A given to up": ("moe_experts", exchanged("gate_proj.lora_A", "up_proj.lora_A")),
    "two experts swapped": ("moe_experts", exchanged("experts.0.", "experts.1.")),
    "two layers swapped": ("dense_dora", exchanged("layers.0.", "layers.1.")),
    "rank and expert transposed": ("moe_stacked", transposed_ranks),
    "gate and up of stacked experts": ("moe_stacked", swapped_halves),
    "no rsLoRA": ("dense_rslora_ends", lambda _, config: config.update(use_rslora=False)),
    "q's lengths one row off": (
        "dense_dora",
        lambda tensors, _: tensors.update(
            {name: np.roll(value, 1) for name, value in tensors.items() if "q_proj.lora_magnitude" in name}
        ),
    ),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_every_mutation_is_seen(tmp_path: Path, mutation: str):
    name, change = MUTATIONS[mutation]
    tensors = load_file(ADAPTERS / name / "adapter_model.safetensors")
    config = json.loads((ADAPTERS / name / "adapter_config.json").read_text())
    change(tensors, config)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert error_of(name, tmp_path) > 100 * TOLERANCE


@pytest.mark.parametrize("rows", ["lora_A", "lora_B"])
def test_a_mistake_in_the_code_is_seen(monkeypatch: pytest.MonkeyPatch, rows: str):
    """Rows of B one off, A from another column: what a slice would do that is cut in the wrong place."""
    original = LowRank.delta

    def shifted(update, wanted, columns, read):
        if rows == "lora_B":
            return np.roll(original(update, wanted, columns, read), 1, axis=0)
        return np.roll(original(update, wanted, columns, read), 1, axis=1)

    monkeypatch.setattr(LowRank, "delta", shifted)
    assert error_of("dense_lora", ADAPTERS / "dense_lora") > 100 * TOLERANCE


# -------------------------------------------------------------------------------------------------------------- merging


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return write(tmp_path / "hf", random_tensors(), hf_config())


@pytest.fixture
def moe(tmp_path: Path) -> Path:
    return write(tmp_path / "moe", random_tensors(MOE_SPEC), hf_config(MOE_SPEC))


@pytest.fixture
def lora(hf: Path) -> Path:
    return write_adapter(hf.parent / "lora", matrices(contents(hf), *ATTENTION), target_modules=list(ATTENTION))


def test_the_difference_has_the_rank_and_is_b_times_a(hf: Path, lora: Path):
    base, merged = contents(hf), tensors_of(check(hf, adapters=lora))
    added = read_adapter(lora)
    for name, value in base.items():
        difference = merged[name].astype(np.float64) - value
        if not name.removesuffix(".weight").endswith(ATTENTION):
            assert not difference.any()
            continue
        assert np.linalg.matrix_rank(difference, tol=1e-4) == 2
        np.testing.assert_allclose(difference, 3 * delta(added, name), rtol=0, atol=1e-5)


def test_bfloat16_is_rounded_once(tmp_path: Path, lora: Path):
    base = write(tmp_path / "bf16", random_tensors(dtype="BF16"), hf_config())
    added = read_adapter(lora)
    merged = tensors_of(check(base, adapters=lora))
    exact = tensors_of(check(base, adapters=lora), dtype="F32")
    for name, value in contents(base).items():
        assert merged[name].tobytes() == exact[name].astype(ml_dtypes.bfloat16).tobytes()
        if name.removesuffix(".weight").endswith(ATTENTION):
            right = value.astype(np.float64) + 3 * delta(added, name)
            np.testing.assert_allclose(exact[name], right, rtol=0, atol=1e-5)


def test_several_add_up_and_scale(hf: Path, lora: Path):
    other = write_adapter(
        hf.parent / "other", matrices(contents(hf), "q_proj", "up_proj", seed=1), target_modules=["q_proj", "up_proj"]
    )
    base = contents(hf)
    both = tensors_of(check(hf, adapters=[lora, (other, -0.5)]))
    assert both.keys() == base.keys()
    added = [read_adapter(path) for path in (lora, other)]
    q, up = "model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"
    right = base[q] + 3 * delta(added[0], q) - 1.5 * delta(added[1], q)
    np.testing.assert_allclose(both[q], right, rtol=0, atol=1e-5)
    np.testing.assert_allclose(both[up], base[up] - 1.5 * delta(added[1], up), rtol=0, atol=1e-5)
    named = tensors_of(check(hf, adapters=[str(lora), f"{other}:-0.5"]))
    assert all(named[name].tobytes() == both[name].tobytes() for name in both)


def test_every_spelling_of_experts_merges_alike(moe: Path, tmp_path: Path):
    """One adapter an expert, or stacked; into experts one by one, or stacked: the same bits."""
    base, spec = contents(moe), MOE_SPEC
    single = matrices(base, "gate_proj", "up_proj", "down_proj")
    for name in [name for name in single if "up_proj.lora_A" in name]:  # stacked, gate and up share A
        single[name] = single[name.replace("up_proj", "gate_proj")]
    stacked: dict[str, np.ndarray] = {}
    for layer in range(spec.num_layers):
        of_layer = f"model.layers.{layer}.mlp.experts"

        def of(part: str, side: str) -> np.ndarray:
            return np.stack([single[f"{of_layer}.{e}.{part}.lora_{side}.weight"] for e in range(spec.num_experts)])  # noqa: B023

        gate_up = np.concatenate([of("gate_proj", "B"), of("up_proj", "B")], axis=1)
        for place, a, b in (
            (".base_layer", of("gate_proj", "A"), gate_up),
            ("", of("down_proj", "A"), of("down_proj", "B")),
        ):
            stacked[f"{of_layer}{place}.lora_A.weight"] = a.reshape(-1, a.shape[2])
            stacked[f"{of_layer}{place}.lora_B.weight"] = np.ascontiguousarray(
                b.transpose(1, 2, 0).reshape(b.shape[1], -1)
            )
    one = write_adapter(tmp_path / "one", single, target_modules=["gate_proj", "up_proj", "down_proj"])
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    other = write_adapter(tmp_path / "stacked", stacked, target_parameters=parameters)
    fused = write(tmp_path / "fused", tensors_of(check(moe), HF_STACKED), hf_config(MOE_SPEC))
    expected = tensors_of(check(moe, adapters=one))
    for directory, adapter in ((moe, other), (fused, one), (fused, other)):
        found = tensors_of(check(directory, adapters=adapter))
        assert all(found[name].tobytes() == expected[name].tobytes() for name in expected)
        twice = tensors_of(check(directory, adapters=[adapter, adapter]))
        assert any(twice[name].tobytes() != expected[name].tobytes() for name in expected)
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    np.testing.assert_allclose(expected[name], base[name] + 3 * delta(single, name), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sizes", [(2, 1), (2, 2), (1, 2)], ids=str)
def test_a_ranks_slice_is_the_slice_of_the_whole(tmp_path: Path, name: str, sizes: tuple[int, int]):
    """Bit for bit: each rank plans from the base and the adapter, or from a merged checkpoint."""
    model = check(base_of(name), adapters=ADAPTERS / name)
    merged = check(
        write(tmp_path, tensors_of(model, dtype="F32"), json.loads((base_of(name) / "config.json").read_text()))
    )
    parallel = ParallelConfig(*sizes)
    if any(parallel.problems(model.spec)):
        pytest.skip("its sizes can't be divided so")
    for number in range(parallel.world_size):
        rank = parallel.rank(number)
        for slice_, whole in zip(model.plan(INFER, "F32", rank).targets, merged.plan(INFER, rank=rank).targets):
            assert slice_.make().tobytes() == whole.make().tobytes(), slice_.name


def test_a_rank_reads_rows_of_b_and_columns_of_a_that_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    spec = replace(SPEC, hidden_size=4096, num_attention_heads=8, head_dim=16)
    hf = random_tensors(spec)
    added = matrices(hf, "q_proj", "down_proj")
    adapter = write_adapter(tmp_path / "lora", added, target_modules=["q_proj", "down_proj"])
    model = check(write(tmp_path / "hf", hf, hf_config(spec)), adapters=adapter)
    asked: list[tuple[str, int]] = []
    original = module.Reader.read

    def spy(reader, tensor, start, out):
        asked.append((tensor.name, len(out)))
        original(reader, tensor, start, out)

    monkeypatch.setattr(module.Reader, "read", spy)
    for target in model.plan(INFER, rank=ParallelConfig(2).rank(1)).targets:
        target.make()
    name = "model.layers.0.self_attn.q_proj"
    b = f"{PREFIX}{name}.lora_B.weight"
    assert sum(size for other, size in asked if other == b) == added[f"{name}.lora_B.weight"].nbytes // 2


def test_modules_to_save_and_the_embedding_replace_and_adapt(hf: Path, tmp_path: Path):
    base = contents(hf)
    random = np.random.default_rng(5)
    embedding = random.standard_normal(base["model.embed_tokens.weight"].shape).astype(np.float32)
    norm = random.standard_normal(base["model.norm.weight"].shape).astype(np.float32)
    a, b = (
        random.standard_normal(shape).astype(np.float32) for shape in ((2, len(embedding)), (embedding.shape[1], 2))
    )
    tensors = {
        "model.embed_tokens.base_layer.weight": embedding,
        "model.embed_tokens.lora_embedding_A": a,
        "model.embed_tokens.lora_embedding_B": b,
        "model.norm.modules_to_save.weight": norm,
    }
    adapter = write_adapter(tmp_path / "saved", tensors, target_modules=["embed_tokens"], modules_to_save=["norm"])
    with pytest.raises(BridgeError, match="modules_to_save names it"):  # all norms end so, by PEFT's rule
        check(hf, adapters=adapter)
    adapter = write_adapter(
        tmp_path / "saved", tensors, target_modules=["embed_tokens"], modules_to_save=["model.norm"]
    )
    merged = tensors_of(check(hf, adapters=adapter))
    assert merged["model.norm.weight"].tobytes() == norm.tobytes()
    np.testing.assert_allclose(merged["model.embed_tokens.weight"], embedding + 3 * (b @ a).T, rtol=0, atol=1e-5)


def test_a_fresh_adapter_changes_nothing_and_says_so(hf: Path, tmp_path: Path):
    fresh = {n: v * ("lora_A" in n) for n, v in matrices(contents(hf), "q_proj").items()}
    model = check(hf, adapters=write_adapter(tmp_path / "fresh", fresh, target_modules=["q_proj"]))
    assert tensors_of(model).keys() == contents(hf).keys()
    assert all(np.array_equal(value, contents(hf)[name]) for name, value in tensors_of(model).items())
    assert any("changes nothing: every B is zero" in note for note in model.notes)


def test_the_summary_says_what_is_merged(hf: Path, lora: Path):
    lines = list(summary(check(hf, adapters=f"{lora}:0.5")))
    assert f"adapter     {lora}, scaled by 0.5: LoRA of rank 2, scaling 1.5, merged into 8 of 16 matrices" in lines


def test_rows_of_invalid_values_name_the_adapters_file(hf: Path, tmp_path: Path):
    from mf_qwen3_bridge.convert.jobs import to_mindformers
    from mf_qwen3_bridge.convert.run import run

    broken = matrices(contents(hf), "q_proj")
    broken["model.layers.0.self_attn.q_proj.lora_B.weight"][3, 1] = math.nan
    adapter = write_adapter(tmp_path / "broken", broken, target_modules=["q_proj"])
    with pytest.raises(BridgeError) as caught:
        run(to_mindformers(check(hf, adapters=adapter), TRAIN, tmp_path / "out"))
    assert "adapter_model.safetensors" in unwrapped(str(caught.value))


# ------------------------------------------------------------------------------------------------------------- refusals


def refused(base: Path, *adapters, **options) -> str:
    with pytest.raises(BridgeError) as caught:
        check(base, adapters=list(adapters), **options)
    return unwrapped(str(caught.value))


CONFIGS = {
    "peft_type": "IA3",
    "r": [0, -1, 2.5, "8", True],
    "lora_alpha": [0, "16", False, 1e-60, 1e60],
    "rank_pattern": [{"q_proj": 0}, [1]],
    "alpha_pattern": [{"q_proj": 0}, {"(": 1}],
    "use_rslora": "yes",
    "target_modules": ["(", 3, [1]],
    "layers_to_transform": "0",
    "layer_replication": [[0, 2]],
    "trainable_token_indices": [1],
    "alora_invocation_tokens": [1],
    "arrow_config": {"top_k": 1},
    "use_bdlora": {"nblocks": 2},
    "kasa_config": {"beta": 1},
    "monteclora_config": {"a": 1},
    "velora_config": {"a": 1},
    "use_qalora": True,
    "megatron_config": {"a": 1},
    "lora_bias": True,
    "bias": "some",
    "init_lora_weights": ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga", "loftq", "mica", 1],
    "use_of_tomorrow": True,
}


@pytest.mark.parametrize(
    ("key", "value"),
    [(key, value) for key, values in CONFIGS.items() for value in (values if isinstance(values, list) else [values])],
    ids=str,
)
def test_what_peft_configs_declare_and_is_not_merged(hf: Path, lora: Path, key: str, value):
    document = json.loads((lora / "adapter_config.json").read_text()) | {key: value}
    (lora / "adapter_config.json").write_text(json.dumps(document))
    message = refused(hf, lora)
    assert key in message or "scaling" in message


def test_everything_that_does_not_fit_is_in_one_table(hf: Path, tmp_path: Path):
    good = matrices(contents(hf), *ATTENTION)
    layer = "model.layers.0.self_attn"
    bad = dict(good)
    bad["model.layers.7.self_attn.q_proj.lora_A.weight"] = good[f"{layer}.q_proj.lora_A.weight"]
    bad["model.layers.7.self_attn.q_proj.lora_B.weight"] = good[f"{layer}.q_proj.lora_B.weight"]
    del bad[f"{layer}.k_proj.lora_B.weight"]
    bad[f"{layer}.v_proj.lora_A.weight"] = np.zeros((2, 5), np.float32)
    bad[f"{layer}.o_proj.lora_A.weight"] = bad[f"{layer}.o_proj.lora_A.weight"][:1]
    bad["model.layers.1.self_attn.q_proj.lora_B.weight"] = np.zeros((16, 2), np.int8)
    bad["model.layers.1.self_attn.k_proj.lora_B.bias"] = np.zeros(8, np.float32)
    bad["lm_head.weight"] = np.zeros((17, 12), np.float32)
    with pytest.raises(BridgeError) as caught:
        check(hf, adapters=write_adapter(tmp_path / "bad", bad, target_modules=list(ATTENTION)))
    message = "\n".join(f"{problem.subject} {problem.found} {problem.remedy}" for problem in caught.value.problems)
    for part in (
        "layers.7.self_attn.q_proj.lora_A.weight fits no weight of the base",
        "lora_B missing",
        "A (2, 5), B (8, 2); the base's in and out are 12 and 8",
        "rank 1 in A, 2 in B; adapter_config.json: 2",
        "dtype I8",
        "has no bias",
        "shape (17, 12); the base's is (16, 12)",
    ):
        assert part in message, part


def test_config_and_file_are_held_against_each_other(hf: Path, tmp_path: Path):
    added = matrices(contents(hf), "q_proj", "v_proj")
    few = write_adapter(tmp_path / "few", added, target_modules=["q_proj"])
    assert "does not adapt this module: PEFT would ignore it" in refused(hf, few)
    many = write_adapter(tmp_path / "many", added, target_modules=["q_proj", "v_proj", "k_proj"])
    message = refused(hf, many)
    assert "model.layers.{0..1}.self_attn.k_proj.weight" in message and "adapter_config.json adapts it" in message
    other_rank = write_adapter(
        tmp_path / "rank", added, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 3}
    )
    assert "adapter_config.json: 3" in refused(hf, other_rank)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": r".*\.(q_proj|v_proj)"},
        {"target_modules": ["model.layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj", "v_proj"]},
        {"target_modules": ["q_proj", "v_proj", "up_proj"], "exclude_modules": ["up_proj"]},
        {"target_modules": "all-linear", "exclude_modules": r".*(k_proj|o_proj|mlp.*)"},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 1], "layers_pattern": "layers"},
        {"target_modules": ["q_proj", "v_proj"], "bias": "all", "lora_dropout": 0.1, "inference_mode": True},
        {"target_modules": ["q_proj"], "target_parameters": ["v_proj.weight"]},
        {"target_modules": ["q_proj", "v_proj"], "fan_in_fan_out": True, "init_lora_weights": "gaussian"},
    ],
    ids=str,
)
def test_ways_to_name_modules(hf: Path, tmp_path: Path, config):
    model = check(hf, adapters=write_adapter(tmp_path / "a", matrices(contents(hf), "q_proj", "v_proj"), **config))
    (merged,) = model.source.adapters
    assert merged.description.endswith("merged into 4 of 16 matrices")


def test_layers_to_transform(hf: Path, tmp_path: Path):
    added = {name: value for name, value in matrices(contents(hf), "q_proj").items() if "layers.1." in name}
    for config in ({"layers_to_transform": 1}, {"layers_to_transform": [1], "layers_pattern": ["layers"]}):
        check(hf, adapters=write_adapter(tmp_path / "a", added, target_modules=["q_proj"], **config))
    message = refused(hf, write_adapter(tmp_path / "a", added, target_modules=["q_proj"], layers_to_transform=[0]))
    assert "layers.0.self_attn.q_proj.weight" in message and "adapter_config.json adapts it" in message
    assert "PEFT would ignore it" in message


def test_names_with_the_adapters_own(hf: Path, lora: Path, tmp_path: Path):
    infix = {name.replace(".weight", ".default.weight"): v for name, v in read_adapter(lora).items()}
    named = write_adapter(tmp_path / "named", infix, target_modules=list(ATTENTION))
    expected, found = (tensors_of(check(hf, adapters=path)) for path in (lora, named))
    assert all(found[name].tobytes() == expected[name].tobytes() for name in expected)
    both = infix | read_adapter(lora)
    assert "it holds two adapters" in refused(
        hf, write_adapter(tmp_path / "both", both, target_modules=list(ATTENTION))
    )


def test_tied_embeddings(tmp_path: Path):
    spec = replace(SPEC, tie_word_embeddings=True)
    base = write(tmp_path / "tied", random_tensors(spec), hf_config(spec))
    width, vocabulary = spec.hidden_size, spec.vocab_size
    a, b = np.ones((2, vocabulary), np.float32), np.ones((width, 2), np.float32)
    tensors = {"model.embed_tokens.lora_embedding_A": a, "model.embed_tokens.lora_embedding_B": b}
    message = refused(base, write_adapter(tmp_path / "a", tensors, target_modules=["embed_tokens"]))
    assert "merging would untie them" in message
    head = {"lm_head.weight": np.ones((vocabulary, width), np.float32)}
    message = refused(base, write_adapter(tmp_path / "b", head, target_modules=[], modules_to_save=["lm_head"]))
    assert "merging would untie them" in message


def test_adapters_that_do_not_add_up(hf: Path, tmp_path: Path):
    base = contents(hf)
    dora = matrices(base, "q_proj")
    dora |= {
        name.replace("lora_B.weight", "lora_magnitude_vector"): np.ones(len(value), np.float32)
        for name, value in dora.items()
        if "lora_B" in name
    }
    first = write_adapter(tmp_path / "dora", dora, target_modules=["q_proj"], use_dora=True)
    second = write_adapter(tmp_path / "lora", matrices(base, "q_proj"), target_modules=["q_proj"])
    assert "don't add up" in refused(hf, first, second)
    assert "don't add up" in refused(hf, first, first)
    saved = write_adapter(tmp_path / "saved", {"lm_head.weight": base["lm_head.weight"]}, modules_to_save=["lm_head"])
    assert "don't add up" in refused(hf, saved, saved)
    assert "can't be scaled by 2" in refused(hf, f"{saved}:2")
    check(hf, adapters=[saved, second])
    missing = {name: value for name, value in dora.items() if "magnitude" not in name}
    message = refused(hf, write_adapter(tmp_path / "dora", missing, target_modules=["q_proj"], use_dora=True))
    assert "lora_magnitude_vector missing" in message
    assert "without use_dora" in refused(hf, write_adapter(tmp_path / "dora", dora, target_modules=["q_proj"]))


def test_dora_of_what_has_no_rows_of_its_own(moe: Path, tmp_path: Path):
    base = contents(moe)
    part = {name: value for name, value in base.items() if "experts" in name}
    dora = matrices(part, "down_proj")
    dora |= {
        name.replace("lora_B.weight", "lora_magnitude_vector"): np.ones(len(value), np.float32)
        for name, value in dora.items()
        if "lora_B" in name
    }
    adapter = write_adapter(tmp_path / "dora", dora, target_modules=["down_proj"], use_dora=True)
    check(moe, adapters=adapter)
    fused = write(tmp_path / "fused", tensors_of(check(moe), HF_STACKED), hf_config(MOE_SPEC))
    assert "DoRA of experts that the base holds stacked" in refused(fused, adapter)


def test_what_is_no_adapter(hf: Path, lora: Path, tmp_path: Path):
    assert "is no directory" in refused(hf, tmp_path / "nowhere")
    assert "adapter_config.json is missing" in refused(hf, hf)
    (lora / "adapter_model.safetensors").rename(lora / "adapter_model.bin")
    assert "adapter_model.bin is not read; load it with PEFT once" in refused(hf, lora)
    (lora / "adapter_model.bin").unlink()
    assert "adapter_model.safetensors is missing: copy it" in refused(hf, lora)
    (tmp_path / "cache" / "snapshots" / "abc").mkdir(parents=True)
    (tmp_path / "cache" / "snapshots" / "abc" / "adapter_config.json").write_text("{}")
    assert f"give {tmp_path / 'cache' / 'snapshots' / 'abc'}" in refused(hf, tmp_path / "cache")
    for scale in ("0", "nan", "inf", "1e-50"):
        assert "factor" in refused(hf, f"{lora}:{scale}")


def test_an_adapter_is_no_model(hf: Path, lora: Path):
    for path in (lora, lora / "adapter_config.json"):
        with pytest.raises(BridgeError, match=r"--adapter|not a directory"):
            check(path)
    with pytest.raises(BridgeError, match="holds a PEFT adapter, no model's weights"):
        assert open_source(lora).is_hf


def test_weights_of_mindformers_are_exported_first(hf: Path, lora: Path, tmp_path: Path):
    trained = write(tmp_path / "trained", tensors_of(check(hf), TRAIN))
    config = tmp_path / "train.yaml"
    config.write_text(json.dumps({"run_mode": "finetune", "model": {"model_config": {}}}))
    message = refused(hf, lora, config=config, weights=trained)
    assert "make a Hugging Face directory of them first (mf-qwen3 export)" in message


def test_the_yaml_names_adapters(hf: Path, lora: Path, tmp_path: Path):
    config = tmp_path / "predict.yaml"

    def document(value, mode="predict"):
        config.write_text(json.dumps({"run_mode": mode, "model": {"model_config": {"pretrained_adapter_dir": value}}}))
        return config

    for value in (str(lora), [f"{lora}:1"]):
        model = check(hf, document(value))
        assert len(model.source.adapters) == 1
        assert not any("not used" in note for note in model.notes)
    model = check(hf, document(str(lora)), adapters=f"{lora}:2")
    assert any("pretrained_adapter_dir of" in note and "is not used" in note for note in model.notes)
    assert not check(hf, document(None)).source.adapters
    assert "is for run_mode: predict" in refused(hf, config=document(str(lora), "finetune"))
    for value in ({"a": 1}, 3, [[3]]):
        assert "give a directory" in refused(hf, config=document(value))


def test_how_adapters_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:2").mkdir()
    assert adapter_paths(None) == adapter_paths(()) == ()
    assert adapter_paths("a:2") == (AdapterPath(Path("a:2")),)  # it exists
    assert adapter_paths("a:2:0.5") == (AdapterPath(Path("a:2"), 0.5),)
    assert adapter_paths("b:2") == adapter_paths(("b", 2)) == (AdapterPath(Path("b"), 2.0),)
    assert adapter_paths("c:d") == (AdapterPath(Path("c:d")),)
    assert adapter_paths(["b", ("c", 3), "d:-1"]) == (
        AdapterPath(Path("b")),
        AdapterPath(Path("c"), 3.0),
        AdapterPath(Path("d"), -1.0),
    )
    for wrong in (3, [3], {"a": 1}, (3, 4)):
        with pytest.raises(BridgeError, match="give a directory"):
            adapter_paths(wrong)


def test_a_regular_expression_is_pefts():
    config = peft_config.PeftConfig(
        {"rank_pattern": {r".*\.gate_up_proj": 4, "k_proj": 1}, "alpha_pattern": {"0.q": 3}}
    )
    assert config.rank("model.layers.0.mlp.experts.gate_up_proj") == 4
    assert config.rank("k_proj") == config.rank("a.k_proj") == 1 != config.rank("ak_proj") == 8
    assert config.alpha("model.layers.0.q") == config.alpha("10.q") == 3 or config.alpha("10.q") == 8


def test_a_file_that_is_no_safetensors(hf: Path, lora: Path):
    (lora / "adapter_model.safetensors").write_bytes(b"no")
    assert "is damaged" in refused(hf, lora)
    shutil.rmtree(lora)


@pytest.mark.parametrize("spec", [SPEC, MOE_SPEC], ids=["dense", "moe"])
@pytest.mark.parametrize("dtype", [None, "F32"])
def test_an_adapter_of_a_quantised_base_adds_to_its_dequantised_weights(tmp_path: Path, spec, dtype):
    """As PEFT adds it to the plain directory that transformers would load."""
    hf = random_tensors(spec)
    config = hf_config(spec, torch_dtype="bfloat16")
    stored, _ = quantise_model(hf, fp8_config())
    (tmp_path / "fp8").mkdir()
    quantised = write_model(tmp_path / "fp8", stored, config | {"quantization_config": fp8_config()})
    modules = ["q_proj", "o_proj"]
    adapter = write_adapter(tmp_path / "adapter", matrices(hf, *modules), target_modules=modules)
    plain = write(tmp_path / "plain", tensors_of(check(quantised), dtype=dtype), config)
    for target in (HF, INFER, TRAIN):
        merged = tensors_of(check(quantised, adapters=adapter), target, dtype)
        expected = tensors_of(check(plain, adapters=adapter), target, dtype)
        assert {name: array.tobytes() for name, array in merged.items()} == {
            name: array.tobytes() for name, array in expected.items()
        }
    name = "model.layers.0.self_attn.q_proj.weight"
    bare, merged = (
        tensors_of(check(quantised), dtype=dtype),
        tensors_of(check(quantised, adapters=adapter), dtype=dtype),
    )
    assert bare[name].tobytes() != merged[name].tobytes()
