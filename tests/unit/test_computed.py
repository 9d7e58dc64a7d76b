"""Tensors that are computed: whatever region is read, however it is cut, its elements are those of the whole."""

from __future__ import annotations

from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mf_qwen3_bridge.convert.run import Part
from mf_qwen3_bridge.inputs.opening import open_source
from mf_qwen3_bridge.model.layouts import Layout
from mf_qwen3_bridge.model.parallel import ParallelConfig
from mf_qwen3_bridge.model.rules import HF, HF_STACKED, INFER, TRAIN, Dialect, model_rules
from mf_qwen3_bridge.transfer import blocks, copying
from mf_qwen3_bridge.transfer import tiles as tiles_module
from mf_qwen3_bridge.transfer.adapted import Adapted, LowRank, LowRankEmbedding, LowRankOfExpert, Stacked, adapted
from mf_qwen3_bridge.transfer.blocks import regions
from mf_qwen3_bridge.transfer.copying import Transfer, have_equal_bytes
from mf_qwen3_bridge.transfer.plan import make_plan
from mf_qwen3_bridge.transfer.safetensors import Reader, TensorInfo
from tests.support.checkpoints import MOE_SPEC, SPEC, random_tensors, write

TARGETS = [HF, HF_STACKED, INFER, TRAIN, Dialect(Layout(True, False)), Dialect(Layout(False, True))]


@dataclass(frozen=True)
class Plus:
    """The sum of two tensors: no bits of it are in either."""

    left: TensorInfo
    right: TensorInfo

    @property
    def tensors(self):
        return self.left, self.right

    def region(self, rows, columns, read):
        left, right = (read(tensor, rows, columns) for tensor in self.tensors)
        assert left.shape == right.shape == (len(rows), columns[1] - columns[0])
        return left.astype(np.float32) + right.astype(np.float32)


def add(directory, spec, dialect, dtype="F32"):
    """Tensors of a model that are sums, and their values."""
    left, right = (random_tensors(spec, dialect, seed=seed) for seed in (1, 2))
    stored = write(directory, {f"{name}#l": v for name, v in left.items()} | {f"{n}#r": v for n, v in right.items()})
    on_disk = open_source(stored).tensors
    tensors = {
        name: replace(
            on_disk[f"{name}#l"],
            name=name,
            dtype=dtype,
            computed=Plus(on_disk[f"{name}#l"], on_disk[f"{name}#r"]),
        )
        for name in left
    }
    return tensors, {name: left[name] + right[name] for name in left}


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    target=st.sampled_from(TARGETS),
    is_moe=st.booleans(),
    dtype=st.sampled_from(["BF16", "F16", "F32", None]),
    rank=st.integers(0, 1),
    is_parallel=st.booleans(),
    sizes=st.tuples(st.sampled_from([64, 300, 1 << 20]), st.sampled_from([1, 7, 1 << 20]), st.sampled_from([1, 4096])),
)
def test_any_plan_of_sums(tmp_path_factory, target, is_moe, dtype, rank, is_parallel, sizes):
    spec = MOE_SPEC if is_moe else SPEC
    tensors, values = add(tmp_path_factory.mktemp("sums"), spec, HF, "BF16")
    number = ParallelConfig(2).rank(rank) if is_parallel and target == INFER else ParallelConfig().rank(0)
    plan = make_plan(model_rules(spec), tensors, HF, target, dtype, number)
    whole = write(tmp_path_factory.mktemp("whole"), values)
    expected = make_plan(model_rules(spec), open_source(whole).tensors, HF, target, dtype or "BF16", number)
    tile_bytes, elements, page = sizes
    with pytest.MonkeyPatch.context() as patch, Transfer() as transfer:
        patch.setattr(tiles_module, "TILE_BYTES", tile_bytes)
        patch.setattr(blocks, "_REGION_ELEMENTS", elements)
        patch.setattr(copying, "PAGE_BYTES", page)
        for made, wanted in zip(plan.targets, expected.targets, strict=True):
            assert made.make(transfer).tobytes() == wanted.make().tobytes(), made.name  # rounded once


def test_what_does_not_fill_whole_rows_is_read_as_well(tmp_path):
    tensors, values = add(tmp_path, SPEC, HF)
    tensor, value = tensors["model.embed_tokens.weight"], values["model.embed_tokens.weight"].reshape(-1)
    with Transfer() as transfer:
        for start, size in [(0, value.size), (3, 2), (3, 4 * tensor.width), (tensor.width, tensor.width), (1, 1)]:
            out = np.empty(size, np.float32)
            transfer.read(tensor, start, out)
            assert np.array_equal(out, value[start : start + size])


def test_a_computed_tensor_of_a_computed_one(tmp_path):
    tensors, values = add(tmp_path, SPEC, HF, "BF16")
    name = "model.layers.0.mlp.up_proj.weight"
    twice = replace(tensors[name], computed=Plus(tensors[name], tensors[name]))
    rounded = values[name].astype(ml_dtypes.bfloat16).astype(np.float32)
    out = np.empty(values[name].shape, ml_dtypes.bfloat16)
    with Transfer() as transfer:
        transfer.read(twice, 0, out)
    assert out.tobytes() == (rounded + rounded).astype(ml_dtypes.bfloat16).tobytes()
    assert have_equal_bytes(twice, twice) and not have_equal_bytes(twice, tensors[name])


def test_regions_of_runs():
    out = np.empty((2, 3), np.int8)
    assert [(r.tolist(), c) for (r, c), _ in regions(np.array([1, 5]), out, 4)] == [([0, 1], (1, 4))]
    assert [(r.tolist(), c) for (r, c), _ in regions(np.array([2, 9]), out, 4)] == [
        ([0], (2, 4)),
        ([1], (0, 1)),
        ([2], (1, 4)),
    ]


def test_files_and_recipes_of_a_job_name_what_is_computed(tmp_path):
    tensors, _ = add(tmp_path, SPEC, HF)
    far = {name: replace(tensor, file=tmp_path / "elsewhere") for name, tensor in tensors.items()}
    plan = make_plan(model_rules(SPEC), far, HF, INFER)
    other = {name: replace(t, computed=Plus(t.computed.right, t.computed.left)) for name, t in far.items()}
    part, swapped = (Part.of(p, []) for p in (plan, make_plan(model_rules(SPEC), other, HF, INFER)))
    assert part.sources == {tmp_path / "elsewhere", *tmp_path.glob("*.safetensors")}
    assert part.recipes != swapped.recipes


def test_a_low_rank_update(tmp_path):
    base, a, b = np.eye(2, 3, dtype=np.float32), np.float32([[1, 2, 3]]), np.float32([[1], [10]])
    on_disk = open_source(write(tmp_path, {"base": base, "a": a, "b": b})).tensors
    tensor = adapted(on_disk["base"], LowRank(on_disk["a"], on_disk["b"], 2.0))
    whole, part = np.empty((2, 3), np.float32), np.empty(2, np.float32)
    with Transfer() as transfer:
        transfer.read(tensor, 0, whole)
        transfer.read(tensor, 4, part)
    assert whole.tolist() == [[3, 4, 6], [20, 41, 60]]
    assert part.tolist() == [41, 60]


UPDATES = ("linear", "embedding", "expert", "stacked", "dora")


def updated(tensors, kind):
    """A tensor of 40 rows and 1030 columns, two blocks of a product wide, with each kind of update."""
    a, b = tensors["a"], tensors["b"]
    if kind == "embedding":
        return adapted(tensors["base"], LowRankEmbedding(tensors["b.T"], tensors["a.T"], 0.5))
    if kind == "expert":
        return adapted(tensors["base"], LowRankOfExpert(tensors["a2"], tensors["b2"], 0.5, 2, 1, 0, 40))
    if kind == "stacked":
        half = LowRank(a, tensors["b.half"], 0.5)
        return adapted(tensors["base"], Stacked((half, None), 20), LowRank(a, b, 1.5))
    magnitude = tensors["m"] if kind == "dora" else None
    return replace(tensors["base"], computed=Adapted(tensors["base"], (LowRank(a, b, 0.5),), magnitude))


def in_numpy(values, kind):
    a, b, base = (values[name].astype(np.float64) for name in ("a", "b", "base"))
    if kind == "expert":
        a2, b2 = values["a2"].astype(np.float64), values["b2"].astype(np.float64)
        return base + 0.5 * np.einsum("ore,eri->eoi", b2.reshape(40, -1, 2), a2.reshape(2, -1, 1030))[1]
    if kind == "stacked":
        half = np.zeros_like(base)
        half[:20] = 0.5 * values["b.half"].astype(np.float64) @ a
        return base + half + 1.5 * b @ a
    merged = base + 0.5 * b @ a
    return merged * (values["m"] / np.linalg.norm(merged, axis=1))[:, None] if kind == "dora" else merged


@pytest.fixture(scope="module")
def factors(tmp_path_factory):
    random = np.random.default_rng(0)
    shapes = {"base": (40, 1030), "a": (5, 1030), "b": (40, 5), "b.half": (20, 5), "a2": (10, 1030), "b2": (40, 10)}
    values = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    values |= {name + ".T": np.ascontiguousarray(values[name].T) for name in ("a", "b")}
    values["m"] = random.uniform(1, 2, 40).astype(np.float32)
    return values, open_source(write(tmp_path_factory.mktemp("factors"), values)).tensors


@pytest.mark.parametrize("kind", UPDATES)
def test_updates_are_those_of_numpy(factors, kind):
    values, tensors = factors
    whole = np.empty((40, 1030), np.float32)
    with Transfer() as transfer:
        transfer.read(updated(tensors, kind), 0, whole)
    np.testing.assert_allclose(whole, in_numpy(values, kind), rtol=0, atol=2e-5)


@settings(deadline=None, max_examples=60)
@given(kind=st.sampled_from(UPDATES), data=st.data())
def test_an_element_does_not_depend_on_the_region(factors, kind, data):
    """A single row, a single column, or whatever else: BLAS takes other ways for matrices of other shapes."""
    tensor, whole = updated(factors[1], kind), np.empty((40, 1030), np.float32)
    rows = np.array(sorted(data.draw(st.sets(st.integers(0, 39), min_size=1))))
    start = data.draw(st.integers(0, 1029))
    columns = start, data.draw(st.integers(start + 1, 1030))
    with Transfer() as transfer:
        transfer.read(tensor, 0, whole)
    with Transfer() as transfer:
        region = transfer._read_region(tensor, rows, columns, np.dtype(np.float32))
    assert region.tobytes() == np.ascontiguousarray(whole[rows, columns[0] : columns[1]]).tobytes()


def test_what_is_needed_again_is_read_once(factors, monkeypatch):
    """A is read for each region of a few rows, and B of stacked experts for each expert."""
    monkeypatch.setattr(blocks, "_REGION_ELEMENTS", 2 * 1030)
    seen: list[str] = []
    upstream = Reader.read

    def spy(reader, tensor, start, out):
        seen.append(tensor.name)
        upstream(reader, tensor, start, out)

    monkeypatch.setattr(Reader, "read", spy)
    for kind in ("linear", "expert", "dora"):
        with Transfer() as transfer:
            transfer.read(updated(factors[1], kind), 0, np.empty((40, 1030), np.float32))
        kept = {"linear": ["a"], "expert": ["a2", "b2"], "dora": ["a", "m"]}[kind]
        assert all(seen.count(name) == 1 for name in kept), seen
        assert seen.count("base") == (40 if kind == "dora" else 20)
        seen.clear()


def test_little_is_kept(monkeypatch):
    monkeypatch.setattr(copying, "_KEPT_BYTES", 100)
    kept = copying.KeptRegions()
    reads = []

    def get(number, size):
        return kept.get(number, lambda: reads.append(number) or np.zeros(size, np.int8))

    for number, size in [(1, 40), (2, 40), (1, 40), (3, 40), (2, 40), (4, 400), (4, 400)]:
        assert len(get(number, size)) == size
    assert reads == [1, 2, 3, 2, 4]
