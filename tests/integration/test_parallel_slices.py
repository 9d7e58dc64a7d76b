"""Every rank's part of every parameter, bit for bit what upstream's own ``weight_loader`` functions put there.

One process plays each rank in turn: upstream's ``initialize_model_parallel`` makes the groups for a world of that size
and that rank, and its network is built for them; only what would talk to other processes is left out.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from mindformers.parallel_core.inference import parallel_state
from mindformers.parallel_core.inference.model_utils import InferModelMixin

from mf_qwen3_bridge.errors import BridgeError
from mf_qwen3_bridge.inputs.preflight import check
from mf_qwen3_bridge.mindformers.load import load_network
from mf_qwen3_bridge.mindformers.network import build_inference_network, rank_of
from mf_qwen3_bridge.model.parallel import ParallelConfig
from mf_qwen3_bridge.model.rules import INFER
from tests.support.checkpoints import hf_config, random_tensors, write
from tests.support.networks import DENSE, MOE, bits, empty_network, playing

SPECS = {
    "dense": DENSE,
    "dense tied": replace(DENSE, tie_word_embeddings=True),
    "dense MHA": replace(DENSE, num_query_groups=8),
    "moe": MOE,
    "moe 4 KV heads": replace(MOE, num_query_groups=4),
}
TENSOR_PARALLEL = [ParallelConfig(size) for size in (2, 4, 8)]
EXPERT_PARALLEL = [
    *(ParallelConfig(tp, ep) for tp, ep in ((2, 2), (4, 2), (4, 4), (8, 2), (8, 4))),
    *(ParallelConfig(tp, ep, dp) for tp, ep, dp in ((1, 2, 2), (1, 4, 4), (2, 2, 2), (2, 4, 2), (1, 1, 2), (2, 1, 2))),
]
CASES = [
    *((name, parallel) for name in SPECS for parallel in TENSOR_PARALLEL),
    *((name, parallel) for name, spec in SPECS.items() if spec.is_moe for parallel in EXPERT_PARALLEL),
]


@pytest.mark.parametrize(("name", "parallel"), CASES, ids=lambda value: str(value).replace("_parallel", ""))
def test_every_rank_holds_what_upstream_gives_it(monkeypatch, tmp_path: Path, name, parallel):
    spec = SPECS[name]
    directory = write(tmp_path, random_tensors(spec), hf_config(spec))
    ranks = {parallel.rank(number) for number in range(parallel.world_size)}
    for number in range(parallel.world_size):
        rank = parallel.rank(number)
        if rank not in ranks:
            continue  # data parallel: the same as another one
        ranks.discard(rank)
        with playing(monkeypatch, parallel, number):
            upstream, model = empty_network(directory)
            assert rank_of(upstream) == rank
            InferModelMixin.load_weights(upstream, str(directory))
            direct, _ = empty_network(directory)
            load_network(direct, model)
            assert bits(direct) == bits(upstream)
            delegated, _ = empty_network(directory)
            load_network(delegated, model, use_training_conversion=True)
            assert bits(delegated) == bits(upstream)
    assert not ranks


@pytest.mark.parametrize(
    ("spec", "parallel", "stages", "offset"),
    [
        (replace(DENSE, num_layers=5), ParallelConfig(2), 2, 0),
        (replace(DENSE, num_layers=5), ParallelConfig(), 3, [0, 2, 0]),
        (replace(MOE, num_layers=3), ParallelConfig(2, 2), 2, 0),
        (MOE, ParallelConfig(1, 1, 2), 2, 0),
    ],
    ids=["tensor parallel", "layers divided by hand", "expert parallel", "data parallel"],
)
def test_every_stage_holds_what_upstream_gives_it(monkeypatch, tmp_path: Path, spec, parallel, stages, offset):
    """As vLLM-MindSpore asks for pipeline parallel; MindFormers can't build a tied model so."""
    directory = write(tmp_path, random_tensors(spec), hf_config(spec))
    model = check(directory)
    held: set[str] = set()
    for number in range(parallel.world_size * stages):
        with playing(monkeypatch, parallel, number, stages):
            stage = parallel_state.get_pipeline_model_parallel_rank()
            config = {"pre_process": stage == 0, "post_process": stage == stages - 1, "offset": offset}
            upstream, direct, delegated = (build_inference_network(model.hf_config | config) for _ in range(3))
            InferModelMixin.load_weights(upstream, str(directory))
            load_network(direct, model)
            assert bits(direct) == bits(upstream)
            load_network(delegated, model, use_training_conversion=True)
            assert bits(delegated) == bits(upstream)
            held |= bits(direct).keys()
    assert held == {target.name for target in model.plan(INFER).targets}


def test_the_routers_order_is_the_networks_own(monkeypatch, tmp_path: Path):
    """A config may ask for all-to-all where the sizes don't: then no router begins with its own experts."""
    directory = write(tmp_path, random_tensors(MOE), hf_config(MOE))
    model = check(directory)
    with playing(monkeypatch, ParallelConfig(2, 2), 1):
        upstream, direct, rotated = (
            build_inference_network(model.hf_config | {"use_alltoall": flag}) for flag in (True, True, False)
        )
        InferModelMixin.load_weights(upstream, str(directory))
        load_network(direct, model)
        load_network(rotated, model)
        assert bits(direct) == bits(upstream) != bits(rotated)


@pytest.mark.parametrize("is_delegated", [False, True], ids=["direct", "delegated"])
def test_a_rank_whose_tokens_nobody_uses(monkeypatch, tmp_path: Path, is_delegated):
    """Its slice of the embedding is zero, as the whole may not be: all ranks give the same answer."""
    tensors = random_tensors(DENSE)
    for rows, is_refused in ((DENSE.vocab_size // 2, False), (0, True)):
        tensors["model.embed_tokens.weight"][rows:] = 0
        directory = write(tmp_path / str(rows), tensors, hf_config(DENSE))
        for number in range(2):
            with playing(monkeypatch, ParallelConfig(2), number):
                network, model = empty_network(directory)
                if is_refused:
                    with pytest.raises(BridgeError, match=r"all zero: model\.embed_tokens"):
                        load_network(network, model, use_training_conversion=is_delegated)
                else:
                    load_network(network, model, use_training_conversion=is_delegated)
