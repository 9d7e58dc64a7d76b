"""The part of every parameter that a rank holds: what slicing whole tensors gives, and nothing else is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mf_qwen3_bridge.errors import BridgeError
from mf_qwen3_bridge.inputs.opening import open_source
from mf_qwen3_bridge.model import training_ranks
from mf_qwen3_bridge.model.layouts import Layout
from mf_qwen3_bridge.model.parallel import ParallelConfig, num_processes
from mf_qwen3_bridge.model.released import RELEASED
from mf_qwen3_bridge.model.rules import HF, HF_STACKED, INFER, TRAIN, Dialect, model_rules
from mf_qwen3_bridge.model.spec import ModelSpec
from mf_qwen3_bridge.transfer import tiles
from mf_qwen3_bridge.transfer.copying import Transfer
from mf_qwen3_bridge.transfer.plan import Plan, check_values, make_plan, write_slices
from mf_qwen3_bridge.transfer.safetensors import DTYPES, Reader
from tests.support.checkpoints import MOE_SPEC, SPEC, Tensors, random_tensors, write

SOURCES = [HF, HF_STACKED, TRAIN, INFER, Dialect(Layout(interleaved_qkv=False, interleaved_gate_up=True))]


def plan_of(directory: Path, spec: ModelSpec, parallel: ParallelConfig, number: int, source: Dialect = HF) -> Plan:
    tensors = open_source(directory).tensors
    return make_plan(model_rules(spec), tensors, source, INFER, rank=parallel.rank(number))


def sliced(hf: Tensors, spec: ModelSpec, parallel: ParallelConfig, number: int) -> Tensors:
    """What a rank holds, by numpy slices of whole tensors: written apart from the rules, parameter by parameter."""
    rank = parallel.rank(number)

    def mine(array: np.ndarray, axis: int, size: int = rank.tensor_parallel, at: int = rank.tensor_rank) -> np.ndarray:
        return np.split(array, size, axis)[at]

    def layer(i: int) -> Tensors:
        hf_layer, mf_layer = f"model.layers.{i}", f"decoder.layers.{i}"
        q, k, v = (hf[f"{hf_layer}.self_attn.{name}_proj.weight"] for name in "qkv")
        repeats = max(1, rank.tensor_parallel // spec.num_query_groups)
        k, v = (np.repeat(t.reshape(-1, spec.head_dim, t.shape[1]), repeats, 0).reshape(-1, t.shape[1]) for t in (k, v))
        result = {
            "self_attention.linear_qkv": np.concatenate([mine(t, 0) for t in (q, k, v)]),
            "self_attention.linear_proj": mine(hf[f"{hf_layer}.self_attn.o_proj.weight"], 1),
            "self_attention.q_layernorm": hf[f"{hf_layer}.self_attn.q_norm.weight"],
            "self_attention.k_layernorm": hf[f"{hf_layer}.self_attn.k_norm.weight"],
            "input_layernorm": hf[f"{hf_layer}.input_layernorm.weight"],
            "pre_mlp_layernorm": hf[f"{hf_layer}.post_attention_layernorm.weight"],
        }
        named = {f"{mf_layer}.{name}.weight": tensor for name, tensor in result.items()}
        if not spec.is_moe:
            gate, up, down = (hf[f"{hf_layer}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
            named[f"{mf_layer}.mlp.linear_fc1.weight"] = np.concatenate([mine(gate, 0), mine(up, 0)])
            named[f"{mf_layer}.mlp.linear_fc2.weight"] = mine(down, 1)
            return named
        gate, up, down = (
            np.stack([hf[f"{hf_layer}.mlp.experts.{e}.{name}_proj.weight"].T for e in range(spec.num_experts)])
            for name in ("gate", "up", "down")
        )
        gate, up, down = (mine(t, 0, rank.expert_parallel, rank.expert_rank) for t in (gate, up, down))
        share = rank.expert_tensor_parallel, rank.expert_tensor_rank
        named[f"{mf_layer}.mlp.experts.weight1"] = np.concatenate([mine(gate, 2, *share), mine(up, 2, *share)], axis=2)
        named[f"{mf_layer}.mlp.experts.weight2"] = mine(down, 1, *share)
        first = spec.num_experts // rank.expert_parallel * rank.expert_rank if rank.rotates_router else 0
        named[f"{mf_layer}.mlp.router.weight"] = np.roll(hf[f"{hf_layer}.mlp.gate.weight"], -first, axis=0)
        return named

    result = {"decoder.final_layernorm.weight": hf["model.norm.weight"]}
    result["embedding.word_embeddings.weight"] = mine(hf["model.embed_tokens.weight"], 0)
    if not spec.tie_word_embeddings:
        result["output_layer.weight"] = mine(hf["lm_head.weight"], 0)
    for i in range(spec.num_layers):
        result |= layer(i)
    return result


@st.composite
def runs(draw) -> tuple[ModelSpec, ParallelConfig]:
    """A model, and sizes that divide it."""
    tensor_parallel, data_parallel = draw(st.sampled_from([1, 2, 3, 4, 8])), draw(st.sampled_from([1, 2]))
    world_size = tensor_parallel * data_parallel
    divisors = [n for n in range(1, tensor_parallel + 1) if tensor_parallel % n == 0]
    groups = draw(st.sampled_from([*divisors, 2 * tensor_parallel]))
    is_moe = draw(st.booleans())
    expert_parallel = (
        draw(st.sampled_from([n for n in range(1, world_size + 1) if world_size % n == 0])) if is_moe else 1
    )
    spec = ModelSpec(
        num_layers=draw(st.integers(1, 2)),
        hidden_size=draw(st.integers(1, 5)),
        num_attention_heads=max(groups, tensor_parallel) * draw(st.integers(1, 2)),
        num_query_groups=groups,
        head_dim=2 * draw(st.integers(1, 2)),
        ffn_hidden_size=0 if is_moe else tensor_parallel * draw(st.integers(1, 3)),
        vocab_size=tensor_parallel * draw(st.integers(1, 3)),
        tie_word_embeddings=draw(st.booleans()),
        num_experts=expert_parallel * draw(st.integers(1, 2)) if is_moe else 0,
        moe_ffn_hidden_size=world_size // expert_parallel * draw(st.integers(1, 3)) if is_moe else 0,
    )
    return spec, ParallelConfig(tensor_parallel, expert_parallel, data_parallel)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(run=runs(), source=st.sampled_from(SOURCES))
def test_every_rank_holds_what_slicing_gives(tmp_path_factory, run, source):
    spec, parallel = run
    assert not list(parallel.problems(spec))
    hf, directory = random_tensors(spec), tmp_path_factory.mktemp("weights")
    hf_plan = make_plan(model_rules(spec), open_source(write(directory / "hf", hf)).tensors, HF, source)
    write(directory / "source", {target.name: target.make() for target in hf_plan.targets})
    for number in range(parallel.world_size):
        expected = sliced(hf, spec, parallel, number)
        plan = plan_of(directory / "source", spec, parallel, number, source)
        assert {target.name for target in plan.targets} == expected.keys()
        for target in plan.targets:
            np.testing.assert_array_equal(target.make(), expected[target.name], target.name, strict=True)


@pytest.fixture
def read(monkeypatch) -> list[int]:
    """The length of every read, in bytes."""
    lengths: list[int] = []
    original = Reader.read

    def counting(self, tensor, start, out):
        lengths.append(len(out))
        original(self, tensor, start, out)

    monkeypatch.setattr(Reader, "read", counting)
    return lengths


LARGE = replace(SPEC, hidden_size=256, num_attention_heads=16, num_query_groups=4, head_dim=1024, ffn_hidden_size=16384)
LARGE_MOE = replace(MOE_SPEC, hidden_size=512, head_dim=4096, num_layers=1, moe_ffn_hidden_size=8)


@pytest.mark.parametrize(
    ("spec", "parallel"),
    [
        (LARGE, ParallelConfig(1)),
        (LARGE, ParallelConfig(2)),
        (LARGE, ParallelConfig(8)),
        (LARGE_MOE, ParallelConfig(4, 4)),
        (LARGE_MOE, ParallelConfig(2, 1)),
    ],
    ids=lambda value: str(value) if isinstance(value, ParallelConfig) else "",
)
def test_nothing_is_read_that_a_rank_does_not_need(tmp_path, read, spec, parallel):
    directory = write(tmp_path, random_tensors(spec, dtype="BF16"))
    total = 0
    for number in range(parallel.world_size):
        plan = plan_of(directory, spec, parallel, number)
        read.clear()
        for target in plan.targets:
            target.make()
        needed = sum(int(np.prod(target.shape)) * 2 for target in plan.targets)
        # Less than a page between two runs is read with them: down_proj's columns in the small experts.
        assert needed == plan.source_nbytes
        assert needed <= sum(read) <= needed * (1.4 if spec.is_moe and parallel.expert_parallel == 1 else 1)
        total += needed
    assert max(read) <= tiles.TILE_BYTES
    assert total >= sum(target.nbytes for target in open_source(directory).tensors.values())


@pytest.mark.parametrize(
    ("spec", "parallel"),
    [
        (SPEC, ParallelConfig(2)),
        (replace(SPEC, ffn_hidden_size=12), ParallelConfig(4)),
        (MOE_SPEC, ParallelConfig(2)),
        (MOE_SPEC, ParallelConfig(2, 2)),
        (MOE_SPEC, ParallelConfig(4, 4)),
    ],
    ids=lambda value: str(value) if isinstance(value, ParallelConfig) else "",
)
def test_all_ranks_together_need_each_element_once_unless_several_hold_it(tmp_path, spec, parallel):
    """So on one machine each byte has to come from the disk once: for no rank the whole of what is divided."""
    directory = write(tmp_path, random_tensors(spec))
    times = {name: np.zeros(tensor.shape, int) for name, tensor in open_source(directory).tensors.items()}
    for number in range(parallel.world_size):
        for target in plan_of(directory, spec, parallel, number).targets:
            for copy in target.copies:
                needed = copy.source_view.of(times[copy.source.name])
                needed += 1
    repeats = max(1, parallel.tensor_parallel // spec.num_query_groups)
    for name, found in times.items():
        is_held_by_all = "norm" in name or name.endswith("mlp.gate.weight")
        heads = repeats if name.endswith(("k_proj.weight", "v_proj.weight")) else 1
        assert (found == (parallel.world_size if is_held_by_all else heads)).all(), name


@pytest.mark.parametrize("source", [TRAIN, INFER])
@pytest.mark.parametrize("spec", [SPEC, MOE_SPEC], ids=["dense", "moe"])
def test_a_mindformers_checkpoint_is_read_once(tmp_path, monkeypatch, read, source, spec):
    """Gate and up of an expert are in one tensor, in the order of the network: they are not read apart."""
    monkeypatch.setattr(tiles, "PAGE_BYTES", 1)
    directory = write(tmp_path, random_tensors(spec, dialect=source))
    plan = plan_of(directory, spec, ParallelConfig(), 0, source)
    for target in plan.targets:
        target.make()
    assert sum(read) == plan.source_nbytes == open_source(directory).nbytes
    if source == INFER:
        assert len(read) == len(plan.targets)


@pytest.mark.parametrize("piece_bytes", [4, 8, 50, 1000])
@pytest.mark.parametrize("page_bytes", [1, 64])
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_pieces_of_any_size_make_the_same(tmp_path, monkeypatch, piece_bytes, page_bytes, dtype):
    parallel = ParallelConfig(2, 2)
    for name, spec in (("dense", replace(SPEC, ffn_hidden_size=8)), ("moe", MOE_SPEC)):
        sizes = ParallelConfig(2) if name == "dense" else parallel
        hf = random_tensors(spec, dtype="BF16")
        directory = write(tmp_path / name, hf)
        tensors = open_source(directory).tensors
        plan = make_plan(model_rules(spec), tensors, HF, INFER, dtype, sizes.rank(1))
        whole = {target.name: target.make() for target in plan.targets}
        with monkeypatch.context() as patch:
            patch.setattr(tiles, "TILE_BYTES", piece_bytes)
            patch.setattr(tiles, "PAGE_BYTES", page_bytes)
            for target in plan.targets:
                assert target.make().tobytes() == whole[target.name].tobytes(), target.name


def test_a_group_is_shared_when_there_are_more_ranks_than_kv_heads(tmp_path):
    # 4 query heads and 2 KV heads of head_dim 4 on 4 ranks: a query head each; the first two share KV head 0.
    hf = random_tensors()
    directory = write(tmp_path, hf)
    q, k, v = (hf[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "qkv")
    for number, kv_head in enumerate([0, 0, 1, 1]):
        rules = [
            rule for rule in model_rules(SPEC) if rule.parameter.endswith("layers.0.self_attention.linear_qkv.weight")
        ]
        tensors = {name: info for name, info in open_source(directory).tensors.items() if name in rules[0].tensors}
        plan = make_plan(rules, tensors, HF, INFER, rank=ParallelConfig(4).rank(number))
        rows = slice(4 * kv_head, 4 * kv_head + 4)
        expected = np.concatenate([q[4 * number : 4 * number + 4], k[rows], v[rows]])
        np.testing.assert_array_equal(plan.targets[0].make(), expected)


def test_what_does_not_divide_is_told_at_once():
    spec = ModelSpec(2, 64, 12, 6, 16, 100, 130, False)
    assert [problem.subject for problem in ParallelConfig(8).problems(spec)] == [
        "vocab_size",
        "num_query_groups",
        "num_attention_heads",
        "ffn_hidden_size",
    ]
    assert [p.subject for p in ParallelConfig(2, 2).problems(spec)] == ["expert parallel"]
    moe = replace(MOE_SPEC, num_experts=6, moe_ffn_hidden_size=9)
    assert [p.subject for p in ParallelConfig(2, 3).problems(moe)] == ["expert parallel"]
    assert [p.subject for p in ParallelConfig(4, 4).problems(moe)] == ["num_experts"]
    assert [p.subject for p in ParallelConfig(4, 2).problems(moe)] == ["moe_ffn_hidden_size"]
    assert not list(ParallelConfig(2, 2).problems(moe))


def test_the_sizes_that_are_advised_divide_everything():
    """Not only the number of their own row: 12 heads divide by 4 and 12, a vocabulary of 130 does not."""
    spec = ModelSpec(2, 64, 12, 6, 16, 100, 130, False)
    remedies = {problem.remedy for problem in ParallelConfig(8).problems(spec)}
    assert remedies == {"use a size that divides the whole model: 1, 2"}
    (row,) = ParallelConfig(4, 4).problems(replace(MOE_SPEC, num_experts=6, moe_ffn_hidden_size=9))
    assert row.remedy == "use a size that divides the whole model: none; change the other size"  # 9 rows by 2 or 4


@pytest.mark.parametrize("size", [2, 4, 8])
def test_all_released_models_divide(size: int):
    """As docs/troubleshooting.md says."""
    for spec in RELEASED.values():
        assert not list(ParallelConfig(tensor_parallel=size).problems(spec))


@pytest.mark.parametrize(("role", "expected"), [("MS_WORKER", 8), ("MS_SCHED", 8), (None, 1)])
def test_the_number_of_processes_is_what_msrun_started(monkeypatch, role, expected):
    """Without its scheduler, which runs the script as well, the others would wait for ever."""
    for name, value in {"MS_ROLE": role, "MS_WORKER_NUM": "8" if role else None, "RANK_SIZE": "3"}.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    assert num_processes() == expected


def test_places_of_eight_ranks():
    """As ``initialize_model_parallel`` assigns them: the ranks of one expert are neighbours."""
    ranks = [ParallelConfig(8, 2).rank(number) for number in range(8)]
    assert [rank.tensor_rank for rank in ranks] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert [rank.expert_rank for rank in ranks] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [rank.expert_tensor_rank for rank in ranks] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert all(rank.rotates_router for rank in ranks)
    shared = ParallelConfig(2, 4, data_parallel=2)
    assert not shared.rank(0).rotates_router  # all-to-all sends tokens to experts by their numbers
    assert [shared.rank(number).tensor_rank for number in range(4)] == [0, 1, 0, 1]


def load(plan: Plan) -> None:
    """What a process does that loads its share: each parameter once, and a look at the values."""
    with Transfer() as transfer:
        seen = {t.name: transfer.fill(np.empty(t.shape, DTYPES[t.dtype]), t.copies) for t in plan.targets}
    check_values(seen, plan)


def shares_of(directory: Path, number: int) -> Iterator[Plan]:
    """What rank ``number`` of two loads: of the inference network, and of the training network."""
    yield plan_of(directory, SPEC, ParallelConfig(2), number)
    rules = list(model_rules(SPEC))
    whole = make_plan(rules, open_source(directory).tensors, HF, TRAIN)
    yield write_slices(whole, dict(training_ranks.boxes(rules, TRAIN, ParallelConfig(2), number)))


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight"])
def test_a_slice_of_zeros_is_no_tensor_of_zeros(tmp_path, name):
    """Rows of tokens that nobody uses may fill a rank's slice; every rank judges the whole tensor."""
    tensors = random_tensors()
    tensors[name][len(tensors[name]) // 2 :] = 0
    write(tmp_path / "half", tensors)
    tensors[name][...] = 0
    write(tmp_path / "all", tensors)
    for number in range(2):
        for plan in shares_of(tmp_path / "half", number):
            load(plan)
        for plan in shares_of(tmp_path / "all", number):
            with pytest.raises(BridgeError, match=f"(?s)all zero: {name}"):
                load(plan)


def test_a_slice_with_a_nan_is_refused(tmp_path):
    tensors = random_tensors()
    tensors["model.embed_tokens.weight"][-1, -1] = np.nan
    write(tmp_path, tensors)
    for plan in shares_of(tmp_path, 0):
        load(plan)  # it is in the other's
    for plan in shares_of(tmp_path, 1):
        with pytest.raises(BridgeError, match="NaN or infinity"):
            load(plan)
